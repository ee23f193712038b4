"""Inputs that were made to hurt: damaged files, odd headers, wrong meanings, pickles of all kinds, words typed wrongly.

`attack(seed, folder)` makes one and merges it. There are two ways to pass: the right result, as libraries other than
this package read the files and float64 averages them; or an error that a reader can act on, which names the file or the
tensor. Everything else (another exception, a wrong number, a file that is left behind) fails.
"""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import mergekit_lite as mkl
from mergekit_lite.cli import app

State = dict[str, Tensor]
CLEAR = (ValueError, TypeError, KeyError)  # CheckpointError is a ValueError


def model(seed: int) -> State:
    """Weights of several shapes and dtypes, statistics, a counter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "blocks.0.weight": draw(4, 3),
        "blocks.1.weight": draw(3, 2, 3, 3),
        "blocks.1.bias": draw(3).half(),
        "norm.running_mean": draw(3),
        "norm.running_var": draw(3).abs(),
        "norm.num_batches_tracked": torch.tensor(seed),
        "scale": draw(),
        "empty": draw(0, 2),
    }


def average(base: State, experts: list[State]) -> State | None:
    """The average, straight from its formula; None where there is none."""
    merged = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            merged[name] = tensor
            continue
        others = [expert.get(name) for expert in experts]
        if any(o is None or o.shape != tensor.shape or not o.is_floating_point() for o in others):
            return None
        values = torch.stack([o.double() for o in others if o is not None])
        if not (values.isfinite().all() and tensor.isfinite().all()) or (name.endswith("var") and (values < 0).any()):
            return None
        merged[name] = values.mean(0)
    floats = {name for expert in experts for name, t in expert.items() if t.is_floating_point() or t.is_complex()}
    return merged if floats <= set(base) else None


def agrees(merged: State, expected: State) -> bool:
    """Whether a merge is the expected one, to the precision of its dtypes."""
    return set(merged) == set(expected) and all(
        torch.allclose(merged[n].double(), expected[n].double(), rtol=2e-3, atol=1e-3 * float(expected[n].abs().max()))
        for n in expected
        if expected[n].numel()
    )


def attack(seed: int, folder: Path) -> str:
    """One case: ``"right"`` or ``"refused"``.

    Raises:
        AssertionError: it was neither.
    """
    chance = random.Random(seed)
    paths = [folder / f"{name}.safetensors" for name in ("base", "good", "odd")]
    for k, path in enumerate(paths):
        save_file(model(k), path, {"format": "pt"})
    family = chance.choice((bytes_of_a_file, header, meaning, pickles, shards, words))
    if family is words:
        return words(chance, paths, folder)
    odd = family(chance, paths[2])
    expected = None
    if (theirs := as_others_read(odd)) is not None:
        expected = average(load_file(paths[0]), [load_file(paths[1]), theirs])
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    verdict = judged(lambda: mkl.average(mkl.TaskVectors(paths[0], [paths[1], odd])), expected, seed)
    out = folder / "out.safetensors"
    in_files = judged(lambda: mkl.load(mkl.merge_files(mkl.average, paths[0], [paths[1], odd], out)), expected, seed)
    assert verdict == in_files, f"seed {seed}: {verdict} in memory, {in_files} in files"
    assert out.exists() == (in_files == "right"), f"seed {seed}: what is written is not what was said"
    out.unlink(missing_ok=True)
    after = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert before == after, f"seed {seed}: inputs changed, or files were left behind"
    return verdict


def judged(merge: Any, expected: State | None, seed: int) -> str:
    """What came out of one merge."""
    told = None
    try:
        merged = merge()
    except CLEAR as problem:
        told = str(problem.args[0]) if problem.args else ""
    if told is not None:
        named = any(word in told for word in ("'blocks", "'norm", "'scale", "'empty", "odd", "expert"))
        assert named, f"seed {seed}: the error names neither file nor tensor: {told}"
        return "refused"
    assert expected is not None, f"seed {seed}: accepted, though it is no model like the base"
    assert agrees(merged, expected), f"seed {seed}: a wrong merge, and nothing said"
    return "right"


def as_others_read(path: Path) -> State | None:
    """The same file read by the libraries that define the formats; None if they refuse it."""
    try:
        if path.name.endswith(".index.json"):
            where = json.loads(path.read_text())["weight_map"]
            if any(Path(shard).name != shard for shard in where.values()):
                return None
            return {name: load_file(path.parent / shard)[name] for name, shard in where.items()}
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, weights_only=True)
        while not all(isinstance(value, Tensor) for value in found.values()):
            inner = [v for key, v in found.items() if isinstance(v, dict) and "optim" not in key]
            if len(inner) != 1:
                return None
            found = inner[0]
        state = {name: tensor for name, tensor in found.items() if tensor.layout == torch.strided}
        return {name.removeprefix("module."): t for name, t in state.items()} if len(state) == len(found) else None
    except Exception:
        return None


# ---------------------------------------------------------------- families


def bytes_of_a_file(chance: random.Random, path: Path) -> Path:
    """Cut, flipped, longer."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    kind = chance.choice(("cut", "cut", "bit of the header", "bit", "length", "longer", "none"))
    if kind == "cut":
        data = data[: chance.randrange(len(data))]
    elif kind == "bit of the header":
        data[8 + chance.randrange(length)] ^= 1 << chance.randrange(8)
    elif kind == "bit":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "length":
        data[:8] = chance.choice((0, 1, length - 1, length + 8, 2**40, 2**63)).to_bytes(8, "little")
    elif kind == "longer":
        data += bytes(chance.randrange(1, 40))
    path.write_bytes(data)
    return path


def header(chance: random.Random, path: Path) -> Path:
    """A header that says other things about the same bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    told = json.loads(data[8 : 8 + length])
    name, other = chance.sample([n for n in told if n != "__metadata__"], 2)
    kind = chance.choice(("dtype", "shape", "offsets", "swap", "gone", "ties", "ties", "metadata", "twice", "text"))
    if kind == "dtype":
        told[name]["dtype"] = chance.choice(("F16", "BF16", "I8", "U8", "F64", "C64", "F4", "F8_E4M3", "BOOL", "X", 3))
    elif kind == "shape":
        told[name]["shape"] = chance.choice(([], [1], [2, 2], [-1], [3, 2, 3, 3], "x", [4, 3], [2**62, 4]))
    elif kind == "offsets":
        told[name]["data_offsets"] = [chance.randrange(-4, 300), chance.randrange(-4, 300)]
    elif kind == "swap":
        told[name], told[other] = told[other], told[name]
    elif kind == "gone":
        del told[name]
    elif kind == "ties":
        told["__metadata__"] = {
            f"tied:{chance.choice((name, 'blocks.9'))}": chance.choice((name, other, "nothing", ""))
        }
    elif kind == "metadata":
        told["__metadata__"] = chance.choice(({}, {"a": "b" * 9000}, {"a": 3}, [], None))
    text = json.dumps(told)
    if kind == "twice":
        text = text[:-1] + f', "{name}": {json.dumps(told[other])}' + "}"
    if kind == "text":
        text = chance.choice(("", "[]", "null", text[:-1], text.replace(":", "", 1), "{" * 500))
    raw = text.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
    return path


def changed(chance: random.Random, state: State) -> State:
    """A state dict with one thing that may be wrong."""
    name = chance.choice(list(state))
    tensor = state[name]
    kind = chance.choice(("number", "number", "dtype", "shape", "gone", "more", "renamed", "prefix", "none"))
    if kind == "number" and tensor.is_floating_point() and tensor.numel():
        worst = chance.choice((float("nan"), float("inf"), -float("inf"), 3e38, -1e9, 1e-40, 0.0))
        tensor.view(-1)[chance.randrange(tensor.numel())] = worst
    elif kind == "dtype":
        state[name] = tensor.to(
            chance.choice((torch.float64, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64))
        )
    elif kind == "shape":
        turned = tensor.transpose(0, -1).contiguous() if tensor.ndim else tensor[None]
        state[name] = chance.choice((tensor[None], tensor.flatten(), torch.zeros(7), turned))
    elif kind == "gone":
        del state[name]
    elif kind == "more":
        state["blocks.7.weight"] = torch.ones(2)
    elif kind == "renamed":
        state[name + "x"] = state.pop(name)
    elif kind == "prefix":
        state = {"module." + n: t for n, t in state.items()}
    return state


def meaning(chance: random.Random, path: Path) -> Path:
    """A whole file with something else in it."""
    state = changed(chance, load_file(path))
    if not all(name.startswith("module.") for name in state):
        save_file(state, path)
    return path


def pickles(chance: random.Random, path: Path) -> Path:
    """What torch.save, pickle and their users write."""
    state: Any = changed(chance, load_file(path))
    for key in chance.choice(((), (), ("model",), ("state_dict", "model"))):
        state = {key: state, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}}
    hurt = chance.choice(("no",) * 6 + ("code", "sparse", "list", "number"))
    if hurt == "code":
        state = {**state, "args": Path("x")}
    elif hurt == "sparse":
        state = {"blocks.0.weight": torch.eye(3).to_sparse(), "scale": torch.ones(())}
    elif hurt == "list":
        state = [state]
    elif hurt == "number":
        state = {"blocks.0.weight": 3.0, "scale": torch.ones(())}
    path = path.with_name("odd" + chance.choice((".pt", ".pth.tar", ".bin", ".CKPT", ".weights")))
    if chance.random() < 0.1:
        path.write_bytes(pickle.dumps({"a": 1, "b": [2]}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=chance.random() < 0.7)
    data = bytearray(path.read_bytes())
    if chance.random() < 0.25:
        if chance.random() < 0.5:
            data = data[: chance.randrange(len(data))]
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
    return path


def shards(chance: random.Random, path: Path) -> Path:
    """Two shards and an index that may lie."""
    state = load_file(path)
    names = list(state)
    files = ["odd-1.safetensors", "odd-2.safetensors"]
    where = {name: files[i % 2] for i, name in enumerate(names)}
    for file in files:
        save_file({name: state[name] for name in names if where[name] == file}, path.parent / file)
    told: Any = {"metadata": {}, "weight_map": where}
    name = chance.choice(names)
    kind = chance.choice(("none", "none", "wrong shard", "missing shard", "outside", "gone", "more", "no map", "text"))
    if kind == "wrong shard":
        where[name] = files[where[name] == files[0]]
    elif kind == "missing shard":
        where[name] = "odd-3.safetensors"
    elif kind == "outside":
        where[name] = "../" + where[name]
    elif kind == "gone":
        del where[name]
    elif kind == "more":
        where["blocks.8"] = files[0]
    elif kind == "no map":
        told = chance.choice(({}, [], {"weight_map": []}, {"weight_map": None}, 3))
    index = path.with_name("odd.safetensors.index.json")
    index.write_text("{" if kind == "text" else json.dumps(told))
    return index


VALUES = (
    "",
    "0.3",
    ".5",
    "1e3",
    "-1",
    "nan",
    "inf",
    "1e400",
    "abc",
    "true",
    "[1,2]",
    "0.1,0.2",
    "None",
    "{",
    "9" * 400,
    "layer",
)


def words(chance: random.Random, paths: list[Path], folder: Path) -> str:
    """A command line with hyperparameters that may make no sense."""
    name = chance.choice(list(mkl.methods(mkl.Need.WEIGHTS)))
    keys = ("scale", "density", "granularity", "t", "weights", "clip", "forget", "steps", "drop", "alpha", "x", "")
    settings = [f"{chance.choice(keys)}={chance.choice(VALUES)}" for _ in range(chance.randrange(3))]
    out = folder / chance.choice(("out.safetensors", "out"))
    asked = ["merge", name, *map(str, paths), "--out", str(out)]
    asked += [word for setting in settings for word in ("--set", setting)]
    done = CliRunner().invoke(app, asked)
    assert done.exception is None or isinstance(done.exception, SystemExit), f"{asked}: {done.exception!r}"
    assert "Traceback" not in done.output, done.output
    assert out.exists() == (done.exit_code == 0), f"{asked}: {done.output}"
    if out.is_dir():
        for file in out.iterdir():
            file.unlink()
        out.rmdir()
    out.unlink(missing_ok=True)
    assert sorted(folder.iterdir()) == sorted(paths), f"{asked}: something was left behind"
    return "right" if done.exit_code == 0 else "refused"
