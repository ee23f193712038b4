"""Trying a method with many hyperparameters, on validation images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mergekit_lite.suites.suite import Suite

if TYPE_CHECKING:
    import pandas as pd


def sweep(
    suite: Suite,
    method: Callable[..., Mapping[str, Tensor]],
    *,
    split: str = "validation",
    jobs: int = 1,
    progress: bool = True,
    **grid: Iterable[Any],
) -> pd.DataFrame:
    """Merge a suite's experts with every combination of hyperparameters and evaluate each merge.

    Args:
        suite: with experts.
        method: a merging method, called as ``method(suite.task_vectors, **hyperparameters)``.
        split: the images to evaluate on. Choose on ``"validation"``; look at ``"test"`` once, at the end.
        jobs: processes to use; each runs on one thread.
        progress: show a progress bar.
        **grid: the values to try of each hyperparameter, such as ``scale=[0.1, 0.2, 0.3]``.

    Returns:
        One row per combination: the hyperparameters, the accuracy per task, and the average.

    Raises:
        ValueError: a hyperparameter has no values.
    """
    import pandas as pd
    from joblib import Parallel, delayed
    from tqdm.auto import tqdm

    values = {name: list(choices) for name, choices in grid.items()}
    empty = [name for name, choices in values.items() if not choices]
    if empty:
        raise ValueError(f"no values to try for '{empty[0]}'.")
    combinations = [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]

    def try_one(hyperparameters: dict[str, Any]) -> dict[str, Any]:
        evaluation = suite.evaluate(method(suite.task_vectors, **hyperparameters), split=split)
        return {**hyperparameters, **evaluation.accuracy, "average": evaluation.average}

    results = Parallel(n_jobs=jobs, return_as="generator")(delayed(try_one)(c) for c in combinations)
    name = getattr(method, "__name__", "merge")
    return pd.DataFrame(list(tqdm(results, total=len(combinations), desc=name, disable=None if progress else True)))


def best(table: pd.DataFrame, names: Iterable[str], by: str = "average") -> dict[str, Any]:
    """The hyperparameters `names` of the best row of a sweep; the first one, if several are equally good."""
    row = table.loc[[table[by].idxmax()]].to_dict("records")[0]  # as Python numbers, not numpy's
    return {name: row[name] for name in names}
