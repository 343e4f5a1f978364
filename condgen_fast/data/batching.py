"""From encoded text to padded batches of about equal numbers of tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from condgen_fast._check import check_number

T = TypeVar("T")


class Encoder(Protocol):
    """What `ParallelDataset.encode` needs of a vocabulary."""

    pad_id: int
    bos_id: int
    eos_id: int

    def encode(self, lines: list[str]) -> list[list[int]]: ...


def pad_sequences(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Rows of ids of different lengths as one int64 tensor [B, T], padded on the right.

    T is the longest row's length; no rows give [0, 0].

    Equivalent to `torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], True, pad_id)`.
    """
    padded = np.full((len(rows), max(map(len, rows), default=0)), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


def windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` items, the last one shorter: a stream in parts that can be sorted by length."""
    check_number(size, "size", minimum=1, integer=True)
    items = iter(items)
    while window := list(islice(items, size)):
        yield window


class TokenRows(Sequence[list[int]]):
    """A read-only list of lists of ids in one flat int32 array: 4 bytes a token, where Python lists take about 40."""

    def __init__(self, rows: Sequence[Sequence[int]] = ()):
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        self._ids = np.fromiter((i for row in rows for i in row), dtype=np.int32, count=int(self.lengths.sum()))

    @classmethod
    def concatenate(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """The rows of all parts, in order."""
        whole = cls()
        if parts:
            whole.lengths = np.concatenate([part.lengths for part in parts])
            whole._ends = np.cumsum(whole.lengths)
            whole._ids = np.concatenate([part._ids for part in parts])
        return whole

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[int]:
        end = self._ends[index]
        return self._ids[end - self.lengths[index] : end].tolist()


@dataclass(frozen=True)
class ParallelBatch:
    """Padded sentence pairs; ids are int64."""

    source: Tensor  # [B, S], each row ends with eos
    source_lengths: Tensor  # [B] int64, eos counted
    target: Tensor  # [B, T], each row is bos … eos
    target_lengths: Tensor  # [B] int64, bos and eos counted
    indices: Tensor  # [B] int64, the pairs' places in their data set

    def to(self, device: torch.device | str) -> ParallelBatch:
        """The same batch on another device."""
        return ParallelBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class ParallelDataset:
    """Encoded sentence pairs.

    `source` and `target` hold ids without bos and eos; `source_lengths` and `target_lengths` (numpy int64, [N]) are
    lengths as they stand in a batch: a source with its eos, a target with its bos and eos. `lines` (numpy int64, [N])
    are the places in the text that `encode` read, from 0.
    """

    def __init__(
        self,
        source: Sequence[Sequence[int]],
        target: Sequence[Sequence[int]],
        *,
        pad_id: int = 0,
        bos_id: int = 2,
        eos_id: int = 3,
    ):
        if len(source) != len(target):
            raise ValueError(f"source and target must have the same length; got {len(source)} and {len(target)}")
        self.source = source if isinstance(source, TokenRows) else TokenRows(source)
        self.target = target if isinstance(target, TokenRows) else TokenRows(target)
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id
        self.source_lengths = self.source.lengths + 1
        self.target_lengths = self.target.lengths + 2
        self.lines = np.arange(len(self.source))

    @classmethod
    def encode(
        cls, source: Sequence[str], target: Sequence[str], vocabulary: Encoder, *, max_length: int | None = None
    ) -> ParallelDataset:
        """Encode line-aligned text, leaving out pairs with an empty side and pairs that are too long.

        A pair is too long when either side, its eos counted, has more than `max_length` tokens. How many pairs were
        left out is logged as a warning.
        """
        if len(source) != len(target):
            raise ValueError(f"source and target must have the same length; got {len(source)} and {len(target)}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be at least 2; got {max_length}")
        empty = long = 0
        sources, targets, lines = [], [], []
        for start in range(0, len(source), 10_000):  # a part at a time: as Python lists the ids of a corpus are large
            part = slice(start, start + 10_000)
            pairs = []
            both = zip(vocabulary.encode(list(source[part])), vocabulary.encode(list(target[part])), strict=True)
            for line, pair in enumerate(both, start):
                if not all(pair):
                    empty += 1
                elif max_length is not None and max(map(len, pair)) >= max_length:
                    long += 1
                else:
                    pairs.append(pair)
                    lines.append(line)
            sources.append(TokenRows([a for a, _ in pairs]))
            targets.append(TokenRows([b for _, b in pairs]))
        if empty or long:
            logging.getLogger(__name__).warning(
                "%d of %d pairs left out: %d with an empty side, %d with more than %s tokens",
                empty + long, len(source), empty, long, max_length,
            )  # fmt: skip
        data = cls(
            TokenRows.concatenate(sources), TokenRows.concatenate(targets),
            pad_id=vocabulary.pad_id, bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id,
        )  # fmt: skip
        data.lines = np.array(lines, dtype=np.int64)
        return data

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: Sequence[int]) -> ParallelBatch:
        """The pairs at these places as one padded batch, in this order."""
        source = [[*self.source[i], self.eos_id] for i in indices]
        target = [[self.bos_id, *self.target[i], self.eos_id] for i in indices]
        return ParallelBatch(
            source=pad_sequences(source, self.pad_id),
            source_lengths=torch.tensor([len(row) for row in source], dtype=torch.int64),
            target=pad_sequences(target, self.pad_id),
            target_lengths=torch.tensor([len(row) for row in target], dtype=torch.int64),
            indices=torch.tensor(list(indices), dtype=torch.int64),
        )


def token_batches(
    source_lengths: Sequence[int] | np.ndarray,  # [N]
    target_lengths: Sequence[int] | np.ndarray,  # [N]
    *,
    max_tokens: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[int]]:
    """One rank's batches of an epoch, as lists of indices: pairs of similar length together, in random order.

    In every batch, pairs × the longest side of any of them is at most `max_tokens`; a pair longer than that is a batch
    of its own. Every pair is in exactly one batch of one rank, but for as many repeated batches as give every rank the
    same number. The result depends on lengths, `seed` and `epoch` alone. With `shuffle=False` batches come in the
    order of length.
    """
    source_lengths, target_lengths = np.asarray(source_lengths), np.asarray(target_lengths)
    if source_lengths.ndim != 1 or source_lengths.shape != target_lengths.shape:
        raise ValueError(
            "source_lengths and target_lengths must have the same shape [N];"
            f" got {list(source_lengths.shape)} and {list(target_lengths.shape)}"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1; got {max_tokens}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}); got {rank}")
    random = np.random.default_rng((seed, epoch))
    longest = np.maximum(source_lengths, target_lengths)
    # Noise lets neighbours change from epoch to epoch, at the price of a little padding.
    noise = random.uniform(0.95, 1.05, len(longest)) if shuffle else 1.0
    # Among pairs of one length the shorter side decides, so that it is padded little as well.
    order = np.lexsort((np.minimum(source_lengths, target_lengths) * noise, np.round(longest * noise)))

    batches: list[list[int]] = []
    batch: list[int] = []
    width = 0
    for index, length in zip(order.tolist(), longest[order].tolist(), strict=True):
        width = max(width, length)
        if batch and width * (len(batch) + 1) > max_tokens:
            batches.append(batch)
            batch, width = [], length
        batch.append(index)
    if batch:
        batches.append(batch)

    if shuffle:
        batches = [batches[i] for i in random.permutation(len(batches))]
    shares = -(-len(batches) // world_size)
    return list(islice(cycle(batches), rank, shares * world_size, world_size))
