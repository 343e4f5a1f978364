"""Iterative refinement (Lee et al. 2018): every token is predicted anew from all of them until nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from condgen_fast._check import check_choice, check_number
from condgen_fast.decode.canvas import between, hypotheses, initial_canvas, mean_log_prob, predict, true_positions
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.left_to_right import check_due
from condgen_fast.decode.protocols import FillModel
from condgen_fast.decode.trace import Recorder


@dataclass(frozen=True)
class IterativeRefinement:
    """Deterministic decoding of a `FillModel` in a number of rounds that the sentence itself decides.

    The first round predicts every token of the most probable length from masks (or, with `initial`, from given
    tokens); each further round predicts every token again from the output of the round before. A sentence is finished
    when one of its last `window` - 1 outputs is within `tolerance` of the oldest of the last `window`; its newest
    output is returned. So it takes at least `window` rounds, the confirming one included, which
    `Hypotheses.iterations` counts. bos, eos, pad and mask are never predicted and never returned.

    The model has to have learned to predict tokens that it sees: a CMLM has not, and keeps most of them.

    `Hypotheses.scores` are mean log-probabilities of the last round; `token_log_probs` holds 0 for eos.

    Source: "Deterministic Non-Autoregressive Neural Sequence Modeling by Iterative Refinement", arXiv:1802.06901,
    section 4. The published code starts from copied source words, adds the last hidden states to the embeddings of the
    output, and compares five outputs.
    """

    model_protocol: ClassVar[type] = FillModel

    # Rounds a sentence gets at most.
    max_iterations: int = 10
    # Outputs that are compared: 2 waits for one that repeats, more also ends a cycle shorter than that.
    window: int = 2
    # hamming: share of the positions that differ. jaccard: of the multisets of tokens, whose order does not matter.
    distance: str = "hamming"
    # The largest distance that counts as unchanged.
    tolerance: float = 0.0
    # Tokens to start from, which also give the length: a list of ids per sentence or int64 [B, L] right-padded; no bos,
    # eos, mask.
    initial: Tensor | Sequence[Sequence[int]] | None = field(default=None, compare=False)
    # Record every step in `Hypotheses.trace`; costs a copy to the host per round.
    trace: bool = False

    def __post_init__(self) -> None:
        check_number(self.max_iterations, "max_iterations", minimum=1, integer=True)
        check_number(self.window, "window", minimum=2, integer=True)
        check_choice(self.distance, "distance", ("hamming", "jaccard"))
        check_number(self.tolerance, "tolerance", minimum=0.0, maximum=1.0)

    def run(self, model: FillModel, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        """Decode source int64 [B, S] with source_lengths [B]; on a GPU one synchronisation every few rounds."""
        memory = model.encode(source, source_lengths)
        batch, device = source.shape[0], source.device
        if self.initial is None:
            lengths = self._likeliest_length(model, memory)
            width = int(lengths.max()) + 2
            tokens = torch.full((batch, width), model.pad_id, device=device)
            tokens.masked_fill_(between(lengths, width), model.mask_id)[:, 0] = model.bos_id
            tokens.scatter_(1, lengths[:, None] + 1, model.eos_id)
        else:
            tokens, lengths = initial_canvas(self.initial, model, batch, device)
            lengths = lengths - 2
        recorder = Recorder(model, batch) if self.trace else None
        inside = between(lengths, tokens.shape[1])
        log_probs = torch.zeros(tokens.shape, device=device)
        if recorder and self.initial is not None:
            recorder.record(0, "start", list(range(batch)), tokens, log_probs, inside)

        final_tokens, final_log_probs = tokens.clone(), log_probs.clone()
        iterations = torch.zeros_like(lengths)
        counts = lengths.tolist()  # from here on the host knows how many tokens are predicted
        rows, active = torch.arange(batch, device=device), list(range(batch))
        done, outputs = lengths == 0, []
        for iteration in range(1, self.max_iterations + 1):
            if check_due(iteration - 2, device):
                host_done = done.tolist()
                if any(host_done):
                    final_tokens[rows], final_log_probs[rows] = tokens, log_probs
                    active = [row for row, gone in zip(active, host_done, strict=True) if not gone]
                    if not active:
                        break
                    left = true_positions(~done, len(active))
                    memory, rows, done, inside = model.select(memory, left), rows[left], done[left], inside[left]
                    tokens, log_probs, outputs = tokens[left], log_probs[left], [output[left] for output in outputs]
            where = true_positions(inside, sum(counts[row] for row in active))
            before, canvas, confidence = tokens, tokens.clone(), log_probs.clone()
            canvas.view(-1)[where], confidence.view(-1)[where] = predict(model, tokens, memory, where)
            tokens = torch.where(done[:, None], tokens, canvas)
            log_probs = torch.where(done[:, None], log_probs, confidence)
            iterations[rows] += (~done).long()
            if recorder:
                first = iteration == 1 and self.initial is None
                touched = inside & ~done[:, None] & (first | (tokens != before))
                recorder.record(iteration, "predict" if first else "rewrite", active, tokens, log_probs, touched)
            outputs = [*outputs, tokens][-self.window :]
            if len(outputs) == self.window:
                for newer in outputs[1:]:
                    done = done | (self._distances(outputs[0], newer, inside) <= self.tolerance)
        else:
            final_tokens[rows], final_log_probs[rows] = tokens, log_probs

        return hypotheses(
            model,
            final_tokens[:, None],
            final_log_probs[:, None],
            lengths[:, None],
            mean_log_prob(final_log_probs, between(lengths, final_tokens.shape[1]))[:, None],
            iterations,
            recorder.traces(list(range(batch)), iterations.tolist()) if recorder else None,
        )

    def _distances(self, a: Tensor, b: Tensor, inside: Tensor) -> Tensor:
        """float64 [R] between two outputs [R, L] of the same lengths."""
        length = inside.sum(1).clamp(min=1).double()
        if self.distance == "hamming":
            return ((a != b) & inside).sum(1) / length
        # A token's n-th occurrence in a is shared if b has it at least n times.
        earlier = torch.arange(a.shape[1], device=a.device) < torch.arange(a.shape[1], device=a.device)[:, None]
        place = ((a[:, :, None] == a[:, None, :]) & inside[:, None, :] & earlier).sum(2)
        found = ((a[:, :, None] == b[:, None, :]) & inside[:, None, :]).sum(2)
        shared = ((place < found) & inside).sum(1)
        return 1 - shared / (2 * length - shared)

    def _likeliest_length(self, model: FillModel, memory: object) -> Tensor:
        """int64 [B], at least 1 and within the model's positions; ties go to the shorter."""
        logits = model.length_logits(memory)[:, 1:]
        longest = getattr(model, "max_positions", None)
        if longest is not None:
            logits = logits[:, : max(longest - 2, 0)]
        if logits.shape[1] == 0:
            raise ValueError(
                "length_logits must score a length of at least 1 that fits the model's positions; got none"
            )
        return logits.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(1) + 1
