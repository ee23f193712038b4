"""Sweeps, pictures and explorers, on the shipped suite cut down to two tasks."""

import dataclasses

import matplotlib as mpl
import pandas as pd
import pytest

import mergekit_lite as mkl
from mergekit_lite.lab import best, sweep
from mergekit_lite.lab.plots import plot_cosines, plot_merges, plot_sweep, show_images, show_source
from mergekit_lite.lab.widgets import explore_scale, merges_at
from mergekit_lite.suites import compare

mpl.use("agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture(scope="module")
def two(suite):
    """The two tasks with the fewest validation images to look at."""
    names = ["photo_digits", "emoji_category"]
    return dataclasses.replace(
        suite, tasks={n: suite.tasks[n] for n in names}, experts={n: suite.experts[n] for n in names}
    )


@pytest.fixture(scope="module")
def table(two):
    return sweep(two, mkl.task_arithmetic, scale=[0.0, 0.3], progress=False)


def test_a_sweep_is_a_table_of_what_was_tried(two, table):
    assert list(table.columns) == ["scale", "photo_digits", "emoji_category", "average"]
    by_hand = two.evaluate(mkl.task_arithmetic(two.task_vectors, scale=0.3), split="validation")
    assert table.loc[1, "average"] == pytest.approx(by_hand.average)
    assert table.loc[1, "photo_digits"] == pytest.approx(by_hand["photo_digits"])
    assert table.loc[0, "average"] == pytest.approx(two.evaluate(split="validation").average)


def test_processes_give_the_same_table(two, table):
    again = sweep(two, mkl.task_arithmetic, scale=[0.0, 0.3], jobs=2, progress=False)
    pd.testing.assert_frame_equal(again, table)


def test_a_grid_is_tried_in_every_combination(two, monkeypatch):
    monkeypatch.setattr(type(two), "evaluate", lambda self, state, split: mkl.suites.Evaluation({"x": 0.5}))
    tried = sweep(two, mkl.ties, density=[0.1, 0.5], scale=[1, 2, 3], progress=False)
    assert tried[["density", "scale"]].to_numpy().tolist() == [[d, s] for d in (0.1, 0.5) for s in (1, 2, 3)]
    with pytest.raises(ValueError, match="no values to try for 'scale'"):
        sweep(two, mkl.ties, scale=[])


def test_the_best_row():
    frame = pd.DataFrame({"scale": [0.1, 0.2, 0.3], "average": [0.4, 0.6, 0.6]})
    assert best(frame, ["scale"]) == {"scale": 0.2}
    assert type(best(frame, ["scale"])["scale"]) is float


def test_merges_are_compared_in_one_table(two):
    frame = two.compare({"base": two.base, "average": mkl.average(two.task_vectors)})
    assert list(frame.index) == ["base", "average"]
    assert frame.loc["average", "normalised"] == pytest.approx(two.evaluate(mkl.average(two.task_vectors)).normalised)
    assert compare({"a": two.evaluate()}).loc["a", "average"] == frame.loc["base", "average"]


# ---------------------------------------------------------------- pictures show the numbers


def test_bars_are_as_high_as_the_accuracies(two):
    evaluations = {"base": two.evaluate(), "average": two.evaluate(mkl.average(two.task_vectors))}
    axis = plot_merges(evaluations).axes[0]
    heights = [bar.get_height() for bars in axis.containers for bar in bars]
    expected = [v for e in evaluations.values() for v in [*e.values(), e.average]]
    assert heights == pytest.approx(expected)


def test_lines_go_through_the_sweep(table):
    axis = plot_sweep(table, references={"base": 0.4}).axes[0]
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert list(lines["average"].get_ydata()) == list(table["average"])
    assert list(lines["photo_digits"].get_ydata()) == list(table["photo_digits"])
    assert set(lines["base"].get_ydata()) == {0.4}


def test_the_heat_map_shows_cosines(two):
    shown = plot_cosines(two.task_vectors).axes[0].images[0].get_array()
    assert shown.diagonal().tolist() == [1.0, 1.0]
    assert shown[0, 1] == pytest.approx(shown[1, 0])


def test_there_is_a_row_of_images_per_task(two):
    assert len(show_images(two, per_task=3).axes) == 6


def test_a_methods_source_is_its_file():
    assert "disjoint_mean" in show_source(mkl.ties).data
    with pytest.raises(ValueError, match="not written in a file"):
        show_source(3)


# ---------------------------------------------------------------- explorers


def test_the_explorer_draws_at_its_extremes(two):
    explorer = explore_scale(two, mkl.task_arithmetic)
    slider = explorer.children[0]
    for value in (slider.min, slider.max):
        slider.value = value
        explorer.update()
        figure = merges_at(two, mkl.task_arithmetic, [value])
        bars = figure.axes[0].containers[0]
        merged = two.evaluate(mkl.task_arithmetic(two.task_vectors, scale=value), split="validation")
        assert [bar.get_height() for bar in bars][:-1] == pytest.approx(list(merged.values()))
