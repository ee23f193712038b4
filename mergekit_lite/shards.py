"""A checkpoint in several files: shards in a folder, with an index that says which tensor is where.

The index is a JSON file, ``model.safetensors.index.json``, as Hugging Face's libraries write it:
``{"weight_map": {"layer.weight": "model-00001-of-00002.safetensors", ...}}``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.safetensors_file import SafetensorsFile
from mergekit_lite.types import CheckpointError, ReadFlat, Weights

INDEX = ".index.json"
# What a folder's one checkpoint may be called, in the order in which it is looked for.
USUAL = ("model.safetensors", "pytorch_model.bin")


class ShardedCheckpoint(Weights):
    """The shards of one model as one read-only state dict; at most one shard is open at a time.

    Args:
        index: path of the index.
        read_pickle: reads a shard that is no safetensors file, whole.

    Raises:
        CheckpointError: the index is damaged or leaves its folder, or a shard is missing, damaged, or lacks a tensor.
    """

    def __init__(self, index: Path, read_pickle: Callable[[Path], Any]) -> None:
        self.path = index
        try:
            where = json.loads(index.read_text())["weight_map"]
            where = {str(name): str(shard) for name, shard in where.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise CheckpointError(
                f"'{index}' is no index of shards: it needs a 'weight_map' from names of tensors to names of files "
                f"({type(problem).__name__}: {problem})."
            ) from problem
        self._shards: dict[str, SafetensorsFile] = {}
        loaded: dict[str, dict[str, Tensor]] = {}
        for shard in dict.fromkeys(where.values()):
            file = index.parent / shard
            if Path(shard).name != shard or shard in ("", "..", "."):
                raise CheckpointError(f"'{index}' points to '{shard}', which is no file of its own folder.")
            if not file.is_file():
                raise CheckpointError(f"'{index}' names the shard '{shard}', which is missing. Download it again.")
            if file.suffix == ".safetensors":
                self._shards[shard] = SafetensorsFile(file)
            else:
                loaded[shard] = read_pickle(file)
        for name, shard in where.items():
            if name not in (self._shards.get(shard) or loaded[shard]):
                raise CheckpointError(f"the shard '{shard}' of '{index}' lacks the tensor '{name}'.")
        self._memory = {name: loaded[shard][name] for name, shard in where.items() if shard in loaded}
        # In the order of the bytes, shard by shard, so that a pass goes through the files from start to end.
        self._where = {n: shard for shard, file in self._shards.items() for n in file if where.get(n) == shard}
        self._where |= {name: where[name] for name in self._memory}
        self._open: SafetensorsFile | None = None

    def _shard(self, name: str) -> SafetensorsFile:
        shard = self._shards[self._where[name]]
        before, self._open = self._open, shard
        if before is not None and before is not shard:
            before.close()
        return shard

    def __getitem__(self, name: str) -> Tensor:
        return self._memory[name] if name in self._memory else self._shard(name)[name]

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    @property
    def metadata(self) -> dict[str, str]:
        """The first shard's metadata."""
        return next(iter(self._shards.values())).metadata if self._shards else {}

    @property
    def files(self) -> list[Path]:
        """The index and all shards."""
        return [self.path, *(self.path.parent / shard for shard in dict.fromkeys(self._where.values()))]

    def shape(self, name: str) -> torch.Size:
        """As `Weights.shape`."""
        return self._memory[name].shape if name in self._memory else self._shards[self._where[name]].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """As `Weights.dtype`."""
        return self._memory[name].dtype if name in self._memory else self._shards[self._where[name]].dtype(name)

    def device(self, name: str) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def flat(self, name: str) -> ReadFlat:
        """As `Weights.flat`."""
        if name in self._memory:
            whole = self._memory[name].reshape(-1)
            return lambda start, stop: whole[start:stop]
        return self._shard(name).flat(name)

    def ties(self) -> dict[str, str]:
        """As `Weights.ties`; within each shard."""
        ties = {name: name for name in self._where}
        for file in self._shards.values():
            ties |= {name: first for name, first in file.ties().items() if name in ties and first in ties}
        return ties

    def check(self) -> None:
        """As `Weights.check`, for every shard."""
        for shard in self._shards.values():
            shard.check()


def is_index(path: Path) -> bool:
    """Whether this is the path of an index of shards."""
    return path.name.endswith(INDEX) and path.is_file()


def file_in_folder(folder: Path) -> Path:
    """The one checkpoint in a folder: an index of shards, or a file.

    Raises:
        CheckpointError: there is none, or there are several, or an adapter.
    """
    indices = sorted(folder.glob("*" + INDEX))
    best = [folder / (name + INDEX) for name in USUAL if folder / (name + INDEX) in indices]
    files = [folder / name for name in USUAL if (folder / name).is_file()]
    others = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    found = best[:1] or (indices if len(indices) == 1 else []) or files[:1] or others
    if (folder / "adapter_config.json").is_file() and not (best or files):
        raise CheckpointError(
            f"'{folder}' holds an adapter, not a whole model. Add it to its base first (merge_and_unload in PEFT)."
        )
    if len(found) != 1 or (not best and len(indices) > 1):
        what = ", ".join(file.name for file in (indices if len(indices) > 1 else found)[:4])
        raise CheckpointError(
            f"the folder '{folder}' holds {'several checkpoints: ' + what if what else 'no checkpoint'}; give the path "
            "of the file, or of the index of its shards."
        )
    return found[0]
