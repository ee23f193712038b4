"""The checkers: each accepts what is right and answers plausible mistakes with the hint that helps.

That the chapters' own solutions pass is tested with the chapters, in tests/test_chapters.py.
"""

import numpy as np
import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.lab import check
from mergekit_lite.lab.exercises import Verdict, checking, exercise, exercises


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
]


@pytest.mark.parametrize(
    ("number", "answer", "hint"), ANSWERS, ids=lambda x: x if isinstance(x, str) else "" if callable(x) else "right"
)
def test_right_answers_pass_and_wrong_ones_get_a_hint(number, answer, hint, suite, monkeypatch):
    monkeypatch.setattr(checking, "pocket8", lambda: suite)
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
