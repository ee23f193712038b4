"""Suites made from folders of images, and the parts suites are made of."""

import platform
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mergekit_lite as mkl
from mergekit_lite.suites import Evaluation, Recipe, Suite
from mergekit_lite.suites.finetune import augment, draw, finetune
from mergekit_lite.suites.heads import CosineHead, class_directions, few_per_class
from mergekit_lite.suites.speed import keep_freed_memory, one_thread
from mergekit_lite.suites.tasks import Split, load_folder, stratified

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def write_images(folder, classes, count, seed):
    """Noisy images of one colour per class, of different sizes."""
    noise = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.array(COLOURS[name]) + noise.integers(-30, 30, (10 + i, 12, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture
def folders(tmp_path):
    """Two tasks: three colours, and two of them."""
    for task, classes in {"three": ["red", "green", "blue"], "two": ["red", "blue"]}.items():
        write_images(tmp_path / task / "train", classes, 10, 0)
        write_images(tmp_path / task / "test", classes, 4, 1)
    return [tmp_path / "three", tmp_path / "two"]


class Tiny(nn.Module):
    """A backbone of one convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, images):
        return self.conv(images).relu().mean((2, 3))


OPTIONS = {"resolution": 12, "shots": 3, "steps": 5, "batch_size": 4}


# ---------------------------------------------------------------- suites from folders


def test_from_folders_to_a_merge(folders):
    suite = Suite.from_folders(folders, Tiny(), device="cpu", **OPTIONS)
    assert list(suite.tasks) == ["three", "two"]
    assert suite.task("three").classes == ["blue", "green", "red"]
    assert len(suite.task("three").train) == 24
    assert len(suite.task("three").validation) == 6
    with pytest.raises(ValueError, match="no experts yet"):
        _ = suite.task_vectors
    suite.finetune(progress=False)
    evaluation = suite.evaluate(mkl.average(suite.task_vectors))
    assert set(evaluation) == {"three", "two"}
    assert evaluation.average > 0.7  # colours are easy: even one convolution sees them
    assert 0 < evaluation.normalised < 2
    assert suite.recorded["test"]["experts"] == dict(suite.evaluate_experts())


def test_any_timm_model_will_do(folders):
    suite = Suite.from_folders(folders, "resnet10t", pretrained=False, device="cpu", **(OPTIONS | {"resolution": 32}))
    assert 0 <= suite.evaluate(split="validation").average <= 1
    assert suite.features(suite.model, suite.task("two").test).shape == (8, 512)


def test_a_validation_folder_is_used(folders):
    write_images(folders[1] / "validation", ["red", "blue"], 2, 2)
    task = load_folder(folders[1], 12)
    assert (len(task.train), len(task.validation), len(task.test)) == (20, 4, 8)


def test_folders_that_do_not_fit_say_why(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="'train' is missing"):
        Suite.from_folders([tmp_path / "nowhere"], Tiny())
    with pytest.raises(ValueError, match="no folders given"):
        Suite.from_folders([], Tiny())
    with pytest.raises(ValueError, match="same name"):
        Suite.from_folders([folders[0], folders[0]], Tiny(), **OPTIONS)
    (folders[0] / "test" / "purple").mkdir()
    with pytest.raises(ValueError, match="class 'purple'"):
        Suite.from_folders(folders, Tiny(), **OPTIONS)
    (folders[1] / "test" / "red" / "0.png").unlink()
    for image in (folders[1] / "test" / "red").iterdir():
        image.unlink()
    with pytest.raises(FileNotFoundError, match="no images in"):
        Suite.from_folders(folders[1:], Tiny(), **OPTIONS)


def test_a_recipe_knows_its_numbers():
    assert Recipe().but(steps=7).steps == 7
    with pytest.raises(TypeError, match="no 'stepps'; it has resolution"):
        Recipe().but(stepps=7)


# ---------------------------------------------------------------- fine-tuning


@pytest.fixture
def small(folders):
    return Suite.from_folders(folders, Tiny(), device="cpu", **OPTIONS)


def test_finetuning_is_reproducible_and_leaves_the_base_alone(small):
    before = {n: t.clone() for n, t in small.base.items()}
    a, b, c = (finetune(small, "two", seed=seed, progress=False) for seed in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)
    assert any(not torch.equal(a[n], before[n]) for n in a)
    assert all(torch.equal(small.base[n], before[n]) for n in before)


def test_frozen_parameters_do_not_move(small):
    small.recipe = small.recipe.but(frozen=("conv.bias",))
    expert = finetune(small, "two", progress=False)
    assert torch.equal(expert["conv.bias"], small.base["conv.bias"])
    assert not torch.equal(expert["conv.weight"], small.base["conv.weight"])


def test_divergence_is_said(small):
    small.heads["two"].directions.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="training 'two' diverged"):
        finetune(small, "two", progress=False)


def test_batches_are_drawn_without_repeats():
    split = Split(torch.arange(10).view(10, 1, 1, 1), torch.arange(10))
    generator = torch.Generator().manual_seed(0)
    assert len(draw(split, 10, generator).labels.unique()) == 10
    assert len(draw(split, 25, generator)) == 25


def test_augmentation_moves_images_a_little():
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert augment(pixels, 0.0, torch.Generator()) is pixels
    moved = augment(pixels, 1.0, torch.Generator().manual_seed(1))
    assert moved.shape == pixels.shape
    assert 0.02 < (moved - pixels).abs().mean() < 0.4
    flat = torch.full((2, 3, 16, 16), 0.5)
    torch.testing.assert_close(augment(flat, 1.0, torch.Generator().manual_seed(1)), flat)


# ---------------------------------------------------------------- heads and splits


def test_a_head_finds_the_class_whose_examples_look_alike():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    head = CosineHead(features.mean(0), class_directions(features, torch.tensor([0, 0, 1, 1])), temperature=10.0)
    assert head(features).argmax(1).tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(head.directions.norm(dim=1), torch.ones(2))
    assert head(features).abs().max() <= 10.0
    with pytest.raises(ValueError, match="class 1 has no example"):
        class_directions(features, torch.tensor([0, 0, 2, 2]))


def test_a_few_of_each_class():
    labels = torch.tensor([0, 1, 1, 1, 2, 2])
    chosen = few_per_class(labels, 2, torch.Generator().manual_seed(0))
    assert labels[chosen].tolist() == [0, 1, 1, 2, 2]


def test_stratified_draws_from_every_class():
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 2)
    mask = stratified(labels, 0.2, torch.Generator().manual_seed(0))
    assert labels[mask].bincount().tolist() == [2, 4, 1]
    with pytest.raises(ValueError, match="class 1 has 1 image"):
        stratified(torch.tensor([0, 0, 1]), 0.2, torch.Generator())


# ---------------------------------------------------------------- evaluations


def test_an_evaluation_is_a_mapping_and_a_table():
    evaluation = Evaluation({"a": 0.5, "b": 0.25}, {"a": 1.0, "b": 0.5}, "validation")
    assert dict(evaluation) == {"a": 0.5, "b": 0.25}
    assert (evaluation.average, evaluation.normalised) == (0.375, 0.5)
    assert repr(evaluation) == "validation: average 0.375 (a 0.500, b 0.250)"
    html = evaluation._repr_html_()
    assert "<table" in html
    assert "0.375" in html
    assert list(evaluation.to_frame().columns) == ["a", "b", "average", "normalised"]


def test_without_experts_nothing_is_normalised():
    evaluation = Evaluation({"a": 0.5})
    assert np.isnan(evaluation.normalised)
    assert list(evaluation.to_frame().columns) == ["a", "average"]


# ---------------------------------------------------------------- speed


def test_one_thread_is_for_a_while_only():
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_memory_is_kept_where_there_is_glibc():
    assert keep_freed_memory() is (sys.platform == "linux" and platform.libc_ver()[0] == "glibc")


# ---------------------------------------------------------------- looking closer


def test_predictions_losses_and_accuracies_agree(folders):
    suite = Suite.from_folders(folders, Tiny(), device="cpu", **OPTIONS)
    for task in suite.tasks:
        images = suite.tasks[task].test
        predicted = suite.predict(None, task)
        assert suite.evaluate(tasks=[task])[task] == pytest.approx((predicted == images.labels).float().mean().item())
        logits = suite.logits(suite.model, task, images)
        by_hand = -logits.log_softmax(1)[torch.arange(len(images)), images.labels].mean().item()
        assert suite.losses(split="test", tasks=[task])[task] == pytest.approx(by_hand, rel=1e-5)


def test_a_suite_cut_down_is_a_part_of_it(folders):
    suite = Suite.from_folders(folders, Tiny(), device="cpu", **OPTIONS)
    suite.finetune(progress=False)
    cut = suite.cut(3, tasks=["two"])
    assert list(cut.tasks) == list(cut.experts) == ["two"]
    assert [len(cut.tasks["two"].split(split)) for split in ("train", "validation", "test")] == [3, 3, 3]
    whole = {image.numpy().tobytes() for image in suite.tasks["two"].test.images}
    assert all(image.numpy().tobytes() in whole for image in cut.tasks["two"].test.images)
    again = suite.cut(3, tasks=["two"])
    assert torch.equal(cut.tasks["two"].train.images, again.tasks["two"].train.images)
    assert len(suite.tasks) == 2, "the suite is not changed"
    assert len(suite.cut(10**9).tasks["three"].test) == len(suite.tasks["three"].test)
    with pytest.raises(KeyError, match="no task named 'four'"):
        suite.cut(3, tasks=["four"])
    with pytest.raises(ValueError, match="at least one image"):
        suite.cut(0)


def as_bytes(image):
    return image.numpy().tobytes()


def images_of(split):
    return sorted(map(as_bytes, split.images))


def test_halves_share_everything_but_the_test_images(small):
    small.finetune(progress=False)
    small.held_out = {"again": small.tasks["two"]}
    seen, unseen = small.halves()
    for name, task in small.tasks.items():
        first, second = seen.tasks[name], unseen.tasks[name]
        assert len(first.test) == len(second.test) == len(task.test) // 2
        assert images_of(task.test) == sorted(images_of(first.test) + images_of(second.test)), "each in one of them"
        labels = dict(zip(map(as_bytes, task.test.images), task.test.labels.tolist(), strict=True))
        for half in (first, second):
            assert [labels[as_bytes(image)] for image in half.test.images] == half.test.labels.tolist()
            assert half.train is task.train
            assert half.validation is task.validation
            assert half.classes == task.classes
    for half in (seen, unseen):
        assert half.model is small.model
        assert half.heads is small.heads
        assert half.held_out is small.held_out
        assert all(half.experts[name] is expert for name, expert in small.experts.items())
        assert half.recorded == {}, "what was recorded was of all images"
    whole, parts = small.evaluate(), [half.evaluate() for half in (seen, unseen)]
    for name in whole:
        assert (parts[0][name] + parts[1][name]) / 2 == pytest.approx(whole[name])
    assert dict(seen.evaluate(split="validation")) == dict(small.evaluate(split="validation"))


def test_halves_are_those_of_the_seed(small):
    first, again, other = (small.halves(seed)[0].tasks["three"].test for seed in (4, 4, 5))
    assert torch.equal(first.images, again.images)
    assert images_of(first) != images_of(other)
    state = torch.get_rng_state()
    small.halves()
    assert torch.equal(state, torch.get_rng_state())
    odd = small.cut(5)
    assert [len(half.tasks["two"].test) for half in odd.halves()] == [3, 2]
    assert [len(half.tasks["two"].test) for half in small.cut(2).halves()] == [1, 1]
    with pytest.raises(ValueError, match=r"'three' has 1 test image\(s\), too few for two halves"):
        small.cut(1).halves()


def test_inputs_are_what_the_backbone_takes(small):
    for split in ("train", "validation", "test"):
        inputs = small.inputs(split)
        assert list(inputs) == list(small.tasks)
        for name, x in inputs.items():
            assert x.shape == (len(small.tasks[name].split(split)), 3, 12, 12)
            assert torch.equal(x, small.prepare(small.tasks[name].split(split).images))
    assert torch.equal(small.inputs()["two"], small.inputs("test")["two"])
    seen, unseen = small.halves()
    both = torch.cat([seen.inputs()["two"], unseen.inputs()["two"]]).mean((1, 2, 3)).sort().values
    torch.testing.assert_close(both, small.inputs()["two"].mean((1, 2, 3)).sort().values)
    before = small.tasks["two"].test.images.clone()
    small.inputs()["two"].zero_()
    assert torch.equal(small.tasks["two"].test.images, before)
    with pytest.raises(ValueError, match="split"):
        small.inputs("tests")


# ---------------------------------------------------------------- a model for each task


def test_each_task_is_answered_by_its_own_weights(small):
    small.finetune(progress=False)
    experts = dict(small.evaluate_experts())
    assert dict(small.evaluate(small.experts)) == experts
    assert experts == {task: small.evaluate(expert, tasks=[task])[task] for task, expert in small.experts.items()}
    assert torch.equal(small.predict(small.experts, "two"), small.predict(small.experts["two"], "two"))
    assert small.losses(small.experts)["two"] == small.losses(small.experts["two"])["two"]
    ours, alone = (small.gradient(state, "two") for state in (small.experts, small.experts["two"]))
    assert all(torch.equal(ours[name], alone[name]) for name in alone)
    swapped = {"three": small.experts["two"], "two": small.experts["three"]}
    assert small.losses(swapped) == {t: small.losses(swapped[t], tasks=[t])[t] for t in swapped}
    assert small.losses(swapped) != small.losses(small.experts)


def test_a_merge_per_task_is_evaluated_and_compared(small):
    small.finetune(progress=False)
    merged = mkl.emr(small.task_vectors)
    evaluation = small.evaluate(merged, split="validation")
    assert dict(evaluation) == {t: small.evaluate(merged[t], split="validation", tasks=[t])[t] for t in merged}
    table = small.compare({"EMR": merged, "average": mkl.average(small.task_vectors)}, split="validation")
    assert table.loc["EMR", "average"] == pytest.approx(evaluation.average)


def test_weights_for_other_tasks_are_not_enough(small):
    small.finetune(progress=False)
    with pytest.raises(KeyError, match="no weights for the task 'two'; there are some for three"):
        small.evaluate({"three": small.experts["three"]})
    assert set(small.evaluate({"three": small.experts["three"]}, tasks=["three"])) == {"three"}
    with pytest.raises(KeyError, match="no task named 'four'"):
        small.evaluate(small.experts, tasks=["four"])


# ---------------------------------------------------------------- calibration and curvature


def test_calibration_images_are_training_images_with_their_labels(small):
    (inputs, labels), *others = batches = small.calibration("three", images=10, batch=4)
    assert [len(x) for x, _ in batches] == [len(y) for _, y in batches] == [4, 4, 2]
    assert inputs.shape == (4, 3, 12, 12)
    train = small.prepare(small.task("three").train.images)
    for x, label in zip(inputs, labels, strict=True):
        (where,) = (train == x).flatten(1).all(1).nonzero()[:, 0].tolist()
        assert small.task("three").train.labels[where] == label
    assert len(torch.cat([inputs, *(x for x, _ in others)]).flatten(1).unique(dim=0)) == 10, "none comes twice"


def test_calibration_images_are_drawn_as_the_seed_says(small):
    def drawn(*args, **options):
        batches = small.calibration("three", *args, **options)
        return torch.cat([x for x, _ in batches])

    assert torch.equal(drawn(8), drawn(8, batch=3))
    assert torch.equal(drawn(8), drawn(12)[:8]), "more images are those and others"
    assert not torch.equal(drawn(8), drawn(8, seed=1))
    assert len(drawn(10**6)) == len(small.task("three").train)
    test = small.prepare(small.task("three").test.images)
    assert sorted(drawn(10**6, split="test").mean((1, 2, 3)).tolist()) == sorted(test.mean((1, 2, 3)).tolist())
    for images, batch in ((0, 25), (-1, 25), (5, 0)):
        with pytest.raises(ValueError, match="at least one image and one per batch"):
            small.calibration("three", images, batch=batch)
    with pytest.raises(KeyError, match="no task named 'four'"):
        small.calibration("four")


def test_the_curvature_of_every_expert(small):
    with pytest.raises(ValueError, match="no experts yet"):
        small.curvature("inputs", progress=False)
    small.finetune(progress=False)
    batches = {task: small.calibration(task, 6, seed=3) for task in small.tasks}
    models = {task: small.build(small.experts[task]).eval() for task in small.tasks}
    by_hand = {
        "inputs": {t: mkl.input_grams(models[t], batches[t]) for t in models},
        "fisher": {t: mkl.diagonal_fisher(models[t], batches[t], head=small.heads[t]) for t in models},
        "kfac": {t: mkl.kfac(models[t], batches[t], head=small.heads[t], labels="expected") for t in models},
    }
    for kind, expected in by_hand.items():
        options = {"labels": "expected"} if kind == "kfac" else {}
        gathered = small.curvature(kind, images=6, seed=3, progress=False, **options)
        assert list(gathered) == list(small.tasks)
        for task, curvature in gathered.items():
            assert {"conv.weight"} <= set(curvature) == set(expected[task])
            for name, block in curvature.items():
                for part, factor in block.factors().items():
                    torch.testing.assert_close(factor, expected[task][name].factors()[part])
    assert not torch.allclose(
        by_hand["inputs"]["three"]["conv.weight"].inputs, by_hand["inputs"]["two"]["conv.weight"].inputs
    )
    with pytest.raises(ValueError, match="kind must be inputs, fisher or kfac; got 'hessian'"):
        small.curvature("hessian")
    small.recipe = small.recipe.but(tangent=True)
    with pytest.raises(ValueError, match="experts of 'my suite' are linearised networks"):
        small.curvature("inputs", images=6)
    small.recipe = small.recipe.but(tangent=False)
    with pytest.raises(ValueError, match="at least one image"):
        small.curvature("inputs", images=0, progress=False)


def test_a_suites_curvature_is_what_the_methods_take(small):
    small.finetune(progress=False)
    tv = small.task_vectors
    merges = [
        mkl.regmean(tv, small.curvature("inputs", images=8, progress=False)),
        mkl.fisher(tv, small.curvature("fisher", images=8, progress=False)),
        mkl.mats(tv, small.curvature("kfac", images=8, progress=False), preconditioner="kronecker"),
        mkl.regmean_plus_plus(
            tv, small.model, {t: small.calibration(t, 8) for t in small.tasks}, depth=["conv.weight", "conv.bias"]
        ),
    ]
    before = small.evaluate(split="validation")
    for merged in merges:
        assert small.evaluate(merged, split="validation").average > 0.6
    assert dict(small.evaluate(split="validation")) == dict(before)
    assert not any(
        module._forward_hooks for module in (*small.model.modules(), *(m for c in small._copies for m in c.modules()))
    )
