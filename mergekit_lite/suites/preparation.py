"""From 8-bit images to a backbone's input: every backbone wants them as it saw them in its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergekit_lite.suites.images import INTERPOLATIONS
from mergekit_lite.suites.recipe import Recipe

# How pocket8's backbone sees images: from -1 to 1.
MEAN = STD = (0.5, 0.5, 0.5)
INTERPOLATION = "bilinear"


def as_inputs(images: Tensor, recipe: Recipe) -> Tensor:
    """Images resized, and with the recipe's mean and standard deviation made 0 and 1.

    Args:
        images: uint8, shape (N, 1 or 3, H, W), on the device of the backbone.
        recipe: its resolution, mean, std and interpolation are used.

    Returns:
        Float inputs, shape (N, 3, resolution, resolution), channels last in memory.
    """
    size = (recipe.resolution, recipe.resolution)
    inputs = _normalised(images.float(), recipe)
    if inputs.shape[-2:] != size:
        mode = recipe.interpolation or INTERPOLATION
        smooth = mode != "nearest"
        shrinks = inputs.shape[-2] > size[0] or inputs.shape[-1] > size[1]
        inputs = F.interpolate(
            inputs, size, mode=mode, align_corners=False if smooth else None, antialias=smooth and shrinks
        )
        if mode == "bicubic":  # it overshoots at sharp edges: nothing is blacker than black or whiter than white
            black, white = (_normalised(inputs.new_full((1, 1, 1, 1), value), recipe) for value in (0.0, 255.0))
            inputs = inputs.clamp(black, white)
    return inputs.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def _normalised(pixels: Tensor, recipe: Recipe) -> Tensor:
    """(pixels / 255 - mean) / std. Where all channels are treated alike, grey images keep their one channel."""
    mean, std = recipe.mean or MEAN, recipe.std or STD
    if len({*mean}) == len({*std}) == 1:
        return pixels / (255 * std[0]) - mean[0] / std[0]
    by_channel = torch.tensor([mean, std], dtype=pixels.dtype, device=pixels.device).view(2, 3, 1, 1)
    return pixels / (255 * by_channel[1]) - by_channel[0] / by_channel[1]


def recipe_for(backbone: nn.Module, recipe: Recipe | None, changes: Mapping[str, Any]) -> Recipe:
    """A recipe in which images are prepared as the backbone saw them in its training, where nothing else is said.

    Args:
        backbone: a network, one of timm's or any other.
        recipe: what is said, but for a `mean`, `std` or `interpolation` of None; None leaves the resolution open, too.
        changes: to the recipe; they count as said.

    Returns:
        A recipe with a mean, a standard deviation and an interpolation: pocket8's, where the backbone states none.

    Raises:
        TypeError, ValueError: there is no such number in a recipe, or it cannot be that.
    """
    said = (recipe or Recipe()).but(**changes)
    usual = {"mean": MEAN, "std": STD, "interpolation": INTERPOLATION} | _stated(backbone)
    if recipe is not None or "resolution" in changes:
        usual["resolution"] = said.resolution
    return said.but(**{k: v for k, v in usual.items() if k == "resolution" or getattr(said, k) is None})


def _stated(backbone: nn.Module) -> dict[str, Any]:
    """What a backbone's timm configuration says: fields of a `Recipe`, those that are known."""
    stated = getattr(backbone, "pretrained_cfg", None) or getattr(backbone, "default_cfg", None) or {}
    if not isinstance(stated, dict):
        stated = vars(stated)  # older models keep an object
    known: dict[str, Any] = {}
    for name in ("mean", "std"):
        if numbers := stated.get(name):
            known[name] = tuple(float(n) for n in (numbers if len(numbers) == 3 else numbers[:1] * 3))
    if size := stated.get("input_size"):
        known["resolution"] = int(size[-1])
    if mode := stated.get("interpolation"):
        known["interpolation"] = mode if mode in INTERPOLATIONS else "bicubic"  # the nearest to Lanczos' and others
    return known
