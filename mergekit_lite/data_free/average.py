r"""Averaging the weights of fine-tuned models.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time", ICML 2022 (arXiv:2203.05482), section 2 (the uniform soup).

.. math:: \theta = \sum_k w_k\,\theta_k = \theta_0 + \sum_k w_k\,\tau_k , \qquad \sum_k w_k = 1

Because the weights sum to one, the base drops out: averaging is the only merge here that needs
no common ancestor to be *computed*. It needs one to *work*: the average of two networks trained
from different initialisations is, as a rule, worse than both.
"""

from collections.abc import Sequence

import torch

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import numbers
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors


@method(
    name="Weight averaging",
    paper="Wortsman et al., Model soups, ICML",
    arxiv="2203.05482",
    year=2022,
    need=Need.WEIGHTS,
)
def average(tv: TaskVectors, *, weights: Sequence[float] | None = None) -> StateDict:
    r"""The (weighted) mean of the experts' weights.

    Args:
        tv: K task vectors.
        weights: K non-negative numbers, one per expert, such as the sizes of the training sets; they
            are divided by their sum. By default all equal.

    Returns:
        The merged state dict.

    Raises:
        ValueError: not K weights, a negative or non-finite one, or all zero.
    """
    w = numbers("weights", [1.0] * len(tv) if weights is None else weights)
    if w.shape != (len(tv),):
        raise ValueError(f"expected {len(tv)} weights, one per expert, got {w.numel()}.")
    if not torch.isfinite(w).all() or (w < 0).any() or w.sum() == 0:
        raise ValueError(f"weights must be finite, not negative and not all zero; got {w.tolist()}.")
    w = w / w.sum()
    return tv.map_pieces(lambda place, taus: w.to(taus) @ taus, shares=w)
