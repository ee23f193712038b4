"""Explorers: one function draws, sliders call it.

In a running notebook an explorer has sliders; in the built page stands the figure that the same function draws at a
few settings. Each figure carries its result in words as its label, which the explorer prints above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mergekit_lite.data_free import task_arithmetic
from mergekit_lite.lab.plots import plot_merges
from mergekit_lite.suites.suite import Evaluation, Suite

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def merges_at(
    suite: Suite, method: Callable[..., Mapping[str, Tensor]], scales: Iterable[float], *, split: str = "validation"
) -> Figure:
    """The accuracy of one method's merge on every task, at one or several scales, as bars."""
    return _bars(
        {f"λ = {scale:.2f}": suite.evaluate(method(suite.task_vectors, scale=scale), split=split) for scale in scales}
    )


def edits_at(suite: Suite, task: str, scales: Iterable[float], *, split: str = "validation") -> Figure:
    """The accuracy on every task with one task vector added (scale > 0) or taken away (scale < 0), as bars."""
    tau = suite.task_vectors[task]
    return _bars(
        {
            f"{task}, λ = {scale:+.2f}": suite.evaluate(task_arithmetic(tau, scale=scale), split=split)
            for scale in scales
        }
    )


def pairs_at(
    suite: Suite, tasks: Sequence[str], scales: Iterable[tuple[float, float]], *, split: str = "validation"
) -> Figure:
    """Two tasks, each with its own task vector alone and with both: what they do to each other, as bars.

    Raises:
        ValueError: not two tasks.
    """
    if len(tasks) != 2:
        raise ValueError(f"expected two tasks, got {len(tasks)}.")
    pair = suite.task_vectors.subset(tasks)
    evaluations = {}
    for a, b in scales:
        alone = {}
        for task, own in ((tasks[0], [a, 0.0]), (tasks[1], [0.0, b])):
            alone[task] = suite.evaluate(task_arithmetic(pair, scale=own), split=split, tasks=[task])[task]
        where = f"λ = ({a:.1f}, {b:.1f})"
        evaluations[f"{where}, own task vector alone"] = Evaluation(alone, split=split)
        both = task_arithmetic(pair, scale=[a, b])
        evaluations[f"{where}, both"] = suite.evaluate(both, split=split, tasks=tasks)
    return _bars(evaluations)


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
    return _explorer(lambda scale: merges_at(suite, method, [scale], split=split), scale=_slider("scale λ", 0.2, span))


def explore_edit(suite: Suite, *, span: Sequence[float] = (-1.0, 1.0), split: str = "validation") -> Any:
    """A menu of tasks and a slider for λ: adding one task vector to the base, or taking it away.

    Args:
        suite: with experts.
        span: the smallest and the largest λ.
        split: the images to evaluate on.

    Returns:
        An ipywidgets container: a menu, a slider and the figure drawn by `edits_at`.
    """
    import ipywidgets as widgets

    return _explorer(
        lambda task, scale: edits_at(suite, task, [scale], split=split),
        task=widgets.Dropdown(options=list(suite.experts), description="task"),
        scale=_slider("scale λ", 0.5, span),
    )


def explore_pair(
    suite: Suite, tasks: Sequence[str], *, span: Sequence[float] = (0.0, 1.5), split: str = "validation"
) -> Any:
    """Two sliders: walk over the plane of two task vectors and watch what each does to the other's task.

    Args:
        suite: with experts.
        tasks: two names.
        span: the smallest and the largest λ of either.
        split: the images to evaluate on.

    Returns:
        An ipywidgets container: two sliders and the figure drawn by `pairs_at`.
    """
    return _explorer(
        lambda first, second: pairs_at(suite, tasks, [(first, second)], split=split),
        first=_slider(f"λ {tasks[0]}", 0.5, span),
        second=_slider(f"λ {tasks[1]}", 0.5, span),
    )


def _bars(evaluations: Mapping[str, Evaluation]) -> Figure:
    """Bars, with the averages in words as the figure's label."""
    figure = plot_merges(evaluations)
    words = [f"{name}: average accuracy {e.average:.3f} on {e.split} images" for name, e in evaluations.items()]
    figure.set_label("\n".join(words))
    return figure


def _slider(description: str, value: float, span: Sequence[float]) -> Any:
    import ipywidgets as widgets

    return widgets.FloatSlider(
        value=value, min=span[0], max=span[1], step=0.05, description=description, continuous_update=False
    )


def _explorer(draw: Callable[..., Figure], **controls: Any) -> Any:
    """Controls above the figure that `draw` makes of their values, and its result in words."""
    import ipywidgets as widgets
    import matplotlib.pyplot as plt

    def show(**settings: Any) -> None:
        figure = draw(**settings)
        print(figure.get_label())
        plt.show(figure)

    return widgets.interactive(show, **controls)
