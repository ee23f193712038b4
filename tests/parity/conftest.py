"""Random checkpoints of a small network, and a quiet place to merge them in."""

import warnings

import pytest
import torch

with warnings.catch_warnings():  # what the peers' dependencies deprecate among themselves is not our concern
    warnings.simplefilter("ignore")
    try:
        import curvlinops  # noqa: F401

        from tests.parity.checkpoints import Checkpoints
    except ModuleNotFoundError as missing:
        pytest.exit(f"{missing.name} is not installed here: these tests are run by `make parity`.", returncode=1)


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are merged faster on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(params=[3, 5, 8], ids=lambda k: f"K={k}")
def models(request) -> Checkpoints:
    """A base and K experts in float32."""
    return Checkpoints(request.param)
