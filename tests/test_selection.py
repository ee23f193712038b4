"""The exact k-th smallest entry of long vectors, against sorting them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekit_lite as mkl
from mergekit_lite import selection
from mergekit_lite.selection import kth_smallest, magnitudes, rank_of


def in_tensors(rows, cuts=(), dtype=torch.float32):
    """Rows (K, d) as task vectors of a model whose tensors end at the cuts."""
    rows = torch.as_tensor(rows, dtype=dtype)
    parts = rows.tensor_split(list(cuts), dim=1)
    base = {f"t{i}": torch.zeros(part.shape[1], dtype=dtype) for i, part in enumerate(parts)}
    return mkl.TaskVectors(base, [{f"t{i}": part[k] for i, part in enumerate(parts)} for k in range(len(rows))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 1000, 150_000, 299_999, 300_000])
def test_any_rank_of_a_long_vector(k, dtype):
    rows = torch.randn(2, 300_000, generator=torch.Generator().manual_seed(k), dtype=dtype)
    tv = in_tensors(rows, cuts=(7, 7, 100_000, 250_001), dtype=dtype)
    assert torch.equal(kth_smallest(tv, [k])[0], rows.kthvalue(k).values)
    assert torch.equal(kth_smallest(magnitudes(tv), [k])[0], rows.abs().kthvalue(k).values)


def test_several_ranks_at_once():
    rows = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    found = kth_smallest(in_tensors(rows), [10, 500, 990])
    assert torch.equal(found, rows.sort().values[:, [9, 499, 989]].T)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.0, 0.0, 1.0, 3.0]), min_size=1, max_size=40),
    st.integers(1, 40),
)
def test_entries_that_stand_many_times(entries, k):
    k = min(k, len(entries))
    assert kth_smallest(in_tensors([entries]), [k]).item() == sorted(entries)[k - 1]


def test_what_stands_many_times_is_counted_not_collected(monkeypatch):
    # Nine tenths are zero and so is the median: a bracket has the ends 0 and 0, and nothing inside.
    rows = torch.zeros(1, 200_000)
    rows[0, ::10] = 1 + torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    sizes = []
    narrow = selection._Search.narrow
    monkeypatch.setattr(selection._Search, "narrow", lambda self: (sizes.append(len(self.counts)), narrow(self))[1])
    assert kth_smallest(in_tensors(rows), [100_000]).item() == 0.0
    assert sizes == [1]
    assert kth_smallest(in_tensors(rows), [180_001]).item() == rows[rows > 0].min()
    assert 0 < max(sizes) <= selection.BINS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_from_the_smallest_to_the_largest_numbers(dtype):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 5000, generator=generator, dtype=dtype) * 10.0 ** torch.randint(
        -30, 30, (2, 5000), generator=generator
    )
    rows[0, ::3] = 0
    for k in (1, 2, 1700, 2500, 4999, 5000):
        assert torch.equal(kth_smallest(in_tensors(rows, dtype=dtype), [k])[0], rows.kthvalue(k).values)


def test_there_must_be_weights():
    with pytest.raises(ValueError, match="no floating-point tensors"):
        kth_smallest(mkl.TaskVectors({"n": torch.tensor(3)}, [{"n": torch.tensor(4)}]), [1])


def test_a_sample_that_misleads_costs_time_not_truth(monkeypatch):
    rows = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    tv = in_tensors(rows)
    honest = selection._sample(tv)
    monkeypatch.setattr(selection, "_sample", lambda vectors: honest + 0.1)
    assert torch.equal(kth_smallest(tv, [100_000])[0], rows.kthvalue(100_000).values)


def test_the_sample_is_spread_over_all_tensors():
    rows = torch.arange(400_000.0)[None]
    sample = selection._sample(in_tensors(rows, cuts=range(1000, 400_000, 1000)))[0]
    assert 2**15 < len(sample) <= 2**17
    assert len(sample[:-1].diff().unique()) <= 2, "but for both ends"
    assert sample[0] == 0


def test_ranks_of_quantiles():
    assert [rank_of(q, 5) for q in (0.0, 0.2, 0.5, 0.6, 1.0)] == [1, 1, 2, 3, 5]


@pytest.mark.parametrize("k", [0, 6, -1])
def test_ranks_that_do_not_exist(k):
    with pytest.raises(ValueError, match="between 1 and 5"):
        kth_smallest(in_tensors([[5.0, 1.0, 4.0, 2.0, 3.0]]), [k])
