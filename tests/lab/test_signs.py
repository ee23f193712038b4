"""The study of chapter 2.4: what its variants are, its pictures, and the tables that travel with the package."""

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.lab import signs
from mergekit_lite.lab.plots import plot_competition, plot_election
from mergekit_lite.lab.widgets import election_at, explore_election


@pytest.fixture(scope="module")
def toy():
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(6, 30, generator=generator), "b": torch.randn(20, generator=generator)}
    experts = [{n: t + torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(3)]
    return mkl.TaskVectors(base, experts)


def test_the_smallest_and_the_largest_make_the_whole(toy):
    whole = signs.smallest(toy, 0.7).flat() + mkl.trim(toy, 0.3).flat()
    torch.testing.assert_close(whole, toy.flat())
    assert (signs.smallest(toy, 0.7).flat() != 0).sum(1).tolist() == [140] * 3


def test_rescaling_keeps_the_sum_of_magnitudes(toy):
    found = signs.largest_rescaled(toy, 0.2).flat()
    torch.testing.assert_close(found.abs().sum(1), toy.flat().abs().sum(1))
    assert torch.equal(found != 0, mkl.trim(toy, 0.2).flat() != 0)


def test_entries_drawn_by_lot_are_left_as_they_are(toy):
    found, flat = signs.at_random(toy, 0.5).flat(), toy.flat()
    torch.testing.assert_close(found[found != 0], flat[found != 0])
    assert 0.3 < (found != 0).double().mean() < 0.7


def test_elections_by_hand():
    taus = torch.tensor([[3.0, 1.0], [-1.0, 1.0], [-1.0, 0.0]])
    tv = mkl.TaskVectors({"w": torch.zeros(2)}, [{"w": tau} for tau in taus])
    assert signs.merge_elected(tv, signs.losers)["w"].tolist() == [-1.0, 0.0]
    torch.testing.assert_close(signs.mean_of_kept(tv)["w"], torch.tensor([1 / 3, 1.0]))
    by_lot = signs.merge_elected(tv, signs.coin)["w"]
    assert by_lot[0] in (3.0, -1.0)
    assert by_lot[1] in (1.0, 0.0)


def test_every_merge_lies_on_its_line_at_the_distance_it_reports(suite, monkeypatch):
    few = suite.cut(10, tasks=["mnist", "fashion"])
    monkeypatch.setattr(signs, "LENGTHS", (1.0, 3.0))
    monkeypatch.setattr(signs, "MERGES", {"TIES": mkl.ties, "average": mkl.average})
    table, curves = signs.measure_merges(few, say=lambda words: None)
    assert list(curves["distance"]) == [1.0, 3.0] * 2
    row = table.set_index("merge").loc["TIES"]
    length = mkl.TaskVectors(few.base, [mkl.ties(few.task_vectors)]).gram().sqrt().item()
    assert row["length"] == pytest.approx(length)
    assert row["scale"] * length == pytest.approx(row["distance"])
    again = mkl.ties(few.task_vectors, scale=row["scale"])
    assert few.evaluate(again, split="validation").average == pytest.approx(row["validation"])
    assert few.evaluate(again).average == pytest.approx(row["test"])


def test_experts_are_measured_with_their_own_task_vectors(suite, monkeypatch):
    few = suite.cut(10, tasks=["mnist", "fashion"])
    monkeypatch.setattr(signs, "KEPT", (0.5,))
    table = signs.measure_experts(few)
    assert list(table.index) == [0.5, 1.0]
    assert table.loc[1.0].tolist() == pytest.approx([few.evaluate_experts().average] * len(signs.WAYS))
    trimmed = mkl.trim(few.task_vectors, 0.5)
    alone = {name: mkl.task_arithmetic(trimmed[name], scale=1.0) for name in trimmed.names}
    assert table.loc[0.5, "the largest"] == pytest.approx(few.evaluate(alone).average)


def test_weights_are_those_of_the_methods(toy):
    flat = toy.flat()
    for weights, merged in (
        (signs.ties_weights(flat, 0.3), mkl.ties(toy, density=0.3)),
        (signs.pcb_weights(flat, 0.3), mkl.pcb(toy, density=0.3, clip=0.0)),
    ):
        expected = mkl.TaskVectors(toy.base, [merged]).flat()[0]
        torch.testing.assert_close((weights * flat).sum(0), expected, atol=1e-5, rtol=1e-4)


def test_shares_are_of_those_that_count():
    share = signs.first_share(torch.tensor([[0.5, 1.0, 0.0], [0.5, 0.0, 0.0]]))
    assert share[:2].tolist() == [0.5, 1.0]
    assert share[2].isnan()


def test_survivors_are_counted_by_rank():
    taus = torch.tensor([[4.0, -1.0, 2.0, 3.0]])
    assert signs.survival(taus, lambda v: mkl.trim(v, 0.5), bins=4).tolist() == [0, 0, 1, 1]
    assert signs.survival(taus, lambda v: mkl.trim_tails(v, 0.5, 0.25), bins=2).tolist() == [0.5, 0.5]


def test_layers_are_given_what_reaches_them(suite):
    few = suite.cut(3, tasks=["mnist", "fashion"])
    seen = signs.layer_inputs(few, images=2)
    name = "blocks.4.1.conv_pwl.weight"
    assert all(x.shape[1] == few.base[n].shape[1] for n, x in seen.items())
    outputs = []
    model = few.build().eval()
    model.get_submodule(name.removesuffix(".weight")).register_forward_hook(lambda _, x, y: outputs.append(y))
    with torch.inference_mode():
        model(torch.cat([few.prepare(task.validation.images[:2]) for task in few.tasks.values()]))
    expected = outputs[0].movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(seen[name] @ few.base[name].flatten(1).T, expected, atol=1e-4, rtol=1e-4)


def test_slopes_errors_and_coherence_by_hand():
    true = torch.tensor([[1.0, 2.0], [2.0, 0.0]])
    assert signs.compared(0.5 * true, true) == pytest.approx([0.5, 0.25])
    assert signs.compared(true + torch.tensor([[2.0, -1.0], [0.0, 0.0]]), true) == pytest.approx([1.0, 0.5])
    x = torch.ones(3, 4)
    assert signs.coherence(torch.ones(2, 4), x) == pytest.approx(4)
    assert signs.coherence(torch.tensor([[1.0, -1.0, 0.0, 1.0]]), x) == pytest.approx(1 / 3)


def test_features_are_those_of_each_tasks_own_expert(suite):
    few = suite.cut(4, tasks=["mnist", "fashion"])
    moved = signs.features_moved(few, {"fashion": few.experts["fashion"], "mnist": few.base})
    images = few.tasks["fashion"].validation
    before, after = (few.features(few.build(state).eval(), images) for state in (few.base, few.experts["fashion"]))
    torch.testing.assert_close(moved[0], after - before)
    assert moved[0].abs().max() > 0.01
    assert not moved[1].any()


def test_other_units_change_no_output(suite):
    few = suite.cut(5, tasks=["mnist"])
    name = "blocks.4.1.conv_pw.weight"
    other = signs.in_other_units(few.experts["mnist"], name, 10.0)
    torch.testing.assert_close(other[name], 10 * few.experts["mnist"][name])
    assert few.losses(other)["mnist"] == pytest.approx(few.losses(few.experts["mnist"])["mnist"], abs=1e-3)


def test_an_election_is_drawn_as_it_is(suite):
    few = suite.cut(5, tasks=["mnist", "fashion"])
    name = "blocks.4.1.conv_pw.weight"
    figure = election_at(few, name, density=0.3, scale=0.5, block=(4, 6))
    drawn = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    merged = mkl.ties(few.task_vectors, density=0.3, scale=0.5)[name] - few.base[name]
    torch.testing.assert_close(torch.tensor(drawn[5]), merged.flatten(1)[:4, :6], atol=1e-6, rtol=1e-4)
    assert "density 0.30" in figure.get_label()
    bars = next(axis for axis in figure.axes if axis.get_xlabel().startswith("accuracy"))
    assert bars.get_xlabel() == "accuracy of TIES, λ = 0.5 (validation images)"
    assert [tick.get_text() for tick in bars.get_yticklabels()] == ["mnist", "fashion", "mean of tasks"]
    assert len(explore_election(few, name).children) == 3


def test_pictures_have_a_panel_each():
    block = torch.zeros(2, 3, 3)
    figure = plot_election(block, block, block[0], {"merged": block[0]}, ["a", "b"])
    assert len(figure.axes) == 2 * 2 + 2 + 1
    share = torch.tensor([0.0, float("nan"), 1.0])
    figure = plot_competition(torch.randn(2, 3), {"one": share, "two": share}, ["a", "b"])
    assert [len(axis.collections[1].get_offsets()) for axis in figure.axes[:2]] == [2, 2]


def test_the_shipped_tables_are_of_these_merges():
    experts, merges, curves = signs.results()
    assert list(experts.index) == [*signs.KEPT, 1.0]
    assert list(experts.columns) == list(signs.WAYS)
    assert list(merges.index) == list(signs.MERGES)
    assert list(curves.index) == list(signs.LENGTHS)
    assert ((merges["scale"] * merges["length"] / merges["distance"] - 1).abs() < 0.02).all()
    seeds = merges[["seed 0", "seed 1", "seed 2"]]
    assert (seeds.mean(axis=1) - merges["test"]).abs().max() < 0.002
    for name in signs.MERGES:
        assert curves[name].max() <= merges.loc[name, "validation"] + 0.01
