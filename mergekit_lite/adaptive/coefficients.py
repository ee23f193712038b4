r"""Coefficients for every task and every tensor of a network, and the merge that they make.

.. math:: \theta^l = \theta_0^l + \sum_k \lambda_k^l\, \tau_k^l \qquad\text{for every tensor } l .
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_lite.adaptive.history import History
from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import numbers
from mergekit_lite.task_vectors import TaskVectors

if TYPE_CHECKING:
    import pandas as pd

GRANULARITIES = ("layer", "task")
Init = float | Sequence[float] | Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Coefficients(Mapping[str, Tensor]):
    r"""A mapping from tensor names to :math:`\lambda^l`, shape (K,), and how it was found.

    Attributes:
        by_name: the coefficients as they multiply the task vectors; the same for all names, if they are task-wise.
        tasks: the names of the K task vectors.
        history: of the adaptation.
    """

    by_name: Mapping[str, Tensor]
    tasks: Sequence[str]
    history: History = field(default_factory=History)

    def __getitem__(self, name: str) -> Tensor:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def means(self) -> dict[str, float]:
        """The mean over all tensors, by task."""
        return dict(zip(self.tasks, torch.stack(list(self.values())).mean(0).tolist(), strict=True))

    def to_frame(self) -> pd.DataFrame:
        """A row per tensor, a column per task."""
        import pandas as pd

        return pd.DataFrame({name: row.tolist() for name, row in self.items()}, index=list(self.tasks)).T

    def __repr__(self) -> str:
        means = ", ".join(f"{task} {mean:.3f}" for task, mean in self.means().items())
        return f"Coefficients({len(self)} tensors, on average {means}; {self.history})"


def merge_with(tv: TaskVectors, coefficients: Mapping[str, Tensor]) -> StateDict:
    r"""Task arithmetic with a scale for every task and tensor: :math:`\theta_0^l + \sum_k \lambda_k^l \tau_k^l`.

    Args:
        tv: K task vectors.
        coefficients: by tensor name, shape (K,).

    Returns:
        The merged state dict.

    Raises:
        KeyError: a tensor has no coefficients.
        ValueError: not K of them.
    """

    def merge(name: str, taus: Tensor) -> Tensor:
        if name not in coefficients:
            raise KeyError(f"there are no coefficients for the tensor '{name}'.")
        if coefficients[name].shape != (len(taus),):
            raise ValueError(f"'{name}' needs {len(taus)} coefficients; got shape {tuple(coefficients[name].shape)}.")
        return weighted_sum(coefficients[name], taus)

    return tv.map(merge)


def weighted_sum(coefficients: Tensor, taus: Tensor) -> Tensor:
    r""":math:`\sum_k \lambda_k \tau_k` of one tensor, from (K,) and (K, *shape)."""
    return torch.tensordot(coefficients.to(taus), taus, dims=1)


def starting(init: Init, names: Sequence[str], tasks: int, granularity: str, clamp: bool = False) -> Tensor:
    """The coefficients before the first step, in float64 on the CPU: (K,), or (tensors, K) for layers.

    Args:
        init: one number, K numbers, or for layers also (tensors, K) numbers or K by tensor name.
        names: of the tensors.
        tasks: K.
        granularity: ``"layer"`` or ``"task"``.
        clamp: whether they will be kept in [0, 1].

    Raises:
        KeyError: `init` lacks a tensor.
        ValueError: another granularity, another shape, a number that is not finite, or one that the clamp would hold.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}; got '{granularity}'.")
    shape = (len(names), tasks) if granularity == "layer" else (tasks,)
    if isinstance(init, Mapping):
        missing = [name for name in names if name not in init]
        if missing:
            raise KeyError(f"init has no coefficients for the tensor '{missing[0]}'.")
        init = torch.stack([init[name] for name in names])
    start = numbers("init", init).detach()
    if start.shape not in ((), (tasks,), shape):
        raise ValueError(f"init is one number, {tasks} (one per task) or of shape {shape}; got {tuple(start.shape)}.")
    if not torch.isfinite(start).all():
        raise ValueError("init must be finite.")
    if clamp and not ((start >= 0) & (start <= 1)).all():
        raise ValueError("coefficients that start outside [0, 1] would be clamped and never move; use clamp=False.")
    return start.expand(shape).clone()
