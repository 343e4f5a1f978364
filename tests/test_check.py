"""The words and types of errors about arguments."""

from __future__ import annotations

import pytest
import torch

from condgen_fast._check import check_choice, check_number, check_tensor, check_token_ids

NAN = float("nan")


def test_tensor_binds_letters():
    x = torch.zeros(2, 3, 5)
    assert check_tensor(x, "x", shape="B K V") == {"B": 2, "K": 3, "V": 5}
    assert check_tensor(x, "x", shape="... V", sizes={"N": 7}) == {"N": 7, "V": 5}
    assert check_tensor(x[0], "x", shape="... K V", dtypes=(torch.float32,), device=x.device) == {"K": 3, "V": 5}
    assert check_tensor(torch.tensor(0.0), "x", shape="...") == {}
    assert check_tensor(torch.zeros(0, 4, 4), "x", shape="B N N") == {"B": 0, "N": 4}
    assert check_tensor(x, "x", shape="2 K V") == {"K": 3, "V": 5}


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        ([1], {"shape": "B"}, TypeError, "x must be a Tensor; got list"),
        (torch.zeros(3), {"shape": "B S"}, ValueError, "x must have shape [B, S]; got [3]"),
        (torch.tensor(0), {"shape": "... V"}, ValueError, "x must have shape [..., V]; got []"),
        (torch.zeros(2, 3), {"shape": "N N"}, ValueError, "x must have shape [N, N]; got [2, 3]"),
        (torch.zeros(2, 3), {"shape": "B 2"}, ValueError, "x must have shape [B, 2]; got [2, 3]"),
        (
            torch.zeros(2, 3), {"shape": "B T", "sizes": {"B": 4, "S": 9}}, ValueError,
            "x must have shape [B, T] with B=4; got [2, 3]",
        ),
        (
            torch.zeros(3), {"shape": "N", "dtypes": (torch.int64, torch.int32)}, ValueError,
            "x must be int64 or int32; got float32",
        ),
        (
            torch.zeros(3), {"shape": "N", "device": torch.device("meta")}, ValueError, "x must be on meta; got cpu",
        ),
    ],
)  # fmt: skip
def test_tensor_refuses(value, options, error, message):
    with pytest.raises(error) as caught:
        check_tensor(value, "x", **options)
    assert str(caught.value) == message


def test_token_ids():
    ids = torch.tensor([[0, 6], [3, 1]])
    assert check_token_ids(ids, "ids", shape="B S", vocab_size=7) == {"B": 2, "S": 2}
    assert check_token_ids(ids[:0].int(), "ids", shape="B S", vocab_size=0) == {"B": 0, "S": 2}
    with pytest.raises(ValueError, match=r"ids must be in \[0, 6\); got 6"):
        check_token_ids(ids, "ids", shape="B S", vocab_size=6)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 6\); got -1"):
        check_token_ids(ids - 1, "ids", shape="B S", vocab_size=6)
    with pytest.raises(ValueError, match="ids must be int64 or int32; got float32"):
        check_token_ids(ids.float(), "ids", shape="B S")


def test_choice():
    check_choice("mean", "reduction", ("mean", "sum", "none"))
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none'; got 'max'"):
        check_choice("max", "reduction", ("mean", "sum", "none"))
    with pytest.raises(TypeError, match="reduction must be a str; got int"):
        check_choice(1, "reduction", ("mean", "sum", "none"))


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        (1.5, {"minimum": 0, "maximum": 1}, ValueError, "x must be in [0, 1]; got 1.5"),
        (-0.1, {"minimum": 0, "maximum": 1}, ValueError, "x must be in [0, 1]; got -0.1"),
        (1, {"minimum": 0, "maximum": 1, "exclusive": True}, ValueError, "x must be in (0, 1); got 1"),
        (0.0, {"minimum": 0, "exclusive": True}, ValueError, "x must be > 0; got 0.0"),
        (0, {"minimum": 1}, ValueError, "x must be >= 1; got 0"),
        (3, {"maximum": 2}, ValueError, "x must be <= 2; got 3"),
        (NAN, {"minimum": 0}, ValueError, "x must be >= 0; got nan"),
        (NAN, {}, ValueError, "x must be a number; got nan"),
        ("1", {}, TypeError, "x must be a number; got str"),
        (True, {}, TypeError, "x must be a number; got bool"),
        (1.0, {"integer": True}, TypeError, "x must be an int; got float"),
    ],
)
def test_number_refuses(value, options, error, message):
    with pytest.raises(error) as caught:
        check_number(value, "x", **options)
    assert str(caught.value) == message


def test_number_accepts():
    check_number(0, "x", minimum=0, maximum=1)
    check_number(1.0, "x", minimum=0, maximum=1)
    check_number(0.5, "x", minimum=0, maximum=1, exclusive=True)
    check_number(float("inf"), "x", minimum=0)
    check_number(3, "x", integer=True)
