"""How much memory a process uses, for the benchmarks."""

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def anonymous_memory() -> int:
    """Bytes of this process that are not backed by a file (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this benchmark reads /proc/self/status, which only Linux has.")


def give_back_freed_memory() -> None:
    """Have glibc return to the system what the process has freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measured(function: Callable[[], T]) -> tuple[T, float, int]:
    """What a function returns, the seconds it took, and by how many bytes its memory rose at most."""
    before, peak, done = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_memory())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return result, seconds, max(0, peak - before)
