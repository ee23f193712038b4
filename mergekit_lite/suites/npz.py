"""Tasks in .npz files: arrays of images and labels, looked at before they are unpacked."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import torch

from mergekit_lite.suites.splits import SPLITS, Split, Task
from mergekit_lite.types import CheckpointError, PathLike

# A compressed file of a few megabytes can unpack to many gigabytes. pocket8's largest unpacks to eleven megabytes.
MOST_BYTES = 2 << 30


def load_npz(path: PathLike) -> Task:
    """A task from an .npz file, named after the file.

    Args:
        path: the file, with ``x_train`` (uint8 images, shape (N, H, W) or (N, H, W, 3)), ``y_train`` (their labels,
            integers, shape (N,)), the same for ``validation`` and ``test``, and ``classes`` (names).

    Raises:
        CheckpointError: the file is missing, damaged, too large or holds something else; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such file: '{path}'. Check the path.")
    wanted = ["classes", *(f"{array}_{split}" for split in SPLITS for array in "xy")]
    try:
        _refuse_giants(path, wanted)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in wanted}
        classes = [str(name) for name in arrays["classes"]]
        splits = {s: _split(arrays[f"x_{s}"], arrays[f"y_{s}"], len(classes)) for s in SPLITS}
    except Exception as problem:  # the errors of zip, zlib and numpy have no common class
        raise CheckpointError(
            f"'{path}' does not hold the images of a task ({problem}). It is damaged or of another kind: "
            "copy or make it again."
        ) from problem
    return Task(path.stem, classes, **splits)


def _refuse_giants(path: Path, names: list[str]) -> None:
    """See how large the arrays are by their headers, before anything is unpacked."""
    total = 0
    with zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(f"{name}.npy") as member:
                shape, dtype = _header(member)
            total += math.prod(shape) * max(1, dtype.itemsize)
    if total > MOST_BYTES:
        raise ValueError(f"it unpacks to {total / 1e9:.1f} GB; at most {MOST_BYTES / 1e9:.1f} GB are read")


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array, from the first bytes of its .npy file."""
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"an array has version {version} of numpy's format, which is not read here")
    shape, _, dtype = read[version](member)
    return shape, dtype


def _split(images: np.ndarray, labels: np.ndarray, classes: int) -> Split:
    """From arrays of images (N, H, W) or (N, H, W, 3) and of labels (N,)."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise ValueError(f"images are uint8, (N, H, W) or (N, H, W, 3); found {images.dtype}, {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images need as many integer labels; found {labels.dtype}, {labels.shape}")
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, but there are {classes} classes")
    pixels = torch.from_numpy(images)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return Split(pixels.contiguous(), torch.from_numpy(labels.astype(np.int64)))
