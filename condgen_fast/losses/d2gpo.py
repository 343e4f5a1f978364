"""The data-dependent Gaussian prior objective, D2GPo (Li et al. 2020, arXiv:2007.04820), as a LabelPrior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen_fast._check import check_choice, check_number, check_tensor
from condgen_fast.ops import LabelPrior, kd_loss

SHAPES = ("gaussian", "linear", "cosine")


def rank_table(
    embeddings: Tensor,  # [V, D]
    width: int,
    *,
    unlisted: Sequence[int] = (),
    block_rows: int = 1024,
) -> Tensor:  # [V, width] int64
    """The `width` tokens most similar to each token by the cosine of their embeddings, itself first.

    `unlisted` tokens (padding and the like) come after all others, but stand first in their own row. The order of
    equally similar tokens is not specified. Memory: O(V * width + block_rows * V), never V x V.
    """
    vocab_size = check_tensor(embeddings, "embeddings", shape="V D", dtypes=(torch.float32, torch.float64))["V"]
    check_number(width, "width", minimum=1, maximum=vocab_size, integer=True)
    check_number(block_rows, "block_rows", minimum=1, integer=True)
    if not bool(embeddings.isfinite().all()):
        raise ValueError("embeddings must be finite; got NaN or infinity")
    directions = F.normalize(embeddings.detach(), dim=-1)
    table = torch.empty(vocab_size, width, dtype=torch.int64, device=embeddings.device)
    for first in range(0, vocab_size, block_rows):
        similarity = directions[first : first + block_rows] @ directions.T
        similarity[:, list(unlisted)] = -2.0
        similarity.diagonal(first).fill_(2.0)  # above every cosine: rounding and equal vectors do not displace it
        table[first : first + block_rows] = similarity.topk(width).indices
    return table


def rank_weights(
    width: int, *, shape: str = "gaussian", sigma: float = 1.0, temperature: float = 2.0, truncate: bool = False
) -> tuple[Tensor, float]:
    """Weights [width] float64 of the ranks 0, 1, … and of every other token, up to a common factor: exp(f(rank) / T).

    f is the density of a normal distribution of standard deviation `sigma` ("gaussian"), 1 - rank / width ("linear")
    or cos(pi / 2 * rank / width) ("cosine"), and 0 beyond `width`. The others have exp(0), which makes q the softmax
    over the whole vocabulary, or 0 with `truncate`, over the listed tokens alone.
    """
    check_choice(shape, "shape", SHAPES)
    check_number(sigma, "sigma", minimum=0, exclusive=True)
    check_number(temperature, "temperature", minimum=0, exclusive=True)
    rank = torch.arange(width, dtype=torch.float64)
    if shape == "gaussian":
        f = torch.exp(-((rank / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
    elif shape == "linear":
        f = 1 - rank / width
    else:
        f = torch.cos(math.pi / 2 * rank / width)
    # relative to rank 0: a small temperature would overflow
    return ((f - f[0]) / temperature).exp(), 0.0 if truncate else math.exp(-f[0].item() / temperature)


def d2gpo_prior(
    embeddings: Tensor,  # [V, D]
    *,
    width: int = 200,
    shape: str = "gaussian",
    sigma: float = 1.0,
    temperature: float = 2.0,
    truncate: bool = False,
    unlisted: Sequence[int] = (),
) -> LabelPrior:
    """The prior of each label over the vocabulary: the ids of `rank_table` with the weights of `rank_weights`.

    The published script lists all V ranks, which a Gaussian of sigma 1 does not need: it is 0 in float32 from rank 14
    on. At sigma 1 and T = 2 the prior is nearly uniform: the label has 1.22 times the probability of a tail token.
    """
    ids = rank_table(embeddings, min(width, len(embeddings)), unlisted=unlisted)
    weights, floor = rank_weights(ids.shape[1], shape=shape, sigma=sigma, temperature=temperature, truncate=truncate)
    return LabelPrior(ids, weights.float().to(ids.device), floor)


def label_smoothing_prior(vocab_size: int, epsilon: float, *, device: torch.device | str = "cpu") -> LabelPrior:
    """Label smoothing as a LabelPrior: the label has 1 - epsilon + epsilon / V, every other token epsilon / V.

    `kd_loss(logits, prior, labels, alpha=1, divergence="cross_entropy")` then is
    `F.cross_entropy(logits, labels, label_smoothing=epsilon)`.
    """
    check_number(epsilon, "epsilon", minimum=0, maximum=1)
    ids = torch.arange(vocab_size, device=device)[:, None]
    rest = epsilon / vocab_size
    return LabelPrior(ids, torch.tensor([1 - epsilon + rest], device=device), rest)


def d2gpo_loss(
    logits: Tensor,  # [..., V]
    prior: LabelPrior,
    labels: Tensor,  # [...]
    *,
    alpha: float = 0.1,
    temperature: float = 2.0,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
) -> Tensor:
    """(1 - alpha) * NLL + alpha * T**2 * KL(q || p), the mean over labels; T is the prior's, p has none.

    As in the published code, where lambda of the paper's `L_MLE + lambda * KL` is alpha * T**2 / (1 - alpha). One call
    of kd_loss: a convex combination times its sum.
    """
    check_number(alpha, "alpha", minimum=0, maximum=1)
    check_number(temperature, "temperature", minimum=0, exclusive=True)
    soft = alpha * temperature**2
    total = 1 - alpha + soft
    value = kd_loss(
        logits, prior, labels, alpha=soft / total, label_smoothing=label_smoothing, ignore_index=ignore_index
    )
    return total * value


def read_embeddings(path: str | Path, pieces: Sequence[str]) -> Tensor:
    """Vectors [V, D] of a vocabulary's pieces from a text file of `word2vec` or fastText: a piece, then its numbers.

    A first line of two numbers is taken for the header. Pieces that the file lacks get the same tiny vector, as in the
    published code. Raises ValueError for a line of another width or with NaN, and where no piece is found.
    """
    place = {piece: i for i, piece in enumerate(pieces)}
    found: dict[int, Tensor] = {}
    width = None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            piece, *values = line.rstrip().split(" ")
            if number == 1 and len(values) == 1:
                continue
            width = len(values) if width is None else width
            try:
                vector = torch.tensor([float(value) for value in values])
            except ValueError:
                raise ValueError(f"{path}, line {number}: must be a piece and {width} numbers") from None
            if len(values) != width:
                raise ValueError(f"{path}, line {number}: must have {width} numbers; got {len(values)}")
            if not bool(vector.isfinite().all()):
                raise ValueError(f"{path}, line {number}: must have finite numbers")
            if piece in place:
                found[place[piece]] = vector
    if not found:
        raise ValueError(f"{path} has no vector of any piece of the vocabulary")
    embeddings = torch.full((len(pieces), width), 1e-6)
    for i, vector in found.items():
        embeddings[i] = vector
    return embeddings
