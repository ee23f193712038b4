"""Order statistics of vectors too long to sort: the exact k-th smallest entry, in two passes and little memory.

Trimming methods keep the largest entries of a whole task vector, so they need the entry at a given rank among
10^8. Sorting costs a hundred times as much as reading, and a copy of each vector besides. Instead

1. a regular sample of 2^16 entries says roughly where the entry lies: in a bracket around the same quantile;
2. one pass counts the entries below the bracket and collects those inside, about 1 % of all. The entry is found
   among these by its rank, exactly; and if the sample misled, the counts show it and the bracket is widened.

"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lite.task_vectors import TaskVectors

SAMPLE = 1 << 16  # entries per vector
# Half the bracket's width, as a share of all entries. A quantile of the sample misses by .002 at most (one
# standard deviation, in the middle), so the first bracket fails about once in 500 times.
MARGIN = 0.006


def magnitudes(tv: TaskVectors) -> TaskVectors:
    """The task vectors' absolute values, entry by entry."""
    return tv.transform_pieces(lambda place, taus: taus.abs_())


def rank_of(q: float, n: int) -> int:
    """The rank, from 1 to n, of the q-quantile of n entries: round(q n)."""
    return min(n, max(1, round(q * n)))


def kth_smallest(vectors: TaskVectors, ranks: Sequence[int]) -> Tensor:
    """The k-th smallest entry of each of K vectors, exactly, for each k of `ranks`.

    Args:
        vectors: K vectors of length d; `TaskVectors` made by `transform_pieces` hold any vectors.
        ranks: numbers k between 1 (the smallest entry) and d (the largest).

    Returns:
        Shape (len(ranks), K), in the vectors' dtype, on the CPU.

    Raises:
        ValueError: a rank outside 1..d.
    """
    d = vectors.dimension
    if not all(1 <= k <= d for k in ranks):
        raise ValueError(f"ranks must lie between 1 and {d}, the number of weights; got {list(ranks)}.")
    sample, margin = _sample(vectors), MARGIN
    while True:
        brackets = [_Bracket(sample, k, d, margin) for k in ranks]
        for _, piece in vectors.pieces():
            for bracket in brackets:
                bracket.count(piece)
        entries = torch.stack([bracket.entry() for bracket in brackets])
        if all(bracket.holds() for bracket in brackets) or _have_ranks(vectors, entries, ranks):
            return entries
        margin *= 8  # from 1 on the bracket holds everything


def _sample(vectors: TaskVectors) -> Tensor:
    """About 2^16 entries of each vector at a regular distance, sorted: (K, m)."""
    step = max(1, vectors.dimension // SAMPLE) | 1  # odd, so as not to fall into step with the widths of layers
    seen, parts = 0, []
    for _, piece in vectors.pieces():
        parts.append(piece[:, -seen % step :: step].clone().cpu())
        seen += piece.shape[1]
    return torch.cat(parts, dim=1).sort(dim=1).values


class _Bracket:
    """An open interval for each of K vectors, how many entries lie below it, and those that lie in it."""

    def __init__(self, sample: Tensor, rank: int, d: int, margin: float) -> None:
        """Around the sample's (K, m) entries at the same share of the way as the rank among d."""
        tasks, m = sample.shape
        first, last = int((rank / d - margin) * m), int((rank / d + margin) * m) + 1
        infinite = torch.full_like(sample[:, 0], torch.inf)
        self.rank = rank
        self.low = sample[:, first] if first > 0 else -infinite
        self.high = sample[:, last] if last < m else infinite
        self.below = [0] * tasks
        self.inside: list[list[Tensor]] = [[] for _ in range(tasks)]

    def count(self, piece: Tensor) -> None:
        """Take a piece (K, n) into account."""
        for i, (row, low, high) in enumerate(zip(piece, self.low.tolist(), self.high.tolist(), strict=True)):
            above = row > low
            self.below[i] += len(row) - int(above.count_nonzero())
            self.inside[i].append(row[above & (row < high)].cpu())

    def holds(self) -> bool:
        """Whether all K entries of this rank lie inside."""
        sizes = [sum(map(len, parts)) for parts in self.inside]
        return all(0 < self.rank - below <= size for below, size in zip(self.below, sizes, strict=True))

    def entry(self) -> Tensor:
        """The K entries of this rank; where one does not lie inside, the nearest end."""
        found = []
        for low, high, below, parts in zip(self.low, self.high, self.below, self.inside, strict=True):
            inside, k = torch.cat(parts), self.rank - below
            found.append(low if k < 1 else high if k > len(inside) else inside.kthvalue(k).values)
        return torch.stack(found)


def _have_ranks(vectors: TaskVectors, entries: Tensor, ranks: Sequence[int]) -> bool:
    """Whether entries (R, K) have the ranks: an end of a bracket may, if it stands in the vector many times (as 0)."""
    below, upto = torch.zeros(entries.shape, dtype=torch.long), torch.zeros(entries.shape, dtype=torch.long)
    for _, piece in vectors.pieces():
        for i, entry in enumerate(entries.to(piece)):
            below[i] += (piece < entry[:, None]).sum(1).cpu()
            upto[i] += (piece <= entry[:, None]).sum(1).cpu()
    rank = torch.tensor(ranks)[:, None]
    return bool(((below < rank) & (rank <= upto)).all())
