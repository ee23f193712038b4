"""Random checkpoints, their merges by the peers' own functions, and how far two merges are apart."""

import copy
from collections.abc import Callable, Sequence

import torch
from fusion_bench.method import BaseAlgorithm
from fusion_bench.modelpool import BaseModelPool
from mergekit.merge_methods import merge_state_dicts
from torch import Tensor, nn

import mergekit_lite as mkl
from mergekit_lite.checkpoints import StateDict

TOLERANCE = 1e-6  # of the merged task vector's length


def network() -> nn.Module:
    """A convolution, a normalisation layer and matrices that are tall, wide and square: 2004 weights.

    Every tensor's size is a multiple of 4, so that a quarter of its weights is a whole number.
    """
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 8, 3),
            "norm": nn.LayerNorm(20),
            "tall": nn.Linear(12, 40),
            "wide": nn.Linear(40, 20),
            "square": nn.Linear(20, 20, bias=False),
        }
    )


class Checkpoints:
    """A base and K experts with normally distributed weights.

    Task vectors have a part in common and are about as long as the base. Real ones are much shorter; but at a
    hundredth of the base's length the rounding of merged float32 weights, which no implementation can avoid, is 3e-6
    of theirs, and two merges could not be told apart so finely.
    """

    def __init__(self, k: int) -> None:
        generator = torch.Generator().manual_seed(k)
        shapes = {name: t.shape for name, t in network().state_dict().items()}

        def draw() -> StateDict:
            return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

        common = draw()
        self.base: StateDict = draw()
        self.experts: list[StateDict] = [
            {name: t + 0.5 * common[name] + own[name] for name, t in self.base.items()}
            for own in (draw() for _ in range(k))
        ]

    @property
    def tv(self) -> mkl.TaskVectors:
        return mkl.TaskVectors(self.base, self.experts)

    def taus(self) -> list[StateDict]:
        """The task vectors as state dicts, as fusion-bench's functions take them."""
        return [{name: t - self.base[name] for name, t in expert.items()} for expert in self.experts]

    def double(self) -> "Checkpoints":
        """The same weights in float64."""
        return self._derived(lambda state: {name: t.double() for name, t in state.items()})

    def times(self, factor: float) -> "Checkpoints":
        """All weights, and so all task vectors, multiplied by a number."""
        return self._derived(lambda state: {name: factor * t for name, t in state.items()})

    def first(self, k: int) -> "Checkpoints":
        """The same base with its first k experts."""
        return self._derived(dict, self.experts[:k])

    def only(self, *names: str) -> "Checkpoints":
        """Models of some tensors: for methods that one package applies tensor by tensor and the other to the whole."""
        return self._derived(lambda state: {name: state[name] for name in names})

    def without(self, *names: str) -> "Checkpoints":
        """Models of all other tensors: for methods that do different things to these."""
        return self.only(*(name for name in self.base if name not in names))

    def from_zero(self) -> "Checkpoints":
        """The experts with a base of zeros, so that whole weights play the task vectors' part."""
        whole = self._derived(dict)
        whole.base = {name: torch.zeros_like(t) for name, t in self.base.items()}
        return whole

    def with_experts(self, experts: Sequence[StateDict]) -> "Checkpoints":
        """The same base with other experts."""
        return self._derived(dict, experts)

    def _derived(
        self, f: Callable[[StateDict], StateDict], experts: Sequence[StateDict] | None = None
    ) -> "Checkpoints":
        new = copy.copy(self)
        new.base, new.experts = f(self.base), [f(expert) for expert in experts or self.experts]
        return new

    # ---------------------------------------------------------------- merges by the peers

    def by_mergekit(self, method: str, *, with_base: bool = True, **parameters: object) -> StateDict:
        """Mergekit's merge of the experts' state dicts."""
        models = {"base": self.base} if with_base else {}
        models |= {f"expert{k}": expert for k, expert in enumerate(self.experts)}
        copies = copy.deepcopy(models)
        return merge_state_dicts(copies, method, parameters=parameters, base="base" if with_base else None)

    def by_fusion_bench(self, algorithm: BaseAlgorithm) -> StateDict:
        """The merge of modules by one of fusion-bench's algorithms."""
        return algorithm.run(self.pool()).state_dict()

    def pool(self) -> BaseModelPool:
        """The models as fusion-bench's algorithms take them."""
        modules = {"_pretrained_": self._module(self.base)}
        modules |= {f"expert {k}": self._module(expert) for k, expert in enumerate(self.experts)}
        return BaseModelPool(modules)

    @staticmethod
    def _module(state: StateDict) -> nn.Module:
        module = network().to(next(iter(state.values())).dtype)
        module.load_state_dict(state)
        return module

    def plus(self, tau: StateDict) -> StateDict:
        """The base plus a merged task vector, where a function of fusion-bench returns only that."""
        return {name: t + tau[name].detach() for name, t in self.base.items()}


def difference(ours: StateDict, theirs: StateDict, base: StateDict) -> float:
    """The distance of two merged models, as a share of the length of our merged task vector."""
    assert set(ours) == set(theirs) == set(base)

    def flat(state: StateDict) -> Tensor:
        return torch.cat([state[name].detach().double().flatten() for name in base])

    length = (flat(ours) - flat(base)).norm()
    assert length > 0
    return float((flat(ours) - flat(theirs)).norm() / length)


def assert_same(ours: StateDict, theirs: StateDict, base: StateDict, tolerance: float = TOLERANCE) -> None:
    """Two merges agree; if not, say in which tensors they don't."""
    apart = difference(ours, theirs, base)
    if apart > tolerance:
        where = {name: float((ours[name] - theirs[name]).norm()) for name in base}
        raise AssertionError(f"the merges differ by {apart:.1e} of the merged task vector's length: {where}")
