"""Checks of hyperparameters: a wrong one is answered with its name and its value, before anything is merged."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor


def number(name: str, value: Any) -> float:
    """The value as a float, which may be NaN or infinite.

    Raises:
        TypeError: it is no number: a word, a truth value, a list.

    Examples:
        >>> number("density", 1)
        1.0
        >>> number("density", "half")
        Traceback (most recent call last):
        TypeError: density must be a number, got 'half'.
    """
    if isinstance(value, str | bytes | bool) or not hasattr(type(value), "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as problem:  # an array of several, a huge integer
        raise TypeError(f"{name} must be a number, got {value!r}.") from problem


def finite(name: str, value: Any) -> float:
    """The value as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN or infinite.
    """
    if not math.isfinite(checked := number(name, value)):
        raise ValueError(f"{name} must be finite, got {value}.")
    return checked


def not_negative(name: str, value: Any) -> float:
    """The value as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN, infinite or below 0.
    """
    if not 0 <= (checked := number(name, value)) < math.inf:
        raise ValueError(f"{name} must be finite and not negative; got {value}.")
    return checked


def positive(name: str, value: Any) -> float:
    """The value as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN, infinite, 0 or below.
    """
    if not 0 < (checked := number(name, value)) < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value}.")
    return checked


def count(name: str, value: Any, least: int = 0) -> int:
    """The value as an integer.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is below `least`, or not finite.
    """
    asked = number(name, value)
    if not least <= asked < math.inf:
        wanted = "finite and not negative" if least == 0 else f"finite and at least {least}"
        raise ValueError(f"{name} must be {wanted}; got {value}.")
    try:
        return operator.index(value)
    except TypeError as problem:
        if asked == int(asked):  # 300.0, as a command line may say it
            return int(asked)
        raise TypeError(f"{name} must be a whole number, got {value!r}.") from problem


def flag(name: str, value: Any) -> bool:
    """The value, which must be true or false.

    Raises:
        TypeError: it is something else, such as the word "False", which Python takes for true.
    """
    if isinstance(value, str) or value not in (True, False):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def numbers(name: str, values: Any) -> Tensor:
    """One or several numbers as a tensor in float64 on the CPU, of shape () or (n,).

    Raises:
        TypeError: they are no numbers.
    """
    if isinstance(values, str | bytes):
        raise TypeError(f"{name} must be a number or a list of numbers, got {values!r}.")
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as problem:
        raise TypeError(f"{name} must be a number or a list of numbers, got {values!r}.") from problem
