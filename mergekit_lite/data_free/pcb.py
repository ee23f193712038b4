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
that are not the same method; this is the form of the paper.
"""

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors


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
        ValueError: a hyperparameter outside its range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is the share of entries to keep, in (0, 1]; got {density}.")
    if not 0 <= clip < 0.5:
        raise ValueError(f"clip is a quantile in [0, 0.5), got {clip}.")
    if not torch.isfinite(torch.tensor(scale)):
        raise ValueError(f"scale must be finite, got {scale}.")
    taus = tv.flat()
    magnitudes = torch.clamp(taus.abs(), _quantile(taus.abs(), clip), _quantile(taus.abs(), 1 - clip))
    scores = survivors(balance(taus, magnitudes), density)
    merged = (scores * taus.sign() * magnitudes).sum(0) / scores.sum(0).clamp(min=1e-12)
    return tv.add(scale * merged)


def balance(taus: Tensor, magnitudes: Tensor) -> Tensor:
    """Intra- times inter-balancing, for the rows of (K, d)."""
    intra = torch.exp(len(taus) * unit_range(magnitudes) ** 2)
    inter = torch.tanh(taus * taus.sum(0))
    return intra * inter


def survivors(scores: Tensor, density: float) -> Tensor:
    """Cut each row's scores at their (1 - density) quantile and map what is left to [0, 1]."""
    return unit_range(torch.maximum(scores, _quantile(scores, 1 - density)))


def unit_range(rows: Tensor) -> Tensor:
    """Map each row's range to [0, 1]; a constant row (a zero task vector) to 0 instead of NaN."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return (rows - low) / torch.where(high > low, high - low, 1.0)


def _quantile(rows: Tensor, q: float) -> Tensor:
    """The q-quantile of each row, shape (K, 1); torch.quantile refuses rows of more than 16 M entries."""
    d = rows.shape[1]
    return rows.kthvalue(min(d, max(1, round(q * d))), dim=1, keepdim=True).values
