"""InsertionDecoding: balanced and sequential orders, limits, given tokens, both kinds of models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refinement_helpers import BOS, EOS, MASK, PAD, RandomModel, ScriptedModel, sure

from condgen_fast.decode import InsertionDecoding, LevenshteinRefinement, decode
from condgen_fast.models.checkpoint import load_model

VOCABULARY = 40


class TreeModel:
    """Knows the target of each sentence: a slot takes the middle of what is missing there, or eos.

    The probability falls with the depth of the token in the balanced tree, so that "sequential" has an order too.
    """

    pad_id, bos_id, eos_id, mask_id, vocab_size = PAD, BOS, EOS, MASK, VOCABULARY

    def __init__(self, lengths, probability=lambda place, n: 0.5 + 0.4 * (place + 1) / (n + 1)):
        self.targets = [list(range(5, 5 + n)) for n in lengths]
        self.probability, self.rows = probability, []

    def encode(self, source, source_lengths):
        return source[:, 0] - 5

    def select(self, memory, rows):
        return memory[rows]

    def slot_logits(self, tokens, memory):
        self.rows.append(len(tokens))
        logits = torch.full((tokens.shape[0], tokens.shape[1] - 1, self.vocab_size), torch.nan)
        for b, (row, sentence) in enumerate(zip(tokens.tolist(), memory.tolist(), strict=True)):
            canvas = [t for t in row if t != PAD]
            target = self.targets[sentence]
            places = [-1, *(target.index(t) for t in canvas[1:-1]), len(target)]
            for slot, (left, right) in enumerate(zip(places, places[1:], strict=False)):
                middle = (left + right) // 2
                token = target[middle] if right - left > 1 else EOS
                logits[b, slot] = torch.tensor(sure(token, self.probability(middle, len(target)), self.vocab_size))
        return logits


class RandomSlots(RandomModel):
    """Slots from a random table; `EOS` is likely enough to end."""

    def slot_logits(self, tokens, memory):
        logits = self._token[self._context(tokens, memory)[:, :-1] % 997].clone()
        logits[..., EOS] += 2.0
        return logits


@pytest.mark.parametrize("lengths", [[0, 1, 2, 3], [7, 8, 15, 16], [4, 31, 5]])
def test_a_balanced_tree_is_complete_after_its_depth(lengths):
    model = TreeModel(lengths)
    source = [[5 + i] for i in range(len(lengths))]
    result = decode(model, source, "insert", max_length=60)
    assert [row[0] for row in result.to_lists()] == model.targets
    assert result.iterations.tolist() == [math.ceil(math.log2(n + 1)) + 1 for n in lengths]
    one_by_one = decode(model, source, "insert", max_length=60, mode="sequential")
    assert one_by_one.to_lists() == result.to_lists()
    assert one_by_one.iterations.tolist() == [n + 1 for n in lengths]


def test_sequential_takes_the_surest_slot_and_the_left_one_of_equals():
    canvases = {}
    for name, probability in (("rising", lambda place, n: 0.5 + 0.01 * place), ("equal", lambda *_: 1.0)):
        model = TreeModel([7], probability)
        result = decode(model, [[5]], "insert", max_length=60, mode="sequential", trace=True)
        canvases[name] = [
            next(t for t, new in zip(s.tokens, s.touched, strict=True) if new) - 5
            for s in result.trace[0].steps
            if s.operation == "put"
        ]
        assert all(sum(step.touched) == (step.operation == "put") for step in result.trace[0].steps)
    assert canvases == {"rising": [3, 5, 6, 4, 1, 2, 0], "equal": [3, 1, 0, 2, 5, 4, 6]}


def test_log_probabilities_are_those_of_the_inserting_iteration():
    result = decode(TreeModel([3], lambda *_: 0.5), [[5]], "insert", max_length=60)
    assert result.token_log_probs[0, 0].exp().tolist() == pytest.approx([0.5, 0.5, 0.5, 1.0])
    assert float(result.scores[0, 0].exp()) == pytest.approx(0.5)


def both_kinds(seed):
    return RandomSlots(seed=seed), RandomModel(seed=seed)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_a_batch_equals_one_by_one(mode):
    source, initial = [[5, 6], [7], [8, 9, 10], [11]], [[6], [], [9, 9, 9, 9], [5, 5]]
    for seed in range(6):
        for model in both_kinds(seed):
            for given_tokens in (None, initial):

                def run(rows, given_tokens=given_tokens, model=model):
                    some = None if given_tokens is None else [given_tokens[i] for i in rows]
                    strategy = InsertionDecoding(mode=mode, max_iterations=6, initial=some)
                    return decode(model, [source[i] for i in rows], strategy)

                whole, shuffled = run(range(4)), run([2, 0, 3, 1])
                assert shuffled.to_lists() == [whole.to_lists()[i] for i in (2, 0, 3, 1)]
                for b in range(4):
                    alone = run([b])
                    assert alone.to_lists()[0] == whole.to_lists()[b] and alone.iterations[0] == whole.iterations[b]
                    assert alone.scores[0] == whole.scores[b]
                    width = alone.token_log_probs.shape[2]
                    assert torch.equal(alone.token_log_probs[0], whole.token_log_probs[b, :, :width])


@settings(max_examples=60, deadline=None)
@given(
    initial=st.lists(st.lists(st.integers(5, 16) | st.just(1), max_size=6), min_size=1, max_size=4),
    maximum=st.integers(1, 12),
    penalty=st.sampled_from([0.0, 3.0]),
    mode=st.sampled_from(["parallel", "sequential"]),
    per_slot=st.none() | st.integers(1, 2),
    seed=st.integers(0, 7),
)
def test_given_tokens_stay_in_order_and_limits_hold(initial, maximum, penalty, mode, per_slot, seed):
    strategy = InsertionDecoding(
        initial=initial, max_length=maximum, eos_penalty=penalty, mode=mode, per_slot=per_slot, max_iterations=9,
    )  # fmt: skip
    for model in both_kinds(seed):
        result = decode(model, [[5 + i] for i in range(len(initial))], strategy)
        for (tokens,), wanted in zip(result.to_lists(), initial, strict=True):
            rest = iter(tokens)
            assert all(token in rest for token in wanted)
            assert len(tokens) <= max(maximum - 1, len(wanted))
            assert not {PAD, BOS, EOS, MASK} & set(tokens)


def test_the_rightmost_insertions_give_way():
    model = TreeModel([15])
    assert decode(model, [[5]], "insert", max_length=3).to_lists() == [
        [[8, 12]]
    ]  # of the two slots round 12 the left one
    assert decode(model, [[5]], "insert", max_length=6).to_lists() == [[[6, 8, 10, 12, 16]]]
    model.max_positions = 6
    assert decode(model, [[5]], "insert", max_length=50).lengths.tolist() == [[4]]


def test_the_penalty_on_nothing_makes_outputs_longer():
    def length(**options):
        model = ScriptedSlots([(EOS, 0.6), (7, 0.7)])
        return int(decode(model, [[5]], "insert", max_iterations=3, **options).lengths)

    assert length() == 0 and length(eos_penalty=10.0) == 7


class ScriptedSlots(TreeModel):
    """Every slot says the same; the second choice takes over where the first is ruled out."""

    def __init__(self, choices):
        super().__init__([0])
        self.choices = choices

    def slot_logits(self, tokens, memory):
        (first, p), (second, q) = self.choices
        row = torch.full((self.vocab_size,), -torch.inf)
        row[[first, second]] = torch.tensor([p, (1 - p) * q]).log()
        return row.expand(tokens.shape[0], tokens.shape[1] - 1, -1)


def test_specials_that_a_model_prefers_are_not_inserted():
    for special in (PAD, BOS, MASK):
        assert decode(ScriptedSlots([(special, 0.9), (7, 0.5)]), [[5]], "insert", max_length=4).to_lists() == [
            [[7] * 3]
        ]


def test_iterations_are_limited_and_finished_sentences_leave():
    model = TreeModel([1, 15, 3])
    result = decode(model, [[5], [6], [7]], "insert", max_iterations=3, max_length=60)
    assert result.lengths.flatten().tolist() == [1, 7, 3] and result.iterations.tolist() == [2, 3, 3]
    assert model.rows == [3, 3, 2]
    model.rows.clear()
    decode(model, [[5], [6], [7]], "insert", max_length=60)
    assert model.rows == [3, 3, 2, 1, 1]


def edit_model(insert, probability=None):
    def fill(sentence, canvas):
        return [(5 + i, 0.5) for i in range(len(canvas))]

    return ScriptedModel(30, fill=fill, insert=insert)


def test_an_edit_model_inserts_what_it_says_at_most_per_slot():
    model = edit_model(lambda sentence, canvas: [5] if len(canvas) == 2 else [0] * (len(canvas) - 1))
    assert decode(model, [[5]], "insert").lengths.tolist() == [[5]] and model.calls["delete"] == 0
    two = edit_model(lambda sentence, canvas: [3] * (len(canvas) - 1) if len(canvas) < 7 else [0] * (len(canvas) - 1))
    result = decode(two, [[5]], InsertionDecoding(per_slot=1, max_length=20, trace=True))
    assert [sum(s.touched) for s in result.trace[0].steps if s.operation == "insert"] == [1, 2, 4]
    assert decode(edit_model(lambda s, c: [0] * (len(c) - 1)), [[5]], "insert", eos_penalty=math.inf).lengths == 9


def test_sequential_takes_the_slot_of_an_edit_model_that_is_least_likely_to_stay_empty():
    model = edit_model(lambda sentence, canvas: [min(i, 3) for i in range(len(canvas) - 1)] if len(canvas) < 9 else
                       [0] * (len(canvas) - 1))  # fmt: skip
    strategy = InsertionDecoding(mode="sequential", initial=[[7, 7, 7, 7]], max_length=20, trace=True, max_iterations=1)
    step = decode(model, [[5]], strategy).trace[0].steps[1]
    assert step.touched.index(True) == 4 and sum(step.touched) == 1  # slots 3 and 4 alike: the left one


def test_one_iteration_on_an_edit_model_is_that_of_levenshtein_refinement():
    for seed in range(10):
        model = RandomModel(seed=seed)
        source = [[5, 6], [7], [8, 9, 10]]
        insertion = decode(model, source, "insert", max_iterations=1)
        refinement = decode(model, source, LevenshteinRefinement(max_iterations=1))
        assert torch.equal(insertion.tokens, refinement.tokens)
        assert torch.equal(insertion.token_log_probs, refinement.token_log_probs)


def test_replaying_the_trace_gives_the_output():
    for seed in range(6):
        for model in both_kinds(seed):
            strategy = InsertionDecoding(initial=[[5, 6], []], max_iterations=5, trace=True)
            result = decode(model, [[5], [6, 7]], strategy)
            plain = decode(model, [[5], [6, 7]], InsertionDecoding(initial=[[5, 6], []], max_iterations=5))
            assert torch.equal(plain.tokens, result.tokens) and plain.trace is None
            for b, trace in enumerate(result.trace):
                canvas = [BOS, *([5, 6] if b == 0 else []), EOS]
                for step in trace.steps:
                    old = [t for t, new in zip(step.tokens, step.touched, strict=True) if not new]
                    if step.operation in ("insert", "put"):
                        assert old == canvas
                    canvas = step.tokens
                assert canvas[1:-1] == result.to_lists()[b][0]


def test_nothing_in_nothing_out():
    assert decode(TreeModel([3]), [], "insert").tokens.shape == (0, 1, 0)
    empty = decode(TreeModel([0]), [[5]], "insert")
    assert empty.lengths.tolist() == [[0]] and empty.scores.tolist() == [[0.0]] and empty.iterations.tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "balanced"}, "mode must be 'parallel' or 'sequential'; got 'balanced'"),
        ({"per_slot": 0}, "per_slot must be >= 1; got 0"),
        ({"max_iterations": 0}, "max_iterations must be >= 1; got 0"),
        ({"max_length": 0}, "max_length must be >= 1; got 0"),
        ({"eos_penalty": -1.0}, "eos_penalty must be >= 0.0; got -1.0"),
        ({"initial": [[MASK]]}, "initial must hold no bos, eos or mask"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        decode(TreeModel([3]), [[5]], "insert", **options)


def test_a_model_without_slots_is_refused():
    class Other:
        pad_id, bos_id, eos_id, mask_id, vocab_size = PAD, BOS, EOS, MASK, 9

    with pytest.raises(
        TypeError, match="InsertionDecoding needs a InsertionModel or EditModel; Other has no encode, select"
    ):
        decode(Other(), [[5]], "insert")


def test_the_example_of_the_shipped_levenshtein_transformer():
    """As the docstring of InsertionDecoding has it, and with a word that the model would not have chosen."""
    try:
        model, vocabulary = load_model("levenshtein-en-de")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    source = [[*ids, model.eos_id] for ids in vocabulary.encode(["Open the file."])]
    for word in ("Datei", "Folie"):
        found = decode(model, source, InsertionDecoding(initial=vocabulary.encode([word])))
        [text] = vocabulary.decode([found.to_lists()[0][0]])
        assert word in text and (text == "Öffnen Sie die Datei." or word == "Folie")
