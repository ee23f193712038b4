"""The pictures and the explorers of part 3."""

import pytest
import torch

from mergekit_lite.lab.plots import (
    plot_bowls,
    plot_convergence,
    plot_kernels,
    plot_kronecker,
    plot_large_matrices,
    plot_patches,
    plot_regression,
)
from mergekit_lite.lab.widgets import descents_at, explore_descents, explore_regression, regression_at
from tests.lab.test_lab import extremes

# ---------------------------------------------------------------- 3.2 RegMean


def test_a_bowl_is_drawn_around_its_lowest_point():
    bowls = {"round": (torch.tensor([1.0, 2.0]), torch.eye(2))}
    figure = plot_bowls(
        bowls, {"here": torch.tensor([0.5, 2.0])}, levels=[0.25], limits=(0, 3, 0, 3), labels=("x", "y")
    )
    axis = figure.axes[0]
    line = torch.tensor(axis.collections[0].get_paths()[0].vertices)
    assert (line - torch.tensor([1.0, 2.0])).norm(dim=1).tolist() == pytest.approx([0.5] * len(line), rel=1e-3)
    assert axis.lines[0].get_xydata().tolist() == [[0.5, 2.0]]
    assert [text.get_text() for text in axis.texts] == ["here"]


def test_patches_stand_beside_their_image_and_their_gram_matrix():
    columns = torch.randn(9, 20, generator=torch.Generator().manual_seed(0))
    figure = plot_patches(torch.rand(12, 12), columns, columns @ columns.T, corner=(2, 4), kernel=3)
    left, middle, right = figure.axes[:3]
    frame = left.patches[0]
    assert (frame.get_xy(), frame.get_width()) == ((3.5, 1.5), 3)
    assert torch.equal(torch.as_tensor(middle.images[0].get_array().data), columns)
    assert right.images[0].get_clim()[1] == pytest.approx((columns @ columns.T).abs().max().item())


def test_errors_along_directions_are_dots_with_areas():
    shares = torch.tensor([0.1, 0.9])
    dots = (shares, torch.tensor([0.2, 7.0]), torch.tensor([3.0, 1.0]))
    left, right = plot_regression({"one": shares.flip(0)}, {"merge": dots}, ["a", "b"]).axes
    assert left.lines[0].get_ydata().tolist() == pytest.approx([0.1, 0.9])
    drawn = right.collections[0]
    assert drawn.get_offsets().tolist() == [[pytest.approx(0.1), pytest.approx(0.2)], [pytest.approx(0.9), 1.0]]
    assert drawn.get_sizes().tolist() == pytest.approx([1127, 377])
    assert right.get_xlabel() == "share s: b alone at 0, a alone at 1"


LAYER = "blocks.2.1.conv_pw.weight"


def test_regmean_of_two_tasks_is_judged_on_other_images(suite):
    def ratio(**options):
        return float(regression_at(suite, LAYER, ["mnist", "textures"], **options).get_label().split()[-4])

    whole, alone, few = ratio(images=10), ratio(images=10, alpha=0.0), ratio(images=1)
    assert whole < alone < 1
    assert whole < few
    with pytest.raises(ValueError, match="expected two tasks, got 1"):
        regression_at(suite, LAYER, ["mnist"])


def test_the_explorer_of_a_layer_at_its_extremes(suite):
    explorer = explore_regression(suite.cut(2, tasks=["mnist", "textures"]), layer=LAYER)
    menus = {menu.description: menu for menu in explorer.children if hasattr(menu, "description")}
    assert menus["layer"].value == LAYER
    assert "blocks.2.1.conv_dw.weight" not in menus["layer"].options
    assert menus["two tasks"].value == "mnist, textures"
    assert list(extremes(explorer))


# ---------------------------------------------------------------- 3.3 MaTS


def test_a_kronecker_product_is_written_entry_by_entry():
    a, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([[1.0, -0.5], [-0.5, 2.0]])
    first, second, product = plot_kronecker(a, b).axes
    assert [text.get_text() for text in first.texts] == ["2", "1", "1", "3"]
    assert not second.patches
    assert torch.equal(torch.as_tensor(product.images[0].get_array().data), torch.kron(a, b))
    assert product.texts[13].get_text() == "1 · 2\n= 2"  # row 3, column 1: a's lower left, b's lower right
    assert [patch.get_xy() for patch in product.patches][2] == (-0.46, 1.54)
    assert {p.get_edgecolor() for p in product.patches} == {p.get_edgecolor() for p in first.patches}


def test_large_matrices_are_drawn_with_the_root_of_their_entries():
    axis = plot_large_matrices({"one": torch.tensor([[4.0, -9.0], [0.0, 1.0]])}).axes[0]
    assert torch.as_tensor(axis.images[0].get_array().data).tolist() == [[2, -3], [0, 1]]
    assert axis.images[0].get_clim()[1] == pytest.approx(2.1)


def test_kernels_are_scaled_to_their_largest_entry():
    kernels = torch.zeros(2, 3, 2, 2)
    kernels[0, 0, 1, 0], kernels[0, 1, 1, 0] = -4.0, 2.0
    axes = plot_kernels({"task": (kernels, [0.5, 0.25])}).axes
    pixels = torch.as_tensor(axes[0].images[0].get_array().data)
    assert pixels[1, 0].tolist() == [0.0, 0.75, 0.5]
    assert (torch.as_tensor(axes[1].images[0].get_array().data) == 0.5).all()
    assert [axis.get_title() for axis in axes] == ["0.5", "0.25"]


def test_residuals_and_distances_stand_side_by_side():
    left, right = plot_convergence({"one": ([1.0, 0.1], [2.0, 0.2, 0.02])}, bound=[3.0, 1.0]).axes
    assert left.lines[0].get_ydata().tolist() == [1.0, 0.1]
    assert [line.get_ydata().tolist() for line in right.lines] == [[2.0, 0.2, 0.02], [3.0, 1.0]]


def test_both_ways_down_are_counted():
    figure = descents_at([(10, 30, "none"), (10, 0, "jacobi")])
    tilted, straight = figure.axes
    steepest, conjugate = (line.get_label() for line in tilted.lines[:2])
    assert int(steepest.split()[-2]) > 15
    assert conjugate == "conjugate gradients: 2 steps"
    assert straight.get_legend().get_texts()[0].get_text() == "steepest descent: 1 step"
    words = figure.get_label().splitlines()
    assert words[1] == "κ = 10, 0°, Jacobi: steps: steepest descent 1, conjugate gradients 1"
    start = tilted.lines[0].get_xydata()[0]
    assert start[0] < 0 < 1 - 1e-9 < (start**2).sum() < 1 + 1e-9


def test_the_explorer_of_descents_at_its_extremes():
    assert list(extremes(explore_descents()))
