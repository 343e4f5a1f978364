"""Teachers that are not a tensor of logits: a few listed tokens a row, and a distribution looked up by the label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from condgen_fast._check import check_choice, check_number, check_tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ID_DTYPES = (torch.int64, torch.int32)
TAILS = ("drop", "uniform", "renormalise")


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher known by its k most probable tokens in every row, as stored offline or sent by a server.

    ``tail`` says where the mass ``rest = 1 - sum(exp(log_probs))`` of the tokens that are not listed goes:

    - "drop": it belongs to no token. The listed tokens keep their probabilities, all others have 0, and the teacher
      sums to less than one. (At another temperature the rest is tempered as one more outcome outside the vocabulary.)
    - "uniform": every token that is not listed gets ``rest / (V - k)``.
    - "renormalise": the listed probabilities are divided by their sum, all others are 0.

    With all V tokens listed the three agree with the dense teacher, at every temperature. Where the teacher is 0 and
    the student is not, ``reverse_kl`` is infinite: it wants "uniform". ``jsd`` and ``tvd`` are finite with each.

    Args:
        ids: [..., k] int64 or int32, distinct within a row.
        log_probs: [..., k] floating, log-probabilities of the teacher at temperature 1; -inf is legal.
        tail: "drop", "uniform" or "renormalise".

    Raises:
        ValueError: shapes or dtypes do not fit, or an unknown tail.
    """

    ids: Tensor  # [..., k]
    log_probs: Tensor  # [..., k]
    tail: str = "drop"

    def __post_init__(self) -> None:
        if check_tensor(self.ids, "ids", shape="... k", dtypes=ID_DTYPES)["k"] == 0:
            raise ValueError(f"ids must list at least one token a row; got shape {list(self.ids.shape)}")
        check_tensor(self.log_probs, "log_probs", shape="... k", dtypes=FLOAT_DTYPES, device=self.ids.device)
        check_choice(self.tail, "tail", TAILS)
        if self.ids.shape != self.log_probs.shape:
            raise ValueError(f"log_probs must have shape {list(self.ids.shape)}; got {list(self.log_probs.shape)}")


@dataclass(frozen=True, eq=False)
class LabelPrior:
    """A teacher that depends on the label alone: row ``labels[n]`` of a table of V distributions.

    Token ``ids[y, r]`` has the probability ``weights[r]`` (or ``weights[y, r]``) given label y, every token that is not
    listed has ``floor``; they are divided by their sum, so any positive scale will do. This is the data-dependent
    Gaussian prior of D2GPo (Li et al. 2020, arXiv:2007.04820) without its V x V matrix. With
    ``ids = arange(V)[:, None]``, ``weights = [1 - eps + eps / V]`` and ``floor = eps / V`` it is label smoothing.

    Args:
        ids: [V, k] int64 or int32, distinct within a row.
        weights: [k] or [V, k] floating, not negative.
        floor: probability of a token that is not listed, not negative.

    Raises:
        ValueError: shapes or dtypes do not fit, a negative weight or floor, no mass at all; on the CPU also ids out of
            range or twice in a row.
    """

    ids: Tensor  # [V, k]
    weights: Tensor  # [k] or [V, k]
    floor: float = 0.0

    def __post_init__(self) -> None:
        sizes = check_tensor(self.ids, "ids", shape="V k", dtypes=ID_DTYPES)
        if sizes["k"] == 0:
            raise ValueError(f"ids must list at least one token a label; got shape {list(self.ids.shape)}")
        check_tensor(self.weights, "weights", shape="... k", dtypes=FLOAT_DTYPES, device=self.ids.device)
        check_number(self.floor, "floor", minimum=0)
        if self.weights.shape not in ((sizes["k"],), tuple(self.ids.shape)):
            raise ValueError(
                f"weights must have shape [{sizes['k']}] or {list(self.ids.shape)}; got {list(self.weights.shape)}"
            )
        if self.ids.device.type == "cpu" and not torch.compiler.is_compiling():
            check_listed_ids(self.ids, "ids", sizes["V"])
            if not bool((self.weights >= 0).all()):
                raise ValueError("weights must not be negative or NaN")
            if self.floor == 0 and not bool((self.weights.double().sum(-1) > 0).all()):
                raise ValueError("weights must have a positive sum where floor is 0")


def check_listed_ids(ids: Tensor, name: str, vocab_size: int) -> None:
    """Refuse ids outside [0, vocab_size) and ids that stand twice in a row of ``ids`` [..., k]."""
    if ids.numel() == 0:
        return
    ordered = ids.sort(dim=-1).values
    lowest, highest = int(ordered[..., 0].min()), int(ordered[..., -1].max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"{name} must be in [0, {vocab_size}); got {lowest if lowest < 0 else highest}")
    twice = ordered[..., 1:] == ordered[..., :-1]
    if bool(twice.any()):
        raise ValueError(f"{name} must be distinct within a row; got {int(ordered[..., 1:][twice][0])} twice")


def listed_distribution(
    teacher: TopK | LabelPrior, labels: Tensor | None, vocab_size: int, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The tempered teacher as ids [N, k], their probabilities [N, k] and the probability [N] of every other token."""
    if isinstance(teacher, LabelPrior):
        safe = labels.clamp(0, vocab_size - 1)
        ids = teacher.ids.index_select(0, safe)  # whole rows: faster than indexing
        listed = (teacher.weights if teacher.weights.dim() == 1 else teacher.weights[safe]).double().log()
        floor = torch.full_like(listed[..., :1], teacher.floor).log()
        others = vocab_size - ids.shape[-1]
        tail = "uniform" if others else "renormalise"
    else:
        ids = teacher.ids.reshape(-1, teacher.ids.shape[-1])
        listed = teacher.log_probs.double().reshape(ids.shape)  # 1 - sum cancels, and a high temperature magnifies that
        others = vocab_size - ids.shape[-1]
        tail = teacher.tail if others else "renormalise"
        rest = (-torch.expm1(listed.logsumexp(-1, keepdim=True))).clamp_min(0)
        floor = (rest / max(others, 1)).log() if tail == "uniform" else rest.log()

    # Besides the listed outcomes there are `others` tokens, one ghost outside the vocabulary, or none.
    listed, floor = listed / temperature, floor / temperature
    outcomes = {"uniform": others, "drop": 1, "renormalise": 0}[tail]
    everything = listed if outcomes == 0 else torch.cat([listed, floor + math.log(outcomes)], -1)
    normaliser = everything.logsumexp(-1, keepdim=True)
    normaliser = normaliser.masked_fill(normaliser == -torch.inf, 0)  # a row with no mass stays without
    probabilities = (listed - normaliser).exp().to(dtype).expand(ids.shape)
    floor = (floor - normaliser).exp() if tail == "uniform" else torch.zeros_like(normaliser)
    return ids.long(), probabilities, floor.to(dtype).squeeze(-1).expand(ids.shape[0])
