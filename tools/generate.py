"""Write what is made from the registry of methods: the README's table and the book's method index."""

import re
from pathlib import Path

import mergekit_lite as mkl

README, METHODS_PAGE = Path("README.md"), Path("book/methods.md")
ROLE = re.compile(r":math:`([^`]*)`")
TABLE = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.DOTALL)


def readme(text: str) -> str:
    return TABLE.sub(lambda found: found[1] + mkl.methods_table() + "\n" + found[2], text)


def methods_page() -> str:
    lines = ["# Methods", "", "Every method of the package, made from its registry.", "", mkl.methods_table()]
    for m in mkl.methods().values():
        source = "/".join(m.function.__module__.split(".")) + ".py"
        lines += ["", f"## {m.name}", "", f"`{m.call}`, in `{source}`.", "", ROLE.sub(r"$\1$", m.summary)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(readme(README.read_text()))
    METHODS_PAGE.write_text(methods_page())
