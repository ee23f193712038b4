"""Explorers: one function draws, a slider calls it.

In a running notebook the explorer has a slider; in the built page stands the figure that the same
function draws at a few settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mergekit_lite.lab.plots import plot_merges
from mergekit_lite.suites.suite import Suite

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def merges_at(
    suite: Suite, method: Callable[..., Mapping[str, Tensor]], scales: Iterable[float], *, split: str = "validation"
) -> Figure:
    """The accuracy of one method's merge on every task, at one or several scales, as bars."""
    evaluations = {}
    for scale in scales:
        evaluations[f"λ = {scale:.2f}"] = suite.evaluate(method(suite.task_vectors, scale=scale), split=split)
    return plot_merges(evaluations)


def explore_scale(
    suite: Suite,
    method: Callable[..., Mapping[str, Tensor]],
    *,
    span: Sequence[float] = (0.0, 1.0),
    split: str = "validation",
) -> Any:
    """A slider for λ: each setting merges the experts anew and evaluates the merge on all tasks.

    Args:
        suite: with experts.
        method: a merging method with a ``scale``.
        span: the smallest and the largest λ.
        split: the images to evaluate on.

    Returns:
        An ipywidgets container: a slider and the figure drawn by `merges_at`.
    """
    import ipywidgets as widgets
    import matplotlib.pyplot as plt

    def draw(scale: float) -> None:
        plt.show(merges_at(suite, method, [scale], split=split))

    slider = widgets.FloatSlider(
        value=0.2, min=span[0], max=span[1], step=0.05, description="scale λ", continuous_update=False
    )
    return widgets.interactive(draw, scale=slider)
