"""Edit oracle, edit distance and alignment: the public functions, their checks and their fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from condgen_fast import _library
from condgen_fast._check import check_choice, check_number, check_tensor, check_token_ids
from condgen_fast.ops.levenshtein import reference
from condgen_fast.ops.levenshtein.reference import EditAlignment, EditLabels

__all__ = ["EditAlignment", "EditLabels", "edit_alignment", "edit_distance", "edit_oracle"]

IMPLS = ("auto", "reference")
_SLOTS = ("kept", "source")
_COSTS = ("levenshtein", "indel")
ID_LIMITS = {torch.int64: 2**63 - 1, torch.int32: 2**31 - 1}


def edit_oracle(
    tokens: Tensor,  # [B, S]
    target: Tensor,  # [B, T]
    *,
    pad_id: int,
    slots: str = "kept",
    impl: str = "auto",
) -> EditLabels:
    """Label the fewest deletions and insertions that turn each row of ``tokens`` into that of ``target``.

    Insertion and deletion cost 1 and there is no substitution, so ``distance = |x| + |y| - 2 LCS(x, y)``. Among the
    cheapest scripts the one that is found walking backwards from the end with "insert, else delete, else keep" is
    taken, the rule of Levenshtein Transformer training (Gu et al. 2019, arXiv:1905.11006, section 4.1).

    Args:
        tokens: [B, S] int64 or int32, right-padded.
        target: [B, T], same dtype, right-padded.
        pad_id: the padding of both. bos and eos are tokens like all others here.
        slots: what ``insert[b, i]`` counts the insertions between. "kept": between the i-th and the next token *that
            stays*, so delete first, then insert; "source": between ``tokens[b, i]`` and ``tokens[b, i + 1]``,
            deleted or not. Counts start at the left; entries beyond the last slot are 0.
        impl: "auto" (compiled, on the tensors' device) or "reference".

    Returns:
        EditLabels(delete [B, S] bool, insert [B, max(S - 1, 0)] int64, masked [B, T] bool, distance [B] int64).
        Applying them gives ``target``: ``apply_edits(tokens, delete=delete, insert=insert, fill=target, ...)``.

    Raises:
        ValueError: a wrong shape, dtype, device or choice; on the CPU also padding before a token, and a row whose
            script inserts before its first or after its last token (kept token for "kept"), where there is no slot.
            A target that has its bos only at the front and its eos only at the end never does when ``tokens`` begins
            with that bos and ends with that eos. On a GPU these two are not checked and such counts are dropped.

    Memory: O(S + T) for each sentence in flight (one per thread) and, unless ``tokens`` is a subsequence of ``target``,
    at most one bit for each cell of the S x T table; far less when few tokens occur twice. On a GPU the table is full.

    Equivalent to: for every row the backtrace of ``d[i, j] = min(d[i-1, j] + 1, d[i, j-1] + 1, d[i-1, j-1] if equal)``.
    """
    check_choice(impl, "impl", IMPLS)
    check_choice(slots, "slots", _SLOTS)
    _check_pair(tokens, "tokens", target, "target", pad_id)
    if impl == "reference":
        return reference.edit_oracle(tokens, target, pad_id=pad_id, slots=slots)
    _library.require(tokens.device)
    return EditLabels(*torch.ops.condgen_fast.edit_oracle.default(tokens, target, pad_id, slots == "source"))


def edit_distance(
    a: Tensor,  # [B, S]
    b: Tensor,  # [B, T], or [C, T] with all_pairs
    *,
    pad_id: int,
    cost: str = "levenshtein",
    all_pairs: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Count the edits that turn each row of ``a`` into that of ``b``, or into each row of ``b``.

    Args:
        a: [B, S] int64 or int32, right-padded.
        b: [B, T], same dtype, right-padded; any number C of rows with ``all_pairs``.
        pad_id: the padding of both.
        cost: "levenshtein" (insert, delete, substitute cost 1; bit-parallel after Myers 1999 and Hyyrö 2003) or
            "indel" (insert and delete cost 1, substitute 2; bit-parallel LCS after Hyyrö 2004).
        all_pairs: every row of ``a`` with every row of ``b``, not row by row.
        impl: "auto" (compiled, on the tensors' device) or "reference".

    Returns:
        [B] int64, or [B, C] with ``all_pairs``.

    Raises:
        ValueError: a wrong shape, dtype, device or choice; on the CPU also padding before a token; on a GPU also 2^31
            pairs or more.

    Equivalent to: ``torch.tensor([rapidfuzz.distance.Levenshtein.distance(x, y) for x, y in zip(a, b)])`` on lists
    without padding (``Indel.distance`` for "indel").
    """
    check_choice(impl, "impl", IMPLS)
    check_choice(cost, "cost", _COSTS)
    if not isinstance(all_pairs, bool):
        raise TypeError(f"all_pairs must be a bool; got {type(all_pairs).__name__}")
    _check_pair(a, "a", b, "b", pad_id, row_by_row=not all_pairs)
    if impl == "reference":
        return reference.edit_distance(a, b, pad_id=pad_id, cost=cost, all_pairs=all_pairs)
    _library.require(a.device)
    return torch.ops.condgen_fast.edit_distance.default(a, b, pad_id, cost == "levenshtein", all_pairs)


def edit_alignment(
    tokens: Tensor,  # [B, S]
    target: Tensor,  # [B, T]
    *,
    pad_id: int,
    gap_id: int,
    impl: str = "auto",
) -> EditAlignment:
    """Align each row of ``tokens`` with that of ``target`` at the least unit-cost edit distance, gaps written out.

    Insertion, deletion and substitution cost 1. Among the cheapest alignments the one that is found walking backwards
    from the end with "pair two tokens, else delete, else insert" is taken: what Edit Flows (Havasi et al. 2025,
    arXiv:2506.09018) train on, whose z0 and z1 are the two results and whose blank is ``gap_id``.

    Args:
        tokens: [B, S] int64 or int32, right-padded.
        target: [B, T], same dtype, right-padded.
        pad_id: the padding of both and of the results.
        gap_id: stands in ``tokens`` where a token is inserted and in ``target`` where one is deleted; differs from
            ``pad_id`` and should be no token of either.
        impl: "auto" (compiled, on the tensors' device) or "reference".

    Returns:
        EditAlignment(tokens [B, S + T], target [B, S + T], lengths [B] int64, distance [B] int64). Column by column,
        up to ``lengths``: equal tokens are kept, unequal ones a substitution, a gap in ``tokens`` an insertion and one
        in ``target`` a deletion.

    Raises:
        ValueError: a wrong shape, dtype, device or number; on the CPU also padding before a token.

    Memory: two bits for each cell of the S x T table of a sentence in flight (one per thread; on a GPU all).

    Equivalent to: Needleman-Wunsch on every row with cost ``a != b`` for a pair and 1 for a gap.
    """
    check_choice(impl, "impl", IMPLS)
    _check_pair(tokens, "tokens", target, "target", pad_id)
    check_id(gap_id, "gap_id", tokens.dtype)
    if gap_id == pad_id:
        raise ValueError(f"gap_id must differ from pad_id; got {gap_id} for both")
    if impl == "reference":
        return reference.edit_alignment(tokens, target, pad_id=pad_id, gap_id=gap_id)
    _library.require(tokens.device)
    return EditAlignment(*torch.ops.condgen_fast.edit_alignment.default(tokens, target, pad_id, gap_id))


def _check_pair(
    first: Tensor, first_name: str, second: Tensor, second_name: str, pad_id: int, *, row_by_row: bool = True
) -> None:
    # All in one condition first: a small batch takes no longer than the checks one by one.
    if (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and first.dtype in ID_LIMITS
        and first.dtype == second.dtype
        and first.dim() == second.dim() == 2
        and (first.shape[0] == second.shape[0] or not row_by_row)
        and first.device == second.device
        and type(pad_id) is int
        and abs(pad_id) <= ID_LIMITS[first.dtype]
    ):
        return
    batch = check_token_ids(first, first_name, shape="B S")["B"]
    sizes, shape = ({"B": batch}, "B T") if row_by_row else ({}, "C T")
    check_tensor(second, second_name, shape=shape, dtypes=(first.dtype,), device=first.device, sizes=sizes)
    check_id(pad_id, "pad_id", first.dtype)


def check_id(value: int, name: str, dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    check_number(value, name, minimum=limits.min, maximum=limits.max, integer=True)


@_library.register_fake("edit_oracle")
def _(tokens, target, pad_id, source_slots):
    batch, width = tokens.shape
    return (
        tokens.new_empty((batch, width), dtype=torch.bool),
        tokens.new_empty((batch, max(width - 1, 0)), dtype=torch.int64),
        tokens.new_empty(target.shape, dtype=torch.bool),
        tokens.new_empty((batch,), dtype=torch.int64),
    )


@_library.register_fake("edit_distance")
def _(a, b, pad_id, substitution, all_pairs=False):
    return a.new_empty((a.shape[0], b.shape[0]) if all_pairs else (a.shape[0],), dtype=torch.int64)


@_library.register_fake("edit_alignment")
def _(tokens, target, pad_id, gap_id):
    batch, width = tokens.shape
    aligned = (batch, width + target.shape[1])
    counts = [tokens.new_empty((batch,), dtype=torch.int64) for _ in range(2)]
    return tokens.new_empty(aligned), tokens.new_empty(aligned), *counts
