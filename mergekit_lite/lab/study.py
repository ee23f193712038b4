"""What pocket8 shows, and how its recipe was found: ``python -m mergekit_lite.lab.study``.

``figures`` merges the shipped experts of every seed by each data-free method, with its scale chosen on
validation images, and writes test accuracies, mean and spread, to ``book/tables``. ``trials`` trains the
experts of one seed by other recipes and writes the same figures for each: the record of what was tried.
``variants`` compares the relatives of pocket8, ``edits`` measures forgetting and analogies over the seeds, and
``analogies`` tries four changes of the images; ``orthogonality`` measures AWD, MetaGPT and the best scales there are;
``signs`` and ``data-free`` measure the methods that need nothing but the weights, ``curvature`` those that need a few
images, ``adaptation`` those that adapt to images without labels. Each writes its table to ``book/tables``, the last
five into the package, for the chapters read them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from mergekit_lite.checkpoints import StateDict, atomic_path
from mergekit_lite.data_free import analogy, average, negation, pcb, task_arithmetic, ties, tsv
from mergekit_lite.geometry import largest_cosine
from mergekit_lite.lab.adaptation import measure as measure_adaptation
from mergekit_lite.lab.curvature import measure as measure_curvature
from mergekit_lite.lab.curvature import measure_images, measure_steps
from mergekit_lite.lab.orthogonality import TABLES as SHIPPED
from mergekit_lite.lab.orthogonality import measure as measure_orthogonality
from mergekit_lite.lab.ranking import measure as measure_all
from mergekit_lite.lab.signs import measure_experts
from mergekit_lite.lab.signs import measure_merges as measure_signs
from mergekit_lite.lab.sweeps import best, sweep
from mergekit_lite.suites.build import build, build_variant
from mergekit_lite.suites.finetune import finetune
from mergekit_lite.suites.pocket import SUITES, load_suite
from mergekit_lite.suites.recipe import Recipe
from mergekit_lite.suites.suite import Suite
from mergekit_lite.suites.tasks import SPLITS, Split, Task
from mergekit_lite.suites.variants import FOUR
from mergekit_lite.task_vectors import TaskVectors

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Measure pocket8.")
TABLES = Path("book/tables")

# What is tried for each method; the best on validation images is reported on test images.
GRIDS: dict[str, tuple[Callable[..., Mapping[str, Tensor]], dict[str, list[float]]]] = {
    "average": (average, {}),
    "task arithmetic": (task_arithmetic, {"scale": [0.05, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]}),
    "TIES": (ties, {"scale": [0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5]}),
    "PCB": (pcb, {"scale": [0.4, 0.6, 0.8, 1.0, 1.3, 1.6], "density": [0.1, 0.2]}),
    "TSV": (tsv, {"scale": [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0]}),
}

# What was tried: changes to the recipe, one at a time. Each takes about seven minutes on one core.
TRIALS: dict[str, dict[str, Any]] = {
    "pocket8": {},
    "each task its own centre": {"centre": "task"},
    "no centre": {"centre": "none"},
    "temperature 20": {"temperature": 20.0},
    "48 pixels": {"resolution": 48},
    "200 steps": {"steps": 200},
    "no augmentation": {"augmentation": 0.0},
    "first two stages frozen": {"frozen": ("conv_stem", "bn1", "blocks.0", "blocks.1")},
}


def measure(suite: Suite, jobs: int = 1) -> dict[str, float]:
    """Test averages of base, merges and experts, the scale each merge was given, and the largest cosine."""
    figures = {"base": suite.evaluate().average}
    for name, (method, grid) in GRIDS.items():
        chosen = best(sweep(suite, method, jobs=jobs, **grid), grid) if grid else {}  # type: ignore[arg-type]
        figures[name] = suite.evaluate(method(suite.task_vectors, **chosen)).average
        figures |= {f"{name} {hyperparameter}": value for hyperparameter, value in chosen.items()}
    figures["experts"] = suite.evaluate_experts().average
    figures["largest |cosine|"] = largest_cosine(suite.task_vectors)
    return figures


@app.command()
def figures(jobs: Annotated[int, typer.Option(help="processes")] = 1, out: Path = TABLES) -> None:
    """Measure every shipped seed and write the table of figures."""
    import pandas as pd

    seeds = sorted(int(folder.name.removeprefix("seed")) for folder in (SUITES / "pocket8").glob("seed*"))
    rows = {f"seed {seed}": measure(load_suite("pocket8", seed=seed, device="cpu"), jobs) for seed in seeds}
    table = pd.DataFrame(rows)
    table = table.assign(mean=table.mean(axis=1), spread=table.std(axis=1)).round(4)
    _write(table, out / "pocket8-figures.csv", "test average of")


@app.command()
def trials(jobs: Annotated[int, typer.Option(help="processes")] = 1, out: Path = TABLES) -> None:
    """Train seed 0 by each of the recipes that were tried and measure it; goes on where it was interrupted."""
    import pandas as pd

    path = out / "pocket8-trials.csv"
    rows = pd.read_csv(path, index_col=0).to_dict("index") if path.exists() else {}
    for name, changes in TRIALS.items():
        if name not in rows:
            with tempfile.TemporaryDirectory() as folder:
                measured = measure(build(Recipe().but(**changes), 0, Path(folder)), jobs)
            rows[name] = {row: value for row, value in measured.items() if not row.endswith(("scale", "density"))}
            _write(pd.DataFrame(rows).T.round(3), path, "recipe")


@app.command()
def variants(work: Path = Path("suites"), out: Path = TABLES) -> None:
    """Four tasks from four kinds of base and training, three seeds each (about 25 minutes; goes on in `work`)."""
    import pandas as pd

    rows: dict[str, list[dict[str, float]]] = {}
    for seed in (0, 1, 2):
        for name in ("pocket8", "pocket8-tangent", "pocket8-far", "pocket8-scratch"):
            if name == "pocket8":
                suite = load_suite(name, seed=seed, device="cpu").cut(tasks=FOUR)
            else:
                suite = build_variant(name, seed, work / name, trained=FOUR)
            rows.setdefault(name, []).append(_four(suite))
    tables = {name: pd.DataFrame(measured) for name, measured in rows.items()}
    table = pd.DataFrame({name: measured.mean() for name, measured in tables.items()}).T
    table["spread of the merge"] = [measured["merge"].std() for measured in tables.values()]
    _write(table.round(3), out / "variants.csv", "suite")


def _four(suite: Suite) -> dict[str, float]:
    """Base, experts and the best task arithmetic of a suite."""
    tv, scales = suite.task_vectors, (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    merges = {scale: task_arithmetic(tv, scale=scale) for scale in scales}
    chosen = max(scales, key=lambda scale: suite.evaluate(merges[scale], split="validation").average)
    return {
        "base": suite.evaluate().average,
        "merge": suite.evaluate(merges[chosen]).average,
        "scale": chosen,
        "experts": suite.evaluate_experts().average,
        "largest |cosine|": largest_cosine(tv),
        "length of a task vector": float(tv.gram().diagonal().sqrt().mean()),
    }


@app.command()
def edits(work: Path = Path("suites"), out: Path = TABLES) -> None:
    """Forgetting each task, and analogies to noise, three seeds each, on test images (about six minutes)."""
    import pandas as pd

    rows = {}
    for seed in (0, 1, 2):
        suite = load_suite("pocket8", seed=seed, device="cpu")
        noisy = build_variant("pocket8-noisy", seed, work / "pocket8-noisy")
        rows[f"seed {seed}"] = _forgetting(suite) | _noise(suite, noisy, "letters") | _noise(suite, noisy, "scripts")
    table = pd.DataFrame(rows)
    _write(table.assign(mean=table.mean(axis=1), spread=table.std(axis=1)), out / "edits.csv", "test accuracy of")


def _forgetting(suite: Suite) -> dict[str, float]:
    """Walk against each task vector as far as the control tasks allow; means over the eight tasks to forget."""
    before = {split: suite.evaluate(split=split) for split in ("validation", "test")}
    rows = []
    for name in suite.tasks:
        control = [task for task in suite.tasks if task != name]

        def kept(accuracy: Mapping[str, float], control: list[str] = control) -> float:
            return sum(accuracy[task] for task in control) / len(control)

        chosen = suite.base
        for scale in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0):
            edited = negation(suite.task_vectors, forget=name, scale=scale)
            after = suite.evaluate(edited, split="validation", tasks=control)
            if after.average < 0.95 * kept(before["validation"]):
                break
            chosen = edited
        result = suite.evaluate(chosen)
        rows.append((before["test"][name], result[name], kept(before["test"]), kept(result)))
    names = (
        "the task to forget, before",
        "the task to forget, negated",
        "the control tasks, before",
        "the control tasks, task negated",
    )
    return {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def _noise(suite: Suite, noisy: Suite, target: str) -> dict[str, float]:
    """Networks for noisy images of a task that never saw one; scales chosen on validation images."""

    def tested(merges: list[StateDict]) -> float:
        best = max(merges, key=lambda merge: noisy.evaluate(merge, split="validation", tasks=[target])[target])
        return noisy.evaluate(best, tasks=[target])[target]

    ways = _without_examples(suite, noisy.experts["mnist"], target)
    return {f"noisy {target}, {name}".replace("changed", "noisy"): tested(merges) for name, merges in ways.items()}


def _without_examples(suite: Suite, changed: StateDict, target: str) -> dict[str, list[StateDict]]:
    """Ways to a network for changed images of a task, from an expert for changed mnist, at several scales."""
    experts = {"mnist": suite.experts["mnist"], "changed": changed, target: suite.experts[target]}
    tv, scales = TaskVectors(suite.base, experts), (0.4, 0.6, 0.8, 1.0)
    both = tv.subset([target, "changed"])
    return {
        "expert for clean images": [suite.experts[target]],
        "expert + changed mnist": [task_arithmetic(both, scale=s) for s in scales],
        "analogy": [analogy(tv, a="mnist", b="changed", c=target, scale=s) for s in scales],
    }


def _by_seed(
    work: Path, name: str, measured: Callable[[Suite], pd.DataFrame], seeds: Iterable[int] = (0, 1, 2)
) -> pd.DataFrame:
    """One table for several seeds, with a column ``seed``; what lies in `work` is not measured again."""
    import pandas as pd

    tables = []
    for seed in seeds:
        path = work / f"{name}{seed}.csv"
        if not path.exists():
            work.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                measured(load_suite(seed=seed, device="cpu")).to_csv(temporary, index=False)
        tables.append(pd.read_csv(path).assign(seed=seed))
    return pd.concat(tables)


def _each_seed(
    work: Path, name: str, measured: Callable[[Suite], tuple[pd.DataFrame, pd.DataFrame]]
) -> tuple[dict[int, pd.DataFrame], dict[int, pd.DataFrame]]:
    """A table and curves for each of three seeds; what lies in `work` is not measured again."""
    import pandas as pd

    tables, curves = {}, {}
    for seed in (0, 1, 2):
        paths = [work / f"{name}-{what}{seed}.csv" for what in ("table", "curves")]
        if not all(path.exists() for path in paths):
            work.mkdir(parents=True, exist_ok=True)
            for path, frame in zip(paths, measured(load_suite(seed=seed, device="cpu")), strict=True):
                with atomic_path(path) as temporary:
                    frame.to_csv(temporary, index=False)
        tables[seed], curves[seed] = (pd.read_csv(path) for path in paths)
    return tables, curves


@app.command()
def orthogonality(work: Path = Path("suites"), out: Path = SHIPPED) -> None:
    """AWD, MetaGPT and the best scales there are, three seeds each (40 minutes; goes on in `work`)."""
    import pandas as pd

    tables, curves = _each_seed(work, "orthogonality", measure_orthogonality)
    by_method = pd.concat(tables).groupby("method", sort=False)
    table = by_method.mean()
    table.insert(table.columns.get_loc("test") + 1, "spread", by_method["test"].std())
    _write(table, out / "orthogonality.csv", "method")
    curve = pd.concat(curves).groupby(["method", "scale"], sort=False).mean().reset_index(level="scale")
    _write(curve, out / "orthogonality-curves.csv", "method")


@app.command("data-free")
def data_free(work: Path = Path("suites"), out: Path = SHIPPED) -> None:
    """Every data-free method, as published and tuned, three seeds each (20 minutes; goes on in `work`)."""
    _write(_by_seed(work, "data-free", measure_all).set_index("method"), out / "data-free.csv", "method")


@app.command()
def curvature(work: Path = Path("suites"), out: Path = SHIPPED) -> None:
    """Fisher, RegMean, MaTS and numbers of images, three seeds each; steps of one (an hour; goes on in `work`)."""
    _write(_by_seed(work, "curvature", measure_curvature).set_index("method"), out / "curvature.csv", "method")
    table = _by_seed(work, "curvature-images", measure_images).set_index("images")
    _write(table, out / "curvature-images.csv", "images")
    table = _by_seed(work, "curvature-steps", measure_steps, seeds=[0]).set_index("start")
    _write(table, out / "curvature-steps.csv", "start", digits="%.3g")


@app.command()
def adaptation(work: Path = Path("suites"), out: Path = SHIPPED) -> None:
    """AdaMerging, Concrete and WEMoE, three seeds each (an hour and a half; goes on in `work`)."""
    import pandas as pd

    tables, curves = _each_seed(work, "adaptation", measure_adaptation)
    for name, parts in (("adaptation", tables), ("adaptation-curves", curves)):
        table = pd.concat([part.assign(seed=seed) for seed, part in parts.items()]).set_index("method")
        _write(table, out / f"{name}.csv", "method", digits="%.4f")


@app.command()
def signs(work: Path = Path("suites"), out: Path = SHIPPED) -> None:
    """TIES step by step, DARE and their relatives, three seeds each (20 minutes; goes on in `work`)."""
    import pandas as pd

    tables, curves = _each_seed(work, "signs", measure_signs)
    by_merge = pd.concat(tables).groupby("merge", sort=False)
    by_seed = {f"seed {seed}": table.set_index("merge")["test"] for seed, table in tables.items()}
    table = by_merge.mean().assign(spread=by_merge["test"].std(), **by_seed)
    _write(table, out / "signs.csv", "merge")
    curve = pd.concat(curves).groupby(["merge", "distance"], sort=False).mean().reset_index(level="distance")
    _write(curve, out / "signs-curves.csv", "merge")
    _write(measure_experts(load_suite("pocket8", device="cpu")), out / "signs-experts.csv", "kept")


@app.command()
def analogies(out: Path = TABLES) -> None:
    """Learn four changes of the images from mnist, and transfer them to other tasks (about four minutes)."""
    import pandas as pd

    suite = load_suite("pocket8", device="cpu")
    rows = [row for change in CHANGES for row in _transfer(suite, change)]
    table = pd.DataFrame(rows).set_index("change of the images").round(3)
    _write(table, out / "analogies.csv", "change of the images")


def _transfer(suite: Suite, change: str) -> list[dict[str, Any]]:
    """What an expert for changed mnist is worth for other changed tasks, on validation images."""

    def changed(split: Split) -> Split:
        return Split(CHANGES[change](split.images), split.labels)

    tasks = {
        name: Task(name, task.classes, *(changed(task.split(split)) for split in SPLITS))
        for name, task in suite.tasks.items()
    }
    elsewhere = replace(suite, tasks=tasks, experts={})
    moved = finetune(elsewhere, "mnist")
    rows = []
    for target in ("letters", "fashion", "scripts"):

        def best_of(merges: list[StateDict], target: str = target) -> float:
            return max(elsewhere.evaluate(merge, split="validation", tasks=[target])[target] for merge in merges)

        ways = {"base": [suite.base]} | _without_examples(suite, moved, target)
        rows.append(
            {"change of the images": change, "task": target} | {name: best_of(merges) for name, merges in ways.items()}
        )
    return rows


def _coarse(images: Tensor) -> Tensor:
    """Images as ten by ten pixels."""
    small = F.interpolate(images.float(), (10, 10), mode="area")
    return F.interpolate(small, images.shape[-2:], mode="nearest").byte()


def _noisy(images: Tensor) -> Tensor:
    """Images with Gaussian noise of 60 grey values."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + 60 * noise).clamp(0, 255).byte()


# Changes of the images, for analogies.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": _noisy,
    "coarse pixels": _coarse,
    "turned by 90 degrees": lambda images: images.rot90(1, (-2, -1)),
    "inverted": lambda images: 255 - images,
}


def _write(table: pd.DataFrame, path: Path, corner: str, digits: str = "%.3f") -> None:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index_label=corner, float_format=digits)
    typer.echo(table.round(3).to_string())
    typer.echo(f"wrote {path}")


if __name__ == "__main__":
    app()
