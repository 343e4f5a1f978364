"""Mask-Predict: schedule, selection, length beam, and what must never happen to special tokens."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refinement_helpers import BOS, EOS, FIRST, MASK, PAD, UNK, HostReads, RandomModel, ScriptedModel

from condgen_fast.decode import MaskPredict, decode, mask_predict
from condgen_fast.decode.unattended import on_device
from condgen_fast.models.cmlm import CMLM, CMLMConfig

SPECIALS = {PAD, BOS, EOS, MASK}


def masks(canvas: list[int]) -> list[int]:
    return [i for i, token in enumerate(canvas) if token == MASK]


def test_worked_example_of_twelve_tokens_in_three_rounds():
    words = "The departure of the French combat completed on 20 November . withdrawal troops was 20th".split()
    ids = {word: FIRST + i for i, word in enumerate(words)}
    rounds = [
        "The departure of the French combat completed completed on 20 November .".split(),
        "The departure of French combat troops was completed on 20 November .".split(),
        "The withdrawal of French combat troops was completed on November 20th .".split(),
    ]
    first = [0.8, 0.3, 0.2, 0.3, 0.5, 0.5, 0.4, 0.1, 0.3, 0.6, 0.6, 0.9]
    second = [0.8, 0.5, 0.8, 0.8, 0.9, 0.7, 0.7, 0.6, 0.8, 0.6, 0.6, 0.9]
    # What the model says of tokens that are not masked must not matter: the scripts below say 0.95 there.
    third = [0.85 if i in (1, 7, 9, 10) else 0.95 for i in range(12)]

    def fill(sentence, canvas):
        step = {12: 0, 8: 1, 4: 2}[len(masks(canvas))]
        confidence = [first, second, third][step]
        return [(FIRST, 0.9), *((ids[w], c) for w, c in zip(rounds[step], confidence, strict=True)), (FIRST, 0.9)]

    model = ScriptedModel(FIRST + len(words), fill=fill, lengths=lambda s: {12: 1.0})
    result = decode(model, [[1]], MaskPredict(iterations=3, length_beam=1, trace=True))

    shown = [masks(canvas) for _, canvas in model.canvases]
    assert shown == [list(range(1, 13)), [2, 3, 4, 5, 6, 7, 8, 9], [2, 8, 10, 11]]
    assert result.tokens[0, 0].tolist() == [ids[word] for word in rounds[2]]
    assert result.iterations.tolist() == [3]
    kept = [0.8, 0.85, 0.8, 0.8, 0.9, 0.7, 0.7, 0.85, 0.8, 0.85, 0.85, 0.9]  # stale where not masked in round 3
    expected = [math.log(c) for c in kept]
    torch.testing.assert_close(result.token_log_probs[0, 0], torch.tensor([*expected, 0.0]))
    assert result.scores[0, 0].item() == pytest.approx(sum(expected) / 12, rel=1e-6)
    steps = result.trace[0].steps
    assert [(s.iteration, s.operation) for s in steps] == [
        (1, "predict"), (2, "mask"), (2, "fill"), (3, "mask"), (3, "fill"),
    ]  # fmt: skip
    assert [i for i, t in enumerate(steps[1].touched) if t] == shown[1]
    assert steps[1].tokens[2] == ids["departure"], "a mask step shows the tokens that leave"


def test_schedule_is_the_exact_floor():
    for iterations in range(1, 17):
        strategy = MaskPredict(iterations=iterations)
        at_least_one = MaskPredict(iterations=iterations, min_remasked=1)
        for length in range(65):
            for t in range(iterations):
                exact = math.floor(length * Fraction(iterations - t, iterations))
                assert strategy.masked_tokens(length, t) == exact
                assert at_least_one.masked_tokens(length, t) == max(exact, min(1, length))


@pytest.mark.parametrize("iterations", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("min_remasked", [0, 1])
def test_as_many_masks_are_shown_as_the_schedule_says(iterations, min_remasked):
    confidences = torch.rand(40, generator=torch.Generator().manual_seed(0)).mul(0.8).add(0.1).tolist()
    model = ScriptedModel(
        12, fill=lambda s, c: [(FIRST, confidences[i]) for i in range(len(c))], lengths=lambda s: {s: 1.0}
    )
    lengths = [1, 2, 5, 9, 13]
    strategy = MaskPredict(iterations=iterations, length_beam=1, min_remasked=min_remasked)
    result = decode(model, [[n] for n in lengths], strategy)
    for n, ran in zip(lengths, result.iterations.tolist(), strict=True):
        counts = [max(n * (iterations - t) // iterations, min_remasked) for t in range(iterations)]
        assert [len(masks(c)) for s, c in model.canvases if s == n] == [c for c in counts if c]
        assert ran == sum(c > 0 for c in counts)
    # A sentence with nothing to predict leaves the batch.
    assert model.rows_seen == [
        rows for t in range(iterations)
        if (rows := sum(max(n * (iterations - t) // iterations, min_remasked) > 0 for n in lengths))
    ]  # fmt: skip


@pytest.mark.parametrize("confidence", [1.0, 0.5])
def test_equal_and_saturated_confidences_mask_from_the_left_and_never_bos(confidence):
    model = ScriptedModel(12, fill=lambda s, c: [(FIRST, confidence)] * len(c), lengths=lambda s: {s: 1.0})
    decode(model, [[6], [3]], MaskPredict(iterations=3, length_beam=1))
    assert [masks(c) for s, c in model.canvases if s == 6] == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4], [1, 2]]
    assert [masks(c) for s, c in model.canvases if s == 3] == [[1, 2, 3], [1, 2], [1]]


def test_one_iteration_is_the_most_probable_token_everywhere():
    model = RandomModel()
    source = torch.tensor([[3, 9, 5]])
    result = decode(model, source, MaskPredict(iterations=1, length_beam=1))
    memory = model.encode(source, torch.tensor([3]))
    length = int(model.length_logits(memory)[0, 1:].argmax()) + 1
    logits = model.fill(torch.tensor([[BOS, *[MASK] * length, EOS]]), memory)[0, 1:-1]
    logits[:, sorted(SPECIALS)] = -torch.inf
    expected = logits.log_softmax(1).max(1)
    assert result.tokens[0, 0].tolist() == expected.indices.tolist()
    torch.testing.assert_close(result.token_log_probs[0, 0, :-1], expected.values)


@pytest.mark.parametrize("favourite", [*sorted(SPECIALS), None])
def test_a_special_token_is_never_predicted_however_probable(favourite):
    class Model(RandomModel):
        def fill(self, tokens, memory):
            logits = super().fill(tokens, memory).clone()
            if favourite is None:  # nothing ordinary has any probability
                return logits.fill_(-torch.inf).index_fill(2, torch.tensor(sorted(SPECIALS)), torch.nan)
            logits[..., favourite] = 50.0
            return logits

    result = decode(Model(), [[4, 4], [7]], MaskPredict(iterations=4))
    for b, row in enumerate(result.to_lists()):
        assert len(row[0]) == result.lengths[b, 0] >= 1
        assert not SPECIALS & set(row[0])
    assert not result.token_log_probs.isnan().any() and not result.scores.isnan().any()


def test_no_limit_of_positions_may_be_said_as_none():
    limited, unlimited = RandomModel(), RandomModel()
    unlimited.max_positions = None
    source = [[3, 8], [5, 1, 2]]
    assert decode(unlimited, source, "mask_predict").to_lists() == decode(limited, source, "mask_predict").to_lists()


def test_only_the_masked_positions_are_projected_where_a_model_allows_it():
    class Model(RandomModel):
        projected: list[int] = []

        def fill_states(self, tokens, memory):
            return RandomModel.fill(self, tokens, memory)

        def project(self, hidden):
            self.projected.append(hidden.shape[0])
            return hidden

        def fill(self, tokens, memory):
            raise AssertionError("fill_states and project serve")

    source, strategy = [[3, 8], [5, 1, 2]], MaskPredict(iterations=4, length_beam=2)
    model = Model()
    result, expected = decode(model, source, strategy), decode(RandomModel(), source, strategy)
    assert torch.equal(result.tokens, expected.tokens) and torch.equal(result.scores, expected.scores)
    assert len(model.projected) == 4 and model.projected == sorted(model.projected, reverse=True)
    assert model.projected[0] < 2 * 2 * 12


def by_length(quality: dict[int, float]):
    """A model whose tokens name their canvas's length and are as probable as `quality` says."""
    return lambda sentence, canvas: [(FIRST + len(canvas) - 2, quality[len(canvas) - 2])] * len(canvas)


def test_the_candidate_of_highest_mean_log_probability_wins():
    quality = {1: 0.3, 2: 0.4, 3: 0.9, 4: 0.6, 5: 0.99}
    lengths = {4: 0.4, 2: 0.3, 3: 0.2, 5: 0.1}
    model = ScriptedModel(20, fill=by_length(quality), lengths=lambda s: lengths)
    result = decode(model, [[1]], MaskPredict(iterations=2, length_beam=3, n_best=3))
    assert result.lengths.tolist() == [[3, 4, 2]], "5 is beyond the length beam, however good"
    torch.testing.assert_close(result.scores, torch.tensor([[0.9, 0.6, 0.4]]).log())
    assert result.to_lists() == [[[FIRST + 3] * 3, [FIRST + 4] * 4, [FIRST + 2] * 2]]
    assert result.tokens[0, 0].tolist() == [FIRST + 3] * 3 + [PAD]
    assert decode(model, [[1]], MaskPredict(iterations=2, length_beam=1)).lengths.tolist() == [[4]]


@pytest.mark.parametrize(("beam", "expected"), [(1, [6]), (2, [6, 5]), (4, [6, 5, 7, 4]), (5, [6, 5, 7, 4, 8])])
def test_a_window_of_lengths_round_the_best(beam, expected):
    quality = dict.fromkeys(range(1, 40), 0.5)
    lengths = {6: 0.4, 12: 0.3, 2: 0.2} | dict.fromkeys((1, 3, 4, 5, 7, 8, 9, 10, 11), 0.01)
    model = ScriptedModel(50, fill=by_length(quality), lengths=lambda s: lengths)
    strategy = MaskPredict(length_beam=beam, n_best=beam, length_candidates="window")
    assert sorted(decode(model, [[1]], strategy).lengths[0].tolist()) == sorted(expected)
    top = MaskPredict(length_beam=3, n_best=3)
    assert decode(model, [[1]], top).lengths.tolist() == [[6, 12, 2]]


def test_a_window_ends_at_length_1_and_at_the_position_table():
    def window(best: int, **options) -> list[int]:
        lengths = dict.fromkeys(range(1, 40), 0.01) | {best: 0.6}
        model = ScriptedModel(
            50, fill=by_length(dict.fromkeys(range(1, 40), 0.5)), lengths=lambda s: lengths, **options
        )
        strategy = MaskPredict(length_beam=5, n_best=5, length_candidates="window")
        return sorted(decode(model, [[1]], strategy).lengths[0].tolist())

    assert window(1) == [0, 0, 1, 2, 3]
    assert window(39) == [0, 0, 37, 38, 39]
    assert window(7, max_positions=10) == [0, 5, 6, 7, 8]


def test_equal_candidates_and_lengths_are_ordered():
    model = ScriptedModel(
        50, fill=by_length(dict.fromkeys(range(1, 40), 0.5)), lengths=lambda s: {7: 0.2, 3: 0.2, 5: 0.6}
    )
    assert decode(model, [[1]], MaskPredict(length_beam=3, n_best=3)).lengths.tolist() == [[5, 3, 7]]


def test_an_impossible_length_is_no_candidate():
    model = ScriptedModel(20, fill=by_length({2: 0.4, 1: 0.9, 3: 0.9}), lengths=lambda s: {2: 1.0})
    result = decode(model, [[1]], MaskPredict(length_beam=3, n_best=3))
    assert result.lengths.tolist() == [[2, 0, 0]]
    assert result.scores[0, 1:].tolist() == [-math.inf, -math.inf]
    assert (result.token_log_probs[0, 1:] == 0).all()


def without_any(model: ScriptedModel, length: int) -> ScriptedModel:
    """`model`, which says of canvases of so many tokens that none is possible."""
    real = model.fill

    def fill(tokens, memory):
        logits = real(tokens, memory)
        logits[(tokens != PAD).sum(1) == length + 2] = -torch.inf
        return logits

    model.fill = fill
    return model


def test_what_is_no_candidate_comes_behind_one_of_score_minus_infinity():
    """The window is 1, 0, 2, -1, 3."""
    lengths = {1: 0.6, 2: 0.2, 3: 0.2}
    model = ScriptedModel(20, fill=by_length(dict.fromkeys((1, 2, 3), 0.5)), lengths=lambda s: lengths)
    strategy = MaskPredict(length_beam=5, n_best=5, length_candidates="window", trace=True)
    result = decode(without_any(model, 2), [[1]], strategy)
    assert result.lengths.tolist() == [[1, 3, 2, 0, 0]]
    assert result.scores[0, 2:].tolist() == [-math.inf] * 3
    assert result.to_lists()[0][2] == [UNK, UNK] and result.trace[0].steps[-1].tokens == [BOS, FIRST + 1, EOS]


def test_equal_candidates_of_a_window_are_ordered():
    quality = dict.fromkeys(range(1, 40), 1.0)
    lengths = {6: 0.4, 7: 0.3, 8: 0.2, 5: 0.06, 4: 0.04}
    model = ScriptedModel(50, fill=by_length(quality), lengths=lambda s: lengths)
    strategy = MaskPredict(length_beam=5, n_best=5, length_candidates="window")
    assert decode(model, [[1]], strategy).lengths.tolist() == [[6, 5, 7, 4, 8]]


def test_length_zero_and_one():
    model = ScriptedModel(20, fill=by_length({1: 0.5, 2: 0.1}), lengths=lambda s: {0: 0.9, 1: 0.08, 2: 0.02})
    result = decode(model, [[1]], MaskPredict(length_beam=2))
    assert result.to_lists() == [[[FIRST + 1]]]
    nothing = ScriptedModel(20, fill=by_length({1: 0.5}), lengths=lambda s: {0: 1.0})
    result = decode(nothing, [[1]], MaskPredict(length_beam=2))
    assert (
        result.lengths.tolist() == [[0]]
        and result.scores.tolist() == [[-math.inf]]
        and result.tokens.shape == (1, 1, 0)
    )
    with pytest.raises(ValueError, match="length of at least 1"):
        decode(ScriptedModel(20, fill=None, lengths=lambda s: {0: 1.0}, lengths_scored=1), [[1]], MaskPredict())


def test_a_length_beyond_the_position_table_is_no_candidate():
    fill = by_length(dict.fromkeys(range(1, 40), 0.5))
    lengths = {30: 0.5, 7: 0.2, 6: 0.2, 5: 0.1}
    model = ScriptedModel(60, fill=fill, lengths=lambda s: lengths, max_positions=8)  # bos, 6 tokens, eos
    result = decode(model, [[1]], MaskPredict(length_beam=5, n_best=5))
    assert result.lengths.tolist() == [[6, 5, 0, 0, 0]]
    with pytest.raises(ValueError, match="fits the model's positions"):
        decode(ScriptedModel(60, fill=fill, lengths=lambda s: lengths, max_positions=2), [[1]], MaskPredict())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(FIRST, 90), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(1, 6), st.integers(1, 5), st.integers(0, 5),
)  # fmt: skip
def test_specials_stay_and_a_sentence_does_not_see_its_batch(sources, iterations, length_beam, seed):
    model = RandomModel(seed=seed)
    strategy = MaskPredict(iterations=iterations, length_beam=length_beam, n_best=length_beam, trace=True)
    together = decode(model, sources, strategy)
    for b, source in enumerate(sources):
        alone = decode(model, [source], strategy)
        assert alone.to_lists()[0] == together.to_lists()[b]
        assert torch.equal(alone.scores[0], together.scores[b])
        assert alone.iterations[0] == together.iterations[b]
        assert alone.trace[0] == together.trace[b]
        for tokens in alone.to_lists()[0]:
            assert not SPECIALS & set(tokens)
        before = None
        for step in alone.trace[0].steps:
            assert step.tokens[0] == BOS and step.tokens[-1] == EOS and not step.touched[0] and not step.touched[-1]
            assert not {PAD, BOS, EOS} & set(step.tokens[1:-1])
            if before is not None:
                changed = [a != b for a, b in zip(before.tokens, step.tokens, strict=True)]
                assert not any(c and not t for c, t in zip(changed, step.touched, strict=True))
            before = step
        assert before.tokens[1:-1] == alone.to_lists()[0][0]


def test_a_round_in_place_writes_to_no_tensor_of_the_model(monkeypatch):
    """`project` hands back what it was given, which the model still needs."""

    class Kept(RandomModel):
        def fill_states(self, tokens, memory):
            self.states = self.fill(tokens, memory)
            return self.states

        def project(self, states):
            return states

    model, strategy = Kept(), MaskPredict(iterations=3)
    expected = decode(RandomModel(), [[3], [4]], strategy)
    monkeypatch.setattr(mask_predict, "_captured", lambda *_: True)
    result = decode(model, [[3], [4]], strategy)
    assert torch.equal(result.tokens, expected.tokens) and not model.states.isinf().any()


def test_what_the_host_knows_reaches_a_gpu_without_a_wait(monkeypatch):
    sent = []

    def noted(values, device):
        sent.append(values)
        return on_device(values, device)

    monkeypatch.setattr(mask_predict, "on_device", noted)
    model = ScriptedModel(20, fill=by_length({1: 0.5, 2: 0.5, 3: 0.5}), lengths=lambda s: {2: 0.8, 1: 0.1, 3: 0.1})
    decode(model, [[1]], MaskPredict(iterations=2, length_beam=3, length_candidates="window"))
    assert sent == [[0, -1, 1], [[2, 1, 3], [1, 0, 1]]]


def test_rounds_are_captured_where_the_model_says_so():
    class Model:
        capturable = True

    gpu = torch.device("cuda")
    assert mask_predict._captured(Model, gpu, 100) and not mask_predict._captured(Model, gpu, 10000)
    assert not mask_predict._captured(RandomModel, gpu, 100)
    assert not mask_predict._captured(Model, torch.device("cpu"), 100)


def test_nothing_of_the_model_is_written_to():
    model = RandomModel()
    tables = [model._token.clone(), model._length.clone()]

    class Views(RandomModel):
        def fill(self, tokens, memory):
            return model._token[: tokens.numel()].view(*tokens.shape, -1)

        def length_logits(self, memory):
            return model._length[: len(memory)]

    decode(Views(), [[3], [4]], MaskPredict(iterations=3))
    assert torch.equal(model._token, tables[0]) and torch.equal(model._length, tables[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"iterations": 0}, ValueError, "iterations must be >= 1; got 0"),
        ({"iterations": 2.5}, TypeError, "iterations must be an int; got float"),
        ({"length_beam": 0}, ValueError, "length_beam must be >= 1"),
        ({"n_best": 6}, ValueError, r"n_best must be in \[1, 5\]; got 6"),
        ({"length_candidates": "best"}, ValueError, "length_candidates must be 'top' or 'window'; got 'best'"),
        ({"min_remasked": -1}, ValueError, "min_remasked must be >= 0"),
        ({"length_beams": 2}, ValueError, "did you mean 'length_beam'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        decode(RandomModel(), [[5]], "mask_predict", **options)


def test_empty_batch():
    result = decode(RandomModel(), [], "mask_predict", n_best=2)
    assert result.tokens.shape == (0, 2, 0) and result.trace is None


def test_the_host_reads_nothing_between_the_length_and_the_result():
    source = [[n] for n in range(5, 25)]
    reads = []
    for iterations in (1, 2, 9, 30):
        with HostReads() as host:
            result = decode(RandomModel(), source, MaskPredict(iterations=iterations))
        reads.append(host.count)
    assert len(set(reads)) == 1
    assert len(set(result.iterations.tolist())) > 1, "sentences left while others went on"


def test_the_reference_model_does_not_see_its_batch():
    torch.manual_seed(0)
    options = dict(vocab_size=29, width=16, feed_forward=32, encoder_layers=1, decoder_layers=2, heads=2)
    model = CMLM(CMLMConfig(**options, length_offset=4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    generator = torch.Generator().manual_seed(1)
    source = [torch.randint(5, 29, (n,), generator=generator).tolist() for n in (3, 9, 1, 6, 6, 12, 2)]
    strategy = MaskPredict(iterations=5, length_beam=3)
    whole = decode(model, source, strategy)
    backwards = decode(model, source[::-1], strategy)
    assert backwards.to_lists() == whole.to_lists()[::-1]
    for b, sentence in enumerate(source):
        alone = decode(model, [sentence], strategy)
        assert alone.to_lists()[0] == whole.to_lists()[b]
        torch.testing.assert_close(alone.scores[0], whole.scores[b], rtol=0, atol=1e-5)
        assert alone.iterations[0] == whole.iterations[b]
    assert len(set(map(len, (row[0] for row in whole.to_lists())))) > 2
