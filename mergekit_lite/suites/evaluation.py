"""What evaluations are: accuracies by task, and tables of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Evaluation(Mapping[str, float]):
    """Accuracy per task; a mapping from task names to shares of images classified correctly.

    Attributes:
        accuracy: per task, in [0, 1].
        experts: the accuracy of each task's own expert on the same images, where it is known.
        split: the images it was measured on.
    """

    accuracy: dict[str, float]
    experts: dict[str, float] = field(default_factory=dict)
    split: str = "test"

    def __getitem__(self, task: str) -> float:
        return self.accuracy[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self.accuracy)

    def __len__(self) -> int:
        return len(self.accuracy)

    @property
    def average(self) -> float:
        """The mean accuracy over the tasks (NaN without any)."""
        return sum(self.accuracy.values()) / len(self.accuracy) if self.accuracy else float("nan")

    @property
    def normalised(self) -> float:
        """The mean over the tasks of accuracy / the expert's accuracy (NaN where one is not known, or is zero)."""
        if not self.accuracy or not all(self.experts.get(task) for task in self.accuracy):
            return float("nan")
        return sum(self.accuracy[t] / self.experts[t] for t in self.accuracy) / len(self.accuracy)

    def to_frame(self) -> pd.DataFrame:
        """One row: a column per task, then the average and the normalised average."""
        return compare({self.split: self})

    def __repr__(self) -> str:
        if not self.accuracy:
            return f"{self.split}: no tasks"
        tasks = ", ".join(f"{task} {value:.3f}" for task, value in self.accuracy.items())
        return f"{self.split}: average {self.average:.3f} ({tasks})"

    def _repr_html_(self) -> str:
        shown = self.to_frame().style.format("{:.3f}", na_rep="", escape="html")
        for axis in (0, 1):  # names of splits and of tasks are text, whatever they contain
            shown = shown.format_index(escape="html", axis=axis)
        return str(shown.to_html())


def compare(evaluations: Mapping[str, Evaluation]) -> pd.DataFrame:
    """Evaluations as one table: a row each, a column per task, then average and normalised average."""
    import pandas as pd

    rows = {
        name: {**evaluation.accuracy, "average": evaluation.average, "normalised": evaluation.normalised}
        for name, evaluation in evaluations.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").dropna(axis="columns", how="all")
