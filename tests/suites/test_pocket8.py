"""The shipped suite: its files, what it shows, and how it is built."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import mergekit_lite as mkl
from mergekit_lite.checkpoints import SafetensorsFile
from mergekit_lite.geometry import largest_cosine
from mergekit_lite.suites import Recipe, build, pocket
from mergekit_lite.suites.finetune import finetune

FOLDER = pocket.SUITES / "pocket8"
FACTS = json.loads((FOLDER / "suite.json").read_text())
SEEDS = [0, 1, 2]


def test_every_file_is_the_one_that_was_measured():
    files = [p for p in FOLDER.rglob("*") if p.suffix in {".safetensors", ".npz"}]
    assert {p.relative_to(FOLDER).as_posix(): pocket.sha256(p) for p in files} == FACTS["sha256"]
    assert {f"seed{seed}/{task}.safetensors" for seed in SEEDS for task in pocket.POCKET8_TASKS} <= set(FACTS["sha256"])


def test_it_fits():
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 60e6


def test_every_checkpoint_says_how_it_was_made():
    for seed in SEEDS:
        for task in pocket.POCKET8_TASKS:
            made = SafetensorsFile(FOLDER / f"seed{seed}" / f"{task}.safetensors").metadata
            assert (made["task"], made["seed"]) == (task, str(seed))
            assert Recipe().but(**FACTS["recipe"] | {"frozen": ()}) == Recipe(), "the defaults made pocket8"
            assert json.loads(made["recipe"]) == FACTS["recipe"]
            assert {"torch", "timm", "python"} <= set(made)


def test_splits_have_every_class_and_hardly_an_image_in_common(suite):
    for task in [*suite.tasks.values(), *suite.held_out.values()]:
        for split in (task.train, task.validation, task.test):
            assert split.labels.unique().tolist() == list(range(len(task.classes)))
            assert split.images.dtype == torch.uint8
        for split in (task.validation, task.test):
            assert len(split) >= 250
        trained_on = {image.numpy().tobytes() for image in task.train.images}
        for split in (task.validation, task.test):
            again = sum(image.numpy().tobytes() in trained_on for image in split.images)
            assert again <= 0.02 * len(split), f"{task.name}: {again} of {len(split)} images stand in training too"


def test_the_data_card_lists_every_file():
    card = (FOLDER / "DATA_CARD.md").read_text()
    for path in (FOLDER / "images").glob("*.npz"):
        with np.load(path) as arrays:
            sizes = " / ".join(str(len(arrays[f"y_{split}"])) for split in ("train", "validation", "test"))
        row = next(line for line in card.splitlines() if line.startswith(f"| {path.stem} "))
        assert sizes in row


@pytest.mark.parametrize("seed", SEEDS)
def test_recorded_accuracies_are_what_one_measures(seed):
    suite = mkl.load_suite("pocket8", seed=seed, device="cpu")
    for task in ("mnist", "emoji_category"):
        for split in ("validation", "test"):
            base = suite.evaluate(split=split, tasks=[task])[task]
            expert = suite.evaluate(suite.experts[task], split=split, tasks=[task])[task]
            assert base == pytest.approx(suite.recorded[split]["base"][task], abs=0.005)
            assert expert == pytest.approx(suite.recorded[split]["experts"][task], abs=0.005)


def test_experts_share_what_was_not_trained(suite):
    for expert in suite.experts.values():
        for name, tensor in suite.base.items():
            if "running" in name or not tensor.is_floating_point():
                assert torch.equal(expert[name], tensor)
            else:
                assert not torch.equal(expert[name], tensor)


# ---------------------------------------------------------------- what the suite is for


def test_it_shows_what_the_papers_show():
    """The recorded figures: the mean over three seeds, scales chosen on validation, measured on test."""
    mean = pd.read_csv("book/tables/pocket8-figures.csv", index_col=0)["mean"]
    assert mean["experts"] >= 0.80
    assert mean["base"] <= 0.60 * mean["experts"]
    assert mean["task arithmetic"] >= mean["base"] + 0.08
    assert mean["base"] < mean["average"] <= mean["task arithmetic"] < mean["TIES"] < mean["PCB"] < mean["TSV"]
    assert mean["largest |cosine|"] <= 0.35


def test_the_page_says_what_the_table_says():
    figures = pd.read_csv("book/tables/pocket8-figures.csv", index_col=0)
    page = " ".join(Path("book/pocket8.md").read_text().split())
    mean, spread = figures["mean"], figures["spread"]
    assert f"{100 * mean['average'] / mean['experts']:.0f} %" in page
    assert f"they differ by {mean['PCB'] - mean['TIES']:.3f}, and their spread over the seeds is larger" in page
    assert mean["PCB"] - mean["TIES"] < min(spread["PCB"], spread["TIES"])


def test_recorded_merges_are_what_one_measures(suite):
    figures = pd.read_csv("book/tables/pocket8-figures.csv", index_col=0)["seed 0"]
    assert suite.evaluate().average == pytest.approx(figures["base"], abs=0.003)
    assert suite.evaluate(mkl.average(suite.task_vectors)).average == pytest.approx(figures["average"], abs=0.003)
    merged = mkl.tsv(suite.task_vectors, scale=figures["TSV scale"])
    assert suite.evaluate(merged).average == pytest.approx(figures["TSV"], abs=0.003)
    assert largest_cosine(suite.task_vectors) == pytest.approx(figures["largest |cosine|"], abs=1e-3)


def test_held_out_tasks_can_be_evaluated(suite):
    evaluation = suite.evaluate(tasks=suite.held_out)
    assert set(evaluation) == {"kana", "optdigits8"}
    assert evaluation.average > 0.3
    assert not set(suite.held_out) & set(suite.task_vectors.names)


@pytest.mark.skipif(
    not (torch.cuda.is_available() or torch.backends.mps.is_available()), reason="needs an accelerator (CUDA or MPS)"
)
def test_devices_agree(suite):
    other = mkl.load_suite("pocket8", device="auto")
    for method in (mkl.task_arithmetic, mkl.ties, mkl.tsv):
        here, there = suite.evaluate(method(suite.task_vectors)), other.evaluate(method(other.task_vectors))
        for task in here:
            assert here[task] == pytest.approx(there[task], abs=0.01)


# ---------------------------------------------------------------- asking wrongly


def test_what_there_is_not_is_said(suite):
    with pytest.raises(ValueError, match="there is pocket8"):
        mkl.load_suite("pocket9")
    with pytest.raises(ValueError, match="seeds 0, 1, 2"):
        mkl.load_suite("pocket8", seed=99)
    with pytest.raises(KeyError, match="no task named 'cars'"):
        suite.evaluate(tasks=["cars"])
    with pytest.raises(ValueError, match="train, validation, test"):
        suite.evaluate(split="tests", tasks=["mnist"])
    with pytest.raises(RuntimeError, match=r"conv_stem\.weight"):
        suite.evaluate({"w": torch.zeros(1)})


# ---------------------------------------------------------------- building it


@pytest.fixture
def quick(monkeypatch):
    """The real build with a recipe of three steps and two tasks."""
    monkeypatch.setattr(build, "Recipe", lambda: Recipe(steps=3))
    for module in (build, pocket):
        monkeypatch.setattr(module, "POCKET8_TASKS", ("mnist", "textures"))
        monkeypatch.setattr(module, "POCKET8_HELD_OUT", ("optdigits8",))


def test_a_build_can_be_interrupted_and_its_result_loaded(quick, tmp_path, monkeypatch):
    def stops_at_textures(suite, task, **options):
        if task == "textures":
            raise KeyboardInterrupt
        return finetune(suite, task, **options)

    out = tmp_path / "built"
    monkeypatch.setattr(build, "finetune", stops_at_textures)
    CliRunner().invoke(build.app, ["pocket8", "--seed", "5", "--out", str(out)])
    first = out / "seed5" / "mnist.safetensors"
    written = first.stat().st_mtime_ns

    trained = []
    monkeypatch.setattr(build, "finetune", lambda suite, task, **o: trained.append(task) or finetune(suite, task, **o))
    done = CliRunner().invoke(build.app, ["pocket8", "--seed", "5", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert trained == ["textures"]
    assert first.stat().st_mtime_ns == written

    suite = mkl.load_suite(out, seed=5, device="cpu")
    assert suite.recipe.steps == 3
    assert suite.recorded["test"]["experts"].keys() == {"mnist", "textures"}
    assert all(
        pocket.sha256(out / name) == digest
        for name, digest in json.loads((out / "suite.json").read_text())["sha256"].items()
    )
    suite.evaluate(mkl.average(suite.task_vectors), split="validation")


def test_another_recipe_trains_again(quick, tmp_path, monkeypatch):
    for steps in (1, 2):
        suite = build.build(Recipe(steps=steps), 0, tmp_path)
        assert suite.recipe.steps == steps
    monkeypatch.setattr(build, "finetune", None)  # a third build with the same recipe must not train at all
    build.build(Recipe(steps=2), 0, tmp_path)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"'conv_stem\.weight' should have shape"):
        build.trunk_from_pretrained(tmp_path / "other.pth")


def test_trunk_weights_are_matched_in_order(tmp_path):
    timm = build.import_timm()
    whole = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = {
        f"_fc.{i}" if "classifier" in n else f"layer{i}.{n.split('.')[-1]}": t for i, (n, t) in enumerate(whole.items())
    }
    torch.save(renamed, tmp_path / "published.pth")
    trunk = build.trunk_from_pretrained(tmp_path / "published.pth")
    assert torch.equal(trunk["blocks.4.2.conv_pwl.weight"], whole["blocks.4.2.conv_pwl.weight"])
    assert not any(name.startswith("blocks.5") for name in trunk)
