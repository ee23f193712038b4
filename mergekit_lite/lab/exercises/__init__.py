"""Exercises that answer: ``check("1.1.1", answer)`` says whether the answer is right, and if not, what to look at.

A checker is a function of the reader's answer, registered under its exercise's number. It raises `Wrong` with a
hint, or returns what is worth knowing once the answer is right::

    @exercise("1.1.1")
    def weighted_average(merged):
        if ...:
            raise Wrong("all tasks have the same weight.")
        return "mnist gains, the others pay."

``None`` stands for an answer that was not given yet, so that a chapter runs from top to bottom before its exercises
are done.
"""

from mergekit_lite.lab.exercises import part1, part2, part3, part4  # noqa: F401
from mergekit_lite.lab.exercises.checking import Verdict, Wrong, check, exercise, exercises

__all__ = ["Verdict", "Wrong", "check", "exercise", "exercises"]
