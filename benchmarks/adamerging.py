"""A step of AdaMerging against a training step: ``python benchmarks/adamerging.py``.

For pocket8's network and 16 images of every task, on one thread, each in a process of its own for its memory:

- training: forward and backward for every task, and a step of Adam on the weights: what nobody can avoid;
- AdaMerging as in the package: the same gradient, then K inner products per tensor, layer-wise and task-wise;
- the straightforward way: autograd through the sum of the task vectors, all tasks' losses added up, one backward;
- the released code's way: likewise, but the merge is built anew for every task.

Times are the shortest of several rounds, in which the ways take turns; memory is what a step adds to what stood before.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from memory import give_back_freed_memory, measured
from torch.func import functional_call

import mergekit_lite as mkl
from mergekit_lite.adaptive.adamerging import losses_and_slopes
from mergekit_lite.suites.speed import keep_freed_memory

BATCH = 16
WAYS = ("training", "AdaMerging, layer", "AdaMerging, task", "straightforward", "as released")


def steps(tasks: int) -> tuple[dict[str, Callable[[], object]], Callable[[], float]]:
    """A function per way that makes one step; and how far the gradients of the coefficients are apart."""
    suite = mkl.load_suite("pocket8", device="cpu")
    names = list(suite.tasks)[:tasks]
    tv = suite.task_vectors.subset(names)
    batches = {task: suite.calibration(task, BATCH, split="test", batch=BATCH)[0] for task in names}
    images = {task: x for task, (x, _) in batches.items()}
    layers = {name: (theta0, taus) for name, theta0, taus in tv.layers()}
    entropies = mkl.LossOfWeights(suite.model, suite.heads, tv)

    network = suite.build()
    weights_adam = torch.optim.Adam(network.parameters(), lr=1e-9)

    def training() -> None:
        weights_adam.zero_grad()
        for task, (x, y) in batches.items():
            F.cross_entropy(suite.heads[task](network(x)), y).backward()
        weights_adam.step()

    def adamerging(free: torch.Tensor) -> Callable[[], None]:
        adam = torch.optim.Adam([free], lr=1e-9)

        def step() -> None:
            _, free.grad = losses_and_slopes(free, True, layers, entropies, images)
            adam.step()

        return step

    of_layers = torch.full((len(layers), tasks), 0.3, dtype=torch.float64)
    of_tasks = torch.full((tasks,), 0.3, dtype=torch.float64)
    lambdas = torch.full((len(layers), tasks), 0.3, requires_grad=True)
    lambdas_adam = torch.optim.Adam([lambdas], lr=1e-9)
    parameters = dict(network.named_parameters())

    def merged() -> dict[str, torch.Tensor]:
        rows = zip(layers.items(), lambdas.clamp(0, 1), strict=True)
        state = {}
        for (name, (theta0, taus)), row in rows:
            weight = theta0 + sum(lam * tau for lam, tau in zip(row, taus, strict=True))
            state[name] = weight if name in parameters else weight.detach()
        return state

    def straightforward(anew: bool) -> Callable[[], None]:
        def step() -> None:
            lambdas_adam.zero_grad()
            weights = None if anew else merged()
            total = torch.zeros(())
            for task, x in images.items():
                logits = suite.heads[task](functional_call(suite.model, weights or merged(), (x,)))
                total = total - (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            total.backward()
            lambdas_adam.step()

        return step

    def apart() -> float:
        return float((of_layers.grad - lambdas.grad).norm() / of_layers.grad.norm())

    made = (training, adamerging(of_layers), adamerging(of_tasks), straightforward(False), straightforward(True))
    return dict(zip(WAYS, made, strict=True)), apart


def step_of(way: str, tasks: int) -> Callable[[], object]:
    return steps(tasks)[0][way]


def memory_of(make: Callable[..., Callable[[], object]], *arguments: object) -> int:
    """The bytes that ``make(*arguments)()`` adds to what its making left, in a process of its own, on one thread."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue = context.Queue()
    process = context.Process(target=_measure_memory, args=(results, make, *arguments))
    process.start()
    memory: int = results.get()
    process.join()
    return memory


def _measure_memory(
    results: multiprocessing.Queue, make: Callable[..., Callable[[], object]], *arguments: object
) -> None:
    torch.set_num_threads(1)
    function = make(*arguments)
    give_back_freed_memory()  # or the function would use it again, and seem to need none
    results.put(measured(function)[2])


def fastest(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The shortest seconds of each of several functions, which take turns."""
    seconds = dict.fromkeys(ways, float("inf"))
    for round_ in range(rounds + 1):
        for way, function in ways.items():
            started = time.perf_counter()
            function()
            if round_:  # the first is for warming up
                seconds[way] = min(seconds[way], time.perf_counter() - started)
    return seconds


def run(tasks: int, rounds: int) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    keep_freed_memory()
    made, apart = steps(tasks)
    seconds = fastest(made, rounds)
    assert apart() < 1e-4, "not the same gradient"
    return [
        {
            "K": tasks,
            "way": way,
            "seconds": round(seconds[way], 3),
            "time / training": round(seconds[way] / seconds["training"], 3),
            "memory (MB)": round(memory_of(step_of, way, tasks) / 1e6),
        }
        for way in WAYS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8], help="how many tasks, at most 8")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="a file for the table (csv)")
    options = parser.parse_args()
    table = pd.DataFrame([row for tasks in options.tasks for row in run(tasks, options.rounds)])
    print(table.to_string(index=False))
    if options.out:
        table.to_csv(options.out, index=False)
    ours = table[table["way"].str.startswith("AdaMerging")]
    assert (ours["time / training"] <= 2).all(), "a step costs more than two training steps"


if __name__ == "__main__":
    main()
