"""Conjugate gradients against writing the matrix out: ``python benchmarks/conjugate_gradient.py [--write]``.

The system is MaTS's with K-FAC, for one layer of n inputs and n outputs and eight tasks,

    sum_k B_k V A_k = sum_k B_k W_k A_k ,

n^2 equations. Solved directly, the n^2 x n^2 matrix is written out and factorised (Cholesky). Conjugate gradients start
from the mean of the W_k, multiply by n x n matrices alone, and stop at a residual of 1e-6 of the right-hand side, or
when the time is up. All in float64 on one thread, each case in a process of its own; times are the processor's. The
factors are random; their spectra, and how much those of two tasks are alike, are about those of pocket8's layers.
Columns:

    n                        the layer is n x n
    preconditioner           of the conjugate gradients; all columns but "dense" and "direct" are about them
    steps                    until the residual was reached, or the time was up
    residual                 ||b - A x|| / ||b|| at the end, computed anew
    error                    ||x - direct|| / ||direct||
    direct / CG, time        both with all preparations: writing out, preconditioner; more than 1: CG is faster;
                             blank, if the time was up first
    step / matrix product    time of a step over that of one product of two n x n matrices; a step has 16, or 18
    dense in MB              n^4 numbers of 8 bytes: the matrix, if it were written out
    direct in MB             largest rise of the process's memory during the direct solution
    CG in MB                 the same during conjugate gradients; the eight pairs of factors are there before
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from memory import measured
from torch import Tensor

from mergekit_lite.calibrated.blocks import Kronecker
from mergekit_lite.calibrated.conjugate_gradient import conjugate_gradient
from mergekit_lite.calibrated.preconditioners import PRECONDITIONERS, approximate_inverse

TASKS = 8
TOLERANCE = 1e-6
WRITTEN_OUT = (8, 16, 32, 48, 64)  # a matrix for n = 128 would take 2 GB
SIZES = (*WRITTEN_OUT, 128, 256, 512, 1024)
TABLE = Path("mergekit_lite/lab/tables/cg-benchmark.csv")


def gram_matrices(n: int, sources: int, decay: float, spread: float, generator: torch.Generator) -> Tensor:
    """Gram matrices of K tasks' inputs: the same sources mixed in the same way, strong or weak in different tasks.

    Args:
        n: width of the inputs.
        sources: how many independent ones they are mixtures of.
        decay: the i-th direction's mean square falls as i ** -decay.
        spread: standard deviation of the logarithm of a source's strength.
        generator: of the random numbers.

    Returns:
        Of shape (K, n, n).
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mixing = torch.arange(1, n + 1, dtype=torch.float64)[:, None] ** (-decay / 2) * normal(n, sources)
    return torch.stack([(mixing * (spread * normal(sources)).exp()) @ mixing.T / sources for _ in range(TASKS)])


def system(n: int) -> tuple[list[Kronecker], Tensor]:
    """Eight tasks' K-FAC blocks and their weights (K, n, n)."""
    generator = torch.Generator().manual_seed(n)
    inputs = gram_matrices(n, 2 * n, decay=1.5, spread=1.0, generator=generator)  # two tasks' cosine: about 0.9
    outputs = gram_matrices(n, n, decay=1.0, spread=3.0, generator=generator)  # about 0.3, and of different lengths
    common, *own = torch.randn(TASKS + 1, n, n, generator=generator, dtype=torch.float64)
    weights = torch.stack([common + w for w in own])
    return [Kronecker(a[None], b[None]) for a, b in zip(inputs, outputs, strict=True)], weights


def product(blocks: list[Kronecker], v: Tensor) -> Tensor:
    """The sum of B_k V A_k over the tasks: all that conjugate gradients need."""
    total = torch.zeros_like(v)
    for block in blocks:
        total += block(v)
    return total


def right_side(blocks: list[Kronecker], weights: Tensor) -> Tensor:
    return torch.stack([block(w) for block, w in zip(blocks, weights, strict=True)]).sum(0)


def direct(blocks: list[Kronecker], weights: Tensor) -> Tensor:
    """The solution by way of the whole matrix."""
    a, b = (torch.cat([getattr(block, name) for block in blocks]) for name in ("inputs", "outputs"))
    n = weights.shape[1]
    matrix = torch.einsum("kop,kij->oipj", b, a).reshape(n * n, n * n)
    triangle = torch.linalg.cholesky(matrix)
    return torch.cholesky_solve(right_side(blocks, weights).reshape(-1, 1), triangle).view(n, n)


def by_steps(
    blocks: list[Kronecker], weights: Tensor, preconditioner: str, seconds: float, steps: int | None = None
) -> tuple[Tensor, int]:
    """The solution by conjugate gradients, and the number of steps."""
    end = time.process_time() + seconds
    start = weights.mean(0)
    inverse = approximate_inverse(blocks, start, preconditioner)
    b = right_side(blocks, weights)
    way = conjugate_gradient(lambda v: product(blocks, v), b, start, precondition=inverse)
    for step, (x, residual) in enumerate(way):
        if residual <= TOLERANCE or step == steps or time.process_time() > end:
            return x, step
    raise RuntimeError("there is no step left to take, yet the residual is too large: is the matrix singular?")


def fastest(function: Callable[[], object], repeats: int, times: int = 1) -> float:
    """The processor's seconds for a call, in the fastest of several rounds of so many calls."""
    rounds = []
    for _ in range(repeats):
        started = time.process_time()
        for _ in range(times):
            function()
        rounds.append((time.process_time() - started) / times)
    return min(rounds)


def run(n: int, preconditioner: str, seconds: float, results: multiprocessing.Queue) -> None:
    """One row of the table."""
    torch.set_num_threads(1)
    blocks, weights = system(n)
    _, _, cg_memory = measured(lambda: by_steps(blocks, weights, preconditioner, seconds, steps=10))
    started = time.process_time()
    x, steps = by_steps(blocks, weights, preconditioner, seconds)
    cg_time = time.process_time() - started
    b = right_side(blocks, weights)
    setup = fastest(lambda: by_steps(blocks, weights, preconditioner, seconds, steps=0), 3)
    one_product = fastest(lambda: weights[0] @ weights[1], 10, times=max(1, 10**7 // n**3))
    row = {
        "n": n,
        "preconditioner": preconditioner,
        "steps": steps,
        "residual": float((b - product(blocks, x)).norm() / b.norm()),
        "error": None,
        "direct / CG, time": None,
        "step / matrix product": (cg_time - setup) / steps / one_product,
        "dense in MB": 8 * n**4 / 1e6,
        "direct in MB": None,
        "CG in MB": cg_memory / 1e6,
    }
    if n in WRITTEN_OUT:
        solution, _, memory = measured(lambda: direct(blocks, weights))
        direct_time = fastest(lambda: direct(blocks, weights), 3)
        row["error"] = float((x - solution).norm() / solution.norm())
        row["direct / CG, time"] = direct_time / cg_time if cg_time < seconds else None
        row["direct in MB"] = memory / 1e6
    results.put(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=max(SIZES), help="leave out larger n")
    parser.add_argument("--seconds", type=float, default=30, help="for each case of conjugate gradients")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE}")
    options = parser.parse_args()
    context, rows = multiprocessing.get_context("spawn"), []
    for n in (n for n in SIZES if n <= options.largest):
        for preconditioner in PRECONDITIONERS:
            results: multiprocessing.Queue = context.Queue()
            process = context.Process(target=run, args=(n, preconditioner, options.seconds, results))
            process.start()
            rows.append(results.get())
            process.join()
            print(n, preconditioner, f"{rows[-1]['steps']} steps, residual {rows[-1]['residual']:.1e}", flush=True)
    table = pd.DataFrame(rows)
    for name in table.columns[3:]:
        table[name] = table[name].map(lambda x: float(f"{x:.2g}"))
    print(table.to_string(index=False, na_rep=""), flush=True)
    if options.write:
        table.to_csv(TABLE, index=False, float_format="%g")


if __name__ == "__main__":
    main()
