"""The peers are those that the tests were written for, with the versions of everything they need."""

import re
from importlib.metadata import distributions, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_PINNED = {"pip", "setuptools", "mergekit-lite"}  # what installs, and what is tested


def pins(path: Path) -> dict[str, str]:
    return {normal(name): pin for name, pin in (line.split("==") for line in path.read_text().split())}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_all_versions_are_pinned_once():
    ours, theirs = pins(ROOT / "constraints.txt"), pins(ROOT / "tests" / "parity" / "constraints.txt")
    assert not ours.keys() & theirs.keys(), "what both environments have is pinned in the first list alone"
    wanted = ours | theirs
    for found in distributions():
        name = normal(found.name)
        if name not in NOT_PINNED:
            assert found.version.split("+")[0] == wanted.get(name), f"{found.name} {found.version}"


def test_versions_of_the_peers():
    peers = "mergekit", "fusion-bench", "curvlinops-for-pytorch"
    assert tuple(map(version, peers)) == ("0.1.5", "0.2.33", "3.0.1")
