"""Checks of arguments, made once per call before dispatch, so that all implementations refuse with the same words.

A value of the wrong Python type is a TypeError; a wrong shape, dtype, device or range a ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_tensor(
    value: Tensor,
    name: str,
    *,
    shape: str,
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Check shape, dtype and device of a tensor -> the sizes its letters stand for.

    Args:
        value: what the caller passed.
        name: the argument's name, for the message.
        shape: dimensions, as in "B T" or "B K 2"; a leading "..." stands for any number of dimensions.
        dtypes: those allowed; None allows all.
        device: the device it has to be on; None allows all.
        sizes: letters that are bound already, from an earlier argument's check.

    Raises:
        TypeError: ``value`` is no tensor.
        ValueError: shape, dtype or device differ.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor; got {type(value).__name__}")
    dimensions = shape.split()
    any_front = bool(dimensions) and dimensions[0] == "..."
    if any_front:
        dimensions = dimensions[1:]
    front = value.dim() - len(dimensions)
    fits = front >= 0 if any_front else front == 0
    bound = dict(sizes) if sizes is not None else {}
    if fits:
        for position, letter in enumerate(dimensions):
            size = value.shape[front + position]
            if letter.isdigit():
                fits = fits and size == int(letter)
            elif letter in bound:
                fits = fits and size == bound[letter]
            else:
                bound[letter] = size
    if not fits:
        raise ValueError(f"{name} must have shape {_describe(shape, sizes)}; got {list(value.shape)}")
    if dtypes is not None and value.dtype not in dtypes:
        raise ValueError(f"{name} must be {_alternatives([_short(d) for d in dtypes])}; got {_short(value.dtype)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}; got {value.device}")
    return bound


def check_token_ids(
    value: Tensor,
    name: str,
    *,
    shape: str,
    vocab_size: int | None = None,
    device: torch.device | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Check a tensor of token ids (int64 or int32) as ``check_tensor`` does -> its sizes.

    With ``vocab_size`` also that all ids are in [0, vocab_size), on the CPU only: elsewhere it would stall the device.
    """
    bound = check_tensor(value, name, shape=shape, dtypes=(torch.int64, torch.int32), device=device, sizes=sizes)
    if vocab_size is not None and value.device.type == "cpu" and value.numel() > 0:
        low, high = (int(bound_id) for bound_id in torch.aminmax(value))
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} must be in [0, {vocab_size}); got {low if low < 0 else high}")
    return bound


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """Check that a string is one of the choices.

    Raises:
        TypeError: ``value`` is no string.
        ValueError: it is none of them.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str; got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be {_alternatives([repr(choice) for choice in choices])}; got {value!r}")


def check_number(
    value: float,
    name: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    exclusive: bool = False,
    integer: bool = False,
) -> None:
    """Check that a number (an int with ``integer``) is within bounds, which belong to the range unless ``exclusive``.

    Raises:
        TypeError: ``value`` is no number (bool is none).
        ValueError: it is out of range or NaN.
    """
    types = (int, torch.SymInt) if integer else (int, float, torch.SymInt, torch.SymFloat)
    if isinstance(value, bool) or not isinstance(value, types):
        raise TypeError(f"{name} must be {'an int' if integer else 'a number'}; got {type(value).__name__}")
    if value != value:  # NaN; torch.compile traces no math.isnan of a float that varies
        low = high = False
    elif exclusive:
        low, high = minimum is None or value > minimum, maximum is None or value < maximum
    else:
        low, high = minimum is None or value >= minimum, maximum is None or value <= maximum
    if low and high:
        return
    if minimum is not None and maximum is not None:
        wanted = f"in ({minimum}, {maximum})" if exclusive else f"in [{minimum}, {maximum}]"
    elif minimum is not None:
        wanted = f"{'>' if exclusive else '>='} {minimum}"
    elif maximum is not None:
        wanted = f"{'<' if exclusive else '<='} {maximum}"
    else:
        wanted = "a number"
    raise ValueError(f"{name} must be {wanted}; got {value}")


def _describe(shape: str, sizes: Mapping[str, int] | None) -> str:
    letters = shape.split()
    known = [f"{letter}={sizes[letter]}" for letter in dict.fromkeys(letters) if letter in sizes] if sizes else []
    return f"[{', '.join(letters)}]" + (f" with {', '.join(known)}" if known else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _alternatives(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
