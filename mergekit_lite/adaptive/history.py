"""What was seen while a merge was adapted: a table with a row per step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(repr=False)
class History:
    """Numbers by quantity (such as ``"loss"``), by step and by name (such as a task's).

    Step n is the merge after n updates. Its losses are those of the images that the next update was made from: a
    sample, another one at every step. So the last step, which no update follows, has none.

    Attributes:
        steps: how many updates were made.
        seen: ``seen[quantity][step][name]``; not every quantity is seen at every step.
    """

    steps: int = 0
    seen: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)

    def add(self, quantity: str, step: int, values: Mapping[str, float]) -> None:
        """Keep some numbers of one step."""
        self.seen.setdefault(quantity, {})[step] = dict(values)

    @property
    def quantities(self) -> list[str]:
        """Of which quantities something was seen."""
        return [quantity for quantity, by_step in self.seen.items() if by_step]

    def average(self, quantity: str) -> dict[int, float]:
        """The mean over all names, by step; empty, if nothing of this quantity was seen."""
        return {step: sum(values.values()) / len(values) for step, values in self.seen.get(quantity, {}).items()}

    def to_frame(self) -> pd.DataFrame:
        """A row per step; columns ``(quantity, name)`` and ``(quantity, "average")``; NaN where nothing was seen.

        So ``history.to_frame()["accuracy"].dropna()`` is a table of accuracies.
        """
        import pandas as pd

        columns = {}
        for quantity in self.quantities:
            by_step = self.seen[quantity]
            for name in dict.fromkeys(name for values in by_step.values() for name in values):
                columns[quantity, name] = pd.Series({step: v[name] for step, v in by_step.items() if name in v})
            columns[quantity, "average"] = pd.Series(self.average(quantity))
        frame = pd.DataFrame(columns).sort_index()
        frame.columns = pd.MultiIndex.from_tuples(frame.columns, names=["quantity", "name"])
        return frame.rename_axis(index="step")

    def plot(self) -> Figure:
        """A picture per quantity, against the steps: thin lines for the names, a thick one for their average."""
        import matplotlib.pyplot as plt

        frame = self.to_frame()
        count = len(self.quantities)
        figure, axes = plt.subplots(1, count, figsize=(4 * count, 3.2), squeeze=False)
        for axis, quantity in zip(axes[0], self.quantities, strict=True):
            table = frame[quantity].dropna(how="all")
            for name in table.columns.drop("average"):
                axis.plot(table.index, table[name], lw=1, alpha=0.6, label=name)
            axis.plot(table.index, table["average"], lw=2.5, color="black", label="average")
            axis.set(xlabel="step", ylabel="loss (nats)" if quantity == "loss" else quantity)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, -1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()
        return figure

    def __repr__(self) -> str:
        ways = []
        for quantity in self.quantities:
            values = self.average(quantity)
            ways.append(f"{quantity} {values[min(values)]:.3f} to {values[max(values)]:.3f}")
        return f"History({'; '.join([f'{self.steps} steps', *ways])})"
