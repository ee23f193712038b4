"""How certain a merge is, how right it is, and where being more certain would lead it: what chapter 4.1 measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergekit_lite.adaptive import LossOfWeights
from mergekit_lite.adaptive.adamerging import slope
from mergekit_lite.adaptive.losses import Loss
from mergekit_lite.suites.suite import Suite
from mergekit_lite.task_vectors import TaskVectors

if TYPE_CHECKING:
    import pandas as pd


def per_image(suite: Suite, state: Mapping[str, Tensor] | nn.Module, task: str, *, split: str = "test") -> pd.DataFrame:
    """What one set of weights says about every image of a task.

    Returns:
        A row per image: ``entropy`` of the prediction and ``loss`` (cross-entropy), both in nats, and ``right``.
    """
    import pandas as pd

    images = suite.task(task).split(split)
    model = state.eval() if isinstance(state, nn.Module) else suite.build(state).eval()
    logits = suite.logits(model, task, images).float().cpu()
    return pd.DataFrame(
        {
            "entropy": torch.special.entr(logits.softmax(1)).sum(1).numpy(),
            "loss": F.cross_entropy(logits, images.labels, reduction="none").numpy(),
            "right": (logits.argmax(1) == images.labels).numpy(),
        }
    )


def certainties(
    suite: Suite, merges: Mapping[float, Mapping[str, Tensor]], *, split: str = "validation"
) -> pd.DataFrame:
    """How certain and how right merges are on every task.

    Args:
        suite: with the tasks.
        merges: state dicts, by the scale that made them.
        split: the images.

    Returns:
        Means over images: a row per scale and task, with ``entropy``, ``loss`` (both in nats) and ``right``.
    """
    import pandas as pd

    rows = {}
    for scale, state in merges.items():
        model = suite.build(state)
        for task in suite.tasks:
            rows[scale, task] = per_image(suite, model, task, split=split).mean()
    return pd.DataFrame(rows).T.rename_axis(["scale", "task"])


def slopes_by_task(
    suite: Suite, tv: TaskVectors, state: Mapping[str, Tensor], inputs: Mapping[str, Tensor], loss: Loss
) -> dict[str, Tensor]:
    """How each task's loss changes with every coefficient of a merge: its gradient times the task vectors.

    Args:
        suite: with a model and heads.
        tv: K task vectors.
        state: the weights at which the gradient is taken.
        inputs: by task.
        loss: of a task.

    Returns:
        By task, (tensors, K), float64.
    """
    of_weights = LossOfWeights(suite.model, suite.heads, tv, loss)
    layers = {name: taus for name, _, taus in tv.layers()}
    slopes = {}
    for task, images in inputs.items():
        _, gradient = of_weights(state, {task: images})
        slopes[task] = torch.stack([slope(gradient.get(name), taus).double() for name, taus in layers.items()])
    return slopes


def label_loss(labels: Mapping[str, Tensor]) -> Loss:
    """The cross-entropy to labels that nobody has who adapts: a loss for one fixed batch of every task.

    Args:
        labels: by task, in the order of the inputs that the loss will be asked about.
    """
    return lambda task, inputs, logits: F.cross_entropy(logits, labels[task].to(logits.device))


def bearings(
    suite: Suite,
    tv: TaskVectors,
    state: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    teachers: Mapping[str, Loss],
    labels: Mapping[str, Tensor],
) -> pd.DataFrame:
    """How far losses without labels point where labels would: cosines of gradients by all coefficients of a merge.

    Args:
        suite: with a model and heads.
        tv: K task vectors.
        state: the weights at which gradients are taken.
        inputs: by task.
        teachers: losses by name.
        labels: of the inputs, by task.

    Returns:
        A row per teacher, a column per task, and ``all tasks`` for the sums of the gradients.
    """
    import pandas as pd

    def gradients(loss: Loss) -> dict[str, Tensor]:
        found = slopes_by_task(suite, tv, state, inputs, loss)
        return {**found, "all tasks": torch.stack(list(found.values())).sum(0)}

    right = gradients(label_loss(labels))
    rows = {}
    for name, loss in teachers.items():
        rows[name] = {
            task: F.cosine_similarity(slopes.flatten(), right[task].flatten(), dim=0).item()
            for task, slopes in gradients(loss).items()
        }
    return pd.DataFrame(rows).T
