"""Text from the command line as a Python value, by the annotation of the parameter that it is for."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def read_value(function: Callable[..., Any], name: str, text: str) -> Any:
    """The value of one parameter.

    Args:
        function: a merging method.
        name: of the parameter; one that the signature does not name is read as JSON, or else is text.
        text: as typed: ``0.3``, ``.3``, ``false``, ``layer``, ``0.1,0.2`` or ``[0.1, 0.2]``.

    Raises:
        ValueError: the text is no such value; the message says what is expected.

    Examples:
        >>> def method(tv, *, scale: float | Sequence[float] = 0.3, clip: bool = True): ...
        >>> read_value(method, "scale", ".5"), read_value(method, "scale", "1,2"), read_value(method, "clip", "False")
        (0.5, [1.0, 2.0], False)
    """
    kind = get_type_hints(function).get(name, Any)
    try:
        return _as(kind, text.strip())
    except ValueError:
        raise ValueError(f"'{text}' is no value for {name}: expected {in_words(kind)}.") from None


def _as(kind: Any, text: str) -> Any:
    """The text as this type.

    Raises:
        ValueError: it is none.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        for each in sorted(get_args(kind), key=lambda each: each is str):  # text last: everything is text
            try:
                return _as(each, text)
            except ValueError:
                continue
        raise ValueError
    if origin is Literal:
        return _one_of(get_args(kind), text)
    if kind in (bool, int, float):
        return _number(kind, text)
    if kind is str:
        return text
    if kind is type(None):
        return _one_of((None,), None if text.lower() in ("none", "null") else text)
    if isinstance(origin, type) and issubclass(origin, Sequence) and not issubclass(origin, str):
        inner = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text
        return [_as(get_args(kind)[0], part.strip()) for part in inner.split(",") if part.strip()]
    if kind is Any or kind is object:
        try:
            return json.loads(text)
        except ValueError:
            return text
    raise ValueError


def _number(kind: type, text: str) -> bool | int | float:
    if kind is bool:
        if text.lower() not in TRUE + FALSE:
            raise ValueError
        return text.lower() in TRUE
    if kind is int and text.replace("_", "").lstrip("+-").isdigit():
        return int(text)
    number = float(text)
    if kind is int:  # 1e3 is a whole number, too
        if not number.is_integer():
            raise ValueError
        return int(number)
    return number


def _one_of(choices: tuple[Any, ...], text: Any) -> Any:
    for choice in choices:
        if text == choice or str(choice) == text:
            return choice
    raise ValueError


def in_words(kind: Any) -> str:
    """A type as a reader would say it."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
    if kind in names:
        return names[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(each) for each in inner))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list such as 0.1,0.2 (of {in_words(inner[0])} each)"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping, which only Python can give"
    return "something that only Python can give"
