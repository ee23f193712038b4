"""Types that every part of the package shares."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

StateDict = dict[str, Tensor]
PathLike = str | os.PathLike[str]
# Reads the entries from `start` up to `stop` of a flattened tensor.
ReadFlat = Callable[[int, int], Tensor]

# What a reader should know, but what is no fault: which entry of a wrapped checkpoint was taken, which prefix dropped.
# Python shows it on the terminal; `logging.getLogger("mergekit_lite").setLevel("ERROR")` turns it off.
say = logging.getLogger("mergekit_lite").warning


class CheckpointError(ValueError):
    """A checkpoint file that is missing, damaged, or not what its name says."""


class Weights(Mapping[str, Tensor]):
    """A model's tensors by name, in memory or in files: what `TaskVectors` reads.

    A mapping whose shapes and dtypes are known before anything is read, and whose tensors can be read in parts.
    """

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name, without reading it (as a mapping's own answer would)."""

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, without reading it."""

    @abstractmethod
    def device(self, name: str) -> torch.device:
        """Where a tensor is, or will be once it is read."""

    @abstractmethod
    def flat(self, name: str) -> ReadFlat:
        """A function that reads parts of a flattened tensor."""

    @abstractmethod
    def ties(self) -> dict[str, str]:
        """For each name the first name of the very same tensor: itself, if it is not tied."""

    def check(self) -> None:
        """Look whether anything has changed since this was opened.

        Raises:
            ValueError: it has; the message names it.
        """
