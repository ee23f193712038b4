"""Methods that need a few inputs: how much each weight matters to each task."""

from mergekit_lite.calibrated.blocks import Curvature, Diagonal, Kronecker
from mergekit_lite.calibrated.curvature import diagonal_fisher, input_grams, kfac
from mergekit_lite.calibrated.fisher import fisher
from mergekit_lite.calibrated.mats import mats
from mergekit_lite.calibrated.regmean import regmean
from mergekit_lite.calibrated.regmean_plus_plus import regmean_plus_plus

__all__ = [
    "Curvature",
    "Diagonal",
    "Kronecker",
    "diagonal_fisher",
    "fisher",
    "input_grams",
    "kfac",
    "mats",
    "regmean",
    "regmean_plus_plus",
]
