"""Merging eight experts of ViT-B/32's shapes: ``python benchmarks/vit.py [--peers .venv-parity/bin/python]``.

Writes a base and eight experts (88 million weights each, float32, random), merges the files by each method in a
process of its own on one thread, and reports time and memory as ratios and megabytes: time over the floor, which is
reading every byte of the nine files once and writing one of that size; memory as the largest amount of anonymous
memory in use above what the process had before. With ``--peers``, the Python of the environment that `make parity`
makes, the same files are merged by mergekit and fusion-bench as well. Everything is measured in one run, each the best
of a few rounds in turn, since times of different runs do not compare.
"""

import argparse
import json
import multiprocessing
import resource
import subprocess
import tempfile
from pathlib import Path

import pandas as pd
import torch
from merge_files import floor, run
from tqdm import tqdm

import mergekit_lite as mkl

EXPERTS = 8
FAST = ["average", "task_arithmetic", "model_stock", "dare", "ties", "pcb", "consensus", "metagpt", "awd"]
SLOW = ["breadcrumbs", "della", "tsv", "iso_c", "wudi"]  # they sort or factorise every matrix
METHODS = FAST + SLOW
HYPERPARAMETERS = {"wudi": {"solver": "exact"}}  # Adam's 300 steps would take half an hour on one core
PEERS = {
    "mergekit": ("average", "task_arithmetic", "model_stock", "dare", "ties"),
    "fusion-bench": ("average", "task_arithmetic", "model_stock", "dare", "ties", "tsv"),
}
# A peer may not ask for more bytes nor take more seconds than this, so that one that needs more fails alone.
MEMORY, PATIENCE = 16 << 30, 200
A_MINUTE = 60  # what takes longer is measured once


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of CLIP's ViT-B/32, as Hugging Face names them."""
    width, hidden, model = 768, 3072, "vision_model."
    found: dict[str, tuple[int, ...]] = {
        f"{model}embeddings.class_embedding": (width,),
        f"{model}embeddings.patch_embedding.weight": (width, 3, 32, 32),
        f"{model}embeddings.position_embedding.weight": (50, width),
    }

    def layer(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    layer(f"{model}pre_layrnorm", width)
    for block in (f"{model}encoder.layers.{number}." for number in range(12)):
        for part in ("k", "v", "q", "out"):
            layer(f"{block}self_attn.{part}_proj", width, width)
        layer(f"{block}layer_norm1", width)
        layer(f"{block}mlp.fc1", hidden, width)
        layer(f"{block}mlp.fc2", width, hidden)
        layer(f"{block}layer_norm2", width)
    layer(f"{model}post_layernorm", width)
    return found


def write_checkpoints(folder: Path) -> None:
    base: dict[str, torch.Tensor] = {}
    for seed in range(EXPERTS + 1):
        generator = torch.Generator().manual_seed(seed)
        noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes().items()}
        if seed == 0:
            base = {name: 0.02 * tensor for name, tensor in noise.items()}
        mkl.save(
            base if seed == 0 else {n: base[n] + 0.001 * t for n, t in noise.items()}, folder / f"{seed}.safetensors"
        )


def ours(method: str, folder: Path) -> tuple[float, int]:
    """Seconds and bytes of one of our methods."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue = context.Queue()
    process = context.Process(target=run, args=(method, folder, EXPERTS, results, HYPERPARAMETERS.get(method, {})))
    process.start()
    memory, seconds = results.get()
    process.join()
    return seconds, memory


def peers(python: Path, tool: str, method: str, folder: Path) -> tuple[float, int] | None:
    """Seconds and bytes of a peer; None if it asks for more memory or time than it may have."""
    script = Path(__file__).with_name("peers.py")
    try:
        done = subprocess.run(
            [python, script, method, tool, folder, folder / "out.safetensors"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        if "memory" in done.stderr.lower():
            return None
        raise RuntimeError(done.stderr[-2000:])
    result = json.loads(done.stdout.splitlines()[-1])
    return result["seconds"], result["memory"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="the Python that has mergekit and fusion-bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where the files lie meanwhile (4 GB); /dev/shm leaves out the disk"
    )
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--out", type=Path, default=Path("mergekit_lite/lab/tables/merge-benchmark.csv"))
    options = parser.parse_args()
    jobs = [("mergekit_lite", method) for method in options.methods]
    if options.peers:
        jobs += [(tool, method) for tool, methods in PEERS.items() for method in methods if method in options.methods]
    floors: list[float] = []
    measured: dict[tuple[str, str], list[tuple[float, int]]] = {job: [] for job in jobs}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_checkpoints(folder)
        again = jobs
        for _ in tqdm(range(options.rounds), desc="rounds"):
            for tool, method in tqdm(again, leave=False):
                floors.append(floor(folder, EXPERTS))
                found = ours(method, folder) if tool == "mergekit_lite" else peers(options.peers, tool, method, folder)
                if found:
                    measured[tool, method].append(found)
            again = [job for job in jobs if measured[job] and measured[job][0][0] < A_MINUTE]
    best = min(floors)
    rows = [
        {
            "method": method,
            "tool": tool,
            "time / floor": round(min(seconds for seconds, _ in results) / best, 1) if results else None,
            "memory in MB": round(max(memory for _, memory in results) / 1e6) if results else None,
        }
        for (tool, method), results in measured.items()
    ]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    print(f"floor: {best:.2f} s, from {best:.2f} to {max(floors):.2f}")
    print(f"blank: wanted more than {MEMORY >> 30} GiB or {PATIENCE} s")
    table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
