r"""Task vectors: what fine-tuning added to a model.

A base model with weights :math:`\theta_0` is fine-tuned on K tasks, which gives K experts
:math:`\theta_k`. The task vector of task k is the difference (Ilharco et al., 2023, section 2)

.. math:: \tau_k = \theta_k - \theta_0 .

Every merging method of this package is a function of a `TaskVectors` object: the base together
with the K task vectors, whether they live in memory or in files. It shows them in three ways:

- `layers()` goes through the model tensor by tensor, with the K task vectors stacked;
- `gram()` is the K x K matrix of their inner products, all that many arguments need;
- `map(f)` builds a merged model: :math:`\theta_0 + f(\text{name}, \tau)` in every tensor.

Methods written with these three never hold a whole model, so they also merge files larger than
memory (`mergekit_lite.merge_files`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lite.checkpoints import PathLike, StateDict, open_checkpoint, tied_names

Source = nn.Module | Mapping[str, Tensor] | PathLike
TauFunction = Callable[[str, Tensor], Tensor]
Collector = Callable[[Iterable[tuple[str, Tensor]]], Any]

GRAM_CHUNK = 1 << 14  # columns turned into float64 at a time: they stay in a core's cache


class TaskVectors:
    """A base and K experts, seen as mathematics and stored in any way.

    Args:
        base: the common ancestor: a module, a state dict, or the path of a checkpoint.
        experts: the K fine-tuned models, each a module, state dict or path. A mapping gives names.
        names: one name per expert; by default ``expert 0``, ``expert 1``, ...

    Paths are memory-mapped and read one tensor at a time. Half-precision weights (float16, bfloat16)
    are computed with in float32 and merged tensors are returned in the base's dtype, on the base's
    device. Tensors that are not floating point (step counters, masks) are taken from the base. Names
    tied to one tensor in the base and in every expert count once and stay tied. Inputs are never
    changed.

    Raises:
        ValueError: no experts, names that repeat or do not fit, shapes that differ; and, once the
            tensor is read, NaN or infinite weights.
        KeyError: an expert lacks a tensor of the base or has one more.
        CheckpointError: a file is missing, truncated or not a checkpoint.
        TypeError: an input is none of the accepted kinds, or has complex weights.

    Examples:
        >>> base = {"w": torch.tensor([1.0, 1.0])}
        >>> tv = TaskVectors(base, {"up": {"w": torch.tensor([1.0, 2.0])}, "right": {"w": torch.tensor([3.0, 1.0])}})
        >>> tv.gram()
        tensor([[1., 0.],
                [0., 4.]], dtype=torch.float64)
        >>> tv.map(lambda name, taus: taus.sum(0))
        {'w': tensor([3., 2.])}
    """

    def __init__(
        self,
        base: Source,
        experts: Sequence[Source] | Mapping[str, Source],
        names: Sequence[str] | None = None,
    ) -> None:
        if isinstance(experts, (str, bytes, nn.Module)) or _is_state_dict(experts):
            raise TypeError("experts must be a list of models (or a dict from names to models), not a single model.")
        if isinstance(experts, Mapping):
            names = list(experts) if names is None else names
            experts = list(experts.values())
        if len(experts) == 0:
            raise ValueError("no experts given: a merge needs at least one fine-tuned model.")
        self.names: list[str] = list(names) if names is not None else [f"expert {k}" for k in range(len(experts))]
        if len(self.names) != len(experts) or len(set(self.names)) != len(self.names):
            raise ValueError(f"{len(experts)} experts need as many different names; got {self.names}.")
        self.base: Mapping[str, Tensor] = _open(base)
        self._experts = [_open(expert) for expert in experts]
        for name, expert in zip(self.names, self._experts, strict=True):
            _check_same_keys(self.base, expert, name)
        self._tied_to = _common_ties(self.base, self._experts)
        self._functions: tuple[TauFunction, ...] = ()  # applied to each tensor's taus, in order
        self._collect: Collector = dict

    # ---------------------------------------------------------------- looking at the task vectors

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        tensors = sum(1 for _ in self._float_names())
        return f"TaskVectors({', '.join(self.names)}; {tensors} tensors, {self.dimension:,} weights)"

    @property
    def dimension(self) -> int:
        """d, the number of weights in one task vector."""
        return sum(self.base[name].numel() for name in self._float_names())

    def layers(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield ``(name, theta0, taus)`` for each floating-point tensor, in the base's order.

        ``theta0`` has the tensor's shape and ``taus`` has shape (K, *shape); both are float32
        (float64 for float64 weights). ``theta0`` may share memory with the base: do not change it.
        """
        for name in self._float_names():
            theta0 = _for_computing(self.base[name])
            yield name, theta0, self._taus(name, theta0)

    def gram(self) -> Tensor:
        r"""The K x K matrix :math:`G_{ij} = \langle\tau_i, \tau_j\rangle`, in float64, from one pass."""
        gram: Tensor | None = None
        for _, _, taus in self.layers():
            products = inner_products(taus.flatten(1))
            gram = products if gram is None else gram + products
        if gram is None:
            raise ValueError("these models have no floating-point tensors, so no task vectors.")
        return gram

    def flat(self) -> Tensor:
        """All task vectors as the rows of one (K, d) matrix, in the order of `layers`."""
        return torch.cat([taus.flatten(1) for _, _, taus in self.layers()], dim=1)

    # ---------------------------------------------------------------- building merged models

    def map(self, f: TauFunction) -> StateDict:
        r"""The merged state dict :math:`\theta_0 + f(\text{name}, \tau)`.

        Args:
            f: takes a tensor's name and its task vectors (K, *shape); returns the merged task vector,
                of shape ``shape``. It may overwrite the ``taus`` it was given.

        Returns:
            A state dict with the base's keys in the base's order, its dtypes and its devices.

        Raises:
            ValueError: `f` returned another shape.
        """
        return self._collect(self._merged(f))

    def _merged(self, f: TauFunction) -> Iterator[tuple[str, Tensor]]:
        done: StateDict = {}  # only tensors with a second name are remembered
        shared = {first for name, first in self._tied_to.items() if first != name}
        for name in self.base:
            first = self._tied_to[name]
            if first in done:
                yield name, done[first]
                continue
            original = self.base[name]
            if original.is_floating_point():
                theta0 = _for_computing(original)
                delta = f(name, self._taus(name, theta0))
                if delta.shape != original.shape:
                    raise ValueError(
                        f"the merge of '{name}' has shape {tuple(delta.shape)}; expected {tuple(original.shape)}."
                    )
                merged = (theta0 + delta).to(original.dtype)
                del delta, theta0
            else:
                merged = original.clone()
            if name in shared:
                done[name] = merged
            yield name, merged
            del merged, original  # before the next tensors are read: two large ones never stand side by side

    def add(self, vector: Tensor) -> StateDict:
        r"""The state dict :math:`\theta_0 + v` for one flat vector v of length d, laid out as in `flat`.

        Raises:
            ValueError: the vector is not of length d.
        """
        if vector.shape != (self.dimension,):
            raise ValueError(f"expected a vector of {self.dimension} weights, got shape {tuple(vector.shape)}.")
        names = list(self._float_names())
        parts = vector.split([self.base[name].numel() for name in names])
        lookup = dict(zip(names, parts, strict=True))
        return self.map(lambda name, taus: lookup[name].view(taus.shape[1:]))

    # ---------------------------------------------------------------- arithmetic

    def transform(self, f: TauFunction, names: Sequence[str] | None = None) -> TaskVectors:
        """New task vectors ``f(name, taus)``: trimmed, rotated, reweighted, ...

        Nothing is computed yet: `f` runs each time a tensor is read, so it must be a pure function.

        Args:
            f: takes a tensor's name and its task vectors (K, *shape); returns (K', *shape). It may
                overwrite the ``taus`` it was given.
            names: the names of the K' new task vectors; by default the old ones.
        """
        return self._derived(functions=(*self._functions, f), names=list(names or self.names))

    def __mul__(self, scale: float) -> TaskVectors:
        return self.transform(lambda _, taus: taus.mul_(scale))

    __rmul__ = __mul__

    def __neg__(self) -> TaskVectors:
        return self * -1.0

    def subset(self, which: Iterable[int | str]) -> TaskVectors:
        """The task vectors with these names or positions, in this order.

        Raises:
            KeyError, IndexError: there is no such task vector.
        """
        index = [self._position(item) for item in which]
        if not index:
            raise ValueError("a subset needs at least one task vector.")
        names = [self.names[i] for i in index]
        if self._functions:  # they may mix experts, so they must see all of them first
            return self.transform(lambda _, taus: taus[index], names)
        return self._derived(experts=[self._experts[i] for i in index], names=names)

    def __getitem__(self, item: int | str | slice) -> TaskVectors:
        """One task vector (by position or name) or a slice, as TaskVectors."""
        return self.subset(range(len(self))[item] if isinstance(item, slice) else [item])

    def __iter__(self) -> Iterator[TaskVectors]:
        return (self[k] for k in range(len(self)))

    # ---------------------------------------------------------------- inner workings

    def _taus(self, name: str, theta0: Tensor) -> Tensor:
        """The stacked task vectors of one tensor, checked and transformed."""
        taus = theta0.new_empty((len(self._experts), *theta0.shape))
        for tau, expert, expert_name in zip(taus, self._experts, self._expert_names(), strict=True):
            weights = expert[name]
            if weights.shape != theta0.shape:
                raise ValueError(
                    f"'{name}' has shape {tuple(weights.shape)} in {expert_name} but {tuple(theta0.shape)} in the "
                    "base: these models do not have the same architecture."
                )
            torch.sub(weights.detach().to(theta0), theta0, out=tau)
        # One sum finds NaN and infinity without a temporary of taus' size; on overflow, look again.
        if not torch.isfinite(taus.sum()) and not (finite := torch.isfinite(taus)).all():
            bad = next(k for k in range(len(taus)) if not finite[k].all())
            where = self._expert_names()[bad] if torch.isfinite(theta0).all() else "the base"
            raise ValueError(f"'{name}' holds NaN or infinite weights in {where}: its training diverged?")
        for f in self._functions:
            taus = f(name, taus)
        return taus

    def _expert_names(self) -> list[str]:
        """Names for error messages: those of the sources, which `transform` may have renamed."""
        known = len(self.names) == len(self._experts)
        return self.names if known else [f"expert {k}" for k in range(len(self._experts))]

    def _float_names(self) -> Iterator[str]:
        return (n for n in self.base if self._tied_to[n] == n and self.base[n].is_floating_point())

    def _position(self, item: int | str) -> int:
        if isinstance(item, str):
            if item not in self.names:
                raise KeyError(f"no task vector named '{item}'; there are {', '.join(self.names)}.")
            return self.names.index(item)
        if not -len(self) <= item < len(self):
            raise IndexError(f"no task vector {item}: there are {len(self)}.")
        return item % len(self)

    def _derived(
        self,
        *,
        experts: list[Mapping[str, Tensor]] | None = None,
        functions: tuple[TauFunction, ...] | None = None,
        names: list[str] | None = None,
        collect: Collector | None = None,
    ) -> TaskVectors:
        """A copy that shares the (unchanged) sources."""
        new = object.__new__(TaskVectors)
        new.base, new._tied_to = self.base, self._tied_to
        new.names = self.names if names is None else names
        new._experts = self._experts if experts is None else experts
        new._functions = self._functions if functions is None else functions
        new._collect = self._collect if collect is None else collect
        return new

    def _with_collector(self, collect: Collector) -> TaskVectors:
        """The same task vectors, whose `map` hands its (name, tensor) pairs to `collect`."""
        return self._derived(collect=collect)


def _is_state_dict(source: object) -> bool:
    return isinstance(source, Mapping) and any(isinstance(value, Tensor) for value in source.values())


def _open(source: Source) -> Mapping[str, Tensor]:
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        wrong = [name for name, value in source.items() if not isinstance(value, Tensor)]
        if wrong:
            kind = type(source[wrong[0]]).__name__
            raise TypeError(f"a state dict maps names to tensors, but '{wrong[0]}' is a {kind}.")
        return source
    if isinstance(source, (str, bytes)) or hasattr(source, "__fspath__"):
        return open_checkpoint(source)
    raise TypeError(f"a model is a module, a state dict or the path of a checkpoint, not a {type(source).__name__}.")


def _check_same_keys(base: Mapping[str, Tensor], expert: Mapping[str, Tensor], expert_name: str) -> None:
    missing = [name for name in base if name not in expert]
    extra = [name for name in expert if name not in base]
    for names, what in ((missing, "lacks"), (extra, "has, and the base has not,")):
        if names:
            shown = ", ".join(f"'{name}'" for name in names[:3])
            shown += f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise KeyError(
                f"{expert_name} {what} {shown}. Merge models of one architecture; leave out what is not shared, "
                "such as classification heads."
            )
    if not isinstance(base, dict) or not isinstance(expert, dict):
        return  # the shapes of mapped files are checked as they are read
    for name, tensor in base.items():
        if tensor.is_complex():
            raise TypeError(f"'{name}' is complex; merging is defined for real weights.")
        if tensor.shape != expert[name].shape:
            raise ValueError(
                f"'{name}' has shape {tuple(expert[name].shape)} in {expert_name} but {tuple(tensor.shape)} in the "
                "base: these models do not have the same architecture."
            )


def _common_ties(base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """The first name of each tensor, where base and all experts agree that the names are tied."""
    ties = tied_names(base)
    if all(first == name for name, first in ties.items()):
        return ties
    for expert in experts:
        theirs = tied_names(expert)
        ties = {n: first if theirs[n] == theirs[first] else n for n, first in ties.items()}
    return ties


def inner_products(vectors: Tensor) -> Tensor:
    """The inner products of K vectors (K, d): K x K, in float64, exactly symmetric."""
    chunks = (float64(chunk) for chunk in vectors.split(GRAM_CHUNK, dim=1))
    gram = torch.stack([chunk @ chunk.T for chunk in chunks]).sum(0)
    return (gram + gram.T) / 2


def float64(tensor: Tensor) -> Tensor:
    """The tensor in double precision; on the CPU where its device has none (Apple's MPS)."""
    return tensor.double() if tensor.device.type != "mps" else tensor.cpu().double()


def _for_computing(tensor: Tensor) -> Tensor:
    """float64 as it is, everything else in float32: half precision is too coarse to subtract in."""
    if tensor.is_complex():
        raise TypeError("complex weights cannot be merged; merging is defined for real weights.")
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
