"""TSV-Merging, and the singular triples that Iso-C and Iso-CTS share with it."""

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.tsv import is_matrix, merge_matrices, orthogonalise, singular_triples


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrices(*deltas):
    """Task vectors of one matrix, over a zero base."""
    return mkl.TaskVectors({"w": torch.zeros_like(deltas[0])}, [{"w": delta} for delta in deltas])


def by_svd(deltas):
    """The paper's four steps with the library's singular value decomposition."""
    kept = max(1, min(deltas.shape[1:]) // len(deltas))
    decomposed = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    sides = torch.cat([u[:, :kept] for u, _, _ in decomposed], 1), torch.cat([v[:kept].T for _, _, v in decomposed], 1)
    (p, _, q), (r, _, t) = (torch.linalg.svd(side, full_matrices=False) for side in sides)
    return p @ q @ torch.diag(torch.cat([s[:kept] for _, s, _ in decomposed])) @ (r @ t).T


# ---------------------------------------------------------------- by hand


def test_tsv_keeps_tasks_that_live_in_perpendicular_directions():
    a, b = torch.zeros(2, 2), torch.zeros(2, 2)
    a[0, 0], b[1, 1] = 3.0, 2.0
    torch.testing.assert_close(mkl.tsv(matrices(a, b))["w"], a + b)


def test_tsv_by_hand():
    # Outputs e1 and (0.6, 0.8), inputs e1 and e2. Of a 2 x 2 matrix M with positive determinant the orthogonal factor
    # is M + cof(M), divided by its columns' length: [[1, .6], [0, .8]] + [[.8, 0], [-.6, 1]] = .6 [[3, 1], [-1, 3]].
    a, b = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.6], [0.0, 0.8]])
    expected = torch.tensor([[6.0, 1.0], [-2.0, 3.0]]) / 10**0.5
    torch.testing.assert_close(mkl.tsv(matrices(a, b))["w"], expected)
    torch.testing.assert_close(mkl.tsv(matrices(a, b), scale=0.5)["w"], expected / 2)


# ---------------------------------------------------------------- against the decomposition of the library


@pytest.mark.parametrize("shape", [(3, 12, 9), (3, 9, 12), (4, 16, 16), (5, 3, 7), (1, 6, 4)])
def test_tsv_against_the_singular_value_decomposition(shape):
    deltas = random(*shape)
    torch.testing.assert_close(merge_matrices(deltas), by_svd(deltas), rtol=0, atol=1e-10)


def test_float32_weights_lose_nothing_in_the_middle():
    deltas = random(4, 48, 96).float()
    expected = by_svd(deltas.double()).float()
    error = mkl.tsv(matrices(*deltas))["w"] - expected
    assert error.norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_singular_triples(shape):
    matrix = random(*shape)
    u, sigma, v = singular_triples(matrix, 3)
    expected_u, expected_sigma, expected_v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(sigma, expected_sigma[:3])
    torch.testing.assert_close((u * sigma) @ v.T, (expected_u[:, :3] * expected_sigma[:3]) @ expected_v[:3])
    torch.testing.assert_close(v.T @ v, torch.eye(3, dtype=torch.float64))


def test_singular_triples_leave_out_what_is_zero():
    matrix = random(6, 2) @ random(2, 9, seed=1)
    u, sigma, v = singular_triples(matrix)
    assert (u.shape, sigma.shape, v.shape) == ((6, 2), (2,), (9, 2))
    torch.testing.assert_close((u * sigma) @ v.T, matrix)
    assert singular_triples(torch.zeros(3, 4))[1].shape == (0,)


# ---------------------------------------------------------------- what it does


def test_tsv_turns_overlapping_directions_apart():
    deltas = random(3, 12, 9)
    # Its singular values are exactly the leading ones of the tasks: nothing was cancelled, nothing doubled.
    leading = torch.linalg.svdvals(deltas)[:, :3].flatten().sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(merge_matrices(deltas)), leading)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_orthogonalise_gives_orthonormal_columns_or_rows(shape):
    q = orthogonalise(random(*shape))
    q = q if shape[0] > shape[1] else q.T
    torch.testing.assert_close(q.T @ q, torch.eye(4, dtype=torch.float64))


def test_orthogonalise_is_nearest():
    matrix = random(7, 4)
    q = orthogonalise(matrix)
    distance = (matrix - q).norm()
    for seed in range(20):
        other, _ = torch.linalg.qr(q + 0.1 * random(7, 4, seed=seed))
        other = other * (other * q).sum(0).sign()
        assert (matrix - other).norm() > distance


def test_tsv_of_one_expert_is_that_expert():
    delta = random(5, 8)
    torch.testing.assert_close(mkl.tsv(matrices(delta))["w"], delta)


def test_copies_of_one_expert_give_its_leading_directions():
    delta = random(6, 9)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    torch.testing.assert_close(mkl.tsv(matrices(delta, delta, delta))["w"], (u[:, :2] * s[:2]) @ v[:2])


def test_directions_that_an_expert_lacks_do_not_disturb_the_others():
    # Two of rank one, where each might keep two directions, and one that changed nothing.
    a, b, zero = torch.zeros(8, 6), torch.zeros(8, 6), torch.zeros(8, 6)
    a[0, 0], b[5, 3] = 3.0, 2.0
    torch.testing.assert_close(mkl.tsv(matrices(a, b, zero))["w"], a + b)
    torch.testing.assert_close(mkl.tsv(matrices(zero, zero))["w"], zero)


def test_tsv_turns_with_its_inputs_and_outputs():
    deltas = random(3, 12, 9)
    (left, _), (right, _) = torch.linalg.qr(random(12, 12, seed=1)), torch.linalg.qr(random(9, 9, seed=2))
    turned = merge_matrices(left @ deltas @ right)
    torch.testing.assert_close(turned, left @ merge_matrices(deltas) @ right)
    torch.testing.assert_close(merge_matrices(-3 * deltas), -3 * merge_matrices(deltas))
    torch.testing.assert_close(merge_matrices(deltas[[2, 0, 1]]), merge_matrices(deltas))


# ---------------------------------------------------------------- what is a matrix


def test_tsv_reads_a_convolution_as_outputs_times_inputs():
    deltas = random(2, 4, 3, 5, 5)
    merged = mkl.tsv(matrices(*deltas))["w"]
    torch.testing.assert_close(merged, merge_matrices(deltas.flatten(2)).view(4, 3, 5, 5))


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


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1, 4)])
@pytest.mark.parametrize("method", [mkl.tsv, mkl.iso_c, mkl.iso_cts, mkl.wudi])
def test_small_and_empty_tensors(method, shape):
    taus = [torch.ones(shape), torch.full(shape, 2.0)]
    merged = method(matrices(*taus))["w"]
    assert merged.shape == shape
    assert torch.isfinite(merged).all()
