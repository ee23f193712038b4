"""Checkers of part 2: interference and orthogonality, AWD, MetaGPT, spectra."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_lite.data_free import average, consensus, metagpt, task_arithmetic, ties, tsv
from mergekit_lite.data_free.awd_solvers import objective
from mergekit_lite.data_free.metagpt import coefficients
from mergekit_lite.geometry import cosines, grams, rows_of, slopes
from mergekit_lite.lab.exercises.checking import (
    Wrong,
    distance,
    exercise,
    expect_function,
    expect_number,
    expect_pair,
    expect_state,
    pocket8,
    same,
)
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
    tv = TaskVectors(suite.base, {"mnist": far} | experts)
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


# ---------------------------------------------------------------- 2.6 Which data-free method?


@exercise("2.6.1")
def spearman(function: Callable[[list[float], list[float]], float]) -> str:
    """Spearman's rank correlation, from the differences of ranks."""
    expect_function(function)
    generator = torch.Generator().manual_seed(3)
    for n in (4, 7, 12):
        a = torch.randn(n, generator=generator, dtype=torch.float64).exp()
        b = a + 2 * torch.randn(n, generator=generator, dtype=torch.float64)
        value = expect_number(function(a.tolist(), b.tolist()), -100, 100, "a correlation")
        ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
        squared = (ranks[0] - ranks[1]).square().sum().item()
        expected = 1 - 6 * squared / (n * (n**2 - 1))
        order = torch.stack([a.argsort(), b.argsort()]).double()
        mistaken = 1 - 6 * (order[0] - order[1]).square().sum().item() / (n * (n**2 - 1))
        if abs(value - expected) < 1e-6:
            continue
        if abs(value - torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 1e-6:
            raise Wrong("that is the correlation of the values; replace each list by its ranks first.")
        if abs(value - (1 - squared / (n * (n**2 - 1)))) < 1e-6:
            raise Wrong("the factor 6 is missing: with it the opposite order gives -1.")
        if abs(value - mistaken) < 1e-6:
            raise Wrong("sorting once tells who stands at each place; a rank is the place at which each one stands.")
        raise Wrong(f"for {n} methods it should be {expected:.3f}; got {value:.3f}. It is 1 - 6 Σ d² / (n (n² - 1)).")
    return "with seven methods, two neighbours that change places cost 0.036."


@exercise("2.6.2")
def paired(function: Callable[[list[float], list[float]], float]) -> str:
    """The mean of paired differences in units of its standard error."""
    expect_function(function)
    cases = [([0.50, 0.55, 0.61], [0.48, 0.54, 0.58]), ([0.51, 0.49, 0.52, 0.55], [0.52, 0.53, 0.50, 0.58])]
    for a, b in cases:
        first, second = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        d, n = first - second, len(a)
        value = expect_number(function(list(a), list(b)), -1e6, 1e6, "a ratio")
        expected = (d.mean() / d.std() * n**0.5).item()
        unpaired = (d.mean() / ((first.var() + second.var()) / n).sqrt()).item()
        if abs(value - expected) < 1e-4 * abs(expected):
            continue
        if abs(value - unpaired) < 1e-4 * abs(unpaired):
            raise Wrong("this takes the two methods for independent; take the difference seed by seed first.")
        if abs(value - expected / n**0.5) < 1e-4 * abs(expected):
            raise Wrong("you divided by the spread of one difference; the mean of n has a spread smaller by √n.")
        if abs(value - expected * (n / (n - 1)) ** 0.5) < 1e-4 * abs(expected):
            raise Wrong("estimate the spread with n - 1, not n: with three seeds that is a lot.")
        raise Wrong(f"for {a} and {b} it should be {expected:.2f}; got {value:.2f}.")
    return "pairing takes away what makes a seed easy or hard for every method."


@exercise("2.6.3")
def optimism(function: Callable[[list[float], list[float]], float]) -> str:
    """What choosing on the test images would have added to the result."""
    expect_function(function)
    cases = [([0.50, 0.56, 0.55, 0.40], [0.47, 0.51, 0.52, 0.39]), ([0.30, 0.20], [0.35, 0.31])]
    for validation, test in cases:
        value = expect_number(function(list(validation), list(test)), -1, 1, "a difference of accuracies")
        expected = max(test) - test[validation.index(max(validation))]
        if abs(value - expected) < 1e-9:
            continue
        if abs(value - (max(validation) - max(test))) < 1e-9:
            raise Wrong("these accuracies are of different images; compare two test accuracies.")
        if abs(value - (max(validation) - test[validation.index(max(validation))])) < 1e-9:
            raise Wrong("validation and test images need not be equally hard; compare two test accuracies.")
        raise Wrong(f"for {validation} on validation and {test} on test images it should be {expected:.3f}.")
    return "never negative, whatever happens: that is what makes it optimism."


@exercise("2.6.4")
def weakest_of_two(name: str) -> str:
    """The method that suffers most when only two experts are merged."""
    few = pocket8().cut(tasks=["photo_digits", "letters"])
    methods: dict[str, Callable[..., dict[str, Tensor]]]
    methods = {"average": average, "Consensus": consensus, "TIES": ties, "TSV": tsv}
    if name not in methods:
        raise Wrong(f"choose one of {', '.join(methods)}; got '{name}'.")
    found = {m: few.evaluate(f(few.task_vectors), split="validation").average for m, f in methods.items()}
    weakest = min(found, key=lambda m: found[m])
    if name != weakest:
        raise Wrong(
            f"{name} has {found[name]:.2f}. Which method keeps a weight only if several tasks agree that they use it?"
        )
    others = ", ".join(f"{m} {value:.2f}" for m, value in found.items() if m != weakest)
    return f"{weakest} has {found[weakest]:.2f} ({others}): with two experts, two of two have to agree."


@exercise("2.6.5")
def your_own(method: Callable[[TaskVectors], dict[str, Tensor]]) -> str:
    """A merging method of the reader's own that beats task arithmetic at its best scale."""
    expect_function(method)
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(4, 6, generator=generator), "b": torch.randn(4, generator=generator)}
    others = [{n: t + torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(3)]
    try:
        elsewhere = method(TaskVectors(base, others))
        expect_state(elsewhere, base)
    except Exception as problem:
        raise Wrong(
            f"on task vectors of another network it does not work ({problem}). A data-free method looks at its task "
            "vectors and at nothing else: no images, no labels, no names."
        ) from None
    few = pocket8().cut(60)
    tv = few.task_vectors
    merged = method(tv)
    expect_state(merged, few.base)
    if same(merged, few.base):
        raise Wrong("this is the base: nothing was merged.")
    if any(same(merged, expert) for expert in few.experts.values()):
        raise Wrong("this is one of the experts: nothing was merged.")
    backwards = method(tv.subset(tv.names[::-1]))
    if distance(backwards, merged) > 1e-4:
        raise Wrong("the order of the experts makes a difference; none of them comes first.")
    accuracy = few.evaluate(merged, split="validation").average
    wanted = few.evaluate(task_arithmetic(tv, scale=0.2), split="validation").average + 0.02
    if accuracy < wanted:
        raise Wrong(
            f"it has {accuracy:.2f}; two points more than task arithmetic at λ = 0.2 are asked for: {wanted:.2f}."
        )
    return f"{accuracy:.2f} where task arithmetic has {wanted - 0.02:.2f}. Now tune it, and try three seeds."


# ---------------------------------------------------------------- 2.5 Spectra


@exercise("2.5.1")
def triples_for_energy(function: Callable[[Tensor, float], int]) -> str:
    """The smallest number of singular triples that hold a share of a matrix's energy."""
    expect_function(function)
    generator = torch.Generator().manual_seed(0)
    for sizes in (torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5]), 0.7 ** torch.arange(12.0)):
        left, right = (torch.linalg.qr(torch.randn(len(sizes) + 4, len(sizes), generator=generator)).Q for _ in "ab")
        matrix = (left * sizes) @ right.T
        for share in (0.3, 0.55, 0.85, 0.97):
            value = expect_number(function(matrix, share), 0, len(sizes) + 4, "a number of triples")
            expected, of_values = (
                int((held < share * held[-1]).sum()) + 1 for held in (sizes.square().cumsum(0), sizes.cumsum(0))
            )
            if value == of_values != expected:
                raise Wrong("you added up the singular values; the energy is the sum of their squares.")
            if value == expected - 1:
                raise Wrong(f"one too few: {expected - 1} triples hold less than {share:g} of the energy.")
            if value != expected:
                raise Wrong(f"for singular values proportional to {sizes.tolist()[:4]}, ... and {share:g}: {expected}.")
    return "a few of them hold most of a task matrix, and it takes most of them for a random one."


@exercise("2.5.2")
def nearest_orthonormal(function: Callable[[Tensor], Tensor]) -> str:
    """The nearest matrix with orthonormal columns."""
    expect_function(function)
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    answer = function(given)
    if answer.shape != given.shape:
        raise Wrong(f"expected a matrix of shape {tuple(given.shape)}, got {tuple(answer.shape)}.")
    product = answer.T @ answer
    if not torch.allclose(product, torch.eye(4, dtype=product.dtype), atol=1e-6):
        if torch.allclose(product.diagonal(), torch.ones(4, dtype=product.dtype), atol=1e-6):
            raise Wrong("the columns have length 1, but they are not orthogonal.")
        raise Wrong("the columns are not orthonormal; is the power of UᵀU minus one half?")
    if not torch.allclose(answer, left @ right, atol=1e-6):
        raise Wrong(
            f"orthonormal, but at a distance of {(answer - given).norm():.2f}, and there is a matrix at "
            f"{(left @ right - given).norm():.2f}. Did you leave out the last factor Eᵀ, or use Gram and Schmidt?"
        )
    return "all columns give way a little, and their order plays no role."


@exercise("2.5.3")
def least_disturbing_row(row: list[float]) -> str:
    """The row with WUDI's least loss for (3, 0) and (1, 1)."""
    hints = {
        (4.0, 1.0): "that is the sum of the task vectors; it answers (1, 1) with 5 where task 2 answers 2.",
        (2.0, 0.5): "that is the average; it answers (3, 0) with 6 where task 1 answers 9.",
        (3.0, 1.0): "task 1 is answered; (1, 1) is answered with 4 where task 2 answers 2.",
    }
    expect_pair(row, (3.0, -1.0), hints, "both terms can be zero: Δ · (3, 0) = 9 and Δ · (1, 1) = 2.")
    return "the loss is zero, at a weight of the opposite sign to everything that was learnt."


@exercise("2.5.4")
def loud_directions_lowered(method: Callable[..., dict[str, Tensor]]) -> str:
    """The sum of the task vectors with no singular value above the mean."""
    expect_function(method)
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv": (12, 5, 3, 3), "depthwise": (12, 1, 3, 3), "linear": (10, 8), "bias": (10,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    taus = [{n: torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(3)]
    tv = TaskVectors(base, [{n: base[n] + tau[n] for n in base} for tau in taus])
    merged = method(tv, scale=0.5)
    expect_state(merged, base)
    for name in ("linear", "conv"):
        moved = (merged[name] - base[name]).flatten(1)
        total = torch.stack([tau[name].flatten(1) for tau in taus]).sum(0)
        u, sigma, v = torch.linalg.svd(total, full_matrices=False)
        mean = sigma.mean()
        plausible = {
            "the singular values below the mean were changed; leave them (Iso-C changes them).": mean.expand_as(sigma),
            "you raised what is below the mean; lower what is above it.": sigma.clamp(min=mean.item()),
            "this is plain task arithmetic: nothing was lowered.": sigma,
            "the scale has no effect.": 2 * sigma.clamp(max=mean.item()),
            "lower the singular values of the sum, not of the average.": sigma.clamp(max=mean.item()) / 3,
        }
        for hint, values in plausible.items():
            if torch.allclose(moved, 0.5 * (u * values) @ v, atol=1e-4):
                raise Wrong(f"'{name}': {hint}")
        if not torch.allclose(moved, 0.5 * (u * sigma.clamp(max=mean.item())) @ v, atol=1e-4):
            raise Wrong(f"'{name}' is not λ U min(Σ, mean of Σ) Vᵀ, read as outputs x (all the rest).")
    for name in ("depthwise", "bias"):
        average = torch.stack([tau[name] for tau in taus]).mean(0)
        if not torch.allclose(merged[name] - base[name], 0.5 * average, atol=1e-4):
            raise Wrong(f"'{name}' is no matrix: it gets the average of its task vectors, times the scale.")
    return "the loud directions are lowered, and no weak one is exaggerated."


# ---------------------------------------------------------------- 2.4 Sign conflicts and redundancy


@exercise("2.4.1")
def noise_of_dropping(function: Callable[[Tensor, Tensor, float], float]) -> str:
    """The expected squared error of one output after DARE."""
    expect_function(function)
    x, tau, p = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 1.0, -0.1]), 0.8
    value = expect_number(function(x, tau, p), -1e6, 1e6, "a squared error")
    squares = float((x * tau).square().sum())
    wrong = {
        p * (1 - p) * squares: "that is the variance without rescaling; the survivors are divided by 1 - p.",
        p / (1 - p) * float((x * tau).sum()) ** 2: "square each term, then sum: the masks are independent.",
        p / (1 - p) * float(tau.square().sum()): "the inputs count, too: x_i² stands with τ_i².",
        (1 - p) / p * squares: "the more is dropped, the larger the error: p / (1 - p).",
    }
    for number, hint in wrong.items():
        if abs(value - number) < 1e-4 * number:
            raise Wrong(hint)
    if abs(value - p / (1 - p) * squares) > 1e-4 * squares:
        raise Wrong(f"for x = (1, -2, 3), τ = (.5, 1, -.1), p = .8 it should be {p / (1 - p) * squares:.2f}.")
    return "no term depends on the sign of an input or an entry: this error cannot add up in one direction."


@exercise("2.4.2")
def majority_of_tasks(function: Callable[[Tensor], Tensor]) -> str:
    """An election in which every task that was not trimmed has one vote."""
    expect_function(function)
    taus = torch.tensor(
        [[5.0, 0.0, -1.0, 0.2, 3.0], [-1.0, 0.0, 2.0, 0.3, 0.0], [-1.0, 0.0, 0.0, -9.0, 0.0], [0.0, 0.0, 0.0, 0.1, 0.0]]
    )
    given, expected = torch.as_tensor(function(taus)).float(), torch.tensor([-1.0, 0.0, 0.0, 1.0, 1.0])
    if given.shape != expected.shape:
        raise Wrong(f"expected one sign per entry, shape (n,); got {tuple(given.shape)}.")
    if torch.equal(given, taus.sum(0).sign()):
        raise Wrong("this is TIES's election, by mass; count the tasks, however loud they are.")
    if torch.equal(given, taus.sign().sum(0)):
        raise Wrong("this is by how many votes a sign wins; take its sign.")
    if torch.equal(given, (taus.sign().sum(0) >= 0).float() * 2 - 1):
        raise Wrong("without votes, or with a draw, the sign is 0.")
    if not torch.equal(given, expected):
        raise Wrong("sum the signs of the entries over the tasks, axis 0, and take the sign of the sum.")
    return "democracy instead of shareholding."


@exercise("2.4.3")
def highest_probability(function: Callable[[Tensor, Tensor, float], float]) -> str:
    """The largest p at which the outputs of a layer have a given relative error."""
    expect_function(function)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, 30, generator=generator)
    taus = torch.randn(6, 30, generator=generator) + 0.5
    squared, apart = (x @ taus.T).square().mean().item(), (x.square() @ taus.square().T).mean().item()
    for error in (0.2, 1.0):
        odds = error * squared / apart
        value = expect_number(function(taus, x, error), -1e6, 1e6, "a probability")
        wrong = {
            odds: "that is p / (1 - p); solve it for p.",
            error / (1 + error): "the coherence is missing.",
            error * apart / squared / (1 + error * apart / squared): "the coherence is upside down.",
        }
        for number, hint in wrong.items():
            if abs(value - number) < 1e-3:
                raise Wrong(hint)
        if abs(value - odds / (1 + odds)) > 1e-3:
            raise Wrong(
                f"with a coherence of {squared / apart:.1f} and an error of {error} it is {odds / (1 + odds):.3f}."
            )
    return "p is set by the layer that bears least; one number for a whole network wastes the wide layers."


@exercise("2.4.4")
def merge_at_a_distance(function: Callable[..., dict[str, Tensor]]) -> str:
    """A merge of any method at a given distance from the base."""
    expect_function(function)
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(5, 8, generator=generator), "b": torch.randn(5, generator=generator)}
    tv = TaskVectors(base, [{n: t + torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in "123"])
    for method in (task_arithmetic, metagpt):
        merged = method(tv)
        given = function(tv, method, 2.5)
        expect_state(given, base)
        direction, found = TaskVectors(base, [merged]).flat()[0], TaskVectors(base, [given]).flat()[0]
        if torch.allclose(found, 2.5 * direction, atol=1e-4):
            raise Wrong("2.5 is a distance here, not a scale: divide by the length of the method's step.")
        if torch.allclose(found, 2.5 / direction.norm() ** 2 * direction, atol=1e-4):
            raise Wrong("gram() holds the squared length; take its root.")
        if abs(found.norm() - 2.5) > 1e-3:
            raise Wrong(f"asked for a distance of 2.5, you are {found.norm():.2f} from the base.")
        if torch.cosine_similarity(direction, found, dim=0) < 1 - 1e-5:
            raise Wrong("the distance is right, the direction is not the method's: one factor for the whole network.")
    return "at 3 task arithmetic is ahead on pocket8, at 6 TIES is: say at which length you compare."
