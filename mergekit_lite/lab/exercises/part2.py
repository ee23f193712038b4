"""Checkers of part 2: interference and orthogonality, AWD, MetaGPT."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_lite.data_free import metagpt, task_arithmetic
from mergekit_lite.data_free.awd_solvers import objective
from mergekit_lite.data_free.metagpt import coefficients
from mergekit_lite.geometry import cosines, grams, rows_of, slopes
from mergekit_lite.lab.exercises.checking import Wrong, exercise, expect_function, expect_number, expect_state, pocket8
from mergekit_lite.suites.pocket import load_suite
from mergekit_lite.suites.suite import Suite
from mergekit_lite.task_vectors import TaskVectors

# ---------------------------------------------------------------- 2.1 Interference and orthogonality


@exercise("2.1.1")
def largest_by_chance(function: Callable[[int, int], float]) -> str:
    """The mean of the largest |cosine| among K random directions."""
    expect_function(function)
    generator = torch.Generator().manual_seed(1)
    for d, tasks in ((400, 8), (2000, 8), (400, 2)):
        x = torch.nn.functional.normalize(torch.randn(400, tasks, d, generator=generator), dim=-1)
        cos = (x @ x.transpose(1, 2) - torch.eye(tasks)).abs()
        expected = cos.amax((1, 2)).mean().item()
        value = expect_number(function(d, tasks), 0, 1, "a |cosine|")
        typical = cos.sum((1, 2)).mean().item() / (tasks * (tasks - 1))
        if tasks > 2 and abs(value - typical) < 0.15 * typical:
            raise Wrong("this is the mean over all pairs; take the largest of each draw, then the mean over draws.")
        if abs(value - expected) > 0.15 * expected:
            raise Wrong(f"for {tasks} directions in {d} dimensions it should be near {expected:.3f}.")
    return "with 8 vectors the largest of the 28 cosines is about three times a typical one."


@exercise("2.1.2")
def cosine_for_a_quarter(cosine: float) -> str:
    """The correlation at which a quarter of the signs differ."""
    value = expect_number(cosine, -1, 1, "a cosine")
    if abs(value - 0.5**0.5) > 0.005:
        raise Wrong("solve arccos(ρ) / π = 1/4 for ρ; the angle is an eighth of a full turn.")
    return "at an angle of 45 degrees. No two tasks are so alike, so about half of all signs always conflict."


@exercise("2.1.3")
def effective_dimensions(dimensions: float) -> str:
    """One over the mean squared cosine of the pairs of pocket8."""
    matrix = cosines(pocket8().task_vectors)
    pairs = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
    value, expected = expect_number(dimensions, 1, 1e7, "a dimension"), 1 / pairs.square().mean().item()
    if abs(value - 1 / pairs.mean().item() ** 2) < 0.02 * value:
        raise Wrong("you squared the mean; take the mean of the squares.")
    if abs(value - expected) > 0.02 * expected:
        raise Wrong("1 / d is the mean squared cosine: invert it, over the pairs of different tasks only.")
    return f"about {expected:.0f}, of {pocket8().task_vectors.dimension:,}."


@exercise("2.1.4")
def first_order_of_a_merge(function: Callable[[Suite, str, float], float]) -> str:
    """What the first order says that all other task vectors do to one task."""
    expect_function(function)
    few = pocket8().cut(20, tasks=["mnist", "letters", "scripts"])
    tv, scale = few.task_vectors, 0.2
    for i, task in enumerate(tv.names):
        alone = [scale * (k == i) for k in range(len(tv))]
        at_own = slopes(tv, few.gradient(task_arithmetic(tv, scale=alone), task))
        at_base = slopes(tv, few.gradient(None, task))
        expected = scale * float(at_own.sum() - at_own[i])
        value = expect_number(function(few, task, scale), -100, 100, "a change of the loss")
        if abs(value - scale * float(at_own.sum())) < 1e-4:
            raise Wrong("the task's own vector is in your sum; it is in both networks, so it does not count.")
        if abs(value - scale * float(at_base.sum() - at_base[i])) < 1e-4:
            raise Wrong("you took the gradient at the base; take it at the merge that has the task's own vector in it.")
        if abs(value - expected / scale) < 1e-4:
            raise Wrong("the step is λ times the other task vectors: multiply by the scale.")
        if abs(value - expected) > 1e-3:
            raise Wrong(f"for {task} at λ = {scale} among three tasks it should be {expected:.3f}; got {value:.3f}.")
    return "seven small helps add up to a large one, on paper."


# ---------------------------------------------------------------- 2.2 AWD


@exercise("2.2.1")
def scales_of_awd(function: Callable[[Tensor, float], Tensor]) -> str:
    """The scale per task that AWD followed by task arithmetic amounts to."""
    expect_function(function)
    c, scale = torch.tensor([0.02, -0.01, 0.1, 0.0]), 0.4
    given = torch.as_tensor(function(c, scale))
    if torch.allclose(given, scale * (1 - c)):
        raise Wrong("δ is subtracted from every one of the K task vectors: each c_k counts K times.")
    if torch.allclose(given, 1 - len(c) * c):
        raise Wrong("the scale λ is missing.")
    if not torch.allclose(given, scale * (1 - len(c) * c)):
        raise Wrong("write Σ (τ_k − δ) with δ = Σ c_k τ_k and collect what stands before τ_k.")
    return "AWD with task arithmetic is task arithmetic with K scales, found without data."


@exercise("2.2.2")
def inner_products_after(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """⟨τ_i − δ, τ_j − δ⟩ for all pairs, from the Gram matrix and c."""
    expect_function(function)
    generator = torch.Generator().manual_seed(0)
    taus = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    c = torch.randn(5, generator=generator, dtype=torch.float64) / 5
    left = taus - c @ taus
    gram = taus @ taus.T
    given = function(gram, c)
    if given.shape != gram.shape:
        raise Wrong(f"expected a K x K matrix, got shape {tuple(given.shape)}.")
    cross = gram @ c
    if torch.allclose(given, gram - cross[:, None] - cross[None, :]):
        raise Wrong("the last term is missing: ⟨δ, δ⟩ = cᵀ G c.")
    if torch.allclose(given, gram - c @ gram @ c):
        raise Wrong("the two mixed terms ⟨τ_i, δ⟩ and ⟨δ, τ_j⟩ are missing.")
    if not torch.allclose(given, left @ left.T):
        raise Wrong("expand ⟨τ_i − δ, τ_j − δ⟩ into four inner products; each is known from G and c.")
    return "K² numbers, and no vector of length d was touched."


@exercise("2.2.3")
def highest_price(alpha: float) -> str:
    """The α from which on δ = 0 is a local minimum of L on pocket8."""
    gram = pocket8().task_vectors.gram()
    identity = torch.eye(len(gram), dtype=gram.dtype)
    slope = objective(identity, gram, torch.zeros(len(gram), dtype=gram.dtype), alpha=0.0).gradient
    expected, value = float((slope @ gram @ slope).sqrt()), expect_number(alpha, 0, 100, "an α")
    if abs(value - slope.norm().item()) < 0.01 * value:
        raise Wrong("that is the length of the coefficients; the length of the vector Σ b_k τ_k is √(bᵀ G b).")
    if abs(value - expected**2) < 0.01 * value:
        raise Wrong("that is the squared length.")
    if abs(value - expected) > 0.02 * expected:
        raise Wrong("away from zero L_O falls at most with ‖∇L_O(0)‖ per unit of length, and the price rises with α.")
    return f"above α = {expected:.2f} every short step costs more than it brings, and descent from zero goes nowhere."


@exercise("2.2.4")
def rows_as_if_orthogonal(method: Callable[..., dict[str, Tensor]]) -> str:
    """Task arithmetic in which no row's sum is longer than if its task vectors were orthogonal."""
    expect_function(method)
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(6, 20, generator=generator), "b": torch.randn(6, generator=generator)}
    shared = {name: torch.randn(t.shape, generator=generator) for name, t in base.items()}
    shared["w"][:3] = 0
    own = [{n: torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(4)]
    tv = TaskVectors(base, [{n: base[n] + shared[n] + o[n] for n in base} for o in own])
    merged = method(tv, scale=0.5)
    expect_state(merged, base)
    inner = grams(tv, "row")
    for name, theta0, taus in tv.layers():
        orthogonal, total = inner[name].diagonal(dim1=-2, dim2=-1).sum(-1), inner[name].sum((-2, -1))
        factor = (orthogonal / total).sqrt().float()
        summed = 0.5 * rows_of(taus).sum(0)

        def moved(factor: Tensor, theta0: Tensor = theta0, summed: Tensor = summed) -> Tensor:
            return theta0 + (summed * factor[:, None]).view(theta0.shape)

        if torch.allclose(merged[name], moved(torch.ones_like(factor)), atol=1e-5) and (factor < 0.95).any():
            raise Wrong(f"'{name}' is plain task arithmetic; its rows' sums are longer than √(Σ ‖τ_k‖²).")
        if torch.allclose(merged[name], moved(factor), atol=1e-5) and (factor > 1.01).any():
            raise Wrong("you also lengthen rows whose sum is short; only shorten: the factor is at most 1.")
        if torch.allclose(merged[name], moved((factor**2).clamp(max=1)), atol=1e-5):
            raise Wrong("that is the ratio of the squared lengths; take its square root.")
        if not torch.allclose(merged[name], moved(factor.clamp(max=1)), atol=1e-4):
            raise Wrong(f"the rows of '{name}' differ from the sum times min(1, √(Σ ‖τ_k‖²) / ‖Σ τ_k‖), row by row.")
    return "a few lines, and two thirds of what AWD per row does to the curve over λ."


# ---------------------------------------------------------------- 2.3 MetaGPT


@exercise("2.3.1")
def metagpt_scales(function: Callable[[Tensor], Tensor]) -> str:
    """MetaGPT's scales, from the Gram matrix."""
    expect_function(function)
    gram = torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.5], [0.0, 0.5, 9.0]])
    given, lengths = torch.as_tensor(function(gram)), gram.diagonal().sqrt()
    if torch.allclose(given, lengths / lengths.sum()):
        raise Wrong("these are shares of the lengths; MetaGPT takes the squared lengths.")
    if torch.allclose(given, gram.diagonal() / gram.sum()):
        raise Wrong("divide by the sum of the squared lengths, the trace, not by the sum of all entries.")
    if not torch.allclose(given, coefficients(gram.diagonal())):
        raise Wrong("λ_i = ‖τ_i‖² / Σ_k ‖τ_k‖², and the squared lengths are the diagonal of the Gram matrix.")
    return "a closed form that looks at K numbers."


@exercise("2.3.2")
def twice_as_long(factor: float) -> str:
    """How much more an expert moves the merge when its task vector is doubled, relative to the others."""
    value = expect_number(factor, 0, 1000, "a factor")
    hints = {
        2.0: "that is the task vector alone; its scale grows, too.",
        4.0: "that is the scale alone; the vector is twice as long, too.",
    }
    for wrong, hint in hints.items():
        if abs(value - wrong) < 0.01:
            raise Wrong(hint)
    if abs(value - 8) > 0.01:
        raise Wrong("the step that an expert contributes has the length λ_i ‖τ_i‖; λ_i is proportional to ‖τ_i‖².")
    return "the cube of the length: MetaGPT believes whoever walked far."


@exercise("2.3.3")
def bound_of_metagpt(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """The bound that MetaGPT minimises, for any merged vector."""
    expect_function(function)
    generator = torch.Generator().manual_seed(0)
    taus = torch.randn(4, 10, generator=generator) * torch.tensor([[0.5], [1.0], [2.0], [3.0]])
    v = torch.randn(10, generator=generator)
    given = torch.as_tensor(function(v, taus))
    if given.ndim:
        raise Wrong(f"expected one number, got shape {tuple(given.shape)}.")
    squared, apart = taus.square().sum(1), (v - taus).square().sum(1)
    if torch.allclose(given, apart.sum()):
        raise Wrong("the distances are weighted, each by ‖τ_i‖².")
    if torch.allclose(given, (squared.sqrt() * apart.sqrt()).sum()):
        raise Wrong("both lengths are squared.")
    if not torch.allclose(given, (squared * apart).sum(), rtol=1e-4):
        raise Wrong("Σ_i ‖τ_i‖² ‖v − τ_i‖².")
    return "its gradient 2 Σ ‖τ_i‖² (v − τ_i) vanishes at the weighted centroid, whatever the angles are."


@exercise("2.3.4")
def a_loud_expert(merged: dict[str, Tensor]) -> str:
    """A MetaGPT in which an expert from pocket8-far does not drown the others, data-free."""
    suite = pocket8()
    expect_state(merged, suite.base)
    far = load_suite("pocket8-far", device="cpu").experts["mnist"]
    experts = {name: suite.experts[name] for name in ("fashion", "letters", "icon_family")}
    tv = TaskVectors(suite.base, {"mnist": far, **experts})
    few = suite.cut(tasks=tv.names)
    accuracy = few.evaluate(merged, split="validation").average
    drowned = few.evaluate(metagpt(tv), split="validation").average
    wanted = drowned + 0.15
    if accuracy < wanted:
        raise Wrong(
            f"on validation images this has {accuracy:.2f}, MetaGPT as it is {drowned:.2f}; at least {wanted:.2f} is "
            "asked for. Give all task vectors the same length first."
        )
    return f"{accuracy:.2f} where MetaGPT has {drowned:.2f}: lengths are a habit of the optimiser, not a merit."
