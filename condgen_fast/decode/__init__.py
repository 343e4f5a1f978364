"""`decode()` and its strategies: one call turns a batch of source sentences into hypotheses."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from condgen_fast._check import check_token_ids
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.protocols import (
    EditModel,
    FillModel,
    InsertionModel,
    MaskedModel,
    StepModel,
    missing_members,
)
from condgen_fast.decode.trace import left_to_right as written  # a module of this package has that name

# short name → module of this folder and class in it; loaded when first asked for
_STRATEGIES = {
    "greedy": ("greedy", "Greedy"),
    "beam": ("beam_search", "BeamSearch"),
    "sample": ("sampling", "Sampling"),
    "mask_predict": ("mask_predict", "MaskPredict"),
    "levenshtein": ("levenshtein", "LevenshteinRefinement"),
    "refine": ("iterative_refinement", "IterativeRefinement"),
    "insert": ("insertion", "InsertionDecoding"),
    "block_diffusion": ("block_diffusion", "BlockDiffusion"),
}
_CLASSES = {class_name: module for module, class_name in _STRATEGIES.values()} | {
    "adapt": "hugging_face",
    "Rescored": "rescoring",
    "Trie": "trie",
    "score": "scoring",
}

__all__ = [
    "BeamSearch",
    "BlockDiffusion",
    "EditModel",
    "FillModel",
    "Greedy",
    "Hypotheses",
    "InsertionDecoding",
    "InsertionModel",
    "IterativeRefinement",
    "LevenshteinRefinement",
    "MaskPredict",
    "MaskedModel",
    "Rescored",
    "Sampling",
    "StepModel",
    "Trie",
    "adapt",
    "decode",
    "score",
]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(f"{__name__}.{_CLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def decode(
    model: Any,
    source: Tensor | Sequence[Sequence[int]],
    strategy: Any = "beam",
    *,
    source_lengths: Tensor | None = None,
    **options: Any,
) -> Hypotheses:
    """Decode a batch of source sentences.

    model           what the strategy needs: `StepModel` (greedy, beam, sample), `FillModel` (mask_predict, refine),
                    `EditModel` (levenshtein, insert), `InsertionModel` (insert) or `MaskedModel` (block_diffusion).
                    A module in training mode is put in eval mode for the call and back after.
    source          [B, S] int64, right-padded with `model.pad_id`, or B lists of ids. An empty sentence is given to
                    the model as a lone eos.
    strategy        a strategy, or its short name: greedy | beam | sample | mask_predict | levenshtein |
                    refine | insert | block_diffusion
    source_lengths  [B] int64; by default everything up to a sentence's last token that is not padding
    options         fields of the strategy named; none beside a strategy that is an instance

    No gradient is recorded. The result of a sentence does not depend on the rest of the batch, its order or padding.

    Raises ValueError for an unknown strategy or option (naming the nearest valid one) or a value out of range,
    TypeError for a wrong type or a model without a method that the strategy calls (naming it).

        decode(model, [[5, 8, 2]], "beam", beam_size=4).tokens[0, 0]
        decode(model, source, BeamSearch(beam_size=4, n_best=4))
    """
    strategy = _resolve(strategy, options)
    _check_model(model, strategy)
    source, source_lengths = _prepare(model, source, source_lengths)
    if source.shape[0] == 0:
        n = getattr(strategy, "n_best", 1)
        return Hypotheses.empty(n, source.device)
    # not inference_mode: tables that a model builds on first use, and the ids returned, must stay usable in training
    with torch.no_grad(), _eval_mode(model):
        return _traced(strategy.run(model, source, source_lengths), model, strategy)


def _traced(result: Hypotheses, model: Any, strategy: Any) -> Hypotheses:
    """`result` with the trace that was asked for: from left to right, the result itself says it all."""
    if not getattr(strategy, "trace", False) or result.trace is not None:
        return result
    best = (each[:, 0] for each in (result.tokens, result.lengths, result.ended, result.token_log_probs))
    return replace(result, trace=written(*best, bos_id=model.bos_id, eos_id=model.eos_id))


def _resolve(strategy: Any, options: dict[str, Any]) -> Any:
    if not isinstance(strategy, str):
        if isinstance(strategy, type) or not hasattr(strategy, "run"):
            raise TypeError(f"strategy must be a name or a strategy such as BeamSearch(beam_size=5); got {strategy!r}")
        if options:
            raise ValueError(
                f"options must be fields of the strategy where it is an instance; got {', '.join(options)} "
                f"beside {type(strategy).__name__}(...)"
            )
        return strategy
    if strategy not in _STRATEGIES:
        nearest = _nearest(strategy, _STRATEGIES)
        raise ValueError(f"strategy must be one of {', '.join(_STRATEGIES)}; got {strategy!r}{nearest}")
    module, class_name = _STRATEGIES[strategy]
    cls = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)
    names = [field.name for field in fields(cls) if field.init]
    for name in options:
        if name not in names:
            raise ValueError(
                f"{name} is not an option of strategy {strategy!r}{_nearest(name, names)}; it has {', '.join(names)}"
            )
    return cls(**options)


def _nearest(name: str, choices: Any) -> str:
    match = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.4)
    return f"; did you mean {match[0]!r}?" if match else ""


def _check_model(model: Any, strategy: Any) -> None:
    """Every strategy names what it needs, or its alternatives, in its class attribute `model_protocol`; a user's own
    need not."""
    protocols = getattr(strategy, "model_protocol", ())
    protocols = protocols if isinstance(protocols, tuple) else (protocols,)
    lacking = [(missing_members(model, protocol), protocol) for protocol in protocols]
    if lacking and all(missing for missing, _ in lacking):
        missing, protocol = min(lacking, key=lambda pair: len(pair[0]))
        hint = ""
        if protocol is StepModel and hasattr(model, "generate"):
            hint = "; a Hugging Face encoder-decoder is decoded through condgen_fast.decode.adapt(model)"
        raise TypeError(
            f"{type(strategy).__name__} needs a {' or '.join(p.__name__ for p in protocols)}; "
            f"{type(model).__name__} has no {', '.join(missing)}{hint}"
        )


def _prepare(model: Any, source: Any, source_lengths: Any) -> tuple[Tensor, Tensor]:
    """`source` [B, S] and `source_lengths` [B] on the model's device, checked, as narrow as the longest sentence."""
    device = _device(model)
    if isinstance(source, Tensor):
        check_token_ids(source, "source", shape="B S")
        source = source.to(device=device if device is not None else source.device, dtype=torch.int64)
    else:
        if source_lengths is not None:
            raise ValueError("source_lengths must be None where source is a list; its sentences have their lengths")
        source, source_lengths = _from_lists(source, model.pad_id, device)
    B, S = source.shape
    positions = torch.arange(S, device=source.device)
    if source_lengths is None:
        source_lengths = torch.where(source != model.pad_id, positions + 1, 0).amax(1) if S else source.new_zeros(B)
    else:
        check_token_ids(source_lengths, "source_lengths", shape="B", sizes={"B": B})
    source_lengths = source_lengths.to(device=source.device, dtype=torch.int64)
    if B == 0:
        return source, source_lengths
    shortest, longest = torch.stack(torch.aminmax(source_lengths)).tolist()
    if shortest < 0 or longest > S:
        raise ValueError(f"source_lengths must be in [0, {S}]; got {shortest if shortest < 0 else longest}")
    source = torch.where(positions < source_lengths[:, None], source, model.pad_id)
    if shortest == 0:
        source = torch.nn.functional.pad(source, (0, 1), value=model.pad_id) if S == 0 else source.clone()
        source[:, 0] = torch.where(source_lengths == 0, model.eos_id, source[:, 0])
        source_lengths = source_lengths.clamp(min=1)
    source = source[:, : max(longest, 1)]
    if source.device.type == "cpu" and int(source.min()) < 0:
        raise ValueError(f"source must hold ids >= 0; got {int(source.min())}")
    return source.contiguous(), source_lengths


def _from_lists(source: Any, pad_id: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    if isinstance(source, str) or not isinstance(source, Sequence):
        raise TypeError(f"source must be a Tensor [B, S] or a list of lists of ids; got {type(source).__name__}")
    for i, sentence in enumerate(source):
        if isinstance(sentence, str) or not isinstance(sentence, Sequence):
            raise TypeError(f"source[{i}] must be a list of ids; got {type(sentence).__name__}")
        if any(not isinstance(token, Integral) for token in sentence):
            raise TypeError(f"source[{i}] must hold ints only; got {list(sentence)[:8]}")
    lengths = [len(sentence) for sentence in source]
    width = max(lengths, default=0)
    rows = [list(sentence) + [pad_id] * (width - len(sentence)) for sentence in source]
    tokens = torch.tensor(rows, dtype=torch.int64, device=device).reshape(len(rows), width)
    return tokens, torch.tensor(lengths, dtype=torch.int64, device=device)


def _device(model: Any) -> torch.device | None:
    if hasattr(model, "device"):
        return torch.device(model.device)
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return None if parameter is None else parameter.device


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Eval mode for the call; afterwards every part is as it was, one that was frozen in eval mode included."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    if not any(training for _, training in modes):  # setting modes takes as long as a decoder's pass
        yield
        return
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for module, mode in modes:
            module.training = mode
