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


def test_names_of_experts_can_be_given(files, tmp_path):
    done = call("merge", "negation", *files, "--out", tmp_path / "m.safetensors", "--set", "forget=expert 1")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "tise"], "no method named 'tise'"),
        (["merge", "ties", "--set", "denisty=0.5"], "no hyperparameter 'denisty'"),
        (["merge", "ties", "--set", "density"], "name=value"),
        (["merge", "ties", "--set", "density=7"], "in (0, 1]"),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(files, tmp_path, words, message):
    out = tmp_path / "m.safetensors"
    done = call(*words[:2], *files, *words[2:], "--out", out)
    assert done.exit_code != 0
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not out.exists()
