"""Model Breadcrumbs."""

import math

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.breadcrumbs import trim_tails
from tests.test_task_vectors import vectors


def test_by_hand():
    # Of ten entries the largest (10) is an outlier, the next two (-9, 8) are kept.
    row = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, -9.0, 10.0]
    kept = trim_tails(vectors(row), density=0.2, outliers=0.1).flat()[0].tolist()
    assert kept == [0.0] * 7 + [8.0, -9.0, 0.0]
    merged = mkl.breadcrumbs(vectors(row, row), density=0.2, outliers=0.1, scale=0.5)["w"].tolist()
    assert merged == kept


def independent(tensor, density, outliers):
    """One tensor, entry by entry: how many are larger?"""
    values = tensor.flatten().tolist()
    top, kept = int(outliers * len(values)), max(1, round(density * len(values)))
    larger = [sum(abs(other) > abs(v) for other in values) for v in values]
    return [v if top <= rank < top + kept else 0.0 for v, rank in zip(values, larger, strict=True)]


@pytest.mark.parametrize(("density", "outliers"), [(0.15, 0.006), (0.5, 0.1), (1.0, 0.0), (0.9, 0.1)])
def test_against_counting(tv, density, outliers):
    for (_, _, before), (_, _, after) in zip(tv.layers(), trim_tails(tv, density, outliers).layers(), strict=True):
        for tau, trimmed in zip(before, after, strict=True):
            assert trimmed.flatten().tolist() == independent(tau, density, outliers)


def test_rows_are_lines_along_the_last_axis():
    base = {"w": torch.zeros(2, 4), "b": torch.zeros(4)}
    tv = mkl.TaskVectors(base, [{"w": torch.tensor([[1.0, 2, 3, 4], [50, 60, 70, 80]]), "b": torch.arange(4.0)}])
    rows = {name: taus[0].tolist() for name, _, taus in trim_tails(tv, 0.5, 0.25, "row").layers()}
    assert rows == {"w": [[0, 2, 3, 0], [0, 60, 70, 0]], "b": [0, 1, 2, 0]}
    layers = {name: taus[0].tolist() for name, _, taus in trim_tails(tv, 0.5, 0.25, "layer").layers()}
    assert layers["w"] == [[0, 0, 3, 4], [50, 60, 0, 0]]


def test_everything_kept_is_task_arithmetic(tv):
    merged, expected = mkl.breadcrumbs(tv, density=1.0, outliers=0.0, scale=0.3), mkl.task_arithmetic(tv, scale=0.3)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("density", "outliers"), [(0.0, 0.0), (0.9, 0.2), (0.5, -0.1), (math.nan, 0.0)])
def test_shares_of_one_whole(tv, density, outliers):
    with pytest.raises(ValueError, match="shares of one whole"):
        mkl.breadcrumbs(tv, density=density, outliers=outliers)
    with pytest.raises(ValueError, match="'layer' or 'row'"):
        mkl.breadcrumbs(tv, granularity="whole")
