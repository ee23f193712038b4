"""What disentangling and choosing scales without data are worth, for one suite: the tables of chapters 2.1 to 2.3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mergekit_lite.data_free import average, disentangle, metagpt, task_arithmetic
from mergekit_lite.geometry import rows_of
from mergekit_lite.lab.headroom import fit_scales, scaled
from mergekit_lite.suites.suite import Suite
from mergekit_lite.task_vectors import TaskVectors

if TYPE_CHECKING:
    import pandas as pd

TABLES = Path(__file__).parent / "tables"
SCALES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
ALPHAS = (0.01, 0.1, 0.3)  # in units of the task vectors' lengths


def is_weight_matrix(name: str, theta0: Tensor) -> bool:
    """What the recipe of AWD's co-author disentangles: no biases, no normalisation."""
    return theta0.ndim >= 2


# Ways to disentangle: arguments of `disentangle`, and the α to choose from.
WAYS: dict[str, tuple[dict[str, Any], Sequence[float]]] = {
    "AWD as published": ({}, (0.1,)),
    "AWD, rows, co-author's recipe": (
        {
            "granularity": "row",
            "row_mean": True,
            "step": 1e-5,
            "iterations": 2000,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "where": is_weight_matrix,
        },
        (0.01, 0.1),
    ),
}
for _granularity in ("whole", "layer", "row"):
    for _solver in ("trajectory", "exact"):
        WAYS[f"AWD, {_granularity}, {_solver}"] = (
            {"granularity": _granularity, "solver": _solver, "relative": True},
            ALPHAS,
        )


def results() -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the study found with pocket8, means over three seeds; it travels with the package.

    Returns:
        One row per method, by name: α and λ that were chosen, accuracies on validation and test images, the spread
        of the latter, lengths; and accuracies on validation images, one row per λ and one column per method.
    """
    import pandas as pd

    table = pd.read_csv(TABLES / "orthogonality.csv", index_col="method")
    curves = pd.read_csv(TABLES / "orthogonality-curves.csv")
    return table, curves.pivot(index="scale", columns="method", values="validation")


def pythagoras(tv: TaskVectors) -> TaskVectors:
    r"""Row by row, task vectors whose sum is no longer than it would be if they were orthogonal.

    A control for AWD: within a row it changes no direction and no cosine, only lengths, by the factor
    :math:`\min(1, \sqrt{\sum_k \|\tau_k\|^2} \,/\, \|\sum_k \tau_k\|)`.
    """

    def shorten(name: str, taus: Tensor) -> Tensor:
        rows = rows_of(taus)  # (K, rows, columns)
        if_orthogonal = rows.square().sum((0, 2)).sqrt()
        factor = if_orthogonal / rows.sum(0).norm(dim=1).clamp(min=1e-12)
        return (rows * factor.clamp(max=1)[:, None]).view(taus.shape)

    return tv.transform(shorten)


def measure(suite: Suite, say: Callable[[str], Any] = print) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All methods on one suite, everything chosen on validation images.

    Returns:
        One row per method: α, λ, accuracy on validation and test images, how long the sum of the task vectors is and
        how long δ; and one row per method and λ: accuracy on validation images.
    """
    import pandas as pd

    tv = suite.task_vectors
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []

    def validation(state: Any) -> float:
        return suite.evaluate(state, split="validation").average

    def sweep_scale(vectors: TaskVectors) -> dict[float, float]:
        return {scale: validation(task_arithmetic(vectors, scale=scale)) for scale in SCALES}

    def report(
        method: str, alpha: float | None, vectors: TaskVectors, length: float, curve: dict[float, float]
    ) -> None:
        scale = max(curve, key=lambda scale: curve[scale])
        total = vectors.gram().sum().sqrt().item()
        test = suite.evaluate(task_arithmetic(vectors, scale=scale)).average
        rows.append(
            {
                "method": method,
                "alpha": alpha,
                "scale": scale,
                "validation": curve[scale],
                "test": test,
                "length of the sum": total,
                "length of delta": length,
            }
        )
        curves.extend({"method": method, "scale": s, "validation": a, "distance": s * total} for s, a in curve.items())
        say(f"{method}: {test:.3f}")

    report("task arithmetic", None, tv, 0.0, sweep_scale(tv))
    for method, (options, alphas) in WAYS.items():
        found = {alpha: disentangle(tv, alpha=alpha, **options) for alpha in alphas}
        tried = {alpha: sweep_scale(found[alpha].task_vectors) for alpha in alphas}
        alpha = max(tried, key=lambda alpha: max(tried[alpha].values()))
        report(method, alpha, found[alpha].task_vectors, found[alpha].lengths[-1].item(), tried[alpha])

    control = pythagoras(tv)
    report("control: Pythagoras per row", None, control, 0.0, sweep_scale(control))
    merges = {
        "average": average(tv),
        "task arithmetic, λ = 0.3": task_arithmetic(tv, scale=0.3),
        "MetaGPT": metagpt(tv),
        "MetaGPT, layer": metagpt(tv, granularity="layer"),
    }
    without_labels = fit_scales(suite, start=rows[0]["scale"], labels=False)
    merges["scales chosen by entropy, whole"] = scaled(tv, without_labels)
    for granularity in ("whole", "layer", "row"):
        scales = fit_scales(suite, granularity, start=rows[0]["scale"])
        merges[f"scales chosen with labels, {granularity}"] = scaled(tv, scales)
    for method, merged in merges.items():
        rows.append({"method": method, "validation": validation(merged), "test": suite.evaluate(merged).average})
        say(f"{method}: {rows[-1]['test']:.3f}")
    return pd.DataFrame(rows), pd.DataFrame(curves)
