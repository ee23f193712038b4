r"""PCB-Merging: parameters compete within a task and balance between tasks.

Du et al., "Parameter competition balancing for model merging", NeurIPS 2024 (arXiv:2410.02396),
section 3. Each entry of each task vector gets a score from two comparisons: with the other entries
of its own task (intra-balancing) and with the same entry of the other tasks (inter-balancing),

.. math::
   \beta_\text{intra} = \exp\big(K \cdot N(|\tau_i|)^2\big), \qquad
   \beta_\text{inter} = \tanh\big(\tau_i \odot \textstyle\sum_j \tau_j\big), \qquad
   \beta_i = \beta_\text{intra} \odot \beta_\text{inter}

where N maps a vector's range to [0, 1]. Only the share r of largest scores survives (drop), and
the merged task vector is the score-weighted mean of the task vectors (rescale),

.. math:: \theta = \theta_0 + \lambda \, \frac{\sum_i \hat\beta_i \odot \tau_i}{\sum_i \hat\beta_i} .

As in the first of the authors' releases, magnitudes are clipped to their quantiles
[q, 1 - q] and survivors keep their rescaled score rather than a hard 0/1 mask. Four releases exist
that are not the same method; this is the form of the paper. Every quantile is an exact entry of the
whole task vector (`mergekit_lite.selection`), found without holding it in memory.
"""

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import finite, number
from mergekit_lite.registry import Need, method
from mergekit_lite.selection import kth_smallest, magnitudes, rank_of
from mergekit_lite.task_vectors import Place, TaskVectors


@method(
    name="PCB-Merging",
    paper="Du et al., Parameter competition balancing for model merging, NeurIPS",
    arxiv="2410.02396",
    year=2024,
    need=Need.WEIGHTS,
)
def pcb(tv: TaskVectors, *, density: float = 0.1, scale: float = 1.0, clip: float = 1e-4) -> StateDict:
    r"""Weight each entry by how much it matters to its task and how well it fits the other tasks.

    Args:
        tv: K task vectors.
        density: r, the share of entries whose score survives, in (0, 1].
        scale: :math:`\lambda`.
        clip: q; magnitudes are clipped to their quantiles q and 1 - q, in [0, 0.5).

    Returns:
        The merged state dict.

    Raises:
        ValueError: a hyperparameter outside its range, or models without any weights.
        TypeError: what should be a number is none.
    """
    if not 0 < number("density", density) <= 1:
        raise ValueError(f"density is the share of entries to keep, in (0, 1]; got {density}.")
    if not 0 <= number("clip", clip) < 0.5:
        raise ValueError(f"clip is a quantile in [0, 0.5), got {clip}.")
    finite("scale", scale)
    d = tv.dimension
    if d == 0:
        raise ValueError("these models have no floating-point weights, so there are no scores to rank.")
    ranks = [rank_of(clip, d), rank_of(1 - clip, d)]
    sizes = kth_smallest(magnitudes(tv), ranks).unsqueeze(-1)  # smallest and largest: (2, K, 1)

    def clipped(taus: Tensor) -> Tensor:
        return taus.abs().clamp_(*sizes.to(taus))

    def score(place: Place, taus: Tensor) -> Tensor:
        return balance(taus, unit_range(clipped(taus), *sizes.to(taus)))

    cuts = kth_smallest(tv.transform_pieces(score), [rank_of(1 - density, d), d]).unsqueeze(-1)

    def merge(place: Place, taus: Tensor) -> Tensor:
        cut, top = cuts.to(taus)
        scores = unit_range(score(place, taus).clamp_(min=cut), cut, top)  # what is below the cut scores 0
        weighted = (scores * taus.sign() * clipped(taus)).sum(0)
        return scale * weighted / scores.sum(0).clamp_(min=1e-12)

    return tv.map_pieces(merge)


def balance(taus: Tensor, sizes: Tensor) -> Tensor:
    """Intra- times inter-balancing of K task vectors (K, n), whose magnitudes, mapped to [0, 1], are `sizes`."""
    intra = torch.exp(len(taus) * sizes**2)
    inter = torch.tanh(taus * taus.sum(0))
    return intra * inter


def unit_range(rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map the range from low to high (K, 1) to [0, 1]; a constant row (a zero task vector) to 0 instead of NaN."""
    return (rows - low) / torch.where(high > low, high - low, 1.0)
