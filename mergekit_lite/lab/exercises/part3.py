"""Checkers of part 3: curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lite.calibrated import diagonal_fisher
from mergekit_lite.lab.exercises.checking import Wrong, exercise, expect_function, expect_number, expect_pair
from mergekit_lite.lab.landscape import heights_at, merged_points

# ---------------------------------------------------------------- 3.1 Loss landscapes as ellipsoids


@exercise("3.1.1")
def lowest_point(point: list[float]) -> str:
    """The lowest point of the sum of two bowls over two weights."""
    hints = {
        (2.0, 1.0): "that is the average, and also what the diagonals give; the matrices are tilted.",
        (6.0, 0.0): "that is the right-hand side, C_2 θ_2; now solve (C_1 + C_2) θ = (6, 0).",
        (3.0, 0.0): "you divided by the mean of the matrices; divide by their sum.",
        (0.0, 0.0): "that is expert 1; task 2 has curvature, too.",
    }
    expect_pair(
        point, (1.5, 0.0), hints, "C_1 + C_2 is four times the identity here, and the right-hand side is C_2 (4, 2)."
    )
    return "as low as expert 1 in the second weight, though the diagonals see two equal tasks."


@exercise("3.1.2")
def fisher_of_logits(function: Callable[[Tensor], Tensor]) -> str:
    """The Fisher information of a softmax by its logits."""
    expect_function(function)
    p = _randn(4).softmax(0)
    given = torch.as_tensor(function(p)).double()
    if given.shape != (4, 4):
        raise Wrong(f"expected a matrix of shape (4, 4), got {tuple(given.shape)}.")
    plausible = {
        "that is the mean of 1_c 1_cᵀ alone: each gradient is 1_c - p.": p.diag(),
        "the entries beside the diagonal are missing: raising one logit lowers the other probabilities.": (
            (p - p.square()).diag()
        ),
        "the outer product of p with itself is what is subtracted.": torch.outer(p, p),
        "classes are weighted by p_c; you gave all the same weight.": sum(
            (torch.outer(e - p, e - p) / 4 for e in torch.eye(4).double()), torch.zeros(4, 4).double()
        ),
    }
    for hint, matrix in plausible.items():
        if torch.allclose(given, matrix, atol=1e-6):
            raise Wrong(hint)
    if not torch.allclose(given, p.diag() - torch.outer(p, p), atol=1e-6):
        raise Wrong("write Σ_c p_c (1_c - p)(1_c - p)ᵀ and multiply out; three of the four terms are alike.")
    return "where one p_c is nearly 1 all of it is nearly 0: an expert without doubt has no curvature."


@exercise("3.1.3")
def price_with_random_signs(function: Callable[[Tensor, Tensor], float]) -> str:
    """The mean over all signs of a step's entries of its price in a bowl."""
    expect_function(function)
    root, step = _randn(40, 40, seed=1), _randn(40, seed=2)
    matrix = root @ root.T
    expected = 0.5 * float(matrix.diagonal() @ step.square())
    value = expect_number(function(matrix, step), -1e9, 1e9, "a price")
    wrong = {
        0.5 * float(step @ matrix @ step): "that is the price of the step itself, with the signs it has.",
        2 * expected: "the factor 1/2 of the bowl is missing.",
        0.5 * float(step.abs() @ matrix.abs() @ step.abs()): "signs do not only add up; pairs of entries cancel.",
        0.5 * float(matrix.trace()): "each entry has its own length: square it.",
    }
    for number, hint in wrong.items():
        if abs(value - number) < 1e-3 * abs(number):
            raise Wrong(hint)
    if abs(value - expected) > 1e-3 * expected:
        raise Wrong("the mean of sign i times sign j is 0 for i ≠ j and 1 for i = j.")
    return "so a diagonal is right on average over all signs, and only then."


@exercise("3.1.4")
def image_by_image(function: Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]) -> str:
    """The diagonal of the empirical Fisher of a small network, without torch.func."""
    expect_function(function)
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    x, y = _randn(7, 5, seed=4), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    blocks = diagonal_fisher(model, [(x, y)])
    expected = {name: block.diagonal(model.get_parameter(name)) for name, block in blocks.items()}
    batch = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    given = function(model, x, y)
    if not isinstance(given, dict) or set(given) != set(expected):
        raise Wrong(f"expected a dict with a tensor for each of {', '.join(expected)}.")

    def like(others: Iterable[Tensor], factor: float = 1.0) -> bool:
        return all(
            torch.allclose(torch.as_tensor(given[n]).double(), factor * o, rtol=1e-4, atol=1e-12)
            for n, o in zip(expected, others, strict=True)
        )

    if like([g.square() for g in batch]):
        raise Wrong("that is the square of the mean gradient; square image by image, then take the mean.")
    if like([g.square() for g in batch], len(x) ** 2) or like([g.square() for g in batch], len(x)):
        raise Wrong("the gradients of all images were added up before they were squared.")
    if like(expected.values(), len(x)):
        raise Wrong("a mean over the images, not their sum.")
    if not like(expected.values()):
        raise Wrong("for each image: its own loss, backward, square p.grad, add up; clear p.grad between images.")
    return "one backward pass per image. torch.func does the same for many images at once."


@exercise("3.1.5")
def worse_than_the_average(matrices: Sequence[Any]) -> str:
    """Two bowls for which the diagonals give a worse merge than the average."""
    if len(matrices) != 2:
        raise Wrong(f"expected two matrices, got {len(matrices)}.")
    experts = torch.zeros(2).double(), torch.tensor([2.0, 1.0]).double()
    bowls = {}
    for i, (low, given) in enumerate(zip(experts, matrices, strict=True), start=1):
        matrix = torch.as_tensor(given).double()
        if matrix.shape != (2, 2) or not torch.allclose(matrix, matrix.T):
            raise Wrong(f"C_{i} must be a symmetric matrix of shape (2, 2).")
        if torch.linalg.eigvalsh(matrix).min() < 0:
            raise Wrong(f"C_{i} has a negative eigenvalue: from that expert there is a way down.")
        bowls[f"task {i}"] = low, matrix
    points = merged_points(bowls)
    cost = {name: sum(heights_at(bowls, point).values()) for name, point in points.items()}
    ratio = cost["diagonal"] / max(cost["average"], 1e-12)
    if cost["average"] < 1e-9:
        raise Wrong("the average costs nothing here; give task 1 some curvature along the way between the experts.")
    if ratio <= 1:
        raise Wrong(
            f"the diagonals cost {ratio:.2f} times what the average costs. Let one task be strongly curved across the "
            "line between the experts and hardly along it: the diagonal takes it for strict, and it would not mind."
        )
    if ratio < 2:
        raise Wrong(f"worse than the average, {ratio:.2f} times its cost. Make that task's curvature larger.")
    return f"{ratio:.1f} times the average's cost. For two tasks it can come close to 4."


# ---------------------------------------------------------------- 3.2 RegMean


@exercise("3.2.1")
def row_that_answers_both(row: list[float]) -> str:
    """RegMean for one output, two inputs and one image per task."""
    hints = {
        (1.0, 2.0): "that is the average; it answers (1, 0) with 1 where expert 1 answers 2.",
        (1.0, 4.0): "that is α = 0, column by column; it answers (1, 1) with 5 where expert 2 answers 4.",
        (2.0, 4.0): "each input is given to one expert; then (1, 1) is answered with 6 where expert 2 answers 4.",
        (2.0, 0.0): "that is expert 1; it answers (1, 1) with 2 where expert 2 answers 4.",
        (0.0, 4.0): "that is expert 2; it answers (1, 0) with 0 where expert 1 answers 2.",
    }
    expect_pair(row, (2.0, 2.0), hints, "both errors can be zero: W · (1, 0) = 2 and W · (1, 1) = 4.")
    return "no error is left. The second weight is half-way between the experts, though task 1 never used that input."


@exercise("3.2.2")
def error_without_inputs(function: Callable[[Tensor, Tensor, Tensor], float]) -> str:
    """The mean squared error of a layer's outputs from a Gram matrix."""
    expect_function(function)
    x, weight, expert = _randn(4, 30), _randn(3, 4, seed=1), _randn(3, 4, seed=2)
    gram, d = x @ x.T / 30, weight - expert
    value = expect_number(function(weight, expert, gram), -1e9, 1e9, "a squared error")
    wrong = {
        (d @ gram).square().sum().item(): "‖(W - W_k) A‖² has A twice; the error has it once.",
        (d.square() * gram.diagonal()).sum().item(): "this uses A's diagonal alone.",
        (d.square().sum() * gram.trace()).item(): "lengths are not enough: it matters which inputs meet which weights.",
        (d @ gram @ d.T).sum().item(): "take the trace, the sum over the outputs, not the sum of all entries.",
        (d @ gram @ d.T).trace().item() / 3: "a mean over places, and a sum over outputs.",
    }
    for number, hint in wrong.items():
        if abs(value - number) < 1e-6 * abs(number):
            raise Wrong(hint)
    if abs(value - (d @ x).square().sum(0).mean().item()) > 1e-6 * value:
        raise Wrong("write the mean of ‖D a‖² as a trace of D, A and Dᵀ, with D = W - W_k.")
    return "nobody had to show an input."


@exercise("3.2.3")
def one_layer(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """RegMean for one linear layer, also where there were no inputs."""
    expect_function(function)
    weights = _randn(3, 2, 5, seed=1)
    inputs = _randn(3, 5, 40, seed=2)
    unused = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)[:, None]
    for x in (inputs, inputs * unused):
        grams = x @ x.transpose(1, 2) / x.shape[2]
        total, average = grams.sum(0), weights.mean(0)
        inverse = torch.linalg.pinv(total, hermitian=True)
        answer = torch.as_tensor(function(weights, grams)).double()
        if answer.shape != average.shape:
            raise Wrong(f"expected a weight of shape {tuple(average.shape)}, got {tuple(answer.shape)}.")
        diagonals = grams.diagonal(dim1=1, dim2=2)
        columns = weights * diagonals[:, None]
        plausible = {
            "this is the average.": average,
            "this uses the diagonals alone (α = 0).": torch.nan_to_num(columns.sum(0) / diagonals.sum(0)),
            "the sum of all W_k times the sum of all A_k is not the sum of W_k A_k.": weights.sum(0),
        }
        for hint, weight in plausible.items():
            if torch.allclose(answer, weight, atol=1e-6):
                raise Wrong(hint)
        if not torch.isfinite(answer).all() or answer.abs().max() > 1e3:
            raise Wrong("two inputs that are always 0 make the sum singular; use the pseudo-inverse.")
        right = average + ((weights - average) @ grams).sum(0) @ inverse
        if torch.allclose(answer @ total, right @ total, atol=1e-6) and not torch.allclose(answer, right, atol=1e-6):
            raise Wrong("where no task has inputs you return 0; keep the average there: regress what it gets wrong.")
        if not torch.allclose(answer, right, atol=1e-6):
            raise Wrong("W (Σ A_k) = Σ W_k A_k: the weights stand to the left of the Gram matrices.")
    return "this is mkl.regmean, for a layer in memory."


@exercise("3.2.4")
def who_was_there(function: Callable[[Tensor, Tensor], Sequence[Any]]) -> str:
    """Which vectors can have been among the inputs of a Gram matrix."""
    expect_function(function)
    inputs = _randn(12, 4, seed=3)
    others = _randn(12, 3, seed=4) * 3  # long ones
    candidates = torch.stack([others[:, 0], inputs[:, 0], inputs[:, 2] * 0.2, others[:, 1], inputs[:, 3], others[:, 2]])
    gram, expected = inputs @ inputs.T / 4, [False, True, True, False, True, False]
    given = [bool(x) for x in function(gram, candidates)]
    if len(given) != len(expected):
        raise Wrong(f"expected one answer for each of {len(expected)} candidates, got {len(given)}.")
    if all(given):
        raise Wrong("three of these six were never seen; a matrix from 4 inputs has rank 4.")
    if given[2] != given[1]:
        raise Wrong("how long a candidate is says nothing; look at what of it lies outside the space of A.")
    if given != expected:
        raise Wrong("a candidate that was there has no part along eigenvectors of A with eigenvalue zero.")
    return "with fewer inputs than dimensions a Gram matrix tells who was there; take many more, or add noise."


@exercise("3.2.5")
def onto_the_experts_outputs(function: Callable[[list[Tensor], list[Tensor]], Tensor]) -> str:
    """Least squares from the merge's inputs to the experts' outputs."""
    expect_function(function)
    weights = _randn(2, 3, 5, seed=1)
    there = [_randn(5, 60, seed=2), _randn(5, 30, seed=3)]
    here = [x + 0.5 * _randn(*x.shape, seed=4) for x in there]
    targets = [w @ x for w, x in zip(weights, there, strict=True)]

    def solve(xs: list[Tensor], ys: list[Tensor], mean: bool = True) -> Tensor:
        sizes = [x.shape[1] if mean else 1 for x in xs]
        total = sum((x @ x.T / n for x, n in zip(xs, sizes, strict=True)), torch.zeros(5, 5).double())
        cross = sum((y @ x.T / n for x, y, n in zip(xs, ys, sizes, strict=True)), torch.zeros(3, 5).double())
        return cross @ torch.linalg.inv(total)

    answer = torch.as_tensor(function(here, targets)).double()
    if answer.shape != (3, 5):
        raise Wrong(f"expected a weight of shape (3, 5), got {tuple(answer.shape)}.")
    if torch.allclose(answer, solve(here, targets, mean=False), atol=1e-6):
        raise Wrong("task 1 has twice as many places here and counts twice: divide by the number of columns.")
    if not torch.allclose(answer, solve(here, targets), atol=1e-6):
        raise Wrong("with the gradient at zero, W Σ X_k X_kᵀ = Σ Y_k X_kᵀ, each term divided by its columns.")
    return "now a layer also makes up for what the layers before it got wrong."


# ---------------------------------------------------------------- 3.3 MaTS


@exercise("3.3.1")
def without_writing_out(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """The product with a sum of Kronecker products, never written out."""
    expect_function(function)
    a, b, v = _positive(3, 5), _positive(3, 4, seed=1), _randn(4, 5, seed=2)
    answer = torch.as_tensor(function(a, b, v))
    if answer.shape != v.shape:
        raise Wrong(f"expected a matrix of v's shape {tuple(v.shape)}, got {tuple(answer.shape)}.")
    hints = {
        "the product of the sums is not the sum of the products.": b.sum(0) @ v @ a.sum(0),
        "this is the mean over tasks; the system has the sum.": (b @ v @ a).mean(0),
        "you added what A and B do; they act one after the other.": (b @ v + v @ a).sum(0),
        "this uses the inputs alone: RegMean's C.": (v @ a).sum(0),
    }
    for hint, wrong in hints.items():
        if torch.allclose(answer, wrong):
            raise Wrong(hint)
    written = torch.stack([torch.kron(x, y) for x, y in zip(a, b, strict=True)]).sum(0)
    if not torch.allclose(answer, (written @ v.T.flatten()).view(5, 4).T):
        raise Wrong("each task gives B_k V A_k: outputs from the left, inputs from the right.")
    return "for 672 x 112 weights these are 59 million multiplications per task; written out, 5.7 billion."


@exercise("3.3.2")
def steps_by_the_bound(function: Callable[[float, float], int]) -> str:
    """After how many steps conjugate gradients are sure to have reached an error."""
    expect_function(function)
    for kappa, error in ((100.0, 0.01), (5000.0, 1e-4), (2.0, 1e-6)):
        value = expect_number(function(kappa, error), 0, 1e12, "a number of steps")

        def steps(root: float, factor: float, error: float = error) -> float:
            return math.log(factor / error) / math.log((root + 1) / (root - 1))

        right = math.ceil(steps(kappa**0.5, 2))
        wrong = {
            steps(kappa, 2): "that is with κ; conjugate gradients have its root (steepest descent has κ).",
            steps(kappa**0.5, 1): "there is a factor 2 in front.",
            steps(kappa**0.5, 2 * error**0.5): "the bound is of the error itself, not of its square.",
        }
        for number, hint in wrong.items():
            if abs(value - math.ceil(number)) < 0.01 and math.ceil(number) != right:
                raise Wrong(hint)
        if abs(value - right) > 0.01:
            raise Wrong(f"for κ = {kappa:g} and an error of {error:g} it is {right}: the next whole number.")
    return "about √κ/2 for each factor e: a hundred times larger κ, ten times more steps."


@exercise("3.3.3")
def curvature_of_gradients(function: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> str:
    """The exact empirical Fisher information of a layer as a linear function."""
    expect_function(function)
    gradients, v = _randn(6, 3, 4), _randn(3, 4, seed=1)
    made = function(gradients)
    if not callable(made):
        raise Wrong("return a function of V, the one that multiplies by C.")
    answer, flat = torch.as_tensor(made(v)), gradients.flatten(1)
    if answer.shape != v.shape:
        raise Wrong(f"C V has V's shape {tuple(v.shape)}; got {tuple(answer.shape)}.")
    mean = gradients.mean(0)
    matrix = flat.T @ flat / len(flat)
    hints = {
        "the outer product of the mean gradient is not the mean of the outer products.": mean * (mean * v).sum(),
        "this is the diagonal alone.": gradients.square().mean(0) * v,
        "a mean over images, not a sum.": (matrix @ v.flatten()).view_as(v) * len(flat),
        "V is multiplied twice: ⟨G, V⟩ is one number per image.": (matrix @ v.flatten()).view_as(v) * v,
    }
    for hint, wrong in hints.items():
        if torch.allclose(answer, wrong):
            raise Wrong(hint)
    if not torch.allclose(answer, (matrix @ v.flatten()).view_as(v)):
        raise Wrong("C V is the mean over images of ⟨G, V⟩ G.")
    return "no independence was assumed. Give mkl.mats such a function for each expert and tensor."


@exercise("3.3.4")
def two_tasks_in_closed_form(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """The K-FAC system of two tasks, solved."""
    expect_function(function)
    a, b, w = _positive(2, 5), _positive(2, 4, seed=1), _randn(2, 4, 5, seed=2)
    answer = torch.as_tensor(function(a, b, w)).double()
    if answer.shape != w[0].shape:
        raise Wrong(f"expected a weight of shape {tuple(w[0].shape)}, got {tuple(answer.shape)}.")
    right = (b @ w @ a).sum(0)
    hints = {
        "this is RegMean: the outputs' matrices are missing.": (w @ a).sum(0) @ torch.linalg.inv(a.sum(0)),
        "the inputs' matrices are missing.": torch.linalg.inv(b.sum(0)) @ (b @ w).sum(0),
        "the inverse of a sum of products is not the product of the sums' inverses.": (
            torch.linalg.inv(b.sum(0)) @ right @ torch.linalg.inv(a.sum(0))
        ),
        "this is the average.": w.mean(0),
    }
    for hint, wrong in hints.items():
        if torch.allclose(answer, wrong, atol=1e-6):
            raise Wrong(hint)
    if not torch.allclose((b @ answer @ a).sum(0), right, atol=1e-5 * float(right.abs().max())):
        raise Wrong("put it into the system: B_1 W A_1 + B_2 W A_2 is not B_1 W_1 A_1 + B_2 W_2 A_2.")
    return "two matrices are diagonal in common coordinates; eight are not, and so there are conjugate gradients."


def _positive(count: int, n: int, seed: int = 0) -> Tensor:
    """Symmetric matrices with positive eigenvalues, (count, n, n)."""
    factors = _randn(count, n, n + 1, seed=seed + 10)
    return factors @ factors.mT


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
