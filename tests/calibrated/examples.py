"""What the tests of calibrated merging share: random layers and curvatures, and blocks as dense matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor

import mergekit_lite as mkl
from tests.data_free.test_tsv import random

# Shapes of weights and how many groups they have: linear, 1x1, convolution, grouped, depthwise.
SHAPES = [((6, 5), 1), ((4, 3, 1, 1), 1), ((4, 2, 3, 3), 1), ((6, 2, 2, 2), 3), ((5, 1, 3, 3), 5)]


def gram(groups: int, n: int, *, rank: int | None = None, seed: int = 0) -> Tensor:
    """A random symmetric matrix for each group, with positive eigenvalues, or `rank` of them and else zeros."""
    vectors = random(groups, n, n + 2 if rank is None else rank, seed=seed)
    return vectors @ vectors.mT / vectors.shape[-1]


def kronecker(shape: Sequence[int], groups: int = 1, *, rank: int | None = None, seed: int = 0) -> mkl.Kronecker:
    """A random block with both factors for a weight of this shape; `rank` is that of the inputs' factor."""
    inputs = gram(groups, torch.Size(shape[1:]).numel(), rank=rank, seed=2 * seed)
    return mkl.Kronecker(inputs, gram(groups, shape[0] // groups, seed=2 * seed + 1))


def written_out(block: mkl.Diagonal | mkl.Kronecker, shape: Sequence[int]) -> Tensor:
    """The block as one matrix, which acts on the weight's entries in the order of `flatten`."""
    if isinstance(block, mkl.Diagonal):
        return torch.diag(block.values.flatten())
    width = torch.Size(shape[1:]).numel()
    ones = [torch.eye(size, dtype=torch.float64).expand(block.groups, -1, -1) for size in (width, shape[0])]
    a = ones[0] if block.inputs is None else block.inputs
    b = ones[1][:, : shape[0] // block.groups, : shape[0] // block.groups] if block.outputs is None else block.outputs
    return torch.block_diag(*(torch.kron(b_group, a_group) for a_group, b_group in zip(a, b, strict=True)))


def layer(*experts: Tensor, base: Tensor | None = None) -> mkl.TaskVectors:
    """Task vectors of models with one weight "w"; the base is random, as merges here depend on experts alone."""
    base = random(*experts[0].shape, seed=99).to(experts[0].dtype) if base is None else base
    return mkl.TaskVectors({"w": base}, [{"w": expert} for expert in experts])


def of(*blocks: object) -> list[dict[str, object]]:
    """Curvatures of K models with one weight "w"."""
    return [{"w": block} for block in blocks]
