"""`adapt` on masked language models of transformers, small and random."""

from __future__ import annotations

import pytest
import torch

from condgen_fast.decode import BlockDiffusion, adapt, decode

transformers = pytest.importorskip("transformers")

V, MASK, PAD, BOS, EOS = 40, 4, 1, 0, 2
SIZES = dict(
    vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=32, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, initializer_range=0.5,
)  # fmt: skip


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def roberta():
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES))


def modernbert():
    config = transformers.ModernBertConfig(**SIZES, cls_token_id=BOS, sep_token_id=EOS, local_attention=8)
    config._attn_implementation = "eager"
    return transformers.ModernBertForMaskedLM(config)


@pytest.fixture(params=[bert, roberta, modernbert], ids=lambda make: make.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param().double()


def infill_by_hand(model, canvas):
    """One mask a pass, the surest first, everything from transformers alone."""
    canvas = list(canvas)
    while MASK in canvas:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([canvas])).logits[0]
        logits[:, [PAD, BOS, EOS, MASK]] = -torch.inf
        best = logits.softmax(-1).max(-1)
        place = max((i for i, t in enumerate(canvas) if t == MASK), key=lambda i: float(best.values[i]))
        canvas[place] = int(best.indices[place])
    return canvas


SOURCES = [
    [BOS, 7, MASK, 9, MASK, MASK, EOS],
    [BOS, MASK, 11, EOS],
    [MASK, 8, MASK, 10, MASK],
    [BOS, 5, 6, 7, 8, 9, MASK, 12, 13, EOS],
]


def test_infill_is_that_of_the_model_itself(model):
    model.eval()
    result = decode(adapt(model, mask_id=MASK), SOURCES, BlockDiffusion(policy="quota"))
    for source, (tokens,) in zip(SOURCES, result.to_lists(), strict=True):
        assert source[: source.index(MASK)] + tokens == infill_by_hand(model, source)


@pytest.mark.parametrize("policy", ["quota", "threshold", "margin", "entropy"])
def test_a_batch_equals_one_by_one(policy, model):
    adapted = adapt(model.train(), mask_id=MASK)
    sources = [*SOURCES, [BOS, 5], [BOS, 7, 8]]
    strategy = BlockDiffusion(policy=policy, block_length=4, max_length=6, temperature=1.0, seed=1)
    whole = decode(adapted, sources, strategy)
    for b, source in enumerate(sources):
        assert decode(adapted, [source], strategy).to_lists()[0] == whole.to_lists()[b]
    assert model.training
    written = whole.token_log_probs[:, :, :-1] != 0
    assert not torch.isin(whole.tokens[written[:, :, : whole.tokens.shape[2]]], torch.tensor([BOS, MASK])).any()


def test_ids_come_from_the_config_or_are_given(model):
    adapted = adapt(model, mask_id=MASK)
    assert (adapted.pad_id, adapted.bos_id, adapted.eos_id, adapted.mask_id) == (PAD, BOS, EOS, MASK)
    other = adapt(model, mask_id=5, pad_id=6, bos_id=7, eos_id=8)
    assert (other.pad_id, other.bos_id, other.eos_id, other.mask_id) == (6, 7, 8, 5)
    model.config.eos_token_id = model.config.sep_token_id = None
    with pytest.raises(ValueError, match=r"eos_id must be given as an id in \[0, 39\]; got None"):
        adapt(model, mask_id=MASK)
    with pytest.raises(ValueError, match=r"mask_id must be given as an id in \[0, 39\]; got 40"):
        adapt(model, mask_id=40)
    with pytest.raises(ValueError, match=r"mask_id must be given as an id in \[0, 39\]; got True"):
        adapt(model, mask_id=True)


def test_without_mask_id_the_refusal_says_what_is_missing(model):
    with pytest.raises(TypeError, match="encoder-decoder .*; a masked language model needs mask_id; got .*ForMaskedLM"):
        adapt(model)


def test_canvases_fit_the_positions(model):
    adapted = adapt(model, mask_id=MASK)
    most = 32 if not isinstance(model, transformers.RobertaForMaskedLM) else 30
    assert adapted.max_positions == most
    result = decode(adapted, [[BOS, 5]], "block_diffusion", max_length=100, policy="quota", steps=1)
    assert int(result.lengths) <= most - 2


def test_what_has_no_language_model_head_is_refused():
    with pytest.raises(TypeError, match="model must be a transformers model with a language-model head; got Linear"):
        adapt(torch.nn.Linear(2, 2), mask_id=3)
    body = transformers.BertModel(transformers.BertConfig(**SIZES))
    with pytest.raises(TypeError, match="language-model head; got BertModel"):
        adapt(body, mask_id=MASK)
