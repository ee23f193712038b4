r"""LiNeS: change the shallow layers less than the deep ones.

Wang et al., "LiNeS: post-training layer scaling prevents forgetting and enhances model merging", ICLR 2025
(arXiv:2410.17146). Shallow layers compute general features that all tasks share; what fine-tuning does to them helps
its own task little and disturbs the others. So scale the change of layer l of L linearly with its depth,

.. math:: \theta^{(l)} = \theta_0^{(l)} + \lambda^{(l)}\, \tau^{(l)}, \qquad
          \lambda^{(l)} = \alpha + \beta\, \frac{l - 1}{L - 1} ,

from `shallow` = α at the first block to `deep` = α + β at the last. It is a step after any other method:

- **one expert** (forget less of everything else): ``lines(tv[0], shallow=0.1, deep=1)``; the paper has α + β = 1;
- **the sum of all task vectors** (merge): ``lines(tv)``;
- **another merge**: ``lines(tv, merged=mkl.ties(tv), deep=1)``; or the task vectors themselves, before any method, with
  `scale_by_depth`.

For merges the paper sets α such that the shallow end is as large as in the average of the experts,

.. math:: \alpha = \frac{1}{K}\, \frac{\|\sum_k \tau_k\|}{\|\tau_{\mathrm{MTL}}\|} ,

with the 1-norm in the released code, so 1/K for the sum; β is chosen among 0.1, 0.2, ..., 1 on validation data and has
no default. Here `deep` is 0.3, so that without data the scale grows from averaging's to task arithmetic's usual one.

A layer is a numbered block, such as a transformer's. The released code finds the blocks by their number between dots
and gives what stands in none, before and after, the scale α. Here what comes after the last block, such as a head, is
as deep as that one (`mergekit_lite.data_free.depth` says how it is found); `depth` says it for any network.

**Not for every network.** In the small convolutional network of the package's own suite deep layers bear a smaller
scale than shallow ones: a scale that falls from 0.3 to 0.2 does no worse than a constant 0.2, and one that rises does.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import finite
from mergekit_lite.data_free.consensus import multi_task_vector
from mergekit_lite.data_free.depth import Depth, relative_depths
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors, TauFunction


@method(
    name="LiNeS",
    paper="Wang et al., LiNeS: post-training layer scaling prevents forgetting and enhances model merging, ICLR",
    arxiv="2410.17146",
    year=2025,
    need=Need.WEIGHTS,
)
def lines(
    tv: TaskVectors,
    *,
    shallow: float | None = None,
    deep: float = 0.3,
    depth: Depth | None = None,
    merged: Mapping[str, Tensor] | None = None,
) -> StateDict:
    r"""Add the task vectors with a scale that grows linearly with depth.

    Args:
        tv: K task vectors.
        shallow: :math:`\alpha`, the scale of the first block; by default the change there is as large as the average's.
        deep: :math:`\alpha + \beta`, the scale of the last block.
        depth: ``depth(name)``, a whole number for every tensor, the smallest at the shallow end; or a list of
            prefixes of names from the shallow end to the deep one. By default numbered blocks are looked for.
        merged: another merge of these experts, whose change of the base is scaled instead of their sum.

    Returns:
        The merged state dict.

    Raises:
        ValueError: a scale that is not finite, or names that tell no depth.
        KeyError: `merged` is not of this architecture.
    """
    added = multi_task_vector(tv, merged)
    if shallow is None:
        shallow = 1 / len(tv) if merged is None else average_scale(tv, added)
    scales = scales_by_depth(tv.base, shallow, deep, depth)
    return tv.map(lambda name, taus: scales[name] * added(name, taus))


def scale_by_depth(tv: TaskVectors, *, shallow: float, deep: float, depth: Depth | None = None) -> TaskVectors:
    """The task vectors themselves, scaled by depth, for any other method to merge.

    Args:
        tv: K task vectors.
        shallow: the scale of the first block.
        deep: the scale of the last one.
        depth: as for `lines`.

    Raises:
        ValueError: as for `lines`.
    """
    scales = scales_by_depth(tv.base, shallow, deep, depth)
    return tv.transform_pieces(lambda place, taus: taus.mul_(scales[place.name]))


def scales_by_depth(names: Iterable[str], shallow: float, deep: float, depth: Depth | None = None) -> dict[str, float]:
    """The scale of every tensor: λ by name."""
    finite("shallow", shallow)
    finite("deep", deep)
    return {name: shallow + (deep - shallow) * relative for name, relative in relative_depths(names, depth).items()}


def average_scale(tv: TaskVectors, added: TauFunction) -> float:
    """The scale at which a multi-task vector is as long, in the 1-norm, as the mean of the K task vectors."""
    total = change = 0.0
    for name, _, taus in tv.layers():
        total += taus.sum(0).abs().sum(dtype=torch.float64).item()
        change += added(name, taus).abs().sum(dtype=torch.float64).item()
    return total / change / len(tv) if change > 0 else 1 / len(tv)
