"""Block diffusion on a tiny masked language model (width 256, 3 layers): our loop and the published one.

pytest benchmarks/bench_block_diffusion.py. All give the same text. "model alone" is what our loop calls of the model,
with the arguments it calls it with and nothing else; what we take beyond it is the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from condgen_fast.decode import BlockDiffusion, decode
from condgen_fast.models.layers import SIZES
from condgen_fast.models.masked_lm import MaskedLM, MaskedLMConfig

V, PROMPT, NEW, BLOCK, STEPS = 8000, 32, 32, 16, 8


@cache
def model_of(block_length: int | None, device: str) -> MaskedLM:
    torch.manual_seed(0)
    model = MaskedLM(MaskedLMConfig(V, **SIZES["tiny"], block_length=block_length, max_positions=128)).eval()
    with torch.no_grad():
        model.norm.weight.mul_(8)  # confidences of random weights are all but equal
    return model.to(device)


@torch.no_grad()
def published(model: MaskedLM, prompts: Tensor) -> Tensor:
    """LLaDA's generate.py (github.com/ML-GSAI/LLaDA), with the tokens that are never written ruled out as ours are."""
    x = torch.nn.functional.pad(prompts, (0, NEW), value=model.mask_id)
    for first in range(PROMPT, PROMPT + NEW, BLOCK):
        for step in range(STEPS):
            logits = model.fill(x)
            logits[..., [model.pad_id, model.bos_id, model.eos_id, model.mask_id]] = -torch.inf
            masked = x == model.mask_id
            tokens = logits.argmax(-1)
            p = logits.double().softmax(-1)
            confidence = p.gather(-1, tokens[..., None])[..., 0]
            confidence[:, first + BLOCK :] = -torch.inf
            confidence = torch.where(masked, confidence, -torch.inf)
            quota = BLOCK // STEPS + (step < BLOCK % STEPS)
            for b in range(len(x)):
                chosen = confidence[b].topk(quota).indices
                x[b, chosen] = tokens[b, chosen]
    return x[:, PROMPT:]


def model_alone(model: MaskedLM, run: Callable[[], object]) -> Callable[[], None]:
    """What `run` calls of the model, once more, by itself."""
    calls: list[tuple[str, tuple]] = []

    def recorded(name: str) -> Callable:
        real = getattr(model, name)

        def call(*arguments: object) -> object:
            kept = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
            calls.append((name, tuple(kept)))
            return real(*arguments)

        return call

    for name in ("fill_states", "extend", "project"):
        setattr(model, name, recorded(name))
    try:
        run()
    finally:
        for name in ("fill_states", "extend", "project"):
            delattr(model, name)

    def replay() -> None:
        with torch.no_grad():
            for name, arguments in calls:
                getattr(model, name)(*arguments)

    return replay


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("block_causal", [False, True], ids=["bidirectional", "block-causal"])
def test_block_diffusion(block_causal: bool, batch: int, device: str, compare: Callable) -> None:
    model = model_of(BLOCK if block_causal else None, device)
    prompts = torch.randint(5, V, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).to(device)
    with torch.no_grad():
        model.output_weight[model.eos_id] = 0  # texts of full length, so that all do the same work

    def ours(cached: bool = True) -> Tensor:
        strategy = BlockDiffusion(max_length=NEW, block_length=BLOCK, policy="quota", steps=STEPS, prefix_cache=cached)
        return decode(model, prompts, strategy).tokens[:, 0]

    if batch == 1:  # on one thread or another, sums differ in their last bits and equal confidences change places
        assert torch.equal(ours(), published(model, prompts))
    assert ours().shape == (batch, NEW)
    peers = {"published loop": lambda: published(model, prompts)}
    if block_causal:
        peers["ours, no prefix cache"] = lambda: ours(cached=False)
    compare(
        "block_diffusion",
        f"B{batch} {PROMPT}+{NEW} {'block-causal' if block_causal else 'bidirectional'}",
        ours,
        peers=peers,
        floor=("model alone", model_alone(model, ours)),
    )
