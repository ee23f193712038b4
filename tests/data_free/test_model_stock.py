"""Model Stock."""

import math

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.model_stock import ratio
from tests.data_free.test_simple_merges import flat
from tests.test_task_vectors import vectors

HALF = math.sqrt(3) / 2


def test_by_hand():
    # 60 degrees: t = 2 (1/2) / (1 + 1/2) = 2/3, times the mean (3/4, sqrt(3)/4).
    merged = mkl.model_stock(vectors([1.0, 0.0], [0.5, HALF]))["w"]
    assert merged.tolist() == pytest.approx([0.5, HALF / 3], abs=1e-6)
    # Three vectors with the cosines 1/2, 1/2 and 0: on average 1/3, so t = 1 / (1 + 2/3) = 3/5.
    tv = vectors([1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0])
    cosines = [0.5, 0.0, 1 / math.sqrt(2)]
    mean = sum(cosines) / 3
    t = 3 * mean / (1 + 2 * mean)
    assert mkl.model_stock(tv)["w"].tolist() == pytest.approx([t * 2 / 3, t * 2 / 3, t / 3], abs=1e-6)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_it_is_the_foot_of_the_perpendicular_from_the_centre(k):
    """The paper's picture: one centre and deviations of one length, orthogonal to it and to each other."""
    generator = torch.Generator().manual_seed(k)
    q, _ = torch.linalg.qr(torch.randn(20, k + 1, generator=generator, dtype=torch.float64))
    centre, deviations = 0.8 * q[:, 0], 1.7 * q[:, 1:].T
    taus = centre + deviations
    foot = taus.T @ torch.linalg.lstsq(taus.T, centre[:, None]).solution[:, 0]
    base = torch.randn(20, generator=generator, dtype=torch.float64)
    tv = mkl.TaskVectors({"w": base}, [{"w": base + tau} for tau in taus])
    torch.testing.assert_close(mkl.model_stock(tv)["w"], base + foot, rtol=1e-10, atol=1e-10)


def test_against_a_loop_in_float64(base, experts):
    tv = mkl.TaskVectors(base.double(), [expert.double() for expert in experts])
    merged = mkl.model_stock(tv)
    for name, theta0, taus in tv.layers():
        taus = [tau.flatten() for tau in taus]
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosine = sum(float(taus[i] @ taus[j] / taus[i].norm() / taus[j].norm()) for i, j in pairs if taus[i].any()) / 3
        t = max(0.0, 3 * cosine / (1 + 2 * cosine))
        expected = (1 - t) * theta0 + t * sum(expert.state_dict()[name] for expert in experts) / 3
        torch.testing.assert_close(merged[name], expected, rtol=1e-9, atol=1e-12)


def test_units():
    # Row 0 of both is (1, 0); row 1 is (0, 1) and (0, 0): t is 1 and 0 by row.
    base = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    one = {"w": torch.eye(2), "b": torch.tensor([1.0, 0.0])}
    two = {"w": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([1.0, 0.0])}
    tv = mkl.TaskVectors(base, [one, two])
    row = mkl.model_stock(tv, granularity="row")
    assert row["w"].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert row["b"].tolist() == [1.0, 0.0], "a tensor with one axis is one row"
    c = 1 / math.sqrt(2)
    t = 2 * c / (1 + c)
    assert mkl.model_stock(tv)["w"].flatten().tolist() == pytest.approx([t, 0, 0, t / 2])
    assert mkl.model_stock(tv)["b"].tolist() == [1.0, 0.0]
    c = 2 / math.sqrt(3 * 2)  # the whole vectors: squared lengths 3 and 2, inner product 2
    t = 2 * c / (1 + c)
    whole = mkl.model_stock(tv, granularity="whole")
    assert whole["w"].flatten().tolist() == pytest.approx([t, 0, 0, t / 2])
    assert whole["b"].tolist() == pytest.approx([t, 0])


def test_a_filter_is_a_row():
    a, b = torch.zeros(2, 2, 2, 3, 3).unbind()
    a[0], b[0], a[1], b[1, 0] = 1.0, 1.0, 1.0, 1.0
    merged = mkl.model_stock(mkl.TaskVectors({"w": torch.zeros_like(a)}, [{"w": a}, {"w": b}]), granularity="row")["w"]
    c = 1 / math.sqrt(2)
    t = 2 * c / (1 + c)
    assert torch.equal(merged[0], torch.ones(2, 3, 3))
    torch.testing.assert_close(merged[1, 0], torch.full((3, 3), t))
    torch.testing.assert_close(merged[1, 1], torch.full((3, 3), t / 2))


def test_obtuse_angles():
    tv = vectors([1.0, 0.0], [-0.5, HALF])  # 120 degrees: the formula has t = -1 / (1/2) = -2
    assert mkl.model_stock(tv)["w"].tolist() == [0.0, 0.0]
    bare = mkl.model_stock(tv, clip=False)["w"].tolist()
    assert bare == pytest.approx([-0.5, -HALF], abs=1e-6)  # -2 times the mean (1/4, sqrt(3)/4)
    opposite = vectors([1.0, 0.0], [-2.0, 0.0])
    assert mkl.model_stock(opposite)["w"].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="cancel each other"):
        mkl.model_stock(opposite, clip=False)


def test_orthogonal_task_vectors_are_taken_for_noise():
    assert mkl.model_stock(vectors([1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]))["w"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("granularity", ["whole", "layer", "row"])
def test_what_holds_for_all_units(granularity, base, experts, tv):
    def merge(vectors):
        return flat(mkl.model_stock(vectors, granularity=granularity))

    origin = flat(base.state_dict())
    copies = merge(mkl.TaskVectors(base, [experts[0]] * 3))
    torch.testing.assert_close(copies, flat(experts[0].state_dict()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merge(tv[1]), flat(experts[1].state_dict()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merge(tv.subset([2, 0, 1])), merge(tv), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merge(-tv) - origin, origin - merge(tv), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merge(tv * 3.0) - origin, 3 * (merge(tv) - origin), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merge(mkl.TaskVectors(base, [base, base])), origin)


@pytest.mark.parametrize("granularity", ["whole", "layer", "row"])
def test_scalars_and_empty_tensors(granularity):
    def model(value):
        return {"scalar": torch.tensor(value), "empty": torch.zeros(0, 3), "none": torch.zeros(3, 0)}

    tv = mkl.TaskVectors(model(0.0), [model(1.0), model(2.0)])
    merged = mkl.model_stock(tv, granularity=granularity)
    assert merged["scalar"].item() == pytest.approx(1.5)
    assert merged["empty"].shape == (0, 3)


def test_ratios_of_many_units_at_once():
    grams = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 4.0]], [[4.0, 1.0], [1.0, 1.0]]])
    assert ratio(grams.double()).tolist() == pytest.approx([1.0, 0.0, 2 / 3])


def test_wrong_input(tv):
    with pytest.raises(ValueError, match="whole, layer, row; got 'tensor'"):
        mkl.model_stock(tv, granularity="tensor")
