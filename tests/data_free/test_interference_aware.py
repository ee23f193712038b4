"""TIES, PCB and TSV."""

import math

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.pcb import survivors, unit_range
from mergekit_lite.data_free.ties import disjoint_mean, elect, trim
from mergekit_lite.data_free.tsv import is_matrix, merge_matrices, orthogonalise
from tests.test_task_vectors import vectors

# ---------------------------------------------------------------- TIES


def test_ties_by_hand():
    # Kept at density 0.5: (4, -3, ., .) and (., 5, -2, .) and (1, ., ., -6).
    tv = vectors([4.0, -3.0, 0.5, 0.1], [0.1, 5.0, -2.0, 1.0], [1.0, 0.2, 0.3, -6.0])
    # Signs: + (4 + 1), + (5 - 3), -, -. Means over those that agree: 2.5, 5, -2, -6.
    assert mkl.ties(tv, density=0.5)["w"].tolist() == [2.5, 5.0, -2.0, -6.0]
    assert mkl.ties(tv, density=0.5, scale=2.0)["w"].tolist() == [5.0, 10.0, -4.0, -12.0]


def test_trim_is_over_the_whole_vector_not_per_tensor():
    base = {"small": torch.zeros(2), "large": torch.zeros(2)}
    tv = mkl.TaskVectors(base, [{"small": torch.tensor([0.1, 0.2]), "large": torch.tensor([3.0, 4.0])}])
    merged = mkl.ties(tv, density=0.5)
    assert merged["small"].tolist() == [0.0, 0.0]
    assert merged["large"].tolist() == [3.0, 4.0]


def test_a_tied_vote_follows_the_majority():
    signs = elect(torch.tensor([[1.0, 2.0, -3.0], [-1.0, 2.0, 1.0]]))
    assert signs.tolist() == [0.0, 1.0, -1.0]  # the majority of (+, -) is itself undecided
    assert elect(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 2.0, 1.0]])).tolist() == [1.0, 1.0, 1.0]
    assert disjoint_mean(torch.tensor([[1.0], [-1.0]]), torch.tensor([1.0])).tolist() == [1.0]


@pytest.mark.parametrize(("density", "kept"), [(1.0, 10), (0.5, 5), (0.2, 2), (1e-9, 1)])
def test_trim_keeps_the_share_asked_for(density, kept):
    taus = torch.arange(1.0, 11.0).repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    assert (trim(taus, density) != 0).sum(1).tolist() == [kept, kept]


def test_ties_of_copies_is_the_trimmed_expert():
    tv = vectors([4.0, -3.0, 0.5, 0.1])
    copies = vectors(*[[4.0, -3.0, 0.5, 0.1]] * 3)
    assert mkl.ties(copies, density=0.5)["w"].tolist() == mkl.ties(tv, density=0.5)["w"].tolist() == [4, -3, 0, 0]


@pytest.mark.parametrize("method", [mkl.ties, mkl.pcb])
@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, math.nan])
def test_density_is_a_share(method, density, tv):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        method(tv, density=density)


# ---------------------------------------------------------------- PCB


def test_pcb_against_a_loop_in_float64():
    generator = torch.Generator().manual_seed(0)
    taus = torch.randn(3, 40, generator=generator)
    merged = mkl.pcb(vectors(*taus.tolist()), density=0.25, clip=0.0)["w"]
    scores = []
    rows = taus.double().tolist()
    for row in rows:
        sizes = [abs(v) for v in row]
        span = max(sizes) - min(sizes)
        beta = [
            math.exp(3 * ((abs(v) - min(sizes)) / span) ** 2) * math.tanh(v * sum(other[i] for other in rows))
            for i, v in enumerate(row)
        ]
        cut = sorted(beta)[30 - 1]  # the 0.75 quantile of 40
        kept = [max(b, cut) for b in beta]
        scores.append([(b - cut) / (max(kept) - cut) for b in kept])
    for i in range(40):
        total = sum(s[i] for s in scores)
        expected = sum(s[i] * row[i] for s, row in zip(scores, rows, strict=True)) / max(total, 1e-12)
        assert merged[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_pcb_prefers_what_the_tasks_agree_on():
    merged = mkl.pcb(vectors([2.0, 2.0, 0.1, 0.1], [2.0, -2.0, 0.1, 0.1]), density=0.5, clip=0.0)["w"]
    assert merged[0] == 2.0
    assert merged[1].abs() < 1e-6


def test_pcb_of_a_zero_task_vector_is_finite():
    assert torch.isfinite(mkl.pcb(vectors([0.0] * 4, [1.0, 2.0, 3.0, 4.0]))["w"]).all()
    assert unit_range(torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]
    assert survivors(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 0.5).tolist() == [[0.0, 0.0, 0.5, 1.0]]


def test_pcb_checks_its_clip(tv):
    with pytest.raises(ValueError, match="quantile"):
        mkl.pcb(tv, clip=0.5)


# ---------------------------------------------------------------- TSV


def test_tsv_keeps_tasks_that_live_in_perpendicular_directions():
    a, b = torch.zeros(2, 2), torch.zeros(2, 2)
    a[0, 0], b[1, 1] = 3.0, 2.0
    tv = mkl.TaskVectors({"w": torch.zeros(2, 2)}, [{"w": a}, {"w": b}])
    torch.testing.assert_close(mkl.tsv(tv)["w"], a + b)


def test_tsv_turns_overlapping_directions_apart():
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, 12, 9, generator=generator, dtype=torch.float64)
    merged = merge_matrices(deltas)
    # Its singular values are exactly the leading ones of the tasks: nothing was cancelled, nothing doubled.
    leading = torch.linalg.svdvals(deltas)[:, :3].flatten().sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(merged), leading)


def test_orthogonalise_gives_orthonormal_columns():
    matrix = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = orthogonalise(matrix)
    torch.testing.assert_close(q.T @ q, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(orthogonalise(matrix.T), q.T)


def test_tsv_averages_what_is_no_matrix(tv):
    merged, mean = mkl.tsv(tv), mkl.average(tv)
    for name in ("0.bias", "1.weight", "3.bias"):
        torch.testing.assert_close(merged[name], mean[name])
    assert not torch.allclose(merged["3.weight"], mean["3.weight"])


def test_depthwise_kernels_are_no_matrices():
    assert not is_matrix(torch.zeros(16, 1, 3, 3))
    assert is_matrix(torch.zeros(16, 8, 1, 1))
    assert is_matrix(torch.zeros(16, 8))
    assert not is_matrix(torch.zeros(16))
