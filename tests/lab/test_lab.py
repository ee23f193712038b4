"""Sweeps, pictures and explorers, on the shipped suite cut down to two tasks."""

import dataclasses

import matplotlib as mpl
import pandas as pd
import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.lab import best, sweep
from mergekit_lite.lab.plots import (
    plot_cosines,
    plot_curves,
    plot_maps,
    plot_merges,
    plot_sweep,
    show_images,
    show_source,
)
from mergekit_lite.lab.widgets import edits_at, explore_edit, explore_pair, explore_scale, merges_at, pairs_at
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


def heights(figure):
    """Heights of the bars per merge, without the average."""
    return [[bar.get_height() for bar in bars][:-1] for bars in figure.axes[0].containers]


def extremes(explorer):
    """Set every slider to its ends and every menu to its last entry, and draw each time."""
    for control in explorer.children[:-1]:
        for value in (control.min, control.max) if hasattr(control, "min") else (control.options[-1],):
            control.value = value
            explorer.update()
            assert not [o for o in explorer.out.outputs if o["output_type"] == "error"], explorer.out.outputs
            yield {c.description: c.value for c in explorer.children[:-1]}


def test_the_scale_explorer_at_its_extremes(two):
    explorer = explore_scale(two, mkl.task_arithmetic)
    assert [at["scale λ"] for at in extremes(explorer)] == [0.0, 1.0]
    for value in (0.0, 1.0):
        figure = merges_at(two, mkl.task_arithmetic, [value])
        merged = two.evaluate(mkl.task_arithmetic(two.task_vectors, scale=value), split="validation")
        assert heights(figure) == [pytest.approx(list(merged.values()))]
        assert figure.get_label() == f"λ = {value:.2f}: average accuracy {merged.average:.3f} on validation images"


def test_the_edit_explorer_at_its_extremes(two):
    seen = list(extremes(explore_edit(two)))
    assert [(at["task"], at["scale λ"]) for at in seen] == [
        ("emoji_category", 0.5),
        ("emoji_category", -1.0),
        ("emoji_category", 1.0),
    ]
    figure = edits_at(two, "photo_digits", [-1.0, 1.0])
    forgot = two.evaluate(mkl.negation(two.task_vectors, forget="photo_digits", scale=1.0), split="validation")
    expert = two.evaluate(two.experts["photo_digits"], split="validation")
    assert heights(figure) == [pytest.approx(list(forgot.values())), pytest.approx(list(expert.values()))]


def test_the_pair_explorer_at_its_extremes(two):
    names = list(two.tasks)
    explorer = explore_pair(two, names)
    assert len(list(extremes(explorer))) == 4
    alone, both = heights(pairs_at(two, names, [(1.0, 1.0)]))
    assert alone == pytest.approx(list(two.evaluate_experts(split="validation").values()))
    merged = two.evaluate(mkl.task_arithmetic(two.task_vectors, scale=1.0), split="validation")
    assert both == pytest.approx(list(merged.values()))
    with pytest.raises(ValueError, match="expected two tasks, got 1"):
        pairs_at(two, names[:1], [(1.0, 1.0)])


# ---------------------------------------------------------------- curves and maps


def test_curves_go_through_the_values():
    axis = plot_curves([1, 2, 4], {"a": [0.1, 0.2, 0.3]}, xlabel="x", log=True).axes[0]
    assert list(axis.get_lines()[0].get_xydata()[:, 1]) == [0.1, 0.2, 0.3]
    assert axis.get_xscale() == "log"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "4"]


def test_a_map_has_the_first_task_to_the_right():
    values = torch.tensor([[0.0, 0.1], [0.8, 0.3]], dtype=torch.float64)  # 0.8 where the first scale is 1
    figure = plot_maps({"one": values, "two": values}, [0.0, 1.0], ["a", "b"], label="accuracy")
    image = figure.axes[0].images[0]
    assert image.get_array()[0, 1] == 0.8  # bottom row (origin below), right column
    assert image.origin == "lower"
    assert image.get_clim() == (0.0, 0.8)
    assert figure.axes[0].get_xlabel().endswith("of a")
