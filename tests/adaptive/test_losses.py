"""The three losses without labels, against numbers computed by hand and finite differences."""

import math

import pytest
import torch
from torch import nn

import mergekit_lite as mkl
from mergekit_lite.adaptive import entropy, entropy_loss, imitation_loss, information_loss
from tests.adaptive.examples import problem, tiny_net
from tests.data_free.test_tsv import random

LOG2, LOG3 = math.log(2), math.log(3)
QUARTER = 2 * LOG2 - 0.75 * LOG3  # the entropy of (3/4, 1/4): log 4 - (3/4) log 3
SURE, UNDECIDED = [1e3, 0.0], [5.0, 5.0]
CERTAIN, OPPOSITE = [LOG3, 0.0], [0.0, LOG3]  # (3/4, 1/4) and (1/4, 3/4)


def information(*rows):
    return information_loss("a", torch.zeros(len(rows)), torch.tensor(rows, dtype=torch.float64)).item()


@pytest.fixture
def setting():
    """Three experts of a network with statistics of normalisation, heads, images, and the experts by task."""
    tv, net, heads, images = problem()
    return net, dict(zip(tv.names, tv._experts, strict=True)), heads, images


# ---------------------------------------------------------------- entropy and information


def test_the_entropy_loss_is_the_mean_entropy_and_knows_no_tasks():
    logits = torch.tensor([CERTAIN, UNDECIDED], dtype=torch.float64)
    assert entropy_loss("a", torch.zeros(2), logits).item() == pytest.approx((QUARTER + LOG2) / 2, rel=1e-12)
    assert torch.equal(entropy_loss("a", torch.zeros(2), logits), entropy_loss("b", torch.ones(9), logits))
    assert torch.equal(entropy(logits), entropy_loss("a", logits, logits))


def test_information_by_hand():
    # Both entropies are H(3/4); the mean prediction is (1/2, 1/2).
    assert information(CERTAIN, OPPOSITE) == pytest.approx(QUARTER - LOG2, rel=1e-12)
    # H(3/4), H(3/4) and log 2; the mean is (2/3, 1/3), of entropy log 3 - (2/3) log 2.
    expected = (2 * QUARTER + LOG2) / 3 - (LOG3 - 2 / 3 * LOG2)
    assert information(CERTAIN, CERTAIN, UNDECIDED) == pytest.approx(expected, rel=1e-12)


def test_one_answer_to_everything_is_worth_nothing_and_one_answer_each_is_worth_most():
    assert information(SURE, SURE) == pytest.approx(0)
    assert information(UNDECIDED, UNDECIDED) == pytest.approx(0), "to know nothing is worth as little"
    assert information(SURE, SURE[::-1]) == pytest.approx(-LOG2)
    assert information(CERTAIN) == pytest.approx(0), "one image cannot differ from itself"
    for seed in range(5):
        logits = 3 * random(20, 6, seed=seed)
        value = information_loss("a", logits, logits).item()
        assert -math.log(6) < value < 0
        assert value == pytest.approx(information_loss("a", logits, logits[torch.randperm(20)]).item(), rel=1e-12)
        assert value == pytest.approx(information_loss("a", logits, logits + random(20, 1)).item(), rel=1e-12)
    few = 100 * random(3, 50)
    assert information_loss("a", few, few) >= -LOG3 - 1e-9, "three images cannot show more than three classes"


def test_classes_that_cannot_be_do_no_harm():
    logits = torch.tensor([[0.0, -math.inf, LOG3], [LOG3, -math.inf, 0.0]], requires_grad=True)
    value = information_loss("a", logits, logits)
    value.backward()
    assert value.item() == pytest.approx(QUARTER - LOG2, rel=1e-5)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, setting):
    logits = random(50, 300).to(dtype)
    net, experts, _, images = setting
    imitation = imitation_loss(net, experts, {"a": lambda outputs: logits[:12, :3]})
    for loss, x, given in ((information_loss, logits, logits), (imitation, images["a"], logits[12:24, :3])):
        value, exact = loss("a", x, given), loss("a", x, given.double()).double()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)


def test_gradients_of_the_losses(setting):
    net, experts, heads, images = setting
    imitation = imitation_loss(net, experts, heads)
    for loss, logits in ((information_loss, random(6, 4)), (entropy_loss, random(6, 4)), (imitation, random(12, 3))):
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss("a", images["a"], z), (logits.requires_grad_(),))


# ---------------------------------------------------------------- imitation


def test_imitation_by_hand():
    experts = {"a": {"weight": torch.tensor([[1.0], [0.0]])}, "b": {"weight": torch.tensor([[0.0], [1.0]])}}
    x = torch.tensor([[LOG3], [0.0]])  # a's expert answers (3/4, 1/4), then (1/2, 1/2); b's (1/4, 3/4)
    loss = imitation_loss(nn.Linear(1, 2, bias=False), experts, {"a": nn.Identity(), "b": nn.Identity()})
    alike = torch.zeros(2, 2)
    assert loss("a", x, alike).item() == pytest.approx(LOG2)
    # The merge answers (1/4, 3/4) both times: -(3/4 log 1/4 + 1/4 log 3/4), then -(log 1/4 + log 3/4) / 2.
    merged = torch.tensor([OPPOSITE, OPPOSITE])
    first, second = 2 * LOG2 - LOG3 / 4, 2 * LOG2 - LOG3 / 2
    assert loss("a", x, merged).item() == pytest.approx((first + second) / 2)
    assert loss("b", x[:1], merged[:1]).item() == pytest.approx(QUARTER), "b's expert agrees: its entropy is left"


def test_imitation_is_the_mean_cross_entropy_to_the_experts_answers(setting):
    net, experts, heads, images = setting
    loss = imitation_loss(net, experts, heads)
    for seed, task in enumerate(experts):
        logits, expert = random(12, 3, seed=seed), tiny_net(1 + seed)
        q = heads[task](expert(images[task])).softmax(1)
        expected = -(q * logits.softmax(1).log()).sum(1).mean()
        torch.testing.assert_close(loss(task, images[task], logits), expected, rtol=1e-12, atol=0)


def test_imitation_is_least_at_the_experts_answers_where_its_gradient_vanishes(setting):
    net, experts, heads, images = setting
    loss = imitation_loss(net, experts, heads)
    answers = heads["b"](tiny_net(2)(images["b"])).detach().requires_grad_()
    least = loss("b", images["b"], answers)
    least.backward()
    assert answers.grad.abs().max() < 1e-12
    assert least.item() == pytest.approx(entropy(answers).item(), rel=1e-12), "what is left is the expert's doubt"
    for seed in range(5):
        assert loss("b", images["b"], answers + 0.1 * random(12, 3, seed=seed)) > least


def test_an_expert_is_used_in_inference_mode_and_nothing_is_changed(setting):
    net, experts, heads, images = setting
    net.train()
    states = [net.state_dict(), *experts.values(), images, heads["a"].state_dict()]
    before = [{name: t.clone() for name, t in state.items()} for state in states]
    loss = imitation_loss(net, experts, heads)
    logits = random(12, 3).requires_grad_()
    value = loss("a", images["a"], logits)
    value.backward()
    first = loss("a", images["a"][:1], logits[:1])
    assert first.item() == pytest.approx(loss("a", images["a"][[0, 0]], logits[[0, 0]]).item(), rel=1e-12)
    assert net.training
    assert all(p.grad is None for module in (net, *heads.values()) for p in module.parameters())
    for state, old in zip(states, before, strict=True):
        assert all(torch.equal(state[name], old[name]) for name in old)
    with torch.no_grad():
        net[4].weight.zero_()
    assert torch.equal(loss("a", images["a"], logits), value), "the network is a copy"


def test_a_class_that_the_head_rules_out_costs_nothing():
    mask = torch.tensor([0.0, -math.inf, 0.0])
    loss = imitation_loss(nn.Linear(1, 3), {"a": nn.Linear(1, 3).state_dict()}, {"a": lambda outputs: outputs + mask})
    logits = torch.zeros(2, 3, requires_grad=True)
    value = loss("a", torch.zeros(2, 1), logits + mask)
    value.backward()
    assert value.item() == pytest.approx(LOG2)
    assert torch.isfinite(logits.grad).all()


def test_more_axes_than_two():
    experts = {"a": {"weight": torch.tensor([[1.0], [0.0]])}}
    loss = imitation_loss(nn.Linear(1, 2, bias=False), experts, {"a": nn.Identity()})
    x = torch.full((4, 3, 1), LOG3)  # three positions, each of which is classified
    assert loss("a", x, torch.tensor(CERTAIN).expand(4, 3, 2)).item() == pytest.approx(QUARTER)
    assert information_loss("a", x, torch.tensor(CERTAIN).expand(4, 3, 2)).item() == pytest.approx(0, abs=1e-6)


def test_what_imitation_lacks_is_said(setting):
    net, experts, heads, images = setting
    loss = imitation_loss(net, {"a": experts["a"]}, {"b": heads["b"]})
    with pytest.raises(KeyError, match="no expert for the task 'b'; there are a"):
        loss("b", images["b"], random(12, 3))
    with pytest.raises(KeyError, match="no head for the task 'a'; there are heads for b"):
        loss("a", images["a"], random(12, 3))


def test_the_losses_are_exported():
    for function in (entropy, entropy_loss, imitation_loss, information_loss):
        assert getattr(mkl, function.__name__) is function
