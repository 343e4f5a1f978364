"""Toy fill and edit models whose behaviour is written down, so that every step of a refinement is predictable."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from condgen_fast.decode.unattended import Running

PAD, UNK, BOS, EOS, MASK, FIRST = 0, 1, 2, 3, 4, 5  # ordinary tokens start at FIRST; UNK is ordinary too
Canvas = list[int]


def sure(token: int, probability: float, vocab_size: int) -> list[float]:
    """Logits that give `token` that probability and share the rest among the other ordinary tokens."""
    others = [t for t in range(vocab_size) if t not in (PAD, BOS, EOS, MASK, token)]
    rest = math.log((1 - probability) / len(others)) if probability < 1 else -math.inf
    row = [-math.inf] * vocab_size
    for other in others:
        row[other] = rest
    row[token] = math.log(probability)
    return row


class ScriptedModel:
    """A Fill and Edit model of Python functions on single canvases.

    `source[b, 0]` is the sentence's number, handed to every function beside the canvas (bos … eos, no padding).
    fill(sentence, canvas) -> [(token, probability)] per position; delete(sentence, canvas) -> [bool] per position;
    insert(sentence, canvas) -> [int] per slot; lengths(sentence) -> {length: probability}. `calls` counts the calls of
    each method, `canvases` keeps every canvas that was shown to `fill`, `rows_seen` how many each time.
    """

    pad_id, bos_id, eos_id, mask_id = PAD, BOS, EOS, MASK

    def __init__(
        self,
        vocab_size: int,
        *,
        fill: Callable[[int, Canvas], list[tuple[int, float]]],
        lengths: Callable[[int], dict[int, float]] | None = None,
        delete: Callable[[int, Canvas], list[bool]] | None = None,
        insert: Callable[[int, Canvas], list[int]] | None = None,
        max_insert: int = 15,
        lengths_scored: int = 40,
        max_positions: int | None = None,
    ):
        self.vocab_size, self.max_insert, self.lengths_scored = vocab_size, max_insert, lengths_scored
        self._fill, self._lengths, self._delete, self._insert = fill, lengths, delete, insert
        if max_positions is not None:
            self.max_positions = max_positions
        self.calls = {"encode": 0, "select": 0, "delete": 0, "insert": 0, "fill": 0}
        self.canvases: list[tuple[int, Canvas]] = []
        self.rows_seen: list[int] = []

    def encode(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        self.calls["encode"] += 1
        assert (source_lengths > 0).all()
        return source[:, 0]

    def select(self, memory: Tensor, rows: Tensor) -> Tensor:
        self.calls["select"] += 1
        return memory[rows]

    def length_logits(self, memory: Tensor) -> Tensor:
        table = torch.full((len(memory), self.lengths_scored), -torch.inf)
        for b, sentence in enumerate(memory.tolist()):
            for length, probability in self._lengths(sentence).items():
                table[b, length] = math.log(probability)
        return table

    def _rows(self, tokens: Tensor, memory: Tensor) -> list[tuple[int, Canvas]]:
        assert tokens.shape[0] == memory.shape[0], "a canvas tensor has as many rows as its memory"
        if hasattr(self, "max_positions"):
            assert tokens.shape[1] <= self.max_positions, "beyond the position table"
        rows = []
        for sentence, row in zip(memory.tolist(), tokens.tolist(), strict=True):
            canvas = [t for t in row if t != PAD]
            assert row[: len(canvas)] == canvas, "padding inside a canvas"
            assert canvas[0] == BOS and canvas[-1] == EOS and not {BOS, EOS} & set(canvas[1:-1])
            rows.append((sentence, canvas))
        return rows

    def fill(self, tokens: Tensor, memory: Tensor) -> Tensor:
        self.calls["fill"] += 1
        rows = self._rows(tokens, memory)
        self.rows_seen.append(len(rows))
        self.canvases += rows
        logits = torch.full((*tokens.shape, self.vocab_size), torch.nan)  # what is not asked for must not be read
        for b, (sentence, canvas) in enumerate(rows):
            choices = self._fill(sentence, canvas)
            logits[b, : len(canvas)] = torch.tensor([sure(t, p, self.vocab_size) for t, p in choices])
        return logits

    def delete_logits(self, tokens: Tensor, memory: Tensor) -> Tensor:
        self.calls["delete"] += 1
        logits = torch.full((*tokens.shape, 2), torch.nan)
        for b, (sentence, canvas) in enumerate(self._rows(tokens, memory)):
            flags = torch.tensor(self._delete(sentence, canvas), dtype=torch.float32)
            logits[b, : len(canvas)] = torch.stack([-flags, flags], dim=1)
        return logits

    def insert_logits(self, tokens: Tensor, memory: Tensor) -> Tensor:
        self.calls["insert"] += 1
        logits = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, self.max_insert + 1)
        logits[..., self.max_insert] = 9.0  # beyond the last slot: a strategy that reads it grows the canvas
        for b, (sentence, canvas) in enumerate(self._rows(tokens, memory)):
            for slot, count in enumerate(self._insert(sentence, canvas)):
                logits[b, slot] = -(torch.arange(self.max_insert + 1) - count).abs().float()
        return logits


class RandomModel:
    """A Fill and Edit model of random tables.

    Every logit depends on the sentence, the position, the length and the tokens on both sides, and on no padding.
    """

    pad_id, bos_id, eos_id, mask_id = PAD, BOS, EOS, MASK

    def __init__(self, vocab_size: int = 17, max_insert: int = 3, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocab_size
        self._token = torch.randn(997, vocab_size, generator=generator)
        self._delete = torch.randn(997, 2, generator=generator)
        self._insert = torch.randn(997, max_insert + 1, generator=generator)
        self._length = torch.randn(997, 12, generator=generator)

    def encode(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        inside = torch.arange(source.shape[1]) < source_lengths[:, None]
        return (source * inside * (torch.arange(source.shape[1]) + 1)).sum(1)

    def select(self, memory: Tensor, rows: Tensor) -> Tensor:
        return memory[rows]

    def length_logits(self, memory: Tensor) -> Tensor:
        return self._length[memory % 997]

    def _context(self, tokens: Tensor, memory: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(tokens, (1, 1), value=PAD)
        position = torch.arange(tokens.shape[1])
        length = (tokens != PAD).sum(1, keepdim=True)
        return memory[:, None] * 31 + padded[:, :-2] * 7 + tokens * 13 + padded[:, 2:] * 17 + position * 5 + length

    def fill(self, tokens: Tensor, memory: Tensor) -> Tensor:
        return self._token[self._context(tokens, memory) % 997]

    def delete_logits(self, tokens: Tensor, memory: Tensor) -> Tensor:
        return self._delete[self._context(tokens, memory) % 997]

    def insert_logits(self, tokens: Tensor, memory: Tensor) -> Tensor:
        return self._insert[self._context(tokens, memory)[:, :-1] % 997]


class SharedStates(RandomModel):
    """The same of a model whose deletion and placeholder head read the same states."""

    capturable = shares_edit_states = True

    def edit_states(self, tokens: Tensor, memory: Tensor) -> Tensor:
        return self._context(tokens, memory)[..., None].double()

    def delete_head(self, states: Tensor) -> Tensor:
        return self._delete[states[..., 0].long() % 997]

    def insert_head(self, states: Tensor) -> Tensor:
        return self._insert[states[:, :-1, 0].long() % 997]


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, or copy to one and wait for that."""

    count = 0

    def __enter__(self):
        self._tolist, self._tensor = Tensor.tolist, torch.tensor
        counted = self

        def tolist(value):
            counted.count += 1
            return counted._tolist(value)

        def tensor(*args, **options):
            counted.count += 1
            return counted._tensor(*args, **options)

        Tensor.tolist, torch.tensor = tolist, tensor
        return super().__enter__()

    def __exit__(self, *error):
        Tensor.tolist, torch.tensor = self._tolist, self._tensor
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


class Lagging(Running):
    """What the host learns of a GPU, on the CPU: `one_behind` is one behind."""

    def one_behind(self, running: Tensor) -> list[bool] | None:
        flags = self.read() if self.asked else None
        self.ask(running.clone())
        return flags
