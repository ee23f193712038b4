r"""TALL-masks: which weights a task uses in the sum of all; and Consensus: drop the weights that one or none uses.

Wang et al., "Localizing task information for improved model merging and compression", ICML 2024 (arXiv:2405.07813).
After adding task vectors, :math:`\tau_{\mathrm{MTL}} = \sum_k \tau_k` (no scale), is task k still in there? The mask
of weights that brings :math:`m \odot \tau_{\mathrm{MTL}}` closest to :math:`\tau_k` in the 1-norm keeps a weight if
:math:`\tau_{\mathrm{MTL}}` is a better guess of :math:`\tau_k` than 0 is; a *strength* :math:`\lambda_k` shifts the
balance (smaller keeps more):

.. math:: m_k = \mathbb{1}\big[\, |\tau_k| \ge \lambda_k\, |\tau_{\mathrm{MTL}} - \tau_k| \,\big] .

- **Compression** (`tall_masks`): task k is answered by :math:`\theta_0 + m_k \odot \tau_{\mathrm{MTL}}`, near the
  expert's accuracy, for a bit per weight and task; the task must be known.
- **Merging** (`consensus`): a weight in one mask only is *selfish*, in no mask *catastrophic*: it helps nobody and
  disturbs all. One model for all tasks keeps the weights that at least k = 2 masks agree on,

  .. math:: \theta = \theta_0 + \alpha\; \mathbb{1}\Big[\sum_k m_k \ge 2\Big] \odot \tau_{\mathrm{MTL}} .

The paper and its code choose :math:`\lambda_k` for every task among 0.2, 0.3, ..., 0.6 by its validation accuracy
under `tall_masks`, then :math:`\alpha` among 0.1, 0.2, ..., 1 for the merge; 0.4 and 0.3 here are the middle and task
arithmetic's usual scale. (The code has > for :math:`\ge`: no difference where a weight has changed.)

**What the criterion cannot see.** It takes agreement for disturbance. If n tasks change a weight by the same a and
nobody else does, then :math:`|\tau_{\mathrm{MTL}} - \tau_k| = (n - 1) |a|`, and the weight is in no mask at all as
soon as :math:`n > 1 + 1/\lambda`: at 0.4, from four tasks on. Eight copies of one expert merge into the base.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import finite, number, numbers
from mergekit_lite.data_free.task_conditioned import TaskConditioned, in_memory
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors, TauFunction

_PAPER = "Wang et al., Localizing task information for improved model merging and compression, ICML"


@method(name="TALL-masks", paper=_PAPER, arxiv="2405.07813", year=2024, need=Need.WEIGHTS, per_task=True)
def tall_masks(
    tv: TaskVectors, *, strength: float | Sequence[float] = 0.4, merged: Mapping[str, Tensor] | None = None
) -> TaskConditioned:
    r"""Keep the sum of the task vectors and, for each task, a mask of the weights it uses.

    Args:
        tv: K task vectors, named as their tasks.
        strength: :math:`\lambda`, or K numbers, one :math:`\lambda_k` per task; a larger one keeps fewer weights.
        merged: another merge of these experts, whose difference to the base is :math:`\tau_{\mathrm{MTL}}`; by
            default it is the sum.

    Returns:
        K models by task name, made when asked for; the masks are its attribute `masks`.

    Raises:
        ValueError: a negative strength, or neither one nor K of them.
        KeyError: `merged` is not of this architecture.
    """
    strengths, added = _strengths(strength, len(tv)), multi_task_vector(tv, merged)
    masks: dict[str, Tensor] = {}

    def merge(name: str, taus: Tensor) -> Tensor:
        total = added(name, taus)
        masks[name] = localise(taus, total, strengths)
        return total

    return TaskConditioned(in_memory(tv, merge), masks, dict.fromkeys(tv.names, 1.0))


@method(name="Consensus Merging", paper=_PAPER, arxiv="2405.07813", year=2024, need=Need.WEIGHTS)
def consensus(
    tv: TaskVectors,
    *,
    strength: float | Sequence[float] = 0.4,
    agreement: int = 2,
    scale: float = 0.3,
    merged: Mapping[str, Tensor] | None = None,
) -> StateDict:
    r"""Add the task vectors, and keep the weights that at least two of them use in the sum.

    Args:
        tv: K task vectors.
        strength: :math:`\lambda`, or K numbers, one :math:`\lambda_k` per task; a larger one makes smaller masks.
        agreement: k, how many masks must hold a weight; 0 is task arithmetic, more than K the base.
        scale: :math:`\alpha`.
        merged: another merge of these experts, whose difference to the base is :math:`\tau_{\mathrm{MTL}}`: with
            ``mkl.ties(tv)`` this is Consensus TIES. By default it is the sum: Consensus Task Arithmetic.

    Returns:
        The merged state dict.

    Raises:
        ValueError: a negative strength or agreement, neither one strength nor K, a scale that is not finite.
        KeyError: `merged` is not of this architecture.
    """
    strengths, added = _strengths(strength, len(tv)), multi_task_vector(tv, merged)
    if not number("agreement", agreement) >= 0:
        raise ValueError(f"agreement is a number of tasks, 0 or more; got {agreement}.")
    finite("scale", scale)

    def merge(name: str, taus: Tensor) -> Tensor:
        total = added(name, taus)
        votes = localise(taus, total, strengths).sum(0)
        return torch.where(votes >= agreement, scale * total, 0.0)

    return tv.map(merge)


def localise(taus: Tensor, total: Tensor, strengths: Tensor) -> Tensor:
    """The masks (K, *shape) of K task vectors (K, *shape) in a multi-task vector (*shape)."""
    strengths = strengths.to(taus).reshape(-1, *[1] * total.ndim)
    return taus.abs() >= strengths * (total - taus).abs()


def multi_task_vector(tv: TaskVectors, merged: Mapping[str, Tensor] | None) -> TauFunction:
    """The multi-task vector, tensor by tensor: the sum of the task vectors, or what another merge adds to the base."""
    if merged is None:
        return lambda name, taus: taus.sum(0)
    TaskVectors(tv.base, {"merged": merged})  # says what does not fit
    return lambda name, taus: merged[name].to(taus) - tv.base[name].to(taus)


def _strengths(strength: float | Sequence[float], tasks: int) -> Tensor:
    strengths = numbers("strength", strength)
    strengths = strengths.repeat(tasks) if strengths.ndim == 0 else strengths
    if strengths.shape != (tasks,):
        raise ValueError(f"expected one strength or {tasks} (one per task), got {strengths.numel()}.")
    if not (torch.isfinite(strengths) & (strengths >= 0)).all():
        raise ValueError(f"a strength must be finite and not negative; got {strength}.")
    return strengths
