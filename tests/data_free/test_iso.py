"""Iso-C and Iso-CTS."""

import math

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.iso import dimensions, merge_matrices
from tests.data_free.test_tsv import matrices, random

METHODS = [mkl.iso_c, mkl.iso_cts]


def by_svd(deltas, common_fraction):
    """The paper's algorithm with the library's singular value decomposition, for deltas of full rank."""
    rank, tasks = min(deltas.shape[1:]), len(deltas)
    total = deltas.sum(0)
    u, s, vt = torch.linalg.svd(total, full_matrices=False)
    if common_fraction == 1:
        return s.mean() * u @ vt
    common, specific = dimensions(rank, tasks, common_fraction)
    left, sigma, right = [u[:, :common]], [s[:common]], [vt[:common].T]
    for delta in deltas:
        rest = delta - left[0] @ left[0].T @ delta
        u, s, vt = torch.linalg.svd(rest, full_matrices=False)
        left.append(u[:, :specific])
        sigma.append(s[:specific])
        right.append(vt[:specific].T)
    (p, _, q), (r, _, t) = (torch.linalg.svd(torch.cat(side, 1), full_matrices=False) for side in (left, right))
    return torch.cat(sigma).mean() * p @ q @ (r @ t).T


# ---------------------------------------------------------------- by hand


def test_iso_c_by_hand():
    # The sum is diag(6, -2): singular values 6 and 2, mean 4.
    tv = matrices(torch.diag(torch.tensor([5.0, 1.0])), torch.diag(torch.tensor([1.0, -3.0])))
    torch.testing.assert_close(mkl.iso_c(tv)["w"], torch.diag(torch.tensor([4.0, -4.0])))
    torch.testing.assert_close(mkl.iso_c(tv, scale=0.5)["w"], torch.diag(torch.tensor([2.0, -2.0])))


def test_iso_cts_by_hand():
    # The sum is diag(12, 8, 2, 1), so k = 2 directions are common: the first two. What is left of the tasks is
    # diag(0, 0, 3, -1) and diag(0, 0, -1, 2), with the strongest directions e3 (3) and e4 (2).
    tv = matrices(torch.diag(torch.tensor([6.0, 4.0, 3.0, -1.0])), torch.diag(torch.tensor([6.0, 4.0, -1.0, 2.0])))
    eye = torch.eye(4)
    torch.testing.assert_close(mkl.iso_cts(tv, common_fraction=0.5)["w"], (12 + 8 + 3 + 2) / 4 * eye)
    torch.testing.assert_close(mkl.iso_c(tv)["w"], (12 + 8 + 2 + 1) / 4 * eye)


@pytest.mark.parametrize(
    ("rank", "tasks", "fraction", "expected"),
    [
        (768, 8, 0.8, (616, 19)),  # 768 - 614 = 154 directions, 19.25 per task
        (768, 20, 0.8, (608, 8)),  # 7.7 per task is rounded up
        (768, 8, 1.0, (768, 0)),
        (16, 8, 0.8, (16, 0)),  # half a direction per task: none
        (12, 8, 0.0, (4, 1)),  # 1.5 per task would be rounded to 2, but 16 are too many
        (12, 3, 0.0, (0, 4)),
    ],
)
def test_dimensions_fill_the_rank(rank, tasks, fraction, expected):
    common, specific = dimensions(rank, tasks, fraction)
    assert (common, specific) == expected
    assert common + tasks * specific == rank


# ---------------------------------------------------------------- against the decomposition of the library


@pytest.mark.parametrize("fraction", [1.0, 0.8, 0.5, 0.0])
@pytest.mark.parametrize("shape", [(3, 12, 18), (3, 18, 12), (4, 16, 16)])
def test_against_the_singular_value_decomposition(shape, fraction):
    deltas = random(*shape)
    expected = by_svd(deltas, fraction)
    torch.testing.assert_close(merge_matrices(deltas, fraction), expected, rtol=0, atol=1e-10)
    single = mkl.iso_cts(matrices(*deltas.float()), common_fraction=fraction)["w"]
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=1e-4)  # rounding the deltas, not the method


# ---------------------------------------------------------------- what they do


@pytest.mark.parametrize("fraction", [1.0, 0.8, 0.5, 0.0])
def test_the_spectrum_is_flat(fraction):
    values = torch.linalg.svdvals(merge_matrices(random(3, 12, 18), fraction))
    torch.testing.assert_close(values, values[:1].expand(12))


def test_iso_c_is_the_nearest_multiple_of_its_directions_and_no_longer_than_the_sum():
    deltas = random(3, 7, 9)
    total, merged = deltas.sum(0), merge_matrices(deltas, 1.0)
    assert ((total - merged) * merged).sum().abs() < 1e-9 * merged.square().sum()
    assert merged.norm() < total.norm()


def test_an_expert_that_is_isotropic_stays_as_it_is():
    rotation, _ = torch.linalg.qr(random(6, 6))
    for method in METHODS:
        torch.testing.assert_close(method(matrices(0.3 * rotation))["w"], 0.3 * rotation)


def test_with_one_task_the_two_are_one():
    deltas = random(1, 10, 14)
    torch.testing.assert_close(merge_matrices(deltas, 0.5), merge_matrices(deltas, 1.0))


def test_directions_that_do_not_exist_get_no_weight():
    # A sum of rank 2: its mean singular value is (3 + 1) / 2, and the other four directions stay empty.
    a, b = torch.zeros(6, 8), torch.zeros(6, 8)
    a[0, 0], b[1, 1] = 3.0, 1.0
    expected = torch.zeros(6, 8)
    expected[0, 0] = expected[1, 1] = 2.0
    torch.testing.assert_close(mkl.iso_c(matrices(a, b))["w"], expected)
    for method in METHODS:
        assert not method(matrices(0 * a, 0 * a))["w"].any()
        assert not method(matrices(a, -a), scale=2.0)["w"][2:].any()


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_they_turn_with_inputs_and_outputs(fraction):
    deltas = random(3, 12, 9)
    (left, _), (right, _) = torch.linalg.qr(random(12, 12, seed=1)), torch.linalg.qr(random(9, 9, seed=2))
    merged = merge_matrices(deltas, fraction)
    torch.testing.assert_close(merge_matrices(left @ deltas @ right, fraction), left @ merged @ right)
    torch.testing.assert_close(merge_matrices(-3 * deltas, fraction), -3 * merged)
    torch.testing.assert_close(merge_matrices(deltas[[2, 0, 1]], fraction), merged)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_matrix_is_averaged_and_scaled(method, tv, base):
    merged, mean, theta0 = method(tv, scale=2.0), mkl.average(tv), base.state_dict()
    for name in ("0.bias", "1.weight", "3.bias"):
        torch.testing.assert_close(merged[name], theta0[name] + 2 * (mean[name] - theta0[name]))
    assert not torch.allclose(merged["3.weight"], theta0["3.weight"] + 2 * (mean["3.weight"] - theta0["3.weight"]))


# ---------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize("scale", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_the_scale_is_finite(method, scale, tv):
    with pytest.raises(ValueError, match="finite"):
        method(tv, scale=scale)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_the_common_fraction_is_a_share(fraction, tv):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        mkl.iso_cts(tv, common_fraction=fraction)
