r"""TIES-Merging: trim, elect a sign, merge what agrees with it.

Yadav et al., "TIES-Merging: resolving interference when merging models", NeurIPS 2023
(arXiv:2306.01708), section 4 and algorithm 1. Two things make task vectors destroy each other when
they are added: entries that do not matter, and entries whose signs disagree. So

1. *trim*: of each task vector keep the entries of largest magnitude (20 %), set the rest to 0;
2. *elect*: per entry, :math:`\gamma = \mathrm{sgn}(\sum_k \hat\tau_k)`, the sign with the larger total;
3. *disjoint mean*: per entry, average those trimmed entries whose sign is :math:`\gamma`,

and :math:`\theta = \theta_0 + \lambda\,\tau_m`. This is the paper's form: the trimming threshold is taken
over the whole task vector, and where the sum is exactly zero the entry takes the sign of the majority of
all elected signs, as in the released code. What others call TIES differs in two ways, which are named
arguments here: merging tools often trim each tensor by itself (``granularity="layer"``), and AdaMerging's
release adds the agreeing entries up instead of averaging them (``combine="sum"``, with a scale near 0.3).
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import finite, number
from mergekit_lite.geometry import vectors_of
from mergekit_lite.registry import Need, method
from mergekit_lite.selection import kth_smallest, magnitudes
from mergekit_lite.task_vectors import TaskVectors


@method(
    name="TIES-Merging",
    paper="Yadav et al., TIES-Merging: resolving interference when merging models, NeurIPS",
    arxiv="2306.01708",
    year=2023,
    need=Need.WEIGHTS,
)
def ties(
    tv: TaskVectors, *, density: float = 0.2, scale: float = 1.0, granularity: str = "whole", combine: str = "mean"
) -> StateDict:
    r"""Trim each task vector, elect a sign per entry, average the entries that agree with it.

    Args:
        tv: K task vectors.
        density: the share of entries kept in each task vector, in (0, 1].
        scale: :math:`\lambda`; the paper tries 0.8 to 2.5 where it has validation data.
        granularity: ``"whole"`` trims each task vector as one, ``"layer"`` each tensor by itself.
        combine: ``"mean"`` of the agreeing entries, or their ``"sum"``.

    Returns:
        The merged state dict.

    Raises:
        ValueError: density outside (0, 1], a scale that is not finite, another granularity or combination; models
            without any weights.
        TypeError: what should be a number is none.
    """
    return elect_and_merge(trim(tv, density, granularity), scale=scale, combine=combine)


def trim(tv: TaskVectors, density: float, granularity: str = "whole") -> TaskVectors:
    """Keep the share `density` of entries of largest magnitude in each task vector; the others become 0.

    Args:
        tv: K task vectors.
        density: in (0, 1]. Entries as large as the smallest one kept stay, too.
        granularity: ``"whole"`` or ``"layer"``: the share of what.

    Returns:
        K task vectors to merge by any method; nothing is trimmed before they are read.

    Raises:
        ValueError: density outside (0, 1], another granularity, or no weights to take a share of.
    """
    if not 0 < number("density", density) <= 1:
        raise ValueError(f"density is the share of entries to keep, in (0, 1]; got {density}.")
    if granularity == "layer":
        return tv.transform(lambda name, taus: keep_from(taus, _smallest_kept(vectors_of(taus).abs(), density)))
    if granularity != "whole":
        raise ValueError(f"granularity must be 'whole' or 'layer', got '{granularity}'.")
    d = tv.dimension
    if d == 0:
        raise ValueError("these models have no floating-point weights, so there is nothing to trim.")
    smallest = kth_smallest(magnitudes(tv), [d - kept(d, density) + 1])[0]
    return tv.transform_pieces(lambda place, taus: keep_from(taus, smallest))


def elect(taus: Tensor) -> Tensor:
    """The sign of each entry's sum over the K task vectors (K, n): (n,), 0 where the votes cancel."""
    return taus.sum(0).sign_()


def election(tv: TaskVectors) -> Callable[[Tensor], Tensor]:
    """The election as a function of any piece (K, n) of the task vectors; the majority decides where votes cancel."""

    @cache
    def majority() -> float:  # takes a pass over the whole model, so it is asked for only where votes cancel
        return float(torch.stack([elect(taus).sum() for _, taus in tv.pieces()]).sum().sign())

    def signs(taus: Tensor) -> Tensor:
        elected = elect(taus)
        cancelled = (elected == 0) & (taus.abs().amax(0) > 0)
        if cancelled.any():
            elected[cancelled] = majority()
        return elected

    return signs


def disjoint_merge(taus: Tensor, signs: Tensor, combine: str = "mean") -> Tensor:
    """Sum or average, per entry of (K, n), what is not zero and has the elected sign."""
    agreeing = (taus * signs).clamp_(min=0)  # how far each goes in the elected direction
    total = agreeing.sum(0) * signs
    return total if combine == "sum" else total / agreeing.sign_().sum(0).clamp_(min=1)


def elect_and_merge(tv: TaskVectors, *, scale: float, combine: str = "mean") -> StateDict:
    r"""Steps 2 and 3 of TIES for task vectors that are sparse already: :math:`\theta_0 + \lambda\,\tau_m`.

    Raises:
        ValueError: `combine` is neither ``"mean"`` nor ``"sum"``, or the scale is not finite.
    """
    finite("scale", scale)
    if combine not in ("mean", "sum"):
        raise ValueError(f"combine must be 'mean' or 'sum', got '{combine}'.")

    signs = election(tv)
    return tv.map_pieces(lambda place, taus: scale * disjoint_merge(taus, signs(taus), combine))


def keep_from(taus: Tensor, smallest: Tensor) -> Tensor:
    """Set entries of (K, *shape) to 0 whose magnitude is below the K given ones."""
    # hardshrink sets |x| <= bound to 0 and is ten times faster than a mask; just below the smallest entry to keep
    # lies the bound that spares it.
    bounds = torch.nextafter(smallest, torch.full_like(smallest, -1)).tolist()
    return torch.stack([torch.hardshrink(tau, bound) for tau, bound in zip(taus, bounds, strict=True)])


def kept(n: int, density: float) -> int:
    """How many of n entries a density keeps; at least one."""
    return max(1, round(density * n))


def _smallest_kept(rows: Tensor, density: float) -> Tensor:
    n = rows.shape[1]
    return rows.kthvalue(n - kept(n, density) + 1, dim=1).values if n else rows.new_zeros(len(rows))
