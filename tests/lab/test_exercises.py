"""The checkers: each accepts what is right and answers plausible mistakes with the hint that helps.

That the chapters' own solutions pass is tested with the chapters, in tests/test_chapters.py.
"""

import numpy as np
import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.awd_solvers import objective
from mergekit_lite.geometry import cosines, rows_of, slopes
from mergekit_lite.lab import check
from mergekit_lite.lab.exercises import Verdict, checking, exercise, exercises, part1, part2


def weighted(tv, heavy, weight=3.0):
    return mkl.average(tv, weights=[weight if name == heavy else 1.0 for name in tv.names])


def merged_with(tv, fashion):
    return mkl.task_arithmetic(tv, scale=[fashion if name == "fashion" else 0.2 for name in tv.names])


def forgot(tv, mnist, photo_digits):
    return mkl.task_arithmetic(tv.subset(["mnist", "photo_digits"]), scale=[-mnist, -photo_digits])


def ratio(tv):
    gram = tv.gram()
    return float(gram.sum() / gram.trace())


def median_by(what):
    return lambda tv, scale=1.0: tv.map(lambda name, taus: what(taus, scale))


def binomial(p, images, candidates):
    return np.random.default_rng(1).binomial(images, p, (4000, candidates)) / images


def moved(tv, change):
    """The base moved by a changed task vector of icon_family."""
    return tv["icon_family"].map(lambda name, taus: change(taus[0]))


def dip(curve):
    line = np.linspace(curve[0], curve[-1], len(curve))
    return (line - np.array(curve)).max()


def chance(d, tasks):
    x = torch.randn(200, tasks, d, generator=torch.Generator().manual_seed(5))
    x = x / x.norm(dim=-1, keepdim=True)
    return (x @ x.transpose(1, 2) - torch.eye(tasks)).abs()


def pairs(tv):
    return cosines(tv)[~torch.eye(len(tv), dtype=torch.bool)]


def first_order(own=False, at_base=False, factor=1.0):
    """What the first order predicts for a merge, and ways to get it wrong."""

    def predicted(suite, task, scale):
        tv = suite.task_vectors
        i = tv.names.index(task)
        state = None if at_base else mkl.task_arithmetic(tv[i], scale=scale)
        along = slopes(tv, suite.gradient(state, task))
        return factor * scale * (along.sum() - (0 if own else along[i])).item()

    return predicted


def slope_at_zero(tv):
    """The gradient of L_O at δ = 0: the length of its coefficients, and its own."""
    gram = tv.gram()
    zero = torch.zeros(len(gram)).double()
    b = objective(torch.eye(len(gram)).double(), gram, zero, alpha=0.0).gradient
    return b.norm().item(), (b @ gram @ b).sqrt().item()


def shortened(change):
    """Row by row, the sum of the task vectors times a function of Σ ‖τ‖² / ‖Σ τ‖²."""

    def method(tv, scale=1.0):
        def merge(name, taus):
            rows = rows_of(taus)
            ratio = rows.square().sum((0, 2)) / rows.sum(0).square().sum(1)
            return (scale * change(ratio)[:, None] * rows.sum(0)).view(taus.shape[1:])

        return tv.map(merge)

    return method


# (exercise, an answer made from the task vectors, what the hint says); None where the answer is right.
ANSWERS = [
    ("1.1.1", lambda tv: weighted(tv, "mnist"), None),
    ("1.1.1", mkl.average, "this is the plain average"),
    ("1.1.1", lambda tv: weighted(tv, "fashion"), "went to fashion"),
    ("1.1.1", lambda tv: weighted(tv, "mnist", 4.0), "weight 1, all of them"),
    ("1.1.1", lambda tv: 0.5, "expected a state dict"),
    ("1.1.1", lambda tv: {"w": torch.zeros(1)}, "another network"),
    ("1.1.2", lambda tv: 0.7, None),
    ("1.1.2", lambda tv: 0.2, "best λ for eight tasks"),
    ("1.1.2", lambda tv: 2.0, "beyond 1"),
    ("1.1.2", lambda tv: "large", "expected a scale, a number; got str"),
    ("1.1.3", lambda tv: ratio(tv) ** 0.5, None),
    ("1.1.3", ratio, "squared lengths"),
    ("1.1.3", lambda tv: 1.0, "only the diagonal remains"),
    ("1.1.4", lambda tv: median_by(lambda taus, scale: scale * taus.quantile(0.5, dim=0)), None),
    ("1.1.4", lambda tv: median_by(lambda taus, scale: scale * taus.median(0).values), "the lower of the two middle"),
    ("1.1.4", lambda tv: median_by(lambda taus, scale: scale * taus.mean(0)), "the mean, not the median"),
    ("1.1.4", lambda tv: median_by(lambda taus, scale: taus.quantile(0.5, dim=0)), "no effect"),
    ("1.1.4", lambda tv: median_by(lambda taus, scale: scale * taus.median(1).values), "could not be used"),
    ("1.1.4", lambda tv: median_by(lambda taus, scale: scale * taus.quantile(0.5).expand(taus.shape[1:])), "axis 0"),
    ("1.1.4", lambda tv: mkl.average(tv), "the function itself"),
    ("1.2.1", lambda tv: merged_with(tv, 0.0), None),
    ("1.2.1", lambda tv: merged_with(tv, 0.2), "still in it"),
    ("1.2.1", lambda tv: merged_with(tv, -0.8), "only 0.2 of it"),
    ("1.2.1", lambda tv: merged_with(tv, 0.4), "the sign"),
    ("1.2.1", lambda tv: mkl.average(tv), "and nothing else"),
    ("1.2.2", lambda tv: forgot(tv, 0.2, 0.1), None),
    ("1.2.2", lambda tv: forgot(tv, -0.2, -0.1), "not along them"),
    ("1.2.2", lambda tv: forgot(tv, 0.01, 0.0), "10 are asked for"),
    ("1.2.2", lambda tv: forgot(tv, 1.0, 1.0), "smaller scales"),
    ("1.2.3", lambda tv: lambda p, n, m: binomial(p, n, m).max(1).mean() - p, None),
    ("1.2.3", lambda tv: lambda p, n, m: binomial(p, n, m).max(1).mean(), "subtract the true accuracy"),
    ("1.2.3", lambda tv: lambda p, n, m: binomial(p, n, m).mean() - p, "take the best"),
    ("1.2.3", lambda tv: lambda p, n, m: n * (binomial(p, n, m).max(1).mean() - p), "share of the images"),
    ("1.2.3", lambda tv: lambda p, n, m: (p * (1 - p) / n * 2 * np.log(m)) ** 0.5, "should be near"),
    ("1.2.4", lambda tv: [0.2] * 8, "from the common λ = 0.2"),
    ("1.2.4", lambda tv: [0.2] * 7, "expected 8, got 7"),
    ("1.2.4", lambda tv: 0.2, "could not be used"),
    ("1.3.1", lambda tv: dip, None),
    ("1.3.1", lambda tv: lambda curve: max(curve) - min(curve), "has no barrier"),
    ("1.3.1", lambda tv: lambda curve: max(0, (curve[0] + curve[-1]) / 2 - min(curve)), "has no barrier"),
    ("1.3.1", lambda tv: lambda curve: curve[0] - curve[-1], "a barrier of 0.4"),
    ("1.3.2", lambda tv: lambda f0, f1, f2, a, b: f0 + a * (f1 - f0) + b * (f2 - f0), None),
    ("1.3.2", lambda tv: lambda f0, f1, f2, a, b: a * f1 + b * f2, "subtract the base's outputs"),
    ("1.3.2", lambda tv: lambda f0, f1, f2, a, b: a * (f1 - f0) + b * (f2 - f0), "the change only"),
    ("1.3.3", lambda tv: moved(tv, lambda tau: tau.flatten().flip(0).view_as(tau)), None),
    ("1.3.3", lambda tv: moved(tv, lambda tau: tau), "this is the expert"),
    ("1.3.3", lambda tv: moved(tv, lambda tau: torch.full_like(tau, tau.mean().item())), "shuffle τ"),
    ("1.3.4", lambda tv: 0.9, "expected about 0.4"),
    ("1.3.4", lambda tv: 47, "between 0 and 1"),
    ("2.1.1", lambda tv: lambda d, K: chance(d, K).amax((1, 2)).mean().item(), None),
    (
        "2.1.1",
        lambda tv: lambda d, K: chance(d, K).sum((1, 2)).mean().item() / (K * (K - 1)),
        "the largest of each draw",
    ),
    ("2.1.1", lambda tv: lambda d, K: 1 / d, "should be near"),
    ("2.1.2", lambda tv: 0.7071, None),
    ("2.1.2", lambda tv: 0.25, "solve arccos"),
    ("2.1.3", lambda tv: 1 / pairs(tv).square().mean().item(), None),
    ("2.1.3", lambda tv: 1 / pairs(tv).mean().item() ** 2, "the mean of the squares"),
    ("2.1.3", lambda tv: tv.dimension, "invert it"),
    ("2.1.4", lambda tv: first_order(), None),
    ("2.1.4", lambda tv: first_order(own=True), "it does not count"),
    ("2.1.4", lambda tv: first_order(at_base=True), "gradient at the base"),
    ("2.1.4", lambda tv: first_order(factor=5.0), "multiply by the scale"),
    ("2.1.4", lambda tv: first_order(factor=-1.0), "it should be"),
    ("2.2.1", lambda tv: lambda c, scale: scale * (1 - len(c) * c), None),
    ("2.2.1", lambda tv: lambda c, scale: scale * (1 - c), "counts K times"),
    ("2.2.1", lambda tv: lambda c, scale: 1 - len(c) * c, "λ is missing"),
    ("2.2.1", lambda tv: lambda c, scale: scale - c, "collect what stands"),
    ("2.2.2", lambda tv: lambda G, c: (torch.eye(5) - c).double() @ G @ (torch.eye(5) - c).double().T, None),
    ("2.2.2", lambda tv: lambda G, c: G - (G @ c)[:, None] - (G @ c)[None], "the last term is missing"),
    ("2.2.2", lambda tv: lambda G, c: G - c @ G @ c, "two mixed terms"),
    ("2.2.2", lambda tv: lambda G, c: G, "four inner products"),
    ("2.2.2", lambda tv: lambda G, c: G @ c, "a K x K matrix"),
    ("2.2.3", lambda tv: slope_at_zero(tv)[1], None),
    ("2.2.3", lambda tv: slope_at_zero(tv)[0], "the length of the coefficients"),
    ("2.2.3", lambda tv: slope_at_zero(tv)[1] ** 2, "the squared length"),
    ("2.2.3", lambda tv: 3.0, "per unit of length"),
    ("2.2.4", lambda tv: shortened(lambda ratio: ratio.sqrt().clamp(max=1)), None),
    ("2.2.4", lambda tv: mkl.task_arithmetic, "plain task arithmetic"),
    ("2.2.4", lambda tv: shortened(lambda ratio: ratio.sqrt()), "only shorten"),
    ("2.2.4", lambda tv: shortened(lambda ratio: ratio.clamp(max=1)), "take its square root"),
    ("2.2.4", lambda tv: shortened(lambda ratio: ratio.sqrt().clamp(max=0.5)), "row by row"),
    ("2.3.1", lambda tv: lambda G: G.diagonal() / G.trace(), None),
    ("2.3.1", lambda tv: lambda G: G.diagonal().sqrt() / G.diagonal().sqrt().sum(), "the squared lengths"),
    ("2.3.1", lambda tv: lambda G: G.diagonal() / G.sum(), "the trace"),
    ("2.3.1", lambda tv: lambda G: torch.ones(3) / 3, "the diagonal of the Gram matrix"),
    ("2.3.2", lambda tv: 8, None),
    ("2.3.2", lambda tv: 2, "its scale grows"),
    ("2.3.2", lambda tv: 4, "the vector is twice as long"),
    ("2.3.2", lambda tv: 16, "proportional"),
    ("2.3.3", lambda tv: lambda v, t: (t.square().sum(1) * (v - t).square().sum(1)).sum(), None),
    ("2.3.3", lambda tv: lambda v, t: (v - t).square().sum(), "are weighted"),
    ("2.3.3", lambda tv: lambda v, t: (t.norm(dim=1) * (v - t).norm(dim=1)).sum(), "both lengths are squared"),
    ("2.3.3", lambda tv: lambda v, t: t.square().sum(1) * (v - t).square().sum(1), "one number"),
    ("2.3.3", lambda tv: lambda v, t: v.sum(), "Σ_i"),
    ("2.3.4", lambda tv: mkl.task_arithmetic(tv.subset(["fashion", "letters", "icon_family"]), scale=0.35), None),
    ("2.3.4", lambda tv: dict(tv.base), "Give all task vectors the same length"),
]


@pytest.mark.parametrize(
    ("number", "answer", "hint"), ANSWERS, ids=lambda x: x if isinstance(x, str) else "" if callable(x) else "right"
)
def test_right_answers_pass_and_wrong_ones_get_a_hint(number, answer, hint, suite, monkeypatch):
    for module in (checking, part1, part2):
        monkeypatch.setattr(module, "pocket8", lambda: suite)
    verdict = check(number, answer(suite.task_vectors))
    assert bool(verdict) == (hint is None), verdict
    assert (hint or "right") in repr(verdict)


def test_every_exercise_is_tried_with_a_wrong_answer():
    assert {number for number, _, hint in ANSWERS if hint} == set(exercises())


def test_an_open_exercise_is_no_error():
    for number in exercises():
        verdict = check(number, None)
        assert not verdict
        assert repr(verdict) == f"Exercise {number}: not answered yet."


def test_an_answer_that_fails_gets_a_verdict():
    def broken(tv, scale):
        raise RuntimeError("I don't work")

    assert "could not be used (RuntimeError: I don't work)" in repr(check("1.1.4", broken))


def test_exercises_that_do_not_exist_are_said():
    with pytest.raises(KeyError, match=r"no exercise '9\.9\.9'; there are 1\.1\.1"):
        check("9.9.9", 1)
    with pytest.raises(ValueError, match="has a checker already"):
        exercise("1.1.1")(lambda answer: "")


def test_a_verdict_is_shown_in_colour_and_escaped():
    shown = Verdict("1.1.1", "wrong", "a < b")._repr_html_()
    assert "a &lt; b" in shown
    assert "not yet" in shown
    assert shown != Verdict("1.1.1", "right", "a < b")._repr_html_()
