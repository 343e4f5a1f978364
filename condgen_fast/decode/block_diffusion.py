"""Block-wise decoding of masked-diffusion language models (LLaDA, block diffusion, Fast-dLLM)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from condgen_fast._check import check_choice, check_number, check_token_ids
from condgen_fast.decode.canvas import PROJECTED_ROWS, mean_log_prob
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.left_to_right import never_generated
from condgen_fast.decode.left_to_right import worth_leaving as worth_moving
from condgen_fast.decode.protocols import MaskedModel
from condgen_fast.decode.sampling import mixed
from condgen_fast.decode.trace import Recorder
from condgen_fast.decode.unattended import Running, on_device, repeated, worth_leaving
from condgen_fast.ops.refinement import RowStats, commit, row_stats

# Where none is given: a probability, a difference of probabilities, and nats.
THRESHOLDS = {"threshold": 0.9, "margin": 0.5, "entropy": 0.1}


@dataclass
class _Canvases:
    """The R canvases that are still being filled, with one block of padding behind the widest: [R, W + L]."""

    prefix: Any  # the model's; None where whole canvases are computed
    rows: Tensor  # int64 [R], their places in the batch
    given: Tensor  # int64 [R], tokens that were given, masks among them included
    tokens: Tensor
    log_probs: Tensor
    kept: Tensor  # int64 [R], positions that the prefix holds
    block: Tensor  # int64 [R], where the block of the last pass began
    planned: Tensor  # int64 [R], its masks at first
    done: Tensor  # int64 [R], passes over it
    passes: Tensor  # int64 [R], passes in which the canvas had masks to fill
    keys: Tensor  # int64 [R], of the random draws

    def names(self) -> list[str]:
        return [f.name for f in fields(self) if f.name != "prefix"]

    def select(self, model: MaskedModel, index: Tensor) -> _Canvases:
        values = {name: getattr(self, name)[index] for name in self.names()}
        return _Canvases(None if self.prefix is None else model.select(self.prefix, index), **values)


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
        width = now.tokens.shape[1] - length
        blank = now.tokens == model.mask_id
        final_tokens, final_log_probs = now.tokens.clone(), now.log_probs.clone()
        passes = torch.zeros_like(now.passes)
        recorder = Recorder(model, batch) if self.trace else None
        if recorder:
            recorder.record(0, "start", list(range(batch)), now.tokens, now.log_probs, now.tokens != model.pad_id)
        # Each pass fills a mask of every sentence that has one, or finishes a block of it.
        unfinished, once = Running(device), None
        for _ in range(int(blank.sum(1).max()) + (0 if now.prefix is None else -(-width // length))):
            flags = unfinished.one_behind((now.tokens == model.mask_id).any(1))
            if flags is not None and not any(flags):
                break
            if flags is not None and self._leaves(sum(flags), now, device):
                final_tokens[now.rows], final_log_probs[now.rows] = now.tokens, now.log_probs
                passes[now.rows] = now.passes
                left = [i for i, runs in enumerate(flags) if runs]
                now, once, unfinished = now.select(model, on_device(left, device)), None, Running(device)
            if recorder:
                committed = self._pass(model, now, length, seed)
                for count in now.passes.unique().tolist():
                    touched = committed & (now.passes == count)[:, None]
                    recorder.record(count, "commit", now.rows.tolist(), now.tokens, now.log_probs, touched)
                continue
            if once is None:
                once = self._repeated(model, now, length, seed)
            once()
        final_tokens[now.rows], final_log_probs[now.rows], passes[now.rows] = now.tokens, now.log_probs, now.passes
        return self._result(model, blank, final_tokens, final_log_probs, passes, recorder)

    def _leaves(self, left: int, now: _Canvases, device: torch.device) -> bool:
        if device.type == "cpu":  # where moving prefixes is all that it costs
            return worth_moving(left, len(now.rows))
        return worth_leaving(left, *now.tokens.shape, device)

    def _repeated(self, model: MaskedModel, now: _Canvases, length: int, seed: int) -> Callable[[], object]:
        """One pass, again and again; draws, which take a generator, are not captured."""
        device = now.tokens.device
        if _counted_by_host(device) or self.temperature > 0:
            return partial(self._pass, model, now, length, seed)
        for name in now.names():  # memory of their own
            setattr(now, name, getattr(now, name).clone())
        return repeated(model, partial(self._pass_in_place, model, now, length, seed), device)

    def _pass_in_place(self, model: MaskedModel, now: _Canvases, length: int, seed: int) -> None:
        """`_pass`, whose results are then where they were before."""
        places = {name: getattr(now, name) for name in now.names()}
        self._pass(model, now, length, seed)
        for name, place in places.items():
            if getattr(now, name) is not place:
                place.copy_(getattr(now, name))
                setattr(now, name, place)

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

    def _start(self, model: MaskedModel, source: Tensor, source_lengths: Tensor, length: int) -> _Canvases:
        batch, longest, device = *source.shape, source.device
        if hasattr(model, "encode"):
            raise TypeError(f"BlockDiffusion needs a model without encoder; {type(model).__name__} has encode")
        if model.pad_id in (model.bos_id, model.eos_id, model.mask_id):
            raise ValueError(f"pad_id must differ from bos_id, eos_id and mask_id; got {model.pad_id}")
        check_token_ids(source, "source", shape="B S", vocab_size=model.vocab_size)
        positions = torch.arange(longest, device=device)
        if device.type == "cpu" and bool(((source == model.pad_id) & (positions < source_lengths[:, None])).any()):
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
        ends = source_lengths + appended
        width = int(ends.max())
        tokens = torch.nn.functional.pad(source, (0, width + length - longest), value=model.pad_id)
        positions = torch.arange(width + length, device=device)
        new = (positions >= source_lengths[:, None]) & (positions < ends[:, None])
        tokens.masked_fill_(new, model.mask_id)
        none = torch.zeros_like(source_lengths)
        now = _Canvases(
            prefix=None,
            rows=torch.arange(batch, device=device),
            given=source_lengths,
            tokens=tokens,
            log_probs=torch.zeros(tokens.shape, device=device),
            kept=none,
            block=none - 1,
            planned=none,
            done=none,
            passes=none,
            keys=mixed(torch.where(positions < source_lengths[:, None], mixed(tokens + mixed(positions)), 0).sum(1)),
        )
        if self.prefix_cache and getattr(model, "block_length", None) and hasattr(model, "extend"):
            masked = tokens == model.mask_id
            now.prefix = model.prefix(batch, width + length)
            now.kept = torch.where(masked.any(1), masked.int().argmax(1) // length * length, 0)
            before = int(now.kept.max())
            if before:
                model.extend(tokens[:, :before], none, now.prefix)
        return now

    def _pass(self, model: MaskedModel, now: _Canvases, length: int, seed: int) -> Tensor:
        """Predict the masks of every canvas's block, write what the policy allows -> bool [R, W + L], where."""
        width, device = now.tokens.shape[1] - length, now.tokens.device
        if now.prefix is not None:
            start, end = now.kept, now.kept + length
        else:
            # Blocks from the prompt's end, backwards into it too; from the first position where the model has blocks.
            origin = 0 if getattr(model, "block_length", None) else now.given
            leftmost = (now.tokens == model.mask_id).int().argmax(1)
            start = origin + (leftmost - origin).div(length, rounding_mode="floor") * length
            start, end = start.clamp(min=0), start + length
        window = start[:, None] + torch.arange(length, device=device)  # [R, L]
        canvas = now.tokens.gather(1, window)
        open_ = (canvas == model.mask_id) & (window < end[:, None])

        # On the CPU only masks are projected; elsewhere counting them would wait for the device.
        if _counted_by_host(device):
            where = open_.flatten().nonzero()[:, 0]
        else:
            where = torch.arange(open_.numel(), device=device)
        if now.prefix is not None:
            states, project = model.extend(canvas, start, now.prefix), model.project
            places = torch.arange(open_.numel(), device=device)
        else:
            project = model.project if hasattr(model, "fill_states") else None
            states = (model.fill if project is None else model.fill_states)(now.tokens[:, :width], None)
            row = torch.arange(len(window), device=device)[:, None]
            places = (row * width + window.clamp(max=width - 1)).flatten()
        noise = mixed(mixed(now.keys + now.passes)[:, None] + window).flatten() if self.temperature else None
        new = (window >= now.given[:, None]).flatten()
        floats = [torch.zeros(open_.numel(), device=device) for _ in range(3)]
        stats = RowStats(torch.zeros_like(places), *floats)
        for some in where.split(PROJECTED_ROWS):
            logits = states.flatten(0, 1).index_select(0, places[some])
            logits = logits if project is None else project(logits)
            part = self._predict(model, logits, new[some], None if noise is None else noise[some], seed)
            for values, found in zip(stats[:4], part[:4], strict=True):
                values[some] = found
        stats = RowStats(*(values.view(open_.shape) for values in stats[:4]))

        limit: dict[str, Any] = {"threshold": THRESHOLDS.get(self.policy) if self.threshold is None else self.threshold}
        if self.policy == "quota":
            entered = start != now.block
            now.planned = torch.where(entered, open_.sum(1), now.planned)
            now.done = torch.where(entered, 0, now.done + 1)
            now.block = start.clone()  # which may be `kept` itself
            steps = self.steps or length
            limit = {"quota": now.planned // steps + (now.done < now.planned % steps)}
        written = commit(stats, canvas, maskable=open_, policy=self.policy, minimum=self.minimum, **limit)

        log_probs = torch.where(written.committed, stats.log_prob, now.log_probs.gather(1, window))
        ends = torch.where(written.committed & (written.tokens == model.eos_id), window, width + length).amin(1)
        dropped = torch.arange(width + length, device=device) > ends[:, None]
        now.tokens = now.tokens.scatter(1, window, written.tokens).masked_fill(dropped, model.pad_id)
        now.log_probs = now.log_probs.scatter(1, window, log_probs).masked_fill(dropped, 0.0)
        filling = open_.any(1)
        now.passes = now.passes + filling
        if now.prefix is not None:
            now.kept = now.kept + length * (~filling & (now.tokens == model.mask_id).any(1))
        return torch.zeros_like(dropped).scatter(1, window, written.committed) & ~dropped

    def _predict(self, model: MaskedModel, logits: Tensor, new: Tensor, noise: Tensor | None, seed: int) -> RowStats:
        """Of logits [N, V], which are changed: the tokens that may be written there and what is known of them."""
        never = {*never_generated(model), model.mask_id}
        for token in never:
            logits[:, token] = -torch.inf
        logits[:, model.eos_id].masked_fill_(~new, -torch.inf)
        draw = {}
        if noise is not None:
            draw = {"generator": torch.Generator(logits.device).manual_seed(seed), "noise_rows": noise}
        stats = row_stats(logits, temperature=self.temperature, **draw)
        nothing = ~(stats.log_prob > -torch.inf)
        fallback = next(i for i in range(len(never) + 2) if i not in never and i != model.eos_id)
        return RowStats(
            stats.token.masked_fill(nothing, fallback),
            stats.log_prob.masked_fill(nothing, -torch.inf),
            stats.margin,
            stats.entropy.masked_fill(nothing, torch.inf),
        )

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


def _counted_by_host(device: torch.device) -> bool:
    """Whether the host may ask how many positions there are without waiting for the device."""
    return device.type == "cpu"
