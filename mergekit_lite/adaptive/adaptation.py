r"""Adapting a merge to inputs without labels: what AdaMerging, Concrete and WEMoE have in common.

A merge has a few numbers left to choose (coefficients, a mask, a router). It is shown unlabelled inputs of every task,
and the numbers descend on a loss that needs no labels (`mergekit_lite.adaptive.losses`), as a rule the entropy of its
predictions.

- `draws`: an endless row of random batches, one batch of every task at a time.
- `LossOfWeights`: the losses of some weights, and the gradient by the weights.
- `adapt`: the loop. It knows nothing about merging: it is given an optimiser and a function that fills in gradients.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mergekit_lite.adaptive.history import History
from mergekit_lite.adaptive.losses import Head, Loss, entropy_loss, logits_of
from mergekit_lite.checks import count, number
from mergekit_lite.data_free.dare import draw_seed
from mergekit_lite.task_vectors import TaskVectors

T = TypeVar("T")

Batch = Tensor | Sequence[Tensor]  # inputs, or inputs and labels, which are not looked at
Draw = Callable[[int, torch.Generator], Tensor]  # draw(n, generator): n inputs, at random
Images = Mapping[str, Tensor | Sequence[Batch] | Draw]


# ---------------------------------------------------------------- inputs


def draws(images: Images, size: int, generator: torch.Generator | None = None) -> Iterator[dict[str, Tensor]]:
    """Random batches of every task, without end; an input comes at most once per batch.

    Args:
        images: by task, as the network takes them (prepare them once): a tensor of inputs, first axis inputs; or a list
            of batches, each a tensor or a pair of inputs and labels, of which the labels are not looked at. Or, for
            inputs that do not fit in memory, a function ``draw(n, generator)`` that returns n of them.
        size: inputs per task and batch; all, if a task has no more.
        generator: gives the seed; by default one with seed 0. Every task draws by itself, so its draws do not depend on
            what other tasks there are.

    Raises:
        ValueError: a size below 1, no tasks, or a task without inputs.
    """
    if count("batch", size) < 1:
        raise ValueError(f"a batch has at least one image per task; got {size}.")
    if not images:
        raise ValueError("no images: there must be some of at least one task.")
    drawers = {task: _drawer(task, given) for task, given in images.items()}
    seed = draw_seed(generator)
    generators = {task: torch.Generator().manual_seed(zlib.crc32(f"{seed} {task}".encode())) for task in images}

    def endless() -> Iterator[dict[str, Tensor]]:
        while True:
            yield {task: draw(size, generators[task]) for task, draw in drawers.items()}

    return endless()


def _drawer(task: str, given: Tensor | Sequence[Batch] | Draw) -> Draw:
    if callable(given):
        return given
    parts = [given] if isinstance(given, Tensor) else [b if isinstance(b, Tensor) else b[0] for b in given]
    if sum(map(len, parts)) == 0:
        raise ValueError(f"no images of the task '{task}'.")
    inputs = torch.cat(parts) if len(parts) > 1 else parts[0]
    return lambda size, generator: inputs[torch.randperm(len(inputs), generator=generator)[:size].to(inputs.device)]


# ---------------------------------------------------------------- losses as a function of the weights


class LossOfWeights:
    r"""The loss of every task at some weights, and the gradient of their sum by the weights.

    That gradient is all a merge needs. If its weights :math:`\theta` are a function of a few numbers :math:`\lambda`,
    the chain rule does the rest, :math:`\nabla_\lambda = (\partial\theta/\partial\lambda)^\top \nabla_\theta`, and
    nobody differentiates through merge and network at once.

    A copy of the model is used, in inference mode, so that images do not influence each other and statistics of
    normalisation do not move: they are the mean of the experts', as in every merge. Buffers among the weights are taken
    from the weights, too, but have no gradient.

    Attributes:
        trainable: the names of the parameters among the task vectors' tensors: those that are no buffers.

    Args:
        model: a network that the weights fit. Tensors of it that `tv` does not have stay as they are.
        heads: by task, from the network's outputs to logits (images, classes); `torch.nn.Identity()`, if the outputs
            are the logits.
        tv: the task vectors; the names of their tensors are those of the weights.
        loss: ``loss(task, inputs, logits)``; by default the mean entropy.

    Raises:
        KeyError: the network lacks a tensor of the task vectors.
        ValueError: the network has one tensor where the task vectors have two.
        RuntimeError: a tensor has another shape in the network.
    """

    def __init__(self, model: nn.Module, heads: Mapping[str, Head], tv: TaskVectors, loss: Loss = entropy_loss) -> None:
        self.heads, self.loss = heads, loss
        self.network = at_base(model, tv)
        tensors = self.network.state_dict(keep_vars=True)
        self._tensors = {name: tensors[name] for name in tv.tensor_names}
        if len({id(tensor) for tensor in self._tensors.values()}) < len(self._tensors):
            raise ValueError("the model uses one tensor under two names (tied weights), but its task vectors differ.")
        self.trainable = [name for name, tensor in self._tensors.items() if isinstance(tensor, nn.Parameter)]
        self._parameters = [self._tensors[name].requires_grad_() for name in self.trainable]

    def __call__(
        self, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Losses by task, and the gradient by name; there is none for buffers and for what the network does not use.

        Args:
            weights: by name, for all tensors of the task vectors; a merged state dict, for instance.
            batch: inputs by task.

        Raises:
            KeyError: a tensor is missing, or a task has no head.
            ValueError: a head's outputs are no logits.
        """
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(weights[name])
        self.network.zero_grad()
        losses = {}
        for task, inputs in batch.items():
            with torch.enable_grad():
                inputs = inputs.to(self._parameters[0].device)
                loss = self.loss(task, inputs, logits_of(task, inputs, self.network(inputs), self.heads))
                # Gradients of the tasks add up. What one task's pass kept in memory is freed before the next begins.
                loss.backward(inputs=self._parameters)
            losses[task] = loss.item()
        return losses, {name: t.grad for name, t in self._tensors.items() if t.grad is not None}


def at_base(model: nn.Module, tv: TaskVectors) -> nn.Module:
    """A copy of a network with the base's weights, in inference mode, none of which takes gradients.

    What is no weight, such as statistics of normalisation, is as in a merge of these task vectors (`tv.others()`).

    Raises:
        KeyError: the network lacks a tensor of the task vectors.
        RuntimeError: a tensor has another shape in the network.
    """
    network = copy.deepcopy(model).eval().requires_grad_(False)
    lacking = network.load_state_dict({**tv.base, **tv.others()}, strict=False).unexpected_keys
    if lacking:
        raise KeyError(f"the model has no tensor '{lacking[0]}', which the task vectors have.")
    return network


# ---------------------------------------------------------------- the loop


class DivergenceError(FloatingPointError):
    """A loss or its gradient became NaN or infinite. That step was not taken, and nothing before it is lost.

    Attributes:
        history: of the steps before.
        reached: what the method would have returned for the steps before; with it one can go on.
    """

    history: History | None = None
    reached: Any = None


def adapt(
    optimizer: torch.optim.Optimizer,
    objective: Callable[[T], Mapping[str, float]],
    batches: Iterable[T],
    *,
    steps: int,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    record: Callable[[], Mapping[str, Mapping[str, float]]] | None = None,
    measure: Callable[[], Mapping[str, float]] | None = None,
    every: int = 50,
    patience: int | None = None,
    progress: bool = True,
    reached: Callable[[History], Any] = lambda _: None,
) -> History:
    """Descend on the tasks' losses, step by step, until the steps are done or the loss has settled.

    Args:
        optimizer: of the parameters to adapt, such as ``torch.optim.Adam([coefficients])``.
        objective: takes a batch, returns the tasks' losses at the parameters as they are, by task, and adds the
            gradient of their sum to the parameters' ``grad``, which were cleared before.
        batches: a batch per step, such as `draws` makes.
        steps: at most.
        schedule: of the learning rate, moved on after every step.
        record: numbers to keep at every step, by quantity and name.
        measure: accuracies by name, to keep at the start, every few steps and at the end. The descent ignores them.
        every: how many steps apart accuracies are measured.
        patience: stop as soon as the mean loss of the last so many steps is not below that of as many steps before.
            By default all steps are done.
        progress: show a progress bar.
        reached: what the method would return with this history; kept in a `DivergenceError`.

    Returns:
        The losses as ``"loss"``, what `record` returned, and the accuracies as ``"accuracy"``.

    Raises:
        DivergenceError: a loss or a gradient is not finite. The parameters are as the step before left them.
        ValueError: a number of steps that makes no sense.
    """
    from tqdm.auto import tqdm

    numbers = [number("steps", steps), number("every", every), 1 if patience is None else number("patience", patience)]
    if not (numbers[0] >= 0 and numbers[1] >= 1 and numbers[2] >= 1):
        raise ValueError(
            f"steps must not be negative, every and patience at least 1; got {steps}, {every}, {patience}."
        )
    history, means = History(seen={"loss": {}}), list[float]()

    def look(measured: bool) -> None:
        for quantity, values in (record() if record else {}).items():
            history.add(quantity, history.steps, values)
        if measure and measured:
            history.add("accuracy", history.steps, measure())

    with tqdm(total=steps, desc="adapt", unit="step", disable=None if progress else True) as bar:
        for _, batch in zip(range(steps), batches, strict=False):
            look(measured=history.steps % every == 0)
            optimizer.zero_grad()
            losses = objective(batch)
            _check_finite(losses, optimizer, history, reached)
            history.add("loss", history.steps, losses)
            optimizer.step()
            if schedule:
                schedule.step()
            history.steps += 1
            means.append(sum(losses.values()) / len(losses))
            bar.set_postfix(loss=f"{means[-1]:.3f}", refresh=False)
            bar.update()
            if patience and _settled(means, patience):
                break
    look(measured=True)
    return history


def _settled(losses: Sequence[float], patience: int) -> bool:
    return len(losses) >= 2 * patience and sum(losses[-patience:]) >= sum(losses[-2 * patience : -patience])


def _check_finite(
    losses: Mapping[str, float],
    optimizer: torch.optim.Optimizer,
    history: History,
    reached: Callable[[History], Any],
) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    bad = [f"the loss of '{task}' is {loss}" for task, loss in losses.items() if not math.isfinite(loss)]
    if not bad and not all(torch.isfinite(p.grad).all() for p in parameters):
        bad = ["the gradient is not finite"]
    if bad:
        problem = DivergenceError(
            f"after {history.steps} steps {bad[0]}, so no further step was taken. Are the inputs finite? If so, try a "
            "smaller learning_rate. What was reached so far is kept in this exception: its `reached` and `history`."
        )
        problem.history, problem.reached = history, reached(history)
        raise problem
