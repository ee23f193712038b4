r"""A frozen classification head per task, made from a few examples.

CLIP classifies with a *zero-shot* head: one direction per class, from the class's name, never
trained. A small vision model knows no names, so here the directions come from the mean features of a
few training images per class, seen through the *base* model. With features f(x), the mean
:math:`\mu_t` of task t's examples, the examples :math:`S_c` of its class c, and the mean
:math:`\mu` of all :math:`\mu_t`,

.. math::
   w_c = \frac{v_c}{\|v_c\|}, \quad v_c = \sum_{x \in S_c} \frac{f(x) - \mu_t}{\|f(x) - \mu_t\|}, \qquad
   \text{logit}_c(x) = T \,\Big\langle w_c, \frac{f(x) - \mu}{\|f(x) - \mu\|} \Big\rangle .

So a head knows how the classes of its task differ, and features are read from one centre that all
tasks share. Where the task as a whole lies in feature space (:math:`\mu_t - \mu`) no head
knows; as with CLIP, whose images do not lie where its words do, that is left for fine-tuning to learn.

The heads are fixed before fine-tuning and are no part of the task vectors: the base, all K experts and
every merge share one set of weights and are read by the same K heads. This is what makes it possible
to merge models whose tasks have different classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CosineHead:
    """Scores features by their cosine with one direction per class.

    Attributes:
        centre: the point cosines are measured from, the same for all tasks, shape (c,).
        directions: unit vectors, shape (classes, c).
        temperature: T, what a cosine of 1 is worth as a logit.
    """

    centre: Tensor
    directions: Tensor
    temperature: float

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (N, classes) of features (N, c)."""
        centred = F.normalize(features - self.centre, dim=-1)
        return self.temperature * centred @ self.directions.T

    def to(self, device: torch.device) -> CosineHead:
        """The same head on another device."""
        return CosineHead(self.centre.to(device), self.directions.to(device), self.temperature)


def make_heads(
    examples: Mapping[str, tuple[Tensor, Tensor]], merged: Iterable[str], centre: str, temperature: float
) -> dict[str, CosineHead]:
    """A head per task, from a few examples of each of its classes.

    Args:
        examples: by task, features (N, c) and labels (N,).
        merged: names of the tasks whose means make the shared centre.
        centre: {"shared", "task", "none"}: the mean of the merged tasks' means, the task's own mean, or zero.
        temperature: of the heads.

    Raises:
        ValueError: another centre, or a class without an example.
    """
    means = {name: features.mean(0) for name, (features, _) in examples.items()}
    shared = torch.stack([means[name] for name in merged]).mean(0)
    centres = {
        "shared": dict.fromkeys(means, shared),
        "task": means,
        "none": dict.fromkeys(means, torch.zeros_like(shared)),
    }
    if centre not in centres:
        raise ValueError(f"centre must be one of {', '.join(centres)}; got '{centre}'.")
    return {
        name: CosineHead(centres[centre][name], class_directions(features, labels), temperature)
        for name, (features, labels) in examples.items()
    }


def class_directions(features: Tensor, labels: Tensor) -> Tensor:
    """The unit vectors w_c, shape (classes, c), from a few examples' features (N, c) and labels (N,).

    Raises:
        ValueError: a class has no example.
    """
    classes = int(labels.max()) + 1
    counts = labels.bincount(minlength=classes)
    if (counts == 0).any():
        raise ValueError(f"class {int(counts.argmin())} has no example to make its direction from.")
    centred = F.normalize(features - features.mean(0), dim=1)
    sums = torch.zeros(classes, features.shape[1]).to(features).index_add_(0, labels, centred)
    return F.normalize(sums, dim=1)


def few_per_class(labels: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Indices of `shots` examples per class, drawn at random (all, if a class has fewer)."""
    drawn = torch.randperm(len(labels), generator=generator)
    return torch.cat([drawn[labels[drawn] == label][:shots] for label in labels.unique()])
