"""Order statistics of vectors too long to sort: the exact k-th smallest entry, in a few passes and little memory.

Trimming methods keep the largest entries of a whole task vector, so they need the entry at a given rank among 10^8.
Sorting costs a hundred times as much as reading, and a copy of each vector besides. Instead

1. a regular sample of 2^16 entries says roughly where the entry lies: in a bracket around the same quantile;
2. one pass counts the entries below the bracket, and how often each value inside it stands in the vector. Adding the
   counts up from below leads to the entry at the wanted rank, exactly.

There are few values to be counted, because a float's bits, read as a whole number, are in the float's own order (with
the negative ones turned around): between two floats that are one per cent apart there are 2^17 others. A bracket with
more than 2^20 is cut into 2^16 bins and the right one searched again. If the sample misled, the counts show it, and the
search goes on beside the bracket. The memory is 2^20 counts at most for each vector and rank, however long the vectors
are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lite.numerics.precision import computing_dtype
from mergekit_lite.task_vectors import TaskVectors

SAMPLE = 1 << 16  # entries per vector
# Half the bracket's width, as a share of all entries. A quantile of the sample misses by .002 at most (one
# standard deviation, in the middle), so the first bracket fails about once in 500 times.
MARGIN = 0.006
BINS = 1 << 20  # values that are counted one by one
FEW = 1 << 16
WHOLE = {torch.float32: torch.int32, torch.float64: torch.int64}  # as many bits


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
        Shape (len(ranks), K), in the vectors' dtype (float64 where tensors differ), on the CPU.

    Raises:
        ValueError: there are no weights, or a rank outside 1..d.
    """
    d = vectors.dimension
    if d == 0:
        raise ValueError("these models have no floating-point tensors with weights, so there is nothing to rank.")
    if not all(1 <= k <= d for k in ranks):
        raise ValueError(f"ranks must lie between 1 and {d}, the number of weights; got {list(ranks)}.")
    sample = _sample(vectors)
    searches = [_Search(row, k, d) for k in ranks for row in sample]
    while open_ones := [(i % len(sample), search) for i, search in enumerate(searches) if search.is_open]:
        for _, piece in vectors.pieces():
            rows = piece.to(sample.dtype)
            for k, search in open_ones:
                search.count(rows[k])
        for _, search in open_ones:
            search.narrow()
    return torch.stack([search.entry for search in searches]).view(len(ranks), len(sample))


def _sample(vectors: TaskVectors) -> Tensor:
    """About 2^16 entries of each vector at a regular distance, and its least and its largest, sorted: (K, m)."""
    d = vectors.dimension
    step = max(1, d // SAMPLE) | 1  # odd, so as not to fall into step with the widths of layers
    # One block from the start: small ones, made between large pieces, would keep the memory of all pieces in use.
    sample = torch.empty(len(vectors), -(-d // step) + 2, dtype=_dtype(vectors))
    sample[:, 0], sample[:, 1] = torch.inf, -torch.inf
    seen, taken = 0, 2
    for _, piece in vectors.pieces():
        part = piece[:, -seen % step :: step]
        sample[:, taken : taken + part.shape[1]] = part
        torch.minimum(sample[:, 0], piece.amin(1).to(sample), out=sample[:, 0])
        torch.maximum(sample[:, 1], piece.amax(1).to(sample), out=sample[:, 1])
        seen, taken = seen + piece.shape[1], taken + part.shape[1]
    return sample.sort(dim=1).values


def _dtype(vectors: TaskVectors) -> torch.dtype:
    """float64 if any tensor is."""
    return max((computing_dtype(vectors.base.dtype(name)) for name in vectors.tensor_names), key=lambda d: d.itemsize)


class _Search:
    """The search for one entry of one vector: the values from `low` up to (not with) `high` are candidates."""

    def __init__(self, sample: Tensor, rank: int, d: int) -> None:
        """Around the sample's entries (m,), sorted, at the same share of the way as the rank among d."""
        m, self.dtype, self.rank = len(sample), sample.dtype, rank
        self.counter = torch.int32 if d < 1 << 31 else torch.int64
        first, last = int((rank / d - MARGIN) * m), int((rank / d + MARGIN) * m) + 1
        first, last = (0, 0) if rank == 1 else (m - 1, m - 1) if rank == d else (max(0, first), min(last, m - 1))
        self.least, self.most = int(_ordered(sample[0])), int(_ordered(sample[-1]))
        self.low, self.high = int(_ordered(sample[first])), int(_ordered(sample[last])) + 1
        self.is_open = rank not in (1, d)  # those are known already
        self._begin()

    def _begin(self) -> None:
        if self.high == 0:
            self.high = -1  # that is the place of -0, which counts as 0
        width = self.high - self.low
        # A bracket that is too wide for a count of each value needs another pass in any case, so a few bins will do.
        self.shift = 0 if width <= BINS else width.bit_length() - FEW.bit_length() + 1
        self.first_bin, last_bin = self.low >> self.shift, (self.high - 1) >> self.shift
        self.counts, self.below = torch.zeros(last_bin - self.first_bin + 1, dtype=self.counter), 0
        self.bounds = float(_float(self.low, self.dtype)), float(_float(self.high - 1, self.dtype))

    @property
    def entry(self) -> Tensor:
        """The lowest candidate: the entry, once the search is not open any more."""
        return _float(self.low, self.dtype)

    def count(self, row: Tensor) -> None:
        """Take entries (n,) into account."""
        low, high = self.bounds
        above = row >= low
        self.below += len(row) - int(above.count_nonzero())
        inside = row[above & (row <= high)].cpu()
        bins = (_ordered(inside).long() >> self.shift) - self.first_bin
        self.counts.index_add_(0, bins, torch.ones_like(bins, dtype=self.counter))

    def narrow(self) -> None:
        """Keep the candidates among which the counts say that the entry is."""
        upto = self.below + self.counts.cumsum(0, dtype=torch.int64)
        if self.rank <= self.below:  # the sample misled
            self.low, self.high = self.least, self.low
        elif self.rank > upto[-1]:
            self.low, self.high = self.high, self.most + 1
        else:
            found = self.first_bin + int((upto < self.rank).sum())
            self.low, self.high = max(self.low, found << self.shift), min(self.high, (found + 1) << self.shift)
            self.is_open = self.high - self.low > 1  # one candidate, and the counts agree
        self._begin()


def _ordered(floats: Tensor) -> Tensor:
    """Floats as whole numbers of the same order; -0 counts as 0."""
    return _turned((floats + 0.0).view(WHOLE[floats.dtype]))


def _float(whole: int, dtype: torch.dtype) -> Tensor:
    """The float that `_ordered` made a whole number of."""
    return _turned(torch.tensor(whole, dtype=WHOLE[dtype])).view(dtype)


def _turned(bits: Tensor) -> Tensor:
    """Negative floats' bits rise with their magnitude: all but the sign are flipped. Its own inverse."""
    return bits ^ ((bits >> (bits.element_size() * 8 - 1)) & torch.iinfo(bits.dtype).max)
