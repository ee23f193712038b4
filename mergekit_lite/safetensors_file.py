"""One safetensors file, read tensor by tensor or in parts of tensors.

The format is eight bytes with the length of a header, the header (JSON: each tensor's dtype, shape and place), and the
tensors' bytes. Nothing in it can run code, and one tensor can be read without the rest, which is what lets
`mergekit_lite.merge_files` merge checkpoints that are larger than memory.

Tensors are *read*, never mapped: a mapped file that is cut or overwritten by another program ends the process, or
changes the weights that are being merged. Whoever reads them gets memory of his own, and a file that is no longer the
one that was opened is noticed by its size, its time of change and its number on the disk.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterator
from io import FileIO
from os import fstat, stat_result
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.types import CheckpointError, PathLike, ReadFlat, Weights

# Two names for one tensor (tied weights) cannot stand twice in a safetensors file. The second name is kept in the
# metadata under this prefix, pointing to the first.
TIED_PREFIX = "tied:"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

Stamp = tuple[int, int, int]  # size, time of change, number on the disk


class SafetensorsFile(Weights):
    """A safetensors file as a read-only state dict; a tensor is read, and copied, when it is asked for.

    Args:
        path: of the file, whatever its suffix.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors, has tensors of an unknown dtype, or says
            that a name is tied to one that it does not hold. Later, when a tensor is read: it was changed meanwhile.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"no such checkpoint: '{self.path}'. Check the path.")
        self._stamp = _stamp(self.path.stat())
        self._lock = threading.Lock()
        self._file: FileIO | None = None  # it is opened when the first tensor is read
        self.header, self._begin, self.metadata = read_header(self.path)
        for name, entry in self.header.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"'{self.path}' holds '{name}' as {entry['dtype']}, a packed or unknown dtype that torch cannot "
                    "compute with. Merge the weights it was made from."
                )
        # Names in the order of the bytes, so that a pass over the file reads it from start to end.
        self._stored_as = {name: name for name in sorted(self.header, key=lambda n: self.header[n]["data_offsets"][0])}
        for name, first in ties_in(self.metadata).items():
            if name in self.header:
                continue  # the metadata were copied from another file; the bytes that are there count
            if first not in self.header:
                raise CheckpointError(
                    f"'{self.path}' says that '{name}' is tied to '{first}', and holds no such tensor: its metadata "
                    "were damaged or belong to another file."
                )
            self._stored_as[name] = first

    def __getitem__(self, name: str) -> Tensor:
        first, shape = self._stored_as[name], self.shape(name)
        return self._read(first, 0, shape.numel()).view(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._stored_as

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_as)

    def __len__(self) -> int:
        return len(self._stored_as)

    def shape(self, name: str) -> torch.Size:
        """As `Weights.shape`."""
        return torch.Size(self.header[self._stored_as[name]]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """As `Weights.dtype`."""
        return DTYPES[self.header[self._stored_as[name]]["dtype"]]

    def device(self, name: str) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def flat(self, name: str) -> ReadFlat:
        """As `Weights.flat`; only the part that is asked for is read."""
        first = self._stored_as[name]
        return lambda start, stop: self._read(first, start, stop)

    def ties(self) -> dict[str, str]:
        """As `Weights.ties`, from the file's metadata."""
        return dict(self._stored_as)

    def check(self) -> None:
        """As `Weights.check`: whether the path still leads to the file that was opened."""
        if not self.path.exists() or _stamp(self.path.stat()) != self._stamp:
            raise self._changed()

    def close(self) -> None:
        """Close the file; it is opened again if it is read again."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        """The entries from `start` up to `stop` of a stored tensor, shape (stop - start,)."""
        entry = self.header[name]
        part = torch.empty(max(0, stop - start), dtype=DTYPES[entry["dtype"]])
        if not part.numel():
            return part
        room = part.view(torch.uint8).numpy().data
        with self._lock:
            file = self._file or self._opened()
            file.seek(self._begin + entry["data_offsets"][0] + start * part.element_size())
            got = 0
            while got < len(room):  # one call reads 2 GB at most
                count = file.readinto(room[got:])
                if not count:
                    raise self._changed()
                got += count
            if _stamp(fstat(file.fileno())) != self._stamp:
                raise self._changed()
        return part

    def _opened(self) -> FileIO:
        try:
            file = FileIO(self.path, "r")
        except OSError as problem:
            raise CheckpointError(f"'{self.path}' can no longer be read ({problem.strerror}).") from problem
        weakref.finalize(self, file.close)
        if _stamp(fstat(file.fileno())) != self._stamp:
            file.close()
            raise self._changed()
        self._file = file
        return file

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"'{self.path}' was changed, replaced or removed after it was opened. Let the program that writes it "
            "finish, and start again."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self._stamp)


def _reopened(path: Path, stamp: Stamp) -> SafetensorsFile:
    """The file of another process, if it is still the same."""
    file = SafetensorsFile(path)
    if file._stamp != stamp:
        raise file._changed()
    return file


def read_header(path: PathLike) -> tuple[dict[str, dict[str, Any]], int, dict[str, str]]:
    """The header of a safetensors file without its metadata, the offset where bytes begin, and the metadata.

    Raises:
        CheckpointError: the file is not safetensors, or not all of it is there.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks that header and size of the file agree
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_each_key_once)
    except (SafetensorError, OSError, ValueError) as problem:
        raise CheckpointError(
            f"'{path}' is not a complete safetensors file ({problem}). It may be truncated (copy or download it "
            "again) or of another format."
        ) from problem
    metadata = header.pop("__metadata__", None) or {}
    return header, 8 + length, metadata


def ties_in(metadata: dict[str, str]) -> dict[str, str]:
    """The second names of tied tensors, each with the first: from a file's metadata."""
    return {key[len(TIED_PREFIX) :]: first for key, first in metadata.items() if key.startswith(TIED_PREFIX)}


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"its header has '{twice}' twice")
    return found


def _stamp(status: stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ino
