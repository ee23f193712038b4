r"""A network made linear in its weights: the first-order Taylor expansion around the base.

.. math::
   f_\text{lin}(x; \theta) = f(x; \theta_0) + J(x)\,(\theta - \theta_0),
   \qquad J(x) = \frac{\partial f(x; \theta)}{\partial \theta}\Big|_{\theta_0}.

Ortiz-Jimenez et al., "Task arithmetic in the tangent space", NeurIPS 2023 (arXiv:2305.12827), equation 5.
The function is linear in the *weights*; in the *images* it is as curved as the network itself. Of the Jacobian,
which would have one column per weight, only the product with one direction is ever needed: a forward-mode
derivative (`torch.func.jvp`) gives it in one pass, at about the price of two forward passes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp


class Linearized(nn.Module):
    """A module that computes the linearisation of `model` around the weights it has now.

    Its parameters are those of a copy of `model`, under the names ``model.*``: training moves the copy away
    from the point of expansion, which stays where it is. The given module is not changed.

    Args:
        model: in inference mode. Its buffers, such as normalisation statistics, stay as they are.
        state: where the linear function is evaluated; at the point of expansion by default.

    Raises:
        RuntimeError: the state dict does not fit the model.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.origin = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.model = copy.deepcopy(model)
        if state is not None:
            self.model.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        """f(x; θ0) + J(x)(θ − θ0)."""
        steps = {name: p - self.origin[name] for name, p in self.model.named_parameters()}
        value, change = self.value_and_change(x, steps)
        return value + change

    def value_and_change(self, x: Tensor, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The network's output f(x; θ0), and J(x) times one direction in weight space.

        Args:
            x: the network's input.
            direction: a tensor per parameter, such as a task vector; what is missing does not move.

        Returns:
            Two tensors of the shape of the network's output.
        """

        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return functional_call(self.model, parameters, (x,))

        tangents = {name: direction.get(name, torch.zeros_like(p)) for name, p in self.origin.items()}
        value, change = jvp(outputs, (self.origin,), (tangents,))  # type: ignore[misc]
        return value, change
