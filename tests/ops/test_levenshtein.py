from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Indel, Levenshtein

from condgen_fast.ops.levenshtein import apply_edits, edit_distance, edit_oracle

PAD, BOS, EOS, MASK = 0, 1, 2, 3
IDS = {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "mask_id": MASK}
IMPLS = ("auto", "reference")
SLOTS = ("kept", "source")
DTYPES = (torch.int64, torch.int32)
WORDS = "abcdefghijklmnopqrstuvwxyz"


def batch(rows, *, width=None, device="cpu", dtype=torch.int64):
    width = max((len(row) for row in rows), default=0) if width is None else width
    padded = [row + [PAD] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=dtype, device=device).reshape(len(rows), width)


def sentence(inner):
    return [BOS, *inner, EOS]


def ids(word):
    return [10 + WORDS.index(letter) for letter in word]


def assert_equal(found, wanted, rows, targets):
    for field, value, reference in zip(found._fields, found, wanted, strict=True):
        assert value.dtype == reference.dtype, field
        wrong = (value != reference).reshape(len(rows), -1).any(1).nonzero()
        if len(wrong):
            b = int(wrong[0])
            raise AssertionError(f"{field} of {rows[b]} -> {targets[b]}: {value[b]} instead of {reference[b]}")


def applied(row, target, delete, insert, masked, slots):
    """What the labels make of a row, without apply_edits."""
    missing = iter([token for token, is_missing in zip(target, masked, strict=False) if is_missing])
    counts = iter(insert)
    out = []
    for token, is_deleted in zip(row, delete, strict=False):
        out += [] if is_deleted else [token]
        if slots == "source" or not is_deleted:
            out += [next(missing) for _ in range(next(counts, 0))]
    assert next(missing, None) is None and not any(counts)
    return out


def random_pairs(count, generator):
    """Sentences of many lengths and alphabets, two thirds of them edited copies, some of them subsequences."""
    rows, targets = [], []
    for n in range(count):
        alphabet = generator.choice((1, 2, 3, 10, 100, 30000))
        longest = generator.choice((2, 8, 30, 66, 130, 260))
        draw = lambda alphabet=alphabet: 10 + generator.randrange(alphabet)  # noqa: E731
        y = [draw() for _ in range(generator.randrange(longest))]
        if n % 3 == 0:
            x = [draw() for _ in range(generator.randrange(longest))]
        else:
            x = [token for token in y if generator.random() < 0.8]
            if n % 3 == 1:
                x = [new for token in x for new in ([token] if generator.random() < 0.8 else [draw(), token])]
        rows.append(sentence(x))
        targets.append(sentence(y))
    return rows, targets


@pytest.mark.parametrize("slots", SLOTS)
def test_every_pair_up_to_length_five(device, slots):
    words = [list(word) for n in range(6) for word in itertools.product((10, 11, 12), repeat=n)]
    pairs = list(itertools.product(words, words))
    if slots == "source":  # delete, masked and distance do not depend on slots: a third is enough for insert
        pairs = pairs[::3]
    rows, targets = [sentence(x) for x, _ in pairs], [sentence(y) for _, y in pairs]
    tokens, target = batch(rows, device=device), batch(targets, device=device)
    wanted = edit_oracle(tokens, target, pad_id=PAD, slots=slots, impl="reference")
    assert_equal(edit_oracle(tokens, target, pad_id=PAD, slots=slots), wanted, rows, targets)


def test_ten_thousand_random_pairs(device):
    rows, targets = random_pairs(10_000, random.Random(20))
    tokens, target = batch(rows, device=device), batch(targets, device=device)
    kept = edit_oracle(tokens, target, pad_id=PAD)
    source = edit_oracle(tokens, target, pad_id=PAD, slots="source")
    for slots, labels in (("kept", kept), ("source", source)):
        for b, (delete, insert, masked) in enumerate(zip(*(value.tolist() for value in labels[:3]), strict=True)):
            assert applied(rows[b], targets[b], delete, insert, masked, slots) == targets[b]
    indel = [Indel.distance(x, y) for x, y in zip(rows, targets, strict=True)]
    assert kept.distance.tolist() == source.distance.tolist() == indel
    assert (kept.delete.sum(1) + kept.insert.sum(1)).tolist() == indel
    assert (source.delete.sum(1) + source.masked.sum(1)).tolist() == indel
    assert edit_distance(tokens, target, pad_id=PAD, cost="indel").tolist() == indel
    levenshtein = [Levenshtein.distance(x, y) for x, y in zip(rows, targets, strict=True)]
    assert edit_distance(tokens, target, pad_id=PAD).tolist() == levenshtein
    result = apply_edits(tokens, delete=kept.delete, insert=kept.insert, max_length=target.shape[1], fill=target, **IDS)
    assert torch.equal(result.tokens, target)
    assert torch.equal(result.origin == -1, kept.masked | (target == PAD))


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_pairs_equal_the_reference(device, dtype, slots):
    rows, targets = random_pairs(150, random.Random(21))
    tokens, target = (batch(side, width=300, device=device, dtype=dtype) for side in (rows, targets))
    wanted = edit_oracle(tokens, target, pad_id=PAD, slots=slots, impl="reference")
    assert_equal(edit_oracle(tokens, target, pad_id=PAD, slots=slots), wanted, rows, targets)


@pytest.mark.parametrize(("alphabet", "length"), [(2, 300), (40, 700), (5000, 1500)])
def test_long_sentences_equal_the_reference(device, alphabet, length):
    generator = random.Random(alphabet)
    row, target = (sentence([10 + generator.randrange(alphabet) for _ in range(length)]) for _ in range(2))
    edited = sentence([t if generator.random() < 0.7 else 10 + generator.randrange(alphabet) for t in target[1:-1]])
    rows, targets = ([row], [target]) if length > 1000 else ([row, edited], [target, target])
    tokens, target = batch(rows, device=device), batch(targets, device=device)
    wanted = edit_oracle(tokens, target, pad_id=PAD, impl="reference")
    assert_equal(edit_oracle(tokens, target, pad_id=PAD), wanted, rows, targets)
    for cost in ("levenshtein", "indel"):
        reference = edit_distance(tokens, target, pad_id=PAD, cost=cost, impl="reference")
        assert torch.equal(edit_distance(tokens, target, pad_id=PAD, cost=cost), reference)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("x", "y", "distance", "delete", "insert"),
    [
        ("kitten", "sitting", 5, [1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 1]),
        ("abcd", "acbd", 2, [0, 1, 0, 0], [0, 0, 1, 0]),
        ("aab", "ab", 1, [0, 1, 0], [0, 0, 0]),
        ("ab", "aab", 1, [0, 0], [0, 1, 0]),
        ("abab", "baba", 2, [1, 0, 0, 0], [0, 0, 0, 1]),
        ("", "abc", 3, [], [3]),
        ("abc", "", 3, [1, 1, 1], [0]),
    ],
)
def test_worked_examples(device, impl, x, y, distance, delete, insert):
    """Scripts worked by hand; with bos and eos around, slots reach from the first token to behind the last."""
    tokens, target = (batch([sentence(ids(word))], device=device) for word in (x, y))
    labels = edit_oracle(tokens, target, pad_id=PAD, impl=impl)
    assert labels.distance.tolist() == [distance]
    assert labels.delete[0].tolist() == [False, *map(bool, delete), False]
    assert labels.insert[0].tolist() == (insert + [0] * len(x))[: len(x) + 1]


@pytest.mark.parametrize("impl", IMPLS)
def test_slots(device, impl):
    tokens, target = batch([sentence(ids("abcx"))], device=device), batch([sentence(ids("ayyx"))], device=device)
    kept = edit_oracle(tokens, target, pad_id=PAD, impl=impl)
    source = edit_oracle(tokens, target, pad_id=PAD, slots="source", impl=impl)
    assert kept.delete.tolist() == source.delete.tolist() == [[False, False, True, True, False, False]]
    assert kept.insert.tolist() == [[0, 2, 0, 0, 0]]
    assert source.insert.tolist() == [[0, 0, 0, 2, 0]]
    assert kept.masked.tolist() == source.masked.tolist() == [[False, False, True, True, False, False]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(
    ("x", "y"), [([BOS, 10], [11, BOS, 10]), ([BOS, 10], [BOS, 10, 11]), ([], [10]), ([10, 11], [12, 13])]
)
def test_insertions_without_a_slot_are_refused(impl, slots, x, y):
    tokens, target = batch([[BOS], x, [10, BOS]], width=4), batch([[BOS], y, [11]], width=4)
    message = (
        f"target must need no insertion before the first or after the last {slots} token; got one in row 1 "
        r"\(let tokens and target share bos and eos\)"
    )
    with pytest.raises(ValueError, match=message):
        edit_oracle(tokens, target, pad_id=PAD, slots=slots, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_bos_and_eos(device, impl):
    """bos and eos are ordinary tokens: any rows will do while the insertions lie between kept tokens."""
    rows, targets = [[10, 11, 12], [], [10, 10], []], [[10, 13, 12], [], [10, 10], []]
    labels = edit_oracle(batch(rows, width=4, device=device), batch(targets, device=device), pad_id=PAD, impl=impl)
    assert labels.distance.tolist() == [2, 0, 0, 0]
    assert labels.insert.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert edit_oracle(
        batch([[10, 11]], device=device), batch([[]], device=device), pad_id=PAD, impl=impl
    ).delete.tolist() == [[True, True]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", [(0, 5, 7), (0, 0, 0), (3, 0, 0), (3, 4, 0), (2, 1, 3)])
def test_empty_and_all_padding(device, impl, sizes):
    rows, width, target_width = sizes
    tokens = torch.full((rows, width), PAD, device=device)
    target = torch.full((rows, target_width), PAD, device=device)
    labels = edit_oracle(tokens, target, pad_id=PAD, impl=impl)
    assert [tuple(value.shape) for value in labels] == [
        (rows, width), (rows, max(width - 1, 0)), (rows, target_width), (rows,)
    ]  # fmt: skip
    assert not any(value.any() for value in labels)
    for cost in ("levenshtein", "indel"):
        assert edit_distance(tokens, target, pad_id=PAD, cost=cost, impl=impl).tolist() == [0] * rows
    result = apply_edits(tokens, delete=labels.delete, insert=labels.insert, scores=tokens.float(), **IDS, impl=impl)
    assert result.lengths.tolist() == [0] * rows
    assert (result.tokens == PAD).all() and (result.origin == -1).all()
    wider = apply_edits(tokens, insert=labels.insert, scores=tokens.float(), max_length=9, **IDS, impl=impl)
    assert wider.scores.tolist() == [[0.0] * 9] * rows  # of no tokens at all they are 0, too


@pytest.mark.parametrize("impl", IMPLS)
def test_huge_and_negative_ids_widths_and_strides(device, impl):
    low, high = -(2**63), 2**63 - 1
    rows, targets = [[BOS, low, high, -1, EOS]], [[BOS, high, low, -1, -1, EOS]]
    tokens = batch(rows, width=90, device=device).repeat_interleave(2, 1)[:, ::2]
    target = batch(targets, device=device).t().contiguous().t()
    labels = edit_oracle(tokens, target, pad_id=PAD, impl=impl)
    assert labels.distance.tolist() == [3] == [Indel.distance(rows[0], targets[0])]
    result = apply_edits(tokens, delete=labels.delete, insert=labels.insert, fill=target, **IDS, impl=impl)
    assert torch.equal(result.tokens, target)
    assert (
        edit_distance(tokens, target, pad_id=PAD, impl=impl).tolist() == [2] == [Levenshtein.distance(*rows, *targets)]
    )
    # ids that fall on one another in a hash table of few slots
    far = batch([sentence([k << 57 for k in range(1, 60)])], device=device)
    assert edit_distance(far, far.flip(1), pad_id=PAD, impl=impl).tolist() == [60]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_pairs(data):
    token = st.integers(10, data.draw(st.sampled_from((10, 11, 14, 2**40))))
    inner = st.lists(token, max_size=data.draw(st.sampled_from((4, 80, 200))))
    pairs = data.draw(st.lists(st.tuples(inner, inner), min_size=1, max_size=3))
    rows, targets = [sentence(x) for x, _ in pairs], [sentence(y) for _, y in pairs]
    tokens, target = batch(rows), batch(targets)
    for slots in SLOTS:
        wanted = edit_oracle(tokens, target, pad_id=PAD, slots=slots, impl="reference")
        assert_equal(edit_oracle(tokens, target, pad_id=PAD, slots=slots), wanted, rows, targets)
    for cost, distance in (("indel", Indel), ("levenshtein", Levenshtein)):
        found = edit_distance(tokens, target, pad_id=PAD, cost=cost).tolist()
        assert found == [distance.distance(x, y) for x, y in zip(rows, targets, strict=True)]


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_inside_a_row_is_refused(impl):
    good, bad = batch([[BOS, 10, EOS], [BOS, EOS]]), batch([[BOS, 10, EOS], [BOS, PAD, EOS]])
    message = " must be right-padded; got pad_id 0 before a token in row 1, position 1"
    calls = {
        "tokens": (lambda: edit_oracle(bad, good, pad_id=PAD, impl=impl), lambda: apply_edits(bad, **IDS, impl=impl)),
        "target": (lambda: edit_oracle(good, bad, pad_id=PAD, impl=impl),),
        "a": (lambda: edit_distance(bad, good, pad_id=PAD, impl=impl),),
        "b": (lambda: edit_distance(good, bad, pad_id=PAD, impl=impl),),
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(ValueError, match=f"^{name}{message}$"):
                call()


def test_messages():
    x = batch([sentence([10])])
    refused = [
        (ValueError, r"tokens must have shape \[B, S\]; got \[3\]", lambda: edit_oracle(x[0], x, pad_id=0)),
        (TypeError, "target must be a Tensor; got list", lambda: edit_oracle(x, [[1]], pad_id=0)),
        (ValueError, "tokens must be int64 or int32; got float32", lambda: edit_oracle(x.float(), x, pad_id=0)),
        (ValueError, "target must be int64; got int32", lambda: edit_oracle(x, x.int(), pad_id=0)),
        (ValueError, r"b must have shape .*; got \[2, 3\]", lambda: edit_distance(x, x.repeat(2, 1), pad_id=0)),
        (ValueError, "slots must be 'kept' or 'source'; got 'all'", lambda: edit_oracle(x, x, pad_id=0, slots="all")),
        (ValueError, "cost must be 'levenshtein' or 'indel'; got 'x'", lambda: edit_distance(x, x, pad_id=0, cost="x")),
        (ValueError, "impl must be 'auto' or 'reference'; got 'x'", lambda: edit_oracle(x, x, pad_id=0, impl="x")),
        (TypeError, "pad_id must be an int; got float", lambda: edit_distance(x, x, pad_id=0.0)),
        (ValueError, "delete must be bool; got int64", lambda: apply_edits(x, delete=x, **IDS)),
        (ValueError, r"delete must have .*; got \[1, 2\]", lambda: apply_edits(x, delete=x[:, :2].bool(), **IDS)),
        (ValueError, r"insert must have shape .*; got \[1, 3\]", lambda: apply_edits(x, insert=x, **IDS)),
        (ValueError, r"fill must have shape .*; got \[1, 2\]", lambda: apply_edits(x, fill=x[:, :2], **IDS)),
        (ValueError, "scores must be .*; got int64", lambda: apply_edits(x, scores=x, **IDS)),
        (
            ValueError,
            r"mask_id must be in \[-2147483648, 2147483647\]; got 1099511627776",
            lambda: apply_edits(x.int(), **{**IDS, "mask_id": 2**40}),
        ),
        (ValueError, "pad_id must be in .*; got 1180591620717411303424", lambda: edit_distance(x, x, pad_id=2**70)),
        (
            ValueError,
            "insert must ask for fewer than 2147483648 tokens a row; got 4294967299",
            lambda: apply_edits(x, insert=torch.full((1, 2), 2**62), **IDS),
        ),
        (ValueError, "max_length must be >= 2; got 1", lambda: apply_edits(x, max_length=1, **IDS)),
        (ValueError, "mask_id must differ from pad_id; got 0 .*", lambda: apply_edits(x, **{**IDS, "mask_id": 0})),
    ]
    for kind, message, call in refused:
        with pytest.raises(kind, match=f"^{message}$"):
            call()


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
            for field, value, reference in zip(found._fields, found, wanted, strict=True):
                assert value.dtype == reference.dtype and torch.equal(value, reference), field


def test_threads_do_not_change_the_result():
    rows, targets = random_pairs(600, random.Random(22))
    tokens, target = batch(rows), batch(targets)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = edit_oracle(tokens, target, pad_id=PAD)
        torch.set_num_threads(2)
        assert_equal(edit_oracle(tokens, target, pad_id=PAD), wanted, rows, targets)
    finally:
        torch.set_num_threads(threads)


def test_opcheck(device):
    tokens, target = (
        batch([sentence([10, 11]), sentence([12])], device=device),
        batch([sentence([11])] * 2, device=device),
    )
    ops = torch.ops.condgen_fast
    labels = edit_oracle(tokens, target, pad_id=PAD)
    torch.library.opcheck(ops.edit_oracle.default, (tokens, target, PAD, False))
    torch.library.opcheck(ops.edit_distance.default, (tokens, target, PAD, True))
    for scores in (None, tokens.float()):
        arguments = (tokens, labels.delete, labels.insert, None, scores, PAD, BOS, EOS, MASK, 6)
        torch.library.opcheck(ops.apply_edits.default, arguments)


def test_compiles_without_graph_breaks(device):
    def step(tokens, target, scores):
        labels = edit_oracle(tokens, target, pad_id=PAD)
        canvas = apply_edits(
            tokens, delete=labels.delete, insert=labels.insert, scores=scores, max_length=target.shape[1], **IDS
        )
        filled = apply_edits(canvas.tokens, fill=target, **IDS)
        return (*labels, *canvas, filled.tokens, edit_distance(tokens, target, pad_id=PAD))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (20, 33):
        rows, targets = random_pairs(count, random.Random(count))
        tokens, target = batch(rows, device=device), batch(targets, device=device)
        results = compiled(tokens, target, tokens.float())
        for value, wanted in zip(results, step(tokens, target, tokens.float()), strict=True):
            assert torch.equal(value, wanted)
        assert torch.equal(results[-2], target)
