import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mergekit_lite as mkl
from tests.conftest import small_net


def vectors(*rows: list[float]) -> mkl.TaskVectors:
    """Task vectors given by their entries, over a zero base."""
    return mkl.TaskVectors({"w": torch.zeros(len(rows[0]))}, [{"w": torch.tensor(row)} for row in rows])


# ---------------------------------------------------------------- what it shows


def test_task_vectors_are_differences(base, experts, tv):
    by_hand = base.state_dict()
    for name, theta0, taus in tv.layers():
        assert torch.equal(theta0, by_hand[name])
        for tau, expert in zip(taus, experts, strict=True):
            assert torch.equal(tau, expert.state_dict()[name] - by_hand[name])


def test_layers_follow_the_base_and_show_weights_alone(base, tv):
    expected = [name for name, t in base.state_dict().items() if t.is_floating_point() and "running" not in name]
    assert [name for name, _, _ in tv.layers()] == expected
    assert "1.num_batches_tracked" in base.state_dict()
    assert "1.num_batches_tracked" not in expected


def test_gram_equals_the_flat_products_in_float64(tv):
    flat = tv.flat().double()
    assert tv.gram().dtype == torch.float64
    torch.testing.assert_close(tv.gram(), flat @ flat.T, rtol=1e-12, atol=0)


def test_gram_goes_through_long_tensors_in_chunks(monkeypatch, tv):
    whole = tv.gram()
    monkeypatch.setattr("mergekit_lite.numerics.precision.GRAM_CHUNK", 7)
    torch.testing.assert_close(tv.gram(), whole, rtol=1e-12, atol=0)


def test_names(base, experts):
    assert mkl.TaskVectors(base, experts).names == ["expert 0", "expert 1", "expert 2"]
    assert mkl.TaskVectors(base, dict(zip("abc", experts, strict=True))).names == ["a", "b", "c"]
    assert mkl.TaskVectors(base, experts, names=["x", "y", "z"]).names == ["x", "y", "z"]


def test_repr_says_what_there_is(tv):
    assert repr(tv) == (
        "TaskVectors(expert 0, expert 1, expert 2; 6 tensors, 145 weights; besides 2 statistics, 1 counter)"
    )


# ---------------------------------------------------------------- merging


def test_map_keeps_keys_order_dtypes_and_integers(base, tv):
    merged = tv.map(lambda name, taus: taus.mean(0))
    original = base.state_dict()
    assert list(merged) == list(original)
    assert all(merged[n].dtype == original[n].dtype for n in original)
    assert torch.equal(merged["1.num_batches_tracked"], original["1.num_batches_tracked"])
    small_net(9).load_state_dict(merged)


def test_a_merge_never_shares_memory_with_its_inputs(base, experts, tv):
    before = [copy.deepcopy(model.state_dict()) for model in (base, *experts)]
    merged = tv.map(lambda name, taus: taus.mul_(0).sum(0))  # even a greedy f may overwrite its taus
    for tensor in merged.values():
        tensor.add_(1)
    for model, state in zip((base, *experts), before, strict=True):
        assert all(torch.equal(model.state_dict()[n], state[n]) for n in state)


def test_add_is_the_inverse_of_flat(experts, tv):
    merged = tv.add(tv.flat()[1])
    for name, tensor in experts[1].state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)


def test_add_wants_d_weights(tv):
    with pytest.raises(ValueError, match="145 weights"):
        tv.add(torch.zeros(3))


def test_a_merge_of_the_wrong_shape_is_named(tv):
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \(3, 4, 3, 3, 3\)"):
        tv.map(lambda name, taus: taus)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept_and_computed_in_at_least_float32(dtype):
    base = {"w": torch.tensor([1.0, 2.0], dtype=dtype)}
    tv = mkl.TaskVectors(base, [{"w": torch.tensor([1.5, 2.0], dtype=dtype)}])
    (_, theta0, taus) = next(tv.layers())
    assert theta0.dtype == taus.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    merged = tv.map(lambda name, taus: taus.sum(0))
    assert merged["w"].dtype == dtype
    assert merged["w"].tolist() == [1.5, 2.0]


def test_half_precision_is_not_summed_in_half_precision():
    # In float16, 2048 + 1 = 2048: adding eight small task vectors one by one would lose them all.
    base = {"w": torch.tensor([2048.0], dtype=torch.float16)}
    tv = mkl.TaskVectors(base, [{"w": torch.tensor([2050.0], dtype=torch.float16)}] * 8)
    assert tv.map(lambda name, taus: 0.5 * taus.sum(0))["w"].item() == 2056.0


def test_experts_of_another_dtype_are_converted():
    tv = mkl.TaskVectors({"w": torch.ones(2)}, [{"w": torch.full((2,), 1.5, dtype=torch.bfloat16)}])
    assert tv.flat().tolist() == [[0.5, 0.5]]


# ---------------------------------------------------------------- tied weights


class Tied(nn.Module):
    def __init__(self, value: float, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 2, bias=False)
        self.head = nn.Linear(2, 2, bias=False)
        nn.init.constant_(self.embed.weight, value)
        nn.init.constant_(self.head.weight, value)
        if tie:
            self.head.weight = self.embed.weight


def test_tied_weights_count_once_and_stay_tied():
    tv = mkl.TaskVectors(Tied(0.0), [Tied(1.0)])
    assert [name for name, _, _ in tv.layers()] == ["embed.weight"]
    assert tv.gram().item() == 4.0
    merged = tv.map(lambda name, taus: taus.sum(0))
    assert merged["head.weight"] is merged["embed.weight"]


def test_weights_that_one_expert_untied_are_merged_apart():
    tv = mkl.TaskVectors(Tied(0.0), [Tied(1.0), Tied(2.0, tie=False)])
    assert [name for name, _, _ in tv.layers()] == ["embed.weight", "head.weight"]


# ---------------------------------------------------------------- arithmetic


def test_scaling_and_negation(tv):
    assert torch.equal((-tv).flat(), -tv.flat())
    assert torch.equal((0.5 * tv).flat(), 0.5 * tv.flat())
    assert torch.equal((tv * 0.5 * 2.0).flat(), tv.flat())


def test_choosing(tv):
    flat = tv.flat()
    assert torch.equal(tv[1].flat(), flat[1:2])
    assert torch.equal(tv["expert 2"].flat(), flat[2:])
    assert torch.equal(tv[-1].flat(), flat[2:])
    assert torch.equal(tv[:2].flat(), flat[:2])
    assert torch.equal(tv.subset(["expert 2", 0]).flat(), flat[[2, 0]])
    assert tv.subset(["expert 2", 0]).names == ["expert 2", "expert 0"]
    assert [one.names for one in tv] == [["expert 0"], ["expert 1"], ["expert 2"]]


def test_choosing_after_a_transformation_that_mixes_experts(tv):
    centred = tv.transform(lambda name, taus: taus - taus.mean(0))
    torch.testing.assert_close(centred[1].flat(), (tv.flat() - tv.flat().mean(0))[1:2])


def test_transform_may_change_the_number_of_task_vectors(tv):
    total = tv.transform(lambda name, taus: taus.sum(0, keepdim=True), names=["sum"])
    assert len(total) == 1
    torch.testing.assert_close(total.flat(), tv.flat().sum(0, keepdim=True))


floats = st.floats(-1e3, 1e3, width=32)
matrices = st.integers(1, 5).flatmap(
    lambda d: st.lists(st.lists(floats, min_size=d, max_size=d), min_size=1, max_size=4)
)


@settings(max_examples=50, deadline=None)
@given(matrices, st.floats(-3, 3))
def test_gram_scales_quadratically_and_stays_symmetric(rows, scale):
    tv = vectors(*rows)
    gram = tv.gram()
    assert torch.equal(gram, gram.T)
    assert torch.linalg.eigvalsh(gram).min() >= -1e-9 * (1 + gram.abs().max())
    torch.testing.assert_close((tv * scale).gram(), scale**2 * gram, rtol=1e-5, atol=1e-30)


@settings(max_examples=50, deadline=None)
@given(matrices, st.randoms(use_true_random=False))
def test_the_order_of_experts_permutes_the_gram_and_nothing_else(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    tv = vectors(*rows)
    torch.testing.assert_close(tv.subset(order).gram(), tv.gram()[order][:, order], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- what can be wrong


def test_no_experts(base):
    with pytest.raises(ValueError, match="at least one fine-tuned model"):
        mkl.TaskVectors(base, [])


@pytest.mark.parametrize("single", ["a.safetensors", small_net(1), small_net(1).state_dict()])
def test_a_single_model_is_no_list(base, single):
    with pytest.raises(TypeError, match="list of models"):
        mkl.TaskVectors(base, single)


def test_names_must_fit(base, experts):
    with pytest.raises(ValueError, match="3 experts need"):
        mkl.TaskVectors(base, experts, names=["a", "b"])
    with pytest.raises(ValueError, match="3 experts need"):
        mkl.TaskVectors(base, experts, names=["a", "b", "b"])


def test_missing_and_unexpected_tensors_are_named():
    base = {"w": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(KeyError, match="math lacks 'b'"):
        mkl.TaskVectors(base, {"math": {"w": torch.ones(1)}})
    with pytest.raises(KeyError, match="and the base has not, 'head'"):
        mkl.TaskVectors(base, {"math": {**base, "head": torch.ones(1)}})


def test_shapes_that_differ_are_named(base):
    expert = {**base.state_dict(), "3.weight": torch.ones(5, 9)}
    with pytest.raises(ValueError, match=r"'3\.weight' has shape \(5, 9\) in math but \(5, 4\)"):
        mkl.TaskVectors(base, {"math": expert})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(bad):
    good = {"u": torch.ones(3), "w": torch.ones(3)}
    broken = {"u": torch.ones(3), "w": torch.tensor([1.0, bad, 1.0])}
    with pytest.raises(ValueError, match="'w' holds NaN or infinite weights in math"):
        mkl.TaskVectors(good, {"ok": good, "math": broken}).gram()
    with pytest.raises(ValueError, match="'w' holds NaN or infinite weights in the base"):
        mkl.TaskVectors(broken, {"ok": good}).gram()


def test_large_finite_weights_are_no_infinity():
    big = torch.full((4,), 3e38)
    tv = mkl.TaskVectors({"w": torch.zeros(4)}, [{"w": big}])  # their sum overflows, they do not
    assert torch.equal(tv.flat()[0], big)


def test_complex_weights_are_refused():
    with pytest.raises(TypeError, match="complex"):
        mkl.TaskVectors({"w": torch.ones(1, dtype=torch.complex64)}, [{"w": torch.ones(1, dtype=torch.complex64)}])


def test_what_is_no_model(base):
    with pytest.raises(TypeError, match="not a int"):
        mkl.TaskVectors(base, [3])
    with pytest.raises(TypeError, match="'w' is a list"):
        mkl.TaskVectors({"w": [1.0]}, [{"w": torch.ones(1)}])


def test_unknown_task_vectors_are_named(tv):
    with pytest.raises(KeyError, match="no task vector named 'math'"):
        tv["math"]
    with pytest.raises(IndexError, match="there are 3"):
        tv[3]
    with pytest.raises(ValueError, match="at least one"):
        tv.subset([])


def test_models_without_weights():
    with pytest.raises(ValueError, match="no floating-point tensors"):
        mkl.TaskVectors({"n": torch.tensor(1)}, [{"n": torch.tensor(2)}]).gram()


# ---------------------------------------------------------------- pieces


LONG = 150_000  # more than two pieces


def long_vectors(dtype=torch.float32):
    base = {"a": torch.randn(3, generator=torch.Generator().manual_seed(0)), "empty": torch.zeros(0, 4)}
    base |= {"b": torch.randn(3, LONG // 3, generator=torch.Generator().manual_seed(1))}
    base = {name: tensor.to(dtype) for name, tensor in base.items()}
    return mkl.TaskVectors(base, [{n: (t * (k + 2)).to(dtype) for n, t in base.items()} for k in range(2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pieces_are_the_task_vectors_cut_up(dtype):
    tv = long_vectors(dtype)
    whole = torch.cat([taus.flatten(1) for _, _, taus in tv.layers()], dim=1)
    places, parts = zip(*((place, taus.clone()) for place, taus in tv.pieces()), strict=True)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert torch.equal(tv.flat(), whole)
    assert [place.name for place in places] == ["a", "b", "b", "b"]
    assert [place.start for place in places[1:]] == [0, 65_536, 131_072]
    merged, expected = tv.map_pieces(lambda place, taus: taus.sum(0)), tv.map(lambda name, taus: taus.sum(0))
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert all(merged[name].dtype == dtype for name in expected)


def test_functions_of_pieces_and_of_tensors_mix():
    tv = long_vectors()

    def by_place(place, taus):  # depends on where a piece begins: pieces must be the same in every pass
        return taus.mul_(1 + place.start % 7)

    mixed = tv.transform_pieces(by_place).transform(lambda name, taus: taus.flip(-1)).transform_pieces(by_place)
    piecewise = mixed.flat()
    assert torch.equal(torch.cat([taus.flatten(1) for _, _, taus in mixed.layers()], dim=1), piecewise)
    by_pieces, whole = mixed.map_pieces(lambda place, taus: taus[1]), mixed.map(lambda name, taus: taus[1])
    assert all(torch.equal(by_pieces[name], whole[name]) for name in whole)
    expected = torch.cat([(t - b).flatten() for t, b in zip(by_pieces.values(), tv.base.values(), strict=True)])
    torch.testing.assert_close(piecewise[1], expected, atol=1e-4, rtol=1e-4)


def test_a_subset_of_pieces_keeps_the_others_out():
    tv = long_vectors().transform_pieces(lambda place, taus: taus - taus.mean(0))
    assert torch.equal(tv[1].flat(), tv.flat()[1:])
    assert tv.subset([1, 0]).names == ["expert 1", "expert 0"]


def test_pieces_say_what_is_wrong():
    tv = long_vectors()
    with pytest.raises(ValueError, match="merge of 'a' has shape"):
        tv.map_pieces(lambda place, taus: taus)
    broken = {name: tensor.clone() for name, tensor in tv.base.items()}
    broken["b"][2, -1] = torch.nan
    with pytest.raises(ValueError, match="'b' holds NaN or infinite weights in expert 1"):
        mkl.TaskVectors(tv.base, [dict(tv.base), broken]).gram()


def test_shapes_in_files_are_checked_before_anything_is_read(tmp_path):
    mkl.save({"w": torch.zeros(2, 3)}, tmp_path / "base.safetensors")
    mkl.save({"w": torch.zeros(3, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="same architecture"):
        mkl.TaskVectors(tmp_path / "base.safetensors", [tmp_path / "other.safetensors"])
