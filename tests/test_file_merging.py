"""merge_files: any method, shards, ties and dtypes of the result, memory, and processes that are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

import mergekit_lite as mkl
from mergekit_lite.checkpoints import SafetensorsFile
from mergekit_lite.file_merging import bytes_in
from tests.conftest import small_net


@pytest.fixture
def files(tmp_path):
    """A base and three experts, whose names tell depth and whose statistics differ."""
    paths = []
    for seed in range(4):
        state = {f"blocks.{name}": tensor for name, tensor in small_net(seed).state_dict().items()}
        state["blocks.1.running_var"] += seed
        paths.append(mkl.save(state, tmp_path / f"{seed}.safetensors", metadata={"author": "ada"}))
    return paths


def same(one, other) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in other)


def half_and_half(tv):
    a, b = mkl.average(tv), mkl.ties(tv)
    return {name: ((a[name] + b[name]) / 2).to(a[name].dtype) for name in a}


OF_TWO = {
    "lines of ties": lambda tv: mkl.lines(tv, merged=mkl.ties(tv), deep=1.0),
    "consensus of ties": lambda tv: mkl.consensus(tv, merged=mkl.ties(tv)),
    "the first of two": lambda tv: (mkl.average(tv), mkl.ties(tv))[0],
    "the second of two": lambda tv: (mkl.average(tv), mkl.ties(tv))[1],
    "the mean of two": half_and_half,
    "a merge of merges": lambda tv: mkl.average(mkl.TaskVectors(tv.base, [mkl.ties(tv), mkl.average(tv)])),
    "a changed merge": lambda tv: {**mkl.average(tv), "blocks.3.bias": torch.zeros(5)},
}


@pytest.mark.parametrize("method", OF_TWO.values(), ids=OF_TWO)
@pytest.mark.parametrize("shard", [None, 200])
def test_methods_made_of_several_merges(tmp_path, files, method, shard):
    out = tmp_path / ("out" if shard else "out.safetensors")
    mkl.merge_files(method, files[0], files[1:], out, max_shard_size=shard)
    assert same(mkl.load(out), method(mkl.TaskVectors(files[0], files[1:])))
    assert not list(tmp_path.glob(".*")), "what was written on the way is gone"


@pytest.mark.parametrize("tied", ["base", "expert", "all"])
def test_the_results_ties_are_written(tmp_path, tied):
    paths = []
    for name, value in (("base", 0.0), ("expert", 1.0), ("other", 5.0)):
        embed = torch.full((2, 2), value)
        head = embed if tied in ("all", name) or (tied == "base" and name == "other") else 3 * embed + 1
        paths.append(mkl.save({"embed": embed, "head": head}, tmp_path / f"{name}.safetensors"))
    expected = mkl.average(mkl.TaskVectors(paths[0], paths[1:]))
    out = mkl.merge_files(mkl.average, paths[0], paths[1:], tmp_path / "o.safetensors")
    assert same(mkl.load(out), expected)
    assert len(load_file(out)) == (1 if tied == "all" else 2)
    own = mkl.merge_files(lambda tv: dict(mkl.average(tv)), paths[0], paths[1:], tmp_path / "own.safetensors")
    assert same(mkl.load(own), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.double(), None),
        (lambda w: w.half(), None),
        (lambda w: w[:, :1], r"'blocks\.3\.weight' with shape \(5, 1\)"),
        (lambda w: w.T, r"with shape \(4, 5\)"),
        (lambda w: w * float("nan"), "not finite"),
        (lambda w: w.long(), "as int64"),
        (lambda w: w + 0j, "as complex64"),
        (lambda w: w.tolist(), "list"),
    ],
)
def test_a_methods_own_tensors_are_checked(tmp_path, files, change, words):
    def method(tv):
        merged = dict(mkl.average(tv))
        return {**merged, "blocks.3.weight": change(merged["blocks.3.weight"])}

    out = tmp_path / "o.safetensors"
    if words is None:
        merged = mkl.load(mkl.merge_files(method, files[0], files[1:], out))
        expected = mkl.average(mkl.TaskVectors(files[0], files[1:]))
        assert all(merged[name].dtype == expected[name].dtype for name in expected)
        torch.testing.assert_close(merged["blocks.3.weight"], expected["blocks.3.weight"], rtol=1e-3, atol=1e-3)
    else:
        with pytest.raises(ValueError, match=words):
            mkl.merge_files(method, files[0], files[1:], out)
        assert sorted(tmp_path.iterdir()) == sorted(files)


def test_what_is_no_merge_is_refused(tmp_path, files):
    for method, words in (
        (lambda tv: 3, "returned a int"),
        (lambda tv: {"w": torch.ones(1)}, "does not return the base's tensors"),
        (lambda tv: {}, "does not return the base's tensors"),
        (mkl.emr, "a model for each task"),
    ):
        with pytest.raises(TypeError, match=words):
            mkl.merge_files(method, files[0], files[1:], tmp_path / "o.safetensors")
    with pytest.raises(TypeError, match="list of paths"):
        mkl.merge_files(mkl.average, files[0], str(files[1]), tmp_path / "o.safetensors")


def test_a_model_for_each_task_makes_a_folder(tmp_path, files):
    out = mkl.merge_files(mkl.emr, files[0], {"a": files[1], "b": files[2]}, tmp_path / "models")
    expected = mkl.emr(mkl.TaskVectors(files[0], {"a": files[1], "b": files[2]}))
    assert sorted(path.name for path in out.iterdir()) == ["a.safetensors", "b.safetensors"]
    assert all(same(mkl.load(out / f"{task}.safetensors"), expected[task]) for task in expected)


# ---------------------------------------------------------------- shards


def test_shards_are_written_and_merged_again(tmp_path, files):
    sharded = [
        mkl.merge_files(mkl.average, path, [path], tmp_path / f"shards {k}", max_shard_size="300B".replace("B", ""))
        for k, path in enumerate(files)
    ]
    index = json.loads((sharded[0] / "model.safetensors.index.json").read_text())
    names = set(mkl.load(files[0]))
    assert set(index["weight_map"]) == names
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    together = {}
    for shard in shards:
        state = load_file(sharded[0] / shard)
        assert sum(t.nbytes for t in state.values()) <= 300 or len(state) == 1
        together |= state
    assert same(together, mkl.load(files[0]))

    for method in (mkl.average, mkl.ties, mkl.tsv):
        whole = mkl.load(mkl.merge_files(method, files[0], files[1:], tmp_path / "o.safetensors"))
        out = mkl.merge_files(method, sharded[0], sharded[1:], tmp_path / f"out {method.__name__}")
        assert (out / "model.safetensors.index.json").is_file(), "as the base, so the output"
        assert same(mkl.load(out), whole)
        single = mkl.merge_files(method, sharded[0], sharded[1:], tmp_path / "single.safetensors")
        assert same(mkl.load(single), whole)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2 << 20), (7, 7)])
def test_sizes(text, size):
    assert bytes_in(text) == size


@pytest.mark.parametrize("text", ["0", "-1", "five", "", "GB", 0])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="such as 5000000000 or '5GB'"):
        bytes_in(text)


# ---------------------------------------------------------------- where it is written


def test_places_that_must_not_be_written(tmp_path, files):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "kept.safetensors").write_bytes(b"old")
    (tmp_path / "kept.safetensors").chmod(0o444)
    called = []
    for out, options, words in (
        (tmp_path / "folder", {}, "a new or an empty folder"),
        (tmp_path / "folder", {"max_shard_size": 100}, "a new or an empty folder"),
        (tmp_path / "kept.safetensors", {}, "write-protected"),
        (files[1], {}, "one of the inputs"),
    ):
        with pytest.raises(mkl.CheckpointError, match=words):
            mkl.merge_files(lambda tv: called.append(1), files[0], files[1:], out, **options)
    assert not called, "said before the work, not after"
    assert (tmp_path / "kept.safetensors").read_bytes() == b"old"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_devices_are_not_replaced(tmp_path, files):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(mkl.CheckpointError, match="no regular file"):
        mkl.merge_files(mkl.average, files[0], files[1:], tmp_path / "pipe.safetensors")


def test_rights_are_kept_and_failed_merges_leave_no_folder(tmp_path, files):
    out = tmp_path / "o.safetensors"
    out.touch(mode=0o600)
    mkl.merge_files(mkl.average, files[0], files[1:], out)
    assert out.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match="density"):
        mkl.merge_files(mkl.ties, files[0], files[1:], tmp_path / "new" / "deep" / "o.safetensors", density=7)
    assert not (tmp_path / "new").exists()


def test_names_as_long_as_the_disk_allows(tmp_path, files):
    out = tmp_path / ("m" * 242 + ".safetensors")
    assert mkl.merge_files(mkl.average, files[0], files[1:], out).exists()


def test_equal_models_give_equal_bytes(tmp_path, files):
    outs = [mkl.merge_files(mkl.ties, files[0], files[1:], tmp_path / f"o{k}.safetensors") for k in range(2)]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    told = {f"key{i}": str(i) for i in range(20)}
    saved = [
        mkl.save(small_net(0).state_dict(), tmp_path / f"s{k}", metadata=dict(sorted(told.items(), reverse=bool(k))))
        for k in range(2)
    ]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert SafetensorsFile(outs[0]).metadata["author"] == "ada"


# ---------------------------------------------------------------- inputs that change, processes that die


@pytest.mark.parametrize("change", ["cut", "overwritten", "replaced"])
def test_inputs_that_change_during_a_merge_are_noticed(tmp_path, files, change):
    other = mkl.save({k: t + 1 for k, t in mkl.load(files[1]).items()}, tmp_path / "other")

    def method(tv):
        done = []

        def f(name, taus):
            if len(done) == 2:
                if change == "cut":
                    os.truncate(files[1], files[1].stat().st_size // 2)
                elif change == "overwritten":
                    files[1].write_bytes(other.read_bytes())
                else:
                    os.replace(other, files[1])
            done.append(name)
            return taus.mean(0)

        return tv.map(f)

    with pytest.raises(mkl.CheckpointError, match=r"1\.safetensors' was changed, replaced or removed"):
        mkl.merge_files(method, files[0], files[1:], tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


KILLED = """
import sys, torch, mergekit_lite as mkl
folder = sys.argv[1]
print("ready", flush=True)
mkl.merge_files(mkl.average, f"{folder}/0.safetensors", [f"{folder}/1.safetensors"] * 2, f"{folder}/out.safetensors")
"""


def test_killed_merges_leave_the_old_file_or_the_new_and_nothing_for_long(tmp_path):
    for k in range(2):
        tensors = {f"{i}": torch.full((250_000,), float(k)) for i in range(int(os.environ.get("KILL_TENSORS", "40")))}
        mkl.save(tensors, tmp_path / f"{k}.safetensors")
    out, chance, found = tmp_path / "out.safetensors", random.Random(0), Counter()
    for _ in range(int(os.environ.get("KILLS", "6"))):
        process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if out.exists():
            assert all((tensor == 1.0).all() for tensor in mkl.load(out).values()), "whole or not at all"
            out.unlink()
            found["there"] += 1
        found["left behind"] += len(list(tmp_path.glob(".mergekit_lite~*")))
    mkl.save({"w": torch.ones(1)}, tmp_path / "next.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors", "next.safetensors"]
    assert found["left behind"] > 0, "no kill fell into the writing; the test shows nothing"


def test_temporary_files_of_living_processes_stay(tmp_path):
    from mergekit_lite.writing import _HOST

    mine, dead = (
        tmp_path / f".mergekit_lite~{host}~{number}~ab12" for host, number in ((_HOST, os.getpid()), (_HOST, 2**22 + 1))
    )
    elsewhere = tmp_path / ".mergekit_lite~another-computer~1~ab12"
    for path in (mine, dead, elsewhere):
        path.touch()
    mkl.save({"w": torch.ones(1)}, tmp_path / "m.safetensors")
    assert mine.exists()
    assert elsewhere.exists()
    assert not dead.exists()


# ---------------------------------------------------------------- memory

PEAK = """
import sys, threading, time, mergekit_lite as mkl
folder, method, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

experts = [f"{folder}/{k}" for k in (1, 2, 3, 4)]
merge = getattr(mkl, method)
mkl.merge_files(merge, f"{folder}/tiny", [f"{folder}/tiny"] * 4, f"{folder}/tiny-{method}")  # what is loaded once
start, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
mkl.merge_files(merge, f"{folder}/0", experts, f"{folder}/out-{method}", max_shard_size="16MB")
done = True
thread.join()
print((peak - start) / limit)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize("method", ["average", "ties", "pcb"])
def test_sharded_models_larger_than_the_memory_in_use(tmp_path_factory, method):
    folder = tmp_path_factory.getbasetemp() / "large"
    if not folder.exists():
        generator = torch.Generator().manual_seed(0)
        base = {f"layers.{i:02}.weight": torch.randn(1 << 20, generator=generator) for i in range(12)}  # 50 MB
        for k in range(5):
            state = {n: t + 0.01 * k * torch.randn(t.shape, generator=generator) for n, t in base.items()}
            whole = mkl.save(state, folder / "whole.safetensors")
            mkl.merge_files(mkl.average, whole, [whole], folder / str(k), max_shard_size="16MB")
            whole.unlink()
        tiny = mkl.save(
            {"layers.0.weight": torch.ones(8), "layers.1.weight": torch.ones(8)}, folder / "tiny.safetensors"
        )
        mkl.merge_files(mkl.average, tiny, [tiny], folder / "tiny", max_shard_size="16MB")
    largest = 4 << 20
    done = subprocess.run([sys.executable, "-c", PEAK, folder, method, str(largest)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # K + 2 = 6 of the largest tensor are promised; counts and sample of the order statistics come to a few MB besides.
    assert float(done.stdout) < (6 if method == "average" else 12), "the whole base alone would be 12"
