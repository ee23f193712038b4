r"""The Karcher mean: the middle of several directions on the sphere, SLERP for more than two models.

Buss and Fillmore, "Spherical averages and applications to spherical splines and interpolation", ACM Transactions on
Graphics 20, 2001; the general notion is Karcher's ("Riemannian center of mass and mollifier smoothing", 1977). The
mean of points in space is the point of least squared distance to them. On the unit sphere, where the distance of
:math:`u_k` and m is their angle :math:`\Omega_k = \arccos \langle u_k, m \rangle`, the mean is

.. math:: m = \arg\min_{\|m\| = 1} \sum_k w_k\, \Omega_k^2 .

Downhill is the weighted mean of the arcs from m to the points, each laid out in the tangent plane at m:

.. math:: v = \sum_k w_k \log_m u_k, \qquad \log_m u = \frac{\Omega}{\sin\Omega}\,(u - \cos\Omega\; m) ,

and one goes the arc v along the sphere, :math:`m \leftarrow \cos\|v\|\; m + \sin\|v\|\; v / \|v\|`, until v is zero.

The points here are the directions of the task vectors, :math:`u_k = \tau_k / \|\tau_k\|`, and the merge gives the
mean direction the (weighted) mean length: :math:`\theta = \theta_0 + \lambda\, (\sum_k w_k \|\tau_k\|)\, m`. Since m
and v are combinations of the :math:`u_k`, all steps run in K coefficients, with the matrix C of cosines for inner
products; the weights are read twice, however many steps it takes.

**Two experts.** m is the point of the arc at :math:`t = w_2`. For task vectors of one length this is SLERP. For
different lengths it is not: `slerp` weights the task vectors, so that the longer one pulls more, and its length at
the middle is not the mean. **K orthogonal experts** of one length and one weight: :math:`m = \sum_k u_k / \sqrt K`, so
the merge is task arithmetic with the scale :math:`1/\sqrt K` (0.35 for eight tasks), where averaging has 1/K.

**Where it is not defined.** Opposite points have many means, as do the corners of a regular triangle around the
centre. There is one mean, and the descent finds it, if all points lie in an open hemisphere; linearly independent
vectors always do.

**mergekit** does this tensor by tensor and on whole weights, where there is no base: ``karcher(TaskVectors(zeros,
experts), granularity="layer")``, with zeros for a base, is the same in exact arithmetic. It stops after at most 10
steps and does not say whether it arrived. Weights of fine-tuned models are nearly parallel, so that there the mean is
nearly the average.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import count, finite, numbers, positive
from mergekit_lite.geometry import SMALLEST_ANGLE, angle_of_rounding, normalise, vectors_of
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors, inner_products

CORRECTIONS = 10_000  # of the perceptron: enough for points that are 0.6 degrees inside a hemisphere
RESOLUTION = 1e-7  # shorter sums of unit vectors are zero: their squares are 1e-14, near the rounding of cosines


@method(
    name="Karcher mean",
    paper="Buss and Fillmore, Spherical averages, ACM Transactions on Graphics",
    year=2001,
    need=Need.WEIGHTS,
)
def karcher(
    tv: TaskVectors,
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    granularity: str = "whole",
    iterations: int = 1000,
    tolerance: float = 1e-7,
) -> StateDict:
    r"""The spherical mean of the task vectors' directions, as long as they are on average.

    Args:
        tv: K task vectors. Zero ones have no direction; they count in the mean length only.
        weights: K non-negative numbers; they are divided by their sum. By default all equal.
        scale: :math:`\lambda`.
        granularity: ``"whole"`` takes a whole task vector for a point; ``"layer"`` has a mean for every tensor.
        iterations: at most so many steps.
        tolerance: the mean is found when the next step would be at most so long (an angle in radians). In double
            precision cosines tell no smaller one than 1e-8.

    Returns:
        The merged state dict.

    Raises:
        ValueError: another granularity, not K weights, a negative or non-finite number, weights that are all zero;
            directions that do not lie in an open hemisphere, or by less than the weights' precision tells
            (`angle_of_rounding`), as opposite ones; a mean that was not found in so many steps.
        TypeError: what should be a number is none.
    """
    if granularity not in ("whole", "layer"):
        raise ValueError(f"granularity must be whole or layer; got '{granularity}'.")
    w = numbers("weights", [1.0] * len(tv) if weights is None else weights)
    if w.shape != (len(tv),) or not torch.isfinite(w).all() or (w < 0).any() or w.sum() == 0:
        raise ValueError(f"expected {len(tv)} weights, finite, not negative and not all zero; got {weights}.")
    finite("scale", scale)
    positive("tolerance", tolerance)
    count("iterations", iterations)
    w = w / w.sum()

    def merge(gram: Tensor, where: str, name: str | None = None) -> Tensor:
        """The coefficients of the task vectors in the merge."""
        gram, coefficients = gram.cpu(), torch.zeros_like(w)
        lengths = gram.diagonal().clamp(min=0).sqrt()
        points = (lengths > 0) & (w > 0)
        if points.any():
            cosines = normalise(gram)[points][:, points]
            margin = angle_of_rounding(tv, name) if (cosines < 0).any() else SMALLEST_ANGLE
            if not in_a_hemisphere(cosines, w[points], margin):
                raise ValueError(
                    f"{where} do not lie in an open hemisphere, so they have no spherical mean: some are opposite, or "
                    "all cancel each other, as far as the weights' precision tells."
                )
            mean = spherical_mean(cosines, w[points] / w[points].sum(), iterations, tolerance)
            coefficients[points] = scale * (w @ lengths) * mean / lengths[points]
        return coefficients

    if granularity == "whole":
        coefficients = merge(tv.gram(), "the task vectors")
        return tv.map_pieces(lambda place, taus: coefficients.to(taus) @ taus, shares=w)

    def merge_layer(name: str, taus: Tensor) -> Tensor:
        coefficients = merge(inner_products(vectors_of(taus)), f"the task vectors of '{name}'", name)
        return torch.tensordot(coefficients.to(taus), taus, dims=1)

    return tv.map(merge_layer, shares=w)


def spherical_mean(cosines: Tensor, weights: Tensor, iterations: int = 1000, tolerance: float = 1e-7) -> Tensor:
    """The coefficients a of the mean m = Σ a_k u_k of unit vectors with these inner products (K, K).

    Raises:
        ValueError: the mean was not found in so many steps.
    """

    def length(c: Tensor) -> Tensor:
        return (c @ cosines @ c).clamp(min=0).sqrt()

    a = weights / length(weights)  # start at the mean of the chords
    for _ in range(iterations):
        cosine = (cosines @ a).clamp(-1, 1)  # of u_k and m
        omega = cosine.arccos()
        pull = weights * torch.where(omega > 0, omega / omega.sin(), 1.0)
        v = pull - (pull @ cosine) * a  # Σ w_k log_m u_k
        arc = length(v)
        if arc <= tolerance:
            return a
        a = arc.cos() * a + arc.sin() / arc * v
        a = a / length(a)  # against rounding
    raise ValueError(f"no mean in {iterations} steps: the last one was {arc:.1e} long. Allow more steps.")


def in_a_hemisphere(cosines: Tensor, start: Tensor, margin: float = SMALLEST_ANGLE) -> bool:
    """Whether unit vectors with these inner products all lie on one side of some plane through the origin.

    The perceptron searches for the plane's normal Σ a_k u_k: as long as a point is on the wrong side, add it.

    Args:
        cosines: (K, K), in float64.
        start: the first coefficients a, (K,), not negative.
        margin: the angle, in radians, by which all of them must be farther from the plane.
    """
    a = start.clone()
    for _ in range(CORRECTIONS):
        side = cosines @ a
        length = (a @ side).clamp(min=0).sqrt()
        if length > RESOLUTION * a.sum() and (side > margin * length).all():
            return True
        a[side.argmin()] += 1
    return False
