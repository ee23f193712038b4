"""Cutting tensors into pieces small enough for a core's cache.

Several steps on a piece then cost hardly more than reading it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 1 << 16  # weights per piece: K = 8 of them in float32 are 2 MB


class Place(NamedTuple):
    """Where a piece lies: in which tensor, and how many of that tensor's weights stand before it."""

    name: str
    start: int


PieceFunction = Callable[[Place, Tensor], Tensor]


def size_of_piece(weights: int, device: torch.device) -> int:
    """How many weights there are in a piece; on an accelerator, where small pieces would be slow, all."""
    return PIECE if device.type == "cpu" else max(1, weights)


def places(name: str, weights: int, device: torch.device) -> Iterator[tuple[Place, int]]:
    """The pieces of a tensor with so many weights, and where each ends in the flattened tensor."""
    size = size_of_piece(weights, device)
    for start in range(0, weights, size):
        yield Place(name, start), min(start + size, weights)


def rows(taus: Tensor) -> Tensor:
    """(K, *shape) as (K, n), also where there is no axis or no entry."""
    return taus.reshape(len(taus), taus[0].numel())


def in_pieces(f: PieceFunction, name: str, taus: Tensor) -> Tensor:
    """A function of pieces applied to a whole tensor (K, *shape): (K', *shape)."""
    flat = rows(taus)
    done = [f(place, flat[:, place.start : stop]) for place, stop in places(name, flat.shape[1], flat.device)]
    return torch.cat(done, dim=1).view(-1, *taus.shape[1:]) if done else taus
