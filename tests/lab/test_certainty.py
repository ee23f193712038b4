"""How certain and how right merges are: against the suite's own measures, and slopes against its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

import mergekit_lite as mkl
from mergekit_lite.adaptive import entropy_loss
from mergekit_lite.lab.certainty import bearings, certainties, label_loss, per_image, slopes_by_task


@pytest.fixture(scope="module")
def few(suite):
    return suite.cut(12, tasks=["mnist", "letters"])


def test_images_are_measured_one_by_one(few):
    state = few.experts["mnist"]
    table = per_image(few, state, "letters")
    assert len(table) == 12
    assert table["right"].mean() == pytest.approx(few.evaluate(state)["letters"])
    assert table["loss"].mean() == pytest.approx(few.losses(state, split="test")["letters"], rel=1e-5)
    logits = few.logits(few.build(state), "letters", few.task("letters").test).double()
    by_hand = [-sum(p * math.log(p) for p in row) for row in logits.softmax(1).tolist()]
    assert table["entropy"].tolist() == pytest.approx(by_hand, rel=1e-4)


def test_a_module_is_measured_like_its_weights(few):
    state = few.experts["letters"]
    assert per_image(few, few.build(state).train(), "mnist").equals(per_image(few, state, "mnist"))


def test_certainties_are_means_over_images(few):
    merges = {0.0: few.base, 1.0: few.experts["mnist"]}
    table = certainties(few, merges)
    assert list(table.index) == [(scale, task) for scale in merges for task in ("mnist", "letters")]
    for scale, state in merges.items():
        for task in ("mnist", "letters"):
            expected = per_image(few, state, task, split="validation").mean()
            assert table.loc[(scale, task)].tolist() == pytest.approx(expected.tolist())


def test_slopes_are_inner_products_with_the_gradient(few):
    tv = few.task_vectors
    state = mkl.task_arithmetic(tv, scale=0.3)
    labels = {task: few.task(task).validation.labels for task in few.tasks}
    slopes = slopes_by_task(few, tv, state, few.inputs("validation"), label_loss(labels))
    for task, found in slopes.items():
        gradient = few.gradient(state, task)
        for row, (name, _, taus) in zip(found, tv.layers(), strict=True):
            expected = [float((gradient[name] * tau).sum()) if name in gradient else 0.0 for tau in taus]
            assert row.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_slopes_of_the_entropy_predict_its_change(few):
    tv = few.task_vectors
    inputs = few.inputs("validation")
    slopes = slopes_by_task(few, tv, mkl.task_arithmetic(tv, scale=0.3), inputs, entropy_loss)["mnist"].sum(0)

    def at(first):
        return certainties(few, {first: mkl.task_arithmetic(tv, scale=[first, 0.3])}).loc[(first, "mnist"), "entropy"]

    assert slopes[0].item() == pytest.approx((at(0.31) - at(0.29)) / 0.02, rel=0.05)


def test_the_loss_of_labels_is_the_cross_entropy():
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1, 0])
    loss = label_loss({"digits": labels})
    assert torch.equal(loss("digits", torch.zeros(5), logits), F.cross_entropy(logits, labels))
    with pytest.raises(KeyError, match="letters"):
        loss("letters", torch.zeros(5), logits)


def test_bearings_are_cosines_with_the_labels_gradient(few):
    tv, inputs = few.task_vectors, few.inputs("validation")
    labels = {task: few.task(task).validation.labels for task in few.tasks}
    with_labels = label_loss(labels)
    teachers = {"labels": with_labels, "against": lambda *given: -with_labels(*given), "entropy": entropy_loss}
    table = bearings(few, tv, few.base, inputs, teachers, labels)
    assert list(table.columns) == ["mnist", "letters", "all tasks"]
    assert table.loc["labels"].tolist() == pytest.approx([1, 1, 1])
    assert table.loc["against"].tolist() == pytest.approx([-1, -1, -1])
    own, right = (slopes_by_task(few, tv, few.base, inputs, loss) for loss in (entropy_loss, with_labels))
    a, b = own["mnist"] + own["letters"], right["mnist"] + right["letters"]
    assert table.loc["entropy", "all tasks"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())))
    assert -1 < table.loc["entropy", "mnist"] < 1
