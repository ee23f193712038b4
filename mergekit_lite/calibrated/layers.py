r"""What a layer reads: the numbers that its weight is multiplied with, and whether it is a layer that does that.

A linear layer multiplies its weight with its inputs, place by place (a pixel, a token). A convolution is a linear layer
over pixels: what it reads is the patch that the kernel sees. A depthwise one is as many layers side by side as it has
channels. Patches come from the layer itself, with unit vectors for kernels, so padding and stride are always the
layer's own.

Layers are watched by hooks: the model is run as it is, and is not changed. Two kinds of weights cannot be watched so:

- **A layer that is more than its weight.** Weight standardisation, spectral and weight normalisation change the weight
  before it is used, so the layer is not linear in it. At its first call each layer must answer with its weight times
  what it read, plus its bias; one that does not is an error with the layer's name.
- **A weight that is used without its layer being called**, as within `torch.nn.MultiheadAttention`, or where query, key
  and value share one layer and have biases of their own. Nobody sees what it reads: `unseen` names it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lite.matrices import is_matrix
from mergekit_lite.task_vectors import float64
from mergekit_lite.types import say

Layer = nn.Linear | nn.Conv2d
Watch = Callable[[str, Layer, Tensor, Tensor], Tensor]

WIDEST = 1 << 14  # inputs, or outputs, of a layer: their Gram matrix takes 2 GB in float64
PROBES = 16  # places at which a layer's answer is compared with that of its weight
_said: set[str] = set()  # what has been said once is not said again


def by_place(layer: Layer, outputs: Tensor) -> Tensor:
    """A layer's outputs, or gradients by them, as (places, groups, outputs of a group), images one after another."""
    if isinstance(layer, nn.Linear):
        return outputs.reshape(-1, 1, outputs.shape[-1])
    if outputs.ndim == 3:  # a single image without an axis of images
        outputs = outputs.unsqueeze(0)
    return outputs.flatten(2).transpose(1, 2).reshape(-1, layer.groups, outputs.shape[1] // layer.groups)


def reader(layer: Layer) -> Callable[[Tensor], Tensor]:
    """A function from a layer's inputs to what its weight is multiplied with: (places, groups, inputs of a group)."""
    if isinstance(layer, nn.Linear):
        return lambda x: x.reshape(-1, 1, x.shape[-1])
    # The same convolution with a unit vector for every kernel: its outputs are the entries of the patches.
    probe, size = copy.deepcopy(layer), layer.weight[0].numel()
    kernels = torch.eye(size).view(size, *layer.weight.shape[1:]).repeat(layer.groups, 1, 1, 1)
    probe.weight, probe.bias = nn.Parameter(kernels.to(layer.weight), requires_grad=False), None
    return lambda x: by_place(layer, probe.forward(x))  # without the hooks that the copy has, too


def width(layer: Layer) -> int:
    """How many numbers an output reads: the size of the layer's Gram matrix of inputs."""
    return layer.weight[0].numel()


# ---------------------------------------------------------------- watching


@contextmanager
def watched(
    model: nn.Module,
    watch: Watch,
    weights: Collection[str] | None = None,
    size: Callable[[Layer], int] = width,
) -> Iterator[None]:
    """Within the block, ``watch(name, layer, a, output)`` sees every call of a layer and returns the output to go on.

    Args:
        model: is run within the block.
        watch: takes the layer's name, the layer, what it read (places, groups, inputs of a group) and its output.
        weights: names of the weights whose layers are watched; by default of all linear and convolutional layers.
        size: of a layer's largest matrix. Layers where it is above `WIDEST` are not watched.

    Raises:
        ValueError: when a layer is called whose output is not its weight times what it read, plus its bias.
    """

    def hook(name: str, layer: Layer) -> Callable[..., Tensor]:
        read: Callable[[Tensor], Tensor] | None = None

        def see(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            nonlocal read
            x = args[0] if args else kwargs["input"]
            if read is None:
                read = checked_reader(name, layer, x, output)
            return watch(name, layer, read(x), output)

        return see

    handles = [
        layer.register_forward_hook(hook(name, layer), with_kwargs=True)
        for name, layer in model.named_modules()
        if isinstance(layer, Layer) and (weights is None or of(name, "weight") in weights) and size(layer) <= WIDEST
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def checked_reader(name: str, layer: Layer, x: Tensor, output: Tensor) -> Callable[[Tensor], Tensor]:
    """A layer's `reader`, if the layer's answer is that of its weight and bias.

    Raises:
        ValueError: it is not; with the layer's name and class.
    """
    # A weight that is computed from others (weight normalisation, pruning) is no parameter of the layer.
    if {"weight", "bias"} <= layer._parameters.keys():
        try:
            read = reader(layer)
            if _answers_by_weight(layer, read(x.detach()), output.detach()):
                return read
        except RuntimeError:  # a layer that changes its weight may not know what to do with others
            pass
    raise ValueError(
        f"the layer '{name}' ({type(layer).__name__}) does not answer with its weight times its inputs: the weight is "
        "standardised, normalised or otherwise changed before it is used. What is known about linear layers does not "
        "hold for it; leave it out with `names`."
    )


def _answers_by_weight(layer: Layer, a: Tensor, output: Tensor) -> bool:
    """Whether W a + b is the output, at some places; up to rounding."""
    found, every = by_place(layer, output), max(1, len(a) // PROBES)
    if len(found) != len(a):
        return False
    few, found = float64(a[::every]), float64(found[::every])
    weight = float64(layer.weight.detach()).reshape(few.shape[1], -1, few.shape[2])
    bias = weight.new_zeros(weight.shape[:2]) if layer.bias is None else float64(layer.bias.detach())
    bias = bias.reshape(weight.shape[:2])
    expected = torch.einsum("pgi,goi->pgo", few, weight) + bias
    if expected.shape != found.shape:
        return False
    size = torch.einsum("pgi,goi->pgo", few.abs(), weight.abs()) + bias.abs()
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in (a, output, layer.weight))
    return not ((found - expected).abs() > max(1e-3, 8 * coarsest) * size).any()


# ---------------------------------------------------------------- what was not seen


def unseen(model: nn.Module, seen: Collection[str]) -> list[str]:
    """The model's linear maps that are not among the weights `seen`, by the names of their parameters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = {id(parameters[name]) for name in seen if name in parameters}  # a tied weight is seen under either name
    kinds = dict(model.named_modules())
    found = []
    for name, parameter in model.named_parameters():
        module, _, last = name.rpartition(".")
        owner = kinds.get(module)
        layer = isinstance(owner, Layer) and last == "weight"
        table = isinstance(owner, nn.Embedding | nn.EmbeddingBag)
        if id(parameter) not in known and not table and (layer or is_matrix(parameter, name)):
            found.append(name)
    return found


def say_unseen(model: nn.Module, seen: Collection[str], consequence: str) -> None:
    """Name the linear maps that were not seen, once."""
    names = unseen(model, seen)
    if names:
        shown = ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        message = (
            f"nothing is known about the inputs of {shown}: their layers were not called (the weight is used by a "
            f"module that is neither nn.Linear nor nn.Conv2d, or not at all), or are wider than {WIDEST:,}. "
            f"{consequence}"
        )
        if message not in _said:
            _said.add(message)
            say(message)


def of(layer: str, parameter: str) -> str:
    """The full name of a layer's parameter; a model that is a single layer has no name before it."""
    return f"{layer}.{parameter}" if layer else parameter
