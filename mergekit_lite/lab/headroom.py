"""How good can a merge be that only chooses scales? The best scales that descent finds, with labels or without."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_lite.adaptive.losses import entropy
from mergekit_lite.checkpoints import StateDict
from mergekit_lite.data_free.awd import combine
from mergekit_lite.geometry import rows_of
from mergekit_lite.suites.suite import Suite
from mergekit_lite.task_vectors import TaskVectors

Scales = Mapping[str, Tensor]


def fit_scales(
    suite: Suite,
    granularity: str = "whole",
    *,
    start: float = 0.2,
    step: float = 0.02,
    iterations: int = 40,
    images: int = 60,
    split: str = "validation",
    labels: bool = True,
    progress: bool = True,
) -> Scales:
    r"""Scales :math:`\lambda_k` that make the labelled loss small: descent with Adam, as far as the images allow.

    A merge that is allowed to see labels is no method to compare with; it shows what the best scales can bring. The
    chain rule gives the slopes without differentiating through the merge,

    .. math:: \frac{\partial}{\partial \lambda_k} \sum_i L_i\Big(\theta_0 + \sum_j \lambda_j \tau_j\Big)
              = \Big\langle \sum_i \nabla L_i,\, \tau_k \Big\rangle ,

    for whole task vectors, and tensor by tensor or row by row for scales that are finer.

    Args:
        suite: with experts.
        granularity: ``"whole"`` has K scales, ``"layer"`` K for every tensor, ``"row"`` K for every row.
        start: all scales before the first step.
        step: of Adam, the size of a scale's change.
        iterations: steps.
        images: of each task, drawn anew for every step.
        split: where the images come from.
        labels: without them the entropy of the predictions takes the place of the loss: the idea of AdaMerging.
        progress: show a progress bar.

    Returns:
        By tensor name, of shape (K,) or (rows, K).
    """
    from tqdm.auto import trange

    tv = suite.task_vectors
    layers = {name: taus for name, _, taus in tv.layers()}
    sizes = {name: (rows_of(taus).shape[1],) if granularity == "row" else () for name, taus in layers.items()}
    common = torch.full((len(tv),), start)  # one tensor for all names, if the scales are those of whole task vectors
    scales = {n: common if granularity == "whole" else torch.full((*size, len(tv)), start) for n, size in sizes.items()}
    loss = F.cross_entropy if labels else lambda logits, labels: entropy(logits)
    optimizer = torch.optim.Adam({id(s): s for s in scales.values()}.values(), lr=step)
    for iteration in trange(iterations, desc=f"{granularity} scales", disable=None if progress else True):
        glance = suite.cut(images, seed=iteration)
        merged = scaled(tv, scales)
        gradients = [glance.gradient(merged, task, split=split, loss=loss) for task in suite.tasks]
        slopes = {id(s): torch.zeros_like(s) for s in scales.values()}
        for name in gradients[0]:
            slope = torch.stack([gradient[name] for gradient in gradients]).sum(0)
            dims = "rd,krd->rk" if granularity == "row" else "rd,krd->k"
            slopes[id(scales[name])] += torch.einsum(dims, rows_of(slope[None])[0], rows_of(layers[name]))
        for scale in scales.values():
            scale.grad = slopes[id(scale)]
        optimizer.step()
    return scales


def scaled(tv: TaskVectors, scales: Scales) -> StateDict:
    """Task arithmetic with the scales that `fit_scales` found; unlike `merge_with` it takes those of rows, too."""
    return tv.map(lambda name, taus: combine(scales[name], taus))
