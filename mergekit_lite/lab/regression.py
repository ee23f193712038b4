r"""Merging a layer is a regression: whose a layer's inputs are, and what a merge makes of them.

For chapter 3.2. The Gram matrices :math:`A_1, A_2` of two tasks have common coordinates: directions :math:`u_i` with

.. math:: A_1 = \sum_i s_i\, u_i u_i^\top , \qquad A_2 = \sum_i (1 - s_i)\, u_i u_i^\top , \qquad 0 \le s_i \le 1 .

Every input of either task is a sum of the :math:`u_i` whose coefficients are uncorrelated, and the share :math:`s_i`
says how much of :math:`u_i` is the first task's. So the squared error of any weight W is a sum over directions, of
:math:`s_i \|(W - W_1) u_i\|^2 + (1 - s_i) \|(W - W_2) u_i\|^2`.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergekit_lite.calibrated.blocks import NEGLIGIBLE, Block, Curvature, Kronecker, pseudo_inverse
from mergekit_lite.calibrated.curvature import Batch, input_grams
from mergekit_lite.calibrated.layers import Layer, reader
from mergekit_lite.calibrated.regmean import regmean
from mergekit_lite.checkpoints import StateDict
from mergekit_lite.data_free.average import average
from mergekit_lite.matrices import is_matrix
from mergekit_lite.suites.speed import keep_freed_memory, one_thread
from mergekit_lite.suites.suite import Suite
from mergekit_lite.task_vectors import TaskVectors, float64

if TYPE_CHECKING:
    import pandas as pd

TINY = 1e-300  # instead of a zero that one divides by


def common_directions(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The directions in which two Gram matrices are both diagonal, and the first one's shares.

    Args:
        first: A of one task, (i, i).
        second: of another.

    Returns:
        Shares (r,) in [0, 1], rising, and directions (i, r), one a column; r is the rank of the sum.
    """
    total = float64(first) + float64(second)
    sizes, vectors = torch.linalg.eigh(total)
    there = sizes > NEGLIGIBLE * sizes[-1]
    whiten = vectors[:, there] / sizes[there].sqrt()  # in these coordinates the sum is the identity
    shares, turn = torch.linalg.eigh(whiten.T @ float64(first) @ whiten)
    return shares.clamp(0, 1), total @ whiten @ turn


def errors_along(merged: Tensor, experts: Tensor, shares: Tensor, directions: Tensor) -> Tensor:
    """The squared error of a weight on the inputs of two tasks, along each of their common directions: (r,).

    Args:
        merged: a weight, or its task vector, (o, i).
        experts: those of the two tasks, (2, o, i).
        shares: of the first task, (r,).
        directions: a column each, (i, r).
    """
    first, second = ((float64(merged - expert) @ directions).square().sum(0) for expert in experts)
    return shares * first + (1 - shares) * second


def answers(tv: TaskVectors, merged: Mapping[str, Tensor], grams: Mapping[str, Mapping[str, Block]]) -> pd.DataFrame:
    r"""What every layer of a merge answers to the tasks' inputs, beside what the experts would answer.

    Let the change that a merge makes to a layer's outputs be split, on the inputs of task k, into a multiple of the
    change that expert k makes and a rest that is orthogonal to it (over all outputs and inputs).

    Args:
        tv: K task vectors.
        merged: the state dict of a merge.
        grams: of all experts, by name.

    Returns:
        A row per layer: ``error``, the squared error of the outputs, added over the tasks, in units of the average's;
        ``own``, the multiple, and ``foreign``, the squared size of the rest in units of the expert's change, both
        means over tasks. An expert has the error 0 on its task, own 1 and foreign 0.
    """
    import pandas as pd

    rows = {}
    for name, theta0, taus in tv.layers():
        blocks = [grams[task][name] for task in tv.names if name in grams[task]]
        if not blocks:
            continue
        tau, exact = float64(merged[name]) - float64(theta0), float64(taus)
        average, per_task = exact.mean(0), []
        for block, expert in zip(blocks, exact, strict=True):
            # Mean inner products of outputs, on this task's inputs.
            size, along = _inner(block(expert), expert, tau)
            (squared,), (of_average, across) = _inner(block(tau), tau), _inner(block(average), average, expert)
            unit = max(size, TINY)
            own = along / unit
            errors = [squared - 2 * along + size, of_average - 2 * across + size]
            per_task.append([*errors, own, squared / unit - own**2])
        error, unit, own, foreign = torch.tensor(per_task, dtype=torch.float64).T
        rows[name] = {"error": error.sum() / unit.sum().clamp(min=TINY), "own": own.mean(), "foreign": foreign.mean()}
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


def error_of_layer(
    tv: TaskVectors,
    name: str,
    seen: Mapping[str, Curvature],
    judged: Mapping[str, Curvature],
    *,
    alpha: float = 1.0,
) -> float:
    """The ``error`` that `answers` measures, of RegMean in one layer from some inputs, on others.

    Args:
        tv: K task vectors.
        name: of the layer's weight.
        seen: Gram matrices of the inputs for RegMean.
        judged: of those to measure on.
        alpha: RegMean's.
    """
    of_layer = [{task: {name: gram[name]} for task, gram in grams.items()} for grams in (seen, judged)]
    return float(answers(tv, regmean(tv, of_layer[0], alpha=alpha), of_layer[1])["error"][name])


def _inner(product: Tensor, *others: Tensor) -> list[float]:
    return [float((product * other).sum()) for other in others]


def gather(
    suite: Suite, states: Mapping[str, StateDict], batches: Mapping[str, Sequence[Batch]]
) -> dict[str, Curvature]:
    """Gram matrices of every task, by any networks on any images.

    Args:
        suite: whose backbone it is.
        states: a network's weights, by task.
        batches: what it reads, by task.
    """
    keep_freed_memory()
    with one_thread():
        return {task: input_grams(suite.build(states[task]), batches[task]) for task in states}


def filled(gram: Tensor) -> float:
    """About how many directions inputs fill: the squared sum of A's eigenvalues over the sum of their squares."""
    return float(gram.trace() ** 2 / gram.square().sum())


def likeness(first: Mapping[str, Curvature], second: Mapping[str, Curvature]) -> pd.DataFrame:
    """Cosines between two kinds of Gram matrices, as lists of numbers: a row per layer that both have.

    Columns: ``own``, the mean over tasks; ``other``, that over pairs of different tasks.
    """
    import pandas as pd

    def flat(grams: Mapping[str, Curvature], name: str) -> Tensor:
        return torch.stack([F.normalize(grams[task][name].factors()["inputs"].flatten(), dim=0) for task in grams])

    rows, task = {}, next(iter(first))
    for name in (name for name in first[task] if name in second[task]):
        cosines = flat(first, name) @ flat(second, name).T
        same, others = cosines.trace().item(), len(cosines) * (len(cosines) - 1)
        rows[name] = {"own": same / len(cosines), "other": (cosines.sum().item() - same) / others}
    return pd.DataFrame.from_dict(rows, orient="index")


def stand_ins(tv: TaskVectors) -> dict[str, Curvature]:
    r"""WUDI's stand-ins for Gram matrices, :math:`\tau_k^\top \tau_k` with trace 1, of all but depthwise weights."""
    grams: dict[str, dict[str, Kronecker]] = {task: {} for task in tv.names}
    for name, theta0, taus in tv.layers():
        if is_matrix(theta0, name):
            for task, tau in zip(tv.names, float64(taus).flatten(2), strict=True):
                grams[task][name] = Kronecker(inputs=(tau.T @ tau / tau.square().sum().clamp(min=TINY))[None])
    return {task: Curvature(blocks) for task, blocks in grams.items()}


@torch.no_grad()
def inputs_of(model: nn.Module, images: Tensor, names: Container[str] | None = None) -> dict[str, Tensor]:
    """What each linear or convolutional layer of a model reads when the model reads images, in the order of calls.

    Args:
        model: a network, run as it is.
        images: its inputs.
        names: of the weights of the layers wanted; by default all.
    """
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].clone()  # an activation may overwrite it
            if len(seen) == len(wanted):
                raise _AllSeen  # what follows is not needed

        return hook

    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    wanted = [name for name in layers if names is None or name in names]
    handles = [layers[name].register_forward_pre_hook(watch(name)) for name in wanted]
    try:
        with suppress(_AllSeen):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _AllSeen(Exception):  # noqa: N818 (nothing is wrong)
    """Ends a forward pass."""


def drift(suite: Suite, state: Mapping[str, Tensor], images: Mapping[str, Tensor]) -> pd.Series:
    """How far a merge's inputs of each layer are from the expert's, as a mean over tasks.

    Args:
        suite: with experts.
        state: the merge.
        images: of every task, the network's inputs.

    Returns:
        By layer: the squared distance in units of the squared length of the expert's inputs.
    """
    import pandas as pd

    merged, each = suite.build(state), []
    with one_thread():
        for task, x in images.items():
            here, there = inputs_of(merged, x), inputs_of(suite.build(suite.experts[task]), x)
            each.append({name: float((here[name] - a).square().sum() / a.square().sum()) for name, a in there.items()})
    return pd.DataFrame(each).mean()


def onto_experts(tv: TaskVectors, model: nn.Module, images: Mapping[str, Tensor], *, ridge: float = 0.01) -> StateDict:
    r"""Layer by layer, the weights whose answers in the merge are nearest to the experts' own outputs.

    A control for RegMean++, with the targets that make up for drift: W minimises
    :math:`\sum_k \|W X_k - Y_k\|^2 / n_k`, where :math:`X_k` is what the layer reads of task k's images behind the
    layers that are merged already, and :math:`Y_k = W_k X_k'` what the expert's layer answers to its own inputs. It
    needs :math:`X_k' X_k^\top`, so expert and merge must read the same images.

    Args:
        tv: K task vectors.
        model: a network that these weights fit; it is not changed.
        images: of every task, by name: the network's inputs.
        ridge: holds every weight at the average, in units of the mean eigenvalue of all inputs' Gram matrix.

    Returns:
        The merged state dict. What is no weight of a linear or convolutional layer is averaged.
    """
    network, merged = copy.deepcopy(model).eval(), average(tv)
    there = {}
    for task in tv.names:
        network.load_state_dict(tv[task].map(lambda _, taus: taus[0]))
        there[task] = inputs_of(network, images[task])
    taus = {name: (theta0, taus) for name, theta0, taus in tv.layers() if name in there[tv.names[0]]}
    for name in there[tv.names[0]]:
        network.load_state_dict(merged)
        read = reader(cast(Layer, network.get_submodule(name.removesuffix(".weight"))))
        base, mean = float64(taus[name][0]), float64(taus[name][1]).mean(0)
        total = wrong = base.new_zeros(())
        for task, tau in zip(tv.names, float64(taus[name][1]), strict=True):
            here = inputs_of(network, images[task], [name])[name]
            # Inputs and the expert's inputs, (groups, i, places).
            x, own = (float64(read(a)).permute(1, 2, 0) for a in (here, there[task][name]))
            weight, start = ((base + t).reshape(len(x), -1, x.shape[1]) for t in (tau, mean))
            residual = weight @ own - start @ x
            total, wrong = total + x @ x.mT / x.shape[2], wrong + residual @ x.mT / x.shape[2]
        price = ridge * total.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(total.shape[1]).to(total)
        correction = (wrong @ pseudo_inverse(total + price)).reshape(base.shape)
        merged[name] = (base + mean + correction).to(merged[name])
    return merged
