import pytest
import torch

from mergekit_lite.geometry import cosines, disentanglement_error, disentanglement_map, largest_cosine
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
