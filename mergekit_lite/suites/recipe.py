"""The numbers that make a suite, in one place."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from mergekit_lite.suites.images import INTERPOLATIONS


@dataclass(frozen=True)
class Recipe:
    """How images are prepared, heads made and experts trained. The defaults made pocket8.

    Attributes:
        resolution: pixels in height and width that images are resized to.
        shots: training images per class that make the frozen head.
        head_seed: of the draw of those images; one head serves all seeds of fine-tuning.
        centre: what features are centred on before a head reads them: ``"shared"``, the mean of all tasks'
            means; ``"task"``, the mean of the task's own examples; ``"none"``, nothing.
        temperature: of the head; what a cosine of 1 is worth as a logit.
        steps: of fine-tuning, per expert.
        batch_size: images per step.
        learning_rate: the peak of a one-cycle schedule (up for 30 % of the steps, then down to zero).
        weight_decay: of AdamW.
        clip: the largest norm of a step's gradient.
        augmentation: 0 shows training images as they are; 1 shifts them by up to 12 %, scales them by up
            to 10 % and turns them by up to 0.15 radians.
        frozen: parameters whose names begin like one of these are not trained.
        tangent: train the network linearised around the base (`mergekit_lite.linearization`), not the network.
        mean: of each channel, of pixels in [0, 1]; it is subtracted from images. None is not said: `Suite.from_folders`
            then takes the backbone's own, and what has no backbone to ask takes pocket8's, 0.5 for each.
        std: of each channel, which images are divided by afterwards; None as for `mean`.
        interpolation: {"nearest", "bilinear", "bicubic"}, of resizing; None as for `mean`, pocket8's is bilinear.
    """

    resolution: int = 56
    shots: int = 8
    head_seed: int = 0
    centre: str = "shared"
    temperature: float = 10.0
    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    clip: float = 1.0
    augmentation: float = 0.5
    frozen: tuple[str, ...] = ()
    tangent: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # as JSON writes a tuple
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            if not _fits(value, field.default):
                raise TypeError(f"a recipe's {field.name} is like {field.default!r}; got {value!r}.")
        for name in ("resolution", "shots", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"a recipe's {name} is at least 1; got {getattr(self, name)}.")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if numbers is not None and not (
                isinstance(numbers, tuple) and len(numbers) == 3 and all(_is_number(n) for n in numbers)
            ):
                raise ValueError(f"a recipe's {name} is a tuple of three numbers, one per channel; got {numbers!r}.")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"a recipe's std is greater than 0; got {self.std}.")
        if self.interpolation not in (None, *INTERPOLATIONS):
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got '{self.interpolation}'.")

    def but(self, **changes: Any) -> Recipe:
        """This recipe with some numbers changed.

        Raises:
            TypeError: there is no such number.
        """
        unknown = set(changes) - {f.name for f in dataclasses.fields(self)}
        if unknown:
            names = ", ".join(f.name for f in dataclasses.fields(self))
            raise TypeError(f"a recipe has no '{unknown.pop()}'; it has {names}.")
        return dataclasses.replace(self, **changes)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Real)) and value is not True and value is not False and math.isfinite(value)


def _fits(value: object, default: object) -> bool:
    """Whether a value is of its default's kind; where the default is None, `Recipe` looks for itself."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, int):
        return isinstance(value, Integral)
    if isinstance(default, float):
        return _is_number(value)
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    return default is None or isinstance(value, type(default))
