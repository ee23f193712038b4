r"""Preconditioners for a sum of curvatures: cheap approximations of its inverse.

``"jacobi"`` divides by the diagonal of :math:`\sum_k C_k`. ``"kronecker"`` takes the one Kronecker product
:math:`P \otimes Q` that is nearest to :math:`\sum_k A_k \otimes B_k` (Van Loan and Pitsianis, "Approximation with
Kronecker products", 1993), whose inverse is :math:`V \mapsto Q^{-1} V P^{-1}`. With the entries of :math:`A_k` in the
columns of a matrix a and those of :math:`B_k` in b, it is the best approximation of :math:`a b^\top` by a matrix of
rank one. Its factors are :math:`P = \sum_k \alpha_k A_k` and :math:`Q = \sum_k \beta_k B_k`, so all that is needed are
the K x K Gram matrices :math:`a^\top a` and :math:`b^\top b`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from mergekit_lite.calibrated.blocks import Block, Diagonal, Kronecker, LinearMap

PRECONDITIONERS = ("none", "jacobi", "kronecker")
POWER_STEPS = 30  # a preconditioner need not be exact
LEAST_SHARE = 1e-6  # no task is left out of it: where it alone has curvature, no step would be taken


def approximate_inverse(blocks: Sequence[LinearMap], like: Tensor, preconditioner: str) -> LinearMap | None:
    """A function that nearly inverts the sum of K blocks, for tensors `like` the weight.

    Raises:
        TypeError: a block is a linear function of which only products are known.
    """
    if preconditioner == "none":
        return None
    known = [block for block in blocks if isinstance(block, Block)]
    if len(known) < len(blocks):
        raise TypeError("a preconditioner must see into the curvature; for functions of your own use 'none'.")
    factored = [block for block in known if isinstance(block, Kronecker)]
    if preconditioner == "kronecker" and len(factored) == len(blocks):
        return nearest_product(factored).inverse()
    return Diagonal(_total(block.diagonal(like) for block in known)).inverse()


def nearest_product(blocks: Sequence[Kronecker]) -> Kronecker:
    """The Kronecker product nearest to the sum of K of them (in the sum of squared entries), group by group.

    Raises:
        ValueError: some blocks have a factor that others lack.
    """
    inputs, outputs = ([f for f in factors if f is not None] for factors in zip(*map(_both, blocks), strict=True))
    if {len(inputs), len(outputs)} - {0, len(blocks)}:
        raise ValueError("the experts' blocks of a tensor must have the same factors.")
    if not inputs or not outputs:  # the sum itself is such a product
        return Kronecker(_total(inputs) if inputs else None, _total(outputs) if outputs else None)
    tiny = torch.finfo(inputs[0].dtype).tiny
    a, b = (_inner_products(torch.stack(factors), tiny) for factors in (inputs, outputs))
    alpha = torch.ones_like(a[..., :1])
    for _ in range(POWER_STEPS):  # to the leading eigenvector; it has no negative entry, as no inner product is one
        alpha = b @ (a @ alpha)
        alpha = alpha / alpha.amax(1, keepdim=True).clamp_min(tiny)
    alpha = alpha.clamp_min(LEAST_SHARE)
    beta = a @ alpha / (alpha.mT @ a @ alpha).clamp_min(tiny)  # so that groups are right relative to each other
    p, q = (torch.einsum("gk,kgij->gij", w[..., 0], torch.stack(m)) for w, m in ((alpha, inputs), (beta, outputs)))
    return Kronecker(p, q)


def _inner_products(factors: Tensor, tiny: float) -> Tensor:
    """Those of K factors (K, groups, n, n): (groups, K, K), in a unit of each group's own, lest squares underflow."""
    factors = factors / factors.abs().amax((0, 2, 3), keepdim=True).clamp_min(tiny)
    return torch.einsum("kgij,lgij->gkl", factors, factors)


def _both(block: Kronecker) -> tuple[Tensor | None, Tensor | None]:
    return block.inputs, block.outputs


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)
