from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Indel, Levenshtein

from condgen_fast.ops.levenshtein import apply_edits, edit_alignment, edit_distance, edit_oracle

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
def test_every_pair_up_to_length_four(device, slots):
    words = [list(word) for n in range(5) for word in itertools.product((10, 11, 12), repeat=n)]
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
    ("x", "y", "columns", "distance"),
    [
        ("kitten", "sitting", ["kitten-", "sitting"], 3),
        ("aab", "ab", ["aab", "-ab"], 1),  # a pair before a deletion, from the end
        ("ab", "ba", ["ab", "ba"], 2),  # two substitutions, where a deletion and an insertion cost the same
        ("abc", "c", ["abc", "--c"], 2),
        ("bc", "abd", ["-bc", "abd"], 2),
        ("", "ab", ["--", "ab"], 2),
        ("ab", "", ["ab", "--"], 2),
    ],
)
def test_alignments_worked_by_hand(device, impl, x, y, columns, distance):
    gap = 99
    tokens, target = (batch([ids(word), ids("a")], width=8, device=device) for word in (x, y))
    found = edit_alignment(tokens, target, pad_id=PAD, gap_id=gap, impl=impl)
    spelled = [[gap if letter == "-" else ids(letter)[0] for letter in row] for row in columns]
    length = len(columns[0])
    assert found.lengths.tolist() == [length, 1] and found.distance.tolist() == [distance, 0]
    assert [found.tokens[0, :length].tolist(), found.target[0, :length].tolist()] == spelled
    assert found.tokens.shape == found.target.shape == (2, 16)
    assert (found.tokens[0, length:] == PAD).all() and (found.target[0, length:] == PAD).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignments_of_random_pairs(device, dtype):
    rows, targets = random_pairs(150, random.Random(23))
    tokens, target = (batch(side, device=device, dtype=dtype) for side in (rows, targets))
    wanted = edit_alignment(tokens, target, pad_id=PAD, gap_id=MASK, impl="reference")
    found = edit_alignment(tokens, target, pad_id=PAD, gap_id=MASK)
    assert_equal(found, wanted, rows, targets)
    assert found.distance.tolist() == [Levenshtein.distance(x, y) for x, y in zip(rows, targets, strict=True)]
    for b, length in enumerate(found.lengths.tolist()):
        for aligned, row in ((found.tokens, rows[b]), (found.target, targets[b])):
            assert [token for token in aligned[b, :length].tolist() if token != MASK] == row


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cost", ["levenshtein", "indel"])
def test_all_pairs(device, impl, cost):
    rows, targets = random_pairs(23, random.Random(24))
    rows, targets = [row[:60] for row in rows], [row[:90] for row in targets[:11]]
    a, b = batch(rows, device=device), batch(targets, device=device)
    found = edit_distance(a, b, pad_id=PAD, cost=cost, all_pairs=True, impl=impl)
    distance = {"levenshtein": Levenshtein, "indel": Indel}[cost].distance
    assert found.tolist() == [[distance(x, y) for y in targets] for x in rows]
    assert edit_distance(a[:0], b, pad_id=PAD, all_pairs=True, impl=impl).shape == (0, 11)
    assert edit_distance(a, b[:0], pad_id=PAD, all_pairs=True, impl=impl).shape == (23, 0)
    bad = torch.tensor([[10, 11], [10, 12], [PAD, 13]])
    with pytest.raises(ValueError, match="b must be right-padded; got pad_id 0 before a token in row 2, position 0"):
        edit_distance(bad[:2], bad, pad_id=PAD, all_pairs=True, impl=impl)


@pytest.mark.parametrize("largest", [2**15, 2**16 + 5, 2**31 + 5, 2**40])
def test_ids_of_every_size(device, largest):
    """Ids of up to 16, 32 and 64 bits take different paths; the change comes within a batch, and at the padding."""
    generator = random.Random(largest)
    rows, targets = random_pairs(40, generator)
    rows, targets = [row[:60] for row in rows], [row[:60] for row in targets]
    for side in (rows, targets):
        for row in side[20:]:
            row[1:-1] = [token + largest if generator.random() < 0.9 else -token for token in row[1:-1]]
    tokens, target = batch(rows, device=device), batch(targets, device=device)
    for pad in (PAD, -5, largest * 2):
        x, y = (side.masked_fill(side == PAD, pad) for side in (tokens, target))
        x, y = (torch.nn.functional.pad(side, (0, 1), value=pad) for side in (x, y))
        for side, whole in ((x, rows), (y, targets)):  # so that every insertion has a slot
            side[torch.arange(40), [len(row) for row in whole]] = 7
        wanted = edit_oracle(x, y, pad_id=pad, slots="source", impl="reference")
        assert_equal(edit_oracle(x, y, pad_id=pad, slots="source"), wanted, rows, targets)
        found = edit_distance(x, y, pad_id=pad)
        assert torch.equal(found, edit_distance(x, y, pad_id=pad, impl="reference"))


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
        (TypeError, "all_pairs must be a bool; got int", lambda: edit_distance(x, x, pad_id=0, all_pairs=1)),
        (ValueError, "gap_id must differ from pad_id; got 0 .*", lambda: edit_alignment(x, x, pad_id=0, gap_id=0)),
        (ValueError, "gap_id must be in .*", lambda: edit_alignment(x.int(), x.int(), pad_id=0, gap_id=2**31)),
        (
            ValueError,
            r"carried\[1\] must have shape \[B, S, ...\] with B=1, S=3 on cpu; got \[1, 2\] on cpu",
            lambda: apply_edits(x, carried=(x, x[:, :2]), **IDS),
        ),
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
    torch.library.opcheck(ops.edit_alignment.default, (tokens, target, PAD, MASK))
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    torch.library.opcheck(ops.random_noise.default, (tokens, seed, 1, PAD, BOS, EOS, MASK, 0))
    for all_pairs in (False, True):
        torch.library.opcheck(ops.edit_distance.default, (tokens, target, PAD, True, all_pairs))
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
        aligned = edit_alignment(tokens, target, pad_id=PAD, gap_id=MASK)
        return (*labels, *canvas[:4], filled.tokens, edit_distance(tokens, target, pad_id=PAD), *aligned)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (20, 33):
        rows, targets = random_pairs(count, random.Random(count))
        tokens, target = batch(rows, device=device), batch(targets, device=device)
        results = compiled(tokens, target, tokens.float())
        for value, wanted in zip(results, step(tokens, target, tokens.float()), strict=True):
            assert torch.equal(value, wanted)
        assert torch.equal(results[8], target)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_captures_all_of_it():
    """Nothing waits for the host: what a capture records runs again on other contents."""
    rows, targets = random_pairs(16, random.Random(5))
    tokens, target = batch(rows, device="cuda"), batch(targets, device="cuda")

    def step():
        labels = edit_oracle(tokens, target, pad_id=PAD)
        canvas = apply_edits(tokens, delete=labels.delete, insert=labels.insert, max_length=target.shape[1], **IDS)
        alignment = edit_alignment(tokens, target, pad_id=PAD, gap_id=MASK)
        distance = edit_distance(tokens, target, pad_id=PAD, all_pairs=True)
        return *labels, canvas.tokens, *alignment, distance

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    tokens.copy_(tokens.roll(1, 0))
    graph.replay()
    for value, wanted in zip(recorded, step(), strict=True):
        assert torch.equal(value, wanted)
