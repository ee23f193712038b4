r"""How AWD's redundant vector is found: the paper's descent, and the minimum itself.

The objective of `mergekit_lite.data_free.awd` for a vector :math:`\delta` and K task vectors is

.. math::
   L(\delta) = \underbrace{\frac{1}{K (K - 1)} \sum_{i \ne j} \big|\cos(\tau_i - \delta,\, \tau_j - \delta)\big|}_{L_O}
               \;+\; \alpha\, \|\delta\| .

It is made of inner products, so nobody needs d coordinates to compute it. Here a vector is given by its coordinates
in *some* basis, and the basis by its Gram matrix, the ``metric``. Three bases are of use:

=================  ==================================  ========================  ===================================
basis              points (the task vectors)           metric                    good for
=================  ==================================  ========================  ===================================
the weights        the K task vectors, n = d           none (orthonormal)        seeing that the others are right
the task vectors   the identity, n = K                 the Gram matrix G         descent from 0: it never leaves them
orthonormal        `coordinates` of G, n = K + 1       none                      the minimum over *all* vectors
=================  ==================================  ========================  ===================================

The last basis spans the task vectors and has one direction more. One is enough: for
:math:`\delta = \sum_k c_k \tau_k + r u` with a unit vector u at a right angle to the span, every inner product in L
depends on u not at all and on r alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# How far the kinks of L are rounded off, from the first look at a problem to the last.
SMOOTHING = (0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


class Value(NamedTuple):
    """The objective at some vectors δ, each field of shape (...); and its gradient as coordinates (..., n)."""

    loss: Tensor
    overlap: Tensor  # L_O, the mean |cosine|
    length: Tensor  # ‖δ‖
    gradient: Tensor


def objective(
    points: Tensor,
    metric: Tensor | None,
    delta: Tensor,
    *,
    alpha: float | Tensor,
    squared: bool = False,
    smoothing: float = 0.0,
) -> Value:
    r"""L and its gradient, for one problem or for many at once.

    With u_i = τ_i − δ of length n_i, the gradient of cos(u_i, u_j) by u_i is u_j / (n_i n_j) − cos · u_i / n_i².
    Summed over all pairs with the sign of the cosine, and with −1 for the inner derivative, this is a combination of
    the u_i with weights −2 w_i / (K (K − 1)); and Σ w_i u_i = Σ w_i τ_i − (Σ w) δ.

    Args:
        points: the task vectors, (..., K, n).
        metric: inner products of the basis, (..., n, n); None for an orthonormal one.
        delta: where, (..., n).
        alpha: the weight of ‖δ‖, one number or one per problem (...).
        squared: ‖δ‖² in the place of ‖δ‖.
        smoothing: μ > 0 rounds both kinks off, |x| to √(x² + μ²).

    A zero task vector has no part in L_O: its cosines are 0 for every δ, and have no gradient.
    """
    apart = points - delta.unsqueeze(-2)
    inner = apart @ (apart if metric is None else apart @ metric).transpose(-2, -1)
    lengths = inner.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    counts = (lengths > 0) & has_direction(points, metric)
    inverse = torch.where(counts, 1 / lengths, 0.0)  # a vector of length zero has cosine 0 with all others
    both = inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    tasks = points.shape[-2]
    cosines = inner * both * (1 - torch.eye(tasks, dtype=points.dtype, device=points.device))

    size = _absolute(cosines, smoothing)
    sign = cosines.sign() if smoothing == 0 else cosines / size
    pairs = max(1, tasks * (tasks - 1))
    overlap = (size.sum((-2, -1)) - smoothing * tasks) / pairs  # without the diagonal, whose size is μ
    w = (sign * both - sign * cosines * inverse.square().unsqueeze(-1)).sum(-1)
    weighted = (w.unsqueeze(-2) @ points).squeeze(-2)
    gradient = -2 / pairs * (weighted - w.sum(-1, keepdim=True) * delta)

    moved = delta if metric is None else (metric @ delta.unsqueeze(-1)).squeeze(-1)
    square = (delta * moved).sum(-1).clamp(min=0)
    alpha = torch.as_tensor(alpha, dtype=points.dtype).to(points.device)
    length = _absolute(square.sqrt(), smoothing)
    if squared:
        return Value(overlap + alpha * square, overlap, length, gradient + 2 * alpha.unsqueeze(-1) * delta)
    # At δ = 0, where the length has no gradient, it is taken as 0.
    unit = torch.where(length.unsqueeze(-1) > 0, delta / length.unsqueeze(-1), 0.0)
    return Value(overlap + alpha * length, overlap, length, gradient + alpha.unsqueeze(-1) * unit)


def has_direction(points: Tensor, metric: Tensor | None) -> Tensor:
    """Which task vectors are not zero: (..., K).

    A zero one, as of a layer that an expert has frozen, has no direction. Nor has it one when δ has been subtracted:
    −δ says nothing about its task, and the shorter δ, the steeper its cosines, up to 1 / 0.
    """
    if metric is None:
        return (points != 0).any(-1)
    return ((points @ metric) * points).sum(-1) > 0


def _absolute(x: Tensor, smoothing: float) -> Tensor:
    return x.abs() if smoothing == 0 else (x.square() + smoothing**2).sqrt()


# ---------------------------------------------------------------- the paper's descent


def descend(
    points: Tensor,
    metric: Tensor | None,
    *,
    alpha: float | Tensor,
    step: float | Tensor = 0.01,
    iterations: int = 300,
    momentum: float = 0.0,
    weight_decay: float | Tensor = 0.0,
    squared: bool = False,
) -> tuple[Tensor, list[Value]]:
    """Gradient descent on L from δ = 0, as `torch.optim.SGD` does it.

    Descent, momentum and weight decay only ever add multiples of gradients and of δ, and these are combinations of
    task vectors. So it makes no difference in which basis one descends: each step is the same vector.

    The arguments are those of `objective` and of `mergekit_lite.disentangle`; α, step and weight decay may be
    tensors (...), with a number for each problem.

    Returns:
        The coordinates (..., n) of δ, and the objective before the first step and after each; all but the last
        without its gradient.
    """
    delta = points.new_zeros((*points.shape[:-2], points.shape[-1]))
    velocity = torch.zeros_like(delta)
    step, weight_decay = (
        torch.as_tensor(number, dtype=points.dtype).to(points.device).unsqueeze(-1) for number in (step, weight_decay)
    )
    record: list[Value] = []
    for _ in range(iterations):
        value = objective(points, metric, delta, alpha=alpha, squared=squared)
        record.append(value._replace(gradient=points.new_empty(0)))  # as long as δ, and not needed any more
        velocity = momentum * velocity + value.gradient + weight_decay * delta
        delta = delta - step * velocity
    record.append(objective(points, metric, delta, alpha=alpha, squared=squared))
    return delta, record


# ---------------------------------------------------------------- the minimum


def coordinates(gram: Tensor) -> Tensor:
    """The task vectors in an orthonormal basis of their span and of one direction more: (..., K, K + 1).

    The last coordinate of each is zero, and so are all of a zero vector.
    """
    values, vectors = torch.linalg.eigh(gram)
    # Where task vectors depend on each other there are directions that none of them has; rounding must not make some.
    values = torch.where(values > 1e-13 * values[..., -1:], values, 0.0)
    inside = vectors * values.sqrt().unsqueeze(-2)
    inside = torch.where(gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) > 0, inside, 0.0)
    return torch.cat([inside, torch.zeros_like(inside[..., :1])], dim=-1)


def minimise(
    gram: Tensor, *, alpha: float | Tensor, squared: bool = False, room: bool | Tensor = True, starts: int = 6
) -> tuple[Tensor, Tensor, list[Value]]:
    r"""The lowest L over all vectors δ that descents from several starts find.

    L has kinks where a cosine is zero, and its minimum lies on some of them. So the kinks are rounded off, the
    rounded problem is solved, and its solution is the start for a sharper one, and so on.

    Args:
        gram: inner products of the task vectors, (..., K, K).
        alpha: the weight of ‖δ‖, one number or one per problem (...).
        squared: ‖δ‖² in the place of ‖δ‖.
        room: whether there is a direction outside the span of the task vectors; one answer, or one per problem (...).
        starts: how many; the first three are δ near 0, the mean task vector, and one outside the span.

    Returns:
        c (..., K) and r (...), for :math:`\delta = \sum_k c_k \tau_k + r u` with any unit vector u at a right angle
        to all task vectors; and the objective at δ = 0 and at this δ.
    """
    tasks = gram.shape[-1]
    unit = typical_length(gram)
    points = coordinates(gram / unit.square()[..., None, None])
    price = alpha * (unit.square() if squared else unit)
    flat, prices = points.reshape(-1, tasks, tasks + 1), price.reshape(-1)
    x = _starts(flat, starts, torch.as_tensor(room).expand(gram.shape[:-2]).reshape(-1))
    which = torch.arange(len(flat), device=gram.device).repeat_interleave(starts)
    for smoothing in SMOOTHING:

        def smooth(delta: Tensor, index: Tensor, smoothing: float = smoothing) -> tuple[Tensor, Tensor]:
            problem = which[index]
            value = objective(flat[problem], None, delta, alpha=prices[problem], squared=squared, smoothing=smoothing)
            return value.loss, value.gradient

        x = bfgs(smooth, x, iterations=40)

    # Inside the span, and δ = 0: two kinks that no descent hits exactly, so both take part in their own name.
    x = x.view(-1, starts, tasks + 1)
    inside = torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], dim=-1)
    x = torch.cat([inside, x, torch.zeros_like(x[:, :1])], dim=1)
    losses = objective(flat.unsqueeze(1), None, x, alpha=prices.unsqueeze(1), squared=squared).loss
    best = x[torch.arange(len(x)), losses.argmin(1)].view(*gram.shape[:-2], tasks + 1)
    record = [objective(points, None, at, alpha=price, squared=squared) for at in (torch.zeros_like(best), best)]
    # c solves cᵀ points = δ; where task vectors depend on each other, the shortest of many c.
    c = (best[..., None, :-1] @ torch.linalg.pinv(points[..., :-1], rtol=1e-7)).squeeze(-2)
    return c, best[..., -1].abs() * unit, [v._replace(length=v.length * unit) for v in record]


def typical_length(gram: Tensor) -> Tensor:
    """The root mean squared length of the task vectors, (...); 1 where all are zero."""
    length = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=0).sqrt()
    return torch.where(length > 0, length, 1.0)


def _starts(points: Tensor, starts: int, room: Tensor) -> Tensor:
    """Where to start each of B problems: (B * starts, n)."""
    generator = torch.Generator().manual_seed(0)
    problems, tasks, n = points.shape
    shares = torch.rand((starts, tasks), generator=generator, dtype=points.dtype).to(points) * 2 / tasks
    outside = torch.rand(starts, generator=generator, dtype=points.dtype).to(points)
    known = min(3, starts)
    shares[:known] = torch.tensor([0.01, 1.0, 0.1], dtype=points.dtype)[:known, None].to(points) / tasks
    outside[:known] = torch.tensor([0.01, 0.1, 0.7], dtype=points.dtype)[:known].to(points)
    x = shares @ points  # (B, starts, n)
    x[..., -1] = outside * room.to(points).unsqueeze(-1)
    return x.reshape(problems * starts, n)


def bfgs(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, iterations: int, tolerance: float = 1e-11
) -> Tensor:
    """Quasi-Newton descent on many small smooth problems at once; libraries solve one at a time.

    Args:
        function: ``function(x, which)`` gives the values (m,) and gradients (m, n) of the problems ``which`` (m,)
            at x (m, n).
        x: a start for each problem, (B, n).
        iterations: at most so many steps.
        tolerance: a problem is done when the next step promises less than this.

    Returns:
        Where each descent ended, (B, n).
    """
    ends = x.clone()
    which = torch.arange(len(x), device=x.device)  # the problems that are not done yet; all below is about these
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    inverse = identity.expand(len(x), -1, -1)  # of the Hessian, as far as it is known
    value, slope = function(x, which)
    for _ in range(iterations):
        direction = -(inverse @ slope.unsqueeze(-1)).squeeze(-1)
        promise = -(direction * slope).sum(-1)
        new_x, new_value, new_slope = x.clone(), value.clone(), slope.clone()
        step, waiting = 1.0, (promise > tolerance).nonzero().squeeze(-1)
        while len(waiting) > 0 and step > 1e-6:  # halve the step until it goes down
            trial = x[waiting] + step * direction[waiting]
            values, slopes = function(trial, which[waiting])
            good = values <= value[waiting] - 1e-4 * step * promise[waiting]
            done = waiting[good]
            new_x[done], new_value[done], new_slope[done] = trial[good], values[good], slopes[good]
            step, waiting = step / 2, waiting[~good]
        moved, turned = new_x - x, new_slope - slope
        ends[which] = new_x
        goes_on = moved.abs().sum(-1) > 0
        if not goes_on.any():
            break
        inverse = _update(inverse[goes_on], moved[goes_on], turned[goes_on], identity)
        which, x, value, slope = which[goes_on], new_x[goes_on], new_value[goes_on], new_slope[goes_on]
    return ends


def _update(inverse: Tensor, moved: Tensor, turned: Tensor, identity: Tensor) -> Tensor:
    """The BFGS formula: the inverse Hessian that explains how the gradient turned on the way, closest to the old."""
    curvature = (moved * turned).sum(-1)
    known = curvature > 1e-12 * moved.norm(dim=-1) * turned.norm(dim=-1)
    rho = torch.where(known, 1 / curvature, 0.0)[:, None, None]
    shear = identity - rho * moved.unsqueeze(-1) * turned.unsqueeze(-2)
    return shear @ inverse @ shear.transpose(-2, -1) + rho * moved.unsqueeze(-1) * moved.unsqueeze(-2)
