import os
import pickle
import stat

import pytest
import torch
from safetensors import safe_open

import mergekit_lite as mkl
from mergekit_lite.checkpoints import SafetensorsFile
from tests.conftest import small_net
from tests.test_task_vectors import Tied


@pytest.fixture
def files(tmp_path):
    """A base and three experts on disk."""
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(4)]
    for seed, path in enumerate(paths):
        mkl.save(small_net(seed).state_dict(), path)
    return paths


# ---------------------------------------------------------------- save and load


def test_what_is_saved_is_loaded(tmp_path):
    state = small_net(0).state_dict()
    state["half"] = torch.ones(3, dtype=torch.bfloat16)
    state["view"] = torch.arange(6.0).view(2, 3).T  # not contiguous
    state["empty"] = torch.zeros(0, 4)
    loaded = mkl.load(mkl.save(state, tmp_path / "new folder" / "m.safetensors"))
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[n], state[n]) and loaded[n].dtype == state[n].dtype for n in state)


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    path = mkl.save(Tied(1.0).state_dict(), tmp_path / "tied.safetensors", metadata={"note": "hello"})
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["embed.weight"]
        assert file.metadata()["note"] == "hello"
    loaded = mkl.load(path)
    assert loaded["head.weight"] is loaded["embed.weight"]
    Tied(0.0).load_state_dict(loaded)


def test_other_peoples_pickles_give_tensors_only(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    assert mkl.load(tmp_path / "good.pt")["w"].tolist() == [1, 1]

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"w": Evil()}))
    with pytest.raises(mkl.CheckpointError, match=r"evil\.pt"):
        mkl.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()

    torch.save({"epoch": 3, "names": ["w"]}, tmp_path / "other.pt")
    with pytest.raises(mkl.CheckpointError, match="plain state dict"):
        mkl.load(tmp_path / "other.pt")


def test_files_that_cannot_be_read_are_named(tmp_path, files):
    (tmp_path / "short.safetensors").write_bytes(files[0].read_bytes()[:-7])
    (tmp_path / "text.safetensors").write_text("not a checkpoint at all")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("short", "text", "empty"):
        with pytest.raises(mkl.CheckpointError, match=rf"{name}\.safetensors' is not a complete safetensors file"):
            mkl.TaskVectors(files[0], [tmp_path / f"{name}.safetensors"])
    with pytest.raises(mkl.CheckpointError, match="no such checkpoint"):
        mkl.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(mkl.CheckpointError, match="no such checkpoint"):
        mkl.load(tmp_path / "nowhere.pt")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = mkl.save({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    old = path.read_bytes()
    with pytest.raises(Exception, match="metadata"):
        mkl.save({"w": torch.zeros(2)}, path, metadata={"bad": 3})
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_saved_files_have_the_usual_rights(tmp_path):
    (tmp_path / "plain").touch()
    path = mkl.save({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


# ---------------------------------------------------------------- task vectors of files


def test_files_and_modules_give_the_same_task_vectors(files):
    from_files = mkl.TaskVectors(files[0], files[1:])
    from_modules = mkl.TaskVectors(small_net(0), [small_net(seed) for seed in (1, 2, 3)])
    torch.testing.assert_close(from_files.gram(), from_modules.gram())
    a, b = mkl.ties(from_files), mkl.ties(from_modules)
    assert all(torch.equal(a[n], b[n]) for n in b)


def test_shapes_in_files_are_checked_as_they_are_read(tmp_path, files):
    state = small_net(0).state_dict() | {"3.weight": torch.ones(5, 9)}
    other = mkl.save(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"'3\.weight' has shape \(5, 9\)"):
        mkl.TaskVectors(files[0], [other]).gram()


# ---------------------------------------------------------------- merge_files

MERGES = [
    (mkl.average, {}),
    (mkl.task_arithmetic, {"scale": 0.4}),
    (mkl.ties, {"density": 0.5}),
    (mkl.tsv, {}),
    (mkl.negation, {"forget": 1}),
]


@pytest.mark.parametrize(("method", "options"), MERGES, ids=lambda x: getattr(x, "__name__", ""))
def test_merging_files_equals_merging_in_memory(tmp_path, files, method, options):
    out = mkl.merge_files(method, files[0], files[1:], tmp_path / "out.safetensors", **options)
    merged, expected = mkl.load(out), method(mkl.TaskVectors(files[0], files[1:]), **options)
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[n], expected[n]) for n in expected)
    assert SafetensorsFile(out).metadata["merged_with"] == f"mergekit_lite.{method.__name__}"


def test_merging_files_keeps_ties_dtypes_and_metadata(tmp_path):
    paths = []
    for value in (0.0, 1.0):
        state = Tied(value).half().state_dict() | {"odd": torch.ones(3, dtype=torch.int8)}
        state["head.weight"] = state["embed.weight"]
        paths.append(mkl.save(state, tmp_path / f"{value}.safetensors", metadata={"author": "ada"}))
    merged = mkl.load(mkl.merge_files(mkl.average, paths[0], paths[1:], tmp_path / "out.safetensors"))
    assert merged["head.weight"] is merged["embed.weight"]
    assert merged["head.weight"].dtype == torch.float16
    assert merged["odd"].dtype == torch.int8
    assert SafetensorsFile(tmp_path / "out.safetensors").metadata["author"] == "ada"


def test_a_method_that_builds_its_own_dict_is_written_too(tmp_path, files):
    def zeros(tv):
        return {name: torch.zeros_like(tensor) for name, tensor in tv.base.items()}

    merged = mkl.load(mkl.merge_files(zeros, files[0], files[1:], tmp_path / "out.safetensors"))
    assert all(not tensor.any() for tensor in merged.values())


def test_a_failed_merge_leaves_nothing(tmp_path, files):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="finite"):
        mkl.merge_files(mkl.task_arithmetic, files[0], files[1:], tmp_path / "out.safetensors", scale=float("nan"))
    assert sorted(tmp_path.iterdir()) == before


def test_inputs_are_never_overwritten(files):
    with pytest.raises(mkl.CheckpointError, match="one of the inputs"):
        mkl.merge_files(mkl.average, files[0], files[1:], files[2])
