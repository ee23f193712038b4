"""The repository's own promises: dependency lists that agree, generated tables, chapters that are complete."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- dependencies


def test_the_three_dependency_lists_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    ranges = [Requirement(line) for group in groups for line in group]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in ranges:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name}: {pins[name]} is outside {requirement.specifier}"

    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    installed = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert "--constraint constraints.txt" in installed, "conda users get the same pins"
    extras = ",".join(project["optional-dependencies"])
    assert f"--editable .[{extras}]" in installed, "and the same lists of packages"
    python = next(item for item in environment["dependencies"] if str(item).startswith("python"))
    assert project["requires-python"].removeprefix(">=") in python


def test_constraints_are_exact_versions_sorted_and_free_of_builds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    assert len({canonicalize_name(line.split("==")[0]) for line in lines}) == len(lines)


# ---------------------------------------------------------------- setting up


def test_setup_says_what_is_missing(monkeypatch, tmp_path):
    setup = tool("setup_env")
    monkeypatch.setattr(setup.sys, "version_info", (3, 8))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer"):
        setup.check_python()
    monkeypatch.undo()
    setup.check_python()
    monkeypatch.setitem(sys.modules, "venv", None)
    with pytest.raises(SystemExit, match="no venv module"):
        setup.check_python()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"where constraints\.txt is"):
        setup.main("new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("platform", "gpu", "choice", "cpu_build"),
    [
        ("linux", None, "auto", True),
        ("linux", "/usr/bin/nvidia-smi", "auto", False),
        ("linux", "/usr/bin/nvidia-smi", "cpu", True),
        ("linux", None, "default", False),
        ("darwin", None, "auto", False),
    ],
)
def test_cuda_is_not_downloaded_by_accident(monkeypatch, platform, gpu, choice, cpu_build):
    setup = tool("setup_env")
    monkeypatch.setattr(setup.sys, "platform", platform)
    monkeypatch.setattr(setup.shutil, "which", lambda name: gpu)
    monkeypatch.setenv("TORCH", choice)
    assert setup.wants_cpu_torch() is cpu_build


def test_a_wrong_choice_of_torch_is_said(monkeypatch):
    setup = tool("setup_env")
    monkeypatch.setenv("TORCH", "gpu")
    with pytest.raises(SystemExit, match="TORCH must be auto, cpu or default"):
        setup.wants_cpu_torch()


def test_pins_are_read_from_the_constraints(monkeypatch):
    monkeypatch.chdir(ROOT)
    setup = tool("setup_env")
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", setup.pinned("torch"))
    with pytest.raises(SystemExit, match="does not pin nothing"):
        setup.pinned("nothing")


# ---------------------------------------------------------------- what is generated


def test_generated_pages_are_up_to_date():
    generate = tool("generate")
    text = (ROOT / "README.md").read_text()
    assert generate.readme(text) == text, "run: make readme"
    assert (ROOT / "book" / "methods.md").read_text() == generate.methods_page(), "run: make readme"


def test_version_stands_once():
    import mergekit_lite

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mergekit_lite.__version__
    assert f"version: {project['version']}" in (ROOT / "CITATION.cff").read_text()


def test_layers_of_the_house():
    """Below everything lies task_vectors; a method imports it and nothing of the suites or the lab."""
    ground = {"types", "checkpoints", "checks", "matrices", "registry"}
    allowed = {
        "data_free": {*ground, "task_vectors", "selection", "geometry", "data_free"},
        "calibrated": {*ground, "task_vectors", "geometry", "calibrated", "data_free"},
        "adaptive": {*ground, "task_vectors", "geometry", "adaptive", "data_free"},
        "suites": {*ground, "task_vectors", "geometry", "linearization", "data_free", "calibrated", "suites"},
    }
    allowed["lab"] = {*allowed["suites"], "selection", "adaptive", "lab"}
    of_data_free = {
        "calibrated": {"average", "depth"},  # RegMean++ starts from the average and goes by depth
        # AdaMerging++ takes TIES' first two steps, Concrete adds what it has masked; seeds are drawn as for DARE
        "adaptive": {"ties", "task_arithmetic", "dare"},
    }
    for folder, below in allowed.items():
        for path in (ROOT / "mergekit_lite" / folder).rglob("*.py"):
            text = path.read_text()
            imported = set(re.findall(r"^\s*(?:from|import) mergekit_lite\.(\w+)", text, re.MULTILINE))
            assert imported <= below, f"{path.name} imports {imported - below}"
            if folder in of_data_free:
                parts = set(re.findall(r"mergekit_lite\.data_free\.?(\w*)", text))
                assert parts <= of_data_free[folder], f"{path.name} imports {parts} of data_free"


# ---------------------------------------------------------------- chapters


def test_every_chapter_stands_in_the_book():
    contents = (ROOT / "book" / "_toc.yml").read_text()
    assert all(f"notebooks/{path.stem}\n" in contents for path in NOTEBOOKS)
    assert NOTEBOOKS


def test_the_repositorys_address_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    address, version = project["urls"]["Repository"], project["version"]
    config = yaml.safe_load((ROOT / "book" / "_config.yml").read_text())
    assert config["repository"]["url"] == address, "where the launch buttons lead"
    assert set(config["launch_buttons"]) >= {"binderhub_url", "colab_url"}
    for path in NOTEBOOKS:
        release = f'%pip install --quiet git+{address}@v{version}"'
        assert release in path.read_text(), "what Colab installs: a release, not whatever is newest"


def test_binder_installs_the_package():
    """With a local requirement repo2docker copies the repository before it makes the environment."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    installed = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert any(line.startswith("--editable .") for line in installed)


def test_make_says_what_there_is():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"make {target}" in done.stdout for target in ("book", "test", "lab"))
