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

Most methods treat every weight by itself. For them there are `pieces()` and `map_pieces(f)`, which
show the K task vectors in pieces small enough for a core's cache: several steps on a piece then
cost hardly more than reading it once, and a merge takes about as long as reading the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mergekit_lite.checkpoints import PathLike, StateDict, open_checkpoint, tied_names

Source = nn.Module | Mapping[str, Tensor] | PathLike
TauFunction = Callable[[str, Tensor], Tensor]
PieceFunction = Callable[["Place", Tensor], Tensor]
Collector = Callable[[Iterable[tuple[str, Tensor]]], Any]

PIECE = 1 << 16  # weights per piece: K = 8 of them in float32 are 2 MB
GRAM_CHUNK = 1 << 14  # columns turned into float64 at a time: they stay in a core's cache


class Place(NamedTuple):
    """Where a piece lies: in which tensor, and how many of that tensor's weights stand before it."""

    name: str
    start: int


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
        # Applied to the task vectors in order, each to whole tensors (False) or to pieces (True).
        self._functions: tuple[tuple[Callable[[Any, Tensor], Tensor], bool], ...] = ()
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

    def pieces(self) -> Iterator[tuple[Place, Tensor]]:
        """Yield ``(place, taus)`` for each piece of each floating-point tensor, in the order of `flat`.

        ``taus`` has shape (K, n), n at most `PIECE`. Its memory is used again for the next piece:
        it may be overwritten, and what should last must be copied. (On an accelerator, where small
        pieces would be slow, a piece is a whole tensor.)
        """
        for place, _, taus in self._pieces():
            yield place, taus

    def gram(self) -> Tensor:
        r"""The K x K matrix :math:`G_{ij} = \langle\tau_i, \tau_j\rangle`, in float64, from one pass."""
        gram: Tensor | None = None
        for _, taus in self.pieces():
            products = inner_products(taus)
            gram = products if gram is None else gram + products
        if gram is None:
            raise ValueError("these models have no floating-point tensors, so no task vectors.")
        return gram

    def flat(self) -> Tensor:
        """All task vectors as the rows of one (K, d) matrix, in the order of `layers`."""
        return torch.cat([taus.clone() for _, taus in self.pieces()], dim=1)

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
        return self._collect(self._merged(lambda name: self._merge_tensor(f, name)))

    def map_pieces(self, f: PieceFunction) -> StateDict:
        r"""`map` for methods that treat every weight by itself: f sees one piece after another.

        Args:
            f: takes a `Place` and a piece of the task vectors (K, n); returns the merged piece (n,). It
                may overwrite the piece it was given.

        Returns:
            As `map`.

        Raises:
            ValueError: `f` returned another shape.
        """
        return self._collect(self._merged(lambda name: self._merge_pieces(f, name)))

    def _merged(self, merge: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        done: StateDict = {}  # only tensors with a second name are remembered
        shared = {first for name, first in self._tied_to.items() if first != name}
        for name in self.base:
            first = self._tied_to[name]
            if first in done:
                yield name, done[first]
                continue
            original = self.base[name]
            merged = merge(name).to(original.dtype) if original.is_floating_point() else original.clone()
            if name in shared:
                done[name] = merged
            yield name, merged
            del merged, original  # before the next tensors are read: two large ones never stand side by side

    def _merge_tensor(self, f: TauFunction, name: str) -> Tensor:
        theta0 = _for_computing(self.base[name])
        delta = f(name, self._taus(name, theta0))
        _check_shape(name, delta, theta0.shape)
        return theta0 + delta

    def _merge_pieces(self, f: PieceFunction, name: str) -> Tensor:
        base = self.base[name]
        merged = base.new_empty(base.shape, dtype=_computing_dtype(base))
        for place, theta0, taus in self._pieces([name]):
            delta = f(place, taus)
            _check_shape(name, delta, theta0.shape)
            torch.add(theta0, delta, out=merged.view(-1)[place.start : place.start + len(theta0)])
        return merged

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
        return self.map_pieces(lambda place, taus: lookup[place.name][place.start :][: taus.shape[1]])

    # ---------------------------------------------------------------- arithmetic

    def transform(self, f: TauFunction, names: Sequence[str] | None = None) -> TaskVectors:
        """New task vectors ``f(name, taus)``: trimmed, rotated, reweighted, ...

        Nothing is computed yet: `f` runs each time a tensor is read, so it must be a pure function.

        Args:
            f: takes a tensor's name and its task vectors (K, *shape); returns (K', *shape). It may
                overwrite the ``taus`` it was given.
            names: the names of the K' new task vectors; by default the old ones.
        """
        return self._derived(functions=(*self._functions, (f, False)), names=list(names or self.names))

    def transform_pieces(self, f: PieceFunction, names: Sequence[str] | None = None) -> TaskVectors:
        """`transform` for what treats every weight by itself: trimming, masking, scaling, ...

        Args:
            f: takes a `Place` and a piece of the task vectors (K, n); returns (K', n). It may overwrite the
                piece it was given. The pieces are the same in every pass, so a random `f` is pure if it
                seeds its generator by the place.
            names: the names of the K' new task vectors; by default the old ones.
        """
        return self._derived(functions=(*self._functions, (f, True)), names=list(names or self.names))

    def __mul__(self, scale: float) -> TaskVectors:
        return self.transform_pieces(lambda _, taus: taus.mul_(scale))

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
            return self.transform_pieces(lambda _, taus: taus[index], names)
        return self._derived(experts=[self._experts[i] for i in index], names=names)

    def __getitem__(self, item: int | str | slice) -> TaskVectors:
        """One task vector (by position or name) or a slice, as TaskVectors."""
        return self.subset(range(len(self))[item] if isinstance(item, slice) else [item])

    def __iter__(self) -> Iterator[TaskVectors]:
        return (self[k] for k in range(len(self)))

    # ---------------------------------------------------------------- inner workings

    def _taus(self, name: str, theta0: Tensor) -> Tensor:
        """The stacked task vectors of one tensor, checked and transformed."""
        experts = (self._weights(name, k, theta0) for k in range(len(self._experts)))
        taus = self._subtract(name, theta0, experts, out=theta0.new_empty((len(self._experts), *theta0.shape)))
        for f, by_pieces in self._functions:
            taus = _in_pieces(f, name, taus) if by_pieces else f(name, taus)
        return taus

    def _pieces(self, names: Iterable[str] | None = None) -> Iterator[tuple[Place, Tensor, Tensor]]:
        """Yield ``(place, theta0, taus)``, of shapes (n,) and (K, n), checked and transformed."""
        transformed_whole = not all(by_pieces for _, by_pieces in self._functions)
        room: Tensor | None = None  # the memory of one piece, used for all of them
        for name in self._float_names() if names is None else names:
            theta0 = _for_computing(self.base[name])
            if transformed_whole:
                taus = _rows(self._taus(name, theta0))
                for place, piece in _places(name, theta0):
                    yield place, theta0.flatten()[piece], taus[:, piece]
                continue
            experts = [self._weights(name, k, theta0).flatten() for k in range(len(self._experts))]
            if room is None or room.dtype != theta0.dtype or room.shape[1] < _size(theta0):
                room = theta0.new_empty((len(experts), _size(theta0)))
            for place, piece in _places(name, theta0):
                part = theta0.flatten()[piece]
                taus = self._subtract(name, part, [expert[piece] for expert in experts], out=room[:, : len(part)])
                for f, _ in self._functions:
                    taus = f(place, taus)
                yield place, part, taus

    def _weights(self, name: str, k: int, theta0: Tensor) -> Tensor:
        """One tensor of expert k, which must have the base's shape."""
        weights = self._experts[k][name]
        if weights.shape != theta0.shape:
            raise ValueError(
                f"'{name}' has shape {tuple(weights.shape)} in {self._expert_names()[k]} but {tuple(theta0.shape)} in "
                "the base: these models do not have the same architecture."
            )
        return weights.detach()

    def _subtract(self, name: str, theta0: Tensor, experts: Iterable[Tensor], out: Tensor) -> Tensor:
        """Write the task vectors of (a piece of) a tensor into `out`; all weights must be finite."""
        for tau, weights in zip(out, experts, strict=True):
            torch.sub(weights.to(theta0), theta0, out=tau)
        # One sum finds NaN and infinity without a temporary of taus' size; on overflow, look again.
        if not torch.isfinite(out.sum()) and not (finite := torch.isfinite(out)).all():
            bad = next(k for k in range(len(out)) if not finite[k].all())
            where = self._expert_names()[bad] if torch.isfinite(theta0).all() else "the base"
            raise ValueError(f"'{name}' holds NaN or infinite weights in {where}: its training diverged?")
        return out

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
        functions: tuple[tuple[Callable[[Any, Tensor], Tensor], bool], ...] | None = None,
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


def _check_shape(name: str, delta: Tensor, shape: torch.Size) -> None:
    if delta.shape != shape:
        raise ValueError(f"the merge of '{name}' has shape {tuple(delta.shape)}; expected {tuple(shape)}.")


def _size(theta0: Tensor) -> int:
    """How many weights there are in a piece."""
    return PIECE if theta0.device.type == "cpu" else max(1, theta0.numel())


def _places(name: str, theta0: Tensor) -> Iterator[tuple[Place, slice]]:
    """The pieces of a tensor, and where they lie in the flattened tensor."""
    for start in range(0, theta0.numel(), _size(theta0)):
        yield Place(name, start), slice(start, start + _size(theta0))


def _rows(taus: Tensor) -> Tensor:
    """(K, *shape) as (K, n), also where there is no axis or no entry."""
    return taus[:, None] if taus.ndim == 1 else taus.flatten(1)


def _in_pieces(f: PieceFunction, name: str, taus: Tensor) -> Tensor:
    """A function of pieces applied to a whole tensor (K, *shape): (K', *shape)."""
    flat = _rows(taus)
    done = [f(place, flat[:, piece]) for place, piece in _places(name, taus[0])]
    return torch.cat(done, dim=1).view(-1, *taus.shape[1:]) if done else taus


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
    return tensor.detach().to(_computing_dtype(tensor))


def _computing_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
