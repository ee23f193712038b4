r"""Between two models: along the straight line, and along the arc.

For two experts (or a base and one expert) and a position :math:`t \in [0, 1]`:

.. math::
   \text{linear:}\quad & \theta = \theta_0 + (1-t)\,\tau_1 + t\,\tau_2 \\
   \text{spherical:}\quad & \theta = \theta_0 + \frac{\sin((1-t)\Omega)}{\sin\Omega}\,\tau_1
                                     + \frac{\sin(t\,\Omega)}{\sin\Omega}\,\tau_2 ,
   \qquad \cos\Omega = \frac{\langle\tau_1, \tau_2\rangle}{\|\tau_1\|\,\|\tau_2\|}

The line is how linear mode connectivity is tested (Frankle et al., ICML 2020, arXiv:1912.05671).
The arc is Shoemake's SLERP ("Animating rotation with quaternion curves", SIGGRAPH 1985). Halfway
between two orthogonal vectors of length r the line has length :math:`r/\sqrt2` and the arc r: SLERP
does not shrink what it merges. Merging tools often apply SLERP to whole weights, tensor by
tensor; here the angle is that between the *task vectors*, one angle for the whole model, since the
weights of two fine-tuned models are nearly parallel and their arc is nearly the line.
"""

import torch

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import finite
from mergekit_lite.geometry import SMALLEST_ANGLE, angle_of_rounding
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors


@method(
    name="Linear interpolation",
    paper="Frankle et al., Linear mode connectivity and the lottery ticket hypothesis, ICML",
    arxiv="1912.05671",
    year=2020,
    need=Need.WEIGHTS,
)
def linear_interpolation(tv: TaskVectors, *, t: float = 0.5) -> StateDict:
    r"""A point on the straight line between two experts, or between the base and one.

    Args:
        tv: two task vectors; or one, and the line starts at the base.
        t: the position: 0 is the first model, 1 the second. Values outside [0, 1] extrapolate.

    Returns:
        The state dict at that point.

    Raises:
        ValueError: more than two task vectors, or t is not finite.
    """
    _check(tv, t)
    weights = torch.tensor([t] if len(tv) == 1 else [1 - t, t], dtype=torch.float64)
    # Of one task vector the line starts at the base, which then has its share in running statistics, too.
    return tv.map_pieces(lambda place, taus: weights.to(taus) @ taus, shares=[1 - t, t])


@method(
    name="SLERP",
    paper="Shoemake, Animating rotation with quaternion curves, SIGGRAPH",
    year=1985,
    need=Need.WEIGHTS,
)
def slerp(tv: TaskVectors, *, t: float = 0.5) -> StateDict:
    r"""A point on the arc between two task vectors (see the formula at the top of this file).

    Args:
        tv: exactly two task vectors.
        t: the position: 0 is the first expert, 1 the second.

    Returns:
        The state dict at that point. Parallel task vectors are interpolated linearly, where the
        formula divides zero by zero.

    Raises:
        ValueError: not two task vectors, one of them zero, or the two opposite to each other, as far as
            the weights' precision tells (`angle_of_rounding`): then every great circle joins them and
            the arc is not defined; t is not finite.
    """
    if len(tv) != 2:
        raise ValueError(f"SLERP joins exactly two models, got {len(tv)}; choose two with tv.subset([...]).")
    _check(tv, t)
    gram = tv.gram()
    lengths = gram.diagonal().sqrt()
    if (lengths == 0).any():
        raise ValueError("a task vector is zero, so it has no direction to turn from; use linear_interpolation.")
    omega = torch.arccos((gram[0, 1] / lengths.prod()).clamp(-1, 1))
    if torch.pi - omega < angle_of_rounding(tv):
        raise ValueError("the two task vectors are opposite, so no single arc joins them; use linear_interpolation.")
    if omega < SMALLEST_ANGLE:
        return linear_interpolation(tv, t=t)
    weights = torch.stack([((1 - t) * omega).sin(), (t * omega).sin()]) / omega.sin()
    return tv.map_pieces(lambda place, taus: weights.to(taus) @ taus, shares=[1 - t, t])


def _check(tv: TaskVectors, t: float) -> None:
    if len(tv) > 2:
        raise ValueError(f"a line joins two models, got {len(tv)}; choose two with tv.subset([...]).")
    finite("t", t)
