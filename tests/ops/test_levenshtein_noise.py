"""Noise: what stays, how often everything happens, and the same result from the same generator."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from condgen_fast.ops.levenshtein import edit_distance, random_delete, random_mask, random_shuffle

PAD, BOS, EOS, MASK = 0, 1, 2, 3
IDS = {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS}
NOISES = {
    "delete": partial(random_delete, **IDS),
    "mask": partial(random_mask, mask_id=MASK, **IDS),
    "shuffle": partial(random_shuffle, **IDS),
    "shuffle anywhere": partial(random_shuffle, distance=None, **IDS),
    "shuffle far": partial(random_shuffle, distance=1000, **IDS),
}


def sentences(lengths, *, dtype=torch.int64, device="cpu"):
    """[BOS, 10, 11, ..., EOS] of these many inner tokens."""
    width = max(lengths, default=0) + 2
    rows = [[BOS, *range(10, 10 + n), EOS] + [PAD] * (width - n - 2) for n in lengths]
    return torch.tensor(rows, dtype=dtype, device=device).reshape(len(lengths), width)


def seeded(device, seed):
    return torch.Generator(device).manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("noise", NOISES)
def test_equal_the_reference(device, noise, dtype):
    tokens = sentences([0, 1, 2, 3, 5, 8, 40, 77] * 3, dtype=dtype, device=device)
    tokens[5, 3] = EOS  # within the sentence
    call = NOISES[noise]
    found = call(tokens, generator=seeded(device, 7))
    assert found.dtype == dtype
    assert torch.equal(found, call(tokens, generator=seeded(device, 7), impl="reference"))
    assert torch.equal(found, call(tokens, generator=seeded(device, 7)))
    assert not torch.equal(found, call(tokens, generator=seeded(device, 8)))
    for b in range(8):  # rows draw numbers of their own
        if tokens[b].gt(2).sum() > 5:
            assert not torch.equal(found[b], found[b + 8])


def test_the_default_generator_is_torchs(device):
    tokens = sentences([30], device=device)
    torch.manual_seed(3)
    first = random_delete(tokens, **IDS)
    torch.manual_seed(3)
    assert torch.equal(first, random_delete(tokens, **IDS))
    assert not torch.equal(first, random_delete(tokens, **IDS))


def test_deletion_and_mask_choose_every_number_and_subset_alike(device):
    rows, inner = 20_000, 4
    tokens = sentences([inner] * rows, device=device)
    masked = random_mask(tokens, mask_id=MASK, generator=seeded(device, 1), **IDS)
    chosen = masked == MASK
    assert torch.equal(masked.masked_fill(chosen, 0), tokens.masked_fill(chosen, 0))
    counts = chosen.sum(1).bincount(minlength=inner + 1).tolist()
    assert counts[0] == 0
    for count in counts[1:]:  # rows / 4 each; 5 standard deviations
        assert abs(count - rows / 4) < 5 * math.sqrt(rows * 3 / 16)
    subsets = (chosen[:, 1:5] * torch.tensor([1, 2, 4, 8], device=device)).sum(1).bincount(minlength=16).tolist()
    for subset in range(1, 16):  # of k tokens: 1/4 over the number of subsets of that size
        share = 0.25 / math.comb(4, subset.bit_count())
        assert abs(subsets[subset] - rows * share) < 5 * math.sqrt(rows * share * (1 - share))
    deleted = random_delete(tokens, generator=seeded(device, 1), **IDS)  # the same seed: the same tokens
    for row in range(50):
        kept = tokens[row][~chosen[row]].tolist()
        assert deleted[row].tolist() == kept + [PAD] * (inner + 2 - len(kept))


def test_shuffled_tokens_stay_near(device):
    rows, inner = 4000, 12
    tokens = sentences([inner] * rows, device=device)
    for distance in (0, 1, 3, 50):
        shuffled = random_shuffle(tokens, distance=distance, generator=seeded(device, 2), **IDS)
        assert torch.equal(shuffled.sort(1).values, tokens.sort(1).values)
        assert (shuffled[:, 0] == BOS).all() and (shuffled[:, -1] == EOS).all()
        moved = (shuffled[:, 1:-1] - 10 - torch.arange(inner, device=device)).abs()
        assert moved.max() == min(distance, inner - 1) if distance != 50 else moved.max() > 8
        if distance == 1:  # neighbours change places where i + u > i + 1 + v for u, v in [0, 2): 1 in 8
            swapped = (shuffled[:, 1] == 11).double().mean().item()
            assert abs(swapped - 1 / 8) < 5 * math.sqrt(7 / 64 / rows)


def test_a_distance_beyond_the_row_shuffles_further(device):
    """Sorted by place + u, u uniform in [0, distance + 1), however short the row: 2 of 2 tokens change places where
    u > 1 + v, with probability (1 - 1 / (distance + 1))^2 / 2."""
    rows = 10_000
    tokens = sentences([2] * rows, device=device)
    for distance in (2, 9, 2**30):
        swapped = random_shuffle(tokens, distance=distance, generator=seeded(device, 6), **IDS)[:, 1] == 11
        wanted = (1 - 1 / (distance + 1)) ** 2 / 2
        assert abs(swapped.double().mean().item() - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / rows)


def test_any_permutation_is_as_likely(device):
    rows = 12_000
    tokens = sentences([3] * rows, device=device)
    shuffled = random_shuffle(tokens, distance=None, generator=seeded(device, 3), **IDS)
    counts = (shuffled[:, 1:4] * torch.tensor([1, 4, 16], device=device)).sum(1).unique(return_counts=True)[1].tolist()
    assert len(counts) == 6
    for count in counts:
        assert abs(count - rows / 6) < 5 * math.sqrt(rows * 5 / 36)
    assert edit_distance(shuffled, tokens, pad_id=PAD).max() <= 3


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("noise", NOISES)
def test_empty(device, noise, impl):
    for shape in ((0, 4), (3, 0), (2, 3)):
        tokens = torch.full(shape, PAD, device=device)
        assert torch.equal(NOISES[noise](tokens, impl=impl), tokens)
    bare = torch.tensor([[BOS, EOS, PAD], [7, PAD, PAD], [EOS, PAD, PAD]], device=device)  # rows without bos or eos
    noisy = NOISES[noise](bare, impl=impl).tolist()
    assert noisy[0] == [BOS, EOS, PAD] and noisy[2] == [EOS, PAD, PAD]
    assert noisy[1] == {"delete": [PAD] * 3, "mask": [MASK, PAD, PAD]}.get(noise, [7, PAD, PAD])


def test_compiles_without_graph_breaks(device):
    def step(tokens):
        return [random_delete(tokens, **IDS), random_mask(tokens, mask_id=MASK, **IDS), random_shuffle(tokens, **IDS)]

    tokens = sentences([5, 9, 13], device=device)
    for found in torch.compile(step, fullgraph=True, backend="aot_eager")(tokens):
        assert found.shape == tokens.shape


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_refusals(impl):
    tokens = sentences([3])
    inside = torch.tensor([[BOS, 10, EOS], [BOS, PAD, EOS]])
    for call, message in (
        (
            lambda: random_delete(inside, **IDS, impl=impl),
            "tokens must be right-padded; got pad_id 0 before a token in row 1",
        ),
        (lambda: random_mask(tokens, mask_id=PAD, **IDS, impl=impl), "mask_id must differ from pad_id; got 0 for both"),
        (lambda: random_shuffle(tokens, distance=-1, **IDS, impl=impl), "distance must be in .*; got -1"),
        (lambda: random_delete(tokens[0], **IDS, impl=impl), r"tokens must have shape \[B, T\]; got \[5\]"),
        (lambda: random_delete(tokens, **IDS, impl="x"), "impl must be 'auto' or 'reference'; got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
