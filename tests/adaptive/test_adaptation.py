"""The loop that adapts a few numbers to inputs without labels, and what it is made of."""

import copy
import math

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import mergekit_lite as mkl
from mergekit_lite.adaptive import DivergenceError, History, LossOfWeights, adapt, draws, entropy
from tests.adaptive.examples import merged_by_hand, problem, tiny_net, uncertainty
from tests.test_task_vectors import Tied

# ---------------------------------------------------------------- entropy


def test_entropy_by_hand():
    assert entropy(torch.zeros(7, 4)).item() == pytest.approx(math.log(4))
    # 3/4 and 1/4: -(3/4) log(3/4) - (1/4) log(1/4) = log 4 - (3/4) log 3
    certain, undecided = [math.log(3), 0.0], [5.0, 5.0]
    expected = (math.log(4) - 0.75 * math.log(3) + math.log(2)) / 2
    assert entropy(torch.tensor([certain, undecided])).item() == pytest.approx(expected)
    assert entropy(torch.tensor([[[certain, undecided]]] * 3)).item() == pytest.approx(expected)  # a mean over all


def test_entropy_of_extreme_logits_is_finite_and_so_is_its_gradient():
    for row in ([1e4, 0.0, -1e4], [0.0, -math.inf, 0.0], [-math.inf, 3.0, -math.inf]):
        logits = torch.tensor([row], requires_grad=True)
        h = entropy(logits)
        h.backward()
        assert h.item() == pytest.approx(math.log(2) if row[0] == 0 else 0.0, abs=1e-6)
        assert torch.isfinite(logits.grad).all()
    assert entropy(torch.full((1, 5), -1e38)).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_entropy_of_half_precision_is_computed_in_float32(dtype):
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert entropy(logits).dtype == torch.float32
    torch.testing.assert_close(entropy(logits).double(), entropy(logits.double()), rtol=1e-6, atol=0)


def test_gradient_of_the_entropy():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entropy, (logits,))


# ---------------------------------------------------------------- draws


def numbers(count: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + count)[:, None]


def take(stream, count):
    return [next(stream) for _ in range(count)]


def test_draws_have_no_repeats_and_in_the_long_run_all_images():
    seen = set()
    for batch in take(draws({"a": numbers(10)}, 4), 20):
        assert batch["a"].shape == (4, 1)
        assert len(set(batch["a"].flatten().tolist())) == 4
        seen |= set(batch["a"].flatten().tolist())
    assert seen == set(range(10))
    (batch,) = take(draws({"a": numbers(3)}, 16), 1)
    assert sorted(batch["a"].flatten().tolist()) == [0, 1, 2]


def test_draws_are_those_of_the_generator_and_do_not_depend_on_other_tasks():
    images = {"a": numbers(50), "b": numbers(50)}

    def drawn(images, seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return [torch.cat([batch[task] for batch in take(draws(images, 5, generator), 3)]) for task in "a"]

    first = drawn(images, 1)
    assert torch.equal(first[0], drawn({"b": images["b"], "a": images["a"]}, 1)[0])
    assert torch.equal(first[0], drawn({"a": images["a"]}, 1)[0])
    assert not torch.equal(first[0], drawn(images, 2)[0])
    assert torch.equal(drawn(images)[0], drawn(images)[0])
    (batch,) = take(draws(images, 5), 1)
    assert not torch.equal(batch["a"], batch["b"]), "tasks draw by themselves"
    generator = torch.Generator().manual_seed(1)
    again = [torch.cat([batch["a"] for batch in take(draws(images, 5, generator), 3)]) for _ in range(2)]
    assert not torch.equal(*again), "a generator goes on"


def test_images_may_be_batches_with_or_without_labels_or_a_function():
    asked = []

    def camera(count, generator):
        asked.append(count)
        return torch.rand(count, 2, generator=generator)

    labelled = [(numbers(4), torch.zeros(4)), [numbers(3, 4), torch.zeros(3)]]
    stream = draws({"pairs": labelled, "parts": (numbers(4), numbers(3, 4)), "camera": camera}, 7)
    first, second = take(stream, 2)
    for task in ("pairs", "parts"):
        assert sorted(first[task].flatten().tolist()) == list(range(7))
    assert asked == [7, 7]
    assert not torch.equal(first["camera"], second["camera"])
    assert torch.equal(first["camera"], next(draws({"camera": camera}, 7))["camera"])


def test_images_that_are_missing_are_said_at_once():
    for given in (torch.zeros(0, 3), [], [torch.zeros(0, 3)]):
        with pytest.raises(ValueError, match="no images of the task 'b'"):
            draws({"a": numbers(3), "b": given}, 2)
    with pytest.raises(ValueError, match="there must be some of at least one task"):
        draws({}, 2)
    with pytest.raises(ValueError, match="at least one image per task; got 0"):
        draws({"a": numbers(3)}, 0)


# ---------------------------------------------------------------- entropies as a function of the weights


def test_entropies_and_gradient_are_those_of_a_network_with_these_weights():
    tv, net, heads, images = problem()
    merged = merged_by_hand(tv, lambda name: torch.tensor([0.3, 0.5, -0.2]))
    entropies, gradient = LossOfWeights(net, heads, tv)(
        {name: merged[name] for name, _, _ in tv.layers()}, {task: images[task] for task in ("c", "a")}
    )
    assert list(entropies) == ["c", "a"]
    parameters = dict(net.named_parameters())
    leaves = {name: t.requires_grad_(name in parameters) for name, t in merged.items()}
    total = uncertainty(leaves, net, heads, {task: images[task] for task in ("c", "a")})
    total.backward()
    assert sum(entropies.values()) == pytest.approx(total.item(), rel=1e-12)
    assert entropies["a"] == pytest.approx(uncertainty(leaves, net, heads, {"a": images["a"]}).item(), rel=1e-12)
    assert set(gradient) == set(parameters), "statistics have none"
    for name, g in gradient.items():
        torch.testing.assert_close(g, leaves[name].grad, rtol=1e-10, atol=1e-12)


def test_another_loss_and_which_tensors_are_trainable():
    tv, net, heads, images = problem()
    weights = {name: theta0 for name, theta0, _ in tv.layers()}
    weight = {"a": 1.0, "b": 2.0, "c": 1.0}
    of_weights = LossOfWeights(net, heads, tv, lambda task, x, logits: weight[task] * logits.square().sum())
    assert of_weights.trainable == [name for name, _ in net.named_parameters()]
    assert of_weights.trainable == list(weights), "the statistics of normalisation are no weights"
    net.load_state_dict(tv.others(), strict=False)  # the mean of the experts' statistics
    losses, gradient = of_weights(weights, images)
    by_hand = {task: weight[task] * heads[task](net(x)).square().sum() for task, x in images.items()}
    assert losses == pytest.approx({task: loss.item() for task, loss in by_hand.items()}, rel=1e-12)
    expected = torch.autograd.grad(sum(by_hand.values()), list(net.parameters()))
    for name, g in zip(of_weights.trainable, expected, strict=True):
        torch.testing.assert_close(gradient[name], g, rtol=1e-10, atol=1e-12)
    part = {name: tensor for name, tensor in tv.base.items() if name.startswith(("4", "1.running"))}
    assert LossOfWeights(net, heads, mkl.TaskVectors(part, [part])).trainable == ["4.weight", "4.bias"]


def test_the_model_and_the_heads_are_not_touched():
    tv, _, heads, images = problem()
    net = tiny_net(7).train()
    before = copy.deepcopy(net.state_dict())
    tracked = {task: x.clone().requires_grad_() for task, x in images.items()}
    LossOfWeights(net, heads, tv)({name: theta0 for name, theta0, _ in tv.layers()}, tracked)
    assert net.training
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(p.grad is None for head in heads.values() for p in head.parameters())
    assert all(x.grad is None for x in tracked.values())


def test_images_do_not_influence_each_other():
    tv, net, heads, images = problem()
    weights = {name: theta0 for name, theta0, _ in tv.layers()}
    entropies = LossOfWeights(net.train(), heads, tv)
    one_by_one = [entropies(weights, {"a": x[None]})[0]["a"] for x in images["a"]]
    assert entropies(weights, {"a": images["a"]})[0]["a"] == pytest.approx(sum(one_by_one) / 12, rel=1e-12)


def test_gradients_are_forgotten_between_calls_and_unused_weights_have_none():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, x):
            return self.used(x)

    tv = mkl.TaskVectors(Half(), [Half()])
    entropies = LossOfWeights(Half(), {"a": nn.Identity()}, tv)
    weights, images = {name: theta0 for name, theta0, _ in tv.layers()}, {"a": torch.randn(4, 2)}
    first, second = entropies(weights, images)[1], entropies(weights, images)[1]
    assert set(first) == {"used.weight", "used.bias"}
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tensors_that_are_not_merged_stay_as_the_model_has_them():
    whole = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    body = {name: t for name, t in whole.state_dict().items() if name.startswith("0.")}
    tv = mkl.TaskVectors(body, [{name: t + 1 for name, t in body.items()}])
    x = torch.randn(5, 2)
    (value,) = LossOfWeights(whole, {"a": nn.Identity()}, tv)(body, {"a": x})[0].values()
    assert value == pytest.approx(entropy(whole(x)).item(), rel=1e-6)


class Twice(Tied):
    def forward(self, x):
        return self.head(self.embed(x))


def test_tied_weights_have_the_gradient_of_both_uses():
    x, heads = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), {"a": nn.Identity()}
    tv = mkl.TaskVectors(Twice(0.5), [Twice(1.0)])
    weight = torch.tensor([[0.3, -0.1], [0.2, 0.4]], requires_grad=True)
    _, gradient = LossOfWeights(Twice(0.0), heads, tv)({"embed.weight": weight.detach()}, {"a": x})
    entropy(x @ weight.T @ weight.T).backward()
    torch.testing.assert_close(gradient["embed.weight"], weight.grad)
    untied = mkl.TaskVectors(Twice(0.0), [Twice(1.0, tie=False)])
    assert set(LossOfWeights(Twice(0.0, tie=False), heads, untied)(untied.base, {"a": x})[1]) == set(untied.base)
    with pytest.raises(ValueError, match="one tensor under two names"):
        LossOfWeights(Twice(0.0), heads, untied)


def test_what_does_not_fit_is_said():
    tv, net, heads, images = problem()
    weights = {name: theta0 for name, theta0, _ in tv.layers()}
    with pytest.raises(KeyError, match=r"the model has no tensor '4\.weight'"):
        LossOfWeights(net[:3], heads, tv)
    wrong = tiny_net()
    wrong[4] = nn.Linear(12, 6).double()
    with pytest.raises(RuntimeError, match=r"size mismatch for 4\.weight"):
        LossOfWeights(wrong, heads, tv)
    with pytest.raises(KeyError, match="no head for the task 'z'; there are heads for a, b, c"):
        LossOfWeights(net, heads, tv)(weights, {"z": images["a"]})
    for head in (lambda x: x.mean(1), lambda x: x[:1]):
        with pytest.raises(ValueError, match="expected logits"):
            LossOfWeights(net, {"a": head}, tv)(weights, {"a": images["a"]})


# ---------------------------------------------------------------- the loop


def bowl(x, target=3.0):
    """(x - target)² for "a", and a quarter of it for "b"; the gradient of the sum is added, as autograd does."""

    def objective(batch):
        loss = (x - target).square().sum()
        x.grad = 2.5 * (x - target) + (0 if x.grad is None else x.grad)
        return {"a": loss.item(), "b": 0.25 * loss.item()}

    return objective


def test_the_loop_descends_and_says_what_it_saw():
    x = torch.zeros(1)
    history = adapt(
        torch.optim.SGD([x], lr=0.1),
        bowl(x),
        range(100),
        steps=8,
        record=lambda: {"x": {"first": x.item()}},
        measure=lambda: {"a": 10 * x.item(), "b": 0.0},
        every=3,
    )
    # Every step leaves 3/4 of the distance.
    path = [3 * (1 - 0.75**n) for n in range(9)]
    assert x.item() == pytest.approx(path[8])
    assert history.steps == 8
    assert [history.seen["x"][n]["first"] for n in range(9)] == pytest.approx(path)
    assert [history.seen["loss"][n]["a"] for n in range(8)] == pytest.approx([(3 - p) ** 2 for p in path[:8]])
    assert list(history.seen["accuracy"]) == [0, 3, 6, 8]
    assert history.average("accuracy") == pytest.approx({n: 5 * path[n] for n in (0, 3, 6, 8)})


def test_each_batch_is_used_once_and_no_more_are_asked_for():
    x, used = torch.zeros(1), []

    def objective(batch):
        used.append(batch)
        return bowl(x)(batch)

    batches = iter(range(10))
    assert adapt(torch.optim.SGD([x], lr=0.1), objective, batches, steps=4).steps == 4
    assert used == [0, 1, 2, 3]
    assert next(batches) == 4
    assert adapt(torch.optim.SGD([x], lr=0.1), objective, [5, 6], steps=4).steps == 2, "there were no more batches"


def test_no_steps_only_look():
    x = torch.zeros(1)
    history = adapt(torch.optim.SGD([x], lr=0.1), bowl(x), range(9), steps=0, measure=lambda: {"a": 0.5})
    assert x.item() == 0
    assert history.quantities == ["accuracy"]
    assert history.to_frame()["accuracy", "a"].to_dict() == {0: 0.5}
    assert repr(history) == "History(0 steps; accuracy 0.500 to 0.500)"


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        # Means of three (times three): 12 then 9.4; 10.5 then 9.0; 9.5 then 9.6, so it stops.
        ([5, 4, 3, 3.5, 3, 2.9, 3.1, 3.6, 1, 1, 1, 1], 8),
        ([1, 1, 1, 1, 1, 1, 1, 1], 6),
        ([8, 7, 6, 5, 4, 3, 2, 1], 8),
    ],
)
def test_it_stops_when_the_loss_has_settled(losses, steps):
    x = torch.zeros(1)
    sgd = torch.optim.SGD([x], lr=0.1)
    assert adapt(sgd, lambda loss: {"a": loss}, losses, steps=20, patience=3).steps == steps


def test_the_learning_rate_may_have_a_schedule():
    x = torch.zeros(1)
    sgd = torch.optim.SGD([x], lr=1.0)

    def objective(batch):
        x.grad = torch.ones(1)
        return {"a": 0.0}

    adapt(sgd, objective, range(9), steps=3, schedule=torch.optim.lr_scheduler.ExponentialLR(sgd, 0.5))
    assert x.item() == pytest.approx(-(1 + 0.5 + 0.25))


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_loop_before_it_does_harm(where, bad):
    x = torch.zeros(1)
    good = bowl(x)

    def objective(batch):
        losses = good(batch)
        if batch == 3 and where == "gradient":
            x.grad = x.grad * bad
        return {"a": losses["a"], "b": bad if batch == 3 and where == "loss" else 0.0}

    said = "the gradient is not finite" if where == "gradient" else f"the loss of 'b' is {bad}"
    with pytest.raises(DivergenceError, match=f"after 3 steps {said}") as stopped:
        adapt(torch.optim.SGD([x], lr=0.1), objective, range(9), steps=9, record=lambda: {"x": {"x": x.item()}})
    assert x.item() == pytest.approx(3 * (1 - 0.75**3))
    assert list(stopped.value.history.seen["loss"]) == [0, 1, 2]
    assert stopped.value.history.seen["x"][3]["x"] == x.item()


def test_numbers_of_steps_that_make_no_sense():
    x = torch.zeros(1)
    for options in ({"steps": -1}, {"steps": 1, "every": 0}, {"steps": 1, "patience": 0}):
        with pytest.raises(ValueError, match="steps must not be negative, every and patience at least 1"):
            adapt(torch.optim.SGD([x], lr=0.1), bowl(x), range(9), **options)


def test_a_mask_can_be_adapted_too():
    """One number per weight, by the chain rule from the weights on; against differentiating through everything."""
    tv, net, heads, images = problem()
    sums = {name: (theta0, taus.sum(0)) for name, theta0, taus in tv.layers()}
    logits = {name: torch.zeros_like(theta0, requires_grad=True) for name, (theta0, _) in sums.items()}
    entropies = LossOfWeights(net, heads, tv)

    def merged():
        return {name: theta0 + 0.5 * logits[name].sigmoid() * total for name, (theta0, total) in sums.items()}

    def objective(batch):
        weights = merged()
        losses, gradient = entropies(weights, batch)
        torch.autograd.backward([weights[name] for name in gradient], list(gradient.values()))
        return losses

    parameters = [logits[name] for name, _ in net.named_parameters()]
    statistics = tv.others()
    expected = torch.autograd.grad(uncertainty({**merged(), **statistics}, net, heads, images), parameters)
    objective(images)
    for slopes, p in zip(expected, parameters, strict=True):
        torch.testing.assert_close(p.grad, slopes, rtol=1e-9, atol=1e-12)
    history = adapt(torch.optim.Adam(parameters, lr=0.1), objective, draws(images, 12), steps=20)
    entropy_by_step = list(history.average("loss").values())
    assert entropy_by_step[-1] < 0.8 * entropy_by_step[0]


def test_a_router_can_be_adapted_too():
    """A module that mixes two layers, input by input, trained as it is."""
    torch.manual_seed(0)
    router, first, second = nn.Linear(3, 2), nn.Linear(3, 4), nn.Linear(3, 4)
    adam = torch.optim.Adam(router.parameters(), lr=0.05)

    def objective(batch):
        weights = router(batch["a"])
        loss = entropy(weights[:, :1] * first(batch["a"]) + weights[:, 1:] * second(batch["a"]))
        loss.backward(inputs=list(router.parameters()))
        return {"a": loss.item()}

    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 30)
    history = adapt(adam, objective, draws({"a": torch.randn(20, 3)}, 16), steps=30, schedule=cosine)
    assert history.seen["loss"][29]["a"] < 0.9 * history.seen["loss"][0]["a"]
    assert adam.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------- the history


@pytest.fixture
def history():
    seen = History(steps=4)
    for step in range(4):
        seen.add("loss", step, {"a": 2.0 - step, "b": 1.0})
        seen.add("coefficient", step, {"a": 0.3})
    seen.add("accuracy", 0, {"a": 0.25, "b": 0.75})
    seen.add("accuracy", 4, {"a": 0.5, "b": 1.0})
    return seen


def test_a_history_as_a_table(history):
    frame = history.to_frame()
    assert frame.index.tolist() == [0, 1, 2, 3, 4]
    assert frame.index.name == "step"
    assert frame["loss"].columns.tolist() == ["a", "b", "average"]
    assert frame["loss", "average"].tolist()[:4] == [1.5, 1.0, 0.5, 0.0]
    assert math.isnan(frame["loss", "a"][4])
    assert frame["accuracy"].dropna().to_dict("index") == {
        0: {"a": 0.25, "b": 0.75, "average": 0.5},
        4: {"a": 0.5, "b": 1.0, "average": 0.75},
    }


def test_a_history_as_a_picture(history):
    figure = history.plot()
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss (nats)", "coefficient", "accuracy"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[2].get_lines()}
    assert lines["average"] == [[0, 0.5], [4, 0.75]]
    assert lines["b"] == [[0, 0.75], [4, 1.0]]
    assert figure.axes[0].get_lines()[-1].get_xydata().tolist() == [[0, 1.5], [1, 1.0], [2, 0.5], [3, 0.0]]
    plt.close(figure)


def test_a_history_in_one_line(history):
    assert repr(history) == "History(4 steps; loss 1.500 to 0.000; coefficient 0.300 to 0.300; accuracy 0.500 to 0.750)"
