"""Block-wise decoding of masked-diffusion language models (LLaDA, block diffusion, Fast-dLLM)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from condgen_fast._check import check_choice, check_number, check_token_ids
from condgen_fast.decode.blocks import Canvases
from condgen_fast.decode.canvas import PROJECTED_ROWS, mean_log_prob, projected, runs
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.left_to_right import never_generated, worth_leaving
from condgen_fast.decode.protocols import MaskedModel
from condgen_fast.decode.sampling import mixed
from condgen_fast.decode.trace import Recorder
from condgen_fast.decode.unattended import Running, host_follows, on_device, repeated, worth_capturing_anew
from condgen_fast.ops.refinement import RowStats, commit, row_stats

# Where none is given: a probability, a difference of probabilities, and nats.
THRESHOLDS = {"threshold": 0.9, "margin": 0.5, "entropy": 0.1}


@dataclass(frozen=True)
class BlockDiffusion:
    """Decoding of a `MaskedModel`: `source` is the prompt, followed by masks that are filled block by block.

    Each sentence works on the block of its leftmost mask; blocks are counted from the end of its prompt, or from the
    canvas's first position where the model is block-causal. A pass predicts the block's masks, and `policy` says which
    of these predictions are written; the others stay masks (`condgen_fast.ops.commit`):

    ========= ================================================================================
    quota     as many of the surest as finish the block in `steps` passes, the first ones one more (LLaDA)
    threshold all of probability at least `threshold`, and the `minimum` surest (Fast-dLLM)
    margin    all whose probability exceeds the next token's by `threshold`, and the `minimum` surest
    entropy   the surest, while the entropies of all but the last sum to at most `threshold` nats, and the `minimum`
              surest (EB-Sampler)
    ========= ================================================================================

    What is written stays; given tokens are never changed, whatever they are. Masks that stand in `source` are filled
    as well (infill), wherever they are. eos is written in appended masks only and ends the text: what follows is
    dropped, and the sentence is finished once no mask stands before it. pad, bos and mask are never written.

    `Hypotheses.tokens` continue the prompt: they are all that follows the tokens before the first mask, which is the
    new text without its eos or, after infill, everything from the first filled mask on. Given tokens among them have
    log-probability 0. `scores` are mean log-probabilities of the tokens that were written, eos included, each at
    temperature 1 and of the pass that wrote it; `iterations` counts the passes that wrote to a sentence.

    Source: "Large Language Diffusion Models", arXiv:2502.09992; "Block Diffusion", arXiv:2503.09573; "Fast-dLLM",
    arXiv:2505.22618; "EB-Sampler", arXiv:2505.24857. The published loops take one prompt, or prompts of one length.
    """

    model_protocol: ClassVar[type] = MaskedModel

    # Masks appended to each prompt, eos counted. None: 2·S + 10 for a prompt of S tokens, none for one that holds
    # masks. Never more than the model's positions hold.
    max_length: int | None = None
    # Positions of a block; None: the model's own, else 32. A multiple of the model's own where it has one.
    block_length: int | None = None
    policy: str = "threshold"
    # quota alone: passes a block; None: as many as a block has positions, so one token a pass.
    steps: int | None = None
    # threshold, margin and entropy; None: 0.9, 0.5 and 0.1.
    threshold: float | None = None
    minimum: int = 1
    # 0 predicts the most probable token, more draws from softmax(logits / temperature).
    temperature: float = 0.0
    # Of the draws, which depend on it, on the sentence's own prompt, on position and pass, and on nothing else; None:
    # from torch's global generator.
    seed: int | None = None
    # Keep what a block-causal model computed of finished blocks. Exact; False computes everything in every pass.
    prefix_cache: bool = True
    # Record every pass in `Hypotheses.trace`; costs a copy to the host per pass.
    trace: bool = False

    def __post_init__(self) -> None:
        check_choice(self.policy, "policy", ("quota", *THRESHOLDS))
        for name, minimum in (("max_length", 0), ("block_length", 1), ("steps", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                check_number(getattr(self, name), name, minimum=minimum, integer=True)
        check_number(self.minimum, "minimum", minimum=1, integer=True)
        check_number(self.temperature, "temperature", minimum=0.0)
        if self.threshold is not None:
            check_number(self.threshold, "threshold", minimum=0.0)
        unread = "threshold" if self.policy == "quota" else "steps"
        if getattr(self, unread) is not None:
            raise ValueError(
                f"{unread} must be None for policy {self.policy!r}, which does not read it; got {getattr(self, unread)}"
            )

    def run(self, model: MaskedModel, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        """Decode source int64 [B, S] with source_lengths [B]; on a GPU it always has a pass to work on."""
        batch, device = source.shape[0], source.device
        length = self._block_length(model)
        now, seed = self._start(model, source, source_lengths, length), self._seed()
        blank = now.tokens == model.mask_id
        final_tokens, final_log_probs = now.tokens.clone(), now.log_probs.clone()
        passes = torch.zeros_like(now.passes)
        recorder = Recorder(model, batch) if self.trace else None
        if recorder:
            recorder.record(0, "start", list(range(batch)), now.tokens, now.log_probs, now.tokens != model.pad_id)
        # Each pass fills a mask of every sentence that has one, or finishes a block of it.
        unfinished, once = Running(device), None
        for _ in range(int(blank.sum(1).max()) + (0 if now.prefix is None else -(-blank.shape[1] // length) - 1)):
            flags = unfinished.one_behind(now.running)
            if flags is not None and not any(flags):
                break
            if flags is not None and self._leaves(sum(flags), now, device):
                final_tokens[now.rows], final_log_probs[now.rows] = now.tokens, now.log_probs
                passes[now.rows] = now.passes
                left = [i for i, runs in enumerate(flags) if runs]
                now, once, unfinished = now.select(model, on_device(left, device)), None, Running(device)
            if once is None:
                once = self._repeated(model, now, seed)
            before = now.tokens.clone() if recorder else None
            once()
            if recorder:
                committed = (before == model.mask_id) & (now.tokens != model.mask_id) & (now.tokens != model.pad_id)
                for count in now.passes.unique().tolist():
                    touched = committed & (now.passes == count)[:, None]
                    recorder.record(count, "commit", now.rows.tolist(), now.tokens, now.log_probs, touched)
        final_tokens[now.rows], final_log_probs[now.rows], passes[now.rows] = now.tokens, now.log_probs, now.passes
        return self._result(model, blank, final_tokens, final_log_probs, passes, recorder)

    def _leaves(self, left: int, now: Canvases, device: torch.device) -> bool:
        if device.type == "cpu":  # where moving prefixes is all that it costs
            return worth_leaving(left, len(now.rows))
        return worth_capturing_anew(left, *now.tokens.shape, device)

    def _repeated(self, model: MaskedModel, now: Canvases, seed: int) -> Callable[[], None]:
        """One pass, again and again; draws, which take a generator, are not captured."""
        once, device = partial(self._pass, model, now, seed), now.tokens.device
        return once if host_follows(device) or self.temperature > 0 else repeated(model, once, device)

    def _block_length(self, model: MaskedModel) -> int:
        own = getattr(model, "block_length", None)
        length = self.block_length or own or 32
        if own is not None and length % own:
            raise ValueError(f"block_length must be a multiple of the model's {own}; got {length}")
        return length

    def _seed(self) -> int:
        if self.temperature == 0:
            return 0
        return int(torch.randint(2**62, ())) if self.seed is None else self.seed

    def _start(self, model: MaskedModel, source: Tensor, source_lengths: Tensor, length: int) -> Canvases:
        if hasattr(model, "encode"):
            raise TypeError(f"BlockDiffusion needs a model without encoder; {type(model).__name__} has encode")
        if model.pad_id in (model.bos_id, model.eos_id, model.mask_id):
            raise ValueError(f"pad_id must differ from bos_id, eos_id and mask_id; got {model.pad_id}")
        check_token_ids(source, "source", shape="B S", vocab_size=model.vocab_size)
        longest, device = source.shape[1], source.device
        positions = torch.arange(longest, device=device)
        inside = positions < source_lengths[:, None]
        if device.type == "cpu" and bool(((source == model.pad_id) & inside).any()):
            raise ValueError("source must have padding only on the right; got some between tokens")
        if self.max_length is None:
            appended = (2 * source_lengths + 10).masked_fill((source == model.mask_id).any(1), 0)
        else:
            appended = torch.full_like(source_lengths, self.max_length)
        most = getattr(model, "max_positions", None)
        if most is not None:
            if longest > most:
                raise ValueError(f"source must fit the model's {most} positions; got {longest} tokens")
            appended = appended.minimum(most - source_lengths)
        keys = mixed(torch.where(inside, mixed(source + mixed(positions)), 0).sum(1))
        cached = self.prefix_cache and bool(getattr(model, "block_length", None)) and hasattr(model, "extend")
        return Canvases.start(model, source, source_lengths, source_lengths + appended, keys, length, cached)

    def _pass(self, model: MaskedModel, now: Canvases, seed: int) -> None:
        """Predict the masks of every canvas's block, and write what the policy allows."""
        window, canvas, open_ = now.window(model.mask_id)
        # On the CPU only masks are projected; elsewhere counting them would wait for the device.
        follows = host_follows(window.device)
        where = open_.flatten().nonzero()[:, 0] if follows else None
        if now.prefix is not None:
            states, project, places = model.extend(canvas, now.block, now.prefix), model.project, where
        else:
            project = model.project if hasattr(model, "fill_states") else None
            states = (model.fill if project is None else model.fill_states)(now.tokens[:, : -now.length], None)
            places = now.in_states(window)
            places = places if where is None else places[where]
        given = (window < now.given[:, None]).flatten()
        noise = mixed(mixed(now.keys + now.passes)[:, None] + window).flatten() if self.temperature else None
        if where is not None:
            given, noise = given[where], None if noise is None else noise[where]

        rows = given.split(PROJECTED_ROWS)
        noises = [None] * len(rows) if noise is None else noise.split(PROJECTED_ROWS)
        found = [
            self._predict(model, logits, *of_rows, seed)
            for logits, *of_rows in zip(projected(states.flatten(0, 1), project, places), rows, noises, strict=True)
        ]
        values = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*found, strict=True)]
        if where is not None:
            values = [value.new_zeros(open_.numel()).index_copy_(0, where, value) for value in values]
        token, log_prob, surety = (value.view(open_.shape) for value in (*values, values[-1])[:3])

        limit: dict[str, Any] = {"threshold": THRESHOLDS.get(self.policy) if self.threshold is None else self.threshold}
        if self.policy == "quota":
            limit = {"quota": now.quota(open_, self.steps or now.length)}
        stats = RowStats(token, log_prob, margin=surety, entropy=surety)  # of which the policy reads its own alone
        written = commit(stats, canvas, maskable=open_, policy=self.policy, minimum=self.minimum, **limit)
        now.write(model, window, written, log_prob, follows)
        now.go_on(model.mask_id, open_.any(1))

    def _predict(
        self, model: MaskedModel, logits: Tensor, given: Tensor, noise: Tensor | None, seed: int
    ) -> tuple[Tensor, ...]:
        """Of logits [N, V], which are changed: the tokens that may be written there, where `given` no eos, and what the
        policy asks of them: the log-probability, and another statistic where it ranks by that."""
        never = {*never_generated(model), model.mask_id}
        for first, end in runs(never):
            logits[:, first:end].fill_(-torch.inf)
        logits[:, model.eos_id].masked_fill_(given, -torch.inf)
        draw = {}
        if noise is not None:
            draw = {"generator": torch.Generator(logits.device).manual_seed(seed), "noise_rows": noise}
        stats = row_stats(logits, temperature=self.temperature, **draw)
        nothing = stats.log_prob == -torch.inf
        fallback = next(i for i in range(len(never) + 2) if i not in never and i != model.eos_id)
        values = stats.token.masked_fill(nothing, fallback), stats.log_prob
        if self.policy == "margin":
            return *values, stats.margin
        return (*values, stats.entropy.masked_fill(nothing, torch.inf)) if self.policy == "entropy" else values

    def _result(
        self,
        model: MaskedModel,
        blank: Tensor,
        tokens: Tensor,
        log_probs: Tensor,
        passes: Tensor,
        recorder: Recorder | None,
    ) -> Hypotheses:
        """What follows the prompts; `blank` is true where a mask stood at first."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        real = tokens != model.pad_id
        count = real.sum(1)
        first = torch.where(blank.any(1), blank.int().argmax(1), count)
        last = (count - 1)[:, None]
        ended = ((tokens == model.eos_id) & blank).gather(1, last)[:, 0]
        lengths = count - first - ended.long()
        longest = int(lengths.max())
        inside = position[:longest] < lengths[:, None]
        index = (first[:, None] + position[: longest + 1]).clamp(max=tokens.shape[1] - 1)
        scored = position[: longest + 1] < (lengths + ended)[:, None]
        return Hypotheses(
            tokens=torch.where(inside, tokens.gather(1, index)[:, :longest], model.pad_id)[:, None],
            lengths=lengths[:, None],
            scores=mean_log_prob(log_probs, blank & real)[:, None],
            token_log_probs=torch.where(scored, log_probs.gather(1, index), 0.0)[:, None],
            iterations=passes,
            ended=ended[:, None],
            trace=recorder.traces(passes, tokens, log_probs) if recorder else None,
        )
