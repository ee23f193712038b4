r"""Iso-C and Iso-CTS: give all singular directions of the merge the same weight.

Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces", ICML 2025
(arXiv:2502.04959). Add the task vectors of a weight matrix, :math:`\Delta = \sum_k \Delta_k = U \Sigma V^\top`: a few
directions, those that many tasks share, get large singular values; the directions that matter to single tasks get
small ones. *Iso-C* keeps the directions and gives all of them the mean singular value,

.. math::
   \theta = \theta_0 + \lambda\, \bar\sigma\, U V^\top, \qquad \bar\sigma = \frac1r \sum_{i=1}^{r} \sigma_i .

(The matrix :math:`U V^\top` is the orthogonal factor of :math:`\Delta`, the same that `tsv` takes of singular vectors,
and :math:`\bar\sigma` is the number c that minimises :math:`\|\Delta - c\, U V^\top\|`.)

The last of the r directions may matter to no task. *Iso-CTS* exchanges them for directions of single tasks:

1. keep the top k singular triples of :math:`\Delta`, the common subspace;
2. remove it from each task, :math:`\bar\Delta_k = \Delta_k - U_{1:k} U_{1:k}^\top \Delta_k`, and keep the top
   :math:`s = (r - k) / K` triples of what is left, the task-specific subspaces;
3. put all of these r triples side by side and make them orthogonal, :math:`U_\perp` and :math:`V_\perp` as in `tsv`;
4. merge: :math:`\theta = \theta_0 + \lambda\, \bar\sigma\, U_\perp V_\perp^\top`, where :math:`\bar\sigma` is the mean
   of the r singular values that were kept.

**The scale.** The paper chooses :math:`\lambda` on validation data, the released code among 0.1, 0.2, ..., 3. The
default here is 1. With it, Iso-C is never longer than the sum: :math:`\|\bar\sigma\, U V^\top\| = \bar\sigma \sqrt r
\le \|\Delta\|`.

**What is no matrix.** The released code averages every tensor without exactly two axes (biases, normalisation,
convolutions) and CLIP's text projection, and scales the average by :math:`\lambda`, too; a table of position embeddings
is a matrix to it. Here a convolution's kernel is a matrix, as in `tsv`, unless it is depthwise, and a table is none
(`mergekit_lite.matrices`); the rest is averaged.

**Small ranks.** r is the smaller side of the matrix. As in the released code, s is (r - k) / K rounded to a whole
number and k takes up the rest; with few rows and many tasks s is 0, and Iso-CTS is Iso-C. Zero singular values have
no directions: the released code counts them and takes what the linear algebra library returns; here they are left out,
from the directions and from the mean.
"""

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import finite, number
from mergekit_lite.data_free.tsv import orthogonalise, singular_triples
from mergekit_lite.matrices import is_matrix
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors, float64

_PAPER = "Marczak et al., No task left behind: isotropic model merging, ICML"


@method(name="Iso-C", paper=_PAPER, arxiv="2502.04959", year=2025, need=Need.WEIGHTS)
def iso_c(tv: TaskVectors, *, scale: float = 1.0) -> StateDict:
    r"""Add the task vectors and give all singular directions of every matrix the same weight.

    Args:
        tv: K task vectors.
        scale: :math:`\lambda`; the paper chooses it on validation data.

    Returns:
        The merged state dict.

    Raises:
        ValueError: a scale that is not finite.
    """
    return iso_cts(tv, scale=scale, common_fraction=1.0)


@method(name="Iso-CTS", paper=_PAPER, arxiv="2502.04959", year=2025, need=Need.WEIGHTS)
def iso_cts(tv: TaskVectors, *, scale: float = 1.0, common_fraction: float = 0.8) -> StateDict:
    r"""As `iso_c`, with the weakest directions of the sum exchanged for the strongest of every task.

    Args:
        tv: K task vectors.
        scale: :math:`\lambda`; the paper chooses it on validation data.
        common_fraction: the share k/r of directions that come from the sum, in [0, 1]; 1 is Iso-C.

    Returns:
        The merged state dict.

    Raises:
        ValueError: a scale that is not finite, or a share outside [0, 1].
    """
    finite("scale", scale)
    if not 0 <= number("common_fraction", common_fraction) <= 1:
        raise ValueError(f"common_fraction is a share in [0, 1]; got {common_fraction}.")

    def merge(name: str, taus: Tensor) -> Tensor:
        if not is_matrix(taus[0], name):
            return scale * taus.mean(0)
        return scale * merge_matrices(taus.flatten(2), common_fraction).reshape(taus.shape[1:]).to(taus)

    return tv.map(merge)


def merge_matrices(deltas: Tensor, common_fraction: float) -> Tensor:
    """Merge K task matrices (K, rows, columns) into one (rows, columns), in float64."""
    common, specific = dimensions(min(deltas.shape[1:]), len(deltas), common_fraction)
    triples = [singular_triples(float64(deltas).sum(0), common)]
    if specific == 0:  # Iso-C: these directions are orthogonal already
        u, sigma, v = triples[0]
        return mean(sigma) * u @ v.T

    shared = triples[0][0]
    for delta in map(float64, deltas):
        triples.append(singular_triples(delta - shared @ (shared.T @ delta), specific))
    us, sigmas, vs = zip(*triples, strict=True)
    left, right = torch.cat(us, dim=1), torch.cat(vs, dim=1)
    return mean(torch.cat(sigmas)) * orthogonalise(left) @ orthogonalise(right).T


def dimensions(rank: int, tasks: int, common_fraction: float) -> tuple[int, int]:
    """How many directions are common (k) and how many each task has for itself (s), with k + K s = r."""
    specific = round((rank - int(rank * common_fraction)) / tasks)
    specific = min(specific, rank // tasks)  # rounding up must not ask for more than there are
    return rank - tasks * specific, specific


def mean(sigma: Tensor) -> Tensor:
    """The mean singular value; 0 where there is none."""
    return sigma.sum() / max(1, len(sigma))
