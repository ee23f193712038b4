"""Tasks in folders of images: what is found in them, what is passed over, and when images are read."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mergekit_lite.suites import Split, Suite, folders
from mergekit_lite.suites.finetune import finetune
from mergekit_lite.suites.folders import StoredSplit, load_folder
from tests.suites.test_suite import OPTIONS, Tiny, write_images


@pytest.fixture
def task(tmp_path):
    """A folder of one task with two classes, ten training images and four test images of each."""
    write_images(tmp_path / "two" / "train", ["red", "blue"], 10, 0)
    write_images(tmp_path / "two" / "test", ["red", "blue"], 4, 1)
    return tmp_path / "two"


@pytest.fixture
def on_disk(monkeypatch):
    """Every task counts as a large one."""
    monkeypatch.setattr(folders, "MOST_IN_MEMORY", 0)


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_validation_images_have_a_folder_of_several_names(task, name):
    write_images(task / name, ["red", "blue"], 3, 2)
    loaded = load_folder(task, 8)
    assert (len(loaded.train), len(loaded.validation)) == (20, 6)


def test_two_folders_of_validation_images_are_one_too_many(task):
    write_images(task / "val", ["red", "blue"], 1, 2)
    write_images(task / "validation", ["red", "blue"], 1, 2)
    with pytest.raises(ValueError, match=r"two' has more than one .*'validation' and 'val'"):
        load_folder(task, 8)


def test_what_other_programs_left_is_passed_over_without_a_word(task, caplog):
    for folder in (task, task / "train", task / "train" / "red", task / "test" / "blue"):
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (folder / name).mkdir()
            Image.new("RGB", (8, 8)).save(folder / name / "x.png")
        for name in ("._0.png", "Thumbs.db", ".DS_Store", "desktop.ini"):
            (folder / name).write_bytes(b"\x00\x05\x16\x07")
    loaded = load_folder(task, 8)
    assert loaded.classes == ["blue", "red"]
    assert len(loaded.train) + len(loaded.validation) == 20
    assert not caplog.records


def test_what_is_passed_over_is_said_once(task, caplog):
    (task / "train" / "red" / "notes.txt").write_text("mine")
    (task / "train" / "red" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(task / "train" / "red" / "more" / "x.png")
    (task / "test" / "loose.png").write_bytes((task / "test" / "red" / "0.png").read_bytes())
    (task / "test" / "red" / "photo.heic").write_bytes(b"x")
    (task / "README.md").write_text("about")
    with caplog.at_level(logging.WARNING, "mergekit_lite"):
        loaded = load_folder(task, 8)
    assert len(loaded.test) == 8
    (record,) = caplog.records
    assert record.name == "mergekit_lite"
    assert str(task) in record.getMessage()
    assert "4 file(s) that are no images" in record.getMessage()
    assert "1 folder(s) out of place, such as 'README.md'" in record.getMessage()


def test_classes_that_differ_are_named(task):
    write_images(task / "val", ["red", "green"], 1, 2)
    with pytest.raises(ValueError, match=r"val' has the class 'green'"):
        load_folder(task, 8)


def test_a_class_with_one_image_is_named(task):
    for image in list((task / "train" / "red").iterdir())[1:]:
        image.unlink()
    with pytest.raises(ValueError, match=r"train/red' has 1 image; it takes two"):
        load_folder(task, 8)


def test_one_folder_is_not_a_list_of_folders(task):
    for one in (str(task), task, b"two"):
        with pytest.raises(TypeError, match="folders must be a list, one folder per task"):
            Suite.from_folders(one, Tiny())
    suite = Suite.from_folders((folder for folder in [task]), Tiny(), device="cpu", **OPTIONS)
    assert list(suite.tasks) == ["two"]


def test_a_broken_image_is_named(task):
    broken = task / "test" / "red" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"test/red/2\.png' could not be read"):
        load_folder(task, 8)


# ---------------------------------------------------------------- images that stay on the disk


def test_a_large_task_has_the_same_images(task, monkeypatch):
    small = load_folder(task, 8)
    monkeypatch.setattr(folders, "MOST_IN_MEMORY", 28 * 3 * 8 * 8 - 1)
    large = load_folder(task, 8)
    assert type(small.train) is Split
    for split in ("train", "validation", "test"):
        here, there = small.split(split), large.split(split)
        assert isinstance(there, StoredSplit)
        assert torch.equal(here.images, there.images)
        assert torch.equal(here.labels, there.labels)
        for index in (slice(1, 4), torch.tensor([2, 0]), here.labels == 1, slice(0, 0)):
            part = there[index]
            assert isinstance(part, StoredSplit)
            assert torch.equal(part.images, here[index].images)
            assert torch.equal(part.labels, here[index].labels)
        batches = list(there.batches(3))
        assert [len(batch) for batch in batches] == [len(batch) for batch in here.batches(3)]
        assert torch.equal(torch.cat([batch.images for batch in batches]), here.images)
    again = pickle.loads(pickle.dumps(copy.deepcopy(large.train)))
    assert torch.equal(again.images, small.train.images)
    assert "on disk" in repr(again)


def test_a_suite_reads_a_batch_at_a_time(task, on_disk, monkeypatch):
    held = []
    read = StoredSplit.images.fget
    monkeypatch.setattr(StoredSplit, "images", property(lambda split: held.append(len(split)) or read(split)))
    monkeypatch.setattr("mergekit_lite.suites.suite.EVALUATION_BATCH", 3)
    suite = Suite.from_folders([task], Tiny(), device="cpu", **OPTIONS)
    assert sum(held) == 6, "only the images that the heads are made from"
    suite.finetune(progress=False)
    suite.evaluate()
    suite.losses(suite.experts)
    suite.gradient(None, "two")
    suite.calibration("two", 5, batch=2)
    suite.inputs()
    for half in (*suite.halves(), suite.cut(3)):
        half.predict(None, "two")
    assert max(held) <= OPTIONS["batch_size"]


def test_a_suite_on_disk_measures_what_one_in_memory_does(task, monkeypatch):
    small = Suite.from_folders([task], Tiny(), device="cpu", **OPTIONS)
    monkeypatch.setattr(folders, "MOST_IN_MEMORY", 0)
    large = Suite.from_folders([task], Tiny(), device="cpu", **OPTIONS)
    a, b = (finetune(suite, "two", progress=False) for suite in (small, large))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert small.losses(a) == large.losses(b)
    assert torch.equal(small.inputs()["two"], large.inputs()["two"])


def test_the_beginning_of_every_file_is_looked_at(task, on_disk):
    whole = (task / "test" / "red" / "2.png").read_bytes()
    (task / "test" / "red" / "2.png").write_bytes(b"no image at all")
    with pytest.raises(ValueError, match=r"test/red/2\.png' could not be read"):
        load_folder(task, 8)
    (task / "test" / "red" / "2.png").write_bytes(whole[:-40])
    loaded = load_folder(task, 8)
    with pytest.raises(ValueError, match=r"test/red/2\.png' could not be read"):
        [batch.images for batch in loaded.test.batches(2)]
    (task / "test" / "red" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"no such image: '.*test/red/2\.png'"):
        _ = loaded.test.images


def test_long_reading_shows_how_far_it_is(task, on_disk, monkeypatch):
    shown = []

    def bar(items, desc, disable, **options):
        shown.append((desc, disable))
        return items

    monkeypatch.setattr("tqdm.auto.tqdm", bar)
    for many, disabled in ((27, None), (28, True)):
        monkeypatch.setattr(folders, "MANY", many)
        load_folder(task, 8)
        assert shown[-1] == ("looking at files", disabled)
    monkeypatch.setattr(folders, "MANY", 7)
    loaded = load_folder(task, 8)
    list(loaded.test.batches(3))
    assert shown[-1] == ("reading batches", None)
    _ = loaded.test.images
    assert shown[-1] == ("reading images", None)


def test_images_are_resized_as_the_recipe_says(task):
    smooth, rough = (load_folder(task, 24, interpolation=mode).test.images for mode in ("bilinear", "nearest"))
    assert not torch.equal(smooth, rough)
    suite = Suite.from_folders([task], Tiny(), device="cpu", **OPTIONS | {"resolution": 24}, interpolation="nearest")
    assert torch.equal(suite.task("two").test.images, rough)
    assert np.unique(rough.numpy()).size > 1
