r"""Conjugate gradients: solve A x = b when all one can do with A is to multiply by it.

Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952; with a preconditioner as in
Saad, "Iterative methods for sparse linear systems", 2003, algorithm 9.1. For a symmetric A without negative
eigenvalues, solving is finding the bottom of the bowl :math:`\tfrac12 x^\top A x - b^\top x`. Steepest descent goes to
and fro between its walls. Conjugate gradients take each step in a direction p that is *conjugate* to all before
(:math:`p^\top A p' = 0`), so that no step undoes an earlier one: after n steps x is the lowest point that n products
with A can reach. With condition number :math:`\kappa` the error, measured by A, falls at least as fast as
:math:`2\,\big( (\sqrt\kappa - 1) / (\sqrt\kappa + 1) \big)^n`.

A preconditioner is a cheap approximation of :math:`A^{-1}`: the nearer, the rounder the bowl.

If A has zero eigenvalues, there are many solutions. Without a preconditioner x moves only where A has an effect, to the
solution nearest to the start; with one, to another solution.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

LinearMap = Callable[[Tensor], Tensor]


def conjugate_gradient(
    apply: LinearMap, b: Tensor, x: Tensor, *, precondition: LinearMap | None = None
) -> Iterator[tuple[Tensor, float]]:
    r"""Yield the start and its residual, then both after each step; ends when no step is left to take.

    Args:
        apply: :math:`p \mapsto A p`, symmetric and without negative eigenvalues, for tensors of b's shape.
        b: the right-hand side, of any shape.
        x: the start, of the same shape; it is not changed.
        precondition: :math:`r \mapsto M^{-1} r`, symmetric and positive.

    Yields:
        x and the relative residual :math:`\|b - A x\| / \|b\|` (as the recurrence keeps it).
    """
    precondition = precondition or (lambda residual: residual)
    size = float(b.norm()) or 1.0
    residual = b - apply(x)
    steepest = precondition(residual)
    direction, height = steepest, inner(residual, steepest)
    while True:
        yield x, float(residual.norm()) / size
        product = apply(direction)
        curvature = inner(direction, product)
        if height <= 0 or curvature <= 0:  # the bottom is reached, or the bowl is flat along the direction
            return
        step = height / curvature
        x = x + step * direction
        residual = residual - step * product
        steepest = precondition(residual)
        before, height = height, inner(residual, steepest)
        direction = steepest + (height / before) * direction


def inner(a: Tensor, b: Tensor) -> float:
    """The inner product of two tensors of one shape."""
    return float((a * b).sum())
