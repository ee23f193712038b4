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

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from mergekit_lite.checkpoints import load
from mergekit_lite.suites.heads import CosineHead
from mergekit_lite.suites.npz import load_npz
from mergekit_lite.suites.records import (
    Stamp,
    check_listed,
    damaged,
    is_plain,
    read_accuracies,
    read_facts,
    read_recipe,
    sha256,
    stamp,
)
from mergekit_lite.suites.splits import Task
from mergekit_lite.suites.suite import Suite
from mergekit_lite.suites.variants import add_noise
from mergekit_lite.suites.vision import build_backbone, pick_device
from mergekit_lite.types import CheckpointError, PathLike, StateDict

__all__ = [
    "BACKBONE",
    "POCKET8_HELD_OUT",
    "POCKET8_TASKS",
    "STAGES",
    "SUITES",
    "find",
    "half",
    "heads_to_tensors",
    "load_heads",
    "load_suite",
    "read_float32",
    "read_recipe",
    "sha256",
]

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
        CheckpointError: a file is missing, damaged, or not the one that was measured; the message names it.
    """
    folder = Path(name) if (Path(name) / "suite.json").is_file() else SUITES / name
    if not (folder / "suite.json").is_file():
        there = ", ".join(sorted(path.parent.name for path in SUITES.glob("*/suite.json")))
        raise ValueError(f"no suite named '{name}'; there is {there}. Build your own with Suite.from_folders.")
    facts = read_facts(folder)
    for key in ("tasks", "held_out", "recipe", "sha256"):
        if key not in facts:
            raise damaged(folder / "suite.json", f"it has no '{key}'")
    if not (folder / f"seed{seed}").is_dir():
        there = ", ".join(sorted(path.name.removeprefix("seed") for path in folder.glob("seed*")))
        raise ValueError(f"'{name}' has no experts of seed {seed}; there are the seeds {there}.")
    where = pick_device(device)
    recipe = read_recipe(facts["recipe"], folder / "suite.json")

    def images(names: Iterable[str]) -> dict[str, Task]:
        paths = {task: find_checked(folder, f"images/{task}.npz") for task in names}
        return {task: _images(path, stamp(path), facts.get("noise", 0.0)) for task, path in paths.items()}

    suite = Suite(
        facts["name"],
        _backbone(find_checked(folder, "base.safetensors")).to(where),
        images(facts["tasks"]),
        load_heads(find_checked(folder, "heads.safetensors"), recipe.temperature, where),
        recipe,
        held_out=images(facts["held_out"]),
        seed=seed,
        recorded=read_accuracies(folder / f"seed{seed}" / "accuracy.json"),
        device=where,
    )
    for task in [*suite.tasks, *suite.held_out]:
        if task not in suite.heads:
            raise damaged(folder / "suite.json", f"there is no head for its task '{task}'")
    for task in suite.tasks:
        file = f"seed{seed}/{task}.safetensors"
        if file in facts["sha256"] or (folder / file).exists():  # not every seed has an expert of every task
            state = read_float32(check_listed(folder, file))
            suite.experts[task] = {key: tensor.to(where) for key, tensor in state.items()}
    return suite


def find(folder: Path, name: str) -> Path:
    """The file of a suite, or of the suite that it inherits from.

    Args:
        folder: of the suite.
        name: of the file in it, such as ``"images/mnist.npz"``.

    Raises:
        FileNotFoundError: neither has it.
        CheckpointError: `name` leads out of the folder, or a ``suite.json`` is damaged or its parents go in a circle.
    """
    if not all(map(is_plain, name.split("/"))):
        raise CheckpointError(f"'{name}' is not the name of a file in the suite's folder '{folder}'.")
    seen = {folder.resolve()}
    while not (folder / name).is_file():
        facts, described = read_facts(folder), folder / "suite.json"
        if "parent" not in facts:
            raise FileNotFoundError(f"the suite '{facts['name']}' has no file '{name}' (in '{folder}').")
        folder = SUITES / facts["parent"]
        if folder.resolve() in seen:
            raise damaged(described, f"its parent '{facts['parent']}' leads back to where the search came from")
        if not (folder / "suite.json").is_file():
            raise damaged(described, f"there is no suite '{facts['parent']}' to be its parent")
        seen.add(folder.resolve())
    return folder / name


def find_checked(folder: Path, name: str) -> Path:
    """As `find`, and the file is the one that the ``suite.json`` beside it lists.

    Raises:
        CheckpointError: as `find`; or the file is missing, not listed, or another one than is listed.
    """
    try:
        home = find(folder, name).parents[name.count("/")]
    except FileNotFoundError as problem:
        raise CheckpointError(f"{problem} Copy or build the suite again.") from problem
    return check_listed(home, name)


def _backbone(path: Path) -> nn.Module:
    """The trunk with the weights of a file."""
    model = build_backbone(BACKBONE, stages=STAGES)
    try:
        model.load_state_dict(read_float32(path))
    except RuntimeError as problem:  # names or shapes of another network
        raise damaged(path, str(problem)) from problem
    return model


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
    """The heads written by `heads_to_tensors`.

    Raises:
        CheckpointError: the file is missing, damaged or holds something else.
    """
    tensors = load(path)
    tasks = dict.fromkeys(key.rsplit(".", 1)[0] for key in tensors)
    parts = {task: [tensors.get(f"{task}.{part}") for part in ("centre", "directions")] for task in tasks}
    heads = {}
    for task, (centre, directions) in parts.items():
        if centre is None or directions is None or directions.shape[1:] != centre.shape:
            raise damaged(path, f"it does not hold a centre (c,) and directions (classes, c) for '{task}'")
        heads[task] = CosineHead(centre, directions, temperature).to(device)
    return heads


@cache
def _images(path: Path, state: Stamp, noise: float) -> Task:
    """Images are decompressed once per process and shared by all suites: nobody changes them."""
    return add_noise(load_npz(path), noise) if noise else load_npz(path)
