"""What can be a model: a module, a state dict, or a checkpoint in any form (`mergekit_lite.checkpoints`).

Names are made to agree where a wrapper has put a prefix before all of them: ``module.`` (DataParallel), ``_orig_mod.``
(`torch.compile`), ``model.`` (Lightning), ``vit.``, and any other. What is done is said.

A model in memory may change after it was opened: a training loop goes on, or a merge is loaded into the base. A module
that serves as base is therefore copied; of everything else each tensor's version is remembered and compared.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from os import PathLike as OsPath

import torch
from torch import Tensor, nn

from mergekit_lite.checkpoints import open_checkpoint
from mergekit_lite.roles import dtype_name
from mergekit_lite.types import PathLike, ReadFlat, StateDict, Weights, say
from mergekit_lite.writing import check_storage, tied_names

Source = nn.Module | Mapping[str, Tensor] | PathLike


class InMemory(Weights):
    """A state dict, whose tensors must stay as they are.

    Args:
        state: names to tensors.
        what: its name in messages.
    """

    def __init__(self, state: Mapping[str, Tensor], what: str) -> None:
        self._state, self._what = dict(state), what
        self._ties = tied_names(self._state)
        self._versions = {name: _version(tensor) for name, tensor in self._state.items()}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        if _version(tensor) != self._versions[name]:
            raise ValueError(
                f"'{name}' of {self._what} was changed after the task vectors were made, so they are no longer what "
                "they were. Give TaskVectors a copy (copy.deepcopy), and load merges into another module."
            )
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def shape(self, name: str) -> torch.Size:
        """As `Weights.shape`."""
        return self._state[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """As `Weights.dtype`."""
        return self._state[name].dtype

    def device(self, name: str) -> torch.device:
        """As `Weights.device`."""
        return self._state[name].device

    def flat(self, name: str) -> ReadFlat:
        """As `Weights.flat`; another layout (channels last, transposed) is turned once, not part by part."""
        whole = self[name].detach().reshape(-1)
        return lambda start, stop: whole[start:stop]

    def ties(self) -> dict[str, str]:
        """As `Weights.ties`."""
        return self._ties

    def check(self) -> None:
        """As `Weights.check`."""
        for name in self:
            self[name]

    def __reduce__(self) -> tuple[type[InMemory], tuple[StateDict, str]]:
        self.check()  # a copy's tensors have versions of their own
        return InMemory, (self._state, self._what)


class Renamed(Weights):
    """The same tensors under other names.

    Args:
        weights: under their own names.
        names: own names by new ones; what is not mentioned is left out.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self._weights, self._names = weights, dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> torch.Size:
        """As `Weights.shape`."""
        return self._weights.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """As `Weights.dtype`."""
        return self._weights.dtype(self._names[name])

    def device(self, name: str) -> torch.device:
        """As `Weights.device`."""
        return self._weights.device(self._names[name])

    def flat(self, name: str) -> ReadFlat:
        """As `Weights.flat`."""
        return self._weights.flat(self._names[name])

    def ties(self) -> dict[str, str]:
        """As `Weights.ties`."""
        ties, firsts = self._weights.ties(), dict[str, str]()
        return {new: firsts.setdefault(ties[old], new) for new, old in self._names.items()}

    def check(self) -> None:
        """As `Weights.check`."""
        self._weights.check()


def open_source(source: Source, what: str, *, copy: bool = False, entry: str | None = None) -> Weights:
    """A model of any kind as tensors by name.

    Args:
        source: a module, a state dict, or the path of a checkpoint.
        what: its name in messages, such as "the base".
        copy: copy a module's weights, so that it may be used for other things meanwhile.
        entry: the state dict to take in a checkpoint that holds several.

    Raises:
        TypeError: it is none of these, or holds something that is no plain tensor.
        CheckpointError: a file cannot be read.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        state = _checked(source.state_dict(), what)
        return InMemory(_copied(state) if copy else state, what)
    if isinstance(source, Mapping):
        return InMemory(_checked(source, what), what)
    if isinstance(source, str | OsPath):
        opened = open_checkpoint(source, entry)
        return opened if isinstance(opened, Weights) else InMemory(opened, f"{what} ('{source}')")
    raise TypeError(f"a model is a module, a state dict or the path of a checkpoint, not a {type(source).__name__}.")


def is_state_dict(source: object) -> bool:
    """Whether this maps names to tensors."""
    return isinstance(source, Mapping) and any(isinstance(value, Tensor) for value in source.values())


def _checked(state: Mapping[str, object], what: str) -> StateDict:
    checked = StateDict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            packed = " It belongs to quantised weights; merge those it was made from." if "_packed" in str(name) else ""
            raise TypeError(
                f"a state dict maps names to tensors, but '{name}' is a {type(value).__name__} in {what}.{packed}"
                + ("" if packed else " Leave it out: {n: t for n, t in state.items() if isinstance(t, torch.Tensor)}.")
            )
        check_storage(name, value)
        checked[name] = value
    return checked


def _copied(state: StateDict) -> StateDict:
    copies = StateDict()
    for name, first in tied_names(state).items():
        copies[name] = copies[first] if first in copies else state[name].detach().clone()
    return copies


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


# ---------------------------------------------------------------- an expert beside its base


def beside(base: Weights, expert: Weights, what: str) -> Weights:
    """An expert under the base's names, in the base's shapes and kinds of numbers.

    Args:
        base: the common ancestor.
        expert: a model with the same tensors, with a prefix before its names or without.
        what: the expert's name in messages.

    Raises:
        KeyError: names do not agree, with any prefix.
        ValueError: shapes do not agree, or one has floating-point numbers where the other has whole ones.
    """
    expert = _under_the_bases_names(base, expert, what)
    for name in base:
        if name not in expert:
            continue  # a counter that old checkpoints do not have
        if expert.shape(name) != base.shape(name):
            raise ValueError(
                f"'{name}' has shape {tuple(expert.shape(name))} in {what} but {tuple(base.shape(name))} in the "
                "base: these models do not have the same architecture."
            )
        theirs, ours = expert.dtype(name), base.dtype(name)
        if theirs.is_floating_point != ours.is_floating_point:
            raise ValueError(
                f"'{name}' has the dtype {dtype_name(theirs)} in {what} but {dtype_name(ours)} in the base: integer "
                "and floating-point numbers cannot be merged. Is one of them quantised?"
            )
    return expert


def _under_the_bases_names(base: Weights, expert: Weights, what: str) -> Weights:
    ours, theirs = _needed(base), _needed(expert)
    if ours <= set(expert) and theirs <= set(base):
        return expert if set(base) == set(expert) else Renamed(expert, {n: n for n in base if n in expert})
    for add, drop in _prefixes(ours, theirs):
        names = {add + name[len(drop) :]: name for name in expert if name.startswith(drop)}
        if (add or drop) and ours <= set(names) and theirs <= {names.get(new) for new in base}:
            done = " and ".join(
                text for text, p in ((f"the prefix '{drop}' is dropped", drop), (f"'{add}' is put first", add)) if p
            )
            say("names of %s: %s.", what, done)
            return Renamed(expert, {new: names[new] for new in base if new in names})
    missing = [name for name in base if name in ours and name not in expert]
    extra = [name for name in expert if name in theirs and name not in base]
    parts = [
        f"{verb} {_some(names)}" for names, verb in ((missing, "lacks"), (extra, "has, and the base has not,")) if names
    ]
    nearest = ""
    if missing and extra:
        here = missing[0]
        there = (difflib.get_close_matches(here, extra[:5000], n=1, cutoff=0.0) or extra)[0]
        nearest = f" (Nearest: '{here}' in the base, '{there}' in {what}; no prefix makes all names agree.)"
    raise KeyError(
        f"{what} {' and '.join(parts)}.{nearest} Merge models of one architecture; leave out what is not shared, such "
        "as classification heads."
    )


def _needed(weights: Weights) -> set[str]:
    """The names that both sides must have: all but those of counters, which are the base's anyway."""
    return {name for name in weights if weights.dtype(name).is_floating_point or weights.dtype(name).is_complex}


def _prefixes(ours: set[str], theirs: set[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a prefix to put before the expert's names and one to drop from them, by which names could agree."""
    if not ours or not theirs:
        return
    one, other = min(ours, key=len), min(theirs, key=len)
    yield from (("", name[: -len(one)]) for name in theirs if name.endswith("." + one))
    yield from ((name[: -len(other)], "") for name in ours if name.endswith("." + other))
    yield _shared(ours), _shared(theirs)


def _shared(names: set[str]) -> str:
    """The dotted prefix that all names share."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind(".", 0, same) + 1]


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
