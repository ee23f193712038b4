r"""TIES-Merging: trim, elect a sign, merge what agrees with it.

Yadav et al., "TIES-Merging: resolving interference when merging models", NeurIPS 2023
(arXiv:2306.01708), section 4 and algorithm 1. Two things make task vectors destroy each other when
they are added: entries that do not matter, and entries whose signs disagree. So

1. *trim*: of each task vector keep the entries of largest magnitude (20 %), set the rest to 0;
2. *elect*: per entry, :math:`\gamma = \mathrm{sgn}(\sum_k \hat\tau_k)`, the sign with the larger total;
3. *disjoint mean*: per entry, average those trimmed entries whose sign is :math:`\gamma`,

and :math:`\theta = \theta_0 + \lambda\,\tau_m`. This is the paper's form: the trimming threshold is taken
over the whole task vector, not per tensor, and where the sum is exactly zero the entry takes the
sign of the majority of all elected signs, as in the released code.
"""

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors


@method(
    name="TIES-Merging",
    paper="Yadav et al., TIES-Merging: resolving interference when merging models, NeurIPS",
    arxiv="2306.01708",
    year=2023,
    need=Need.WEIGHTS,
)
def ties(tv: TaskVectors, *, density: float = 0.2, scale: float = 1.0) -> StateDict:
    r"""Trim each task vector, elect a sign per entry, average the entries that agree with it.

    Args:
        tv: K task vectors.
        density: the share of entries kept in each task vector, in (0, 1].
        scale: :math:`\lambda`; the paper tries 0.8 to 2.5 where it has validation data.

    Returns:
        The merged state dict.

    Raises:
        ValueError: density outside (0, 1], or a scale that is not finite.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is the share of entries to keep, in (0, 1]; got {density}.")
    if not torch.isfinite(torch.tensor(scale)):
        raise ValueError(f"scale must be finite, got {scale}.")
    trimmed = trim(tv.flat(), density)
    return tv.add(scale * disjoint_mean(trimmed, elect(trimmed)))


def trim(taus: Tensor, density: float) -> Tensor:
    """Keep the share `density` of largest magnitude in each row of (K, d); ties with the threshold stay."""
    d = taus.shape[1]
    dropped = d - max(1, round(density * d))
    if dropped == 0:
        return taus
    threshold = taus.abs().kthvalue(dropped, dim=1, keepdim=True).values
    return torch.where(taus.abs() > threshold, taus, 0.0)


def elect(taus: Tensor) -> Tensor:
    """The elected sign of each entry, shape (d,): that of the sum; of the majority where the sum is 0."""
    signs = taus.sum(0).sign()
    majority = signs.sum().sign()
    return torch.where(signs == 0, majority, signs)


def disjoint_mean(taus: Tensor, signs: Tensor) -> Tensor:
    """The mean, per entry, over those task vectors whose entry is not zero and has the elected sign."""
    agrees = taus * signs > 0
    return torch.where(agrees, taus, 0.0).sum(0) / agrees.sum(0).clamp(min=1)
