r"""AWD: subtract what all task vectors share, so that the rest is more orthogonal.

Xiong et al., "Multi-task model merging via adaptive weight disentanglement", 2024 (arXiv:2411.18729). One *redundant*
vector :math:`\delta` is taken from every task vector. It is found by gradient descent from :math:`\delta = 0` on

.. math::
   L(\delta) = \underbrace{\frac{1}{K (K - 1)} \sum_{i \ne j} \big|\cos(\tau_i - \delta,\, \tau_j - \delta)\big|}_{L_O}
               \;+\; \alpha \underbrace{\|\delta\|}_{L_R},

and the disentangled task vectors :math:`\tau_k - \delta` are merged by task arithmetic. The authors have released no
code; this is written from the paper's text.

**Why d numbers are really K.** Start at :math:`\delta = \sum_k c_k \tau_k`, for instance at zero. The gradient of L is
a combination of the vectors :math:`\tau_i - \delta` and of :math:`\delta`, so again of the task vectors: descent never
leaves their span. And L is made of inner products, which the Gram matrix G knows: with the unit vectors :math:`e_i`,

.. math::
   \langle \tau_i - \delta,\, \tau_j - \delta \rangle = (e_i - c)^\top G\, (e_j - c), \qquad
   \|\delta\|^2 = c^\top G\, c .

So the paper's descent, step for step, runs in the K coefficients c, and its cost does not depend on d once G is known.
Momentum and weight decay stay in the span, too; Adam, which scales every coordinate on its own, does not.

**What the merge then is.** As :math:`\sum_k (\tau_k - \delta) = \sum_k (1 - K c_k)\, \tau_k`, AWD followed by task
arithmetic is task arithmetic with the scales :math:`\lambda (1 - K c_k)`: scales per task that were found without data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.data_free.task_arithmetic import task_arithmetic
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors, float64

GRANULARITIES = ("whole", "layer", "row")


@dataclass(frozen=True)
class Disentangled:
    """What `disentangle` found.

    Attributes:
        task_vectors: the vectors τ_k − δ; they can be merged by any method.
        redundant: δ as a single task vector.
        coefficients: c by tensor name, shape (K,), or (rows, K) where every row has its own. With the granularity
            ``"whole"`` all tensors share one c.
        losses: L before the first step and after each, shape (iterations + 1,); the mean over all problems where
            there are several (layers, rows).
    """

    task_vectors: TaskVectors
    redundant: TaskVectors
    coefficients: Mapping[str, Tensor]
    losses: Tensor


@method(
    name="AWD",
    paper="Xiong et al., Multi-task model merging via adaptive weight disentanglement",
    arxiv="2411.18729",
    year=2024,
    need=Need.WEIGHTS,
)
def awd(
    tv: TaskVectors, *, scale: float = 0.3, alpha: float = 0.1, granularity: str = "whole", **descent: Any
) -> StateDict:
    r"""Add the task vectors without their redundant part: :math:`\theta_0 + \lambda \sum_k (\tau_k - \delta)`.

    Args:
        tv: K task vectors.
        scale: :math:`\lambda`.
        alpha: the weight :math:`\alpha` of :math:`\delta`'s length.
        granularity: as for `disentangle`.
        **descent: further arguments of `disentangle`.

    Returns:
        The merged state dict.

    Raises:
        ValueError: as for `disentangle` and `task_arithmetic`.
    """
    found = disentangle(tv, alpha=alpha, granularity=granularity, **descent)
    return task_arithmetic(found.task_vectors, scale=scale)


def disentangle(
    tv: TaskVectors,
    *,
    alpha: float = 0.1,
    granularity: str = "whole",
    step: float = 0.01,
    iterations: int = 300,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    squared: bool = False,
) -> Disentangled:
    r"""Find the redundant vector by the paper's gradient descent, in K coefficients, and subtract it.

    Args:
        tv: K task vectors.
        alpha: the weight of :math:`\delta`'s length.
        granularity: ``"whole"`` has one objective for whole task vectors, as in the paper; ``"layer"`` one for every
            tensor; ``"row"`` one for every row of every tensor (an output unit's weights).
        step: of the descent; the paper's is 0.01.
        iterations: the paper's are 300.
        momentum: of the descent, as in `torch.optim.SGD`.
        weight_decay: of the descent, likewise.
        squared: take :math:`\|\delta\|^2` for :math:`\|\delta\|`.

    Raises:
        ValueError: another granularity, or a negative number.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}; got '{granularity}'.")
    numbers = {
        "alpha": alpha,
        "step": step,
        "iterations": iterations,
        "momentum": momentum,
        "weight_decay": weight_decay,
    }
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{name} must not be negative; got {number}.")

    grams = (
        {"all": tv.gram()} if granularity == "whole" else {n: _gram(taus, granularity) for n, _, taus in tv.layers()}
    )
    problems = {
        name: descend(
            gram,
            alpha=alpha,
            step=step,
            iterations=iterations,
            momentum=momentum,
            weight_decay=weight_decay,
            squared=squared,
        )
        for name, gram in grams.items()
    }
    found = {name: problems["all" if granularity == "whole" else name][0] for name, _, _ in tv.layers()}
    count = sum(losses[0].numel() for _, losses in problems.values())
    summed = [losses.reshape(len(losses), -1).sum(1) for _, losses in problems.values()]
    return Disentangled(
        tv.transform(lambda name, taus: taus - combine(found[name], taus)),
        tv.transform(lambda name, taus: combine(found[name], taus)[None], names=["redundant"]),
        found,
        torch.stack(summed).sum(0) / count,
    )


def combine(coefficients: Tensor, taus: Tensor) -> Tensor:
    """δ of one tensor, Σ c_k τ_k, from its coefficients (K,) or (rows, K) and its taus (K, *shape)."""
    c = coefficients.to(taus)
    if c.ndim == 1:
        return torch.tensordot(c, taus, dims=1)
    return torch.einsum("rk,krd->rd", c, rows_of(taus)).view(taus.shape[1:])


def rows_of(taus: Tensor) -> Tensor:
    """Task vectors (K, *shape) of a tensor as (K, rows, columns); what has fewer than two axes is one row."""
    return taus.flatten(2) if taus.ndim > 2 else taus.reshape(len(taus), 1, -1)


def _gram(taus: Tensor, granularity: str) -> Tensor:
    """The Gram matrix of one tensor (K, K), or of each of its rows (rows, K, K), in float64."""
    if granularity == "layer":
        flat = float64(taus.flatten(1))
        return flat @ flat.T
    rows = float64(rows_of(taus)).transpose(0, 1)
    return rows @ rows.transpose(1, 2)


# ---------------------------------------------------------------- the descent, in Gram space


def descend(
    gram: Tensor, *, alpha: float, step: float, iterations: int, momentum: float, weight_decay: float, squared: bool
) -> tuple[Tensor, Tensor]:
    """Gradient descent on L from δ = 0, for one Gram matrix (K, K) or many at once (..., K, K).

    Returns:
        The coefficients (..., K), and L before the first step and after each, shape (iterations + 1, ...).
    """
    c = gram.new_zeros(gram.shape[:-1])
    velocity = torch.zeros_like(c)
    losses = []
    for _ in range(iterations):
        loss, slope = loss_and_gradient(gram, c, alpha, squared)
        losses.append(loss)
        velocity = momentum * velocity + slope + weight_decay * c
        c = c - step * velocity
    losses.append(loss_and_gradient(gram, c, alpha, squared)[0])
    return c, torch.stack(losses)


def loss_and_gradient(gram: Tensor, c: Tensor, alpha: float, squared: bool = False) -> tuple[Tensor, Tensor]:
    r"""L at δ = Σ c_k τ_k, shape (...), and its gradient with respect to δ, :math:`\sum_k b_k \tau_k`, as b (..., K).

    With u_i = τ_i − δ of length n_i, the gradient of cos(u_i, u_j) by u_i is u_j / (n_i n_j) − cos · u_i / n_i².
    Summed over all pairs with the sign of the cosine, and with −1 for the inner derivative, this is a combination of
    the u_i with weights −2 w_i / (K (K − 1)); and Σ w_i u_i has the coefficients w − (Σ w) c.
    """
    pairs = max(1, gram.shape[-1] * (gram.shape[-1] - 1))
    cosines, inverse = _cosines(gram, c)
    signed = cosines.sign() * (inverse.unsqueeze(-1) * inverse.unsqueeze(-2))
    w = (signed - cosines.abs() * inverse.square().unsqueeze(-1)).sum(-1)
    overlap, slope = cosines.abs().sum((-2, -1)) / pairs, -2 / pairs * (w - w.sum(-1, keepdim=True) * c)
    square = torch.einsum("...i,...ij,...j->...", c, gram, c).clamp(min=0)  # ‖δ‖²
    if squared:
        return overlap + alpha * square, slope + 2 * alpha * c
    length = square.sqrt()
    unit = torch.where(length.unsqueeze(-1) > 0, c / length.unsqueeze(-1), 0.0)  # at δ = 0 the slope is taken as 0
    return overlap + alpha * length, slope + alpha * unit


def _cosines(gram: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines between all u_i = τ_i − δ, with zeros on the diagonal and for vectors of length zero; and 1 / lengths."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    residual = identity - c.unsqueeze(-2)  # row i is e_i − c
    inner = residual @ gram @ residual.transpose(-2, -1)
    lengths = inner.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    return inner * inverse.unsqueeze(-1) * inverse.unsqueeze(-2) * (1 - identity), inverse
