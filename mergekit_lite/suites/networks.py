"""Looking at a network without changing it: it may be somebody's, and in the middle of its training."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mergekit_lite.types import StateDict

# How many are looking at a network now, and the mode of each of its modules before the first of them came.
_looked_at: WeakKeyDictionary[nn.Module, tuple[int, dict[nn.Module, bool]]] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def in_inference_mode(model: nn.Module) -> Iterator[None]:
    """The network in inference mode for a while; afterwards each of its modules is in the mode it was in.

    Several threads may look at one network at once: the last of them puts it back.
    """
    with _lock:
        count, modes = _looked_at.get(model, (0, {}))
        if count == 0:
            modes = {module: module.training for module in model.modules()}
            model.eval()
        _looked_at[model] = (count + 1, modes)
    try:
        yield
    finally:
        with _lock:
            count, modes = _looked_at.pop(model)
            if count > 1:
                _looked_at[model] = (count - 1, modes)
            else:
                for module, training in modes.items():
                    module.training = training


def sum_of_gradients(model: nn.Module, parts: Iterable[Tensor]) -> StateDict:
    """The gradient of a sum by a network's parameters; gradients that the parameters hold are left alone.

    Args:
        model: its parameters that require a gradient are asked about.
        parts: scalars, one at a time, so that only one graph is kept in memory.

    Returns:
        Gradients by parameter name; without the parameters on which no part depends.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("every parameter of the network is frozen; set requires_grad_(True) on those you ask about.")
    total: StateDict = {}
    with torch.enable_grad():
        for part in parts:
            found = torch.autograd.grad(part, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    total[name] = total[name] + gradient if name in total else gradient
    return total
