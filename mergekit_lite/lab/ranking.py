"""How good the data-free methods are, as published and with their hyperparameters chosen: the table of chapter 2.6."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.data_free import (
    average,
    awd,
    breadcrumbs,
    consensus,
    dare,
    della,
    emr,
    iso_c,
    iso_cts,
    karcher,
    lines,
    metagpt,
    model_stock,
    pcb,
    task_arithmetic,
    ties,
    tsv,
    wudi,
)
from mergekit_lite.lab.sweeps import best, sweep
from mergekit_lite.suites.suite import Suite

if TYPE_CHECKING:
    import pandas as pd

TABLES = Path(__file__).parent / "tables"
SCALES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)  # of sums
LENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0)  # of vectors about as long as one task vector, or longer

# Each method, and what is tried of its hyperparameters; its defaults are the paper's. EMR is told the task of each
# image and so is no competitor of the others.
WAYS: dict[str, tuple[Callable[..., Mapping[str, Any]], dict[str, Sequence[Any]]]] = {
    "average": (average, {}),
    "MetaGPT": (metagpt, {}),
    "Model Stock": (model_stock, {}),
    "task arithmetic": (task_arithmetic, {"scale": SCALES}),
    "Karcher mean": (karcher, {"scale": LENGTHS}),
    "LiNeS": (lines, {"shallow": (0.1, 0.2, 0.3, 0.4), "deep": (0.1, 0.15, 0.2, 0.3)}),
    "AWD": (awd, {"granularity": ["row"], "relative": [True], "alpha": [0.1], "scale": SCALES}),
    "Breadcrumbs": (breadcrumbs, {"density": (0.15, 0.9), "scale": (*SCALES[2:], 0.7, 1.0)}),
    "DARE": (dare, {"drop": (0.3, 0.6, 0.9), "scale": SCALES[:5]}),
    "DELLA": (della, {"drop": (0.3, 0.6), "scale": LENGTHS}),
    "Consensus": (consensus, {"strength": (0.2, 0.4, 0.6), "scale": (*SCALES[2:], 0.7)}),
    "TIES": (ties, {"scale": LENGTHS}),
    "PCB": (pcb, {"density": (0.1, 0.2), "scale": LENGTHS[:6]}),
    "TSV": (tsv, {"scale": LENGTHS}),
    "Iso-C": (iso_c, {"scale": LENGTHS}),
    "Iso-CTS": (iso_cts, {"scale": LENGTHS}),
    "WUDI": (wudi, {"learning_rate": (1e-5, 1e-4, 1e-3), "scale": LENGTHS[:6]}),
    "WUDI, exact": (partial(wudi, solver="exact"), {"ridge": (0.1, 1.0, 10.0), "scale": LENGTHS[:6]}),
    "EMR": (emr, {}),
}


def measure(suite: Suite) -> pd.DataFrame:
    """Every method on one suite: as published, and with what is best on validation images.

    Returns:
        One row per method: ``default``, ``tuned`` (test accuracies), ``validation`` (of the tuned one) and ``chosen``
        (its hyperparameters, as JSON).
    """
    import pandas as pd
    from tqdm.auto import tqdm

    rows = []
    for name, (method, grid) in tqdm(WAYS.items(), desc="methods"):
        merged = method(suite.task_vectors)
        default = suite.evaluate(merged).average
        row: dict[str, Any] = {"method": name, "default": default, "tuned": default, "chosen": "{}"}
        if grid:
            table = sweep(suite, method, progress=False, **grid)
            chosen = best(table, grid)
            row |= {"tuned": suite.evaluate(method(suite.task_vectors, **chosen)).average, "chosen": json.dumps(chosen)}
            row["validation"] = float(table["average"].max())
        else:
            row["validation"] = suite.evaluate(merged, split="validation").average
        rows.append(row)
    return pd.DataFrame(rows)


def by_seed() -> pd.DataFrame:
    """What the study found with pocket8: a row per seed and method, as `measure` gives them."""
    import pandas as pd

    return pd.read_csv(TABLES / "data-free.csv")


def results() -> pd.DataFrame:
    """Means and spreads (standard deviations) over three seeds, a row per method, best tuned method last.

    Columns: ``default``, ``default spread``, ``tuned``, ``tuned spread``: test accuracies.
    """
    import pandas as pd

    groups = by_seed().groupby("method", sort=False)
    table = pd.DataFrame(
        {
            f"{column}{suffix}": values
            for column in ("default", "tuned")
            for suffix, values in (("", groups[column].mean()), (" spread", groups[column].std()))
        }
    )
    return table.sort_values("tuned")


def published() -> pd.DataFrame:
    """Published averages (%) of CLIP ViT-B/32 over eight tasks, by method, with checkpoints' family and source.

    Accuracies of different families do not compare: the experts differ.
    """
    import pandas as pd

    return pd.read_csv(TABLES / "published.csv", index_col="method")


def costs() -> pd.DataFrame:
    """What merging eight experts of ViT-B/32's size from files costs (`benchmarks/vit.py`).

    Columns: by tool, the time on one thread over that of reading all files once and writing one, infinite if the tool
    wanted more than 16 GiB or 200 s, and NaN if it was not asked; and ``MB``, the memory that this package used.
    """
    import pandas as pd

    table = pd.read_csv(TABLES / "merge-benchmark.csv").fillna({"time / floor": float("inf")})
    names = {getattr(way, "__name__", "wudi"): name for name, (way, _) in WAYS.items() if name != "WUDI"}
    table["method"] = table["method"].map(names)
    times = table.pivot(index="method", columns="tool", values="time / floor")
    ours = table[table["tool"] == "mergekit_lite"].set_index("method")["memory in MB"]
    tools = [tool for tool in ("mergekit_lite", "mergekit", "fusion-bench") if tool in times]
    return (
        times.reindex([name for name in WAYS if name in times.index])[tools].assign(MB=ours).rename_axis(columns=None)
    )


def rank_correlation(a: pd.Series, b: pd.Series) -> float:
    r"""Spearman's :math:`\rho`: how far two measurements put the same methods in the same order, 1 if they do.

    Only methods that stand in both (by their index) count.
    """
    import pandas as pd

    both = pd.concat([a, b], axis=1, join="inner").dropna()
    return float(both.corr(method="spearman").iloc[0, 1])
