"""A problem small enough for finite differences: two or three experts of a tiny network, in float64."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

import mergekit_lite as mkl

TASKS = ("a", "b", "c")


def tiny_net(seed: int = 0) -> nn.Module:
    """Convolution, normalisation with statistics that differ by seed, and a linear layer: (N, 2, 4, 4) to (N, 5)."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5)).double()
    for vector in (net[1].weight.data, net[1].bias.data, net[1].running_mean):
        vector.copy_(torch.randn(3))
    net[1].running_var.copy_(1 + torch.rand(3))
    return net.eval()


def problem(
    tasks: int = 3, *, statistics: bool = True
) -> tuple[mkl.TaskVectors, nn.Module, dict[str, nn.Module], dict[str, Tensor]]:
    """Task vectors, the network, a head of 3 classes and 12 images per task.

    Without `statistics` all experts have the base's statistics of normalisation.
    """
    names, base = TASKS[:tasks], tiny_net(0).state_dict()
    experts = {name: tiny_net(1 + k).state_dict() for k, name in enumerate(names)}
    if not statistics:
        experts = {task: {n: base[n] if "running" in n else t for n, t in e.items()} for task, e in experts.items()}
    tv = mkl.TaskVectors(base, experts)
    torch.manual_seed(9)
    heads = {name: nn.Linear(5, 3).double() for name in names}
    for head in heads.values():
        head.weight.data.mul_(5)  # so that predictions are neither certain nor undecided
    images = {name: torch.randn(12, 2, 4, 4, dtype=torch.float64) for name in names}
    return tv, tiny_net(0), heads, images


def merged_by_hand(tv: mkl.TaskVectors, coefficients: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """θ0 + Σ λ_k τ_k, one expert after another, from the state dicts themselves; differentiable in the coefficients.

    Statistics of normalisation are the mean of the experts'.
    """
    merged = {}
    for name, theta0 in tv.base.items():
        merged[name] = theta0
        if "running" in name:
            merged[name] = torch.stack([expert[name] for expert in tv._experts]).mean(0)
        elif theta0.is_floating_point():
            for lam, expert in zip(coefficients(name), tv._experts, strict=True):
                merged[name] = merged[name] + lam * (expert[name] - theta0)
    return merged


def uncertainty(
    weights: Mapping[str, Tensor], net: nn.Module, heads: Mapping[str, nn.Module], images: Mapping[str, Tensor]
) -> Tensor:
    """The sum over tasks of the mean entropy, straight from the definition."""
    total = torch.zeros((), dtype=torch.float64)
    for task, x in images.items():
        p = heads[task](functional_call(net, dict(weights), (x,))).softmax(1)
        total = total - (p * p.log()).sum(1).mean()
    return total
