"""Evaluations: what they say, of networks that are left as they were, from several threads at once."""

import copy
import dataclasses
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import mergekit_lite as mkl
from mergekit_lite.suites import Evaluation, Split, Suite, compare
from mergekit_lite.suites.networks import in_inference_mode
from mergekit_lite.suites.speed import one_thread
from tests.suites.test_suite import OPTIONS, write_images


class Normalised(nn.Module):
    """A backbone with a normalisation layer, dropout and a parameter that does not matter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, images):
        return self.drop(self.norm(self.conv(images)).relu()).mean((2, 3))


@pytest.fixture
def small(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name / "train", ["red", "green", "blue"], 6, 0)
        write_images(tmp_path / name / "test", ["red", "green", "blue"], 5, 1)
    return Suite.from_folders([tmp_path / "a", tmp_path / "b"], Normalised(), device="cpu", **OPTIONS)


# ---------------------------------------------------------------- what they say


def test_an_expert_that_is_never_right_is_no_ceiling():
    evaluation = Evaluation({"a": 0.5}, {"a": 0.0})
    assert np.isnan(evaluation.normalised)
    assert list(evaluation.to_frame().columns) == ["a", "average"]
    assert "0.500" in evaluation._repr_html_()


def test_an_evaluation_of_no_tasks_is_shown():
    nothing = Evaluation({})
    assert repr(nothing) == "test: no tasks"
    assert np.isnan(nothing.average)
    assert np.isnan(nothing.normalised)
    assert len(nothing.to_frame()) == 1
    assert "<table" in nothing._repr_html_()
    assert len(compare({})) == 0


def test_names_are_text_on_the_page():
    name = "<script>alert(1)</script>"
    page = Evaluation({name: 0.5}, split="<b>test</b>")._repr_html_()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;test" in page


@pytest.mark.parametrize("fault", ["negative variance", "NaN", "infinite"])
def test_features_that_are_no_numbers_are_not_scored(small, fault):
    state = {name: tensor.clone() for name, tensor in small.base.items()}
    if fault == "negative variance":
        state["norm.running_var"].fill_(-1.0)
    else:
        state["conv.weight"][0] = float("nan" if fault == "NaN" else "inf")
    for measure in (
        small.evaluate,
        small.losses,
        lambda state: small.predict(state, "a"),
        lambda state: small.gradient(state, "a"),
        lambda state: small.evaluate({"a": state, "b": state}),
    ):
        with pytest.raises(ValueError, match=r"'a' are not finite \(NaN or infinite features\).*running variance"):
            measure(state)
    small.evaluate()  # and the suite goes on


def test_a_head_that_is_no_number_is_said(small):
    small.heads["b"].directions.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"'b' are not finite"):
        small.evaluate()


def test_nothing_to_measure_is_said(small):
    assert len(small.evaluate(tasks=[])) == 0
    empty = dataclasses.replace(small.task("a"), test=small.task("a").test[:0])
    nothing = dataclasses.replace(small, tasks={"a": empty})
    for measure in (nothing.evaluate, nothing.losses, nothing.predict, nothing.gradient):
        task = {"tasks": ["a"]} if measure in (nothing.evaluate, nothing.losses) else {"task": "a"}
        with pytest.raises(ValueError, match="'a' has no test images"):
            measure(None, split="test", **task)
    for call in (small.evaluate, small.losses, small.cut):
        with pytest.raises(TypeError, match=r"tasks must be a list of names, such as \['a'\]"):
            call(tasks="a")


# ---------------------------------------------------------------- a network is left as it was


def photograph(model):
    """All that could change in a network."""
    return {
        "modes": [module.training for module in model.modules()],
        "trained": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "values": [t.tolist() for t in model.state_dict().values()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_network_is_left_as_it_was(small, mode, gradients):
    model = Normalised().train(mode != "eval")
    if mode == "mixed":
        model.norm.eval()
        model.conv.bias.requires_grad_(False)
    if gradients:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    before = photograph(model)
    split = small.task("a").test
    results = [
        [
            dict(small.evaluate(model)),
            small.predict(model, "a").tolist(),
            small.losses(model),
            small.features(model, split).tolist(),
            small.logits(model, "a", split).tolist(),
            {name: g.tolist() for name, g in small.gradient(model, "a").items()},
        ]
        for _ in range(2)
    ]
    assert results[0] == results[1]
    assert photograph(model) == before
    whole = small.gradient(model.state_dict(), "a")
    frozen = {"conv.bias"} if mode == "mixed" else set()
    assert results[0][-1] == {n: g.tolist() for n, g in whole.items() if n not in frozen}
    assert "unused" not in whole


def test_a_network_is_left_as_it_was_by_an_error(small):
    model = Normalised().train()
    model.norm.running_var.fill_(-1.0)
    before = photograph(model)
    for measure in (small.evaluate, lambda m: small.gradient(m, "a")):
        with pytest.raises(ValueError, match="not finite"):
            measure(model)
    assert str(photograph(model)) == str(before)


def test_a_network_that_is_frozen_has_no_gradient(small):
    model = Normalised().requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the network is frozen"):
        small.gradient(model, "a")


def test_the_gradient_is_that_of_the_mean_loss(small, monkeypatch):
    state = {name: tensor + 0.01 for name, tensor in small.base.items()}
    whole = small.gradient(state, "a", split="train")
    monkeypatch.setattr("mergekit_lite.suites.suite.EVALUATION_BATCH", 4)
    batched = small.gradient(state, "a", split="train")
    model = small.build(state).eval()
    images = small.task("a").train
    nn.functional.cross_entropy(small.heads["a"](model(small.prepare(images.images))), images.labels).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(whole[name], p.grad)
            torch.testing.assert_close(batched[name], p.grad)


# ---------------------------------------------------------------- threads


def in_threads(work, count=4):
    """`work(k)` in `count` threads that begin together; their results."""
    barrier = threading.Barrier(count)

    def run(k):
        barrier.wait()
        return work(k)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_a_suite_answers_several_threads(small):
    states = [small.build().state_dict() for _ in range(4)]
    for k, state in enumerate(states):
        state["conv.weight"] = state["conv.weight"] + 0.3 * k * torch.randn_like(state["conv.weight"])
    model = Normalised().train()

    def measure(state):
        return (
            small.losses(state, split="test"),
            small.losses(model),
            small.gradient(state, "b")["conv.weight"].tolist(),
        )

    alone = [measure(state) for state in states]
    assert len({str(losses) for losses, _, _ in alone}) == 4
    for _ in range(3):
        small.__dict__.pop("_copies", None)
        together = in_threads(lambda k: [measure(states[k]) for _ in range(6)])
        assert together == [[alone[k]] * 6 for k in range(4)]
    assert model.training
    assert len(small._copies) <= 4


def test_a_measurement_within_a_measurement_has_weights_of_its_own(small):
    other = {name: tensor * 0.5 for name, tensor in small.base.items()}
    expected = small.gradient(None, "a", split="train")

    def loss(logits, labels):
        small.evaluate(other)
        return nn.functional.cross_entropy(logits, labels)

    nested = small.gradient(None, "a", split="train", loss=loss)
    assert all(torch.equal(nested[name], expected[name]) for name in expected)


def test_a_used_suite_can_be_sent_and_copied(small):
    small.finetune(progress=False)
    expected = dict(small.evaluate(mkl.average(small.task_vectors)))
    for other in (
        pickle.loads(pickle.dumps(small)),
        copy.deepcopy(small),
        copy.copy(small),
        dataclasses.replace(small),
    ):
        assert "_copies" not in other.__dict__
        assert dict(other.evaluate(mkl.average(other.task_vectors))) == expected
    assert len(pickle.dumps(small)) < len(pickle.dumps(small.__dict__))


def test_one_thread_is_counted():
    before = torch.get_num_threads()
    inside, leave = threading.Event(), threading.Event()

    def stays():
        with one_thread():
            inside.set()
            leave.wait(10)
            return torch.get_num_threads()

    torch.set_num_threads(3)
    with ThreadPoolExecutor(1) as pool:
        with one_thread():
            staying = pool.submit(stays)
            inside.wait()
            with one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        leave.set()
        assert staying.result() == 1
        assert pool.submit(torch.get_num_threads).result() == 3, "the thread that stayed, too"
    assert in_threads(lambda k: torch.get_num_threads()) == [3] * 4, "new threads begin with what is usual"

    def blocks(k):
        seen = set()
        for _ in range(200):
            with one_thread():
                seen.add(torch.get_num_threads())
        return seen, torch.get_num_threads()

    assert in_threads(blocks) == [({1}, 3)] * 4
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_several_may_look_at_one_network():
    model = Normalised().train()
    model.norm.eval()
    with in_inference_mode(model):
        with in_inference_mode(model):
            assert not any(module.training for module in model.modules())
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.children()] == [True, False, True]


def test_a_split_in_memory_is_what_it_was():
    split = Split(torch.zeros(3, 1, 2, 2).byte(), torch.tensor([0, 1, 0]))
    assert [len(batch) for batch in split.batches(2)] == [2, 1]
