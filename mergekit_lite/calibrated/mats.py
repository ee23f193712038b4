r"""MaTS: merging as one linear system, whatever is known about the tasks' curvature.

Tam, Bansal and Raffel, "Merging by matching models in task parameter subspaces", TMLR 2024 (arXiv:2312.04339). Let
:math:`C_k` tell how much a move away from expert k costs its task. The cheapest weights for all tasks together,

.. math:: \min_\theta \; \sum_k (\theta - \theta_k)^\top C_k\, (\theta - \theta_k)
   \quad\Longleftrightarrow\quad \Big( \sum_k C_k \Big)\, \theta = \sum_k C_k\, \theta_k ,

are the experts' average for :math:`C_k = I`, Fisher merging for a diagonal, RegMean for the Gram matrix of a layer's
inputs: each of these systems falls apart into small ones with a closed solution. With K-FAC it does not. There
:math:`C_k = A_k \otimes B_k`, the sum of several Kronecker products is none, and written out it has
:math:`(\text{outputs} \times \text{inputs})^2` entries. But to multiply by it is cheap,

.. math:: V \;\mapsto\; \sum_k B_k\, V A_k ,

and multiplying is all that conjugate gradients need. The method's name is from the view that :math:`C_k` picks out the
subspace of directions that matter to a task, in which the merged model is to match the expert.

**Preconditioners.** ``"jacobi"`` divides by the diagonal of :math:`\sum_k C_k`. ``"kronecker"`` takes the one Kronecker
product :math:`P \otimes Q` nearest to the sum (Van Loan and Pitsianis, 1993), whose inverse is
:math:`V \mapsto Q^{-1} V P^{-1}`. With the entries of :math:`A_k` in the columns of a matrix a and those of :math:`B_k`
in b, it is the best approximation of :math:`a b^\top` by a matrix of rank one. Its factors are
:math:`P = \sum_k \alpha_k A_k` and :math:`Q = \sum_k \beta_k B_k`, so all that is needed are the K x K Gram matrices
:math:`a^\top a` and :math:`b^\top b`.

**The start matters.** Where no task has any curvature, the system says nothing and the merge stays where it began; and
whoever stops early stays near it altogether. The paper starts from other merges.

**What the released code does differently.** It starts from task arithmetic (scale 0.3) in its examples, multiplies in
float32 and leaves the tolerance at its library's 1e-5, without a preconditioner; all biases and normalisation
parameters are averaged. Here float64 is the default, a block can be given for any tensor, and residuals can be watched.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from itertools import islice

import torch
from torch import Tensor

from mergekit_lite.calibrated.blocks import Block, Curvatures, Diagonal, Kronecker, LinearMap, blocks_of, in_order
from mergekit_lite.calibrated.conjugate_gradient import conjugate_gradient
from mergekit_lite.checkpoints import StateDict
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors, float64

PRECONDITIONERS = ("none", "jacobi", "kronecker")
POWER_STEPS = 30  # a preconditioner need not be exact
LEAST_SHARE = 1e-6  # no task is left out of it: where it alone has curvature, no step would be taken
# The name of a tensor, the number of steps, the merged task vector now (the tensor's shape), the relative residual.
Watch = Callable[[str, int, Tensor, float], None]


@method(
    name="MaTS",
    paper="Tam et al., Merging by matching models in task parameter subspaces, TMLR",
    arxiv="2312.04339",
    year=2024,
    need=Need.CALIBRATION,
)
def mats(
    tv: TaskVectors,
    curvatures: Curvatures,
    *,
    init: Mapping[str, Tensor] | None = None,
    iterations: int = 100,
    tolerance: float = 1e-8,
    preconditioner: str = "none",
    dtype: torch.dtype = torch.float64,
    watch: Watch | None = None,
) -> StateDict:
    r"""Solve :math:`(\sum_k C_k)\, \theta = \sum_k C_k\, \theta_k` by conjugate gradients, tensor by tensor.

    Args:
        tv: K task vectors.
        curvatures: of every expert, in order or by name: what `kfac`, `input_grams` or `diagonal_fisher` gather, or
            mappings from tensor names to linear functions V -> C V of your own. Tensors that have none are averaged
            (C is the identity).
        init: a state dict to start from, such as another merge; by default the average.
        iterations: steps at most.
        tolerance: stop when the residual :math:`\|b - A x\| / \|b\|` is no larger.
        preconditioner: ``"none"``, ``"jacobi"`` (the diagonal), or ``"kronecker"`` (the product of the mean factors).
        dtype: to compute in; float32 is faster and ends at residuals of about 1e-6.
        watch: is called as ``watch(name, step, tau, residual)`` before the first and after every step.

    Returns:
        The merged state dict.

    Raises:
        ValueError: not K curvatures, another preconditioner, negative numbers, an `init` of another shape.
        KeyError: a curvature belongs to another model, only some experts have one for a tensor, or `init` lacks one.
        TypeError: a preconditioner for linear functions of which only products are known.
    """
    if preconditioner not in PRECONDITIONERS:
        raise ValueError(f"preconditioner must be one of {', '.join(PRECONDITIONERS)}; got '{preconditioner}'.")
    if iterations < 0 or not tolerance >= 0:
        raise ValueError(f"iterations and tolerance must not be negative; got {iterations} and {tolerance}.")
    ordered = in_order(tv, curvatures)

    def merge(name: str, taus: Tensor) -> Tensor:
        exact = taus.to(dtype)
        blocks = [block.to(exact) if isinstance(block, Block) else block for block in blocks_of(name, ordered)]
        if not blocks:
            return taus.mean(0)
        start = exact.mean(0) if init is None else _start(init, name, tv.base[name]).to(exact)

        def curved(v: Tensor) -> Tensor:
            return _sum(block(v) for block in blocks)

        right = _sum(block(tau) for block, tau in zip(blocks, exact, strict=True))
        inverse = approximate_inverse(blocks, start, preconditioner)
        steps = conjugate_gradient(curved, right, start, precondition=inverse)
        for step, (tau, residual) in enumerate(islice(steps, iterations + 1)):
            if watch is not None:
                watch(name, step, tau, residual)
            if residual <= tolerance:
                break
        return tau.to(taus)

    return tv.map(merge)


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
    return Diagonal(_sum(block.diagonal(like) for block in known)).inverse()


def nearest_product(blocks: Sequence[Kronecker]) -> Kronecker:
    """The Kronecker product nearest to the sum of K of them (in the sum of squared entries), group by group.

    Raises:
        ValueError: some blocks have a factor that others lack.
    """
    inputs, outputs = ([f for f in factors if f is not None] for factors in zip(*map(_both, blocks), strict=True))
    if {len(inputs), len(outputs)} - {0, len(blocks)}:
        raise ValueError("the experts' blocks of a tensor must have the same factors.")
    if not inputs or not outputs:  # the sum itself is such a product
        return Kronecker(_sum(inputs) if inputs else None, _sum(outputs) if outputs else None)
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


def _start(init: Mapping[str, Tensor], name: str, theta0: Tensor) -> Tensor:
    """The task vector of the state dict to start from."""
    if name not in init:
        raise KeyError(f"the state dict to start from lacks '{name}'.")
    if init[name].shape != theta0.shape:
        shapes = f"{tuple(init[name].shape)} instead of {tuple(theta0.shape)}"
        raise ValueError(f"in the state dict to start from, '{name}' has shape {shapes}.")
    return float64(init[name]) - float64(theta0)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)
