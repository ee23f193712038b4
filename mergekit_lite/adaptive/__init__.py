"""Methods that need unlabelled test inputs: a merge that adapts to what it will be asked."""

from mergekit_lite.adaptive.adamerging import adamerging, learn_coefficients, trim_and_elect
from mergekit_lite.adaptive.adaptation import DivergenceError, EntropyOfWeights, adapt, draws, entropy
from mergekit_lite.adaptive.coefficients import Coefficients, merge_with
from mergekit_lite.adaptive.history import History

__all__ = [
    "Coefficients",
    "DivergenceError",
    "EntropyOfWeights",
    "History",
    "adamerging",
    "adapt",
    "draws",
    "entropy",
    "learn_coefficients",
    "merge_with",
    "trim_and_elect",
]
