"""Hugging Face encoder-decoders (Marian, T5, BART, ...) as step models, used in place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen_fast._check import check_token_ids
from condgen_fast.decode.hugging_face_masked import HuggingFaceMaskedModel


def adapt(
    model: nn.Module,
    *,
    forced_bos_id: int | None = None,
    mask_id: int | None = None,
    pad_id: int | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> HuggingFaceModel | HuggingFaceMaskedModel:
    """A `transformers` model as one that strategies decode; its weights stay where they are.

    An encoder-decoder with a language-model head (Marian, T5, BART, T5Gemma, NLLB-MoE, Switch, ProphetNet) becomes a
    `StepModel`; with `mask_id`, a masked language model without decoder (BERT, RoBERTa, ModernBERT) a `MaskedModel`.

    forced_bos_id  the token that every target begins with (a language code, say); by default the model's own
                   `forced_bos_token_id`. As in `generate`, it costs nothing, and it stands first in the hypotheses.

    mask_id        the tokenizer's `mask_token_id`; the model's config does not hold it
    pad_id, bos_id, eos_id
                   of a masked model; by default its config's pad, bos or cls, and eos or sep token id

    Ids of an encoder-decoder come from `model.generation_config`: bos is its `decoder_start_token_id`, and several eos
    ids all end a hypothesis (`eos_id`, the first, is the end that `score` counts). Nothing else of the generation
    configuration is read: beam size, lengths and penalties are options of the strategy.
    Keys and values of the source are held once a sentence where the decoder attends by torch's attention ("sdpa", the
    default of Marian, BART, T5 and most others), once a beam where it was loaded with another; neither is reordered.
    Steps are not captured in a CUDA graph (there is no `reserve`): the caches grow with every token, and in each step
    transformers waits for the device to say whether its mask hides anything.

    Raises TypeError if the model is no encoder-decoder and there is no `mask_id`, ValueError where it does not have
    an eos id, one pad id and one decoder start id.

        decode(adapt(MarianMTModel.from_pretrained(path)), source, "beam", beam_size=4)
        model = adapt(BertForMaskedLM.from_pretrained(path), mask_id=103, bos_id=101, eos_id=102)
        decode(model, [[101, 2023, 103, 1037, 103, 102]], "block_diffusion").tokens
    """
    if mask_id is not None:
        return HuggingFaceMaskedModel(model, mask_id=mask_id, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id)
    return HuggingFaceModel(model, forced_bos_id)


@dataclass(frozen=True)
class _Memory:
    source: Tensor  # [B, S] int64
    hidden: Tensor  # [B, S, D]
    mask: Tensor  # [B, S] int64, 1 inside the sentence
    output: type  # what the encoder puts its result into


@dataclass(frozen=True)
class _State:
    memory: _Memory
    beam_size: int
    # transformers.EncoderDecoderCache, None before the first step: of B*K rows for the target's tokens, of B rows
    # (`_OfSentences`) for the source's where the model attends by scaled_dot_product_attention, otherwise of B*K too
    cache: Any = None


class _OfSentences(Tensor):
    """Keys or values [B, H, S, D] of the source that the queries [B*K, H, 1, D] of all K beams of a sentence look at.

    `scaled_dot_product_attention` takes a sentence's beams for K queries of one row, so that nothing is copied per
    beam. The model is not touched: only the tensors in the cache that it is handed are of this kind.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention:
                return _attend(*args, **(kwargs or {}))
            if func is torch.cat:  # T5Gemma2 attends to target and source at once
                rows = max(len(x) for x in args[0])
                return torch.cat([x.repeat_interleave(rows // len(x), 0) for x in args[0]], *args[1:], **(kwargs or {}))
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if isinstance(result, Tensor) else result


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    (rows, heads, _, width), sentences = query.shape, key.shape[0]
    beams = rows // sentences
    if attn_mask is not None and attn_mask.shape[0] == rows:
        attn_mask = attn_mask[::beams]  # the same for all beams of a sentence
    query = query.view(sentences, beams, heads, width).transpose(1, 2)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    return found.transpose(1, 2).flatten(0, 1)[:, :, None]


class HuggingFaceModel(nn.Module):
    """What `adapt` returns. A state is consumed by the method it is handed to: its cache is changed in place."""

    def __init__(self, model: nn.Module, forced_bos_id: int | None = None) -> None:
        super().__init__()
        config = getattr(model, "config", None)
        if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "generation_config"):
            raise TypeError(
                "model must be a transformers encoder-decoder with a language-model head; a masked language model needs"
                f" mask_id; got {type(model).__name__}"
            )
        self.model = model
        generation = model.generation_config
        self.eos_ids = _ids(generation.eos_token_id, "eos_token_id")
        self.eos_id = self.eos_ids[0]
        self.pad_id = _only_id(generation.pad_token_id, "pad_token_id")
        self.bos_id = _only_id(
            generation.decoder_start_token_id
            if generation.decoder_start_token_id is not None
            else generation.bos_token_id,
            "decoder_start_token_id",
        )
        self.forced_bos_id = generation.forced_bos_token_id if forced_bos_id is None else forced_bos_id
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        if self.forced_bos_id is not None and not 0 <= self.forced_bos_id < self.vocab_size:
            raise ValueError(f"forced_bos_id must be in [0, {self.vocab_size - 1}]; got {self.forced_bos_id}")
        self.max_positions = getattr(config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, source: Tensor, source_lengths: Tensor) -> _Memory:
        known = self.model.get_input_embeddings().num_embeddings
        check_token_ids(source, "source", shape="B S", vocab_size=known)
        if self.max_positions is not None and source.shape[1] > self.max_positions:
            raise ValueError(
                f"source must have at most the model's {self.max_positions} positions; got {source.shape[1]} tokens"
            )
        positions = torch.arange(source.shape[1], device=source.device)
        mask = (positions < source_lengths[:, None]).long()
        output = self.model.get_encoder()(input_ids=source, attention_mask=mask, return_dict=True)
        return _Memory(source, output.last_hidden_state, mask, type(output))

    def force(self, target: Tensor, memory: _Memory) -> Tensor:
        """Logits [B, n, T, V] that follow each token of the targets [B, n, T] (the start first)."""
        B, n, T = target.shape
        output = self.model(
            input_ids=memory.source.repeat_interleave(n, 0),  # of no use, but without it FSMT's decoder is not causal
            encoder_outputs=memory.output(last_hidden_state=memory.hidden.repeat_interleave(n, 0)),
            attention_mask=memory.mask.repeat_interleave(n, 0),
            decoder_input_ids=target.view(B * n, T),
            use_cache=False,
            return_dict=True,
        )
        logits = output.logits.view(B, n, T, -1)
        if self.forced_bos_id is None:
            return logits
        first = torch.full_like(logits[:, :, :1], -torch.inf)
        first[..., self.forced_bos_id] = 0.0
        return torch.cat([first, logits[:, :, 1:]], 2)

    def start(self, memory: _Memory, beam_size: int) -> _State:
        return _State(memory, beam_size)

    def step(self, tokens: Tensor, state: _State) -> tuple[Tensor, _State]:
        B, K = tokens.shape
        if state.cache is None:
            # All hypotheses are still equal: one row a sentence goes through the decoder, then the self-attention cache
            # is copied per beam, once. From here on only it is ever moved.
            logits, cache = self._decode(tokens[:, :1], state.memory, None)
            cache.self_attention_cache.batch_repeat_interleave(K)
            if self._shares_source():
                for layer in cache.cross_attention_cache.layers:
                    layer.keys, layer.values = (x.as_subclass(_OfSentences) for x in (layer.keys, layer.values))
            else:
                cache.cross_attention_cache.batch_repeat_interleave(K)
            logits = logits[:, None].expand(B, K, -1).contiguous()
            if self.forced_bos_id is not None:
                logits = torch.full_like(logits, -torch.inf)
                logits[..., self.forced_bos_id] = 0.0
        else:
            # The keys and values of the source are cached, so only the shape of the hidden states is looked at.
            hidden = state.memory.hidden[:1].expand(B * K, -1, -1)
            memory = replace(state.memory, hidden=hidden, mask=state.memory.mask.repeat_interleave(K, 0))
            logits, cache = self._decode(tokens.reshape(B * K, 1), memory, state.cache)
            logits = logits.view(B, K, -1)
        return logits, replace(state, cache=cache)

    def _decode(self, tokens: Tensor, memory: _Memory, cache: Any) -> tuple[Tensor, Any]:
        output = self.model(
            encoder_outputs=memory.output(last_hidden_state=memory.hidden),
            attention_mask=memory.mask,
            decoder_input_ids=tokens,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return output.logits[:, -1], output.past_key_values

    def _shares_source(self) -> bool:
        """Whether the decoder's attention is torch's, as it is unless the model was loaded to have another."""
        config = getattr(self.model.get_decoder(), "config", None)  # FSMT's has none, and attention of its own
        return getattr(config, "_attn_implementation", None) == "sdpa"

    def reorder(self, state: _State, parents: Tensor) -> _State:
        first = torch.arange(parents.shape[0], device=parents.device)[:, None] * state.beam_size
        state.cache.self_attention_cache.reorder_cache((first + parents).reshape(-1))
        return state

    def select(self, state: _State, rows: Tensor) -> _State:
        beams = torch.arange(state.beam_size, device=rows.device)
        beam_rows = (rows[:, None] * state.beam_size + beams).reshape(-1)
        state.cache.self_attention_cache.batch_select_indices(beam_rows)
        state.cache.cross_attention_cache.batch_select_indices(rows if self._shares_source() else beam_rows)
        parts = {name: getattr(state.memory, name)[rows] for name in ("source", "hidden", "mask")}
        return replace(state, memory=replace(state.memory, **parts))


def _only_id(value: Any, name: str) -> int:
    ids = _ids(value, name)
    if len(ids) > 1:
        raise ValueError(f"model.generation_config.{name} must be one id; got {ids}")
    return ids[0]


def _ids(value: Any, name: str) -> list[int]:
    if isinstance(value, Tensor):
        value = value.tolist()
    ids = list(value) if isinstance(value, (list, tuple)) else [value]
    if not ids or not all(isinstance(token, int) for token in ids):
        raise ValueError(f"model.generation_config.{name} must be an id; got {value!r}")
    return ids
