"""The chapters: their exercises can be solved, their versions are complete, and every rule catches what it is for."""

import ast
import copy

import matplotlib as mpl
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from mergekit_lite import registry
from mergekit_lite.lab.exercises import exercises
from tests.test_repository import NOTEBOOKS, ROOT, tool

mpl.use("agg")
rules, course = tool("chapter_rules"), tool("course")


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def chapter():
    """A good chapter, to be spoilt."""
    return read(ROOT / "notebooks" / "12_task_arithmetic.ipynb")


# ---------------------------------------------------------------- exercises


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_instructors_version_solves_every_exercise(path, monkeypatch):
    """All cells in order, drawings left out, with the solutions in the answer cells."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    names: dict[str, object] = {"__name__": "chapter"}
    verdicts = []
    for cell in course.instructor(read(path)).cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or "nbval-ignore-output" in tags:
            continue
        tree = ast.parse(TransformerManager().transform_cell(cell.source))
        if "exercise" in tags:
            *body, last = tree.body
            exec(compile(ast.Module(body, []), path.stem, "exec"), names)
            verdicts.append(eval(compile(ast.Expression(last.value), path.stem, "eval"), names))
        else:
            exec(compile(tree, path.stem, "exec"), names)
    assert len(verdicts) >= rules.EXERCISES
    assert all(verdicts), [verdict for verdict in verdicts if not verdict]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_exercise_has_a_checker_and_starts_unanswered(path):
    part, number = path.stem[0], path.stem[1]
    there = [name for name, _ in rules.exercises(read(path))]
    assert there == [name for name in exercises() if name.startswith(f"{part}.{number}.")]
    answered = [o.data["text/plain"] for o in rules.outputs(read(path)) if "Exercise" in str(o.get("data", ""))]
    assert answered == [f"Exercise {name}: not answered yet." for name in there]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_students_see_the_tasks_and_hints_but_no_solution(path):
    whole, students = read(path), course.student(read(path))
    text = rules.text(students)
    assert "{solution}" not in text
    assert len(course.solutions(whole)) == text.count(":::{exercise}") == text.count(":::{hint}")
    for solution in course.solutions(whole).values():
        assert solution not in text
    assert [c.source for c in rules.code(students)] == [c.source for c in rules.code(whole)]
    assert not rules.outputs(students)
    nbformat.validate(students)


def test_both_versions_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    course.main(tmp_path)
    for version in ("student", "instructor"):
        assert sorted(p.name for p in (tmp_path / version).iterdir()) == [p.name for p in NOTEBOOKS]


# ---------------------------------------------------------------- the rules


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_chapters_keep_the_rules(path):
    assert rules.problems(read(path)) == []


def in_text(old, new):
    """Spoil a chapter by replacing some text; the text must be there."""

    def spoil(notebook):
        cells = [c for c in notebook.cells if c.cell_type == "markdown" and old in c.source]
        assert cells, f"the chapter has no {old!r}"
        for cell in cells:
            cell.source = cell.source.replace(old, new)

    return spoil


def add_text(text):
    def spoil(notebook):
        notebook.cells[2].source += "\n\n" + text

    return spoil


def with_output(**output):
    def spoil(notebook):
        cell = next(c for c in rules.code(notebook) if "assert" in c.source)
        cell.outputs = [nbformat.v4.new_output(**output)]

    return spoil


def stdout(text):
    return with_output(output_type="stream", name="stdout", text=text)


def without_asserts(notebook):
    for cell in rules.code(notebook):
        cell.source = cell.source.replace("assert ", "print ")


def drop_alt_text(notebook):
    next(c for c in rules.code(notebook) if "mystnb" in c.metadata).metadata.pop("mystnb")


def drop_first_code_cell(notebook):
    notebook.cells.remove(rules.code(notebook)[0])


def drop_explorer(notebook):
    notebook.cells = [c for c in notebook.cells if "remove-output" not in rules.tags(c)]


def run_twice(notebook):
    rules.code(notebook)[3].execution_count = 99


def drop_two_exercises(notebook):
    for number in ("1.2.1", "1.2.2"):
        in_text(":::{exercise} " + number, ":::{note} " + number)(notebook)


def endless_code(notebook):
    rules.code(notebook)[-1].source += "\nx = 1" * 400


def widget_state(notebook):
    notebook.metadata["widgets"] = {"state": {}}


SPOILT = {
    "opening: no **Objectives.**": in_text("**Objectives.**", "Objectives."),
    "opening: no **Prerequisites.**": in_text("**Prerequisites.**", "You need"),
    "opening: the time is given in minutes": in_text("1 minute to run", "a moment to run"),
    "opening: the first cell is the title": lambda n: n.cells.insert(0, nbformat.v4.new_code_cell("1")),
    "sections_in_order": in_text("## Where it fails", "## Odds and ends"),
    "sections_in_order: the sections are The question": in_text("## Summary", "## In short"),
    "package_is_installed_first": drop_first_code_cell,
    "equations_are_numbered: displayed equations": add_text("$$\n\\lambda = 1\n$$"),
    "equations_are_numbered: 5 displayed": add_text("```{math}\n\\lambda = 1\n```"),
    "equations_are_numbered: eq-lonely": add_text("```{math}\n:label: eq-lonely\n\\lambda = 1\n```"),
    "claims_have_asserts": without_asserts,
    "exercises_are_complete: 2 exercises": drop_two_exercises,
    "exercises_are_complete: exercise 1.2.1 has no difficulty": in_text("*Easy, 10 minutes.*", "Easy."),
    "exercises_are_complete: exercise 1.2.1 has no hint": in_text(":::{hint}", ":::{note}"),
    "exercises_are_complete: exercise 1.2.3 has no hidden solution": in_text(
        ":::{solution} ex-1-2-3\n:class: dropdown", ":::{solution} ex-1-2-3"
    ),
    "exercises_are_complete: exercise 1.2.4 has no label": in_text(":label: ex-1-2-4", ":label: exercise-four"),
    "explorer_has_a_figure: no explorer": drop_explorer,
    "images_have_alt_text": drop_alt_text,
    "images_have_alt_text: an image in the text": add_text("![](images/x.png)"),
    "outputs_are_clean: not run once": run_twice,
    "outputs_are_clean: an error": with_output(output_type="error", ename="ValueError", evalue="", traceback=[]),
    "outputs_are_clean: a warning": with_output(output_type="stream", name="stderr", text="UserWarning: careful"),
    "outputs_are_clean: an absolute path": stdout("saved /home/reader/merged.safetensors"),
    "outputs_are_clean: a timing": stdout("merged in 3.2 s"),
    "outputs_are_clean: widget state": widget_state,
    "length_is_right: ": add_text("word " * 3500),
    "length_is_right": endless_code,
    "symbols_stand_in_the_notation_table: not in book/notation.md: N": add_text("Let $N_{ij}$ be new."),
    "symbols_stand_in_the_notation_table: not in book/notation.md: omega": add_text("Let $\\omega$ be new."),
    "references_are_the_chapters_own: no bibliography": in_text("```{bibliography}", "```{note}"),
    "references_are_the_chapters_own: nothing is cited": in_text("{cite}`", "`"),
}


@pytest.mark.parametrize("complaint", SPOILT)
def test_a_bad_chapter_is_caught(complaint, chapter, tmp_path):
    bad = copy.deepcopy(chapter)
    SPOILT[complaint](bad)
    nbformat.write(bad, tmp_path / "12_bad.ipynb")
    found = rules.problems(read(tmp_path / "12_bad.ipynb"))
    assert any(problem.startswith(complaint) for problem in found), found


def test_there_is_a_bad_chapter_for_every_rule():
    assert {name.split(":")[0] for name in SPOILT} == {rule.__name__ for rule in rules.RULES}


def test_symbols_are_read_from_formulas():
    assert rules.symbols(r"$\theta_k = \theta_0 + \tau_k$ and `$x$` and price") == {"theta", "tau", "k"}
    assert rules.symbols("```{math}\n:label: eq-a\n\\sum_{j=1}^{K} \\text{no} \\ln m\n```") == {"j", "K", "m"}
    assert rules.symbols("```python\ny = '$z$'\n```") == set()


def test_names_in_the_notation_table_exist(suite):
    """The code column names what one can type: attributes of tv and suite, or things of the package."""
    import re

    from mergekit_lite import geometry
    from mergekit_lite.linearization import Linearized

    names = {"tv": suite.task_vectors, "suite": suite, "geometry": geometry, "Linearized": Linearized, "len": len}
    rows = [line.split("|") for line in (ROOT / "book" / "notation.md").read_text().splitlines() if "| $" in line[:4]]
    typed = [name for row in rows for name in re.findall(r"`((?:tv|suite|geometry|Linearized)\.\w+)", row[3])]
    assert len(typed) > 8
    for name in typed:
        assert eval(name, names) is not None
