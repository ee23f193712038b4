import pytest
import torch

from mergekit_lite.geometry import cosines, largest_cosine
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
