"""Checkpoints on disk, whatever they look like: told by their first bytes, never by their names.

==========================================  ==========================================================================
what there is                               how it is read
==========================================  ==========================================================================
a safetensors file                          tensor by tensor (`SafetensorsFile`)
a folder of shards, or its ``.index.json``  tensor by tensor (`ShardedCheckpoint`)
what ``torch.save`` wrote, of any age       whole, with ``weights_only``: nothing but tensors, numbers and text
a checkpoint around a state dict            the one state dict in it is taken, and said; several are named
==========================================  ==========================================================================

Others' pickles are never trusted: what could run code is refused, and the message names what was in there.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.safetensors_file import SafetensorsFile
from mergekit_lite.shards import ShardedCheckpoint, file_in_folder, is_index
from mergekit_lite.types import CheckpointError, PathLike, StateDict, Weights, say
from mergekit_lite.writing import atomic_path, check_storage, save, tied_names

__all__ = [
    "CheckpointError",
    "PathLike",
    "SafetensorsFile",
    "ShardedCheckpoint",
    "StateDict",
    "atomic_path",
    "load",
    "open_checkpoint",
    "save",
    "tied_names",
]

# What other kinds of files begin with, and what to do about them.
OTHERS = {
    b"": "is empty: it was not copied or downloaded to its end",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<": "is a web page: the download was answered by a site, not by the file",
    b"GGUF": "is a GGUF file, whose weights are quantised: merge the weights it was made from",
    b"\x89HDF": "is an HDF5 file: save the weights with safetensors",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"BZh": "is compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed with xz: unpack it first",
    b"(\xb5/\xfd": "is compressed with zstd: unpack it first",
    b"\x93NUMPY": "is a NumPy array: save the weights with safetensors",
}
PICKLES = (b"PK\x03\x04", b"\x80", b"(", b"}", b"c")  # a zip archive, or pickle's own first bytes
DEPTH = 3  # how deep in a wrapped checkpoint a state dict is looked for
TRAINING = ("optim", "sched", "scaler")  # entries that hold tensors, but no model


def open_checkpoint(path: PathLike, entry: str | None = None) -> Weights | StateDict:
    """A checkpoint as a mapping from names to tensors, read as they are asked for where the format allows it.

    Args:
        path: a file, or a folder with a checkpoint in it.
        entry: the state dict to take, where a file holds several: its key, with dots for keys within keys.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint, or holds more than tensors, or several models.
    """
    path = Path(path)
    if path.is_dir():
        path = file_in_folder(path)
    if is_index(path):
        return ShardedCheckpoint(path, _read_pickle)
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: '{path}'. Check the path.")
    try:
        with path.open("rb") as file:
            first = file.read(24)
    except OSError as problem:
        raise CheckpointError(f"'{path}' cannot be read ({problem.strerror}).") from problem
    if first[4:9] == b"\0\0\0\0{":  # a header shorter than 4 GB
        return SafetensorsFile(path)
    for begin, what in OTHERS.items():
        if first.startswith(begin) if begin else not first:
            raise CheckpointError(f"'{path}' is not a complete safetensors file and no checkpoint of torch: it {what}.")
    if first.startswith(PICKLES):
        return state_dict_in(_read_pickle(path), path, entry)
    return SafetensorsFile(path)  # says what is wrong with it


def load(path: PathLike, entry: str | None = None) -> StateDict:
    """Read a checkpoint into memory as a plain state dict; tied names share one tensor again.

    Args:
        path: a safetensors file, what ``torch.save`` wrote, or a folder with a checkpoint or its shards.
        entry: the state dict to take, where a file holds several, such as ``"model_ema"``.

    Returns:
        Tensors in memory of their own: whatever happens to the file, they stay as they are.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors, or several models.
    """
    opened = open_checkpoint(path, entry)
    if not isinstance(opened, Weights):
        return dict(opened)
    ties, loaded = opened.ties(), StateDict()
    for name in opened:
        loaded[name] = loaded[ties[name]] if ties[name] in loaded else opened[name]
    return loaded


# ---------------------------------------------------------------- what torch.save wrote


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as problem:  # pickle's errors have no common class
        text = str(problem)
        if found := re.search(r"GLOBAL ([\w.]+)", text) or re.search(
            r"[Uu]nsupported (?:class|global:?) ([\w.]+)", text
        ):
            reason = f"it holds an object of {found[1]}, which could run code"
        elif "TorchScript" in text:
            reason = "it is a TorchScript program"
        elif "tar" in text and "legacy" in text:
            reason = "it is in torch's format of 2016, a tar archive"
        else:
            lines = text.strip().splitlines()
            reason = f"{type(problem).__name__}: {lines[0][:200] if lines else 'damaged'}"
        raise CheckpointError(
            f"'{path}' could not be read with torch.load(weights_only=True): {reason}. It is damaged, or holds objects "
            "other than tensors; ask its author for model.state_dict() as a safetensors file."
        ) from problem


def _harmless() -> list[Any]:
    """Classes besides tensors that training programs often save, and that do nothing when they are read."""
    import numpy as np
    from numpy._core.multiarray import scalar  # a NumPy number's function, under its old and its new name

    dtypes = [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
    return [argparse.Namespace, np.dtype, *dtypes, scalar, (scalar, "numpy.core.multiarray.scalar")]


# ---------------------------------------------------------------- checkpoints around a state dict


def state_dict_in(loaded: Any, path: Path, entry: str | None = None) -> StateDict:
    """The state dict in what a file held.

    Raises:
        CheckpointError: there is none, there are several, or it holds other things than tensors.
    """
    if _is_state_dict(loaded) and entry is None:
        return _checked(loaded, path)
    found = dict(_state_dicts(loaded))
    if entry is not None:
        if entry in found or (_is_state_dict(loaded) and not found):  # a plain state dict needs no choice
            return _checked(found.get(entry, loaded), path)
        there = ", ".join(f"'{name}'" for name in found) or "none"
        raise CheckpointError(f"'{path}' has no state dict '{entry}'; there is {there}.")
    if len(found) > 1:
        there = ", ".join(f"'{name}'" for name in found)
        raise CheckpointError(
            f"'{path}' holds several state dicts: {there}. Choose one: mergekit_lite.load('{path.name}', "
            f"entry='{next(iter(found))}')."
        )
    if found:
        ((name, state),) = found.items()
        say("'%s' holds more than a model; its state dict '%s' is taken.", path.name, name)
        return _checked(state, path)
    what = f"a {type(loaded).__name__}"
    if isinstance(loaded, Mapping):
        wrong = next((name for name, value in loaded.items() if not isinstance(value, Tensor)), None)
        what = f"'{wrong}', a {type(loaded[wrong]).__name__}" if wrong is not None else "nothing"
    raise CheckpointError(
        f"'{path}' does not hold a plain state dict (names to tensors), but {what}. Save model.state_dict() alone."
    )


def _state_dicts(loaded: Any) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The state dicts that lie least deep in nested mappings, with their keys."""
    level: dict[str, Any] = {"": loaded}
    for _ in range(DEPTH):
        inner = {
            f"{outer}.{key}" if outer else str(key): value
            for outer, mapping in level.items()
            if isinstance(mapping, Mapping)
            for key, value in mapping.items()
            if not any(word in str(key).lower() for word in TRAINING)
        }
        found = {key: value for key, value in inner.items() if _is_state_dict(value)}
        if found:
            yield from found.items()
            return
        level = inner


def _is_state_dict(value: object) -> bool:
    """Whether this is a mapping from names to tensors, as it should be or with little else in it."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) for key in value):
        return False
    tensors = sum(isinstance(entry, Tensor) for entry in value.values())
    return tensors > 0 and not any(isinstance(entry, Mapping) for entry in value.values())


def _checked(state: Mapping[str, Any], path: Path) -> StateDict:
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"'{path}' does not hold a plain state dict: '{name}' is a {type(tensor).__name__}, not a tensor. "
                "Leave it out and save the file again."
            )
        try:
            check_storage(name, tensor)
        except TypeError as problem:
            raise CheckpointError(f"'{path}': {problem}") from problem
    return {name: tensor.detach() for name, tensor in state.items()}
