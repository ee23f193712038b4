"""What curvature is worth: Fisher, RegMean and MaTS over three seeds, the tables of part 3."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_lite.calibrated import Curvature, Kronecker, fisher, mats, regmean, regmean_plus_plus
from mergekit_lite.checkpoints import StateDict
from mergekit_lite.data_free import average, iso_c, task_arithmetic, ties
from mergekit_lite.suites.suite import Suite
from mergekit_lite.task_vectors import TaskVectors

if TYPE_CHECKING:
    import pandas as pd

TABLES = Path(__file__).parent / "tables"
IMAGES = (1, 2, 5, 10, 25, 50, 100)  # per task
LENGTHS = [1.0, 1.2, 1.4, 1.6, 2.0]  # of a merged task vector, in its own length
STEPS = (0, 1, 2, 5, 10, 20, 50, 100)  # of conjugate gradients

Merge = Callable[..., Mapping[str, Tensor]]
Gathered = dict[str, Curvature]

# To solve a K-FAC system in few steps; its solution is the same with any other preconditioner.
SOLVE: dict[str, Any] = {"iterations": 40, "preconditioner": "kronecker", "tolerance": 1e-5, "dtype": torch.float32}


def normalised(curvatures: Gathered) -> Gathered:
    """Every expert's curvature divided by its trace, so that all tasks have the same say."""
    return {task: curvature.normalised() for task, curvature in curvatures.items()}


def damped(curvatures: Gathered, damping: float) -> Gathered:
    """Every expert's curvature with a multiple of the identity added to each factor."""
    return {task: curvature.damped(damping) for task, curvature in curvatures.items()}


def without_diagonals(curvatures: Gathered) -> dict[str, dict[str, Any]]:
    """The Kronecker blocks alone: parameters of normalisation are averaged, as in the papers."""
    return {
        task: {name: block for name, block in curvature.items() if isinstance(block, Kronecker)}
        for task, curvature in curvatures.items()
    }


# ---------------------------------------------------------------- all choices of C


def ways(suite: Suite, images: int = 100) -> dict[str, tuple[Callable[..., StateDict], dict[str, list[Any]]]]:
    """Each method, given its statistics, and what is tried of its hyperparameters on validation images."""
    tv = suite.task_vectors
    gather = partial(suite.curvature, images=images, progress=False)
    batches = {task: suite.calibration(task, images) for task in suite.tasks}
    given, expected = gather("fisher"), gather("fisher", labels="expected")
    inputs, kfac = gather("inputs"), {labels: gather("kfac", labels=labels) for labels in ("given", "expected")}
    starts = {"average": average(tv), "task arithmetic": task_arithmetic(tv, scale=0.2)}

    def scaled(scale: float, merged: StateDict) -> StateDict:
        return task_arithmetic(TaskVectors(tv.base, [merged]), scale=scale)

    def solve(labels: str, damping: float, start: str) -> StateDict:
        return mats(tv, damped(normalised(kfac[labels]), damping), init=starts[start], **SOLVE)

    released: dict[str, Any] = {
        "init": task_arithmetic(tv),
        "iterations": 100,
        "tolerance": 1e-5,
        "dtype": torch.float32,
    }
    return {
        "average": (partial(average, tv), {}),
        "average, scaled": (lambda scale: scaled(scale, average(tv)), {"scale": LENGTHS}),
        "Fisher": (partial(fisher, tv, expected), {}),
        "Fisher, given labels": (partial(fisher, tv, given), {}),
        "Fisher, normalised": (partial(fisher, tv, normalised(expected)), {}),
        "Fisher, given labels, normalised": (partial(fisher, tv, normalised(given)), {}),
        "Fisher, normalised, scaled": (
            lambda scale: scaled(scale, fisher(tv, normalised(expected))),
            {"scale": LENGTHS},
        ),
        "RegMean": (partial(regmean, tv, inputs), {"alpha": [1.0, 0.9, 0.5, 0.1]}),
        "RegMean++": (partial(regmean_plus_plus, tv, suite.model, batches), {"alpha": [1.0, 0.95, 0.8]}),
        "RegMean, scaled": (lambda scale: scaled(scale, regmean(tv, inputs)), {"scale": LENGTHS}),
        "RegMean++, every layer": (
            partial(regmean_plus_plus, tv, suite.model, batches, depth=layer_by_layer(suite.model)),
            {"alpha": [1.0, 0.95]},
        ),
        "MaTS, as released": (partial(mats, tv, without_diagonals(kfac["given"]), **released), {}),
        "MaTS": (
            solve,
            {
                "labels": ["given", "expected"],
                "damping": [0.01, 0.001, 0.0001],
                "start": ["average", "task arithmetic"],
            },
        ),
        "MaTS, scaled": (
            lambda scale: scaled(scale, solve("expected", 0.001, "task arithmetic")),
            {"scale": LENGTHS},
        ),
    }


def layer_by_layer(model: nn.Module) -> Callable[[str], int]:
    """A depth for `regmean_plus_plus` that makes every layer a block of its own, in the order of modules."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return lambda tensor: order[tensor.rpartition(".")[0]]


def measure(suite: Suite, images: int = 100) -> pd.DataFrame:
    """Every choice of C on one suite.

    Returns:
        A row per method: ``test`` and ``validation`` averages and ``chosen``, its hyperparameters as JSON.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    rows = []
    for name, (method, grid) in tqdm(ways(suite, images).items(), desc="methods"):
        best: tuple[float, dict[str, Any], StateDict] | None = None
        for values in product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            merged = method(**chosen)
            accuracy = suite.evaluate(merged, split="validation").average
            if best is None or accuracy > best[0]:
                best = accuracy, chosen, merged
        assert best is not None
        test = suite.evaluate(best[2]).average
        rows.append({"method": name, "test": test, "validation": best[0], "chosen": json.dumps(best[1])})
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- how many images, and how many steps


def measure_images(suite: Suite, counts: Iterable[int] = IMAGES) -> pd.DataFrame:
    """Test averages by the number of images per task, with hyperparameters fixed: a row per number and method."""
    import pandas as pd
    from tqdm.auto import tqdm

    tv, rows = suite.task_vectors, []
    for images in tqdm(list(counts), desc="images"):
        gather = partial(suite.curvature, images=images, progress=False)
        inputs = gather("inputs")
        merges = {
            "Fisher, normalised": fisher(tv, normalised(gather("fisher"))),
            "RegMean": regmean(tv, inputs),
            "RegMean, α = 0.9": regmean(tv, inputs, alpha=0.9),
            "MaTS": mats(tv, damped(normalised(gather("kfac")), 0.001), **SOLVE),
        }
        rows += [
            {"images": images, "method": name, "test": suite.evaluate(merged).average}
            for name, merged in merges.items()
        ]
    return pd.DataFrame(rows)


def measure_steps(suite: Suite, images: int = 100) -> pd.DataFrame:
    """Conjugate gradients on the K-FAC system from several starts, without a preconditioner.

    Returns:
        A row per start and number of steps: ``residual`` (the median over tensors), ``test`` and ``validation``.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    tv = suite.task_vectors
    curvatures = normalised(suite.curvature("kfac", images=images, progress=False))
    starts = {
        "base": dict(suite.base),
        "average": average(tv),
        "task arithmetic": task_arithmetic(tv, scale=0.2),
        "TIES": ties(tv, scale=0.8),
        "Iso-C": iso_c(tv, scale=1.0),
        "RegMean": regmean(tv, curvatures),
    }
    rows = []
    for name, start in tqdm(starts.items(), desc="starts"):
        path = steps_of(tv, curvatures, STEPS, init=start, dtype=torch.float32)
        rows += [
            {
                "start": name,
                "steps": steps,
                "residual": residual,
                "test": suite.evaluate(merged).average,
                "validation": suite.evaluate(merged, split="validation").average,
            }
            for steps, (merged, residual) in path.items()
        ]
    return pd.DataFrame(rows)


def steps_of(
    tv: TaskVectors, curvatures: Any, steps: Iterable[int], **options: Any
) -> dict[int, tuple[StateDict, float]]:
    """One run of `mats`, looked at after several numbers of steps.

    Args:
        tv: K task vectors.
        curvatures: as for `mats`.
        steps: after how many to look.
        **options: passed on to `mats`.

    Returns:
        By number of steps: the merged state dict, and the median over tensors of the relative residual. A tensor that
        was done before stays as it was then.
    """
    at = sorted(set(steps))
    taus: dict[str, dict[int, Tensor]] = {}
    residuals: dict[str, dict[int, float]] = {}

    def watch(name: str, step: int, tau: Tensor, residual: float) -> None:
        for later in (n for n in at if n >= step):  # the last one to write is the last step that was taken
            taus.setdefault(name, {})[later] = tau
            residuals.setdefault(name, {})[later] = residual

    done = mats(tv, curvatures, iterations=at[-1], watch=watch, **options)
    path = {}
    for n in at:
        merged = {
            name: (tv.base[name] + taus[name][n].to(weight)).to(weight) if name in taus else weight
            for name, weight in done.items()
        }
        path[n] = merged, float(torch.tensor([by_step[n] for by_step in residuals.values()]).median())
    return path


# ---------------------------------------------------------------- the shipped tables


def results() -> pd.DataFrame:
    """Means over three seeds, a row per method: ``test``, its ``spread``, ``validation``, ``seed 0`` to ``seed 2``."""
    table = _read("curvature.csv")
    groups = table.groupby("method", sort=False)
    means = groups[["test", "validation"]].mean()
    means.insert(1, "spread", groups["test"].std())
    seeds = table.pivot(index="method", columns="seed", values="test").add_prefix("seed ")
    return means.join(seeds)


def published() -> pd.DataFrame:
    """Published averages (%), a row per method and a column per benchmark; columns do not compare with each other.

    T5-Large: Tam et al. (2024), at second hand. CLIP ViT-B/32 on eight tasks, family A: Yang et al. (2024); family C:
    fusion-bench's documentation (Tang et al., 2024), whose Fisher merging is another one than Matena and Raffel's.
    """
    return _read("published-curvature.csv").set_index("method")


def chosen() -> pd.DataFrame:
    """The hyperparameters chosen on validation images, a row per method and a column per seed."""
    table = _read("curvature.csv")
    return table.pivot(index="method", columns="seed", values="chosen").add_prefix("seed ")


def images() -> pd.DataFrame:
    """Test averages by the number of images: a row per number, a column per method, means over three seeds."""
    return _read("curvature-images.csv").pivot_table(index="images", columns="method", values="test", sort=False)


def steps() -> pd.DataFrame:
    """Conjugate gradients on the system of seed 0 from several starts: index start and steps.

    Columns: ``residual`` (the median over tensors), ``test`` and ``validation``.
    """
    return _read("curvature-steps.csv").set_index(["start", "steps"])[["residual", "test", "validation"]]


def _read(name: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(TABLES / name)
