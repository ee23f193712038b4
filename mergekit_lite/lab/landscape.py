r"""The loss around an expert, measured and as a bowl: the experiments of chapter 3.1.

A step s away from expert k changes its task's loss to second order by

.. math:: L_k(\theta_k + s) - L_k(\theta_k) \approx \nabla L_k(\theta_k)^\top s + \tfrac12\, s^\top F_k\, s ,

with the Fisher information :math:`F_k` in the place of the Hessian. It has a row and a column per weight, but *between*
a few directions it can be had exactly. Let :math:`p` be the predicted probabilities of an image's classes and
:math:`Ju` the change of its logits along a direction u, a forward-mode derivative. Then

.. math:: u^\top F_k\, v = \text{mean over images of } \operatorname{Cov}_{c \sim p}\big( (Ju)_c, (Jv)_c \big) .
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jvp

from mergekit_lite.calibrated import Curvature, Diagonal, fisher, mats
from mergekit_lite.data_free import average
from mergekit_lite.suites.speed import keep_freed_memory, one_thread
from mergekit_lite.suites.suite import Suite
from mergekit_lite.task_vectors import TaskVectors, float64

Direction = Mapping[str, Tensor]  # by parameter name; what is missing does not move

# ---------------------------------------------------------------- directions


def away_from(suite: Suite, task: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The step from a task's expert to other weights, parameters only."""
    expert = suite.experts[task]
    return {name: state[name] - expert[name] for name, _ in suite.model.named_parameters()}


def with_random_signs(direction: Direction, seed: int = 0) -> dict[str, Tensor]:
    """The same step with the sign of every entry drawn anew: as far, weight by weight, but elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: step * (2.0 * torch.randint(0, 2, step.shape, generator=generator) - 1)
        for name, step in direction.items()
    }


def one_weight(suite: Suite, name: str, place: Sequence[int]) -> dict[str, Tensor]:
    """The direction that moves a single weight by 1."""
    direction = torch.zeros_like(suite.base[name])
    direction[tuple(place)] = 1
    return {name: direction}


# ---------------------------------------------------------------- bowls around an expert


@dataclass(frozen=True)
class Bowl:
    r"""A task's loss around its expert to second order, along m directions: :math:`g^\top s + \tfrac12 s^\top F s`.

    Attributes:
        matrix: F, the Fisher information between the directions, (m, m).
        slope: g, the gradient of the loss on given labels along them, (m,).
    """

    matrix: Tensor
    slope: Tensor

    def __call__(self, steps: Tensor) -> Tensor:
        """The change of the loss, (...), at steps (..., m) along the directions."""
        steps = float64(steps)
        return steps @ self.slope + 0.5 * torch.einsum("...i,ij,...j->...", steps, self.matrix, steps)


def bowl_around(suite: Suite, task: str, directions: Sequence[Direction], *, images: int = 50) -> Bowl:
    """The Fisher information and the slope of a task's loss at its expert, along some directions.

    Args:
        suite: with experts.
        task: a task's name.
        directions: m steps in weight space.
        images: how many training images, as `Suite.calibration` draws them.
    """
    model, head, expert = suite.build(), suite.heads[task], suite.experts[task]
    model.eval()
    m, seen = len(directions), 0
    matrix, slope = torch.zeros(m, m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    with one_thread(), torch.no_grad():
        for x, labels in suite.calibration(task, images):
            x = x.contiguous()  # other layouts are slow in forward mode
            along = []
            for direction in directions:
                moving = {name: expert[name] for name in direction}

                def logits_at(weights: Direction, x: Tensor = x) -> Tensor:
                    return head(functional_call(model, {**expert, **weights}, (x,)))

                logits, change = jvp(logits_at, (moving,), (dict(direction),))[:2]
                along.append(float64(change))
            p, changes = float64(logits).softmax(1), torch.stack(along)
            centred = changes - (p * changes).sum(2, keepdim=True)
            matrix += torch.einsum("nc,inc,jnc->ij", p, centred, centred).cpu()
            surprise = F.one_hot(labels, p.shape[1]) - p
            slope -= torch.einsum("nc,inc->i", surprise.to(p), changes).cpu()
            seen += len(x)
    return Bowl(matrix / seen, slope / seen)


def between(curvature: Curvature, directions: Sequence[Direction]) -> Tensor:
    r"""What a curvature in blocks says of the same directions: :math:`u_i^\top C u_j`, (m, m)."""

    def inner(u: Direction, v: Direction) -> float:
        total = 0.0
        for name in (name for name in u if name in v and name in curvature):
            step = float64(v[name])
            total += float((float64(u[name]) * curvature[name].to(step)(step)).sum())
        return total

    return torch.tensor([[inner(u, v) for v in directions] for u in directions], dtype=torch.float64)


def changes_at(
    suite: Suite, task: str, directions: Sequence[Direction], points: Tensor, *, images: int = 50
) -> dict[str, Tensor]:
    """The measured change of a task's loss around its expert.

    Args:
        suite: with experts.
        task: a task's name.
        directions: m steps in weight space.
        points: (n, m), how far to go along each.
        images: how many training images, as `Suite.calibration` draws them.

    Returns:
        Two tensors (n,): by ``"given labels"`` the mean cross-entropy minus the expert's; by ``"own predictions"`` that
        for labels drawn from the expert's predictions (the Kullback-Leibler divergence from them).
    """
    head, expert, batches = suite.heads[task], suite.experts[task], suite.calibration(task, images)
    moved = {name for direction in directions for name in direction}
    model = suite.build(expert).eval()
    weights = dict(model.named_parameters())

    def answers() -> Tensor:
        return torch.cat([float64(head(model(x))).log_softmax(1) for x, _ in batches])

    given, own = [], []
    keep_freed_memory()
    with one_thread(), torch.no_grad():
        labels = torch.cat([y for _, y in batches])
        before = answers()
        for point in points.tolist():
            for name in moved:
                step = sum(a * u[name] for a, u in zip(point, directions, strict=True) if name in u)
                weights[name].copy_(expert[name] + step)
            change = before - answers()
            given.append(change[torch.arange(len(labels)), labels].mean())
            own.append((before.exp() * change).sum(1).mean())
    return {"given labels": torch.stack(given), "own predictions": torch.stack(own)}


# ---------------------------------------------------------------- bowls over two weights


def ellipse(angle: float, elongation: float, size: float = 1.0) -> Tensor:
    r"""The matrix C (2, 2) whose level lines :math:`s^\top C s = 1` are ellipses.

    Args:
        angle: of the long axis to the first weight's axis, in degrees.
        elongation: how many times longer the long axis is than the short one, from 1.
        size: C's trace, halved: how much the task minds on average over all directions.
    """
    radians = math.radians(angle)
    axes = torch.tensor([[math.cos(radians), -math.sin(radians)], [math.sin(radians), math.cos(radians)]])
    curvatures = torch.tensor([1.0, elongation**2]).double()
    return (axes.double() * (2 * size * curvatures / curvatures.sum())) @ axes.double().T


def merged_points(bowls: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Where three merging methods put the two weights, given bowls with a lowest point (2,) and a matrix C (2, 2).

    Returns:
        By what the method knows of the bowls: ``"average"`` nothing, ``"diagonal"`` C's diagonal (Fisher merging),
        ``"whole matrix"`` all of it (MaTS).
    """
    tv = TaskVectors({"w": torch.zeros(2).double()}, {name: {"w": lowest} for name, (lowest, _) in bowls.items()})
    diagonals = [Curvature({"w": Diagonal(matrix.diagonal())}) for _, matrix in bowls.values()]
    wholes = [{"w": matrix.__matmul__} for _, matrix in bowls.values()]  # any linear function will do
    merges = {"average": average(tv), "diagonal": fisher(tv, diagonals), "whole matrix": mats(tv, wholes)}
    return {name: state["w"] for name, state in merges.items()}


def heights_at(bowls: Mapping[str, tuple[Tensor, Tensor]], point: Tensor) -> dict[str, float]:
    r"""Each bowl's height at a point (2,): :math:`\tfrac12 (\theta - m)^\top C\, (\theta - m)`."""
    return {name: 0.5 * float((point - low) @ matrix @ (point - low)) for name, (low, matrix) in bowls.items()}
