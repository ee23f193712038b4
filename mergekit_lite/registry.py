"""The list of merging methods: one entry per method, written where the method is written.

Tables of methods (the README's, the book's index, the leaderboard's rows) are made from this
registry, so they cannot disagree with the code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Need(Enum):
    """What a method needs beyond the weights; the package, the book and the tests follow this order."""

    WEIGHTS = "weights only"
    CALIBRATION = "a few inputs"
    TEST_INPUTS = "unlabelled test inputs"
    NO_ANCESTOR = "no common ancestor"
    ADAPTERS = "adapters"


@dataclass(frozen=True)
class Method:
    """A merging method: its function and where it comes from.

    Most methods return one state dict for all tasks; those with `per_task` return one for each task, so that whoever
    uses them must know the task of every input.
    """

    function: Callable[..., Any]
    name: str
    paper: str
    arxiv: str
    year: int
    need: Need
    per_task: bool = False

    @property
    def call(self) -> str:
        """How the function is called: ``mkl.ties``."""
        return f"mkl.{self.function.__name__}"

    @property
    def needs(self) -> str:
        """What the method needs, in words: to merge, and to use the merge."""
        return self.need.value + ("; to use it, the task of each input" if self.per_task else "")

    @property
    def url(self) -> str:
        """The paper's page; empty where there is no paper on arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        return (self.function.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ").lstrip("r")


_METHODS: dict[str, Method] = {}


def method(
    *, name: str, paper: str, arxiv: str = "", year: int, need: Need, per_task: bool = False
) -> Callable[[F], F]:
    """Decorator that records a merging method; the function itself stays as it was.

    Args:
        name: the method's name in the field, such as ``TIES-Merging``.
        paper: authors, title and venue, in one line.
        arxiv: the paper's arXiv number, if it has one.
        year: the year of the first publication.
        need: what the method needs beyond the weights.
        per_task: it returns a state dict for each task instead of one for all.

    Raises:
        ValueError: a method of this function name is recorded already.
    """

    def record(function: F) -> F:
        known = _METHODS.get(function.__name__)
        # Running a notebook cell again, or reloading a module, defines the same function again.
        if known is not None and known.function.__module__ != function.__module__:
            raise ValueError(f"'{function.__name__}' is already registered by {known.function.__module__}.")
        _METHODS[function.__name__] = Method(function, name, paper, arxiv, year, need, per_task)
        return function

    return record


def methods(need: Need | None = None) -> dict[str, Method]:
    """All recorded methods by function name, ordered by need and year; or those of one need."""
    order = list(Need)
    chosen = [(key, m) for key, m in _METHODS.items() if need is None or m.need is need]
    return dict(sorted(chosen, key=lambda item: (order.index(item[1].need), item[1].year, item[0])))


def running_method() -> str:
    """The recorded method that is at work, for messages: the outermost on the call stack, as it was called."""
    known = {m.function.__code__: m.call for m in _METHODS.values()}
    frame, found = sys._getframe(1), "this method"
    while frame := frame.f_back:  # type: ignore[assignment]
        found = known.get(frame.f_code, found)
    return found


def methods_table() -> str:
    """The methods as a Markdown table, as it stands in the README and in the book."""
    rows = ["| call | method | needs | paper |", "|---|---|---|---|"]
    for m in methods().values():
        paper = f"[{m.paper}]({m.url})" if m.url else m.paper
        rows.append(f"| `{m.call}` | {m.name} | {m.needs} | {paper}, {m.year} |")
    return "\n".join(rows)
