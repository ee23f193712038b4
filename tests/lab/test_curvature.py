"""The tables of part 3, and the functions that made them."""

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.lab import curvature
from tests.calibrated.examples import kronecker, layer, of
from tests.data_free.test_tsv import random


def test_the_tables_are_whole():
    table = curvature.results()
    assert {"average", "Fisher", "RegMean", "RegMean++", "MaTS", "MaTS, as released"} <= set(table.index)
    assert not table.isna().any().any()
    by_seed = table[["seed 0", "seed 1", "seed 2"]]
    assert (by_seed.mean(axis=1) - table["test"]).abs().max() < 1e-9
    assert (table["spread"] < 0.02).all()
    assert list(curvature.images().index) == list(curvature.IMAGES)
    steps = curvature.steps()
    assert set(steps.index.get_level_values("steps")) == set(curvature.STEPS)
    assert (steps["residual"].xs(100, level="steps") < steps["residual"].xs(0, level="steps") / 100).all()


def test_the_papers_order_holds():
    """Average < Fisher < RegMean < MaTS, published with other models and tasks, and with every seed here."""
    ours, theirs = curvature.results(), curvature.published()["T5-Large, 8 tasks"]
    order = {"average": "average", "Fisher": "Fisher, normalised", "RegMean": "RegMean", "MaTS": "MaTS"}
    assert theirs[list(order)].is_monotonic_increasing
    for seed in ("seed 0", "seed 1", "seed 2"):
        assert ours.loc[list(order.values()), seed].is_monotonic_increasing


def test_looking_at_the_steps_does_not_change_them():
    tv = layer(*random(3, 4, 3))
    curvatures = of(*(kronecker((4, 3), seed=k) for k in range(3)))
    path = curvature.steps_of(tv, curvatures, [0, 2, 5])
    assert list(path) == [0, 2, 5]
    for steps, (merged, residual) in path.items():
        expected = mkl.mats(tv, curvatures, iterations=steps)
        torch.testing.assert_close(merged["w"], expected["w"])
        assert residual >= 0
    assert path[5][1] < path[2][1] < path[0][1]


def test_a_tensor_that_is_done_stays():
    tv = layer(*random(2, 3))
    path = curvature.steps_of(tv, of(*(mkl.Diagonal(torch.ones(3)) for _ in range(2))), [0, 1, 50])
    assert torch.equal(path[50][0]["w"], path[1][0]["w"])


def test_normalised_and_damped():
    curvatures = {"a": mkl.Curvature({"w": mkl.Diagonal(torch.tensor([1.0, 3.0]))})}
    normalised = curvature.normalised(curvatures)["a"]["w"]
    assert torch.equal(normalised.values, torch.tensor([0.25, 0.75]))
    assert torch.equal(curvature.damped(curvatures, 0.5)["a"]["w"].values, torch.tensor([2.0, 4.0]))
    both = mkl.Curvature({"w": mkl.Diagonal(torch.ones(2)), "v": kronecker((4, 3))})
    assert list(curvature.without_diagonals({"a": both})["a"]) == ["v"]


def test_every_layer_is_a_block():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    depth = curvature.layer_by_layer(model)
    assert depth("0.weight") == depth("0.bias") < depth("1.0.weight")
    with pytest.raises(KeyError):
        depth("2.weight")
