"""Memory and time of merging files: ``python benchmarks/merge_files.py [--experts 4] [--layers 7] [--side 3000]``.

Writes a base and K experts of random weights (more than 1 GB in all by default), merges them with
`merge_files` in a process of its own, and compares

- the largest amount of anonymous memory in use (what cannot be given back by dropping file pages), above
  what the process had before, with K + 2 times the largest tensor;
- the time with the floor: reading every byte of the inputs once and writing the output's bytes.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import measured

import mergekit_lite as mkl

# The largest tensor is SIDE x SIDE float32, 36 MB: above 32 MB glibc returns freed memory at once, below it
# may keep a block or two, which would be counted here as memory in use.
SIDE = 3000


def write_checkpoint(path: Path, seed: int, layers: int, side: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = {f"layer{i}.weight": torch.randn(side, side, generator=generator) for i in range(layers)}
    state |= {f"layer{i}.bias": torch.randn(side, generator=generator) for i in range(layers)}
    mkl.save(state, path)


def run(
    method: str, folder: Path, experts: int, results: multiprocessing.Queue, hyperparameters: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    inputs = [folder / f"{i}.safetensors" for i in range(experts + 1)]
    mkl.merge_files(mkl.average, inputs[0], inputs[1:2], folder / "warm.safetensors")
    os.sync()  # what was written before is not our time
    merge = getattr(mkl, method)
    out = folder / "out.safetensors"
    _, seconds, memory = measured(lambda: mkl.merge_files(merge, inputs[0], inputs[1:], out, **hyperparameters))
    results.put((memory, seconds))


def floor(folder: Path, experts: int) -> float:
    """Seconds to read every input once and write one output of the same size."""
    buffer = bytearray(1 << 24)
    os.sync()
    started = time.perf_counter()
    for i in range(experts + 1):
        with open(folder / f"{i}.safetensors", "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    size = (folder / "0.safetensors").stat().st_size
    with open(folder / "floor.bin", "wb", buffering=0) as file:
        for start in range(0, size, len(buffer)):
            file.write(buffer[: min(len(buffer), size - start)])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/merge_files.json"))
    options = parser.parse_args()
    largest, rows = options.side**2 * 4, []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(options.experts + 1):
            write_checkpoint(folder / f"{seed}.safetensors", seed, options.layers, options.side)
        total = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{options.experts + 1} files, {total / 1e9:.2f} GB; largest tensor {largest / 1e6:.0f} MB")
        for method in ("average", "task_arithmetic", "dare", "ties", "pcb"):
            results: multiprocessing.Queue = context.Queue()
            process = context.Process(target=run, args=(method, folder, options.experts, results, {}))
            process.start()
            memory, seconds = results.get()
            process.join()
            row = {
                "method": method,
                "experts": options.experts,
                "input GB": round(total / 1e9, 2),
                "peak memory / largest tensor": round(memory / largest, 2),
                "bound K + 2": options.experts + 2,
                "time / floor": round(seconds / floor(folder, options.experts), 2),
            }
            rows.append(row)
            print(row)
            # The order statistics of ties and pcb count in memory that does not depend on the size of tensors.
            counts = (4 << 20) * options.experts * {"ties": 1, "pcb": 2}.get(method, 0)
            assert memory <= (options.experts + 2) * largest + counts, "more memory than promised"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
