"""Run chapters in place and write them as they are committed: ``make chapters``, or with names of notebooks.

Outputs are stored, except those of cells tagged `remove-output` (explorers, which need a running kernel), and
without widget state or the running machine's versions. The figure of a cell tagged `picture-NAME` is also
written to book/images/NAME.png, for the README and the book's first page.
"""

import base64
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

IMAGES = Path("book/images")


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, record_timing=False)
    # Answering a slider's output widget can make nbclient miss the cell's reply and wait until the timeout.
    client.comm_open_handlers.clear()
    client.execute(cwd=str(path.parent))
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "remove-output" in tags:
            cell.outputs = []
        for name in (tag.removeprefix("picture-") for tag in tags if tag.startswith("picture-")):
            (IMAGES / f"{name}.png").write_bytes(base64.b64decode(cell.outputs[0].data["image/png"]))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    nbformat.write(notebook, path)
    print(f"ran {path}")


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in sys.argv[1:] or sorted(Path("notebooks").glob("*.ipynb")):
        run(Path(name))
