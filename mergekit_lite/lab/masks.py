r"""A learnt mask under the magnifying glass: how it is drawn, how far it goes, and which entries it favours.

For chapter 4.2. A mask has an entry :math:`m_i` for each weight; divided by its mean over the tensor it is
:math:`\hat m`, which is 1 everywhere as long as nothing is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.task_vectors import TaskVectors

SMALLEST = 64  # tensors with fewer entries have no tenths worth the name

Mask = Mapping[str, Tensor]


# ---------------------------------------------------------------- one entry


def drawn(x: float, temperature: float, u: Tensor) -> Tensor:
    r"""The Concrete entry that a uniform number u in (0, 1) makes: :math:`\sigma((x + \log u - \log(1 - u)) / T)`."""
    return torch.sigmoid((x + u.logit()) / temperature)


def slope_of_draw(m: Tensor, temperature: float) -> Tensor:
    r"""How a drawn entry moves with its logit: :math:`\partial m / \partial x = m (1 - m) / T`."""
    return m * (1 - m) / temperature


def density(m: Tensor, x: float, temperature: float) -> Tensor:
    """The density of the Concrete distribution at m in (0, 1)."""
    noise = temperature * m.logit() - x  # that makes this m
    return torch.sigmoid(noise) * torch.sigmoid(-noise) * temperature / (m * (1 - m))


def moments(x: float, temperature: float, points: int = 100_000) -> dict[str, float]:
    """Means over all draws of one entry, by the midpoint rule.

    Returns:
        ``kept``, the probability of m > 1/2; ``mean`` of m; ``slope``, the mean slope by the logit, and
        ``square``, the mean squared slope.
    """
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    m = drawn(x, temperature, u)
    slope = slope_of_draw(m, temperature)
    means = {"kept": (m > 0.5).double(), "mean": m, "slope": slope, "square": slope.square()}
    return {name: float(values.mean()) for name, values in means.items()}


# ---------------------------------------------------------------- whole masks


def hats(mask: Mask) -> dict[str, Tensor]:
    """Every tensor's mask divided by its mean."""
    return {name: m / m.mean() for name, m in mask.items()}


def rounded(mask: Mask) -> dict[str, Tensor]:
    """The mask of zeros and ones that keeps what is above 1/2; a tensor in which nothing is, is kept whole."""
    return {name: (m > 0.5).to(m) if (m > 0.5).any() else torch.ones_like(m) for name, m in mask.items()}


def stretched(mask: Mask, t: float) -> dict[str, Tensor]:
    r"""The mask :math:`1 + t\,(\hat m - 1)`: no mask at t = 0, this one at t = 1, and beyond."""
    return {name: 1 + t * (hat - 1) for name, hat in hats(mask).items()}


def shuffled(mask: Mask, seed: int = 0) -> dict[str, Tensor]:
    """The same numbers in each tensor, in random places."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _permuted(m, generator) for name, m in mask.items()}


def mean_by_rank(mask: Mask, by: Mask, parts: int = 10) -> list[float]:
    r"""The mean of :math:`\hat m` for entries of equal rank.

    Args:
        mask: by tensor name.
        by: what to rank the entries of each tensor by, such as magnitudes; of the mask's shapes.
        parts: how many groups of equal size are made in each tensor, from the lowest. Small tensors are left out.
    """
    total, count = torch.zeros(parts).double(), torch.zeros(parts).double()
    for name, hat in hats(mask).items():
        if hat.numel() >= SMALLEST:
            group = _ranks(by[name], parts)
            total.index_add_(0, group, hat.flatten().double())
            count += group.bincount(minlength=parts)
    means: list[float] = (total / count).tolist()
    return means


def mean_by_ranks(mask: Mask, rows: Mask, columns: Mask, parts: int = 5) -> Tensor:
    r"""The mean of :math:`\hat m` for entries of equal rank in two respects: (parts, parts), from the lowest."""
    both = {name: _ranks(rows[name], parts) * parts + _ranks(columns[name], parts) for name in mask}
    total, count = torch.zeros(parts**2).double(), torch.zeros(parts**2).double()
    for name, hat in hats(mask).items():
        if hat.numel() >= SMALLEST:
            total.index_add_(0, both[name], hat.flatten().double())
            count += both[name].bincount(minlength=parts**2)
    return (total / count).view(parts, parts)


def only_ranks(mask: Mask, by: Mask, parts: int = 20) -> dict[str, Tensor]:
    r"""What is left of a mask if entries of equal rank in a tensor share their mean; small tensors are left alone."""
    left = {}
    for name, hat in hats(mask).items():
        group = _ranks(by[name], parts)
        total = hat.new_zeros(parts).index_add_(0, group, hat.flatten())
        means = total / group.bincount(minlength=parts).clamp(min=1)
        left[name] = means[group].view_as(hat) if hat.numel() >= SMALLEST else torch.ones_like(hat)
    return left


def on_shuffled(tv: TaskVectors, scale: float, seed: int = 0) -> TaskVectors:
    r"""Task arithmetic's merge again, but a mask on it acts on entries that belong elsewhere.

    The sum of the task vectors, v, is shuffled within each tensor to w. One task vector w over the base
    :math:`\theta_0 + \lambda v - \lambda w` makes the same merge as before where the mask is 1. Any other mask
    stretches and shrinks w, which means nothing.

    Args:
        tv: K task vectors.
        scale: :math:`\lambda`.
        seed: of the shuffling.
    """
    generator = torch.Generator().manual_seed(seed)
    base, expert = StateDict(tv.base), StateDict(tv.base)
    for name, theta0, taus in tv.layers():
        v = taus.sum(0)
        w = _permuted(v, generator)
        base[name] = theta0 + scale * (v - w)
        expert[name] = base[name] + w
    return TaskVectors(base, {"shuffled": expert})


def _permuted(values: Tensor, generator: torch.Generator) -> Tensor:
    return values.flatten()[torch.randperm(values.numel(), generator=generator)].view_as(values)


def _ranks(values: Tensor, parts: int) -> Tensor:
    """The group of each entry, 0 to parts - 1, flat: equal shares of the entries, from the lowest."""
    rank = values.flatten().argsort().argsort()
    return rank * parts // max(1, values.numel())
