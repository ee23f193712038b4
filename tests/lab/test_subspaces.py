"""The Fisher information of a layer, its approximations, and ways down a bowl: against what is known by hand."""

import pytest
import torch
from torch import nn

import mergekit_lite as mkl
from mergekit_lite.calibrated import Diagonal, Kronecker, diagonal_fisher, kfac
from mergekit_lite.lab.subspaces import (
    bowl,
    cosine_of_draws,
    cosine_to,
    direction,
    fisher_of_equal_places,
    fisher_roots,
    one_layer,
    outer_products,
    solve_directly,
    ways_down,
    written_out,
)
from tests.data_free.test_tsv import random as randn


def positive(n, seed=0):
    factor = randn(n, n + 2, seed=seed)
    return factor @ factor.T


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)
    return nn.Sequential(*layers).double()


def test_roots_give_the_fisher_information_of_logistic_regression():
    layer, x = nn.Linear(3, 2, bias=False).double(), randn(5, 3)
    roots = fisher_roots(layer, x, ["weight"])["weight"]
    p = layer(x).softmax(1).detach()
    expected = sum(torch.kron(torch.outer(a, a), q.diag() - torch.outer(q, q)) for a, q in zip(x, p, strict=True)) / 5
    torch.testing.assert_close(outer_products(roots), expected)


def test_the_diagonal_of_the_roots_is_the_diagonal_fisher(network):
    x, names = randn(6, 2, 4, 4), ["0.weight", "3.weight"]
    fisher = diagonal_fisher(network.train(), [x], labels="expected", names=names)
    for name, roots in fisher_roots(network, x, names).items():
        torch.testing.assert_close(roots.square().sum(0), fisher[name].values.flatten(1))
    assert network.training


def test_a_head_makes_the_logits(network):
    x, body, head = randn(3, 2, 4, 4), network[:3], network[3]
    whole = fisher_roots(network, x, ["0.weight"])["0.weight"]
    torch.testing.assert_close(fisher_roots(body, x, ["0.weight"], head=head)["0.weight"], whole)


def test_kfac_is_exact_for_one_image_at_one_place():
    layer, x = nn.Linear(3, 4, bias=False).double(), randn(1, 3)
    roots = fisher_roots(layer, x, ["weight"])["weight"]
    block = kfac(layer, [x], labels="expected")["weight"]
    torch.testing.assert_close(outer_products(roots), written_out(block, layer.weight))
    assert cosine_to(roots, block) == pytest.approx(1)


def test_equal_places_are_all_there_is_if_there_is_one_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(2, 4)).double()
    x = randn(5, 3, 1, 1)
    roots = fisher_roots(model, x, ["0.weight"])["0.weight"]
    torch.testing.assert_close(fisher_of_equal_places(model, x, "0.weight"), outer_products(roots))


def test_pairs_of_different_places_are_left_out():
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Flatten()).double().train(), nn.Linear(8, 2).double()
    x = randn(1, 3, 2, 2)
    p, by_place = head(body(x)).softmax(1)[0].detach(), head.weight.detach().view(2, 2, 4)  # class, output, place
    expected = torch.zeros(6, 6).double()
    for c in range(2):
        g = by_place[c] - torch.einsum("c,cot->ot", p, by_place)
        for t in range(4):
            root = torch.kron(x[0].flatten(1)[:, t], g[:, t])
            expected += p[c] * torch.outer(root, root)
    torch.testing.assert_close(fisher_of_equal_places(body, x, "0.weight", head=head), expected)
    assert body.training


@pytest.mark.parametrize(
    "block",
    [
        Diagonal(randn(4, 3).square()),
        Kronecker(positive(3)[None]),
        Kronecker(None, positive(4)[None]),
        Kronecker(positive(3)[None], positive(4, seed=1)[None]),
    ],
    ids=["diagonal", "inputs", "outputs", "both"],
)
def test_a_block_written_out_does_what_the_block_does(block):
    v = randn(4, 3, seed=2)
    matrix = written_out(block, v)
    torch.testing.assert_close(matrix @ v.T.flatten(), block(v).T.flatten())
    roots = randn(7, 4, 3, seed=3)
    fisher = outer_products(roots)
    assert cosine_to(roots, block) == pytest.approx(float((fisher * matrix).sum() / fisher.norm() / matrix.norm()))


def test_only_one_group_is_written_out():
    with pytest.raises(ValueError, match="expected one group, got 2"):
        written_out(Kronecker(torch.ones(2, 1, 1)), torch.ones(2, 1))


def test_the_cosine_of_two_draws():
    a, b = randn(5, 2, 3), randn(6, 2, 3, seed=1)
    m, n = outer_products(a), outer_products(b)
    assert cosine_of_draws(a, b) == pytest.approx(float((m * n).sum() / m.norm() / n.norm()))
    assert cosine_of_draws(a, a) == pytest.approx(1)


def test_the_direct_solution_is_that_of_conjugate_gradients(tv):
    one = one_layer(tv, "0.weight")
    assert list(one.base) == ["0.weight"]
    torch.testing.assert_close(one.flat(), tv.flat()[:, : one.dimension])
    blocks = [Kronecker(positive(27, seed=k)[None], positive(4, seed=k + 9)[None]) for k in range(3)]
    taus = next(taus for _, _, taus in one.layers())
    merged = mkl.mats(one, [{"0.weight": block} for block in blocks], iterations=500)
    expected = one.base["0.weight"] + solve_directly(blocks, taus).float()
    torch.testing.assert_close(merged["0.weight"], expected, rtol=1e-4, atol=1e-5)


def test_a_bowl_has_its_valley_at_an_angle():
    matrix = bowl(9.0, 30.0)
    torch.testing.assert_close(matrix @ direction(30), direction(30))
    torch.testing.assert_close(matrix @ direction(120), 9 * direction(120))


def test_steepest_descent_zigzags_and_conjugate_gradients_do_not():
    # From the worst start, steepest descent keeps ((κ - 1) / (κ + 1))² of the height at each step.
    worst = torch.tensor([5.0, 1.0]).double()
    ways = ways_down(torch.diag(torch.tensor([1.0, 5.0]).double()), worst, share=1e-3)
    heights = (ways["steepest descent"].square() * torch.tensor([1.0, 5.0])).sum(1)
    torch.testing.assert_close(heights[1:] / heights[:-1], torch.full((len(heights) - 1,), 4 / 9).double())
    assert heights[-1] <= 1e-3 * heights[0] < heights[-2]
    assert len(ways["conjugate gradients"]) == 3  # two steps in two dimensions


def test_dividing_by_the_diagonal_makes_a_bowl_round_that_lies_along_the_axes():
    straight, tilted = (
        ways_down(bowl(20.0, angle), direction(angle + 3), jacobi=True)["steepest descent"] for angle in (0.0, 45.0)
    )
    assert len(straight) == 2
    plain = ways_down(bowl(20.0, 45.0), direction(48))["steepest descent"]
    torch.testing.assert_close(tilted, plain)  # at 45 degrees both numbers on the diagonal are equal
    assert len(tilted) > 10


def test_ways_end_after_a_number_of_steps_or_where_they_begin():
    ways = ways_down(bowl(50.0, 10.0), direction(11.0), most=4, share=0.0)
    assert len(ways["steepest descent"]) == 5
    at_rest = ways_down(bowl(50.0, 10.0), torch.zeros(2).double())
    assert [len(way) for way in at_rest.values()] == [1, 1]
