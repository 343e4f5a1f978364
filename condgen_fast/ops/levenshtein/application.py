"""Application of edits: the public function, its checks and its fake."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from condgen_fast import _library
from condgen_fast._check import check_choice, check_number, check_tensor, check_token_ids
from condgen_fast.ops.levenshtein import reference
from condgen_fast.ops.levenshtein.op import IMPLS, check_id
from condgen_fast.ops.levenshtein.reference import AppliedEdits

__all__ = ["AppliedEdits", "apply_edits"]

_MOST_INSERTED = 2**31  # a row longer than that is a mistake, and sums of larger counts could overflow
_BOOL, _INT64 = (torch.bool,), (torch.int64,)
_SCORE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
    bounds: Tensor | None = None,  # [B]
    scores: Tensor | None = None,  # [B, S]
    carried: Sequence[Tensor] = (),  # [B, S, ...] each
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
        bounds: [B] int64; placeholders lengthen row b to ``bounds[b]`` at most, those furthest right giving way first.
            Tokens never give way to it, and where it is less than what stays, nothing is inserted.
        scores: [B, S] float; each score moves with its token. No gradient flows through them.
        carried: any other tensors per token, [B, S, ...] of any dtype: alignments, hidden states, birth iterations.
            Each row moves with its token. Gradients flow.
        impl: "auto" (compiled, on the tensors' device) or "reference".

    Returns:
        AppliedEdits(tokens [B, W], scores [B, W] or None, lengths [B] int64, origin [B, W] int64, carried, a tuple of
        [B, W, ...]). ``origin`` is the place in the input a token came from, -1 on placeholders (filled ones too) and
        padding. Scores and what is carried are 0 where ``origin`` is -1.
        W is S, or ``max_length`` if less, without ``insert``; with ``insert`` it is ``max_length``, and only without
        one the longest result, for which the host has to wait for the device. ``tokens[:, :lengths.max()]`` trims.

    Raises:
        ValueError: a wrong shape, dtype, device or number; on the CPU also padding before a token and a negative
            count in ``insert`` (taken as 0 on a GPU).

    Equivalent to: ``tokens[b][keep]``, then position ``i + insert[b, :i].sum()`` for the i-th token that stays and
    ``mask_id`` between, then ``torch.where(tokens == mask_id, fill, tokens)`` (the three actions of the Levenshtein
    Transformer, Gu et al. 2019, arXiv:1905.11006, section 3.1).
    """
    _check(tokens, delete, insert, scores, bounds, (pad_id, bos_id, eos_id, mask_id), max_length)
    check_choice(impl, "impl", IMPLS)
    batch, width = tokens.shape
    if scores is not None and scores.requires_grad:
        scores = scores.detach()
    if not isinstance(carried, Sequence):  # a Tensor is none
        raise TypeError(f"carried must be a sequence of Tensors; got {type(carried).__name__}")
    for k, values in enumerate(carried):
        name = f"carried[{k}]"
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a Tensor; got {type(values).__name__}")
        if values.shape[:2] != tokens.shape or values.device != tokens.device:
            raise ValueError(
                f"{name} must have shape [B, S, ...] with B={batch}, S={width} on {tokens.device}; "
                f"got {list(values.shape)} on {values.device}"
            )
    if impl == "auto":
        _library.require(tokens.device)

    if insert is None:
        width = width if max_length is None else min(width, max_length)
    elif max_length is not None:
        width = max_length
    elif batch > 0:
        width = _longest_result(tokens, delete, insert, bounds, pad_id, bos_id, eos_id)
    if fill is not None:
        wanted = {"B": batch, "W": width}
        check_tensor(fill, "fill", shape="B W", dtypes=(tokens.dtype,), device=tokens.device, sizes=wanted)

    if impl == "reference":
        return reference.apply_edits(
            tokens, delete, insert, fill, scores, bounds, carried,
            pad_id=pad_id, bos_id=bos_id, eos_id=eos_id, mask_id=mask_id, width=width,
        )  # fmt: skip
    out = torch.ops.condgen_fast.apply_edits(
        tokens, delete, insert, fill, scores, pad_id, bos_id, eos_id, mask_id, width, bounds
    )
    moved = tuple(_move(values, out[3]) for values in carried)
    return AppliedEdits(out[0], None if scores is None else out[1], out[2], out[3], moved)


def _check(
    tokens: Tensor,
    delete: Tensor | None,
    insert: Tensor | None,
    scores: Tensor | None,
    bounds: Tensor | None,
    ids: tuple[int, ...],
    max_length: int | None,
) -> None:
    sizes = check_token_ids(tokens, "tokens", shape="B S")
    batch, width = sizes["B"], sizes["S"]
    for value, name in zip(ids, ("pad_id", "bos_id", "eos_id", "mask_id"), strict=True):
        check_id(value, name, tokens.dtype)
        if value == ids[0] and name != "pad_id":
            raise ValueError(f"{name} must differ from pad_id; got {value} for both")
    if max_length is not None:
        check_number(max_length, "max_length", minimum=2, integer=True)
    if delete is not None:
        check_tensor(delete, "delete", shape="B S", dtypes=_BOOL, device=tokens.device, sizes=sizes)
    if insert is not None:
        slots = {"B": batch, "S-1": max(width - 1, 0)}
        check_tensor(insert, "insert", shape="B S-1", dtypes=_INT64, device=tokens.device, sizes=slots)
    if scores is not None:
        check_tensor(scores, "scores", shape="B S", dtypes=_SCORE_DTYPES, device=tokens.device, sizes=sizes)
    if bounds is not None:
        check_tensor(bounds, "bounds", shape="B", dtypes=_INT64, device=tokens.device, sizes=sizes)


def _move(values: Tensor, origin: Tensor) -> Tensor:
    """[B, S, ...] to [B, W, ...]: the rows of values that origin [B, W] names, 0 where it is -1."""
    batch, width = values.shape[:2]
    if width == 0:
        return values.new_zeros(*origin.shape, *values.shape[2:])
    row = torch.arange(batch, device=origin.device)[:, None] * width + origin.clamp(min=0)
    moved = values.flatten(0, 1).index_select(0, row.flatten()).unflatten(0, origin.shape)
    return moved.masked_fill(origin.reshape(*origin.shape, *[1] * (values.dim() - 2)) < 0, 0)


def _longest_result(
    tokens: Tensor,
    delete: Tensor | None,
    insert: Tensor,
    bounds: Tensor | None,
    pad_id: int,
    bos_id: int,
    eos_id: int,
) -> int:
    keep = tokens != pad_id
    if delete is not None:
        keep &= ~delete | (tokens == bos_id) | (tokens == eos_id)
    kept = keep.sum(1)
    in_use = torch.arange(insert.shape[1], device=insert.device) < kept[:, None] - 1
    lengths = kept + (insert.clamp(0, _MOST_INSERTED) * in_use).sum(1)
    if bounds is not None:
        lengths = lengths.minimum(bounds.maximum(kept))
    longest = int(lengths.max())
    if longest > _MOST_INSERTED:
        raise ValueError(f"insert must ask for fewer than {_MOST_INSERTED} tokens a row; got {longest}")
    return longest


@_library.register_fake("apply_edits")
def _(tokens, delete, insert, fill, scores, pad_id, bos_id, eos_id, mask_id, width, bounds=None):
    batch = tokens.shape[0]
    return (
        tokens.new_empty((batch, width)),
        tokens.new_empty((0,), dtype=torch.float32) if scores is None else scores.new_empty((batch, width)),
        tokens.new_empty((batch,), dtype=torch.int64),
        tokens.new_empty((batch, width), dtype=torch.int64),
    )
