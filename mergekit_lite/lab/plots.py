"""The book's pictures: each function draws one figure and returns it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

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


def plot_cosines(tv: TaskVectors) -> Figure:
    """The K x K matrix of cosines between task vectors, as a labelled heat map."""
    import matplotlib.pyplot as plt

    matrix = cosines(tv).cpu()
    figure, axis = plt.subplots(figsize=(5.4, 4.6))
    image = axis.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_xticks(range(len(tv)), tv.names, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(tv)), tv.names, fontsize=8)
    for i in range(len(tv)):
        for j in range(len(tv)):
            value = float(matrix[i, j])
            label = f"{value:.2f}".replace("-0.00", "0.00")
            axis.text(j, i, label, ha="center", va="center", fontsize=7, color="white" if i == j else "black")
    figure.colorbar(image, label="cosine", shrink=0.85)
    figure.tight_layout()
    return figure


def show_source(function: object) -> object:
    """The file in which a method is written, coloured, for reading in a notebook."""
    import inspect

    from IPython.display import Code

    module = inspect.getmodule(function)
    if module is None:
        raise ValueError(f"{function} was not written in a file.")
    return Code(inspect.getsource(module).rstrip(), language="python")
