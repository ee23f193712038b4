"""The geometry of task vectors: how long they are, where they point, and how much they disturb each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import number
from mergekit_lite.matrices import is_matrix
from mergekit_lite.task_vectors import TaskVectors, float64, inner_products

GRANULARITIES = ("whole", "layer", "row")
SMALLEST_ANGLE = 1e-4  # in radians: between directions nearer to each other, arc and line are the same in float32
Where = Callable[[str, Tensor], bool]  # which tensors count, by name and θ0

# ---------------------------------------------------------------- inner products and angles


def grams(tv: TaskVectors, granularity: str = "layer", *, where: Where | None = None) -> dict[str, Tensor]:
    r"""Gram matrices :math:`G_{ij} = \langle \tau_i, \tau_j \rangle` of whole task vectors, of layers or of rows.

    Args:
        tv: K task vectors.
        granularity: ``"whole"`` sums over all tensors; ``"layer"`` has a matrix for every tensor; ``"row"`` one for
            every row of every tensor (what one output unit reads; a tensor with fewer than two axes is one row).
        where: ``where(name, theta0)`` says which tensors count; by default all.

    Returns:
        In float64: ``{"whole": (K, K)}``, or by tensor name (K, K), or (rows, K, K).

    Raises:
        ValueError: another granularity, or no weight counts.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}; got '{granularity}'.")
    found: dict[str, Tensor] = {}
    if granularity == "row":
        for name, theta0, taus in tv.layers():
            if where is None or where(name, theta0):
                rows = float64(rows_of(taus)).transpose(0, 1)
                found[name] = rows @ rows.transpose(1, 2)
    else:
        for place, taus in tv.pieces():
            if where is None or where(place.name, tv.base[place.name]):
                key = "whole" if granularity == "whole" else place.name
                products = inner_products(taus)
                found[key] = found[key] + products if key in found else products
    if not found:
        raise ValueError("no tensor to measure: these models have no weights, or `where` refused all of them.")
    return found


def vectors_of(taus: Tensor) -> Tensor:
    """Task vectors (K, *shape) of a tensor as (K, n), also where the tensor has no axis (n = 1) or no entry (n = 0)."""
    return taus.flatten(1) if taus.ndim > 1 else taus.unsqueeze(1)


def rows_of(taus: Tensor) -> Tensor:
    """Task vectors (K, *shape) of a tensor as (K, rows, columns); what has fewer than two axes is one row."""
    return taus.flatten(2) if taus.ndim > 2 else vectors_of(taus).unsqueeze(1)


def normalise(gram: Tensor) -> Tensor:
    r"""Cosines :math:`G_{ij} / \sqrt{G_{ii} G_{jj}}` from Gram matrices (..., K, K), in float64.

    A zero task vector has no direction; its cosines with the others are 0, with itself 1.
    """
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2) * (1 - identity) + identity


def cosines(tv: TaskVectors) -> Tensor:
    """The K x K matrix of cosines between whole task vectors; for layers and rows, `normalise` their `grams`."""
    return normalise(tv.gram())


def mean_cosine(gram: Tensor) -> Tensor:
    """The mean |cosine| over all pairs of different task vectors, from Gram matrices (..., K, K); AWD's L_O."""
    tasks = gram.shape[-1]
    return (normalise(gram).abs().sum((-2, -1)) - tasks) / max(1, tasks * (tasks - 1))


def largest_cosine(tv: TaskVectors) -> float:
    """The largest |cosine| between two different task vectors (0 for a single one)."""
    matrix = cosines(tv)
    return float((matrix - torch.eye(len(tv), dtype=matrix.dtype)).abs().max())


def sign_conflicts(tv: TaskVectors) -> Tensor:
    """How often two task vectors pull a weight in opposite directions: (K, K), in float64.

    Entry (i, j) is the share of opposite signs among the weights that both i and j change; NaN where there is none.
    For entries that are jointly Gaussian with the correlation ρ it is arccos(ρ) / π, so 1/2 by chance.
    """
    opposite = both = torch.zeros(len(tv), len(tv), dtype=torch.float64)
    for _, taus in tv.pieces():
        signs = taus.sign()
        agreement, changed = inner_products(signs).cpu(), inner_products(signs.abs()).cpu()
        opposite, both = opposite + (changed - agreement) / 2, both + changed
    return opposite / both


def principal_cosines(tv: TaskVectors, rank: int, *, side: str = "left") -> dict[str, Tensor]:
    r"""Cosines of the principal angles between what the task vectors change in every weight matrix.

    A weight matrix's task vector :math:`\Delta_k = U_k \Sigma_k V_k^\top` changes most along its first singular
    vectors. The singular values of :math:`U_i^\top U_j` (first r columns each) are the cosines of the angles between
    these two subspaces: all 1 where they are equal, all 0 where they are orthogonal. Two random subspaces of
    :math:`\mathbb{R}^n` have a mean squared cosine of r / n.

    Args:
        tv: K task vectors.
        rank: r, the dimension of the subspaces.
        side: ``"left"``, the outputs that are changed, or ``"right"``, the inputs that are read.

    Returns:
        By tensor name, (K, K, r) in float64. Only for matrices (`is_matrix`) with more than `rank` rows and columns;
        a convolution's kernel is read as outputs x (inputs, height, width), and a depthwise one is no matrix.

    Raises:
        ValueError: a rank below 1, or another side.
    """
    if number("rank", rank) < 1 or side not in ("left", "right"):
        raise ValueError(f"expected a rank of at least 1 and the side left or right; got {rank} and '{side}'.")
    found = {}
    for name, theta0, taus in tv.layers():
        if not is_matrix(theta0, name) or min(theta0.flatten(1).shape) <= rank:
            continue
        u, _, v = torch.linalg.svd(float64(taus.flatten(2)), full_matrices=False)
        first = u[..., :rank] if side == "left" else v[:, :rank].transpose(1, 2)  # (K, n, r)
        found[name] = torch.linalg.svdvals(torch.einsum("inr,jns->ijrs", first, first))
    return found


def turned(pair: TaskVectors, cosine: float) -> TaskVectors:
    r"""Two task vectors, the second turned within their plane until the two have this cosine; its length is kept.

    Args:
        pair: two task vectors, not parallel.
        cosine: between -1 and 1.

    Raises:
        ValueError: not two task vectors, two parallel ones, one that is zero, or no cosine.
    """
    if len(pair) != 2 or not -1 <= number("cosine", cosine) <= 1:
        raise ValueError(f"expected two task vectors and a cosine; got {len(pair)} and {cosine}.")
    (first, inner), (_, second) = pair.gram().tolist()
    if not (first > 0 and second > 0):
        raise ValueError("one of these two task vectors is zero: it has no direction, so there is no plane to turn in.")
    upright = second - inner**2 / first  # squared length of what τ2 has at a right angle to τ1
    if upright <= 1e-9 * second:
        raise ValueError("these two task vectors are parallel: they lie in no plane to turn in.")
    along, across = cosine * (second / first) ** 0.5, ((1 - cosine**2) * second / upright) ** 0.5
    return pair.transform(
        lambda name, taus: torch.stack([taus[0], along * taus[0] + across * (taus[1] - inner / first * taus[0])])
    )


def angle_of_rounding(tv: TaskVectors, name: str | None = None) -> float:
    r"""How far, in radians, rounding the weights may turn a task vector that has kept half of its digits.

    A weight of relative precision :math:`\epsilon` is stored with an error of about :math:`\epsilon \|\theta\|`. Seen
    from a task vector it is an angle of :math:`\epsilon \|\theta\| / \|\tau\|`, and if the task vector is as long as
    :math:`\sqrt\epsilon\, \|\theta\|`, that is :math:`\sqrt\epsilon`: 0.0003 for float32, 0.03 for float16, 0.09 for
    bfloat16. Two task vectors nearer to opposite than this may be opposite ones that were rounded, and rounding must
    not choose the way from one to the other. It is never less than 0.0001, as cosines in double precision tell
    differences of :math:`10^{-8}` at most.

    Args:
        tv: K task vectors.
        name: a tensor, whose base's dtype counts; by default the coarsest of all.
    """
    dtypes = {tv.base.dtype(each) for each in (tv.base if name is None else [name])}
    return max([SMALLEST_ANGLE, *(torch.finfo(dtype).eps ** 0.5 for dtype in dtypes if dtype.is_floating_point)])


# ---------------------------------------------------------------- interference, in losses

# The loss of a merged network on one task: ``loss(state, task)``.
Loss = Callable[[StateDict, str], float]


def interference(tv: TaskVectors, loss: Loss, scale: float) -> Tensor:
    r"""What each task vector does to each other task: how much task i's loss rises when j is added to its own merge.

    .. math::
       I_{ij} = L_i\big(\theta_0 + \lambda (\tau_i + \tau_j)\big) - L_i(\theta_0 + \lambda \tau_i), \qquad I_{ii} = 0 .

    Args:
        tv: K task vectors, named as their tasks.
        loss: ``loss(state, task)`` measures a merge on a task; asked K² times.
        scale: :math:`\lambda`.

    Returns:
        (K, K) in float64, in the unit of the loss.
    """
    measured = torch.zeros(len(tv), len(tv), dtype=torch.float64)
    for i, task in enumerate(tv.names):
        alone = loss(_added(tv, [i], scale), task)
        for j in range(len(tv)):
            if j != i:
                measured[i, j] = loss(_added(tv, [i, j], scale), task) - alone
    return measured


def first_order_interference(tv: TaskVectors, gradient: Callable[[StateDict, str], StateDict], scale: float) -> Tensor:
    r"""The first term of the Taylor expansion of `interference`: :math:`\lambda\, \langle \nabla L_i, \tau_j \rangle`.

    Args:
        tv: K task vectors, named as their tasks.
        gradient: ``gradient(state, task)`` is the gradient of task's loss at a merge, by tensor name; asked K times,
            at :math:`\theta_0 + \lambda \tau_i`.
        scale: :math:`\lambda`.

    Returns:
        (K, K) in float64; the diagonal is 0.
    """
    predicted = torch.zeros(len(tv), len(tv), dtype=torch.float64)
    for i, task in enumerate(tv.names):
        predicted[i] = scale * slopes(tv, gradient(_added(tv, [i], scale), task))
    return predicted.fill_diagonal_(0.0)


def slopes(tv: TaskVectors, gradient: Mapping[str, Tensor]) -> Tensor:
    r"""Inner products :math:`\langle \nabla L, \tau_k \rangle` of one gradient with all task vectors: (K,), float64.

    Tensors that the gradient lacks (running statistics) count as zero.
    """
    parts = [
        float64(vectors_of(taus)) @ float64(gradient[name].flatten())
        for name, _, taus in tv.layers()
        if name in gradient
    ]
    return torch.stack(parts).sum(0).cpu() if parts else torch.zeros(len(tv), dtype=torch.float64)


def _added(tv: TaskVectors, which: Sequence[int], scale: float) -> StateDict:
    return tv.subset(which).map(lambda name, taus: scale * taus.sum(0))  # the other task vectors are not read


# ---------------------------------------------------------------- disentanglement, in predictions

# What a merged network with these scales predicts for the images of one task: classes, shape (N,).
Predict = Callable[[Sequence[float], str], Tensor]


def disentanglement_error(predict: Predict, tasks: Sequence[str], scales: Sequence[float]) -> float:
    r"""How much the task vectors disturb each other's predictions at one point of the plane of scales.

    .. math::
       \xi(\lambda_1, \dots, \lambda_K) = \sum_{k=1}^{K} \Pr_{x \sim \text{task } k} \Big[
           f(x;\, \theta_0 + \lambda_k \tau_k) \ne f\big(x;\, \theta_0 + \textstyle\sum_j \lambda_j \tau_j\big) \Big]

    Ortiz-Jimenez et al., "Task arithmetic in the tangent space", NeurIPS 2023 (arXiv:2305.12827), equation 6, with
    the share of images whose predicted class changes as the distance. 0 is a merge in which every task is
    answered as if its own task vector had been added alone; K is the worst there can be.

    Args:
        predict: ``predict(scales, task)`` gives the predicted classes of the merge with these K scales.
        tasks: K names, in the order of the scales.
        scales: K numbers :math:`\lambda_k`.

    Raises:
        ValueError: not as many scales as tasks.
    """
    if len(scales) != len(tasks):
        raise ValueError(f"expected {len(tasks)} scales (one per task), got {len(scales)}.")
    error = 0.0
    for k, task in enumerate(tasks):
        alone = [scale if j == k else 0.0 for j, scale in enumerate(scales)]
        error += (predict(alone, task) != predict(scales, task)).double().mean().item()
    return error


def disentanglement_map(predict: Predict, tasks: Sequence[str], grid: Sequence[float]) -> Tensor:
    r"""The disentanglement error of two tasks over a grid of scales.

    Args:
        predict: as for `disentanglement_error`.
        tasks: two names.
        grid: n values that each of :math:`\lambda_1, \lambda_2` takes.

    Returns:
        Shape (n, n), float64; row i has :math:`\lambda_1` = grid[i], column j has :math:`\lambda_2` = grid[j].

    Raises:
        ValueError: not two tasks.
    """
    if len(tasks) != 2:
        raise ValueError(f"a map has two axes, so it needs two tasks; got {len(tasks)}.")
    known = cache(lambda scales, task: predict(scales, task))  # each λτ alone stands for a whole row or column
    errors = [[disentanglement_error(lambda s, t: known(tuple(s), t), tasks, (a, b)) for b in grid] for a in grid]
    return torch.tensor(errors, dtype=torch.float64)
