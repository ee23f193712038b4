"""What a tensor is for. Not everything that floats is a weight.

==============  ===========================================================  =====================================
role            what it is                                                   what a merge does with it
==============  ===========================================================  =====================================
``weight``      what training moved                                          what the method says
``statistic``   running mean and variance of a normalisation                 a convex mean of the experts'
``constant``    the same in the base and in every expert, such as a mask     copied
``counter``     whole numbers: steps, positions                              the base's
``mask``        a pruning mask, beside the weight that it masks              copied; refused if experts differ
``norm pair``   length and direction of a weight, kept apart                 copied; refused if experts differ
``code``        whole numbers or 8 bits with a scale elsewhere               refused
``factor``      a factor of an adapter (LoRA)                                refused
==============  ===========================================================  =====================================

A statistic is no direction in which training went: it has no part in lengths, angles, trimming or scales. A running
variance is a mean of squares; the sum of three variances minus two others may be negative, and the network then
answers NaN. A mean with non-negative weights that sum to one never is.

Numbers stored in parts (codes and scales, factors, lengths and directions) mean nothing part by part: the mean of two
products is not the product of two means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import torch

from mergekit_lite.types import Weights

if TYPE_CHECKING:
    import pandas as pd

Role = Literal["weight", "statistic", "constant", "counter", "mask", "norm pair", "code", "factor"]

STATISTIC = re.compile(r"(?:^|[._])(?:running_(?:mean|var)|moving_(?:mean|variance|var))$")
VARIANCE = re.compile(r"(?:running|moving)_var(?:iance)?$")
FACTOR = re.compile(
    r"(?:^|\.|_)(?:lora_(?:[AB]|embedding_[AB]|up|down|magnitude_vector)|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|vera_lambda_[bd])"
    r"(?:\.|$)"
)
# Names that only quantised layers have: of bitsandbytes, GPTQ and AWQ, compressed-tensors, torch.ao, fp8 releases.
CODE = re.compile(
    r"(?:^|[._])(?:qweight|qzeros|SCB|weight_format|absmax|nested_absmax|quant_map|nested_quant_map|weight_packed|"
    r"weight_scale|weight_scale_inv|weight_zero_point|_packed_params|quant_state)(?:\.|$)"
)
NARROW = (torch.int8, torch.uint8)
FLOAT8 = tuple(dtype for name in dir(torch) if name.startswith("float8") for dtype in [getattr(torch, name)])


def role_of(name: str, dtype: torch.dtype, names: Iterable[str] = ()) -> Role:
    """A tensor's role, as far as its name, its dtype and its neighbours' names (a set, best) show it."""
    last = name.rpartition(".")[2]
    if FACTOR.search(name):
        return "factor"
    if CODE.search(name) or (
        dtype in (*NARROW, *FLOAT8) and any(f"{name}{end}" in names for end in ("_scale", ".scale"))
    ):
        return "code"
    if last.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in names:
        return "mask"
    if not dtype.is_floating_point and not dtype.is_complex:
        if dtype != torch.bool and last in ("weight", "bias", "kernel"):
            return "code"
        return "constant" if dtype in NARROW else "counter"
    if STATISTIC.search(name):
        return "statistic"
    stem = name[:-2]
    if (last.endswith("_g") and f"{stem}_v" in names) or (last.endswith("_v") and f"{stem}_g" in names):
        return "norm pair"
    if "parametrizations." in name and last in ("original0", "original1"):
        return "norm pair"
    return "weight"


def roles_of(weights: Weights, what: str) -> dict[str, Role]:
    """Every tensor's role.

    Args:
        weights: a model's tensors.
        what: the model's name in messages, such as "the base".

    Raises:
        ValueError: there are codes or factors, of which no part can be merged alone.
        TypeError: there are complex weights.
    """
    names = weights.keys()
    roles = {name: role_of(name, weights.dtype(name), names) for name in weights}
    for name, role in roles.items():
        if weights.dtype(name).is_complex:
            raise TypeError(f"'{name}' of {what} is complex; merging is defined for real weights.")
        if role == "code":
            raise ValueError(
                f"'{name}' of {what} ({dtype_name(weights.dtype(name))}) belongs to quantised weights: integer or "
                "8-bit codes with a scale elsewhere, which cannot be merged by parts. Merge the weights that they "
                "were made from, or dequantise them first."
            )
        if role == "factor":
            raise ValueError(
                f"'{name}' of {what} is a factor of an adapter (LoRA). Averaging factors does not average what they "
                "multiply to. Add each adapter to its base first (merge_and_unload in PEFT) and merge the whole models."
            )
    return roles


REMEDY: Mapping[str, str] = {
    "mask": "a pruning mask: make the pruning permanent with torch.nn.utils.prune.remove",
    "norm pair": "half of a weight that is kept as length and direction: join them with "
    "torch.nn.utils.parametrize.remove_parametrizations (or torch.nn.utils.remove_weight_norm)",
    "constant": "an 8-bit integer tensor, so a constant or a code with a scale elsewhere: merge the weights that it "
    "was made from",
}


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` rather than ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


class Roles(dict[str, Role]):
    """Roles by tensor name; in Jupyter a table."""

    def count(self) -> dict[Role, int]:
        """How many tensors there are of each role."""
        return {role: sum(each == role for each in self.values()) for role in dict.fromkeys(self.values())}

    def to_frame(self) -> pd.DataFrame:
        """A row per tensor."""
        import pandas as pd

        return pd.DataFrame({"role": list(self.values())}, index=list(self))

    def __repr__(self) -> str:
        return f"Roles({', '.join(f'{count} {role}' for role, count in self.count().items())})"

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html())
