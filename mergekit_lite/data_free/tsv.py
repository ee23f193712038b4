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
matrix (biases, normalisation, depthwise kernels, whose rows see one channel each) is averaged.
"""

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors


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
    if not torch.isfinite(torch.tensor(scale)):
        raise ValueError(f"scale must be finite, got {scale}.")

    def merge(name: str, taus: Tensor) -> Tensor:
        if not is_matrix(taus[0]):
            return scale * taus.mean(0)
        return scale * merge_matrices(taus.flatten(2)).view(taus.shape[1:])

    return tv.map(merge)


def is_matrix(weight: Tensor) -> bool:
    """Whether a weight maps many inputs to many outputs: linear layers and full convolutions."""
    return weight.ndim >= 2 and weight.shape[1] > 1


def merge_matrices(deltas: Tensor) -> Tensor:
    """Merge K task matrices (K, rows, columns) into one (rows, columns)."""
    k = len(deltas)
    u, s, vt = torch.linalg.svd(deltas, full_matrices=False)
    kept = max(1, s.shape[1] // k)
    left = torch.cat(list(u[:, :, :kept]), dim=1)  # (rows, K * kept)
    right = torch.cat(list(vt[:, :kept]), dim=0)  # (K * kept, columns)
    return (orthogonalise(left) * s[:, :kept].flatten()) @ orthogonalise(right)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix whose columns (or rows, if it is wide) are orthonormal."""
    p, _, qt = torch.linalg.svd(matrix, full_matrices=False)
    return p @ qt
