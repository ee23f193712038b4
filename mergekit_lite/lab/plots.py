"""The book's pictures: each function draws one figure and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_lite.data_free.awd import Disentangled
from mergekit_lite.geometry import cosines
from mergekit_lite.suites.suite import Evaluation, Suite
from mergekit_lite.task_vectors import TaskVectors

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Okabe and Ito's palette: its colours differ in brightness too, so they survive colour blindness and print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C00", "#000000")


def show_images(suite: Suite, per_task: int = 8) -> Figure:
    """A row of test images per task, one of each of its first classes."""
    import matplotlib.pyplot as plt

    tasks = list(suite.tasks.values())
    figure, axes = plt.subplots(len(tasks), per_task, figsize=(per_task * 0.9, len(tasks) * 1.05), squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for label, axis in enumerate(row):
            axis.axis("off")
            matching = (task.test.labels == label).nonzero()
            if len(matching):
                pixels = task.test.images[matching[0, 0]].permute(1, 2, 0)
                axis.imshow(pixels.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        row[0].set_title(task.name, loc="left", fontsize=9)
    figure.tight_layout(pad=0.3)
    return figure


def plot_merges(merges: Mapping[str, Evaluation]) -> Figure:
    """Accuracy per task as groups of bars: one colour per merge, one group per task, the average at the end."""
    import matplotlib.pyplot as plt

    tasks = list(next(iter(merges.values())))
    figure, axis = plt.subplots(figsize=(9, 3.4))
    width = 0.8 / len(merges)
    positions = torch.arange(len(tasks) + 1).double()
    positions[-1] += 0.5  # a gap before the average
    for i, (name, evaluation) in enumerate(merges.items()):
        heights = [*evaluation.values(), evaluation.average]
        left = positions + (i - (len(merges) - 1) / 2) * width
        axis.bar(left.numpy(), heights, width, label=name, color=COLOURS[i % 8])
    axis.set_xticks(positions.numpy(), [task.replace("_", "\n") for task in tasks] + ["average"], fontsize=8)
    axis.set(ylim=(0, 1), ylabel="accuracy")
    axis.legend(ncols=len(merges), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def plot_sweep(table: pd.DataFrame, x: str = "scale", *, references: Mapping[str, float] | None = None) -> Figure:
    """Accuracy against a hyperparameter: thin lines for the tasks, a thick one for the average.

    Args:
        table: what `mergekit_lite.lab.sweep` returned.
        x: the hyperparameter on the horizontal axis.
        references: names and averages to draw as dashed horizontal lines, such as the base's.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    tasks = list(table.columns[list(table.columns).index(x) + 1 : -1])
    for task, colour in zip(tasks, COLOURS, strict=False):
        axis.plot(table[x], table[task], lw=1, alpha=0.6, color=colour, label=task)
    axis.plot(table[x], table["average"], lw=3, color="black", label="average")
    for (name, value), style in zip((references or {}).items(), ("--", ":", "-."), strict=False):
        axis.axhline(value, color="gray", ls=style, lw=1.5, label=name)
    axis.set(xlabel=r"scale $\lambda$" if x == "scale" else x, ylabel="accuracy", ylim=(0, 1))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def plot_curves(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    ylabel: str = "accuracy",
    log: bool = False,
) -> Figure:
    """Several curves over one axis, with markers where something was measured.

    Args:
        x: n positions.
        curves: n values each, by the name to show in the legend.
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        log: make the horizontal axis logarithmic.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    markers = "osD^vP*X"
    for i, (name, values) in enumerate(curves.items()):
        axis.plot(x, list(values), marker=markers[i % 8], ms=5, color=COLOURS[i % 8], label=name)
    if log:
        axis.set_xscale("log")
        axis.set_xticks(list(x), [f"{value:g}" for value in x])
        axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def plot_maps(
    maps: Mapping[str, Tensor], grid: Sequence[float], tasks: Sequence[str], *, label: str, top: float | None = None
) -> Figure:
    r"""Heat maps over the plane of two scales, two in a row, with one colour scale.

    Args:
        maps: (n, n) each, row i at :math:`\lambda_1` = grid[i], column j at :math:`\lambda_2` = grid[j].
        grid: the n scales, evenly spaced.
        tasks: the names of the two tasks.
        label: what the colours mean.
        top: the value of the brightest colour; by default the largest there is.
    """
    import matplotlib.pyplot as plt

    columns = min(2, len(maps))
    rows = -(-len(maps) // columns)
    size = (3.7 * columns + 1, 3.7 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    half = (grid[1] - grid[0]) / 2
    extent = (grid[0] - half, grid[-1] + half, grid[0] - half, grid[-1] + half)
    brightest = top if top is not None else max(float(values.max()) for values in maps.values())
    for axis, (title, values) in zip(axes.flat, maps.items(), strict=False):
        # imshow's rows run upwards here, and they are the vertical axis: task 2 goes up, task 1 to the right.
        image = axis.imshow(values.T.numpy(), origin="lower", extent=extent, vmin=0, vmax=brightest, cmap="viridis")
        axis.set_title(title, fontsize=10)
        axis.set_xticks(list(grid), [f"{value:g}" for value in grid])
        axis.set_yticks(list(grid), [f"{value:g}" for value in grid])
        axis.set(xlabel=rf"$\lambda$ of {tasks[0]}", ylabel=rf"$\lambda$ of {tasks[1]}")
        for point, name, place in (
            ((0, 0), "base", (5, 5)),
            ((1, 0), "expert", (-34, 5)),
            ((0, 1), "expert", (5, -12)),
        ):
            if grid[0] <= min(point) and max(point) <= grid[-1]:
                axis.plot(*point, "o", color="white", mec="black", ms=6)
                axis.annotate(name, point, xytext=place, textcoords="offset points", color="white", fontsize=8)
    figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    return figure


def plot_cosines(tv: TaskVectors) -> Figure:
    """The K x K matrix of cosines between task vectors, as a labelled heat map."""
    return plot_matrices({"": cosines(tv)}, tv.names, label="cosine", limit=1.0)


def plot_matrices(
    matrices: Mapping[str, Tensor], names: Sequence[str], *, label: str, limit: float | None = None
) -> Figure:
    """K x K matrices side by side as heat maps, each entry written into its field; red is above zero, blue below.

    Args:
        matrices: (K, K) each, by title.
        names: of the K rows and columns.
        label: what the numbers mean.
        limit: the value of the deepest red; by default the largest absolute value there is.
    """
    import matplotlib.pyplot as plt

    limit = limit or max(float(matrix.abs().max()) for matrix in matrices.values())
    size = (5.2 * len(matrices) + 0.6, 4.8)
    figure, axes = plt.subplots(1, len(matrices), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, matrix) in zip(axes.flat, matrices.items(), strict=True):
        values = matrix.cpu()
        image = axis.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        for i in range(len(names)):
            for j in range(len(names)):
                value = float(values[i, j])
                colour = "white" if abs(value) > 0.6 * limit else "black"
                written = f"{value:.2f}".replace("-0.00", "0.00")
                axis.text(j, i, written, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label=label, shrink=0.85)
    return figure


def plot_points(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    diagonal: bool = False,
    names: bool = False,
) -> Figure:
    """Groups of points in a plane, each group with its colour and marker.

    Args:
        points: horizontal and vertical positions by the name of the group.
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        diagonal: draw the line on which both agree.
        names: write the group's name beside its last point, instead of a legend.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.6, 4.4))
    for i, (name, (x, y)) in enumerate(points.items()):
        axis.plot(list(x), list(y), "osD^vP*X"[i % 8], ms=6, alpha=0.8, color=COLOURS[i % 8], label=name)
        if names:
            axis.annotate(name, (x[-1], y[-1]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    if diagonal:
        low, high = axis.get_xlim()
        axis.axline((low, low), (high, high), color="gray", lw=1, zorder=0)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if not names:
        axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def plot_disentangled(
    before: TaskVectors, found: Disentangled, curves: Mapping[str, Mapping[float, float]], *, title: str = ""
) -> Figure:
    r"""What AWD did: the cosines after it, the share of each task vector that is left in the merge, and λ-curves.

    Where layers or rows have shares of their own, a line goes from the 5th to the 95th percentile.

    Args:
        before: the task vectors that were disentangled.
        found: what `mergekit_lite.disentangle` returned.
        curves: accuracy by λ, by the name to show in the legend.
        title: of the figure.
    """
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    values = cosines(found.task_vectors).fill_diagonal_(0.0)
    limit = float(cosines(before).fill_diagonal_(0.0).abs().max()) or 1.0
    image = left.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    left.set_title("cosines after (off the diagonal)", fontsize=9)
    left.set_xticks([])
    left.set_yticks(range(len(before)), before.names, fontsize=8)
    figure.colorbar(image, ax=left, shrink=0.8)

    tasks = len(before)
    shares = torch.cat([(1 - tasks * c[..., :tasks]).view(-1, tasks) for c in found.coefficients.values()])
    low, median, high = shares.quantile(torch.tensor([0.05, 0.5, 0.95]).to(shares), dim=0).tolist()
    middle.hlines(range(tasks), low, high, color=COLOURS[0], lw=2)
    middle.plot(median, range(tasks), "o", color=COLOURS[0])
    middle.axvline(1.0, color="gray", lw=1, ls=":")
    middle.set_yticks(range(tasks), before.names, fontsize=8)
    middle.invert_yaxis()
    middle.set_title(r"$1 - K c_k$: share of $\tau_k$ in the merge", fontsize=9)

    for i, (name, curve) in enumerate(curves.items()):
        right.plot(list(curve), list(curve.values()), "os"[i % 2] + "-", ms=4, color=COLOURS[i % 8], label=name)
    right.set(xlabel=r"scale $\lambda$", ylabel="accuracy")
    right.legend(fontsize=8, frameon=False)
    for axis in (middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def show_source(function: object, *, alone: bool = False) -> object:
    """The file in which a method is written, coloured, for reading in a notebook; or that one function `alone`."""
    import inspect

    from IPython.display import Code

    module = inspect.getmodule(function)
    if module is None:
        raise ValueError(f"{function} was not written in a file.")
    shown = inspect.getsource(function if alone else module)  # type: ignore[arg-type]
    return Code(shown.rstrip(), language="python")
