"""Chapter 4.2's measurements of masks, and its picture and explorer."""

import math
from itertools import pairwise

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.lab import masks
from mergekit_lite.lab.plots_adaptation import plot_concrete
from mergekit_lite.lab.widgets import concrete_at, explore_concrete
from tests.lab.test_lab import extremes


def numbers(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def mask():
    """A tensor with many entries, one with few."""
    return {"a": numbers(20, 10) + 0.1, "b": numbers(3, seed=1)}


# ---------------------------------------------------------------- one entry


def test_an_entry_is_drawn_as_the_formula_says():
    u = torch.tensor([0.5, 0.2], dtype=torch.float64)
    expected = [1 / (1 + math.exp(-1 / 0.5)), 1 / (1 + math.exp(-(1 + math.log(0.25)) / 0.5))]
    assert masks.drawn(1.0, 0.5, u).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("x", "temperature"), [(0.0, 0.3), (1.5, 0.5), (-2.0, 2.0)])
def test_the_density_is_that_of_the_draws(x, temperature):
    draws = masks.drawn(x, temperature, numbers(200_000))
    edges = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    for low, high in pairwise(edges.tolist()):
        middle = torch.linspace(low, high, 201, dtype=torch.float64)
        expected = masks.density(middle, x, temperature).mean().item() * (high - low)
        assert ((draws > low) & (draws < high)).double().mean().item() == pytest.approx(expected, abs=4e-3)


def test_the_slope_is_that_of_the_draw():
    u, step = numbers(50), 1e-6
    by_hand = (masks.drawn(0.7 + step, 0.4, u) - masks.drawn(0.7 - step, 0.4, u)) / (2 * step)
    assert masks.slope_of_draw(masks.drawn(0.7, 0.4, u), 0.4).tolist() == pytest.approx(
        by_hand.tolist(), rel=1e-4, abs=1e-8
    )


def test_moments_at_one_temperature_and_where_it_is_small():
    at_one = masks.moments(0.0, 1.0)  # then m = u, a slope of u (1 - u)
    assert [at_one[name] for name in ("kept", "mean", "slope", "square")] == pytest.approx(
        [1 / 2, 1 / 2, 1 / 6, 1 / 30]
    )
    kept = 1 / (1 + math.exp(-1))
    cold = masks.moments(1.0, 0.02)
    assert (cold["kept"], cold["mean"]) == pytest.approx((kept, kept), abs=1e-3)
    assert cold["slope"] == pytest.approx(kept * (1 - kept), rel=1e-2)
    assert cold["square"] == pytest.approx(kept * (1 - kept) / (6 * 0.02), rel=1e-2)


# ---------------------------------------------------------------- whole masks


def test_masks_are_rounded_stretched_and_shuffled(mask):
    mask["b"] = torch.tensor([0.1, 0.2, 0.3])
    assert masks.rounded(mask)["b"].tolist() == [1, 1, 1], "nothing above one half: kept whole"
    assert torch.equal(masks.rounded(mask)["a"], (mask["a"] > 0.5).double())
    assert masks.stretched(mask, 2.0)["b"].tolist() == pytest.approx([0.0, 1.0, 2.0])
    assert torch.equal(masks.stretched(mask, 0.0)["a"], torch.ones(20, 10).double())
    mixed = masks.shuffled(mask)
    assert not torch.equal(mixed["a"], mask["a"])
    assert torch.equal(mixed["a"].flatten().sort().values, mask["a"].flatten().sort().values)
    assert torch.equal(mixed["a"], masks.shuffled(mask)["a"])
    assert not torch.equal(mixed["a"], masks.shuffled(mask, seed=1)["a"])


def test_means_by_rank(mask):
    by = {"a": torch.arange(200.0).view(20, 10).flip(0), "b": torch.ones(3)}
    hat = (mask["a"] / mask["a"].mean()).flip(0).flatten()
    assert masks.mean_by_rank(mask, by, 4) == pytest.approx(hat.view(4, 50).mean(1).tolist())
    columns = {"a": torch.arange(10.0).expand(20, 10) + torch.arange(20.0).view(20, 1) / 100, "b": torch.ones(3)}
    table = masks.mean_by_ranks(mask, by, columns, parts=2)
    halves = hat.view(20, 10)
    expected = [[halves[:10, :5].mean(), halves[:10, 5:].mean()], [halves[10:, :5].mean(), halves[10:, 5:].mean()]]
    assert table.flatten().tolist() == pytest.approx([float(v) for row in expected for v in row])


def test_only_ranks_leaves_a_function_of_the_rank(mask):
    by = {"a": torch.arange(200.0).view(20, 10), "b": torch.ones(3)}
    left = masks.only_ranks(mask, by, parts=4)
    hat = (mask["a"] / mask["a"].mean()).flatten().view(4, 50)
    assert left["a"].flatten().view(4, 50).tolist() == [pytest.approx([mean] * 50) for mean in hat.mean(1).tolist()]
    assert left["b"].tolist() == [1, 1, 1]


def test_the_shuffled_stand_in_is_the_same_merge_and_another_playground(suite):
    tv = suite.task_vectors
    other = masks.on_shuffled(tv, 0.2)
    merge = mkl.task_arithmetic(tv, scale=0.2)
    again = mkl.task_arithmetic(other, scale=0.2)
    assert all(torch.allclose(again[name], merge[name], atol=1e-6) for name in merge)
    name = "blocks.3.1.conv_pw.weight"
    v = next(taus.sum(0) for n, _, taus in tv.layers() if n == name)
    w = next(taus[0] for n, _, taus in other.layers() if n == name)
    assert torch.allclose(v.flatten().sort().values, w.flatten().sort().values, atol=1e-6)
    assert torch.cosine_similarity(v.flatten(), w.flatten(), dim=0).abs() < 0.05


# ---------------------------------------------------------------- picture and explorer


def test_the_picture_has_a_curve_per_setting_in_each_panel():
    figure = plot_concrete([(0.0, 1.0), (1.0, 0.5)])
    assert [len(axis.lines) for axis in figure.axes] == [3, 2, 2]
    u, m = figure.axes[0].lines[0].get_data()
    assert m == pytest.approx(u), "at x = 0 and T = 1 the entry is u"
    assert figure.axes[1].lines[0].get_ydata() == pytest.approx(1.0)
    slopes = figure.axes[2].lines[1].get_ydata()
    assert slopes.mean() == pytest.approx(masks.moments(1.0, 0.5)["slope"], rel=1e-3)


def test_the_explorer_says_what_is_drawn():
    figure = concrete_at([(0.0, 1.0), (1.0, 0.1)])
    first, second = figure.get_label().splitlines()
    assert first == (
        "x = 0, T = 1: above 1/2 with probability 0.50, on average 0.50; slope on average 0.17, its mean square 1.2 "
        "times the square of that"
    )
    assert second.startswith("x = 1, T = 0.1: above 1/2 with probability 0.73, on average 0.73")
    seen = list(extremes(explore_concrete()))
    assert [(at["logit x"], at["temp. T"]) for at in seen] == [(-4.0, 0.5), (4.0, 0.5), (4.0, 0.05), (4.0, 3.0)]
