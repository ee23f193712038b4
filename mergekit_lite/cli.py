"""The command line: ``mergekit-lite methods`` and ``mergekit-lite merge ties base.safetensors a.safetensors ...``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_lite.calibrated import Curvature
from mergekit_lite.command_values import read_value
from mergekit_lite.file_merging import merge_files
from mergekit_lite.registry import Method
from mergekit_lite.registry import methods as registered

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Merge fine-tuned checkpoints.")

CURVATURES = ("fishers", "grams", "curvatures")  # parameters that --curvature fills


@app.command()
def methods() -> None:
    """List the merging methods and their hyperparameters."""
    for name, method in registered().items():
        options = [f"{p.name}={p.default}" for p in _parameters(method) if p.default is not p.empty]
        typer.echo(f"{name:22} {method.name}, {method.year}; {', '.join(options)}")


@app.command()
def merge(
    method: Annotated[str, typer.Argument(help="a name from `mergekit-lite methods`")],
    base: Annotated[
        Path, typer.Argument(help="the common ancestor: a file, or a folder with a checkpoint or its shards")
    ],
    experts: Annotated[list[Path], typer.Argument(help="the fine-tuned checkpoints")],
    out: Annotated[
        Path, typer.Option(help="where to write the merge: a .safetensors file, or a new folder for shards")
    ] = Path("merged.safetensors"),
    curvature: Annotated[
        list[Path] | None,
        typer.Option(help="per expert, in order: a file of Curvature.save, for fisher, regmean, mats"),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a hyperparameter, such as scale=0.3")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="write shards of at most this size, such as 5GB")] = None,
    entry: Annotated[
        str | None, typer.Option(help="the state dict to take where files hold several, such as model_ema")
    ] = None,
    traceback: Annotated[bool, typer.Option(help="show where in the code an error came up")] = False,
) -> None:
    """Merge checkpoint files into one, tensor by tensor."""
    if method not in registered():
        raise typer.BadParameter(f"no method named '{method}'; there are {', '.join(registered())}.")
    chosen = registered()[method]
    hyperparameters = dict(_assigned(chosen, text) for text in set_ or [])
    needed = [p.name for p in _parameters(chosen) if p.default is p.empty and p.name not in hyperparameters]
    if needed and needed[0] not in CURVATURES:
        raise typer.BadParameter(f"{method} needs '{needed[0]}'; set it, or call {chosen.call} in Python.")
    if bool(needed) != bool(curvature):
        raise typer.BadParameter(f"{method} needs {'' if needed else 'no '}--curvature files.")
    try:
        given = {name: [Curvature.load(path) for path in curvature or []] for name in needed}
        merge_files(
            chosen.function, base, experts, out, max_shard_size=max_shard_size, entry=entry, **hyperparameters, **given
        )
    except Exception as problem:  # a command line answers in one line, whatever was wrong
        if traceback:
            raise
        typer.echo(f"not merged: {_in_words(problem)}", err=True)
        raise typer.Exit(1) from problem
    typer.echo(f"wrote {out}")


def _parameters(method: Method) -> list[inspect.Parameter]:
    """A method's parameters behind the task vectors, without a catch-all."""
    parameters = list(inspect.signature(method.function).parameters.values())[1:]
    return [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _assigned(method: Method, assignment: str) -> tuple[str, Any]:
    """``scale=0.3`` as ("scale", 0.3), the value as the method's signature says."""
    name, equals, text = assignment.partition("=")
    if not equals:
        raise typer.BadParameter(f"'{assignment}' is not of the form name=value.")
    known = {p.name: p for p in _parameters(method)}
    takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(method.function).parameters.values())
    if name not in known and not takes_more:
        there = ", ".join(known) or "none"
        raise typer.BadParameter(f"{method.function.__name__} has no hyperparameter '{name}'; there is {there}.")
    try:
        return name, read_value(method.function, name, text)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem


def _in_words(problem: Exception) -> str:
    """An error's message in one line; where it has none, its kind."""
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.strerror}: '{problem.filename}'" if problem.filename else problem.strerror
    words = str(problem.args[0]) if problem.args else ""
    if not isinstance(problem, KeyError | TypeError | ValueError | IndexError):
        words = f"{type(problem).__name__}: {words}"
    return " ".join(words.split()) or type(problem).__name__


__all__ = ["app"]
