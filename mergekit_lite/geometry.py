"""The geometry of task vectors: how long they are and where they point."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lite.task_vectors import TaskVectors


def cosines(tv: TaskVectors) -> Tensor:
    r"""The K x K matrix of cosines :math:`G_{ij} / \sqrt{G_{ii} G_{jj}}` between whole task vectors, in float64.

    A zero task vector has no direction; its cosines with the others are 0, with itself 1.
    """
    gram = tv.gram()
    lengths = gram.diagonal().sqrt()
    safe = torch.where(lengths > 0, lengths, 1.0)
    return (gram / safe.outer(safe)).fill_diagonal_(1.0)


def largest_cosine(tv: TaskVectors) -> float:
    """The largest |cosine| between two different task vectors (0 for a single one)."""
    matrix = cosines(tv)
    return float((matrix - torch.eye(len(tv), dtype=matrix.dtype)).abs().max())
