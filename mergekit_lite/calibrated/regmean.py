r"""RegMean: merge every linear layer so that its outputs stay what each expert's were, by least squares.

Jin et al., "Dataless knowledge fusion by merging weights of language models", ICLR 2023 (arXiv:2212.09849), section 3.
A linear layer answers its inputs :math:`X_k` (a column per image or place) with :math:`W_k X_k`. One matrix W for all
tasks should answer as the experts did:

.. math:: \min_W \; \sum_k \| W X_k - W_k X_k \|^2 , \qquad W = \Big( \sum_k W_k G_k \Big) \Big( \sum_k G_k \Big)^{-1} ,

with the Gram matrices :math:`G_k = X_k X_k^\top`, which are all that must be known of the inputs; they are divided by
the number of columns, so that tasks count equally. Everything that is no weight of a linear layer is averaged.

**Off the diagonal.** The authors multiply all entries of :math:`G_k` beside the diagonal by :math:`\alpha`. With
:math:`\alpha = 0` each input is on its own, and the merge is a weighted average of columns. Their released experiments
use 0.1, 0.9 or leave the matrices as they are, which is the default there and here.

**Convolutions** are not in the paper. They are linear layers over the patches that the kernel sees, so they are merged
in the same way; a depthwise one channel by channel.

**Where nothing is known.** A few images do not move in all directions, and the sum of Gram matrices may have no
inverse. Along inputs that never occurred all matrices fit equally well; there the average is kept (pseudo-inverse).
"""

from collections.abc import Sequence

from torch import Tensor

from mergekit_lite.calibrated.blocks import Curvatures, Kronecker, blocks_of, in_order, pseudo_inverse
from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import number
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors, float64


@method(
    name="RegMean",
    paper="Jin et al., Dataless knowledge fusion by merging weights of language models, ICLR",
    arxiv="2212.09849",
    year=2023,
    need=Need.CALIBRATION,
)
def regmean(tv: TaskVectors, grams: Curvatures, *, alpha: float = 1.0) -> StateDict:
    r"""The matrices whose outputs are nearest to the experts' outputs, layer by layer.

    Args:
        tv: K task vectors.
        grams: of every expert, in order or by name, as `input_grams` gathers them. Only the inputs' factor of a
            `Kronecker` block counts. Tensors that have none are averaged.
        alpha: :math:`\alpha \in [0, 1]`, what becomes of the entries of a Gram matrix beside its diagonal.

    Returns:
        The merged state dict.

    Raises:
        ValueError: not K curvatures, a block of another shape, or an alpha outside [0, 1].
        KeyError: a curvature belongs to another model, or only some experts have one for a tensor.
    """
    check_share(alpha)
    ordered = in_order(tv, grams)

    def merge(name: str, taus: Tensor) -> Tensor:
        blocks = [block.mixed(alpha) for block in blocks_of(name, ordered) if isinstance(block, Kronecker)]
        known = [block.inputs for block in blocks if block.inputs is not None]
        if known and len(known) < len(tv):
            raise KeyError(f"only {len(known)} of {len(tv)} experts have a Gram matrix for '{name}'.")
        return least_squares(taus, known).to(taus) if known else taus.mean(0)

    return tv.map(merge)


def least_squares(weights: Tensor, grams: Sequence[Tensor]) -> Tensor:
    """The best weight for K weights (or task vectors) of shape (K, *shape) and K Gram matrices (groups, i, i)."""
    average = float64(weights).mean(0)
    total = wrong = average.new_zeros(())
    for weight, gram in zip(weights, map(float64, grams), strict=True):
        difference = (float64(weight) - average).reshape(len(gram), -1, gram.shape[1])  # groups x outputs x inputs
        total, wrong = total + gram, wrong + difference @ gram  # what the average gets wrong
    return average + (wrong @ pseudo_inverse(total)).reshape(average.shape)


def check_share(alpha: float) -> None:
    """Raises a ValueError unless alpha lies in [0, 1]."""
    if not 0 <= number("alpha", alpha) <= 1:
        raise ValueError(f"alpha must lie in [0, 1], from the diagonals alone to whole Gram matrices; got {alpha}.")
