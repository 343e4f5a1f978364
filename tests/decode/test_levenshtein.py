"""Levenshtein refinement: stopping, bounds, post-editing, and loops of policies with a known outcome."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refinement_helpers import BOS, EOS, FIRST, MASK, PAD, RandomModel, ScriptedModel

from condgen_fast.decode import LevenshteinRefinement, decode
from condgen_fast.models.levenshtein import LevenshteinConfig, LevenshteinTransformer
from condgen_fast.ops.levenshtein import edit_oracle

SPECIALS = {PAD, BOS, EOS, MASK}
VOCAB = 40


def oracle_model(targets: dict[int, list[int]], **options) -> ScriptedModel:
    """A model whose three policies are the edit oracle towards `targets[sentence]`."""

    def labels(sentence, canvas):
        target = torch.tensor([[BOS, *targets[sentence], EOS]])
        return edit_oracle(torch.tensor([canvas]), target, pad_id=PAD, impl="reference")

    def delete(sentence, canvas):
        return labels(sentence, canvas).delete[0].tolist()

    def insert(sentence, canvas):
        return labels(sentence, canvas).insert[0, : len(canvas) - 1].tolist()

    def fill(sentence, canvas):
        target = [BOS, *targets[sentence], EOS]
        return [(token, 0.9) if token >= FIRST else (FIRST, 0.5) for token in target]

    return ScriptedModel(VOCAB, fill=fill, delete=delete, insert=insert, **options)


def constant(insert: int, token: int = FIRST, delete: bool = False, **options) -> ScriptedModel:
    """A model that inserts the same number everywhere, fills the same token, and deletes everything or nothing."""
    return ScriptedModel(
        VOCAB,
        fill=lambda s, c: [(token, 0.5)] * len(c),
        delete=lambda s, c: [delete] * len(c),
        insert=lambda s, c: [insert] * (len(c) - 1),
        **options,
    )


TARGETS = {1: [7, 8, 9], 2: [], 3: [5], 4: [9, 9, 9, 8, 8, 5, 6], 5: [10, 11]}


@pytest.mark.parametrize("initial", [None, [[], [], [], [], []], [[8, 9, 7], [5, 6], [5], [1, 9, 8], [9] * 7]])
def test_oracle_policies_reach_the_target_in_one_iteration_and_confirm_it(initial):
    model = oracle_model(TARGETS)
    result = decode(model, [[s] for s in TARGETS], LevenshteinRefinement(initial=initial))
    assert [rows[0] for rows in result.to_lists()] == list(TARGETS.values())
    starts = initial or [[]] * len(TARGETS)
    expected = [1 if start == target else 2 for start, target in zip(starts, TARGETS.values(), strict=True)]
    assert result.iterations.tolist() == expected
    assert model.calls["fill"] == 1, "the confirming iteration has nothing to fill"


def test_deletes_are_skipped_while_every_canvas_is_empty_and_finished_sentences_leave():
    model = oracle_model(TARGETS)
    decode(model, [[s] for s in TARGETS], LevenshteinRefinement())
    assert model.calls == {"encode": 1, "select": 1, "delete": 1, "insert": 2, "fill": 1}
    assert model.rows_seen == [4], "the sentence whose target is empty left before the fill"


def test_scores_are_of_the_iteration_that_wrote_each_token():
    def fill(sentence, canvas):
        return [(FIRST + len(canvas), 0.5 if len(canvas) == 4 else 0.25)] * len(canvas)

    def insert(sentence, canvas):
        return (
            [2] if len(canvas) == 2 else [1 if len(canvas) == 4 and slot == 1 else 0 for slot in range(len(canvas) - 1)]
        )

    model = ScriptedModel(VOCAB, fill=fill, delete=lambda s, c: [False] * len(c), insert=insert)
    result = decode(model, [[1]], LevenshteinRefinement(trace=True))
    assert result.to_lists() == [[[FIRST + 4, FIRST + 5, FIRST + 4]]]
    half, quarter = math.log(0.5), math.log(0.25)
    torch.testing.assert_close(result.token_log_probs[0, 0], torch.tensor([half, quarter, half, 0.0]))
    assert result.scores.item() == pytest.approx((2 * half + quarter) / 3)
    assert result.iterations.tolist() == [3]
    assert [(s.iteration, s.operation) for s in result.trace[0].steps] == [
        (1, "insert"), (1, "fill"), (2, "insert"), (2, "fill"), (3, "result"),
    ]  # fmt: skip


def test_inserts_nothing_anywhere():
    model = constant(0)
    result = decode(model, [[1], [2]], LevenshteinRefinement())
    assert result.to_lists() == [[[]], [[]]] and result.tokens.shape == (2, 1, 0)
    assert result.iterations.tolist() == [1, 1] and result.scores.tolist() == [[0.0], [0.0]]
    assert model.calls["fill"] == 0 and model.calls["delete"] == 0
    kept = decode(model, [[1], [2]], LevenshteinRefinement(initial=[[6, 7], [8]]))
    assert kept.to_lists() == [[[6, 7]], [[8]]] and kept.iterations.tolist() == [1, 1]
    assert kept.token_log_probs.abs().sum() == 0, "given tokens that stay have log-probability 0"


def test_deletes_everything():
    result = decode(constant(0, delete=True), [[1], [2]], LevenshteinRefinement(initial=[[6, 7], []]))
    assert result.to_lists() == [[[]], [[]]]
    assert result.iterations.tolist() == [2, 1]


@pytest.mark.parametrize("options", [{}, {"max_length": 7}, {"max_length": 1}, {"max_length": 30}])
def test_inserts_the_maximum_everywhere(options):
    model = constant(15)
    result = decode(model, [[1] * 9, [2]], LevenshteinRefinement(max_iterations=4, **options))
    length = options.get("max_length")
    expected = [length - 1] * 2 if length else [17, 9]  # max(10, 2 S) with eos
    assert result.lengths.flatten().tolist() == [min(n, 15 * (1 + 16)) for n in expected]
    assert all(len(canvas) <= max(expected) + 2 for _, canvas in model.canvases)
    assert set(result.tokens[0, 0].tolist()) <= {FIRST}


def test_the_position_table_bounds_the_canvas():
    model = constant(15, max_positions=8)  # the model asserts that no canvas is wider
    result = decode(model, [[1] * 9], LevenshteinRefinement(max_length=50))
    assert result.lengths.tolist() == [[6]]
    with pytest.raises(ValueError, match="initial must fit the model's 8 positions with bos and eos; got 7 tokens"):
        decode(model, [[1]], LevenshteinRefinement(initial=[[5] * 7]))


def test_a_given_canvas_longer_than_the_bound_is_kept():
    assert decode(constant(1), [[1]], LevenshteinRefinement(initial=[[6] * 20])).to_lists() == [[[6] * 20]]


def test_placeholders_furthest_right_give_way():
    def insert(sentence, canvas):
        return [0, 2, 2, 2][: len(canvas) - 1] if len(canvas) == 5 else [0] * (len(canvas) - 1)

    model = ScriptedModel(
        VOCAB, fill=lambda s, c: [(30, 0.5)] * len(c), delete=lambda s, c: [False] * len(c), insert=insert
    )
    result = decode(model, [[1]], LevenshteinRefinement(initial=[[6, 7, 8]], max_length=7))
    assert result.to_lists() == [[[6, 30, 30, 7, 30, 8]]]


def swinging(probability: dict[int, float]) -> ScriptedModel:
    """Deletes whatever stands there and fills the other of two tokens, for ever."""

    def fill(sentence, canvas):
        token = FIRST if model.calls["fill"] % 2 == 1 else FIRST + 1
        return [(token, probability[token])] * len(canvas)

    model = ScriptedModel(
        VOCAB, fill=fill, delete=lambda s, c: [True] * len(c), insert=lambda s, c: [2] + [0] * (len(c) - 2)
    )
    return model


@pytest.mark.parametrize("max_iterations", [3, 4, 9])
@pytest.mark.parametrize("better", [FIRST, FIRST + 1])
def test_two_canvases_in_turn_stop_at_the_maximum_and_the_better_is_returned(max_iterations, better):
    model = swinging({FIRST: 0.5, FIRST + 1: 0.5} | {better: 0.8})
    result = decode(model, [[1]], LevenshteinRefinement(max_iterations=max_iterations, trace=True))
    assert result.to_lists() == [[[better] * 2]]
    assert result.iterations.tolist() == [max_iterations]
    assert result.scores.item() == pytest.approx(math.log(0.8))
    last = result.trace[0].steps[-1]
    assert last.tokens[1:-1] == [better] * 2
    assert (last.operation == "restore") == ((max_iterations % 2 == 1) == (better == FIRST + 1))


def test_without_a_cycle_the_last_canvas_is_returned_however_probable_the_one_before():
    model = ScriptedModel(
        VOCAB,
        fill=lambda s, c: [(FIRST + len(c), 1 / len(c))] * len(c),
        delete=lambda s, c: [False] * len(c),
        insert=lambda s, c: [1] + [0] * (len(c) - 2),
    )
    result = decode(model, [[1]], LevenshteinRefinement(max_iterations=4))
    assert result.to_lists() == [[[FIRST + n for n in (6, 5, 4, 3)]]]
    assert result.iterations.tolist() == [4]


def test_an_empty_canvas_is_never_the_better_of_two():
    model = ScriptedModel(
        VOCAB,
        fill=lambda s, c: [(FIRST, 0.1)] * len(c),
        delete=lambda s, c: [True] * len(c),
        insert=lambda s, c: [0] if model.calls["insert"] % 2 == 0 else [1],
    )
    for maximum in (4, 5):
        model.calls["insert"] = 0
        assert decode(model, [[1]], LevenshteinRefinement(max_iterations=maximum)).to_lists() == [[[FIRST]]]


def test_rewriting_the_same_tokens_counts_as_unchanged():
    model = ScriptedModel(
        VOCAB,
        fill=lambda s, c: [(FIRST, 0.5)] * len(c),
        delete=lambda s, c: [True] * len(c),
        insert=lambda s, c: [3] + [0] * (len(c) - 2),
    )
    result = decode(model, [[1]], LevenshteinRefinement())
    assert result.to_lists() == [[[FIRST] * 3]]
    assert result.iterations.tolist() == [2], "iteration 2 deleted and wrote the same canvas again"


def test_eos_penalty_is_taken_from_inserting_nothing():
    model = constant(0)  # logits -0, -1, -2 …: a penalty above 1 makes one placeholder the most probable
    assert decode(model, [[1]], LevenshteinRefinement(eos_penalty=0.9)).lengths.item() == 0
    assert decode(model, [[1]], LevenshteinRefinement(eos_penalty=1.0)).lengths.item() == 0, "ties: fewer"
    for penalty in (1.1, math.inf):
        strategy = LevenshteinRefinement(eos_penalty=penalty, max_iterations=1)
        assert decode(model, [[1]], strategy).lengths.item() == 1


@pytest.mark.parametrize("favourite", [*sorted(SPECIALS), None])
def test_a_special_token_is_never_written_however_probable(favourite):
    class Model(RandomModel):
        def fill(self, tokens, memory):
            logits = super().fill(tokens, memory).clone()
            if favourite is None:
                return logits.fill_(torch.nan)
            logits[..., favourite] = 50.0
            return logits

    result = decode(Model(), [[4, 4], [7]], LevenshteinRefinement())
    for row, length in zip(result.to_lists(), result.lengths.tolist(), strict=True):
        assert len(row[0]) == length[0] and not SPECIALS & set(row[0])


sentences = st.lists(st.lists(st.integers(FIRST, 90), min_size=1, max_size=6), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(sentences, st.integers(1, 5), st.integers(0, 9), st.sampled_from([None, 3, 8]), st.booleans(), st.data())
def test_invariants_and_a_sentence_does_not_see_its_batch(sources, maximum, seed, max_length, post_edit, data):
    model = RandomModel(seed=seed)
    given_tokens = [data.draw(st.lists(st.integers(FIRST, 16), max_size=7)) for _ in sources] if post_edit else None

    def strategy(initial):
        return LevenshteinRefinement(max_iterations=maximum, max_length=max_length, initial=initial, trace=True)

    together = decode(model, sources, strategy(given_tokens))
    for b, source in enumerate(sources):
        alone = decode(model, [source], strategy(given_tokens and [given_tokens[b]]))
        tokens = alone.to_lists()[0][0]
        assert tokens == together.to_lists()[b][0]
        assert torch.equal(alone.scores[0], together.scores[b])
        assert alone.iterations[0] == together.iterations[b] <= maximum
        assert alone.trace[0] == together.trace[b]
        assert not SPECIALS & set(tokens)
        bound = (max_length or max(10, 2 * len(source))) - 1
        assert len(tokens) <= max(bound, len(given_tokens[b]) if post_edit else 0)
        for step in alone.trace[0].steps:
            assert step.tokens[0] == BOS and step.tokens[-1] == EOS and not {BOS, EOS} & set(step.tokens[1:-1])
            if step.operation != "restore":
                assert not step.touched[0] and not step.touched[-1]
            if step.operation in ("delete", "fill", "start"):
                assert MASK not in step.tokens
            if step.operation == "insert":
                assert step.touched == [token == MASK for token in step.tokens]
        last = alone.trace[0].steps[-1]
        assert last.tokens[1:-1] == tokens and last.iteration == alone.trace[0].iterations == alone.iterations[0]
        torch.testing.assert_close(torch.tensor(last.log_probs[1:]), alone.token_log_probs[0, 0], rtol=0, atol=0)


def test_initial_tokens_as_tensor_and_as_lists():
    model, source = RandomModel(), [[5, 6], [7], [8, 9]]
    lists = [[6, 7], [], [9, 9, 9]]
    tensor = torch.tensor([[6, 7, PAD, PAD], [PAD] * 4, [9, 9, 9, PAD]])
    one = decode(model, source, LevenshteinRefinement(initial=lists))
    two = decode(model, source, LevenshteinRefinement(initial=tensor))
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.scores, two.scores)
    assert torch.equal(one.iterations, two.iterations)


@pytest.mark.parametrize(
    ("initial", "error", "message"),
    [
        ([[5]], ValueError, "initial must hold tokens for each of the 2 sentences; got 1"),
        ([[5], [MASK]], ValueError, "initial must hold no bos, eos or mask"),
        ([[5], [BOS, 6]], ValueError, "initial must hold no bos, eos or mask"),
        ([[5], [6, EOS]], ValueError, "initial must hold no bos, eos or mask"),
        (torch.tensor([[5, 6], [PAD, 6]]), ValueError, "padding only on the right"),
        ([[5], [17]], ValueError, r"initial must be in \[0, 17\); got 17"),
        (torch.tensor([[5.0], [6.0]]), ValueError, "initial must be int64 or int32; got float32"),
        (torch.tensor([5, 6]), ValueError, r"initial must have shape \[B, L\]; got \[2\]"),
        ("ab", TypeError, "initial must be"),
        ([[5], ["a"]], TypeError, "initial must be"),
        (7, TypeError, "initial must be"),
    ],
)
def test_bad_initial_tokens(initial, error, message):
    with pytest.raises(error, match=message):
        decode(RandomModel(), [[5], [6]], LevenshteinRefinement(initial=initial))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_iterations": 0}, ValueError, "max_iterations must be >= 1; got 0"),
        ({"eos_penalty": -1.0}, ValueError, "eos_penalty must be >= 0.0; got -1.0"),
        ({"max_length": 0}, ValueError, "max_length must be >= 1; got 0"),
        ({"max_length": 2.0}, TypeError, "max_length must be an int; got float"),
        ({"eos_penality": 1.0}, ValueError, "did you mean 'eos_penalty'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        decode(RandomModel(), [[5]], "levenshtein", **options)


def test_empty_batch():
    assert decode(RandomModel(), [], "levenshtein").tokens.shape == (0, 1, 0)


def test_passes_that_would_say_nothing_new_are_not_made():
    """Nothing was inserted: the states after the deletions are those of the next canvas. And a canvas written again as
    it was is not looked at any more."""
    model = LevenshteinTransformer(
        LevenshteinConfig(vocab_size=29, width=16, feed_forward=32, encoder_layers=1, decoder_layers=1, heads=2)
    ).eval()
    seen, script = [], {}
    real_states, real_insert = model.edit_states, model.insert_head

    def edit_states(tokens, memory):
        seen.append(tokens.shape[1])
        return real_states(tokens, memory)

    def delete_head(states):
        logits = torch.zeros(*states.shape[:2], 2)
        logits[:, script["delete"].pop(0), 1] = 1.0
        return logits

    def insert_head(states):
        logits = torch.zeros_like(real_insert(states))
        for slot, count in script["insert"].pop(0):
            logits[:, slot, count] = 1.0
        return logits

    model.edit_states, model.delete_head, model.insert_head = edit_states, delete_head, insert_head
    script.update(delete=[[2], [], []], insert=[[], []])
    result = decode(model, [[5, 6]], LevenshteinRefinement(initial=[[7, 8, 9]]))
    assert result.to_lists() == [[[7, 9]]] and result.iterations.tolist() == [2] and seen == [5, 5]

    seen.clear()
    script.update(delete=[[2]], insert=[[(1, 1)]])
    model.fill_states = lambda tokens, memory: torch.zeros(*tokens.shape, 16)
    model.project = lambda states: torch.nn.functional.one_hot(torch.tensor([8] * len(states)), 29).float()
    result = decode(model, [[5, 6]], LevenshteinRefinement(initial=[[7, 8, 9]]))
    assert result.to_lists() == [[[7, 8, 9]]] and result.iterations.tolist() == [1] and seen == [5, 5]


def test_the_reference_model_does_not_see_its_batch():
    torch.manual_seed(0)
    options = dict(vocab_size=29, width=16, feed_forward=32, encoder_layers=1, decoder_layers=2, heads=2)
    model = LevenshteinTransformer(LevenshteinConfig(**options, max_insert=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    generator = torch.Generator().manual_seed(1)
    source = [torch.randint(5, 29, (n,), generator=generator).tolist() for n in (3, 9, 1, 6, 6, 12, 2)]
    strategy = LevenshteinRefinement(max_iterations=6)
    whole = decode(model, source, strategy)
    backwards = decode(model, source[::-1], strategy)
    assert backwards.to_lists() == whole.to_lists()[::-1]
    for b, sentence in enumerate(source):
        alone = decode(model, [sentence], strategy)
        assert alone.to_lists()[0] == whole.to_lists()[b]
        torch.testing.assert_close(alone.scores[0], whole.scores[b], rtol=0, atol=1e-5)
        assert alone.iterations[0] == whole.iterations[b]
    assert len(set(map(len, (row[0] for row in whole.to_lists())))) > 2


def test_a_canvas_that_shrinks_after_another_sentence_left_keeps_no_tail():
    model, sources, given_tokens = RandomModel(seed=0), [[5, 40], [5, 5]], [[5, 5, 5, 5], []]
    together = decode(model, sources, LevenshteinRefinement(max_iterations=3, initial=given_tokens))
    for b, source in enumerate(sources):
        alone = decode(model, [source], LevenshteinRefinement(max_iterations=3, initial=[given_tokens[b]]))
        assert together.to_lists()[b] == alone.to_lists()[0]
