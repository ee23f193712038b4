"""Merging checkpoint files into files, tensor by tensor: larger models than memory holds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_lite.checkpoints import open_checkpoint
from mergekit_lite.numerics.precision import fits_into
from mergekit_lite.roles import dtype_name
from mergekit_lite.safetensors_file import SafetensorsFile
from mergekit_lite.shards import INDEX, ShardedCheckpoint
from mergekit_lite.sources import InMemory
from mergekit_lite.task_vectors import TaskVectors
from mergekit_lite.types import CheckpointError, PathLike, Weights
from mergekit_lite.writing import TensorWriter, atomic_path, check_place, temporary_place, tied_names, tied_only

SUFFIXES = re.compile(r"(\.(safetensors|pth|pt|bin|ckpt|pkl|tar|index|json))+$", re.IGNORECASE)
SHARD = 5 << 30  # bytes in a shard at most, where nothing else is asked for
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def merge_files(
    method: Callable[..., Mapping[str, Any]],
    base: PathLike,
    experts: Iterable[PathLike] | Mapping[str, PathLike],
    out: PathLike,
    *,
    max_shard_size: int | str | None = None,
    entry: str | None = None,
    **hyperparameters: object,
) -> Path:
    """Merge checkpoint files into a file, tensor by tensor, without holding a model in memory.

    Any method written with `TaskVectors.layers`, `gram` and `map` works unchanged: `map` writes each merged tensor to
    the output instead of collecting it. For an elementwise method on float32 files the memory in use stays below K + 2
    times the largest tensor (half-precision files are computed in float32 and so need twice their own size), however
    many shards there are; what ranks all weights of a task vector (TIES, PCB) counts in a few MB more per expert.
    Inputs must stay as they are meanwhile, and it is said if one does not. Files that ``torch.save`` wrote cannot be
    read in parts and are held in memory.

    Args:
        method: a merging method, such as `mergekit_lite.task_arithmetic`.
        base: the base checkpoint: a file, or a folder with shards. The output has its names, shapes and dtypes.
        experts: the fine-tuned checkpoints; a mapping gives names, else they are called as their files.
        out: where to write: a file, or, if it has no suffix and the base is sharded, `max_shard_size` is given, or the
            method makes a model for each task, a new folder. Nothing is left there if the merge fails.
        max_shard_size: bytes in a shard at most, such as ``"5GB"``; the output is then a folder of shards.
        entry: the state dict to take from checkpoints that hold several, such as ``"model_ema"``.
        **hyperparameters: passed to the method and recorded in the output's metadata.

    Returns:
        The path written.

    Raises:
        CheckpointError: a file is missing or damaged, was changed during the merge, or `out` is one of the inputs.
        KeyError, ValueError: the checkpoints do not fit together, or the method's result does not fit the base or is
            not finite in its dtype; the message names the tensor.
        TypeError: the method does not return one state dict of this architecture.
    """
    if isinstance(experts, str | bytes | os.PathLike):
        raise TypeError(f"experts must be a list of paths, not the single path '{os.fspath(experts)!s}'.")
    paths = [Path(path) for path in (experts.values() if isinstance(experts, Mapping) else experts)]
    names = list(experts) if isinstance(experts, Mapping) else _names_of(paths)
    out, sources = Path(out), [Path(base), *paths]
    opened = [_opened(path, entry, "the base" if i == 0 else names[i - 1]) for i, path in enumerate(sources)]
    shard = None if max_shard_size is None else bytes_in(max_shard_size)
    if shard is None and not out.suffix and isinstance(opened[0], ShardedCheckpoint):
        shard = SHARD
    check_place(out, folder=shard is not None or (out.is_dir() and not out.suffix))
    _refuse_inputs(out, sources, opened)
    tv = TaskVectors(opened[0], opened[1:], names=names or None)
    recipe = {
        "merged_with": f"mergekit_lite.{getattr(method, '__name__', 'method')}",
        "hyperparameters": json.dumps(hyperparameters, default=str),
        "base": sources[0].name,
        "experts": json.dumps([path.name for path in paths]),
    }
    metadata = {**getattr(opened[0], "metadata", {}), **recipe}

    results: list[Weights] = []
    with ExitStack() as stack:

        def stream(pairs: Iterable[tuple[str, Tensor]]) -> Weights:
            """Write what one `map` makes to a file of its own; which of them is the result is known at the end."""
            place = stack.enter_context(temporary_place(out.parent, folder=shard is not None))
            results.append(_write(place, tv.base, tv._tied_to, pairs, metadata, shard))
            return results[-1]

        merged = method(tv._with_collector(stream), **hyperparameters)
        if not isinstance(merged, Mapping):
            raise TypeError(f"{recipe['merged_with']} returned a {type(merged).__name__}, not a state dict.")
        written = any(merged is result for result in results)
        by_task = not written and isinstance(next(iter(merged.values()), None), Mapping)
        if by_task and (out.suffix or shard is not None):
            raise TypeError(
                f"{recipe['merged_with']} makes a model for each task ({', '.join(list(merged)[:3])}, ...), which is "
                "no single file; give a folder as output."
            )
        with atomic_path(out, folder=by_task or shard is not None) as temporary:
            if by_task:
                _write_by_task(temporary, tv, merged, metadata)
            elif isinstance(merged, SafetensorsFile | ShardedCheckpoint) and written:
                _take(merged, temporary)
            else:
                _write_own(temporary, tv, merged, metadata, shard, recipe["merged_with"])
            for weights in opened:
                weights.check()
    return out


def bytes_in(size: int | str) -> int:
    """``"5GB"`` as a number of bytes.

    Raises:
        ValueError: it is no positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(size).strip().upper())
    number = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if number < 1:
        raise ValueError(f"a shard's size is a positive number of bytes, such as 5000000000 or '5GB'; got {size!r}.")
    return number


# ---------------------------------------------------------------- the inputs


def _opened(path: Path, entry: str | None, what: str) -> Weights:
    opened = open_checkpoint(path, entry)
    return opened if isinstance(opened, Weights) else InMemory(opened, f"{what} ('{path}')")


def _names_of(paths: list[Path]) -> list[str]:
    """What experts are called: as their files, if these have different names."""
    stems = [SUFFIXES.sub("", path.name) if SUFFIXES.search(path.name) else path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [f"expert {k}" for k in range(len(paths))]


def _refuse_inputs(out: Path, sources: Iterable[Path], opened: Iterable[Weights]) -> None:
    files = [*sources, *(file for each in opened if isinstance(each, ShardedCheckpoint) for file in each.files)]
    if out.exists() and any(file.exists() and out.samefile(file) for file in files):
        raise CheckpointError(f"the output '{out}' is one of the inputs; write it under another name.")


# ---------------------------------------------------------------- the output


def _write(
    place: Path,
    base: Weights,
    ties: Mapping[str, str],
    pairs: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    shard: int | None,
) -> Weights:
    """Write (name, tensor) pairs, laid out as the base, into a file or a folder of shards; and open it."""
    stored = [name for name in base if ties[name] == name]
    groups = _shards(base, stored, shard) if shard is not None else [stored]
    files = [place / f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    files = files if shard is not None else [place]
    seconds = tied_only(ties)
    with ExitStack() as stack:
        writers: dict[str, TensorWriter] = {}
        for file, group in zip(files, groups, strict=True):
            contents = {name: (base.dtype(name), base.shape(name)) for name in group}
            own = {name: first for name, first in seconds.items() if first in contents}
            writer = stack.enter_context(TensorWriter(file, contents, own, metadata))
            writers |= dict.fromkeys(group, writer)
        for name, tensor in pairs:
            if ties[name] == name:  # a tied name's bytes stand under the first
                writers[name].write(name, tensor)
            del tensor  # it is on disk; the next one needs the memory
    if shard is None:
        return SafetensorsFile(place)
    where = {n: file.name for file, group in zip(files, groups, strict=True) for n in group}
    where |= {name: where[first] for name, first in seconds.items()}
    total = sum(base.shape(n).numel() * base.dtype(n).itemsize for n in stored)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (place / f"model.safetensors{INDEX}").write_text(json.dumps(index, indent=1) + "\n")
    return ShardedCheckpoint(place / f"model.safetensors{INDEX}", lambda path: {})


def _shards(base: Weights, names: Iterable[str], size: int) -> list[list[str]]:
    """The names cut into groups of at most `size` bytes; a larger tensor has a group of its own."""
    groups: list[list[str]] = [[]]
    room = size
    for name in names:
        needed = base.shape(name).numel() * base.dtype(name).itemsize
        if needed > room and groups[-1]:
            groups.append([])
            room = size
        groups[-1].append(name)
        room -= needed
    return groups


def _write_own(
    place: Path,
    tv: TaskVectors,
    merged: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    shard: int | None,
    what: str,
) -> None:
    """Write a state dict that a method built by itself, instead of returning what `map` made."""
    if set(merged) != set(tv.base):
        odd = sorted(set(merged) ^ set(tv.base), key=str)
        raise TypeError(
            f"{what} does not return the base's tensors: {len(odd)} names differ, such as '{odd[0]}'. It must return "
            "one state dict of this architecture."
        )
    for name, tensor in merged.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{what} returned '{name}' as a {type(tensor).__name__}, not a tensor.")
    ties = tied_names(merged)

    def fitting() -> Iterator[tuple[str, Tensor]]:
        for name in tv.base:
            if ties[name] == name:
                yield name, _fitted(name, merged[name], tv, what)

    ordered = {name: ties[name] for name in tv.base}
    _write(place, tv.base, ordered, fitting(), metadata, shard)


def _fitted(name: str, tensor: Tensor, tv: TaskVectors, what: str) -> Tensor:
    """A tensor of a method's own state dict in the base's dtype."""
    shape, dtype = tv.base.shape(name), tv.base.dtype(name)
    if tensor.shape != shape:
        raise ValueError(f"{what} returned '{name}' with shape {tuple(tensor.shape)}; the base has {tuple(shape)}.")
    if tensor.is_complex() or tensor.is_floating_point() != dtype.is_floating_point:
        raise ValueError(f"{what} returned '{name}' as {dtype_name(tensor.dtype)}; the base has {dtype_name(dtype)}.")
    if (
        dtype.is_floating_point
        and not fits_into(tensor, dtype)
        and not tensor.isfinite().eq(tv.base[name].isfinite()).all()
    ):
        raise ValueError(f"{what} returned '{name}' with numbers that are not finite in {dtype_name(dtype)}.")
    return tensor.to(dtype)


def _write_by_task(
    folder: Path, tv: TaskVectors, merged: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """A file for each task of a merge that answers each task with its own model."""
    for task in merged:
        if Path(task).name != task:
            raise ValueError(f"the task '{task}' cannot be the name of a file; give the experts other names.")
        _write_own(
            folder / f"{task}.safetensors", tv, merged[task], {**metadata, "task": task}, None, f"the model of {task}"
        )


def _take(merged: SafetensorsFile | ShardedCheckpoint, place: Path) -> None:
    """Move what `map` has written to its place; nothing is copied."""
    if isinstance(merged, SafetensorsFile):
        merged.close()
        os.replace(merged.path, place)
    else:
        for file in merged.files:
            os.replace(file, place / file.name)
