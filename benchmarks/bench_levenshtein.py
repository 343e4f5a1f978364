"""Times the levenshtein family against rapidfuzz and plain torch: pytest benchmarks/bench_levenshtein.py

Tensors in, tensors out, except for rapidfuzz, which gets lists of lists that are made before the clock starts and gives
its scripts without making labels of them. About 30 % of the tokens differ; each result is checked before it is timed.
"""

from __future__ import annotations

import random

import pytest
import torch
from rapidfuzz.distance import Indel, Levenshtein
from torch import Tensor

from condgen_fast.ops.levenshtein import apply_edits, edit_distance, edit_oracle

PAD, BOS, EOS, MASK, VOCABULARY = 0, 1, 2, 3, 32000
IDS = {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "mask_id": MASK}
SHAPES = [(256, 32), (64, 128), (16, 512), (1, 4096)]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

shapes = pytest.mark.parametrize(("rows", "length"), SHAPES, ids=[f"B{rows}-T{length}" for rows, length in SHAPES])
devices = pytest.mark.parametrize("device", DEVICES)


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


def timed(benchmark, device: str, function, *args, **options):
    if device == "cpu":
        return benchmark(function, *args, **options)

    def synchronised():
        function(*args, **options)
        torch.cuda.synchronize()

    return benchmark(synchronised)


def torch_indel_distance(a: Tensor, b: Tensor) -> Tensor:
    """Row by row: LCS[i, j] = max over j' <= j of max(LCS[i-1, j'], LCS[i-1, j'-1] + 1 where the tokens are equal)."""
    common = a.new_zeros(len(a), b.shape[1] + 1)
    real = b != PAD
    for i in range(a.shape[1]):
        longer = common[:, :-1] + ((a[:, i, None] == b) & real)
        common[:, 1:] = torch.maximum(common[:, 1:], longer).cummax(1).values
    return (a != PAD).sum(1) + real.sum(1) - 2 * common[:, -1]


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


@devices
@shapes
@pytest.mark.parametrize("case", ["edited", "subsequence"])
def test_edit_oracle(benchmark, device, rows, length, case):
    sources, targets = pairs(rows, length, case == "subsequence")
    tokens, target = padded(sources, device), padded(targets, device)
    labels = edit_oracle(tokens, target, pad_id=PAD)
    assert labels.distance.tolist() == [Indel.distance(x, y) for x, y in zip(sources, targets, strict=True)]
    edits = {"delete": labels.delete, "insert": labels.insert, "fill": target, "max_length": target.shape[1]}
    assert torch.equal(apply_edits(tokens, **edits, **IDS).tokens, target)
    timed(benchmark, device, edit_oracle, tokens, target, pad_id=PAD)


@shapes
@pytest.mark.parametrize("case", ["edited", "subsequence"])
def test_edit_oracle_rapidfuzz(benchmark, rows, length, case):
    sources, targets = pairs(rows, length, case == "subsequence")
    benchmark(lambda: [Indel.editops(x, y) for x, y in zip(sources, targets, strict=True)])


@devices
@shapes
@pytest.mark.parametrize("cost", ["levenshtein", "indel"])
def test_edit_distance(benchmark, device, rows, length, cost):
    sources, targets = pairs(rows, length)
    a, b = padded(sources, device), padded(targets, device)
    distance = {"levenshtein": Levenshtein, "indel": Indel}[cost].distance
    assert edit_distance(a, b, pad_id=PAD, cost=cost).tolist() == list(map(distance, sources, targets))
    timed(benchmark, device, edit_distance, a, b, pad_id=PAD, cost=cost)


@shapes
@pytest.mark.parametrize("cost", ["levenshtein", "indel"])
def test_edit_distance_rapidfuzz(benchmark, rows, length, cost):
    sources, targets = pairs(rows, length)
    distance = {"levenshtein": Levenshtein, "indel": Indel}[cost].distance
    benchmark(lambda: list(map(distance, sources, targets)))


@devices
@shapes
def test_edit_distance_torch_indel(benchmark, device, rows, length):
    sources, targets = pairs(rows, length)
    a, b = padded(sources, device), padded(targets, device)
    assert torch.equal(torch_indel_distance(a, b), edit_distance(a, b, pad_id=PAD, cost="indel"))
    timed(benchmark, device, torch_indel_distance, a, b)


@devices
@shapes
@pytest.mark.parametrize("case", ["ours", "torch"])
def test_apply_edits(benchmark, device, rows, length, case):
    sources, targets = pairs(rows, length)
    tokens, target = padded(sources, device), padded(targets, device)
    labels = edit_oracle(tokens, target, pad_id=PAD)
    edits = {"delete": labels.delete, "insert": labels.insert, "max_length": target.shape[1]}
    wanted = torch.where(labels.masked, MASK, target)
    assert torch.equal(apply_edits(tokens, **edits, **IDS).tokens, wanted)
    assert torch.equal(torch_apply_edits(tokens, labels.delete, labels.insert, target.shape[1]), wanted)
    if case == "ours":
        timed(benchmark, device, apply_edits, tokens, **edits, **IDS)
    else:
        timed(benchmark, device, torch_apply_edits, tokens, labels.delete, labels.insert, target.shape[1])
