"""BlockDiffusion on toy masked language models: what holds of every result, blocks, ends and refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_models import (
    ALL_POLICIES,
    POLICIES,
    VOCABULARY,
    RandomLM,
    ScriptedLM,
    ToyLM,
    by_position,
)
from refinement_helpers import BOS, EOS, MASK, PAD, UNK, RandomModel

from condgen_fast.decode import BlockDiffusion, decode

SOURCES = [[5, 6, 7], [8], [9, 10, MASK, 11, MASK, MASK], [6] * 9, [MASK], [BOS, EOS, UNK, MASK, EOS, BOS]]


@ALL_POLICIES
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_different_prompts_equals_one_by_one(policy, temperature, device):
    model = RandomLM(device=device)
    for length, maximum in itertools.product((1, 4, 32), (None, 11)):
        strategy = BlockDiffusion(
            max_length=maximum, block_length=length, policy=policy, temperature=temperature, seed=3, **POLICIES[policy]
        )
        batch = decode(model, SOURCES, strategy)
        order = [3, 5, 0, 1, 4, 2]
        shuffled = decode(model, [SOURCES[i] for i in order], strategy)
        assert shuffled.to_lists() == [batch.to_lists()[i] for i in order]
        for b, source in enumerate(SOURCES):
            alone = decode(model, [source], strategy)
            assert alone.to_lists()[0] == batch.to_lists()[b]
            width = alone.token_log_probs.shape[2]
            assert torch.equal(alone.token_log_probs[0], batch.token_log_probs[b, :, :width])
            assert alone.iterations[0] == batch.iterations[b] and alone.scores[0] == batch.scores[b]


@settings(max_examples=60, deadline=None)
@given(
    sources=st.lists(
        st.lists(st.sampled_from([*range(1, VOCABULARY), MASK, MASK, MASK]), min_size=1, max_size=12),
        min_size=1,
        max_size=4,
    ),
    maximum=st.none() | st.integers(0, 9),
    length=st.integers(1, 12),
    policy=st.sampled_from(list(POLICIES)),
    temperature=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 5),
)
def test_given_tokens_stay_and_specials_are_never_written(sources, maximum, length, policy, temperature, seed):
    strategy = BlockDiffusion(
        max_length=maximum, block_length=length, policy=policy, temperature=temperature, seed=seed, **POLICIES[policy]
    )
    model = RandomLM(seed=seed)
    result = decode(model, sources, strategy)
    for b, source in enumerate(sources):
        first = source.index(MASK) if MASK in source else len(source)
        text = source[:first] + result.to_lists()[b][0]
        kept, new = text[: len(source)], text[len(source) :]
        assert len(kept) == len(source)
        assert all(a == b for a, b in zip(source, kept, strict=True) if a != MASK)
        filled = [b for a, b in zip(source, kept, strict=True) if a == MASK]
        assert not {PAD, BOS, EOS, MASK} & {*filled, *new}
        assert len(new) <= (maximum if maximum is not None else 0 if MASK in source else 2 * len(source) + 10)
        log_probs = result.token_log_probs[b, 0].tolist()
        for i, value in enumerate(log_probs[: len(text) - first]):
            assert (value == 0) == (first + i < len(source) and source[first + i] != MASK)
        assert not any(log_probs[len(text) - first + 1 :])
    assert result.tokens[result.tokens == MASK].numel() == 0


def test_a_block_is_finished_before_the_next_and_sees_the_masks_behind_it():
    model = RandomLM(eos=False)
    strategy = BlockDiffusion(max_length=10, block_length=4, policy="quota", steps=2)
    decode(model, [[5, 6, 7]], strategy)
    masks = [(tokens[0] == MASK).nonzero()[:, 0].tolist() for tokens in model.seen]
    assert all(set(range(7, 13)) <= set(m) for m in masks[:2]) and all(set(range(11, 13)) <= set(m) for m in masks[:4])
    assert not any(m[0] < 7 for m in masks[2:]) and len(masks) == 6


def test_eos_ends_a_text_and_what_follows_is_dropped():
    def script(canvas):  # eos is surest at position 4, then at 3
        return [(EOS, 0.99 if i == 4 else 0.9) if i in (3, 4) else (6 + i % 9, 0.5) for i in range(len(canvas))]

    model = ScriptedLM(script)
    result = decode(model, [[5], [5] * 6], BlockDiffusion(max_length=6, policy="quota"))
    assert result.to_lists()[0] == [[7, 8]]
    assert result.token_log_probs[0, 0].exp().tolist()[:3] == pytest.approx([0.5, 0.5, 0.9])
    assert int(result.iterations[0]) == 4  # eos, eos, 7, 8; the two masks behind were never filled
    assert float(result.scores[0, 0].exp()) == pytest.approx((0.5 * 0.5 * 0.9) ** (1 / 3))


def test_finished_sentences_leave():
    model = ScriptedLM(lambda canvas: [(EOS, 0.9) if canvas[0] == 6 else (7, 0.5)] * len(canvas))
    result = decode(model, [[6], [6], [6], [5]], BlockDiffusion(max_length=8, block_length=4, policy="quota"))
    assert result.lengths.flatten().tolist() == [0, 0, 0, 8] and result.iterations.tolist() == [1, 1, 1, 8]
    assert result.ended.flatten().tolist() == [True, True, True, False]
    assert model.rows == [4] + [1] * 7


def test_lengths_of_nothing_and_one():
    model = RandomLM(eos=False)
    nothing = decode(model, [[5, 6], [7]], "block_diffusion", max_length=0)
    assert nothing.tokens.shape == (2, 1, 0) and nothing.token_log_probs.shape == (2, 1, 1) and not model.rows
    assert nothing.iterations.tolist() == [0, 0] and nothing.scores.tolist() == [[0.0], [0.0]]
    one = decode(model, [[5, 6], [MASK]], "block_diffusion", max_length=1, block_length=1)
    assert one.lengths.tolist() == [[1], [2]] and one.iterations.tolist() == [1, 2]
    assert decode(model, [], "block_diffusion").tokens.shape[0] == 0
    only_eos = decode(by_position([(EOS, 1.0)]), [[5]], "block_diffusion")
    assert only_eos.lengths.tolist() == [[0]] and only_eos.token_log_probs.tolist() == [[[0.0]]]


def test_a_model_that_leaves_no_token_still_ends_without_masks():
    class Nothing(ToyLM):
        def logits(self, tokens):
            logits = torch.full((*tokens.shape, VOCABULARY), -torch.inf)
            logits[:, 2::3] = torch.nan
            logits[..., [PAD, BOS, MASK]] = 5.0
            return logits

    for policy, options in POLICIES.items():
        result = decode(Nothing(), [[5], [MASK, 6, MASK]], BlockDiffusion(max_length=4, policy=policy, **options))
        assert result.to_lists() == [[[UNK] * 4], [[UNK, 6, UNK, UNK, UNK, UNK, UNK]]]
        assert (result.scores == -torch.inf).all()


def test_the_canvas_stays_within_the_models_positions():
    model = RandomLM(eos=False)
    model.max_positions = 9
    result = decode(model, [[5] * 4, [5] * 9], BlockDiffusion(max_length=50))
    assert result.lengths.tolist() == [[5], [0]] and max(t.shape[1] for t in model.seen) == 9
    with pytest.raises(ValueError, match="source must fit the model's 9 positions; got 10 tokens"):
        decode(model, [[5] * 10], "block_diffusion")


def test_the_trace_shows_every_pass():
    sources = [[5, 6], [7, MASK, MASK, 8]]
    result = decode(RandomLM(), sources, BlockDiffusion(max_length=5, block_length=3, policy="quota", trace=True))
    for source, tokens, passes, trace in zip(
        sources, result.to_lists(), result.iterations.tolist(), result.trace, strict=True
    ):
        start, *commits = trace.steps
        assert start.operation == "start" and start.tokens == source + [MASK] * 5
        assert [step.iteration for step in commits] == list(range(1, passes + 1))
        canvas = start.tokens
        for step in commits:
            assert all(step.tokens[i] == canvas[i] for i in range(len(step.tokens)) if not step.touched[i])
            assert all(canvas[i] == MASK != step.tokens[i] for i in range(len(step.tokens)) if step.touched[i])
            canvas = step.tokens
        first = source.index(MASK) if MASK in source else len(source)
        assert canvas[first:] in (tokens[0], [*tokens[0], EOS])
    assert decode(RandomLM(), sources, "block_diffusion").trace is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "policy must be 'quota'"),
        ({"max_length": -1}, "max_length must be >= 0; got -1"),
        ({"block_length": 0}, "block_length must be >= 1; got 0"),
        ({"policy": "quota", "threshold": 0.5}, "threshold must be None for policy 'quota', which does not read it"),
        ({"steps": 3}, "steps must be None for policy 'threshold', which does not read it; got 3"),
        ({"minimum": 0}, "minimum must be >= 1; got 0"),
        ({"temperature": -1.0}, "temperature must be >= 0.0; got -1.0"),
        ({"seed": -1}, "seed must be >= 0; got -1"),
        ({"threshold": -0.5}, "threshold must be >= 0.0; got -0.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        decode(RandomLM(), [[5]], "block_diffusion", **options)


def test_bad_models_and_sources_are_refused():
    with pytest.raises(ValueError, match="source must have padding only on the right"):
        decode(RandomLM(), torch.tensor([[5, PAD, 6]]), "block_diffusion")
    with pytest.raises(ValueError, match=r"source must be in \[0, 17\); got 17"):
        decode(RandomLM(), [[5], [VOCABULARY]], "block_diffusion")
    model = RandomLM()
    model.pad_id = EOS
    with pytest.raises(ValueError, match="pad_id must differ from bos_id, eos_id and mask_id; got 3"):
        decode(model, [[5]], "block_diffusion")
    with pytest.raises(TypeError, match="BlockDiffusion needs a model without encoder; RandomModel has encode"):
        decode(RandomModel(), [[5]], "block_diffusion")
    with pytest.raises(TypeError, match="BlockDiffusion needs a MaskedModel; object has no vocab_size"):
        decode(object(), [[5]], "block_diffusion")
