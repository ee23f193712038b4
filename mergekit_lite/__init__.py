"""mergekit_lite: model merging made understandable.

::

    import mergekit_lite as mkl

    suite = mkl.load_suite("pocket8")               # real images and checkpoints: no download, no GPU
    tv = suite.task_vectors                         # or mkl.TaskVectors(base, experts)
    merged = mkl.task_arithmetic(tv, scale=0.2)     # a plain state dict
    suite.evaluate(merged)                          # accuracy per task

Importing the package needs torch alone; timm, pandas, matplotlib and ipywidgets load where they are used.
"""

from typing import TYPE_CHECKING, Any

from mergekit_lite import adaptive, calibrated, data_free
from mergekit_lite.adaptive import *  # noqa: F403  (all methods; each stands in adaptive.__all__)
from mergekit_lite.calibrated import *  # noqa: F403  (all methods; each stands in calibrated.__all__)
from mergekit_lite.checkpoints import CheckpointError, load, save
from mergekit_lite.data_free import *  # noqa: F403  (all methods; each stands in data_free.__all__)
from mergekit_lite.file_merging import merge_files
from mergekit_lite.registry import Method, Need, method, methods, methods_table
from mergekit_lite.task_vectors import TaskVectors

if TYPE_CHECKING:
    from mergekit_lite.suites import Recipe, Suite, load_suite

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Method",
    "Need",
    "Recipe",
    "Suite",
    "TaskVectors",
    "load",
    "load_suite",
    "merge_files",
    "method",
    "methods",
    "methods_table",
    "save",
]
__all__ += data_free.__all__ + calibrated.__all__ + adaptive.__all__


def __getattr__(name: str) -> Any:
    if name in ("Recipe", "Suite", "load_suite"):  # these need numpy, so they load when first asked for
        from mergekit_lite import suites

        return getattr(suites, name)
    raise AttributeError(f"module 'mergekit_lite' has no attribute '{name}'")
