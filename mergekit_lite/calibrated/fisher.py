r"""Fisher merging: average every weight, and let the tasks that need it most have the most say.

Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022 (arXiv:2111.09832). How
much does task k's loss rise when weight i leaves its expert's value? To second order by
:math:`\tfrac12 F_{k,i}\, (\theta_i - \theta_{k,i})^2`, where :math:`F_{k,i}` is the i-th number on the diagonal of
the Fisher information. The sum over tasks is least at

.. math:: \theta_i = \frac{\sum_k \lambda_k F_{k,i}\, \theta_{k,i}}{\sum_k \lambda_k F_{k,i}} ,

with :math:`\lambda_k` the weight of task k: multiply its curvature by it. If all :math:`F_{k,i}` are equal, this is
the average of the experts. So it is where they are all zero: there is nothing to choose by.

**What the released code does differently.** It takes the exact Fisher information (``labels="expected"``) from 4,096
training examples, divides each expert's by its length over all tensors, chooses :math:`\lambda` on validation data, and
raises values of the first expert, the target, to :math:`10^{-6}`. Widely used other code squares the gradient of a
whole batch, summed over classes and examples, which is no Fisher information.
"""

import torch
from torch import Tensor

from mergekit_lite.calibrated.blocks import Block, Curvatures, blocks_of, in_order
from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import not_negative
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors, float64


@method(
    name="Fisher merging",
    paper="Matena and Raffel, Merging models with Fisher-weighted averaging, NeurIPS",
    arxiv="2111.09832",
    year=2022,
    need=Need.CALIBRATION,
)
def fisher(tv: TaskVectors, fishers: Curvatures, *, floor: float = 0.0) -> StateDict:
    r"""The mean of the experts, each weight weighted by its Fisher information.

    Args:
        tv: K task vectors.
        fishers: of every expert, in order or by name, as `diagonal_fisher` gathers them. Of blocks that are no
            diagonals, the diagonal counts. Tensors that have no block are averaged.
        floor: is added to every :math:`F_{k,i}`, in its own unit; from 0 to infinity it leads to the average.

    Returns:
        The merged state dict.

    Raises:
        ValueError: not K curvatures, a block of another shape or with negative numbers, or a floor that is negative
            or not finite.
        KeyError: a curvature belongs to another model, or only some experts have one for a tensor.
    """
    not_negative("floor", floor)
    ordered = in_order(tv, fishers)

    def merge(name: str, taus: Tensor) -> Tensor:
        blocks = blocks_of(name, ordered)
        average = float64(taus).mean(0)
        if not blocks:
            return average.to(taus)
        fishers = torch.stack([float64(diagonal(block, average)) for block in blocks])
        if not (fishers >= 0).all():
            raise ValueError(f"the curvature of '{name}' has negative or undefined numbers on its diagonal.")
        weights = fishers + floor
        total = weights.sum(0)
        # As a correction of the average, which is kept where no task minds.
        correction = (weights * (float64(taus) - average)).sum(0) / torch.where(total > 0, total, 1.0)
        return (average + correction).to(taus)

    return tv.map(merge)


def diagonal(block: object, like: Tensor) -> Tensor:
    """The diagonal of a block of curvature.

    Raises:
        TypeError: the block is a function of which only products are known.
    """
    if not isinstance(block, Block):
        raise TypeError("a linear function has no known diagonal; pass Diagonal or Kronecker blocks.")
    return block.diagonal(like)
