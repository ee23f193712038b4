r"""A frozen classification head per task, made from a few examples.

CLIP classifies with a *zero-shot* head: one direction per class, from the class's name, never
trained. A small vision model knows no names, so here a class's direction is the mean feature of a
few of its training images, seen through the *base* model. With features f(x), their mean
:math:`\mu` over the examples, and class c's examples :math:`S_c`,

.. math::
   u(x) = \frac{f(x) - \mu}{\|f(x) - \mu\|}, \qquad
   w_c = \frac{\sum_{x \in S_c} u(x)}{\big\|\sum_{x \in S_c} u(x)\big\|}, \qquad
   \text{logit}_c(x) = T \,\langle w_c, u(x)\rangle .

The head is fixed before fine-tuning and is no part of the task vector: all K experts, the base and
every merge share one set of weights and are read by the same K heads. This is what makes it
possible to merge models whose tasks have different classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CosineHead:
    """Scores features by their cosine with one direction per class.

    Attributes:
        mean: the point cosines are measured from, shape (c,).
        directions: unit vectors, shape (classes, c).
        temperature: T, what a cosine of 1 is worth as a logit.
    """

    mean: Tensor
    directions: Tensor
    temperature: float

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (N, classes) of features (N, c)."""
        centred = F.normalize(features - self.mean, dim=-1)
        return self.temperature * centred @ self.directions.T

    def to(self, device: torch.device) -> CosineHead:
        """The same head on another device."""
        return CosineHead(self.mean.to(device), self.directions.to(device), self.temperature)


def make_head(features: Tensor, labels: Tensor, temperature: float) -> CosineHead:
    """A head from a few examples' features (N, c) and labels (N,), every class among them.

    Raises:
        ValueError: a class has no example.
    """
    classes = int(labels.max()) + 1
    counts = labels.bincount(minlength=classes)
    if (counts == 0).any():
        raise ValueError(f"class {int(counts.argmin())} has no example to make its direction from.")
    mean = features.mean(0)
    centred = F.normalize(features - mean, dim=1)
    sums = torch.zeros(classes, features.shape[1]).to(features).index_add_(0, labels, centred)
    return CosineHead(mean, F.normalize(sums, dim=1), temperature)


def few_per_class(labels: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Indices of `shots` examples per class, drawn at random (all, if a class has fewer)."""
    drawn = torch.randperm(len(labels), generator=generator)
    return torch.cat([drawn[labels[drawn] == label][:shots] for label in labels.unique()])
