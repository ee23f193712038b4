"""Merges that are one model per task."""

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.task_conditioned import TaskConditioned
from tests.test_task_vectors import Tied


@pytest.fixture
def small() -> TaskConditioned:
    base = {"w": torch.tensor([1.0, 1.0, 1.0], dtype=torch.float16), "n": torch.tensor(7)}
    shared = {"w": torch.tensor([2.0, 3.0, 5.0], dtype=torch.float16), "n": torch.tensor(7)}
    masks = {"w": torch.tensor([[True, True, False], [False, False, True]])}
    return TaskConditioned(mkl.TaskVectors(base, [shared]), masks, {"a": 1.0, "b": 0.5})


def test_it_is_a_mapping_of_models(small):
    assert list(small) == ["a", "b"]
    assert len(small) == 2
    assert small["a"]["w"].tolist() == [2.0, 3.0, 1.0]
    assert small["b"]["w"].tolist() == [1.0, 1.0, 3.0]
    assert small["b"]["w"].dtype == torch.float16
    assert list(small["b"]) == ["w", "n"]
    assert small["b"]["n"].item() == 7
    with pytest.raises(KeyError, match="no task named 'c'; there are a, b"):
        small["c"]


def test_what_it_takes_to_store(small):
    assert small.density == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    # Two models of three half-precision weights; for each of two tasks a byte for three bits, and a scale.
    assert small.nbytes == 2 * 3 * 2 + 2 * (1 + 4)
    assert repr(small) == "TaskConditioned(a, b; 0.0 MB, where 2 experts take 0.0 MB)"


def test_names_that_an_expert_untied_are_kept_apart():
    merged = mkl.tall_masks(mkl.TaskVectors(Tied(0.0), [Tied(1.0), Tied(2.0, tie=False)]))
    assert set(merged.masks) == {"embed.weight", "head.weight"}
    tied = mkl.tall_masks(mkl.TaskVectors(Tied(0.0), [Tied(1.0), Tied(2.0)]))
    assert set(tied.masks) == {"embed.weight"}
    state = tied["expert 1"]
    assert state["head.weight"] is state["embed.weight"]


def test_masks_are_bits(tv):
    for merged in (mkl.emr(tv), mkl.tall_masks(tv)):
        assert all(mask.dtype == torch.bool for mask in merged.masks.values())
        weights = tv.dimension
        bits = sum((mask[0].numel() + 7) // 8 for mask in merged.masks.values())
        assert merged.nbytes == 2 * 4 * weights + 3 * (bits + 4)
