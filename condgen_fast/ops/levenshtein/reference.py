"""The specification of the levenshtein family: whole matrices and Python loops, one sentence at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class EditLabels(NamedTuple):
    """What turns ``tokens [B, S]`` into ``target [B, T]`` with the fewest insertions and deletions."""

    delete: Tensor  # [B, S] bool, true where a token has to go; false on padding
    insert: Tensor  # [B, max(S - 1, 0)] int64, tokens to insert per slot
    masked: Tensor  # [B, T] bool, true where a target token has to be inserted; false on padding
    distance: Tensor  # [B] int64, insertions + deletions


class AppliedEdits(NamedTuple):
    """The edited sentences, right-padded to a common width W."""

    tokens: Tensor  # [B, W], dtype of the input tokens
    scores: Tensor | None  # [B, W], dtype of the input scores; 0 on inserted positions and padding
    lengths: Tensor  # [B] int64
    origin: Tensor  # [B, W] int64, where in the input a token stood; -1 on inserted positions and padding
    carried: tuple[Tensor, ...] = ()  # [B, W, ...] each; 0 on inserted positions and padding


class EditAlignment(NamedTuple):
    """Rows aligned column by column, right-padded: a pair of tokens, or a token and a gap."""

    tokens: Tensor  # [B, S + T], dtype of the input tokens, with gaps where tokens are inserted
    target: Tensor  # [B, S + T], with gaps where tokens are deleted
    lengths: Tensor  # [B] int64, columns
    distance: Tensor  # [B] int64, insertions + deletions + substitutions


def unpadded_rows(tokens: Tensor, pad_id: int, name: str) -> list[list[int]]:
    rows = []
    for b, row in enumerate(tokens.tolist()):
        length = len(row)
        while length > 0 and row[length - 1] == pad_id:
            length -= 1
        if pad_id in row[:length]:
            raise ValueError(
                f"{name} must be right-padded; got pad_id {pad_id} before a token in row {b}, "
                f"position {row.index(pad_id)}"
            )
        rows.append(row[:length])
    return rows


def edit_script(x: list[int], y: list[int]) -> list[str]:
    """The steps from x to y in reading order: "insert" and "delete" cost 1, "keep" 0, and there is no substitution."""
    distance = [[i + j for j in range(len(y) + 1)] for i in range(len(x) + 1)]
    for i in range(1, len(x) + 1):
        for j in range(1, len(y) + 1):
            if x[i - 1] == y[j - 1]:
                distance[i][j] = distance[i - 1][j - 1]
            else:
                distance[i][j] = 1 + min(distance[i - 1][j], distance[i][j - 1])
    script = []
    i, j = len(x), len(y)
    while i > 0 or j > 0:
        if j > 0 and distance[i][j - 1] < distance[i][j]:
            script.append("insert")
            j -= 1
        elif i > 0 and distance[i - 1][j] < distance[i][j]:
            script.append("delete")
            i -= 1
        else:
            script.append("keep")
            i -= 1
            j -= 1
    return script[::-1]


def edit_oracle(tokens: Tensor, target: Tensor, *, pad_id: int, slots: str = "kept") -> EditLabels:
    (batch, width), target_width = tokens.shape, target.shape[1]
    delete = torch.zeros(batch, width, dtype=torch.bool)
    insert = torch.zeros(batch, max(width - 1, 0), dtype=torch.int64)
    masked = torch.zeros(batch, target_width, dtype=torch.bool)
    distance = torch.zeros(batch, dtype=torch.int64)
    rows = unpadded_rows(tokens, pad_id, "tokens")
    target_rows = unpadded_rows(target, pad_id, "target")
    for b, (x, y) in enumerate(zip(rows, target_rows, strict=True)):
        script = edit_script(x, y)
        slot_count = (script.count("keep") if slots == "kept" else len(x)) - 1
        i = j = slot = 0  # slot: tokens passed so far, kept ones or all of them; slot 0 stands before the first
        for step in script:
            if step == "insert":
                if not 0 < slot <= slot_count:
                    raise ValueError(
                        f"target must need no insertion before the first or after the last {slots} token; got one in "
                        f"row {b} (let tokens and target share bos and eos)"
                    )
                insert[b, slot - 1] += 1
                masked[b, j] = True
                j += 1
            else:
                delete[b, i] = step == "delete"
                i += 1
                j += step == "keep"
                slot += step == "keep" or slots == "source"
        distance[b] = len(script) - script.count("keep")
    return EditLabels(*(label.to(tokens.device) for label in (delete, insert, masked, distance)))


def edit_distance(a: Tensor, b: Tensor, *, pad_id: int, cost: str = "levenshtein", all_pairs: bool = False) -> Tensor:
    rows, others = unpadded_rows(a, pad_id, "a"), unpadded_rows(b, pad_id, "b")
    substitution = 1 if cost == "levenshtein" else 2
    pairs = itertools.product(rows, others) if all_pairs else zip(rows, others, strict=True)
    distances = [unit_costs(x, y, substitution)[-1][-1] for x, y in pairs]
    shape = (len(rows), len(others)) if all_pairs else (len(rows),)
    return torch.tensor(distances, dtype=torch.int64, device=a.device).reshape(shape)


def unit_costs(x: list[int], y: list[int], substitution: int = 1) -> list[list[int]]:
    """The table of distances between prefixes: cell (i, j) is that from x[:i] to y[:j]."""
    table = [list(range(len(y) + 1))]
    for i, token in enumerate(x, start=1):
        row = [i]
        for j, other in enumerate(y, start=1):
            change = table[-1][j - 1] + (0 if token == other else substitution)
            row.append(min(change, table[-1][j] + 1, row[j - 1] + 1))
        table.append(row)
    return table


def edit_alignment(tokens: Tensor, target: Tensor, *, pad_id: int, gap_id: int) -> EditAlignment:
    batch, width = tokens.shape[0], tokens.shape[1] + target.shape[1]
    aligned = torch.full((2, batch, width), pad_id, dtype=tokens.dtype)
    lengths = torch.zeros(batch, dtype=torch.int64)
    distance = torch.zeros(batch, dtype=torch.int64)
    rows = zip(unpadded_rows(tokens, pad_id, "tokens"), unpadded_rows(target, pad_id, "target"), strict=True)
    for b, (x, y) in enumerate(rows):
        table = unit_costs(x, y)
        columns = []
        i, j = len(x), len(y)
        while i > 0 or j > 0:
            if i > 0 and j > 0 and table[i][j] == table[i - 1][j - 1] + (x[i - 1] != y[j - 1]):
                columns.append((x[i - 1], y[j - 1]))
                i, j = i - 1, j - 1
            elif i > 0 and table[i][j] == table[i - 1][j] + 1:
                columns.append((x[i - 1], gap_id))
                i -= 1
            else:
                columns.append((gap_id, y[j - 1]))
                j -= 1
        lengths[b], distance[b] = len(columns), table[-1][-1]
        for k, column in enumerate(reversed(columns)):
            aligned[:, b, k] = torch.tensor(column)
    device = tokens.device
    return EditAlignment(*aligned.to(device), lengths.to(device), distance.to(device))


def apply_edits(
    tokens: Tensor,
    delete: Tensor | None,
    insert: Tensor | None,
    fill: Tensor | None,
    scores: Tensor | None,
    bounds: Tensor | None,
    carried: Sequence[Tensor],
    *,
    pad_id: int,
    bos_id: int,
    eos_id: int,
    mask_id: int,
    width: int,
) -> AppliedEdits:
    """As the public function, with the width of the result given: rows longer than it are cut to it."""
    batch = tokens.shape[0]
    out_tokens = torch.full((batch, width), pad_id, dtype=tokens.dtype)
    out_scores = None if scores is None else torch.zeros(batch, width, dtype=scores.dtype)
    out_carried = tuple(values.new_zeros(batch, width, *values.shape[2:]) for values in carried)
    lengths = torch.zeros(batch, dtype=torch.int64)
    origin = torch.full((batch, width), -1, dtype=torch.int64)
    for b, row in enumerate(unpadded_rows(tokens, pad_id, "tokens")):
        kept = [i for i, token in enumerate(row) if token in (bos_id, eos_id) or delete is None or not delete[b, i]]
        counts = [0] * len(kept) if insert is None else insert[b, : max(len(kept) - 1, 0)].tolist() + [0]
        if min(counts, default=0) < 0:
            slot = next(slot for slot, count in enumerate(counts) if count < 0)
            raise ValueError(f"insert must not be negative; got {counts[slot]} in row {b}, slot {slot}")
        if len(kept) > width:
            kept = kept[: width - 1] + kept[-1:]
        room = max((width if bounds is None else min(width, int(bounds[b]))) - len(kept), 0)
        canvas = []  # positions in the row, -1 for a placeholder
        for i, count in zip(kept, counts, strict=False):
            canvas += [i] + [-1] * min(count, room)
            room -= min(count, room)
        lengths[b] = len(canvas)
        for k, i in enumerate(canvas):
            token = mask_id if i < 0 else row[i]
            out_tokens[b, k] = fill[b, k] if fill is not None and token == mask_id else token
            origin[b, k] = i
            if out_scores is not None and i >= 0:
                out_scores[b, k] = scores[b, i]
            for values, moved in zip(carried, out_carried, strict=True):
                if i >= 0:
                    moved[b, k] = values[b, i]
    device = tokens.device
    out_scores = None if scores is None else out_scores.to(device)
    return AppliedEdits(out_tokens.to(device), out_scores, lengths.to(device), origin.to(device), out_carried)
