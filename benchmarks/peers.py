"""Merging files with mergekit or fusion-bench: ``PYTHON benchmarks/peers.py METHOD PEER FOLDER OUT``.

PYTHON is that of the environment which `make parity` makes. FOLDER holds the base, ``0.safetensors``, and K experts,
``1.safetensors`` to ``K.safetensors``; OUT is the file to write. Prints one line of JSON: the seconds that reading,
merging and writing took, on one thread, and by how many bytes anonymous memory rose at most meanwhile.

Both peers are used as is best for them. mergekit runs its own command for files, `mergekit-pytorch`, which goes tensor
by tensor but collects the merged ones until it writes them. fusion-bench merges modules; they are taken from the
mapped files when its algorithm asks for them, and the merged one is written with safetensors. What is imported, and a
merge of two small models before, are not counted.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from memory import measured
from safetensors.torch import load_file, save_file
from torch import nn

# Hyperparameters are the papers': for eight tasks without validation data.
SCALE, DENSITY, DROP = 0.3, 0.2, 0.9
MERGEKIT = {
    "average": ("linear", {"weight": 1.0}),
    "task_arithmetic": ("task_arithmetic", {"weight": SCALE}),
    "ties": ("ties", {"weight": 1.0, "density": DENSITY}),
    "dare": ("dare_linear", {"weight": SCALE, "density": 1 - DROP}),
    "model_stock": ("model_stock", {}),
}
FUSION_BENCH = {
    "average": ("simple_average.SimpleAverageAlgorithm", {}),
    "task_arithmetic": ("task_arithmetic.TaskArithmeticAlgorithm", {"scaling_factor": SCALE}),
    "ties": (
        "ties_merging.TiesMergingAlgorithm",
        {"scaling_factor": 1.0, "threshold": DENSITY, "remove_keys": [], "merge_func": "mean"},
    ),
    "dare": (
        "dare.DareTaskArithmetic",
        {"scaling_factor": SCALE, "sparsity_ratio": DROP, "only_on_linear_weights": False},
    ),
    "model_stock": ("model_stock.ModelStock", {}),
    "tsv": ("task_singular_vector.TaskSingularVectorMerging", {"alpha": 1.0}),
    "wudi": ("wudi.WUDIMerging", {"iter_num": 300}),
}
Merge = Callable[[list[Path], Path], None]


def mergekit(method: str) -> Merge:
    """The command of mergekit for checkpoints that are plain files."""
    from mergekit.scripts.merge_raw_pytorch import main as command

    name, parameters = MERGEKIT[method]

    def merge(files: list[Path], out: Path) -> None:
        experts = [{"model": str(path)} for path in files[1:]]
        config = {"merge_method": name, "models": experts, "parameters": parameters}
        if name != "linear":  # which would take the base for one more model
            config["base_model"] = str(files[0])
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(json.dumps(config))  # which is YAML, too
            command([str(path), str(Path(folder) / "merged")], standalone_mode=False)
            os.replace(Path(folder) / "merged" / "model.safetensors", out)

    return merge


def fusion_bench(method: str) -> Merge:
    """fusion-bench's algorithms on models that are read when they are needed."""
    from fusion_bench.modelpool import BaseModelPool
    from fusion_bench.models.parameter_dict import ParameterDictModel

    place, arguments = FUSION_BENCH[method]
    module, algorithm = place.split(".")
    make = getattr(importlib.import_module(f"fusion_bench.method.{module}"), algorithm)

    class Files(BaseModelPool):
        """A model pool that makes a module of a file."""

        def load_model(self, name: str) -> nn.Module:
            return ParameterDictModel({n: nn.Parameter(t) for n, t in load_file(self._models[name]).items()})

    def merge(files: list[Path], out: Path) -> None:
        names = ["_pretrained_", *(f"expert{k}" for k in range(1, len(files)))]
        pool = Files({name: str(path) for name, path in zip(names, files, strict=True)})
        merged = make(**arguments).run(pool)
        save_file({name: t.detach().contiguous() for name, t in merged.state_dict().items()}, out)

    return merge


def warm_up(merge: Merge) -> None:
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{k}.safetensors" for k in range(3)]
        for path in files:
            save_file({"part.weight": torch.randn(8, 8), "part.bias": torch.randn(8)}, path)
        merge(files, Path(name) / "out.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = {"mergekit": (mergekit, MERGEKIT), "fusion-bench": (fusion_bench, FUSION_BENCH)}
    parser.add_argument("method")
    parser.add_argument("peer", choices=peers)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    make, methods = peers[options.peer]
    if options.method not in methods:
        parser.error(f"{options.peer} has no {options.method}; it has {', '.join(methods)}.")
    files = sorted(options.folder.glob("[0-9]*.safetensors"), key=lambda path: int(path.stem))
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    torch.manual_seed(0)
    os.environ |= {"TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):  # both peers tell what they do
        merge = make(options.method)
        warm_up(merge)
        os.sync()  # what was written before is not their time
        _, seconds, memory = measured(lambda: merge(files, options.out))
    print(
        json.dumps(
            {
                "method": options.method,
                "peer": options.peer,
                "version": importlib.metadata.version(options.peer),
                "experts": len(files) - 1,
                "seconds": seconds,
                "memory": memory,
            }
        )
    )


if __name__ == "__main__":
    main()
