"""The suites that travel with the package: where their files are and how they are read.

::

    pocket8/
        base.safetensors      the pre-trained trunk, the common ancestor
        heads.safetensors     one frozen head per task
        suite.json            recipe, tasks, versions, sha256 of every file
        images/<task>.npz     train / validation / test
        seed0/                <task>.safetensors, the experts, and accuracy.json; likewise seed1, seed2
    pocket8-scratch/          only what differs: the rest is read from the "parent" that its suite.json names
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.checkpoints import PathLike, StateDict, load
from mergekit_lite.suites.heads import CosineHead
from mergekit_lite.suites.recipe import Recipe
from mergekit_lite.suites.suite import Suite
from mergekit_lite.suites.tasks import Task, load_npz
from mergekit_lite.suites.variants import add_noise
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

    Its relatives ``pocket8-scratch``, ``pocket8-scratch-other``, ``pocket8-far``, ``pocket8-tangent`` and
    ``pocket8-noisy`` differ in one thing above all (`mergekit_lite.suites.variants`).

    Args:
        name: of the suite, such as ``"pocket8"``; or the folder of one that you built.
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
    model.load_state_dict(read_float32(find(folder, "base.safetensors")))
    recipe = read_recipe(facts["recipe"])

    def images(names: Iterable[str]) -> dict[str, Task]:
        return {task: _images(find(folder, f"images/{task}.npz"), facts.get("noise", 0.0)) for task in names}

    suite = Suite(
        facts["name"],
        model.to(where),
        images(facts["tasks"]),
        load_heads(find(folder, "heads.safetensors"), recipe.temperature, where),
        recipe,
        held_out=images(facts["held_out"]),
        seed=seed,
        recorded=json.loads((folder / f"seed{seed}" / "accuracy.json").read_text()),
        device=where,
    )
    for task in suite.tasks:
        if (path := folder / f"seed{seed}" / f"{task}.safetensors").is_file():
            suite.experts[task] = {key: tensor.to(where) for key, tensor in read_float32(path).items()}
    return suite


def find(folder: Path, name: str) -> Path:
    """The file of a suite, or of the suite that it inherits from.

    Raises:
        FileNotFoundError: neither has it.
    """
    while not (folder / name).is_file():
        facts = json.loads((folder / "suite.json").read_text())
        if "parent" not in facts:
            raise FileNotFoundError(f"the suite '{facts['name']}' has no file '{name}'.")
        folder = SUITES / facts["parent"]
    return folder / name


def read_float32(path: PathLike) -> StateDict:
    """A shipped checkpoint, stored in half precision, as float32 (integers as they are)."""
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in load(path).items()}


def read_recipe(numbers: Mapping[str, Any]) -> Recipe:
    """A recipe that was written as JSON; what it does not mention has its default."""
    return Recipe().but(**{k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()})


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
def _images(path: Path, noise: float) -> Task:
    """Images are decompressed once per process and shared by all suites: nobody changes them."""
    return add_noise(load_npz(path), noise) if noise else load_npz(path)
