"""After a build: the merges that the chapters just ran, and where the book is."""

from pathlib import Path

import nbformat

BUILD = Path("book/_build")


def merges(notebook: Path) -> list[str]:
    """The text of the tables in the cells tagged `merges`."""
    tables = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "merges" in cell.metadata.get("tags", []):
            tables += [o.data["text/plain"] for o in cell.outputs if "text/plain" in o.get("data", {})]
    return tables


if __name__ == "__main__":
    for notebook in sorted((BUILD / "jupyter_execute").rglob("*.ipynb")):
        for table in merges(notebook):
            print(f"\n{notebook.stem}: accuracy on test images\n{table}")
    print(f"\nThe book is at {(BUILD / 'html' / 'index.html').resolve().as_uri()}")
