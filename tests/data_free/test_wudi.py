"""WUDI-Merging: the loss, its minimum, and the descent towards it."""

import importlib
import math
from itertools import islice

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.wudi import descent, factors, is_wide, loss, losses, minimum, quadratic
from mergekit_lite.matrices import is_matrix
from tests.data_free.test_tsv import matrices, random

SOLVERS = ["adam", "exact"]
module = importlib.import_module("mergekit_lite.data_free.wudi")  # the package has a function of this name


def row(*entries):
    return torch.tensor([entries])


# ---------------------------------------------------------------- by hand


def test_where_tasks_share_no_input_they_are_added_and_where_they_do_they_are_averaged():
    # τ1 reads inputs 1 and 2, τ2 reads inputs 2 and 3. Both solve (τ - τ_k) · τ_k = 0: τ has to answer 5 and 10.
    tau1, tau2 = row(1.0, 2.0, 0.0), row(0.0, 1.0, 3.0)
    tau = minimum(torch.stack([tau1, tau2])).float()
    torch.testing.assert_close(tau @ torch.cat([tau1, tau2]).T, row(5.0, 10.0))
    # The same input alone cannot have two answers: 1 and 3 become 2.
    pairs = [((1.0, 0.0), (3.0, 0.0)), ((1.0, 0.0), (0.0, 3.0))]
    shared, apart = (minimum(torch.stack([row(*first), row(*second)])).float() for first, second in pairs)
    torch.testing.assert_close(shared, row(2.0, 0.0))
    torch.testing.assert_close(apart, row(1.0, 3.0))
    # Two rows at once, by the method itself.
    rows = [torch.tensor([first, first]) for pair in pairs[:1] for first in pair]
    torch.testing.assert_close(mkl.wudi(matrices(*rows), solver="exact")["w"], torch.tensor([[2.0, 0.0]] * 2))


def test_the_loss_by_hand():
    # ((2 - 1) · 1)² / 1² + ((2 - 3) · 3)² / 3² = 1 + 1, and at the sum, 4: 3² + 1² = 10.
    taus = torch.stack([row(1.0, 0.0), row(3.0, 0.0)])
    assert loss(row(2.0, 0.0), taus).item() == 2
    assert loss(row(4.0, 7.0), taus).item() == 10  # the second input is no task's
    # Two rows: (τ - τ1) τ1ᵀ = [[1, 1], [1, 1]] [[1, 0], [0, 2]] = [[1, 2], [1, 2]], 10 / 5.
    tau1 = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert loss(tau1 + 1, tau1[None]).item() == pytest.approx(2)


def test_quadratic_by_hand():
    # τ1 = (2, 0) and τ2 = (1, 1): τᵀτ / ‖τ‖² are [[1, 0], [0, 0]] and [[.5, .5], [.5, .5]].
    taus = torch.stack([row(2.0, 0.0), row(1.0, 1.0)])
    a, c = quadratic(taus)
    torch.testing.assert_close(a, torch.tensor([[1.5, 0.5], [0.5, 0.5]], dtype=torch.float64))
    # -τ2 times the first is (-1, 0), and -τ1 times the second (-1, -1).
    torch.testing.assert_close(c, torch.tensor([[-2.0, -1.0]], dtype=torch.float64))
    # From the sum (3, 1) the correction is (-1, -1), as (-1, -1) A = (-2, -1): τ = (2, 0) disturbs neither.
    torch.testing.assert_close(minimum(taus), torch.tensor([[2.0, 0.0]], dtype=torch.float64))
    assert loss(minimum(taus), taus).item() == pytest.approx(0, abs=1e-20)


# ---------------------------------------------------------------- the minimum


@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9, 4), (2, 3, 8), (1, 3, 5), (4, 1, 9)])
def test_the_minimum_is_the_shortest_solution_of_the_least_squares(shape):
    taus = random(*shape)
    # All rows of all τ_k / ‖τ_k‖ under each other are the inputs; to answer is what each τ_k answers to its own.
    inputs = torch.cat([tau / tau.norm() for tau in taus])
    answers = torch.cat([tau @ tau.T / tau.norm() for tau in taus])
    expected = torch.linalg.lstsq(inputs, answers, driver="gelsd").solution.T
    torch.testing.assert_close(minimum(taus), expected)


def test_the_gradient_is_that_of_the_loss():
    taus, tau = random(3, 4, 6), random(4, 6, seed=1).requires_grad_()
    loss(tau, taus).backward()
    a, c = quadratic(taus)
    torch.testing.assert_close(2 * ((tau.detach() - taus.sum(0)) @ a - c), tau.grad)


def test_no_step_from_the_minimum_lowers_the_loss():
    taus = random(3, 4, 6)
    best = minimum(taus)
    for seed in range(20):
        assert loss(best + 0.01 * random(4, 6, seed=seed), taus) > loss(best, taus)


@pytest.mark.parametrize("copies", [1, 3])
def test_copies_of_one_expert_give_that_expert(copies):
    delta = random(4, 7)
    torch.testing.assert_close(mkl.wudi(matrices(*[delta] * copies), solver="exact")["w"], delta)


def test_the_minimum_turns_scales_and_permutes_with_the_tasks():
    taus = random(3, 6, 5)
    (left, _), (right, _) = torch.linalg.qr(random(6, 6, seed=1)), torch.linalg.qr(random(5, 5, seed=2))
    merged = minimum(taus)
    torch.testing.assert_close(minimum(left @ taus @ right), left @ merged @ right)
    torch.testing.assert_close(minimum(-3 * taus), -3 * merged)
    torch.testing.assert_close(minimum(taus[[2, 0, 1]]), merged)
    torch.testing.assert_close(minimum(1e-12 * taus.float()), 1e-12 * merged, rtol=1e-4, atol=0)


def test_a_zero_task_vector_has_no_say():
    taus = random(3, 4, 6)
    taus[1] = 0
    torch.testing.assert_close(minimum(taus), minimum(taus[[0, 2]]))
    assert torch.isfinite(loss(taus.sum(0), taus))
    for solver in SOLVERS:
        assert not mkl.wudi(matrices(*torch.zeros(2, 3, 4)), solver=solver)["w"].any()


def test_a_ridge_leads_from_the_minimum_to_the_sum():
    taus = random(3, 4, 6)
    ridges = [0.0, 0.01, 0.1, 1.0, 10.0, 1e9]
    found = [minimum(taus, ridge) for ridge in ridges]
    losses_ = [loss(tau, taus).item() for tau in found]
    distances = [(tau - taus.sum(0)).norm().item() for tau in found]
    assert losses_ == sorted(losses_)
    assert distances == sorted(distances, reverse=True)
    torch.testing.assert_close(found[-1], taus.sum(0))
    # The gradient of L + ρ ‖τ - Σ τ_k‖² is zero, where ρ is 0.1 times the mean eigenvalue 3 / 6 of A.
    a, c = quadratic(taus)
    correction = found[2] - taus.sum(0)
    torch.testing.assert_close(correction @ a - c, -0.05 * correction)


# ---------------------------------------------------------------- the descent


def test_the_descent_is_adam_on_the_loss():
    taus = random(3, 4, 6)
    tau = taus.sum(0).requires_grad_()
    adam = torch.optim.Adam([tau], lr=0.01)
    for found in islice(descent(taus, 0.01), 21):
        torch.testing.assert_close(found, tau.detach())
        adam.zero_grad()
        loss(tau, taus).backward()
        adam.step()


def test_adam_comes_near_the_minimum_and_never_below_it():
    taus = random(3, 4, 6)
    least = loss(minimum(taus), taus).item()
    fallen = [loss(tau, taus).item() for tau in islice(descent(taus, 0.01), 3001)]
    assert fallen[0] == loss(taus.sum(0), taus).item()
    assert fallen[0] > fallen[30] > fallen[300] > least
    assert min(fallen) >= least * (1 - 1e-12)
    assert fallen[-1] < 1.001 * least


def test_adam_moves_a_weight_by_about_the_learning_rate():
    for magnitude in (0.1, 10.0):
        taus = magnitude * random(3, 4, 6)
        tau = next(islice(descent(taus, 1e-5), 300, None))
        assert 0.002 < (tau - taus.sum(0)).abs().max() < 300 * 1.01e-5


def test_no_steps_give_the_sum():
    taus = random(3, 4, 6)
    torch.testing.assert_close(mkl.wudi(matrices(*taus), steps=0)["w"], taus.sum(0))


def test_of_one_expert_adam_has_nothing_to_change():
    delta = random(4, 7).float()
    assert torch.equal(mkl.wudi(matrices(delta))["w"], delta)


def test_the_suite_s_minimum_is_long(suite):
    """Why the least loss is not the best merge, and why the ridge is there."""
    tv = suite.task_vectors
    matrices_ = [taus.flatten(2) for _, theta0, taus in tv.layers() if is_matrix(theta0)]

    def whole(solve):
        return math.sqrt(sum(solve(taus).square().sum().item() for taus in matrices_))

    total = whole(lambda taus: taus.sum(0))
    assert whole(minimum) > 5 * total
    assert whole(lambda taus: minimum(taus, ridge=1.0)) < total


# ---------------------------------------------------------------- what is merged so


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_no_matrix_stays_at_the_base_or_is_averaged(solver, tv, base):
    theta0, mean = base.state_dict(), mkl.average(tv)
    merged = mkl.wudi(tv, solver=solver)
    averaged = mkl.wudi(tv, solver=solver, others="average")
    for name in ("0.bias", "1.weight", "3.bias"):
        torch.testing.assert_close(merged[name], theta0[name])
        torch.testing.assert_close(averaged[name], mean[name])
    torch.testing.assert_close(merged["3.weight"], averaged["3.weight"])
    assert not torch.allclose(merged["3.weight"], theta0["3.weight"])


def test_where_says_which_matrices(tv, base):
    theta0 = base.state_dict()
    merged = mkl.wudi(tv, where=lambda name, weight: weight.ndim == 2)
    assert torch.equal(merged["0.weight"], theta0["0.weight"])
    assert not torch.equal(merged["3.weight"], theta0["3.weight"])
    assert list(losses(tv, merged, where=lambda name, weight: weight.ndim == 2)) == ["3.weight"]


def test_losses_of_a_merge(tv):
    exact, adam = losses(tv, mkl.wudi(tv, solver="exact")), losses(tv, mkl.wudi(tv))
    start = losses(tv, mkl.task_arithmetic(tv, scale=1.0))
    assert list(exact) == ["0.weight", "3.weight"]
    assert all(exact[name] < adam[name] < start[name] for name in exact)


def test_a_convolution_is_outputs_times_inputs():
    taus = random(2, 4, 3, 3, 3)
    merged = mkl.wudi(matrices(*taus), solver="exact", scale=0.5)["w"]
    torch.testing.assert_close(merged, 0.5 * minimum(taus.flatten(2)).view(4, 3, 3, 3))


# ---------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "sgd"}, "solver is adam or exact"),
        ({"others": "sum"}, "others is base or average"),
        ({"scale": math.nan}, "scale must be finite"),
        ({"steps": -1}, "steps must be finite and not negative"),
        ({"learning_rate": math.inf}, "learning_rate must be finite"),
        ({"ridge": -0.1}, "ridge must be finite and not negative"),
    ],
)
def test_arguments_make_sense(arguments, message, tv):
    with pytest.raises(ValueError, match=message):
        mkl.wudi(tv, **arguments)


# ---------------------------------------------------------------- the shorter side


@pytest.mark.parametrize("shape", [(3, 4, 13), (2, 3, 40), (3, 2, 7), (1, 2, 5)])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_wide_matrices_are_merged_by_their_rows_to_the_same(shape, ridge, monkeypatch):
    taus = random(*shape)
    taus[0, 0] = taus[0, 1]  # rows that depend on each other
    assert is_wide(taus)
    u, b = factors(taus)
    a, c = quadratic(taus)
    torch.testing.assert_close(u.T @ u, a)
    torch.testing.assert_close(b @ u, c)
    by_rows, steps = minimum(taus, ridge), list(islice(descent(taus, 0.01), 30))
    monkeypatch.setattr(module, "is_wide", lambda taus: False)
    torch.testing.assert_close(by_rows, minimum(taus, ridge), rtol=1e-9, atol=1e-10)
    for mine, other in zip(steps, islice(descent(taus, 0.01), 30), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_matrix_has_a_row_and_a_column_per_input(solver, monkeypatch):
    """40,000 inputs would take 12.8 GB; the task matrices take a megabyte."""
    largest = 0
    multiply = torch.Tensor.__matmul__

    def watched(first, second):
        nonlocal largest
        product = multiply(first, second)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    merged = mkl.wudi(matrices(*random(2, 3, 40_000).float()), solver=solver, steps=2)
    assert torch.isfinite(merged["w"]).all()
    assert 0 < largest <= 2 * 3 * 40_000
