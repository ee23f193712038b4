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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

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


def plot_election(
    before: Tensor,
    trimmed: Tensor,
    elected: Tensor,
    merged: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    bars: Mapping[str, float] | None = None,
    bars_label: str = "accuracy",
    title: str = "",
) -> Figure:
    """TIES on a block of a weight matrix, entry by entry: red is above zero, blue below, white is zero.

    Args:
        before: K task vectors (K, rows, columns).
        trimmed: the same after trimming.
        elected: the sign of every entry, (rows, columns).
        merged: results to compare, (rows, columns) each, by title; drawn with the colours of `before`.
        names: of the K tasks.
        bars: numbers between 0 and 1 to draw beside the results, such as accuracies.
        bars_label: what they are, for their axis.
        title: of the figure.
    """
    import matplotlib.pyplot as plt

    limit = float(before.abs().max()) or 1.0
    tasks = len(before)
    figure = plt.figure(figsize=(11, 5.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(2, 1.45))[:, 0]
    panels = above.subplots(2, tasks, squeeze=False)
    for row, block, word in zip(panels, (before, trimmed), ("task vector", "trimmed"), strict=True):
        for axis, values, name in zip(row, block, names, strict=True):
            _draw_block(axis, values, limit)
            axis.set_title(name if word == "task vector" else "", fontsize=8)
        row[0].set_ylabel(word, fontsize=8)
    last = below.subplots(1, len(merged) + 1 + bool(bars), squeeze=False, width_ratios=_widths(merged, bars))[0]
    _draw_block(last[0], elected, 1.0)
    last[0].set_title("elected sign", fontsize=8)
    for axis, (name, values) in zip(last[1:], merged.items(), strict=False):
        image = _draw_block(axis, values, limit)
        axis.set_title(name, fontsize=8)
    figure.colorbar(image, ax=list(last[: len(merged) + 1]), shrink=0.8, label="entry")
    if bars:
        last[-1].barh(list(bars), list(bars.values()), color=COLOURS[0])
        last[-1].set(xlim=(0, 1), xlabel=bars_label)
        last[-1].invert_yaxis()
        last[-1].tick_params(labelsize=8)
        for i, value in enumerate(bars.values()):
            last[-1].text(value + 0.02, i, f"{value:.2f}", va="center", fontsize=8)
        last[-1].spines[["top", "right"]].set_visible(False)
    return figure


def _widths(merged: Mapping[str, Tensor], bars: Mapping[str, float] | None) -> list[float]:
    return [1.0] * (len(merged) + 1) + ([1.6] if bars else [])


def _draw_block(axis: Axes, values: Tensor, limit: float) -> AxesImage:
    axis.set_xticks([])
    axis.set_yticks([])
    return axis.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")


def plot_competition(entries: Tensor, shares: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """Where two task vectors pull each entry, coloured by who decides the merged entry.

    Args:
        entries: of two task vectors, (2, n).
        shares: task 1's share of the weights with which the two are averaged, (n,) in [0, 1], by the title of a
            panel; NaN where neither counts, which is drawn in grey.
        names: of the two tasks.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    size = (4.1 * len(shares) + 1, 4.2)
    figure, axes = plt.subplots(1, len(shares), figsize=size, squeeze=False, layout="constrained")
    limit = float(entries.abs().max()) * 1.05
    colours = LinearSegmentedColormap.from_list("shares", [COLOURS[0], COLOURS[4], COLOURS[1]])
    x, y = entries.numpy()
    for axis, (title, share) in zip(axes.flat, shares.items(), strict=True):
        decided = (~share.isnan()).numpy()
        axis.scatter(x[~decided], y[~decided], s=4, color="#BBBBBB", linewidths=0)
        drawn = axis.scatter(
            x[decided], y[decided], s=6, c=share.numpy()[decided], cmap=colours, vmin=0, vmax=1, linewidths=0
        )
        axis.axhline(0, color="black", lw=0.5)
        axis.axvline(0, color="black", lw=0.5)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axis.set_title(title, fontsize=10)
        axis.set(xlabel=f"entry of {names[0]}", ylabel=f"entry of {names[1]}")
    figure.colorbar(drawn, ax=axes, label=f"share of {names[0]} in the merged entry", shrink=0.85)
    return figure


def plot_ranking(table: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> Figure:
    """Methods as rows of dots with their spread: hollow as published, filled with hyperparameters chosen.

    Args:
        table: a row per method, drawn from the bottom up, with columns ``default``, ``default spread``, ``tuned`` and
            ``tuned spread``.
        groups: the methods by group; each group has its colour and marker. What is in no group is not drawn.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    shown = [name for name in table.index if any(name in members for members in groups.values())]
    figure, axis = plt.subplots(figsize=(7.8, 0.27 * len(shown) + 1.3), layout="constrained")
    legend = []
    for i, (group, members) in enumerate(groups.items()):
        colour, marker = COLOURS[i % 8], "osD^vP*X"[i % 8]
        rows = [name for name in shown if name in members]
        heights = [shown.index(name) for name in rows]
        found = table.loc[rows]
        axis.hlines(heights, found["default"], found["tuned"], color=colour, lw=1, alpha=0.35)
        for column, face in (("default", "white"), ("tuned", colour)):
            axis.errorbar(
                found[column], heights, xerr=found[f"{column} spread"], fmt=marker, ms=6, lw=1.2, color=colour, mfc=face
            )
        legend.append(Line2D([], [], marker=marker, ls="", color=colour, label=group))
    for face, label in (("white", "as published"), ("black", "tuned")):
        legend.append(Line2D([], [], marker="o", ls="", color="black", mfc=face, label=label))
    axis.set_yticks(range(len(shown)), shown, fontsize=8)
    axis.grid(axis="x", lw=0.4)
    axis.set_xlabel("accuracy")
    axis.legend(handles=legend, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def plot_named_points(
    points: Mapping[str, Mapping[str, tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    curve: tuple[str, Sequence[float], Sequence[float]] | None = None,
    log: bool = False,
) -> Figure:
    """Points in a plane with a name beside each, in groups of one colour and marker.

    Args:
        points: the horizontal and the vertical position by name, by group.
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        curve: a name for the legend and the positions of a line to compare the points with.
        log: make the horizontal axis logarithmic.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.8, 4.8))
    if curve is not None:
        axis.plot(list(curve[1]), list(curve[2]), color="gray", lw=1.5, zorder=0, label=curve[0])
    for i, (group, members) in enumerate(points.items()):
        x, y = zip(*members.values(), strict=True)
        axis.plot(x, y, "osD^vP*X"[i % 8], ms=6, color=COLOURS[i % 8], label=group)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.margins(0.12)
    if log:
        axis.set_xscale("log")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _name_points(axis, {name: at for members in points.values() for name, at in members.items()})
    return figure


# Where a name may stand beside its point, in points to the right and up, the nearest places first.
NAME_PLACES = (
    *((7, -3), (-7, -3), (0, 8), (0, -14), (7, 9), (-7, 9), (7, -15), (-7, -15)),
    *((-14, 26), (14, 26), (14, -34), (-14, -34), (0, 44), (0, -50)),
)


def _name_points(axis: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each name where it covers no point and no other name; to those farther away leads a thin line."""
    from matplotlib.transforms import Bbox

    figure = axis.get_figure()
    assert figure is not None
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axis.transData.transform(list(points.values()))]
    for name, at in points.items():
        for right, up in NAME_PLACES:
            side = "left" if right > 0 else "right" if right < 0 else "center"
            text = axis.annotate(name, at, (right, up), textcoords="offset points", fontsize=8, ha=side)
            box = text.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = axis.annotate(name, at, NAME_PLACES[0], textcoords="offset points", fontsize=8)
            box = text.get_window_extent(renderer)
        taken.append(box)
        if abs(up) > 20:
            end = (box.x0 if right > 0 else box.x1, box.y0 if up > 0 else box.y1)
            x, y = zip(at, axis.transData.inverted().transform(end), strict=True)
            axis.plot(x, y, color="gray", lw=0.6, zorder=0)


def plot_table(
    table: pd.DataFrame, *, label: str, limits: tuple[float, float] | None = None, around_zero: bool = False
) -> Figure:
    """A table as a heat map, each number written into its field.

    Args:
        table: numbers, with the names of rows and columns.
        label: what the numbers mean.
        limits: the values of the first and the last colour; by default the smallest and the largest there are.
        around_zero: red above zero, blue below, white at zero; else from dark to bright.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    values = table.to_numpy(dtype=float)
    largest = float(abs(values).max())
    low, high = limits or ((-largest, largest) if around_zero else (float(values.min()), float(values.max())))
    size = (0.43 * table.shape[1] + 2.6, 0.27 * table.shape[0] + 1.5)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(values, cmap="RdBu_r" if around_zero else "cividis", vmin=low, vmax=high, aspect="auto")
    axis.set_xticks(range(table.shape[1]), [str(name) for name in table.columns], rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(table.shape[0]), [str(name) for name in table.index], fontsize=8)
    for (i, j), value in np.ndenumerate(values):
        place = (value - low) / ((high - low) or 1.0)
        dark = abs(place - 0.5) > 0.32 if around_zero else place < 0.55
        written = f"{value:.2f}".replace("-0.00", "0.00").replace("0.", ".")
        axis.text(j, i, written, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    figure.colorbar(image, ax=axis, label=label, shrink=0.85)
    return figure


def plot_spectra(
    spectra: Mapping[str, Tensor],
    *,
    xlabel: str = "singular value, from the largest",
    ylabel: str = "size",
    log: bool = True,
) -> Figure:
    """Falling numbers as lines, each with its own colour and dash: singular values, eigenvalues, shares.

    Args:
        spectra: (n,) by the name to show in the legend.
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        log: make the vertical axis logarithmic.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    for i, (name, values) in enumerate(spectra.items()):
        axis.plot(
            range(1, len(values) + 1), values, lw=2, ls=("-", "--", ":", "-.")[i % 4], color=COLOURS[i % 8], label=name
        )
    if log:
        axis.set_yscale("log")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def plot_directions(panels: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Directions in the plane as arrows from one point, panels side by side, with the circle of length one.

    Args:
        panels: by title: vectors (2,) by the name to write at their tips.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Circle

    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.5), squeeze=False, layout="constrained")
    for axis, (title, vectors) in zip(axes.flat, panels.items(), strict=True):
        axis.add_patch(Circle((0, 0), 1, fill=False, color="lightgray"))
        for i, (name, (x, y)) in enumerate((name, vector.tolist()) for name, vector in vectors.items()):
            arrow = {"arrowstyle": "-|>", "color": COLOURS[i % 8], "lw": 2, "shrinkA": 0, "shrinkB": 0}
            axis.annotate("", (x, y), (0, 0), arrowprops=arrow)
            length = (x**2 + y**2) ** 0.5
            place = (x + 0.17 * x / length, y + 0.17 * y / length)
            axis.text(*place, name, ha="center", va="center", fontsize=10, color=COLOURS[i % 8])
        axis.set_title(title, fontsize=10)
        axis.set(xlim=(-0.75, 1.4), ylim=(-0.45, 1.25), aspect="equal")
        axis.axis("off")
    return figure


def plot_bowls(
    bowls: Mapping[str, tuple[Tensor, Tensor]],
    points: Mapping[str, Tensor],
    *,
    levels: Sequence[float],
    limits: tuple[float, float, float, float],
    labels: tuple[str, str],
) -> Figure:
    r"""Quadratic bowls over the plane of two weights as contour lines, with named points.

    Args:
        bowls: by name, the lowest point (2,) and the matrix C (2, 2) of :math:`(\theta - m)^\top C\, (\theta - m)`.
        points: (2,) by the name to write beside them.
        levels: heights of the contour lines, rising.
        limits: left, right, bottom, top.
        labels: of the two axes.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.2, 3.9))
    legend = _draw_bowls(axis, bowls, points, levels, limits)
    axis.legend(handles=legend, fontsize=8, loc="upper right", framealpha=1)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    figure.tight_layout()
    _name_points(axis, {name: (float(point[0]), float(point[1])) for name, point in points.items()})
    for text in axis.texts:  # readable across the lines
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85})
    return figure


def _draw_bowls(
    axis: Axes,
    bowls: Mapping[str, tuple[Tensor, Tensor]],
    points: Mapping[str, Tensor],
    levels: Sequence[float],
    limits: tuple[float, float, float, float],
) -> list[Line2D]:
    """Contour lines of each bowl in its colour and the points in black; returns the bowls' legend."""
    from matplotlib.lines import Line2D

    x, y = torch.linspace(*limits[:2], 201), torch.linspace(*limits[2:], 201)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).double()
    legend = []
    for i, (name, (lowest, matrix)) in enumerate(bowls.items()):
        away = grid - lowest
        height = torch.einsum("yxi,ij,yxj->yx", away, matrix.double(), away)
        axis.contour(x, y, height, levels=list(levels), colors=COLOURS[i % 8], linewidths=1.2, alpha=0.8)
        legend.append(Line2D([], [], color=COLOURS[i % 8], label=name))
    for i, (right, up) in enumerate(point.tolist() for point in points.values()):
        axis.plot(right, up, "osD^vP*X"[i % 8], ms=7, color="black", mec="white")
    axis.set(xlim=limits[:2], ylim=limits[2:], aspect="equal")
    axis.spines[["top", "right"]].set_visible(False)
    return legend


def plot_ellipses(
    panels: Mapping[str, tuple[Mapping[str, tuple[Tensor, Tensor]], Mapping[str, Tensor]]],
    *,
    levels: Sequence[float],
    limits: tuple[float, float, float, float],
    heights: Mapping[str, Mapping[str, float]] | None = None,
    labels: tuple[str, str] = ("first weight", "second weight"),
) -> Figure:
    r"""Panels of quadratic bowls over two weights, each bowl with a cross at its lowest point, and what methods merge.

    Args:
        panels: by title: bowls as `plot_bowls` takes them, and points (2,) by name.
        levels: heights of the contour lines, rising.
        limits: left, right, bottom, top.
        heights: by point, how high each bowl is there; drawn as stacked bars beside the panels.
        labels: of the two axes.
    """
    import matplotlib.pyplot as plt

    width = 3.1 * (limits[1] - limits[0]) / (limits[3] - limits[2])
    size = ((width + 0.7) * len(panels) + (3.6 if heights else 0), 4.0)
    widths = [width] * len(panels) + ([2.6] if heights else [])
    figure, axes = plt.subplots(
        1, len(widths), figsize=size, squeeze=False, layout="constrained", gridspec_kw={"width_ratios": widths}
    )
    named = []
    for axis, (title, (bowls, points)) in zip(axes.flat, panels.items(), strict=False):
        legend = _draw_bowls(axis, bowls, points, levels, limits)
        for i, (lowest, _) in enumerate(bowls.values()):
            axis.plot(*lowest.tolist(), "+", ms=11, mew=2.5, color=COLOURS[i % 8])
        axis.set_title(title, fontsize=10)
        axis.set(xlabel=labels[0], ylabel=labels[1])
        named.append((axis, {name: (float(point[0]), float(point[1])) for name, point in points.items()}))
    figure.legend(handles=legend, fontsize=8, frameon=False, loc="outside lower center", ncols=len(legend))
    if heights:
        _draw_heights(axes.flat[-1], heights)
    for axis, places in named:
        _name_points(axis, places)
    return figure


def _draw_heights(axis: Axes, heights: Mapping[str, Mapping[str, float]]) -> None:
    """Stacked bars: how high each bowl is at each point, and the sum in numbers."""
    methods = list(heights)
    bottom = torch.zeros(len(methods)).double()
    for i, bowl in enumerate(next(iter(heights.values()))):
        part = torch.tensor([heights[name][bowl] for name in methods]).double()
        axis.bar(methods, part.numpy(), 0.6, bottom=bottom.numpy(), color=COLOURS[i % 8])
        bottom += part
    for i, total in enumerate(bottom.tolist()):
        axis.text(i, total, f"{total:.2f}", ha="center", va="bottom", fontsize=8)
    axis.set_ylabel("sum of the losses")
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def plot_surfaces(
    panels: Mapping[str, tuple[Tensor, Mapping[str, Tensor]]],
    grid: Sequence[float],
    *,
    levels: Sequence[float],
    labels: Mapping[str, tuple[str, str]],
    unit: str,
) -> Figure:
    r"""Measured surfaces over two directions in colours, and the ellipses that matrices predict for the same heights.

    Args:
        panels: by title: heights (n, n), row i at grid[i] of the first direction, column j at grid[j] of the second;
            and matrices C (2, 2) by name, whose ellipses are :math:`\tfrac12 s^\top C s`, solid, dashed, dotted.
        grid: the n positions.
        levels: heights at which the colours change and the ellipses are drawn, rising from 0.
        labels: of the two axes, by title.
        unit: what the heights are.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.1 * len(panels) + 1, 4.6), squeeze=False, layout="constrained"
    )
    fine = torch.linspace(float(grid[0]), float(grid[-1]), 151).double()
    plane = torch.stack(torch.meshgrid(fine, fine, indexing="xy"), dim=-1)
    styles = ("-", "--", ":")
    for axis, (title, (heights, matrices)) in zip(axes.flat, panels.items(), strict=True):
        # The first direction goes to the right, so rows and columns change places.
        drawn = axis.contourf(grid, grid, heights.T, levels=list(levels), cmap="cividis", extend="max")
        legend = []
        for (name, matrix), style in zip(matrices.items(), styles, strict=False):
            ellipses = 0.5 * torch.einsum("yxi,ij,yxj->yx", plane, matrix.double(), plane)
            axis.contour(
                fine, fine, ellipses, levels=list(levels[1:]), colors="white", linestyles=style, linewidths=1.4
            )
            legend.append(Line2D([], [], color="black", ls=style, label=name))
        axis.set_title(title, fontsize=10)
        axis.set(xlabel=labels[title][0], ylabel=labels[title][1], aspect="equal")
    figure.legend(handles=legend, fontsize=9, frameon=False, loc="outside lower center", ncols=len(legend))
    figure.colorbar(drawn, ax=axes, label=unit, shrink=0.85)
    return figure


def plot_patches(image: Tensor, columns: Tensor, gram: Tensor, *, corner: tuple[int, int], kernel: int) -> Figure:
    """A convolution's inputs as a matrix: an image with one patch framed, patches as columns, their Gram matrix.

    Args:
        image: what the convolution reads, (h, w) or (h, w, 3), from 0 to 1.
        columns: the numbers that the kernel sees, a column per place, (i, places).
        gram: A, (i, i).
        corner: of the framed patch: row and column of its first pixel. It is the first column.
        kernel: its width.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(10, 3.3), layout="constrained", width_ratios=(1, 1.7, 1.15)
    )
    left.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
    left.add_patch(Rectangle((corner[1] - 0.5, corner[0] - 0.5), kernel, kernel, fill=False, ec=COLOURS[3], lw=2))
    left.set_title("image", fontsize=9)
    left.axis("off")
    limit = float(columns.abs().max()) or 1.0
    drawn = middle.imshow(columns.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    middle.add_patch(Rectangle((-0.5, -0.5), 1, len(columns), fill=False, ec=COLOURS[3], lw=2, clip_on=False))
    middle.set(xlabel="place", ylabel="input")
    middle.set_title("inputs X: a patch is a column", fontsize=9)
    figure.colorbar(drawn, ax=middle, shrink=0.8)
    limit = float(gram.abs().max()) or 1.0
    drawn = right.imshow(gram.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="none")
    right.set(xlabel="input", ylabel="input")
    right.set_title("A, their Gram matrix", fontsize=9)
    figure.colorbar(drawn, ax=right, shrink=0.8)
    return figure


def plot_regression(
    shares: Mapping[str, Tensor],
    errors: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    tasks: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """Whose a layer's inputs are, and the error of merges along each direction of them.

    Args:
        shares: how much of an input is the first task's, from 0 to 1, (n,) by the kind of input; drawn in order.
        errors: by merge, for n directions: the first task's shares; errors in units of the squared difference between
            the two experts (those above 1 are drawn at 1); and what the direction counts, which is a dot's area.
        tasks: the two names.
        title: of the figure.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for i, (name, values) in enumerate(shares.items()):
        style = {"lw": 2, "ls": ("-", "--", ":")[i % 3], "color": COLOURS[i % 8]}
        left.plot(torch.linspace(0, 1, len(values)), values.sort().values, label=name, **style)
    left.axhline(0.5, color="gray", lw=1, zorder=0)
    left.set(xlabel="inputs in order, from the first to the last", ylabel=f"share of {tasks[0]}", ylim=(-0.03, 1.03))
    curve = torch.linspace(0, 1, 101)
    right.axhline(0.25, color="black", lw=1.5, ls="--", label="average: 1/4")
    right.plot(curve, curve * (1 - curve), color="gray", lw=1.5, label="the best: s(1 - s)")
    for i, (name, (s, error, counts)) in enumerate(errors.items()):
        areas = 2 + 1500 * counts / counts.sum()
        right.scatter(s, error.clamp(max=1), areas, color=COLOURS[(3, 2, 4)[i % 3]], alpha=0.5, lw=0, label=name)
    right.set(xlabel=f"share s: {tasks[1]} alone at 0, {tasks[0]} alone at 1", ylabel="error along the direction")
    right.set_ylim(-0.02, 1.02)
    for axis in (left, right):
        where = {"loc": "upper left" if axis is left else "upper center", "frameon": axis is right, "framealpha": 0.8}
        for handle in axis.legend(fontsize=8, **where).legend_handles:
            if hasattr(handle, "set_sizes"):
                handle.set_sizes([30])
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def plot_kronecker(a: Tensor, b: Tensor) -> Figure:
    """Two small matrices and their Kronecker product, with every entry written as the product that it is.

    Args:
        a: (n, n); each of its entries becomes a block, framed in a colour of its own.
        b: (m, m).
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    product, n, m = torch.kron(a, b), len(a), len(b)
    limit = 1.6 * float(product.abs().max())
    size = (1.05 * (n + m + n * m) + 0.5, 1.05 * n * m + 0.4)
    figure, axes = plt.subplots(1, 3, figsize=size, layout="constrained", width_ratios=(n, m, n * m))
    for axis, matrix, title in zip(axes, (a, b, product), ("A", "B", "A ⊗ B"), strict=True):
        _draw_block(axis, matrix, limit)
        axis.set_title(title)
        for i, row in enumerate(matrix.tolist()):
            for j, value in enumerate(row):
                factors = f"{a[i // m, j // m]:g} · {b[i % m, j % m]:g}\n= " if matrix is product else ""
                axis.text(j, i, f"{factors}{value:g}", ha="center", va="center", fontsize=9)
        width = {"A": 1, "B": 0}.get(title, m)
        for k in range(n * n if width else 0):
            corner = (k % n * width - 0.46, k // n * width - 0.46)
            axis.add_patch(Rectangle(corner, width - 0.08, width - 0.08, fill=False, ec=COLOURS[k % 8], lw=3))
    return figure


def plot_large_matrices(matrices: Mapping[str, Tensor]) -> Figure:
    """Large matrices side by side, without numbers: red above zero, blue below, each with a scale of its own.

    Small entries are made visible: a colour's depth goes with the root of an entry.

    Args:
        matrices: (n, n) each, by title.
    """
    import matplotlib.pyplot as plt

    size = (2.9 * len(matrices), 3.2)
    figure, axes = plt.subplots(1, len(matrices), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, matrix) in zip(axes.flat, matrices.items(), strict=True):
        roots = matrix.sign() * matrix.abs().sqrt()
        _draw_block(axis, roots, 0.7 * float(roots.abs().max()) or 1.0)
        axis.set_title(title, fontsize=10)
    return figure


def plot_kernels(rows: Mapping[str, tuple[Tensor, Sequence[float]]]) -> Figure:
    """Small colour kernels in rows, each scaled to its largest entry, with a number above each.

    Args:
        rows: kernels (n, 3, height, width) and n numbers, by the name to write before the row.
    """
    import matplotlib.pyplot as plt

    count = max(len(numbers) for _, numbers in rows.values())
    size = (1.05 * count + 1.2, 1.3 * len(rows))
    figure, axes = plt.subplots(len(rows), count, figsize=size, squeeze=False, layout="constrained")
    for line, (name, (kernels, numbers)) in zip(axes, rows.items(), strict=True):
        for axis, kernel, number in zip(line, kernels, numbers, strict=False):
            pixels = kernel / (2 * kernel.abs().max().clamp_min(1e-12)) + 0.5
            axis.imshow(pixels.permute(1, 2, 0).float().numpy())
            axis.set_title(f"{number:.2g}", fontsize=8)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, fontsize=8)
    return figure


def plot_descents(panels: Mapping[str, tuple[Tensor, Mapping[str, Tensor]]]) -> Figure:
    """Ways to the bottom of bowls in the plane, over the bowls' contour lines.

    Args:
        panels: by title, the matrix (2, 2) of a bowl with its lowest point at the origin, and ways (steps, 2) by name.
    """
    import matplotlib.pyplot as plt

    size = (4.1 * len(panels) + 0.4, 3.9)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, (matrix, ways)) in zip(axes.flat, panels.items(), strict=True):
        reach = 1.15 * max(float(way.abs().max()) for way in ways.values()) or 1.0
        line = torch.linspace(-reach, reach, 121, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
        height = torch.einsum("yxi,ij,yxj->yx", grid, matrix.double(), grid)
        top = max(float(way[0] @ matrix @ way[0]) for way in ways.values())
        levels = [top * 0.45**k for k in range(7, -2, -1)]
        axis.contour(line, line, height, levels=levels, colors="lightgray", linewidths=1)
        for i, (name, way) in enumerate(ways.items()):
            style = {
                "marker": "os"[i % 2],
                "ms": 4,
                "lw": 1.6,
                "ls": ("-", "--")[i % 2],
                "color": COLOURS[(3, 0)[i % 2]],
            }
            steps = len(way) - 1
            axis.plot(*way.T.numpy(), label=f"{name}: {steps} step" + "s" * (steps != 1), **style)
        axis.plot(0, 0, "*", color="black", ms=10, zorder=5)
        axis.set_title(title, fontsize=10)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.0), frameon=False)
    return figure


def plot_convergence(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, bound: Sequence[float] | None = None
) -> Figure:
    """Conjugate gradients, step by step: the residual, and how far the solution still is; both axes logarithmic.

    Args:
        curves: residuals and distances from the start on, by name.
        bound: what the distance cannot exceed, drawn as a thin line.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True, layout="constrained")
    for axis, what in zip(axes, ("residual", "distance to the solution"), strict=True):
        for i, (name, both) in enumerate(curves.items()):
            values = both[what != "residual"]
            style = {"color": COLOURS[i % 8], "lw": 2, "ls": ("-", "--", ":", "-.")[i % 4]}
            axis.plot(range(len(values)), values, label=name, **style)
        axis.set_title(what, fontsize=10)
        axis.set(xlabel="step", xscale="symlog", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    if bound is not None:
        axes[1].plot(range(len(bound)), bound, color="black", lw=0.8, label="bound")
    axes[1].legend(fontsize=8, frameon=False, loc="lower left")
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
