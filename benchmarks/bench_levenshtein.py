"""The levenshtein family against rapidfuzz and plain torch: pytest benchmarks/bench_levenshtein.py

Tensors in, tensors out, except for rapidfuzz (one thread), which gets lists of lists that are made before the clock
starts and gives its scripts without making labels of them. About 30 % of the tokens differ.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from condgen_fast.ops.levenshtein import apply_edits, edit_distance, edit_oracle

try:
    from rapidfuzz import distance as rapidfuzz
except ImportError:
    rapidfuzz = None

PAD, BOS, EOS, MASK, VOCABULARY = 0, 1, 2, 3, 32000
IDS = {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "mask_id": MASK}
SHAPES = [(256, 32), (64, 128), (16, 512), (1, 4096)]

shapes = pytest.mark.parametrize(("B", "T"), SHAPES, ids=[f"B{B}-T{T}" for B, T in SHAPES])


def pairs(rows: int, length: int, subsequence: bool = False) -> tuple[list[list[int]], list[list[int]]]:
    generator = random.Random(length)
    sources, targets = [], []
    for _ in range(rows):
        target = [generator.randrange(10, VOCABULARY) for _ in range(length - 2)]
        source = []
        for token in target:
            edit = generator.random()
            if edit < (0.3 if subsequence else 0.1):  # deleted
                continue
            source.append(generator.randrange(10, VOCABULARY) if edit < 0.2 and not subsequence else token)
            if 0.2 <= edit < 0.3 and not subsequence:  # inserted
                source.append(generator.randrange(10, VOCABULARY))
        sources.append([BOS, *source, EOS])
        targets.append([BOS, *target, EOS])
    return sources, targets


def padded(rows: list[list[int]], device: str) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows], device=device)


def torch_distance(a: Tensor, b: Tensor, cost: str) -> Tensor:
    """Row by row of the table, whose dependence along a row is a running maximum or minimum."""
    real = b != PAD
    lengths, columns = real.sum(1, keepdim=True), torch.arange(b.shape[1] + 1, device=b.device)
    if cost == "indel":  # LCS[i, j] = max over j' <= j of max(LCS[i-1, j'], LCS[i-1, j'-1] + 1 where equal)
        common = a.new_zeros(len(a), b.shape[1] + 1)
        for i in range(a.shape[1]):
            longer = common[:, :-1] + ((a[:, i, None] == b) & real)
            common[:, 1:] = torch.maximum(common[:, 1:], longer).cummax(1).values
        return (a != PAD).sum(1) + lengths[:, 0] - 2 * common[:, -1]
    row = columns.expand(len(a), -1)  # D[i, j] - j = min over j' <= j of what a deletion or a match gives at j', - j'
    for i in range(a.shape[1]):
        matched = torch.minimum(row[:, 1:] + 1, row[:, :-1] + (a[:, i, None] != b))
        below = (torch.cat([row[:, :1] + 1, matched], 1) - columns).cummin(1).values + columns
        row = torch.where((a[:, i] != PAD)[:, None], below, row)
    return row.gather(1, lengths)[:, 0]


def torch_apply_edits(tokens: Tensor, delete: Tensor, insert: Tensor, width: int) -> Tensor:
    """As Levenshtein Transformer decoding is usually written: a sort to delete, prefix sums and a scatter to insert."""
    keep = (tokens != PAD) & (~delete | (tokens == BOS) | (tokens == EOS))
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    kept = keep.sum(1, keepdim=True)
    column = torch.arange(tokens.shape[1], device=tokens.device)
    packed = tokens.gather(1, order)
    counts = insert * (column[:-1] < kept - 1)
    position = torch.nn.functional.pad(counts.cumsum(1), (1, 0)) + column
    length = kept + counts.sum(1, keepdim=True)
    out = torch.where(torch.arange(width, device=tokens.device) < length, MASK, PAD)
    out = torch.nn.functional.pad(out, (0, 1))
    position = torch.where(column < kept, position, width)
    return out.scatter(1, position, packed)[:, :width]


@shapes
@pytest.mark.parametrize("variant", ["edited", "subsequence"])
def test_edit_oracle(compare, device, B, T, variant):
    sources, targets = pairs(B, T, variant == "subsequence")
    tokens, target = padded(sources, device), padded(targets, device)
    labels = edit_oracle(tokens, target, pad_id=PAD)
    assert torch.equal(labels.distance, torch_distance(tokens, target, "indel"))
    edits = {"delete": labels.delete, "insert": labels.insert, "fill": target, "max_length": target.shape[1]}
    assert torch.equal(apply_edits(tokens, **edits, **IDS).tokens, target)

    def scripts() -> list:
        return [rapidfuzz.Indel.editops(x, y) for x, y in zip(sources, targets, strict=True)]

    compare(
        "edit_oracle",
        f"{variant} B{B} T{T}",
        lambda: edit_oracle(tokens, target, pad_id=PAD),
        peers={"rapidfuzz": scripts if rapidfuzz else None},
    )


@shapes
@pytest.mark.parametrize("cost", ["levenshtein", "indel"])
def test_edit_distance(compare, device, B, T, cost):
    sources, targets = pairs(B, T)
    a, b = padded(sources, device), padded(targets, device)
    found = edit_distance(a, b, pad_id=PAD, cost=cost)
    assert torch.equal(found, torch_distance(a, b, cost))
    peers = {"rapidfuzz": None, "torch": lambda: torch_distance(a, b, cost)}
    if rapidfuzz:
        distance = {"levenshtein": rapidfuzz.Levenshtein, "indel": rapidfuzz.Indel}[cost].distance
        assert found.tolist() == list(map(distance, sources, targets))
        peers["rapidfuzz"] = lambda: list(map(distance, sources, targets))
    compare("edit_distance", f"{cost} B{B} T{T}", lambda: edit_distance(a, b, pad_id=PAD, cost=cost), peers=peers)


@shapes
def test_apply_edits(compare, device, B, T):
    sources, targets = pairs(B, T)
    tokens, target = padded(sources, device), padded(targets, device)
    labels = edit_oracle(tokens, target, pad_id=PAD)
    edits = {"delete": labels.delete, "insert": labels.insert, "max_length": target.shape[1]}
    wanted = torch.where(labels.masked, MASK, target)

    def ours() -> Tensor:
        return apply_edits(tokens, **edits, **IDS).tokens

    def plain() -> Tensor:
        return torch_apply_edits(tokens, labels.delete, labels.insert, target.shape[1])

    assert torch.equal(ours(), wanted)
    assert torch.equal(plain(), wanted)
    compare("apply_edits", f"B{B} T{T}", ours, peers={"torch": plain})
