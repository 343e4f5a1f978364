"""Attention of one decoding step, of beams whose keys and values stay where they are: functions, checks, fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from condgen_fast._check import check_choice, check_tensor
from condgen_fast.ops.transformer import reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def target_attention(
    query: Tensor,  # [R, H, d]
    key: Tensor,  # [R, H, d]
    value: Tensor,  # [R, H, d]
    keys: Tensor,  # [C, H, T, d]
    values: Tensor,  # [C, H, T, d]
    places: Tensor,  # [R, T]
    position: Tensor,  # [1]
    *,
    impl: str = "auto",
) -> Tensor:
    """Store each beam's new key and value in the cache, and attend over its own tokens: [R, H, d], dtype of `query`.

    Beam r is row r of what is computed. Its token of an earlier position t lies in row `places[r, t]` of the cache, so
    that beams that part and join, or sentences that leave, change that table alone; its new token, of position
    `position`, is stored in row r, and `places[r, position]` becomes r. Nothing behind `position` is read, and on a GPU
    the work ends there. Sums are in float32 (float64 for float64); no gradient flows; nothing waits for the device.

    Args:
        query, key, value: [R, H, d], float32, bfloat16, float16 or float64.
        keys, values: [C, H, T, d] of the same dtype, C at least R, laid out alike, changed in place.
        places: [R, T] int32, changed in place; up to `position` in [0, C).
        position: [1] int32, in [0, T): checked on the CPU; elsewhere beyond T nothing is stored.
        impl: "auto" (Triton on a GPU, except for float64), "reference" or "triton".

    Raises:
        ValueError: a wrong shape, dtype, device, layout, choice, or position.

    Equivalent to, for each r and with ``t = arange(position + 1); k, v = keys[places[r, t], :, t], values[places[r, t],
    :, t]``: ``F.scaled_dot_product_attention(query[r, :, None], k.transpose(0, 1), v.transpose(0, 1))[:, 0]``.
    """
    check_choice(impl, "impl", ("auto", "reference", "triton"))
    sizes = check_tensor(query, "query", shape="R H d", dtypes=_FLOATS)
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(tensor, name, shape="R H d", dtypes=(query.dtype,), device=query.device, sizes=sizes)
    sizes = _check_cache(query, keys, values, sizes)
    check_tensor(places, "places", shape="R T", dtypes=(torch.int32,), device=query.device, sizes=sizes)
    check_tensor(position, "position", shape="1", dtypes=(torch.int32,), device=query.device)
    if sizes["C"] < sizes["R"]:
        raise ValueError(f"keys must have at least R={sizes['R']} rows; got {sizes['C']}")
    known = position.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and not 0 <= int(position) < sizes["T"]:
        raise ValueError(f"position must be in [0, {sizes['T']}); got {int(position)}")
    if places.stride(1) != 1:
        raise ValueError(f"places must be contiguous in its last dimension; got stride {places.stride(1)}")
    if _plain(impl, query):
        return reference.target_attention(query, key, value, keys, values, places, position)
    return torch.ops.condgen_fast.target_attention(query, key, value, keys, values, places, position)


def source_attention(
    query: Tensor,  # [B, K, H, d]
    keys: Tensor,  # [C, H, S, d]
    values: Tensor,  # [C, H, S, d]
    sources: Tensor,  # [B]
    lengths: Tensor,  # [C]
    *,
    impl: str = "auto",
) -> Tensor:
    """Attend with all beams of a sentence over its source, whose keys lie once: [B, K, H, d], dtype of `query`.

    Sentence b attends over the first `lengths[sources[b]]` positions of row `sources[b]`, so that sentences that leave
    the batch change that list alone. Sums are in float32 (float64 for float64); no gradient flows; nothing waits.

    Args:
        query: [B, K, H, d], float32, bfloat16, float16 or float64.
        keys, values: [C, H, S, d] of the same dtype, laid out alike.
        sources: [B] int32, in [0, C).
        lengths: [C] int32, in [1, S].
        impl: "auto" (Triton on a GPU, except for float64), "reference" or "triton".

    Raises:
        ValueError: a wrong shape, dtype, device, layout or choice.

    Equivalent to ``F.scaled_dot_product_attention(query.transpose(1, 2), keys[sources], values[sources],
    arange(S) < lengths[sources][:, None, None, None]).transpose(1, 2)``.
    """
    check_choice(impl, "impl", ("auto", "reference", "triton"))
    sizes = check_tensor(query, "query", shape="B K H d", dtypes=_FLOATS)
    sizes = _check_cache(query, keys, values, sizes)
    check_tensor(sources, "sources", shape="B", dtypes=(torch.int32,), device=query.device, sizes=sizes)
    check_tensor(lengths, "lengths", shape="C", dtypes=(torch.int32,), device=query.device, sizes=sizes)
    if _plain(impl, query):
        return reference.source_attention(query, keys, values, sources, lengths)
    return torch.ops.condgen_fast.source_attention(query, keys, values, sources, lengths)


def _check_cache(query: Tensor, keys: Tensor, values: Tensor, sizes: dict[str, int]) -> dict[str, int]:
    sizes = check_tensor(keys, "keys", shape="C H T d", dtypes=(query.dtype,), device=query.device, sizes=sizes)
    check_tensor(values, "values", shape="C H T d", dtypes=(query.dtype,), device=query.device, sizes=sizes)
    if values.stride() != keys.stride():
        raise ValueError(f"values must be laid out as keys are, strides {keys.stride()}; got {values.stride()}")
    if query.stride(-1) != 1 or keys.stride(-1) != 1:
        raise ValueError("query and keys must be contiguous in their last dimension")
    return sizes


def _plain(impl: str, query: Tensor) -> bool:
    if impl != "auto":
        return impl == "reference"
    return query.device.type not in ("cuda", "meta") or query.dtype == torch.float64


@torch.library.custom_op("condgen_fast::target_attention", mutates_args=("keys", "values", "places"))
def _target_attention(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Tensor, position: Tensor
) -> Tensor:
    from condgen_fast.ops.transformer import triton_kernel

    return triton_kernel.target_attention(query, key, value, keys, values, places, position)


@torch.library.custom_op("condgen_fast::source_attention", mutates_args=())
def _source_attention(query: Tensor, keys: Tensor, values: Tensor, sources: Tensor, lengths: Tensor) -> Tensor:
    from condgen_fast.ops.transformer import triton_kernel

    return triton_kernel.source_attention(query, keys, values, sources, lengths)


@_target_attention.register_fake
def _(query, key, value, keys, values, places, position):
    return query.new_empty(query.shape)


@_source_attention.register_fake
def _(query, keys, values, sources, lengths):
    return query.new_empty(query.shape)
