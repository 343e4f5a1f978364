"""What a decoding strategy did, step by step: plain data that `condgen_fast.decode.html` turns into a page."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from condgen_fast.decode.protocols import EditModel, FillModel


@dataclass(frozen=True)
class Step:
    """One operation on the canvas of one sentence; `touched` marks the positions it concerned.

    operation   canvas shown   what happened to the touched positions
    start       after          given, not written by a model
    predict     after          every mask became a token
    mask        before         tokens that become masks again
    delete      before         tokens that leave
    insert      after          masks that came
    fill        after          masks that became tokens
    restore     after          an earlier canvas is returned instead of the last
    result      after          none: how the canvas was returned, where no other step shows it
    write       after          the next token, from left to right
    rewrite     after          tokens that became others
    put         after          tokens that came where none was
    commit      after          masks that became tokens; others may have been dropped from the end
    """

    iteration: int  # 0 before the first round
    operation: str
    tokens: list[int]  # bos … eos, no padding
    log_probs: list[float]  # natural logarithms; 0 where no model wrote the token (bos, eos, masks, given tokens)
    touched: list[bool]


@dataclass(frozen=True)
class Trace:
    """The steps that led to the best hypothesis of one sentence, and the ids that have no surface form."""

    steps: list[Step]
    iterations: int  # rounds that ran for it
    bos_id: int
    eos_id: int
    mask_id: int | None = None  # None where the strategy has no masks


class Recorder:
    """Collects the steps of a batch of canvases; each call of `record` copies to the host."""

    def __init__(self, model: FillModel | EditModel, rows: int):
        self._model = model
        self._steps: list[list[Step]] = [[] for _ in range(rows)]

    def record(
        self, iteration: int, operation: str, rows: list[int], tokens: Tensor, log_probs: Tensor, touched: Tensor
    ) -> None:
        """Add one step to each of `rows`: tokens int64 [R, L], log_probs float [R, L], touched bool [R, L].

        A row that the operation did not touch gets no step, unless it is a start.
        """
        lengths = (tokens != self._model.pad_id).sum(1).tolist()
        columns = zip(rows, lengths, tokens.tolist(), log_probs.tolist(), touched.tolist(), strict=True)
        for row, length, ids, values, flags in columns:
            if operation == "start" or any(flags):
                self._steps[row].append(Step(iteration, operation, ids[:length], values[:length], flags[:length]))

    def traces(self, iterations: Tensor, tokens: Tensor, log_probs: Tensor, rows: Tensor | None = None) -> list[Trace]:
        """The traces of `rows` [R], of all if None, in that order.

        iterations: int64 [R], their rounds; tokens int64 and log_probs float [R, L], the canvases that are returned.
        """
        ids = (self._model.bos_id, self._model.eos_id, self._model.mask_id)
        recorded = self._steps if rows is None else [self._steps[row] for row in rows.tolist()]
        lengths = (tokens != self._model.pad_id).sum(1).tolist()
        traces = []
        columns = zip(recorded, iterations.tolist(), tokens.tolist(), log_probs.tolist(), lengths, strict=True)
        for steps, rounds, canvas, values, length in columns:
            if not steps or steps[-1].operation == "delete" or steps[-1].iteration != rounds:
                steps = [*steps, Step(rounds, "result", canvas[:length], values[:length], [False] * length)]
            traces.append(Trace(steps, rounds, *ids))
        return traces


def left_to_right(
    tokens: Tensor, lengths: Tensor, ended: Tensor, token_log_probs: Tensor, *, bos_id: int, eos_id: int
) -> list[Trace]:
    """Traces of autoregressive outputs, one "write" step per token, to stand beside refinement on a page.

    tokens: int64 [B, L] without bos and eos; lengths: int64 [B]; ended: bool [B], whether eos was written;
    token_log_probs: float [B, L+1], eos's after the last token: as in `Hypotheses`, of one hypothesis per sentence.
    """
    traces = []
    columns = (each.tolist() for each in (tokens, lengths, ended, token_log_probs))
    for ids, length, has_end, values in zip(*columns, strict=True):
        ids = [bos_id, *ids[:length], *[eos_id] * has_end]
        values = [0.0, *values[: len(ids) - 1]]
        steps = [Step(n, "write", ids[: n + 1], values[: n + 1], [False] * n + [True]) for n in range(1, len(ids))]
        traces.append(Trace(steps, len(steps), bos_id, eos_id))
    return traces
