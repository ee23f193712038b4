"""AWD in d dimensions against AWD on the Gram matrix: ``python benchmarks/disentangle.py``.

For task vectors of d weights from K experts, side by side in one process each:

- the paper's descent (300 steps) on vectors of d numbers, against the same descent in K coefficients;
- the same descent in d dimensions against the exact minimum in K + 1 numbers;
- the pass that computes the Gram matrix, against reading K vectors of d numbers from memory once;
- the largest amount of memory that each route takes beside the experts.

All vectors are float32, all on one thread. In high dimension a few steps are timed and the time for 300 is
extrapolated: every step does the same work.
"""

import argparse
import multiprocessing
import time
from pathlib import Path

import pandas as pd
import torch
from memory import measured

import mergekit_lite as mkl
from mergekit_lite.data_free.awd_solvers import descend, minimise

STEPS = 300
ALPHA = 1e-3
LAYER = 1_000_000  # weights in a tensor
CASES = [(d, k) for d in (10**5, 10**6, 10**7) for k in (2, 8, 32)] + [(9 * 10**7, 8), (10**8, 2)]
COLUMNS = {
    "d": "weights d",
    "K": "experts K",
    "descent": "descent, d numbers / K numbers",
    "exact": "descent, d numbers / exact",
    "solve": "exact, time / that at d = 100,000",
    "gram": "Gram pass / reading once",
    "form": "Gram pass / forming the task vectors",
    "memory": "memory, d numbers / Gram",
}


def task_vectors(d: int, k: int) -> mkl.TaskVectors:
    """K experts that share a part, in tensors of at most a million weights."""
    generator = torch.Generator().manual_seed(0)
    sizes = [LAYER] * (d // LAYER) or [d]

    def draw(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    base = {f"layer{i}": draw(size) for i, size in enumerate(sizes)}
    shared = {name: 0.003 * draw(len(t)) for name, t in base.items()}
    experts = [{name: t + shared[name] + 0.01 * draw(len(t)) for name, t in base.items()} for _ in range(k)]
    return mkl.TaskVectors(base, experts)


def fastest(function, repeats: int) -> float:
    """The shortest of several runs: what the machine can do undisturbed."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def run(d: int, k: int, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    tv = task_vectors(d, k)
    repeats = 2 if d * k > 10**8 else 5
    gram, _, gram_memory = measured(tv.gram)
    gram_time = fastest(tv.gram, repeats)
    form_time = fastest(lambda: [None for _ in tv.layers()], repeats)
    identity = torch.eye(k, dtype=torch.float64)
    small = fastest(lambda: descend(identity, gram, alpha=ALPHA, iterations=STEPS), 5)
    exact = fastest(lambda: minimise(gram, alpha=ALPHA), 5)

    flat = tv.flat()
    read_time = fastest(flat.sum, repeats)
    steps = max(2, min(STEPS, int(3e8 / (d * k))))
    if d <= 10**6:  # later, float32 sums of so many products would take another way at the kinks
        same, few = (descend(*basis, alpha=ALPHA, iterations=10)[0] for basis in ((identity, gram), (flat, None)))
        assert (same.float() @ flat - few).norm() < 1e-3 * few.norm(), "not the same descent"
    _, seconds, full_memory = measured(lambda: descend(flat, None, alpha=ALPHA, iterations=steps))
    full = seconds / (steps + 1) * (STEPS + 1)
    results.put(
        {
            "d": d,
            "K": k,
            "descent": full / small,
            "exact": full / exact,
            "solve": exact,
            "gram": gram_time / read_time,
            "form": gram_time / form_time,
            "memory": (full_memory + flat.numel() * 4) / max(gram_memory, 1 << 20),  # stacking them is part of it
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=float, default=1e8, help="leave out larger d; 1e8 needs 12 GB of memory")
    parser.add_argument("--out", type=Path, default=Path("book/tables/awd-benchmark.csv"))
    options = parser.parse_args()
    context, rows = multiprocessing.get_context("spawn"), []
    for d, k in CASES:
        if d <= options.largest:
            results: multiprocessing.Queue = context.Queue()
            process = context.Process(target=run, args=(d, k, results))
            process.start()
            rows.append(results.get())
            process.join()
            print({name: round(value, 2) for name, value in rows[-1].items()})
    table = pd.DataFrame(rows)
    first = table[table["d"] == table["d"].min()].set_index("K")["solve"]
    table["solve"] /= table["K"].map(first)
    rounded = table.assign(**{name: table[name].map(lambda x: float(f"{x:.2g}")) for name in list(COLUMNS)[2:]})
    rounded.rename(columns=COLUMNS).to_csv(options.out, index=False, float_format="%g")
    million = rounded[rounded["d"] == 10**6]
    assert (million["descent"] >= 100).all(), "less than a hundred times as fast at d = 10^6"


if __name__ == "__main__":
    main()
