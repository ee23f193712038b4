"""Averaging, task arithmetic and SLERP."""

import pytest
from fusion_bench.method.simple_average import simple_average
from fusion_bench.method.slerp.slerp import slerp_on_state_dicts
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from mergekit.merge_methods import merge_state_dicts

import mergekit_lite as mkl
from tests.parity.checkpoints import assert_same, difference


def test_average(models):
    ours = mkl.average(models.tv)
    assert_same(ours, models.by_mergekit("linear", with_base=False, weight=1.0), models.base)
    assert_same(ours, simple_average(models.experts), models.base)


def test_weighted_average(models):
    weights = [1.0 + k for k in range(len(models.experts))]
    ours = mkl.average(models.tv, weights=weights)
    assert_same(ours, models.by_mergekit("linear", with_base=False, weight=weights), models.base)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_task_arithmetic(models, scale):
    ours = mkl.task_arithmetic(models.tv, scale=scale)
    assert_same(ours, models.by_mergekit("task_arithmetic", weight=scale), models.base)
    assert_same(ours, models.by_fusion_bench(TaskArithmeticAlgorithm(scaling_factor=scale)), models.base)


def test_task_arithmetic_with_a_scale_for_each_task(models):
    scales = [0.1 * (k + 1) for k in range(len(models.experts))]
    ours = mkl.task_arithmetic(models.tv, scale=scales)
    assert_same(ours, models.by_mergekit("task_arithmetic", weight=scales), models.base)


# SLERP. We turn from one task vector to the other, with one angle for the whole model. mergekit's `slerp` and
# fusion-bench turn whole weights, with an angle for each tensor; mergekit's `nuslerp` turns task vectors, with an
# angle for each tensor. Tensor by tensor all three agree with ours.


@pytest.mark.parametrize("t", [0.25, 0.5])
def test_slerp_of_task_vectors_tensor_by_tensor(models, t):
    two = models.first(2)
    theirs = two.by_mergekit("nuslerp", weight=[1 - t, t])
    ours = {name: mkl.slerp(two.only(name).tv, t=t)[name] for name in two.base}
    assert_same(ours, theirs, two.base)
    # One angle for all tensors is another merge: the angles of small tensors vary by chance.
    assert 0.001 < difference(mkl.slerp(two.tv, t=t), theirs, two.base) < 0.1


@pytest.mark.parametrize("t", [0.25, 0.5])
def test_slerp_of_whole_weights_tensor_by_tensor(models, t):
    whole = models.first(2).from_zero()
    ours = {name: mkl.slerp(whole.only(name).tv, t=t)[name] for name in whole.base}
    # mergekit calls the first of the two models the base.
    first, second = whole.experts
    theirs = merge_state_dicts({"a": first, "b": second}, "slerp", parameters={"t": t}, base="a")
    assert_same(ours, theirs, models.base)
    assert_same(ours, slerp_on_state_dicts(t, first, second), models.base)


def test_slerp_of_nearly_parallel_weights_is_linear_in_both_peers(models):
    """Above a cosine of 0.9995 (1.8 degrees) they fall back to the line; we do so at an angle of 1e-4.

    Whole weights of fine-tuned models are that close to each other as a rule, their task vectors never.
    """
    two = models.first(2).experts
    near = models.with_experts([{name: t + 0.01 * (e[name] - t) for name, t in models.base.items()} for e in two])
    theirs = slerp_on_state_dicts(0.5, *near.experts)
    assert_same(mkl.linear_interpolation(near.tv, t=0.5), theirs, near.from_zero().base)
    assert difference(mkl.slerp(near.tv, t=0.5), theirs, near.base) > 0.1
