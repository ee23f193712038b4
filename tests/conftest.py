"""Models that many tests merge, small enough to check by hand."""

import pytest
import torch
from torch import nn

import mergekit_lite as mkl


def pytest_collection_modifyitems(items):
    """Tests of one file share fixtures, so one process runs them all; but a chapter takes a minute and goes alone."""
    for item in items:
        alone = "instructors_version_solves" in item.name
        item.add_marker(pytest.mark.xdist_group(item.name if alone else str(item.path)))


@pytest.fixture(autouse=True)
def one_thread():
    """Small models are faster on one thread, and pytest-xdist already uses every core."""
    torch.set_num_threads(1)


def small_net(seed: int) -> nn.Module:
    """A network with a convolution, a normalisation layer (with an integer buffer) and a linear layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5)).eval()


@pytest.fixture
def base() -> nn.Module:
    return small_net(0)


@pytest.fixture
def experts() -> list[nn.Module]:
    return [small_net(seed) for seed in (1, 2, 3)]


@pytest.fixture
def tv(base, experts) -> mkl.TaskVectors:
    return mkl.TaskVectors(base, experts)


@pytest.fixture(scope="session")
def suite() -> mkl.Suite:
    """The shipped suite on the CPU; tests must not change it."""
    return mkl.load_suite("pocket8", device="cpu")
