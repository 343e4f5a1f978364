"""Attention of a decoding step: kernel and reference against float64, what is stored, what is not read, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from condgen_fast.ops.transformer import source_attention, target_attention

IMPLS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, generator, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=generator).to(device, dtype)


def target_case(rows, heads, width, positions, position, *, cache_rows=None, dtype=torch.float32, device="cpu", seed=0):
    """Arguments in which everything that must not be read is NaN, or a place that does not exist."""
    generator = torch.Generator().manual_seed(seed)
    cache_rows = cache_rows or rows
    qkv = random(rows, 3, heads, width, generator=generator, dtype=dtype, device=device)
    keys, values = random(2, cache_rows, heads, positions, width, generator=generator, dtype=dtype, device=device)
    keys[:, :, position:] = torch.nan
    values[:, :, position:] = torch.nan
    places = torch.randint(0, cache_rows, (rows, positions), generator=generator, dtype=torch.int32).to(device)
    places[:, position:] = 2**30
    at = torch.tensor([position], dtype=torch.int32, device=device)
    return [*qkv.unbind(1), keys, values, places, at]


def target_exact(query, key, value, keys, values, places, position):
    """A loop over beams in float64."""
    found = []
    for r in range(query.shape[0]):
        own_keys, own_values = ([token[r].double()] for token in (key, value))
        for t in range(int(position)):
            own_keys.append(keys[places[r, t], :, t].double())
            own_values.append(values[places[r, t], :, t].double())
        k, v = torch.stack(own_keys, 1), torch.stack(own_values, 1)  # [H, t, d]
        found.append(F.scaled_dot_product_attention(query[r].double()[:, None], k, v)[:, 0])
    return torch.stack(found)


def close(actual, exact, dtype, torchs):
    """No worse than torch's own attention in that dtype, and a rounding of the result."""
    slack = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    error, torch_error = ((x.double() - exact).abs().max().item() for x in (actual, torchs))
    assert actual.dtype == dtype and error <= 1.5 * torch_error + slack, (error, torch_error)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "heads", "width", "positions", "position"),
    [
        *[(1, 1, 64, 1, 0), (3, 2, 64, 130, 63), (2, 1, 64, 64, 63), (2, 1, 64, 130, 64), (2, 2, 64, 130, 129)],
        *[(5, 3, 8, 9, 4), (2, 2, 24, 40, 37), (2, 1, 128, 34, 33), (4, 1, 32, 7, 2)],
    ],
)
def test_target(rows, heads, width, positions, position, dtype, impl, device):
    arguments = target_case(rows, heads, width, positions, position, cache_rows=rows + 2, dtype=dtype, device=device)
    query, key, value, keys, values, places, at = arguments
    exact = target_exact(*arguments)
    lies = places[:, :position].long()
    t = torch.arange(position, device=device)
    seen_keys, seen_values = (
        torch.cat([cache[lies, :, t], own[:, None]], 1).transpose(1, 2) for cache, own in ((keys, key), (values, value))
    )
    torchs = F.scaled_dot_product_attention(query[:, :, None], seen_keys, seen_values)[:, :, 0]
    before = [x.clone() for x in (keys, values, places)]
    found = target_attention(*arguments, impl=impl)
    close(found, exact, dtype, torchs)

    for old, new in zip(before[:2], (key, value), strict=True):
        old[:rows, :, position] = new
    before[2][:, position] = torch.arange(rows)
    for old, now in zip(before, (keys, values, places), strict=True):
        assert torch.equal(old.nan_to_num(7), now.nan_to_num(7) if now.is_floating_point() else now)
    assert at.tolist() == [position]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("beams", "heads", "width", "lengths"),
    [(1, 1, 64, [1]), (4, 2, 64, [32, 33, 1, 64]), (5, 1, 24, [7, 2]), (17, 2, 8, [5, 31]), (3, 1, 128, [40])],
)
def test_source(beams, heads, width, lengths, dtype, impl, device):
    generator = torch.Generator().manual_seed(1)
    size = max(lengths) + 3
    query = random(len(lengths) + 1, beams, heads, width, generator=generator, dtype=dtype, device=device)
    # the layout that one matrix product gives
    memory = random(len(lengths), size, 2, heads, width, generator=generator, dtype=dtype, device=device)
    keys, values = memory.permute(2, 0, 3, 1, 4)
    sources = torch.randint(0, len(lengths), (len(lengths) + 1,), generator=generator, dtype=torch.int32).to(device)
    limits = torch.tensor(lengths, dtype=torch.int32, device=device)
    mask = torch.arange(size, device=device) < limits[sources.long()][:, None, None, None]
    exact, torchs = (
        F.scaled_dot_product_attention(
            query.transpose(1, 2).to(kind), keys[sources.long()].to(kind), values[sources.long()].to(kind), mask
        ).transpose(1, 2)
        for kind in (torch.float64, dtype)
    )
    for b, length in enumerate(lengths):
        memory[b, length:] = torch.nan
    close(source_attention(query, keys, values, sources, limits, impl=impl), exact, dtype, torchs)


@pytest.mark.parametrize("impl", IMPLS)
def test_bits_do_not_depend_on_the_batch_or_the_room(impl, device):
    arguments = target_case(4, 2, 32, 20, 11, device=device)
    whole = target_attention(*arguments, impl=impl)
    alone = target_case(4, 2, 32, 20, 11, device=device)
    query, key, value, keys, values, places, at = alone
    keys, values = (F.pad(x, (0, 0, 0, 9), value=torch.nan) for x in (keys, values))
    part = target_attention(query[2:3], key[2:3], value[2:3], keys, values, F.pad(places[2:3], (0, 9)), at, impl=impl)
    if impl == "triton":
        assert torch.equal(part[0], whole[2])
    torch.testing.assert_close(part[0], whole[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_and_no_room(impl, device):
    empty = target_case(2, 1, 16, 3, 1, device=device)
    empty = [x[:0] if i in (0, 1, 2, 5) else x for i, x in enumerate(empty)]
    assert target_attention(*empty, impl=impl).shape == (0, 1, 16)
    query = torch.zeros(0, 3, 1, 16, device=device)
    keys = torch.zeros(2, 1, 4, 16, device=device)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    lengths = torch.ones(2, dtype=torch.int32, device=device)
    assert source_attention(query, keys, keys, none, lengths, impl=impl).shape == (0, 3, 1, 16)


def test_behind_the_last_position_the_kernel_stores_nothing(device):
    from condgen_fast.ops.transformer import triton_kernel

    arguments = target_case(2, 2, 16, 5, 5, device=device)
    before = [x.clone() for x in arguments]
    triton_kernel.target_attention(*arguments)
    for old, now in zip(before, arguments, strict=True):
        assert torch.equal(old, now)


def test_double_precision_is_computed_in_double(device):
    arguments = target_case(3, 2, 16, 9, 5, dtype=torch.float64, device=device)
    exact = target_exact(*arguments)
    torch.testing.assert_close(target_attention(*arguments), exact, rtol=0, atol=1e-14)


def test_ops_on_tensors_without_values_and_compiled(device):
    def clone():
        return target_case(2, 2, 16, 6, 3, device=device)

    op = torch.ops.condgen_fast.target_attention.default
    torch.library.opcheck(op, tuple(clone()), test_utils=("test_schema", "test_faketensor"))
    meta = [x.to("meta") for x in clone()]
    found = target_attention(*meta)
    assert found.shape == (2, 2, 16) and found.device.type == "meta"
    query = torch.zeros(2, 3, 2, 16, device="meta")
    sources = torch.zeros(2, dtype=torch.int32, device="meta")
    assert source_attention(query, meta[3], meta[4], sources, sources).shape == (2, 3, 2, 16)

    expected = target_attention(*clone(), impl="triton")
    compiled = torch.compile(lambda *x: target_attention(*x, impl="triton") * 2, fullgraph=True, backend="aot_eager")
    arguments, plain = clone(), clone()
    target_attention(*plain, impl="triton")
    torch.testing.assert_close(compiled(*arguments), expected * 2)
    for own, other in zip(arguments, plain, strict=True):
        assert (
            torch.equal(own.nan_to_num(7), other.nan_to_num(7)) if own.is_floating_point() else torch.equal(own, other)
        )


def test_refusals(device):
    def arguments(**changes):
        names = ("query", "key", "value", "keys", "values", "places", "position")
        return dict(zip(names, target_case(2, 2, 16, 4, 2, device=device), strict=True)) | changes

    normal = arguments()
    other_layout = normal["values"].transpose(0, 1).contiguous().transpose(0, 1)
    for changes, message in [
        ({"query": normal["query"][0]}, r"query must have shape \[R, H, d\]"),
        ({"query": normal["query"].long()}, "query must be float32, bfloat16, float16 or float64; got int64"),
        ({"key": normal["key"].double()}, "key must be float32; got float64"),
        ({"value": normal["value"][:1]}, "value must have shape"),
        ({name: normal[name][:1] for name in ("keys", "values")}, "keys must have at least R=2 rows; got 1"),
        ({"keys": normal["keys"].double()}, "keys must be float32; got float64"),
        ({"values": other_layout}, "values must be laid out as keys are"),
        ({"places": normal["places"].long()}, "places must be int32; got int64"),
        ({"places": normal["places"][:, :3]}, r"places must have shape \[R, T\]"),
        ({"places": normal["places"].T.contiguous().T}, "places must be contiguous"),
        ({"query": normal["query"].transpose(1, 2).contiguous().transpose(1, 2)}, "query and keys must be contiguous"),
        ({"position": normal["position"][0]}, r"position must have shape \[1\]"),
        ({"impl": "cuda"}, "impl must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            target_attention(**arguments(**changes))
    if device == "cpu":
        with pytest.raises(ValueError, match=r"position must be in \[0, 4\); got 4"):
            target_attention(**arguments(position=normal["position"] + 2))
    query = torch.zeros(1, 1, 2, 16, device=device)
    sources, lengths = (torch.zeros(n, dtype=torch.int32, device=device) for n in (1, 2))
    for changes, message in [
        ({"query": query[0]}, r"query must have shape \[B, K, H, d\]"),
        ({"lengths": lengths.float()}, "lengths must be int32; got float32"),
        ({"lengths": lengths[:1]}, r"lengths must have shape \[C\]"),
        ({"sources": sources.long()}, "sources must be int32; got int64"),
        ({"impl": "cuda"}, "impl must be"),
    ]:
        given = {"keys": normal["keys"], "values": normal["values"], "sources": sources, "lengths": lengths}
        with pytest.raises(ValueError, match=message):
            source_attention(**{"query": query, **given, **changes})
