"""Adapting merges without labels on pocket8, scored on images that they have seen and on others: tables of part 4."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mergekit_lite.adaptive import (
    History,
    WEMoE,
    entropy_loss,
    imitation_loss,
    information_loss,
    learn_coefficients,
    learn_mask,
    masked,
    trim_and_elect,
    wemoe,
)
from mergekit_lite.adaptive.losses import Loss
from mergekit_lite.checkpoints import StateDict
from mergekit_lite.data_free import average, disentangle, emr, iso_c, task_arithmetic, ties, tsv
from mergekit_lite.lab.masks import on_shuffled
from mergekit_lite.lab.ranking import LENGTHS, SCALES
from mergekit_lite.suites.suite import Suite
from mergekit_lite.task_vectors import TaskVectors

if TYPE_CHECKING:
    import pandas as pd

TABLES = Path(__file__).parent / "tables"
START = 0.2  # the scale at which task arithmetic is best on validation images, with each of the three seeds

Merge = StateDict | nn.Module | Mapping[str, StateDict]
Watch = Callable[[Merge], Mapping[str, float]]


def blocks(model: nn.Module) -> list[str]:
    """The names of the network's residual blocks, which are to it what MLPs are to a transformer."""
    return [name for name, _ in model.named_modules() if name.startswith("blocks.") and name.count(".") == 2]


@dataclass
class Best:
    """Looks at merges while they are adapted and keeps the one that is best on validation images, or the last."""

    suite: Suite
    last: bool = False
    accuracy: float = -1.0
    merge: Merge | None = None
    seen: list[float] = field(default_factory=list)

    def __call__(self, merge: Merge) -> Mapping[str, float]:
        """Its accuracies on validation images."""
        measured = self.suite.evaluate(merge, split="validation")
        self.seen.append(measured.average)
        if self.last or measured.average > self.accuracy:
            self.accuracy, self.merge = measured.average, copy.deepcopy(merge)
        return measured


# ---------------------------------------------------------------- all ways of adapting


def ways(suite: Suite, seen: Suite, most: int = 500) -> dict[str, Callable[[Watch], History]]:
    """Each way to adapt to the test images of `seen`, told whom to show its merges on the way; `most` steps each.

    Nothing is tried but the number of steps. Entropy descends with the learning rates of the papers, the other losses
    with ten or thirty times those, and all start where task arithmetic is best on validation images.
    """
    tv, images = suite.task_vectors, seen.inputs()
    imitation = imitation_loss(suite.model, suite.experts, suite.heads)
    common: dict[str, Any] = {"model": suite.model, "heads": suite.heads, "images": images, "progress": False}

    def steps(count: int, every: int = 20) -> dict[str, Any]:
        return {"steps": min(count, most), "every": every}

    def coefficients(tv: TaskVectors, granularity: str, loss: Loss = entropy_loss, **options: Any) -> Any:
        chosen: dict[str, Any] = {"init": START, **common, **steps(100), **options}

        def run(watch: Watch) -> History:
            return learn_coefficients(tv, granularity=granularity, loss=loss, measure=watch, **chosen).history

        return run

    def mask(loss: Loss, learning_rate: float, count: int, tv: TaskVectors = tv) -> Any:
        options = {"scale": START, "loss": loss, "learning_rate": learning_rate, **common, **steps(count)}
        return lambda watch: learn_mask(tv, measure=watch, **options).history

    def mask_and_coefficients(loss: Loss, of_mask: float, **options: Any) -> Any:
        inner = {"coefficients": "layer", "scale": START, "inner_learning_rate": 0.01, **common, **steps(60)}

        def run(watch: Watch) -> History:
            found = learn_mask(tv, loss=loss, learning_rate=of_mask, **inner)
            history: History = coefficients(masked(tv, found.mean()), "layer", loss, **options)(watch)
            return history

        return run

    def mixture(loss: Loss, learning_rate: float) -> Any:
        where = {"modules": blocks(suite.model), "scale": START, "init": START, "train_route": "batch"}
        options = {**where, "loss": loss, "learning_rate": learning_rate, **common, **steps(100)}
        return lambda watch: wemoe(tv, measure=watch, **options).history

    elected, awd = trim_and_elect(tv), disentangle(tv, granularity="row", relative=True).task_vectors
    faster = {"learning_rate": 1e-2, **steps(200, every=40)}
    return {
        "AdaMerging, task": coefficients(tv, "task"),
        "AdaMerging, layer": coefficients(tv, "layer"),
        "AdaMerging, layer, faster": coefficients(tv, "layer", **faster),
        "AdaMerging, layer, as published": coefficients(tv, "layer", init=0.3, **steps(500, every=500)),
        "AdaMerging++, task": coefficients(elected, "task", init=0.3),
        "AdaMerging++, layer": coefficients(elected, "layer", init=0.3),
        "AWD AdaMerging, task": coefficients(awd, "task"),
        "AWD AdaMerging, layer": coefficients(awd, "layer"),
        "information, layer": coefficients(tv, "layer", information_loss, **faster | steps(120), batch=32),
        "imitation, task": coefficients(tv, "task", imitation, **faster | steps(120)),
        "imitation, layer": coefficients(tv, "layer", imitation, **faster),
        "imitation, AWD, layer": coefficients(awd, "layer", imitation, **faster),
        "Concrete, entropy": mask(entropy_loss, 1e-3, 100),
        "Concrete, imitation": mask(imitation, 3e-2, 160),
        "Concrete, imitation, shuffled": mask(imitation, 3e-2, 160, on_shuffled(tv, START)),
        "Concrete AdaMerging, entropy": mask_and_coefficients(entropy_loss, 1e-3),
        "Concrete AdaMerging, imitation": mask_and_coefficients(imitation, 3e-2, **faster),
        "WEMoE, entropy": mixture(entropy_loss, 1e-4),
        "WEMoE, imitation": mixture(imitation, 1e-3),
    }


def data_free(suite: Suite) -> dict[str, Callable[[Watch], None]]:
    """What needs no images, with scales to try, and EMR, which is told the task of each image."""
    tv = suite.task_vectors

    def tried(method: Callable[..., Merge], scales: tuple[float, ...]) -> Callable[[Watch], None]:
        def run(watch: Watch) -> None:
            for scale in scales:
                watch(method(tv, scale=scale))

        return run

    def once(merge: Callable[[], Merge]) -> Callable[[Watch], None]:
        def run(watch: Watch) -> None:
            watch(merge())

        return run

    return {
        "base": once(lambda: suite.base),
        "average": once(partial(average, tv)),
        "task arithmetic": tried(task_arithmetic, SCALES[:5]),
        "TIES": tried(ties, LENGTHS),
        "TSV": tried(tsv, LENGTHS),
        "Iso-C": tried(iso_c, LENGTHS),
        "EMR": once(partial(emr, tv)),
        "experts": once(lambda: suite.experts),
    }


def measure(suite: Suite, most: int = 500) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Adapt to one half of the test images by every way, and score on both halves.

    Args:
        suite: with experts.
        most: steps of each way, to try it out.

    Returns:
        A table with a row per method: the averages ``held out`` (on the half it has not seen), ``transductive`` (on
        the half that it has), ``unseen tasks`` (which no expert was trained on), ``validation``, ``steps`` (how many
        were best on validation), ``tasks`` (held-out accuracies as JSON), and for mixtures ``by batch`` (held out,
        routed by batches of 50 images of one task). And curves: a row per method and step that was looked at, with
        ``loss`` (the mean since the last look) and ``validation``.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    seen, unseen = suite.halves(suite.seed)
    rows, curves = [], []
    for name, way in tqdm({**data_free(suite), **ways(suite, seen, most)}.items(), desc="methods"):
        best = Best(suite, last=name.endswith("as published"))
        history = way(best)
        assert best.merge is not None
        row = _scores(best.merge, seen, unseen)
        steps = 0
        if history is not None:
            looked = list(history.seen["accuracy"])
            steps = looked[-1 if best.last else best.seen.index(best.accuracy)]
            curves += _curve(name, history)
        rows.append({"method": name, **row, "validation": best.accuracy, "steps": steps})
    return pd.DataFrame(rows), pd.DataFrame(curves)


def _scores(merge: Merge, seen: Suite, unseen: Suite) -> dict[str, Any]:
    held_out = unseen.evaluate(merge)
    told = isinstance(merge, Mapping) and not isinstance(next(iter(merge.values())), torch.Tensor)
    row = {
        "held out": held_out.average,
        "transductive": seen.evaluate(merge).average,
        "unseen tasks": float("nan") if told else unseen.evaluate(merge, tasks=unseen.held_out).average,
        "tasks": json.dumps({task: round(value, 4) for task, value in held_out.items()}),
    }
    if isinstance(merge, WEMoE):
        merge.route = "batch"
        row["by batch"] = unseen.evaluate(merge).average
        merge.route = "image"
    return row


def _curve(name: str, history: History) -> list[dict[str, Any]]:
    losses, accuracies = history.average("loss"), history.average("accuracy")
    rows, last = [], 0
    for step, accuracy in accuracies.items():
        since = [losses[n] for n in range(last, step)] or [losses[0]]
        rows.append({"method": name, "step": step, "loss": sum(since) / len(since), "validation": accuracy})
        last = step
    return rows


# ---------------------------------------------------------------- the shipped tables


def results() -> pd.DataFrame:
    """Means over three seeds, a row per method: ``held out``, its ``spread``, ``transductive``, ``seed 0`` to 2, ..."""
    table = _read("adaptation.csv")
    groups = table.groupby("method", sort=False)
    means = groups[["held out", "transductive", "by batch", "unseen tasks", "validation", "steps"]].mean()
    means.insert(1, "spread", groups["held out"].std())
    seeds = table.pivot(index="method", columns="seed", values="held out").add_prefix("seed ")
    return means.join(seeds)


def by_task() -> pd.DataFrame:
    """Held-out accuracies, means over three seeds: a row per method, a column per task."""
    import pandas as pd

    table = _read("adaptation.csv")
    tasks = pd.DataFrame([json.loads(row) for row in table["tasks"]]).assign(method=table["method"])
    return tasks.groupby("method", sort=False).mean()


def curves() -> pd.DataFrame:
    """Losses and validation accuracies on the way, means over three seeds: index method and step."""
    return _read("adaptation-curves.csv").groupby(["method", "step"], sort=False)[["loss", "validation"]].mean()


def _read(name: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(TABLES / name)
