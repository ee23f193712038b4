"""Model Stock and the Karcher mean."""

import torch
from fusion_bench.method.model_stock import ModelStock

import mergekit_lite as mkl
from mergekit_lite.data_free.model_stock import ratio
from mergekit_lite.geometry import grams, normalise
from tests.parity.checkpoints import assert_same, difference

# ---------------------------------------------------------------- Model Stock


def test_model_stock_by_layer(models):
    """Without a clip, which mergekit has not: a negative mean cosine takes it away from all experts."""
    theirs = models.by_mergekit("model_stock")
    assert_same(mkl.model_stock(models.tv, clip=False), theirs, models.base)
    ours = mkl.model_stock(models.tv)
    negative = [name for name, gram in grams(models.tv).items() if ratio(gram, clip=False) < 0]
    for name in models.base:
        if name in negative:
            assert torch.equal(ours[name], models.base[name])
            assert not torch.equal(theirs[name], models.base[name])
        else:
            assert torch.allclose(ours[name], theirs[name], atol=1e-5)


def test_model_stock_by_row(models):
    """The same but for convolutions: there mergekit takes every line of every kernel for a row, we a whole filter."""
    ours, theirs = (
        mkl.model_stock(models.tv, granularity="row", clip=False),
        models.by_mergekit("model_stock", filter_wise=True),
    )
    assert difference(ours, theirs, models.base) > 0.01
    theirs["conv.weight"] = ours["conv.weight"]
    assert_same(ours, theirs, models.base)


def test_model_stock_of_two_models(models):
    """fusion-bench agrees for two models, ..."""
    two = models.first(2)
    assert_same(mkl.model_stock(two.tv, clip=False), two.by_fusion_bench(ModelStock()), two.base)


def test_model_stock_of_more_models(models):
    """... and for more takes the mean of the pairs' angles, where we take the mean of their cosines."""
    doubles = models.double()
    theirs = doubles.by_fusion_bench(ModelStock())

    def merge(name, taus):
        k = len(taus)
        cosines = normalise(taus.flatten(1) @ taus.flatten(1).T)
        pairs = cosines[torch.triu_indices(k, k, 1).unbind()]
        cosine = float(pairs.arccos().mean().cos())
        return k * cosine / (1 + (k - 1) * cosine) * taus.mean(0)

    assert_same(doubles.tv.map(merge), theirs, doubles.base)
    ours = mkl.model_stock(doubles.tv, clip=False)
    assert 1e-4 < difference(ours, theirs, doubles.base) < 0.1


# ---------------------------------------------------------------- Karcher mean


def test_karcher_mean_of_whole_weights(models):
    """The points are whole weights there, tensor by tensor, as ours are with a base of zeros."""
    theirs = models.by_mergekit("karcher", with_base=False, max_iter=1000, tol=1e-7)
    whole = models.from_zero()
    assert_same(mkl.karcher(whole.tv, granularity="layer"), theirs, whole.base)


def test_karcher_mean_after_ten_steps(models):
    """By default it stops when a step is shorter than 1e-5, or after ten steps, and leaves errors of that size."""
    whole, theirs = models.from_zero(), models.by_mergekit("karcher", with_base=False)
    assert 1e-6 < difference(mkl.karcher(whole.tv, granularity="layer"), theirs, whole.base) < 1e-5
