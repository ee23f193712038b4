"""The lab: sweeps, pictures, explorers and exercises around the methods."""

from mergekit_lite.lab.exercises import check
from mergekit_lite.lab.sweeps import best, sweep

__all__ = ["best", "check", "sweep"]
