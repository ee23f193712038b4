"""The files of a suite as input: what is damaged, missing, replaced or leads elsewhere is named."""

import json
import os
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.checkpoints import CheckpointError, SafetensorsFile, load, save
from mergekit_lite.suites import Recipe, build, pocket, records
from mergekit_lite.suites.finetune import finetune
from mergekit_lite.suites.npz import load_npz

FOLDER = pocket.SUITES / "pocket8"


@pytest.fixture
def copied(tmp_path):
    """A copy of pocket8 with two tasks and one seed, to be spoilt."""
    out = tmp_path / "mine"
    (out / "images").mkdir(parents=True)
    (out / "seed0").mkdir()
    facts = json.loads((FOLDER / "suite.json").read_text())
    facts |= {"name": "mine", "tasks": ["mnist", "textures"], "held_out": ["optdigits8"]}
    for file in ["base.safetensors", "heads.safetensors", "seed0/accuracy.json"]:
        shutil.copy(FOLDER / file, out / file)
    for task in facts["tasks"]:
        shutil.copy(FOLDER / "seed0" / f"{task}.safetensors", out / "seed0")
    for task in [*facts["tasks"], *facts["held_out"]]:
        shutil.copy(FOLDER / "images" / f"{task}.npz", out / "images")
    (out / "suite.json").write_text(json.dumps(facts))
    return out


def change(folder, **facts):
    path = folder / "suite.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def listed(folder):
    return json.loads((folder / "suite.json").read_text())["sha256"]


def flip(path, place=-9):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_copy_is_as_good(copied, suite):
    mine = mkl.load_suite(copied, device="cpu")
    assert list(mine.tasks) == list(mine.experts) == ["mnist", "textures"]
    assert torch.equal(mine.experts["mnist"]["conv_stem.weight"], suite.experts["mnist"]["conv_stem.weight"])


# ---------------------------------------------------------------- checksums


@pytest.mark.parametrize(
    "file",
    [
        "base.safetensors",
        "heads.safetensors",
        "images/textures.npz",
        "images/optdigits8.npz",
        "seed0/mnist.safetensors",
    ],
)
def test_a_file_that_is_not_the_one_that_was_measured_is_named(copied, file):
    mkl.load_suite(copied, device="cpu")
    flip(copied / file)
    with pytest.raises(CheckpointError, match=rf"{file}' is not the file that was measured.*copy or build it again"):
        mkl.load_suite(copied, device="cpu")
    (copied / file).unlink()
    with pytest.raises(CheckpointError, match=file.split("/")[-1]):
        mkl.load_suite(copied, device="cpu")


def test_another_tasks_expert_is_not_this_ones(copied):
    shutil.copy(copied / "seed0" / "textures.safetensors", copied / "seed0" / "mnist.safetensors")
    with pytest.raises(CheckpointError, match=r"seed0/mnist\.safetensors' is not the file that was measured"):
        mkl.load_suite(copied, device="cpu")


def test_an_expert_that_is_listed_must_be_there(copied):
    (copied / "seed0" / "mnist.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"no such file: '.*seed0/mnist\.safetensors', though '.*suite\.json' lists"
    ):
        mkl.load_suite(copied, device="cpu")
    left = {name: digest for name, digest in listed(copied).items() if name != "seed0/mnist.safetensors"}
    change(copied, sha256=left)
    assert list(mkl.load_suite(copied, device="cpu").experts) == ["textures"], "a seed need not train every task"


@pytest.mark.parametrize("file", ["base.safetensors", "images/mnist.npz", "seed0/mnist.safetensors"])
def test_a_file_that_is_not_listed_is_refused(copied, file):
    change(copied, sha256={name: digest for name, digest in listed(copied).items() if name != file})
    with pytest.raises(CheckpointError, match=rf"{file}' is not listed in '.*suite\.json'"):
        mkl.load_suite(copied, device="cpu")


def test_checksums_are_computed_once(copied, monkeypatch):
    mkl.load_suite(copied, device="cpu")
    computed = []
    monkeypatch.setattr(records, "sha256", lambda path: computed.append(path) or pocket.sha256(path))
    mkl.load_suite(copied, device="cpu")
    assert computed == []
    os.utime(copied / "base.safetensors", ns=(time.time_ns(), time.time_ns()))
    mkl.load_suite(copied, device="cpu")
    assert [path.name for path in computed] == ["base.safetensors"]


def test_images_that_were_replaced_are_read_again(copied):
    before = mkl.load_suite(copied, device="cpu").tasks["mnist"].test.images
    shutil.copy(copied / "images" / "textures.npz", copied / "images" / "mnist.npz")
    change(copied, sha256=listed(copied) | {"images/mnist.npz": listed(copied)["images/textures.npz"]})
    assert not torch.equal(mkl.load_suite(copied, device="cpu").tasks["mnist"].test.images, before)


# ---------------------------------------------------------------- suite.json and accuracy.json


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"name": 3}', b"{}"])
def test_a_damaged_description_is_named(copied, content):
    (copied / "suite.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"mine/suite\.json' is damaged"):
        mkl.load_suite(copied, device="cpu")


@pytest.mark.parametrize(
    "facts",
    [
        {"tasks": "mnist"},
        {"tasks": [3]},
        {"tasks": ["mnist", "mnist"]},
        {"tasks": None},
        {"recipe": {"stepps": 3}},
        {"recipe": {"steps": "many"}},
        {"recipe": [1]},
        {"noise": "loud"},
        {"noise": float("nan")},
        {"sha256": {"base.safetensors": 3}},
        {"sha256": {"../base.safetensors": "0"}},
        {"parent": 3},
    ],
)
def test_what_a_description_cannot_say_is_named(copied, facts):
    change(copied, **facts)
    with pytest.raises(CheckpointError, match=r"mine/suite\.json' is damaged"):
        mkl.load_suite(copied, device="cpu")


@pytest.mark.parametrize("missing", ["name", "tasks", "held_out", "recipe", "sha256"])
def test_what_a_description_does_not_say_is_named(copied, missing):
    facts = json.loads((copied / "suite.json").read_text())
    del facts[missing]
    (copied / "suite.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=rf"mine/suite\.json' is damaged .*no '{missing}'"):
        mkl.load_suite(copied, device="cpu")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\b", "C:x", "a\0b", "a\nb"]
)
def test_names_do_not_lead_out_of_the_folder(copied, name):
    for facts in ({"tasks": [name]}, {"held_out": [name]}, {"parent": name}):
        spoilt = copied.parent / "spoilt"
        shutil.copytree(copied, spoilt)
        change(spoilt, **facts)
        with pytest.raises(CheckpointError, match=r"suite\.json' is damaged .* is not a plain name"):
            mkl.load_suite(spoilt, device="cpu")
        shutil.rmtree(spoilt)
    with pytest.raises(CheckpointError, match="is not the name of a file"):
        pocket.find(copied, f"images/{name}" if name != "a/b" else "images//mnist.npz")


def test_parents_that_lead_in_a_circle_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pocket, "SUITES", tmp_path)
    for name, parent in {"self": "self", "a": "b", "b": "c", "c": "a", "orphan": "nobody"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "suite.json").write_text(json.dumps({"name": name, "parent": parent}))
    for name, last in {"self": "self", "a": "c", "b": "a"}.items():
        with pytest.raises(CheckpointError, match=rf"{last}/suite\.json' is damaged .* leads back"):
            pocket.find(tmp_path / name, "base.safetensors")
    with pytest.raises(CheckpointError, match=r"orphan/suite\.json' is damaged .* no suite 'nobody' to be its parent"):
        pocket.find(tmp_path / "orphan", "base.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"test": 3}',
        '{"test": {"base": 3}}',
        '{"tests": {}}',
        '{"test": {"base": {"a": "x"}}}',
        '{"test": {"base": {"a": 2}}}',
    ],
)
def test_damaged_accuracies_are_named(copied, content):
    (copied / "seed0" / "accuracy.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"seed0/accuracy\.json' is damaged"):
        mkl.load_suite(copied, device="cpu")
    (copied / "seed0" / "accuracy.json").unlink()
    with pytest.raises(CheckpointError, match=r"no such file: '.*accuracy\.json'.*build was not finished"):
        mkl.load_suite(copied, device="cpu")


def test_heads_and_base_of_another_kind_are_named(copied):
    for file, state in {
        "base.safetensors": {"w": torch.zeros(2)},
        "heads.safetensors": {"mnist.centre": torch.zeros(3)},
    }.items():
        spoilt = copied.parent / "spoilt"
        shutil.copytree(copied, spoilt)
        save(state, spoilt / file)
        change(spoilt, sha256=listed(spoilt) | {file: pocket.sha256(spoilt / file)})
        with pytest.raises(CheckpointError, match=rf"{file}' is damaged"):
            mkl.load_suite(spoilt, device="cpu")
        shutil.rmtree(spoilt)
    change(copied, held_out=["kana", "optdigits8"])
    shutil.copy(FOLDER / "images" / "kana.npz", copied / "images")
    heads = {name: tensor for name, tensor in load(copied / "heads.safetensors").items() if "kana" not in name}
    save(heads, copied / "heads.safetensors")
    change(copied, sha256=listed(copied) | {"heads.safetensors": pocket.sha256(copied / "heads.safetensors")})
    with pytest.raises(CheckpointError, match="no head for its task 'kana'"):
        mkl.load_suite(copied, device="cpu")


# ---------------------------------------------------------------- arrays of images


def arrays(**changes):
    split = {"x": np.zeros((4, 5, 5), np.uint8), "y": np.array([0, 1, 0, 1])}
    whole = {f"{array}_{name}": value for name in ("train", "validation", "test") for array, value in split.items()}
    return {**whole, "classes": np.array(["a", "b"])} | changes


def test_arrays_become_a_task(tmp_path):
    np.savez_compressed(tmp_path / "mine.npz", **arrays(x_test=np.zeros((4, 5, 6, 3), np.uint8)))
    task = load_npz(tmp_path / "mine.npz")
    assert (task.name, task.classes) == ("mine", ["a", "b"])
    assert (task.train.images.shape, task.test.images.shape) == ((4, 1, 5, 5), (4, 3, 5, 6))


@pytest.mark.parametrize(
    "changes",
    [
        {"x_train": np.zeros((4, 5, 5))},
        {"x_train": np.zeros((4, 5, 5, 4), np.uint8)},
        {"x_train": np.zeros((3, 5, 5), np.uint8)},
        {"y_test": np.array([0, 1, 2, 1])},
        {"y_test": np.array([0, -1, 0, 1])},
        {"y_test": np.array([0.0, 1, 0, 1])},
        {"y_test": np.array([[0], [1], [0], [1]])},
        {"classes": np.array("a")},
        {"classes": np.array(["a", None], dtype=object)},
    ],
)
def test_arrays_that_are_no_task_are_named(tmp_path, changes):
    np.savez(tmp_path / "mine.npz", **arrays(**changes))
    with pytest.raises(CheckpointError, match=r"mine\.npz' does not hold the images of a task"):
        load_npz(tmp_path / "mine.npz")


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, **arrays(x_train=np.random.default_rng(0).integers(0, 255, (4, 99, 99), dtype=np.uint8)))
    whole = path.read_bytes()
    for content in (
        b"",
        b"PK",
        whole[: len(whole) // 2],
        whole[:-30],
        whole[:500] + b"\0" * 50 + whole[550:],
        b"x" * 999,
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"mine\.npz' does not hold the images"):
            load_npz(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(CheckpointError, match=r"one\.npy' does not hold the images"):
        load_npz(tmp_path / "one.npy")
    np.savez(path, **{name: array for name, array in arrays().items() if name != "y_test"})
    with pytest.raises(CheckpointError, match=r"mine\.npz' .*y_test"):
        load_npz(path)
    with pytest.raises(CheckpointError, match=r"no such file: '.*gone\.npz'"):
        load_npz(tmp_path / "gone.npz")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (60000, 300, 300), }",
        "{'descr': '<U99999999', 'fortran_order': False, 'shape': (20,), }",
        "{'descr': '<U0', 'fortran_order': False, 'shape': (9999999999999,), }",
    ],
)
def test_giants_are_refused_before_they_are_unpacked(tmp_path, header):
    np.savez(tmp_path / "giant.npz", **{name: array for name, array in arrays().items() if name != "classes"})
    with zipfile.ZipFile(tmp_path / "giant.npz", "a") as archive:
        archive.writestr("classes.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"giant\.npz' .*it unpacks to [\d.]+ GB"):
        load_npz(tmp_path / "giant.npz")
    assert time.perf_counter() - start < 5


# ---------------------------------------------------------------- building


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A build of two tasks with one step of training; `trained` lists what is trained from now on."""
    for module in (build, pocket):
        monkeypatch.setattr(module, "POCKET8_TASKS", ("mnist", "textures"))
        monkeypatch.setattr(module, "POCKET8_HELD_OUT", ())
    monkeypatch.setattr(build, "_rounded", lambda accuracy: dict.fromkeys(accuracy, 0.5))
    monkeypatch.setattr("mergekit_lite.suites.suite.Suite._predict", lambda suite, task, model, images: images.labels)
    build.build(RECIPE, 0, tmp_path)
    return tmp_path


RECIPE = Recipe(steps=1, batch_size=2)


@pytest.fixture
def trained(monkeypatch):
    names = []
    monkeypatch.setattr(build, "finetune", lambda suite, task, **o: names.append(task) or finetune(suite, task, **o))
    return names


def test_a_finished_expert_is_not_trained_again(built, trained):
    build.build(RECIPE, 0, built)
    (built / "suite.json").unlink()
    build.build(RECIPE, 0, built)
    assert trained == []
    mkl.load_suite(built, device="cpu")


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("place", [-9, -200_000])
def test_a_damaged_expert_is_not_taken_for_finished(built, trained, interrupted, place):
    path = built / "seed0" / "mnist.safetensors"
    if interrupted:
        (built / "suite.json").unlink()
    flip(path, place)
    with pytest.raises(CheckpointError, match=r"seed0/mnist\.safetensors' is damaged.*Delete it to train it again"):
        build.build(RECIPE, 0, built)
    path.unlink()
    build.build(RECIPE, 0, built)
    assert trained == ["mnist"]
    mkl.load_suite(built, device="cpu")


def test_another_expert_is_not_taken_for_this_one(built, trained):
    seeds = built / "seed0"
    shutil.copy(seeds / "textures.safetensors", seeds / "mnist.safetensors")
    build.build(RECIPE, 0, built)
    assert trained == ["mnist"]
    (built / "seed1").mkdir()
    for task in ("mnist", "textures"):
        shutil.copy(seeds / f"{task}.safetensors", built / "seed1")
    build.build(RECIPE, 1, built)
    assert trained == ["mnist", "mnist", "textures"], "those of another seed"


def spoil_metadata(path, **changes):
    save(load(path), path, SafetensorsFile(path).metadata | changes)


@pytest.mark.parametrize("recipe", ["{", "[]", "3", '{"stepps": 3}', '{"steps": "many"}', "[" * 50_000])
def test_a_broken_recipe_is_named(built, recipe):
    spoil_metadata(built / "seed0" / "mnist.safetensors", recipe=recipe)
    with pytest.raises(CheckpointError, match=r"seed0/mnist\.safetensors' is damaged"):
        build.build(RECIPE, 0, built)


def test_an_interrupted_build_by_another_version_is_trained_again(built, trained):
    (built / "suite.json").unlink()
    spoil_metadata(built / "seed0" / "mnist.safetensors", torch="1.0.0")
    build.build(RECIPE, 0, built)
    assert trained == ["mnist"]


def test_an_interrupted_change_of_the_recipe_goes_on(built, trained, monkeypatch):
    other = RECIPE.but(learning_rate=1e-5)
    counted = build.finetune

    def stops(suite, task, **options):
        if task == "textures":
            raise KeyboardInterrupt
        return counted(suite, task, **options)

    monkeypatch.setattr(build, "finetune", stops)
    with pytest.raises(KeyboardInterrupt):
        build.build(other, 0, built)
    with pytest.raises(CheckpointError, match=r"safetensors' is not the file that was measured"):
        mkl.load_suite(built, device="cpu")
    monkeypatch.setattr(build, "finetune", counted)
    build.build(other, 0, built)
    assert trained == ["mnist", "textures"]
    mkl.load_suite(built, device="cpu")


def test_a_build_does_not_hide_that_another_seed_is_damaged(built):
    flip(built / "seed0" / "mnist.safetensors")
    build.build(RECIPE, 1, built)
    mkl.load_suite(built, seed=1, device="cpu")
    with pytest.raises(CheckpointError, match=r"seed0/mnist\.safetensors' is not the file that was measured"):
        mkl.load_suite(built, seed=0, device="cpu")


def test_a_seed_whose_build_was_not_finished_is_said(built):
    (built / "seed1").mkdir()
    shutil.copy(built / "seed0" / "mnist.safetensors", built / "seed1")
    with pytest.raises(CheckpointError, match=r"build was not finished"):
        mkl.load_suite(built, seed=1, device="cpu")


def test_a_build_begins_with_the_images_that_were_measured(built, tmp_path, monkeypatch):
    spoilt = tmp_path / "shipped" / "pocket8"
    shutil.copytree(FOLDER / "images", spoilt / "images")
    for file in ("suite.json", "base.safetensors"):
        shutil.copy(FOLDER / file, spoilt)
    flip(spoilt / "images" / "mnist.npz", 5000)
    monkeypatch.setattr(build, "SUITES", tmp_path / "shipped")
    with pytest.raises(CheckpointError, match=r"images/mnist\.npz' is not the file that was measured"):
        build.build(RECIPE, 0, tmp_path / "new")
