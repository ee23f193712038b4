"""Methods that need nothing but the weights."""

from mergekit_lite.data_free.average import average
from mergekit_lite.data_free.awd import awd, disentangle
from mergekit_lite.data_free.breadcrumbs import breadcrumbs, trim_tails
from mergekit_lite.data_free.consensus import consensus, tall_masks
from mergekit_lite.data_free.dare import dare, drop_and_rescale
from mergekit_lite.data_free.della import della, magprune
from mergekit_lite.data_free.emr import emr
from mergekit_lite.data_free.interpolation import linear_interpolation, slerp
from mergekit_lite.data_free.iso import iso_c, iso_cts
from mergekit_lite.data_free.karcher import karcher
from mergekit_lite.data_free.lines import lines, scale_by_depth
from mergekit_lite.data_free.metagpt import metagpt
from mergekit_lite.data_free.model_stock import model_stock
from mergekit_lite.data_free.pcb import pcb
from mergekit_lite.data_free.task_arithmetic import analogy, negation, task_arithmetic
from mergekit_lite.data_free.task_conditioned import TaskConditioned
from mergekit_lite.data_free.ties import ties, trim
from mergekit_lite.data_free.tsv import tsv
from mergekit_lite.data_free.wudi import wudi

__all__ = [
    "TaskConditioned",
    "analogy",
    "average",
    "awd",
    "breadcrumbs",
    "consensus",
    "dare",
    "della",
    "disentangle",
    "drop_and_rescale",
    "emr",
    "iso_c",
    "iso_cts",
    "karcher",
    "linear_interpolation",
    "lines",
    "magprune",
    "metagpt",
    "model_stock",
    "negation",
    "pcb",
    "scale_by_depth",
    "slerp",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "trim",
    "trim_tails",
    "tsv",
    "wudi",
]
