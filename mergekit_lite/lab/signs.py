"""What trimming, electing and dropping are worth, for one suite: the tables of chapter 2.4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.data_free import breadcrumbs, dare, della, drop_and_rescale, pcb, task_arithmetic, ties, trim
from mergekit_lite.data_free.dare import random_levels
from mergekit_lite.data_free.pcb import balance, unit_range
from mergekit_lite.data_free.ties import disjoint_merge, elect, elect_and_merge
from mergekit_lite.selection import rank_of
from mergekit_lite.suites.suite import Suite
from mergekit_lite.task_vectors import Place, TaskVectors

if TYPE_CHECKING:
    import pandas as pd

TABLES = Path(__file__).parent / "tables"
KEPT = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.8)  # shares of a single task vector's entries
LENGTHS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)  # how far a merge lies from the base
Election = Callable[[Place, Tensor], Tensor]


def results() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """What was found with pocket8; it travels with the package.

    Returns:
        Test accuracy of thinned experts of seed 0, a row per share that is kept and a column per way; one row per
        merge, means over three seeds, as `measure_merges` describes it, with the spread of the test accuracy and what
        it was in each seed; and accuracies on validation images, one row per distance and one column per merge.
    """
    import pandas as pd

    experts = pd.read_csv(TABLES / "signs-experts.csv", index_col="kept")
    merges = pd.read_csv(TABLES / "signs.csv", index_col="merge")
    curves = pd.read_csv(TABLES / "signs-curves.csv")
    return experts, merges, curves.pivot(index="distance", columns="merge", values="validation")


# ---------------------------------------------------------------- one expert, thinned


def smallest(tv: TaskVectors, share: float) -> TaskVectors:
    """Only the share of smallest entries: what `trim` with 1 - share sets to 0."""
    large = trim(tv, 1 - share)
    return tv.transform_pieces(_minus(large))


def at_random(tv: TaskVectors, share: float) -> TaskVectors:
    """A random share of the entries, as they are: DARE without its rescaling."""
    return drop_and_rescale(tv, 1 - share) * share


def largest_rescaled(tv: TaskVectors, share: float) -> TaskVectors:
    """The largest entries, multiplied so that each task vector has the sum of magnitudes it had before."""
    kept = trim(tv, share)
    before, after = (sum(taus.abs().sum(1) for _, taus in vectors.pieces()) for vectors in (tv, kept))
    factor = torch.as_tensor(before) / torch.as_tensor(after).clamp(min=1e-12)
    return kept.transform_pieces(lambda _, taus: taus.mul_(factor[:, None].to(taus)))


# Ways to keep a share of a task vector.
WAYS: dict[str, Callable[[TaskVectors, float], TaskVectors]] = {
    "the largest": trim,
    "the largest, rescaled": largest_rescaled,
    "at random, rescaled": lambda tv, share: drop_and_rescale(tv, 1 - share),
    "at random": at_random,
    "the smallest": smallest,
}


def _minus(other: TaskVectors) -> Callable[[Place, Tensor], Tensor]:
    """A function of pieces that subtracts other task vectors, which are read in the same order."""
    parts = {place: piece.clone() for place, piece in other.pieces()}
    return lambda place, taus: taus.sub_(parts[place])


def measure_experts(suite: Suite, *, split: str = "test") -> pd.DataFrame:
    """Each expert on its own task with a share of its task vector: one row per share, one column per way."""
    import pandas as pd

    tv = suite.task_vectors

    def accuracy(thinned: TaskVectors) -> float:
        experts = {name: task_arithmetic(thinned[name], scale=1.0) for name in tv.names}
        return suite.evaluate(experts, split=split).average

    rows = {share: {way: accuracy(thin(tv, share)) for way, thin in WAYS.items()} for share in KEPT}
    rows[1.0] = dict.fromkeys(WAYS, accuracy(tv))
    return pd.DataFrame(rows).T


# ---------------------------------------------------------------- merges, step by step


def merge_elected(tv: TaskVectors, election: Election) -> StateDict:
    """The disjoint mean for any election of signs."""
    return tv.map_pieces(lambda place, taus: disjoint_merge(taus, election(place, taus)))


def coin(place: Place, taus: Tensor) -> Tensor:
    """Signs by lot."""
    return torch.where(random_levels(taus.shape[1], 0, place) < 0, -1.0, 1.0).to(taus)


def losers(place: Place, taus: Tensor) -> Tensor:
    """The sign that loses TIES's election."""
    return -elect(taus)


def mean_of_kept(tv: TaskVectors) -> StateDict:
    """Per entry, the mean of what was not trimmed, whatever its sign."""
    return tv.map_pieces(lambda _, taus: taus.sum(0) / (taus != 0).sum(0).clamp(min=1))


# Merges at λ = 1: a direction each, and how far to go along it is chosen for all alike.
MERGES: dict[str, Callable[[TaskVectors], StateDict]] = {
    "task arithmetic": lambda tv: task_arithmetic(tv, scale=1.0),
    "TIES": ties,
    "TIES, per layer": lambda tv: ties(tv, granularity="layer"),
    "no trim": lambda tv: elect_and_merge(tv, scale=1.0),
    "no election": lambda tv: mean_of_kept(trim(tv, 0.2)),
    "sum for mean": lambda tv: ties(tv, combine="sum"),
    "trim only": lambda tv: task_arithmetic(trim(tv, 0.2), scale=1.0),
    "elect only": lambda tv: elect_and_merge(tv, scale=1.0, combine="sum"),
    "signs by lot": lambda tv: merge_elected(trim(tv, 0.2), coin),
    "the losers' sign": lambda tv: merge_elected(trim(tv, 0.2), losers),
    "DARE, p = 0.5": lambda tv: dare(tv, drop=0.5, scale=1.0),
    "DARE, p = 0.9": lambda tv: dare(tv, drop=0.9, scale=1.0),
    "DARE + TIES, p = 0.5": lambda tv: dare(tv, drop=0.5, scale=1.0, combine="ties"),
    "DARE + TIES, p = 0.8": lambda tv: dare(tv, drop=0.8, scale=1.0, combine="ties"),
    "DELLA": lambda tv: della(tv, scale=1.0),
    "Breadcrumbs": lambda tv: breadcrumbs(tv, scale=1.0),
    "Breadcrumbs, 85 %": lambda tv: breadcrumbs(tv, density=0.85, outliers=0.01, scale=1.0),
    "PCB": pcb,
}


def measure_merges(suite: Suite, say: Callable[[str], Any] = print) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All merges on one suite, their lengths chosen on validation images.

    Returns:
        One row per merge: the length of its direction at λ = 1, the λ that was chosen, accuracy on validation and
        test images; and one row per merge and distance from the base: accuracy on validation images.
    """
    import pandas as pd

    rows, curves = [], []
    for name, merge in MERGES.items():
        direction = TaskVectors(suite.base, {name: merge(suite.task_vectors)})
        length = direction.gram().sqrt().item()
        curve = {}
        for distance in LENGTHS:
            state = task_arithmetic(direction, scale=distance / length)
            curve[distance] = suite.evaluate(state, split="validation").average
        chosen = max(curve, key=lambda distance: curve[distance])
        scale = chosen / length
        row: Mapping[str, Any] = {
            "merge": name,
            "length": length,
            "scale": scale,
            "distance": chosen,
            "validation": curve[chosen],
            "test": suite.evaluate(task_arithmetic(direction, scale=scale)).average,
        }
        say(", ".join(f"{value:.3f}" if isinstance(value, float) else value for value in row.values()))
        rows.append(row)
        curves += [{"merge": name, "distance": d, "validation": a} for d, a in curve.items()]
    return pd.DataFrame(rows), pd.DataFrame(curves)


# ---------------------------------------------------------------- who decides an entry, who survives


def ties_weights(taus: Tensor, density: float) -> Tensor:
    """The weights with which TIES averages K task vectors (K, n) per entry: (K, n), columns that sum to 1 or 0."""
    kept = trim(_alone(taus), density).flat()
    agrees = (kept * elect(kept) > 0).to(taus)
    return agrees / agrees.sum(0).clamp(min=1)


def pcb_weights(taus: Tensor, density: float) -> Tensor:
    """The weights with which PCB averages K task vectors (K, n) per entry: as `ties_weights`."""
    n = taus.shape[1]
    sizes = taus.abs()
    scores = balance(taus, unit_range(sizes, sizes.amin(1, keepdim=True), sizes.amax(1, keepdim=True)))
    cut = scores.kthvalue(rank_of(1 - density, n), dim=1, keepdim=True).values
    scores = unit_range(scores.clamp(min=cut), cut, scores.amax(1, keepdim=True))
    return scores / scores.sum(0).clamp(min=1e-12)


def first_share(weights: Tensor) -> Tensor:
    """The first task's part of the weights (K, n) of all: (n,), NaN where no task counts."""
    return weights[0] / weights.sum(0)


def survival(taus: Tensor, thin: Callable[[TaskVectors], TaskVectors], bins: int = 20) -> Tensor:
    """The share of entries that are not 0 after thinning, by their rank: the smallest first, (bins,).

    All K task vectors (K, n) count together; each is ranked by itself, as one row.
    """
    kept = thin(_alone(taus)).flat() != 0
    ranked = kept.gather(1, taus.abs().argsort(dim=1))
    return torch.stack([part.double().mean() for part in ranked.tensor_split(bins, dim=1)])


# ---------------------------------------------------------------- what reaches and leaves a layer


def layer_inputs(suite: Suite, images: int) -> dict[str, Tensor]:
    """What reaches the pointwise convolutions of the base, from so many validation images per task.

    Returns:
        By the name of the weight: one row per image and position, one column per input, (rows, n).
    """
    model, seen = suite.build().eval(), {}

    def remember(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_: Any, given: tuple[Tensor, ...]) -> None:
            seen[f"{name}.weight"] = given[0].movedim(1, -1).flatten(0, 2).clone()

        return hook

    for name, module in model.named_modules():
        if "conv_pw" in name:
            module.register_forward_pre_hook(remember(name))
    with torch.inference_mode():
        model(torch.cat([suite.prepare(task.validation.images[:images]) for task in suite.tasks.values()]))
    return seen


def features_moved(suite: Suite, experts: Mapping[str, StateDict]) -> Tensor:
    """How far each expert moves the base's features of its own task's validation images: (K, images, features)."""
    base, moved = suite.build().eval(), []
    for task, expert in experts.items():
        images = suite.tasks[task].validation
        moved.append(suite.features(suite.build(expert).eval(), images) - suite.features(base, images))
    return torch.stack(moved)


def compared(changes: Tensor, true: Tensor) -> list[float]:
    """How much of true changes (K, ...) is in others, and their squared distance relative to the true ones' length.

    Returns:
        The slope of the regression on the true change, and the error; means over the K tasks.
    """
    changes, true = changes.flatten(1), true.flatten(1)
    slope = (changes * true).sum(1) / true.square().sum(1)
    error = (changes - true).square().sum(1) / true.square().sum(1)
    return [slope.mean().item(), error.mean().item()]


def coherence(taus: Tensor, x: Tensor) -> float:
    r"""How far the terms of a layer's change push the same way: from 1, random signs, to n.

    .. math:: C = \mathbb{E} \Big(\sum_i x_i \tau_i\Big)^2 \Big/ \; \mathbb{E} \sum_i x_i^2 \tau_i^2

    Args:
        taus: (..., outputs, n), of one task or of several.
        x: inputs, (rows, n).
    """
    return ((taus @ x.T).square().mean() / (taus.square() @ x.T.square()).mean()).item()


def in_other_units(state: Mapping[str, Tensor], name: str, factor: float) -> StateDict:
    """The same function with one expansion's weights written larger, and the statistics of the normalisation after it.

    Args:
        state: of a network of pocket8.
        name: of an expansion's weight, ``"blocks. ... .conv_pw.weight"`` in a block that begins with it.
        factor: by which the weights grow.
    """
    after = name.replace("conv_pw.weight", "bn1.running_")
    larger = {name: factor, f"{after}mean": factor, f"{after}var": factor**2}
    return {n: larger[n] * t if n in larger else t for n, t in state.items()}


def _alone(taus: Tensor) -> TaskVectors:
    """Task vectors of a network that has one tensor."""
    return TaskVectors({"w": torch.zeros_like(taus[0])}, [{"w": tau} for tau in taus])
