"""Recipes, and images prepared as each backbone wants them."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from mergekit_lite.suites import Recipe, Suite
from mergekit_lite.suites.pocket import read_recipe
from mergekit_lite.suites.preparation import as_inputs, recipe_for
from mergekit_lite.suites.vision import import_timm
from tests.suites.test_suite import OPTIONS, Tiny, write_images

WHITE = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / "two" / split, ["red", "blue"], 4, 0)
    return tmp_path / "two"


def noise(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")])
def test_pocket8_sees_images_as_it_always_did(channels, recipe):
    images = noise(5, channels, 28, 28)
    expected = F.interpolate(images.float() / 127.5 - 1, (56, 56), mode="bilinear", align_corners=False)
    inputs = as_inputs(images, recipe)
    assert torch.equal(inputs, expected.expand(-1, 3, -1, -1))
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(as_inputs(noise(2, 3, 56, 56), recipe), noise(2, 3, 56, 56).float() / 127.5 - 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_each_channel_has_its_own_mean_and_deviation(channels, mode):
    recipe = Recipe(resolution=9, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0), interpolation=mode)
    flat = torch.full((2, channels, 5, 7), 204, dtype=torch.uint8)
    inputs = as_inputs(flat, recipe)
    assert inputs.shape == (2, 3, 9, 9)
    for channel, value in enumerate([(0.8 - 0.1) / 0.5, (0.8 - 0.2) / 0.25, 0.8 - 0.3]):
        torch.testing.assert_close(inputs[:, channel], torch.full((2, 9, 9), value))


def test_no_interpolation_leaves_black_and_white():
    recipe = Recipe(resolution=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0), interpolation="bicubic")
    edges = (torch.arange(8) // 2 % 2 * 255).byte().expand(1, 3, 8, 8)
    inputs, black, white = (as_inputs(x, recipe) for x in (edges, torch.zeros_like(WHITE), WHITE))
    for channel in range(3):
        assert inputs[0, channel].min() == black[0, channel].min()
        assert inputs[0, channel].max() == white[0, channel].max()


def test_images_that_shrink_are_averaged():
    board = (torch.arange(60)[:, None] + torch.arange(60)).remainder(2).mul(255).byte().expand(1, 3, 60, 60)
    for mode in ("bilinear", "bicubic"):
        inner = as_inputs(board, Recipe(resolution=20, interpolation=mode))[..., 2:-2, 2:-2]
        assert inner.abs().max() < 0.2, "one pixel of three would be black or white"


# ---------------------------------------------------------------- the backbone's own


def test_a_backbone_is_shown_images_as_in_its_training(folder):
    net = import_timm().create_model("resnet10t", num_classes=0)
    stated = net.pretrained_cfg
    suite = Suite.from_folders([folder], net, device="cpu", resolution=32)
    expected = [(1 - m) / s for m, s in zip(stated["mean"], stated["std"], strict=True)]
    torch.testing.assert_close(suite.prepare(WHITE)[0, :, 0, 0], torch.tensor(expected))
    assert (suite.recipe.resolution, suite.recipe.interpolation) == (32, stated["interpolation"])
    assert recipe_for(net, None, {}).resolution == stated["input_size"][-1]
    assert json.loads(json.dumps(asdict(suite.recipe)))["mean"] == list(stated["mean"])


def test_what_the_caller_says_counts():
    net = import_timm().create_model("resnet10t", num_classes=0)
    said = recipe_for(net, Recipe(steps=9), {"mean": (0.5, 0.5, 0.5)})
    assert (said.mean, said.std, said.steps) == ((0.5, 0.5, 0.5), net.pretrained_cfg["std"], 9)
    assert said.resolution == 56, "a recipe that is given says its resolution"
    assert recipe_for(net, None, {"interpolation": "nearest"}).interpolation == "nearest"


@pytest.mark.parametrize("stated", [None, {}, {"mean": None}, {"url": "x"}])
def test_a_backbone_that_states_nothing_has_pocket8s_preparation(folder, stated):
    net = Tiny()
    if stated is not None:
        net.pretrained_cfg = stated
    suite = Suite.from_folders([folder], net, device="cpu")
    assert suite.recipe == Recipe(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    torch.testing.assert_close(suite.prepare(WHITE), torch.ones(1, 3, 56, 56))


def test_older_configurations_are_understood():
    net = Tiny()
    net.default_cfg = {"mean": (0.4,), "std": (0.3,), "input_size": (3, 64, 64), "interpolation": "lanczos"}
    recipe = recipe_for(net, None, {})
    assert (recipe.mean, recipe.std) == ((0.4,) * 3, (0.3,) * 3)
    assert (recipe.resolution, recipe.interpolation) == (64, "bicubic")


def test_a_backbone_that_is_given_is_left_alone(folder):
    net = Tiny().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    suite = Suite.from_folders([folder], net, device="cpu", **OPTIONS)
    suite.finetune(progress=False)
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    with torch.no_grad():
        net.conv.weight.zero_()  # its owner trains it on
    assert suite.base["conv.weight"].any()


# ---------------------------------------------------------------- recipes


def test_recipes_of_old_files_are_pocket8s():
    old = {k: v for k, v in asdict(Recipe()).items() if k not in ("mean", "std", "interpolation")} | {"frozen": ["a"]}
    assert read_recipe(old) == Recipe(frozen=("a",))
    new = Recipe(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), interpolation="bicubic", frozen=("a", "b"))
    assert read_recipe(json.loads(json.dumps(asdict(new)))) == new


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": "many"}, TypeError, "a recipe's steps is like 400; got 'many'"),
        ({"steps": True}, TypeError, "steps"),
        ({"steps": 1.5}, TypeError, "steps"),
        ({"tangent": 1}, TypeError, "tangent"),
        ({"learning_rate": float("nan")}, TypeError, "learning_rate"),
        ({"frozen": "conv"}, TypeError, "frozen"),
        ({"resolution": 0}, ValueError, "a recipe's resolution is at least 1; got 0"),
        ({"mean": (0.5,)}, ValueError, "three numbers"),
        ({"mean": 0.5}, ValueError, "three numbers"),
        ({"std": (1.0, 1.0, 0.0)}, ValueError, "std is greater than 0"),
        ({"interpolation": "lanczos"}, ValueError, "nearest, bilinear, bicubic; got 'lanczos'"),
    ],
)
def test_what_a_recipe_cannot_be_is_said(changes, error, message):
    with pytest.raises(error, match=message):
        Recipe().but(**changes)


def test_lists_become_tuples():
    assert Recipe(mean=[0.1, 0.2, 0.3], frozen=["a"]) == Recipe(mean=(0.1, 0.2, 0.3), frozen=("a",))
