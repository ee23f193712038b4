"""Methods that need nothing but the weights."""

from mergekit_lite.data_free.average import average
from mergekit_lite.data_free.awd import awd, disentangle
from mergekit_lite.data_free.interpolation import linear_interpolation, slerp
from mergekit_lite.data_free.metagpt import metagpt
from mergekit_lite.data_free.pcb import pcb
from mergekit_lite.data_free.task_arithmetic import analogy, negation, task_arithmetic
from mergekit_lite.data_free.ties import ties
from mergekit_lite.data_free.tsv import tsv

__all__ = [
    "analogy",
    "average",
    "awd",
    "disentangle",
    "linear_interpolation",
    "metagpt",
    "negation",
    "pcb",
    "slerp",
    "task_arithmetic",
    "ties",
    "tsv",
]
