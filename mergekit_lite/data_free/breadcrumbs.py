r"""Model Breadcrumbs: drop the small entries, and the very largest ones too.

Davari & Belilovsky, "Model breadcrumbs: scaling multi-task model merging with sparse masks", ECCV 2024
(arXiv:2312.06795), section 3. Small entries of a task vector are noise; the few largest are outliers that
disturb the other tasks most. So in each layer a mask keeps what lies between two percentiles of magnitude,

.. math:: \theta = \theta_0 + \alpha \sum_k m_k^{\beta,\gamma} \odot \tau_k .

Here `outliers` is the share cut off at the top and `density` the share kept below it, which is how the
released code counts. The paper speaks of layers; the release ranks the entries of each row of a layer (of the last
axis) among themselves: ``granularity="row"``. Merging tools rank per layer and keep 90 % by default.
"""

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import finite, number
from mergekit_lite.data_free.task_arithmetic import task_arithmetic
from mergekit_lite.data_free.ties import kept
from mergekit_lite.geometry import vectors_of
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors


@method(
    name="Model Breadcrumbs",
    paper="Davari & Belilovsky, Model breadcrumbs, ECCV",
    arxiv="2312.06795",
    year=2024,
    need=Need.WEIGHTS,
)
def breadcrumbs(
    tv: TaskVectors,
    *,
    density: float = 0.15,
    outliers: float = 0.006,
    scale: float = 0.2,
    granularity: str = "layer",
) -> StateDict:
    r"""Add task vectors without their small entries and without their outliers.

    Args:
        tv: K task vectors.
        density: the share of entries kept, in (0, 1].
        outliers: the share of largest entries dropped, in [0, 1 - density].
        scale: :math:`\alpha`.
        granularity: ``"layer"`` takes the shares of each tensor, ``"row"`` of each line along its last axis.

    Returns:
        The merged state dict. The defaults are the released code's for CLIP.

    Raises:
        ValueError: shares that do not fit together, a scale that is not finite, another granularity.
        TypeError: what should be a number is none.
    """
    finite("scale", scale)
    return task_arithmetic(trim_tails(tv, density, outliers, granularity), scale=scale)


def trim_tails(tv: TaskVectors, density: float, outliers: float, granularity: str = "layer") -> TaskVectors:
    """Keep the share `density` of each tensor (or row) below its share `outliers` of largest entries.

    Raises:
        ValueError: as `breadcrumbs`.
    """
    density, outliers = number("density", density), number("outliers", outliers)
    if not 0 < density <= 1 or not outliers >= 0 or density + outliers > 1 + 1e-9:
        raise ValueError(
            "density (in (0, 1]) and outliers (at least 0) are shares of one whole, so their sum is at most 1; "
            f"got {density} and {outliers}."
        )
    if granularity not in ("layer", "row"):
        raise ValueError(f"granularity must be 'layer' or 'row', got '{granularity}'.")

    def mask(name: str, taus: Tensor) -> Tensor:
        lines = vectors_of(taus) if granularity == "layer" or taus.ndim == 1 else taus
        n = lines.shape[-1]
        top = int(outliers * n)
        ranked = lines.abs().topk(min(n, top + kept(n, density)), dim=-1).indices if n else lines.long()
        return torch.zeros_like(lines).scatter_(-1, ranked[..., top:], 1.0).mul_(lines).reshape(taus.shape)

    return tv.transform(mask)
