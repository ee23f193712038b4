"""Averaging, task arithmetic, interpolation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekit_lite as mkl
from tests.test_task_vectors import vectors

# All methods for any number of experts that need nothing but the weights and end in one state dict.
OTHERS = {"slerp", "linear_interpolation", "negation", "analogy"}
METHODS = [
    method.function
    for name, method in mkl.methods(mkl.Need.WEIGHTS).items()
    if name not in OTHERS and not method.per_task
]


def flat(state):
    return torch.cat([t.flatten().double() for t in state.values() if t.is_floating_point()])


# ---------------------------------------------------------------- averaging


def test_average_by_hand():
    tv = mkl.TaskVectors(
        {"w": torch.tensor([10.0, 20.0])}, [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}]
    )
    assert mkl.average(tv)["w"].tolist() == [2.0, 4.0]
    assert mkl.average(tv, weights=[3, 1])["w"].tolist() == [1.5, 3.0]


def test_average_does_not_depend_on_the_base(base, experts):
    other = {n: t * 2 if t.is_floating_point() else t for n, t in base.state_dict().items()}
    a, b = mkl.average(mkl.TaskVectors(base, experts)), mkl.average(mkl.TaskVectors(other, experts))
    torch.testing.assert_close(flat(a), flat(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1, 2], "3 weights"), ([1, -1, 1], "not negative"), ([0, 0, 0], "not all zero"), ([1, math.nan, 1], "finite")],
)
def test_average_wants_sensible_weights(tv, weights, message):
    with pytest.raises(ValueError, match=message):
        mkl.average(tv, weights=weights)


# ---------------------------------------------------------------- task arithmetic


def test_task_arithmetic_by_hand():
    tv = mkl.TaskVectors(
        {"w": torch.tensor([1.0, 1.0])}, [{"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([1.0, 4.0])}]
    )
    assert mkl.task_arithmetic(tv, scale=0.5)["w"].tolist() == [1.5, 2.5]
    assert mkl.task_arithmetic(tv, scale=[2.0, 1.0])["w"].tolist() == [3.0, 4.0]
    assert mkl.negation(tv, forget=1, scale=1.0)["w"].tolist() == [1.0, -2.0]
    assert mkl.negation(tv, forget="expert 1")["w"].tolist() == [1.0, -2.0]


def test_analogy_by_hand():
    tv = vectors([1.0, 0.0], [1.0, 1.0], [5.0, 0.0])  # A, B = A + (0, 1), C
    assert mkl.analogy(tv, a=0, b=1, c=2)["w"].tolist() == [5.0, 1.0]
    assert mkl.analogy(tv, a=0, b=1, c=2, scale=0.5)["w"].tolist() == [2.5, 0.5]


def test_one_over_k_is_the_average(tv):
    torch.testing.assert_close(flat(mkl.task_arithmetic(tv, scale=1 / 3)), flat(mkl.average(tv)), rtol=1e-6, atol=1e-7)


def test_scale_zero_is_the_base(base, tv):
    assert torch.equal(flat(mkl.task_arithmetic(tv, scale=0.0)), flat(base.state_dict()))


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_task_arithmetic_wants_a_finite_scale(tv, scale):
    with pytest.raises(ValueError, match="finite"):
        mkl.task_arithmetic(tv, scale=scale)


def test_one_scale_or_k(tv):
    with pytest.raises(ValueError, match="one scale or 3"):
        mkl.task_arithmetic(tv, scale=[0.1, 0.2])


# ---------------------------------------------------------------- interpolation


def test_linear_interpolation_by_hand(tv, base, experts):
    ends = [flat(e.state_dict()) for e in experts[:2]]
    two = tv[:2]
    for t in (0.0, 0.25, 1.0):
        expected = (1 - t) * ends[0] + t * ends[1]
        torch.testing.assert_close(flat(mkl.linear_interpolation(two, t=t)), expected, rtol=1e-5, atol=1e-6)
    half_way = (flat(base.state_dict()) + ends[0]) / 2
    torch.testing.assert_close(flat(mkl.linear_interpolation(tv[0], t=0.5)), half_way, rtol=1e-5, atol=1e-6)


def test_slerp_of_perpendicular_vectors_walks_a_circle():
    tv = vectors([1.0, 0.0], [0.0, 1.0])
    for t in (0.0, 0.3, 0.5, 1.0):
        expected = [math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)]
        assert mkl.slerp(tv, t=t)["w"].tolist() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=6, max_size=6), st.floats(0, 1))
def test_slerp_keeps_the_length_of_equally_long_vectors(entries, t):
    a, b = torch.tensor(entries).view(2, 3).unbind()
    if min(a.norm(), b.norm()) < 0.1 or torch.cosine_similarity(a, b, dim=0).abs() > 0.99:
        return
    tv = vectors((a / a.norm()).tolist(), (b / b.norm()).tolist())
    assert mkl.slerp(tv, t=t)["w"].norm().item() == pytest.approx(1.0, abs=1e-3)


def test_slerp_of_parallel_vectors_is_the_line():
    assert mkl.slerp(vectors([1.0, 1.0], [3.0, 3.0]), t=0.5)["w"].tolist() == [2.0, 2.0]


def test_slerp_says_where_it_is_not_defined(tv):
    with pytest.raises(ValueError, match="exactly two"):
        mkl.slerp(tv)
    with pytest.raises(ValueError, match="opposite"):
        mkl.slerp(vectors([1.0, 0.0], [-2.0, 0.0]))
    with pytest.raises(ValueError, match="zero"):
        mkl.slerp(vectors([0.0, 0.0], [1.0, 0.0]))
    with pytest.raises(ValueError, match="joins two"):
        mkl.linear_interpolation(tv)
    with pytest.raises(ValueError, match="finite"):
        mkl.slerp(tv[:2], t=math.nan)


# ---------------------------------------------------------------- what holds for all


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_changed(method, base, experts, tv):
    before = [flat(m.state_dict()).clone() for m in (base, *experts)]
    for tensor in method(tv).values():
        tensor.zero_()
    assert all(torch.equal(flat(m.state_dict()), old) for m, old in zip((base, *experts), before, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_experts_does_not_matter(method, tv):
    if method in (mkl.dare, mkl.della):
        pytest.skip("random masks are drawn in the order of the experts")
    torch.testing.assert_close(flat(method(tv)), flat(method(tv.subset([2, 0, 1]))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_zero_task_vectors_give_the_base(method, base):
    merged = method(mkl.TaskVectors(base, [base, base]))
    torch.testing.assert_close(flat(merged), flat(base.state_dict()))


@pytest.mark.parametrize("method", METHODS)
def test_one_expert_merges_to_something_finite(method, tv):
    assert torch.isfinite(flat(method(tv[0]))).all()


@pytest.mark.parametrize("method", METHODS)
def test_files_are_merged_as_models_are(method, tv, tmp_path):
    """Through mapped files, tensor by tensor, to the same weights."""
    mkl.save(tv.base, tmp_path / "base.safetensors")
    paths = [tmp_path / f"{k}.safetensors" for k in range(len(tv))]
    for expert, path in zip(tv, paths, strict=True):
        mkl.save(mkl.task_arithmetic(expert, scale=1.0), path)
    merged = mkl.load(mkl.merge_files(method, tmp_path / "base.safetensors", paths, tmp_path / "out.safetensors"))
    expected = method(mkl.TaskVectors(tv.base, [mkl.load(path) for path in paths]))
    assert set(merged) == set(expected)
    for name, tensor in expected.items():  # sums over a file's tensors run in another order
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)
    assert all(merged[name].dtype == tv.base[name].dtype for name in expected)


@pytest.mark.parametrize("method", METHODS)
def test_double_precision_is_kept(method, tv):
    """In float64 the result is the one in float32, up to the latter's rounding, and finer."""
    double = mkl.TaskVectors(
        {n: t.double() if t.is_floating_point() else t for n, t in tv.base.items()},
        [
            {n: t.double() if t.is_floating_point() else t for n, t in mkl.task_arithmetic(expert, scale=1.0).items()}
            for expert in tv
        ],
    )
    merged = method(double)
    assert all(t.dtype == torch.float64 for t in merged.values() if t.is_floating_point())
    if method is mkl.average:
        expected = torch.stack([flat(expert) for expert in double._experts]).mean(0)
        torch.testing.assert_close(flat(merged), expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(flat(method(tv)), flat(merged), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [mkl.ties, mkl.pcb, mkl.tsv, mkl.dare, mkl.breadcrumbs, mkl.della, mkl.wudi])
def test_a_scale_must_be_finite(method, tv):
    for scale in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            method(tv, scale=scale)
