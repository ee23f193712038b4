"""What a merge for every image costs: ``python benchmarks/wemoe.py``.

pocket8's network with eight experts, its blocks as mixtures, beside the plain network, for batches of one image and of
more, on one thread: the time of a forward pass, the memory it adds (each in a process of its own), and the numbers that
are stored. Times are the shortest of several rounds, in which the ways take turns.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from adamerging import fastest, memory_of
from torch import Tensor, nn

import mergekit_lite as mkl
from mergekit_lite.lab.adaptation import blocks
from mergekit_lite.suites.speed import keep_freed_memory

WAYS = ("plain", "WEMoE by batch", "WEMoE by image")


def network_of(way: str) -> tuple[nn.Module, Tensor]:
    """The network, and some images of all tasks."""
    suite = mkl.load_suite("pocket8", device="cpu")
    images = torch.cat([suite.calibration(task, 8, split="test", batch=8)[0][0] for task in suite.tasks])
    if way == "plain":
        return suite.build().eval(), images
    network = mkl.WEMoE.start(suite.task_vectors, suite.model, images[:1], blocks(suite.model), scale=0.2, init=0.2)
    for router in network.routers.values():  # as if they were trained: images get weights that differ
        router[2].weight.data.mul_(10)
    network.route = way.removeprefix("WEMoE by ")
    return network, images


def forward_of(way: str, batch: int) -> Callable[[], Tensor]:
    network, images = network_of(way)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:batch]]

    @torch.no_grad()
    def forward() -> Tensor:
        return torch.as_tensor(network(images))

    return forward


def several_of(way: str, batch: int) -> Callable[[], object]:
    """Some forward passes, as the memory of one is looked at only a few times."""
    forward = forward_of(way, batch)
    return lambda: [forward().sum() for _ in range(30)]


def stored(way: str) -> int:
    return sum(tensor.numel() for tensor in network_of(way)[0].state_dict().values())


@torch.no_grad()
def check() -> None:
    """Routed by image, images in company get the answers that they get alone, routed by batch they do not."""
    network, images = network_of("WEMoE by image")
    assert isinstance(network, mkl.WEMoE)
    by_image = network(images[::9])
    network.route = "batch"
    alone, together = torch.cat([network(x[None]) for x in images[::9]]), network(images[::9])
    apart = [float((answers - alone).norm() / alone.norm()) for answers in (by_image, together)]
    assert apart[0] < 1e-4, apart
    assert apart[1] > 1e-2, apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="images, at most 64")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a file for the table (csv)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    check()
    numbers = {way: stored(way) for way in WAYS}
    rows = []
    for batch in options.batches:
        seconds = fastest({way: forward_of(way, batch) for way in WAYS}, options.rounds)
        memory = {way: memory_of(several_of, way, batch) for way in WAYS}
        rows += [
            {
                "images": batch,
                "way": way,
                "milliseconds": round(1000 * seconds[way], 1),
                "time / plain": round(seconds[way] / seconds["plain"], 2),
                "added memory (MB)": round(memory[way] / 1e6, 1),
                "added memory / plain": round(memory[way] / memory["plain"], 2),
                "stored / plain": round(numbers[way] / numbers["plain"], 2),
            }
            for way in WAYS
        ]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
