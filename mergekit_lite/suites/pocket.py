"""The suites that travel with the package: where their files are and how they are read.

::

    pocket8/
        base.safetensors      the pre-trained trunk, the common ancestor
        heads.safetensors     one frozen head per task
        suite.json            recipe, versions, sha256 of every file
        images/<task>.npz     train / validation / test
        seed0/                <task>.safetensors, the experts, and accuracy.json; likewise seed1, seed2
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lite.checkpoints import PathLike, StateDict, load
from mergekit_lite.suites.heads import CosineHead
from mergekit_lite.suites.recipe import Recipe
from mergekit_lite.suites.suite import Suite
from mergekit_lite.suites.tasks import Task, load_npz
from mergekit_lite.suites.vision import build_backbone, pick_device

SUITES = Path(__file__).parent
POCKET8_TASKS = ("mnist", "fashion", "photo_digits", "letters", "scripts", "emoji_category", "icon_family", "textures")
POCKET8_HELD_OUT = ("kana", "optdigits8")
BACKBONE, STAGES = "tf_efficientnet_lite0", 5


def load_suite(name: PathLike = "pocket8", *, seed: int = 0, device: str = "auto") -> Suite:
    """A suite that is shipped with the package, ready to merge: no download, no GPU.

    ``pocket8`` has eight real vision tasks, an ImageNet-pretrained convolutional trunk of 0.7 M
    parameters, a frozen cosine head per task, eight fine-tuned experts, and two more tasks that are
    never merged. The inverted-bottleneck expansions and the other 1x1 convolutions of the trunk are
    the linear layers that methods such as RegMean, LoRA or WEMoE ask for: linear maps over pixels.

    Args:
        name: of the suite, ``"pocket8"``; or the folder of one that you built.
        seed: which fine-tuning of the eight experts; the base and the heads are the same for all.
        device: where models are run: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.

    Raises:
        ValueError: there is no such suite or seed; the message lists those there are.
    """
    folder = Path(name) if (Path(name) / "suite.json").is_file() else SUITES / name
    if not (folder / "suite.json").is_file():
        there = ", ".join(sorted(path.parent.name for path in SUITES.glob("*/suite.json")))
        raise ValueError(f"no suite named '{name}'; there is {there}. Build your own with Suite.from_folders.")
    facts = json.loads((folder / "suite.json").read_text())
    if not (folder / f"seed{seed}").is_dir():
        there = ", ".join(sorted(path.name.removeprefix("seed") for path in folder.glob("seed*")))
        raise ValueError(f"'{name}' has no experts of seed {seed}; there are the seeds {there}.")
    where = pick_device(device)
    model = build_backbone(BACKBONE, stages=STAGES)
    model.load_state_dict(read_float32(folder / "base.safetensors"))
    recipe = Recipe().but(**{k: tuple(v) if isinstance(v, list) else v for k, v in facts["recipe"].items()})
    suite = Suite(
        facts["name"],
        model.to(where),
        {task: _images(folder / "images" / f"{task}.npz") for task in POCKET8_TASKS},
        load_heads(folder / "heads.safetensors", recipe.temperature, where),
        recipe,
        held_out={task: _images(folder / "images" / f"{task}.npz") for task in POCKET8_HELD_OUT},
        seed=seed,
        recorded=json.loads((folder / f"seed{seed}" / "accuracy.json").read_text()),
        device=where,
    )
    for task in suite.tasks:
        expert = read_float32(folder / f"seed{seed}" / f"{task}.safetensors")
        suite.experts[task] = {key: tensor.to(where) for key, tensor in expert.items()}
    return suite


def read_float32(path: PathLike) -> StateDict:
    """A shipped checkpoint, stored in half precision, as float32 (integers as they are)."""
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in load(path).items()}


def half(state: Mapping[str, Tensor]) -> StateDict:
    """A state dict in half precision for shipping; integers as they are."""
    return {key: tensor.cpu().half() if tensor.is_floating_point() else tensor.cpu() for key, tensor in state.items()}


def heads_to_tensors(heads: Mapping[str, CosineHead]) -> StateDict:
    """All heads as one state dict."""
    parts = ("centre", "directions")
    return {f"{task}.{part}": getattr(head, part).cpu() for task, head in heads.items() for part in parts}


def load_heads(path: PathLike, temperature: float, device: torch.device) -> dict[str, CosineHead]:
    """The heads written by `heads_to_tensors`."""
    tensors = load(path)
    tasks = dict.fromkeys(key.rsplit(".", 1)[0] for key in tensors)
    return {t: CosineHead(tensors[f"{t}.centre"], tensors[f"{t}.directions"], temperature).to(device) for t in tasks}


def sha256(path: PathLike) -> str:
    """The checksum of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _images(path: Path) -> Task:
    """Images are decompressed once per process and shared by all suites: nobody changes them."""
    return load_npz(path)
