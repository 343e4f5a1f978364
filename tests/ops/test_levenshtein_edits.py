"""apply_edits: step by step, at its limits, and with tensors that are carried along."""

from __future__ import annotations

import pytest
import torch

from condgen_fast.ops.levenshtein import apply_edits

PAD, BOS, EOS, MASK = 0, 1, 2, 3
IDS = {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "mask_id": MASK}
IMPLS = ("auto", "reference")
DTYPES = (torch.int64, torch.int32)


def batch(rows, *, device="cpu", dtype=torch.int64):
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows], dtype=dtype, device=device)


def sentence(inner):
    return [BOS, *inner, EOS]


@pytest.mark.parametrize("impl", IMPLS)
def test_negative_counts_are_refused(impl):
    tokens = batch([sentence([10]), sentence([10, 11])])
    insert = torch.tensor([[0, 0, -5], [0, -2, 0]])  # the -5 stands behind the last token
    with pytest.raises(ValueError, match="^insert must not be negative; got -2 in row 1, slot 1$"):
        apply_edits(tokens, insert=insert, **IDS, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_edits_step_by_step(device, impl, dtype):
    tokens = batch([[BOS, 10, 11, 12, EOS], [BOS, EOS]], device=device, dtype=dtype)
    scores = torch.tensor([[0.0, -1, -2, -3, 0], [0, 0, 9, 9, 9]], device=device)
    delete = torch.tensor([[True, False, True, False, True], [True, True, True, True, True]], device=device)
    shorter = apply_edits(tokens, delete=delete, scores=scores, **IDS, impl=impl)
    assert shorter.tokens.tolist() == [[BOS, 10, 12, EOS, PAD], [BOS, EOS, PAD, PAD, PAD]]
    assert shorter.tokens.dtype == dtype
    assert shorter.scores.tolist() == [[0, -1, -3, 0, 0], [0, 0, 0, 0, 0]]
    assert shorter.lengths.tolist() == [4, 2]
    assert shorter.origin.tolist() == [[0, 1, 3, 4, -1], [0, 1, -1, -1, -1]]

    insert = torch.tensor([[0, 2, 0, 7], [1, 7, 7, 7]], device=device)  # the sevens stand behind eos
    longer = apply_edits(shorter.tokens, insert=insert, scores=shorter.scores, **IDS, impl=impl)
    assert longer.tokens.tolist() == [[BOS, 10, MASK, MASK, 12, EOS], [BOS, MASK, EOS, PAD, PAD, PAD]]
    assert longer.scores.tolist() == [[0, -1, 0, 0, -3, 0], [0, 0, 0, 0, 0, 0]]
    assert longer.lengths.tolist() == [6, 3]
    assert longer.origin.tolist() == [[0, 1, -1, -1, 2, 3], [0, -1, 1, -1, -1, -1]]

    fill = torch.arange(20, 32, device=device, dtype=dtype).reshape(2, 6)
    full = apply_edits(longer.tokens, fill=fill, **IDS, impl=impl)
    assert full.tokens.tolist() == [[BOS, 10, 22, 23, 12, EOS], [BOS, 27, EOS, PAD, PAD, PAD]]
    assert full.scores is None

    at_once = apply_edits(tokens, delete=delete, insert=insert, fill=fill, scores=scores, **IDS, impl=impl)
    assert torch.equal(at_once.tokens, full.tokens)
    assert torch.equal(at_once.scores, longer.scores)
    unchanged = apply_edits(full.tokens, **IDS, impl=impl)
    assert torch.equal(unchanged.tokens, full.tokens)


@pytest.mark.parametrize("impl", IMPLS)
def test_apply_edits_never_exceeds_max_length(device, impl):
    tokens = batch([[BOS, 10, 11, EOS], [BOS, EOS]], device=device)
    insert = torch.tensor([[1, 5, 5], [2**62, 0, 0]], device=device)
    for max_length, wanted in {
        7: [[BOS, MASK, 10, MASK, MASK, 11, EOS], [BOS, *[MASK] * 5, EOS]],
        5: [[BOS, MASK, 10, 11, EOS], [BOS, *[MASK] * 3, EOS]],
        4: [[BOS, 10, 11, EOS], [BOS, MASK, MASK, EOS]],
        3: [[BOS, 10, EOS], [BOS, MASK, EOS]],
        2: [[BOS, EOS], [BOS, EOS]],
    }.items():
        result = apply_edits(tokens, insert=insert, max_length=max_length, **IDS, impl=impl)
        assert result.tokens.tolist() == wanted
        assert result.lengths.tolist() == [max_length] * 2
    assert apply_edits(tokens, insert=insert.clamp(max=1), max_length=9, **IDS, impl=impl).tokens.shape == (2, 9)
    assert apply_edits(tokens, max_length=3, **IDS, impl=impl).tokens.tolist() == [[BOS, 10, EOS], [BOS, EOS, PAD]]
    assert apply_edits(tokens, max_length=9, **IDS, impl=impl).tokens.tolist() == tokens.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_random_edits_equal_the_reference(device, dtype):
    generator = torch.Generator().manual_seed(4)
    for max_length in (None, 2, 6, 40, 300):
        lengths = torch.randint(0, 80, (40,), generator=generator)
        tokens = torch.randint(1, 6, (40, 80), generator=generator)
        tokens = torch.where(torch.arange(80) < lengths[:, None], tokens, PAD).to(device)
        delete = (torch.rand(40, 80, generator=generator) < 0.4).to(device)
        insert = torch.randint(0, 4, (40, 79), generator=generator).to(device)
        scores = torch.randn(40, 80, generator=generator).to(dtype).to(device)
        for edits in ({"delete": delete}, {"insert": insert}, {"delete": delete, "insert": insert}, {}):
            options = {**edits, **IDS, "max_length": max_length, "scores": scores}
            width = apply_edits(tokens, **options, impl="reference").tokens.shape[1]
            options["fill"] = torch.randint(100, 200, (40, width), generator=generator).to(device)
            found, wanted = apply_edits(tokens, **options), apply_edits(tokens, **options, impl="reference")
            for field in ("tokens", "scores", "lengths", "origin"):
                value, reference = getattr(found, field), getattr(wanted, field)
                assert value.dtype == reference.dtype and torch.equal(value, reference), field


@pytest.mark.parametrize("impl", IMPLS)
def test_tensors_are_carried_along(device, impl):
    tokens = batch([[BOS, 10, 11, 12, EOS], [BOS, EOS]], device=device)
    delete = tokens == 11
    insert = torch.tensor([[0, 2, 0, 0], [1, 0, 0, 0]], device=device)
    born = torch.arange(10, device=device).reshape(2, 5)
    hidden = torch.randn(2, 5, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    flags = tokens > 10
    result = apply_edits(tokens, delete=delete, insert=insert, carried=(born, hidden, flags), **IDS, impl=impl)
    assert result.tokens.tolist() == [[BOS, 10, MASK, MASK, 12, EOS], [BOS, MASK, EOS, PAD, PAD, PAD]]
    assert result.carried[0].tolist() == [[0, 1, 0, 0, 3, 4], [5, 0, 6, 0, 0, 0]]
    assert result.carried[2].tolist() == [[False] * 4 + [True, False], [False] * 6]
    moved = result.carried[1]
    assert moved.shape == (2, 6, 3, 2)
    assert torch.equal(moved[0, 4], hidden[0, 3]) and not moved[0, 2].any() and torch.equal(moved[1, 2], hidden[1, 1])
    moved.sum().backward()  # what was deleted, and padding, gets no gradient
    assert hidden.grad[:, :, 0, 0].tolist() == [[1, 1, 0, 1, 1], [1, 1, 0, 0, 0]]
    scores = hidden[:, :, 0, 0]
    assert not apply_edits(tokens, delete=delete, scores=scores, **IDS, impl=impl).scores.requires_grad
    empty = apply_edits(tokens[:, :0], max_length=4, insert=insert[:, :0], carried=(hidden[:, :0],), **IDS, impl=impl)
    assert empty.carried[0].shape == (2, 4, 3, 2) and not empty.carried[0].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_bounds_hold_placeholders_back_and_never_tokens(device, impl):
    tokens = batch([[BOS, 10, 11, EOS]] * 6, device=device)
    insert = torch.tensor([[1, 2, 1]] * 6, device=device)
    bounds = torch.tensor([-1, 3, 4, 6, 8, 2**62], device=device)
    wanted = [
        *[[BOS, 10, 11, EOS]] * 3,
        [BOS, MASK, 10, MASK, 11, EOS],
        *[[BOS, MASK, 10, MASK, MASK, 11, MASK, EOS]] * 2,
    ]
    for max_length in (None, 9, 7):
        got = apply_edits(tokens, insert=insert, bounds=bounds, max_length=max_length, **IDS, impl=impl)
        rows = [row if len(row) <= 7 or max_length != 7 else [*row[:6], EOS] for row in wanted]
        assert [row[: row.index(EOS) + 1] for row in got.tokens.tolist()] == rows
        assert got.lengths.tolist() == list(map(len, rows)) and got.tokens.shape[1] == (max_length or 8)
    kept = apply_edits(tokens, bounds=bounds.clamp(max=3), **IDS, impl=impl)
    assert torch.equal(kept.tokens, tokens)
