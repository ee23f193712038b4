"""The machine behind ``check``: the registry of checkers and what they answer."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from mergekit_lite.suites.pocket import load_suite
from mergekit_lite.suites.suite import Suite

Checker = Callable[..., str]
C = TypeVar("C", bound=Checker)

_CHECKERS: dict[str, Checker] = {}


class Wrong(Exception):  # noqa: N818 (it is said to a reader, not to a programmer)
    """The answer is wrong; the message is a hint."""


@dataclass(frozen=True)
class Verdict:
    """What `check` says: true if the answer is right.

    Attributes:
        number: of the exercise.
        status: ``"right"``, ``"wrong"`` or ``"open"`` (not answered yet).
        message: a hint, or what the answer teaches.
    """

    number: str
    status: str
    message: str

    def __bool__(self) -> bool:
        return self.status == "right"

    def __repr__(self) -> str:
        return f"Exercise {self.number}: {self._word}{self.message}"

    def _repr_html_(self) -> str:
        colour = {"right": "#009E73", "wrong": "#D55E00", "open": "#888888"}[self.status]
        return (
            f'<div style="border-left: 4px solid {colour}; padding: 0.2em 0.8em">'
            f"<b>Exercise {self.number}.</b> {html.escape(self._word + self.message)}</div>"
        )

    @property
    def _word(self) -> str:
        return {"right": "✓ right. ", "wrong": "✗ not yet: ", "open": ""}[self.status]


def exercise(number: str) -> Callable[[C], C]:
    """Register the checker of one exercise.

    Args:
        number: part, chapter and exercise, such as ``"1.2.3"``.

    Raises:
        ValueError: the number is taken.
    """

    def register(checker: C) -> C:
        if number in _CHECKERS:
            raise ValueError(f"exercise {number} has a checker already.")
        _CHECKERS[number] = checker
        return checker

    return register


def exercises() -> Mapping[str, Checker]:
    """All checkers by number."""
    return dict(sorted(_CHECKERS.items()))


def check(number: str, *answer: Any) -> Verdict:
    """Say whether an answer is right.

    Args:
        number: of the exercise, such as ``"1.1.1"``.
        *answer: what the exercise asks for; None if it is not answered yet.

    Returns:
        The verdict, which a notebook shows as a coloured line. An answer of the wrong kind, or a function of
        the reader's that fails, gives a verdict too, never an error.

    Raises:
        KeyError: there is no such exercise.
    """
    if number not in _CHECKERS:
        raise KeyError(f"there is no exercise '{number}'; there are {', '.join(exercises())}.")
    if not answer or any(a is None for a in answer):
        return Verdict(number, "open", "not answered yet.")
    try:
        return Verdict(number, "right", _CHECKERS[number](*answer))
    except Wrong as hint:
        return Verdict(number, "wrong", str(hint))
    except Exception as problem:
        return Verdict(number, "wrong", f"your answer could not be used ({type(problem).__name__}: {problem}).")


# ---------------------------------------------------------------- what checkers have in common


@cache
def pocket8() -> Suite:
    """The suite that the exercises are about, loaded once."""
    return load_suite("pocket8", device="cpu")


def expect_state(answer: Any, like: Mapping[str, Tensor]) -> None:
    """The answer must be a state dict of the suite's backbone."""
    if not isinstance(answer, Mapping) or not all(isinstance(t, torch.Tensor) for t in answer.values()):
        raise Wrong(f"expected a state dict, such as mkl.average(tv) returns; got {type(answer).__name__}.")
    if set(answer) != set(like):
        raise Wrong("this is a state dict of another network: its names are not those of the base.")


def expect_number(answer: Any, low: float, high: float, what: str) -> float:
    """The answer must be a number in a range."""
    try:
        value = float(answer)
    except (TypeError, ValueError):
        raise Wrong(f"expected {what}, a number; got {type(answer).__name__}.") from None
    if not low <= value <= high:
        raise Wrong(f"{what} lies between {low:g} and {high:g}; got {value:g}.")
    return value


def expect_function(answer: Any) -> None:
    """The answer must be something that can be called."""
    if not callable(answer):
        raise Wrong("hand over the function itself, without calling it.")


def expect_pair(answer: Any, right: tuple[float, float], hints: Mapping[tuple[float, float], str], rest: str) -> None:
    """Raises `Wrong` unless these are the right two numbers: with the hint for a known wrong answer, or the `rest`."""
    given = torch.as_tensor(answer, dtype=torch.float64).flatten()
    if given.shape != (2,):
        raise Wrong(f"expected two numbers, got {given.numel()}.")

    def near(pair: tuple[float, float]) -> bool:
        return torch.allclose(given, torch.tensor(pair, dtype=torch.float64), atol=1e-3)

    for wrong, hint in hints.items():
        if near(wrong):
            raise Wrong(hint)
    if not near(right):
        raise Wrong(rest)


def expect_close(value: float, right: float, hints: Mapping[float, str], rest: str, atol: float = 1e-6) -> None:
    """Raises `Wrong` unless this is the right number: with the hint for a known wrong answer, or the `rest`."""
    for wrong, hint in hints.items():
        if abs(value - wrong) < atol:
            raise Wrong(hint)
    if not abs(value - right) < atol:
        raise Wrong(rest)


def expect_tensor(given: Tensor, right: Tensor, hints: Mapping[str, Tensor], rest: str, atol: float = 1e-8) -> None:
    """Raises `Wrong` unless this is the right tensor: with the hint for a known wrong answer, or the `rest`."""
    for hint, wrong in hints.items():
        if torch.allclose(given, wrong, atol=atol):
            raise Wrong(hint)
    if not torch.allclose(given, right, atol=atol):
        raise Wrong(rest)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The relative distance between two state dicts, seen from `b`'s length: 0 is equal."""
    pairs = [(a[name].double(), b[name].double()) for name in b if b[name].is_floating_point()]
    difference = sum(((x - y) ** 2).sum().item() for x, y in pairs)
    return float((difference / sum((y**2).sum().item() for _, y in pairs)) ** 0.5)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal up to rounding; task vectors are short beside the base, hence the small tolerance."""
    return distance(a, b) < 1e-6
