"""What is written down about a suite, read with care: whatever is wrong with a file, the message names it.

``suite.json`` lists the sha256 of every file that was there when the suite was measured. A file that is another one
now is refused: its numbers would not be those that are written beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoints import SafetensorsFile, load
from mergekit_lite.suites.recipe import Recipe
from mergekit_lite.suites.splits import SPLITS
from mergekit_lite.types import CheckpointError, PathLike, StateDict

# What a file was when it was last looked at: its size, the time of its last change and its number on the disk.
Stamp = tuple[int, int, int]


def read_facts(folder: PathLike) -> dict[str, Any]:
    """The content of a suite's ``suite.json``.

    Args:
        folder: of the suite.

    Returns:
        A dict with ``name`` and, in a whole suite, ``tasks``, ``held_out``, ``recipe``, ``sha256``, ``parent``
        (of a variant) and ``noise``. What is there has the right kind; the names are plain ones, without a path.

    Raises:
        CheckpointError: the file is missing or damaged, or a name in it leads out of the folder.
    """
    path = Path(folder) / "suite.json"
    facts = read_json(path)
    kinds = {"name": str, "tasks": list, "held_out": list, "recipe": dict, "sha256": dict, "parent": str}
    for key, kind in kinds.items():
        if not isinstance(facts.get(key, kind()), kind):
            raise damaged(path, f"its '{key}' is a {type(facts[key]).__name__}, not a {kind.__name__}")
    if "name" not in facts:
        raise damaged(path, "it has no 'name'")
    names = [*facts.get("tasks", []), *facts.get("held_out", [])]
    for name in [*names, *([facts["parent"]] if "parent" in facts else [])]:
        if not is_plain(name):
            raise damaged(path, f"{name!r} is not a plain name, as tasks and parents have")
    if len(set(names)) < len(names):
        raise damaged(path, "a task stands in it twice")
    for name, digest in facts.get("sha256", {}).items():
        if not isinstance(digest, str) or not all(map(is_plain, name.split("/"))):
            raise damaged(path, f"'{name}' is not a file of this folder with its checksum")
    noise = facts.get("noise", 0.0)
    if not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
        raise damaged(path, f"its 'noise' is {noise!r}, not a strength")
    return facts


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it is missing, damaged or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise CheckpointError(f"no such file: '{path}'. The suite's build was not finished; run it again.") from problem
    except (OSError, ValueError, RecursionError) as problem:
        raise damaged(path, str(problem)) from problem
    if not isinstance(content, dict):
        raise damaged(path, f"it holds a {type(content).__name__}, not an object")
    return content


def read_recipe(numbers: Mapping[str, Any], path: PathLike = "recipe") -> Recipe:
    """A recipe that was written as JSON into a file; what it does not mention has its default.

    Raises:
        CheckpointError: it is not a recipe.
    """
    try:
        return Recipe().but(**numbers)
    except (TypeError, ValueError) as problem:
        raise damaged(path, str(problem)) from problem


def read_accuracies(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What was measured when a suite was built: ``[split][row][task]``, shares of images.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    recorded = read_json(path)
    for split, rows in recorded.items():
        whole = split in SPLITS and isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values())
        numbers = [number for row in rows.values() for number in row.values()] if whole else [None]
        if not all(isinstance(n, (int, float)) and 0 <= n <= 1 for n in numbers):
            raise damaged(path, f"its '{split}' does not hold accuracies by task")
    return recorded


def sha256(path: PathLike) -> str:
    """The checksum of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_listed(home: Path, name: str) -> Path:
    """The file of a folder, if it is the one that the folder's ``suite.json`` lists.

    Args:
        home: a suite's folder.
        name: of a file in it, such as ``"images/mnist.npz"``.

    Raises:
        CheckpointError: the file is missing, is not listed, or is another one than is listed.
    """
    path, listed = home / name, read_facts(home).get("sha256", {})
    if name not in listed:
        raise CheckpointError(
            f"'{path}' is not listed in '{home / 'suite.json'}': its build was not finished, or it was put there "
            "by hand. Run the build again, or remove the file."
        )
    if not path.is_file():
        raise CheckpointError(
            f"no such file: '{path}', though '{home / 'suite.json'}' lists it. Copy or build it again."
        )
    if digest_of(path) != listed[name]:
        raise CheckpointError(
            f"'{path}' is not the file that was measured: its sha256 is not the one in '{home / 'suite.json'}'. "
            "It is damaged or was replaced; copy or build it again."
        )
    return path


def digest_of(path: Path) -> str:
    """As `sha256`, but computed once as long as the file stays as it is."""
    return _digest(path.resolve(), stamp(path))


def is_finished(path: Path, made: Mapping[str, str], recipe: Recipe, listed: str | None) -> bool:
    """Whether a file is the expert that would be trained now, whole as it was written; if not, it is trained again.

    Args:
        path: a safetensors file.
        made: what its metadata should say: task and seed, versions of torch and timm.
        recipe: what it should have been trained by.
        listed: its sha256 in ``suite.json``; None where that does not mention it, as after an interrupted build.

    Raises:
        CheckpointError: the file is damaged.
    """
    facts = SafetensorsFile(path).metadata
    try:
        trained_by = json.loads(facts.get("recipe", "{}"))
    except (ValueError, RecursionError) as problem:
        raise damaged(path, f"its recipe cannot be read ({problem})") from problem
    if not isinstance(trained_by, dict):
        raise damaged(path, f"its recipe is a {type(trained_by).__name__}, not an object")
    if read_recipe(trained_by, path) != recipe or any(facts.get(key) != made[key] for key in ("task", "seed")):
        return False
    if digest_of(path) == listed:
        return True
    if "tensors" not in facts and listed is None:
        return False  # nothing tells whether it is whole
    if digest_of_tensors(load(path)) != facts.get("tensors"):
        raise CheckpointError(f"'{path}' is damaged: its checksum is another one. Delete it to train it again.")
    return all(facts.get(key) == made[key] for key in ("torch", "timm"))


def digest_of_tensors(state: StateDict) -> str:
    """The sha256 of the names, shapes and values of a state dict on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def stamp(path: Path) -> Stamp:
    """By what one sees that a file has not changed."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


def is_plain(name: object) -> bool:
    """Whether this is a name that cannot lead out of a folder: no path, no drive, nothing hidden."""
    return isinstance(name, str) and re.fullmatch(r"[^./\\:\x00-\x1f][^/\\:\x00-\x1f]*", name) is not None


def damaged(path: PathLike, what: str) -> CheckpointError:
    """The error that a file of a suite is damaged."""
    return CheckpointError(f"'{path}' is damaged or was changed by hand: {what}. Copy it or build the suite again.")


@cache
def _digest(path: Path, state: Stamp) -> str:
    return sha256(path)
