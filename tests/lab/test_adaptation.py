"""The study of part 4: every way for one step on a few images, the merge it keeps, and the readers of its tables."""

import dataclasses
import json
import math

import pandas as pd
import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.lab import adaptation
from mergekit_lite.lab.adaptation import Best, blocks

TOLD = {"EMR", "experts"}
MIXTURES = {"WEMoE, entropy", "WEMoE, imitation"}


@pytest.fixture(scope="module")
def few(suite):
    """Two tasks of four images in each split, and one held-out task of four."""
    cut = suite.cut(4, tasks=["mnist", "fashion"])
    name, task = next(iter(suite.held_out.items()))
    return dataclasses.replace(cut, held_out={name: dataclasses.replace(task, test=task.test[torch.arange(4)])})


@pytest.fixture(scope="module")
def measured(few):
    """The two tables of all ways, one step each."""
    table, curves = adaptation.measure(few, most=1)
    return table.set_index("method"), curves


# ---------------------------------------------------------------- the measurements


def test_all_methods_are_measured_on_both_halves(few, measured):
    table, _ = measured
    seen, _ = few.halves(few.seed)
    assert list(table.index) == [*adaptation.data_free(few), *adaptation.ways(few, seen, 1)]
    scores = table[["held out", "transductive", "validation"]]
    assert ((scores >= 0) & (scores <= 1)).all(axis=None)
    assert set(table.index[table["unseen tasks"].isna()]) == TOLD, "who is told the task knows no weights for others"
    assert set(table.index[table["by batch"].notna()]) == MIXTURES
    assert set(table["steps"]) <= {0, 1}
    assert table.loc["AdaMerging, layer, as published", "steps"] == 1, "the last, be it better or not"
    for tasks, average in zip(table["tasks"].map(json.loads), table["held out"], strict=True):
        assert list(tasks) == ["mnist", "fashion"]
        assert sum(tasks.values()) / 2 == pytest.approx(average, abs=1e-4)


def test_what_needs_no_images_is_what_the_suite_says(few, measured):
    table, _ = measured
    seen, unseen = few.halves(few.seed)
    assert table.loc["experts", "transductive"] == pytest.approx(seen.evaluate_experts().average)
    assert table.loc["experts", "held out"] == pytest.approx(unseen.evaluate_experts().average)
    assert table.loc["base", "held out"] == pytest.approx(unseen.evaluate().average)
    assert table.loc["base", "unseen tasks"] == pytest.approx(few.evaluate(tasks=few.held_out).average)
    merges = [mkl.task_arithmetic(few.task_vectors, scale=scale) for scale in adaptation.SCALES[:5]]
    on_validation = [few.evaluate(merged, split="validation").average for merged in merges]
    best = merges[on_validation.index(max(on_validation))]
    assert table.loc["task arithmetic", "validation"] == pytest.approx(max(on_validation))
    assert table.loc["task arithmetic", "held out"] == pytest.approx(unseen.evaluate(best).average)


def test_curves_have_a_row_for_every_look(few, measured):
    table, curves = measured
    adapted = [name for name in table.index if name not in adaptation.data_free(few)]
    assert list(curves["method"]) == [name for name in adapted for _ in range(2)]
    assert list(curves["step"]) == [0, 1] * len(adapted)
    assert curves["loss"].map(math.isfinite).all()
    for name, rows in curves.groupby("method"):
        kept = rows.set_index("step").loc[table.loc[name, "steps"], "validation"]
        assert kept == pytest.approx(table.loc[name, "validation"])
        if "as published" not in name:
            assert kept == rows["validation"].max()


def test_a_way_sees_the_images_of_its_half_alone(few):
    seen, _ = few.halves(3)
    tv, merges = few.task_vectors, []
    imitation = mkl.imitation_loss(few.model, few.experts, few.heads)

    def watch(merge):
        merges.append(merge)
        return few.evaluate(merge, split="validation")

    ways = adaptation.ways(few, seen, most=2)
    history = ways["imitation, layer"](watch)
    assert history.steps == 2
    options = {"init": 0.2, "steps": 2, "learning_rate": 0.01, "loss": imitation, "progress": False}
    found = mkl.learn_coefficients(tv, few.model, few.heads, seen.inputs(), **options)
    expected = mkl.merge_with(tv, found)
    assert all(torch.equal(merges[-1][name], tensor) for name, tensor in expected.items())
    assert list(history.seen["accuracy"]) == [0, 2]
    merges.clear()
    ways["WEMoE, imitation"](watch)
    mixture = merges[-1]
    assert isinstance(mixture, mkl.WEMoE)
    assert list(mixture.mixtures) == blocks(few.model)


def test_the_networks_blocks(suite):
    names = blocks(suite.model)
    assert names
    for name in names:
        where, stage, number = name.split(".")
        assert where == "blocks"
        assert suite.model.blocks[int(stage)][int(number)] is suite.model.get_submodule(name)
    assert len(names) == sum(len(stage) for stage in suite.model.blocks)


# ---------------------------------------------------------------- which merge is kept


def test_the_merge_that_is_best_on_validation_images_is_kept(few):
    states = [few.base, few.experts["mnist"], mkl.average(few.task_vectors)]
    accuracies = [few.evaluate(state, split="validation").average for state in states]
    best, last = Best(few), Best(few, last=True)
    for state, accuracy in zip(states, accuracies, strict=True):
        assert best(state).average == pytest.approx(accuracy)
        last(state)
    assert best.seen == last.seen == accuracies
    assert best.accuracy == max(accuracies)
    first = accuracies.index(max(accuracies))
    assert all(torch.equal(best.merge[name], tensor) for name, tensor in states[first].items())
    assert all(torch.equal(last.merge[name], tensor) for name, tensor in states[-1].items())
    assert last.accuracy == accuracies[-1]


def test_what_is_kept_is_a_copy(few):
    state = {name: tensor.clone() for name, tensor in few.base.items()}
    best = Best(few)
    best(state)
    kept = best.merge
    for tensor in state.values():
        tensor.zero_()
    assert all(torch.equal(kept[name], tensor) for name, tensor in few.base.items())
    best(few.base)
    assert best.merge is kept, "of two that are equal the first"


def test_losses_are_averaged_since_the_last_look():
    history = mkl.History(steps=4)
    for step, loss in enumerate([4.0, 2.0, 1.0, 0.5]):
        history.add("loss", step, {"a": loss, "b": loss + 1})
    for step, accuracy in ((0, 0.25), (3, 0.5), (4, 1.0)):
        history.add("accuracy", step, {"a": accuracy, "b": 0.0})
    assert adaptation._curve("way", history) == [
        {"method": "way", "step": 0, "loss": 4.5, "validation": 0.125},
        {"method": "way", "step": 3, "loss": pytest.approx(7 / 3 + 0.5), "validation": 0.25},
        {"method": "way", "step": 4, "loss": 1.0, "validation": 0.5},
    ]


# ---------------------------------------------------------------- the tables that travel with the package


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "TABLES", tmp_path)
    rows = [
        # seed, method, held out, transductive, unseen tasks, tasks, validation, steps, by batch
        (0, "TA", 0.50, 0.52, 0.25, {"a": 0.4, "b": 0.6}, 0.5, 0, None),
        (0, "MoE", 0.70, 0.70, 0.20, {"a": 0.8, "b": 0.6}, 0.7, 20, 0.8),
        (1, "TA", 0.54, 0.50, 0.35, {"a": 0.5, "b": 0.58}, 0.5, 0, None),
        (1, "MoE", 0.80, 0.76, 0.30, {"a": 0.9, "b": 0.7}, 0.7, 60, 0.9),
    ]
    columns = ["seed", "method", "held out", "transductive", "unseen tasks", "tasks", "validation", "steps", "by batch"]
    table = pd.DataFrame(rows, columns=columns)
    table["tasks"] = table["tasks"].map(json.dumps)
    table.to_csv(tmp_path / "adaptation.csv", index=False)
    curves = [(s, m, n, s + n / 10, 0.5 + s / 10) for s in (0, 1) for m in ("z way", "a way") for n in (0, 20)]
    names = ["seed", "method", "step", "loss", "validation"]
    pd.DataFrame(curves, columns=names).to_csv(tmp_path / "adaptation-curves.csv", index=False)


def test_means_and_spreads_over_seeds(tables):
    table = adaptation.results()
    assert list(table.index) == ["TA", "MoE"], "the order of the study"
    assert list(table.columns[:3]) == ["held out", "spread", "transductive"]
    row = table.loc["MoE"]
    assert row["held out"] == pytest.approx(0.75)
    assert row["spread"] == pytest.approx(0.05 * 2**0.5)  # two numbers, 0.05 on either side of their mean
    assert (row["seed 0"], row["seed 1"]) == (0.7, 0.8)
    assert (row["transductive"], row["steps"]) == (pytest.approx(0.73), 40)
    assert row["by batch"] == pytest.approx(0.85)
    assert math.isnan(table.loc["TA", "by batch"])
    assert table.loc["TA", "unseen tasks"] == pytest.approx(0.3)


def test_accuracies_by_task(tables):
    table = adaptation.by_task()
    assert list(table.index) == ["TA", "MoE"]
    assert table.loc["TA"].to_dict() == pytest.approx({"a": 0.45, "b": 0.59})
    assert table.loc["MoE"].to_dict() == pytest.approx({"a": 0.85, "b": 0.65})


def test_mean_curves(tables):
    curves = adaptation.curves()
    assert list(curves.index) == [("z way", 0), ("z way", 20), ("a way", 0), ("a way", 20)]
    assert list(curves.columns) == ["loss", "validation"]
    assert curves.loc["z way", "loss"].tolist() == pytest.approx([0.5, 2.5])
    assert curves.loc["a way", "validation"].tolist() == pytest.approx([0.55, 0.55])
