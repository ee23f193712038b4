"""What hyperparameters may be, and that methods name the one that is wrong."""

import inspect
import math

import numpy as np
import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite import checks


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int64(1), torch.tensor(1.0), torch.tensor([1])])
def test_numbers_of_all_kinds(value):
    assert checks.number("x", value) == checks.finite("x", value) == checks.positive("x", value) == 1.0
    assert isinstance(checks.not_negative("x", value), float)
    assert checks.count("x", value) == 1


@pytest.mark.parametrize("value", ["abc", "1", b"1", None, [1.0], (1,), {}, True, 1j, torch.zeros(2), np.zeros(2)])
@pytest.mark.parametrize("check", [checks.number, checks.finite, checks.not_negative, checks.positive, checks.count])
def test_what_is_no_number(check, value):
    with pytest.raises(TypeError, match="lambda must be a number, got "):
        check("lambda", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(value):
    for check in (checks.finite, checks.not_negative, checks.positive, checks.count):
        with pytest.raises(ValueError, match=r"lambda must be .*finite"):
            check("lambda", value)


def test_ranges():
    assert checks.not_negative("x", 0) == 0
    for check, value in ((checks.not_negative, -1e-9), (checks.positive, 0), (checks.count, -1)):
        with pytest.raises(ValueError, match="x must be"):
            check("x", value)
    assert checks.count("x", 3.0) == 3
    with pytest.raises(TypeError, match=r"x must be a whole number, got 1\.5"):
        checks.count("x", 1.5)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        checks.count("x", 0, least=1)


def test_flags():
    assert [checks.flag("x", value) for value in (True, False, 1, 0, np.True_)] == [True, False, True, False, True]
    for value in ("False", "", None, 2, 0.5):
        with pytest.raises(TypeError, match="x must be True or False"):
            checks.flag("x", value)


def test_several_numbers():
    assert checks.numbers("x", [1, 2]).tolist() == [1.0, 2.0]
    assert checks.numbers("x", torch.tensor(3)).dtype == torch.float64
    for value in ("abc", ["a"], None, [[1], [2, 3]], object()):
        with pytest.raises(TypeError, match="x must be a number or a list of numbers"):
            checks.numbers("x", value)


# ---------------------------------------------------------------- in the methods

WRONG = ["abc", math.nan, object()]
WORDS = {"granularity", "combine", "solver", "others"}


def hyperparameters():
    for name, method in mkl.methods(mkl.Need.WEIGHTS).items():
        for key, parameter in list(inspect.signature(method.function).parameters.items())[1:]:
            if parameter.kind is parameter.KEYWORD_ONLY and key not in {"merged", "where", "generator"}:
                yield name, key


@pytest.mark.parametrize(("name", "key"), list(hyperparameters()))
@pytest.mark.parametrize("wrong", WRONG, ids=["word", "nan", "object"])
def test_methods_name_the_hyperparameter_that_is_wrong(tv, name, key, wrong):
    required = {"a": 0, "b": 1, "c": 2} if name == "analogy" else {}
    chosen = tv[:2] if name in ("slerp", "linear_interpolation") else tv
    what = "task vector" if key in {"a", "b", "c", "forget"} else key
    with pytest.raises((ValueError, TypeError, LookupError), match=what):
        mkl.methods()[name].function(chosen, **required | {key: wrong})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tv: mkl.disentangle(tv, step="a"), "step must be a number"),
        (lambda tv: mkl.disentangle(tv, iterations=math.inf), "iterations must be finite"),
        (lambda tv: mkl.disentangle(tv, momentum=math.nan), "momentum must be finite"),
        (lambda tv: mkl.disentangle(tv, relative="no"), "relative must be True or False"),
        (lambda tv: mkl.disentangle(tv, squared="no"), "squared must be True or False"),
        (lambda tv: mkl.scale_by_depth(tv, shallow="a", deep=1), "shallow must be a number"),
        (lambda tv: mkl.drop_and_rescale(tv, "a"), "drop must be a number"),
        (lambda tv: mkl.dare(tv, generator=3), "generator must be a torch.Generator"),
        (lambda tv: mkl.trim(tv, None), "density must be a number"),
        (lambda tv: mkl.trim_tails(tv, 0.5, "a"), "outliers must be a number"),
        (lambda tv: mkl.regmean(tv, [{}] * 3, alpha="a"), "alpha must be a number"),
        (lambda tv: mkl.fisher(tv, [{}] * 3, floor="a"), "floor must be a number"),
        (lambda tv: mkl.mats(tv, [{}] * 3, iterations=1.5), "iterations must be a whole number"),
        (lambda tv: mkl.mats(tv, [{}] * 3, tolerance=None), "tolerance must be a number"),
        (lambda tv: mkl.Curvature({}) * "a", "a task's weight must be a number"),
        (lambda tv: mkl.Curvature({}).damped("a"), "damping must be a number"),
    ],
)
def test_other_functions_do_so_too(tv, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(tv)
