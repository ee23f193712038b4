"""Looking into mixtures, and sending images to whole experts."""

import pytest
import torch
from torch import nn

import mergekit_lite as mkl
from mergekit_lite.adaptive.wemoe import Mixture
from mergekit_lite.lab import mixtures
from mergekit_lite.lab.adaptation import blocks
from mergekit_lite.lab.plots_adaptation import plot_routes, plot_routing
from mergekit_lite.lab.widgets import explore_routing, routing_at


@pytest.fixture(scope="module")
def few(suite):
    return suite.cut(3)


@pytest.fixture(scope="module")
def network(few):
    """A mixture whose routers answer differently to different images, without having been trained."""
    images, _ = mixtures.images_of(few)
    started = mkl.WEMoE.start(few.task_vectors, few.model, images[:1], blocks(few.model), 0.2, 0.2)
    generator = torch.Generator().manual_seed(1)
    for router in started.routers.values():
        for linear in (router[0], router[2]):
            nn.init.normal_(linear.weight, std=0.03, generator=generator)
    return started.requires_grad_(False)


def test_features_of_all_images_are_scored_as_the_suite_does(few):
    images, tasks = mixtures.images_of(few)
    assert tasks.tolist() == [k for k in range(8) for _ in range(3)]
    features = mixtures.features_of(few.build(), images)
    assert dict(mixtures.score(few, features)) == pytest.approx(dict(few.evaluate()))
    right = mixtures.hits(few, features)
    assert right.any()
    assert torch.equal(mixtures.hits(few, features, tasks), right)
    assert not mixtures.hits(few, features, (tasks + 1) % 8).any()


def test_a_look_sees_features_and_answers(few, network):
    images, _ = mixtures.images_of(few)
    features, answers = mixtures.look(network, images)
    with torch.no_grad():
        assert torch.allclose(features, network(images), atol=1e-4)
    assert torch.equal(answers["blocks.4.2"], network.routing(images)["blocks.4.2"])
    assert answers["blocks.4.2"].std(0).min() > 1e-3


def test_images_in_batches_share_a_merge(few, network):
    images, _ = mixtures.images_of(few)
    images = images[::4]
    alone, _ = mixtures.look(network, images)
    assert torch.allclose(mixtures.in_batches(network, images, 1), alone, atol=1e-4)
    pairs = mixtures.in_batches(network, images, 2)
    assert (pairs - alone).norm() > 0.01 * alone.norm()
    order = torch.tensor([4, 5, 0, 1, 3, 2])  # the same company in another order
    assert torch.allclose(mixtures.in_batches(network, images, 2, order), pairs, atol=1e-4)
    assert network.route == "image"


def test_the_nearest_mean_is_that_of_the_seen_points():
    seen = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 1.0]])
    points = torch.tensor([[1.9, 1.0], [2.1, 1.0]])
    assert mixtures.recovered(seen, torch.tensor([0, 0, 1]), points).tolist() == [0, 1]


def test_mixing_outputs_is_mixing_weights_for_one_linear_layer_only():
    generator = torch.Generator().manual_seed(0)

    def mixture(module):
        taus = {n: torch.randn(3, *p.shape, generator=generator) for n, p in module.named_parameters()}
        return Mixture(module.requires_grad_(False), taus, nn.Sequential(nn.Linear(4, 3))).requires_grad_(False)

    h = torch.randn(5, 4, generator=generator)
    one = mixture(nn.Linear(4, 6))
    base, mixed = mixtures.outputs_mixed(one, h)
    assert torch.allclose(base, one.module(h))
    assert torch.allclose(mixed, one(h), atol=1e-5)
    assert torch.allclose(mixtures.OutputMixture(one)(h), mixed)
    two = mixture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    assert not torch.allclose(mixtures.outputs_mixed(two, h)[1], two(h), atol=0.1)


def test_inputs_are_those_of_each_mixture(few, network):
    images, _ = mixtures.images_of(few)
    inputs = mixtures.inputs_at(network, images[:2])
    assert list(inputs) == blocks(few.model)
    mixture = network.mixtures["blocks.3.1"]
    expected = network.routing(images[:2])["blocks.3.1"]
    assert torch.allclose(mixture.coefficients(inputs["blocks.3.1"]), expected, atol=1e-6)


def test_multiply_adds_are_counted():
    model = nn.Sequential()
    model.add_module("conv", nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()))
    model.add_module("flat", nn.Flatten())
    model.add_module("last", nn.Linear(4 * 5 * 5, 2))
    counts, tokens = mixtures.multiply_adds(model, torch.zeros(1, 3, 5, 5), ["conv"])
    assert counts == {"": 200, "conv": 25 * 4 * 27}
    assert tokens == {"conv": 25}


def test_a_mixture_has_weights_for_what_experts_changed(few, network):
    parameters = {
        block: sum(p.numel() for p in few.model.get_submodule(block).parameters()) for block in blocks(few.model)
    }
    assert mixtures.weights_of(network) == parameters


def test_tasks_are_classified_whatever_the_scale_of_the_features():
    generator = torch.Generator().manual_seed(0)
    tasks = torch.arange(3).repeat_interleave(20)
    features = torch.eye(3)[tasks] * 4 + torch.randn(60, 3, generator=generator)
    logits = mixtures.task_classifier(features, tasks)(features)
    assert (logits.argmax(1) == tasks).float().mean() > 0.9
    stretched = features * torch.tensor([100.0, 1.0, 0.01]) + 7
    assert torch.allclose(mixtures.task_classifier(stretched, tasks)(stretched), logits, atol=0.02)


def test_an_image_is_answered_by_its_expert(few):
    images, tasks = mixtures.images_of(few)
    whole = mixtures.by_experts(few, tasks, images)
    assert dict(mixtures.score(few, whole)) == pytest.approx(dict(few.evaluate(few.experts)))
    chosen = torch.eye(8)[tasks]
    assert torch.allclose(mixtures.by_mixed_experts(few, chosen, images, chunk=7), whole, atol=1e-3)
    same = mixtures.by_mixed_experts(few, torch.full((3, 8), 0.2), images[:3])
    merged = few.build(mkl.task_arithmetic(few.task_vectors, scale=0.2))
    assert torch.allclose(same, mixtures.features_of(merged, images[:3]), atol=1e-3)


# ---------------------------------------------------------------- pictures


def test_routing_is_drawn_with_a_frame_around_the_own_expert():
    w = torch.tensor([[1.0, 0.0], [0.5, -2.0], [0.0, 1.0]])
    figure = plot_routing({"first": w, "last": w}, torch.tensor([0, 0, 1]), ["a", "b"])
    axis = figure.axes[0]
    assert axis.images[0].get_clim() == (-2, 2)
    frames = [(f.get_xy(), f.get_width(), f.get_height()) for f in axis.patches]
    assert frames == [((-0.5, -0.5), 1, 2), ((0.5, 1.5), 1, 1)]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["images of a", "images of b"]


def test_images_stand_above_their_routes():
    rows = {f"image {i}": (torch.zeros(1, 4, 4, dtype=torch.uint8), torch.full((3, 2), float(i))) for i in (1, 3)}
    figure = plot_routes(rows, ["x", "y", "z"], ["a", "b"])
    maps = [axis.images[0] for axis in figure.axes[2:4]]
    assert [m.get_clim() for m in maps] == [(-3, 3), (-3, 3)]
    assert [axis.get_title() for axis in figure.axes[:2]] == ["image 1", "image 3"]


def test_the_explorer_tells_what_is_predicted(few, network):
    figure = routing_at(few, network, [("mnist", 0), ("kana", 1)])
    first, second = figure.get_label().split("\n")
    images, _ = mixtures.images_of(few)
    guess = int(few.heads["mnist"](network(images[:1])).argmax())
    right = guess == int(few.tasks["mnist"].test.labels[0])
    assert first.startswith(f"mnist 0: {few.tasks['mnist'].classes[guess]}, {'right' if right else 'but it is '}")
    assert second.startswith("kana 1: ")
    shown = figure.axes[2].images[0].get_array().data
    assert torch.allclose(torch.as_tensor(shown)[10], network.routing(images[:1])["blocks.4.2"][0], atol=1e-5)
    task, image = explore_routing(few, network).children[:2]
    assert list(task.options) == [*few.tasks, "kana", "optdigits8"]
    assert image.max == 2
