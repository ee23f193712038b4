"""TALL-masks, Consensus and EMR-Merging: masks over the sum or over an elected task vector."""

import pytest
import torch
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.tall_mask import TallMaskTaskArithmeticAlgorithm, utils
from fusion_bench.method.tall_mask.task_arithmetic import generate_task_masks

import mergekit_lite as mkl
from tests.parity.checkpoints import assert_same


def flat(state):
    return torch.cat([t.flatten() for t in state.values()])


# ---------------------------------------------------------------- TALL-masks and Consensus


@pytest.mark.parametrize("strength", [0.2, 0.4, 0.6])
def test_tall_masks(models, strength):
    ours = mkl.tall_masks(models.tv, strength=strength)
    taus = torch.stack([flat(tau) for tau in models.taus()])
    experts = torch.stack([flat(expert) for expert in models.experts])
    theirs = utils.generate_task_masks(taus, experts, flat(models.base), tall_mask_lambda=strength)
    masks = torch.cat([ours.masks[name].flatten(1) for name in models.base], dim=1)
    assert torch.equal(masks, theirs)


@pytest.mark.parametrize("agreement", [1, 2, 3])
def test_consensus(models, agreement, monkeypatch):
    """fusion-bench reads TALL-masks from a file; here it gets them from its own function."""
    strength, scale = 0.4, 0.3
    taus = torch.stack([flat(tau) for tau in models.taus()])
    experts = torch.stack([flat(expert) for expert in models.experts])
    masks = utils.generate_task_masks(taus, experts, flat(models.base), tall_mask_lambda=strength)
    states = {k: as_state(mask, models.base) for k, mask in enumerate(masks)}
    monkeypatch.setattr(utils, "load_tall_mask", lambda *_: states)
    kept = utils.construct_consensus_mask(models.base, agreement, config=None)
    # its vectors are in the order of the sorted names
    mask = as_state(kept, {name: models.base[name] for name in sorted(models.base)})
    total = as_state(taus.sum(0), models.base)
    theirs = models.plus({name: scale * mask[name] * t for name, t in total.items()})
    ours = mkl.consensus(models.tv, strength=strength, agreement=agreement, scale=scale)
    assert_same(ours, theirs, models.base)


def test_tall_masks_of_the_ready_made_algorithm(models):
    """fusion-bench's algorithm hands θ₀ to a function that expects the base's task vector, which is zero.

    So a weight would be kept where τ_k is closer to the sum than to the *weight θ₀*; the paper's rule asks whether it
    is closer to the sum than to 0. With zeros the same function gives our masks. In this version the algorithm
    stops before, since it also refuses to subtract tensors from parameters.
    """
    with pytest.raises(TypeError, match="expected Parameter, got Tensor"):
        TallMaskTaskArithmeticAlgorithm(tall_mask_lambda=0.4).run(models.pool())
    taus = models.taus()
    total = {n: sum(tau[n] for tau in taus) for n in models.base}
    ours = mkl.tall_masks(models.tv, strength=0.4)
    for k, tau in enumerate(taus):
        right, wrong = (generate_task_masks(total, tau, base, 0.4) for base in (models.from_zero().base, models.base))
        assert all(torch.equal(ours.masks[n][k], right[n].bool()) for n in models.base)
        assert (flat(right) == flat(wrong)).float().mean() < 0.8  # two random masks agree in a half


# ---------------------------------------------------------------- EMR-Merging


def test_emr(models):
    ours = mkl.emr(models.tv, by_tensor=True)
    unified, masks, scales = emr_merge(models.taus())
    for k, name in enumerate(models.tv.names):
        theirs = models.plus({n: unified[n] * masks[n][k] * scales[k] for n in models.base})
        assert_same(ours[name], theirs, models.base)


def test_emr_measures_all_weights_alike(models):
    """By default a weight counts the same in every tensor; the released code lets a bias count as much as a matrix."""
    ours, (_, _, scales) = mkl.emr(models.tv), emr_merge(models.taus())
    ratio = torch.tensor(list(ours.scales.values())) / scales
    assert 0.01 < (ratio - 1).abs().max() < 0.2


def test_emr_where_the_sum_is_zero(models):
    """Opposite experts: fusion-bench elects the negative sign, we elect nothing."""
    first = models.experts[0]
    two = models.with_experts([first, {n: 2 * t - first[n] for n, t in models.base.items()}])
    taus = two.taus()
    exact = flat(taus[0]) + flat(taus[1]) == 0
    assert exact.any()
    unified, _, _ = emr_merge(taus)
    assert (flat(unified)[exact] < 0).all()
    ours = mkl.emr(two.tv)
    assert not torch.cat([m.flatten(1) for m in ours.masks.values()], dim=1)[:, exact].any()


def as_state(vector, like):
    parts = vector.split([t.numel() for t in like.values()])
    return {name: part.view(t.shape) for part, (name, t) in zip(parts, like.items(), strict=True)}
