"""The exercises of the chapters: the solutions pass the checks, and doing nothing does not."""

import re
from pathlib import Path

import matplotlib as mpl
import nbformat
import pytest

from mergekit_lite import registry

mpl.use("agg")
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def exercises(notebook):
    """(title, check, solution) of every exercise."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for part in re.split(r"^### (?=Exercise)", text, flags=re.MULTILINE)[1:]:
        task, solution = part.split(":::{dropdown} Solution")
        yield part.splitlines()[0], BLOCK.search(task)[1], BLOCK.search(solution)[1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_solutions_pass_the_checks(path, monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    notebook = nbformat.read(path, as_version=4)
    names: dict[str, object] = {"__name__": "chapter"}
    for cell in notebook.cells:
        if cell.cell_type == "code" and "nbval-ignore-output" not in cell.metadata.get("tags", []):
            exec(cell.source, names)
    for title, check, solution in exercises(notebook):
        answered = dict(names)
        with pytest.raises((NameError, AssertionError)):
            exec(check, dict(names))  # nothing done yet
        exec(solution, answered)
        try:
            exec(check, answered)
        except AssertionError as problem:
            pytest.fail(f"{title}: the solution does not pass: {problem}")
