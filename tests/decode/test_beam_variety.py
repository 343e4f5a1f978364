"""Groups, drawn continuations, drawn hypotheses, the lattice: each against its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import ShrinkingTableModel, TableModel, assert_consistent, assert_same, log_probs_of, random_table

from condgen_fast.decode import BeamSearch, Trie, decode

DRAWS = [dict(choose="stochastic"), dict(choose="sample", temperature=1.5)]


def plain_diverse_search(model, sentence, *, groups, beams, diversity, steps):
    """Kept hypotheses of each group after `steps` steps, by algorithm 1 of Vijayakumar et al. 2016; no ends."""
    kept = [[(0.0, 0.0, [])] for _ in range(groups)]
    for _ in range(steps):
        chosen: list[int] = []
        for g in range(groups):
            candidates = []
            for rank, total, tokens in kept[g]:
                node = 0
                for token in tokens:
                    node = (node * model.vocab_size + token + 1) % model.table.shape[1]
                for token, log_prob in enumerate(model.table[sentence, node].double().log_softmax(0).tolist()):
                    if token not in (model.pad_id, model.bos_id, model.eos_id):
                        penalty = diversity * chosen.count(token)
                        candidates.append((rank + log_prob - penalty, total + log_prob, [*tokens, token]))
            kept[g] = sorted(candidates, key=lambda c: -c[0])[:beams]
            chosen += [tokens[-1] for *_, tokens in kept[g]]
    return kept


def test_groups_follow_the_plain_search():
    sentences, steps = 20, 5
    table = random_table(sentences, 997, 9, seed=41)
    table[:, :, 1] = -60.0  # no ends before the limit
    model = TableModel(table)
    beam = BeamSearch(beam_size=6, groups=3, diversity=0.7, n_best=6, max_length=steps + 1, keep_lattice=True)
    found = decode(model, [[s] for s in range(sentences)], beam)
    prefixes = found.lattice.prefixes(steps - 1)
    for s in range(sentences):
        kept = plain_diverse_search(model, s, groups=3, beams=2, diversity=0.7, steps=steps)
        expected = [tokens for group in kept for *_, tokens in group]
        assert prefixes[s].tolist() == expected
        totals = [total for group in kept for _, total, _ in group]
        ranks = [rank for group in kept for rank, *_ in group]
        assert found.lattice.scores[steps - 1, s].tolist() == pytest.approx(totals, abs=1e-4)
        assert found.lattice.ranks[steps - 1, s].tolist() == pytest.approx(ranks, abs=1e-4)
        assert sorted(found.to_lists()[s]) == sorted(expected)
    assert_consistent(model, range(sentences), found, atol=1e-4)


def test_groups_are_diverse_and_finish_by_themselves():
    sentences = 60
    model = ShrinkingTableModel(random_table(sentences, 997, 12, seed=42, eos_bias=1.0))
    source = [[s] for s in range(sentences)]
    alone = decode(model, source, BeamSearch(beam_size=2, n_best=2))
    for stopping in ("exact", "heuristic", "first"):
        together = BeamSearch(beam_size=6, n_best=6, groups=3, diversity=2.0, stopping=stopping)
        found = decode(model, source, together)
        plain = decode(model, source, BeamSearch(beam_size=6, n_best=6, stopping=stopping))
        assert_consistent(model, range(sentences), found)

        def distinct_first(found):
            return sum(len({tokens[0] if tokens else -1 for tokens in rows}) for rows in found.to_lists())

        assert distinct_first(found) > distinct_first(plain)
        if stopping == "exact":  # the first group is a search by itself
            for rows, of_group in zip(found.to_lists(), alone.to_lists(), strict=True):
                assert of_group[0] in rows
    unrelated = decode(model, source, BeamSearch(beam_size=6, n_best=3, groups=3, diversity=0.0))
    assert all(rows[0] == rows[1] == rows[2] for rows in unrelated.to_lists())  # three times the same search


def gumbel_top_k(model, sentence, longest):
    ordinary = [t for t in range(model.vocab_size) if t not in (0, 1)]
    every = [list(t) for n in range(longest) for t in itertools.product(ordinary, repeat=n)]
    return every, torch.tensor([math.fsum(log_probs_of(model, sentence, tokens)) for tokens in every])


def test_stochastic_beams_draw_without_replacement_from_the_model():
    """Frequencies of the first draw and of being among two, over 4000 seeds as sentences that differ in their key."""
    V, longest, draws = 4, 3, 4000
    table = random_table(1, 400, V, seed=43)
    table[:, :, 0] = -math.inf  # what cannot be generated has no probability, so the hypotheses' add up to 1
    model = TableModel(table)
    table[0, 1 + V :, 2:] = -math.inf  # only eos follows two tokens
    every, log_probs = gumbel_top_k(model, 0, longest)
    assert math.isclose(log_probs.exp().sum(), 1, abs_tol=1e-4)
    beam = BeamSearch(beam_size=3, n_best=3, choose="stochastic", max_length=longest, seed=1)
    found = decode(model, [[s] for s in range(draws)], beam)
    first = torch.zeros(len(every), dtype=torch.float64)
    either = torch.zeros(len(every), dtype=torch.float64)
    estimate = 0.0
    value = torch.arange(len(every), dtype=torch.float64).sin()
    sums = found.token_log_probs.sum(2)
    for rows, scores, of_rows in zip(found.to_lists(), found.scores.tolist(), sums.tolist(), strict=True):
        places = [every.index(tokens) for tokens in rows]
        assert len(set(places)) == 3
        first[places[0]] += 1
        either[places[:2]] += 1
        threshold = scores[2]
        for place, log_prob in zip(places[:2], of_rows[:2], strict=True):
            inclusion = -math.expm1(-math.exp(log_prob - threshold))
            estimate += math.exp(log_prob) / inclusion * value[place].item()
    p = log_probs.exp()
    error = 4 * (p * (1 - p) / draws).sqrt() + 1e-3
    assert ((first / draws - p).abs() < error).all()
    both = p + torch.stack([p[j] * p / (1 - p[j]) for j in range(len(every))]).sum(0) - p * p / (1 - p)
    assert ((either / draws - both).abs() < 4 * (both * (1 - both) / draws).sqrt() + 1e-3).all()
    assert estimate / draws == pytest.approx((p * value).sum().item(), abs=0.05)  # equation 9 of Kool et al.
    assert_consistent(TableModel(table.expand(draws, -1, -1)), range(0), found)


def test_stochastic_scores_descend_and_differ_by_seed():
    model = TableModel(random_table(20, 997, 10, seed=44, eos_bias=1.0))
    source = [[s] for s in range(20)]
    one = decode(model, source, BeamSearch(beam_size=4, n_best=4, choose="stochastic", seed=5))
    assert (one.scores[:, :-1] >= one.scores[:, 1:]).all()
    assert all(len({tuple(tokens) for tokens in rows}) == 4 for rows in one.to_lists())
    again = decode(model, source, BeamSearch(beam_size=4, n_best=4, choose="stochastic", seed=5))
    other = decode(model, source, BeamSearch(beam_size=4, n_best=4, choose="stochastic", seed=6))
    assert one.to_lists() == again.to_lists() != other.to_lists()
    torch.manual_seed(3)
    unseeded = decode(model, source, BeamSearch(beam_size=4, choose="stochastic"))
    torch.manual_seed(3)
    assert decode(model, source, BeamSearch(beam_size=4, choose="stochastic")).to_lists() == unseeded.to_lists()


def test_beam_sampling_draws_by_temperature():
    model = TableModel(random_table(200, 997, 8, seed=45, eos_bias=0.5))
    source = [[s] for s in range(200)]
    options = dict(beam_size=3, max_length=8)
    best = decode(model, source, BeamSearch(**options))
    cold = decode(model, source, BeamSearch(**options, choose="sample", temperature=1e-4, seed=0))
    warm = decode(model, source, BeamSearch(**options, choose="sample", temperature=1.0, seed=0))
    hot = decode(model, source, BeamSearch(**options, choose="sample", temperature=5.0, seed=0))
    assert cold.to_lists() == best.to_lists()
    assert best.scores.mean() > warm.scores.mean() > hot.scores.mean()
    assert_consistent(model, range(200), warm)


def test_one_step_of_beam_sampling_has_the_models_frequencies():
    table = torch.tensor([[[-9.0, -99.0, 1.0, 0.0, -1.0]]]).expand(1, 4, 5).clone()
    table[0, 1:] = torch.tensor([-99.0, 0.0, -99.0, -99.0, -99.0])
    model = TableModel(table)
    found = decode(
        model,
        [[s] for s in range(4000)],
        BeamSearch(beam_size=1, choose="sample", temperature=2.0, max_length=2, seed=3),
    )
    counts = torch.bincount(found.tokens[:, 0, 0], minlength=5)[2:].double()
    # two continuations are drawn without replacement, and the better of them goes on
    p = (table[0, 0, 2:] / 2).softmax(0).double()
    pairs = torch.stack([torch.stack([p[i] * p[j] / (1 - p[i]) for j in range(3)]) for i in range(3)])
    expected = torch.tensor(
        [sum(pairs[i, j] for i in range(3) for j in range(3) if i != j and min(i, j) == k) for k in range(3)]
    )
    assert ((counts / 4000 - expected).abs() < 0.03).all()


@pytest.mark.parametrize("options", [*DRAWS, dict(groups=2, diversity=1.0)], ids=str)
def test_the_same_in_any_batch(options):
    sentences = 30
    model = ShrinkingTableModel(random_table(sentences, 997, 12, seed=46, eos_bias=1.5))
    beam = BeamSearch(beam_size=4, n_best=3, seed=None if "groups" in options else 9, **options)
    source = [[s, 5][: 1 + s % 2] for s in range(2, 2 + sentences)]
    whole = decode(model, source, beam)
    order = torch.randperm(sentences, generator=torch.Generator().manual_seed(0)).tolist()
    assert_same(decode(model, [source[i] for i in order], beam), whole, order)
    for part in (range(0, 1), range(1, 8), range(8, 30)):
        assert_same(decode(model, [source[i] for i in part], beam), whole, list(part))
    padded = torch.zeros(sentences, 9, dtype=torch.int64)
    for row, sentence in zip(padded, source, strict=True):
        row[: len(sentence)] = torch.tensor(sentence)
    assert_same(decode(model, padded, beam), whole)


@pytest.mark.parametrize("options", [*DRAWS, dict()], ids=str)
def test_nothing_impossible_is_drawn(options):
    """Hypotheses of probability zero, of rows with a logit of +inf, or of ids beyond the vocabulary."""

    def search(row, **more):
        beam = BeamSearch(beam_size=7, n_best=7, max_length=3, **options, **more)
        found = decode(TableModel(torch.tensor(row).expand(1, 1, 6)), [[0]], beam)
        real = found.scores[0] > -math.inf
        assert (found.scores[0] > -1e30).equal(real)
        return [tokens for tokens, is_one in zip(found.to_lists()[0], real.tolist(), strict=True) if is_one]

    INF = math.inf
    assert search([-INF, -INF, 1.0, 0.0, -INF, -INF]) == []  # no end
    assert search([-INF, -1.0, 1.0, -INF, -INF, -INF]) != []
    assert all(set(tokens) <= {2} for tokens in search([-INF, -1.0, 1.0, -INF, -INF, -INF]))
    assert search([0.0, 0.0, INF, 0.0, 0.0, 0.0]) == []
    assert search([0.0] * 6, trie=Trie([[7], [2], [9, 2]])) == [[2]]


def test_places_that_nobody_took_choose_no_token():
    """The first group has one hypothesis, of token 2; that token 0 stands in its other places costs nobody anything."""
    model = TableModel(torch.tensor([0.0, 0.0, 0.5, 0.0]).expand(1, 1, 4), pad_id=3, bos_id=3)
    beam = BeamSearch(
        beam_size=6, groups=2, diversity=1.0, n_best=2, max_length=3, trie=Trie([[0, 2], [2, 2]]), keep_lattice=True
    )
    lattice = decode(model, [[0]], beam).lattice
    assert lattice.tokens[0, 0, :2].tolist() == [2, 0] and lattice.ranks[0, 0, 2] == -math.inf
    lost = dict(
        zip(lattice.tokens[0, 0, 3:5].tolist(), (lattice.scores - lattice.ranks)[0, 0, 3:5].tolist(), strict=True)
    )
    assert lost == {2: pytest.approx(1.0), 0: pytest.approx(1.0)}


def test_lattice_holds_the_search():
    sentences = 25
    model = ShrinkingTableModel(random_table(sentences, 997, 10, seed=47, eos_bias=1.0))
    source = [[s] for s in range(sentences)]
    found = decode(model, source, BeamSearch(beam_size=3, keep_lattice=True))
    assert decode(model, source, BeamSearch(beam_size=3)).lattice is None
    lattice = found.lattice
    assert (
        lattice.tokens.shape == lattice.parents.shape == lattice.scores.shape == (found.iterations.max(), sentences, 3)
    )
    for step in range(lattice.tokens.shape[0]):
        prefixes = lattice.prefixes(step)
        for s in range(sentences):
            kept = lattice.scores[step, s] > -math.inf
            last = found.iterations[s] - 1  # where everything may have ended
            assert step == last or kept.any() == (step < last)
            for slot in kept.nonzero()[:, 0].tolist():
                tokens = prefixes[s, slot].tolist()
                total = math.fsum(log_probs_of(model, s, tokens)[:-1])
                assert lattice.scores[step, s, slot].item() == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(groups=2), "groups must divide beam_size = 5; got 2"),
        (dict(diversity=-1.0), "diversity"),
        (dict(groups=5, diversity=101.0), "diversity must be in"),
        (dict(seed=2**63), "seed must be in"),
        (dict(choose="worst"), "choose must be 'best', 'sample' or 'stochastic'"),
        (dict(choose="stochastic", stopping="first"), "stopping must be exact"),
        (dict(choose="sample", groups=5), "groups must be 1"),
        (dict(choose="sample", temperature=0.0), "temperature must be > 0"),
        (dict(seed=-1), "seed must be in"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        BeamSearch(**options)
