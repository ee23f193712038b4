"""Conjugate gradients, step by step beside scipy's."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg

from mergekit_lite.calibrated.conjugate_gradient import conjugate_gradient


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("zeros", [0, 6])
def test_iterates(preconditioned, zeros):
    noise = np.random.default_rng(0)
    q, _ = np.linalg.qr(noise.standard_normal((20, 20)))
    matrix = (q * np.r_[np.zeros(zeros), np.geomspace(1, 100, 20 - zeros)]) @ q.T
    b, start = matrix @ noise.standard_normal(20), noise.standard_normal(20)
    inverse = np.diag(1 / matrix.diagonal()) if preconditioned else None
    theirs = []
    cg(matrix, b, start, rtol=0, maxiter=8, M=inverse, callback=lambda x: theirs.append(x.copy()))
    as_map = None if inverse is None else (lambda r: torch.from_numpy(inverse) @ r)
    ours = conjugate_gradient(
        lambda p: torch.from_numpy(matrix) @ p, torch.from_numpy(b), torch.from_numpy(start), precondition=as_map
    )
    assert torch.equal(next(ours)[0], torch.from_numpy(start))
    for x, (our_x, residual) in zip(theirs, ours, strict=False):
        np.testing.assert_allclose(our_x, x, rtol=1e-9)
        assert residual == pytest.approx(np.linalg.norm(b - matrix @ x) / np.linalg.norm(b), rel=1e-6)
    assert len(theirs) == 8
