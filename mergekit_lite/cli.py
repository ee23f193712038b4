"""The command line: ``mergekit-lite methods`` and ``mergekit-lite merge ties base.safetensors a.safetensors ...``."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_lite.calibrated import Curvature
from mergekit_lite.checkpoints import merge_files
from mergekit_lite.registry import methods as registered

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Merge fine-tuned checkpoints.")


@app.command()
def methods() -> None:
    """List the merging methods and their hyperparameters."""
    for name, method in registered().items():
        parameters = inspect.signature(method.function).parameters.values()
        options = [f"{p.name}={p.default}" for p in parameters if p.default is not p.empty]
        typer.echo(f"{name:22} {method.name}, {method.year}; {', '.join(options)}")


@app.command()
def merge(
    method: Annotated[str, typer.Argument(help="a name from `mergekit-lite methods`")],
    base: Annotated[Path, typer.Argument(help="the common ancestor, a .safetensors file")],
    experts: Annotated[list[Path], typer.Argument(help="the fine-tuned checkpoints")],
    out: Annotated[Path, typer.Option(help="where to write the merge")] = Path("merged.safetensors"),
    curvature: Annotated[
        list[Path] | None,
        typer.Option(help="per expert, in order: a file of Curvature.save, for fisher, regmean, mats"),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a hyperparameter, such as scale=0.3")] = None,
) -> None:
    """Merge checkpoint files into one, tensor by tensor."""
    if method not in registered():
        raise typer.BadParameter(f"no method named '{method}'; there are {', '.join(registered())}.")
    function = registered()[method].function
    hyperparameters = dict(_parse(assignment) for assignment in set_ or [])
    parameters = inspect.signature(function).parameters
    unknown = set(hyperparameters) - set(parameters)
    if unknown:
        raise typer.BadParameter(f"{method} has no hyperparameter '{unknown.pop()}'.")
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.name not in hyperparameters][1:]
    if needed and needed[0] not in ("fishers", "grams", "curvatures"):
        raise typer.BadParameter(
            f"{method} needs '{needed[0]}'; set it, or call {registered()[method].call} in Python."
        )
    if bool(needed) != bool(curvature):
        raise typer.BadParameter(f"{method} needs {'' if needed else 'no '}--curvature files.")
    try:
        given = {name: [Curvature.load(path) for path in curvature or []] for name in needed}
        merge_files(function, base, experts, out, **hyperparameters, **given)
    except (KeyError, TypeError, ValueError) as problem:  # their messages say what is wrong and what to do
        typer.echo(f"not merged: {problem.args[0]}", err=True)
        raise typer.Exit(1) from problem
    typer.echo(f"wrote {out}")


def _parse(assignment: str) -> tuple[str, Any]:
    """``scale=0.3`` as ("scale", 0.3); values are JSON, or else text."""
    name, equals, value = assignment.partition("=")
    if not equals:
        raise typer.BadParameter(f"'{assignment}' is not of the form name=value.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
