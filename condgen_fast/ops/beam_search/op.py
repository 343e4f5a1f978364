"""The steps of a beam search: the public functions, their checks and their fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from condgen_fast import _library
from condgen_fast._check import check_choice, check_number, check_tensor
from condgen_fast.ops.beam_search import reference
from condgen_fast.ops.beam_search.reference import Adjustments, Allowed, BeamTopK
from condgen_fast.ops.beam_search.state import BeamState, Candidates

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_IMPLS = ("auto", "reference")
_MOST = 2**20


def beam_topk(
    logits: Tensor,  # [B, K, V]
    scores: Tensor,  # [B, K]
    k: int,
    *,
    temperature: float = 1.0,
    adjust: Adjustments | None = None,
    allowed: Allowed | None = None,
    impl: str = "auto",
) -> BeamTopK:
    """Find the k best of ``scores[b, i] + log_softmax(logits[b, i] / temperature)[v]`` over all i and v, best first.

    Args:
        logits: [B, K, V] float32, bfloat16, float16 or float64 (rounded to float32 as it is read). Any strides; a copy
            is made only if the last dimension is not contiguous.
        scores: [B, K], any of these dtypes, rounded to float32. -inf marks an empty beam, whose logits are not read.
        k: at least 1, at most 1048576 (1024 on a GPU).
        temperature: above 0.
        adjust: Adjustments(tokens [B, K, M] int64, amounts [B, K, M] float32), added to the totals of these tokens
            without changing the distribution: -inf bans a token, whose share of the probability is nobody's then.
        allowed: Allowed(tokens [E], first [B, K], last [B, K]) int64, the lists of tokens that some of the beams are
            restricted to; nor does this change the distribution.
        impl: "auto" (compiled, on the tensors' device) or "reference".

    Returns:
        BeamTopK(scores [B, k] float32, parents [B, k] int64, tokens [B, k] int64).

    Order. In float32, with m the row's highest logit,
    ``total = score + ((logit - m) / temperature - log(sum(exp((logit - m) / temperature))))``.
    Candidates are in descending order of the total, adjusted; equal totals go to the lower parent; within one parent
    to the higher logit, then the lower token. So ties within a row are decided exactly, by the logits. Between rows
    they are decided by rounded totals: implementations whose logarithm differs in the last bit (an instruction set, a
    device) may order two parents differently whose totals are that close. One implementation always returns the same
    bits for the same row and score, whatever the batch, the number of threads or the other rows.

    Special values. A NaN logit counts as -inf, for the normaliser too, so the rest of its row stays a distribution. A
    beam is empty if its score is not finite, or its highest logit is not: all NaN or -inf, or a +inf among them. Only
    candidates with a total above -inf are found; where these are fewer than k, the places that are left hold score
    -inf, parent 0, token 0.

    No gradient flows through. One pass over the logits; memory O(B K k).

    Raises:
        TypeError: an argument that is no tensor or no number.
        ValueError: a wrong shape, dtype, device, number or choice; on a GPU also k above 1024.

    Equivalent to, but for ties: ``totals = scores[..., None] + (logits.float() / temperature).log_softmax(-1)``,
    ``best, index = totals.flatten(1).topk(k)``, ``parents, tokens = index // V, index % V``. The normaliser and the
    selection share the pass as in Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    check_choice(impl, "impl", _IMPLS)
    sizes = check_tensor(logits, "logits", shape="B K V", dtypes=_FLOATS)
    check_tensor(scores, "scores", shape="B K", dtypes=_FLOATS, device=logits.device, sizes=sizes)
    check_number(k, "k", minimum=1, maximum=_MOST, integer=True)
    check_number(temperature, "temperature", minimum=0.0, exclusive=True)
    _check_constraints(adjust, allowed, sizes, logits.device)
    if impl == "auto":
        _library.require(logits.device)
    return unchecked_beam_topk(logits.detach(), scores.detach().float(), k, temperature, adjust, allowed, impl)


def unchecked_beam_topk(
    logits: Tensor,
    scores: Tensor,
    k: int,
    temperature: float,
    adjust: Adjustments | None,
    allowed: Allowed | None,
    impl: str,
) -> BeamTopK:
    """`beam_topk` without gradient, of float32 scores, where the library is known to be there: for loops that make its
    arguments themselves. Between the steps of a model, which leave nothing in the caches, checks take as long as the
    kernel."""
    if impl == "reference":
        if allowed is not None and logits.device.type == "cpu":  # as the compiled op does
            most, last = allowed.tokens.shape[0], allowed.last
            if last.numel() > 0 and int(last.max()) > most:
                raise ValueError(f"allowed.last must be at most E = {most}; got {int(last.max())}")
        return reference.beam_topk(logits, scores, k, temperature=temperature, adjust=adjust, allowed=allowed)
    constraints = (*(adjust or (None, None)), *(allowed or (None, None, None)))
    return BeamTopK(*torch.ops.condgen_fast.beam_topk(logits, scores, k, temperature, *constraints))


def _check_constraints(
    adjust: Adjustments | None, allowed: Allowed | None, sizes: dict[str, int], device: torch.device
) -> None:
    on_device = dict(device=device, dtypes=(torch.int64,))
    if adjust is not None:
        tokens, amounts = adjust
        bound = check_tensor(tokens, "adjust.tokens", shape="B K M", sizes=sizes, **on_device)
        check_tensor(amounts, "adjust.amounts", shape="B K M", sizes=bound, dtypes=(torch.float32,), device=device)
    if allowed is not None:
        tokens, first, last = allowed
        check_tensor(tokens, "allowed.tokens", shape="E", **on_device)
        check_tensor(first, "allowed.first", shape="B K", sizes=sizes, **on_device)
        check_tensor(last, "allowed.last", shape="B K", sizes=sizes, **on_device)


@_library.register_fake("beam_topk")
def _(logits, scores, k, temperature, adjusted=None, amounts=None, allowed=None, first=None, last=None):
    shape = (logits.shape[0], k)
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.int64),
    )


def beam_update(state: BeamState, found: Candidates, *, impl: str = "auto") -> None:
    """Move a beam search on by one step, in place: from what may continue its hypotheses to what it keeps.

    Of each group's K / G best candidates those that end go into its finished list, ordered by
    ``sum / norms[length]`` (the rank's, by ``state.rules.by_rank``), of equal ones the earlier first. Of all its
    candidates the K / G best that do not end are kept; where there are too few, the places that are left hold sums and
    ranks of -inf, and tokens and parents of other candidates. These are written to the lattice. Then
    ``state.rules`` decide whether the group is finished: from then on no hypothesis of it ends. Last, what may
    follow at the next step is written to ``state.adjust`` and ``state.allowed``.

    Args:
        state: BeamState of R sentences, K beams in G groups, that has made fewer than T steps.
        found: Candidates [R * G, C], C >= K / G, those with a rank of -inf last.
        impl: "auto" (compiled, on the tensors' device) or "reference".

    One launch on a GPU, which nobody waits for; the step's number is on the device, so that it can be captured.

    Raises:
        TypeError: an argument of another type.
        ValueError: a wrong shape, dtype, device or choice; on the CPU also a parent that is no beam.

    Equivalent to ``reference.beam_update``, value for value.
    """
    check_choice(impl, "impl", _IMPLS)
    if not isinstance(state, BeamState):
        raise TypeError(f"state must be a BeamState; got {type(state).__name__}")
    N, device = state.tokens.shape[0] * state.groups, state.tokens.device
    sizes = {"N": N}
    for name, value, dtype in zip(Candidates._fields, found, _OF_CANDIDATES, strict=True):
        sizes = check_tensor(value, name, shape="N C", sizes=sizes, dtypes=(dtype,), device=device)
    least = state.tokens.shape[1] // state.groups
    if sizes["C"] < least:
        raise ValueError(f"tokens must have at least {least} columns; got {sizes['C']}")
    if impl == "auto":
        _library.require(device)
    unchecked_beam_update(state, Candidates(*(value.detach().contiguous() for value in found)), impl)


def unchecked_beam_update(state: BeamState, found: Candidates, impl: str) -> None:
    """`beam_update` of contiguous tensors, as `unchecked_beam_topk`."""
    if impl == "reference":
        return reference.beam_update(state, found)
    return torch.ops.condgen_fast.beam_update(*found, state.changed, state.constant, state.numbers)


_OF_CANDIDATES = (torch.float32, torch.float32, torch.int64, torch.int64)


@_library.register_fake("beam_update")
def _(ranks, sums, parents, tokens, state, constants, rules):
    return None


def beam_hypotheses(
    finished: Tensor,  # [3, B, n]
    sums: Tensor,  # [B, n]
    tokens: Tensor,  # [T, B, K]
    parents: Tensor,  # [T, B, K]
    totals: Tensor,  # [T, B, K]
    ends: Tensor,  # [E]
    pad_id: int,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow finished hypotheses back through the lattice of a search to their first token.

    Args:
        finished: int64: which of the beams kept a step before it continues, its last token (-1: no hypothesis), its
            length up to that token.
        sums: float32, of its log-probabilities.
        tokens, parents, totals: int64, int64, float32: what each step kept, totals being sums.
        ends: int64, the ids that are not part of the hypothesis.
        pad_id: what stands behind it.
        impl: "auto" (compiled, on the tensors' device) or "reference".

    Returns:
        tokens [B, n, T] int64; lengths [B, n] int64 without an end; log-probabilities [B, n, T + 1] float32 of the
        tokens, the end's among them, 0 beyond.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: a wrong shape, dtype, device or choice; on the CPU also a beam or a length that there is not.
    """
    check_choice(impl, "impl", _IMPLS)
    on_device = dict(device=tokens.device)
    integers, floats = dict(dtypes=(torch.int64,), **on_device), dict(dtypes=(torch.float32,), **on_device)
    sizes = check_tensor(tokens, "tokens", shape="T B K", **integers)
    check_tensor(parents, "parents", shape="T B K", sizes=sizes, **integers)
    check_tensor(totals, "totals", shape="T B K", sizes=sizes, **floats)
    sizes = check_tensor(finished, "finished", shape="3 B n", sizes=sizes, **integers)
    check_tensor(sums, "sums", shape="B n", sizes=sizes, **floats)
    check_tensor(ends, "ends", shape="E", **integers)
    arguments = [each.contiguous() for each in (finished, sums, tokens, parents, totals, ends)]
    if impl == "reference":
        return reference.beam_hypotheses(*arguments, pad_id)
    _library.require(tokens.device)
    return torch.ops.condgen_fast.beam_hypotheses(*arguments, pad_id)


@_library.register_fake("beam_hypotheses")
def _(finished, sums, tokens, parents, totals, ends, pad_id):
    _, B, n = finished.shape
    T = tokens.shape[0]
    return tokens.new_empty(B, n, T), tokens.new_empty(B, n), sums.new_empty(B, n, T + 1)
