"""The linearised network: its value, its slope, that it is linear, and that it can be trained."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from mergekit_lite.linearization import Linearized


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


@pytest.fixture
def moved(net):
    generator = torch.Generator().manual_seed(1)
    return {n: p.detach() + torch.randn(p.shape, generator=generator).double() for n, p in net.named_parameters()}


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)).double()


def jacobian_product(net, direction):
    """J(x) times a direction, with the whole Jacobian written down."""
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: functional_call(net, p, (X,)))(parameters)
    return sum(torch.tensordot(jacobian[n], direction[n], direction[n].ndim) for n in parameters)


def test_it_is_the_first_order_expansion(net, moved):
    step = {n: moved[n] - p.detach() for n, p in net.named_parameters()}
    expected = net(X) + jacobian_product(net, step)
    assert torch.allclose(Linearized(net, moved)(X), expected, atol=1e-12)


def test_at_the_base_it_is_the_network(net):
    assert torch.equal(Linearized(net)(X), net(X))


def test_it_is_linear_in_the_weights(net, moved):
    base = dict(net.named_parameters())
    half = {n: (base[n].detach() + moved[n]) / 2 for n in moved}
    middle = (net(X) + Linearized(net, moved)(X)) / 2
    assert torch.allclose(Linearized(net, half)(X), middle, atol=1e-12)
    assert not torch.allclose(functional_call(net, half, (X,)), middle, atol=1e-3), "the network is not"


def test_a_direction_may_leave_parameters_out(net, moved):
    step = {"2.bias": torch.ones(2).double()}
    value, change = Linearized(net).value_and_change(X, step)
    assert torch.equal(value, net(X))
    assert torch.allclose(change, torch.ones(5, 2).double())


def test_training_moves_the_copy_and_nothing_else(net):
    before = [p.clone() for p in net.parameters()]
    linear = Linearized(net)
    target = torch.randn(5, 2, generator=torch.Generator().manual_seed(3)).double()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = ((linear(X) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, linear.origin.values(), strict=True))
    again = Linearized(net, linear.model.state_dict())
    assert torch.allclose(again(X), linear(X))


def test_weights_of_another_network_are_refused(net):
    with pytest.raises(RuntimeError, match="Missing key"):
        Linearized(net, {"w": torch.zeros(1)})
