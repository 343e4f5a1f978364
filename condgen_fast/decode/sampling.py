"""Ancestral sampling, with temperature, top-k and top-p (nucleus) truncation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from condgen_fast._check import check_number
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.left_to_right import check_lengths, end_ids, generate, never_generated
from condgen_fast.decode.protocols import StepModel


@dataclass(frozen=True)
class Sampling:
    """Draw every token from softmax(logits / temperature), cut to the `top_k` most probable tokens and of these to the
    fewest whose probabilities reach `top_p` (Fan et al. 2018; Holtzman et al. 2020).

    temperature     > 0; 1 samples from the model
    top_k           None: no cut
    top_p           in (0, 1]; the token that crosses it is kept
    n_samples       hypotheses a sentence, drawn independently, returned by score
    seed            the draws; None: from torch's global generator, so that `torch.manual_seed` governs them
    generator       a torch.Generator to take the seed from, advanced by one draw a call; not beside `seed`
    min_length, max_length, length_penalty   as in `Greedy`
    trace           record the best sample's tokens in `Hypotheses.trace`

    A draw depends on the seed, the sentence's own source tokens, the number of the sample and the step, and on nothing
    else: a sentence has the same samples in any batch, order and padding, and equal sentences have equal samples.
    The log-probabilities are the model's own, at temperature 1 and without the cuts, so that they compare with those of
    other strategies. pad and bos are never drawn.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    n_samples: int = 1
    seed: int | None = None
    generator: torch.Generator | None = None
    min_length: int = 0
    max_length: int | None = None
    length_penalty: float = 1.0
    trace: bool = False

    model_protocol: ClassVar[type] = StepModel

    def __post_init__(self) -> None:
        check_number(self.temperature, "temperature", minimum=0.0, exclusive=True)
        check_number(self.top_p, "top_p", minimum=0.0, maximum=1.0)
        if self.top_p == 0:
            raise ValueError("top_p must be in (0, 1]; got 0")
        if self.top_k is not None:
            check_number(self.top_k, "top_k", minimum=1, integer=True)
        check_number(self.n_samples, "n_samples", minimum=1, integer=True)
        if self.seed is not None:
            check_number(self.seed, "seed", minimum=0, maximum=2**63 - 1, integer=True)
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator; got {type(self.generator).__name__}")
        if self.seed is not None and self.generator is not None:
            raise ValueError("seed must be None where a generator is given; got both")
        check_lengths(self.min_length, self.max_length, self.length_penalty)

    @property
    def n_best(self) -> int:
        return self.n_samples

    def run(self, model: StepModel, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        never, ends = never_generated(model), end_ids(model)
        keys = random_keys(source, source_lengths, self.n_samples, self.seed, self.generator)

        def choose(logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
            banned = never + ends * (step + 1 < self.min_length)
            return self._draw(logits.float(), banned, uniform(mixed(keys[rows] + step)), model.eos_id)

        return generate(
            model,
            source,
            source_lengths,
            choose=choose,
            n=self.n_samples,
            max_length=self.max_length,
            length_penalty=self.length_penalty,
        )

    def _draw(self, logits: Tensor, banned: list[int], uniform: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
        logits = torch.where(logits.isnan(), -torch.inf, logits)
        allowed = logits / self.temperature
        for token in banned:
            allowed[..., token] = -torch.inf
        order = None
        if self.top_k is not None or self.top_p < 1:
            # a stable sort, so that ties go to the lower token
            allowed, order = allowed.sort(dim=-1, descending=True, stable=True)
            if self.top_k is not None:
                allowed, order = allowed[..., : self.top_k], order[..., : self.top_k]
        cumulative = allowed.softmax(-1).double().cumsum(-1)
        total = cumulative[..., -1:]
        if self.top_p < 1:
            # up to and with the token that crosses top_p
            crossing = (cumulative < self.top_p * total).sum(-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
            total = cumulative.gather(-1, crossing)
        # the first token whose cumulative probability exceeds the draw: never one of probability 0
        place = torch.searchsorted(cumulative, uniform[..., None] * total, right=True)
        place = place.clamp(max=cumulative.shape[-1] - 1)
        tokens = (place if order is None else order.gather(-1, place))[..., 0]
        nothing = ~(total[..., 0] > 0)
        tokens = tokens.masked_fill(nothing, eos_id)
        log_probs = logits.gather(-1, tokens[..., None])[..., 0] - torch.logsumexp(logits, -1)
        return tokens, log_probs.masked_fill(nothing, -torch.inf)


def random_keys(
    source: Tensor, source_lengths: Tensor, n: int, seed: int | None, generator: torch.Generator | None
) -> Tensor:
    """A stream of random numbers for each of n draws of each sentence, [B, n] int64."""
    device = source.device
    if seed is not None:
        first = torch.full((), seed, dtype=torch.int64, device=device)
    else:
        at = generator.device if generator is not None else device
        first = torch.randint(2**62, (), generator=generator, device=at).to(device)
    positions = torch.arange(source.shape[1], device=device)
    inside = positions < source_lengths[:, None]
    sentence = torch.where(inside, mixed(source + mixed(positions)), 0).sum(1)
    return mixed(mixed(sentence + mixed(first))[:, None] + torch.arange(n, device=device))


def mixed(x: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014) on int64 that wraps around."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; int64's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(x: Tensor) -> Tensor:
    """The upper 53 bits as float64 in [0, 1); uniform * total rounds to less than total."""
    return _shifted(x, 11).double() * 2.0**-53
