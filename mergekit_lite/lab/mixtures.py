"""What a mixture of task vectors does for single images, and simpler ways to send an image to an expert."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mergekit_lite.adaptive.wemoe import Mixture, WEMoE, entering
from mergekit_lite.suites.speed import keep_freed_memory
from mergekit_lite.suites.suite import EVALUATION_BATCH, Evaluation, Suite

# ---------------------------------------------------------------- images of all tasks in one row


def images_of(suite: Suite) -> tuple[Tensor, Tensor]:
    """All test images, task after task, as the network takes them, and each one's task as its position."""
    keep_freed_memory()
    return torch.cat(list(suite.inputs().values())), tasks_of(suite)


def tasks_of(suite: Suite) -> Tensor:
    """The position of its task for every test image, task after task."""
    return torch.cat([torch.full((len(task.test),), i) for i, task in enumerate(suite.tasks.values())])


@torch.no_grad()
def features_of(network: nn.Module, images: Tensor) -> Tensor:
    """What a network makes of images: (N, c)."""
    return torch.cat([network(part) for part in images.split(EVALUATION_BATCH)])


def hits(suite: Suite, features: Tensor, heads: Tensor | None = None) -> Tensor:
    """Which test images are classified correctly from their features: truth values in the order of `images_of`.

    Args:
        suite: whose heads read the features.
        features: (N, c), of all images in this order.
        heads: the position of the task whose head reads each image; by default the right one. Under another task's
            head an image cannot be right.
    """
    parts = features.split([len(task.test) for task in suite.tasks.values()])
    right = torch.cat(
        [
            suite.heads[name](part).argmax(1) == task.test.labels
            for part, (name, task) in zip(parts, suite.tasks.items(), strict=True)
        ]
    )
    return right if heads is None else right & (heads == tasks_of(suite))


def score(suite: Suite, features: Tensor, heads: Tensor | None = None) -> Evaluation:
    """Accuracy by task; arguments as for `hits`."""
    right = hits(suite, features, heads).float()
    parts = right.split([len(task.test) for task in suite.tasks.values()])
    return Evaluation({name: part.mean().item() for name, part in zip(suite.tasks, parts, strict=True)})


# ---------------------------------------------------------------- looking into a mixture


def look(network: WEMoE, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Features (N, c) of images, and by module what its router answered on the way, (N, K)."""
    features: list[Tensor] = []
    handle = network.network.register_forward_hook(lambda module, arguments, output: features.append(output))
    try:
        answers = [network.routing(part) for part in images.split(EVALUATION_BATCH)]
    finally:
        handle.remove()
    return torch.cat(features), {name: torch.cat([answer[name] for answer in answers]) for name in network.mixtures}


@torch.no_grad()
def in_batches(network: WEMoE, images: Tensor, size: int, order: Tensor | None = None) -> Tensor:
    """Features of images that come in batches, the images of a batch sharing one merge.

    Args:
        network: a mixture; its route is as before afterwards.
        images: (N, 3, H, W).
        size: of the batches.
        order: in which the images come, their N positions; by default as they are.
    """
    route, network.route = network.route, "batch"
    try:
        parts = (torch.arange(len(images)) if order is None else order).split(size)
        features = torch.cat([network(images[part]) for part in parts])
    finally:
        network.route = route
    return features[torch.cat(parts).argsort()]


def recovered(seen: Tensor, seen_tasks: Tensor, points: Tensor) -> Tensor:
    """The task whose mean over seen points lies nearest: positions, (N,)."""
    centres = torch.stack([seen[seen_tasks == k].mean(0) for k in range(int(seen_tasks.max()) + 1)])
    return torch.cdist(points, centres).argmin(1)


def inputs_at(network: WEMoE, images: Tensor) -> dict[str, Tensor]:
    """What enters each mixture, by the module's name."""
    return entering(network.network, list(network.mixtures), images[:EVALUATION_BATCH])


@torch.no_grad()
def outputs_mixed(mixture: Mixture, h: Tensor) -> tuple[Tensor, Tensor]:
    """The base's outputs for a mixture's inputs; and with the experts' changes of *outputs* added, by the same w."""
    tensors = mixture.module.state_dict()
    taus = {name: getattr(mixture, buffer) for name, buffer in mixture._names.items()}
    w = mixture.coefficients(h)
    base = functional_call(mixture.module, {name: tensors[name] for name in taus}, (h,))
    mixed = base.clone()
    for k in range(w.shape[1]):
        expert = functional_call(mixture.module, {name: tensors[name] + tau[k] for name, tau in taus.items()}, (h,))
        mixed += w[:, k].view(-1, *[1] * (h.ndim - 1)) * (expert - base)
    return base, mixed


class OutputMixture(nn.Module):
    """A module whose outputs are mixed where a `Mixture` mixes weights."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, h: Tensor) -> Tensor:
        """As the mixture's."""
        return outputs_mixed(self.mixture, h)[1]


# ---------------------------------------------------------------- what it costs


def weights_of(network: WEMoE) -> dict[str, int]:
    """How many numbers one task vector has in each mixture, by the module's name."""
    return {
        name: sum(getattr(mixture, buffer)[0].numel() for buffer in mixture._names.values())
        for name, mixture in network.mixtures.items()
    }


@torch.no_grad()
def multiply_adds(model: nn.Module, image: Tensor, names: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Multiply-adds of convolutions and linear layers for one image, and how many tokens enter, by module.

    Args:
        model: a network.
        image: (1, 3, H, W).
        names: of modules; what belongs to none of them is counted under ``""``.
    """
    counts: dict[str, int] = dict.fromkeys(["", *names], 0)
    tokens: dict[str, int] = {}

    def count(owner: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            counts[owner] += output.numel() * weight[0].numel()

        return hook

    def see(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: tokens.__setitem__(name, arguments[0][0, 0].numel())

    handles = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in names]
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            owner = next((n for n in names if name.startswith(n + ".")), "")
            handles.append(module.register_forward_hook(count(owner)))
    model(image)
    for handle in handles:
        handle.remove()
    return counts, tokens


# ---------------------------------------------------------------- simpler: whole experts


def task_classifier(features: Tensor, tasks: Tensor, steps: int = 200) -> nn.Module:
    """A linear classifier of tasks, by softmax regression on standardised features: from (N, c) to logits (N, K)."""
    centre, size = features.mean(0), features.std(0).clamp(min=1e-6)
    linear = nn.Linear(features.shape[1], int(tasks.max()) + 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(linear((features - centre) / size), tasks).backward()
        optimizer.step()
    with torch.no_grad():  # read the features as they are
        linear.weight.div_(size)
        linear.bias.sub_(linear.weight @ centre)
    return linear.requires_grad_(False)


def by_experts(suite: Suite, chosen: Tensor, images: Tensor) -> Tensor:
    """Features (N, c) of images, each made by one whole expert, whose position is chosen for it."""
    features = torch.empty(
        len(images), suite.features(suite.build(), next(iter(suite.tasks.values())).test[:1]).shape[1]
    )
    for k, expert in enumerate(suite.experts.values()):
        mine = (chosen == k).nonzero()[:, 0]
        if len(mine):
            features[mine] = features_of(suite.build(expert), images[mine])
    return features


@torch.no_grad()
def by_mixed_experts(suite: Suite, w: Tensor, images: Tensor, chunk: int = 25) -> Tensor:
    r"""Features (N, c) of images, each made by a network of its own, :math:`\theta_0 + \sum_k w_k \tau_k`.

    Args:
        suite: with experts.
        w: (N, K).
        images: (N, 3, H, W).
        chunk: how many networks are formed at a time.
    """
    model = suite.build()
    changed = {name: (theta0, taus) for name, theta0, taus in suite.task_vectors.layers() if taus.any()}

    def one(weights: Mapping[str, Tensor], image: Tensor) -> Tensor:
        features: Tensor = functional_call(model, dict(weights), (image[None],))[0]
        return features

    features = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the last pooling is not vectorised
        for wi, xi in zip(w.split(chunk), images.split(chunk), strict=True):
            merged = {name: theta0 + torch.tensordot(wi, taus, dims=1) for name, (theta0, taus) in changed.items()}
            features.append(vmap(one)(merged, xi))
    return torch.cat(features)
