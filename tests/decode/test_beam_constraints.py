"""What hypotheses may hold: bans, several ends, forced prefixes, tries; each against brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import ShrinkingTableModel, TableModel, log_probs_of, random_table

from condgen_fast.decode import BeamSearch, Trie, decode

V, LONGEST, SENTENCES = 6, 5, 12
SOURCE = [[s] for s in range(SENTENCES)]
EXHAUSTIVE = BeamSearch(beam_size=700, n_best=5, max_length=LONGEST)


def model(cls=TableModel, **ids):
    return cls(random_table(SENTENCES, sum(V**i for i in range(LONGEST)), V, seed=31), **ids)


def best(model, sentence, fits, n=5, ends=(1,)):
    """The n best of all hypotheses that `fits(tokens)` lets pass, with their scores."""
    ordinary = [t for t in range(V) if t != model.pad_id and t not in ends]
    found = []
    for length in range(LONGEST):
        for tokens in itertools.product(ordinary, repeat=length):
            if not fits(list(tokens)):
                continue
            for end in ends:
                row = log_probs_of(replace_eos(model, end), sentence, list(tokens))
                found.append((math.fsum(row) / (length + 1), list(tokens)))
    return sorted(found, key=lambda pair: -pair[0])[:n]


def replace_eos(model, eos_id):
    return TableModel(model.table, pad_id=model.pad_id, bos_id=model.bos_id, eos_id=eos_id)


def assert_best(model, beam, fits, ends=(1,)):
    found = decode(model, SOURCE, beam)
    for s in range(SENTENCES):
        of = fits if not isinstance(fits, list) else fits[s]
        expected = best(model, s, of, beam.n_best, ends)
        n = len(expected)
        assert found.to_lists()[s][:n] == [tokens for _, tokens in expected]
        assert found.scores[s, :n].tolist() == pytest.approx([value for value, _ in expected], abs=1e-5)
        assert (found.scores[s, n:] == -math.inf).all()


def test_banned():
    assert_best(model(), replace(EXHAUSTIVE, banned=(3, 5)), lambda tokens: not {3, 5} & set(tokens))


def test_banned_and_minimum_length():
    beam = replace(EXHAUSTIVE, banned=(4,), min_length=3)
    assert_best(model(), beam, lambda tokens: 4 not in tokens and len(tokens) >= 2)


def test_several_ends():
    ending = model()
    ending.eos_ids = (1, 4)
    assert_best(ending, EXHAUSTIVE, lambda tokens: True, ends=(1, 4))
    assert_best(ending, replace(EXHAUSTIVE, min_length=4), lambda tokens: len(tokens) >= 3, ends=(1, 4))
    for stopping in ("exact", "heuristic", "first"):  # and with a beam that has to be filled up behind two ends
        found = decode(ending, SOURCE, BeamSearch(beam_size=2, n_best=2, stopping=stopping, max_length=8))
        assert not ((found.tokens == 1) | (found.tokens == 4)).any() and (found.scores > -math.inf).all()


def test_an_end_that_is_named_twice_is_one():
    for options in (dict(max_length=1), dict(max_length=4, min_length=2), dict(choose="sample", seed=0)):
        beam = BeamSearch(beam_size=4, n_best=4, **options)
        twice = model()
        twice.eos_ids = (1, 1)
        found, expected = decode(twice, SOURCE, beam), decode(model(), SOURCE, beam)
        assert found.to_lists() == expected.to_lists() and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("cls", [TableModel, ShrinkingTableModel])
def test_ragged_prefixes(cls):
    prefixes = [[2, 3, 2][: s % 4] for s in range(SENTENCES)]
    prefixes[5] = [0, 5]  # pad or bos too, if they are forced
    beam = replace(EXHAUSTIVE, prefixes=prefixes, n_best=3)
    found = decode(model(cls), SOURCE, beam)
    assert all(rows[0][: len(p)] == p for rows, p in zip(found.to_lists(), prefixes, strict=True))
    prefixes[5] = [3, 5]
    fits = [lambda tokens, p=prefix: tokens[: len(p)] == p for prefix in prefixes]
    assert_best(model(cls), replace(beam, prefixes=prefixes), fits)
    with_bans = replace(beam, prefixes=prefixes, banned=(3,), min_length=4)  # which prefixes may break
    fits = [
        lambda tokens, p=prefix: tokens[: len(p)] == p and 3 not in tokens[len(p) :] and len(tokens) >= 3
        for prefix in prefixes
    ]
    assert_best(model(cls), with_bans, fits)


def test_a_prefix_and_its_end_always_fit():
    """Into a limit that is given, or the prefix is refused; the default limit makes room."""
    table = TableModel(random_table(2, 997, V, seed=31))

    def search(prefix, **options):
        found = decode(table, [[0], [1]], BeamSearch(beam_size=2, prefixes=[[], prefix], **options))
        assert (found.scores > -math.inf).all()
        return found.to_lists()[1][0], bool(found.ended[1, 0])

    for impl in ("auto", "reference"):
        assert search([5, 4], max_length=3, impl=impl) == ([5, 4], True)
        assert search([5, 4, 1], max_length=3, impl=impl) == ([5, 4], True)  # it has its end
        assert search([5, 4, 3], max_length=3, compat="hf", impl=impl) == ([5, 4, 3], False)
        long = [5, 4, 3, 2] * 4
        assert search(long, impl=impl) == (long, True) and len(long) > 2 * 1 + 10
    for prefix, options, most in (([5, 4, 3], {}, 2), ([5, 4, 3, 1], {}, 2), ([5, 4, 3, 2], dict(compat="hf"), 3)):
        message = f"prefixes must have at most {most} tokens with max_length = 3; got one of {len(prefix)}"
        with pytest.raises(ValueError, match=message):
            search(prefix, max_length=3, **options)
    table.max_positions = 17
    assert search(long) == (long, True)
    with pytest.raises(ValueError, match="at most 16 tokens with model.max_positions = 17; got one of 17"):
        search([*long, 2])


@pytest.mark.parametrize("cls", [TableModel, ShrinkingTableModel])
def test_trie_of_whole_targets(cls):
    sequences = [[2, 3], [2, 3, 4], [2, 5], [5], [4, 4, 4, 4], [3, 2, 3], [5, 1]]  # the last is [5] with its eos
    assert_best(model(cls), replace(EXHAUSTIVE, trie=Trie(sequences)), lambda tokens: tokens in sequences)
    small = decode(model(cls), SOURCE, BeamSearch(beam_size=2, n_best=2, trie=Trie(sequences)))
    assert all(tokens in sequences for rows in small.to_lists() for tokens in rows)
    too_long = decode(model(cls), SOURCE, BeamSearch(trie=Trie([[2, 3, 4, 5, 2]]), max_length=4))
    assert (too_long.scores == -math.inf).all() and (too_long.lengths == 0).all()


def test_trie_of_beginnings_behind_prefixes():
    beginnings = [[2, 3], [4], [4, 5], [5, 5, 2]]
    prefixes = [[3][: s % 2] for s in range(SENTENCES)]
    beam = replace(EXHAUSTIVE, trie=Trie(beginnings, whole=False), prefixes=prefixes)

    def fits(tokens, prefix):
        rest = tokens[len(prefix) :]
        return tokens[: len(prefix)] == prefix and any(rest[: len(b)] == b for b in beginnings)

    assert_best(model(), beam, [lambda tokens, p=prefix: fits(tokens, p) for prefix in prefixes])


def test_a_trie_costs_no_host_reads_and_knows_many_sequences():
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(2, 50, (3000, 4), generator=generator).tolist()
    wide = TableModel(random_table(8, 997, 50, seed=2))
    found = decode(wide, [[s] for s in range(8)], BeamSearch(beam_size=5, n_best=5, trie=Trie(sequences)))
    assert all(tokens in sequences for rows in found.to_lists() for tokens in rows)
    reference = BeamSearch(beam_size=5, n_best=5, trie=Trie(sequences), impl="reference")
    assert decode(wide, [[s] for s in range(8)], reference).to_lists() == found.to_lists()


def test_repetition_penalty():
    table = TableModel(random_table(SENTENCES, 997, 8, seed=5, eos_bias=-2.0))
    plain = decode(table, SOURCE, BeamSearch(beam_size=4, max_length=9))
    penalised = decode(table, SOURCE, BeamSearch(beam_size=4, max_length=9, repetition_penalty=5.0))

    def repeats(found):
        return sum(len(tokens) - len(set(tokens)) for rows in found.to_lists() for tokens in rows)

    assert repeats(penalised) < repeats(plain) / 2
    tokens = penalised.to_lists()[0][0]
    node, expected = 0, []
    for i, token in enumerate([*tokens, 1]):
        logits = table.table[0, node].double().clone()
        for earlier in set(tokens[:i]):
            logits[earlier] = logits[earlier] / 5 if logits[earlier] > 0 else logits[earlier] * 5
        expected.append(logits.log_softmax(0)[token].item())
        node = (node * 8 + token + 1) % 997
    assert penalised.token_log_probs[0, 0, : len(expected)].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("impossible", [math.nan, -math.inf])
@pytest.mark.parametrize("options", [dict(), dict(impl="reference"), dict(choose="sample", temperature=0.01)], ids=str)
@pytest.mark.parametrize("penalty", [1.5, 0.5])
def test_a_penalty_on_what_cannot_follow(impossible, options, penalty):
    """Token 2 comes first and has no probability afterwards: it must not come back, nor take others with it."""
    table = torch.zeros(1, 40, 5)
    table[..., 1] = -3.0
    table[0, 0, 2] = 3.0
    table[0, 1:, 2], table[0, 1:, 3] = impossible, 1.0
    beam = BeamSearch(beam_size=2, n_best=2, max_length=4, compat="hf", repetition_penalty=penalty, seed=0, **options)
    found = decode(TableModel(table), [[0]], beam)
    assert (found.scores > -2).all() and all(tokens[0] == 2 not in tokens[1:] for tokens in found.to_lists()[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(banned=(9,)), r"banned must hold ids in \[0, 6\)"),
        (dict(prefixes=[[2]]), "prefixes must have one list for each of 12 sentences; got 1"),
        (dict(prefixes=[[7]] * 12), r"prefixes must hold ids in \[0, 6\)"),
        (dict(repetition_penalty=0.0), "repetition_penalty must be > 0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        decode(model(), SOURCE, BeamSearch(**options))


def test_refuses_a_trie_of_nothing():
    for sequences in ([], [[]], [[-1]]):
        with pytest.raises(ValueError, match="sequences must"):
            Trie(sequences)
    with pytest.raises(TypeError, match="trie must be a Trie; got list"):
        BeamSearch(trie=[[1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(banned=[5.7]), r"banned must hold ints only; got 5\.7"),
        (dict(banned=[True]), "banned must hold ints only; got True"),
        (dict(banned="12"), "banned must be a list; got str"),
        (dict(banned=None), "banned must be a list; got NoneType"),
        (dict(prefixes=3), "prefixes must be a list; got int"),
        (dict(prefixes=["12"]), r"prefixes\[0\] must be a list; got str"),
        (dict(prefixes=[[], [5.7]]), r"prefixes\[1\] must hold ints only; got 5\.7"),
        (dict(prefixes=[None]), r"prefixes\[0\] must be a list; got NoneType"),
    ],
)
def test_refuses_what_is_no_list_of_ids(options, message):
    with pytest.raises(TypeError, match=message):
        BeamSearch(**options)
