"""What a tensor is for, told by its name, its dtype and its neighbours."""

import pytest
import torch
from torch import nn

import mergekit_lite as mkl
from mergekit_lite.roles import role_of

HALF, INT8, INT32, LONG = torch.float16, torch.int8, torch.int32, torch.int64


@pytest.mark.parametrize(
    ("name", "dtype", "others", "role"),
    [
        ("layer1.0.conv1.weight", HALF, (), "weight"),
        ("logit_scale", HALF, (), "weight"),
        ("blocks.0.ls1.gamma", HALF, (), "weight"),
        ("encoder.layer_scale", HALF, (), "weight"),
        ("bn1.running_mean", HALF, (), "statistic"),
        ("running_var", HALF, (), "statistic"),
        ("bn.moving_variance", HALF, (), "statistic"),
        ("bn1.num_batches_tracked", LONG, (), "counter"),
        ("embeddings.position_ids", LONG, (), "counter"),
        ("attn.causal", torch.bool, (), "counter"),
        ("attn.bias", torch.bool, (), "counter"),
        ("attn.masked", torch.uint8, (), "constant"),
        ("fc.weight", INT8, (), "code"),
        ("fc.weight", INT32, (), "code"),
        ("fc.SCB", torch.float32, ("fc.weight",), "code"),
        ("fc.qweight", INT32, (), "code"),
        ("fc.weight_scale_inv", torch.float32, (), "code"),
        ("fc.weight.absmax", torch.float32, (), "code"),
        ("fc.weight", torch.float8_e4m3fn, ("fc.weight_scale",), "code"),
        ("fc.weight", torch.float8_e4m3fn, (), "weight"),
        ("q_proj.lora_A.weight", HALF, (), "factor"),
        ("q_proj.lora_A.default.weight", HALF, (), "factor"),
        ("embed.lora_embedding_B", HALF, (), "factor"),
        ("lora_unet_down.lora_up.weight", HALF, (), "factor"),
        ("fc.hada_w1_a", HALF, (), "factor"),
        ("flora.weight", HALF, (), "weight"),
        ("fc.weight_mask", HALF, ("fc.weight_orig",), "mask"),
        ("fc.weight_mask", HALF, (), "weight"),
        ("fc.weight_g", HALF, ("fc.weight_v",), "norm pair"),
        ("fc.weight_v", HALF, ("fc.weight_g",), "norm pair"),
        ("fc.weight_v", HALF, ("fc.weight_u",), "weight"),
        ("fc.parametrizations.weight.original0", HALF, (), "norm pair"),
        ("fc.parametrizations.weight.original", HALF, (), "weight"),
    ],
)
def test_roles(name, dtype, others, role):
    assert role_of(name, dtype, others) == role


def normalised(mean: float, variance: float) -> dict[str, torch.Tensor]:
    return {
        "conv.weight": torch.tensor([mean, 2.0]),
        "bn.running_mean": torch.tensor([mean]),
        "bn.running_var": torch.tensor([variance]),
        "bn.num_batches_tracked": torch.tensor(int(10 * variance)),
    }


@pytest.fixture
def tv():
    return mkl.TaskVectors(normalised(0.0, 0.5), {"a": normalised(1.0, 0.01), "b": normalised(3.0, 2.0)})


def statistics(merged):
    return merged["bn.running_mean"].item(), merged["bn.running_var"].item()


def test_statistics_stand_outside_the_geometry(tv):
    assert [name for name, _, _ in tv.layers()] == ["conv.weight"]
    assert tv.dimension == 2
    assert tv.gram().tolist() == [[1.0, 3.0], [3.0, 9.0]]
    assert tv.flat().shape == (2, 2)
    assert tv.role("bn.running_var") == "statistic"


def test_statistics_are_merged_as_a_mean_whatever_the_scale(tv):
    mean = (2.0, pytest.approx(1.005))
    for scale in (0.1, 0.3, 5.0):
        assert statistics(mkl.task_arithmetic(tv, scale=scale)) == mean
    assert statistics(mkl.ties(tv, scale=3.0)) == mean
    assert statistics(mkl.average(tv, weights=[3, 1])) == (1.5, pytest.approx(0.5075))
    assert statistics(mkl.average(tv[0])) == (1.0, pytest.approx(0.01))
    assert statistics(mkl.linear_interpolation(tv[0], t=0.25)) == (0.25, pytest.approx(0.3775))
    assert statistics(mkl.linear_interpolation(tv, t=1.5)) == (3.0, pytest.approx(2.0)), "never beyond an expert's"


def test_an_expert_that_is_taken_away_lends_no_statistics(tv):
    assert statistics(mkl.negation(tv, forget="b")) == (0.0, 0.5)
    assert statistics(mkl.task_arithmetic(tv, scale=0.0)) == (0.0, 0.5)
    assert statistics(mkl.task_arithmetic(tv, scale=[1.0, -1.0])) == (1.0, pytest.approx(0.01))
    assert statistics(mkl.average(-tv)) == (0.0, 0.5)
    trimmed = mkl.trim(tv, 0.5)["b"]
    assert statistics(mkl.average(trimmed)) == (3.0, pytest.approx(2.0)), "chosen after a transformation"


def test_counters_are_the_bases(tv):
    assert mkl.average(tv)["bn.num_batches_tracked"].item() == 5


def test_what_is_no_weight_can_be_asked_for(tv):
    assert set(tv.others()) == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    assert torch.equal(tv.others()["bn.running_var"], mkl.average(tv)["bn.running_var"])


def test_negative_variances_are_refused():
    with pytest.raises(ValueError, match=r"'bn\.running_var' holds negative variances in a"):
        mkl.average(mkl.TaskVectors(normalised(0.0, 0.5), {"a": normalised(1.0, -0.1)}))


def test_a_network_with_merged_statistics_answers_finite_numbers():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval() for _ in range(3)]
    for net, size in zip(nets, (1.0, 0.01, 5.0), strict=True):
        net[1].running_var.fill_(size)
    tv = mkl.TaskVectors(nets[0], nets[1:])
    for merged in (mkl.negation(tv, forget=1), mkl.task_arithmetic(tv, scale=-2.0), mkl.analogy(tv, a=1, b=0, c=0)):
        nets[0].load_state_dict(merged)
        assert torch.isfinite(nets[0](torch.ones(1, 2))).all()


# ---------------------------------------------------------------- constants, masks, pairs


def test_constants_are_copied_with_their_infinities():
    mask = torch.full((3, 3), float("-inf")).triu(1)
    models = [{"w": torch.full((2,), float(k)), "mask": mask.clone()} for k in range(3)]
    tv = mkl.TaskVectors(models[0], models[1:])
    for merged in (mkl.average(tv), mkl.ties(tv), mkl.tsv(tv), mkl.pcb(tv)):
        assert torch.equal(merged["mask"], mask)
    assert tv.roles() == {"w": "weight", "mask": "constant"}
    assert repr(tv.roles()) == "Roles(1 weight, 1 constant)"
    assert tv.roles().to_frame().loc["mask", "role"] == "constant"
    assert torch.isfinite(tv.flat()).all()


def test_infinities_that_differ_are_no_constant():
    models = [{"w": torch.tensor([1.0, x])} for x in (float("-inf"), float("-inf"), 0.0)]
    with pytest.raises(ValueError, match="'w' holds NaN or infinite weights in the base"):
        mkl.average(mkl.TaskVectors(models[0], models[1:]))


def test_pruned_networks():
    def pruned(value: float, mask: list[float]) -> dict[str, torch.Tensor]:
        return {"fc.weight_orig": torch.full((3,), value), "fc.weight_mask": torch.tensor(mask)}

    same = mkl.TaskVectors(pruned(0.0, [1, 0, 1]), [pruned(1.0, [1, 0, 1]), pruned(2.0, [1, 0, 1])])
    assert mkl.average(same)["fc.weight_mask"].tolist() == [1, 0, 1]
    assert mkl.average(same)["fc.weight_orig"].tolist() == [1.5] * 3
    other = mkl.TaskVectors(pruned(0.0, [1, 0, 1]), [pruned(1.0, [1, 1, 0])])
    with pytest.raises(ValueError, match=r"'fc\.weight_mask' differs between the models.*prune\.remove"):
        mkl.average(other)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_length_and_direction_are_not_merged_apart(norm):
    torch.manual_seed(0)
    nets = [norm(nn.Linear(3, 2)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"length and direction.*remove"):
        mkl.average(mkl.TaskVectors(nets[0], [nets[1]]))
    assert mkl.average(mkl.TaskVectors(nets[0], [nets[0]])).keys() == nets[0].state_dict().keys()


# ---------------------------------------------------------------- refused


def test_quantised_weights_and_adapters_are_refused_by_name():
    weight = torch.ones(2, 2)
    cases = {
        "quantised": {"fc.weight": weight.to(torch.int8), "fc.SCB": torch.ones(2)},
        "adapter": {"q.lora_A.weight": weight, "q.lora_B.weight": weight},
    }
    for word, state in cases.items():
        with pytest.raises(ValueError, match=word):
            mkl.TaskVectors(state, [state])
    with pytest.raises(ValueError, match=r"'w' has the dtype int8 in expert 0 but float32 in the base"):
        mkl.TaskVectors({"w": weight}, [{"w": weight.to(torch.int8)}])
    with pytest.raises(ValueError, match=r"'w' has the dtype float32 in expert 0 but int8 in the base"):
        mkl.TaskVectors({"w": weight.to(torch.int8)}, [{"w": weight}])


def test_bytes_that_differ_are_not_taken_for_a_mask():
    models = [{"w": torch.ones(1), "table": torch.tensor([k, 1], dtype=torch.uint8)} for k in (0, 0, 3)]
    assert mkl.average(mkl.TaskVectors(models[0], models[:2]))["table"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="'table' differs between the models"):
        mkl.average(mkl.TaskVectors(models[0], models[1:]))


# ---------------------------------------------------------------- finite results


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.float64])
def test_a_merge_that_does_not_fit_its_dtype_names_tensor_and_method(dtype):
    top = torch.finfo(dtype).max
    base, expert = ({"w": torch.tensor([x * top, 1.0], dtype=torch.float64).to(dtype)} for x in (0.4, 0.9))
    tv = mkl.TaskVectors(base, [expert, expert])
    with pytest.raises(ValueError, match=r"the merge of 'w' by mkl\.task_arithmetic is not finite in"):
        mkl.task_arithmetic(tv, scale=1.0)
    with pytest.raises(ValueError, match=r"by mkl\.dare is not finite"):
        mkl.dare(tv, drop=0.0, scale=1.0)
    with pytest.raises(ValueError, match="the merge of 'w' by this method is not finite"):
        tv.map(lambda name, taus: 2 * taus.sum(0))
    assert torch.isfinite(mkl.average(tv)["w"].double()).all()


def test_the_largest_number_may_stay():
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        top = {"w": torch.tensor([torch.finfo(dtype).max]).to(dtype)}
        assert torch.equal(mkl.average(mkl.TaskVectors(top, [top]))["w"].float(), top["w"].float())


def test_weights_too_far_apart_are_not_called_infinite():
    far = [{"w": torch.tensor([x])} for x in (-3e38, 3e38)]
    with pytest.raises(ValueError, match="'w' differs from the base by more than float32 can hold"):
        mkl.average(mkl.TaskVectors(far[0], [far[1]]))


def test_complex_results_are_refused():
    tv = mkl.TaskVectors({"w": torch.ones(2)}, [{"w": torch.zeros(2)}])
    with pytest.raises(TypeError, match="complex"):
        tv.map(lambda name, taus: taus[0] * 1j)
