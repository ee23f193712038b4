r"""AWD: subtract what all task vectors share, so that the rest is more orthogonal.

Xiong et al., "Multi-task model merging via adaptive weight disentanglement", 2024 (arXiv:2411.18729). One *redundant*
vector :math:`\delta` is taken from every task vector. It makes

.. math::
   L(\delta) = \underbrace{\frac{1}{K (K - 1)} \sum_{i \ne j} \big|\cos(\tau_i - \delta,\, \tau_j - \delta)\big|}_{L_O}
               \;+\; \alpha \underbrace{\|\delta\|}_{L_R}

small, and the disentangled task vectors :math:`\tau_k - \delta` are merged by task arithmetic. The authors have
released no code; this is written from the paper's text.

**Why d numbers are really K.** Start at :math:`\delta = \sum_k c_k \tau_k`, for instance at zero. The gradient of L is
a combination of the vectors :math:`\tau_i - \delta` and of :math:`\delta`, so again of the task vectors: descent never
leaves their span. And L is made of inner products, which the Gram matrix G knows. With the unit vectors :math:`1_i`
of :math:`\mathbb{R}^K`,

.. math::
   \langle \tau_i - \delta,\, \tau_j - \delta \rangle = (1_i - c)^\top G\, (1_j - c), \qquad
   \|\delta\|^2 = c^\top G\, c .

So the paper's descent, step for step, runs in the K coefficients c, and its cost does not depend on d once G is known.
Momentum and weight decay stay in the span, too; Adam, which scales every coordinate on its own, does not. The minimum
over *all* vectors needs one number more, the length of the part of :math:`\delta` that is orthogonal to all task
vectors. Both are found by `mergekit_lite.data_free.awd_solvers`.

**What the merge then is.** As :math:`\sum_k (\tau_k - \delta) = \sum_k (1 - K c_k)\, \tau_k`, AWD followed by task
arithmetic is task arithmetic with the scales :math:`\lambda (1 - K c_k)`: scales per task (or layer, or row) that were
found without data.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import count, finite, flag, not_negative
from mergekit_lite.data_free.awd_solvers import Value, descend, minimise, typical_length
from mergekit_lite.data_free.task_arithmetic import task_arithmetic
from mergekit_lite.geometry import Where, grams, rows_of
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors

CHUNK = 1024  # problems (layers, rows) solved at a time, to bound the memory
SOLVERS = ("trajectory", "exact")


@dataclass(frozen=True)
class Disentangled:
    """What `disentangle` found.

    The record has one entry before the first step and one after each (trajectory), or two: before and after (exact).

    Attributes:
        task_vectors: the vectors τ_k − δ; they can be merged by any method.
        redundant: δ as a single task vector.
        coefficients: c by tensor name, shape (K,), or (rows, K) where every row has its own; with the granularity
            ``"whole"`` all tensors share one c. Where it was found by ``"exact"`` there is one number more, the share
            of a random vector, zero as long as δ lies in the span of the task vectors. Tensors without δ are left out.
        losses: L; the mean over all problems where there are several (layers, rows).
        cosines: L_O, the mean |cosine| over all pairs; likewise.
        lengths: ‖δ‖ of the whole vector.
    """

    task_vectors: TaskVectors
    redundant: TaskVectors
    coefficients: Mapping[str, Tensor]
    losses: Tensor
    cosines: Tensor
    lengths: Tensor


@method(
    name="AWD",
    paper="Xiong et al., Multi-task model merging via adaptive weight disentanglement",
    arxiv="2411.18729",
    year=2024,
    need=Need.WEIGHTS,
)
def awd(
    tv: TaskVectors,
    *,
    scale: float = 0.3,
    alpha: float = 0.1,
    solver: str = "trajectory",
    granularity: str = "whole",
    **options: Any,
) -> StateDict:
    r"""Add the task vectors without their redundant part: :math:`\theta_0 + \lambda \sum_k (\tau_k - \delta)`.

    Args:
        tv: K task vectors.
        scale: :math:`\lambda`.
        alpha: the weight :math:`\alpha` of :math:`\delta`'s length.
        solver: ``"trajectory"``, the paper's descent, or ``"exact"``, the minimum.
        granularity: ``"whole"``, ``"layer"`` or ``"row"``.
        **options: further arguments of `disentangle`.

    Returns:
        The merged state dict.

    Raises:
        ValueError: as for `disentangle` and `task_arithmetic`.
    """
    finite("scale", scale)
    found = disentangle(tv, alpha=alpha, solver=solver, granularity=granularity, **options)
    return task_arithmetic(found.task_vectors, scale=scale)


def disentangle(
    tv: TaskVectors,
    *,
    alpha: float = 0.1,
    solver: str = "trajectory",
    granularity: str = "whole",
    squared: bool = False,
    step: float = 0.01,
    iterations: int = 300,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    relative: bool = False,
    row_mean: bool = False,
    where: Where | None = None,
) -> Disentangled:
    r"""Find the redundant vector and subtract it from every task vector.

    A later code of one of the authors descends per row; its recipe is ``granularity="row", row_mean=True, step=1e-5,
    iterations=2000, momentum=0.9, weight_decay=1e-4``, with a ``where`` that leaves out classifier, embeddings,
    biases and normalisation.

    Args:
        tv: K task vectors.
        alpha: the weight of :math:`\delta`'s length.
        solver: ``"trajectory"`` is the paper's gradient descent from :math:`\delta = 0`, with the four arguments from
            `step` to `weight_decay`; ``"exact"`` is the lowest minimum of L that descents from several starts find.
            If that lies outside the span of the task vectors, the direction there makes no difference to L; a
            random one is taken, always the same.
        granularity: ``"whole"`` has one objective for whole task vectors, as in the paper; ``"layer"`` one for every
            tensor; ``"row"`` one for every row of every tensor (an output unit's weights).
        squared: take :math:`\|\delta\|^2` for :math:`\|\delta\|`.
        step: of the descent; the paper's is 0.01.
        iterations: the paper's are 300.
        momentum: of the descent, as in `torch.optim.SGD`.
        weight_decay: of the descent, likewise.
        relative: measure lengths in units of the task vectors' typical length, for every problem (layer, row) on its
            own, so that α and step mean the same for all. In absolute units, as published, a step of 0.01 is small
            for a vector of length 4, and throws one of length 0.05 far away.
        row_mean: a tensor's objective is the *mean* of its rows' :math:`L_O` plus :math:`\alpha` times the *sum* of
            their lengths, so that more rows mean smaller steps. Only for rows.
        where: ``where(name, theta0)`` says from which tensors to subtract; by default from all.

    Raises:
        ValueError: another solver or granularity, a number that is negative or not finite, `row_mean` without rows,
            or no weights to measure.
        TypeError: what should be a number is none.
    """
    _check(solver, granularity, row_mean)
    for word, answer in (("squared", squared), ("relative", relative), ("row_mean", row_mean)):
        flag(word, answer)
    for word, number in (("alpha", alpha), ("step", step), ("momentum", momentum), ("weight_decay", weight_decay)):
        not_negative(word, number)
    iterations = count("iterations", iterations)

    # δ is a combination of these: the task vectors, and for the exact minimum one random vector more.
    parts = tv.transform(_with_noise, [*tv.names, "outside"]) if solver == "exact" else tv
    by_name = grams(parts, granularity, where=where)
    counts = [gram[..., 0, 0].numel() for gram in by_name.values()]
    problems = torch.cat([gram.reshape(-1, len(parts), len(parts)) for gram in by_name.values()])
    unit = problems.new_ones(len(problems))
    if relative:
        unit = typical_length(problems[:, : len(tv), : len(tv)])
        problems = problems / unit.square()[:, None, None]

    # The mean over R rows plus α times the sum is 1/R times (the sum plus R α times the sum).
    rows = torch.cat([unit.new_full((count,), count if row_mean else 1) for count in counts])
    if solver == "exact":
        c, record = _solve_exactly(problems, alpha * rows, squared)
    else:
        basis = torch.eye(len(tv), dtype=problems.dtype, device=problems.device).expand_as(problems)
        c, record = descend(
            basis,
            problems,
            alpha=alpha * rows,
            step=step / rows,
            iterations=iterations,
            momentum=momentum,
            weight_decay=weight_decay * rows,
            squared=squared,
        )

    pieces = zip(by_name.items(), c.split(counts), strict=True)
    solved = {name: piece.view(gram.shape[:-1]) for (name, gram), piece in pieces}
    names = [name for name, theta0, _ in tv.layers() if where is None or where(name, theta0)]
    keys = {name: "whole" if granularity == "whole" else name for name in names}
    shares = {name: solved[key] for name, key in keys.items() if key in solved}  # an empty tensor has no Gram matrix

    def delta(name: str, taus: Tensor) -> Tensor:
        if name not in shares:
            return torch.zeros_like(taus[0])
        return combine(shares[name], _with_noise(name, taus) if solver == "exact" else taus)

    return Disentangled(
        tv.transform(lambda name, taus: taus - delta(name, taus)),
        tv.transform(lambda name, taus: delta(name, taus)[None], names=["redundant"]),
        shares,
        losses=torch.stack([value.loss.mean() for value in record]),
        cosines=torch.stack([value.overlap.mean() for value in record]),
        lengths=torch.stack([(value.length * unit).norm() for value in record]),
    )


def combine(coefficients: Tensor, taus: Tensor) -> Tensor:
    """δ of one tensor, Σ c_k τ_k, from its coefficients (K,) or (rows, K) and its taus (K, *shape)."""
    c = coefficients.to(taus)
    if c.ndim == 1:
        return torch.tensordot(c, taus, dims=1)
    return torch.einsum("rk,krd->rd", c, rows_of(taus)).reshape(taus.shape[1:])


def _check(solver: str, granularity: str, row_mean: bool) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got '{solver}'.")
    if row_mean and granularity != "row":
        raise ValueError(f"row_mean is about rows; the granularity is '{granularity}'.")


# ---------------------------------------------------------------- outside the span of the task vectors


def _with_noise(name: str, taus: Tensor) -> Tensor:
    """The task vectors of one tensor and a random vector more, always the same: (K + 1, *shape)."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(taus.shape[1:], generator=generator, dtype=taus.dtype)
    return torch.cat([taus, noise.to(taus.device)[None]])


def _solve_exactly(gram: Tensor, alpha: Tensor, squared: bool) -> tuple[Tensor, list[Value]]:
    """The minima of P problems, for Gram matrices (P, K + 1, K + 1) of K task vectors and a random one, the last.

    Without its projection on the task vectors, Σ a_k τ_k, the random vector is a direction outside their span.
    """
    from tqdm.auto import tqdm

    inner, across, square = gram[..., :-1, :-1], gram[..., :-1, -1], gram[..., -1, -1]
    a = (torch.linalg.pinv(inner, hermitian=True) @ across.unsqueeze(-1)).squeeze(-1)
    left = (square - (across * a).sum(-1)).clamp(min=0)
    room = left > 1e-6 * square  # as many task vectors as weights leave none
    bar = tqdm(total=len(inner), desc="disentangle", disable=None if len(inner) > CHUNK else True)
    solved = []
    for part in torch.arange(len(inner), device=inner.device).split(CHUNK):
        solved.append(minimise(inner[part], alpha=alpha[part], squared=squared, room=room[part]))
        bar.update(len(part))
    bar.close()
    parts, lengths, records = zip(*solved, strict=True)
    record = [Value(*map(torch.cat, zip(*step, strict=True))) for step in zip(*records, strict=True)]
    c, outside = torch.cat(parts), torch.cat(lengths)
    share = torch.where(room, outside / left.sqrt(), 0.0).unsqueeze(-1)
    return torch.cat([c - share * a, share], dim=-1), record
