"""Explorers: one function draws, sliders call it.

In a running notebook an explorer has sliders; in the built page stands the figure that the same function draws at a
few settings. Each figure carries its result in words as its label, which the explorer prints above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_lite.adaptive import WEMoE
from mergekit_lite.calibrated import input_grams
from mergekit_lite.calibrated.regmean import least_squares
from mergekit_lite.data_free import disentangle, task_arithmetic, ties, trim
from mergekit_lite.data_free.ties import disjoint_merge, elect
from mergekit_lite.data_free.tsv import singular_triples
from mergekit_lite.geometry import cosines as angles
from mergekit_lite.geometry import rows_of, slopes, turned
from mergekit_lite.lab.landscape import ellipse, heights_at, merged_points
from mergekit_lite.lab.masks import moments
from mergekit_lite.lab.mixtures import look
from mergekit_lite.lab.plots import (
    plot_curves,
    plot_descents,
    plot_disentangled,
    plot_election,
    plot_ellipses,
    plot_merges,
    plot_regression,
    plot_spectra,
)
from mergekit_lite.lab.plots_adaptation import plot_certainty, plot_concrete, plot_routes
from mergekit_lite.lab.regression import common_directions, errors_along
from mergekit_lite.lab.spectra import flattened, matrices, reshaped
from mergekit_lite.lab.subspaces import bowl, direction, ways_down
from mergekit_lite.suites.suite import Evaluation, Suite
from mergekit_lite.task_vectors import TaskVectors

if TYPE_CHECKING:
    import pandas as pd
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


def turned_at(
    suite: Suite, tasks: Sequence[str], cosines: Iterable[float], *, scale: float = 0.3, split: str = "validation"
) -> Figure:
    """What the second task vector does to the loss of the first task, as the angle between the two is changed.

    The first-order prediction stands beside the measured change of the loss.
    """
    pair = suite.task_vectors.subset(tasks)
    at = list(cosines)
    alone = task_arithmetic(pair, scale=[scale, 0.0])
    before = suite.losses(alone, tasks=[tasks[0]], split=split)[tasks[0]]
    slope = suite.gradient(alone, tasks[0], split=split)
    predicted, measured = [], []
    for cosine in at:
        vectors = turned(pair, cosine)
        merged = task_arithmetic(vectors, scale=scale)
        measured.append(suite.losses(merged, tasks=[tasks[0]], split=split)[tasks[0]] - before)
        predicted.append(scale * slopes(vectors, slope)[1].item())
    figure = plot_curves(
        at,
        {"predicted by the first order": predicted, "measured": measured},
        xlabel=f"cosine between the task vectors of {tasks[0]} and {tasks[1]}",
        ylabel=f"change of the loss of {tasks[0]} (nats)",
    )
    figure.axes[0].axhline(0, color="gray", lw=1, zorder=0)
    words = (
        f"cosine {c:+.2f}: loss of {tasks[0]} {m:+.3f}, predicted {p:+.3f}"
        for c, m, p in zip(at, measured, predicted, strict=True)
    )
    figure.set_label("\n".join(words))
    return figure


def explore_angle(suite: Suite, tasks: Sequence[str], *, split: str = "validation") -> Any:
    """Two sliders: the cosine between two task vectors, and λ; watch what the second does to the first task's loss.

    Args:
        suite: with experts.
        tasks: two names.
        split: the images to measure on.

    Returns:
        An ipywidgets container: two sliders and the figure drawn by `turned_at`, from the true cosine to the chosen.
    """
    pair = suite.task_vectors.subset(tasks)
    true = angles(pair)[0, 1].item()
    return _explorer(
        lambda cosine, scale: turned_at(suite, tasks, sorted({true, cosine}), scale=scale, split=split),
        cosine=_slider("cosine", 0.5, (-0.95, 0.95)),
        scale=_slider("scale λ", 0.3, (0.05, 1.0)),
    )


def disentangled_at(
    suite: Suite,
    *,
    alpha: float = 0.1,
    granularity: str = "layer",
    solver: str = "trajectory",
    scales: Sequence[float] = (0.1, 0.2, 0.3, 0.5),
    split: str = "validation",
) -> Figure:
    """AWD at one α and granularity (in relative units): cosines, what is left of each task vector, and the λ-curve."""
    tv = suite.task_vectors
    found = disentangle(tv, alpha=alpha, granularity=granularity, solver=solver, relative=True)
    curves = {
        name: {s: suite.evaluate(task_arithmetic(vectors, scale=s), split=split).average for s in scales}
        for name, vectors in (("task arithmetic", tv), ("AWD", found.task_vectors))
    }
    title = f"AWD per {granularity}, alpha = {alpha:g}, {solver}".replace("per whole", "on whole task vectors")
    figure = plot_disentangled(tv, found, curves, title=title)
    length = tv.gram().diagonal().sqrt().mean()
    words = [
        f"{title}: mean |cosine| {found.cosines[0]:.3f} before, {found.cosines[-1]:.3f} after",
        f"length of δ {found.lengths[-1]:.2f}, of a task vector {length:.2f}",
        *(f"{name}, best of {len(scales)} scales: accuracy {max(c.values()):.3f}" for name, c in curves.items()),
    ]
    figure.set_label("\n".join(words))
    return figure


def explore_disentangling(suite: Suite, *, split: str = "validation") -> Any:
    """A slider for α and a menu of granularities: disentangle anew and watch cosines, coefficients and the λ-curve.

    Args:
        suite: with experts.
        split: the images to evaluate on.

    Returns:
        An ipywidgets container: the controls and the figure drawn by `disentangled_at`.
    """
    import ipywidgets as widgets

    return _explorer(
        lambda alpha, granularity: disentangled_at(suite, alpha=alpha, granularity=granularity, split=split),
        alpha=widgets.FloatLogSlider(value=0.1, min=-3, max=0, step=0.25, description="alpha", continuous_update=False),
        granularity=widgets.Dropdown(options=["whole", "layer", "row"], value="layer", description="granularity"),
    )


def election_at(
    suite: Suite,
    name: str,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    block: tuple[int, int] = (16, 16),
    split: str = "validation",
) -> Figure:
    """TIES on the upper left corner of one weight matrix, and what the whole merge is worth.

    Args:
        suite: with experts.
        name: of a tensor with two axes or more; a convolution's kernel has a row per output.
        density: the share of entries that is kept.
        scale: of the merge.
        block: rows and columns to show.
        split: the images to evaluate on.
    """
    tv = suite.task_vectors
    trimmed = trim(tv, density)

    def corner(vectors: TaskVectors) -> Tensor:
        """A block of each task vector, (K, rows, columns)."""
        return next(rows_of(taus) for layer, _, taus in vectors.layers() if layer == name)[:, : block[0], : block[1]]

    before, after = corner(tv), corner(trimmed)
    elected = elect(after)
    merge = scale * disjoint_merge(after, elected)
    evaluation = suite.evaluate(ties(tv, density=density, scale=scale), split=split)
    figure = plot_election(
        before,
        after,
        elected,
        {f"TIES, λ = {scale:g}": merge, "average": before.mean(0)},
        [task.replace("_", "\n") for task in tv.names],
        bars={**evaluation, "mean of tasks": evaluation.average},
        bars_label=f"accuracy of TIES, λ = {scale:g} ({split} images)",
        title=f"{name}, density {density:g}",
    )
    figure.set_label(
        f"density {density:.2f}, λ = {scale:.2f}: average accuracy {evaluation.average:.3f} on {split} images; in this "
        f"block {(after != 0).double().mean():.2f} of the entries kept, {(merge == 0).double().mean():.2f} of the "
        "merged ones 0"
    )
    return figure


def explore_election(suite: Suite, name: str, *, split: str = "validation") -> Any:
    """Two sliders: the density at which TIES trims, and λ; watch a block of one layer and the accuracies.

    Args:
        suite: with experts.
        name: of a tensor with two axes or more.
        split: the images to evaluate on.

    Returns:
        An ipywidgets container: two sliders and the figure drawn by `election_at`.
    """
    return _explorer(
        lambda density, scale: election_at(suite, name, density=density, scale=scale, split=split),
        density=_slider("density", 0.2, (0.05, 1.0)),
        scale=_slider("scale λ", 1.0, (0.05, 2.5)),
    )


def lengths_at(suite: Suite, powers: Iterable[float], *, total: float = 1.0, split: str = "validation") -> Figure:
    r"""Merges with :math:`\lambda_k \propto \|\tau_k\|^p`, as bars: p = 0 is the average, p = 2 MetaGPT.

    Args:
        suite: with experts.
        powers: values of p.
        total: the sum of all scales; MetaGPT's and the average's is 1.
        split: the images to evaluate on.
    """
    tv = suite.task_vectors
    lengths = tv.gram().diagonal().sqrt()
    merges = {}
    for power in powers:
        scales = total * lengths**power / (lengths**power).sum()
        merged = task_arithmetic(tv, scale=scales.tolist())
        merges[f"p = {power:g}, sum {total:g}"] = suite.evaluate(merged, split=split)
    return _bars(merges)


def explore_lengths(suite: Suite, *, split: str = "validation") -> Any:
    """Two sliders: how much a task vector's length counts for its scale, and what the scales add up to.

    Args:
        suite: with experts.
        split: the images to evaluate on.

    Returns:
        An ipywidgets container: two sliders and the figure drawn by `lengths_at`.
    """
    return _explorer(
        lambda power, total: lengths_at(suite, [power], total=total, split=split),
        power=_slider("power p", 2.0, (-4.0, 8.0)),
        total=_slider("sum of λ", 1.0, (0.0, 4.0)),
    )


def spectrum_at(
    suite: Suite,
    layer: str,
    settings: Iterable[tuple[float, float]],
    *,
    kept: float = 1.0,
    split: str = "validation",
) -> Figure:
    r"""The singular values of one merged matrix between task arithmetic and Iso-C, and the accuracy of the merges.

    Args:
        suite: with experts.
        layer: the name of the matrix to draw; all matrices are merged so.
        settings: pairs (t, λ): singular values :math:`\lambda\, \sigma_i^{1-t} \bar\sigma^t`, t = 0 task arithmetic
            and t = 1 Iso-C.
        kept: the share of triples of the sum that are kept, from the largest; at least one.
        split: the images to evaluate on.
    """
    spectra, words = {}, []
    sigma = singular_triples(matrices(suite.task_vectors)[layer].sum(0))[1]
    for t, scale in settings:

        def change(sigma: Tensor, t: float = t) -> Tensor:
            changed = flattened(t)(sigma)
            changed[max(1, round(kept * len(sigma))) :] = 0
            return changed

        accuracy = suite.evaluate(reshaped(suite.task_vectors, change, scale=scale), split=split).average
        name = f"t = {t:.2f}, λ = {scale:.2f}: accuracy {accuracy:.2f}"
        spectra[name] = (scale * change(sigma)).cpu()
        words.append(f"t = {t:.2f}, λ = {scale:.2f}, {kept:.0%} of the triples: accuracy {accuracy:.3f}")
    figure = plot_spectra(spectra, ylabel="singular value of the merge", log=False)
    figure.axes[0].set_title(layer, fontsize=10)
    figure.set_label("\n".join(words))
    return figure


def explore_spectrum(suite: Suite, layer: str, *, split: str = "validation") -> Any:
    """Three sliders: how flat the spectrum of the merge is made, how many triples are kept, and λ.

    Args:
        suite: with experts.
        layer: the name of the matrix to draw.
        split: the images to evaluate on.

    Returns:
        An ipywidgets container: sliders and the figure drawn by `spectrum_at`.
    """
    return _explorer(
        lambda flat, kept, scale: spectrum_at(suite, layer, [(flat, scale)], kept=kept, split=split),
        flat=_slider("flatness t", 0.5, (0.0, 1.0)),
        kept=_slider("triples kept", 1.0, (0.0, 1.0)),
        scale=_slider("scale λ", 0.4, (0.0, 2.0)),
    )


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


def mixed_at(
    suite: Suite,
    merges: Mapping[str, Mapping[str, Tensor]],
    first: str,
    second: str,
    shares: Iterable[float],
    *,
    split: str = "validation",
) -> Figure:
    r"""Merges of merges: :math:`(1 - t)` of one and t of another, as bars.

    Args:
        suite: with experts.
        merges: state dicts by name.
        first: the name of one.
        second: the name of the other.
        shares: values of t; at 0 is the first merge, at 1 the second.
        split: the images to evaluate on.
    """
    both = TaskVectors(suite.base, {"first": merges[first], "second": merges[second]})
    ends = {0.0: first, 1.0: second}
    return _bars(
        {
            ends.get(t, f"{1 - t:g} {first} + {t:g} {second}"): suite.evaluate(
                task_arithmetic(both, scale=[1 - t, t]), split=split
            )
            for t in shares
        }
    )


def explore_mixing(suite: Suite, merges: Mapping[str, Mapping[str, Tensor]], *, split: str = "validation") -> Any:
    """Two menus of merges and a slider: the straight line from one merge to the other.

    Args:
        suite: with experts.
        merges: state dicts by name, at least two.
        split: the images to evaluate on.

    Returns:
        An ipywidgets container: two menus, a slider and the figure drawn by `mixed_at` for both ends and the mixture.
    """
    import ipywidgets as widgets

    names = list(merges)
    return _explorer(
        lambda first, second, share: mixed_at(suite, merges, first, second, sorted({0.0, share, 1.0}), split=split),
        first=widgets.Dropdown(options=names, value=names[0], description="from"),
        second=widgets.Dropdown(options=names, value=names[-1], description="to"),
        share=_slider("share of it", 0.5, (0.0, 1.0)),
    )


def bowls_at(
    settings: Iterable[tuple[tuple[float, float], tuple[float, float]]], *, distance: float = 4.0, size: float = 1.0
) -> Figure:
    """Two bowls over two weights, and where the average, the diagonals and the whole matrices put the merge.

    Args:
        settings: for each panel, the angles (degrees) of both long axes, and the elongations of both bowls.
        distance: between the two lowest points.
        size: how strongly curved the second bowl is; the first has size 1.
    """
    panels, words = {}, []
    experts = torch.zeros(2).double(), distance * F.normalize(torch.tensor([2.0, 1.0]).double(), dim=0)
    for tilts, elongations in settings:
        shapes = map(ellipse, tilts, elongations, (1.0, size))
        bowls = {f"task {i}": bowl for i, bowl in enumerate(zip(experts, shapes, strict=True), start=1)}
        points = merged_points(bowls)
        heights = {name: heights_at(bowls, point) for name, point in points.items()}
        title = "angles {:g}° and {:g}°, elongations {:g} and {:g}".format(*tilts, *elongations)
        panels[title] = bowls, points
        sums = ", ".join(f"{name} {sum(height.values()):.2f}" for name, height in heights.items())
        words.append(f"{title}: sum of the losses {sums}")
    seen = torch.stack([*experts, *(point for _, points in panels.values() for point in points.values())])
    (left, bottom), (right, top) = (seen.amin(0) - 1.5).tolist(), (seen.amax(0) + 1.5).tolist()
    figure = plot_ellipses(
        panels,
        levels=(0.3, 1.2, 2.7),
        limits=(left, right, bottom, top),
        heights=heights if len(panels) == 1 else None,
    )
    figure.set_label("\n".join(words))
    return figure


def explore_bowls() -> Any:
    """Sliders for two quadratic bowls: tilt, stretch, move and strengthen them, and watch where methods merge.

    Returns:
        An ipywidgets container: sliders and the figure drawn by `bowls_at`.
    """
    return _explorer(
        lambda first, second, long1, long2, distance, size: bowls_at(
            [((first, second), (long1, long2))], distance=distance, size=size
        ),
        first=_slider("angle 1", 60.0, (-90.0, 90.0)),
        second=_slider("angle 2", -20.0, (-90.0, 90.0)),
        long1=_slider("elongation 1", 3.0, (1.0, 8.0)),
        long2=_slider("elongation 2", 3.0, (1.0, 8.0)),
        distance=_slider("distance", 4.0, (0.0, 8.0)),
        size=_slider("size of 2", 1.0, (0.1, 10.0)),
    )


def regression_at(
    suite: Suite,
    layer: str,
    tasks: Sequence[str],
    *,
    alpha: float = 1.0,
    images: int = 25,
    judged_on: int = 50,
) -> Figure:
    r"""RegMean of two tasks in one layer, judged on other images: whose inputs, and the error along each direction.

    Left, how much of each single input, and of each common direction of the inputs, is the first task's. Right, the
    squared error of the average and of RegMean along these directions.

    Args:
        suite: with experts.
        layer: the name of a weight; no depthwise convolution's.
        tasks: two names.
        alpha: RegMean's, for what stands beside the diagonals.
        images: training images per task that RegMean is given.
        judged_on: validation images per task, for everything that is drawn.

    Raises:
        ValueError: not two tasks.
        KeyError: there is no such layer, or it is a depthwise convolution.
    """
    if len(tasks) != 2:
        raise ValueError(f"expected two tasks, got {len(tasks)}.")
    taus = matrices(suite.task_vectors.subset(tasks))[layer]

    def gram(task: str, count: int, split: str) -> Tensor:
        batches = suite.calibration(task, count, split=split)
        block = input_grams(suite.build(suite.experts[task]), batches, names=[layer])[layer]
        return block.mixed(alpha if split == "train" else 1.0).factors()["inputs"]

    merges = {
        "average": taus.mean(0),
        "RegMean": least_squares(taus, [gram(task, images, "train") for task in tasks]),
    }
    first, second = (gram(task, judged_on, "validation")[0] for task in tasks)
    shares, directions = common_directions(first, second)
    apart = ((taus[0] - taus[1]) @ directions).square().sum(0)  # the unit: how far the experts are apart
    errors = {name: errors_along(merged, taus, shares, directions) for name, merged in merges.items()}
    title = f"{layer}, alpha = {alpha:g}, {images} image{'s' if images > 1 else ''} per task"
    figure = plot_regression(
        {
            "single inputs": first.diagonal() / (first + second).diagonal().clamp(min=1e-300),
            "common directions": shares,
        },
        {"RegMean": (shares, errors["RegMean"] / apart.clamp(min=1e-300), apart)},
        tasks,
        title=title,
    )
    whole = {name: float(error.sum()) for name, error in errors.items()}
    ratio = whole["RegMean"] / whole["average"]
    figure.set_label(f"{title}: on other images RegMean's error is {ratio:.2f} of the average's")
    return figure


def explore_regression(suite: Suite, *, layer: str | None = None) -> Any:
    """Menus of layers and pairs of tasks, sliders for RegMean's α and its images: watch the error along each direction.

    Args:
        suite: with experts.
        layer: to begin with; by default the first.

    Returns:
        An ipywidgets container: the controls and the figure drawn by `regression_at`.
    """
    import ipywidgets as widgets

    layers = list(matrices(suite.task_vectors))
    pairs = {f"{a}, {b}": (a, b) for a, b in combinations(suite.experts, 2)}
    return _explorer(
        lambda layer, tasks, alpha, images: regression_at(suite, layer, pairs[tasks], alpha=alpha, images=images),
        layer=widgets.Dropdown(options=layers, value=layer or layers[0], description="layer"),
        tasks=widgets.Dropdown(options=list(pairs), description="two tasks"),
        alpha=_slider("alpha", 1.0, (0.0, 1.0)),
        images=widgets.SelectionSlider(options=[1, 2, 5, 10, 25, 50], value=25, description="images"),
    )


def descents_at(settings: Iterable[tuple[float, float, str]], *, start: float = 6.0) -> Figure:
    """Steepest descent and conjugate gradients on a bowl in the plane, until a ten-thousandth of the height is left.

    Args:
        settings: a panel each: the bowl's elongation (its condition number), the angle of its valley in degrees, and
            the preconditioner, ``"none"`` or ``"jacobi"``.
        start: where to start from, on a circle around the lowest point: degrees from the valley.
    """
    panels, words = {}, []
    for elongation, degrees, preconditioner in settings:
        matrix = bowl(elongation, degrees)
        jacobi = preconditioner == "jacobi"
        # From 180 degrees on: the way leads from the left to the right.
        ways = ways_down(matrix, direction(degrees + 180 - start), jacobi=jacobi)
        title = f"κ = {elongation:g}, {degrees:g}°" + (", Jacobi" if jacobi else "")
        panels[title] = matrix, ways
        counts = ", ".join(f"{name} {len(way) - 1}" for name, way in ways.items())
        words.append(f"{title}: steps: {counts}")
    figure = plot_descents(panels)
    figure.set_label("\n".join(words))
    return figure


def explore_descents() -> Any:
    """Sliders for a bowl's elongation, its angle and the start, and a menu of preconditioners: two ways to the bottom.

    Returns:
        An ipywidgets container: the controls and the figure drawn by `descents_at`.
    """
    import ipywidgets as widgets

    def slider(description: str, value: float, low: float, high: float) -> Any:
        return widgets.FloatSlider(
            value=value, min=low, max=high, step=1, description=description, continuous_update=False
        )

    return _explorer(
        lambda elongation, degrees, start, way: descents_at([(elongation, degrees, way)], start=start),
        elongation=slider("elongation", 10, 1, 100),
        degrees=slider("angle", 30, 0, 90),
        start=slider("start", 6, 0, 90),
        way=widgets.Dropdown(options=["none", "jacobi"], description="precond."),
    )


def certainty_at(table: pd.DataFrame, scale: float) -> Figure:
    """Entropy, which needs no labels, beside the loss, which does: for every task at one scale, and over all scales.

    Args:
        table: what `mergekit_lite.lab.certainty.certainties` returned.
        scale: one of the table's.
    """
    figure = plot_certainty(table, scale)
    here = table.loc[scale].mean()
    figure.set_label(
        f"λ = {scale:g}: entropy {here['entropy']:.2f}, loss {here['loss']:.2f}, accuracy {here['right']:.2f}"
    )
    return figure


def explore_certainty(table: pd.DataFrame) -> Any:
    """A slider for the common scale of a merge: watch how certain it is on every task, and how right.

    Args:
        table: what `mergekit_lite.lab.certainty.certainties` returned; the slider stops at its scales.

    Returns:
        An ipywidgets container: a slider and the figure drawn by `certainty_at`.
    """
    import ipywidgets as widgets

    scales = list(dict.fromkeys(table.index.get_level_values("scale")))
    return _explorer(
        lambda scale: certainty_at(table, scale),
        scale=widgets.SelectionSlider(
            options=scales, value=scales[len(scales) // 2], description="scale λ", continuous_update=False
        ),
    )


def concrete_at(settings: Iterable[tuple[float, float]]) -> Figure:
    r"""One entry of a Concrete mask: draws, density and slopes.

    Args:
        settings: a logit x and a temperature T for each curve.
    """
    settings = list(settings)
    figure = plot_concrete(settings)
    words = []
    for x, temperature in settings:
        found = moments(x, temperature)
        noise = found["square"] / found["slope"] ** 2
        words.append(
            f"x = {x:g}, T = {temperature:g}: above 1/2 with probability {found['kept']:.2f}, on average "
            f"{found['mean']:.2f}; slope on average {found['slope']:.2f}, its mean square {noise:.1f} times the square "
            "of that"
        )
    figure.set_label("\n".join(words))
    return figure


def explore_concrete() -> Any:
    """Sliders for logit and temperature: from a yes or no without a slope to a number without a choice.

    Returns:
        An ipywidgets container: two sliders and the figure drawn by `concrete_at`.
    """
    return _explorer(
        lambda x, temperature: concrete_at([(x, temperature)]),
        x=_slider("logit x", 1.0, (-4.0, 4.0)),
        temperature=_slider("temp. T", 0.5, (0.05, 3.0)),
    )


def routing_at(suite: Suite, network: WEMoE, chosen: Iterable[tuple[str, int]]) -> Figure:
    """Test images, each beside its routing weights in all blocks and the class that the mixture predicts.

    Args:
        suite: whose images and heads they are.
        network: a mixture.
        chosen: an image each, by its task and its position among the task's test images.
    """
    rows, words = {}, []
    for task, index in chosen:
        split = suite.task(task).test[index : index + 1]
        features, answers = look(network, suite.prepare(split.images))
        probabilities = suite.heads[task](features).softmax(1)[0]
        classes, true, found = suite.task(task).classes, int(split.labels[0]), int(probabilities.argmax())
        title = f"{task} {index}: {classes[true]}\npredicted: {classes[found]} ({float(probabilities[found]):.2f})"
        rows[title] = split.images[0], torch.cat(list(answers.values()))
        words.append(f"{task} {index}: {classes[found]}, {'right' if found == true else f'but it is {classes[true]}'}")
    figure = plot_routes(rows, list(network.mixtures), network.tasks)
    figure.set_label("\n".join(words))
    return figure


def explore_routing(suite: Suite, network: WEMoE) -> Any:
    """A menu of tasks, those that are never merged too, and a slider over their test images: watch the routers.

    Args:
        suite: whose images and heads they are.
        network: a mixture.

    Returns:
        An ipywidgets container: the controls and the figure drawn by `routing_at`.
    """
    import ipywidgets as widgets

    tasks = {**suite.tasks, **suite.held_out}
    last = min(len(task.test) for task in tasks.values()) - 1
    return _explorer(
        lambda task, image: routing_at(suite, network, [(task, image)]),
        task=widgets.Dropdown(options=list(tasks), description="task"),
        image=widgets.IntSlider(value=0, min=0, max=last, description="image", continuous_update=False),
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
