"""DARE and DELLA: dropping at random."""

import math

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.dare import drop_and_rescale, random_levels
from mergekit_lite.data_free.della import magprune
from tests.test_selection import in_tensors
from tests.test_task_vectors import vectors

ONES = in_tensors(torch.ones(2, 200_000), cuts=(50_000,))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- DARE


def test_survivors_are_rescaled_and_the_rest_is_zero():
    thinned = drop_and_rescale(ONES, 0.75, seeded(1)).flat()
    assert set(thinned.unique().tolist()) == {0.0, 4.0}
    share = (thinned != 0).double().mean(1)
    assert torch.allclose(share, torch.tensor(0.25, dtype=torch.float64), atol=5 * math.sqrt(0.25 * 0.75 / 200_000))


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.9, 0.999])
def test_unbiased(drop):
    mean = drop_and_rescale(ONES, drop, seeded(1)).flat().double().mean(1)
    error = math.sqrt(drop / (1 - drop) / 200_000)  # of the mean of 200,000 entries with variance p / (1 - p)
    assert ((mean - 1).abs() <= 5 * error).all()


def test_masks_of_tasks_and_tensors_are_independent():
    survives = (drop_and_rescale(ONES, 0.5, seeded(1)).flat() != 0).double()
    assert abs((survives[0] * survives[1]).mean().item() - 0.25) < 0.01
    assert abs((survives[:, :50_000] * survives[:, 50_000:100_000]).mean().item() - 0.25) < 0.01
    assert abs((survives[:, :-1] * survives[:, 1:]).mean().item() - 0.25) < 0.01


def test_the_generator_decides_and_every_reading_agrees():
    thinned = drop_and_rescale(ONES, 0.9, seeded(1))
    assert torch.equal(thinned.flat(), thinned.flat())
    assert torch.equal(thinned.flat(), torch.cat([taus for _, _, taus in thinned.layers()], dim=1))
    assert torch.equal(thinned.flat(), drop_and_rescale(ONES, 0.9, seeded(1)).flat())
    assert not torch.equal(thinned.flat(), drop_and_rescale(ONES, 0.9, seeded(2)).flat())
    generator = seeded(1)
    assert not torch.equal(drop_and_rescale(ONES, 0.9, generator).flat(), drop_and_rescale(ONES, 0.9, generator).flat())


def test_random_numbers_are_uniform():
    drawn = random_levels(1_000_001, 3, ("w", 0)).long()
    assert drawn.min() < -32_700
    assert drawn.max() > 32_700
    counts = torch.bincount((drawn + 32_768) // 4096, minlength=16)
    assert (counts - 1_000_001 / 16).abs().max() < 6 * math.sqrt(1_000_001 / 16)


def test_by_hand_without_dropping():
    tv = vectors([1.0, -2.0], [3.0, 4.0])
    assert mkl.dare(tv, drop=0.0, scale=0.5)["w"].tolist() == [2.0, 1.0]
    assert mkl.dare(tv, drop=0.0, scale=1.0, combine="ties")["w"].tolist() == [2.0, 4.0]


def test_what_it_merges_is_what_was_dropped():
    thinned = drop_and_rescale(ONES, 0.6, seeded(5))
    merged = mkl.dare(ONES, drop=0.6, scale=0.5, generator=seeded(5))
    torch.testing.assert_close(torch.cat(list(merged.values())), thinned.flat().sum(0) * 0.5)
    merged = mkl.dare(ONES, drop=0.6, scale=1.0, combine="ties", generator=seeded(5))
    torch.testing.assert_close(torch.cat(list(merged.values())), thinned.flat().amax(0))


def test_dare_composes_with_ties():
    tv = in_tensors(torch.randn(3, 1000, generator=seeded(0)))
    thinned = drop_and_rescale(tv, 0.5, seeded(1))
    kept = mkl.trim(thinned, 0.2).flat()
    assert (kept != 0).sum(1).tolist() == [200, 200, 200]
    assert ((thinned.flat() - kept) * kept == 0).all()


def test_drop_is_a_probability(tv):
    for drop in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\)"):
            mkl.dare(tv, drop=drop)
    with pytest.raises(ValueError, match="'linear' or 'ties'"):
        mkl.dare(tv, combine="sum")


# ---------------------------------------------------------------- DELLA


def test_large_entries_survive_more_often():
    row = torch.arange(1.0, 5.0).repeat(1, 40_000, 1).view(1, -1)  # 40,000 rows of (1, 2, 3, 4)
    tv = mkl.TaskVectors({"w": torch.zeros(40_000, 4)}, [{"w": row.view(40_000, 4)}])
    pruned = magprune(tv, 0.5, 0.6, seeded(1)).flat().view(-1, 4).double()
    # Probabilities to survive 0.2, 0.4, 0.6, 0.8; each entry is unbiased.
    expected = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    assert torch.allclose((pruned != 0).double().mean(0), expected, atol=0.012)
    assert torch.allclose(pruned.mean(0), torch.arange(1.0, 5.0, dtype=torch.float64), rtol=0.05)


def test_ranks_are_within_rows_and_by_magnitude():
    base = {"w": torch.zeros(2, 3)}
    tv = mkl.TaskVectors(base, [{"w": torch.tensor([[-9.0, 1.0, 2.0], [0.1, 0.3, -0.2]])}])
    counts = torch.zeros(6)
    for seed in range(400):
        counts += (magprune(tv, 0.5, 0.9, seeded(seed)).flat()[0] != 0).float()
    order = counts.view(2, 3).argsort(dim=1)
    assert order.tolist() == [[1, 2, 0], [0, 2, 1]]


def test_a_window_of_zero_is_dare():
    pruned = magprune(ONES, 0.75, 0.0, seeded(1)).flat()
    assert set(pruned.unique().tolist()) == {0.0, 4.0}


def test_della_without_dropping_is_ties_without_trimming(tv):
    for merged, expected in zip(
        mkl.della(tv, drop=0.0, window=0.0, scale=1.0).values(), mkl.ties(tv, density=1.0).values(), strict=True
    ):
        torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize(("drop", "window"), [(0.1, 0.4), (0.9, 0.2), (0.5, -0.1), (math.nan, 0.1)])
def test_probabilities_stay_probabilities(tv, drop, window):
    with pytest.raises(ValueError, match=r"stay in \[0, 1\)"):
        mkl.della(tv, drop=drop, window=window)
