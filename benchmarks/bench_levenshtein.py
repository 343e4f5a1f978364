"""The levenshtein family against rapidfuzz and plain torch: pytest benchmarks/bench_levenshtein.py

Tensors in, tensors out, except for rapidfuzz (one thread), which gets lists of lists that are made before the clock
starts and gives its scripts without making labels of them. About 30 % of the tokens differ.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from condgen_fast.losses import levenshtein
from condgen_fast.models.levenshtein import LevenshteinConfig, LevenshteinTransformer
from condgen_fast.ops.levenshtein import (
    apply_edits,
    edit_alignment,
    edit_distance,
    edit_oracle,
    random_delete,
    random_mask,
    random_shuffle,
)

try:
    from rapidfuzz import distance as rapidfuzz
    from rapidfuzz import process
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


@pytest.mark.parametrize(("B", "T"), [*SHAPES, (1, 32768)], ids=[f"B{B}-T{T}" for B, T in [*SHAPES, (1, 32768)]])
@pytest.mark.parametrize("variant", ["edited", "subsequence"])
def test_edit_oracle(compare, device, B, T, variant):
    sources, targets = pairs(B, T, variant == "subsequence")
    tokens, target = padded(sources, device), padded(targets, device)
    labels = edit_oracle(tokens, target, pad_id=PAD)
    if T <= 4096:
        assert torch.equal(labels.distance, torch_distance(tokens, target, "indel"))
    edits = {"delete": labels.delete, "insert": labels.insert, "fill": target, "max_length": target.shape[1]}
    assert torch.equal(apply_edits(tokens, **edits, **IDS).tokens, target)
    peers = {"rapidfuzz": None}
    if rapidfuzz:
        peers["rapidfuzz"] = lambda: [rapidfuzz.Indel.editops(x, y) for x, y in zip(sources, targets, strict=True)]
    if variant == "subsequence":  # one token that the target lacks: the same rows, but no subsequences
        others = padded([[*row[:-2], VOCABULARY, row[-1]] for row in sources], device)
        peers["our general path"] = lambda: edit_oracle(others, target, pad_id=PAD)
    compare("edit_oracle", f"{variant} B{B} T{T}", lambda: edit_oracle(tokens, target, pad_id=PAD), peers=peers)


@shapes
def test_edit_alignment(compare, device, B, T):
    sources, targets = pairs(B, T)
    tokens, target = padded(sources, device), padded(targets, device)
    found = edit_alignment(tokens, target, pad_id=PAD, gap_id=MASK)
    assert torch.equal(found.distance, torch_distance(tokens, target, "levenshtein"))
    assert torch.equal((found.tokens != found.target).sum(1), found.distance)
    peers = {"rapidfuzz": None}
    if rapidfuzz:
        peers["rapidfuzz"] = lambda: [
            rapidfuzz.Levenshtein.editops(x, y) for x, y in zip(sources, targets, strict=True)
        ]
    compare(
        "edit_alignment",
        f"B{B} T{T}",
        lambda: edit_alignment(tokens, target, pad_id=PAD, gap_id=MASK),
        peers=peers,
    )


@pytest.mark.parametrize(("B", "T"), [(128, 32), (64, 128)], ids=["B128-T32", "B64-T128"])
def test_all_pairs(compare, device, B, T):
    """Every row with every other: what minimum Bayes risk decoding and clustering of outputs ask for."""
    sources, targets = pairs(B, T)
    a, b = padded(sources, device), padded(targets, device)
    found = edit_distance(a, b, pad_id=PAD, all_pairs=True)
    peers = {"rapidfuzz cdist": None}
    if rapidfuzz:
        threads = torch.get_num_threads()

        def cdist():
            return process.cdist(sources, targets, scorer=rapidfuzz.Levenshtein.distance, workers=threads)

        assert found.tolist() == cdist().tolist()
        peers["rapidfuzz cdist"] = cdist
    compare(
        "edit_distance", f"all pairs B{B} T{T}", lambda: edit_distance(a, b, pad_id=PAD, all_pairs=True), peers=peers
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


@shapes
def test_apply_edits_carried(compare, device, B, T):
    sources, targets = pairs(B, T)
    tokens, target = padded(sources, device), padded(targets, device)
    labels = edit_oracle(tokens, target, pad_id=PAD)
    edits = {"delete": labels.delete, "insert": labels.insert, "max_length": target.shape[1]}
    hidden, born = torch.randn(*tokens.shape, 64, device=device), tokens.int()

    def ours() -> tuple[Tensor, ...]:
        return apply_edits(tokens, **edits, **IDS, carried=(hidden, born)).carried

    def gathered() -> tuple[Tensor, ...]:
        origin = apply_edits(tokens, **edits, **IDS).origin
        index, gone = origin.clamp(min=0), origin < 0
        wide = index[..., None].expand(-1, -1, 64)
        return hidden.gather(1, wide).masked_fill(gone[..., None], 0), born.gather(1, index).masked_fill(gone, 0)

    assert all(map(torch.equal, ours(), gathered()))
    compare("apply_edits", f"carried [64] and [] B{B} T{T}", ours, peers={"gather": gathered})


def torch_noise(kind: str, tokens: Tensor) -> Tensor:
    """As training code usually draws it: random scores, a sort, a threshold and another sort."""
    inner = (tokens != PAD) & (tokens != BOS) & (tokens != EOS)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    if kind == "shuffle":
        key = place + torch.where(inner, torch.rand(tokens.shape, device=tokens.device) * 4, 0)
        key = torch.where(inner, key.clamp(min=1), place * 1.0)
        key = torch.where((tokens == EOS) | (tokens == PAD), key + 4, key)
        return tokens.gather(1, key.argsort(1))
    count = inner.sum(1, keepdim=True)
    dropped = (torch.rand(count.shape, device=tokens.device) * count).long() + 1
    score = torch.rand(tokens.shape, device=tokens.device).masked_fill(~inner, 2.0)
    chosen = (score.argsort(1).argsort(1) < dropped) & inner
    if kind == "mask":
        return tokens.masked_fill(chosen, MASK)
    order = chosen.to(torch.int8).argsort(dim=1, stable=True)
    return tokens.masked_fill(chosen, PAD).gather(1, order)


@shapes
@pytest.mark.parametrize("kind", ["delete", "mask", "shuffle"])
def test_noise(compare, device, B, T, kind):
    tokens = padded(pairs(B, T)[1], device)
    noise = {"delete": random_delete, "mask": random_mask, "shuffle": random_shuffle}[kind]
    options = IDS if kind == "mask" else {name: value for name, value in IDS.items() if name != "mask_id"}
    for noisy in (noise(tokens, **options), torch_noise(kind, tokens)):
        assert noisy.shape == tokens.shape and not torch.equal(noisy, tokens) and (noisy[:, 0] == BOS).all()
    peers = {"torch": lambda: torch_noise(kind, tokens)}
    compare(f"random_{kind}", f"B{B} T{T}", lambda: noise(tokens, **options), peers=peers)


@pytest.mark.parametrize(("B", "T"), [(64, 32), (32, 128)], ids=["B64-T32", "B32-T128"])
def test_training_step(compare, device, B, T, monkeypatch):
    """Both oracle calls of a step of a small Levenshtein Transformer, and the whole step beside them."""
    torch.manual_seed(0)
    config = LevenshteinConfig(
        vocab_size=8000, width=256, feed_forward=1024, encoder_layers=3, decoder_layers=3, heads=4, max_positions=256
    )
    model = LevenshteinTransformer(config).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    target = padded(pairs(B, T)[1], device)
    specials = {BOS: model.bos_id, EOS: model.eos_id, PAD: model.pad_id}
    words = 10 + target % 7900
    for ours, theirs in specials.items():
        words = torch.where(target == ours, theirs, words)
    batch = SimpleNamespace(
        source=words.flip(0).clone(), source_lengths=(words.flip(0) != model.pad_id).sum(1), target=words
    )
    calls = []

    def recorded(tokens: Tensor, target: Tensor, *, pad_id: int):
        calls.append((tokens, target))
        return edit_oracle(tokens, target, pad_id=pad_id)

    def step() -> None:
        optimizer.zero_grad()
        levenshtein.levenshtein_loss(model, batch)["loss"].backward()
        optimizer.step()

    with monkeypatch.context() as patch:
        patch.setattr(levenshtein, "edit_oracle", recorded)
        step()
    assert len(calls) == 2

    def oracles() -> list:
        return [edit_oracle(tokens, target, pad_id=model.pad_id) for tokens, target in calls]

    compare("edit_oracle", f"both calls of a LevT step B{B} T{T}", oracles, peers={"the whole step": step})
