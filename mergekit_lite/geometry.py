"""The geometry of task vectors: how long they are, where they point, and how much they disturb each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from mergekit_lite.task_vectors import TaskVectors


def cosines(tv: TaskVectors) -> Tensor:
    r"""The K x K matrix of cosines :math:`G_{ij} / \sqrt{G_{ii} G_{jj}}` between whole task vectors, in float64.

    A zero task vector has no direction; its cosines with the others are 0, with itself 1.
    """
    gram = tv.gram()
    lengths = gram.diagonal().sqrt()
    safe = torch.where(lengths > 0, lengths, 1.0)
    return (gram / safe.outer(safe)).fill_diagonal_(1.0)


def largest_cosine(tv: TaskVectors) -> float:
    """The largest |cosine| between two different task vectors (0 for a single one)."""
    matrix = cosines(tv)
    return float((matrix - torch.eye(len(tv), dtype=matrix.dtype)).abs().max())


# What a merged network with these scales predicts for the images of one task: classes, shape (N,).
Predict = Callable[[Sequence[float], str], Tensor]


def disentanglement_error(predict: Predict, tasks: Sequence[str], scales: Sequence[float]) -> float:
    r"""How much the task vectors disturb each other's predictions at one point of the plane of scales.

    .. math::
       \xi(\lambda_1, \dots, \lambda_K) = \sum_{k=1}^{K} \Pr_{x \sim \text{task } k} \Big[
           f(x;\, \theta_0 + \lambda_k \tau_k) \ne f\big(x;\, \theta_0 + \textstyle\sum_j \lambda_j \tau_j\big) \Big]

    Ortiz-Jimenez et al., "Task arithmetic in the tangent space", NeurIPS 2023 (arXiv:2305.12827), equation 6, with
    the share of images whose predicted class changes as the distance. 0 is a merge in which every task is
    answered as if its own task vector had been added alone; K is the worst there can be.

    Args:
        predict: ``predict(scales, task)`` gives the predicted classes of the merge with these K scales.
        tasks: K names, in the order of the scales.
        scales: K numbers :math:`\lambda_k`.

    Raises:
        ValueError: not as many scales as tasks.
    """
    if len(scales) != len(tasks):
        raise ValueError(f"expected {len(tasks)} scales (one per task), got {len(scales)}.")
    error = 0.0
    for k, task in enumerate(tasks):
        alone = [scale if j == k else 0.0 for j, scale in enumerate(scales)]
        error += (predict(alone, task) != predict(scales, task)).double().mean().item()
    return error


def disentanglement_map(predict: Predict, tasks: Sequence[str], grid: Sequence[float]) -> Tensor:
    r"""The disentanglement error of two tasks over a grid of scales.

    Args:
        predict: as for `disentanglement_error`.
        tasks: two names.
        grid: n values that each of :math:`\lambda_1, \lambda_2` takes.

    Returns:
        Shape (n, n), float64; row i has :math:`\lambda_1` = grid[i], column j has :math:`\lambda_2` = grid[j].

    Raises:
        ValueError: not two tasks.
    """
    if len(tasks) != 2:
        raise ValueError(f"a map has two axes, so it needs two tasks; got {len(tasks)}.")
    known = cache(lambda scales, task: predict(scales, task))  # each λτ alone stands for a whole row or column
    errors = [[disentanglement_error(lambda s, t: known(tuple(s), t), tasks, (a, b)) for b in grid] for a in grid]
    return torch.tensor(errors, dtype=torch.float64)
