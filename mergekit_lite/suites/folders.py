"""Tasks in folders of image files: found first, read when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mergekit_lite.suites.images import FORMATS, check_image, read_image, suffixes
from mergekit_lite.suites.splits import SPLITS, Split, Task, stratified
from mergekit_lite.types import PathLike, say

VALIDATION_FOLDERS = ("validation", "val", "valid")
# What other programs leave in folders, besides names that begin with a dot.
STRAY_NAMES = frozenset({"__macosx", "thumbs.db", "desktop.ini"})
# A task that takes more bytes than this as 8-bit pixels stays on disk.
MOST_IN_MEMORY = 64 << 20
# Reading more images than this shows a progress bar.
MANY = 1000

T = TypeVar("T")


class StoredSplit(Split):
    """A split whose images stay in their files until they are asked for.

    `images` reads all of them, each time. A part of the split, such as one of its `batches`, is a stored split too,
    so a loop over batches holds the images of one batch.

    Args:
        files: image files, N of them.
        labels: int64, shape (N,).
        resolution: height and width that images are resized to, in pixels.
        interpolation: {"nearest", "bilinear", "bicubic"}, of resizing.
    """

    files: list[Path]
    resolution: int
    interpolation: str

    def __init__(self, files: list[Path], labels: Tensor, resolution: int, interpolation: str = "bicubic") -> None:
        # A split is frozen: its attributes are set here, past the lock.
        self.__dict__.update(files=files, labels=labels, resolution=resolution, interpolation=interpolation)

    @property
    def images(self) -> Tensor:
        """All images, read now: uint8, shape (N, 3, resolution, resolution).

        Raises:
            ValueError: a file is damaged; the message names it.
        """
        pixels = torch.empty(len(self), 3, self.resolution, self.resolution, dtype=torch.uint8)
        for place, file in zip(pixels, _with_bar(self.files, "reading images"), strict=True):
            place.copy_(torch.from_numpy(read_image(file, self.resolution, self.interpolation)).permute(2, 0, 1))
        return pixels

    def __getitem__(self, index: Tensor | slice) -> Split:
        chosen = torch.arange(len(self))[index].tolist()  # by a mask, positions or a slice
        return StoredSplit([self.files[i] for i in chosen], self.labels[index], self.resolution, self.interpolation)

    def __repr__(self) -> str:
        return f"StoredSplit({len(self)} images of {self.resolution} x {self.resolution} pixels, on disk)"

    def batches(self, size: int) -> Iterator[Split]:
        """The split in pieces of at most `size` images, in order; a progress bar shows them if there are many."""
        starts = range(0, len(self), size)
        return (self[start : start + size] for start in _with_bar(starts, "reading batches", len(self)))

    def in_memory(self) -> Split:
        """The same split with its images read."""
        return Split(self.images, self.labels)


def list_of_folders(folders: Iterable[PathLike]) -> list[Path]:
    """The folders, one per task, as a list of paths.

    Raises:
        TypeError: one folder instead of a list of them.
        ValueError: there are none.
    """
    if isinstance(folders, (str, bytes, os.PathLike)):
        raise TypeError(f"folders must be a list, one folder per task, such as [{folders!r}]; got one folder.")
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("no folders given: a suite needs at least one task.")
    return paths


def load_folder(
    path: PathLike, resolution: int, validation_share: float = 0.2, seed: int = 0, interpolation: str = "bicubic"
) -> Task:
    """A task from a folder ``path/{train,validation,test}/<class>/<image>``.

    A task that is small as 8-bit pixels (64 MB) is read into memory. Of a larger one the beginning of each file is
    looked at; its images are read batch by batch when they are asked for, and its splits are `StoredSplit`.
    Hidden files and what else other programs leave are passed over; what is no image is passed over and said.

    Args:
        path: the task's folder; its name becomes the task's name. ``val`` or ``valid`` will do for ``validation``.
        resolution: height and width that every image is resized to, in pixels.
        validation_share: share of each class's training images that is held out where there is no such folder.
        seed: of the draw of those images.
        interpolation: {"nearest", "bilinear", "bicubic"}, of resizing.

    Raises:
        FileNotFoundError: there is no ``train`` or ``test`` folder, or a class folder has no images.
        ValueError: the splits do not have the same classes, a class has too few images to share, there are two
            folders of validation images, or an image cannot be read; the message names the file or folder.
    """
    path = Path(path)
    folders = _split_folders(path)
    skipped: list[Path] = [p for p in _visible(path) if p not in folders.values()]
    classes = sorted(p.name for p in _visible(folders["train"]) if p.is_dir())
    if not classes:
        raise FileNotFoundError(f"'{folders['train']}' has no class folders.")
    splits = {
        name: StoredSplit(*_find_images(folder, classes, skipped), resolution, interpolation)
        for name, folder in folders.items()
    }
    if skipped:
        of_folders = sum(p.is_dir() for p in skipped)
        say(
            f"'{path}': passed over {len(skipped) - of_folders} file(s) that are no images "
            f"({', '.join(FORMATS)}) and {of_folders} folder(s) out of place, such as '{skipped[0].relative_to(path)}'."
        )
    if "validation" not in splits:
        train = splits["train"]
        least = int(train.labels.bincount().argmin())
        if (train.labels == least).sum() < 2:
            raise ValueError(
                f"'{folders['train'] / classes[least]}' has 1 image; it takes two to hold one out. "
                "Add images, or a folder 'validation'."
            )
        held = stratified(train.labels, validation_share, torch.Generator().manual_seed(seed))
        splits |= {"train": train[~held], "validation": train[held]}  # type: ignore[dict-item]
    if sum(map(len, splits.values())) * 3 * resolution**2 <= MOST_IN_MEMORY:
        return Task(_name(path), classes, *(splits[name].in_memory() for name in SPLITS))
    files = list(chain.from_iterable(split.files for split in splits.values()))
    for file in _with_bar(files, "looking at files"):
        check_image(file)
    return Task(_name(path), classes, *(splits[name] for name in SPLITS))


def _split_folders(path: Path) -> dict[str, Path]:
    """The folders of the splits by the splits' names: train, test and, if there is one, validation."""
    for needed in ("train", "test"):
        if not (path / needed).is_dir():
            raise FileNotFoundError(f"'{path}' needs train/<class>/ and test/<class>/; '{needed}' is missing.")
    folders = {name: path / name for name in ("train", "test")}
    validation = [path / name for name in VALIDATION_FOLDERS if (path / name).is_dir()]
    if len(validation) > 1:
        raise ValueError(
            f"'{path}' has more than one folder of validation images: "
            f"{' and '.join(repr(p.name) for p in validation)}. Keep one."
        )
    return folders | dict(zip(["validation"], validation, strict=False))


def _find_images(folder: Path, classes: list[str], skipped: list[Path]) -> tuple[list[Path], Tensor]:
    """The image files of one split and their labels; what is no image is added to `skipped`."""
    visible = _visible(folder)
    unknown = sorted({p.name for p in visible if p.is_dir()} - set(classes))
    if unknown:
        raise ValueError(f"'{folder}' has the class '{unknown[0]}', which the training folder has not.")
    skipped += [p for p in visible if not p.is_dir()]
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = _visible(folder / name) if (folder / name).is_dir() else []
        images = [p for p in inside if p.suffix.lower() in suffixes() and not p.is_dir()]
        if not images:
            raise FileNotFoundError(f"no images in '{folder / name}'; {', '.join(FORMATS)} are read.")
        skipped += [p for p in inside if p not in set(images)]
        files += images
        labels += [label] * len(images)
    return files, torch.tensor(labels)


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, in order, without what other programs left there."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in STRAY_NAMES)


def _name(path: Path) -> str:
    """A folder's name, also where the path is as short as a dot."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def _with_bar(items: Iterable[T], what: str, images: int | None = None) -> Iterable[T]:
    """The items with a progress bar that is shown, on a terminal, if there are many images."""
    from tqdm.auto import tqdm

    items = list(items)
    many = (len(items) if images is None else images) > MANY
    bar: Iterable[T] = tqdm(items, desc=what, leave=False, disable=None if many else True)
    return bar
