"""MetaGPT: the closed form, what it minimises, and that orthogonality is not needed for it."""

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.metagpt import coefficients
from tests.test_task_vectors import vectors


def correlated(seed, k=4, d=12):
    """Task vectors of different lengths that are far from orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(d, generator=generator).double()
    own = torch.randn(k, d, generator=generator).double()
    return (shared + own) * torch.linspace(0.3, 2.0, k).double()[:, None]


def merged_vector(taus, **options):
    return mkl.metagpt(vectors(*taus.tolist()), **options)["w"]


def bound(v, taus):
    """The paper's bound on the summed losses, as a function of any merged vector v."""
    weights = taus.square().sum(1)
    return (weights * (v - taus).square().sum(1)).sum()


def test_by_hand():
    # Squared lengths 1 and 9: a tenth of the first and nine tenths of the second.
    assert merged_vector(torch.tensor([[1.0, 0.0], [0.0, 3.0]])).tolist() == pytest.approx([0.1, 2.7])


@pytest.mark.parametrize("seed", range(5))
def test_it_minimises_the_bound_over_all_vectors(seed):
    """A descent in full dimension from a random start ends in the closed form, without orthogonality."""
    taus = correlated(seed)
    cosine = torch.nn.functional.cosine_similarity(taus[0], taus[1], dim=0)
    assert cosine.abs() > 0.1, "far from orthogonal"
    v = torch.randn(taus.shape[1], generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
    optimizer = torch.optim.LBFGS([v], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss():
        optimizer.zero_grad()
        value = bound(v, taus)
        value.backward()
        return value

    optimizer.step(loss)
    closed = torch.tensordot(coefficients(taus.square().sum(1)), taus, dims=1)
    torch.testing.assert_close(v.detach(), closed, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(merged_vector(taus.float()), closed.float(), rtol=1e-5, atol=1e-6)


def test_the_printed_equation_leads_elsewhere():
    """With 1 - λ², as equations 10 and 39 print it, the minimum is not at equation 15."""
    squared = torch.tensor([1.0, 9.0]).double()
    grid = torch.linspace(0, 1, 1001).double()

    def total(price):
        """The bound for orthogonal task vectors: own loss `price(λ_t)`, and the others' share λ_k²."""
        first = squared[0] * (price(grid) * squared[0] + (1 - grid) ** 2 * squared[1])
        second = squared[1] * (price(1 - grid) * squared[1] + grid**2 * squared[0])
        return first + second

    assert grid[total(lambda share: (1 - share) ** 2).argmin()] == pytest.approx(coefficients(squared)[0].item())
    assert abs(grid[total(lambda share: 1 - share**2).argmin()] - coefficients(squared)[0]) > 0.05


def test_equal_lengths_are_averaged_and_scales_sum_to_one(suite):
    turned = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    torch.testing.assert_close(merged_vector(turned), turned.mean(0))
    assert coefficients(suite.task_vectors.gram().diagonal()).sum().item() == pytest.approx(1)


def test_whole_is_task_arithmetic_with_these_coefficients(suite):
    tv = suite.task_vectors.subset(["mnist", "fashion", "letters"])
    scales = coefficients(tv.gram().diagonal())
    expected = mkl.task_arithmetic(tv, scale=scales.tolist())
    for name, merged in mkl.metagpt(tv).items():
        torch.testing.assert_close(merged, expected[name])


def test_layers_are_measured_on_their_own(tv):
    merged = mkl.metagpt(tv, granularity="layer")
    for name, theta0, taus in tv.layers():
        weights = taus.flatten(1).double().square().sum(1)
        expected = (
            theta0 + torch.tensordot((weights / weights.sum()).float(), taus, dims=1) if weights.sum() > 0 else theta0
        )
        torch.testing.assert_close(merged[name], expected)


def test_zero_task_vectors_and_wrong_words():
    assert merged_vector(torch.zeros(3, 2)).tolist() == [0.0, 0.0]
    assert merged_vector(torch.tensor([[0.0, 0.0], [1.0, 2.0]])).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="whole or layer; got 'row'"):
        merged_vector(torch.ones(2, 2), granularity="row")
