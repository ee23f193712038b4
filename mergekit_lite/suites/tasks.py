"""Image classification tasks: arrays of images and labels, split into train, validation and test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mergekit_lite.checkpoints import PathLike

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


def load_npz(path: PathLike) -> Task:
    """A task from an .npz file with ``x_train``, ``y_train``, ``x_validation``, ... and ``classes``."""
    with np.load(path, allow_pickle=False) as arrays:
        splits = {name: _split(arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in SPLITS}
        return Task(Path(path).stem, [str(c) for c in arrays["classes"]], **splits)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    """From (N, H, W) or (N, H, W, 3) arrays."""
    pixels = torch.from_numpy(images)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return Split(pixels.contiguous(), torch.from_numpy(labels.astype(np.int64)))


def load_folder(path: PathLike, resolution: int, validation_share: float = 0.2, seed: int = 0) -> Task:
    """A task from a folder ``path/{train,validation,test}/<class>/<image>``.

    Args:
        path: the task's folder; its name becomes the task's name.
        resolution: every image is resized to this many pixels in height and width.
        validation_share: without a ``validation`` folder, this share of each class's training images.
        seed: of the draw of those images.

    Raises:
        FileNotFoundError: there is no ``train`` or ``test`` folder, or a class folder is empty.
        ValueError: the splits do not have the same classes, or a class has too few images to share.
    """
    path = Path(path)
    for needed in ("train", "test"):
        if not (path / needed).is_dir():
            raise FileNotFoundError(f"'{path}' needs train/<class>/ and test/<class>/; '{needed}' is missing.")
    classes = sorted(folder.name for folder in (path / "train").iterdir() if folder.is_dir())
    if not classes:
        raise FileNotFoundError(f"'{path / 'train'}' has no class folders.")
    train = _read_images(path / "train", classes, resolution)
    test = _read_images(path / "test", classes, resolution)
    if (path / "validation").is_dir():
        validation = _read_images(path / "validation", classes, resolution)
    else:
        held = stratified(train.labels, validation_share, torch.Generator().manual_seed(seed))
        train, validation = train[~held], train[held]
    return Task(path.name, classes, train, validation, test)


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


def _read_images(folder: Path, classes: list[str], resolution: int) -> Split:
    from PIL import Image

    unknown = sorted({f.name for f in folder.iterdir() if f.is_dir()} - set(classes))
    if unknown:
        raise ValueError(f"'{folder}' has the class '{unknown[0]}', which the training folder has not.")
    suffixes = set(Image.registered_extensions())
    images, labels = [], []
    for label, name in enumerate(classes):
        files = [f for f in sorted((folder / name).glob("*")) if f.suffix.lower() in suffixes]
        if not files:
            raise FileNotFoundError(f"no images in '{folder / name}'.")
        for file in files:
            with Image.open(file) as image:
                images.append(np.asarray(image.convert("RGB").resize((resolution, resolution))))
            labels.append(label)
    return _split(np.stack(images), np.array(labels))
