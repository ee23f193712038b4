r"""AdaMerging: let the merge choose its own coefficients, so that its predictions become certain.

Yang et al., "AdaMerging: adaptive model merging for multi-task learning", ICLR 2024 (arXiv:2310.02575). Task arithmetic
has one scale for all task vectors. AdaMerging has one per task, or one per task and tensor :math:`l` of the network,

.. math:: \theta^l = \theta_0^l + \sum_k \lambda_k^l\, \tau_k^l, \qquad 0 \le \lambda_k^l \le 1,

and learns them without labels: by descent, with Adam, on the entropy of the predictions for test inputs, summed over
tasks (`mergekit_lite.adaptive.adaptation`). How a coefficient acts on that sum :math:`L`, the chain rule says:

.. math::
   \frac{\partial L}{\partial \lambda_k^l} = \Big\langle \frac{\partial L}{\partial \theta^l},\; \tau_k^l \Big\rangle .

So a step is a training step of *one* network, whose gradient is then multiplied with the K task vectors, an inner
product each. Running statistics of normalisation have no coefficients: they are the mean of the experts' throughout, as
in every merge. A coefficient of another buffer, of a tensor that the network does not use, or of one that its expert
has not changed stays where it started.

**++**, the paper's second variant, is the same on other task vectors, those of TIES before they are averaged:
``adamerging(trim_and_elect(tv), ...)``. Likewise for any others, such as ``disentangle(tv).task_vectors`` (AWD).

**The bounds.** :math:`\lambda` is kept in [0, 1] by clamping a free number, whose gradient is zero outside. So what has
left the interval never comes back: of the layer-wise coefficients that the authors publish for ViT-B/32, 12 % are 0.
``clamp=False`` is without bounds.

**What the released code does differently.** It sums the losses of two batches of 16 images per task and step. Adam
hardly notices a factor, so this is ``batch=32``. And it adapts on the very test images that it is then scored on: so do
the published numbers. Here `images` are whatever you pass; to know what a merge does on images that it was not adapted
to, score it on others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lite.adaptive.adaptation import Images, LossOfWeights, adapt, draws
from mergekit_lite.adaptive.coefficients import Coefficients, Init, merge_with, starting, weighted_sum
from mergekit_lite.adaptive.history import History
from mergekit_lite.adaptive.losses import Head, Loss, entropy_loss
from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import flag, positive
from mergekit_lite.data_free.ties import election, trim
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors


@method(
    name="AdaMerging",
    paper="Yang et al., AdaMerging: adaptive model merging for multi-task learning, ICLR",
    arxiv="2310.02575",
    year=2024,
    need=Need.TEST_INPUTS,
)
def adamerging(
    tv: TaskVectors,
    model: nn.Module,
    heads: Mapping[str, Head],
    images: Images,
    *,
    granularity: str = "layer",
    init: Init = 0.3,
    clamp: bool = True,
    steps: int = 500,
    batch: int = 16,
    learning_rate: float = 1e-3,
    **options: Any,
) -> StateDict:
    r"""Add the task vectors, each tensor of each with the coefficient that makes predictions most certain.

    Args:
        tv: K task vectors; for "++" ``trim_and_elect(tv)``.
        model: a network that these weights fit; it is not changed.
        heads: by task, from the network's outputs to logits.
        images: by task, inputs without labels: a tensor, or see `learn_coefficients`.
        granularity: ``"layer"`` has a coefficient per task and tensor, ``"task"`` one per task.
        init: where the coefficients start.
        clamp: keep them in [0, 1].
        steps: of Adam.
        batch: images per task and step.
        learning_rate: of Adam, about how far a coefficient moves in a step.
        **options: further arguments of `learn_coefficients`.

    Returns:
        The merged state dict. To see the coefficients as well, call `learn_coefficients`, then `merge_with`.

    Raises:
        KeyError, ValueError, DivergenceError: as for `learn_coefficients`.
    """
    found = learn_coefficients(
        tv,
        model,
        heads,
        images,
        granularity=granularity,
        init=init,
        clamp=clamp,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        **options,
    )
    return merge_with(tv, found)


def learn_coefficients(
    tv: TaskVectors,
    model: nn.Module,
    heads: Mapping[str, Head],
    images: Images,
    *,
    granularity: str = "layer",
    init: Init = 0.3,
    clamp: bool = True,
    loss: Loss = entropy_loss,
    steps: int = 500,
    batch: int = 16,
    learning_rate: float = 1e-3,
    generator: torch.Generator | None = None,
    measure: Callable[[StateDict], Mapping[str, float]] | None = None,
    every: int = 50,
    patience: int | None = None,
    progress: bool = True,
) -> Coefficients:
    r"""Find the coefficients of AdaMerging. The task vectors are held in memory, K times the size of the network.

    Args:
        tv: K task vectors.
        model: a network that these weights fit; it is not changed.
        heads: by task, from the network's outputs to logits; more than are needed may be given.
        images: inputs by task, as `draws` takes them: tensors, lists of batches, or functions. The loss is summed
            over these tasks; an expert whose task is not among them is merged as suits the others.
        granularity: ``"layer"`` has a coefficient per task and tensor, ``"task"`` one per task.
        init: where they start: a number, K numbers, or for layers also (tensors, K) numbers or K by tensor name, such
            as other `Coefficients`, to go on from there.
        clamp: keep the coefficients in [0, 1].
        loss: what to descend on; the paper's is the entropy.
        steps: of Adam.
        batch: images per task and step.
        learning_rate: of Adam, about how far a coefficient moves in a step.
        generator: of the draws of images; by default one with seed 0.
        measure: accuracies by name of a merged state dict, such as ``suite.evaluate``, for the history alone.
        every: how many steps apart they are measured.
        patience: stop as soon as the mean loss of the last so many steps is not below that of as many before.
        progress: show a progress bar.

    Returns:
        The coefficients by tensor name, and their history.

    Raises:
        KeyError: a task has no head, or a tensor is missing in the model or in `init`.
        ValueError: no images, another granularity, or a number that makes no sense.
        DivergenceError: a loss or its gradient is not finite; `reached` has the coefficients so far.
    """
    positive("learning_rate", learning_rate)
    flag("clamp", clamp)
    layers = {name: (theta0, taus) for name, theta0, taus in tv.layers()}
    free = starting(init, list(layers), len(tv), granularity, clamp)
    of_weights = LossOfWeights(model, heads, tv, loss)

    def objective(inputs: Mapping[str, Tensor]) -> Mapping[str, float]:
        losses, free.grad = losses_and_slopes(free, clamp, layers, of_weights, inputs)
        return losses

    def found(history: History | None = None) -> Coefficients:
        rows = bounded(free, clamp).expand(len(layers), len(tv))
        return Coefficients(dict(zip(layers, rows.clone(), strict=True)), tv.names, history or History())

    history = adapt(
        torch.optim.Adam([free], lr=learning_rate),
        objective,
        draws(images, batch, generator),
        steps=steps,
        record=lambda: {"coefficient": found().means()},
        measure=None if measure is None else lambda: measure(merge_with(tv, found())),
        every=every,
        patience=patience,
        progress=progress,
        reached=found,
    )
    return found(history)


def losses_and_slopes(
    free: Tensor,
    clamp: bool,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    of_weights: LossOfWeights,
    inputs: Mapping[str, Tensor],
) -> tuple[Mapping[str, float], Tensor]:
    """The losses at some coefficients, by task, and the slopes of their sum.

    Args:
        free: the coefficients before they are clamped, (K,) or (tensors, K).
        clamp: whether they are; then a slope outside [0, 1] is 0, and at 0 and 1 it is that of the inside.
        layers: θ0 and the task vectors (K, *shape), by tensor name.
        of_weights: the losses as a function of the weights.
        inputs: by task.

    Returns:
        A loss per task; slopes of the shape of `free`.
    """
    lambdas = bounded(free, clamp).expand(len(layers), -1)
    merged = {
        name: theta0 + weighted_sum(row, taus)
        for (name, (theta0, taus)), row in zip(layers.items(), lambdas, strict=True)
    }
    losses, gradient = of_weights(merged, inputs)
    slopes = torch.stack([slope(gradient.get(name), taus) for name, (_, taus) in layers.items()]).to(free)
    slopes = slopes.sum(0) if free.ndim == 1 else slopes
    return losses, torch.where((free < 0) | (free > 1), 0.0, slopes) if clamp else slopes


def bounded(free: Tensor, clamp: bool) -> Tensor:
    """The coefficients as they multiply the task vectors."""
    return free.clamp(0, 1) if clamp else free


def slope(gradient: Tensor | None, taus: Tensor) -> Tensor:
    r""":math:`\langle \partial L / \partial \theta, \tau_k \rangle` for one tensor: (K,); 0 where no gradient comes."""
    if gradient is None:
        return taus.new_zeros(len(taus))
    return taus.reshape(len(taus), gradient.numel()) @ gradient.to(taus).flatten()


def trim_and_elect(tv: TaskVectors, density: float = 0.2, granularity: str = "whole") -> TaskVectors:
    """The first two steps of TIES: keep each task vector's largest entries, then those of the elected sign.

    TIES averages what is left; AdaMerging++ gives it coefficients.

    Args:
        tv: K task vectors.
        density: the share of entries kept before the election, in (0, 1].
        granularity: ``"whole"`` trims each task vector as one, ``"layer"`` each tensor by itself.

    Returns:
        K task vectors; per entry, those that are not zero have one sign.

    Raises:
        ValueError: density outside (0, 1], or another granularity.
    """
    trimmed = trim(tv, density, granularity)
    signs = election(trimmed)
    return trimmed.transform_pieces(lambda place, taus: torch.where(taus * signs(taus) > 0, taus, 0.0))
