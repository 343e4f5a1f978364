"""The k most probable tokens of a distribution in 25 bits each: 200 bytes at k = 64.

Ids are sorted, which leaves about 2 + log2(V / k) bits of each (Elias 1974, Fano 1971): the low ones as they are, of
the high ones a bitmap in which the r-th one stands at place `high + r`. What remains of the 25 bits is the logarithm of
the probability, 14 bits of it at V = 32000 and 12 at 128256, in steps of its square root: the more probable, the finer.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BITS = 25
DECODED_AT_ONCE = 256
"""records whose temporaries stay in the cache"""
FEWEST_LOG_PROB_BITS = 11
"""more than 25 bits a token where whole bytes of a few ids leave less"""
LOWEST = 24.0
"""-log of the smallest probability that is not stored as 0, 4e-11"""


class TopKRecords:
    """Encodes and decodes records of k tokens out of V.

    `size` is the bytes of a record. A log-probability l comes back within `step * sqrt(-l) + step**2 / 4`, below
    -LOWEST as -inf; ids come back exactly, in ascending order.
    """

    def __init__(self, k: int, vocab_size: int):
        self.k, self.vocab_size = k, vocab_size
        self.low_bits = max(0, (vocab_size // k).bit_length() - 1)
        self._map_bytes = -(-(k + ((vocab_size - 1) >> self.low_bits)) // 8)
        remaining = BITS * k - 8 * self._map_bytes - 8 * _packed_bytes(k, self.low_bits)
        self.log_prob_bits = max(FEWEST_LOG_PROB_BITS, min(16, remaining // k))
        self._low_end = self._map_bytes + _packed_bytes(k, self.low_bits)
        self.size = self._low_end + _packed_bytes(k, self.log_prob_bits)
        self._codes = 2**self.log_prob_bits - 1  # the last one is -inf
        self.step = LOWEST**0.5 / (self._codes - 1)
        code = np.arange(self._codes + 1, dtype=np.float64)
        self._values = (-((code * self.step) ** 2)).astype(np.float32)
        self._values[self._codes] = -np.inf

    def encode(self, ids: Tensor, log_probs: Tensor) -> np.ndarray:
        """ids [n, k] integer, distinct in a row and in [0, V); log_probs [n, k] <= 0 -> records [n, size] uint8."""
        order = ids.argsort(-1)
        ids = ids.gather(-1, order).cpu().numpy()
        logs = log_probs.double().gather(-1, order).cpu().numpy()
        n = len(ids)
        if n and not (ids[:, 0].min() >= 0 and ids[:, -1].max() < self.vocab_size and (np.diff(ids) > 0).all()):
            raise ValueError(f"ids must be distinct in a row and in [0, {self.vocab_size})")
        if np.isnan(logs).any():
            raise ValueError("log_probs must not be NaN")
        bitmap = np.zeros((n, 8 * self._map_bytes), np.uint8)
        np.put_along_axis(bitmap, (ids >> self.low_bits) + np.arange(self.k), 1, axis=1)
        distance = np.maximum(-logs, 0)
        codes = np.where(
            distance > LOWEST, self._codes, np.rint(np.sqrt(np.minimum(distance, LOWEST)) / self.step)
        ).astype(np.int64)
        low = ids & ((1 << self.low_bits) - 1)
        parts = [np.packbits(bitmap, axis=1), _pack(low, self.low_bits), _pack(codes, self.log_prob_bits)]
        return np.concatenate(parts, axis=1)

    def decode(self, records: np.ndarray) -> tuple[Tensor, Tensor]:
        """records [n, size] uint8 -> ids [n, k] int64 and log_probs [n, k] float32."""
        ids = np.empty((len(records), self.k), np.int64)
        log_probs = np.empty((len(records), self.k), np.float32)
        for first in range(0, len(records), DECODED_AT_ONCE):
            part = slice(first, first + DECODED_AT_ONCE)
            ids[part], log_probs[part] = self._decode(records[part])
        return torch.from_numpy(ids), torch.from_numpy(log_probs)

    def _decode(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = len(records)
        places = np.flatnonzero(np.unpackbits(records[:, : self._map_bytes], axis=1))
        if len(places) != n * self.k:
            raise ValueError("records are damaged: a bitmap of ids has not k ones")
        high = places.reshape(n, self.k) - np.arange(n)[:, None] * (8 * self._map_bytes) - np.arange(self.k)
        ids = high << self.low_bits
        if self.low_bits:
            ids |= _unpack(records[:, self._map_bytes : self._low_end], self.k, self.low_bits)
        return ids, self._values[_unpack(records[:, self._low_end :], self.k, self.log_prob_bits)]


def _packed_bytes(count: int, bits: int) -> int:
    return bits // 8 * count + bits % 8 * -(-count // 8)


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """[n, count] integers of so many bits -> [n, bytes]: whole bytes of all, then single bits of all."""
    n, count = values.shape
    parts = [((values >> shift) & 255).astype(np.uint8) for shift in range(0, bits // 8 * 8, 8)]
    parts += [np.packbits((values >> bit) & 1, axis=1) for bit in range(bits // 8 * 8, bits)]
    return np.concatenate(parts, axis=1) if parts else np.empty((n, 0), np.uint8)


def _unpack(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    """What `_pack` packed, as int32."""
    values = np.zeros((len(data), count), np.int32)
    first = 0
    for shift in range(0, bits // 8 * 8, 8):
        values |= data[:, first : first + count].astype(np.int32) << shift
        first += count
    width = -(-count // 8)
    for bit in range(bits // 8 * 8, bits):
        values |= np.unpackbits(data[:, first : first + width], axis=1, count=count).astype(np.int32) << bit
        first += width
    return values
