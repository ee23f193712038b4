"""TALL-masks and Consensus."""

import itertools
import math

import pytest
import torch

import mergekit_lite as mkl
from tests.data_free.test_simple_merges import flat
from tests.test_task_vectors import vectors


def task_vectors(tasks: int, weights: int, seed: int = 0) -> mkl.TaskVectors:
    """Random task vectors in float64 over a zero base."""
    taus = torch.randn(tasks, weights, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mkl.TaskVectors({"w": torch.zeros(weights, dtype=torch.float64)}, [{"w": tau} for tau in taus])


def test_by_hand():
    tv = vectors([4.0, 0.0, -1.0, 1.0], [1.0, 2.0, 1.0, 1.0])  # their sum: 5, 2, 0, 2
    merged = mkl.tall_masks(tv, strength=0.5)
    # |4| >= .5 |5 - 4|, but 0 < .5 |2 - 0|; |1| < .5 |5 - 1|, and so on.
    assert merged.masks["w"].tolist() == [[True, False, True, True], [False, True, True, True]]
    assert merged["expert 0"]["w"].tolist() == [5.0, 0.0, 0.0, 2.0]
    assert merged["expert 1"]["w"].tolist() == [0.0, 2.0, 0.0, 2.0]
    assert mkl.consensus(tv, strength=0.5, scale=0.5)["w"].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert mkl.consensus(tv, strength=0.5, agreement=1, scale=0.5)["w"].tolist() == [2.5, 1.0, 0.0, 1.0]
    # With a strength for each task only the first mask shrinks: |1| < 2 |2 - 1|.
    two = mkl.tall_masks(tv, strength=[2.0, 0.5])
    assert two.masks["w"].tolist() == [[True, False, False, False], [False, True, True, True]]


def test_strength_one_is_the_closest_mask_of_all():
    tv = task_vectors(3, 6)
    taus = tv.flat()
    merged = mkl.tall_masks(tv, strength=1.0)
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    for tau, mask in zip(taus, merged.masks["w"], strict=True):
        distances = (masks * taus.sum(0) - tau).abs().sum(1)
        assert torch.equal(masks[distances.argmin()].bool(), mask)


def test_consensus_against_a_loop_in_float64():
    tv = task_vectors(5, 40)
    rows = tv.flat().tolist()
    for agreement in (1, 2, 3):
        merged = mkl.consensus(tv, strength=0.3, agreement=agreement, scale=0.7)["w"].tolist()
        for i in range(40):
            total = math.fsum(row[i] for row in rows)
            users = [row for row in rows if abs(row[i]) >= 0.3 * abs(total - row[i])]
            assert merged[i] == pytest.approx(0.7 * total if len(users) >= agreement else 0.0, abs=1e-12)


@pytest.mark.parametrize(("copies", "kept"), [(2, True), (3, True), (4, False), (8, False)])
def test_agreement_of_many_is_taken_for_disturbance(copies, kept):
    """At 0.4 a weight that n tasks change alike stays up to n = 1 + 1 / 0.4 = 3.5 only."""
    tv = vectors(*[[1.0, -2.0]] * copies)
    expected = [copies * 1.0, copies * -2.0] if kept else [0.0, 0.0]
    assert mkl.consensus(tv, strength=0.4, scale=1.0)["w"].tolist() == expected


def test_another_merge_takes_the_place_of_the_sum():
    tv = vectors([4.0, 1.0], [1.0, 2.0])
    merged = {"w": torch.tensor([3.0, 0.5])}
    # Masks in (3, .5): |4| >= |3 - 4|, |1| >= |.5 - 1|; |1| < |3 - 1|, |2| >= |.5 - 2|.
    assert mkl.consensus(tv, strength=1.0, scale=1.0, merged=merged)["w"].tolist() == [0.0, 0.5]
    tall = mkl.tall_masks(tv, strength=1.0, merged=merged)
    assert [tall[name]["w"].tolist() for name in tall] == [[3.0, 0.5], [0.0, 0.5]]
    shifted = mkl.TaskVectors({"w": torch.ones(2)}, [{"w": torch.tensor([5.0, 2.0])}, {"w": torch.tensor([2.0, 3.0])}])
    again = mkl.consensus(shifted, strength=1.0, scale=1.0, merged={"w": torch.tensor([4.0, 1.5])})
    assert again["w"].tolist() == [1.0, 1.5]
    with pytest.raises(KeyError, match="merged lacks 'w'"):
        mkl.consensus(tv, merged={})


def test_the_sum_as_another_merge_changes_nothing(tv):
    total = mkl.task_arithmetic(tv, scale=1.0)
    torch.testing.assert_close(flat(mkl.consensus(tv, merged=total)), flat(mkl.consensus(tv)), rtol=1e-5, atol=1e-6)


def test_the_ends_are_task_arithmetic_and_the_base(tv, base):
    torch.testing.assert_close(flat(mkl.consensus(tv, agreement=0)), flat(mkl.task_arithmetic(tv)))
    torch.testing.assert_close(flat(mkl.consensus(tv, strength=0.0)), flat(mkl.task_arithmetic(tv)))
    assert torch.equal(flat(mkl.consensus(tv, agreement=4)), flat(base.state_dict()))


def test_a_larger_strength_keeps_less(tv):
    densities = [mkl.tall_masks(tv, strength=s).density for s in (0.2, 0.4, 0.6, 1.0)]
    for name in tv.names:
        kept = [density[name] for density in densities]
        assert kept == sorted(kept, reverse=True)
        assert kept[0] > kept[-1]


def test_masks_depend_on_directions_only(tv):
    masks = mkl.tall_masks(tv).masks
    for other in (tv * 2.0, -tv):
        again = mkl.tall_masks(other).masks
        assert all(torch.equal(masks[name], again[name]) for name in masks)
    turned = mkl.tall_masks(tv.subset([2, 0, 1])).masks
    assert all((masks[name][[2, 0, 1]] == turned[name]).float().mean() > 0.99 for name in masks)


def test_a_single_expert_is_found_again(tv, experts):
    alone = mkl.tall_masks(tv[1])
    torch.testing.assert_close(flat(alone["expert 1"]), flat(experts[1].state_dict()), rtol=1e-6, atol=1e-7)


def test_zero_task_vectors_give_the_base(base):
    tv = mkl.TaskVectors(base, [base, base])
    assert torch.equal(flat(mkl.consensus(tv)), flat(base.state_dict()))
    assert torch.equal(flat(mkl.tall_masks(tv)["expert 0"]), flat(base.state_dict()))


def test_scalars_and_empty_tensors():
    def model(value):
        return {"scalar": torch.tensor(value), "empty": torch.zeros(0, 3)}

    tv = mkl.TaskVectors(model(0.0), [model(1.0), model(2.0)])
    assert mkl.consensus(tv, strength=0.5, scale=1.0)["scalar"].item() == 3.0
    tall = mkl.tall_masks(tv, strength=0.6)
    assert [tall[name]["scalar"].item() for name in tall] == [0.0, 3.0]  # 1 < .6 x 2
    assert tall["expert 0"]["empty"].shape == (0, 3)


def test_files_are_merged_alike(tmp_path, base, experts, tv):
    paths = [mkl.save(m.state_dict(), tmp_path / f"{i}.safetensors") for i, m in enumerate([base, *experts])]
    out = mkl.merge_files(mkl.consensus, paths[0], paths[1:], tmp_path / "out.safetensors", scale=0.5)
    merged, expected = mkl.load(out), mkl.consensus(tv, scale=0.5)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_wrong_input(tv):
    for method in (mkl.consensus, mkl.tall_masks):
        with pytest.raises(ValueError, match="one strength or 3"):
            method(tv, strength=[0.1, 0.2])
        for strength in (-0.1, math.nan, math.inf):
            with pytest.raises(ValueError, match="not negative"):
                method(tv, strength=strength)
    with pytest.raises(ValueError, match="number of tasks"):
        mkl.consensus(tv, agreement=-1)
    with pytest.raises(ValueError, match="finite"):
        mkl.consensus(tv, scale=math.nan)
