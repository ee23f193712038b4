import pytest
import torch
from typer.testing import CliRunner

import mergekit_lite as mkl
from mergekit_lite.cli import app
from tests.conftest import small_net


@pytest.fixture
def files(tmp_path):
    return [mkl.save(small_net(seed).state_dict(), tmp_path / f"{seed}.safetensors") for seed in range(3)]


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_methods_are_listed_with_their_defaults():
    listed = call("methods").output
    assert all(name in listed for name in mkl.methods())
    assert "density=0.2, scale=1.0" in listed


def test_a_merge(files, tmp_path):
    done = call(
        "merge", "ties", *files, "--out", tmp_path / "m.safetensors", "--set", "density=0.5", "--set", "scale=2"
    )
    assert done.exit_code == 0, done.output
    expected = mkl.ties(mkl.TaskVectors(files[0], files[1:]), density=0.5, scale=2.0)
    merged = mkl.load(tmp_path / "m.safetensors")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_experts_are_called_as_their_files(files, tmp_path):
    named = [file.rename(tmp_path / name) for file, name in zip(files, ("base.st", "math.st", "code.st"), strict=True)]
    done = call("merge", "negation", *named, "--out", tmp_path / "m.safetensors", "--set", "forget=code")
    assert done.exit_code == 0, done.output
    expected = mkl.negation(mkl.TaskVectors(named[0], named[1:]), forget=1)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in mkl.load(tmp_path / "m.safetensors").items())


def test_curvature_comes_from_files(files, tmp_path):
    curvatures = [mkl.input_grams(small_net(seed), [torch.randn(9, 3, 3, 3)]) for seed in (1, 2)]
    saved = [tmp_path / f"grams{k}.safetensors" for k in range(2)]
    for curvature, path in zip(curvatures, saved, strict=True):
        curvature.save(path)
    out = tmp_path / "m.safetensors"
    done = call("merge", "regmean", *files, "--out", out, "--curvature", saved[0], "--curvature", saved[1])
    assert done.exit_code == 0, done.output
    expected, merged = mkl.regmean(mkl.TaskVectors(files[0], files[1:]), curvatures), mkl.load(out)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "tise"], "no method named 'tise'"),
        (["merge", "ties", "--set", "denisty=0.5"], "no hyperparameter 'denisty'"),
        (["merge", "ties", "--set", "density"], "name=value"),
        (["merge", "ties", "--set", "density=7"], "in (0, 1]"),
        (["merge", "regmean"], "regmean needs --curvature files"),
        (["merge", "ties", "--curvature", "a.safetensors"], "ties needs no --curvature files"),
        (["merge", "regmean", "--curvature", "none.safetensors"], "no such checkpoint"),
        (["merge", "regmean_plus_plus"], "call mkl.regmean_plus_plus in Python"),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(files, tmp_path, words, message):
    out = tmp_path / "m.safetensors"
    done = call(*words[:2], *files, *words[2:], "--out", out)
    assert done.exit_code != 0
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not out.exists()
