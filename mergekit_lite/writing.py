"""Writing tensors: whole files or none, the same bytes for the same model, nothing left behind.

A file is written under a temporary name beside its place and moved there when it is complete. The temporary name
carries the process that writes; what a process that was killed has left is removed by the next one that writes there.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from mergekit_lite.safetensors_file import DTYPES, TIED_PREFIX
from mergekit_lite.types import CheckpointError, PathLike, Weights

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HOST = re.sub(r"[^\w.-]", "_", socket.gethostname())[:60]
_TEMPORARY = re.compile(r"\.mergekit_lite~(?P<host>[\w.-]+)~(?P<process>\d+)~\w+")


def save(state: Mapping[str, Tensor], path: PathLike, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a state dict as safetensors, atomically: `path` holds the whole file or the old one.

    Args:
        state: names to tensors; names that share one tensor (tied weights) are stored once.
        path: where to write; missing folders are made.
        metadata: strings to keep in the header, such as the recipe of a merge.

    Returns:
        The path written.

    Raises:
        TypeError: a tensor that the format cannot hold (sparse, quantised, without memory), or metadata that are
            no strings.
        CheckpointError: `path` is a folder, a device or write-protected.
    """
    path, ties = Path(path), tied_names(state)
    stored = {name: state[name] for name, first in ties.items() if first == name}
    with (
        atomic_path(path) as temporary,
        TensorWriter(
            temporary, {name: (t.dtype, t.shape) for name, t in stored.items()}, tied_only(ties), metadata
        ) as writer,
    ):
        for name, tensor in stored.items():
            writer.write(name, tensor)
    return path


class TensorWriter:
    """Writes tensors, in any order, into a new safetensors file whose contents are known beforehand.

    Equal contents give equal bytes: tensors stand by the width of their dtype (which keeps all of them aligned), then
    in the given order, and metadata are sorted.

    Args:
        path: of the file; it is overwritten.
        contents: dtype and shape by name.
        ties: second names of tensors, each with the first.
        metadata: strings for the header.

    Raises:
        TypeError: a dtype that safetensors does not have, or metadata that are no strings.
    """

    def __init__(
        self,
        path: Path,
        contents: Mapping[str, tuple[torch.dtype, torch.Size]],
        ties: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.contents = path, contents
        for name, (dtype, _) in contents.items():
            if not isinstance(name, str) or dtype not in _CODES:
                raise TypeError(f"'{name}' cannot be written: safetensors has no dtype for {dtype}.")
        # Ties of another file, that came along with its metadata, say nothing about this one.
        told = {key: text for key, text in (metadata or {}).items() if not str(key).startswith(TIED_PREFIX)}
        told |= {TIED_PREFIX + second: first for second, first in (ties or {}).items()}
        wrong = [key for key, text in told.items() if not isinstance(key, str) or not isinstance(text, str)]
        if wrong:
            raise TypeError(f"metadata are strings; '{wrong[0]}' is a {type(told[wrong[0]]).__name__}.")
        header: dict[str, object] = {"__metadata__": dict(sorted(told.items()))} if told else {}
        end = 0
        for name in sorted(contents, key=lambda name: -contents[name][0].itemsize):
            dtype, shape = contents[name]
            start, end = end, end + shape.numel() * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._header, self._begin, self._waiting = header, 8 + len(text), set(contents)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        with self._file:
            if kind is None and self._waiting:
                raise ValueError(f"'{min(self._waiting)}' was not written.")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            KeyError: there is no such tensor in the file.
            ValueError, TypeError: it has another shape or dtype than was said, or no plain memory.
        """
        dtype, shape = self.contents[name]
        check_storage(name, tensor)
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"'{name}' is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype} of shape {tuple(shape)}."
            )
        self._waiting.discard(name)
        flat = tensor.detach().cpu().contiguous().view(-1)
        if flat.numel():
            entry: dict[str, list[int]] = self._header[name]  # type: ignore[assignment]
            self._file.seek(self._begin + entry["data_offsets"][0])
            left = flat.view(torch.uint8).numpy().data
            while left:  # one call writes 2 GB at most
                left = left[self._file.write(left) :]


def check_storage(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that has no plain memory of numbers.

    Raises:
        TypeError: it is sparse, nested, quantised, or on the meta device.
    """
    what = (
        "is nested"
        if tensor.is_nested
        else f"is sparse ({tensor.layout})"
        if tensor.layout != torch.strided
        else "is quantised"
        if tensor.is_quantized
        else "is on the meta device and has no numbers"
        if tensor.is_meta
        else ""
    )
    if what:
        raise TypeError(f"'{name}' {what}; weights are merged and written as plain, dense tensors.")


def tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name, the first name that shows the very same tensor (itself, if it is not tied)."""
    if isinstance(state, Weights):
        return state.ties()
    seen: dict[tuple[object, ...], str] = {}
    firsts = {}
    for name, tensor in state.items():
        check_storage(name, tensor)
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        # Empty tensors all "stand" at address 0.
        firsts[name] = seen.setdefault(place, name) if tensor.data_ptr() else name
    return firsts


def tied_only(ties: Mapping[str, str]) -> dict[str, str]:
    """The second names alone."""
    return {name: first for name, first in ties.items() if name != first}


# ---------------------------------------------------------------- atomic


@contextmanager
def atomic_path(path: PathLike, *, folder: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    Args:
        path: a file that may be there already, and is then replaced with its rights kept; or a folder that may not.
        folder: make a folder, not a file.

    Raises:
        CheckpointError: there is something at `path` that must not be replaced; nothing is written then.
    """
    path = Path(path)
    check_place(path, folder=folder)
    with temporary_place(path.parent, folder=folder) as temporary:
        yield temporary
        if path.is_file():
            shutil.copymode(path, temporary)
        for file in temporary.iterdir() if folder else [temporary]:
            _to_disk(file)
        os.replace(temporary, path)


@contextmanager
def temporary_place(parent: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new file (or folder) in `parent` that is removed when the block ends, if it is still there."""
    made = _make_folders(parent)
    remove_leftovers(parent)
    temporary = parent / f".mergekit_lite~{_HOST}~{os.getpid()}~{secrets.token_hex(4)}"
    try:
        temporary.mkdir() if folder else temporary.touch(exist_ok=False)
        yield temporary
    finally:
        _remove(temporary)
        for new in made:
            with suppress(OSError):  # what is not empty stays
                new.rmdir()


def check_place(path: Path, *, folder: bool = False) -> None:
    """Look before the work whether something can be written at a path.

    Raises:
        CheckpointError: it is a folder, a device or a write-protected file; or, for a folder, anything at all.
    """
    if folder and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"the output '{path}' is there already; give a new or an empty folder.")
    if not folder and path.exists():
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise CheckpointError(f"the output '{path}' is {what}; give the path of a file.")
        if not path.stat().st_mode & 0o222:
            raise CheckpointError(f"the output '{path}' is write-protected.")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes of this computer that are gone."""
    for item in folder.glob(".mergekit_lite~*"):
        match = _TEMPORARY.fullmatch(item.name)
        if match and match["host"] == _HOST and not _is_running(int(match["process"])):
            _remove(item)


def _is_running(process: int) -> bool:
    if sys.platform == "win32":
        return True  # there is no harmless way to ask
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it is another user's
    return True


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those that it stands in; the new ones, innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _to_disk(file: Path) -> None:
    """Wait until a file's bytes are on the disk, so that after a power cut there is the old file or the new one."""
    handle = os.open(file, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(item: Path) -> None:
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item, ignore_errors=True)
    else:
        item.unlink(missing_ok=True)
