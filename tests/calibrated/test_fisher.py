"""Fisher merging: an average of each weight, weighted by how much it matters to each task."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekit_lite as mkl
from tests.calibrated.examples import SHAPES, kronecker, layer, of, written_out
from tests.data_free.test_tsv import random


def diagonals(*values):
    return of(*(mkl.Diagonal(torch.as_tensor(v)) for v in values))


# ---------------------------------------------------------------- by hand


def test_fisher_by_hand():
    tv = layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 4.0], [9.0, 8.0]]))
    fishers = diagonals([[1.0, 0.0], [2.0, 3.0]], [[3.0, 2.0], [0.0, 1.0]])
    # (1·1 + 3·5) / 4 = 4, (0·2 + 2·4) / 2 = 4, (2·3 + 0·9) / 2 = 3, (3·4 + 1·8) / 4 = 5
    torch.testing.assert_close(mkl.fisher(tv, fishers)["w"], torch.tensor([[4.0, 4.0], [3.0, 5.0]]))
    # With 1 added to each: (2·1 + 4·5) / 6, (1·2 + 3·4) / 4, (3·3 + 1·9) / 4, (4·4 + 2·8) / 6
    expected = torch.tensor([[22 / 6, 14 / 4], [18 / 4, 32 / 6]])
    torch.testing.assert_close(mkl.fisher(tv, fishers, floor=1.0)["w"], expected)


def test_a_tasks_weight_multiplies_its_curvature():
    tv = layer(torch.tensor([1.0]), torch.tensor([4.0]))
    first, second = (mkl.Curvature(f) for f in diagonals([1.0], [1.0]))
    torch.testing.assert_close(mkl.fisher(tv, [2 * first, second])["w"], torch.tensor([2.0]))


def test_where_no_task_minds_the_average_is_kept():
    tv = layer(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 4.0]))
    assert mkl.fisher(tv, diagonals([0.0, 0.0], [0.0, 1.0]))["w"].tolist() == [1.5, 4.0]


def test_kronecker_blocks_count_by_their_diagonal():
    # B's diagonal is (1, 2) and A's (2, 3): numbers (2, 3; 4, 6), against ones.
    block = mkl.Kronecker(torch.tensor([[[2.0, 9.0], [9.0, 3.0]]]), torch.tensor([[[1.0, 5.0], [5.0, 2.0]]]))
    tv = layer(torch.ones(2, 2), torch.zeros(2, 2))
    merged = mkl.fisher(tv, of(block, mkl.Diagonal(torch.ones(2, 2))))["w"]
    torch.testing.assert_close(merged, torch.tensor([[2 / 3, 3 / 4], [4 / 5, 6 / 7]]))


# ---------------------------------------------------------------- by another route


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_fisher_is_numpys_weighted_average(shape, groups):
    weights, values = random(3, *shape), random(3, *shape, seed=1).square()
    merged = mkl.fisher(layer(*weights), diagonals(*values))["w"]
    np.testing.assert_allclose(merged, np.average(weights, axis=0, weights=values), rtol=1e-12)
    blocks = [kronecker(shape, groups, seed=k) for k in range(3)]
    values = [written_out(block, shape).diagonal().view(shape) for block in blocks]
    merged = mkl.fisher(layer(*weights), of(*blocks), floor=0.1)["w"]
    expected = np.average(weights, axis=0, weights=np.stack(values) + 0.1)
    np.testing.assert_allclose(merged, expected, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.just(0.0) | st.floats(1e-100, 10), st.floats(1e-30, 1e30))
def test_every_weight_lies_between_the_experts_whatever_unit_the_loss_has(seed, floor, unit):
    weights, values = random(3, 5, seed=seed), random(3, 5, seed=seed + 1).relu()
    merged = mkl.fisher(layer(*weights), diagonals(*values), floor=floor)["w"]
    assert (merged <= weights.amax(0) + 1e-12).all()
    assert (merged >= weights.amin(0) - 1e-12).all()
    scaled = mkl.fisher(layer(*weights), diagonals(*(values * unit)), floor=floor * unit)["w"]
    torch.testing.assert_close(scaled, merged, rtol=1e-9, atol=1e-9)


def test_the_merge_costs_least():
    """No other weights have a smaller sum of Σ F (θ - θ_k)²."""
    weights, values = random(3, 4), random(3, 4, seed=1).square()
    merged = mkl.fisher(layer(*weights), diagonals(*values))["w"]
    least = (values * (merged - weights) ** 2).sum()
    for seed in range(20):
        other = merged + 0.01 * random(4, seed=seed)
        assert (values * (other - weights) ** 2).sum() > least


# ---------------------------------------------------------------- what it does


def test_a_floor_leads_to_the_average():
    tv, fishers = layer(*random(3, 4)), diagonals(*random(3, 4, seed=1).square())
    mean = mkl.average(tv)["w"]
    distances = [(mkl.fisher(tv, fishers, floor=floor)["w"] - mean).norm() for floor in (0.0, 0.1, 1.0, 10.0, 1e9)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-8 < distances[-2]


def test_equal_curvatures_give_the_average():
    tv, values = layer(*random(3, 4)), random(4, seed=1).square()
    torch.testing.assert_close(mkl.fisher(tv, diagonals(values, values, values))["w"], mkl.average(tv)["w"])


def test_copies_of_one_expert_and_one_expert_give_that_expert():
    expert, values = random(4, 3), random(3, 4, 3, seed=1).square()
    torch.testing.assert_close(mkl.fisher(layer(expert, expert, expert), diagonals(*values))["w"], expert)
    torch.testing.assert_close(mkl.fisher(layer(expert), diagonals(values[0]))["w"], expert)


def test_the_order_of_the_experts_does_not_matter():
    weights, values = random(3, 4), random(3, 4, seed=1).square()
    names = ["a", "b", "c"]
    tv = mkl.TaskVectors({"w": random(4, seed=9)}, dict(zip(names, ({"w": w} for w in weights), strict=True)))
    by_name = dict(zip(names, diagonals(*values), strict=True))
    expected = mkl.fisher(tv, by_name)["w"]
    turned = mkl.fisher(tv.subset(["c", "a", "b"]), by_name)["w"]
    torch.testing.assert_close(turned, expected)
    torch.testing.assert_close(mkl.fisher(tv, diagonals(*values))["w"], expected)


def test_the_base_does_not_matter():
    weights, fishers = random(2, 4), diagonals(*random(2, 4, seed=1).square())
    far = layer(*weights, base=100 * random(4, seed=3))
    torch.testing.assert_close(mkl.fisher(far, fishers)["w"], mkl.fisher(layer(*weights), fishers)["w"])


def test_tensors_without_curvature_are_averaged(tv):
    merged = mkl.fisher(tv, [{"3.bias": mkl.Diagonal(random(5, seed=k).square())} for k in range(3)])
    mean = mkl.average(tv)
    for name in mean:
        assert torch.allclose(merged[name].double(), mean[name].double(), atol=1e-6) == (name != "3.bias")
        assert merged[name].dtype == tv.base[name].dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_experts_in_any_precision(dtype):
    weights, values = random(3, 16).to(dtype), random(3, 16, seed=1).square()
    merged = mkl.fisher(layer(*weights, base=torch.zeros(16, dtype=dtype)), diagonals(*values))["w"]
    expected = np.average(weights.double(), axis=0, weights=values)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.double(), torch.from_numpy(expected), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_inputs_are_not_changed(tv):
    fishers = [mkl.Curvature({"3.bias": mkl.Diagonal(torch.ones(5))}) for _ in range(3)]
    before = [t.clone() for state in (tv.base, *tv._experts) for t in state.values()]
    for tensor in mkl.fisher(tv, fishers, floor=1.0).values():
        tensor.zero_()
    after = [t for state in (tv.base, *tv._experts) for t in state.values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(f["3.bias"].values.tolist() == [1.0] * 5 for f in fishers)


# ---------------------------------------------------------------- wrong input


def test_wrong_input_says_why():
    tv, fishers = layer(*random(2, 4)), diagonals(*torch.ones(2, 4))
    for floor in (-1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match="floor must be finite and not negative"):
            mkl.fisher(tv, fishers, floor=floor)
    with pytest.raises(ValueError, match="2 experts need as many curvatures; got 1"):
        mkl.fisher(tv, fishers[:1])
    with pytest.raises(KeyError, match="no curvature for the expert 'expert 1'"):
        mkl.fisher(tv, {"expert 0": fishers[0]})
    with pytest.raises(KeyError, match="'v', which is no tensor of the model"):
        mkl.fisher(tv, [fishers[0], {"v": mkl.Diagonal(torch.ones(4))}])
    with pytest.raises(KeyError, match="only 1 of 2 experts have a curvature for 'w'"):
        mkl.fisher(tv, [fishers[0], {}])
    with pytest.raises(TypeError, match="no known diagonal; pass Diagonal or Kronecker blocks"):
        mkl.fisher(tv, of(lambda v: v, lambda v: v))


@pytest.mark.parametrize("values", [[1.0, -1e-3], [-1.0, -2.0]])
def test_negative_numbers_are_refused(values):
    """A weight would go away from the experts, or a sum of weights be zero."""
    with pytest.raises(ValueError, match="a curvature must not be negative; its smallest number is"):
        mkl.Diagonal(torch.tensor(values))
    upright = mkl.Kronecker(inputs=torch.eye(2)[None])
    turned = mkl.Kronecker(inputs=torch.diag(torch.tensor(values))[None])
    with pytest.raises(ValueError, match="the curvature of 'w' has negative numbers on a factor's diagonal"):
        mkl.Curvature({"w": turned})
    with pytest.raises(ValueError, match="the curvature of 'w' has negative or undefined numbers on its diagonal"):
        mkl.fisher(layer(torch.ones(3, 2), torch.zeros(3, 2)), [{"w": upright}, {"w": turned}])


def test_negative_numbers_in_a_file_are_refused(tmp_path):
    path = mkl.save({"w:diagonal": torch.tensor([1.0, -1.0])}, tmp_path / "curvature.safetensors")
    with pytest.raises(ValueError, match="a curvature must not be negative"):
        mkl.Curvature.load(path)
