"""The pictures and the explorer of chapter 2.6."""

import pandas as pd
import pytest

import mergekit_lite as mkl
from mergekit_lite.lab.plots import plot_named_points, plot_ranking, plot_table
from mergekit_lite.lab.widgets import explore_mixing, mixed_at
from tests.lab.test_lab import extremes


@pytest.fixture(scope="module")
def merges(suite):
    tv = suite.task_vectors
    return {"average": mkl.average(tv), "sum": mkl.task_arithmetic(tv, scale=0.25)}


def test_a_ranking_has_two_dots_per_method_and_leaves_out_what_has_no_group():
    table = pd.DataFrame(
        {"default": [0.4, 0.5, 0.6], "default spread": 0.01, "tuned": [0.45, 0.5, 0.7], "tuned spread": 0.02},
        index=["a", "b", "c"],
    )
    axis = plot_ranking(table, {"one": ["c", "a"]}).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "c"]
    default, tuned = (line.get_xdata().tolist() for line in axis.lines[:2])
    assert (default, tuned) == ([0.4, 0.6], [0.45, 0.7])
    spread = axis.collections[2].get_segments()[1][:, 0]  # after the lines and the first error bars
    assert spread.tolist() == pytest.approx([0.68, 0.72])


def test_names_stand_beside_their_points_and_cover_each_other_nowhere():
    crowd = {f"method {i}": (0.01 * i, 0.02 * (i % 2)) for i in range(6)}
    figure = plot_named_points({"crowd": crowd, "far": {"alone": (5.0, 1.0)}}, xlabel="x", ylabel="y")
    axis = figure.axes[0]
    boxes = [text.get_window_extent() for text in axis.texts]
    assert {text.get_text(): text.xy for text in axis.texts} == crowd | {"alone": (5.0, 1.0)}
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    with_curve = plot_named_points({"one": crowd}, xlabel="x", ylabel="y", curve=("line", [0, 1], [2, 3])).axes[0]
    assert with_curve.lines[0].get_xydata().tolist() == [[0, 2], [1, 3]]
    logarithmic = plot_named_points({"one": {"a": (1.0, 0.0), "b": (100.0, 1.0)}}, xlabel="x", ylabel="y", log=True)
    assert logarithmic.axes[0].get_xscale() == "log"


def test_a_table_shows_every_number_in_its_field():
    table = pd.DataFrame({"x": [0.25, -0.5], "y": [0.0, 1.0]}, index=["a", "b"])
    axis = plot_table(table, label="", around_zero=True).axes[0]
    assert {text.get_position(): text.get_text() for text in axis.texts} == {
        (0, 0): ".25",
        (1, 0): ".00",
        (0, 1): "-.50",
        (1, 1): "1.00",
    }
    assert axis.images[0].get_clim() == (-1, 1)
    assert plot_table(table, label="", limits=(0, 2)).axes[0].images[0].get_clim() == (0, 2)
    assert plot_table(table, label="").axes[0].images[0].get_clim() == (-0.5, 1)


def test_the_ends_of_a_mixture_are_the_merges_themselves(suite, merges):
    few = suite.cut(15, tasks=["mnist", "letters"])
    figure = mixed_at(few, merges, "average", "sum", [0.0, 0.5, 1.0])
    middle = mkl.task_arithmetic(suite.task_vectors, scale=(0.25 + 1 / 8) / 2)
    expected = [few.evaluate(state, split="validation").average for state in (merges["average"], middle, merges["sum"])]
    found = [float(line.split("accuracy ")[1][:5]) for line in figure.get_label().splitlines()]
    assert found == pytest.approx(expected, abs=6e-4)


def test_the_explorer_at_its_extremes(suite, merges):
    few = suite.cut(5, tasks=["mnist"])
    explorer = explore_mixing(few, merges)
    assert [menu.value for menu in explorer.children[:2]] == ["average", "sum"]
    assert list(extremes(explorer))
