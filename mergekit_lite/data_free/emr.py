r"""EMR-Merging: one elected task vector, and for each task a mask and a scale that bring it near the expert.

Huang et al., "EMR-Merging: tuning-free high-performance model merging", NeurIPS 2024 (arXiv:2405.17461), section 3.2
and algorithm 1. One set of weights cannot stand for all experts. So

1. *elect* one vector for all: per entry the sign with the larger total, and the largest magnitude that has it,

   .. math:: \gamma = \mathrm{sgn}\Big(\sum_k \tau_k\Big), \qquad
             \tau_{\mathrm{uni}} = \gamma \odot \max_k\, (\gamma \odot \tau_k)_+ \,;

2. *mask* it for task k where the signs differ: :math:`M_k = \mathbb{1}[\tau_k \odot \tau_{\mathrm{uni}} > 0]`;
3. *rescale* it to the size of :math:`\tau_k`:
   :math:`\lambda_k = \|\tau_k\|_1 \,/\, \|M_k \odot \tau_{\mathrm{uni}}\|_1`,

and task k is answered by :math:`\theta_0 + \lambda_k\, M_k \odot \tau_{\mathrm{uni}}`. Nothing is tuned; but the task
of an input must be known, and a bit per weight and task be stored.

**What steps 2 and 3 do.** Masking brings the vector closer to every :math:`\tau_k` (the paper's equation 4): where
signs differ, 0 is closer than any number of the wrong sign. Rescaling need not. Equation 13 takes :math:`\lambda_k`
for the scale of least squared distance, but that is :math:`\langle \tau_k, M_k \odot \tau_{\mathrm{uni}} \rangle /
\|M_k \odot \tau_{\mathrm{uni}}\|^2`. For :math:`\tau_1 = (1, -10)` and :math:`\tau_2 = (1, 11)` the mask leaves task 1
with (1, 0), which is optimal, and :math:`\lambda_1 = 11` makes it (11, 0), farther away than without a mask.

**The released code** differs in two ways. It adds up each tensor's *mean* magnitude in :math:`\lambda_k`, so that a
bias counts as much as a large matrix (`by_tensor`), and where the sum is exactly zero it elects the negative sign,
where here, as in the formula, nothing is elected.
"""

import torch
from torch import Tensor

from mergekit_lite.checks import flag
from mergekit_lite.data_free.task_conditioned import TaskConditioned, in_memory
from mergekit_lite.geometry import vectors_of
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors


@method(
    name="EMR-Merging",
    paper="Huang et al., EMR-Merging: tuning-free high-performance model merging, NeurIPS",
    arxiv="2405.17461",
    year=2024,
    need=Need.WEIGHTS,
    per_task=True,
)
def emr(tv: TaskVectors, *, by_tensor: bool = False) -> TaskConditioned:
    r"""Elect one task vector; mask and rescale it for each task.

    Args:
        tv: K task vectors, named as their tasks.
        by_tensor: measure :math:`\lambda_k` with the sum of every tensor's mean magnitude, as the released code does,
            instead of the sum over all weights.

    Returns:
        K models by task name, made when asked for. A task vector with which the election agrees nowhere is answered
        by the base.

    Raises:
        TypeError: `by_tensor` is neither True nor False.
    """
    flag("by_tensor", by_tensor)
    masks: dict[str, Tensor] = {}
    size, kept = torch.zeros(2, len(tv), dtype=torch.float64)  # the two norms in λ, by task

    def merge(name: str, taus: Tensor) -> Tensor:
        unified = elect(taus)
        masks[name] = taus * unified > 0
        weights = max(1, unified.numel()) if by_tensor else 1
        size.add_(norms(taus) / weights)
        kept.add_(norms(masks[name] * unified) / weights)
        return unified

    shared = in_memory(tv, merge)
    scales = torch.where(kept > 0, size / kept, 0.0)
    return TaskConditioned(shared, masks, dict(zip(tv.names, scales.tolist(), strict=True)))


def elect(taus: Tensor) -> Tensor:
    """The largest entry, per weight, among those of K task vectors (K, *shape) that have the sign of their sum."""
    signs = taus.sum(0).sign()
    return signs * (taus * signs).clamp(min=0).amax(0)


def norms(vectors: Tensor) -> Tensor:
    """The 1-norms of K vectors (K, *shape): shape (K,), in float64."""
    return vectors_of(vectors).abs().sum(1, dtype=torch.float64).cpu()
