"""A layer as a regression: against cases known by hand, and against outputs computed from inputs."""

import pytest
import torch
from torch import nn

import mergekit_lite as mkl
from mergekit_lite.calibrated import Curvature, Kronecker, input_grams
from mergekit_lite.calibrated.regmean import least_squares
from mergekit_lite.lab.regression import (
    answers,
    common_directions,
    drift,
    error_of_layer,
    errors_along,
    filled,
    gather,
    inputs_of,
    likeness,
    onto_experts,
    stand_ins,
)
from tests.data_free.test_tsv import random as randn


def gram(inputs):
    return inputs @ inputs.T / inputs.shape[1]


def test_two_tasks_on_axes_of_their_own():
    shares, directions = common_directions(torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([0.0, 3.0])))
    torch.testing.assert_close(shares, torch.tensor([0.25, 1.0]).double())  # the second axis is shared 1 to 3
    torch.testing.assert_close(directions.abs(), torch.tensor([[0.0, 2.0], [2.0, 0.0]]).double())


@pytest.mark.parametrize("columns", [3, 40], ids=["few inputs", "many inputs"])
def test_common_directions_make_both_matrices_diagonal(columns):
    first, second = gram(randn(6, columns, seed=1)), gram(randn(6, columns, seed=2))
    if columns == 3:
        second[:, :3] = second[:3] = 0  # and a space that neither uses
        first[:, :1] = first[:1] = 0
    shares, u = common_directions(first, second)
    assert len(shares) == torch.linalg.matrix_rank(first + second)
    torch.testing.assert_close((u * shares) @ u.T, first)
    torch.testing.assert_close((u * (1 - shares)) @ u.T, second)


def test_errors_along_directions_add_up_to_the_error_of_the_outputs():
    inputs = [randn(5, 30, seed=1), randn(5, 20, seed=2)]
    experts, merged = randn(2, 4, 5, seed=3), randn(4, 5, seed=4)
    shares, u = common_directions(*map(gram, inputs))
    outputs = sum(((merged - w) @ x).square().sum(0).mean() for w, x in zip(experts, inputs, strict=True))
    torch.testing.assert_close(errors_along(merged, experts, shares, u).sum(), outputs)


def test_the_average_errs_by_a_quarter_and_least_squares_by_the_product_of_the_shares():
    grams, experts = [gram(randn(5, 30, seed=s)) for s in (1, 2)], randn(2, 4, 5, seed=3)
    shares, u = common_directions(*grams)
    apart = ((experts[0] - experts[1]) @ u).square().sum(0)
    best = least_squares(experts, [g[None] for g in grams])
    torch.testing.assert_close(errors_along(experts.mean(0), experts, shares, u), apart / 4)
    torch.testing.assert_close(errors_along(best, experts, shares, u), shares * (1 - shares) * apart)
    torch.testing.assert_close(best @ u, (shares * (experts[0] @ u)) + (1 - shares) * (experts[1] @ u))


@pytest.fixture
def layer():
    """Two experts of one linear layer, and inputs of their own."""
    base = nn.Linear(3, 2, bias=False).double()
    tv = mkl.TaskVectors(base, {"a": {"weight": randn(2, 3, seed=5)}, "b": {"weight": randn(2, 3, seed=6)}})
    inputs = {"a": randn(50, 3, seed=7), "b": randn(40, 3, seed=8)}
    return base, tv, inputs, {task: input_grams(base, [x]) for task, x in inputs.items()}


def test_answers_are_measured_as_if_the_inputs_were_there(layer):
    base, tv, inputs, grams = layer
    merged = {"weight": randn(2, 3, seed=9)}
    weights = {task: tv[task].map(lambda _, taus: taus[0])["weight"] for task in inputs}
    average = sum(weights.values()) / 2
    error = unit = own = foreign = 0
    for task, x in inputs.items():
        change, wanted = x @ (merged["weight"] - base.weight).T, x @ (weights[task] - base.weight).T
        error += (x @ (merged["weight"] - weights[task]).T).square().mean()
        unit += (x @ (average - weights[task]).T).square().mean()
        multiple = (change * wanted).sum() / wanted.square().sum()
        own += multiple / 2
        foreign += (change - multiple * wanted).square().sum() / wanted.square().sum() / 2
    found = answers(tv, merged, grams).loc["weight"]
    assert found.tolist() == pytest.approx([(error / unit).item(), own.item(), foreign.item()])


def test_an_expert_answers_its_own_task_as_it_should(layer):
    _, tv, _, grams = layer
    found = answers(tv["a"], tv["a"].map(lambda _, taus: taus[0]), grams)
    assert found.loc["weight", ["own", "foreign"]].tolist() == pytest.approx([1.0, 0.0])
    assert answers(tv, mkl.average(tv), grams)["error"].tolist() == pytest.approx([1.0])
    assert answers(tv, mkl.regmean(tv, grams), grams)["error"].item() < 1


def test_the_error_of_one_layer_is_that_of_regmean_on_other_inputs(layer):
    base, tv, inputs, grams = layer
    others = {task: input_grams(base, [x.flip(1)]) for task, x in inputs.items()}
    for alpha in (1.0, 0.0):
        expected = answers(tv, mkl.regmean(tv, grams, alpha=alpha), others)["error"].item()
        assert error_of_layer(tv, "weight", grams, others, alpha=alpha) == pytest.approx(expected)
    assert error_of_layer(tv, "weight", others, others) < error_of_layer(tv, "weight", grams, others)


def test_stand_ins_are_made_of_the_rows_of_task_vectors():
    base = {"w": torch.zeros(2, 2), "depthwise": torch.zeros(2, 1, 3, 3), "b": torch.zeros(2)}
    expert = {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "depthwise": torch.ones(2, 1, 3, 3), "b": torch.ones(2)}
    grams = stand_ins(mkl.TaskVectors(base, {"a": expert, "none": base}))
    assert list(grams["a"]) == ["w"]
    torch.testing.assert_close(grams["a"]["w"].inputs[0], torch.diag(torch.tensor([0.36, 0.64])).double())
    assert not grams["none"]["w"].inputs.any()


def test_inputs_are_those_before_an_activation_in_place():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(inplace=True), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(-torch.eye(2))
    x = torch.tensor([[1.0, -2.0]])
    seen = inputs_of(model, x)
    assert {name: a.tolist() for name, a in seen.items()} == {"0.weight": [[1.0, -2.0]], "2.weight": [[0.0, 2.0]]}
    assert list(inputs_of(model, x, ["0.weight"])) == ["0.weight"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_drift_is_measured_layer_by_layer(suite):
    images = {task: suite.calibration(task, 3)[0][0] for task in ("mnist", "textures")}
    assert drift(suite, suite.base, images)["conv_stem.weight"] == 0.0
    assert drift(suite, suite.experts["mnist"], {"mnist": images["mnist"]}).max() == 0.0
    name, base = "blocks.2.0.conv_pw.weight", suite.build()
    squared = []
    for task, x in images.items():
        own, other = (inputs_of(net, x)[name] for net in (suite.build(suite.experts[task]), base))
        squared.append(((own - other).norm() / own.norm()) ** 2)
    assert drift(suite, suite.base, images)[name] == pytest.approx(float(sum(squared) / 2), rel=1e-4)


def test_gram_matrices_by_any_network_on_any_images(suite):
    few = suite.cut(3, tasks=["mnist", "textures"])
    batches = {task: few.calibration(task, 3) for task in few.tasks}
    own = gather(few, few.experts, batches)
    for task, curvature in few.curvature("inputs", images=3, progress=False).items():
        torch.testing.assert_close(own[task]["conv_stem.weight"].inputs, curvature["conv_stem.weight"].inputs)
    by_base = gather(few, dict.fromkeys(few.tasks, few.base), dict.fromkeys(few.tasks, batches["mnist"]))
    torch.testing.assert_close(
        by_base["mnist"]["conv_stem.weight"].inputs, by_base["textures"]["conv_stem.weight"].inputs
    )


def test_how_many_directions_inputs_fill():
    assert filled(torch.eye(5)) == pytest.approx(5.0)
    assert filled(torch.diag(torch.tensor([3.0, 0.0, 0.0]))) == pytest.approx(1.0)


def test_likeness_by_hand():
    along, across = (Curvature({"w": Kronecker(torch.diag(torch.tensor(d))[None])}) for d in ([1.0, 0.0], [0.0, 2.0]))
    both = Curvature({"w": Kronecker(torch.eye(2)[None]), "only here": Kronecker(torch.eye(2)[None])})
    found = likeness({"a": along, "b": across}, {"a": along, "b": both})
    assert list(found.index) == ["w"]
    assert found.loc["w"].tolist() == pytest.approx([(1 + 0.5**0.5) / 2, 0.5**0.5 / 2])


def test_onto_the_experts_outputs_by_hand():
    """One weight per layer: the second one makes up for what the first one, a compromise, gets wrong."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    weights = {"a": (1.0, 1.0), "b": (3.0, 2.0)}
    experts = {t: {f"{i}.weight": torch.tensor([[w]]).double() for i, w in enumerate(ws)} for t, ws in weights.items()}
    tv = mkl.TaskVectors(model, experts)
    images = {task: torch.tensor([[1.0], [-1.0]]).double() for task in weights}
    merged = onto_experts(tv, model, images, ridge=0.0)
    # The first layer answers 2 to 1, between 1 and 3. The second reads 2 and should answer 1 and 6: 3.5, by 1.75.
    assert [merged[f"{i}.weight"].item() for i in (0, 1)] == pytest.approx([2.0, 1.75])
    images["b"] = images["b"] * 0.1  # now task a has nearly all the say, as squares count
    merged = onto_experts(tv, model, images, ridge=0.0)
    first = (1 + 3 * 0.01) / 1.01
    second = (first * 1 + 0.1 * first * 0.6) / (first**2 * 1.01)
    assert [merged[f"{i}.weight"].item() for i in (0, 1)] == pytest.approx([first, second])
    held = onto_experts(tv, model, images, ridge=1e9)
    assert [held[f"{i}.weight"].item() for i in (0, 1)] == pytest.approx([2.0, 1.5])


def test_onto_the_experts_outputs_of_one_expert_is_that_expert():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 2, stride=2)).double()
    expert = {name: torch.randn_like(p) for name, p in model.state_dict().items()}
    merged = onto_experts(mkl.TaskVectors(model, {"a": expert}), model, {"a": torch.randn(20, 2, 8, 8).double()})
    for name, weight in expert.items():
        torch.testing.assert_close(merged[name], weight)
