"""Noise on sentences for training: the public functions, their reference and their fake."""

from __future__ import annotations

import torch
from torch import Tensor

from condgen_fast import _library
from condgen_fast._check import check_choice, check_number, check_token_ids
from condgen_fast.ops.levenshtein.op import IMPLS, check_id
from condgen_fast.ops.levenshtein.reference import unpadded_rows

__all__ = ["random_delete", "random_mask", "random_shuffle"]

_DELETE, _MASK, _SHUFFLE = range(3)


def random_delete(
    tokens: Tensor,  # [B, T]
    *,
    pad_id: int,
    bos_id: int,
    eos_id: int,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> Tensor:
    """Delete, in each row, a number uniform in 1 … N of its N tokens that are neither bos nor eos, at random places.

    The noise of Levenshtein Transformer training: every subset of a size has the same chance, and keeping all has none
    (Gu et al. 2019, arXiv:1905.11006, section 4.1, as published in code).

    Args:
        tokens: [B, T] int64 or int32, right-padded.
        pad_id, bos_id, eos_id: bos and eos stay wherever they stand.
        generator: of the tokens' device; one number is drawn from it. Rows differ by their place in the batch; the same
            number gives the same result on CPU and GPU.
        impl: "auto" (compiled, on the tensors' device) or "reference".

    Returns:
        [B, T], right-padded: the width stays, so nothing has to wait for a GPU.

    Raises:
        ValueError: a wrong shape, dtype or number; on the CPU also padding before a token.

    Equivalent to: ``tokens[b][keep]`` with ``keep`` false at ``torch.randperm(N)[: torch.randint(1, N + 1, ())]``.
    """
    return _noise(tokens, _DELETE, generator, impl, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id)


def random_mask(
    tokens: Tensor,  # [B, T]
    *,
    pad_id: int,
    bos_id: int,
    eos_id: int,
    mask_id: int,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> Tensor:
    """Mask, in each row, a number uniform in 1 … N of its N tokens that are neither bos nor eos, at random places.

    Arguments, result and errors as of ``random_delete``, which would delete the tokens that are masked here from the
    same seed. The noise of the conditional masked language model (Ghazvininejad et al. 2019, arXiv:1904.09324).

    Equivalent to: ``tokens[b].masked_fill(chosen, mask_id)``, ``chosen`` as in ``random_delete``.
    """
    return _noise(tokens, _MASK, generator, impl, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id, mask_id=mask_id)


def random_shuffle(
    tokens: Tensor,  # [B, T]
    *,
    pad_id: int,
    bos_id: int,
    eos_id: int,
    distance: int | None = 3,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> Tensor:
    """Permute the tokens of each row between a leading bos and a trailing eos.

    Args:
        tokens, pad_id, bos_id, eos_id, generator, impl: as of ``random_delete``.
        distance: no token moves farther: tokens are sorted by place + u, u uniform in [0, distance + 1) (Lample et al.
            2018, arXiv:1711.00043, section 2.3). None: any permutation, all with the same chance.

    Returns:
        [B, T].

    Raises:
        ValueError: a wrong shape, dtype or number; on the CPU also padding before a token.

    Equivalent to: ``inner[(torch.arange(N) + torch.rand(N) * (distance + 1)).argsort()]``.
    """
    if distance is not None:
        check_number(distance, "distance", minimum=0, maximum=2**30, integer=True)
    reach = -1 if distance is None else distance
    return _noise(tokens, _SHUFFLE, generator, impl, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id, distance=reach)


def _noise(
    tokens: Tensor,
    kind: int,
    generator: torch.Generator | None,
    impl: str,
    *,
    pad_id: int,
    bos_id: int,
    eos_id: int,
    mask_id: int | None = None,
    distance: int = 0,
) -> Tensor:
    check_choice(impl, "impl", IMPLS)
    check_token_ids(tokens, "tokens", shape="B T")
    ids = {"pad_id": pad_id, "bos_id": bos_id, "eos_id": eos_id} | ({"mask_id": mask_id} if kind == _MASK else {})
    for name, value in ids.items():
        check_id(value, name, tokens.dtype)
        if value == pad_id and name != "pad_id":
            raise ValueError(f"{name} must differ from pad_id; got {value} for both")
    if impl == "auto":
        _library.require(tokens.device)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=tokens.device)
    if impl == "reference":
        rows = unpadded_rows(tokens, pad_id, "tokens")
        out = torch.full_like(tokens, pad_id)
        for b, row in enumerate(rows):
            draws = _Draws(int(seed), b)
            shuffled = kind == _SHUFFLE
            noisy = _shuffled(row, draws, bos_id, eos_id, distance) if shuffled else _dropped(row, draws, ids, kind)
            out[b, : len(noisy)] = torch.tensor(noisy, dtype=tokens.dtype)
        return out
    mask_id = 0 if mask_id is None else mask_id
    return torch.ops.condgen_fast.random_noise.default(tokens, seed, kind, pad_id, bos_id, eos_id, mask_id, distance)


class _Draws:
    """Numbers uniform in [0, 2^32), each a hash of the seed, the row and its own number (SplitMix64)."""

    def __init__(self, seed: int, row: int) -> None:
        self.key = _mix(_mix(seed) + row)

    def __call__(self, number: int) -> int:
        return _mix(self.key + 0x9E3779B97F4A7C15 * (number + 1)) >> 32

    def below(self, number: int, bound: int) -> int:
        return self(number) * bound >> 32


def _mix(z: int) -> int:
    z %= 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def _dropped(row: list[int], draws: _Draws, ids: dict[str, int], kind: int) -> list[int]:
    special = (ids["bos_id"], ids["eos_id"])
    left = sum(token not in special for token in row)
    wanted = 1 + draws.below(0, left) if left else 0
    out = []
    for i, token in enumerate(row):
        dropped = token not in special and draws.below(1 + i, left) < wanted
        left -= token not in special
        wanted -= dropped
        if not dropped:
            out.append(token)
        elif kind == _MASK:
            out.append(ids["mask_id"])
    return out


def _shuffled(row: list[int], draws: _Draws, bos_id: int, eos_id: int, distance: int) -> list[int]:
    begin = int(bool(row) and row[0] == bos_id)
    end = len(row) - (len(row) > begin and row[-1] == eos_id)
    inner = row[begin:end]
    if distance < 0:  # Fisher and Yates
        for i in range(len(inner) - 1, 0, -1):
            other = draws.below(i, i + 1)
            inner[i], inner[other] = inner[other], inner[i]
    else:
        order = sorted(range(len(inner)), key=lambda i: (i << 32) + draws(i) * (distance + 1))
        inner = [inner[i] for i in order]
    return row[:begin] + inner + row[end:]


@_library.register_fake("random_noise")
def _(tokens, seed, kind, pad_id, bos_id, eos_id, mask_id, distance):
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)
