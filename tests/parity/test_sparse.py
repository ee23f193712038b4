"""Methods that set entries to zero: TIES, DARE, Model Breadcrumbs, DELLA."""

from collections.abc import Callable

import pytest
import torch
from fusion_bench.method.dare import DareTaskArithmetic, DareTiesMerging
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from mergekit.merge_methods import merge_state_dicts
from torch import Tensor

import mergekit_lite as mkl
from mergekit_lite.data_free.ties import elect_and_merge
from tests.parity.checkpoints import assert_same, difference

# ---------------------------------------------------------------- TIES


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_ties_by_layer(models, density):
    """Mergekit trims each tensor by itself."""
    ours = mkl.ties(models.tv, density=density, granularity="layer")
    assert_same(ours, models.by_mergekit("ties", density=density, weight=1.0), models.base)


def test_ties_rounds_the_number_of_entries(models):
    """We keep the nearest number of entries to the density, mergekit the next smaller one."""
    theirs = models.by_mergekit("ties", density=0.24, weight=1.0)
    for name, t in models.base.items():
        exact = 0.24 * t.numel()
        one = models.only(name)
        assert_same(mkl.ties(one.tv, density=int(exact) / t.numel()), {name: theirs[name]}, one.base)
        if round(exact) != int(exact):
            assert difference(mkl.ties(one.tv, density=0.24), {name: theirs[name]}, one.base) > 0.01


def test_ties_with_weights(models):
    """The weights of mergekit are votes, too: they multiply the task vectors before a sign is elected."""
    weights = torch.arange(1.0, 1 + len(models.experts))
    theirs = models.by_mergekit("ties", density=0.25, weight=weights.tolist(), normalize=False)
    weighted = mkl.trim(models.tv, 0.25, "layer").transform_pieces(lambda place, taus: weights[:, None] * taus)
    assert_same(elect_and_merge(weighted, scale=1.0, combine="sum"), theirs, models.base)


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("density", [0.25, 0.5])
def test_ties_of_the_whole_task_vector(models, combine, density):
    """fusion-bench trims the whole task vector, as we do; but it keeps one entry more than the density says."""
    tv = models.tv
    theirs = tv.add(ties_merging(tv.flat(), reset_thresh=density, merge_func=combine))
    one_more = (int(density * tv.dimension) + 1) / tv.dimension
    assert_same(mkl.ties(tv, density=one_more, combine=combine), theirs, models.base)
    assert 1e-3 < difference(mkl.ties(tv, density=density, combine=combine), theirs, models.base) < 0.1


def test_ties_where_votes_cancel(models):
    """Two opposite experts elect nothing. We and fusion-bench take the majority's sign then, mergekit always plus."""
    tv = mkl.TaskVectors(
        {"w": torch.zeros(4)}, [{"w": torch.tensor(w)} for w in ([-1.0, -1, -1, 2], [-1.0, -1, -1, -2])]
    )
    minus = {"w": torch.tensor([-1.0, -1, -1, -2])}
    assert mkl.ties(tv, density=1)["w"].tolist() == minus["w"].tolist()
    # fusion-bench cannot keep everything; 0.75 of its 4 entries are 3 and one more
    assert ties_merging(tv.flat(), reset_thresh=0.75, merge_func="mean").tolist() == minus["w"].tolist()
    states = [{"w": t} for t in tv.flat()]
    theirs = merge_state_dicts([tv.base, *states], "ties", parameters={"weight": 1.0}, base=0)
    assert theirs["w"].tolist() == [-1, -1, -1, 2]


# ---------------------------------------------------------------- DARE


@pytest.fixture
def survivors(monkeypatch) -> Callable[[mkl.TaskVectors], tuple[dict[str, Tensor], list[Tensor]]]:
    """Lets both peers keep the entries that we keep: where they draw random numbers, they get our choice.

    A function of our thinned task vectors, which returns their masks by tensor name, and a list in which mergekit's
    probabilities appear as soon as it asks for random numbers.
    """

    def share(thinned: mkl.TaskVectors) -> tuple[dict[str, Tensor], list[Tensor]]:
        masks = {name: taus != 0 for name, _, taus in thinned.layers()}
        # mergekit asks tensor by tensor, fusion-bench expert by expert
        for_mergekit = (mask for of_all in masks.values() for mask in of_all)
        for_fusion_bench = (of_all[k] for k in range(len(thinned)) for of_all in masks.values())
        chances: list[Tensor] = []

        def bernoulli(probabilities: Tensor) -> Tensor:
            chances.append(probabilities)
            return next(for_mergekit).view(probabilities.shape).to(probabilities.dtype)

        def rand_like(weights: Tensor) -> Tensor:
            return next(for_fusion_bench).to(weights.dtype)  # it keeps what is larger than its probability

        monkeypatch.setattr(torch, "bernoulli", bernoulli)
        monkeypatch.setattr(torch, "rand_like", rand_like)
        return masks, chances

    return share


@pytest.mark.parametrize("drop", [0.5, 0.75])
def test_dare(models, survivors, drop):
    """Both peers divide by 1 - drop, mergekit if its own rescaling is switched off and the weight says so."""
    survivors(mkl.drop_and_rescale(models.tv, drop))
    ours = mkl.dare(models.tv, drop=drop, scale=0.3)
    algorithm = DareTaskArithmetic(scaling_factor=0.3, sparsity_ratio=drop, only_on_linear_weights=False)
    assert_same(ours, models.by_fusion_bench(algorithm), models.base)
    theirs = models.by_mergekit("dare_linear", density=1 - drop, weight=0.3 / (1 - drop), rescale=False)
    assert_same(ours, theirs, models.base)


def test_dare_at_a_probability_that_16_bits_round(models, survivors):
    """Our random numbers have 16 bits, so 0.9 is realised as 1 - 6554 / 65536, and what was realised is divided by."""
    survivors(mkl.drop_and_rescale(models.tv, 0.9))
    algorithm = DareTaskArithmetic(scaling_factor=0.3, sparsity_ratio=0.9, only_on_linear_weights=False)
    theirs = models.by_fusion_bench(algorithm)
    assert difference(mkl.dare(models.tv, drop=0.9, scale=0.3), theirs, models.base) == pytest.approx(6.1e-5, rel=0.1)
    assert_same(mkl.dare(models.tv, drop=0.9, scale=0.3 * 10 * 6554 / 65536), theirs, models.base)


def test_dare_as_mergekit_rescales_it(models, survivors):
    """By default mergekit gives each tensor its former 1-norm, instead of dividing by 1 - drop.

    That is 1 / (1 - drop) on average, but varies with what survived: much in small tensors, little in large ones.
    """
    masks, _ = survivors(mkl.drop_and_rescale(models.tv, 0.5))
    theirs = models.by_mergekit("dare_linear", density=0.5, weight=0.3)
    ours = mkl.task_arithmetic(models.tv.transform(norm_kept(masks)), scale=0.3)
    assert_same(ours, theirs, models.base)
    assert 0.01 < difference(mkl.dare(models.tv, drop=0.5, scale=0.3), theirs, models.base) < 0.2


def test_dare_with_ties(models, survivors):
    """With these options both average what agrees with the elected sign; fusion-bench trims once more before."""
    survivors(mkl.drop_and_rescale(models.tv, 0.75))
    ours = mkl.dare(models.tv, drop=0.75, scale=1.0, combine="ties")
    theirs = models.by_mergekit("dare_ties", density=0.25, weight=1.0, rescale=False, normalize=True, **{"lambda": 4})
    assert_same(ours, theirs, models.base)
    algorithm = DareTiesMerging(
        sparsity_ratio=0.75,
        only_on_linear_weights=False,
        rescale=True,
        scaling_factor=1.0,
        threshold=0.5,  # trimming to a half changes nothing where three quarters are zero
        remove_keys=[],
        merge_func="mean",
    )
    assert_same(ours, models.by_fusion_bench(algorithm), models.base)


def test_dare_with_ties_as_mergekit_combines_it(models, survivors):
    """By default it adds up what agrees, and keeps each tensor's 1-norm."""
    masks, _ = survivors(mkl.drop_and_rescale(models.tv, 0.75))
    theirs = models.by_mergekit("dare_ties", density=0.25, weight=1.0)
    ours = elect_and_merge(models.tv.transform(norm_kept(masks)), scale=1.0, combine="sum")
    assert_same(ours, theirs, models.base)


def norm_kept(masks):
    """The rescaling of mergekit: what survives of a tensor is brought to the 1-norm that the tensor had."""

    def rescale(name, taus):
        survived = taus * masks[name]
        norms = [t.flatten(1).abs().sum(1).view(-1, *[1] * (taus.ndim - 1)) for t in (taus, survived)]
        return survived * norms[0] / norms[1].clamp(min=1e-9)  # of a small tensor nothing may survive

    return rescale


# ---------------------------------------------------------------- Model Breadcrumbs


@pytest.mark.parametrize("outliers", [0.0, 0.05, 0.2])
def test_breadcrumbs(models, outliers):
    ours = mkl.breadcrumbs(models.tv, density=0.25, outliers=outliers, scale=0.2)
    assert_same(ours, models.by_mergekit("breadcrumbs", density=0.25, gamma=outliers, weight=0.2), models.base)


# ---------------------------------------------------------------- DELLA


def test_della(models, survivors):
    """The probabilities are the same, except for convolutions; the rescaling differs, as in DARE.

    mergekit's epsilon is half of our window. It ranks along a tensor's second axis, so that in a convolution three
    input channels are ranked among themselves, where we rank all that one filter reads.
    """
    drop, window = 0.5, 0.25
    masks, chances = survivors(mkl.magprune(models.tv, drop, window))
    theirs = models.by_mergekit("della", density=1 - drop, epsilon=window / 2, weight=1.0)
    assert_same(elect_and_merge(models.tv.transform(norm_kept(masks)), scale=1.0), theirs, models.base)

    seen = iter(chances)
    for name, _, taus in models.tv.layers():
        for tau in taus:
            chance = next(seen).view(tau.shape)
            if name == "conv.weight":
                levels = torch.tensor([drop - window / 2, drop, drop + window / 2])
                assert torch.allclose(chance.sort(1).values, levels.view(1, 3, 1, 1).expand_as(chance))
            else:
                # We divide a survivor by its probability, so that the expectation is the task vector.
                expected = 1 - drop - window / 2 + window * ranks(tau) / (tau.shape[-1] - 1)
                assert torch.allclose(chance, expected)
    assert difference(mkl.della(models.tv, drop=drop, window=window, scale=1.0), theirs, models.base) > 0.05


def ranks(tau: Tensor) -> Tensor:
    """How many entries of the same row are smaller."""
    return (tau.abs().unsqueeze(-1) > tau.abs().unsqueeze(-2)).sum(-1)
