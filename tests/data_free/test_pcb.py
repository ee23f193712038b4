"""PCB-Merging."""

import math

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.pcb import unit_range
from tests.test_selection import in_tensors
from tests.test_task_vectors import vectors


def independent(rows, density, clip):
    """PCB by plain loops over Python floats."""
    d = len(rows[0])

    def quantile(values, q):
        return sorted(values)[min(d, max(1, round(q * d))) - 1]

    sizes, scores = [], []
    for row in rows:
        absolute = [abs(v) for v in row]
        low, high = quantile(absolute, clip), quantile(absolute, 1 - clip)
        sizes.append([min(max(a, low), high) for a in absolute])
        beta = [
            math.exp(len(rows) * ((a - low) / (high - low)) ** 2) * math.tanh(v * sum(other[i] for other in rows))
            for i, (v, a) in enumerate(zip(row, sizes[-1], strict=True))
        ]
        cut = quantile(beta, 1 - density)
        scores.append([(max(b, cut) - cut) / (max(beta) - cut) for b in beta])
    merged = []
    for i in range(d):
        total = sum(s[i] for s in scores)
        signed = (s[i] * math.copysign(a[i], row[i]) for s, a, row in zip(scores, sizes, rows, strict=True))
        merged.append(sum(signed) / max(total, 1e-12))
    return merged


@pytest.mark.parametrize("clip", [0.0, 0.02])
@pytest.mark.parametrize("cuts", [(), (13, 100)])
def test_against_loops_in_float64(clip, cuts):
    rows = torch.randn(3, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    merged = mkl.pcb(in_tensors(rows, cuts, dtype=torch.float64), density=0.25, clip=clip)
    expected = torch.tensor(independent(rows.tolist(), 0.25, clip), dtype=torch.float64)
    torch.testing.assert_close(torch.cat(list(merged.values())), expected, rtol=1e-10, atol=1e-12)


def test_by_hand():
    # Two equal task vectors: sizes 0, 1/2 and 1 of the range; scores e^0 tanh(2) = 0.964, e^0.5 tanh(8) = 1.649 and
    # e^2 tanh(18) = 7.389. At density 2/3 the first is the cut: scores 0, 0.107, 1, and the means are 2 and 3.
    merged = mkl.pcb(vectors([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), density=2 / 3, clip=0.0)["w"]
    assert merged.tolist() == pytest.approx([0.0, 2.0, 3.0])


def test_prefers_what_the_tasks_agree_on():
    merged = mkl.pcb(vectors([2.0, 2.0, 0.1, 0.1], [2.0, -2.0, 0.1, 0.1]), density=0.5, clip=0.0)["w"]
    assert merged[0] == 2.0
    assert merged[1].abs() < 1e-6


def test_copies_merge_to_the_entries_that_survive():
    row = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    merged = mkl.pcb(in_tensors(row.repeat(3, 1)), density=0.2, clip=0.0)["t0"]
    changed = merged != 0
    assert 58 <= int(changed.sum()) <= 60  # of 60 that survive, the one at the cut scores 0
    torch.testing.assert_close(merged[changed], row[0][changed])


def test_sign_goes_through():
    rows = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mkl.pcb(in_tensors(-rows))["t0"], -mkl.pcb(in_tensors(rows))["t0"])


def test_a_zero_task_vector_is_finite():
    assert torch.isfinite(mkl.pcb(vectors([0.0] * 4, [1.0, 2.0, 3.0, 4.0]))["w"]).all()
    zero = torch.zeros(1, 1)
    assert unit_range(torch.zeros(1, 3), zero, zero).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, math.nan])
def test_density_is_a_share(density, tv):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        mkl.pcb(tv, density=density)


def test_clip_is_a_quantile(tv):
    with pytest.raises(ValueError, match="quantile"):
        mkl.pcb(tv, clip=0.5)
