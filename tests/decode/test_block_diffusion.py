"""BlockDiffusion on toy masked language models, and on the real one with and without its prefix cache."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refinement_helpers import BOS, EOS, FIRST, MASK, PAD, UNK, HostReads, RandomModel, sure
from torch import Tensor

from condgen_fast.decode import BlockDiffusion, block_diffusion, decode
from condgen_fast.models.masked_lm import MaskedLM, MaskedLMConfig

VOCABULARY = 17
POLICIES = {
    "quota": {"steps": 3},
    "threshold": {"threshold": 0.15},
    "margin": {"threshold": 0.05},
    "entropy": {"threshold": 4.0},
}
ALL_POLICIES = pytest.mark.parametrize("policy", POLICIES)


class ToyLM:
    """A masked language model without encoder; `seen` keeps what it was shown, `rows` how many canvases each time."""

    pad_id, bos_id, eos_id, mask_id, vocab_size = PAD, BOS, EOS, MASK, VOCABULARY

    def __init__(self, device: str = "cpu"):
        self.device, self.rows, self.seen = device, [], []

    def fill(self, tokens: Tensor, memory: None) -> Tensor:
        assert memory is None
        real = tokens != PAD
        assert not (real[:, 1:] & ~real[:, :-1]).any(), "padding inside a canvas"
        self.rows.append(len(tokens))
        self.seen.append(tokens)
        return self.logits(tokens)


class RandomLM(ToyLM):
    """Logits from a random table, by position, the tokens on both sides and the canvas's length."""

    def __init__(self, *, eos: bool = True, seed: int = 0, device: str = "cpu"):
        super().__init__(device)
        self.table = torch.randn(997, VOCABULARY, generator=torch.Generator().manual_seed(seed)).to(device)
        if not eos:
            self.table[:, EOS] = -torch.inf

    def logits(self, tokens: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(tokens, (1, 1), value=PAD)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        length = (tokens != PAD).sum(1, keepdim=True)
        context = padded[:, :-2] * 7 + tokens * 13 + padded[:, 2:] * 17 + position * 5 + length
        return self.table[context % 997]


class ScriptedLM(ToyLM):
    """Says (token, probability) at every position of a canvas, as `script(canvas)` gives it."""

    def __init__(self, script, **options):
        super().__init__(**options)
        self.script = script

    def logits(self, tokens: Tensor) -> Tensor:
        logits = torch.full((*tokens.shape, VOCABULARY), torch.nan)  # what is not asked for must not be read
        for b, row in enumerate(tokens.tolist()):
            canvas = [t for t in row if t != PAD]
            for i, (token, probability) in enumerate(self.script(canvas)):
                logits[b, i] = torch.tensor(sure(token, probability, VOCABULARY))
        return logits


def by_position(choices):
    """The same (token, probability) at a position, whatever the canvas."""
    return ScriptedLM(lambda canvas: [choices[i % len(choices)] for i in range(len(canvas))])


def written_per_pass(trace):
    return [sum(step.touched) for step in trace.steps if step.operation == "commit"]


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


def test_seeds_make_draws_reproducible_and_prompts_draw_apart():
    model = RandomLM()

    def texts(**options):
        strategy = BlockDiffusion(max_length=20, temperature=1.5, **options)
        return decode(model, [[5], [6], [5]], strategy).to_lists()

    assert texts(seed=1) == texts(seed=1) != texts(seed=2)
    assert texts(seed=1)[0] == texts(seed=1)[2] != texts(seed=1)[1]
    torch.manual_seed(0)
    free = texts(), texts()
    torch.manual_seed(0)
    assert (texts(), texts()) == free and free[0] != free[1]
    cold = BlockDiffusion(max_length=20, temperature=1e-6, seed=1)
    assert decode(model, [[5]], cold).to_lists() == decode(model, [[5]], BlockDiffusion(max_length=20)).to_lists()


def test_every_pass_and_position_draws_anew(monkeypatch):
    drawn, real_row_stats = [], block_diffusion.row_stats

    def recorded(logits, **options):
        drawn.extend(options["noise_rows"].tolist())
        return real_row_stats(logits, **options)

    monkeypatch.setattr(block_diffusion, "row_stats", recorded)
    decode(RandomLM(eos=False), [[5], [6, 7]], BlockDiffusion(max_length=6, policy="quota", temperature=1.0))
    assert len(drawn) == 2 * (6 + 5 + 4 + 3 + 2 + 1) and len(set(drawn)) == len(drawn)


def test_draws_follow_the_softmax():
    logits = torch.full((VOCABULARY,), -torch.inf)
    logits[[EOS, 5, 6, 7]] = torch.tensor([0.0, 1.0, 2.0, 0.5])

    class Fixed(ToyLM):
        def logits(self, tokens):
            return logits.expand(*tokens.shape, -1).clone()

    sources = [[5 + i % 11, 5 + i // 11 % 11, 5 + i // 121] for i in range(1331)]
    for temperature in (0.7, 2.0):
        result = decode(Fixed(), sources, "block_diffusion", max_length=1, temperature=temperature, seed=0)
        counts = Counter(row[0][0] if row[0] else EOS for row in result.to_lists())
        want = (logits / temperature).softmax(0)
        statistic = sum((counts[t] - 1331 * want[t]) ** 2 / (1331 * want[t]) for t in (EOS, 5, 6, 7))
        assert statistic < 16.3  # 3 degrees of freedom, p = 0.001
        got = result.token_log_probs[:, 0, 0]
        longer = decode(
            Fixed(), sources, "block_diffusion", max_length=2, block_length=1, temperature=temperature, seed=0
        )
        ended = result.lengths[:, 0] == 0  # a draw depends on the prompt, not on how much follows it
        assert torch.equal(ended, longer.lengths[:, 0] == 0)
        assert torch.equal(result.tokens[~ended, 0, 0], longer.tokens[~ended, 0, 0])
        possible = logits.log_softmax(0)[[EOS, 5, 6, 7]]  # of temperature 1
        assert ((got[:, None] - possible).abs().amin(1) < 1e-5).all()


@pytest.fixture(scope="module")
def block_causal():
    torch.manual_seed(0)
    config = MaskedLMConfig(vocab_size=40, width=32, feed_forward=64, encoder_layers=2, heads=2, block_length=4)
    return MaskedLM(config).double().eval()


@ALL_POLICIES
def test_the_prefix_cache_changes_nothing_but_the_work(policy, block_causal, monkeypatch):
    sources = [[5, 6, 7], [8] * 9, [9, 10, MASK, 11, MASK, MASK], [6] * 5, [MASK] * 3, [7] * 12]
    widths = []
    real_extend = MaskedLM.extend
    monkeypatch.setattr(
        MaskedLM,
        "extend",
        lambda self, tokens, *rest: widths.append(tokens.shape[1]) or real_extend(self, tokens, *rest),
    )
    for length, temperature in ((None, 0.0), (4, 1.0), (8, 0.0)):
        options = dict(max_length=13, block_length=length, policy=policy, temperature=temperature, seed=1, trace=True)
        widths.clear()
        cached = decode(block_causal, sources, BlockDiffusion(**options, **POLICIES[policy]))
        assert widths[0] == 12 // (length or 4) * (length or 4) and set(widths[1:]) == {length or 4}
        widths.clear()
        plain = decode(block_causal, sources, BlockDiffusion(**options, **POLICIES[policy], prefix_cache=False))
        assert not widths
        assert torch.equal(cached.tokens, plain.tokens) and torch.equal(cached.iterations, plain.iterations)
        torch.testing.assert_close(cached.token_log_probs, plain.token_log_probs)
        for a, b in zip(cached.trace, plain.trace, strict=True):
            assert [(s.iteration, s.tokens, s.touched) for s in a.steps] == [
                (s.iteration, s.tokens, s.touched) for s in b.steps
            ]


@ALL_POLICIES
@pytest.mark.parametrize("cache", [True, False])
def test_on_a_gpu_the_same_result_comes_without_a_host_read_in_a_pass(policy, cache, block_causal, monkeypatch):
    """The path that a GPU takes, here on the CPU: blocks are projected whole, the host asks every eighth pass."""
    sources = [[5, 6, 7], [8] * 9, [9, 10, MASK, 11, MASK, MASK], [6] * 5, [MASK] * 3, [7] * 12]
    options = dict(max_length=13, policy=policy, temperature=1.0, seed=1, prefix_cache=cache, **POLICIES[policy])

    def reads(prompts):
        with HostReads() as host:
            result = decode(block_causal, prompts, BlockDiffusion(**options))
        return result, host.count

    plain, _ = reads(sources)
    monkeypatch.setattr(block_diffusion, "_counted_by_host", lambda device: False)
    monkeypatch.setattr(block_diffusion, "check_due", lambda step, device: (step + 1) % 8 == 0)
    monkeypatch.setattr(
        block_causal, "extend", lambda *call: extend_without_reading(block_causal, *call), raising=False
    )
    result, count = reads(sources)
    assert torch.equal(result.tokens, plain.tokens) and torch.equal(result.iterations, plain.iterations)
    torch.testing.assert_close(result.token_log_probs, plain.token_log_probs)
    few = {**options, "max_length": 1}
    with HostReads() as host:
        decode(block_causal, sources, BlockDiffusion(**few))
    # 13 masks are 12 passes more, and cached blocks further ones; two reads at each check.
    assert count <= host.count + 2 * 3


def extend_without_reading(model, tokens, start, prefix):
    """`extend` with what it asks of the host (how far keys are needed, on the CPU) answered beforehand."""
    with torch.utils._python_dispatch._disable_current_modes():
        return MaskedLM.extend(model, tokens, start, prefix)


def test_only_masks_of_the_block_are_projected(block_causal, monkeypatch):
    rows, real_project = [], MaskedLM.project
    monkeypatch.setattr(MaskedLM, "project", lambda self, x: rows.append(x.shape[0]) or real_project(self, x))
    for cache in (True, False):
        rows.clear()
        strategy = BlockDiffusion(max_length=0, policy="quota", steps=2, prefix_cache=cache)
        decode(block_causal, [[5] * 4 + [MASK] * 4, [MASK, 6, 7, 8]], strategy)
        assert [n for n in rows if n] == [5, 2]


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


def test_bad_models_and_sources_are_refused(block_causal):
    with pytest.raises(ValueError, match="block_length must be a multiple of the model's 4; got 6"):
        decode(block_causal, [[5]], "block_diffusion", block_length=6)
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
