r"""Task arithmetic: adding, negating and combining task vectors.

Ilharco et al., "Editing models with task arithmetic", ICLR 2023 (arXiv:2212.04089), section 3.

===========  ==========================================================  =========================
operation    merged weights                                              what it should do
===========  ==========================================================  =========================
addition     :math:`\theta_0 + \lambda \sum_k \tau_k`                    all K tasks in one model
negation     :math:`\theta_0 - \lambda\,\tau`                            forget one task
analogy      :math:`\theta_0 + \lambda\,(\tau_C + \tau_B - \tau_A)`      a task D, where A : B = C : D
===========  ==========================================================  =========================

Running statistics of normalisation are not added: they are the mean over the tasks with a positive scale, so that a
variance stays one (`mergekit_lite.roles`).

One scale :math:`\lambda` serves all tasks. The paper chooses it on validation data; 0.3 is the usual
choice for eight tasks without any. At :math:`\lambda = 1/K` addition is plain averaging.
"""

from collections.abc import Sequence

import torch

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import finite, numbers
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors

_PAPER = "Ilharco et al., Editing models with task arithmetic, ICLR"


@method(name="Task arithmetic", paper=_PAPER, arxiv="2212.04089", year=2023, need=Need.WEIGHTS)
def task_arithmetic(tv: TaskVectors, *, scale: float | Sequence[float] = 0.3) -> StateDict:
    r"""Add the task vectors: :math:`\theta_0 + \lambda \sum_k \tau_k`.

    Args:
        tv: K task vectors; ``-tv[k]`` negates one.
        scale: :math:`\lambda`, or K numbers, one :math:`\lambda_k` per task.

    Returns:
        The merged state dict.

    Raises:
        ValueError: a scale that is not finite, or neither one number nor K.
    """
    scales = numbers("scale", scale)
    scales = scales.repeat(len(tv)) if scales.ndim == 0 else scales
    if scales.shape != (len(tv),):
        raise ValueError(f"expected one scale or {len(tv)} (one per task), got {scales.numel()}.")
    if not torch.isfinite(scales).all():
        raise ValueError(f"scale must be finite, got {scale}.")
    return tv.map_pieces(lambda place, taus: scales.to(taus) @ taus, shares=scales)


@method(name="Task negation", paper=_PAPER, arxiv="2212.04089", year=2023, need=Need.WEIGHTS)
def negation(tv: TaskVectors, *, forget: int | str = 0, scale: float = 1.0) -> StateDict:
    r"""Forget one task: :math:`\theta_0 - \lambda\,\tau`.

    Args:
        tv: task vectors; only the one to forget is read.
        forget: the position or the name of the task to forget.
        scale: :math:`\lambda`. The paper takes the largest at which a control task (a different task,
            which should survive) keeps 95 % of the base's accuracy.

    Returns:
        The merged state dict.

    Raises:
        KeyError, IndexError: there is no such task.
        ValueError: the scale is not finite.
    """
    return task_arithmetic(-tv[forget], scale=finite("scale", scale))


@method(name="Task analogy", paper=_PAPER, arxiv="2212.04089", year=2023, need=Need.WEIGHTS)
def analogy(tv: TaskVectors, *, a: int | str, b: int | str, c: int | str, scale: float = 1.0) -> StateDict:
    r"""A is to B as C is to D: :math:`\theta_0 + \lambda\,(\tau_C + \tau_B - \tau_A)` for the unseen D.

    Args:
        tv: task vectors that include A, B and C.
        a: the position or the name of task A.
        b: of task B.
        c: of task C.
        scale: :math:`\lambda`.

    Returns:
        The merged state dict.

    Raises:
        KeyError, IndexError: there is no such task.
        ValueError: the scale is not finite.
    """
    scale = finite("scale", scale)
    return task_arithmetic(tv.subset([c, b, a]), scale=[scale, scale, -scale])
