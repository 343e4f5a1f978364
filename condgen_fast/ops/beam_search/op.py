"""Selection of a beam step: the public function, its checks and its fake."""

from __future__ import annotations

import torch
from torch import Tensor

from condgen_fast import _library
from condgen_fast._check import check_choice, check_number, check_tensor
from condgen_fast.ops.beam_search import reference
from condgen_fast.ops.beam_search.reference import BeamTopK

__all__ = ["BeamTopK", "beam_topk"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_IMPLS = ("auto", "reference")


def beam_topk(
    logits: Tensor,  # [B, K, V]
    scores: Tensor,  # [B, K]
    k: int,
    *,
    temperature: float = 1.0,
    impl: str = "auto",
) -> BeamTopK:
    """Find the k best of ``scores[b, i] + log_softmax(logits[b, i] / temperature)[v]`` over all i and v, best first.

    Args:
        logits: [B, K, V] float32, bfloat16, float16 or float64 (rounded to float32 as it is read). Any strides; a copy
            is made only if the last dimension is not contiguous.
        scores: [B, K], any of these dtypes, rounded to float32. -inf marks an empty beam, whose logits are not read.
        k: at least 1; more than K has no price beyond the merge of K * k candidates.
        temperature: above 0.
        impl: "auto" (compiled, on the tensors' device) or "reference".

    Returns:
        BeamTopK(scores [B, k] float32, parents [B, k] int64, tokens [B, k] int64).

    Order. In float32, with m the row's highest logit,
    ``total = score + ((logit - m) / temperature - log(sum(exp((logit - m) / temperature))))``.
    Candidates are in descending order of the total; equal totals go to the lower parent; within one parent to the
    higher logit, then the lower token. So ties within a row are decided exactly, by the logits. Between rows they are
    decided by rounded totals: implementations whose logarithm differs in the last bit (an instruction set, a device)
    may order two parents differently whose totals are that close. One implementation always returns the same bits for
    the same row and score, whatever the batch, the number of threads or the other rows.

    Special values. A NaN logit counts as -inf, for the normaliser too, so the rest of its row stays a distribution. A
    beam is empty if its score is not finite, or its highest logit is not: all NaN or -inf, or a +inf among them. All
    candidates of an empty beam have total -inf and rank by token; they come after every finite candidate. Places
    beyond the K * V candidates hold score -inf, parent 0, token 0.

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
    check_number(k, "k", minimum=1, integer=True)
    check_number(temperature, "temperature", minimum=0.0, exclusive=True)
    logits, scores = logits.detach(), scores.detach()
    if impl == "reference":
        return reference.beam_topk(logits, scores, k, temperature=temperature)
    _library.require(logits.device)
    return BeamTopK(*torch.ops.condgen_fast.beam_topk(logits, scores.float(), k, temperature))


@_library.register_fake("beam_topk")
def _(logits, scores, k, temperature):
    shape = (logits.shape[0], k)
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.int64),
    )
