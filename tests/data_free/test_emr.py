"""EMR-Merging."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekit_lite as mkl
from mergekit_lite.data_free.emr import elect
from tests.data_free.test_simple_merges import flat
from tests.test_task_vectors import vectors


def test_by_hand():
    tv = vectors([2.0, -1.0, 3.0, 0.0], [4.0, 3.0, -1.0, 0.0])
    # Sums 6, 2, 2, 0: the elected vector is (4, 3, 3, 0).
    merged = mkl.emr(tv)
    assert merged.masks["w"].tolist() == [[True, False, True, False], [True, True, False, False]]
    # Norms 6 and 8; of what the masks leave 4 + 3 = 7 both times.
    assert merged.scales == pytest.approx({"expert 0": 6 / 7, "expert 1": 8 / 7})
    assert merged["expert 0"]["w"].tolist() == pytest.approx([24 / 7, 0, 18 / 7, 0])
    assert merged["expert 1"]["w"].tolist() == pytest.approx([32 / 7, 24 / 7, 0, 0])


def test_what_has_no_majority_is_not_elected():
    assert elect(torch.tensor([[1.0, -2.0, 0.0], [-1.0, 1.0, 0.0]])).tolist() == [0.0, -2.0, 0.0]


def test_against_loops_in_float64():
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 30, "b": 4}
    base = {name: torch.randn(n, generator=generator, dtype=torch.float64) for name, n in sizes.items()}
    experts = [
        {name: t + torch.randn(t.shape, generator=generator, dtype=torch.float64) for name, t in base.items()}
        for _ in range(4)
    ]
    tv = mkl.TaskVectors(base, experts)
    taus = {name: [(expert[name] - base[name]).tolist() for expert in experts] for name in sizes}
    elected = {name: [] for name in sizes}
    for name, n in sizes.items():
        for i in range(n):
            column = [tau[i] for tau in taus[name]]
            sign = math.copysign(1, math.fsum(column))
            elected[name].append(sign * max(abs(v) for v in column if v * sign > 0))
    for by_tensor in (False, True):
        merged = mkl.emr(tv, by_tensor=by_tensor)
        for k, task in enumerate(merged):
            share = {name: 1 / n if by_tensor else 1.0 for name, n in sizes.items()}
            size = sum(share[name] * abs(v) for name in sizes for v in taus[name][k])
            pairs = {name: list(zip(taus[name][k], elected[name], strict=True)) for name in sizes}
            kept = sum(share[name] * abs(e) for name in sizes for v, e in pairs[name] if v * e > 0)
            assert merged.scales[task] == pytest.approx(size / kept, rel=1e-12)
            for name in sizes:
                expected = [
                    theta + size / kept * e * (v * e > 0)
                    for theta, (v, e) in zip(base[name].tolist(), pairs[name], strict=True)
                ]
                assert merged[task][name].tolist() == pytest.approx(expected, rel=1e-12)


rows = st.integers(1, 6).flatmap(
    lambda d: st.lists(st.lists(st.floats(-9, 9, width=32), min_size=d, max_size=d), min_size=1, max_size=4)
)


@settings(max_examples=50, deadline=None)
@given(rows)
def test_a_mask_brings_the_elected_vector_closer_to_every_expert(entries):
    taus = torch.tensor(entries, dtype=torch.float64)
    elected = elect(taus)
    masks = taus * elected > 0
    assert ((taus - masks * elected).norm(dim=1) <= (taus - elected).norm(dim=1) + 1e-12).all()
    assert all(
        value in [abs(row[i]) for row in entries] or value == 0 for i, value in enumerate(elected.abs().tolist())
    )


def test_rescaling_may_lead_away_again():
    """The example of the module: the scale is no least-squares scale, as equation 13 of the paper has it."""
    tv = vectors([1.0, -10.0], [1.0, 11.0])
    merged = mkl.emr(tv)
    assert merged.scales == {"expert 0": 11.0, "expert 1": 1.0}
    assert merged["expert 0"]["w"].tolist() == [11.0, 0.0]
    expert, elected = torch.tensor([1.0, -10.0]), torch.tensor([1.0, 11.0])
    distances = [(expert - v).norm() for v in (torch.tensor([1.0, 0.0]), merged["expert 0"]["w"])]
    assert distances[0] < distances[1] < (expert - elected).norm()


@pytest.mark.parametrize("by_tensor", [False, True])
def test_copies_of_one_expert_are_that_expert(base, experts, by_tensor):
    merged = mkl.emr(mkl.TaskVectors(base, [experts[0]] * 3), by_tensor=by_tensor)
    for state in merged.values():
        torch.testing.assert_close(flat(state), flat(experts[0].state_dict()), rtol=1e-6, atol=1e-7)


def test_order_sign_and_scale(tv, base):
    merged = mkl.emr(tv)
    turned = mkl.emr(tv.subset([2, 0, 1]))
    assert list(turned) == ["expert 2", "expert 0", "expert 1"]
    origin = flat(base.state_dict())
    for task in merged:
        change = flat(merged[task]) - origin
        torch.testing.assert_close(flat(turned[task]), flat(merged[task]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(flat(mkl.emr(-tv)[task]) - origin, -change, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(flat(mkl.emr(tv * 2.0)[task]) - origin, 2 * change, rtol=1e-4, atol=1e-5)


def test_a_task_that_is_never_elected_is_answered_by_the_base():
    merged = mkl.emr(vectors([0.0, 0.0], [3.0, -1.0], [-1.0, 0.5]))
    assert merged.scales == {"expert 0": 0.0, "expert 1": 1.0, "expert 2": 0.0}
    assert [merged[task]["w"].tolist() for task in merged] == [[0.0, 0.0], [3.0, -1.0], [0.0, 0.0]]


def test_scalars_and_empty_tensors():
    def model(value):
        return {"scalar": torch.tensor(value), "empty": torch.zeros(0, 3), "count": torch.tensor(5)}

    for by_tensor in (False, True):
        merged = mkl.emr(mkl.TaskVectors(model(0.0), [model(1.0), model(2.0)]), by_tensor=by_tensor)
        assert [merged[task]["scalar"].item() for task in merged] == [1.0, 2.0]
        assert merged["expert 0"]["count"].item() == 5


def test_inputs_are_not_changed(base, experts, tv):
    before = [flat(m.state_dict()).clone() for m in (base, *experts)]
    merged = mkl.emr(tv)
    for tensor in merged["expert 0"].values():
        tensor.zero_()
    assert all(torch.equal(flat(m.state_dict()), old) for m, old in zip((base, *experts), before, strict=True))
    assert flat(merged["expert 0"]).abs().max() > 0, "made anew each time"


def test_files_are_read_but_not_merged_into_one(tmp_path, base, experts, tv):
    paths = [mkl.save(m.state_dict(), tmp_path / f"{i}.safetensors") for i, m in enumerate([base, *experts])]
    from_files, expected = mkl.emr(mkl.TaskVectors(paths[0], paths[1:])), mkl.emr(tv)
    for task in expected:
        assert all(torch.equal(from_files[task][name], expected[task][name]) for name in expected[task])
    with pytest.raises(TypeError, match=r"a model for each task .* no single file"):
        mkl.merge_files(mkl.emr, paths[0], paths[1:], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
