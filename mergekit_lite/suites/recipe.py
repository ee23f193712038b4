"""The numbers that make a suite, in one place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


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
