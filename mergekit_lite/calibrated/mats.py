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

**The start matters.** Where no task has any curvature, the system says nothing and the merge stays where it began
(with a preconditioner it is free to move there); and whoever stops early stays near the start altogether. The paper
starts from other merges.

**What the released code does differently.** It starts from task arithmetic (scale 0.3) in its examples, multiplies in
float32 and leaves the tolerance at its library's 1e-5, without a preconditioner; all biases and normalisation
parameters are averaged. Here float64 is the default, a block can be given for any tensor, and residuals can be watched.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import islice

import torch
from torch import Tensor

from mergekit_lite.calibrated.blocks import Block, Curvatures, LinearMap, blocks_of, in_order
from mergekit_lite.calibrated.conjugate_gradient import conjugate_gradient
from mergekit_lite.calibrated.preconditioners import PRECONDITIONERS, approximate_inverse
from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import count, not_negative
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors, float64

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
        preconditioner: ``"none"``, ``"jacobi"`` (the diagonal), or ``"kronecker"`` (the nearest product; for a tensor
            with blocks of another form, the diagonal).
        dtype: to compute in; float32 is faster and ends at residuals of about 1e-6.
        watch: is called as ``watch(name, step, tau, residual)`` before the first and after every step.

    Returns:
        The merged state dict.

    Raises:
        ValueError: not K curvatures, another preconditioner, negative numbers, a block or an `init` of another shape.
        KeyError: a curvature belongs to another model, only some experts have one for a tensor, or `init` lacks one.
        TypeError: a preconditioner for linear functions of which only products are known.
    """
    if preconditioner not in PRECONDITIONERS:
        raise ValueError(f"preconditioner must be one of {', '.join(PRECONDITIONERS)}; got '{preconditioner}'.")
    iterations = count("iterations", iterations)
    not_negative("tolerance", tolerance)
    ordered = in_order(tv, curvatures)

    def merge(name: str, taus: Tensor) -> Tensor:
        exact = taus.to(dtype)
        blocks = _in_one_unit(blocks_of(name, ordered))
        if not blocks:
            return taus.mean(0)
        blocks = [block.to(exact) if isinstance(block, Block) else block for block in blocks]
        start = exact.mean(0) if init is None else _start(init, name, tv.base[name]).to(exact)

        def curved(v: Tensor) -> Tensor:
            return reduce(torch.add, (block(v) for block in blocks))

        right = reduce(torch.add, (block(tau) for block, tau in zip(blocks, exact, strict=True)))
        inverse = approximate_inverse(blocks, start, preconditioner)
        steps = conjugate_gradient(curved, right, start, precondition=inverse)
        for step, (tau, residual) in enumerate(islice(steps, iterations + 1)):
            if watch is not None:
                watch(name, step, tau, residual)
            if residual <= tolerance:
                break
        return tau.to(taus)

    return tv.map(merge)


def _in_one_unit(blocks: Sequence[LinearMap]) -> Sequence[LinearMap]:
    """The blocks over their largest trace, which changes no merge: in float32, squares below 1e-38 would be zero."""
    known = [block for block in blocks if isinstance(block, Block)]
    largest = max((block.trace() for block in known), default=0.0)
    return [block.scaled(1 / largest) for block in known] if largest > 0 and len(known) == len(blocks) else blocks


def _start(init: Mapping[str, Tensor], name: str, theta0: Tensor) -> Tensor:
    """The task vector of the state dict to start from."""
    if name not in init:
        raise KeyError(f"the state dict to start from lacks '{name}'.")
    if init[name].shape != theta0.shape:
        shapes = f"{tuple(init[name].shape)} instead of {tuple(theta0.shape)}"
        raise ValueError(f"in the state dict to start from, '{name}' has shape {shapes}.")
    return float64(init[name]) - float64(theta0)
