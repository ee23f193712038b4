"""Image classification tasks and where they come from: arrays in a file, or folders of images."""

from mergekit_lite.suites.folders import load_folder
from mergekit_lite.suites.npz import load_npz
from mergekit_lite.suites.splits import SPLITS, Split, Task, stratified

__all__ = ["SPLITS", "Split", "Task", "load_folder", "load_npz", "stratified"]
