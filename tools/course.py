"""Two versions of every chapter for a course, from the one source: ``make course``.

course/student/      without solutions and outputs
course/instructor/   with the solutions in the answer cells; runs from top to bottom, every check is right
"""

import copy
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

SOLUTION = re.compile(r":::\{solution\} (ex-[\d-]+)\n:class: dropdown\n(.*?)\n:::\n?", re.DOTALL)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
CHECK = re.compile(r'^check\("([\d.]+)", (\w+)\)$', re.MULTILINE)


def solutions(notebook: NotebookNode) -> dict[str, str]:
    """The solution's code by exercise number, such as "1.1.1"."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return {
        label.removeprefix("ex-").replace("-", "."): BLOCK.search(body)[1] for label, body in SOLUTION.findall(text)
    }


def student(chapter: NotebookNode) -> NotebookNode:
    """The chapter without solutions and outputs."""
    notebook = copy.deepcopy(chapter)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = SOLUTION.sub("", cell.source).strip()
        else:
            cell.outputs, cell.execution_count = [], None
    notebook.cells = [cell for cell in notebook.cells if cell.source]
    return notebook


def instructor(chapter: NotebookNode) -> NotebookNode:
    """The chapter with every ``answer = None`` replaced by the solution."""
    notebook, solved = copy.deepcopy(chapter), solutions(chapter)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        if "exercise" in cell.metadata.get("tags", []):
            number, answer = CHECK.search(cell.source).groups()
            cell.source = cell.source.replace(f"{answer} = None\n", solved[number])
    return notebook


def main(out: Path) -> None:
    for path in sorted(Path("notebooks").glob("*.ipynb")):
        chapter = nbformat.read(path, as_version=4)
        for version in (student, instructor):
            target = out / version.__name__ / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(version(chapter), target)
            print(f"wrote {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "course"))
