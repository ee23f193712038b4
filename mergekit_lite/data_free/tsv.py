r"""TSV-Merging: keep each task's leading singular directions and make them orthogonal.

Gargiulo et al., "Task singular vectors: reducing task interference in model merging", CVPR 2025
(arXiv:2412.00081), section 4.2. The task vector of a weight *matrix* is a matrix
:math:`\Delta_k = U_k \Sigma_k V_k^\top` of low effective rank, and two tasks interfere where their
singular vectors overlap. So, per matrix:

1. keep of each task the top r/K singular triples, so that all K together fill the rank r;
2. put them side by side, :math:`U = [U_1 \dots U_K]`, :math:`V = [V_1 \dots V_K]`, :math:`\Sigma` likewise;
3. replace U and V by the nearest matrices with orthonormal columns: if :math:`U = P D Q^\top`, then
   :math:`U_\perp = P Q^\top` (the orthogonal Procrustes problem);
4. merge: :math:`\theta = \theta_0 + \lambda\, U_\perp \Sigma V_\perp^\top`.

A convolution's kernel is read as the matrix (outputs) x (inputs x height x width). Whatever is no
linear map (biases, normalisation, tables of positions, depthwise kernels, whose rows see one channel
each) is averaged; `mergekit_lite.matrices` says what is one.

**What the released code does differently.** It also averages convolutions (any tensor without exactly two axes) and
CLIP's text projection. It rounds r/K down to zero where there are more tasks than rank, and leaves such a matrix at the
base; here every task keeps one triple. And it keeps triples whose singular value is zero, and directions that several
tasks share to the last digit: there singular vectors are not unique, and the result depends on the linear algebra
library. Here they are left out. So copies of one expert merge into that expert's leading r/K triples.

**How singular triples are found.** The eigenvectors of the smaller of :math:`\Delta\Delta^\top` and
:math:`\Delta^\top\Delta` are singular vectors of :math:`\Delta`, and its eigenvalues are :math:`\sigma_i^2`. Squaring
costs half of the digits, so this is computed in float64. For weights in float32 that is more accurate than their
singular value decomposition in float32, and up to twice as fast.
"""

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import finite
from mergekit_lite.matrices import is_matrix
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors, float64

# A singular value below this share of the largest counts as zero: float32 weights leave rounding errors of this size.
NEGLIGIBLE = 1e-6


@method(
    name="TSV-Merging",
    paper="Gargiulo et al., Task singular vectors, CVPR",
    arxiv="2412.00081",
    year=2025,
    need=Need.WEIGHTS,
)
def tsv(tv: TaskVectors, *, scale: float = 1.0) -> StateDict:
    r"""Concatenate the leading singular triples of all tasks, orthogonalised, matrix by matrix.

    Args:
        tv: K task vectors.
        scale: :math:`\lambda`; the paper finds 1 to be near the best.

    Returns:
        The merged state dict.

    Raises:
        ValueError: a scale that is not finite.
    """
    finite("scale", scale)

    def merge(name: str, taus: Tensor) -> Tensor:
        if not is_matrix(taus[0], name):
            return scale * taus.mean(0)
        return scale * merge_matrices(taus.flatten(2)).reshape(taus.shape[1:]).to(taus)

    return tv.map(merge)


def merge_matrices(deltas: Tensor) -> Tensor:
    """Merge K task matrices (K, rows, columns) into one (rows, columns), in float64."""
    kept = max(1, min(deltas.shape[1:]) // len(deltas))
    us, sigmas, vs = zip(*(singular_triples(delta, kept) for delta in deltas), strict=True)
    left, sigma, right = torch.cat(us, dim=1), torch.cat(sigmas), torch.cat(vs, dim=1)
    return (orthogonalise(left) * sigma) @ orthogonalise(right).T


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows, if it is wide); its own zero directions stay zero."""
    p, _, q = singular_triples(matrix)
    return p @ q.T


def singular_triples(matrix: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    r"""The leading singular triples of a matrix, without those whose singular value is zero.

    Args:
        matrix: :math:`\Delta`, of shape (rows, columns).
        count: how many triples at most; by default all.

    Returns:
        U (rows, n), :math:`\sigma` (n,), falling, and V (columns, n), in float64, where
        :math:`U\, \mathrm{diag}(\sigma)\, V^\top` is the best approximation of :math:`\Delta` of rank n.
    """
    if matrix.shape[0] > matrix.shape[1]:  # the smaller of the two products is enough
        v, sigma, u = singular_triples(matrix.T, count)
        return u, sigma, v
    delta = float64(matrix)
    squares, vectors = torch.linalg.eigh(delta @ delta.T)  # rising
    strong = squares > NEGLIGIBLE**2 * squares[-1:]
    sigma = squares[strong].sqrt().flip(0)[:count]
    u = vectors[:, strong].flip(1)[:, :count]
    return u, sigma, delta.T @ u / sigma
