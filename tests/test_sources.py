"""What can be a model: modules, state dicts, files of any kind, wrapped or prefixed; and models that move."""

import argparse
import copy
import json
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mergekit_lite as mkl
from mergekit_lite.checkpoints import SafetensorsFile, ShardedCheckpoint, open_checkpoint
from tests.conftest import small_net


def ones(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.w": torch.full((2, 3), value), "b.w": torch.full((4,), value)}


def same(one, other) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in other)


# ---------------------------------------------------------------- files of any name and age


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".ckpt", ".pth.tar", ".PTH", ".weights", ""])
@pytest.mark.parametrize("new", [True, False])
def test_files_are_told_by_their_first_bytes(tmp_path, suffix, new):
    path = tmp_path / f"model{suffix}"
    torch.save(ones(), path, _use_new_zipfile_serialization=new)
    assert same(mkl.load(path), ones())
    mkl.save(ones(2.0), path)
    assert same(mkl.load(path), ones(2.0))


def test_what_is_loaded_lives_without_its_file(tmp_path):
    for path, write in ((tmp_path / "m.pt", torch.save), (tmp_path / "m.safetensors", mkl.save)):
        write(ones(), path)
        state = mkl.load(path)
        path.write_bytes(b"")
        assert same(state, ones())
        state["a.w"].add_(1)
        write(ones(), path)
        opened = open_checkpoint(path)
        opened["a.w"].add_(1)
        if path.suffix == ".safetensors":
            assert torch.equal(opened["a.w"], ones()["a.w"]), "each reading is a copy"


OTHER_FILES = {
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "git lfs pull",
    b"<!DOCTYPE html><html>": "web page",
    b"GGUF\x03\0\0\0": "GGUF",
    b"\x1f\x8b\x08\0": "gzip",
    b"PK\x03\x04 but no zip": "could not be read",
    b"\x80\x02 but no pickle": "could not be read",
    b"some text that goes on for a while": "not a complete safetensors file",
    (1 << 20).to_bytes(8, "little") + b"{}": "not a complete safetensors file",
}


@pytest.mark.parametrize(("content", "words"), OTHER_FILES.items())
def test_other_files_are_called_what_they_are(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(mkl.CheckpointError, match=words) as caught:
        mkl.load(path)
    assert str(path) in str(caught.value)


def test_pickles_that_could_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"w": torch.ones(1), "evil": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"w": Evil()}))
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    for name, what in (("evil.pt", "mkdir"), ("plain.pkl", "plain.pkl"), ("whole.pt", "Linear")):
        with pytest.raises(mkl.CheckpointError, match=what):
            mkl.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- checkpoints around a state dict


def test_the_one_state_dict_of_a_training_checkpoint_is_taken_and_said(tmp_path, caplog):
    adam = {"state": {0: {"exp_avg": torch.ones(2), "step": torch.ones(())}}, "param_groups": [{"lr": 0.1}]}
    wrapped = {
        "state_dict": ones(),
        "epoch": 3,
        "best_acc": np.float64(0.5),
        "args": argparse.Namespace(lr=np.float32(0.1), name="x"),
        "optimizer": adam,
        "rng": torch.zeros(5, dtype=torch.uint8),
    }
    torch.save(wrapped, tmp_path / "last.pth.tar")
    with caplog.at_level(logging.WARNING, "mergekit_lite"):
        assert same(mkl.load(tmp_path / "last.pth.tar"), ones())
    assert "'state_dict' is taken" in caplog.text
    torch.save({"outer": {"model": ones()}, "step": 1}, tmp_path / "deep.pt")
    assert same(mkl.load(tmp_path / "deep.pt"), ones())


def test_several_state_dicts_are_named_and_can_be_chosen(tmp_path):
    path = tmp_path / "two.pth"
    torch.save({"model": ones(1.0), "model_ema": ones(2.0), "epoch": 1}, path)
    with pytest.raises(mkl.CheckpointError, match=r"'model', 'model_ema'.*entry='model'"):
        mkl.load(path)
    assert same(mkl.load(path, entry="model_ema"), ones(2.0))
    with pytest.raises(mkl.CheckpointError, match="no state dict 'ema'"):
        mkl.load(path, entry="ema")
    merged = mkl.load(mkl.merge_files(mkl.average, path, [path], tmp_path / "o.safetensors", entry="model_ema"))
    assert same(merged, ones(2.0))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3}, "'epoch', a int"),
        ([torch.ones(2)], "a list"),
        ({**ones(), "epoch": 3}, "'epoch' is a int"),
        ({"w": torch.eye(2).to_sparse()}, "sparse"),
        ({}, "nothing"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, words):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(mkl.CheckpointError, match=words) as caught:
        mkl.load(tmp_path / "odd.pt")
    assert "odd.pt" in str(caught.value)


# ---------------------------------------------------------------- shards and folders


def in_shards(folder, state, suffix=".safetensors"):
    folder.mkdir(parents=True)
    where = {}
    for i, name in enumerate(state):
        shard = f"model-{i + 1:05}-of-{len(state):05}{suffix}"
        where[name] = shard
        (save_file if suffix == ".safetensors" else torch.save)({name: state[name]}, folder / shard)
    index = folder / f"{'model.safetensors' if suffix == '.safetensors' else 'pytorch_model.bin'}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_folders_of_shards_are_one_model(tmp_path, suffix):
    state = small_net(0).state_dict()
    index = in_shards(tmp_path / "hf", state, suffix)
    assert same(mkl.load(tmp_path / "hf"), state)
    assert same(mkl.load(index), state)
    tv = mkl.TaskVectors(index, [small_net(1), tmp_path / "hf"])
    assert same(mkl.average(tv), mkl.average(mkl.TaskVectors(small_net(0), [small_net(1), small_net(0)])))


def test_folders_with_one_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(mkl.CheckpointError, match="no checkpoint"):
        mkl.load(tmp_path)
    save_file(ones(), tmp_path / "any.safetensors")
    assert same(mkl.load(tmp_path), ones())
    save_file(ones(), tmp_path / "other.safetensors")
    with pytest.raises(mkl.CheckpointError, match=r"several checkpoints: any\.safetensors, other\.safetensors"):
        mkl.load(tmp_path)
    save_file(ones(3.0), tmp_path / "model.safetensors")
    assert same(mkl.load(tmp_path), ones(3.0)), "the usual name is meant"


def test_an_adapters_folder_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(mkl.CheckpointError, match="adapter"):
        mkl.load(tmp_path)


def test_indices_that_lie(tmp_path):
    index = in_shards(tmp_path / "hf", ones())
    told = json.loads(index.read_text())
    first = told["weight_map"]["a.w"]
    for change, words in (
        ({"a.w": "gone.safetensors"}, "'gone.safetensors', which is missing"),
        ({"a.w": "../hf/" + first}, "no file of its own folder"),
        ({"c.w": first}, "lacks the tensor 'c.w'"),
    ):
        index.write_text(json.dumps({"weight_map": {**told["weight_map"], **change}}))
        with pytest.raises(mkl.CheckpointError, match=words):
            mkl.load(index)
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(mkl.CheckpointError, match="no index of shards"):
            mkl.load(index)


def test_only_one_shard_is_open_at_a_time(tmp_path):
    state = {f"{i:03}.w": torch.full((2,), float(i)) for i in range(60)}
    opened = ShardedCheckpoint(in_shards(tmp_path / "hf", state), lambda path: {})
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert all(opened[name][0] == float(name[:3]) for name in opened)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 1


# ---------------------------------------------------------------- ties in metadata


def test_ties_that_the_file_contradicts(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(2), "b": torch.full((2,), 7.0)}, path, metadata={"tied:b": "a"})
    assert mkl.load(path)["b"].tolist() == [7, 7], "the bytes that are there count"
    for metadata in ({"tied:c": "nowhere"}, {"tied:c": "c"}, {"tied:c": "d", "tied:d": "c"}):
        save_file({"a": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(mkl.CheckpointError, match=r"m\.safetensors' says that '[cd]' is tied"):
            SafetensorsFile(path)


def test_metadata_of_another_file_bring_no_ties(tmp_path):
    t = torch.ones(2)
    first = mkl.save({"a": t, "b": t}, tmp_path / "tied.safetensors", metadata={"author": "ada"})
    told = SafetensorsFile(first).metadata
    again = mkl.save({"a": t, "b": 7 * t}, tmp_path / "untied.safetensors", metadata=told)
    assert mkl.load(again)["b"].tolist() == [7, 7]
    assert SafetensorsFile(again).metadata == {"author": "ada"}


def test_dtypes_that_torch_cannot_compute_with(tmp_path):
    path = mkl.save({"w": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "m.safetensors")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["w"] |= {"dtype": "F8_E8M0"}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(mkl.CheckpointError, match=r"m\.safetensors"):
        mkl.load(path)


# ---------------------------------------------------------------- prefixes

PREFIXES = ["module.", "_orig_mod.", "model.", "vit.", "module._orig_mod.", "ema_model.module.", "x.y.z."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_dropped_and_said(prefix, caplog):
    state = small_net(1).state_dict()
    prefixed = {prefix + name: tensor for name, tensor in state.items()}
    plain = mkl.average(mkl.TaskVectors(small_net(0), {"math": state}))
    with caplog.at_level(logging.WARNING, "mergekit_lite"):
        assert same(mkl.average(mkl.TaskVectors(small_net(0), {"math": prefixed})), plain)
    assert f"names of math: the prefix '{prefix}' is dropped" in caplog.text
    base = {prefix + name: tensor for name, tensor in small_net(0).state_dict().items()}
    assert list(mkl.average(mkl.TaskVectors(base, [state]))) == list(base), "the base's names are kept"
    other = {"other." + name: tensor for name, tensor in state.items()}
    assert list(mkl.average(mkl.TaskVectors(base, [other]))) == list(base)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_wrapped_modules():
    net = small_net(1)
    for wrapped in (nn.DataParallel(net), torch.compile(net)):
        tv = mkl.TaskVectors(small_net(0), [wrapped])
        plain = mkl.TaskVectors(small_net(0), [net])
        assert same(mkl.average(tv), mkl.average(plain))


def test_ties_survive_a_prefix():
    weight = torch.ones(2, 2)
    base = {"embed": torch.zeros(2, 2)}
    base["head"] = base["embed"]
    tv = mkl.TaskVectors(base, [{"model.embed": weight, "model.head": weight}])
    assert tv.dimension == 4
    assert mkl.average(tv)["head"] is not weight


def test_names_that_no_prefix_explains_show_both_sides_and_the_nearest_pair():
    base = {"blocks.0.attn.weight": torch.ones(1), "head": torch.ones(1)}
    expert = {"blocks.0.attention.weight": torch.ones(1), "head": torch.ones(1)}
    with pytest.raises(KeyError) as caught:
        mkl.TaskVectors(base, {"math": expert})
    text = caught.value.args[0]
    assert "math lacks 'blocks.0.attn.weight'" in text
    assert "and the base has not, 'blocks.0.attention.weight'" in text
    assert "Nearest: 'blocks.0.attn.weight' in the base, 'blocks.0.attention.weight' in math" in text


def test_counters_that_old_checkpoints_lack_or_new_ones_dropped():
    net = small_net(1).state_dict()
    del net["1.num_batches_tracked"]
    tv = mkl.TaskVectors(small_net(0), [net | {"position_ids": torch.arange(3)}])
    assert set(mkl.average(tv)) == set(small_net(0).state_dict())


# ---------------------------------------------------------------- models that move


def test_a_module_that_serves_as_base_may_go_on(tmp_path):
    base = nn.Linear(1, 1, bias=False)
    base.weight.data.zero_()
    tv, found = mkl.TaskVectors(base, [{"weight": torch.tensor([[3.0]])}]), []
    for scale in (0.1, 0.5, 0.1):
        merged = mkl.task_arithmetic(tv, scale=scale)
        base.load_state_dict(merged)
        found.append(round(merged["weight"].item(), 4))
    assert found == [0.3, 1.5, 0.3]


@pytest.mark.parametrize("moved", ["base", "expert"])
def test_weights_that_change_are_noticed(moved):
    base, expert = small_net(0), small_net(1)
    tv = mkl.TaskVectors(base.state_dict(), {"math": expert})
    mkl.average(tv)
    optimizer = torch.optim.SGD((base if moved == "base" else expert).parameters(), lr=0.1)
    (base if moved == "base" else expert)(torch.ones(1, 3, 3, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=f"of {'the base' if moved == 'base' else 'math'} was changed"):
        mkl.average(tv)


@pytest.mark.parametrize("change", ["cut", "overwritten", "replaced", "touched"])
def test_files_that_change_are_noticed(tmp_path, change):
    paths = [mkl.save(ones(float(k)), tmp_path / f"{k}.safetensors") for k in range(2)]
    tv = mkl.TaskVectors(paths[0], paths[1:])
    mkl.average(tv)
    if change == "cut":
        os.truncate(paths[1], 100)
    elif change == "overwritten":
        paths[1].write_bytes(mkl.save(ones(5.0), tmp_path / "new").read_bytes())
    elif change == "touched":
        os.utime(paths[1], ns=(1, 1))
    else:
        mkl.save(ones(5.0), paths[1])
        assert same(mkl.average(tv), ones(1.0)), "the file that was opened is still read"
        tv = pickle.loads(pickle.dumps(mkl.TaskVectors(paths[0], paths[1:])))
        mkl.save(ones(6.0), paths[1])
    with pytest.raises(mkl.CheckpointError, match=r"1\.safetensors' was changed"):
        mkl.average(tv)


def test_task_vectors_of_files_can_be_sent_to_another_process(tmp_path):
    paths = [mkl.save(ones(float(k)), tmp_path / f"{k}.safetensors") for k in range(2)]
    tv = mkl.TaskVectors(paths[0], paths[1:])
    mkl.average(tv)
    assert same(mkl.average(pickle.loads(pickle.dumps(tv))), ones(1.0))
    assert same(mkl.average(copy.deepcopy(tv)), ones(1.0))


def test_task_vectors_in_memory_can_be_copied_and_sent():
    base, expert = ones(0.0), small_net(1)
    base["a.w"].add_(0.0)  # it has been worked with before
    tv = mkl.TaskVectors(base, [{f"module.{name}": tensor.add_(0) for name, tensor in ones(2.0).items()}])
    for copied in (copy.deepcopy(tv), pickle.loads(pickle.dumps(tv))):
        assert same(mkl.average(copied), ones(2.0))
    conditioned = copy.deepcopy(mkl.emr(mkl.TaskVectors(small_net(0), {"a": expert, "b": small_net(2)})))
    assert set(conditioned["a"]) == set(expert.state_dict())


def test_nothing_is_read_before_a_merge_and_everything_once(tmp_path, monkeypatch):
    paths = [mkl.save(small_net(k).state_dict(), tmp_path / f"{k}.safetensors") for k in range(3)]
    reads = []
    read = SafetensorsFile._read
    monkeypatch.setattr(
        SafetensorsFile, "_read", lambda self, *where: (reads.append(self.path.name), read(self, *where))[1]
    )
    tv = mkl.TaskVectors(paths[0], paths[1:])
    assert repr(tv)
    assert "0.weight" in tv.base
    assert reads == []
    mkl.average(tv)
    floats = sum(t.is_floating_point() for t in small_net(0).state_dict().values())
    assert reads.count("1.safetensors") == reads.count("2.safetensors") == floats


# ---------------------------------------------------------------- what is no model


def test_experts_may_come_one_by_one(tmp_path):
    mkl.save(ones(1.0), tmp_path / "expert_1.safetensors")
    assert len(mkl.TaskVectors(ones(0.0), tmp_path.glob("expert_*.safetensors"))) == 1
    for wrong in (3, None):
        with pytest.raises(TypeError, match="list"):
            mkl.TaskVectors(ones(), wrong)
    for single in (tmp_path, str(tmp_path), ones(), small_net(0)):
        with pytest.raises(TypeError, match="list of models"):
            mkl.TaskVectors(ones(), single)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_has_no_plain_numbers_is_named():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"amax": 1}

        def set_extra_state(self, state): ...

    with pytest.raises(TypeError, match="'_extra_state' is a dict"):
        mkl.TaskVectors(Extra(2, 2), [Extra(2, 2)])
    odd = {
        "sparse": torch.eye(2).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "meta": torch.ones(2, device="meta"),
        "complex": torch.ones(2, dtype=torch.complex64),
    }
    for word, tensor in odd.items():
        with pytest.raises(TypeError, match=f"'w'.*{word}"):
            mkl.TaskVectors({"w": tensor}, [{"w": tensor}])
