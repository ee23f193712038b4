"""The pictures of part 4: merges that adapt without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_lite.lab.masks import density, drawn, slope_of_draw
from mergekit_lite.lab.plots import COLOURS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# ---------------------------------------------------------------- 4.1 Entropy as a teacher


def plot_predictions(
    images: Sequence[Tensor], probabilities: Tensor, labels: Sequence[int], titles: Sequence[str] = ()
) -> Figure:
    """Images, each above what is predicted for it: a bar per class, that of the true class in another colour.

    The entropy and the loss of each prediction, in nats, are written over its bars.

    Args:
        images: n of them, uint8, (1 or 3 channels, height, width).
        probabilities: (n, classes).
        labels: the n true classes.
        titles: n words to write over the images.
    """
    import matplotlib.pyplot as plt

    count = len(images)
    figure, axes = plt.subplots(
        2, count, figsize=(2.1 * count, 3.3), squeeze=False, height_ratios=(1.2, 1), layout="constrained"
    )
    entropies = torch.special.entr(probabilities).sum(1)
    for i, (above, below) in enumerate(axes.T):
        above.imshow(images[i].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        above.axis("off")
        above.set_title(titles[i] if titles else "", fontsize=9)
        true = labels[i]
        colours = [COLOURS[1] if c == true else COLOURS[0] for c in range(probabilities.shape[1])]
        below.bar(range(probabilities.shape[1]), probabilities[i].tolist(), color=colours)
        loss = -float(probabilities[i, true].log())
        below.set_title(f"H = {float(entropies[i]):.2f}, loss {loss:.2f}", fontsize=9)
        below.set(ylim=(0, 1), xlabel="class")
        below.set_xticks([])
        below.spines[["top", "right"]].set_visible(False)
        if i:
            below.set_yticks([])
    axes[1, 0].set_ylabel("probability")
    return figure


def plot_certainty(table: pd.DataFrame, scale: float) -> Figure:
    r"""What a merge with one scale believes and what is true: entropy beside loss.

    Left, for every task at one scale, with its accuracy below its name; right, their means over tasks for all scales.

    Args:
        table: what `mergekit_lite.lab.certainty.certainties` returned.
        scale: one of the table's.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1.7, 1), layout="constrained")
    here = table.loc[scale]
    for shift, column, colour in ((-0.2, "entropy", COLOURS[0]), (0.2, "loss", COLOURS[1])):
        left.bar([i + shift for i in range(len(here))], here[column], 0.4, color=colour, label=column)
    names = [f"{task.replace('_', chr(10))}\n({right_:.2f})" for task, right_ in here["right"].items()]
    left.set_xticks(range(len(here)), names, fontsize=8)
    left.set(ylabel="nats", ylim=(0, float(table[["entropy", "loss"]].to_numpy().max()) * 1.05))
    left.set_title(f"λ = {scale:g} (below the names: accuracy)", fontsize=10)
    means = table.groupby(level="scale").mean()
    for column, colour, marker in (("entropy", COLOURS[0], "o"), ("loss", COLOURS[1], "s")):
        right.plot(means.index, means[column], marker=marker, ms=5, color=colour, label=column)
    right.axvline(scale, color="gray", ls="--", lw=1)
    right.set(xlabel=r"scale $\lambda$", ylabel="nats, mean over tasks", ylim=(0, None))
    for axis in (left, right):
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


# ---------------------------------------------------------------- 4.2 A mask to share


def plot_concrete(settings: Sequence[tuple[float, float]]) -> Figure:
    r"""One entry of a random mask: what each coin makes of it, how it is distributed, and how it moves with its logit.

    Left and right, the area under a curve is a mean over all draws: of the entry, and of its slope by the logit.

    Args:
        settings: pairs (x, T) of a logit and a temperature, a curve each.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    inside = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for i, (x, temperature) in enumerate(settings):
        m = drawn(x, temperature, inside)
        curves = m, density(inside, x, temperature), slope_of_draw(m, temperature)
        for axis, values in zip(axes, curves, strict=True):
            style = {"lw": 2, "color": COLOURS[i % 8], "ls": ("-", "--", ":", "-.")[i % 4]}
            axis.plot(inside, values, label=f"x = {x:g}, T = {temperature:g}", **style)
    axes[0].axhline(0.5, color="gray", lw=1)
    axes[0].set(xlabel="random number u", ylabel="entry m", title="what u makes of it")
    axes[1].set(xlabel="entry m", ylabel="density", ylim=(0, 4), title="how often")
    axes[2].set(xlabel="random number u", ylabel=r"$\partial m / \partial x$", title="its slope by the logit")
    axes[1].legend(fontsize=8, frameon=False, loc="upper center")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


# ---------------------------------------------------------------- 4.3 A mixture instead of a merge


def plot_routing(panels: Mapping[str, Tensor], tasks: Tensor, names: Sequence[str]) -> Figure:
    """Routing weights as heat maps, a row per image and a column per expert: red above zero, blue below.

    Args:
        panels: (N, K) by title, each with a colour scale of its own.
        tasks: (N,), the position of every image's task, in rising order.
        names: of the K tasks.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    size = (4.2 * len(panels) + 1.2, 4.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    starts = [int((tasks == k).nonzero()[0, 0]) for k in range(len(names))]
    ends = [*starts[1:], len(tasks)]
    for i, (axis, (title, w)) in enumerate(zip(axes[0], panels.items(), strict=True)):
        limit = float(w.abs().max())
        image = axis.imshow(w.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
        for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
            # A frame around the expert of the images' own task.
            frame = Rectangle((k - 0.5, start - 0.5), 1, end - start, fill=False, ec="black", lw=1.5)
            axis.add_patch(frame)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
        axis.set_yticks(middles, [f"images of {name}" for name in names] if i == 0 else [""] * len(names), fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.tick_params(left=False)
        figure.colorbar(image, ax=axis, shrink=0.85, label="routing weight" if i == len(panels) - 1 else "")
    return figure


def plot_routes(rows: Mapping[str, tuple[Tensor, Tensor]], blocks: Sequence[str], names: Sequence[str]) -> Figure:
    """Images, each beside its routing weights: a row per block, a column per expert; red above zero, blue below.

    Args:
        rows: by title, an image (channels, height, width), uint8, and its weights (blocks, K).
        blocks: the names of the rows.
        names: the names of the K experts.
    """
    import matplotlib.pyplot as plt

    limit = max(float(w.abs().max()) for _, w in rows.values())
    count = len(rows)
    figure, axes = plt.subplots(
        2, count, figsize=(3.3 * count + 1.8, 4.8), squeeze=False, height_ratios=(1, 2.4), layout="constrained"
    )
    for i, (title, (pixels, w)) in enumerate(rows.items()):
        above, below = axes[:, i]
        above.imshow(pixels.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        above.axis("off")
        above.set_title(title, fontsize=9)
        image = below.imshow(w.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        below.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        below.set_yticks(range(len(blocks)), list(blocks) if i == 0 else [""] * len(blocks), fontsize=8)
    figure.colorbar(image, ax=list(axes[1]), label="routing weight")
    return figure
