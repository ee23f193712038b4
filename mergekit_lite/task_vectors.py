r"""Task vectors: what fine-tuning added to a model.

A base model with weights :math:`\theta_0` is fine-tuned on K tasks, which gives K experts
:math:`\theta_k`. The task vector of task k is the difference (Ilharco et al., 2023, section 2)

.. math:: \tau_k = \theta_k - \theta_0 .

Every merging method of this package is a function of a `TaskVectors` object: the base together
with the K task vectors, whether they live in memory or in files. It shows them in three ways:

- `layers()` goes through the weights tensor by tensor, with the K task vectors stacked;
- `gram()` is the K x K matrix of their inner products, all that many arguments need;
- `map(f)` builds a merged model: :math:`\theta_0 + f(\text{name}, \tau)` in every tensor.

Methods written with these three never hold a whole model, so they also merge files larger than
memory (`mergekit_lite.merge_files`).

Most methods treat every weight by itself. For them there are `pieces()` and `map_pieces(f)`, which
show the K task vectors in pieces small enough for a core's cache: several steps on a piece then
cost hardly more than reading it once, and a merge takes about as long as reading the files.

Not every tensor holds weights. Running statistics of normalisation, counters and masks stand outside all of this: they
have no part in `layers`, `gram` and `flat`, and `map` treats them by their role (`mergekit_lite.roles`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lite.numerics.precision import (
    all_finite,
    computing_dtype,
    fits_into,
    float64,
    inner_products,
)
from mergekit_lite.pieces import PIECE, PieceFunction, Place, in_pieces, places, rows, size_of_piece
from mergekit_lite.registry import running_method
from mergekit_lite.roles import REMEDY, VARIANCE, Role, Roles, dtype_name, roles_of
from mergekit_lite.sources import Source, beside, is_state_dict, open_source
from mergekit_lite.types import StateDict, Weights

__all__ = [
    "PIECE",
    "PieceFunction",
    "Place",
    "Source",
    "TaskVectors",
    "TauFunction",
    "float64",
    "inner_products",
]

TauFunction = Callable[[str, Tensor], Tensor]
Collector = Callable[[Iterable[tuple[str, Tensor]]], Any]
Shares = Sequence[float] | Tensor


class TaskVectors:
    """A base and K experts, seen as mathematics and stored in any way.

    Args:
        base: the common ancestor: a module, a state dict, or the path of a checkpoint.
        experts: the K fine-tuned models, each a module, state dict or path. A mapping gives names.
        names: one name per expert; by default ``expert 0``, ``expert 1``, ...

    Checkpoints are files of safetensors, folders of shards, or what ``torch.save`` wrote (`mergekit_lite.checkpoints`);
    safetensors are read one tensor at a time. A prefix that a wrapper has put before all names is dropped.
    Half-precision weights (float16, bfloat16) are computed with in float32, and merged tensors are returned in the
    base's dtype, on the base's device, and finite. Names tied to one tensor in the base and in every expert count once
    and stay tied. Inputs are never changed; where one changes while it is in use, that is said.

    Raises:
        ValueError: no experts, names that repeat or do not fit, shapes that differ, quantised weights or adapters; and,
            once the tensor is read, NaN or infinite weights, or a model that has changed.
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
        experts: Mapping[str, Source] | Iterable[Source],
        names: Sequence[str] | None = None,
    ) -> None:
        if isinstance(experts, str | bytes | nn.Module) or is_state_dict(experts) or hasattr(experts, "__fspath__"):
            raise TypeError("experts must be a list of models (or a dict from names to models), not a single model.")
        if isinstance(experts, Mapping):
            names = list(experts) if names is None else names
            experts = experts.values()
        try:
            models = list(experts)
        except TypeError:
            raise TypeError(f"experts must be a list of models, not a {type(experts).__name__}.") from None
        if len(models) == 0:
            raise ValueError("no experts given: a merge needs at least one fine-tuned model.")
        self.names: list[str] = list(names) if names is not None else [f"expert {k}" for k in range(len(models))]
        if len(self.names) != len(models) or len(set(self.names)) != len(self.names):
            raise ValueError(f"{len(models)} experts need as many different names; got {self.names}.")
        self.base: Weights = open_source(base, "the base", copy=True)
        self._roles = roles_of(self.base, "the base")
        self._experts: list[Weights] = []
        for name, model in zip(self.names, models, strict=True):
            opened = open_source(model, name)
            roles_of(opened, name)  # says what cannot be merged
            self._experts.append(beside(self.base, opened, name))
        self._tied_to = _common_ties(self.base, self._experts)
        # Applied to the task vectors in order, each to whole tensors (False) or to pieces (True).
        self._functions: tuple[tuple[Callable[[Any, Tensor], Tensor], bool], ...] = ()
        self._collect: Collector = dict
        # How much each expert counts in the mean of statistics; all zero leaves the base's.
        self._shares = torch.ones(len(models), dtype=torch.float64)

    # ---------------------------------------------------------------- looking at the task vectors

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        others = Roles(
            {n: role for n, role in self._roles.items() if role != "weight" and self._tied_to[n] == n}
        ).count()
        besides = ", ".join(f"{count} {role}{'s' if count > 1 else ''}" for role, count in others.items())
        tensors = len(self.tensor_names)
        return (
            f"TaskVectors({', '.join(self.names)}; {tensors} tensors, {self.dimension:,} weights"
            + (f"; besides {besides}" if besides else "")
            + ")"
        )

    @property
    def dimension(self) -> int:
        """d, the number of weights in one task vector."""
        return sum(self.base.shape(name).numel() for name in self.tensor_names)

    @property
    def tensor_names(self) -> list[str]:
        """The names of the tensors of weights, in the base's order; of tied ones the first."""
        return [name for name, role in self._roles.items() if role == "weight" and self._tied_to[name] == name]

    def role(self, name: str) -> Role:
        """What a tensor is for (`mergekit_lite.roles`), as its name, its dtype and its neighbours show it.

        Raises:
            KeyError: there is no such tensor.
        """
        return self._roles[name]

    def roles(self) -> Roles:
        """All tensors' roles, constants included: every model is read once to find them. A table in Jupyter."""
        found = Roles(self._roles)
        for name, role in self._roles.items():
            if role == "weight" and self._is_constant(name):
                found[name] = "constant"
        return found

    def layers(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield ``(name, theta0, taus)`` for each tensor of weights, in the base's order.

        ``theta0`` has the tensor's shape and ``taus`` has shape (K, *shape); both are float32
        (float64 for float64 weights). ``theta0`` may share memory with the base: do not change it.
        """
        for name in self.tensor_names:
            theta0 = self._theta0(name)
            yield name, theta0, self._taus(name, theta0)

    def pieces(self) -> Iterator[tuple[Place, Tensor]]:
        """Yield ``(place, taus)`` for each piece of each tensor of weights, in the order of `flat`.

        ``taus`` has shape (K, n), n at most `PIECE`. Its memory is used again for the next piece:
        it may be overwritten, and what should last must be copied. (On an accelerator, where small
        pieces would be slow, a piece is a whole tensor.)
        """
        for place, _, taus in self._pieces():
            yield place, taus

    def gram(self) -> Tensor:
        r"""The K x K matrix :math:`G_{ij} = \langle\tau_i, \tau_j\rangle`, in float64, from one pass.

        Raises:
            ValueError: there are no weights.
        """
        gram: Tensor | None = None
        for _, taus in self.pieces():
            products = inner_products(taus)
            gram = products if gram is None else gram + products
        if gram is None:
            raise ValueError("these models have no floating-point tensors with weights, so no task vectors.")
        return gram

    def flat(self) -> Tensor:
        """All task vectors as the rows of one (K, d) matrix, in the order of `layers`."""
        parts = [taus.clone() for _, taus in self.pieces()]
        return torch.cat(parts, dim=1) if parts else torch.zeros(len(self), 0)

    # ---------------------------------------------------------------- building merged models

    def map(self, f: TauFunction, *, shares: Shares | None = None) -> StateDict:
        r"""The merged state dict :math:`\theta_0 + f(\text{name}, \tau)`.

        Args:
            f: takes a tensor's name and its task vectors (K, *shape); returns the merged task vector,
                of shape ``shape``. It may overwrite the ``taus`` it was given. It is asked about weights alone.
            shares: K numbers, how much each expert counts in the mean of running statistics (or K + 1, the base's
                first); by default the experts all count the same. Negative ones count as 0; if none is positive the
                base's statistics are kept.

        Returns:
            A state dict with the base's keys in the base's order, its dtypes and its devices; all numbers are finite.

        Raises:
            ValueError: `f` returned another shape, or the merge is not finite in the base's dtype.
        """
        return self._collect(self._merged(lambda name: self._merge_tensor(f, name), shares))

    def map_pieces(self, f: PieceFunction, *, shares: Shares | None = None) -> StateDict:
        r"""`map` for methods that treat every weight by itself: f sees one piece after another.

        Args:
            f: takes a `Place` and a piece of the task vectors (K, n); returns the merged piece (n,). It
                may overwrite the piece it was given.
            shares: as for `map`.

        Returns:
            As `map`.

        Raises:
            ValueError: as `map`.
        """
        return self._collect(self._merged(lambda name: self._merge_pieces(f, name), shares))

    def others(self, *, shares: Shares | None = None) -> StateDict:
        """What a merge has besides weights: statistics, counters and so on, as `map` returns them.

        Args:
            shares: as for `map`.
        """
        share = self._statistic_shares(shares)
        return {name: self._other(name, share) for name in self.base if self._roles[name] != "weight"}

    def _merged(self, merge: Callable[[str], Tensor], shares: Shares | None) -> Iterator[tuple[str, Tensor]]:
        done: StateDict = {}  # only tensors with a second name are remembered
        shared = {first for name, first in self._tied_to.items() if first != name}
        share = self._statistic_shares(shares)
        for name in self.base:
            first = self._tied_to[name]
            if first in done:
                yield name, done[first]
                continue
            merged = merge(name) if self._roles[name] == "weight" else self._other(name, share)
            if name in shared:
                done[name] = merged
            yield name, merged
            del merged  # before the next tensors are read: two large ones never stand side by side

    def _merge_tensor(self, f: TauFunction, name: str) -> Tensor:
        theta0 = self._theta0(name)
        delta = f(name, self._taus(name, theta0))
        _check_merge(name, delta, theta0.shape)
        return self._brought_back(name, theta0 + delta, theta0)

    def _merge_pieces(self, f: PieceFunction, name: str) -> Tensor:
        merged = torch.empty(self.base.shape(name), dtype=self.base.dtype(name), device=self.base.device(name))
        flat = merged.view(-1)
        for place, theta0, taus in self._pieces([name]):
            delta = f(place, taus)
            _check_merge(name, delta, theta0.shape)
            flat[place.start : place.start + len(theta0)] = self._brought_back(name, theta0 + delta, theta0)
        return merged

    def _brought_back(self, name: str, merged: Tensor, theta0: Tensor) -> Tensor:
        """What a method made of (a piece of) a tensor, in the base's dtype and finite: the one place that casts."""
        dtype = self.base.dtype(name)
        if not fits_into(merged, dtype):
            kept = torch.isfinite(theta0)  # a constant's -inf stays what it is
            merged = torch.where(kept, merged, theta0)
            if not fits_into(merged[kept], dtype):
                raise ValueError(
                    f"the merge of '{name}' by {running_method()} is not finite in {dtype_name(dtype)} (largest "
                    f"magnitude {merged[kept].abs().max().item():.3g}): try a smaller scale, or a base in float32."
                )
        return merged.to(dtype)

    def add(self, vector: Tensor) -> StateDict:
        r"""The state dict :math:`\theta_0 + v` for one flat vector v of length d, laid out as in `flat`.

        Raises:
            ValueError: the vector is not of length d.
        """
        if vector.shape != (self.dimension,):
            raise ValueError(f"expected a vector of {self.dimension} weights, got shape {tuple(vector.shape)}.")
        names = self.tensor_names
        parts = vector.split([self.base.shape(name).numel() for name in names])
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
        scaled = self.transform_pieces(lambda _, taus: taus.mul_(scale))
        if not scale > 0:  # an expert that is taken away lends no statistics
            scaled._shares = torch.zeros_like(self._shares)
        return scaled

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
            chosen = self.transform_pieces(lambda _, taus: taus[index], names)
            if len(self) == len(self._experts):
                chosen._shares = torch.zeros_like(self._shares)
                chosen._shares[index] = self._shares[index]
            return chosen
        return self._derived(experts=[self._experts[i] for i in index], names=names, shares=self._shares[index])

    def __getitem__(self, item: int | str | slice) -> TaskVectors:
        """One task vector (by position or name) or a slice, as TaskVectors."""
        return self.subset(range(len(self))[item] if isinstance(item, slice) else [item])

    def __iter__(self) -> Iterator[TaskVectors]:
        return (self[k] for k in range(len(self)))

    # ---------------------------------------------------------------- inner workings

    def _theta0(self, name: str) -> Tensor:
        return self.base[name].detach().to(computing_dtype(self.base.dtype(name)))

    def _taus(self, name: str, theta0: Tensor) -> Tensor:
        """The stacked task vectors of one tensor, checked and transformed."""
        experts = (expert[name].detach() for expert in self._experts)
        out = theta0.new_empty((len(self._experts), *theta0.shape))
        taus = self._subtract(name, theta0, experts, out=out)
        for f, by_pieces in self._functions:
            taus = in_pieces(f, name, taus) if by_pieces else f(name, taus)
        return taus

    def _pieces(self, names: Iterable[str] | None = None) -> Iterator[tuple[Place, Tensor, Tensor]]:
        """Yield ``(place, theta0, taus)``, of shapes (n,) and (K, n), checked and transformed."""
        transformed_whole = not all(by_pieces for _, by_pieces in self._functions)
        room: Tensor | None = None  # the memory of one piece, used for all of them
        for name in self.tensor_names if names is None else names:
            weights, device = self.base.shape(name).numel(), self.base.device(name)
            if transformed_whole:
                whole = self._theta0(name)
                taus, whole = rows(self._taus(name, whole)), whole.reshape(-1)
                for place, stop in places(name, weights, device):
                    yield place, whole[place.start : stop], taus[:, place.start : stop]
                continue
            dtype, size = computing_dtype(self.base.dtype(name)), min(weights, size_of_piece(weights, device))
            if room is None or room.dtype != dtype or room.shape[1] < size or room.device != device:
                room = torch.empty((len(self._experts), size), dtype=dtype, device=device)
            base, experts = self.base.flat(name), [expert.flat(name) for expert in self._experts]
            for place, stop in places(name, weights, device):
                start, n = place.start, stop - place.start
                theta0 = base(start, stop).to(dtype)
                taus = self._subtract(name, theta0, (read(start, stop) for read in experts), out=room[:, :n])
                for f, _ in self._functions:
                    taus = f(place, taus)
                yield place, theta0, taus

    def _subtract(self, name: str, theta0: Tensor, experts: Iterable[Tensor], out: Tensor) -> Tensor:
        """Write the task vectors of (a piece of) a tensor into `out`; all weights must be finite."""
        for tau, weights in zip(out, experts, strict=True):
            torch.sub(weights.to(theta0), theta0, out=tau)
        if not all_finite(out):
            if not self._is_constant(name):
                raise ValueError(self._why_not_finite(name))
            out[:, ~torch.isfinite(theta0)] = 0  # -inf in a mask, minus itself
        return out

    def _why_not_finite(self, name: str) -> str:
        base = self.base[name]
        if not torch.isfinite(base).all():
            return f"'{name}' holds NaN or infinite weights in the base: its training diverged?"
        for k, expert in enumerate(self._experts):
            if not torch.isfinite(expert[name]).all():
                return f"'{name}' holds NaN or infinite weights in {self._expert_names()[k]}: its training diverged?"
        return f"'{name}' differs from the base by more than {dtype_name(computing_dtype(base.dtype))} can hold."

    def _is_constant(self, name: str) -> bool:
        """Whether a tensor is the same in the base and in every expert, with the same infinities but no NaN."""
        base = self.base[name]
        return all(torch.equal(expert[name].to(base), base) for expert in self._experts if name in expert)

    def _statistic_shares(self, shares: Shares | None) -> Tensor:
        """Non-negative numbers that sum to 1, or all 0, by which the experts' statistics are averaged."""
        own, rest = self._shares, 0.0
        if shares is not None:
            given = torch.as_tensor(shares, dtype=torch.float64).cpu().clamp(min=0)
            if len(given) == len(own) + 1:
                rest, given = float(given[0]), given[1:]
            own = own * given if len(given) == len(own) else own  # else a transformation has made other task vectors
        total = own.sum() + rest
        return own / total if total > 0 else own

    def _other(self, name: str, share: Tensor) -> Tensor:
        """A tensor that is no weight, as it will be in the merge."""
        role, base = self._roles[name], self.base[name].detach()
        if role == "statistic":
            return self._mean_statistic(name, base, share)
        if role in REMEDY and not self._is_constant(name):
            raise ValueError(f"'{name}' differs between the models, and is {REMEDY[role]}.")
        return base.clone()

    def _mean_statistic(self, name: str, base: Tensor, share: Tensor) -> Tensor:
        theta0 = self._theta0(name)
        models = torch.stack([theta0, *(expert[name].detach().to(theta0) for expert in self._experts)])
        if not all_finite(models):
            raise ValueError(self._why_not_finite(name))
        if VARIANCE.search(name) and (models < 0).any():
            bad = (
                int((models < 0).flatten(1).any(1).nonzero()[0]) if models.ndim > 1 else int((models < 0).nonzero()[0])
            )
            where = "the base" if bad == 0 else self._expert_names()[bad - 1]
            raise ValueError(f"'{name}' holds negative variances in {where}: it was merged by other means, or damaged.")
        # As θ0 + Σ w τ, so that what no expert has changed stays as it is; rounding must not leave the models' range.
        merged = theta0 + torch.tensordot(share.to(theta0), models[1:] - theta0, dims=1)
        merged = merged.clamp(models.amin(0), models.amax(0))
        return self._brought_back(name, merged, theta0)

    def _expert_names(self) -> list[str]:
        """Names for error messages: those of the sources, which `transform` may have renamed."""
        known = len(self.names) == len(self._experts)
        return self.names if known else [f"expert {k}" for k in range(len(self._experts))]

    def _position(self, item: int | str) -> int:
        if isinstance(item, str):
            if item not in self.names:
                raise KeyError(f"no task vector named '{item}'; there are {', '.join(self.names)}.")
            return self.names.index(item)
        if not hasattr(item, "__index__"):
            raise TypeError(f"a task vector is chosen by its name or its position, not by a {type(item).__name__}.")
        if not -len(self) <= item < len(self):
            raise IndexError(f"no task vector {item}: there are {len(self)}.")
        return item % len(self)

    def _derived(
        self,
        *,
        experts: list[Weights] | None = None,
        functions: tuple[tuple[Callable[[Any, Tensor], Tensor], bool], ...] | None = None,
        names: list[str] | None = None,
        collect: Collector | None = None,
        shares: Tensor | None = None,
    ) -> TaskVectors:
        """A copy that shares the (unchanged) sources."""
        new = object.__new__(TaskVectors)
        new.base, new._tied_to, new._roles = self.base, self._tied_to, self._roles
        new.names = self.names if names is None else names
        new._experts = self._experts if experts is None else experts
        new._functions = self._functions if functions is None else functions
        new._collect = self._collect if collect is None else collect
        new._shares = self._shares if shares is None else shares
        return new

    def _with_collector(self, collect: Collector) -> TaskVectors:
        """The same task vectors, whose `map` hands its (name, tensor) pairs to `collect`."""
        return self._derived(collect=collect)


def _common_ties(base: Weights, experts: Sequence[Weights]) -> dict[str, str]:
    """The first name of each tensor, where base and all experts agree that the names are tied."""
    ties = base.ties()
    if all(first == name for name, first in ties.items()):
        return ties
    for expert in experts:
        theirs = expert.ties()
        ties = {n: first if theirs.get(n) == theirs.get(first) else n for n, first in ties.items()}
    return ties


def _check_merge(name: str, delta: Tensor, shape: torch.Size) -> None:
    if not isinstance(delta, Tensor) or delta.is_complex():
        what = "complex" if isinstance(delta, Tensor) else f"a {type(delta).__name__}"
        raise TypeError(f"the merge of '{name}' by {running_method()} is {what}; expected a tensor of real numbers.")
    if delta.shape != shape:
        raise ValueError(f"the merge of '{name}' has shape {tuple(delta.shape)}; expected {tuple(shape)}.")
