"""The canvases of block diffusion, each of which is filled block by block, from left to right."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from condgen_fast.decode.protocols import MaskedModel
from condgen_fast.ops.refinement import Commit


@dataclass
class Canvases:
    """The R canvases that are still being filled, with one block of padding behind the widest: [R, W + L].

    What changes is changed in place. Of padding, log-probabilities mean nothing.
    """

    prefix: Any  # the model's, of what stands before the block; None where whole canvases are computed
    length: int  # L
    positions: Tensor  # int64 [W + L]: 0, 1, …
    offsets: Tensor  # int64 [at least R, 1]: 0, W, …
    rows: Tensor  # int64 [R], their places in the batch
    given: Tensor  # int64 [R], tokens that were given, masks among them included
    begins: Tensor | None  # int64 [R, W + L], where the block of each position begins; None where there is a prefix
    keys: Tensor  # int64 [R], of the random draws
    tokens: Tensor
    log_probs: Tensor
    running: Tensor  # bool [R], which have masks
    block: Tensor  # int64 [R], where the block of the next pass begins, below 0 where it is only part of one
    counted: Tensor  # int64 [R], the block of which `due` counts
    due: Tensor  # int64 [R], its masks at first and steps - 1, less the passes over it
    passes: Tensor  # int64 [R], passes in which the canvas had masks to fill

    @classmethod
    def start(
        cls, model: MaskedModel, source: Tensor, given: Tensor, ends: Tensor, keys: Tensor, length: int, cached: bool
    ) -> Canvases:
        """source int64 [B, S] with masks from `given` to `ends` [B]; cached: whether the model keeps a prefix."""
        width, rows = int(ends.max()), torch.arange(len(source), device=source.device)
        tokens = torch.nn.functional.pad(source, (0, width + length - source.shape[1]), value=model.pad_id)
        positions = torch.arange(width + length, device=source.device)
        tokens.masked_fill_((positions >= given[:, None]) & (positions < ends[:, None]), model.mask_id)
        masks = tokens == model.mask_id
        running, leftmost = masks.any(1), masks.int().argmax(1)
        prefix = begins = None
        if cached:
            prefix, block = model.prefix(len(tokens), width + length), torch.where(running, leftmost, 0)
            block = block // length * length
            before = int(block.max())
            if before:
                model.extend(tokens[:, :before], torch.zeros_like(given), prefix)
        else:
            # from the prompt's end, backwards into it too; from the first position where the model has blocks
            origin = (torch.zeros_like(given) if getattr(model, "block_length", None) else given)[:, None]
            begins = origin + (positions - origin).div(length, rounding_mode="floor") * length
            block = begins.gather(1, leftmost[:, None])[:, 0]
        return cls(
            prefix=prefix,
            length=length,
            positions=positions,
            offsets=width * rows[:, None],
            rows=rows,
            given=given,
            begins=begins,
            keys=keys,
            tokens=tokens,
            log_probs=torch.zeros(tokens.shape, device=source.device),
            running=running,
            block=block,
            counted=block - 1,
            due=torch.zeros_like(given),
            passes=torch.zeros_like(given),
        )

    def select(self, model: MaskedModel, index: Tensor) -> Canvases:
        prefix = None if self.prefix is None else model.select(self.prefix, index)
        same = {"prefix": prefix, "length": self.length, "positions": self.positions, "offsets": self.offsets}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in same}
        return Canvases(**same, **{name: None if v is None else v.index_select(0, index) for name, v in values.items()})

    def window(self, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each canvas's block [R, L]: positions, the tokens there, and which are masks that it has to fill."""
        block, columns = self.block[:, None], self.positions[: self.length]
        if self.prefix is not None:
            window = block + columns
            canvas = self.tokens.gather(1, window)
            return window, canvas, canvas == mask_id
        window = block.clamp(min=0) + columns
        canvas = self.tokens.gather(1, window)
        return window, canvas, (canvas == mask_id) & (window < block + self.length)

    def in_states(self, window: Tensor) -> Tensor:
        """int64 [R * L], where positions [R, L], if they are no padding, stand in all states [R * W, D]."""
        width = len(self.positions) - self.length
        return (window.clamp(max=width - 1) + self.offsets[: len(window)]).flatten()

    def quota(self, open_: Tensor, steps: int) -> Tensor:
        """int64 [R]: the tokens that this pass owes, so that `steps` of them finish a block, the first ones one more.

        open_: bool [R, L], its masks.
        """
        torch.where(self.block != self.counted, open_.sum(1) + (steps - 1), self.due - 1, out=self.due)
        self.counted.copy_(self.block)
        return self.due // steps

    def write(self, model: MaskedModel, window: Tensor, written: Commit, log_prob: Tensor, follows: bool) -> None:
        """Put what was committed, with log_prob [R, L], where it belongs; nothing stays behind a new eos.

        follows: whether the host may ask if there is one.
        """
        log_probs = torch.where(written.committed, log_prob, self.log_probs.gather(1, window))
        self.tokens.scatter_(1, window, written.tokens)
        self.log_probs.scatter_(1, window, log_probs)
        ending = written.committed & (written.tokens == model.eos_id)
        if not follows or bool(ending.any()):
            ends = torch.where(ending, window, len(self.positions)).amin(1, keepdim=True)
            self.tokens.masked_fill_(self.positions > ends, model.pad_id)

    def go_on(self, mask_id: int, filled: Tensor) -> None:
        """To the next pass, and to the next block where this one is finished; filled bool [R]: which had masks in it.

        A finished block is passed over once more, so that the prefix holds what was written there.
        """
        masks = self.tokens == mask_id
        torch.any(masks, 1, out=self.running)
        self.passes.add_(filled)
        if self.begins is None:
            self.block.add_(self.running > filled, alpha=self.length)
        else:
            torch.gather(self.begins, 1, masks.int().argmax(1, keepdim=True), out=self.block[:, None])
