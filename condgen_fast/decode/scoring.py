"""What a model says of given hypotheses, with gradient: for training on what a search has found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.protocols import StepModel


def score(
    model: StepModel,
    source: Tensor | Sequence[Sequence[int]],
    hypotheses: Hypotheses,
    *,
    source_lengths: Tensor | None = None,
) -> Tensor:
    """Log-probabilities [B, n, L+1] float32 of the tokens of `hypotheses`, differentiable in the model's parameters.

    Each token's stands at its place, eos's after the last, 0 beyond, as in `Hypotheses.token_log_probs`. `.sum(-1)` is
    the log-probability of each hypothesis, 0 for one that is none (score -inf). One that is not `ended` has no eos.
    Modes and gradients are the caller's: nothing is put in eval mode, and under `torch.no_grad()` nothing is recorded.

    The values are those of `token_log_probs`, except where a search changes the model's: by a repetition penalty; with
    compat="ctranslate2" by bans and min_length, whose probability goes to the other tokens there. And of a model with
    several `eos_ids` the end that is scored is `eos_id`, as a hypothesis does not say which one it had.

    A model with `force(target [B, n, T], memory) -> logits [B, n, T, V]`, the logits that follow each token of the
    targets, reads them at once; of others every step is called.

        found = decode(model, source, BeamSearch(n_best=4))
        risk = (score(model, source, found).sum(-1).softmax(-1) * cost).sum()  # expected risk: Shen et al. 2016

    Equivalent to teacher forcing: ``log_softmax`` of the logits of ``[bos, *tokens]``, gathered at ``[*tokens, eos]``.
    """
    from condgen_fast.decode import _prepare

    source, source_lengths = _prepare(model, source, source_lengths)
    tokens, lengths = hypotheses.tokens, hypotheses.lengths
    B, n, width = tokens.shape
    if source.shape[0] != B:
        raise ValueError(f"hypotheses must be of the {source.shape[0]} sentences of source; got {B}")
    if B == 0:
        return torch.zeros(0, n, width + 1, device=tokens.device)
    places = torch.arange(width + 1, device=tokens.device)
    last = lengths[..., None]
    counts = (places < last + hypotheses.ended[..., None].long()) & (hypotheses.scores > -torch.inf)[..., None]
    padded = torch.nn.functional.pad(tokens, (0, 1), value=model.pad_id)
    targets = torch.where(places == last, model.eos_id, padded)
    inputs = torch.cat([torch.full_like(targets[..., :1], model.bos_id), targets[..., :-1]], 2)
    memory = model.encode(source, source_lengths)
    if hasattr(model, "force"):
        log_probs = _chosen(model.force(inputs, memory), targets)
    else:
        state, columns = model.start(memory, n), []
        for t in range(width + 1):
            logits, state = model.step(inputs[..., t], state)
            columns.append(_chosen(logits, targets[..., t]))
        log_probs = torch.stack(columns, 2)
    # where, not a product: what does not count may be -inf, and must have no gradient
    return torch.where(counts, log_probs, 0.0)


def _chosen(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
