"""decode(): strategies and options by name, sources of every kind, models it refuses, the mode it leaves them in."""

from __future__ import annotations

import weakref

import numpy
import pytest
import torch
from helpers import TableModel, random_table
from torch import nn

from condgen_fast.decode import BeamSearch, EditModel, FillModel, Greedy, Hypotheses, StepModel, decode

LEFT_TO_RIGHT = ["greedy", "beam", "sample"]


@pytest.fixture
def model():
    return TableModel(random_table(64, 997, 9, seed=40, eos_bias=1.0))


class Seen(TableModel):
    """Keeps what it was given to encode."""

    def encode(self, source, source_lengths):
        self.source, self.lengths = source, source_lengths
        return super().encode(source, source_lengths)


class TrainedModel(nn.Module):
    """A TableModel that is a module with dropout, a part of which is kept in eval mode."""

    def __init__(self):
        super().__init__()
        self.dropout, self.frozen = nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)).eval()
        self.bias = nn.Parameter(torch.zeros(9))
        self.table = TableModel(random_table(64, 997, 9, seed=41))
        self.vocab_size, self.pad_id, self.bos_id, self.eos_id = 9, 0, 0, 1
        self.fail = False

    def encode(self, source, source_lengths):
        return self.table.encode(source, source_lengths)

    def start(self, memory, beam_size):
        return self.table.start(memory, beam_size)

    def step(self, tokens, state):
        assert not any(module.training for module in self.modules()) and not torch.is_grad_enabled()
        if self.fail:
            raise RuntimeError("no")
        logits, state = self.table.step(tokens, state)
        return self.dropout(logits + self.bias), state

    def reorder(self, state, parents):
        return self.table.reorder(state, parents)


def test_strategy_by_name_and_by_instance(model):
    source = [[3], [4, 5]]
    named = decode(model, source, "beam", beam_size=3, n_best=2)
    given = decode(model, source, BeamSearch(beam_size=3, n_best=2))
    assert named.to_lists() == given.to_lists() and torch.equal(named.scores, given.scores)
    assert decode(model, source).to_lists() == decode(model, source, BeamSearch()).to_lists()


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("bean", {}, "strategy must be one of greedy, beam, sample, mask_predict, .*; got .*did you mean 'beam'"),
        ("xyz", {}, "got 'xyz'$"),
        ("beam", dict(bem_size=3), "bem_size is not an option of strategy 'beam'; did you mean 'beam_size'"),
        ("greedy", dict(beam_size=3), "beam_size is not an option of strategy 'greedy'.* max_length"),
        (Greedy(), dict(max_length=3), r"got max_length beside Greedy\(\.\.\.\)"),
    ],
)
def test_unknown_strategies_and_options(model, strategy, options, message):
    with pytest.raises(ValueError, match=message):
        decode(model, [[3]], strategy, **options)


@pytest.mark.parametrize("strategy", [BeamSearch, 3, None])
def test_what_is_no_strategy(model, strategy):
    with pytest.raises(TypeError, match="strategy must be a name or a strategy such as"):
        decode(model, [[3]], strategy)


def test_a_strategy_of_ones_own(model):
    class Nothing:
        def run(self, model, source, source_lengths):
            return source, source_lengths

    source, lengths = decode(model, [[3], [4, 5]], Nothing())
    assert source.tolist() == [[3, 0], [4, 5]] and lengths.tolist() == [1, 2]


def test_a_model_without_a_method_is_named(model):
    class NoReorder:
        vocab_size, pad_id, bos_id = 9, 0, 0
        encode = start = step = print

    with pytest.raises(TypeError, match="BeamSearch needs a StepModel; NoReorder has no eos_id, reorder$"):
        decode(NoReorder(), [[3]])
    assert isinstance(model, StepModel) and not isinstance(NoReorder(), StepModel)
    assert not isinstance(model, FillModel) and not isinstance(model, EditModel)


@pytest.mark.parametrize("strategy", LEFT_TO_RIGHT)
def test_sources_of_every_kind_are_the_same(strategy):
    model = Seen(random_table(64, 997, 9, seed=42))
    options = dict(seed=1) if strategy == "sample" else {}
    expected = decode(model, [[3], [4, 5, 6]], strategy, **options)
    assert model.source.tolist() == [[3, 0, 0], [4, 5, 6]] and model.lengths.tolist() == [1, 3]
    padded = torch.tensor([[3, 0, 0, 0], [4, 5, 6, 0]])
    dirty = torch.tensor([[3, 8, 8, 8], [4, 5, 6, 8]])
    lengths = torch.tensor([1, 3])
    for found in (
        decode(model, padded, strategy, **options),
        decode(model, padded.int(), strategy, **options),
        decode(model, padded.t().contiguous().t(), strategy, **options),
        decode(model, [(3,), list(numpy.array([4, 5, 6]))], strategy, **options),
        decode(model, dirty, strategy, source_lengths=lengths, **options),
        decode(model, dirty, strategy, source_lengths=lengths.int(), **options),
    ):
        assert model.source.tolist() == [[3, 0, 0], [4, 5, 6]] and model.lengths.tolist() == [1, 3]
        assert found.to_lists() == expected.to_lists() and torch.equal(found.scores, expected.scores)
    assert dirty[0].tolist() == [3, 8, 8, 8]


def test_pad_inside_a_sentence_does_not_end_it():
    model = Seen(random_table(64, 997, 9, seed=42))
    decode(model, torch.tensor([[3, 0, 5, 0], [0, 0, 0, 4]]))
    assert model.lengths.tolist() == [3, 4]


@pytest.mark.parametrize("strategy", LEFT_TO_RIGHT)
@pytest.mark.parametrize("source", [[[], [4, 5]], torch.tensor([[0, 0], [4, 5]])])
def test_an_empty_sentence_is_a_lone_eos(strategy, source):
    model = Seen(random_table(64, 997, 9, seed=43))
    found = decode(model, source, strategy)
    assert model.source.tolist() == [[1, 0], [4, 5]] and model.lengths.tolist() == [1, 2]
    assert found.tokens.shape[0] == 2
    for empty in ([[]], torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)):
        decode(model, empty, strategy)
        assert model.source.tolist() == [[1]] and model.lengths.tolist() == [1]


@pytest.mark.parametrize("source", [[], torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.int64)])
@pytest.mark.parametrize(
    ("strategy", "options", "n"),
    [("greedy", {}, 1), ("beam", dict(n_best=3), 3), ("sample", dict(n_samples=4), 4)],
)
def test_no_sentences(model, source, strategy, options, n):
    found = decode(model, source, strategy, **options)
    assert isinstance(found, Hypotheses) and found.to_lists() == []
    assert found.tokens.shape == (0, n, 0) and found.token_log_probs.shape == (0, n, 1)
    assert found.lengths.shape == found.scores.shape == (0, n) and found.iterations.shape == (0,)
    assert model.row_counts == []


@pytest.mark.parametrize(
    ("source", "lengths", "error", "message"),
    [
        ("abc", None, TypeError, "source must be a Tensor"),
        (["abc"], None, TypeError, r"source\[0\] must be a list of ids; got str"),
        ([[3], 4], None, TypeError, r"source\[1\] must be a list of ids; got int"),
        ([[3], [4.0]], None, TypeError, r"source\[1\] must hold ints only; got \[4.0\]"),
        ([[3], [-4]], None, ValueError, "source must hold ids >= 0; got -4"),
        (torch.tensor([3]), None, ValueError, r"source must have shape \[B, S\]; got \[1\]"),
        (torch.tensor([[3.0]]), None, ValueError, "source must be int64 or int32; got float32"),
        (torch.tensor([[3]]), [1], TypeError, "source_lengths must be a Tensor; got list"),
        (torch.tensor([[3]]), torch.tensor([1, 1]), ValueError, r"source_lengths must have shape \[B\] with B=1"),
        (torch.tensor([[3]]), torch.tensor([1.0]), ValueError, "source_lengths must be int64 or int32; got float32"),
        (torch.tensor([[3]]), torch.tensor([2]), ValueError, r"source_lengths must be in \[0, 1\]; got 2"),
        (torch.tensor([[3]]), torch.tensor([-1]), ValueError, r"source_lengths must be in \[0, 1\]; got -1"),
        ([[3]], torch.tensor([1]), ValueError, "source_lengths must be None where source is a list"),
    ],
)
def test_bad_sources(model, source, lengths, error, message):
    with pytest.raises(error, match=message):
        decode(model, source, source_lengths=lengths)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("strategy", LEFT_TO_RIGHT)
def test_mode_is_restored_part_by_part(strategy, fails):
    model = TrainedModel().train()
    model.frozen.eval()
    model.fail = fails
    if fails:
        with pytest.raises(RuntimeError, match="no"):
            decode(model, [[3]], strategy)
    else:
        found = decode(model, [[3], [4]], strategy)
        assert not found.scores.requires_grad and not found.scores.is_inference()
    assert model.training and model.dropout.training and torch.is_grad_enabled()
    assert not model.frozen.training and not model.frozen[0].training
    model.eval()
    model.fail = False
    decode(model, [[3]], strategy)
    assert not any(module.training for module in model.modules())


class Large(TableModel):
    """Fails where the logits of the step before still have their memory when the next are asked for."""

    before = None

    def step(self, tokens, state):
        assert self.before is None or self.before() is None
        logits, state = super().step(tokens, state)
        memory = logits.numpy().copy()  # lives as long as any tensor that looks at it
        self.before = weakref.ref(memory)
        return torch.from_numpy(memory), state


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("greedy", {}),
        ("sample", {"n_samples": 3, "top_k": 4}),
        ("beam", {}),
        ("beam", {"groups": 5}),
        ("beam", {"choose": "sample"}),
        ("beam", {"choose": "stochastic"}),
        ("beam", {"repetition_penalty": 1.5}),
    ],
)
def test_a_steps_logits_are_gone_before_the_next_step(strategy, options):
    model = Large(random_table(64, 997, 9, seed=42))
    decode(model, [[3], [4, 5]], strategy, max_length=8, **options)
    assert len(model.row_counts) > 2
