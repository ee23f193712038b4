"""Bowls around experts, measured surfaces, and the pictures and the explorer of chapter 3.1."""

import pytest
import torch
import torch.nn.functional as F

import mergekit_lite as mkl
from mergekit_lite.calibrated import Curvature, Diagonal, Kronecker, diagonal_fisher
from mergekit_lite.lab.landscape import (
    away_from,
    between,
    bowl_around,
    changes_at,
    ellipse,
    heights_at,
    merged_points,
    one_weight,
    with_random_signs,
)
from mergekit_lite.lab.plots import plot_ellipses, plot_surfaces
from mergekit_lite.lab.widgets import bowls_at, explore_bowls
from tests.lab.test_lab import extremes

LAYER = "blocks.1.0.conv_pwl.weight"


@pytest.fixture(scope="module")
def few(suite):
    return suite.cut(6, tasks=["scripts", "mnist"])


@pytest.fixture(scope="module")
def two_weights(few):
    return [one_weight(few, LAYER, place) for place in ((1, 93, 0, 0), (1, 80, 0, 0))]


# ---------------------------------------------------------------- bowls around an expert


def test_a_bowl_is_made_of_slope_and_fisher_of_every_image_and_class(few, two_weights):
    """By another route: the gradient of each class's log-probability, image by image."""
    model, head = few.build(few.experts["scripts"]).eval(), few.heads["scripts"]
    weight = model.get_parameter(LAYER)
    matrix, slope = torch.zeros(2, 2).double(), torch.zeros(2).double()
    ((images, labels),) = few.calibration("scripts", 5)
    for image, label in zip(images, labels.tolist(), strict=True):
        log_p = head(model(image[None])).log_softmax(1)[0]
        for c, one in enumerate(log_p):
            (gradient,) = torch.autograd.grad(one, [weight], retain_graph=True)
            along = torch.stack([(gradient * u[LAYER]).sum().double() for u in two_weights])
            matrix += one.exp().item() * torch.outer(along, along) / 5
            slope -= along / 5 if c == label else 0
    bowl = bowl_around(few, "scripts", two_weights, images=5)
    torch.testing.assert_close(bowl.matrix, matrix, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(bowl.slope, slope, rtol=1e-3, atol=1e-6)
    steps = torch.tensor([[0.5, -1.0], [0.0, 2.0]]).double()
    expected = [float(s @ slope + 0.5 * s @ matrix @ s) for s in steps]
    assert bowl(steps).tolist() == pytest.approx(expected, rel=1e-3)


def test_the_diagonal_between_single_weights_is_the_diagonal_fisher(few, two_weights):
    model = few.build(few.experts["scripts"])
    fisher = diagonal_fisher(
        model, few.calibration("scripts", 5), head=few.heads["scripts"], labels="expected", names=[LAYER]
    )
    bowl = bowl_around(few, "scripts", two_weights, images=5)
    matrix = between(fisher, two_weights)
    assert matrix.diagonal().tolist() == pytest.approx(bowl.matrix.diagonal().tolist(), rel=1e-3)
    assert matrix[0, 1] == matrix[1, 0] == 0 < bowl.matrix[0, 1]


def test_between_works_with_any_block():
    a = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]])
    u, v = {"w": torch.tensor([[1.0, 0.0]]), "b": torch.ones(1)}, {"w": torch.tensor([[0.0, 2.0]])}
    curvature = Curvature({"w": Kronecker(inputs=a), "b": Diagonal(torch.tensor([5.0]))})
    assert between(curvature, [u, v]).tolist() == [[7, 2], [2, 12]]


def test_near_the_expert_bowls_and_measurements_agree(few, two_weights):
    steps = 0.02 * torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    bowl = bowl_around(few, "scripts", two_weights, images=6)
    seen = changes_at(few, "scripts", two_weights, steps, images=6)
    assert seen["given labels"].tolist() == pytest.approx(bowl(steps).tolist(), rel=0.2, abs=1e-5)
    own = bowl(steps) - steps.double() @ bowl.slope  # from the expert's own predictions there is no way down
    assert seen["own predictions"].tolist() == pytest.approx(own.tolist(), rel=0.4, abs=1e-5)


def test_changes_are_those_of_the_whole_step(few):
    merged = mkl.average(few.task_vectors)
    step = away_from(few, "scripts", merged)
    seen = changes_at(few, "scripts", [step], torch.tensor([[1.0], [0.0]]), images=6)["given labels"]
    few_images, expert = few.calibration("scripts", 6), few.experts["scripts"]

    def loss(state):
        model = few.build(state).eval()
        return sum(
            F.cross_entropy(few.heads["scripts"](model(x)), y, reduction="sum").item() / 6 for x, y in few_images
        )

    assert seen.tolist() == pytest.approx([loss(merged) - loss(expert), 0.0], abs=1e-5)


def test_random_signs_keep_every_magnitude(few):
    step = away_from(few, "mnist", mkl.average(few.task_vectors))
    other = with_random_signs(step)
    flipped = torch.cat([(other[n] != step[n]).flatten()[step[n].flatten() != 0] for n in step])
    assert all(torch.equal(other[n].abs(), step[n].abs()) for n in step)
    assert 0.45 < flipped.double().mean() < 0.55
    assert all(torch.equal(a, b) for a, b in zip(other.values(), with_random_signs(step).values(), strict=True))
    assert not torch.equal(other[LAYER], with_random_signs(step, seed=1)[LAYER])


# ---------------------------------------------------------------- bowls over two weights


def test_an_ellipse_has_its_angle_its_elongation_and_its_size():
    matrix = ellipse(30, 4, size=2.0)
    values, vectors = torch.linalg.eigh(matrix)
    assert float(values[1] / values[0]) == pytest.approx(16)  # the axes are as 1 to the root of that
    assert float(matrix.trace()) == pytest.approx(4)
    long = vectors[:, 0] * vectors[0, 0].sign()
    assert long.tolist() == pytest.approx([3**0.5 / 2, 0.5])
    torch.testing.assert_close(ellipse(77, 1), torch.eye(2).double())


def test_methods_meet_where_the_matrices_say():
    bowls = {
        "one": (torch.zeros(2).double(), torch.tensor([[8.0, -4.0], [-4.0, 4.0]]).double()),
        "two": (torch.tensor([4.0, 2.0]).double(), torch.tensor([[2.0, 2.0], [2.0, 6.0]]).double()),
    }
    points = merged_points(bowls)
    assert points["average"].tolist() == [2, 1]
    assert points["diagonal"].tolist() == pytest.approx([0.8, 1.2])
    assert points["whole matrix"].tolist() == pytest.approx([5 / 3, 7 / 3])
    assert heights_at(bowls, points["average"]) == {"one": pytest.approx(10), "two": pytest.approx(11)}


# ---------------------------------------------------------------- pictures


def test_panels_of_bowls_show_points_crosses_and_heights():
    bowls = {"one": (torch.zeros(2), torch.eye(2)), "two": (torch.tensor([2.0, 1.0]), torch.eye(2))}
    panels = {"left": (bowls, {"here": torch.tensor([1.0, 0.5])}), "right": (bowls, {})}
    heights = {"here": {"one": 1.0, "two": 2.5}, "there": {"one": 0.5, "two": 0.25}}
    left, right, bars = plot_ellipses(panels, levels=[1], limits=(-2, 4, -2, 3), heights=heights).axes
    assert [line.get_xydata().tolist() for line in left.lines] == [[[1, 0.5]], [[0, 0]], [[2, 1]]]
    assert [text.get_text() for text in left.texts] == ["here"]
    assert len(right.lines) == 2
    assert [bar.get_height() for bar in bars.patches] == [1.0, 0.5, 2.5, 0.25]
    assert [bar.get_y() for bar in bars.patches] == [0, 0, 1.0, 0.5]
    assert [text.get_text() for text in bars.texts] == ["3.50", "0.75"]
    assert len(plot_ellipses({"left": panels["left"]}, levels=[1], limits=(-2, 4, -2, 3)).axes) == 1


def test_ellipses_are_drawn_over_the_measured_surface():
    grid = torch.linspace(-1, 1, 5)
    heights = grid[:, None].square() + 0 * grid  # rises along the first direction, to the right
    figure = plot_surfaces(
        {"both": (heights, {"round": torch.eye(2)})},
        grid,
        levels=[0, 0.125, 0.5],
        labels={"both": ("x", "y")},
        unit="nats",
    )
    filled, lines = figure.axes[0].collections[:2]
    radius = torch.tensor(lines.get_paths()[0].vertices).norm(dim=1)
    assert radius.tolist() == pytest.approx([0.5] * len(radius), rel=1e-2)
    lowest = torch.tensor(filled.get_paths()[0].vertices)
    assert lowest[:, 0].abs().max() < 0.6
    assert lowest[:, 1].abs().max() == 1


def test_the_explorers_figure_says_what_each_method_costs():
    figure = bowls_at([((90, 0), (3, 3)), ((-63, 27), (6, 6))], distance=8, size=10)
    (axes, sums), (crossed, other) = (line.split(": sum of the losses ") for line in figure.get_label().splitlines())
    cost, worse = (
        {part.rpartition(" ")[0]: float(part.rpartition(" ")[2]) for part in text.split(", ")} for text in (sums, other)
    )
    assert (axes, crossed) == ("angles 90° and 0°, elongations 3 and 3", "angles -63° and 27°, elongations 6 and 6")
    assert cost["diagonal"] == cost["whole matrix"] < cost["average"]
    assert worse["whole matrix"] < worse["average"] < 0.5 * worse["diagonal"]
    assert len(figure.axes) == 2
    assert len(bowls_at([((90, 0), (3, 3))]).axes) == 2, "one panel and the bars"


def test_the_explorer_of_bowls_at_its_extremes():
    seen = list(extremes(explore_bowls()))
    assert len(seen) == 12
    assert seen[-1] == {
        "angle 1": 90.0,
        "angle 2": 90.0,
        "elongation 1": 8.0,
        "elongation 2": 8.0,
        "distance": 8.0,
        "size of 2": 10.0,
    }
