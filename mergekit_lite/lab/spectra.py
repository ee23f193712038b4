r"""Task vectors as matrices: merges by their singular values, and what two tasks share.

For chapter 2.5. Everything here is a control or a measurement, made of the functions of `mergekit_lite.data_free.tsv`:
a merge with other singular values than the sum's, TSV with steps left out, and the overlap of two task matrices that
their inner product does not see.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.data_free.tsv import orthogonalise, singular_triples
from mergekit_lite.matrices import is_matrix
from mergekit_lite.task_vectors import TaskVectors, float64

# Singular values (n,), falling, to singular values (n,).
Change = Callable[[Tensor], Tensor]


def reshaped(tv: TaskVectors, change: Change, *, scale: float = 1.0) -> StateDict:
    r"""The sum of the task vectors with other singular values: :math:`\lambda\, U f(\Sigma) V^\top`, matrix by matrix.

    What is no matrix is averaged, whatever the scale, so that merges differ in the spectra of matrices only.

    Args:
        tv: K task vectors.
        change: f, of all singular values of a matrix, falling; the identity gives task arithmetic.
        scale: :math:`\lambda`.
    """

    def merge(deltas: Tensor) -> Tensor:
        u, sigma, v = singular_triples(deltas.sum(0))
        return scale * (u * change(sigma)) @ v.T

    return by_matrix(tv, merge)


def flattened(share: float) -> Change:
    r"""A change towards equal singular values, :math:`\sigma_i^{1-t}\, \bar\sigma^t`: t = 0 none, t = 1 Iso-C.

    Raises:
        ValueError: a share t outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"t is a share in [0, 1]; got {share}.")
    return lambda sigma: sigma ** (1 - share) * sigma.mean() ** share


def capped(sigma: Tensor) -> Tensor:
    """Singular values above the mean are lowered to it."""
    return sigma.clamp(max=sigma.mean().item()) if len(sigma) else sigma


def raised(sigma: Tensor) -> Tensor:
    """Singular values below the mean are raised to it."""
    return sigma.clamp(min=sigma.mean().item()) if len(sigma) else sigma


def tsv_steps(tv: TaskVectors, *, truncate: bool, orthogonal: bool, scale: float = 1.0) -> StateDict:
    """TSV with its two steps or without: both is `tsv` (but for the scale of what is no matrix), none the sum.

    Args:
        tv: K task vectors.
        truncate: keep r/K triples of every task; otherwise all.
        orthogonal: make the singular vectors of all tasks orthogonal.
        scale: λ, of the matrices. What is no matrix is averaged.
    """

    def merge(deltas: Tensor) -> Tensor:
        kept = max(1, min(deltas.shape[1:]) // len(deltas)) if truncate else None
        us, sigmas, vs = zip(*(singular_triples(delta, kept) for delta in deltas), strict=True)
        left, sigma, right = torch.cat(us, dim=1), torch.cat(sigmas), torch.cat(vs, dim=1)
        if orthogonal:
            left, right = orthogonalise(left), orthogonalise(right)
        return scale * (left * sigma) @ right.T

    return by_matrix(tv, merge)


def by_matrix(tv: TaskVectors, merge: Callable[[Tensor], Tensor]) -> StateDict:
    """Merge every matrix by a function of its task matrices (K, rows, columns), in float64; average the rest."""

    def merge_tensor(name: str, taus: Tensor) -> Tensor:
        if not is_matrix(taus[0], name):
            return taus.mean(0)
        return merge(float64(taus.flatten(2))).view(taus.shape[1:]).to(taus)

    return tv.map(merge_tensor)


def matrices(tv: TaskVectors) -> dict[str, Tensor]:
    """The task matrices (K, rows, columns) of every weight matrix by name, in float64; depthwise kernels are none."""
    return {name: float64(taus.flatten(2)) for name, theta0, taus in tv.layers() if is_matrix(theta0, name)}


def shared_inputs(deltas: Tensor) -> Tensor:
    r"""How much two task matrices read the same inputs: (K, K), 1 on the diagonal, in float64.

    .. math:: \frac{\|\Delta_i \Delta_j^\top\|}{\sqrt{\|\Delta_i \Delta_i^\top\|\, \|\Delta_j \Delta_j^\top\|}}

    It is 0 only if every row of one is orthogonal to every row of the other. Their inner product, the trace of
    :math:`\Delta_i \Delta_j^\top`, may vanish although this is large.

    Args:
        deltas: K task matrices (K, rows, columns), none of them zero.
    """
    deltas = float64(deltas)
    seconds = deltas.transpose(1, 2) @ deltas  # ‖Δi Δjᵀ‖² = ⟨Δiᵀ Δi, Δjᵀ Δj⟩
    products = torch.einsum("irc,jrc->ij", seconds, seconds).sqrt()
    own = products.diagonal().sqrt()
    return products / own / own[:, None]


def turned_at_random(deltas: Tensor, seed: int = 0) -> Tensor:
    """Matrices of the same singular values whose singular vectors have nothing in common: each is turned by itself."""
    generator = torch.Generator().manual_seed(seed)

    def rotation(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q

    return torch.stack([rotation(d.shape[0]) @ d @ rotation(d.shape[1]) for d in float64(deltas)])


def kept_of_own(merged: Tensor, delta: Tensor) -> Tensor:
    r"""What of a task's own answer a merged matrix gives, direction by direction: (n,), in float64.

    For the triples of :math:`\Delta_k` it is :math:`u_i^\top \Delta\, v_i / \sigma_i`: 1 where the input :math:`v_i`
    is answered as by task k alone, as far as the output :math:`u_i` goes.
    """
    u, sigma, v = singular_triples(delta)
    return torch.einsum("ri,rc,ci->i", u, float64(merged), v) / sigma


def alignment(merged: Tensor, deltas: Tensor, share: float = 0.95) -> Tensor:
    r"""The subspace alignment ratio of Marczak et al. (2025, equations 5 and 6): (K,), in float64.

    .. math:: \frac{\|U_{1:k} U_{1:k}^\top \Delta_i\|}{\|\Delta_i\|} ,

    with the first k left singular vectors of the merged matrix, as many as keep `share` of its length.

    Args:
        merged: (rows, columns).
        deltas: K task matrices (K, rows, columns), none of them zero.
        share: in (0, 1].
    """
    u, sigma, _ = singular_triples(merged)
    energy = sigma.square().cumsum(0)
    count = int((energy < share**2 * energy[-1]).sum()) + 1
    deltas = float64(deltas)
    return (u[:, :count].T @ deltas).norm(dim=(1, 2)) / deltas.norm(dim=(1, 2))
