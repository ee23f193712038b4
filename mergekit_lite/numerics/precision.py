"""In which precision is computed, and the one place where results are brought back into the model's own."""

from __future__ import annotations

import torch
from torch import Tensor

GRAM_CHUNK = 1 << 14  # columns turned into float64 at a time: they stay in a core's cache
FULL = (torch.float32, torch.float64)


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 as it is, everything else in float32: half precision is too coarse to subtract in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def float64(tensor: Tensor) -> Tensor:
    """The tensor in double precision; on the CPU where its device has none (Apple's MPS)."""
    return tensor.double() if tensor.device.type != "mps" else tensor.cpu().double()


def inner_products(vectors: Tensor) -> Tensor:
    """The inner products of K vectors (K, d): K x K, in float64, exactly symmetric."""
    chunks = (float64(chunk) for chunk in vectors.split(GRAM_CHUNK, dim=1))
    gram = torch.stack([chunk @ chunk.T for chunk in chunks]).sum(0)
    return (gram + gram.T) / 2


def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity."""
    # One sum shows it without a temporary of the tensor's size; where the sum itself overflows, look again.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def fits_into(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers are finite and stay so in another dtype; on a narrow one, rounded to its largest at most."""
    if dtype == tensor.dtype or (dtype in FULL and tensor.dtype == torch.float32):
        return all_finite(tensor)
    if not tensor.numel():
        return True
    limits = torch.finfo(dtype)
    return bool(tensor.abs().amax() <= limits.max * (1 + limits.eps / 2))  # False for NaN, too
