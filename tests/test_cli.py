import pytest
import torch
from typer.testing import CliRunner

import mergekit_lite as mkl
from mergekit_lite.cli import app
from mergekit_lite.command_values import read_value
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


# ---------------------------------------------------------------- text to values


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        ("ties", "density=.5", 0.5),
        ("ties", "density=1", 1.0),
        ("ties", "granularity=layer", "layer"),
        ("model_stock", "clip=False", False),
        ("model_stock", "clip=yes", True),
        ("wudi", "steps=1e2", 100),
        ("average", "weights=1,2", [1.0, 2.0]),
        ("average", "weights=[1, 2]", [1.0, 2.0]),
        ("average", "weights=none", None),
        ("task_arithmetic", "scale=.1,.2", [0.1, 0.2]),
        ("negation", "forget=1", 1),
        ("negation", "forget=code", "code"),
        ("lines", "shallow=None", None),
    ],
)
def test_values_are_read_as_the_signature_says(method, setting, value):
    name, _, text = setting.partition("=")
    found = read_value(mkl.methods()[method].function, name, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("ties", "density=abc", "'abc' is no value for density: expected a number"),
        ("model_stock", "clip=maybe", "expected true or false"),
        ("wudi", "steps=1.5", "expected a whole number"),
        ("average", "weights=1,b", "expected a list such as 0.1,0.2 (of a number each) or none"),
        ("wudi", "where=x", "only Python can give"),
        ("ties", "scale=nan", "scale must be finite"),
        ("negation", "forget=99", "no task vector 99"),
        ("negation", "forget=nobody", "no task vector named 'nobody'"),
        ("analogy", "a=0", "analogy needs 'b'"),
    ],
)
def test_values_that_make_no_sense_are_said_in_a_line(files, tmp_path, method, setting, message):
    done = call("merge", method, *files, "--set", setting, "--out", tmp_path / "m.safetensors")
    said = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code != 0
    assert message in said
    assert "Traceback" not in said
    assert isinstance(done.exception, SystemExit)


def test_no_input_ends_in_a_traceback(files, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("no checkpoint at all, but text")
    for words in (
        [tmp_path / "text", files[1]],
        [tmp_path / "nowhere", files[1]],
        [files[0], tmp_path / "text"],
        [tmp_path, files[1]],
    ):
        done = call("merge", "average", *words, "--out", tmp_path / "m.safetensors")
        assert done.exit_code == 1, done.output
        assert done.output.startswith("not merged: ")
        assert isinstance(done.exception, SystemExit)

    def full(*_, **__):
        raise OSError(28, "No space left on device", "m.safetensors")

    monkeypatch.setattr("mergekit_lite.cli.merge_files", full)
    done = call("merge", "average", *files, "--out", tmp_path / "m.safetensors")
    assert done.output == "not merged: No space left on device: 'm.safetensors'\n"
    shown = call("merge", "average", *files, "--out", tmp_path / "m.safetensors", "--traceback")
    assert isinstance(shown.exception, OSError), "for whoever looks for the fault in the code"


def test_awd_can_be_merged_from_the_command_line(files, tmp_path):
    out = tmp_path / "m.safetensors"
    done = call("merge", "awd", *files, "--set", "granularity=layer", "--set", "iterations=3", "--out", out)
    assert done.exit_code == 0, done.output
    expected = mkl.awd(mkl.TaskVectors(files[0], files[1:]), granularity="layer", iterations=3)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in mkl.load(out).items())


def test_shards_and_models_for_each_task(files, tmp_path):
    done = call("merge", "average", *files, "--max-shard-size", "200", "--out", tmp_path / "shards")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert call("merge", "emr", *files, "--out", tmp_path / "models").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["1.safetensors", "2.safetensors"]
    wrong = call("merge", "average", *files, "--max-shard-size", "many", "--out", tmp_path / "x")
    assert "such as 5000000000 or '5GB'" in wrong.output
