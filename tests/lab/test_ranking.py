"""The table of chapter 2.6: its measure on a small suite, the published column, and rank correlation."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest

import mergekit_lite as mkl
from mergekit_lite.lab import ranking


@pytest.fixture(scope="module")
def few(suite):
    return suite.cut(20, tasks=["mnist", "fashion"])


@pytest.fixture(scope="module")
def measured(few):
    grid = {"density": (0.2, 0.9), "scale": (0.1, 0.9)}
    with pytest.MonkeyPatch.context() as patch:
        ways = {"average": (mkl.average, {}), "TIES": (mkl.ties, grid), "EMR": (mkl.emr, {})}
        patch.setattr(ranking, "WAYS", ways)
        return ranking.measure(few).set_index("method"), grid


def test_hyperparameters_are_chosen_on_validation_images_and_reported_on_test_images(few, measured):
    table, grid = measured
    tries = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    on_validation = [few.evaluate(mkl.ties(few.task_vectors, **t), split="validation").average for t in tries]
    row = table.loc["TIES"]
    assert json.loads(row["chosen"]) == tries[on_validation.index(max(on_validation))]
    assert row["validation"] == pytest.approx(max(on_validation))
    chosen = mkl.ties(few.task_vectors, **json.loads(row["chosen"]))
    assert row["tuned"] == pytest.approx(few.evaluate(chosen).average)
    assert row["default"] == pytest.approx(few.evaluate(mkl.ties(few.task_vectors)).average)


def test_a_method_without_a_grid_is_measured_as_it_is(few, measured):
    row = measured[0].loc["average"]
    merged = mkl.average(few.task_vectors)
    assert row["default"] == row["tuned"] == pytest.approx(few.evaluate(merged).average)
    assert row["validation"] == pytest.approx(few.evaluate(merged, split="validation").average)
    assert row["chosen"] == "{}"


def test_a_method_that_is_told_the_task_answers_each_task_with_its_own_weights(few, measured):
    merged = mkl.emr(few.task_vectors)
    alone = [few.evaluate(merged[task], tasks=[task])[task] for task in few.tasks]
    assert measured[0].loc["EMR", "tuned"] == pytest.approx(sum(alone) / len(alone))


def test_means_and_spreads_over_seeds(monkeypatch):
    seeds = pd.DataFrame(
        {
            "seed": [0, 0, 1, 1, 2, 2],
            "method": ["a", "b"] * 3,
            "default": [0.5, 0.1, 0.6, 0.1, 0.7, 0.1],
            "tuned": [0.9, 0.2, 0.9, 0.3, 0.9, 0.7],
        }
    )
    monkeypatch.setattr(ranking, "by_seed", lambda: seeds)
    table = ranking.results()
    assert list(table.index) == ["b", "a"], "the best tuned one is last"
    assert table.loc["a"].tolist() == pytest.approx([0.6, 0.1, 0.9, 0.0])
    assert table.loc["b"].tolist() == pytest.approx([0.1, 0.0, 0.4, 0.07**0.5])  # (0.04 + 0.01 + 0.09) / 2


def test_rank_correlation_by_hand():
    a = pd.Series({"p": 10.0, "q": 20.0, "r": 30.0, "s": 40.0})
    b = pd.Series({"s": 0.3, "r": 0.9, "q": 0.2, "p": 0.1})
    # Ranks 1, 2, 3, 4 and 1, 2, 4, 3: squared differences 0, 0, 1, 1; 1 - 6 * 2 / (4 * 15) = 0.8.
    assert ranking.rank_correlation(a, b) == pytest.approx(0.8)
    assert ranking.rank_correlation(a, a**3) == pytest.approx(1.0), "only the order counts"
    assert ranking.rank_correlation(a, -a) == pytest.approx(-1.0)


def test_equal_values_share_their_rank():
    a, b = pd.Series([1.0, 1.0, 2.0]), pd.Series([1.0, 2.0, 3.0])
    # Ranks 1.5, 1.5, 3 and 1, 2, 3: covariance 1.5, variances 1.5 and 2.
    assert ranking.rank_correlation(a, b) == pytest.approx(1.5 / 3**0.5)


def test_methods_that_stand_in_one_table_only_do_not_count():
    a = pd.Series({"p": 1.0, "q": 2.0, "r": 3.0, "only here": -9.0, "unknown": 5.0})
    b = pd.Series({"p": 1.0, "q": 2.0, "r": 3.0, "only there": 99.0, "unknown": float("nan")})
    assert ranking.rank_correlation(a, b) == pytest.approx(1.0)


def test_the_published_figures_are_of_methods_that_are_measured_here():
    table = ranking.published()
    assert set(table.index) <= set(ranking.WAYS)
    assert not table.index.duplicated().any()
    assert table["ViT-B/32"].between(50, 100).all()
    first_hand = table[table["secondary"] == "no"]
    assert first_hand["family"].notna().all(), "a figure from the paper itself has a known family of checkpoints"
    assert (table.loc[table["family"] == "A"].index[:2] == ["average", "task arithmetic"]).all()


def test_the_sources_of_the_published_figures_stand_in_the_bibliography(pytestconfig):
    entries = (pytestconfig.rootpath / "book" / "references.bib").read_text()
    for source in ranking.published()["source"]:
        assert f"{{{source}," in entries, source


def test_the_shipped_table_holds_three_seeds_of_every_method():
    table = ranking.by_seed()
    assert set(map(tuple, table[["seed", "method"]].to_numpy())) == set(itertools.product((0, 1, 2), ranking.WAYS))
    assert len(table) == 3 * len(ranking.WAYS)
    for _, row in table.iterrows():
        grid = ranking.WAYS[row["method"]][1]
        chosen = json.loads(row["chosen"])
        assert set(chosen) == set(grid)
        assert all(chosen[name] in values for name, values in grid.items()), (row["method"], chosen)
        assert grid or row["default"] == row["tuned"]


def test_the_shipped_table_is_of_the_shipped_experts(suite):
    """One number measured anew, to the rounding of the file and the few images that another CPU sees otherwise."""
    row = ranking.by_seed().set_index(["seed", "method"]).loc[(0, "TIES")]
    assert suite.evaluate(mkl.ties(suite.task_vectors)).average == pytest.approx(row["default"], abs=0.002)


def test_the_costs_are_of_methods_of_the_table_and_too_much_is_infinite():
    found = ranking.costs()
    assert set(found.index) < set(ranking.WAYS)
    assert list(found.columns) == ["mergekit_lite", "mergekit", "fusion-bench", "MB"]
    assert np.isinf(found.loc["TIES", "fusion-bench"])
    assert np.isnan(found.loc["AWD", "mergekit"])
    assert (found["mergekit_lite"] > 1).all()  # no merge is faster than reading its files
