r"""WUDI-Merging: make the merge disturb each task's inputs least, with task vectors standing for the inputs.

Cheng et al., "Whoever started the interference should end it: guiding data-free model merging via task vectors", ICML
2025 (arXiv:2503.08099). A linear layer answers input x with W x. Merged, it answers task k's inputs with an error of
:math:`(\tau - \tau_k)\, x`, where :math:`\tau` is the merged task vector and all are matrices (outputs x inputs). Those
inputs are not at hand; but gradient descent adds multiples of them to the rows of W, so the rows of :math:`\tau_k` are
combinations of task k's inputs. With them in the place of x,

.. math::
   L(\tau) = \sum_k \frac{1}{\|\tau_k\|^2}\, \big\| (\tau - \tau_k)\, \tau_k^\top \big\|^2

is made small, for every matrix on its own. Along an input that only one task uses the answer is that task's, whole;
along an input that several tasks use it is a weighted mean. So there is no scale to choose.

Write :math:`\tau = \sum_k \tau_k + \delta`, where :math:`\delta` corrects the sum of the task vectors. The loss is a
quadratic function of it,

.. math::
   L = \langle \delta A, \delta \rangle - 2 \langle \delta, C \rangle + \text{constant}, \qquad
   A = \sum_k \frac{\tau_k^\top \tau_k}{\|\tau_k\|^2}, \quad
   C = \sum_k \Big( \tau_k - \sum_j \tau_j \Big) \frac{\tau_k^\top \tau_k}{\|\tau_k\|^2} ,

so its gradient :math:`2 (\delta A - C)` costs one product of matrices, however many tasks there are.

**The paper's recipe** (``solver="adam"``): from :math:`\delta = 0`, 300 steps of Adam with a learning rate of
:math:`10^{-5}`. That is an absolute length: a step moves no weight by much more than the learning rate, so where the
entries of the sum are larger than 0.003, all steps together are too short, and a larger one is needed.

**The minimum** (``solver="exact"``) is at :math:`\delta = C A^+`. It is RegMean's merge (Jin et al., 2023,
arXiv:2212.09849), with :math:`\tau_k^\top \tau_k / \|\tau_k\|^2` for the second moments of task k's inputs. Inputs
orthogonal to the rows of all :math:`\tau_k` make no difference to L; there the correction is zero, and so is the sum.
Of all solutions it is the nearest to the sum, where plain gradient descent would end, and the shortest.

The lower loss need not be the better merge. Along inputs that all task vectors hardly contain, A is small and
:math:`C A^+` can be much longer than any task vector; stopping early keeps Adam from going there. The same is done
openly by a *ridge*, which is not in the paper: it adds :math:`\rho\, \|\delta\|^2` to L, where :math:`\rho` is `ridge`
times the mean eigenvalue of A. From 0 to infinity it leads from the minimum to the sum.

**The shorter side.** A has a row and a column per input. Where there are more inputs than rows of all
:math:`\tau_k` together (a wide layer, a convolution with many channels) it is not written out: with the rows of all
:math:`\tau_k / \|\tau_k\|` under each other in U, and all :math:`(\tau_k - \sum_j \tau_j)\, \tau_k^\top / \|\tau_k\|`
beside each other in B,

.. math:: A = U^\top U, \quad C = B\, U, \qquad \delta A = (\delta\, U^\top)\, U, \qquad
          C (A + \rho)^+ = B\, (U U^\top + \rho)^+\, U .

So memory is never more than a few times that of the task vectors.

**What is merged so.** The authors' code for vision transformers merges the matrices of attention and MLP and leaves
everything else at the base (embeddings, biases, normalisation, projection). Here these are all linear maps
(`mergekit_lite.matrices`: with convolutions, but not depthwise ones) that `where` lets pass.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import count, finite, not_negative
from mergekit_lite.data_free.tsv import NEGLIGIBLE
from mergekit_lite.geometry import Where
from mergekit_lite.matrices import is_matrix
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors, float64


@method(
    name="WUDI-Merging",
    paper="Cheng et al., Whoever started the interference should end it, ICML",
    arxiv="2503.08099",
    year=2025,
    need=Need.WEIGHTS,
)
def wudi(
    tv: TaskVectors,
    *,
    solver: str = "adam",
    scale: float = 1.0,
    steps: int = 300,
    learning_rate: float = 1e-5,
    ridge: float = 0.0,
    where: Where | None = None,
    others: str = "base",
) -> StateDict:
    r"""Find the merged task vector that disturbs the tasks least, matrix by matrix.

    Args:
        tv: K task vectors.
        solver: ``"adam"``, the paper's descent, or ``"exact"``, the minimum.
        scale: a factor for the result; the paper has none.
        steps: of Adam; 0 gives the sum of the task vectors.
        learning_rate: of Adam, in units of weights.
        ridge: of the exact solution: how strongly it is held at the sum of the task vectors, in units of the mean
            eigenvalue of A.
        where: ``where(name, theta0)`` says which matrices to merge so; by default all linear maps.
        others: all other tensors are left at the ``"base"``, as in the authors' code, or take the ``"average"``.

    Returns:
        The merged state dict.

    Raises:
        ValueError: another solver, or another word for `others`; a number that is negative or not finite.
        TypeError: what should be a number is none.
    """
    if solver not in ("adam", "exact") or others not in ("base", "average"):
        raise ValueError(f"solver is adam or exact, and others is base or average; got '{solver}' and '{others}'.")
    finite("scale", scale)
    steps = count("steps", steps)
    not_negative("learning_rate", learning_rate)
    not_negative("ridge", ridge)

    def merge(name: str, taus: Tensor) -> Tensor:
        if not is_chosen(name, tv.base[name], where):
            return scale * taus.mean(0) if others == "average" else torch.zeros_like(taus[0])
        matrices = taus.flatten(2)
        if solver == "exact":
            tau = minimum(matrices, ridge).to(taus)
        else:
            tau = next(islice(descent(matrices, learning_rate), steps, None))
        return scale * tau.reshape(taus.shape[1:])

    return tv.map(merge)


def losses(tv: TaskVectors, merged: Mapping[str, Tensor], *, where: Where | None = None) -> dict[str, float]:
    """L of a merged state dict, by the name of every matrix that `where` lets pass."""
    return {
        name: loss((merged[name].to(theta0) - theta0).flatten(1), taus.flatten(2)).item()
        for name, theta0, taus in tv.layers()
        if is_chosen(name, theta0, where)
    }


def loss(tau: Tensor, taus: Tensor) -> Tensor:
    """L of one merged matrix (rows, columns) and K task matrices (K, rows, columns), in float64."""
    disturbances = (((float64(tau) - task) @ unit(task).T).square().sum() for task in map(float64, taus))
    return torch.stack(list(disturbances)).sum()


def descent(taus: Tensor, learning_rate: float) -> Iterator[Tensor]:
    """Adam on L from the sum of the task vectors: yields the start, then the matrix after each step, without end."""
    start = taus.sum(0)
    correction = torch.zeros_like(start)
    gradient = slope(taus)
    adam = torch.optim.Adam([correction], lr=learning_rate)
    while True:
        yield start + correction
        correction.grad = gradient(correction)
        adam.step()


def slope(taus: Tensor) -> Callable[[Tensor], Tensor]:
    """The gradient 2 (δ A − C) of L as a function of the correction δ, for K task matrices (K, rows, columns)."""
    if is_wide(taus):
        u, b = factors(taus)
        u, c = u.to(taus), (b @ u).to(taus)
        return lambda correction: 2 * (correction @ u.T @ u - c)
    a, c = (matrix.to(taus) for matrix in quadratic(taus))
    return lambda correction: 2 * (correction @ a - c)


def minimum(taus: Tensor, ridge: float = 0.0) -> Tensor:
    """The matrix with the least L plus ridge, for K task matrices (K, rows, columns), in float64."""
    if is_wide(taus):
        u, b = factors(taus)
        values, vectors = strong(u @ u.T)
        curvature = values + ridge * values.sum() / taus.shape[2]  # the mean of all, as the others are zero
        return float64(taus).sum(0) + (b @ vectors / curvature) @ (vectors.T @ u)
    a, c = quadratic(taus)
    values, vectors = strong(a)
    curvature = values + ridge * values.sum() / len(a)  # the mean of all, as the others are zero
    return float64(taus).sum(0) + (c @ vectors / curvature) @ vectors.T


def strong(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) and eigenvectors (size, n), without those that are zero: no task vector has anything there."""
    values, vectors = torch.linalg.eigh(matrix)
    chosen = values > NEGLIGIBLE**2 * values[-1]
    return values[chosen], vectors[:, chosen]


def is_wide(taus: Tensor) -> bool:
    """Whether there are more columns than rows of all K task matrices (K, rows, columns) together."""
    return taus.shape[2] > taus.shape[0] * taus.shape[1]


def factors(taus: Tensor) -> tuple[Tensor, Tensor]:
    """U (K rows, columns) and B (rows, K rows) of K task matrices (K, rows, columns), in float64."""
    deltas = float64(taus)
    total = deltas.sum(0)
    directions = [unit(tau) for tau in deltas]
    answers = [(tau - total) @ direction.T for tau, direction in zip(deltas, directions, strict=True)]
    return torch.cat(directions), torch.cat(answers, dim=1)


def quadratic(taus: Tensor) -> tuple[Tensor, Tensor]:
    """A (columns, columns) and C (rows, columns) of K task matrices (K, rows, columns), in float64."""
    total = float64(taus).sum(0)
    a = c = float64(taus.new_zeros(()))
    for tau in map(float64, taus):
        direction = unit(tau)
        a = a + direction.T @ direction
        c = c + torch.linalg.multi_dot((tau - total, direction.T, direction))
    return a, c


def unit(tau: Tensor) -> Tensor:
    """τ / ‖τ‖; zero for a zero task vector, which has no inputs to disturb."""
    return tau / tau.norm().clamp(min=torch.finfo(tau.dtype).tiny)


def is_chosen(name: str, weight: Tensor, where: Where | None) -> bool:
    """Whether this tensor is merged by its loss."""
    return is_matrix(weight, name) and (where is None or where(name, weight))
