"""Whose rules a beam search follows, and what it divides sums by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STOPPING = ("exact", "heuristic", "first")


@dataclass(frozen=True)
class Rules:
    """In what the beam searches of other systems differ from ours.

    stopping        what they do where the user does not say
    choices         what they can do
    cut_at_limit    a hypothesis that has reached the limit is returned without eos; otherwise only eos may follow there
    overflow        of several hypotheses that end at once, those that the finished list has no room for: best keeps
                    the best of all, order those that come first by sum, room makes room for all
    allow_specials  pad and bos may be generated
    renormalise     what is banned leaves its probability to the others
    """

    stopping: str = "exact"
    choices: tuple[str, ...] = STOPPING
    cut_at_limit: bool = False
    overflow: str = "best"
    allow_specials: bool = False
    renormalise: bool = False


# Hugging Face: GenerationMixin._beam_search of transformers 4.50 to 5; fairseq: SequenceGenerator; CTranslate2:
# BeamSearch::search of 4.8. tests/decode/test_beam_compat.py holds them against these systems.
RULES = {
    None: Rules(),
    "hf": Rules(stopping="heuristic", cut_at_limit=True, allow_specials=True),
    "fairseq": Rules(stopping="first", choices=("first",), overflow="order"),
    "ctranslate2": Rules(
        stopping="first",
        choices=("first",),
        cut_at_limit=True,
        overflow="room",
        allow_specials=True,
        renormalise=True,
    ),
}


def norms(normalization: str, length_penalty: float, longest: int, device: torch.device) -> Tensor:
    """norm(length) for lengths 0 .. longest + 1, float32."""
    lengths = torch.arange(longest + 2, dtype=torch.float64, device=device)
    if normalization == "none" or length_penalty == 0:
        return torch.ones_like(lengths, dtype=torch.float32)
    base = lengths if normalization == "power" else (5 + lengths) / 6
    return (base**length_penalty).clamp(1e-30, 1e30).float()
