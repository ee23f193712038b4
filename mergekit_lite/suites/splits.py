"""What a classification task is made of: images and labels, split into train, validation and test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Images and labels.

    Attributes:
        images: uint8, shape (N, C, H, W) with C = 1 or 3.
        labels: int64, shape (N,).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Split:
        return Split(self.images[index], self.labels[index])

    def batches(self, size: int) -> Iterator[Split]:
        """The split in pieces of at most `size` images, in order."""
        return (self[start : start + size] for start in range(0, len(self), size))


@dataclass(frozen=True)
class Task:
    """A classification task: what the classes are called, and its three splits."""

    name: str
    classes: list[str]
    train: Split
    validation: Split
    test: Split

    def split(self, name: str) -> Split:
        """The split of this name.

        Raises:
            ValueError: there is no such split.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got '{name}'.")
        chosen: Split = getattr(self, name)
        return chosen


def names_asked(tasks: Iterable[str] | None, usual: Iterable[str]) -> list[str]:
    """The names of the tasks that are asked for; the usual ones, if nobody says.

    Raises:
        TypeError: one name instead of a list of names.
    """
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a list of names, such as ['{tasks}']; got the text '{tasks}'.")
    return list(usual if tasks is None else tasks)


def stratified(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A boolean mask that draws the same share of every class (at least one, never all).

    Raises:
        ValueError: a class has fewer than two members.
    """
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        if len(members) < 2:
            raise ValueError(f"class {int(label)} has {len(members)} image; it takes two to hold one out.")
        count = min(len(members) - 1, max(1, round(share * len(members))))
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask
