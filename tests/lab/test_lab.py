"""Sweeps, pictures and explorers, on the shipped suite cut down to two tasks."""

import dataclasses

import pandas as pd
import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.geometry import cosines, turned
from mergekit_lite.lab import best, sweep
from mergekit_lite.lab.headroom import fit_scales, scaled
from mergekit_lite.lab.plots import (
    plot_cosines,
    plot_curves,
    plot_maps,
    plot_matrices,
    plot_merges,
    plot_points,
    plot_sweep,
    show_images,
    show_source,
)
from mergekit_lite.lab.widgets import (
    disentangled_at,
    edits_at,
    explore_angle,
    explore_disentangling,
    explore_edit,
    explore_lengths,
    explore_pair,
    explore_scale,
    lengths_at,
    merges_at,
    pairs_at,
    turned_at,
)
from mergekit_lite.suites import compare


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
    assert "disjoint_merge" in show_source(mkl.ties).data
    assert show_source(sweep, alone=True).data.startswith("def sweep(")
    with pytest.raises(ValueError, match="not written in a file"):
        show_source(3)


# ---------------------------------------------------------------- explorers


def heights(figure):
    """Heights of the bars per merge, without the average."""
    return [[bar.get_height() for bar in bars][:-1] for bars in figure.axes[0].containers]


def extremes(explorer):
    """Set every slider to its ends and every menu to its last entry, and draw each time."""
    for control in explorer.children[:-1]:
        ends = (control.min, control.max) if hasattr(control, "min") else (control.options[-1],)
        for value in [control.base**end for end in ends] if hasattr(control, "base") else ends:
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


def test_a_turned_task_vector_keeps_its_length(two):
    pair = two.task_vectors
    for cosine in (-0.7, 0.0, 0.9):
        moved = turned(pair, cosine)
        assert cosines(moved)[0, 1].item() == pytest.approx(cosine, abs=1e-5)
        torch.testing.assert_close(moved.gram().diagonal(), pair.gram().diagonal(), rtol=1e-5, atol=0)
    back = turned(pair, cosines(pair)[0, 1].item())
    torch.testing.assert_close(back.flat(), pair.flat(), atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match=r"expected two task vectors and a cosine; got 2 and 1\.5"):
        turned(pair, 1.5)
    with pytest.raises(ValueError, match="parallel"):
        turned(mkl.TaskVectors(two.base, [two.experts["photo_digits"]] * 2), 0.5)


def test_the_angle_explorer_at_its_extremes(two):
    names = list(two.tasks)
    explorer = explore_angle(two, names)
    assert [at["cosine"] for at in extremes(explorer)] == [-0.95, 0.95, 0.95, 0.95]
    predicted, measured = turned_at(two, names, [-0.9, 0.9], scale=0.1).axes[0].get_lines()[:2]
    pair = turned(two.task_vectors, 0.9)
    first = two.losses(mkl.task_arithmetic(pair, scale=[0.1, 0.0]), tasks=names[:1])[names[0]]
    both = two.losses(mkl.task_arithmetic(pair, scale=0.1), tasks=names[:1])[names[0]]
    assert measured.get_ydata()[1] == pytest.approx(both - first, abs=1e-5)
    assert predicted.get_ydata()[0] > 0 > predicted.get_ydata()[1], "opposed vectors undo, parallel ones help"


def test_the_disentangling_explorer_at_its_extremes(two):
    explorer = explore_disentangling(two)
    seen = list(extremes(explorer))
    assert [(round(at["alpha"], 3), at["granularity"]) for at in seen] == [
        (0.001, "layer"),
        (1.0, "layer"),
        (1.0, "row"),
    ]
    found = mkl.disentangle(two.task_vectors, relative=True)
    figure = disentangled_at(two, granularity="whole", scales=(0.2, 0.4))
    shown = figure.axes[0].images[0].get_array()
    assert shown[0, 1] == pytest.approx(cosines(found.task_vectors)[0, 1].item(), abs=1e-9)
    shares = figure.axes[1].get_lines()[0].get_xdata()
    assert list(shares) == pytest.approx((1 - 2 * found.coefficients["conv_stem.weight"]).tolist())
    merged = two.evaluate(mkl.task_arithmetic(found.task_vectors, scale=0.4), split="validation")
    lines = {line.get_label(): line for line in figure.axes[2].get_lines()}
    assert lines["AWD"].get_ydata()[1] == pytest.approx(merged.average)
    assert f"mean |cosine| {found.cosines[0]:.3f} before, {found.cosines[-1]:.3f} after" in figure.get_label()


def test_the_length_explorer_goes_from_the_average_to_metagpt(two):
    assert [at["sum of λ"] for at in extremes(explore_lengths(two))] == [1.0, 1.0, 0.0, 4.0]
    averaged, metagpt = heights(lengths_at(two, [0.0, 2.0]))
    assert averaged == pytest.approx(list(two.evaluate(mkl.average(two.task_vectors), split="validation").values()))
    assert metagpt == pytest.approx(list(two.evaluate(mkl.metagpt(two.task_vectors), split="validation").values()))


# ---------------------------------------------------------------- the best scales there are


def test_scales_chosen_with_labels_lower_the_loss(two):
    few = two.cut(30)
    tv = few.task_vectors
    before = sum(few.losses(mkl.task_arithmetic(tv, scale=0.2)).values())
    for granularity, shape in (("whole", (2,)), ("layer", (2,)), ("row", (32, 2))):
        scales = fit_scales(few, granularity, iterations=4, images=30, step=0.05, progress=False)
        assert scales["conv_stem.weight"].shape == shape
        assert sum(few.losses(scaled(tv, scales)).values()) < before - 0.02
        if granularity == "whole":
            whole = scales["conv_stem.weight"]
            assert all(scale is whole for scale in scales.values())
            assert before - 0.02 > sum(few.losses(mkl.task_arithmetic(tv, scale=whole.tolist())).values())


def test_without_labels_the_predictions_become_more_certain(two):
    few = two.cut(30)
    tv = few.task_vectors

    def undecided(state):
        splits = {name: task.validation for name, task in few.tasks.items()}
        return sum(mkl.entropy(few.logits(few.build(state), name, split)).item() for name, split in splits.items())

    for task in few.tasks.values():
        task.validation.labels.fill_(0)  # of the copy that `cut` made
    scales = fit_scales(few, iterations=4, images=30, step=0.05, labels=False, progress=False)
    assert undecided(scaled(tv, scales)) < undecided(mkl.task_arithmetic(tv, scale=0.2)) - 0.02


def test_the_slope_of_a_scale_is_what_a_small_change_shows(two):
    """One step of Adam goes against the sign of the slope: compare with the losses on both sides."""
    few = two.cut(40)
    tv = few.task_vectors
    start, moved = 0.4, fit_scales(few, iterations=1, images=40, start=0.4, step=1e-3, progress=False)
    for k in range(2):
        sides = []
        for change in (-0.02, 0.02):
            scales = [start + change * (j == k) for j in range(2)]
            sides.append(sum(few.losses(mkl.task_arithmetic(tv, scale=scales)).values()))
        assert (moved["conv_stem.weight"][k] < start) == (sides[0] < sides[1])


# ---------------------------------------------------------------- curves and maps


def test_matrices_and_points_are_drawn_as_given():
    matrix = torch.tensor([[0.0, -0.5], [0.25, 0.0]])
    figure = plot_matrices({"first": matrix, "second": -matrix}, ["a", "b"], label="nats")
    assert figure.axes[1].images[0].get_array().tolist() == (-matrix).tolist()
    assert figure.axes[0].images[0].get_clim() == (-0.5, 0.5)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.00", "-0.50", "0.25", "0.00"]
    axis = plot_points({"one": ([1.0, 2.0], [3.0, 4.0])}, xlabel="x", ylabel="y", diagonal=True, names=True).axes[0]
    assert axis.get_lines()[0].get_xydata().tolist() == [[1, 3], [2, 4]]
    assert axis.texts[0].get_text() == "one"


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
