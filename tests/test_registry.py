import pytest

import mergekit_lite as mkl
from mergekit_lite import registry


def test_every_exported_method_is_recorded_with_its_source():
    recorded = mkl.methods()
    assert {"average", "task_arithmetic", "negation", "analogy", "linear_interpolation", "slerp"} <= set(recorded)
    for name, method in recorded.items():
        assert getattr(mkl, name) is method.function
        assert method.summary
        assert 1900 < method.year < 2100
        assert method.url.startswith("https://arxiv.org/abs/") or name in ("slerp", "karcher")


def test_methods_can_be_asked_for_by_need():
    by_need = [set(mkl.methods(need)) for need in mkl.Need]
    assert set.union(*by_need) == set(mkl.methods())
    assert sum(map(len, by_need)) == len(mkl.methods())
    assert set(mkl.methods(mkl.Need.CALIBRATION)) == {"fisher", "regmean", "regmean_plus_plus", "mats"}
    assert set(mkl.methods(mkl.Need.TEST_INPUTS)) == {"adamerging", "concrete", "wemoe"}
    assert list(mkl.methods(mkl.Need.TEST_INPUTS)) == ["concrete", "adamerging", "wemoe"], "by year"
    assert mkl.methods(mkl.Need.ADAPTERS) == {}


def test_methods_with_a_model_per_task_say_so(tv):
    per_task = {name for name, method in mkl.methods().items() if method.per_task}
    assert per_task == {"emr", "tall_masks"}
    for name in per_task:
        assert isinstance(getattr(mkl, name)(tv), mkl.TaskConditioned)
    assert "| `mkl.emr` | EMR-Merging | weights only; to use it, the task of each input |" in mkl.methods_table()


def test_a_method_of_ones_own_can_be_recorded_and_recorded_again(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    for _ in range(2):  # a notebook cell that is run twice

        @mkl.method(name="Mine", paper="me", year=2026, need=mkl.Need.WEIGHTS)
        def mine(tv):
            """Mine."""

    assert mkl.methods()["mine"].url == ""
    assert "| `mkl.mine` | Mine | weights only | me, 2026 |" in mkl.methods_table()


def test_two_methods_of_one_name_are_refused(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    with pytest.raises(ValueError, match="'ties' is already registered by mergekit_lite"):

        @mkl.method(name="TIES", paper="me", year=2026, need=mkl.Need.WEIGHTS)
        def ties(tv):
            """Another one."""
