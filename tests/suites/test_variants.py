"""The relatives of pocket8: what is shipped, what they inherit, and how they are built."""

import json

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import mergekit_lite as mkl
from mergekit_lite.geometry import largest_cosine
from mergekit_lite.linearization import Linearized
from mergekit_lite.suites import build, pocket, variants
from mergekit_lite.suites.variants import FOUR, VARIANTS, add_noise, calibrate

EXPERTS = [(name, seed) for name, variant in VARIANTS.items() for seed in variant.trained]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_file_is_the_one_that_was_measured(name):
    folder = pocket.SUITES / name
    facts = json.loads((folder / "suite.json").read_text())
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    assert set(facts["sha256"]) == there
    assert all(pocket.sha256(folder / file) == digest for file, digest in facts["sha256"].items())
    assert pocket.read_recipe(facts["recipe"]) == mkl.Recipe().but(**VARIANTS[name].changes)


@pytest.mark.parametrize(("name", "seed"), EXPERTS)
def test_recorded_accuracies_are_what_one_measures(name, seed):
    suite = mkl.load_suite(name, seed=seed, device="cpu")
    task = VARIANTS[name].trained[seed][0]
    assert set(suite.experts) == set(VARIANTS[name].trained[seed])
    expert = suite.experts[task]
    network = Linearized(suite.model, expert) if suite.recipe.tangent else expert
    measured = suite.evaluate(network, split="validation", tasks=[task])[task]
    assert measured == pytest.approx(suite.recorded["validation"]["experts"][task], abs=0.005)
    assert measured > 0.9, "every expert is good at its task"


def test_a_suite_runs_its_experts_as_the_networks_they_were_trained_as():
    tangent = mkl.load_suite("pocket8-tangent", device="cpu").cut(20)
    for task, expert in tangent.experts.items():
        linear = tangent.predict(Linearized(tangent.model, expert), task)
        assert torch.equal(tangent.predict(expert, task), linear)
    whole = mkl.load_suite("pocket8-tangent", device="cpu")
    measured = whole.evaluate_experts(split="validation")
    assert dict(measured) == pytest.approx(whole.recorded["validation"]["experts"], abs=0.005)


def test_what_a_variant_does_not_have_is_its_parents(suite):
    far, scratch = mkl.load_suite("pocket8-far", device="cpu"), mkl.load_suite("pocket8-scratch", device="cpu")
    other = mkl.load_suite("pocket8-scratch-other", device="cpu")
    assert all(torch.equal(far.base[name], suite.base[name]) for name in suite.base)
    assert far.tasks["mnist"] is suite.tasks["mnist"]
    assert torch.equal(far.heads["mnist"].directions, suite.heads["mnist"].directions)
    assert not torch.equal(scratch.base["conv_stem.weight"], suite.base["conv_stem.weight"])
    assert not torch.equal(scratch.base["conv_stem.weight"], other.base["conv_stem.weight"])
    assert torch.equal(scratch.heads["mnist"].directions, other.heads["mnist"].directions)


def test_a_missing_file_is_said(tmp_path):
    (tmp_path / "suite.json").write_text(json.dumps({"name": "mine"}))
    with pytest.raises(FileNotFoundError, match=r"the suite 'mine' has no file 'base\.safetensors'"):
        pocket.find(tmp_path, "base.safetensors")


def test_noise_is_the_same_at_every_call_and_leaves_the_images_alone(suite):
    task = suite.tasks["mnist"]
    before = task.test.images.clone()
    once, again = add_noise(task, 60.0), add_noise(task, 60.0)
    assert torch.equal(once.test.images, again.test.images)
    assert torch.equal(task.test.images, before)
    assert torch.equal(once.test.labels, task.test.labels)
    # Where clipping at 0 and 255 does not hide it, the noise has the strength asked for.
    grey = (before > 100) & (before < 155)
    spread = (once.test.images.float() - before.float())[grey].std().item()
    assert spread == pytest.approx(60, rel=0.05)


def test_calibration_sets_the_statistics_of_the_images(suite):
    small = suite.cut(40, tasks=["mnist", "fashion"])
    model = suite.build()
    first = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    first.running_mean.fill_(9.0)
    calibrate(model, small)
    seen = []
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean((0, 2, 3))))
    with torch.no_grad():
        for task in small.tasks.values():
            model(small.prepare(task.train.images))
    torch.testing.assert_close(first.running_mean, torch.stack(seen).mean(0), atol=1e-4, rtol=1e-3)
    assert not model.training
    assert first.momentum == 0.1


# ---------------------------------------------------------------- what they are for


def test_the_table_says_what_chapter_13_says():
    table = pd.read_csv("book/tables/variants.csv", index_col=0)
    gain = table["merge"] - table["base"]
    assert gain["pocket8"] > 0.1
    assert gain["pocket8-tangent"] > 0.1
    assert gain["pocket8-far"] < 0.02
    assert gain["pocket8-scratch"] < 0.02
    assert (table["experts"] > 0.7).all()
    assert (table["largest |cosine|"] < 0.15).all()
    assert table["largest |cosine|"].idxmin() == "pocket8-scratch"
    lengths = table["length of a task vector"]
    assert 15 < lengths["pocket8-far"] / lengths["pocket8"] < 20
    assert table["experts"]["pocket8"] - table["experts"]["pocket8-tangent"] > 0.02


def test_the_table_says_what_chapter_12_says():
    table = pd.read_csv("book/tables/analogies.csv")
    table["transferred"] = table["analogy"] - table["expert for clean images"]
    gained = table.groupby("change of the images")["transferred"].mean()
    assert gained["noise"] > gained["coarse pixels"] > gained["turned by 90 degrees"] > gained["inverted"]
    assert gained["turned by 90 degrees"] < gained["noise"] / 3
    assert abs(gained["inverted"]) < 0.03


def test_the_table_of_edits_says_what_chapter_12_says():
    table = pd.read_csv("book/tables/edits.csv", index_col=0)
    mean, spread = table["mean"], table["spread"]
    assert 0.06 < mean["the task to forget, before"] - mean["the task to forget, negated"] < 0.08
    assert mean["the control tasks, before"] - mean["the control tasks, task negated"] < 0.01
    for task, margin in {"letters": 0.08, "scripts": 0.04}.items():
        analogy = mean[f"noisy {task}, analogy"]
        assert analogy > mean[f"noisy {task}, expert for clean images"] + 0.2
        assert analogy > mean[f"noisy {task}, expert + noisy mnist"] + margin
    assert spread["noisy letters, analogy"] > 4 * spread["noisy scripts, analogy"]


def test_shipped_variants_agree_with_the_table():
    table = pd.read_csv("book/tables/variants.csv", index_col=0)
    scratch = mkl.load_suite("pocket8-scratch", device="cpu")
    assert largest_cosine(scratch.task_vectors) == pytest.approx(table["largest |cosine|"]["pocket8-scratch"], abs=0.03)
    assert scratch.evaluate(tasks=FOUR).average == pytest.approx(table["base"]["pocket8-scratch"], abs=0.003)


# ---------------------------------------------------------------- building them


def test_a_variant_is_built_and_can_be_loaded(tmp_path, monkeypatch):
    quick = variants.Variant("pocket8", ("mnist",), {0: ("mnist",)}, {"steps": 2}, initialisation=3, own_heads=True)
    monkeypatch.setitem(VARIANTS, "pocket8-scratch", quick)
    out = tmp_path / "pocket8-scratch"
    done = CliRunner().invoke(build.app, ["variant", "pocket8-scratch", "--out", str(out)])
    assert done.exit_code == 0, done.output
    suite = mkl.load_suite(out, device="cpu")
    assert list(suite.tasks) == list(suite.experts) == ["mnist"]
    assert suite.recipe.steps == 2
    monkeypatch.setattr(build, "finetune", None)  # nothing is trained twice
    again = build.build_variant("pocket8-scratch", 0, out)
    assert torch.equal(again.experts["mnist"]["conv_stem.weight"], suite.experts["mnist"]["conv_stem.weight"])


def test_a_linearised_expert_is_trained_in_the_tangent_space(suite):
    tangent = mkl.load_suite("pocket8-tangent", device="cpu")
    from mergekit_lite.suites.finetune import finetune

    tangent.recipe = tangent.recipe.but(steps=3, batch_size=8)
    expert = finetune(tangent, "mnist", progress=False)
    assert expert.keys() == suite.base.keys()
    curved = tangent.recipe.but(tangent=False)
    tangent.recipe = curved
    other = finetune(tangent, "mnist", progress=False)
    name = "conv_stem.weight"
    assert not torch.equal(expert[name], suite.base[name])
    assert not torch.equal(expert[name], other[name])


def test_an_unknown_variant_is_said():
    done = CliRunner().invoke(build.app, ["variant", "pocket8-near"])
    assert done.exit_code == 2
    assert "there is no variant 'pocket8-near'" in done.output
