"""TIES-Merging."""

import math

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.ties import disjoint_merge, elect, trim
from tests.test_selection import in_tensors
from tests.test_task_vectors import vectors


def test_by_hand():
    # Kept at density 0.5: (4, -3, ., .) and (., 5, -2, .) and (1, ., ., -6).
    tv = vectors([4.0, -3.0, 0.5, 0.1], [0.1, 5.0, -2.0, 1.0], [1.0, 0.2, 0.3, -6.0])
    # Signs: + (4 + 1), + (5 - 3), -, -. Means over those that agree: 2.5, 5, -2, -6.
    assert mkl.ties(tv, density=0.5)["w"].tolist() == [2.5, 5.0, -2.0, -6.0]
    assert mkl.ties(tv, density=0.5, scale=2.0)["w"].tolist() == [5.0, 10.0, -4.0, -12.0]
    assert mkl.ties(tv, density=0.5, combine="sum")["w"].tolist() == [5.0, 5.0, -2.0, -6.0]


def independent(rows, density, scale):
    """TIES by plain loops over Python floats."""
    kept = []
    for row in rows:
        order = sorted(range(len(row)), key=lambda i: abs(row[i]), reverse=True)
        chosen = set(order[: max(1, round(density * len(row)))])
        kept.append([value if i in chosen else 0.0 for i, value in enumerate(row)])
    signs = [math.copysign(1, sum(column)) if sum(column) else 0 for column in zip(*kept, strict=True)]
    majority = (sum(signs) > 0) - (sum(signs) < 0)
    merged = []
    for column, sign in zip(zip(*kept, strict=True), signs, strict=True):
        agreeing = [v for v in column if v * (sign or majority) > 0]
        merged.append(scale * sum(agreeing) / max(1, len(agreeing)))
    return merged


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("cuts", [(), (100, 101, 400)])
def test_against_loops_in_float64(density, cuts):
    rows = torch.randn(4, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[1, :50] = -rows[0, :50]  # votes that cancel
    merged = mkl.ties(in_tensors(rows, cuts, dtype=torch.float64), density=density, scale=1.5)
    expected = torch.tensor(independent(rows.tolist(), density, 1.5), dtype=torch.float64)
    torch.testing.assert_close(torch.cat(list(merged.values())), expected, rtol=1e-12, atol=1e-15)


def test_pieces_and_tensors_do_not_show():
    """A tensor longer than a piece, cut or not, merges to the same."""
    rows = torch.randn(3, 150_000, generator=torch.Generator().manual_seed(0))
    one, many = mkl.ties(in_tensors(rows)), mkl.ties(in_tensors(rows, cuts=(10, 70_000)))
    assert torch.equal(torch.cat(list(one.values())), torch.cat(list(many.values())))


# ---------------------------------------------------------------- trim


def test_trim_is_over_the_whole_vector_or_per_tensor():
    base = {"small": torch.zeros(2), "large": torch.zeros(2)}
    tv = mkl.TaskVectors(base, [{"small": torch.tensor([0.1, 0.2]), "large": torch.tensor([3.0, 4.0])}])
    merged = mkl.ties(tv, density=0.5)
    assert merged["small"].tolist() == [0.0, 0.0]
    assert merged["large"].tolist() == [3.0, 4.0]
    merged = mkl.ties(tv, density=0.5, granularity="layer")
    assert merged["small"].tolist() == pytest.approx([0.0, 0.2])
    assert merged["large"].tolist() == [0.0, 4.0]


@pytest.mark.parametrize("granularity", ["whole", "layer"])
@pytest.mark.parametrize(("density", "kept"), [(1.0, 10), (0.5, 5), (0.2, 2), (1e-9, 1)])
def test_trim_keeps_the_share_asked_for(density, kept, granularity):
    entries = [float(i) for i in range(1, 11)]
    tv = vectors(entries, [-entry for entry in entries])
    assert (trim(tv, density, granularity).flat() != 0).sum(1).tolist() == [kept, kept]


def test_entries_as_large_as_the_smallest_kept_stay():
    assert trim(vectors([1.0, -1.0, 1.0, 0.5]), 0.5).flat().tolist() == [[1.0, -1.0, 1.0, 0.0]]
    assert trim(vectors([0.0, 0.0, 0.0, 2.0]), 0.5).flat().tolist() == [[0.0, 0.0, 0.0, 2.0]]


def test_what_trims_gives_task_vectors_to_merge_by_any_method():
    tv = vectors([4.0, -3.0, 0.5, 0.1], [0.1, 5.0, -2.0, 1.0])
    trimmed = mkl.trim(tv, 0.5)
    assert trimmed.names == tv.names
    assert mkl.task_arithmetic(trimmed, scale=1.0)["w"].tolist() == [4.0, 2.0, -2.0, 0.0]
    assert mkl.trim(trimmed, 0.25).flat().tolist() == [[4.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]]


def test_an_empty_tensor_is_no_trouble():
    base = {"empty": torch.zeros(0), "w": torch.zeros(2)}
    tv = mkl.TaskVectors(base, [{"empty": torch.zeros(0), "w": torch.tensor([1.0, 2.0])}])
    for granularity in ("whole", "layer"):
        assert mkl.ties(tv, density=0.5, granularity=granularity)["w"].tolist() == [0.0, 2.0]


# ---------------------------------------------------------------- elect and merge


def test_a_tied_vote_follows_the_majority():
    assert elect(torch.tensor([[1.0, 2.0, -3.0], [-1.0, 2.0, 1.0]])).tolist() == [0.0, 1.0, -1.0]
    both = vectors([1.0, 2.0, 3.0], [-1.0, 2.0, 1.0])
    assert mkl.ties(both, density=1.0)["w"].tolist() == [1.0, 2.0, 2.0]
    assert mkl.ties(-both, density=1.0)["w"].tolist() == [-1.0, -2.0, -2.0]
    undecided = vectors([1.0, 2.0, -3.0], [-1.0, 2.0, 1.0])  # a plus and a minus: no majority either
    assert mkl.ties(undecided, density=1.0)["w"].tolist() == [0.0, 2.0, -3.0]
    assert disjoint_merge(torch.tensor([[1.0], [-1.0]]), torch.tensor([1.0])).tolist() == [1.0]


def test_copies_merge_to_the_trimmed_expert():
    tv = vectors([4.0, -3.0, 0.5, 0.1])
    copies = vectors(*[[4.0, -3.0, 0.5, 0.1]] * 3)
    assert mkl.ties(copies, density=0.5)["w"].tolist() == mkl.ties(tv, density=0.5)["w"].tolist() == [4, -3, 0, 0]


def test_sign_and_joint_scaling_go_through():
    rows = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    merged = mkl.ties(in_tensors(rows))["t0"]
    assert torch.equal(mkl.ties(in_tensors(-rows))["t0"], -merged)
    assert torch.equal(mkl.ties(in_tensors(rows * 4))["t0"], merged * 4)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, math.nan])
def test_density_is_a_share(density, tv):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        mkl.ties(tv, density=density)


def test_unknown_variants(tv):
    with pytest.raises(ValueError, match="'whole' or 'layer'"):
        mkl.ties(tv, granularity="row")
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        mkl.ties(tv, combine="median")
