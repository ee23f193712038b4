"""AdaMerging: coefficients per task, or per task and tensor, that make predictions certain."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import mergekit_lite as mkl
from mergekit_lite.adaptive.adamerging import losses_and_slopes
from mergekit_lite.adaptive.coefficients import starting
from tests.adaptive.examples import merged_by_hand, problem, uncertainty
from tests.conftest import small_net
from tests.data_free.test_tsv import random

QUICK = {"steps": 25, "batch": 12, "learning_rate": 0.03, "progress": False}


def same(state, other, **tolerance):
    assert list(state) == list(other)
    for name in state:
        torch.testing.assert_close(state[name], other[name], **tolerance)


# ---------------------------------------------------------------- the merge


def test_merge_by_hand():
    tv = mkl.TaskVectors(
        {"v": torch.tensor([1.0, 1.0]), "w": torch.tensor([[0.0]])},
        [
            {"v": torch.tensor([2.0, 1.0]), "w": torch.tensor([[10.0]])},
            {"v": torch.tensor([1.0, 5.0]), "w": torch.tensor([[-2.0]])},
        ],
    )
    merged = mkl.merge_with(tv, {"v": torch.tensor([0.5, 0.25]), "w": torch.tensor([0.1, 1.0])})
    assert merged["v"].tolist() == [1.5, 2.0]  # 1 + 0.5·1, 1 + 0.25·4
    assert merged["w"].tolist() == [[-1.0]]  # 0.1·10 + 1·(−2)
    with pytest.raises(KeyError, match="no coefficients for the tensor 'w'"):
        mkl.merge_with(tv, {"v": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'v' needs 2 coefficients; got shape \(3,\)"):
        mkl.merge_with(tv, {"v": torch.ones(3), "w": torch.ones(2)})


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_before_the_first_step_it_is_task_arithmetic(tv, granularity):
    heads, images = {"expert 0": nn.Identity()}, {"expert 0": torch.randn(2, 3, 3, 3)}
    merged = mkl.adamerging(tv, small_net(0), heads, images, granularity=granularity, steps=0)
    same(merged, mkl.task_arithmetic(tv, scale=0.3))


def test_statistics_of_normalisation_are_merged_but_do_not_descend():
    tv, net, heads, images = problem()
    layers = mkl.learn_coefficients(tv, net, heads, images, **QUICK)
    tasks = mkl.learn_coefficients(tv, net, heads, images, granularity="task", **QUICK)
    for found in (layers, tasks):
        merged = mkl.merge_with(tv, found)
        for name in ("1.running_mean", "1.running_var"):
            assert name not in found
            torch.testing.assert_close(merged[name], torch.stack([expert[name] for expert in tv._experts]).mean(0))
    assert all((layers[name] != 0.3).all() for name, _ in net.named_parameters())


# ---------------------------------------------------------------- the slopes of the coefficients


def sides(free, clamp, tv, net, heads, images, step):
    """The differences of the loss over `step`, coefficient by coefficient; the merge is built expert by expert."""
    names = [name for name, _, _ in tv.layers()]

    def loss(free):
        lambdas = (free.clamp(0, 1) if clamp else free).expand(len(names), len(tv))
        merged = merged_by_hand(tv, dict(zip(names, lambdas, strict=True)).__getitem__)
        return uncertainty(merged, net, heads, images)

    differences = torch.zeros_like(free)
    for i in range(free.numel()):
        moved = free.clone().flatten()
        moved[i] += step
        differences.view(-1)[i] = (loss(moved.view(free.shape)) - loss(free)) / step
    return differences


def at(free, clamp, tv, net, heads, images):
    layers = {name: (theta0, taus) for name, theta0, taus in tv.layers()}
    return losses_and_slopes(free, clamp, layers, mkl.LossOfWeights(net, heads, tv), images)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_slopes_are_those_of_finite_differences(granularity, clamp):
    # Statistics have no slope, as published, though the loss depends on them; task-wise that cannot be told apart.
    setting = problem(statistics=granularity == "layer")
    names = [name for name, _, _ in setting[0].layers()]
    free = starting(0.4, names, 3, granularity) + 0.2 * random(*((len(names), 3) if granularity == "layer" else (3,)))
    free.view(-1)[:2] = torch.tensor([1.3, -0.2])  # outside
    losses, slopes = at(free, clamp, *setting)
    expected = (sides(free, clamp, *setting, 1e-5) + sides(free, clamp, *setting, -1e-5)) / 2
    if granularity == "layer":
        expected[torch.tensor(["running" in name for name in names])] = 0
    torch.testing.assert_close(slopes, expected, rtol=1e-5, atol=1e-7)
    assert (slopes.view(-1)[:2] == 0).all() == clamp, "the clamp kills gradients outside, and nothing else does"
    tv, net, heads, images = setting
    lambdas = dict(zip(names, (free.clamp(0, 1) if clamp else free).expand(len(names), 3), strict=True))
    total = uncertainty(merged_by_hand(tv, lambdas.__getitem__), net, heads, images)
    assert sum(losses.values()) == pytest.approx(total.item(), rel=1e-12)


def test_at_the_clamps_edge_the_slope_is_that_of_the_inside():
    setting = problem()
    names = [name for name, _, _ in setting[0].layers()]
    for edge, inside in ((0.0, 1e-6), (1.0, -1e-6)):
        free = torch.full((len(names), 3), edge, dtype=torch.float64)
        _, slopes = at(free, True, *setting)
        weights = torch.tensor(["running" not in name for name in names])
        expected = sides(free, True, *setting, inside)[weights]
        torch.testing.assert_close(slopes[weights], expected, rtol=1e-4, atol=1e-5)
        assert (sides(free, True, *setting, -inside) == 0).all(), "outside nothing changes"
        same({"": slopes}, {"": at(free, False, *setting)[1]})


@pytest.mark.parametrize("granularity", ["layer", "task"])
@pytest.mark.parametrize("clamp", [True, False])
def test_the_whole_descent_is_that_of_autograd_through_the_merge(granularity, clamp):
    """The same steps of Adam, with the network differentiated through the sum of the task vectors."""
    tv, net, heads, images = problem()
    names, parameters = [name for name, _, _ in tv.layers()], dict(net.named_parameters())
    free = torch.full((len(names), 3) if granularity == "layer" else (3,), 0.3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([free], lr=0.1)

    def merged(lambdas):
        rows = dict(zip(names, (lambdas.clamp(0, 1) if clamp else lambdas).expand(len(names), 3), strict=True))
        state = merged_by_hand(tv, rows.__getitem__)
        return {name: t if name in parameters else t.detach() for name, t in state.items()}

    for _ in range(8):
        adam.zero_grad()
        uncertainty(merged(free), net, heads, images).backward()
        adam.step()
    ours = mkl.adamerging(
        tv, net, heads, images, granularity=granularity, clamp=clamp, steps=8, batch=99, learning_rate=0.1
    )
    same(ours, merged(free.detach()), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- other losses


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_with_another_loss_the_slopes_are_its_slopes(granularity):
    """Imitation and information, by autograd through merge and network; statistics have no slope."""
    tv, net, heads, images = problem(statistics=False)
    experts = dict(zip(tv.names, tv._experts, strict=True))
    q = {t: heads[t](functional_call(net, dict(experts[t]), (x,))).softmax(1).detach() for t, x in images.items()}
    names = [name for name, _, _ in tv.layers()]
    shape = (len(names), 3) if granularity == "layer" else (3,)
    free = (0.3 + 0.1 * random(*shape)).requires_grad_()

    def entropy_of(p):
        return -(p * p.log()).sum(-1)

    losses = {
        mkl.imitation_loss(net, experts, heads): lambda t, p: -(q[t] * p.log()).sum(1).mean(),
        mkl.information_loss: lambda t, p: entropy_of(p).mean() - entropy_of(p.mean(0)),
    }
    for loss, by_hand in losses.items():
        merged = merged_by_hand(tv, dict(zip(names, free.expand(len(names), 3), strict=True)).__getitem__)
        merged = {name: t.detach() if "running" in name else t for name, t in merged.items()}
        p = {t: heads[t](functional_call(net, merged, (x,))).softmax(1) for t, x in images.items()}
        values = {t: by_hand(t, p[t]) for t in p}
        (expected,) = torch.autograd.grad(sum(values.values()), free)
        layers = {name: (theta0, taus) for name, theta0, taus in tv.layers()}
        of_weights = mkl.LossOfWeights(net, heads, tv, loss)
        ours, slopes = losses_and_slopes(free.detach(), False, layers, of_weights, images)
        torch.testing.assert_close(slopes, expected, rtol=1e-9, atol=1e-12)
        assert ours == pytest.approx({t: value.item() for t, value in values.items()}, rel=1e-12)


def test_the_loss_that_is_given_is_what_it_descends_on():
    tv, net, heads, images = problem()
    imitation = mkl.imitation_loss(net, dict(zip(tv.names, tv._experts, strict=True)), heads)

    def value(loss, found):
        merged = mkl.merge_with(tv, found)
        logits = {t: heads[t](functional_call(net, merged, (x,))) for t, x in images.items()}
        return sum(loss(t, images[t], z).item() for t, z in logits.items())

    found = {
        loss: mkl.learn_coefficients(tv, net, heads, images, loss=loss, **QUICK)
        for loss in (mkl.entropy_loss, mkl.information_loss, imitation)
    }
    for loss, coefficients in found.items():
        assert value(loss, coefficients) < value(loss, starting_point(tv)) - 0.05
    assert min(found, key=lambda loss: value(imitation, found[loss])) is imitation
    assert value(mkl.entropy_loss, found[mkl.entropy_loss]) < value(mkl.entropy_loss, found[imitation])
    assert not torch.equal(found[mkl.entropy_loss]["4.weight"], found[mkl.information_loss]["4.weight"])
    same(found[mkl.entropy_loss], mkl.learn_coefficients(tv, net, heads, images, **QUICK), rtol=0, atol=0)
    merged = mkl.adamerging(tv, net, heads, images, loss=imitation, **QUICK)
    same(merged, mkl.merge_with(tv, found[imitation]), rtol=0, atol=0)
    history = found[imitation].history
    assert history.average("loss")[0] * 3 == pytest.approx(value(imitation, starting_point(tv)))
    assert history.quantities == ["loss", "coefficient"]


def starting_point(tv):
    return {name: torch.full((3,), 0.3, dtype=torch.float64) for name in tv.base}


def test_a_loss_is_told_the_task_its_inputs_and_the_logits_of_its_own_head():
    tv, net, heads, images = problem()
    calls = []

    def loss(task, inputs, logits):
        calls.append(task)
        assert all(any(torch.equal(x, y) for y in images[task]) for x in inputs)
        expected = heads[task](functional_call(net, mkl.task_arithmetic(tv, scale=0.3), (inputs,)))
        torch.testing.assert_close(logits, expected)
        return logits.square().mean()

    mkl.learn_coefficients(tv, net, heads, images, loss=loss, **QUICK | {"steps": 1, "batch": 5})
    assert calls == ["a", "b", "c"]


# ---------------------------------------------------------------- what it does


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_predictions_become_more_certain(granularity):
    tv, net, heads, images = problem()
    before = uncertainty(mkl.task_arithmetic(tv, scale=0.3), net, heads, images)
    merged = mkl.adamerging(tv, net, heads, images, granularity=granularity, **QUICK)
    assert uncertainty(merged, net, heads, images) < 0.9 * before


def test_more_coefficients_reach_a_lower_entropy():
    tv, net, heads, images = problem(statistics=False)
    task, layer = (
        uncertainty(mkl.adamerging(tv, net, heads, images, granularity=g, **QUICK), net, heads, images)
        for g in ("task", "layer")
    )
    assert layer < task


def test_the_clamp_lets_nothing_come_back_and_without_it_there_are_no_bounds():
    tv, net, heads, images = problem(statistics=False)  # merged with negative coefficients, variances can be negative
    options = {"granularity": "task", "init": 0.05, "steps": 40, "batch": 4, "learning_rate": 0.2, "progress": False}
    path = mkl.learn_coefficients(tv, net, heads, images, **options).history.to_frame()["coefficient"]
    assert path.to_numpy().min() == 0
    assert path.to_numpy().max() <= 1
    for task in tv.names:
        outside = path.index[path[task].isin([0.0, 1.0])]
        assert len(outside) == 0 or path[task][outside[0] :].nunique() == 1
    free = mkl.learn_coefficients(tv, net, heads, images, clamp=False, **options)
    assert free.history.to_frame()["coefficient"].to_numpy().min() < 0
    same(mkl.merge_with(tv, free), mkl.task_arithmetic(tv, scale=free["0.weight"].tolist()))


def test_a_seed_repeats_it():
    tv, net, heads, images = problem()

    def run(seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return mkl.learn_coefficients(tv, net, heads, images, steps=5, batch=3, generator=generator, progress=False)

    same(run(), run())
    same(run(7), run(7))
    assert any(not torch.equal(run(7)[name], run(8)[name]) for name in run(7))
    global_state = torch.get_rng_state()
    run(7)
    assert torch.equal(global_state, torch.get_rng_state())


def test_the_order_of_experts_and_images_does_not_matter():
    tv, net, heads, images = problem()
    options = {**QUICK, "batch": 5}
    first = mkl.adamerging(tv, net, heads, images, **options)
    second = mkl.adamerging(tv.subset(["c", "a", "b"]), net, heads, {t: images[t] for t in ("b", "c", "a")}, **options)
    same(first, second, rtol=1e-7, atol=1e-9)


def test_labels_are_not_looked_at():
    tv, net, heads, images = problem()
    pairs = {task: [(x[:5], torch.tensor([9])), (x[5:], None)] for task, x in images.items()}
    same(mkl.adamerging(tv, net, heads, pairs, **QUICK), mkl.adamerging(tv, net, heads, images, **QUICK))


def test_nothing_that_was_given_is_changed():
    tv, net, heads, images = problem()
    net.train()
    init = torch.full((3,), 0.3)
    given = [
        tv.base,
        *tv._experts,
        net.state_dict(),
        images,
        *(head.state_dict() for head in heads.values()),
        {"": init},
    ]
    before = [{name: t.clone() for name, t in state.items()} for state in given]
    merged = mkl.adamerging(tv, net, heads, images, init=init, **QUICK)
    for tensor in merged.values():
        tensor.zero_()
    for state, old in zip(given, before, strict=True):
        same(state, old, rtol=0, atol=0)
    assert net.training
    assert all(p.grad is None for module in (net, *heads.values()) for p in module.parameters())


def test_one_expert():
    tv, net, heads, images = problem(1)
    found = mkl.learn_coefficients(tv, net, heads, images, granularity="task", **QUICK)
    assert found["0.weight"].shape == (1,)
    assert found["0.weight"].item() != 0.3
    zero = mkl.TaskVectors(tv.base, [tv.base])
    same(mkl.adamerging(zero, net, {"expert 0": heads["a"]}, {"expert 0": images["a"]}, **QUICK), tv.base)


def test_tasks_without_images_are_merged_too():
    tv, net, heads, images = problem()
    found = mkl.learn_coefficients(tv, net, heads, {"b": images["b"]}, **QUICK)
    assert list(found.history.seen["loss"][0]) == ["b"]
    assert (found["0.weight"] != 0.3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_precisions(dtype):
    tv, net, heads, images = problem()
    states = [{n: t.to(dtype) if t.is_floating_point() else t for n, t in s.items()} for s in (tv.base, *tv._experts)]
    coarse = mkl.TaskVectors(states[0], dict(zip(tv.names, states[1:], strict=True)))
    heads = {task: head.to(dtype) for task, head in heads.items()}
    options = {**QUICK, "steps": 3}
    merged = mkl.adamerging(coarse, net.to(dtype), heads, {t: x.to(dtype) for t, x in images.items()}, **options)
    assert all(merged[name].dtype == states[0][name].dtype for name in merged)
    exact = mkl.adamerging(tv, problem()[1], problem()[2], images, **options)
    for name in exact:
        assert (merged[name].double() - exact[name].double()).abs().max() < (0.15 if dtype == torch.bfloat16 else 1e-4)


class Odd(nn.Module):
    """A network with a tensor without axes and one without entries."""

    def __init__(self, value):
        super().__init__()
        self.scale, self.none = nn.Parameter(torch.tensor(value)), nn.Parameter(torch.zeros(0, 3))
        self.weight = nn.Parameter(torch.tensor([[value, 1.0], [0.5, -value]]))

    def forward(self, x):
        return self.scale * x @ self.weight + self.none.sum()


def odd_problem():
    torch.manual_seed(0)
    tv = mkl.TaskVectors(Odd(1.0), {"a": Odd(2.0), "b": Odd(-1.0)})
    return tv, Odd(1.0), {"a": nn.Identity(), "b": nn.Identity()}, {"a": torch.randn(6, 2), "b": torch.randn(6, 2)}


def test_tensors_without_axes_and_without_entries():
    tv, net, heads, images = odd_problem()
    found = mkl.learn_coefficients(tv, net, heads, images, **QUICK)
    assert found["none"].tolist() == pytest.approx([0.3, 0.3])
    assert (found["scale"] - 0.3).abs().min() > 0.01
    lam = found["scale"].tolist()
    assert mkl.merge_with(tv, found)["scale"].item() == pytest.approx(1 + lam[0] - 2 * lam[1])
    same(
        mkl.adamerging(mkl.trim_and_elect(tv, 1.0), net, heads, images, **QUICK | {"steps": 0}),
        {
            "scale": torch.tensor(1 - 0.3 * 2),
            "none": torch.zeros(0, 3),
            "weight": torch.tensor([[0.4, 1.0], [0.5, -0.4]]),
        },
    )


# ---------------------------------------------------------------- where it starts


def test_starts():
    names = ["x", "y"]
    assert starting(0.2, names, 3, "task").tolist() == [0.2] * 3
    assert starting([0.1, 0.2, 0.3], names, 3, "task").tolist() == [0.1, 0.2, 0.3]
    assert starting(0.2, names, 3, "layer").tolist() == [[0.2] * 3] * 2
    assert starting(torch.tensor([0.0, 0.5, 1.0]), names, 3, "layer").tolist() == [[0, 0.5, 1]] * 2
    rows = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert starting(torch.tensor(rows), names, 3, "layer").tolist() == rows
    by_name = {"y": torch.tensor(rows[1]), "x": torch.tensor(rows[0]), "more": torch.zeros(9)}
    assert starting(by_name, names, 3, "layer").tolist() == rows
    given = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    starting(given, names, 3, "task").zero_()
    assert given.sum() > 0
    for init, granularity in (([0.1, 0.2], "task"), (torch.zeros(3, 2), "layer"), (torch.zeros(2, 3), "task")):
        with pytest.raises(ValueError, match="init is one number, 3"):
            starting(init, names, 3, granularity)
    with pytest.raises(KeyError, match="no coefficients for the tensor 'y'"):
        starting({"x": torch.zeros(3)}, names, 3, "layer")
    with pytest.raises(ValueError, match="init must be finite"):
        starting([0.0, math.nan, 0.0], names, 3, "task")
    with pytest.raises(ValueError, match="granularity must be one of layer, task; got 'row'"):
        starting(0.3, names, 3, "row")


def test_one_can_go_on_from_coefficients():
    tv, net, heads, images = problem()
    options = {**QUICK, "learning_rate": 0.01}
    first = mkl.learn_coefficients(tv, net, heads, images, **options)
    second = mkl.learn_coefficients(tv, net, heads, images, init=first, **options)
    assert second.history.average("loss")[0] < first.history.average("loss")[0]
    assert second.means() != first.means()
    assert second.history.seen["coefficient"][0] == pytest.approx(first.means())


# ---------------------------------------------------------------- what one sees of it


def test_coefficients_as_a_table_and_in_one_line():
    coefficients = mkl.Coefficients({"v": torch.tensor([0.5, 0.25]), "w": torch.tensor([0.0, 0.75])}, ["a", "b"])
    assert coefficients.to_frame().loc["w"].to_dict() == {"a": 0.0, "b": 0.75}
    assert coefficients.to_frame().index.tolist() == ["v", "w"]
    assert coefficients.means() == {"a": 0.25, "b": 0.5}
    assert repr(coefficients) == "Coefficients(2 tensors, on average a 0.250, b 0.500; History(0 steps))"


def test_accuracies_are_measured_on_the_way_and_change_nothing():
    tv, net, heads, images = problem()
    states = []

    def measure(state):
        states.append(state)
        return {"a": len(states) / 10}

    found = mkl.learn_coefficients(tv, net, heads, images, measure=measure, every=10, **QUICK)
    assert found.history.seen["accuracy"] == {0: {"a": 0.1}, 10: {"a": 0.2}, 20: {"a": 0.3}, 25: {"a": 0.4}}
    same(states[0], mkl.task_arithmetic(tv, scale=0.3))
    same(states[-1], mkl.merge_with(tv, found))
    same(found, mkl.learn_coefficients(tv, net, heads, images, **QUICK))
    assert set(found.history.to_frame().columns.levels[0]) == {"loss", "coefficient", "accuracy"}


def test_it_may_stop_early():
    tv, net, heads, images = problem()
    options = {**QUICK, "steps": 400, "learning_rate": 0.1}
    found = mkl.learn_coefficients(tv, net, heads, images, patience=10, **options)
    assert 20 <= found.history.steps < 400


# ---------------------------------------------------------------- other task vectors: ++ and AWD


def test_trim_and_elect_by_hand():
    # Of 4 entries the 2 largest stay: (4, 0, 3, 0), (−5, 0, 0, 2), (0, 1, 2, 0). Sums: −1, 1, 5, 2.
    experts = [[4.0, 0.5, 3.0, -1.0], [-5.0, 0.5, 1.0, 2.0], [0.5, 1.0, 2.0, -0.5]]
    tv = mkl.TaskVectors({"w": torch.zeros(4)}, [{"w": torch.tensor(e)} for e in experts])
    kept = mkl.trim_and_elect(tv, density=0.5)
    assert kept.flat().tolist() == [[0, 0, 3, 0], [-5, 0, 0, 2], [0, 1, 2, 0]]
    assert kept.names == tv.names
    # Where votes cancel, the majority of all signs decides: here two plus, one minus.
    experts = [[3.0, 1.0, 1.0, -1.0], [-3.0, 1.0, 1.0, -1.0]]
    tv = mkl.TaskVectors({"w": torch.zeros(4)}, [{"w": torch.tensor(e)} for e in experts])
    assert mkl.trim_and_elect(tv, density=1.0).flat().tolist() == [[3, 1, 1, -1], [0, 1, 1, -1]]


@pytest.mark.parametrize("granularity", ["whole", "layer"])
def test_what_trim_and_elect_leaves_adds_up_to_ties(tv, granularity):
    kept = mkl.trim_and_elect(tv, 0.3, granularity)
    expected = mkl.ties(tv, density=0.3, granularity=granularity, combine="sum", scale=0.3)
    same(mkl.task_arithmetic(kept, scale=0.3), expected)
    signs = kept.flat().sign()
    assert (signs.amax(0) - signs.amin(0) <= 1).all()
    assert torch.equal(mkl.trim_and_elect(tv[0], 0.3).flat(), mkl.trim(tv[0], 0.3).flat())
    with pytest.raises(ValueError, match="density"):
        mkl.trim_and_elect(tv, 0.0)


@pytest.mark.parametrize(
    "change", [lambda tv: mkl.trim_and_elect(tv, 0.5), lambda tv: mkl.disentangle(tv, iterations=20).task_vectors]
)
def test_other_task_vectors_are_weighted_in_the_same_way(change):
    tv, net, heads, images = problem()
    other = change(tv)
    found = mkl.learn_coefficients(other, net, heads, images, granularity="task", **QUICK)
    vector = found["0.weight"] @ other.flat()
    same(mkl.adamerging(other, net, heads, images, granularity="task", **QUICK), tv.add(vector))
    entropies = found.history.average("loss")
    assert entropies[24] < entropies[0]
    written_out = [state.map(lambda _, taus: taus[0]) for state in other]
    plain = mkl.TaskVectors(tv.base, dict(zip(tv.names, written_out, strict=True)))
    same(found, mkl.learn_coefficients(plain, net, heads, images, granularity="task", **QUICK), rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- wrong input


def test_wrong_input_says_why():
    tv, net, heads, images = problem()

    def run(heads=heads, images=images, **options):
        mkl.adamerging(tv, net, heads, images, **{**QUICK, **options})

    with pytest.raises(KeyError, match="no head for the task 'z'; there are heads for a, b, c"):
        run(images={**images, "z": images["a"]})
    with pytest.raises(KeyError, match="no head for the task 'b'; there are heads for a"):
        run(heads={"a": heads["a"]})
    with pytest.raises(ValueError, match="no images of the task 'c'"):
        run(images={**images, "c": images["c"][:0]})
    with pytest.raises(ValueError, match="there must be some of at least one task"):
        run(images={})
    with pytest.raises(ValueError, match="granularity must be one of layer, task; got 'row'"):
        run(granularity="row")
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="learning_rate must be positive and finite"):
            run(learning_rate=rate)
    with pytest.raises(ValueError, match="at least one image per task"):
        run(batch=0)
    with pytest.raises(ValueError, match="steps must not be negative"):
        run(steps=-1)
    for init in (-0.1, [0.2, 0.3, 1.1]):
        with pytest.raises(ValueError, match=r"outside \[0, 1\] would be clamped and never move; use clamp=False"):
            run(init=init)
        run(init=init, clamp=False)
    with pytest.raises(TypeError, match="density"):
        run(density=0.2)


def test_what_was_reached_before_an_image_was_bad_is_kept():
    tv, net, heads, images = problem()
    taken = []

    def camera(count, generator):
        taken.append(count)
        return images["b"] * (math.nan if len(taken) == 7 else 1.0)

    given = {"a": images["a"], "b": camera}
    with pytest.raises(mkl.DivergenceError, match="after 6 steps the loss of 'b' is nan") as stopped:
        mkl.adamerging(tv, net, heads, given, **QUICK)
    assert stopped.value.history.steps == 6
    taken.clear()
    same(stopped.value.reached, mkl.learn_coefficients(tv, net, heads, given, **{**QUICK, "steps": 6}))
    assert stopped.value.reached.history is stopped.value.history


# ---------------------------------------------------------------- on the suite


def test_adamerging_on_the_suite(suite):
    few = suite.cut(12, tasks=["mnist", "textures"])
    images = {task: few.calibration(task, 12, split="test") for task in few.tasks}
    options = {"steps": 6, "batch": 12, "learning_rate": 0.03, "progress": False}
    found = mkl.learn_coefficients(few.task_vectors, few.model, few.heads, images, measure=few.evaluate, **options)
    assert found["conv_stem.weight"].shape == (2,)
    first, last = (found.history.average("loss")[step] for step in (0, 5))
    assert last < first - 0.02
    assert found.history.seen["accuracy"][6] == dict(few.evaluate(mkl.merge_with(few.task_vectors, found)))
