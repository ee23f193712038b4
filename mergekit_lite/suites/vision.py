"""Vision backbones from timm, and the one place that makes torchvision importable.

timm needs torchvision. On some machines torchvision's compiled part does not fit a CPU-only torch:
``import torchvision`` then fails with ``operator torchvision::nms does not exist``, although nothing
that timm uses here needs that operator. `import_torchvision` declares the missing operators (name and
signature, no implementation) and imports again. Where torchvision is healthy it does nothing. It runs
when this module is imported, so that a suite sent to another process finds its timm model importable.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch
from torch import nn

# The operators whose shape rules torchvision registers while it is imported.
_MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a declaration lives as long as its Library object


def import_torchvision() -> ModuleType:
    """Import torchvision, with its compiled operators declared if they are missing."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as problem:
        if "torchvision::nms" not in str(problem):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # left half imported by the failure
    library = torch.library.Library("torchvision", "DEF")
    for operator in _MISSING_OPERATORS:
        library.define(operator)
    _declared.append(library)
    return importlib.import_module("torchvision")


import_torchvision()


def import_timm() -> ModuleType:
    """Import timm, which needs torchvision."""
    return importlib.import_module("timm")


def build_backbone(name: str, *, stages: int | None = None, pretrained: bool = False) -> nn.Module:
    """A timm model without its classifier: images (N, 3, H, W) to pooled features (N, c).

    Args:
        name: any model name that ``timm.create_model`` knows.
        stages: keep only the stem and this many stages of ``blocks`` (for networks that have such a
            list, like the EfficientNets); by default all.
        pretrained: let timm load its pre-trained weights (this needs a network).

    Returns:
        The model, in inference mode and with channels-last weights, which is faster on a CPU.

    Raises:
        ValueError: `stages` does not fit the network.
    """
    model: nn.Module = import_timm().create_model(name, pretrained=pretrained, num_classes=0)
    if stages is not None:
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.Sequential) or not 0 < stages <= len(blocks):
            raise ValueError(f"'{name}' cannot be cut to {stages} stages.")
        model.blocks = blocks[:stages]
        model.conv_head, model.bn2 = nn.Identity(), nn.Identity()  # they follow the last stage
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def pick_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is CUDA if there is one, else Apple's MPS, else the CPU.

    Raises:
        ValueError: the device asked for is not there.
    """
    if device != "auto":
        chosen = torch.device(device)
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not there.get(chosen.type, True):
            raise ValueError(f"device '{device}' is not available on this machine; use device='cpu' or 'auto'.")
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
