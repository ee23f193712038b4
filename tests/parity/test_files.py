"""Whole runs, from files to a file, as `benchmarks/peers.py` measures them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mergekit_lite as mkl
from tests.parity.checkpoints import Checkpoints, assert_same

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "benchmarks/peers.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("peer", ["mergekit", "fusion-bench"])
def test_files_are_merged_alike(peer, tmp_path):
    models = Checkpoints(3)
    files = [mkl.save(state, tmp_path / f"{k}.safetensors") for k, state in enumerate([models.base, *models.experts])]
    before = [path.read_bytes() for path in files]
    done = run("task_arithmetic", peer, tmp_path, tmp_path / "theirs.safetensors")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["peer"], report["experts"]) == (peer, 3)
    assert 0 < report["seconds"] < 10
    ours = mkl.merge_files(mkl.task_arithmetic, files[0], files[1:], tmp_path / "ours.safetensors", scale=0.3)
    assert_same(mkl.load(ours), mkl.load(tmp_path / "theirs.safetensors"), models.base)
    assert [path.read_bytes() for path in files] == before


def test_what_a_peer_lacks_is_said(tmp_path):
    done = run("tsv", "mergekit", tmp_path, tmp_path / "out.safetensors")
    assert done.returncode != 0
    assert "mergekit has no tsv; it has average, task_arithmetic, ties, dare, model_stock" in done.stderr
