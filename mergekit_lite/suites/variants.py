"""Relatives of pocket8 in which one thing above all is different, to see what merging depends on.

Each is a suite of its own, loaded with ``load_suite("pocket8-scratch")`` and so on. It holds only what differs;
images, base and heads that it does not have are its parent's.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mergekit_lite.suites.splits import SPLITS, Split, Task
from mergekit_lite.suites.suite import Suite

FOUR = ("mnist", "fashion", "letters", "icon_family")

# Images seen once, without labels, to set the normalisation statistics of a network that was never trained.
CALIBRATION_IMAGES = 100


@dataclass(frozen=True)
class Variant:
    """What is different.

    Attributes:
        parent: the suite that lends what this one does not have.
        tasks: the tasks of the suite; None is the parent's.
        trained: the tasks that have experts, per seed of fine-tuning.
        changes: to the recipe.
        initialisation: the seed of a base with random weights; None is the parent's base.
        own_heads: make new heads from this base's features; otherwise they are the parent's.
        noise: the standard deviation, in grey values of 255, of Gaussian noise added to every image.
    """

    parent: str
    tasks: tuple[str, ...] | None
    trained: Mapping[int, tuple[str, ...]]
    changes: Mapping[str, Any] = field(default_factory=dict)
    initialisation: int | None = None
    own_heads: bool = False
    noise: float = 0.0


VARIANTS = {
    # No pre-training. Seed 1 trains mnist once more from the same random base, with its images in another order.
    "pocket8-scratch": Variant(
        "pocket8",
        FOUR,
        {0: FOUR, 1: ("mnist",)},
        {"learning_rate": 2e-3},
        initialisation=0,
        own_heads=True,
    ),
    # Another random base, taught to speak to the same head.
    "pocket8-scratch-other": Variant(
        "pocket8-scratch", FOUR, {0: ("mnist",)}, {"learning_rate": 2e-3}, initialisation=1
    ),
    # The pre-trained base, fine-tuned with steps thirty times as large.
    "pocket8-far": Variant("pocket8", FOUR, {0: FOUR}, {"learning_rate": 1e-2}),
    # The pre-trained base, fine-tuned as a network that is linear in its weights.
    "pocket8-tangent": Variant("pocket8", FOUR, {0: FOUR}, {"tangent": True, "learning_rate": 1e-3}),
    # All images noisy; an expert for noisy mnist only.
    "pocket8-noisy": Variant("pocket8", None, {0: ("mnist",)}, noise=60.0),
}


def add_noise(task: Task, strength: float) -> Task:
    """The task with Gaussian noise on every image, the same noise at every call."""

    def noisy(name: str) -> Split:
        split = task.split(name)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{task.name} {name}".encode()))
        noise = strength * torch.randn(split.images.shape, generator=generator)
        return Split((split.images + noise).clamp(0, 255).byte(), split.labels)

    return Task(task.name, task.classes, *(noisy(name) for name in SPLITS))


def calibrate(model: nn.Module, suite: Suite) -> None:
    """Set the normalisation statistics of an untrained network to those of the suite's training images, in place.

    A pre-trained network brings statistics of its own. A random one has mean 0 and variance 1 everywhere, which
    fits nothing, and with them its signal dies out on the way up.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over the batches
    model.train()
    with torch.no_grad():
        for task in suite.tasks.values():
            model(suite.prepare(task.train[:CALIBRATION_IMAGES].images))
    model.eval()
    for layer in layers:
        layer.momentum = 0.1  # torch's default
