r"""MetaGPT: a scale per task, in closed form, from the lengths of the task vectors.

Zhou et al., "MetaGPT: merging large language models using model exclusive task arithmetic", EMNLP 2024
(arXiv:2406.11385). Merging costs task i the *task loss difference*, its loss in the merge minus its loss in its own
expert. Expanding around the expert, where the gradient vanishes,

.. math::
   \mathrm{TLD}_i \approx \tfrac12\, (v - \tau_i)^\top H_i\, (v - \tau_i), \qquad v = \sum_k \lambda_k \tau_k .

The paper linearises the network and assumes a squared loss. Then :math:`\tau_i` is proportional to the network's
gradient, the Hessian :math:`H_i` to :math:`\tau_i \tau_i^\top`, and Cauchy-Schwarz gives, up to one factor for all
tasks,

.. math::
   \sum_i \mathrm{TLD}_i \;\le\; \sum_i \|\tau_i\|^2\, \|v - \tau_i\|^2 .

The right-hand side is a sum of squared distances from v, weighted by :math:`\|\tau_i\|^2`. Its minimum over *all*
vectors v is the weighted centroid, a combination of task vectors with the coefficients (the paper's equation 15)

.. math::
   \lambda_i = \frac{\|\tau_i\|^2}{\sum_k \|\tau_k\|^2} .

So the orthogonality of the task vectors, which the paper assumes, is not needed for this step. (Its equations 10 and
39 print :math:`1 - \lambda_k^2` where only :math:`(1 - \lambda_k)^2` leads to equation 15.) The coefficients sum to
one: task vectors of equal length are simply averaged, and a longer one counts for more.
"""

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.geometry import vectors_of
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors, float64


@method(
    name="MetaGPT",
    paper="Zhou et al., MetaGPT: merging large language models using model exclusive task arithmetic, EMNLP",
    arxiv="2406.11385",
    year=2024,
    need=Need.WEIGHTS,
)
def metagpt(tv: TaskVectors, *, granularity: str = "whole") -> StateDict:
    r"""Add the task vectors, each with the scale :math:`\lambda_i = \|\tau_i\|^2 / \sum_k \|\tau_k\|^2`.

    Args:
        tv: K task vectors.
        granularity: ``"whole"`` measures whole task vectors, as the paper does; ``"layer"`` measures every tensor on
            its own.

    Returns:
        The merged state dict.

    Raises:
        ValueError: another granularity.
    """
    if granularity not in ("whole", "layer"):
        raise ValueError(f"granularity must be whole or layer; got '{granularity}'.")
    whole = coefficients(tv.gram().diagonal()) if granularity == "whole" else None

    def merge(name: str, taus: Tensor) -> Tensor:
        scales = whole if whole is not None else coefficients(float64(vectors_of(taus)).square().sum(1))
        return torch.tensordot(scales.to(taus), taus, dims=1)

    return tv.map(merge, shares=whole)


def coefficients(squared_lengths: Tensor) -> Tensor:
    """The K scales, from K squared lengths; all equal where every task vector is zero."""
    total = squared_lengths.sum()
    return squared_lengths / total if total > 0 else torch.full_like(squared_lengths, 1 / len(squared_lengths))
