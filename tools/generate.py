"""Write what is made from the registry of methods: the README's table and the book's method index."""

import re
from pathlib import Path

import nbformat

import mergekit_lite as mkl

ROOT = Path(__file__).parent.parent
README, METHODS_PAGE, CHAPTERS = ROOT / "README.md", ROOT / "book/methods.md", ROOT / "notebooks"
ROLE = re.compile(r":math:`([^`]*)`")
TABLE = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.DOTALL)


def readme(text: str) -> str:
    return TABLE.sub(lambda found: found[1] + mkl.methods_table() + "\n" + found[2], text)


def chapters_with(name: str) -> str:
    """Links to the chapters whose code calls a method."""
    found = []
    for path in sorted(CHAPTERS.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        if any(re.search(rf"\bmkl\.{name}\b", cell.source) for cell in cells if cell.cell_type == "code"):
            found.append(f"{{doc}}`/notebooks/{path.stem}`")
    return f" Used in {', '.join(found)}." if found else ""


def methods_page() -> str:
    lines = ["# Methods", "", "Every method of the package, made from its registry.", "", mkl.methods_table()]
    for m in mkl.methods().values():
        source = "/".join(m.function.__module__.split(".")) + ".py"
        lines += [
            "",
            f"## {m.name}",
            "",
            f"`{m.call}`, in `{source}`.{chapters_with(m.call.removeprefix('mkl.'))}",
            "",
            ROLE.sub(r"$\1$", m.summary),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(readme(README.read_text()))
    METHODS_PAGE.write_text(methods_page())
