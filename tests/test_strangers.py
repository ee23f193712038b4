"""The main job on files that nobody here wrote: what the README promises, in the README's words."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import mergekit_lite as mkl
from mergekit_lite.cli import app
from mergekit_lite.suites.vision import import_timm
from tests.conftest import small_net

README = (Path(__file__).parent.parent / "README.md").read_text()
OWN = README.split("## Your own models")[1].split("## Methods")[0]


def same(one, other) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in other)


def call(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


# ---------------------------------------------------------------- the README's own lines


def test_the_readmes_lines_run_on_files_of_all_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mkl.save(small_net(0).state_dict(), "base.safetensors")
    prefixed = {f"module.{name}": tensor for name, tensor in small_net(1).state_dict().items()}
    torch.save({"state_dict": prefixed, "epoch": 3}, "birds.pth.tar", _use_new_zipfile_serialization=False)
    mkl.save(small_net(2).state_dict(), "cars.safetensors")
    mkl.merge_files(mkl.average, "cars.safetensors", ["cars.safetensors"], "cars_folder", max_shard_size=200)

    python, shell = re.findall(r"```(?:python)?\n(.*?)```", OWN, re.DOTALL)
    found: dict = {}
    exec(python, found)
    expected = mkl.ties(mkl.TaskVectors(small_net(0), [small_net(1), small_net(2)]), density=0.2)
    assert same(found["merged"], expected)
    assert same(mkl.load("merged.safetensors"), expected)
    assert same(mkl.load("merged_folder"), expected)
    Path("merged.safetensors").unlink()
    for line in shell.strip().splitlines():
        program, *words = shlex.split(line)
        assert program == "mergekit-lite"
        call(*words)
    assert same(mkl.load("merged.safetensors"), expected)


def test_two_old_checkpoints_with_wrappers_and_prefixes(tmp_path):
    """As torch 1.4 and its users wrote them: no zip archive, a dict around the weights, names with a prefix."""
    paths = [tmp_path / name for name in ("base.pth", "one.pth", "two.pth")]
    wrappers = [
        lambda s: s,
        lambda s: {"model": s, "optimizer": {"state": {}}},
        lambda s: {"net": {"ema": s}, "step": 1},
    ]
    for k, (path, prefix, wrap) in enumerate(zip(paths, ("", "module.", "model.encoder."), wrappers, strict=True)):
        state = {prefix + name: tensor for name, tensor in small_net(k).state_dict().items()}
        torch.save(wrap(state), path, _use_new_zipfile_serialization=False)
        assert path.read_bytes()[:1] == b"\x80"
    expected = mkl.task_arithmetic(mkl.TaskVectors(small_net(0), [small_net(1), small_net(2)]), scale=0.5)
    assert same(mkl.task_arithmetic(mkl.TaskVectors(paths[0], paths[1:]), scale=0.5), expected)
    call("merge", "task_arithmetic", *paths, "--set", "scale=.5", "--out", tmp_path / "o.safetensors")
    assert same(mkl.load(tmp_path / "o.safetensors"), expected)


# ---------------------------------------------------------------- four families of networks, every method

NETWORKS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4},
    ),
}
# What a method needs besides its defaults, as the command line takes it.
NEEDED = {
    "linear_interpolation": {"t": "0.3"},
    "negation": {"forget": "c"},
    "analogy": {"a": "a", "b": "b", "c": "c"},
    "wudi": {"steps": "10"},
    "awd": {"granularity": "layer"},
}


def networks(name: str) -> list[nn.Module]:
    """A base and three experts, in channels-last, each with statistics of its own."""
    family, options = NETWORKS[name]
    made = []
    for seed in range(4):
        torch.manual_seed(0)
        net = import_timm().create_model(family, num_classes=0, **options)
        torch.manual_seed(seed)
        if seed:
            for parameter in net.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
        net.train()
        with torch.no_grad():  # moves running statistics, where there are any
            net(torch.randn(8, 3, 32, 32) * (1 + seed))
        made.append(net.eval().to(memory_format=torch.channels_last))
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two tasks: bright and dark in 16 bits, and shapes on a transparent ground."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "test"):
        for i in range(4):
            for low, name in ((0, "dark"), (40_000, "bright")):
                pixels = rng.integers(low, low + 25_000, (20, 20)).astype(np.uint16)
                (root / "deep" / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / "deep" / split / name / f"{i}.png")
            for rows, name in ((slice(0, 8), "top"), (slice(12, 20), "bottom")):
                glyph = np.zeros((20, 20, 4), np.uint8)
                glyph[rows, 2 + i : 16, 3] = 255
                (root / "glyphs" / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(glyph).save(root / "glyphs" / split / name / f"{i}.png")
    return [root / "deep", root / "glyphs"]


@pytest.mark.parametrize("family", NETWORKS)
def test_every_method_merges_networks_of_this_family(tmp_path, folders, family):
    base, *experts = networks(family)
    before = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in (base, *experts)]
    paths = [
        mkl.save(net.state_dict(), tmp_path / f"{name}.safetensors")
        for net, name in zip((base, *experts), "xabc", strict=True)
    ]
    tv = mkl.TaskVectors(base, dict(zip("abc", experts, strict=True)))
    suite = mkl.Suite.from_folders(folders, base, device="cpu", resolution=32)
    variances = [name for name in tv.base if name.endswith("running_var")]
    assert bool(variances) == (family == "resnet")

    for name, method in mkl.methods(mkl.Need.WEIGHTS).items():
        chosen = NEEDED.get(name, {})
        two = name in ("slerp", "linear_interpolation")
        settings = {
            key: value if value in "abc" else float(value) if "." in value else int(value) if value.isdigit() else value
            for key, value in chosen.items()
        }
        merged = method.function(tv[:2] if two else tv, **settings)
        states = dict(merged) if method.per_task else {"all": merged}
        for state in states.values():
            assert list(state) == list(base.state_dict())
            assert all(torch.isfinite(tensor.float()).all() for tensor in state.values()), name
            assert all((state[variance] >= 0).all() for variance in variances), name
            assert all(0 <= accuracy <= 1 for accuracy in suite.evaluate(state).values())
        out = tmp_path / (f"{name}" if method.per_task else f"{name}.safetensors")
        words = [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]
        call("merge", name, *(paths[:3] if two else paths), *words, "--out", out)
        for task, state in states.items():
            written = mkl.load(out / f"{task}.safetensors" if method.per_task else out)
            torch.testing.assert_close(written, dict(state), rtol=1e-5, atol=1e-6)
    for net, state in zip((base, *experts), before, strict=True):
        assert same(net.state_dict(), state), "inputs are never changed"
