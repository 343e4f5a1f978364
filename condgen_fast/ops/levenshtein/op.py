"""Edit oracle, edit distance and application of edits: the public functions, their checks and their fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from condgen_fast import _library
from condgen_fast._check import check_choice, check_number, check_tensor, check_token_ids
from condgen_fast.ops.levenshtein import reference
from condgen_fast.ops.levenshtein.reference import AppliedEdits, EditLabels

__all__ = ["AppliedEdits", "EditLabels", "apply_edits", "edit_distance", "edit_oracle"]

_IMPLS = ("auto", "reference")
_SLOTS = ("kept", "source")
_COSTS = ("levenshtein", "indel")
_MOST_INSERTED = 2**31  # a row longer than that is a mistake, and sums of larger counts could overflow
_SCORE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
    check_choice(impl, "impl", _IMPLS)
    check_choice(slots, "slots", _SLOTS)
    _check_pair(tokens, "tokens", target, "target", pad_id)
    if impl == "reference":
        return reference.edit_oracle(tokens, target, pad_id=pad_id, slots=slots)
    _library.require(tokens.device)
    return EditLabels(*torch.ops.condgen_fast.edit_oracle(tokens, target, pad_id, slots == "source"))


def edit_distance(
    a: Tensor,  # [B, S]
    b: Tensor,  # [B, T]
    *,
    pad_id: int,
    cost: str = "levenshtein",
    impl: str = "auto",
) -> Tensor:
    """Count the edits that turn each row of ``a`` into that of ``b``.

    Args:
        a: [B, S] int64 or int32, right-padded.
        b: [B, T], same dtype, right-padded.
        pad_id: the padding of both.
        cost: "levenshtein" (insert, delete, substitute cost 1; bit-parallel after Myers 1999 and Hyyrö 2003) or
            "indel" (insert and delete cost 1, substitute 2; bit-parallel LCS after Hyyrö 2004).
        impl: "auto" (compiled, on the tensors' device) or "reference".

    Returns:
        [B] int64.

    Raises:
        ValueError: a wrong shape, dtype, device or choice; on the CPU also padding before a token.

    Equivalent to: ``torch.tensor([rapidfuzz.distance.Levenshtein.distance(x, y) for x, y in zip(a, b)])`` on lists
    without padding (``Indel.distance`` for "indel").
    """
    check_choice(impl, "impl", _IMPLS)
    check_choice(cost, "cost", _COSTS)
    _check_pair(a, "a", b, "b", pad_id)
    if impl == "reference":
        return reference.edit_distance(a, b, pad_id=pad_id, cost=cost)
    _library.require(a.device)
    return torch.ops.condgen_fast.edit_distance(a, b, pad_id, cost == "levenshtein")


def apply_edits(
    tokens: Tensor,  # [B, S]
    *,
    delete: Tensor | None = None,  # [B, S]
    insert: Tensor | None = None,  # [B, max(S - 1, 0)]
    fill: Tensor | None = None,  # [B, W]
    pad_id: int,
    bos_id: int,
    eos_id: int,
    mask_id: int,
    max_length: int | None = None,
    scores: Tensor | None = None,  # [B, S]
    impl: str = "auto",
) -> AppliedEdits:
    """Delete tokens, then insert placeholders, then write tokens over the placeholders; each step is optional.

    Args:
        tokens: [B, S] int64 or int32, right-padded.
        delete: [B, S] bool; true where a token goes. bos and eos stay wherever they stand.
        insert: [B, max(S - 1, 0)] int64; ``insert[b, i]`` placeholders (``mask_id``) between the i-th and the next
            token that stays, so ``slots="kept"`` of ``edit_oracle``. Counts after the last token are ignored.
        fill: [B, W], dtype of ``tokens``, W the width of the result; read wherever the result has ``mask_id``,
            which includes the ``mask_id`` that ``tokens`` already had.
        pad_id, bos_id, eos_id, mask_id: ``pad_id`` differs from the other three.
        max_length: at least 2; no row becomes longer, bos and eos counted. The placeholders furthest right give way
            first; if the tokens that stay are too many by themselves, the first ``max_length - 1`` and the last remain.
        scores: [B, S] float; each score moves with its token. No gradient flows through them.
        impl: "auto" (compiled, on the tensors' device) or "reference".

    Returns:
        AppliedEdits(tokens [B, W], scores [B, W] or None, lengths [B] int64, origin [B, W] int64). ``origin`` is the
        place in the input a token came from, -1 on placeholders (filled ones too) and padding, so any other tensor
        per token can follow with ``gather``. Scores are 0 where ``origin`` is -1.
        W is S, or ``max_length`` if less, without ``insert``; with ``insert`` it is ``max_length``, and only without
        one the longest result, for which the host has to wait for the device. ``tokens[:, :lengths.max()]`` trims.

    Raises:
        ValueError: a wrong shape, dtype, device or number; on the CPU also padding before a token and a negative
            count in ``insert`` (taken as 0 on a GPU).

    Equivalent to: ``tokens[b][keep]``, then position ``i + insert[b, :i].sum()`` for the i-th token that stays and
    ``mask_id`` between, then ``torch.where(tokens == mask_id, fill, tokens)`` (the three actions of the Levenshtein
    Transformer, Gu et al. 2019, arXiv:1905.11006, section 3.1).
    """
    check_choice(impl, "impl", _IMPLS)
    sizes = check_token_ids(tokens, "tokens", shape="B S")
    batch, width = sizes["B"], sizes["S"]
    for value, name in ((pad_id, "pad_id"), (bos_id, "bos_id"), (eos_id, "eos_id"), (mask_id, "mask_id")):
        _check_id(value, name, tokens.dtype)
        if value == pad_id and name != "pad_id":
            raise ValueError(f"{name} must differ from pad_id; got {value} for both")
    if max_length is not None:
        check_number(max_length, "max_length", minimum=2, integer=True)
    if delete is not None:
        check_tensor(delete, "delete", shape="B S", dtypes=(torch.bool,), device=tokens.device, sizes=sizes)
    if insert is not None:
        slots = {"B": batch, "S-1": max(width - 1, 0)}
        check_tensor(insert, "insert", shape="B S-1", dtypes=(torch.int64,), device=tokens.device, sizes=slots)
    if scores is not None:
        check_tensor(scores, "scores", shape="B S", dtypes=_SCORE_DTYPES, device=tokens.device, sizes=sizes)
    if impl == "auto":
        _library.require(tokens.device)

    if insert is None:
        width = width if max_length is None else min(width, max_length)
    elif max_length is not None:
        width = max_length
    elif batch > 0:
        width = _longest_result(tokens, delete, insert, pad_id, bos_id, eos_id)
    if fill is not None:
        wanted = {"B": batch, "W": width}
        check_tensor(fill, "fill", shape="B W", dtypes=(tokens.dtype,), device=tokens.device, sizes=wanted)

    if impl == "reference":
        return reference.apply_edits(
            tokens, delete, insert, fill, scores,
            pad_id=pad_id, bos_id=bos_id, eos_id=eos_id, mask_id=mask_id, width=width,
        )  # fmt: skip
    out = torch.ops.condgen_fast.apply_edits(
        tokens, delete, insert, fill, scores, pad_id, bos_id, eos_id, mask_id, width
    )
    return AppliedEdits(out[0], None if scores is None else out[1], out[2], out[3])


def _longest_result(
    tokens: Tensor, delete: Tensor | None, insert: Tensor, pad_id: int, bos_id: int, eos_id: int
) -> int:
    keep = tokens != pad_id
    if delete is not None:
        keep &= ~delete | (tokens == bos_id) | (tokens == eos_id)
    kept = keep.sum(1)
    in_use = torch.arange(insert.shape[1], device=insert.device) < kept[:, None] - 1
    longest = int((kept + (insert.clamp(0, _MOST_INSERTED) * in_use).sum(1)).max())
    if longest > _MOST_INSERTED:
        raise ValueError(f"insert must ask for fewer than {_MOST_INSERTED} tokens a row; got {longest}")
    return longest


def _check_pair(first: Tensor, first_name: str, second: Tensor, second_name: str, pad_id: int) -> None:
    batch = check_token_ids(first, first_name, shape="B S")["B"]
    check_tensor(second, second_name, shape="B T", dtypes=(first.dtype,), device=first.device, sizes={"B": batch})
    _check_id(pad_id, "pad_id", first.dtype)


def _check_id(value: int, name: str, dtype: torch.dtype) -> None:
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
def _(a, b, pad_id, substitution):
    return a.new_empty((a.shape[0],), dtype=torch.int64)


@_library.register_fake("apply_edits")
def _(tokens, delete, insert, fill, scores, pad_id, bos_id, eos_id, mask_id, width):
    batch = tokens.shape[0]
    return (
        tokens.new_empty((batch, width)),
        tokens.new_empty((0,), dtype=torch.float32) if scores is None else scores.new_empty((batch, width)),
        tokens.new_empty((batch,), dtype=torch.int64),
        tokens.new_empty((batch, width), dtype=torch.int64),
    )
