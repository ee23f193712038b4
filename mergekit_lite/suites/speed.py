"""Two settings that make small models several times faster on a CPU."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class _OpenBlocks:
    """The blocks of `one_thread` that are being run, in all threads and in the calling thread alone."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.everywhere = 0
        self.usual = 1  # the setting before the first of them began
        self.local = threading.local()


_blocks = _OpenBlocks()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run small models on one thread: the others would cost more in waiting than they bring.

    The setting belongs to the Python thread that makes it, and a new thread begins with what was set last. So every
    thread sets it for itself, and goes back to what was usual before the first of them came.
    """
    with _blocks.lock:
        setting = torch.get_num_threads()  # asked first: a thread's first use takes over what others set
        if _blocks.everywhere == 0:
            _blocks.usual = setting
        _blocks.everywhere += 1
        torch.set_num_threads(1)
    depth = getattr(_blocks.local, "depth", 0)
    _blocks.local.depth = depth + 1
    try:
        yield
    finally:
        _blocks.local.depth = depth
        with _blocks.lock:
            _blocks.everywhere -= 1
            if depth == 0:
                torch.set_num_threads(_blocks.usual)


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep the memory of one layer's output for the next layer, instead of returning it.

    Returned memory is asked for again a millisecond later, and the kernel clears each page of it anew;
    in networks with small layers that takes as long as the arithmetic. Elsewhere than in glibc this
    does nothing.

    Returns:
        Whether the setting was made.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, 32 << 20) & mallopt(_M_TRIM_THRESHOLD, 1 << 30))
