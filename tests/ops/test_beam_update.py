"""beam_update and beam_hypotheses: every implementation against the reference, state for state; a search by hand."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor

from condgen_fast.ops.beam_search import (
    BeamConstraints,
    BeamRules,
    BeamState,
    Candidates,
    beam_hypotheses,
    beam_update,
)

INF = float("inf")
V = 12  # tokens 0 .. 11, of which 1 and sometimes 2 are ends
TENSORS = [
    "sentences", "chosen", "totals", "flags", "bans", "ranges", "progress", "finished_ids", "finished_totals",
]  # fmt: skip


def a_trie(ends: list[int]) -> tuple[Tensor, Tensor, int, int]:
    """Node 0 has children an end, 3 and 4, which lead to node 1, whose children are 5 and 6; from there all goes."""
    stride = max(ends[0], 6) + 1
    tokens = torch.tensor([ends[0], 3, 4, 5, 6])
    parents, targets = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, -1, 0])
    keys = parents * stride + tokens
    return tokens, torch.cat([torch.tensor([0, 3, 5]), torch.tensor([1, 0]), keys, targets]), 2, stride


def random_state(seed: int, device: str) -> BeamState:
    draw = random.Random(seed)
    G = draw.choice([1, 1, 2, 3])
    k, B, T = draw.choice([1, 2, 4, 7, 40]), draw.choice([1, 2, 5]), draw.choice([2, 5, 9])
    n_best = draw.randint(1, k)
    options = dict(
        stopping=draw.choice(["exact", "heuristic", "first", "topped"]),
        wanted=max(n_best, draw.choice([k, 1, 2 * k])),
        n_best=n_best,
        min_length=draw.choice([0, 0, 3, 20]),
        rising=draw.random() < 0.7,
        cut_at_limit=draw.random() < 0.4,
        overflow=draw.choice(["best", "order", "room"]),
        by_rank=draw.random() < 0.3,
        no_repeat_ngram=draw.choice([0, 0, 1, 2, 3]),
    )
    ends, banned = draw.choice([[1], [1, 2], [2, 1]]), draw.choice([[], [0], [0, 1], [7, 8]])
    early = [end for end in ends if end not in banned] if draw.random() < 0.6 else []
    longest_prefix = draw.choice([0, 0, 1, 3])
    parts, of_trie = [torch.tensor(ends), torch.full((B * longest_prefix,), 3)], {}
    if draw.random() < 0.4:
        children, edges, nodes, stride = a_trie(ends)
        parts.append(children)
        of_trie = dict(trie=edges.to(device), trie_nodes=nodes, trie_stride=stride)
    prefix_lengths = torch.tensor([draw.randint(0, longest_prefix) for _ in range(B)] if longest_prefix else [])
    constraints = BeamConstraints(
        ends=torch.tensor(ends, device=device),
        banned=torch.tensor(banned + early, dtype=torch.int64, device=device),
        always_banned=len(banned),
        allowed=torch.cat(parts).to(device),
        prefix_lengths=prefix_lengths.to(device, torch.int64),
        longest_prefix=longest_prefix,
        **of_trie,
    )
    limits = torch.tensor([draw.randint(1, T) for _ in range(B)], device=device)
    state = BeamState.start(
        BeamRules(**options),
        constraints,
        limits,
        torch.arange(T + 2, device=device).float().clamp(min=0.5) ** draw.choice([1.0, -0.5, 0.0]),
        beams=k * G,
        groups=G,
        ranked=options["by_rank"] or draw.random() < 0.5,
        first_token=9,
        history=draw.choice([None, 0, 1]),
    )
    if draw.random() < 0.5:
        rows = sorted(draw.sample(range(B), draw.randint(1, B)))
        state = state.select(torch.tensor(rows, device=device))
    return state


def random_candidates(state: BeamState, seed: int) -> Candidates:
    """Ends among them, ties, and often too few that live."""
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    (R, K), G = state.tokens.shape, state.groups
    k = K // G
    C = k * draw.choice([1, 2, 3])
    shape, device = (R * G, C), state.tokens.device
    ranks = (torch.randn(shape, generator=generator) * 3 - 4).round(decimals=draw.choice([0, 3]))
    ranks = ranks.sort(1, descending=True).values
    living = torch.randint(0 if draw.random() < 0.3 else k, C + 1, (R * G, 1), generator=generator)
    ranks[torch.arange(C) >= living] = -INF
    sums = ranks - torch.rand(shape, generator=generator).round(decimals=1) if len(state.totals) == 2 else ranks
    first = k * torch.arange(G).repeat(R)[:, None]
    parents = torch.randint(0, k, shape, generator=generator) + first
    tokens = torch.randint(1, 4 if draw.random() < 0.3 else V, shape, generator=generator)
    return Candidates(*(each.to(device) for each in (ranks, sums, parents, tokens)))


def assert_same_state(one: BeamState, other: BeamState, steps: int) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.history[0], other.history[0]) and torch.equal(one.nodes[0], other.nodes[0])
    made = one.sentences[0]  # of the others nothing has been written
    for name in ("lattice_ids", "lattice_totals"):
        assert torch.equal(getattr(one, name)[:, :steps, made], getattr(other, name)[:, :steps, made]), name


@pytest.mark.parametrize("block", range(8))
def test_as_the_reference(block, device):
    finished = 0
    for seed in range(100 * block, 100 * block + 100):
        state = random_state(seed, device)
        expected = copy.deepcopy(state)
        for step in range(state.steps):
            found = random_candidates(state, 1000 * seed + step)
            beam_update(state, found)
            beam_update(expected, found, impl="reference")
            assert_same_state(state, expected, step + 1)
        finished += int(state.finished_count)
        assert (state.sentences[2] == state.steps).all()
    assert finished > 100


@pytest.mark.parametrize("rule", range(10))
def test_every_rule_makes_a_difference(rule, device):
    """Not one of them can be ignored without `test_as_the_reference` seeing it."""
    for seed in range(300):
        state = random_state(seed, device)
        expected = copy.deepcopy(state)
        most = [4, *[state.finished_ids.shape[3] + 1] * 2, 10, 2, 2, 2, 2, 4, len(state.constraints.banned) + 1][rule]
        state.numbers[rule] = (state.numbers[rule] + 1) % most or int(rule in (1, 2, 8))
        for step in range(state.steps):
            for each in (state, expected):
                beam_update(each, random_candidates(state, 1000 * seed + step))
            if any(not torch.equal(getattr(state, name), getattr(expected, name)) for name in TENSORS):
                return
    raise AssertionError


def test_one_sentence_by_hand(device):
    """Two beams; an end in front, one too late to count, and too few others."""
    constraints = BeamConstraints(
        ends=torch.tensor([1], device=device),
        banned=torch.tensor([0, 1], device=device),
        always_banned=1,
        allowed=torch.tensor([1], device=device),
        prefix_lengths=torch.tensor([], dtype=torch.int64, device=device),
    )
    state = BeamState.start(
        BeamRules("exact", wanted=2, n_best=1, min_length=3),
        constraints,
        torch.tensor([3], device=device),
        torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0], device=device),
        beams=2,
        first_token=5,
    )
    assert state.tokens.tolist() == [[5, 5]] and state.sums.tolist() == [[0.0, -INF]]
    assert state.adjust.tokens.tolist() == [[[0, 1], [0, 1]]] and state.allowed.first.tolist() == [[-1, -1]]

    def step(ranks, parents, tokens):
        ranks = torch.tensor([ranks], device=device)
        ids = (torch.tensor([each], device=device) for each in (parents, tokens))
        beam_update(state, Candidates(ranks, ranks, *ids))

    step([-1.0, -2.0, -3.0, -4.0], [0, 0, 0, 0], [1, 7, 1, 8])
    assert state.finished_totals[:, 0, 0].tolist() == [[-1.0, -INF], [-1.0, -INF]]
    assert state.finished_ids[:, 0, 0, 0].tolist() == [0, 1, 1]
    assert state.tokens.tolist() == [[7, 8]] and state.sums.tolist() == [[-2.0, -4.0]]
    assert not state.flags[0].any()  # -2 / 3 may follow
    assert state.adjust.tokens.tolist() == [[[0, 1], [0, 1]]]
    step([-2.5, -6.0, -6.5, -INF], [0, 1, 0, 0], [9, 1, 1, 0])
    assert state.finished_totals[0, 0, 0].tolist() == [-1.0, -3.0]
    assert state.tokens.tolist() == [[9, 1]] and state.parents.tolist() == [[0, 1]]
    assert state.sums.tolist() == [[-2.5, -INF]]
    assert state.adjust.tokens.tolist() == [[[0, -1], [0, -1]]]  # the limit is stronger than min_length
    assert state.allowed.first.tolist() == [[0, 0]] and state.allowed.last.tolist() == [[1, 1]]
    step([-2.7, -INF], [0, 0], [1, 0])
    assert state.flags[0].all() and state.progress.tolist() == [3, 1]
    ids, (scores, sums) = state.finished_ids[:, :, 0], state.finished_totals[:, :, 0]
    torch.testing.assert_close(scores, torch.tensor([[-0.9, -1.0]], device=device))
    tokens, lengths, log_probs = beam_hypotheses(
        ids, sums, *state.lattice_ids, state.lattice_totals[0], constraints.ends, 5
    )
    assert tokens.tolist() == [[[7, 9, 5], [5, 5, 5]]] and lengths.tolist() == [[2, 0]]
    expected = torch.tensor([[[-2.0, -0.5, -0.2, 0.0], [-1.0, 0.0, 0.0, 0.0]]], device=device)
    torch.testing.assert_close(log_probs, expected)


@pytest.mark.parametrize(("B", "n", "T", "K"), [(1, 1, 1, 1), (3, 2, 7, 4), (40, 5, 9, 5), (0, 2, 3, 2)])
def test_hypotheses_as_the_reference(B, n, T, K, device):
    generator = torch.Generator().manual_seed(B)

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    finished = torch.stack([integers(K, B, n), integers(V, B, n) - 1, 1 + integers(T, B, n)])
    sums, totals = torch.randn(B, n, generator=generator), torch.randn(T, B, K, generator=generator)
    arguments = [finished, sums, integers(V, T, B, K), integers(K, T, B, K), totals, torch.tensor([1, 2])]
    arguments = [each.to(device) for each in arguments]
    found = beam_hypotheses(*arguments, 99)
    expected = beam_hypotheses(*arguments, 99, impl="reference")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    finished[2] = 1  # nothing but the last token
    tokens, lengths, log_probs = beam_hypotheses(finished.to(device), *arguments[1:], 99)
    assert (lengths.cpu() == ((finished[1] != 1) & (finished[1] != 2) & (finished[1] != -1))).all()
    assert (tokens[..., 1:] == 99).all() and (log_probs[..., 1:] == 0).all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_values_out_of_range_are_refused(impl):
    """On the CPU; whatever they are, no memory but the op's own is read or written, and the state stays as it was."""
    T, B, K = 3, 1, 2
    lattice = torch.zeros(T, B, K, dtype=torch.int64)

    def follow(slot, length, parents=lattice):
        finished = torch.tensor([[[slot]], [[5]], [[length]]])
        totals = torch.zeros(T, B, K)
        return beam_hypotheses(finished, torch.zeros(1, 1), lattice, parents, totals, torch.tensor([1]), 0, impl=impl)

    assert follow(1, T)[1].tolist() == [[T]]
    for slot, length in ((0, 0), (0, -3), (0, T + 1), (0, 2**40), (-1, 2), (K, 2), (2**40, 2)):
        with pytest.raises(ValueError, match="finished"):
            follow(slot, length)
    for parent in (-1, K, 2**40):
        with pytest.raises(ValueError, match="parents"):
            follow(1, T, lattice + parent)
    with pytest.raises(ValueError, match="tokens must hold a step and a beam" if impl == "auto" else "finished"):
        empty = torch.zeros(0, B, K, dtype=torch.int64)
        finished = torch.tensor([[[0]], [[5]], [[1]]])
        beam_hypotheses(finished, torch.zeros(1, 1), empty, empty, empty.float(), torch.tensor([1]), 0, impl=impl)

    state = random_state(1, "cpu")
    found = random_candidates(state, 0)
    for parent in (-1, state.tokens.shape[1], 2**40):
        before = copy.deepcopy(state)
        parents = found.parents.clone()
        parents[-1, -1] = parent
        with pytest.raises(ValueError, match=r"parents must be in \[0, "):
            beam_update(state, found._replace(parents=parents), impl=impl)
        assert_same_state(state, before, 0)
    if impl == "auto":
        for place in range(3):
            for value in (-1, 2**40):
                broken = copy.deepcopy(state)
                broken.sentences[place, 0] = value
                with pytest.raises(ValueError, match=rf"sentences\[{place}\] must be in"):
                    beam_update(broken, found)
        broken = next(each for each in map(lambda seed: random_state(seed, "cpu"), range(99)) if each.nodes.numel())
        broken.nodes[0] += broken.constraints.trie_nodes
        with pytest.raises(ValueError, match="nodes must be below 2"):
            beam_update(broken, random_candidates(broken, 0))


def test_opcheck(device):
    state = random_state(3, device)
    found = random_candidates(state, 0)
    arguments = (*found, state.changed, state.constant, state.numbers)
    torch.library.opcheck(torch.ops.condgen_fast.beam_update.default, arguments)
    lattice = (*state.lattice_ids.zero_(), state.lattice_totals[0].zero_())
    arguments = (state.finished_ids.flatten(2), state.finished_totals[1].flatten(1), *lattice, state.constant[0], 0)
    torch.library.opcheck(torch.ops.condgen_fast.beam_hypotheses.default, arguments)


def test_refuses(device):
    state = random_state(1, device)
    found = random_candidates(state, 0)
    with pytest.raises(TypeError, match="state must be a BeamState; got list"):
        beam_update([], found)
    with pytest.raises(ValueError, match="impl must be 'auto' or 'reference'; got 'fast'"):
        beam_update(state, found, impl="fast")
    for impl in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"sums must have shape \[N, C\]"):
            beam_update(state, found._replace(sums=found.sums[:, :-1]), impl=impl)
        with pytest.raises(ValueError, match="parents must be int64; got float32"):
            beam_update(state, found._replace(parents=found.ranks), impl=impl)
        least = state.tokens.shape[1] // state.groups
        with pytest.raises(ValueError, match=f"tokens must have at least {least} columns; got {least - 1}"):
            beam_update(state, Candidates(*(each[:, : least - 1] for each in found)), impl=impl)
    if device == "cpu":  # the op itself reads no foreign memory
        for place in range(len(state.changed)):
            wrong = list(state.changed)
            wrong[place] = wrong[place].flatten()[:-1]
            with pytest.raises(ValueError, match="must"):
                torch.ops.condgen_fast.beam_update(*found, wrong, state.constant, state.numbers)
        with pytest.raises(ValueError, match=r"finished must have shape \[3, B, n\]"):
            ids, totals = state.lattice_ids[0], state.lattice_totals[0]
            beam_hypotheses(state.finished_ids, totals, ids, ids, totals, state.constant[0], 0)
