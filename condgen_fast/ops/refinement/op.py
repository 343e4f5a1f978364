"""Row statistics, re-masking and committing: the public functions, their checks and their fakes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from condgen_fast import _library
from condgen_fast._check import check_choice, check_number, check_tensor
from condgen_fast.ops.refinement import reference
from condgen_fast.ops.refinement.reference import Commit, RowStats

__all__ = ["Commit", "RowStats", "commit", "remask", "row_stats"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# policy -> how the compiled op counts (0: as many as asked for, 1: those that reach the bound, 2: sums of entropies),
# and the statistic it ranks by
_POLICIES = {
    "quota": (0, "log_prob"),
    "threshold": (1, "log_prob"),
    "entropy": (2, "entropy"),
    "margin": (1, "margin"),
}


def row_stats(
    logits: Tensor,  # [..., V]
    *,
    temperature: float | Tensor = 0.0,  # number or [...]
    generator: torch.Generator | None = None,
    rows: Tensor | None = None,  # [M]
    noise_rows: Tensor | None = None,  # [...] or [M]
    impl: str = "auto",
) -> RowStats:
    """Choose a token for each row of logits, and say how sure its distribution is.

    The distribution is p = softmax(logits), at temperature 1, for ``log_prob``, ``margin`` and ``entropy`` alike: they
    are the model's own confidence and compare across temperatures. ``temperature`` only governs the choice: 0 takes
    the most probable token (ties: the lowest), more draws from softmax(logits / temperature) by the Gumbel-max trick
    (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030), whose noise is that of a chunk of 2048 logits: the maximum of
    such a chunk is a Gumbel variable at its log-sum-exp, so that one number decides between two chunks.

    NaN counts as -inf, +inf as the largest finite float32. A row of -inf alone has no distribution: token 0, log_prob
    -inf, margin 0, entropy 0. With V = 1 the second-highest probability is 0. Computed in float32; no gradient flows.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, V at least 1.
        temperature: finite and at least 0, or a float tensor of the shape of the results, a temperature for each row;
            in a tensor what is not above 0 means 0, and +inf is an error on the CPU (undefined elsewhere).
        generator: where the seed of the draws comes from, advanced by one; None: torch's global generator. The noise
            is a function of (seed, row, chunk of columns): a row draws the same whichever rows are asked for beside
            it, and all implementations draw the same up to the rounding of float32.
        rows: [M] int64, which rows to read, indices into the flattened leading dimensions, in any order, repeats
            allowed; None: all. An index out of range is an error on the CPU; elsewhere its row counts as one of -inf.
        noise_rows: int64 of the shape of the results: what the noise takes for the row of a logit, so that a caller can
            make draws independent of where a row stands; equal numbers draw equal noise. None: the row's index.
        impl: "auto" (compiled on the CPU, Triton on a GPU), "reference" or "triton".

    Returns:
        RowStats(token int64, log_prob, margin, entropy float32, best int64), each [...], or [M] with ``rows``. ``best``
        is the most probable token, ``token`` the one chosen, to which ``log_prob`` belongs.

    Raises:
        ValueError: a wrong shape, dtype, device, choice or number.

    Equivalent to, at temperature 0: ``p = logits.softmax(-1); top = p.topk(2).values; RowStats(p.argmax(-1),
    p.amax(-1).log(), top[..., 0] - top[..., 1], torch.special.entr(p).sum(-1), p.argmax(-1))``.
    """
    if generator is None and _is_plain(logits, temperature, rows, noise_rows, impl):
        shape = logits.shape[:-1]
        flat = logits if logits.dim() == 2 else logits.flatten(0, -2)
        token, *values, _ = torch.ops.condgen_fast.row_stats(flat, None, None, None, None)
        if logits.dim() != 2:
            token, *values = (value.view(shape) for value in (token, *values))
        return RowStats(token, *values, token)
    check_choice(impl, "impl", ("auto", "reference", "triton"))
    check_tensor(logits, "logits", shape="... V", dtypes=_FLOATS)
    width = logits.shape[-1]
    if width == 0:
        raise ValueError("logits must have V at least 1; got 0")
    shape = logits.shape[:-1]
    if rows is not None:
        check_tensor(rows, "rows", shape="M", dtypes=(torch.int64,), device=logits.device)
        shape = rows.shape
    temperatures = seed = None
    if isinstance(temperature, Tensor):
        check_tensor(temperature, "temperature", shape="...", dtypes=_FLOATS, device=logits.device)
        _check_shape(temperature, "temperature", shape)
        temperatures = temperature.reshape(-1).float()
    else:
        check_number(temperature, "temperature", minimum=0.0, maximum=torch.finfo(torch.float32).max)
        if temperature > 0:
            temperatures = torch.full((1,), temperature, dtype=torch.float32, device=logits.device)
    if noise_rows is not None:
        check_tensor(noise_rows, "noise_rows", shape="...", dtypes=(torch.int64,), device=logits.device)
        _check_shape(noise_rows, "noise_rows", shape)
        noise_rows = noise_rows.reshape(-1)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}")
    if temperatures is not None:
        device = logits.device if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (1,), generator=generator, device=device).to(logits.device)

    flat = logits.detach().reshape(-1, width)
    if impl == "reference":
        stats = reference.row_stats(flat, rows, temperatures, seed, noise_rows)
    elif impl == "triton" or logits.device.type == "cuda":
        from condgen_fast.ops.refinement import triton_kernel

        stats = triton_kernel.row_stats(flat, rows, temperatures, seed, noise_rows)
    else:
        _library.require(logits.device)
        stats = torch.ops.condgen_fast.row_stats(flat, rows, temperatures, seed, noise_rows)
    token, log_prob, margin, entropy = (value.view(shape) for value in stats[:4])
    return RowStats(token, log_prob, margin, entropy, token if temperatures is None else stats[4].view(shape))


def _is_plain(
    logits: Tensor, temperature: float | Tensor, rows: Tensor | None, noise_rows: Tensor | None, impl: str
) -> bool:
    """Whether this is the most probable token of all rows on the CPU, where checks take longer than a few rows."""
    return (
        isinstance(logits, Tensor)
        and logits.dtype in _FLOATS
        and logits.dim() >= 2
        and logits.shape[-1] > 0
        and logits.device.type == "cpu"
        and not logits.requires_grad
        and type(temperature) in (int, float)
        and temperature == 0
        and rows is None
        and noise_rows is None
        and impl == "auto"
        and _library.load()
    )


def remask(
    scores: Tensor,  # [B, T]
    count: Tensor,  # [B]
    *,
    maskable: Tensor,  # [B, T]
    impl: str = "auto",
) -> Tensor:
    """Choose in each row the ``count[b]`` maskable positions of lowest score, ties going to the lower position.

    NaN counts as -inf: what has no confidence goes first. A count above the number of maskable positions takes them
    all, a count below 1 none.

    Args:
        scores: [B, T] of any float dtype, compared as float32; such as log-probabilities, read only where ``maskable``.
        count: [B] int64.
        maskable: [B, T] bool; false on bos, eos, padding and whatever was given.
        impl: "auto" (compiled, on the tensors' device) or "reference".

    Returns:
        [B, T] bool, a subset of ``maskable``.

    Raises:
        ValueError: a wrong shape, dtype, device or choice.

    Source: the selection of Mask-Predict (Ghazvininejad et al. 2019, arXiv:1904.09324, section 3.2), ties defined.
    Equivalent to: ``scores.masked_fill(~maskable, inf).argsort(1, stable=True).argsort(1) < count[:, None]``, for
    counts up to the number maskable.
    """
    check_choice(impl, "impl", ("auto", "reference"))
    sizes = check_tensor(scores, "scores", shape="B T", dtypes=_FLOATS)
    check_tensor(count, "count", shape="B", dtypes=(torch.int64,), device=scores.device, sizes=sizes)
    check_tensor(maskable, "maskable", shape="B T", dtypes=(torch.bool,), device=scores.device, sizes=sizes)
    scores = scores.detach().float()
    if impl == "reference":
        return reference.remask(scores, count, maskable)
    _library.require(scores.device)
    return torch.ops.condgen_fast.remask(scores, count, maskable)


def commit(
    stats: RowStats,  # each [B, T]
    canvas: Tensor,  # [B, T]
    *,
    maskable: Tensor,  # [B, T]
    policy: str,
    quota: int | Tensor | None = None,  # number or [B]
    threshold: float | Tensor | None = None,  # number or [B]
    minimum: int | Tensor = 1,  # number or [B]
    active: Tensor | None = None,  # [B]
    impl: str = "auto",
) -> Commit:
    """Write the surest tokens of ``stats`` to the canvas, in each row as many as the policy allows.

    ========= ============ =====================================================================================
    policy    surest first commits
    ========= ============ =====================================================================================
    quota     log_prob     ``quota[b]`` positions (LLaDA, Nie et al. 2025, arXiv:2502.09992)
    threshold log_prob     those of probability at least ``threshold[b]`` (Fast-dLLM, Wu et al. 2025, arXiv:2505.22618)
    margin    margin       those of margin at least ``threshold[b]`` (Kim et al. 2025, arXiv:2502.06768)
    entropy   low entropy  the most whose entropies, all but the largest of them, sum to at most ``threshold[b]`` nats
                           (EB-Sampler, Ben-Hamu et al. 2025, arXiv:2505.24857)
    ========= ============ =====================================================================================

    The last three commit at least the ``minimum[b]`` surest, so that decoding ends; "quota" does not read ``minimum``.
    Ties go to the lower position. More than are maskable means all that are, less than 1 none. A NaN statistic is the
    least sure of all. Entropies are added in units of 2^-32 nats, so that all implementations agree to the last
    position.

    Args:
        stats: of ``row_stats(logits [B, T, V])``; of log_prob, margin and entropy only the one named above is read.
        canvas: [B, T] int64 or int32; not changed.
        maskable: [B, T] bool, the positions that may be written: still masked and not given, as in
            ``(canvas == mask_id) & ~prompt``.
        policy: "quota", "threshold", "entropy" or "margin".
        quota: for "quota" alone, a number of positions or [B] int64.
        threshold: for the other three, a number or [B] float32.
        minimum: a number of positions or [B] int64.
        active: [B] bool, rows that take part; nothing is committed in others. None: all.
        impl: "auto" (compiled, on the tensors' device) or "reference".

    Returns:
        Commit(tokens [B, T] of the canvas's dtype, committed [B, T] bool, a subset of ``maskable``).

    Raises:
        ValueError: a wrong shape, dtype, device, choice or number; ``quota`` or ``threshold`` missing, or given to a
            policy that does not read it.

    Equivalent to, for "quota": ``remask(-stats.log_prob, quota, maskable=maskable)``, then
    ``torch.where(committed, stats.token, canvas)``.
    """
    check_choice(impl, "impl", ("auto", "reference"))
    check_choice(policy, "policy", tuple(_POLICIES))
    kind, field = _POLICIES[policy]
    sizes = check_tensor(canvas, "canvas", shape="B T", dtypes=(torch.int64, torch.int32))
    device = canvas.device
    if not isinstance(stats, tuple) or not hasattr(stats, "_fields"):
        raise TypeError(f"stats must be a RowStats; got {type(stats).__name__}")
    ranking = getattr(stats, field)
    for value, name, dtypes in (
        (stats.token, "stats.token", (torch.int64,)),
        (ranking, f"stats.{field}", _FLOATS),
        (maskable, "maskable", (torch.bool,)),
    ):
        # check_tensor says what is wrong, and takes as long as the rest of the call
        fits = isinstance(value, Tensor) and value.shape == canvas.shape
        if not fits or value.dtype not in dtypes or value.device != device:
            check_tensor(value, name, shape="B T", dtypes=dtypes, device=device, sizes=sizes)
    if active is not None:
        check_tensor(active, "active", shape="B", dtypes=(torch.bool,), device=device, sizes=sizes)
    if (quota is None) == (policy == "quota"):
        wanted, got = ("given", "None") if quota is None else ("None", quota)
        raise ValueError(f"quota must be {wanted} for policy {policy!r}; got {got}")
    if (threshold is None) == (policy != "quota"):
        wanted, got = ("given", "None") if threshold is None else ("None", threshold)
        raise ValueError(f"threshold must be {wanted} for policy {policy!r}; got {got}")
    name = "minimum" if quota is None else "quota"
    at_least, least = _per_row(minimum if quota is None else quota, name, torch.int64, sizes, device)
    bound, limit = None, 0.0
    if threshold is not None:
        bound, limit = _per_row(threshold, "threshold", torch.float32, sizes, device)
        if policy == "threshold":
            bound = None if bound is None else bound.double().log().float()
            limit = math.log(limit) if limit > 0 else -math.inf

    if ranking.dtype != torch.float32 or ranking.requires_grad:
        ranking = ranking.detach().float()
    arguments = (stats.token, ranking, canvas, maskable, at_least, bound, active, least, limit, kind)
    if impl == "reference":
        return reference.commit(*arguments)
    _library.require(device)
    return Commit(*torch.ops.condgen_fast.commit(*arguments))


def _check_shape(value: Tensor, name: str, shape: torch.Size) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}; got {list(value.shape)}")


def _per_row(
    value: float | Tensor, name: str, dtype: torch.dtype, sizes: dict[str, int], device: torch.device
) -> tuple[Tensor | None, float]:
    """A value for each row, or one for all."""
    if isinstance(value, Tensor):
        check_tensor(value, name, shape="B", dtypes=(dtype,), device=device, sizes=sizes)
        return value, 0
    check_number(value, name, minimum=0, integer=dtype == torch.int64)
    return None, value


@_library.register_fake("row_stats")
def _(logits, rows, temperature, seed, noise_rows=None):
    shape = logits.shape[:1] if rows is None else rows.shape
    floats = [logits.new_empty(shape, dtype=torch.float32) for _ in range(3)]
    best = logits.new_empty((0,) if temperature is None else shape, dtype=torch.int64)
    return (logits.new_empty(shape, dtype=torch.int64), *floats, best)


@_library.register_fake("remask")
def _(scores, count, maskable):
    return maskable.new_empty(maskable.shape)


@_library.register_fake("commit")
def _(token, ranking, canvas, maskable, minimum, bound, active, least, limit, policy):
    return canvas.new_empty(canvas.shape), maskable.new_empty(maskable.shape)
