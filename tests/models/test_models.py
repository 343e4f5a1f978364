"""The reference models: parameter counts, caches against full passes, causality, padding, heads."""

from __future__ import annotations

import pytest
import torch

from condgen_fast.models.cmlm import CMLM, CMLMConfig
from condgen_fast.models.layers import SIZES, Dropout, TransformerConfig
from condgen_fast.models.levenshtein import LevenshteinConfig, LevenshteinTransformer
from condgen_fast.models.masked_lm import MaskedLM, MaskedLMConfig
from condgen_fast.models.transformer import Transformer

SMALL = {"vocab_size": 37, "width": 16, "feed_forward": 32, "encoder_layers": 2, "decoder_layers": 2, "heads": 2}


def small(model_class=Transformer, config_class=TransformerConfig, **more):
    torch.manual_seed(0)
    return model_class(config_class(**SMALL | more)).eval()


def source_of(*lengths):
    torch.manual_seed(1)
    source = torch.randint(5, 37, (len(lengths), max(lengths)))
    lengths = torch.tensor(lengths)
    return source.masked_fill(torch.arange(source.shape[1]) >= lengths[:, None], 0), lengths


@pytest.mark.parametrize(("size", "millions"), [("tiny", 15.7), ("small", 36.1), ("base", 64.5), ("big", 217.1)])
def test_parameter_counts_are_those_of_the_literature(size, millions):
    with torch.device("meta"):
        model = Transformer(TransformerConfig(vocab_size=39_800, **SIZES[size]))
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e6 - millions) < 0.03 * millions


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_steps_equal_the_full_pass(norm, positions):
    model = small(norm=norm, positions=positions)
    source, lengths = source_of(7, 3)
    target = torch.randint(5, 37, (2, 6))
    full = model.project(model(source, lengths, target))
    state = model.start(model.encode(source, lengths), beam_size=1)
    for t in range(6):
        logits, state = model.step(target[:, t : t + 1], state)
        torch.testing.assert_close(logits[:, 0], full[:, t], atol=1e-5, rtol=1e-5)


def test_beams_reorder_and_select():
    model = small()
    source, lengths = source_of(7, 3)
    target = torch.randint(5, 37, (2, 3, 5))  # three beams
    state = model.start(model.encode(source, lengths), beam_size=3)
    for t in range(4):
        _, state = model.step(target[:, :, t], state)
    parents = torch.tensor([[2, 2, 0, 1], [0, 1, 1, 2]])
    state = model.select(model.reorder(state, parents), torch.tensor([1]))
    logits, _ = model.step(target[1, parents[1], 4][None], state)
    for k, parent in enumerate(parents[1].tolist()):
        full = model.project(model(source[1:], lengths[1:], target[1:, parent]))
        torch.testing.assert_close(logits[0, k], full[0, -1], atol=1e-5, rtol=1e-5)


def test_the_decoder_is_causal_and_the_canvas_is_not():
    source, lengths = source_of(6)
    target = torch.randint(5, 37, (1, 8))
    changed = target.clone()
    changed[0, 5] = (target[0, 5] - 4) % 32 + 5
    model = small()
    before, after = model(source, lengths, target), model(source, lengths, changed)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])
    model = small(CMLM, CMLMConfig)
    memory = model.encode(source, lengths)
    before, after = model.fill(target, memory), model.fill(changed, memory)
    assert (before != after).any(-1).all()


@pytest.mark.parametrize("model_class,config_class", [(CMLM, CMLMConfig), (LevenshteinTransformer, LevenshteinConfig)])
def test_canvases_do_not_see_padding(model_class, config_class):
    model = small(model_class, config_class)
    source, lengths = source_of(9, 4)
    canvas = torch.tensor([[2, 7, 4, 8, 9, 3], [2, 4, 3, 0, 0, 0]])
    together = model.fill(canvas, model.encode(source, lengths))
    alone = model.fill(canvas[1:, :3], model.encode(source[1:, :4], lengths[1:]))
    torch.testing.assert_close(together[1:, :3], alone, atol=1e-5, rtol=1e-5)


def test_length_logits_index_is_the_length():
    model = small(CMLM, CMLMConfig, length_offset=3)
    source, lengths = source_of(9, 2)
    memory = model.encode(source, lengths)
    logits, offsets = model.length_logits(memory), model.length_offset_logits(memory)
    assert logits.shape == (2, 1023)
    assert torch.equal(logits[0, 6:13], offsets[0])
    assert torch.equal(logits[1, 1:6], offsets[1, 2:])  # lengths -1 and 0 are impossible
    assert torch.isinf(logits[0, :6]).all() and torch.isinf(logits[0, 13:]).all() and torch.isinf(logits[1, 0])


@pytest.mark.parametrize("share", [True, False])
def test_levenshtein_heads(share):
    model = small(LevenshteinTransformer, LevenshteinConfig, share_decoder=share, max_insert=7, deletion_layers=1)
    source, lengths = source_of(9, 4)
    memory = model.encode(source, lengths)
    canvas = torch.tensor([[2, 7, 4, 3], [2, 9, 3, 0]])
    assert model.delete_logits(canvas, memory).shape == (2, 4, 2)
    assert model.insert_logits(canvas, memory).shape == (2, 3, 8)
    picked = model.select(memory, torch.tensor([1, 1]))
    torch.testing.assert_close(
        model.insert_logits(canvas[[1, 1]], picked)[0, :2], model.insert_logits(canvas, memory)[1, :2]
    )


def test_an_early_exit_runs_fewer_layers():
    deep, early = (
        small(LevenshteinTransformer, LevenshteinConfig, deletion_layers=layers) for layers in (2, 1)
    )  # the same seed, so the same weights
    source, lengths = source_of(5)
    canvas = torch.tensor([[2, 7, 9, 3]])
    outputs = [model.delete_logits(canvas, model.encode(source, lengths)) for model in (deep, early)]
    assert not torch.allclose(*outputs)
    with torch.no_grad():  # the layer after the exit does not matter
        for parameter in early.decoder.layers[1].parameters():
            parameter.fill_(7.0)
    assert torch.equal(outputs[1], early.delete_logits(canvas, early.encode(source, lengths)))


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [(CMLM, CMLMConfig), (LevenshteinTransformer, LevenshteinConfig), (MaskedLM, MaskedLMConfig)],
)
def test_a_hook_keeps_passes_out_of_cuda_graphs(model_class, config_class):
    """In which it would not run."""
    model = small(model_class, config_class)
    assert model.capturable
    part = [part for part in model.modules() if isinstance(part, torch.nn.Linear)][-1]
    for register in (part.register_forward_hook, part.register_forward_pre_hook, model.register_forward_hook):
        handle = register(lambda *_: None)
        assert not model.capturable
        handle.remove()
        assert model.capturable


def test_empty_source_and_too_long_source():
    model = small(max_positions=12)
    logits, _ = model.step(
        torch.full((2, 1), 2), model.start(model.encode(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2)), 1)
    )
    assert logits.isfinite().all()
    with pytest.raises(ValueError, match="12 positions; got a sequence of 13"):
        model.encode(torch.full((1, 13), 5), torch.tensor([13]))
    with pytest.raises(ValueError, match=r"source must be in \[0, 37\); got 37"):
        model.encode(torch.tensor([[5, 37]]), torch.tensor([2]))


def test_dropout_drops_the_share_it_says_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(200_000)
    layer = Dropout(0.25)
    y = layer(x)
    assert abs((y == 0).float().mean() - 0.25) < 0.005 and abs(y.mean() - 1) < 0.01
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heads", 3, "multiple of heads=3"),
        ("heads", 0, "heads must be >= 1; got 0"),
        ("width", "x", "width must be an int"),
        ("norm", "batch", "norm must be one of"),
        ("activation", "x", "activation"),
    ],
)
def test_config_is_checked(field, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TransformerConfig(**SMALL | {field: value})
