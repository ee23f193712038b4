"""The Karcher mean."""

import math

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.karcher import in_a_hemisphere, spherical_mean
from mergekit_lite.geometry import normalise
from tests.data_free.test_simple_merges import flat
from tests.test_task_vectors import vectors


def textbook(points, weights, steps=500):
    """The descent with the points themselves, as the definition of log and exp has it."""
    mean = (weights[:, None] * points).sum(0)
    mean = mean / mean.norm()
    for _ in range(steps):
        velocity = torch.zeros_like(mean)
        for weight, point in zip(weights, points, strict=True):
            across = point - (point @ mean) * mean
            if across.norm() > 0:
                angle = torch.atan2(across.norm(), point @ mean)
                velocity += weight * angle * across / across.norm()
        speed = velocity.norm()
        if speed > 0:
            mean = speed.cos() * mean + speed.sin() * velocity / speed
    return mean


def unit_vectors(k, d, seed=0):
    points = torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return points / points.norm(dim=1, keepdim=True)


def as_vectors(taus):
    return mkl.TaskVectors({"w": torch.zeros_like(taus[0])}, [{"w": tau} for tau in taus])


def test_by_hand():
    # The direction halfway between the axes, and the mean length (2 + 4) / 2.
    assert mkl.karcher(vectors([2.0, 0.0], [0.0, 4.0]))["w"].tolist() == pytest.approx([3 * math.sqrt(0.5)] * 2)
    # Two thirds of the way from 0 to 90 degrees, and 2/3 of the way between the lengths.
    merged = mkl.karcher(vectors([3.0, 0.0], [0.0, 6.0]), weights=[1, 2])["w"]
    assert merged.tolist() == pytest.approx([5 * math.cos(math.pi / 3), 5 * math.sin(math.pi / 3)], abs=1e-6)
    assert mkl.karcher(vectors([2.0, 0.0], [0.0, 4.0]), scale=0.5)["w"].norm().item() == pytest.approx(1.5)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_of_two_vectors_of_one_length_it_is_slerp(t):
    tv = as_vectors(2.5 * unit_vectors(2, 7))
    merged = mkl.karcher(tv, weights=[1 - t, t], tolerance=1e-12)["w"]
    torch.testing.assert_close(merged, mkl.slerp(tv, t=t)["w"], rtol=1e-9, atol=1e-9)


def test_of_two_vectors_of_different_lengths_it_is_not():
    tv = vectors([1.0, 0.0], [0.0, 3.0])
    assert mkl.karcher(tv)["w"].tolist() == pytest.approx([math.sqrt(2)] * 2)
    assert mkl.slerp(tv)["w"].tolist() == pytest.approx([math.sqrt(0.5), 3 * math.sqrt(0.5)])


@pytest.mark.parametrize("k", [2, 5, 8])
def test_of_orthogonal_vectors_it_is_task_arithmetic(k):
    tv = as_vectors(3.0 * torch.eye(k))
    expected = mkl.task_arithmetic(tv, scale=1 / math.sqrt(k))["w"]
    torch.testing.assert_close(mkl.karcher(tv)["w"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("k", "d"), [(3, 3), (6, 3), (8, 50)])
def test_against_the_textbook_in_float64(k, d):
    points = unit_vectors(k, d, seed=k)
    points = points * (points @ points[0]).sign()[:, None]  # all in the hemisphere around the first
    lengths = torch.linspace(0.5, 2.0, k, dtype=torch.float64)
    weights = torch.linspace(1.0, 3.0, k, dtype=torch.float64)
    weights = weights / weights.sum()
    merged = mkl.karcher(as_vectors(lengths[:, None] * points), weights=weights.tolist())["w"]
    torch.testing.assert_close(merged, (weights @ lengths) * textbook(points, weights), rtol=0, atol=1e-6)


def test_no_direction_has_a_smaller_sum_of_squared_angles():
    points = unit_vectors(5, 9)
    weights = torch.tensor([0.1, 0.1, 0.2, 0.3, 0.3], dtype=torch.float64)
    mean = mkl.karcher(as_vectors(points), weights=weights.tolist())["w"]

    def cost(m):
        return weights @ (points @ m).clamp(-1, 1).arccos().square()

    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(20):
            other = mean + size * torch.randn(9, generator=generator, dtype=torch.float64)
            assert cost(other / other.norm()) > cost(mean)


def test_layer_by_layer_on_whole_weights(experts):
    """What mergekit does: every tensor a point, the origin for a base."""
    states = [{n: t.double() for n, t in e.state_dict().items() if t.is_floating_point()} for e in experts]
    states = [{n: t for n, t in state.items() if "running" not in n} for state in states]
    tv = mkl.TaskVectors({n: torch.zeros_like(t) for n, t in states[0].items()}, states)
    merged = mkl.karcher(tv, granularity="layer")
    for name in states[0]:
        tensors = torch.stack([state[name].flatten() for state in states])
        lengths = tensors.norm(dim=1)
        moved = lengths > 0
        expected = torch.zeros_like(tensors[0])
        if moved.any():
            points = tensors[moved] / lengths[moved, None]
            expected = lengths.mean() * textbook(points, torch.full((int(moved.sum()),), 1 / int(moved.sum())).double())
        torch.testing.assert_close(merged[name].flatten(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("granularity", ["whole", "layer"])
def test_copies_order_and_scale(granularity, base, experts, tv):
    def merge(vectors):
        return flat(mkl.karcher(vectors, granularity=granularity))

    origin = flat(base.state_dict())
    copies = merge(mkl.TaskVectors(base, [experts[0]] * 3))
    torch.testing.assert_close(copies, flat(experts[0].state_dict()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merge(tv[1]), flat(experts[1].state_dict()), rtol=1e-5, atol=1e-6)
    if granularity == "whole":
        torch.testing.assert_close(merge(tv.subset([2, 0, 1])), merge(tv), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merge(-tv) - origin, origin - merge(tv), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merge(tv * 3.0) - origin, 3 * (merge(tv) - origin), rtol=1e-5, atol=1e-5)


def test_a_weight_of_two_is_two_copies():
    points = unit_vectors(3, 5)
    weighted = mkl.karcher(as_vectors(points), weights=[2, 1, 1])["w"]
    repeated = mkl.karcher(as_vectors(points[[0, 0, 1, 2]]))["w"]
    torch.testing.assert_close(weighted, repeated, rtol=0, atol=1e-6)


def test_zero_task_vectors_count_in_the_length_only(base):
    assert mkl.karcher(vectors([0.0, 0.0], [3.0, 0.0], [0.0, 3.0]))["w"].tolist() == pytest.approx([math.sqrt(2)] * 2)
    zero = mkl.TaskVectors(base, [base, base])
    for granularity in ("whole", "layer"):
        assert torch.equal(flat(mkl.karcher(zero, granularity=granularity)), flat(base.state_dict()))


def test_scalars_and_empty_tensors():
    def model(value):
        return {"scalar": torch.tensor(value), "empty": torch.zeros(0, 3)}

    for granularity in ("whole", "layer"):
        merged = mkl.karcher(mkl.TaskVectors(model(0.0), [model(1.0), model(4.0)]), granularity=granularity)
        assert merged["scalar"].item() == pytest.approx(2.5)
        assert merged["empty"].shape == (0, 3)


def test_one_mean_although_a_point_is_far_from_it():
    """170 degrees apart is still in a hemisphere, so the mean is where the weights say, 17 degrees from the first."""
    angle = math.radians(170)
    tv = vectors([1.0, 0.0], [math.cos(angle), math.sin(angle)])
    merged = mkl.karcher(tv, weights=[9, 1])["w"]
    assert merged.tolist() == pytest.approx([math.cos(angle / 10), math.sin(angle / 10)], abs=1e-5)


def test_where_it_is_not_defined(tv):
    thirds = [[math.cos(a), math.sin(a)] for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    for rows in ([[1.0, 0.0], [-2.0, 0.0]], thirds):
        with pytest.raises(ValueError, match="the task vectors do not lie in an open hemisphere"):
            mkl.karcher(vectors(*rows))
        with pytest.raises(ValueError, match="the task vectors of 'w' do not lie"):
            mkl.karcher(vectors(*rows), granularity="layer")
    assert mkl.karcher(vectors(*thirds), weights=[1, 1, 0])["w"].tolist() == pytest.approx([0.5, math.sqrt(3) / 2])


def test_linearly_independent_vectors_always_lie_in_a_hemisphere():
    for seed in range(20):
        points = unit_vectors(6, 6, seed)
        cosines = points @ points.T
        if torch.linalg.eigvalsh(cosines)[0] > 1e-3:
            assert in_a_hemisphere(cosines, torch.ones(6, dtype=torch.float64))


def test_too_few_steps_are_said():
    cosines = normalise(as_vectors(unit_vectors(4, 6)).gram())
    with pytest.raises(ValueError, match="no mean in 2 steps"):
        spherical_mean(cosines, torch.full((4,), 0.25, dtype=torch.float64), iterations=2, tolerance=1e-12)


@pytest.mark.parametrize("weights", [[1, 2], [1, -1, 1], [0, 0, 0], [1, math.nan, 1]])
def test_wrong_weights(tv, weights):
    with pytest.raises(ValueError, match="expected 3 weights"):
        mkl.karcher(tv, weights=weights)


def test_wrong_input(tv):
    with pytest.raises(ValueError, match="whole or layer; got 'row'"):
        mkl.karcher(tv, granularity="row")
    with pytest.raises(ValueError, match="scale must be finite"):
        mkl.karcher(tv, scale=math.inf)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        mkl.karcher(tv, tolerance=0.0)


@pytest.mark.parametrize("granularity", ["whole", "layer"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_of_opposite_vectors_does_not_choose_a_direction(dtype, granularity):
    """The second expert is the first one's mirror image, as far as its dtype goes; and a triangle that cancels."""
    generator = torch.Generator().manual_seed(0)
    theta0, first, second = torch.randn(3, 500, generator=generator, dtype=torch.float64)
    mirrored = [theta0 + 0.1 * first, theta0 - 0.1 * first]
    cancelling = [theta0 + 0.1 * first, theta0 + 0.1 * second, theta0 - 0.1 * (first + second)]
    for experts in (mirrored, cancelling):
        tv = mkl.TaskVectors({"w": theta0.to(dtype)}, [{"w": expert.to(dtype)} for expert in experts])
        with pytest.raises(ValueError, match="some are opposite, or all cancel each other"):
            mkl.karcher(tv, granularity=granularity)
    with pytest.raises(ValueError, match="opposite"):
        mkl.slerp(mkl.TaskVectors({"w": theta0.to(dtype)}, [{"w": expert.to(dtype)} for expert in mirrored]))


def test_opposite_to_the_last_digit():
    """Their cosine may come out as -1 + 1e-16, and their sum longer than zero."""
    for seed in range(50):
        tau = torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        tv = as_vectors(torch.stack([tau, -3 * tau]))
        for merge in (mkl.karcher, mkl.slerp):
            with pytest.raises(ValueError, match="opposite"):
                merge(tv)


def test_nearly_opposite_vectors_of_full_precision_have_a_mean():
    """One degree from opposite, in float32 and float64: 89.5 degrees from both."""
    angle = math.radians(179)
    for dtype in (torch.float32, torch.float64):
        tv = as_vectors(torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=dtype))
        expected = [math.cos(angle / 2), math.sin(angle / 2)]
        for merge in (mkl.karcher, mkl.slerp):
            assert merge(tv)["w"].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_vector_that_is_tiny_beside_the_others_has_its_direction():
    tv = as_vectors(torch.tensor([[1e-9, 0.0], [0.0, 1.0]], dtype=torch.float64))
    assert mkl.karcher(tv)["w"].tolist() == pytest.approx([math.sqrt(0.125)] * 2)
