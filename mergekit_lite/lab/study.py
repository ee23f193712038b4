"""What pocket8 shows, and how its recipe was found: ``python -m mergekit_lite.lab.study``.

``figures`` merges the shipped experts of every seed by each data-free method, with its scale chosen on
validation images, and writes test accuracies, mean and spread, to ``book/tables``. ``trials`` trains the
experts of one seed by other recipes and writes the same figures for each: the record of what was tried.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from torch import Tensor

from mergekit_lite.checkpoints import atomic_path
from mergekit_lite.data_free import average, pcb, task_arithmetic, ties, tsv
from mergekit_lite.geometry import largest_cosine
from mergekit_lite.lab.sweeps import best, sweep
from mergekit_lite.suites.build import build
from mergekit_lite.suites.pocket import SUITES, load_suite
from mergekit_lite.suites.recipe import Recipe
from mergekit_lite.suites.suite import Suite

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


def _write(table: pd.DataFrame, path: Path, corner: str) -> None:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index_label=corner)
    typer.echo(table.round(3).to_string())
    typer.echo(f"wrote {path}")


if __name__ == "__main__":
    app()
