r"""Model Stock: how far from the base to the mean, told by the angle between the task vectors.

Jang et al., "Model Stock: all we need is just a few fine-tuned models", ECCV 2024 (arXiv:2403.19522). Models that are
fine-tuned on *one* task with different random seeds lie, layer by layer, on a thin shell around a centre
:math:`\theta_0 + \mu`, and models nearer to the centre are better. The mean of many comes close to it. What is the
best that can be made of K and the base? The paper's picture: all task vectors of a layer have one length :math:`\ell`
and all pairs one angle :math:`\phi`, and each is :math:`\mu` plus a deviation that is orthogonal to :math:`\mu` and to
the other deviations. Hence

.. math:: \langle \tau_i, \tau_j \rangle = \|\mu\|^2 = \ell^2 \cos\phi \quad (i \ne j), \qquad
          \langle \tau_i, \mu \rangle = \|\mu\|^2 .

The foot of the perpendicular from the centre on the plane through the base and all experts is, by symmetry, on the
line from the base to their mean :math:`\bar\tau`, at :math:`t \bar\tau` with
:math:`t = \langle \mu, \bar\tau \rangle / \|\bar\tau\|^2`. As
:math:`\|\bar\tau\|^2 = \ell^2 (1 + (K - 1) \cos\phi) / K`, this is the paper's ratio (equation 3):

.. math:: \theta = (1 - t)\, \theta_0 + t\, \frac1K \sum_k \theta_k, \qquad
          t = \frac{K \cos\phi}{1 + (K - 1) \cos\phi} .

Parallel task vectors (:math:`\cos\phi = 1`) give the mean, orthogonal ones the base. For more than two models
:math:`\cos\phi` is the mean of the pairs' *cosines*, as the authors have said and mergekit does (another library
averages the angles). **For different tasks this is a cautious choice:** their task vectors are nearly orthogonal, so
they are taken for noise around the base.

**Where the picture breaks.** The mean cosine of K vectors is at least -1/(K - 1). Between that and 0 the formula
gives t < 0, away from all experts, without a bound; no centre has a negative squared length. The paper does not say
what to do then; here t is 0 (`clip`), where mergekit uses the formula as it stands.

The paper's unit is the layer. mergekit takes each tensor, biases too, for a layer, as ``"layer"`` does here; its
option ``filter_wise`` takes every line along the *last* axis for one, where ``"row"`` here is everything that one
output unit reads (the same for matrices, but not for convolutions).
"""

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import flag
from mergekit_lite.geometry import grams, normalise, rows_of
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import Place, TaskVectors


@method(
    name="Model Stock",
    paper="Jang et al., Model Stock: all we need is just a few fine-tuned models, ECCV",
    arxiv="2403.19522",
    year=2024,
    need=Need.WEIGHTS,
)
def model_stock(tv: TaskVectors, *, granularity: str = "layer", clip: bool = True) -> StateDict:
    r"""Go from the base towards the mean of the experts, the farther the smaller the angle between them.

    Args:
        tv: K task vectors. One alone has no angle; it is returned as it is.
        granularity: ``"layer"`` has an angle for every tensor, as the paper; ``"row"`` one for every row of every
            tensor; ``"whole"`` one for all.
        clip: put t to 0 where the mean cosine is negative. False is the bare formula.

    Returns:
        The merged state dict. A zero task vector counts as orthogonal to all others.

    Raises:
        ValueError: another granularity; or, without `clip`, task vectors that cancel each other, so that t is not
            defined.
        TypeError: `clip` is neither True nor False.
    """
    flag("clip", clip)
    ratios = {name: ratio(gram, clip) for name, gram in grams(tv, granularity).items()}

    def merge_rows(name: str, taus: Tensor) -> Tensor:
        t = ratios[name].to(taus).unsqueeze(1)  # (rows, 1)
        return (t * rows_of(taus).mean(0)).reshape(taus.shape[1:])

    def merge(place: Place, taus: Tensor) -> Tensor:
        t = ratios["whole" if granularity == "whole" else place.name]
        return t.to(taus) * taus.mean(0)

    return tv.map(merge_rows) if granularity == "row" else tv.map_pieces(merge)


def ratio(gram: Tensor, clip: bool = True) -> Tensor:
    """t, from Gram matrices (..., K, K) of K task vectors: shape (...)."""
    tasks = gram.shape[-1]
    if tasks == 1:
        return torch.ones_like(gram[..., 0, 0])
    cosine = (normalise(gram).sum((-2, -1)) - tasks) / (tasks * (tasks - 1))  # of all pairs, on average
    if clip:
        cosine = cosine.clamp(min=0)
    rest = 1 + (tasks - 1) * cosine
    if (rest < 1e-12).any():
        raise ValueError("task vectors cancel each other, so the ratio divides by zero; use clip=True.")
    return tasks * cosine / rest
