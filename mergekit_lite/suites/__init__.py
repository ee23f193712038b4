"""Suites: tasks, backbones, shipped checkpoints and their evaluation."""

from mergekit_lite.suites.pocket import load_suite
from mergekit_lite.suites.recipe import Recipe
from mergekit_lite.suites.suite import Evaluation, Suite, compare
from mergekit_lite.suites.tasks import Split, Task

__all__ = ["Evaluation", "Recipe", "Split", "Suite", "Task", "compare", "load_suite"]
