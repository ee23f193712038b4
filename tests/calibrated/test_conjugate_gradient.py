"""Conjugate gradients against dense solutions, and step by step against what defines each iterate."""

from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite.calibrated.conjugate_gradient import conjugate_gradient, inner
from tests.data_free.test_tsv import random


def system(n, condition=100.0, *, zeros=0, seed=0):
    """A matrix with eigenvalues from 1 to `condition` (and zeros), a right-hand side in its range, and a start."""
    q, _ = torch.linalg.qr(random(n, n, seed=seed))
    eigenvalues = torch.logspace(0, np.log10(condition), n - zeros, dtype=torch.float64)
    matrix = (q[:, : n - zeros] * eigenvalues) @ q[:, : n - zeros].T
    return matrix, matrix @ random(n, seed=seed + 1), random(n, seed=seed + 2)


def iterates(matrix, b, x, **options):
    return list(islice(conjugate_gradient(lambda p: matrix @ p, b, x, **options), 250))


def steps(matrix, b, x, count, **options):
    return [x for x, _ in iterates(matrix, b, x, **options)][: count + 1]


def energy(matrix, error):
    """The error as the matrix measures it."""
    return float(error @ (matrix @ error)) ** 0.5


# ---------------------------------------------------------------- by hand


def test_two_steps_by_hand():
    # A = [[4, 1], [1, 3]], b = (1, 2), start (2, 1): residual (-8, -3), A r = (-35, -17), step 73 / 331.
    a, b, start = torch.tensor([[4.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    (x0, r0), (x1, r1), (x2, r2), *_ = iterates(a, b.double(), start.double())
    assert x0.tolist() == [2.0, 1.0]
    assert r0 == pytest.approx((73 / 5) ** 0.5)
    assert x1.tolist() == pytest.approx([2 - 8 * 73 / 331, 1 - 3 * 73 / 331])
    # b - A x1 = (-8, -3) + 73 / 331 (35, 17)
    assert r1 == pytest.approx((((-8 + 73 * 35 / 331) ** 2 + (-3 + 73 * 17 / 331) ** 2) / 5) ** 0.5)
    assert x2.tolist() == pytest.approx([1 / 11, 7 / 11])
    assert r2 < 1e-14


# ---------------------------------------------------------------- the solution


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_n_steps_reach_the_dense_solution(n):
    matrix, b, start = system(n, condition=10.0)
    x = steps(matrix, b, start, n)[-1]
    np.testing.assert_allclose(x, np.linalg.solve(matrix.numpy(), b.numpy()), rtol=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_as_many_steps_as_there_are_different_eigenvalues(different, seed):
    q, _ = torch.linalg.qr(random(12, 12, seed=seed))
    matrix = (q * (1.0 + torch.arange(12) % different)) @ q.T
    solution = random(12, seed=seed + 1)
    x = steps(matrix, matrix @ solution, random(12, seed=seed + 2), different)[-1]
    torch.testing.assert_close(x, solution, rtol=1e-8, atol=1e-8)


def test_tensors_of_any_shape():
    matrix, b, start = system(12)
    shaped = conjugate_gradient(lambda p: (matrix @ p.flatten()).view(3, 2, 2), b.view(3, 2, 2), start.view(3, 2, 2))
    for (x, r), (flat, flat_r) in zip(shaped, iterates(matrix, b, start)[:8], strict=False):
        torch.testing.assert_close(x.flatten(), flat)
        assert r == pytest.approx(flat_r)
        assert x.shape == (3, 2, 2)


# ---------------------------------------------------------------- every iterate


def test_every_iterate_is_the_lowest_point_that_so_many_products_reach():
    """Among x0 + span(r, A r, ..., A^(n-1) r) its error, measured by A, is least: a least-squares problem for numpy."""
    matrix, b, start = system(10, condition=20.0)
    solution = torch.linalg.solve(matrix, b)
    root = torch.linalg.cholesky(matrix).T  # |root e| = sqrt(e A e)
    r = b - matrix @ start
    for n, x in enumerate(steps(matrix, b, start, 7)):
        powers = torch.stack([torch.linalg.matrix_power(matrix, p) @ r for p in range(max(n, 1))], 1)
        basis = torch.linalg.qr(powers)[0][:, :n]
        weights, *_ = np.linalg.lstsq((root @ basis).numpy(), (root @ (solution - start)).numpy())
        np.testing.assert_allclose(x, start + basis @ torch.from_numpy(weights), rtol=1e-6, atol=1e-9)


def test_steps_are_conjugate_and_residuals_perpendicular():
    matrix, b, start = system(10)
    x = torch.stack(steps(matrix, b, start, 8))
    moves, residuals = x.diff(dim=0), b - x @ matrix
    for vectors, products in ((moves, moves @ matrix @ moves.T), (residuals, residuals @ residuals.T)):
        lengths = products.diagonal().sqrt()
        cosines = products / lengths.outer(lengths)
        torch.testing.assert_close(cosines, torch.eye(len(vectors), dtype=torch.float64), rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(2.0, 1e4))
def test_the_error_falls_at_least_as_fast_as_the_bound(seed, condition):
    matrix, b, start = system(20, condition, seed=seed)
    solution = torch.linalg.solve(matrix, b)
    errors = [energy(matrix, x - solution) for x in steps(matrix, b, start, 15)]
    rate = (condition**0.5 - 1) / (condition**0.5 + 1)
    for n, error in enumerate(errors):
        assert error <= 2 * rate**n * errors[0] * (1 + 1e-6)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))


def test_a_bad_condition_takes_more_steps():
    def needed(condition):
        return next(n for n, (_, r) in enumerate(iterates(*system(60, condition))) if r < 1e-6)

    counts = [needed(condition) for condition in (1.0, 10.0, 100.0, 1000.0)]
    assert counts[0] == 1
    assert counts == sorted(set(counts))


def test_residuals_are_those_of_the_iterates():
    matrix, b, start = system(10)
    for x, residual in iterates(matrix, b, start)[:9]:
        assert residual == pytest.approx(((b - matrix @ x).norm() / b.norm()).item(), rel=1e-6, abs=1e-12)


# ---------------------------------------------------------------- where there is nothing to do


def test_what_the_matrix_does_not_see_stays_at_the_start():
    matrix, b, start = system(12, zeros=5)
    x = steps(matrix, b, start, 7)[-1]
    solution = start + torch.linalg.pinv(matrix, hermitian=True, rtol=1e-9) @ (b - matrix @ start)
    torch.testing.assert_close(x, solution, rtol=1e-8, atol=1e-8)
    values, vectors = torch.linalg.eigh(matrix)
    unseen = vectors[:, values < 1e-9]
    assert unseen.shape[1] == 5
    torch.testing.assert_close(unseen.T @ x, unseen.T @ start)


def test_a_singular_system_does_not_run_away():
    """Far more steps than there are dimensions: rounding errors in the null space are not blown up."""
    matrix, b, start = system(12, zeros=5)
    for x in steps(matrix, b, start, 200):
        assert torch.isfinite(x).all()
        assert x.norm() < 10 * (start.norm() + 12)


def test_a_zero_matrix_leaves_the_start():
    _, b, start = system(4)
    ((x, residual),) = iterates(torch.zeros(4, 4).double(), 0 * b, start)
    assert torch.equal(x, start)
    assert residual == 0
    ((x, residual),) = iterates(torch.zeros(4, 4).double(), b, start)
    assert torch.equal(x, start)
    assert residual == 1


def test_a_zero_right_hand_side_leads_to_zero():
    matrix, b, start = system(6)
    reached = iterates(matrix, 0 * b, start)
    assert reached[0][1] == pytest.approx((matrix @ start).norm().item()), "relative to 1"
    torch.testing.assert_close(reached[6][0], 0 * b, rtol=0, atol=1e-10)


def test_at_the_solution_nothing_is_done():
    ((x, residual),) = iterates(torch.eye(3).double(), torch.ones(3).double(), torch.ones(3).double())
    assert x.tolist() == [1.0, 1.0, 1.0]
    assert residual == 0


def test_inputs_are_not_changed_and_iterates_can_be_kept():
    matrix, b, start = system(6)
    before = [t.clone() for t in (matrix, b, start)]
    kept = iterates(matrix, b, start)[:5]
    assert all(torch.equal(old, new) for old, new in zip(before, (matrix, b, start), strict=True))
    assert torch.equal(kept[0][0], start)
    assert len({tuple(x.tolist()) for x, _ in kept}) == 5


# ---------------------------------------------------------------- preconditioned


def test_a_preconditioner_is_a_change_of_coordinates():
    """With M = L Lᵀ it is plain conjugate gradients for L⁻¹ A L⁻ᵀ, in the coordinates Lᵀ x (Saad, section 9.2)."""
    matrix, b, start = system(10, condition=10.0)
    m = system(10, condition=10.0, seed=7)[0]
    factor = torch.linalg.cholesky(m)
    inverse = torch.linalg.inv(factor)
    ours = steps(matrix, b, start, 8, precondition=lambda r: torch.linalg.solve(m, r))
    plain = steps(inverse @ matrix @ inverse.T, inverse @ b, factor.T @ start, 8)
    for x, transformed in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, inverse.T @ transformed, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(ours[2], steps(matrix, b, start, 2)[2], rtol=1e-3)


def test_the_exact_inverse_takes_one_step_and_a_multiple_of_the_identity_changes_nothing():
    matrix, b, start = system(10)
    x = steps(matrix, b, start, 1, precondition=lambda r: torch.linalg.solve(matrix, r))[-1]
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b))
    scaled = steps(matrix, b, start, 6, precondition=lambda r: 1e-3 * r)
    for x, plain in zip(scaled, steps(matrix, b, start, 6), strict=True):
        torch.testing.assert_close(x, plain)


def test_the_diagonal_mends_bad_scales():
    matrix, _, start = system(12, condition=3.0)
    scales = torch.logspace(-2, 2, 12, dtype=torch.float64)
    bad = scales[:, None] * matrix * scales
    b = bad @ random(12, seed=5)

    def needed(**options):
        return next(n for n, (_, r) in enumerate(iterates(bad, b, start, **options)) if r < 1e-8)

    assert needed(precondition=lambda r: r / bad.diagonal()) <= 14 < needed()


def test_inner_products():
    assert inner(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.5]])) == 0.0
    assert inner(torch.ones(2, 3), 2 * torch.ones(2, 3)) == 12.0
