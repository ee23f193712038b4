r"""Curvature, tensor by tensor: how much it costs a task to move a weight away from its expert.

Near its expert :math:`\theta_m` the loss of task m is about a quadratic bowl,

.. math:: \ell_m(\theta) \approx \ell_m(\theta_m) + \tfrac12 (\theta - \theta_m)^\top C_m (\theta - \theta_m) .

:math:`C_m` has a row and a column per weight, too many to write down. What can be written down is one *block* per
tensor of the model, weights of different tensors being taken as independent, and each block in one of two forms:

- `Diagonal`: a number per weight;
- `Kronecker`: two small matrices, one for the layer's inputs and one for its outputs.

A block is a function: it takes V, of the tensor's shape, and returns C V. So merging methods can also be given any
other linear function that is symmetric and never negative (:math:`\langle V, C V \rangle \ge 0`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_lite.checkpoints import CheckpointError, PathLike, load, save
from mergekit_lite.checks import not_negative, number
from mergekit_lite.task_vectors import TaskVectors

LinearMap = Callable[[Tensor], Tensor]

# Eigenvalues below this share of the largest are rounding errors of zero.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Diagonal:
    """A number per weight: every weight is a bowl of its own.

    Attributes:
        values: of the tensor's shape, not negative.

    Raises:
        ValueError: a number is negative; a bowl that opens downwards has no lowest point.
    """

    values: Tensor

    def __post_init__(self) -> None:
        if (self.values < 0).any():
            raise ValueError(f"a curvature must not be negative; its smallest number is {self.values.min():.3g}.")

    def __call__(self, v: Tensor) -> Tensor:
        """C V: every entry times its number."""
        return self.values.to(v) * v

    def diagonal(self, like: Tensor) -> Tensor:
        """The matrix's diagonal, in the shape of a tensor `like` the weight."""
        return self.values

    def fits(self, shape: torch.Size) -> bool:
        """Whether a weight of this shape can be multiplied."""
        return self.values.shape == shape

    def to(self, like: Tensor) -> Diagonal:
        """This block in the dtype and on the device of a tensor."""
        return Diagonal(self.values.to(like))

    def trace(self) -> float:
        """The sum of the diagonal."""
        return float(self.values.sum())

    def scaled(self, factor: float) -> Diagonal:
        """This block times a number."""
        return Diagonal(self.values * factor)

    def mixed(self, share: float) -> Diagonal:
        """Itself: there is nothing beside the diagonal to be made smaller."""
        return self

    def damped(self, damping: float) -> Diagonal:
        """With `damping` times its mean added to every number."""
        return Diagonal(self.values + damping * self.values.mean())

    def inverse(self) -> Diagonal:
        """The pseudo-inverse: a zero stays zero."""
        inverse = 1 / self.values
        return Diagonal(torch.where(torch.isfinite(inverse), inverse, 0.0))

    def factors(self) -> dict[str, Tensor]:
        """What is written to a file."""
        return {"diagonal": self.values}


@dataclass(frozen=True)
class Kronecker:
    r"""A Kronecker product of two small matrices, never multiplied out: :math:`C = A \otimes B`, and C V = B V A.

    V is the weight as a matrix, outputs x inputs. A grouped convolution is several independent layers side by side,
    each with matrices of its own, so both have an axis of groups (of length 1 for all other layers).

    Attributes:
        inputs: A, shape (groups, i, i), i = how many numbers one output sees; the identity, if None.
        outputs: B, shape (groups, o, o), o = outputs of a group; the identity, if None.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def __post_init__(self) -> None:
        for name, factor in self.factors().items():
            if factor.ndim != 3 or factor.shape[1] != factor.shape[2]:
                raise ValueError(f"the factor '{name}' must have shape (groups, n, n); it has {tuple(factor.shape)}.")
        if len({len(factor) for factor in self.factors().values()}) != 1:
            raise ValueError("a Kronecker block needs at least one factor, and both with as many groups.")

    @property
    def groups(self) -> int:
        """How many independent layers the tensor is made of."""
        return len(next(iter(self.factors().values())))

    def matrices(self, v: Tensor) -> Tensor:
        """A tensor of the weight's shape as matrices (groups, o, i)."""
        return v.reshape(self.groups, len(v) // self.groups, -1)

    def fits(self, shape: torch.Size) -> bool:
        """Whether a weight of this shape can be multiplied."""
        if not shape or shape[0] % self.groups:
            return False
        width, height = shape[1:].numel(), shape[0] // self.groups
        wanted = {"inputs": width, "outputs": height}
        return all(factor.shape[1] == wanted[name] for name, factor in self.factors().items())

    def __call__(self, v: Tensor) -> Tensor:
        """C V = B V A, group by group."""
        product = self.matrices(v)
        if self.outputs is not None:
            product = self.outputs.to(v) @ product
        if self.inputs is not None:
            product = product @ self.inputs.to(v)
        return product.reshape(v.shape)

    def diagonal(self, like: Tensor) -> Tensor:
        """The matrix's diagonal, in the shape of a tensor `like` the weight: products of both factors' diagonals."""
        matrix = self.matrices(torch.ones_like(like))
        if self.outputs is not None:
            matrix = matrix * self.outputs.diagonal(dim1=1, dim2=2).unsqueeze(2)
        if self.inputs is not None:
            matrix = matrix * self.inputs.diagonal(dim1=1, dim2=2).unsqueeze(1)
        return matrix.reshape(like.shape)

    def to(self, like: Tensor) -> Kronecker:
        """This block in the dtype and on the device of a tensor."""
        return self._each(lambda m: m.to(like))

    def trace(self) -> float:
        """The sum of the diagonal: group by group, the product of both traces (1 for a factor that is missing)."""
        traces = [factor.diagonal(dim1=1, dim2=2).sum(1) for factor in self.factors().values()]
        return float(torch.stack(traces).prod(0).sum())

    def scaled(self, factor: float) -> Kronecker:
        """This block times a number."""
        name, first = next(iter(self.factors().items()))
        return replace(self, **{name: first * factor})

    def mixed(self, share: float) -> Kronecker:
        r"""Each factor M as share · M + (1 − share) · diag(M): everything beside the diagonal is made smaller."""
        return self._each(lambda m: share * m + (1 - share) * torch.diag_embed(m.diagonal(dim1=1, dim2=2)))

    def damped(self, damping: float) -> Kronecker:
        """With `damping` times its mean eigenvalue added to each factor's diagonal."""

        def lift(factor: Tensor) -> Tensor:
            mean = factor.diagonal(dim1=1, dim2=2).mean(1)
            return factor + damping * mean[:, None, None] * torch.eye(factor.shape[1]).to(factor)

        return self._each(lift)

    def inverse(self) -> Kronecker:
        """The pseudo-inverse: that of a product is the product of both."""
        return self._each(pseudo_inverse)

    def _each(self, f: LinearMap) -> Kronecker:
        return Kronecker(**{name: f(factor) for name, factor in self.factors().items()})

    def is_upright(self) -> bool:
        """Whether no factor has a negative number on its diagonal, as no mean of squares is negative."""
        return all(bool((factor.diagonal(dim1=1, dim2=2) >= 0).all()) for factor in self.factors().values())

    def factors(self) -> dict[str, Tensor]:
        """What is written to a file."""
        both = {"inputs": self.inputs, "outputs": self.outputs}
        return {name: factor for name, factor in both.items() if factor is not None}


Block = Diagonal | Kronecker


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """The pseudo-inverse of symmetric matrices (..., n, n) without negative eigenvalues; `NEGLIGIBLE` ones are zero."""
    rtol = max(NEGLIGIBLE, 10 * torch.finfo(matrix.dtype).eps)
    return torch.linalg.pinv(matrix, hermitian=True, rtol=rtol)


class Curvature(Mapping[str, Block]):
    """The curvature of one task's loss around its expert: a block for each tensor that statistics were gathered for.

    Args:
        blocks: by tensor name, as in the state dict.

    Raises:
        ValueError: a block has NaN or infinite entries, or negative ones on its diagonal.

    Examples:
        >>> curvature = Curvature({"w": Diagonal(torch.tensor([1.0, 3.0]))})
        >>> curvature["w"](torch.tensor([2.0, 2.0]))
        tensor([2., 6.])
        >>> curvature.damped(0.5)["w"].values
        tensor([2., 4.])
    """

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        for name, block in blocks.items():
            if not all(torch.isfinite(factor).all() for factor in block.factors().values()):
                raise ValueError(f"the curvature of '{name}' has NaN or infinite entries: were the losses finite?")
            if isinstance(block, Kronecker) and not block.is_upright():
                raise ValueError(f"the curvature of '{name}' has negative numbers on a factor's diagonal.")
        self._blocks = dict(blocks)

    def __getitem__(self, name: str) -> Block:
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        diagonal = sum(isinstance(block, Diagonal) for block in self.values())
        numbers = sum(factor.numel() for block in self.values() for factor in block.factors().values())
        return f"Curvature({len(self) - diagonal} Kronecker and {diagonal} diagonal blocks, {numbers:,} numbers)"

    def __mul__(self, factor: float) -> Curvature:
        """Every block times a number: how much this task counts in a merge."""
        not_negative("a task's weight", factor)
        return Curvature({name: block.scaled(factor) for name, block in self.items()})

    __rmul__ = __mul__

    def normalised(self) -> Curvature:
        """Divided by its trace: all its diagonals' numbers add up to 1 (a missing factor counting as a single 1).

        Curvatures of different experts are of very different size, as a task's loss is where its expert stands. So
        normalised, every task has the same say.

        Raises:
            ValueError: the curvature is zero everywhere.
        """
        trace = sum(block.trace() for block in self.values())
        if not trace > 0:
            raise ValueError("this curvature is zero everywhere, so it has no size to be divided by.")
        return self * (1 / trace)

    def mixed(self, share: float) -> Curvature:
        """With entries beside the diagonals of all factors times `share`: 1 changes nothing, 0 leaves the diagonals.

        Raises:
            ValueError: a share outside [0, 1].
        """
        if not 0 <= number("share", share) <= 1:
            raise ValueError(f"the share of what stands beside the diagonal must lie in [0, 1]; got {share}.")
        return Curvature({name: block.mixed(share) for name, block in self.items()})

    def damped(self, damping: float) -> Curvature:
        """With a multiple of the identity added to every factor, `damping` times the factor's mean eigenvalue.

        Raises:
            ValueError: a negative or infinite damping.
        """
        not_negative("damping", damping)
        return Curvature({name: block.damped(damping) for name, block in self.items()})

    def save(self, path: PathLike) -> None:
        """Write all blocks to a safetensors file, atomically."""
        save({f"{name}:{part}": m for name, block in self.items() for part, m in block.factors().items()}, path)

    @classmethod
    def load(cls, path: PathLike) -> Curvature:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or holds something else.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for key, factor in load(path).items():
            name, _, part = key.rpartition(":")
            parts.setdefault(name, {})[part] = factor
        try:
            return cls({n: Diagonal(f["diagonal"]) if "diagonal" in f else Kronecker(**f) for n, f in parts.items()})
        except TypeError as problem:
            raise CheckpointError(f"'{path}' holds no curvature, as Curvature.save writes it.") from problem


# ---------------------------------------------------------------- the curvatures of K experts

Curvatures = Mapping[str, Mapping[str, LinearMap]] | Sequence[Mapping[str, LinearMap]]


def in_order(tv: TaskVectors, curvatures: Curvatures) -> list[Mapping[str, LinearMap]]:
    """The K experts' curvatures in the order of the task vectors.

    Args:
        tv: K task vectors.
        curvatures: K in the same order, or by the task vectors' names.

    Raises:
        ValueError: not K of them, or a block for a tensor of another shape.
        KeyError: an expert has none, or they are for a tensor that the model does not have.
    """
    if isinstance(curvatures, Mapping):
        missing = [name for name in tv.names if name not in curvatures]
        if missing:
            raise KeyError(f"no curvature for the expert '{missing[0]}'; there is one for {', '.join(curvatures)}.")
        curvatures = [curvatures[name] for name in tv.names]
    if len(curvatures) != len(tv):
        raise ValueError(f"{len(tv)} experts need as many curvatures; got {len(curvatures)}.")
    for curvature in curvatures:
        for name, block in curvature.items():
            if name not in tv.base:
                raise KeyError(f"the curvature has a block for '{name}', which is no tensor of the model.")
            if isinstance(block, Block) and not block.fits(shape := tv.base[name].shape):
                raise ValueError(f"the curvature's block for '{name}' does not fit weights of shape {tuple(shape)}.")
    return list(curvatures)


def blocks_of(name: str, curvatures: Sequence[Mapping[str, LinearMap]]) -> list[LinearMap]:
    """The K experts' blocks for one tensor; none, if no statistics were gathered for it.

    Raises:
        KeyError: some experts have a block and others do not.
    """
    blocks = [curvature[name] for curvature in curvatures if name in curvature]
    if blocks and len(blocks) < len(curvatures):
        raise KeyError(f"only {len(blocks)} of {len(curvatures)} experts have a curvature for '{name}'.")
    return blocks
