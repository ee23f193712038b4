"""Checkpoints on disk: read tensor by tensor, written whole or not at all.

The format is safetensors: a JSON header followed by raw bytes. Nothing in such a file can run
code, and one tensor can be read without the rest, which is what lets `merge_files` merge
checkpoints that are larger than memory. Other people's ``.pt``/``.pth``/``.bin`` files are read
with ``torch.load(weights_only=True)``, which refuses everything but tensors.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mergekit_lite.task_vectors import TaskVectors

StateDict = dict[str, Tensor]
PathLike = str | os.PathLike[str]

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
# Two names for one tensor (tied weights) cannot stand twice in a safetensors file. The second name
# is kept in the metadata under this prefix, pointing to the first.
TIED_PREFIX = "tied:"


class CheckpointError(ValueError):
    """A checkpoint file that is missing, damaged, or not what its name says."""


class SafetensorsFile(Mapping[str, Tensor]):
    """A safetensors file seen as a read-only state dict whose tensors are mapped, not loaded.

    Indexing returns a tensor backed by the file's pages, so a file of 10 GB costs no memory until
    its tensors are read, and the operating system may drop what was read at any time.

    Args:
        path: a ``.safetensors`` file.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """

    def __init__(self, path: PathLike) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"no such checkpoint: '{self.path}'. Check the path.")
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(
                f"'{self.path}' is not a complete safetensors file ({problem}). "
                "It may be truncated (copy or download it again) or be of another format "
                "(convert it: mergekit_lite.save(mergekit_lite.load('model.pt'), 'model.safetensors'))."
            ) from problem
        self.metadata: dict[str, str] = self._file.metadata() or {}
        tied = {k[len(TIED_PREFIX) :]: v for k, v in self.metadata.items() if k.startswith(TIED_PREFIX)}
        # Names in the order of the bytes, so that a pass over the file reads it from start to end.
        header, _ = read_header(self.path)
        stored = sorted(header, key=lambda name: header[name]["data_offsets"][0])
        self._stored_as = {name: name for name in stored} | tied

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(self._stored_as[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_as)

    def __len__(self) -> int:
        return len(self._stored_as)

    def stored_name(self, name: str) -> str:
        """The name under which the bytes of `name` stand: another one if the two are tied."""
        return self._stored_as[name]


def read_header(path: PathLike) -> tuple[dict[str, dict[str, Any]], int]:
    """The header of a safetensors file (without its metadata), and the offset where bytes begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def open_checkpoint(path: PathLike) -> Mapping[str, Tensor]:
    """A checkpoint as a mapping from names to tensors, memory-mapped, whatever its format.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors.
    """
    path = Path(path)
    if path.suffix not in PICKLE_SUFFIXES:
        return SafetensorsFile(path)
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: '{path}'. Check the path.")
    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as problem:  # pickle's errors have no common class
        raise CheckpointError(
            f"'{path}' could not be read with torch.load(weights_only=True): {problem}. It is damaged, "
            "or holds objects other than tensors; ask its author for a safetensors file."
        ) from problem
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(
            f"'{path}' does not hold a plain state dict (names to tensors). Save model.state_dict() alone."
        )
    return loaded


def load(path: PathLike) -> StateDict:
    """Read a checkpoint into memory as a plain state dict; tied names share one tensor again.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors.
    """
    file = open_checkpoint(path)
    if not isinstance(file, SafetensorsFile):
        return dict(file)
    loaded: StateDict = {}
    for name in file:
        first = file.stored_name(name)
        # clone: what is mapped lives only as long as the file stays as it is
        loaded[name] = loaded[first] if first in loaded else file[name].clone()
    return loaded


def save(state: Mapping[str, Tensor], path: PathLike, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a state dict as safetensors, atomically: `path` holds the whole file or the old one.

    Args:
        state: names to tensors; names that share one tensor (tied weights) are stored once.
        path: where to write; missing folders are made.
        metadata: strings to keep in the header, such as the recipe of a merge.

    Returns:
        The path written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    firsts = tied_names(state)
    tensors = {n: state[n].detach().contiguous() for n in state if firsts[n] == n}
    # A view into a larger storage (one row of a matrix) is written as just what it shows.
    tensors = {n: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for n, t in tensors.items()}
    ties = {TIED_PREFIX + name: first for name, first in firsts.items() if name != first}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={**(metadata or {}), **ties})
    return path


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner can read; give this one the usual rights.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name, the first name that shows the very same tensor (itself, if it is not tied)."""
    if isinstance(state, SafetensorsFile):
        return {name: state.stored_name(name) for name in state}
    seen: dict[tuple[object, ...], str] = {}
    firsts = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        # Empty tensors and those without memory (the meta device) all "stand" at address 0.
        firsts[name] = seen.setdefault(place, name) if tensor.data_ptr() else name
    return firsts


def merge_files(
    method: Callable[..., Mapping[str, Tensor]],
    base: PathLike,
    experts: Iterable[PathLike],
    out: PathLike,
    **hyperparameters: object,
) -> Path:
    """Merge checkpoint files into a file, tensor by tensor, without holding a model in memory.

    Any method written with `TaskVectors.layers`, `gram` and `map` works unchanged: `map` writes each
    merged tensor to the output file instead of collecting it. For an elementwise method on float32
    files the memory in use stays below K + 2 times the largest tensor (half-precision files are
    computed in float32 and so need twice their own size).

    Args:
        method: a merging method, such as `mergekit_lite.task_arithmetic`.
        base: the base checkpoint, a ``.safetensors`` file; the output has its names, shapes and dtypes.
        experts: the fine-tuned checkpoints, ``.safetensors`` files.
        out: where to write. Nothing is left there if the merge fails.
        **hyperparameters: passed to the method and recorded in the output's metadata.

    Returns:
        The path written.

    Raises:
        CheckpointError: a file is missing or damaged, or `out` is one of the inputs.
        KeyError, ValueError: the checkpoints do not fit together; the message names the tensor.
        TypeError: the method does not return one state dict of this architecture.
    """
    from mergekit_lite.task_vectors import TaskVectors

    sources = [Path(base), *map(Path, experts)]
    out = Path(out)
    if out.exists() and any(source.exists() and out.samefile(source) for source in sources):
        raise CheckpointError(f"the output '{out}' is one of the inputs; write it under another name.")
    base_file = SafetensorsFile(base)
    recipe = {
        "merged_with": f"mergekit_lite.{getattr(method, '__name__', 'method')}",
        "hyperparameters": json.dumps(hyperparameters, default=str),
        "base": sources[0].name,
        "experts": json.dumps([path.name for path in sources[1:]]),
    }
    with atomic_path(out) as temporary:
        stream = _StreamedFile(base_file, temporary, {**base_file.metadata, **recipe})
        tv: TaskVectors = TaskVectors(base_file, sources[1:])._with_collector(stream.write)
        merged = method(tv, **hyperparameters)
        if merged is not stream.result:  # a method that built its own dict instead of calling tv.map
            if set(merged) != set(base_file):
                raise TypeError(
                    f"{recipe['merged_with']} does not return the base's tensors but {', '.join(list(merged)[:3])}. "
                    "A method with a model for each task makes no single file; save each of its models."
                )
            stream.write(merged.items())
    return out


class _StreamedFile:
    """Writes merged tensors into a new safetensors file laid out exactly like the base's."""

    def __init__(self, base: SafetensorsFile, path: Path, metadata: dict[str, str]) -> None:
        self.base, self.path, self.metadata = base, path, metadata
        self.header, _ = read_header(base.path)
        self.result: Mapping[str, Tensor] | None = None

    def write(self, merged: Iterable[tuple[str, Tensor]]) -> Mapping[str, Tensor]:
        """Write all pairs, in any order, and return the new file as a (mapped) state dict."""
        text = json.dumps({"__metadata__": self.metadata, **self.header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # keeps every tensor aligned
        with open(self.path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in merged:
                if self.base.stored_name(name) == name:  # a tied name's bytes stand under the first
                    file.seek(8 + len(text) + self.header[name]["data_offsets"][0])
                    _write_bytes(file, tensor)
                del tensor  # it is on disk; the next one needs the memory
        self.result = SafetensorsFile(self.path)
        return self.result


def _write_bytes(file: IO[bytes], tensor: Tensor) -> None:
    """Write a tensor's bytes without copying them (`view` to bytes, then numpy's buffer)."""
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel():
        file.write(flat.view(torch.uint8).numpy().data)
