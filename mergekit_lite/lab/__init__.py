"""The lab: sweeps, pictures and explorers around the methods."""

from mergekit_lite.lab.sweeps import best, sweep

__all__ = ["best", "sweep"]
