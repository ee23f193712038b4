"""Methods that need unlabelled test inputs: a merge that adapts to what it will be asked."""

from mergekit_lite.adaptive.adamerging import adamerging, learn_coefficients, trim_and_elect
from mergekit_lite.adaptive.adaptation import DivergenceError, LossOfWeights, adapt, draws
from mergekit_lite.adaptive.coefficients import Coefficients, merge_with
from mergekit_lite.adaptive.concrete import ConcreteMask, concrete, learn_mask, masked
from mergekit_lite.adaptive.history import History
from mergekit_lite.adaptive.losses import entropy, entropy_loss, imitation_loss, information_loss
from mergekit_lite.adaptive.wemoe import WEMoE, wemoe

__all__ = [
    "Coefficients",
    "ConcreteMask",
    "DivergenceError",
    "History",
    "LossOfWeights",
    "WEMoE",
    "adamerging",
    "adapt",
    "concrete",
    "draws",
    "entropy",
    "entropy_loss",
    "imitation_loss",
    "information_loss",
    "learn_coefficients",
    "learn_mask",
    "masked",
    "merge_with",
    "trim_and_elect",
    "wemoe",
]
