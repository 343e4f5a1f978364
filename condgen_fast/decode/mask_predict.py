"""Mask-Predict (Ghazvininejad et al. 2019): predict the whole target at once, then re-predict what was unsure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from condgen_fast._check import check_choice, check_number
from condgen_fast.decode.canvas import best_first, between, fill, hypotheses, mean_log_prob, true_positions
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.protocols import FillModel
from condgen_fast.decode.trace import Recorder
from condgen_fast.decode.unattended import LAUNCH_BOUND, on_device, repeated
from condgen_fast.ops.refinement import remask


@dataclass(frozen=True)
class MaskPredict:
    """Decoding of a `FillModel` in a constant number of rounds.

    Each of `length_beam` target lengths N of a sentence gets a canvas of N masks. Round 0 predicts
    all of them; round t = 1 … iterations-1 masks the floor(N·(iterations−t)/iterations) tokens of lowest
    log-probability again (ties: the lower position) and predicts them anew, while every other token keeps the
    log-probability of the round that wrote it. The candidate of highest mean log-probability is returned (ties: the
    more probable length; in a "window" the one nearer to its middle, then the shorter). bos, eos, pad and mask are
    never predicted, never masked and never returned.

    `Hypotheses.scores` are the mean log-probabilities of the tokens, `token_log_probs` holds 0 for eos, and
    `iterations` counts the decoder passes of a sentence: a round with nothing to mask (N < iterations) does not run.

    Source: "Mask-Predict: Parallel Decoding of Conditional Masked Language Models", arXiv:1904.09324, section 3. The
    published code takes the floor in float32, masks at least one token in every round, and counts eos in N.
    """

    model_protocol: ClassVar[type] = FillModel

    # Rounds, the first prediction included.
    iterations: int = 10
    # Candidate lengths per sentence; a length that does not fit the model's positions is no candidate.
    length_beam: int = 5
    # Which lengths these are: "top", the most probable ones, or "window", the most probable one and its neighbours
    # (fairseq's length beam; of an even number one more is shorter than longer).
    length_candidates: str = "top"
    # Candidates returned per sentence, best first; at most length_beam.
    n_best: int = 1
    # Tokens masked again in every round at least, whatever the schedule says; the published code has 1.
    min_remasked: int = 0
    # Record every step of the best candidate in `Hypotheses.trace`; costs a copy to the host per step.
    trace: bool = False

    def __post_init__(self) -> None:
        check_number(self.iterations, "iterations", minimum=1, integer=True)
        check_number(self.length_beam, "length_beam", minimum=1, integer=True)
        check_choice(self.length_candidates, "length_candidates", ("top", "window"))
        check_number(self.n_best, "n_best", minimum=1, maximum=self.length_beam, integer=True)
        check_number(self.min_remasked, "min_remasked", minimum=0, integer=True)

    def run(self, model: FillModel, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        """Decode source int64 [B, S] with source_lengths [B]; nothing waits between lengths and result."""
        memory = model.encode(source, source_lengths)
        lengths, possible = self._candidate_lengths(model, memory)
        batch, beam = lengths.shape
        host_lengths = lengths.flatten().tolist()  # from here to the result every count is known on the host
        device = lengths.device
        memory = model.select(memory, torch.arange(batch * beam, device=device) // beam)

        width = max(host_lengths, default=0) + 2
        maskable = between(lengths.flatten(), width)
        tokens = torch.full(maskable.shape, model.pad_id, device=device).masked_fill_(maskable, model.mask_id)
        tokens[:, 0] = model.bos_id
        tokens.scatter_(1, lengths.view(-1, 1) + 1, model.eos_id)
        log_probs = torch.zeros(maskable.shape, device=device)
        recorder = Recorder(model, batch * beam) if self.trace else None

        schedule = [[self.masked_tokens(length, t) for length in host_lengths] for t in range(self.iterations)]
        counts = on_device(schedule, device)  # [T, B*K], never rising with t
        rounds = (counts > 0).sum(0)
        if recorder is None and _captured(model, device, maskable.numel()):
            now = _InPlace(
                memory, tokens, log_probs, maskable, counts, torch.zeros(1, dtype=torch.int64, device=device)
            )
            once = repeated(model, partial(_round, model, now), device)
            for _ in range(sum(any(row) for row in schedule)):
                once()
        else:
            self._refine(model, memory, tokens, log_probs, maskable, schedule, counts, recorder)

        scores, order = best_first(mean_log_prob(log_probs, maskable).view(batch, beam), possible, self.n_best)
        best = order + torch.arange(0, batch * beam, beam, device=device)[:, None]  # [B, n], rows of the canvases
        tokens, log_probs, first = tokens[best], log_probs[best], best[:, 0]
        return hypotheses(
            model,
            tokens,
            log_probs,
            lengths.masked_fill(~possible, 0).gather(1, order),
            scores,
            rounds.view(batch, beam).amax(1),
            recorder.traces(rounds[first], tokens[:, 0], log_probs[:, 0], first) if recorder else None,
        )

    def _refine(
        self,
        model: FillModel,
        memory: Any,
        tokens: Tensor,
        log_probs: Tensor,
        maskable: Tensor,
        schedule: list[list[int]],
        counts: Tensor,
        recorder: Recorder | None,
    ) -> None:
        """All rounds, in place, in which masked positions alone are projected and who has nothing to predict leaves."""
        active = list(range(len(tokens)))
        rows = torch.arange(len(tokens), device=tokens.device)
        canvas, confidence, inside = tokens, log_probs, maskable
        for t, quotas in enumerate(schedule):
            left = [i for i, row in enumerate(active) if quotas[row]]
            if len(left) < len(active):
                if canvas is not tokens:
                    tokens[rows], log_probs[rows] = canvas, confidence
                active = [active[i] for i in left]
                if not active:
                    break
                kept = true_positions(counts[t, rows] > 0, len(active))
                rows, memory, inside = rows[kept], model.select(memory, kept), inside[kept]
                canvas, confidence = tokens[rows], log_probs[rows]
            masked = inside
            if t > 0:
                masked = remask(confidence, counts[t, rows], maskable=inside)
                if recorder:
                    recorder.record(t + 1, "mask", active, canvas, confidence, masked)
                canvas.masked_fill_(masked, model.mask_id)
            fill(model, canvas, confidence, memory, masked, sum(quotas[row] for row in active))
            if recorder:
                recorder.record(t + 1, "fill" if t else "predict", active, canvas, confidence, masked)
        if active and canvas is not tokens:
            tokens[rows], log_probs[rows] = canvas, confidence

    def masked_tokens(self, length: int, t: int) -> int:
        """How many of `length` tokens round t (from 0) predicts: all at first, then the linear schedule in integers."""
        return max(length * (self.iterations - t) // self.iterations, min(self.min_remasked, length))

    def _candidate_lengths(self, model: FillModel, memory: object) -> tuple[Tensor, Tensor]:
        """The lengths [B, K] to try, the most probable first (ties: the shorter), and whether each is possible.

        Of a window those nearer to it come first (ties: the shorter).
        """
        logits = model.length_logits(memory)[:, 1:]  # of lengths 1, 2, …
        longest = getattr(model, "max_positions", None)
        if longest is not None:
            logits = logits[:, : max(longest - 2, 0)]
        if logits.shape[1] == 0:
            raise ValueError(
                "length_logits must score a length of at least 1 that fits the model's positions; got none"
            )
        logits = logits.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        # Places beyond the lengths there are, so that a result always has n_best hypotheses.
        missing = max(self.length_beam - logits.shape[1], 0)
        logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        values, order = logits.sort(dim=1, descending=True, stable=True)
        values, order = values[:, : self.length_beam], order[:, : self.length_beam]
        if self.length_candidates == "window":
            shifts = sorted(range(-(self.length_beam // 2), (self.length_beam + 1) // 2), key=abs)
            order = order[:, :1] + on_device(shifts, order.device)
            inside = (order >= 0) & (order < logits.shape[1])
            order = order.clamp(0, logits.shape[1] - 1)
            values = logits.gather(1, order).masked_fill(~inside, -torch.inf)
        possible = values > -torch.inf
        return (order + 1).masked_fill(~possible, 1), possible


@dataclass(frozen=True)
class _InPlace:
    """All candidates [R, W] as rounds in place find them and leave them."""

    memory: Any
    tokens: Tensor
    log_probs: Tensor
    maskable: Tensor
    counts: Tensor  # int64 [T, R]
    t: Tensor  # int64 [1]


def _round(model: FillModel, now: _InPlace) -> None:
    """Mask what round t masks, which is all in the first, and predict it; then it is round t + 1."""
    count = now.counts.index_select(0, now.t).flatten()
    masked = remask(now.log_probs, count, maskable=now.maskable)
    now.tokens.masked_fill_(masked, model.mask_id)
    fill(model, now.tokens, now.log_probs, now.memory, masked, None)
    now.t.add_(1)


def _captured(model: FillModel, device: torch.device, positions: int) -> bool:
    """Whether a round becomes a CUDA graph, whose price is that it projects unmasked positions too.

    That is worth it as long as launches take longer than kernels; beyond, a round as it is keeps the device busy.
    """
    return device.type != "cpu" and getattr(model, "capturable", False) and positions <= LAUNCH_BOUND
