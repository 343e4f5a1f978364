"""When a beam search has finished a sentence, and whose rules decide it."""

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


@dataclass(frozen=True)
class Stop:
    """The rule of one search; called after each step.

    wanted   hypotheses that the finished list has to hold
    n_best   hypotheses that are returned
    """

    stopping: str
    wanted: int
    n_best: int
    min_length: int
    rising: bool  # norm(length) does not fall

    def __call__(self, finished: Tensor, best: Tensor, length: int, limits: Tensor, norms: Tensor) -> Tensor:
        """Sentences [R] that are finished after `length` tokens.

        finished [R, H] are the scores of their finished hypotheses, best first, `best` [R] their best unfinished sum.
        """
        over = (limits <= length) | (best == -torch.inf)
        full = finished[:, self.wanted - 1] > -torch.inf
        if self.stopping == "first":
            return over | full
        if self.stopping == "heuristic":
            return over | (full & (finished[:, self.wanted - 1] >= best / norms[length]))
        # Admissible: log-probabilities are at most 0, so what follows a kept hypothesis of sum c has a sum c' <= c <=
        # best <= 0, and ends at a length l with length < l <= limit and l >= min_length. norm is positive, so it scores
        # c' / norm(l) <= best / norm(l); and as best <= 0, that is greatest where norm(l) is. norm is l**a,
        # ((5+l)/6)**a or 1, monotone in l, rising for a >= 0 and falling for a < 0: greatest at the last or the first
        # of these l. Nothing above best / norm(that l) can follow, so the n_best stand once their last is not below it.
        # Perturbed sums (stochastic beams) may be positive, but are not divided, and no continuation has a higher one.
        if self.rising:
            most = norms[limits]
        else:
            most = norms[torch.clamp(limits, max=max(length + 1, self.min_length))]
        return over | (finished[:, self.n_best - 1] >= best / most)
