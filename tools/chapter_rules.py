"""What every chapter is held to. Each rule is a function of a notebook; it yields what is wrong, in words.

python tools/chapter_rules.py notebooks/12_task_arithmetic.ipynb
"""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

NOTATION = Path(__file__).parent.parent / "book" / "notation.md"
WORDS = (2000, 3500)
CODE_LINES = 400
EXERCISES = 4

RULES: list[Callable[[NotebookNode], Iterator[str]]] = []

# LaTeX that is no symbol of ours: layout, operators, relations, accents.
LAYOUT = re.compile(
    r"\\(?:text|operatorname|mathrm|label|begin|end|tag)\{[^{}]*\}"
    r"|\\(?:exp|ln|log|max|min|cos|Pr|sim|mathbb\{E\}|mathbb\{R\}|dots)\b|\\mathbb\{[A-Z]\}"
)
DIFFERENTIAL = re.compile(r"\\(?:nabla|partial|underbrace|overset|frac|sum|sqrt)")
SYMBOL = re.compile(
    r"\\(alpha|beta|gamma|delta|epsilon|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|psi|omega)(?![A-Za-z])"
)
LETTER = re.compile(r"(?<![A-Za-z\\])([A-Za-z])(?![A-Za-z])")
MATH = re.compile(r"```\{math\}\n(.*?)```|\$([^$\n]+)\$", re.DOTALL)
CODE = re.compile(r"```python\n.*?```|(?<!`)`[^`\n]+`(?!`)", re.DOTALL)
LOCAL = re.compile(r"(?:/home/|/root/|/tmp/|/work/|/Users/|[A-Z]:\\\\)")
TIMING = re.compile(r"\d+(?:\.\d+)? ?(?:ms|µs|s|secs?|seconds|min|minutes)\b|\d ?it/s\b|\bWall time\b")


def rule(function: Callable[[NotebookNode], Iterator[str]]) -> Callable[[NotebookNode], Iterator[str]]:
    RULES.append(function)
    return function


def problems(notebook: NotebookNode) -> list[str]:
    return [f"{function.__name__}: {problem}" for function in RULES for problem in function(notebook)]


# ---------------------------------------------------------------- reading a notebook


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def tags(cell):
    return cell.metadata.get("tags", [])


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def sections(notebook):
    """(heading, code cells) of every section of the second level; the cells before the first have none."""
    found = [("", [])]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            found[-1][1].append(cell)
        else:
            found += [(heading, []) for heading in re.findall(r"^## (.+)$", cell.source, re.MULTILINE)]
    return found


def exercises(notebook):
    """(number, everything from one exercise's directive to the next) with the answer cell's code in place."""
    whole = "\n\n".join(cell.source for cell in notebook.cells).split("\n## Summary")[0]
    for part in whole.split(":::{exercise} ")[1:]:
        yield part.split()[0], part


# ---------------------------------------------------------------- the rules


@rule
def opening(notebook):
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not re.match(r"# \d\.\d \S", first.source):
        yield "the first cell is the title, with the chapter's number"
    for word in ("Objectives", "Prerequisites", "Time"):
        if f"**{word}.**" not in text(notebook).split("\n## ")[0]:
            yield f"no **{word}.** before the first section"
    time = re.search(r"\*\*Time\.\*\*.*", text(notebook))
    if time and not re.search(r"\d+ minutes?\b", time[0]):
        yield "the time is given in minutes"


@rule
def sections_in_order(notebook):
    wanted = ["The question", "Explore", "Where it fails", "Exercises", "Summary", "References"]
    there = [heading for heading, _ in sections(notebook) if heading in wanted]
    if there != wanted:
        yield f"the sections are {', '.join(wanted)}, in this order; there are {', '.join(there)}"


@rule
def package_is_installed_first(notebook):
    cells = code(notebook)
    if not cells or "%pip install" not in cells[0].source or "remove-cell" not in tags(cells[0]):
        yield "the first code cell installs the package where it is missing, and is tagged remove-cell"


@rule
def equations_are_numbered(notebook):
    words = text(notebook)
    displayed = re.findall(r"```\{math\}\n(.*?)```", words, re.DOTALL)
    labels = re.findall(r"^:label: (eq-\S+)$", words, re.MULTILINE)
    if "$$" in words or "\\[" in re.sub(r"\\\\\[", "", words.replace("\\Big[", "").replace("\\big[", "")):
        yield "displayed equations are written with the math directive"
    if not displayed or len(labels) < len(displayed):
        yield f"{len(displayed)} displayed equations, {len(labels)} labels"
    for label in labels:
        if f"{{eq}}`{label}`" not in words:
            yield f"{label} is never referred to"


@rule
def claims_have_asserts(notebook):
    for heading, cells in sections(notebook):
        if heading in ("", "Explore", "Exercises"):
            continue
        results = [
            cell
            for cell in cells
            if cell.outputs and not re.search(r"show_source|show_images|^(?:suite|tv)$", cell.source, re.MULTILINE)
        ]
        if results and not any("assert " in cell.source for cell in cells):
            yield f"'{heading}' shows results and asserts nothing"


@rule
def exercises_are_complete(notebook):
    there = list(exercises(notebook))
    if len(there) < EXERCISES:
        yield f"{len(there)} exercises, at least {EXERCISES} are needed"
    for number, part in there:
        label = f"ex-{number.replace('.', '-')}"
        for what, pattern in {
            "difficulty and minutes": r"^\*(?:Easy|Medium|Hard), \d+ minutes\.\*",
            "hint": r"^:::\{hint\}\n:class: dropdown$",
            "check": rf"^check\(\"{re.escape(number)}\", ",
            "hidden solution": rf"^:::\{{solution\}} {label}\n:class: dropdown\n```python\n",
            "label": rf"^:label: {label}$",
        }.items():
            if not re.search(pattern, part, re.MULTILINE):
                yield f"exercise {number} has no {what}"


@rule
def explorer_has_a_figure(notebook):
    cells = next((cells for heading, cells in sections(notebook) if heading == "Explore"), [])
    if not any("remove-output" in tags(cell) for cell in cells):
        yield "no explorer (a cell tagged remove-output)"
    if not any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs):
        yield "the explorer has no static figure beside it"


@rule
def images_have_alt_text(notebook):
    for cell in code(notebook):
        drawn = any("image/png" in output.get("data", {}) for output in cell.outputs)
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if drawn and len(alt.split()) < 5:
            yield f"no alt text that says what is to be seen: {cell.source[:50]!r}"
    if re.search(r"!\[\]\(", text(notebook)):
        yield "an image in the text without alt text"


@rule
def outputs_are_clean(notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield "not run once from top to bottom: make chapters"
    for output in outputs(notebook):
        if output.output_type == "error":
            yield f"an error: {output.ename}"
        if output.get("name") == "stderr":
            yield f"a warning: {output.text[:60]!r}"
        data = output.get("data", {})
        written = output.get("text", "") + data.get("text/plain", "") + data.get("text/html", "")
        if "<style>.output_html" in written:  # a method's source, not a result
            continue
        if LOCAL.search(written):
            yield f"an absolute path: {LOCAL.search(written)[0]}"
        if TIMING.search(re.sub(r"<[^>]*>", " ", written)):
            yield f"a timing: {TIMING.search(re.sub(r'<[^>]*>', ' ', written))[0]!r}"
    if "widgets" in notebook.metadata:
        yield "widget state: a page would need a script from a CDN to show it"


@rule
def length_is_right(notebook):
    words, lines = len(text(notebook).split()), sum(len(cell.source.splitlines()) for cell in code(notebook))
    if not WORDS[0] <= words <= WORDS[1]:
        yield f"{words} words, not {WORDS[0]} to {WORDS[1]}"
    if lines > CODE_LINES:
        yield f"{lines} lines of code, more than {CODE_LINES}"


@rule
def symbols_stand_in_the_notation_table(notebook):
    unknown = symbols(text(notebook)) - known_symbols()
    if unknown:
        yield f"not in book/notation.md: {', '.join(sorted(unknown))}"


@rule
def references_are_the_chapters_own(notebook):
    words = text(notebook)
    if "{cite}`" not in words and "{cite:t}`" not in words:
        yield "nothing is cited"
    if "```{bibliography}\n:filter: docname in docnames" not in words:
        yield "no bibliography directive at the end"


# ---------------------------------------------------------------- symbols


def symbols(words: str) -> set[str]:
    """Greek letters by name and Latin letters that stand alone, in all formulas of a text."""
    found: set[str] = set()
    for display, inline in MATH.findall(CODE.sub("", words)):
        formula = re.sub(r"^:label:.*$", "", display or inline, flags=re.MULTILINE)
        while (shorter := LAYOUT.sub(" ", formula)) != formula:
            formula = shorter
        formula = DIFFERENTIAL.sub(" ", formula)
        found |= set(SYMBOL.findall(formula))
        formula = re.sub(r"\\[A-Za-z]+", " ", formula)
        formula = re.sub(r"\^\{?\\?top\}?", " ", formula)
        found |= set(LETTER.findall(re.sub(r"_", " ", formula)))
    return found


def known_symbols() -> set[str]:
    """The symbols in the first column of the notation table."""
    rows = [line for line in NOTATION.read_text().splitlines() if line.startswith("| $")]
    return symbols("\n".join(row.split("|")[1] for row in rows))


if __name__ == "__main__":
    failed = False
    for name in sys.argv[1:] or sorted(map(str, Path("notebooks").glob("*.ipynb"))):
        for problem in problems(nbformat.read(name, as_version=4)):
            failed = True
            print(f"{name}: {problem}")
    sys.exit(failed)
