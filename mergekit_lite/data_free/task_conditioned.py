r"""A merge that is one model per task: what the tasks share, and for each task a mask and a scale.

Some methods do not end with one set of weights. They keep one shared vector :math:`\tau` for all K tasks and, for
every task, a mask :math:`m_k \in \{0, 1\}^d` and a scale :math:`\lambda_k`, and answer task k with

.. math:: \hat\theta_k = \theta_0 + \lambda_k\, m_k \odot \tau .

A mask costs one bit per weight, so in 32-bit precision the K models take the room of 2 + K/32 (the base, the shared
model and the masks) instead of K. The price: whoever uses them must know which task an input belongs to. This is
compression of the experts, and its accuracies do not compare with those of a merge that is told nothing.

Shared by TALL-masks (`mergekit_lite.tall_masks`) and EMR-Merging (`mergekit_lite.emr`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.task_vectors import TaskVectors, TauFunction


@dataclass(frozen=True, eq=False, repr=False)
class TaskConditioned(Mapping[str, StateDict]):
    """K models in the room of little more than two: a mapping from task names to state dicts.

    A state dict is made each time it is asked for: ``merged["mnist"]``. `Suite.evaluate` takes the mapping as it is
    and answers every task with its own model.

    Attributes:
        shared: the base and one model, θ0 + τ, as a single task vector.
        masks: m by tensor name, boolean, shape (K, *shape), in the order of `scales`. (In memory torch gives a
            boolean a byte; `nbytes` counts a bit.)
        scales: λ by task.
    """

    shared: TaskVectors
    masks: Mapping[str, Tensor]
    scales: Mapping[str, float]

    def __getitem__(self, task: str) -> StateDict:
        """The weights that answer a task.

        Raises:
            KeyError: there is no such task.
        """
        if task not in self.scales:
            raise KeyError(f"no task named '{task}'; there are {', '.join(self.scales)}.")
        k, scale = list(self.scales).index(task), self.scales[task]
        return self.shared.map(lambda name, taus: scale * (self.masks[name][k] * taus[0]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.scales)

    def __len__(self) -> int:
        return len(self.scales)

    @property
    def density(self) -> dict[str, float]:
        """The share of weights that each task's mask keeps."""
        kept = [sum(int(mask[k].sum()) for mask in self.masks.values()) for k in range(len(self))]
        return {task: count / max(1, self.shared.dimension) for task, count in zip(self, kept, strict=True)}

    @property
    def nbytes(self) -> int:
        """Bytes to store it all: the base, the shared model, a bit per weight and task, and K scales in float32."""
        models = 2 * sum(self.shared.base[name].nbytes for name in self.masks)
        bits = sum((mask[0].numel() + 7) // 8 for mask in self.masks.values())
        return models + len(self) * (bits + 4)

    def __repr__(self) -> str:
        experts = len(self) * sum(self.shared.base[name].nbytes for name in self.masks)
        return (
            f"TaskConditioned({', '.join(self)}; {self.nbytes / 1e6:.1f} MB, where {len(self)} experts take "
            f"{experts / 1e6:.1f} MB)"
        )


def in_memory(tv: TaskVectors, f: TauFunction) -> TaskVectors:
    """The base and one merged model, θ0 + f(name, taus), as a single task vector.

    It is kept in memory even where files are merged into a file: it is a part of the result, not the result.
    """
    return TaskVectors(tv.base, {"shared": tv._with_collector(dict).map(f)})
