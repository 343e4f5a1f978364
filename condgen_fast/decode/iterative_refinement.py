"""Iterative refinement (Lee et al. 2018): every token is predicted anew from all of them until nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial, reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from condgen_fast._check import check_choice, check_number
from condgen_fast.decode.canvas import between, hypotheses, initial_canvas, mean_log_prob, predict, true_positions
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.protocols import FillModel
from condgen_fast.decode.trace import Recorder
from condgen_fast.decode.unattended import Running, on_device, repeated, worth_capturing_anew


@dataclass
class _Sentences:
    """The R sentences that are being refined, as rounds in place find them and leave them."""

    memory: Any
    rows: Tensor  # int64 [R], their places in the batch
    inside: Tensor  # bool [R, W]
    running: Tensor  # bool [R], not finished: finished ones stay as they are
    rounds: Tensor  # int64 [R]
    tokens: Tensor
    log_probs: Tensor
    outputs: Tensor  # [R, window, W], as they were after the last rounds, the newest last

    def select(self, model: FillModel, index: Tensor) -> _Sentences:
        values = {f.name: getattr(self, f.name).index_select(0, index) for f in fields(self) if f.name != "memory"}
        return _Sentences(model.select(self.memory, index), **values)


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
        """Decode source int64 [B, S] with source_lengths [B]; on a GPU it always has a round to work on."""
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

        now = _Sentences(
            memory=memory,
            rows=torch.arange(batch, device=device),
            inside=inside,
            running=lengths > 0,
            rounds=torch.zeros_like(lengths),
            tokens=tokens,
            log_probs=log_probs,
            outputs=tokens[:, None].repeat(1, self.window, 1),
        )
        final_tokens, final_log_probs, iterations = tokens, log_probs, now.rounds
        counts, active = lengths.tolist(), list(range(batch))  # from here on the host knows how many are predicted
        unfinished, once = Running(device), None
        for iteration in range(1, self.max_iterations + 1):
            flags = unfinished.one_behind(now.running)
            if flags is not None and not any(flags):
                break
            if flags is not None and worth_capturing_anew(sum(flags), *now.tokens.shape, device):
                final_tokens = final_tokens.index_copy(0, now.rows, now.tokens)
                final_log_probs = final_log_probs.index_copy(0, now.rows, now.log_probs)
                iterations = iterations.index_copy(0, now.rows, now.rounds)
                left = [i for i, runs in enumerate(flags) if runs]
                active = [active[i] for i in left]
                now, once, unfinished = now.select(model, on_device(left, device)), None, Running(device)
            if once is None:
                where = true_positions(now.inside, sum(counts[row] for row in active))
                once = repeated(model, partial(self._round, model, now, where), device)
            before = (now.tokens.clone(), now.running.clone()) if recorder else None
            once()
            if recorder:
                first = iteration == 1 and self.initial is None
                touched = now.inside & before[1][:, None] & (first | (now.tokens != before[0]))
                operation = "predict" if first else "rewrite"
                recorder.record(iteration, operation, active, now.tokens, now.log_probs, touched)
        final_tokens = final_tokens.index_copy(0, now.rows, now.tokens)
        final_log_probs = final_log_probs.index_copy(0, now.rows, now.log_probs)
        iterations = iterations.index_copy(0, now.rows, now.rounds)

        return hypotheses(
            model,
            final_tokens[:, None],
            final_log_probs[:, None],
            lengths[:, None],
            mean_log_prob(final_log_probs, between(lengths, final_tokens.shape[1]))[:, None],
            iterations,
            recorder.traces(iterations, final_tokens, final_log_probs) if recorder else None,
        )

    def _round(self, model: FillModel, now: _Sentences, where: Tensor) -> None:
        """Predict the positions `where` of the flattened canvases anew, in place, of sentences that are running."""
        running, log_probs = now.running[:, None], now.log_probs.clone()
        token, log_prob = predict(model, now.tokens, now.memory, where)
        now.tokens.view(-1).index_copy_(0, where, token)
        now.log_probs.view(-1).index_copy_(0, where, log_prob)
        torch.where(running, now.tokens, now.outputs[:, -1], out=now.tokens)
        torch.where(running, now.log_probs, log_probs, out=now.log_probs)
        now.rounds.add_(now.running)
        for older in range(self.window - 1):
            now.outputs[:, older].copy_(now.outputs[:, older + 1])
        now.outputs[:, -1].copy_(now.tokens)
        far = now.rounds < self.window  # nothing to compare yet
        apart = [self._distances(now.outputs[:, 0], now.outputs[:, k], now.inside) for k in range(1, self.window)]
        now.running.logical_and_(far | (reduce(torch.minimum, apart) > self.tolerance))

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
