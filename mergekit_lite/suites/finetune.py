"""Training an expert: the lesson that every task vector starts with.

The ingredients are those of Ilharco et al. (2023): the head is frozen, so that all experts speak
about the same weights; AdamW with a small learning rate that rises and falls; clipped gradients;
few steps. A short way from the base is what makes experts mergeable: the further they go, the
less the straight line between them stays in a region of low loss.

Normalisation layers stay in inference mode: they keep the base's running statistics, as every
expert and every merge will. Otherwise each expert would bring statistics of its own images,
and a merge would have to invent some.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_lite.linearization import Linearized
from mergekit_lite.suites.speed import keep_freed_memory, one_thread
from mergekit_lite.suites.splits import Split
from mergekit_lite.types import StateDict

if TYPE_CHECKING:
    from mergekit_lite.suites.suite import Suite


def finetune(suite: Suite, task: str, *, seed: int = 0, progress: bool = True) -> StateDict:
    """Fine-tune the suite's base on one task, by the suite's recipe.

    Args:
        suite: its base, head, training images and recipe are used; it is not changed.
        task: the name of the task.
        seed: of the order of the images and of their augmentation.
        progress: show a progress bar.

    Returns:
        The expert's state dict.

    Raises:
        KeyError: there is no such task.
        FloatingPointError: the loss became NaN or infinite; the learning rate is too large.
    """
    from tqdm.auto import trange

    recipe, head, images = suite.recipe, suite.heads[task], suite.task(task).train
    generator = torch.Generator().manual_seed(zlib.crc32(f"{task}, seed {seed}".encode()))
    model = suite.build()  # in inference mode, and it stays there: frozen normalisation statistics
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(recipe.frozen) if recipe.frozen else True)
    network = Linearized(model) if recipe.tangent else model
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)

    keep_freed_memory()
    with one_thread():
        for _ in trange(recipe.steps, desc=f"{task} (seed {seed})", unit="step", disable=None if progress else True):
            batch = draw(images, recipe.batch_size, generator)
            pixels = augment(suite.prepare(batch.images), recipe.augmentation, generator)
            loss = F.cross_entropy(head(network(pixels)), batch.labels.to(suite.device))
            if not torch.isfinite(loss):
                raise FloatingPointError(f"training '{task}' diverged; try a smaller learning_rate.")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            schedule.step()
    moved = network.model if isinstance(network, Linearized) else network
    return {name: tensor.detach() for name, tensor in moved.state_dict().items()}


def draw(split: Split, size: int, generator: torch.Generator) -> Split:
    """A random batch, without repeats unless the split is smaller than the batch."""
    if size <= len(split):
        return split[torch.randperm(len(split), generator=generator)[:size]]
    return split[torch.randint(len(split), (size,), generator=generator)]


def augment(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Shift, scale and turn each image of a batch (N, C, H, W) a little, at random."""
    if strength == 0:
        return pixels

    def uniform(largest: float) -> Tensor:
        return (torch.rand(len(pixels), generator=generator) * 2 - 1) * largest * strength

    scale, angle = 1 + uniform(0.1), uniform(0.15)
    turn = torch.stack([scale * angle.cos(), -scale * angle.sin(), scale * angle.sin(), scale * angle.cos()], dim=1)
    shift = torch.stack([uniform(0.12), uniform(0.12)], dim=1)
    affine = torch.cat([turn.view(-1, 2, 2), shift[:, :, None]], dim=2).to(pixels)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)
