"""Methods that work on singular values of matrices, TSV-Merging, Iso-C and Iso-CTS; and WUDI.

In float32 the peers' singular value decompositions alone cost more than 1e-6. So their functions get the float32
weights in double precision, and ours the weights as they are; and both agree to 1e-9 if both compute in float64.
"""

import pytest
import torch
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction as tsvm
from fusion_bench.method.wudi.wudi import wudi_merging

import mergekit_lite as mkl
from mergekit_lite.data_free.wudi import losses
from tests.parity.checkpoints import assert_same, difference

CONVOLUTION = "conv.weight"
CASES = {
    "TSV": (mkl.tsv, {}, tsvm, {}),
    "Iso-C": (mkl.iso_c, {}, iso_c, {}),
    "Iso-CTS": (mkl.iso_cts, {}, iso_cts, {"common_space_fraction": 0.8}),
    "Iso-CTS, half in common": (mkl.iso_cts, {"common_fraction": 0.5}, iso_cts, {"common_space_fraction": 0.5}),
}


def by(function, models, **arguments):
    """The base plus the task vector that one of fusion-bench's functions makes of the experts'."""
    return models.plus(function(models.taus(), accelerator="cpu", **arguments))


@pytest.mark.parametrize("case", CASES)
def test_spectral_merges(models, case):
    ours, options, theirs, arguments = CASES[case]
    single = models.without(CONVOLUTION)
    double = single.double()
    exact = by(theirs, double, **arguments)
    assert_same(ours(single.tv, **options), exact, single.base)
    assert_same(ours(double.tv, **options), exact, double.base, 1e-9)
    assert difference(by(theirs, single, **arguments), exact, single.base) < 2e-5  # their own rounding


@pytest.mark.parametrize("case", CASES)
def test_convolutions_are_matrices_to_us(models, case):
    """With a row for each filter. To fusion-bench only tensors of two axes are matrices; it averages the others."""
    ours, options, theirs, arguments = CASES[case]
    conv = models.only(CONVOLUTION).double()
    as_matrices = [{name: tau.flatten(1) for name, tau in taus.items()} for taus in conv.taus()]
    matrix = theirs(as_matrices, accelerator="cpu", **arguments)[CONVOLUTION]
    assert_same(ours(conv.tv, **options), conv.plus({CONVOLUTION: matrix.view(8, 3, 3, 3)}), conv.base, 1e-9)
    mean = by(theirs, conv, **arguments)
    assert_same(mkl.average(conv.tv), mean, conv.base)
    assert difference(ours(conv.tv, **options), mean, conv.base) > 0.1


def test_tsv_of_a_matrix_with_less_rank_than_tasks():
    """Of a matrix with 3 rows each of 5 tasks may keep 3 // 5 = 0 directions. fusion-bench keeps none, we keep one."""
    generator = torch.Generator().manual_seed(0)
    taus = [{"w": torch.randn(3, 4, generator=generator)} for _ in range(5)]
    tv = mkl.TaskVectors({"w": torch.zeros(3, 4)}, taus)
    assert not tsvm(taus, accelerator="cpu")["w"].any()
    assert mkl.tsv(tv)["w"].norm() > 1


# ---------------------------------------------------------------- WUDI-Merging


def small(models):
    """Task vectors with entries of 0.001, such as those of a fine-tuned transformer: Adam's steps of 1e-5 fit them."""
    return models.without(CONVOLUTION).times(0.001)


def test_wudi(models):
    """fusion-bench's descent and ours go the same way, all 300 steps."""
    few = small(models)
    assert_same(mkl.wudi(few.tv, others="average"), by(wudi_merging, few), few.base)
    double = few.double()
    assert_same(mkl.wudi(double.tv, others="average"), by(wudi_merging, double), double.base, 1e-12)


def test_wudi_leaves_other_tensors_alone(models):
    """As the authors' code does, and by default ours; fusion-bench averages whatever is no matrix."""
    few = small(models)
    ours, theirs = mkl.wudi(few.tv), by(wudi_merging, few)
    average = mkl.average(few.tv)
    for name, theta0 in few.base.items():
        if theta0.ndim < 2:
            assert torch.equal(ours[name], theta0)
            assert torch.allclose(theirs[name], average[name], atol=1e-9)


def test_wudi_has_not_arrived_after_300_steps(models):
    """Where there are more tasks the descent ends farther from the minimum, which we can compute."""
    few = small(models).double()
    start, theirs, least = (
        sum(losses(few.tv, merged).values())
        for merged in (mkl.wudi(few.tv, steps=0), by(wudi_merging, few), mkl.wudi(few.tv, solver="exact"))
    )
    assert least < theirs < start
    left = (theirs - least) / (start - least)  # 0.04, 0.13 and 0.30 for 3, 5 and 8 tasks
    assert 0.02 < left < 0.4
