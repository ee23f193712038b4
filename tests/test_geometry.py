import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.geometry import (
    cosines,
    disentanglement_error,
    disentanglement_map,
    first_order_interference,
    grams,
    interference,
    largest_cosine,
    mean_cosine,
    normalise,
    principal_cosines,
    sign_conflicts,
)
from tests.test_task_vectors import vectors


def test_cosines_by_hand():
    tv = vectors([1.0, 0.0], [3.0, 3.0], [0.0, -2.0])
    half = 0.5**0.5
    expected = torch.tensor([[1, half, 0], [half, 1, -half], [0, -half, 1]], dtype=torch.float64)
    torch.testing.assert_close(cosines(tv), expected)
    assert largest_cosine(tv) == pytest.approx(half)


def test_a_zero_task_vector_has_no_direction():
    assert cosines(vectors([0.0, 0.0], [1.0, 0.0])).tolist() == [[1, 0], [0, 1]]


def test_one_task_vector_has_no_neighbour():
    assert largest_cosine(vectors([1.0, 2.0])) == 0.0


# ---------------------------------------------------------------- layers and rows


def test_layers_and_rows_add_up_to_the_whole(tv):
    whole, layers, rows = (grams(tv, granularity) for granularity in ("whole", "layer", "row"))
    torch.testing.assert_close(whole["whole"], tv.gram())
    torch.testing.assert_close(sum(layers.values()), tv.gram())
    for name, _, taus in tv.layers():
        assert rows[name].shape == (taus.shape[1] if taus.ndim > 2 else 1, len(tv), len(tv))
        torch.testing.assert_close(rows[name].sum(0), layers[name])


def test_only_some_tensors_count(tv):
    names = list(grams(tv, where=lambda name, theta0: theta0.ndim >= 2))
    assert names == [name for name, theta0, _ in tv.layers() if theta0.ndim >= 2]
    assert 0 < len(names) < len(list(tv.layers()))
    with pytest.raises(ValueError, match="whole, layer, row; got 'column'"):
        grams(tv, "column")


def test_mean_cosines_of_many_gram_matrices():
    gram = torch.tensor([[[4.0, 2.0], [2.0, 1.0]], [[1.0, -0.3], [-0.3, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(mean_cosine(gram), torch.tensor([1.0, 0.3, 0.0]))
    assert normalise(gram)[0].tolist() == [[1, 1], [1, 1]]


# ---------------------------------------------------------------- signs and subspaces


def test_sign_conflicts_by_hand():
    tv = vectors([1.0, 2.0, -3.0, 0.0], [1.0, -2.0, 3.0, 5.0], [0.0, 0.0, 0.0, 0.0])
    conflicts = sign_conflicts(tv)
    assert conflicts[0, 1].item() == pytest.approx(2 / 3), "of the three weights that both move"
    assert conflicts[0, 0] == conflicts[1, 1] == 0
    assert conflicts[0, 2].isnan(), "nothing to disagree about"


@pytest.mark.parametrize("correlation", [0.0, 0.3, -0.6])
def test_sign_conflicts_of_gaussian_vectors_are_their_angle(correlation):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 200_000, generator=generator)
    b = correlation * a + (1 - correlation**2) ** 0.5 * b
    tv = mkl.TaskVectors({"w": torch.zeros_like(a)}, [{"w": a}, {"w": b}])
    expected = torch.acos(torch.tensor(correlation)) / torch.pi
    assert sign_conflicts(tv)[0, 1].item() == pytest.approx(expected.item(), abs=0.004)


def test_principal_angles_between_planes():
    turned = torch.tensor(0.4)
    basis = torch.eye(6)
    first = basis[:, :2]
    second = torch.stack([basis[:, 0], turned.cos() * basis[:, 1] + turned.sin() * basis[:, 2]], dim=1)
    third = basis[:, 4:]
    changes = [u @ torch.diag(torch.tensor([3.0, 2.0])) @ torch.eye(2, 5) for u in (first, second, third)]
    base = {"w": torch.zeros(6, 5), "b": torch.zeros(6), "depthwise": torch.zeros(6, 1, 3, 3)}
    tv = mkl.TaskVectors(base, [base | {"w": change} for change in changes])
    found = principal_cosines(tv, 2)
    assert list(found) == ["w"], "no vectors, no depthwise kernels"
    torch.testing.assert_close(found["w"][0, 1], torch.tensor([1.0, turned.cos()], dtype=torch.float64))
    torch.testing.assert_close(found["w"][0, 2], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found["w"][0, 0], torch.ones(2, dtype=torch.float64))
    inputs = principal_cosines(tv, 2, side="right")["w"]
    torch.testing.assert_close(inputs, torch.ones(3, 3, 2, dtype=torch.float64))  # all read the same two inputs


def test_random_subspaces_overlap_as_chance_says():
    generator = torch.Generator().manual_seed(0)
    experts = [{"w": torch.randn(80, 60, generator=generator)} for _ in range(8)]
    overlap = principal_cosines(mkl.TaskVectors({"w": torch.zeros(80, 60)}, experts), 6)["w"].square().mean(-1)
    different = overlap[~torch.eye(8, dtype=torch.bool)]
    assert different.mean().item() == pytest.approx(6 / 80, abs=0.01)


def test_subspaces_need_a_rank_and_a_side(tv):
    with pytest.raises(ValueError, match="got 0 and 'left'"):
        principal_cosines(tv, 0)
    with pytest.raises(ValueError, match="got 1 and 'top'"):
        principal_cosines(tv, 1, side="top")


# ---------------------------------------------------------------- interference


def test_interference_of_quadratic_losses_by_hand():
    """L_i = ‖θ − θ_i‖² / 2: first order is −λ(1 − λ)⟨τ_i, τ_j⟩, and λ²‖τ_j‖² / 2 is what it leaves out."""
    tv = vectors([1.0, 0.5], [2.0, 3.0])
    targets = {name: tv[name].flat()[0] for name in tv.names}
    scale, gram = 0.3, tv.gram()

    def loss(state, task):
        return float((state["w"] - targets[task]).square().sum() / 2)

    def gradient(state, task):
        return {"w": state["w"] - targets[task]}

    first = first_order_interference(tv, gradient, scale)
    measured = interference(tv, loss, scale)
    assert first[0, 1].item() == pytest.approx(-scale * (1 - scale) * gram[0, 1].item())
    for i, j in ((0, 1), (1, 0)):
        expected = first[i, j] + scale**2 * gram[j, j] / 2
        assert measured[i, j].item() == pytest.approx(expected.item(), rel=1e-5)
    assert measured.diagonal().tolist() == first.diagonal().tolist() == [0, 0]


def test_the_gradient_of_a_suite_is_the_slope_of_its_loss(suite):
    """A short walk along a task vector changes the measured loss by gradient times step."""
    few = suite.cut(40, tasks=["mnist", "fashion"])
    tv = few.task_vectors["fashion"]
    slope = few.gradient(None, "mnist")
    predicted = sum((slope[name] * taus[0]).sum().item() for name, _, taus in tv.layers() if name in slope)
    before, after = (
        few.losses(mkl.task_arithmetic(tv, scale=scale), tasks=["mnist"])["mnist"] for scale in (-1e-3, 1e-3)
    )
    assert (after - before) / 2e-3 == pytest.approx(predicted, rel=0.02)
    assert all(not p.requires_grad or p.grad is None for p in few.model.parameters()), "the suite is unchanged"


# ---------------------------------------------------------------- disentanglement


def table(scales, task):
    """Predictions for four images: those of task a turn with its own scale, and with b's if b's is large."""
    a, b = scales
    own, foreign = (a, b) if task == "a" else (b, a)
    return torch.tensor([own > 0, own > 0.5, foreign > 0.5, False]).long()


def test_the_error_counts_changed_predictions():
    assert disentanglement_error(table, ["a", "b"], [0.0, 0.0]) == 0
    assert disentanglement_error(table, ["a", "b"], [0.4, 0.4]) == 0
    assert disentanglement_error(table, ["a", "b"], [0.4, 1.0]) == 0.25  # one of four images of task a
    assert disentanglement_error(table, ["a", "b"], [1.0, 1.0]) == 0.5


def test_a_map_has_the_first_scale_along_its_rows():
    errors = disentanglement_map(table, ["a", "b"], [0.0, 0.4, 1.0])
    assert errors.tolist() == [[0, 0, 0.25], [0, 0, 0.25], [0.25, 0.25, 0.5]]


def test_a_map_asks_for_each_merge_once():
    asked = []
    disentanglement_map(lambda s, t: asked.append((s, t)) or table(s, t), ["a", "b"], [0.0, 0.5, 1.0])
    assert len(asked) == len(set(asked))


def test_wrong_numbers_of_scales_and_tasks():
    with pytest.raises(ValueError, match=r"expected 2 scales \(one per task\), got 1"):
        disentanglement_error(table, ["a", "b"], [1.0])
    with pytest.raises(ValueError, match="needs two tasks; got 3"):
        disentanglement_map(table, ["a", "b", "c"], [0.0])
