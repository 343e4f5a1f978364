"""Which predictions the policies of BlockDiffusion write, and in which pass."""

from __future__ import annotations

import pytest
from masked_models import (
    ALL_POLICIES,
    RandomLM,
    by_position,
    written_per_pass,
)
from refinement_helpers import FIRST, MASK

from condgen_fast.decode import BlockDiffusion, decode


@pytest.mark.parametrize("length", [1, 3, 8])
def test_quota_writes_exactly_its_share_in_every_pass(length):
    for steps in (None, 1, 2, 3, 5, 8, 11):
        sources = [[5] * (1 + n % 4) + [MASK] * n for n in range(21)]
        strategy = BlockDiffusion(block_length=length, policy="quota", steps=steps, trace=True, max_length=0)
        # Blocks are counted from the end of what was given: the first of a row is what remains.
        result = decode(RandomLM(), sources, strategy)
        appended = decode(
            RandomLM(eos=False), [[5] * (1 + n % 4) for n in range(21)],
            BlockDiffusion(block_length=length, policy="quota", steps=steps, trace=True, max_length=13),
        )  # fmt: skip
        passes = steps or length
        for n, (source, trace) in enumerate(zip(sources, result.trace, strict=True)):
            starts = range(len(source) % length - length, len(source), length)
            masks = [sum(start <= i < start + length for i in range(len(source) - n, len(source))) for start in starts]
            assert written_per_pass(trace) == shares(masks, passes)
            assert result.iterations[n] == trace.iterations == len(shares(masks, passes))
        for trace in appended.trace:
            assert written_per_pass(trace) == shares([length] * (13 // length) + [13 % length], passes)


def shares(masks, passes):
    return [s for n in masks for s in (n // passes + (i < n % passes) for i in range(passes)) if s]


def test_threshold_writes_what_is_sure_and_at_least_the_minimum():
    model = by_position([(7, 0.95), (8, 0.6), (9, 0.9), (10, 0.3)])
    # positions 5 … 8 have probabilities 0.6, 0.9, 0.3, 0.95
    passes = {1: [[6, 8], [5], [7]], 2: [[6, 8], [5, 7]], 3: [[5, 6, 8], [7]], 9: [[5, 6, 7, 8]]}
    for minimum, want in passes.items():
        strategy = BlockDiffusion(max_length=4, threshold=0.89, minimum=minimum, trace=True)
        result = decode(model, [[FIRST] * 5], strategy)
        written = [
            [i for i, touched in enumerate(step.touched) if touched]
            for step in result.trace[0].steps
            if step.operation == "commit"
        ]
        assert written == want and len(want) == int(result.iterations[0])
        assert result.to_lists()[0][0] == [8, 9, 10, 7]
        assert result.token_log_probs[0, 0].exp().tolist() == pytest.approx([0.6, 0.9, 0.3, 0.95, 1.0])
        assert float(result.scores[0, 0].exp()) == pytest.approx((0.6 * 0.9 * 0.3 * 0.95) ** 0.25)


def test_margin_and_entropy_read_their_own_statistic():
    model = by_position([(7, 0.95), (8, 0.5), (9, 0.9), (10, 0.6)])
    passes = {}
    for policy, threshold in (("margin", 0.85), ("margin", 0.5), ("entropy", 0.0), ("entropy", 0.33), ("entropy", 99)):
        result = decode(
            model, [[5] * 4], "block_diffusion", max_length=4, policy=policy, threshold=threshold, trace=True
        )
        passes[policy, threshold] = written_per_pass(result.trace[0])
    # Of the other 12 tokens each has (1 - p) / 12; entropies 0.32, 1.94, 0.57, 1.67.
    assert passes["margin", 0.85] == [2, 1, 1] and passes["margin", 0.5] == [3, 1]
    assert passes["entropy", 0.0] == [1, 1, 1, 1] and passes["entropy", 99] == [4]
    assert passes["entropy", 0.33] == [2, 1, 1]


@ALL_POLICIES
def test_equal_and_saturated_confidences_go_from_left_to_right(policy):
    options = {"quota": {"steps": 4}, "threshold": {"threshold": 1.0}, "margin": {"threshold": 1.0},
               "entropy": {"threshold": 0.0}}[policy]  # fmt: skip
    for probability, at_once in ((1.0, policy != "quota"), (0.5, False)):
        model = by_position([(7, probability)])
        strategy = BlockDiffusion(max_length=8, block_length=4, policy=policy, trace=True, **options)
        result = decode(model, [[5], [5, 5]], strategy)
        assert result.to_lists() == [[[7] * 8]] * 2
        for b, trace in enumerate(result.trace):
            places = [[i for i, t in enumerate(s.touched) if t] for s in trace.steps if s.operation == "commit"]
            first = b + 1
            blocks = [list(range(first, first + 4)), list(range(first + 4, first + 8))]
            assert places == (blocks if at_once else [[i] for i in range(first, first + 8)])
