"""The compiled forward pass against the modules it stands in for: values, bits across batches, weights, states."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from condgen_fast import _library
from condgen_fast.decode import BeamSearch, Greedy, decode
from condgen_fast.models import compiled
from condgen_fast.models.cmlm import CMLM, CMLMConfig
from condgen_fast.models.compiled import CompiledState
from condgen_fast.models.layers import TransformerConfig
from condgen_fast.models.transformer import Transformer, TransformerState
from condgen_fast.ops.transformer import linear, transformer_pass

pytestmark = pytest.mark.skipif(not _library.load(), reason="needs the compiled library")

# sizes that are no multiple of any vector, panel or tile
SMALL = {"vocab_size": 61, "width": 24, "feed_forward": 50, "encoder_layers": 2, "decoder_layers": 2, "heads": 3}


def small(model_class=Transformer, config_class=TransformerConfig, **more):
    torch.manual_seed(0)
    model = model_class(config_class(**SMALL | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that none can be forgotten
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sentences(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 61, (n,), generator=generator).tolist() for n in lengths]


def padded(rows, width=None):
    width = width or max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), torch.tensor([len(row) for row in rows])


@pytest.fixture
def by_modules(monkeypatch):
    """Call this to have the modules themselves compute, from there on."""
    return lambda: monkeypatch.setattr(compiled, "stands_in", lambda *modules: False)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "pre", "tie_embeddings": False},
        {"norm": "post", "positions": "learned"},
        {"activation": "gelu", "feed_forward": 300},
        {"width": 64, "heads": 1, "vocab_size": 128},
        {"width": 160, "heads": 2, "decoder_layers": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_steps_equal_the_teacher_forced_pass(options, by_modules):
    model = small(**options)
    source, lengths = padded(sentences(7, 3, 1))
    target = torch.randint(5, 61, (3, 20), generator=torch.Generator().manual_seed(2))  # more than a part of the cache
    state = model.start(model.encode(source, lengths), beam_size=1)
    assert isinstance(state, CompiledState)
    steps = []
    for t in range(20):
        logits, state = model.step(target[:, t : t + 1], state)
        steps.append(logits[:, 0])
    assert [len(part) for part in state.cache] == [16, 16]
    by_modules()
    full = model.project(model(source, lengths, target))
    torch.testing.assert_close(torch.stack(steps, 1), full, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_beams_and_sentences_come_and_go(by_modules):
    """Every operation of a state, beside the modules' own states."""

    def run(model):
        generator = torch.Generator().manual_seed(3)

        def tokens():
            return torch.randint(5, 61, (batch, beam), generator=generator)

        batch, beam = 4, 2
        source, lengths = padded(sentences(5, 9, 2, 7))
        state = model.start(model.encode(source, lengths), beam)
        kinds.append(type(state))
        found = []
        for step in range(24):
            logits, state = model.step(tokens(), state)
            found.append(logits)
            if step == 5:
                batch = 3
                state = model.select(state, torch.tensor([3, 0, 1]))
            before = beam
            beam = {3: 5, 9: 1, 12: 4}.get(step, beam)
            parents = torch.randint(0, before, (batch, beam), generator=generator)
            state = model.reorder(state, parents)
        return found

    kinds = []
    model = small()
    ours = run(model)
    by_modules()
    theirs = run(model)
    assert kinds == [CompiledState, TransformerState]
    for own, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_the_cache_stays_where_it_is():
    model = small()
    state = model.start(model.encode(*padded(sentences(4, 5))), 3)
    _, state = model.step(torch.full((2, 3), 7), state)
    held = state.cache[0]
    kept = held[0].clone()
    state = model.select(model.reorder(state, torch.tensor([[2, 2, 0], [1, 0, 0]])), torch.tensor([1]))
    _, state = model.step(torch.full((1, 3), 8), state)
    assert state.cache[0] is held and torch.equal(held[0], kept)
    assert state.slots.tolist() == [[4, 0], [3, 1], [3, 2]]


@pytest.mark.parametrize("strategy", [BeamSearch(beam_size=4, n_best=4), Greedy()], ids=["beam", "greedy"])
def test_bits_do_not_depend_on_the_batch_the_order_the_padding_or_the_threads(strategy):
    model = small(width=48, heads=4, feed_forward=600)
    rows = sentences(*(1 + i % 9 for i in range(24)))
    whole = decode(model, rows, strategy)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    shuffled = decode(model, [rows[i] for i in order], strategy)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        other_threads = decode(model, padded(rows, 17)[0], strategy)
    finally:
        torch.set_num_threads(threads)
    width = whole.token_log_probs.shape[2]
    for name in ("tokens", "scores", "token_log_probs", "lengths"):
        assert torch.equal(getattr(shuffled, name), getattr(whole, name)[order]), name
        assert torch.equal(getattr(other_threads, name), getattr(whole, name)), name
    for i in (0, 7, 8, 23):
        alone = decode(model, [rows[i]], strategy)
        assert alone.to_lists()[0] == whole.to_lists()[i]
        assert torch.equal(alone.scores[0], whole.scores[i])
        log_probs = nn.functional.pad(alone.token_log_probs[0], (0, width - alone.token_log_probs.shape[2]))
        assert torch.equal(log_probs, whole.token_log_probs[i])


def test_two_decodes_at_once_with_more_threads_than_processors():
    model = small(width=48, heads=4, feed_forward=600)
    rows = sentences(*(1 + i % 9 for i in range(24)))
    expected = decode(model, rows, "beam", beam_size=4).to_lists()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda _: decode(model, rows, "beam", beam_size=4).to_lists(), range(4)))
    finally:
        torch.set_num_threads(threads)
    assert found == [expected] * 4


@torch.no_grad()
def test_logits_are_the_same_bits_for_any_number_of_rows():
    generator = torch.Generator().manual_seed(5)
    weight, bias = (torch.randn(shape, generator=generator) for shape in [(70, 300), (70,)])
    x = torch.randn(300, 300, generator=generator)
    whole = linear(x, weight, bias)
    for rows in (1, 3, 4, 8, 9, 12, 13, 16, 17, 31, 33, 48, 129, 257):
        assert torch.equal(linear(x[:rows], weight, bias), whole[:rows]), rows
        assert torch.equal(linear(x[-rows:], weight, bias), whole[-rows:]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (4, 512, 96), (33, 700, 29), (40, 2048, 50)])
def test_linear_is_as_exact_as_torch(rows, inputs, outputs, dtype):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator)
    exact = x.double() @ weight.double().T + bias.double()
    ours = (linear(x, weight, bias) - exact).abs().max()
    torchs = (nn.functional.linear(x, weight.float(), bias) - exact).abs().max()
    assert ours <= 3 * torchs + 1e-6
    assert linear(x[:0], weight, None).shape == (0, outputs)


@torch.no_grad()
def test_changed_weights_are_used_at_once():
    model = small(activation="gelu")  # of which no unit is dead
    memory = model.encode(*padded(sentences(6)))
    tokens = torch.full((1, 1), 9)

    def logits():
        return model.step(tokens, model.step(tokens, model.start(memory, 1))[1])[0]

    before = logits()
    for name, parameter in model.decoder.named_parameters():
        if "cross_attention.memory" in name:  # used when the source is encoded
            continue
        saved = parameter.clone()
        parameter[tuple(n - 1 for n in parameter.shape)] += 0.5  # of self-attention's input, a value's
        if "tokens" in name:
            parameter[9] += 0.5
        assert not torch.equal(logits(), before), name
        parameter.copy_(saved)
        assert torch.equal(logits(), before), name
    model.decoder.layers[1].feed_forward.inner.weight = nn.Parameter(torch.zeros(50, 24))
    assert not torch.equal(logits(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_weights(dtype):
    """The same numbers in a wide model: only the encoded source is rounded in between."""
    narrow = small().to(dtype)
    wide = small()
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    wide.decoder.embedding.positions = narrow.decoder.embedding.positions.float()
    source = padded(sentences(6, 3))
    target = torch.randint(5, 61, (2, 1, 8), generator=torch.Generator().manual_seed(7))
    states = [model.start(model.encode(*source), 1) for model in (narrow, wide)]
    assert all(isinstance(state, CompiledState) for state in states)
    for t in range(8):
        ours, states[0] = narrow.step(target[:, :, t], states[0])
        expected, states[1] = wide.step(target[:, :, t], states[1])
        torch.testing.assert_close(ours, expected, atol=0.1, rtol=0.02)
        assert not torch.equal(ours, expected)


def test_training_has_dropout_and_gradients_and_decoding_neither():
    model = small(dropout=0.5)
    rows = sentences(5, 3)
    expected = decode(model, rows, "beam", beam_size=3)
    model.train()
    assert decode(model, rows, "beam", beam_size=3).to_lists() == expected.to_lists()
    assert model.training
    state = model.start(model.encode(*padded(rows)), 2)
    assert isinstance(state, TransformerState)
    total = 0.0
    for token in (7, 8, 9):
        logits, state = model.step(torch.full((2, 2), token), state)
        state = model.reorder(state, torch.tensor([[1, 0], [1, 1]]))
        total = total + logits.logsumexp(-1).sum()
    total.backward()
    assert all(parameter.grad is not None for parameter in model.decoder.layers.parameters())
    with torch.no_grad():
        assert not compiled.stands_in(model.decoder)


@torch.no_grad()
def test_parts_that_are_not_ours_are_called():
    """Adapters, hooks, parametrisations and other types keep the modules computing."""

    class Adapted(nn.Linear):
        pass

    def replaced(model):
        model.decoder.layers[0].feed_forward.inner = Adapted(24, 50)

    def hooked(model):
        model.decoder.layers[1].attention.register_forward_hook(lambda *_: None)

    def parametrised(model):
        nn.utils.parametrizations.weight_norm(model.decoder.layers[0].attention.output)

    def double(model):
        model.double()

    model = small()
    assert compiled.stands_in(model.decoder) and compiled.stands_in(model.encoder)
    for change in (replaced, hooked, parametrised, double):
        changed = copy.deepcopy(model)
        change(changed)
        assert not compiled.stands_in(changed.decoder.eval()), change.__name__
        assert len(decode(changed, sentences(3), "greedy", max_length=4).tokens) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert not compiled.stands_in(model.decoder)
    with torch.enable_grad():
        assert not compiled.stands_in(model.decoder)


@torch.no_grad()
def test_encoders_and_canvases(by_modules):
    """The pass that every reference model encodes with, and the same with cross-attention."""
    model = small(CMLM, CMLMConfig)
    source, lengths = padded(sentences(9, 4, 1, 30))
    canvas, canvas_lengths = padded(sentences(3, 12, 5, 1, seed=8))
    memory = model.encode(source, lengths).source
    decoder = model.decoder
    ours = transformer_pass(
        canvas, canvas_lengths, [tensor for pair in memory.cross for tensor in pair], lengths,
        compiled.listed(decoder.embedding, decoder.layers, decoder.norm), heads=3, norm_first=True, gelu=False,
    )  # fmt: skip
    by_modules()
    expected = model.encode(source, lengths).source
    real = torch.arange(30) < lengths[:, None]
    torch.testing.assert_close(memory.states[real], expected.states[real], atol=2e-5, rtol=2e-5)
    assert (memory.states[~real] == 0).all() and torch.equal(memory.mask, real)
    for own, other in zip(memory.cross, expected.cross, strict=True):
        for a, b in zip(own, other, strict=True):
            torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=2e-5, rtol=2e-5)
    real = torch.arange(12) < canvas_lengths[:, None]
    full = decoder(canvas, expected, real[:, None, None, :], causal=False)
    torch.testing.assert_close(ours[real], full[real], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_refusals():
    model = small(max_positions=3)
    state = model.start(model.encode(*padded(sentences(2))), 1)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 61\); got 61"):
        model.step(torch.full((1, 1), 61), state)
    for _ in range(3):
        _, state = model.step(torch.full((1, 1), 5), state)
    with pytest.raises(ValueError, match="3 positions; got a sequence of 4"):
        model.step(torch.full((1, 1), 5), state)
    with pytest.raises(ValueError, match="3 positions; got a sequence of 9"):
        model.encode(*padded(sentences(4, 9, 5)))
    with pytest.raises(ValueError, match="slots must be rows of the cache; got 4"):
        state = model.start(model.encode(*padded(sentences(2))), 1)
        _, state = model.step(torch.full((1, 1), 5), state)
        state.slots.fill_(4)
        model.step(torch.full((1, 1), 5), state)
    with pytest.raises(ValueError, match="input must have shape"):
        linear(torch.ones(2, 3), torch.ones(4, 5), None)


def test_fakes():
    arguments = (torch.randn(5, 24), torch.randn(7, 24), torch.randn(7))
    torch.library.opcheck(
        torch.ops.condgen_fast.linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
