"""Checkers of part 1: the first merge, task arithmetic, why merging works."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_lite.data_free import average, task_arithmetic
from mergekit_lite.lab.exercises.checking import (
    Wrong,
    exercise,
    expect_function,
    expect_number,
    expect_state,
    pocket8,
    same,
)
from mergekit_lite.suites.suite import Suite
from mergekit_lite.task_vectors import TaskVectors

State = Mapping[str, Tensor]


# ---------------------------------------------------------------- 1.1 Your first merge


@exercise("1.1.1")
def weights_for_the_average(merged: State) -> str:
    """An average in which mnist has three times the weight of every other task."""
    tv = pocket8().task_vectors
    expect_state(merged, tv.base)

    def weighted(heavy: str) -> State:
        return average(tv, weights=[3.0 if name == heavy else 1.0 for name in tv.names])

    if same(merged, average(tv)):
        raise Wrong("this is the plain average; give `mkl.average` its weights.")
    for name in tv.names:
        if name != "mnist" and same(merged, weighted(name)):
            raise Wrong(f"the weight of 3 went to {name}; `tv.names` gives the order of the weights.")
    if not same(merged, weighted("mnist")):
        raise Wrong("the other seven tasks should have the weight 1, all of them.")
    return "mnist gains, and seven tasks pay: 3/10 of the average is its, 1/10 each of the others'."


@exercise("1.1.2")
def fewer_tasks(best_scale: float) -> str:
    """The best λ for mnist and fashion alone, on validation images."""
    value = expect_number(best_scale, 0, 5, "a scale")
    if value < 0.35:
        raise Wrong("that is about the best λ for eight tasks. Take tv.subset([...]) of the two tasks first.")
    if value > 1.0:
        raise Wrong("beyond 1 both tasks fall again; look at your sweep's maximum.")
    return "two tasks disturb each other less than eight, so the top lies further out."


@exercise("1.1.3")
def length_of_the_mean(ratio: float) -> str:
    """‖mean τ‖ over the length that orthogonal task vectors would give it."""
    gram = pocket8().task_vectors.gram()
    squared = float(gram.sum() / gram.trace())
    value = expect_number(ratio, 0, 100, "a ratio")
    if abs(value - squared) < 1e-3:
        raise Wrong("that is the ratio of the squared lengths; take the square root.")
    if abs(value - squared**0.5) > 1e-3:
        raise Wrong(
            "the squared length of the mean is the sum of all entries of the Gram matrix over K²; for "
            "orthogonal task vectors only the diagonal remains."
        )
    return "a little above 1: the small positive cosines add up, because there are K² - K of them."


@exercise("1.1.4")
def median(method: Callable[..., State]) -> str:
    """A merge by the median of the task vectors, as a function of tv and scale."""
    expect_function(method)
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(4, 3, generator=generator)}
    taus = torch.randn(6, 4, 3, generator=generator)
    tv = TaskVectors(base, [{"w": base["w"] + tau} for tau in taus])
    merged = method(tv, scale=2.0)
    expect_state(merged, base)
    moved = merged["w"] - base["w"]
    middle = taus.quantile(0.5, dim=0)
    close = {
        "this is the mean, not the median.": 2 * taus.mean(0),
        "torch.median takes the lower of the two middle values, which pushes every weight the same way; take "
        "taus.quantile(0.5, dim=0).": 2 * taus.median(0).values,
        "the scale has no effect.": middle,
        "tv.map adds what your function returns to the base; you added the base once more.": 2 * middle + base["w"],
        "the median is taken over the tasks, which are axis 0 of taus.": 2 * taus.quantile(0.5).expand(4, 3),
    }
    for hint, wrong in close.items():
        if torch.allclose(moved, wrong, atol=1e-5):
            raise Wrong(hint)
    if not torch.allclose(moved, 2 * middle, atol=1e-5):
        raise Wrong("return scale * (the median over axis 0 of taus) inside tv.map.")
    return "a weight that only one task moves has a median near zero: the median throws away what makes experts differ."


# ---------------------------------------------------------------- 1.2 Task arithmetic


@exercise("1.2.1")
def take_one_out(merged: State) -> str:
    """The merge θ0 + 0.2 Σ τ of eight tasks with the part of fashion taken out again."""
    tv = pocket8().task_vectors
    expect_state(merged, tv.base)
    scales = torch.full((len(tv),), 0.2)
    fashion = tv.names.index("fashion")

    def with_fashion(scale: float) -> State:
        changed = scales.clone()
        changed[fashion] = scale
        return task_arithmetic(tv, scale=changed.tolist())

    if same(merged, with_fashion(0.2)):
        raise Wrong("fashion is still in it, with the scale 0.2.")
    if same(merged, with_fashion(-0.8)):
        raise Wrong("you took out the whole task vector; only 0.2 of it was added.")
    if same(merged, with_fashion(0.4)):
        raise Wrong("you added it once more; the sign.")
    if not same(merged, with_fashion(0.0)):
        raise Wrong("subtract 0.2 times the task vector of fashion from the merge, and nothing else.")
    return "addition of task vectors can be undone exactly, by whoever kept the task vector."


@exercise("1.2.2")
def forget_all_digits(edited: State) -> str:
    """A network that has forgotten both tasks about digits, and little else."""
    suite = pocket8()
    expect_state(edited, suite.base)
    digits = {"mnist": 0.10, "photo_digits": 0.02}  # what each must lose
    others = [task for task in suite.tasks if task not in digits]
    before, after = suite.evaluate(split="validation"), suite.evaluate(edited, split="validation")
    kept = sum(after[task] for task in others) / sum(before[task] for task in others)
    for task, wanted in digits.items():
        lost = before[task] - after[task]
        if lost < 0:
            raise Wrong(f"{task} has gained {-100 * lost:.0f} points: walk against the task vectors, not along them.")
        if lost < wanted:
            raise Wrong(f"{task} has lost {100 * lost:.1f} points; {100 * wanted:.0f} are asked for.")
    if kept < 0.9:
        raise Wrong(f"the other six tasks keep {100 * kept:.0f} % of the base's accuracy; smaller scales.")
    return f"both are forgotten in part, and the other six tasks keep {100 * kept:.0f} %."


@exercise("1.2.3")
def luck(function: Callable[[float, int, int], float]) -> str:
    """The winner's expected excess over its true accuracy, among equally good candidates."""
    expect_function(function)
    generator = torch.Generator().manual_seed(0)
    for p, images, candidates in ((0.5, 100, 20), (0.5, 400, 20), (0.8, 100, 2)):
        draws = torch.full((4000, candidates), float(images))
        accuracies = torch.binomial(draws, torch.full_like(draws, p), generator=generator) / images
        expected = (accuracies.max(1).values.mean() - p).item()
        value = expect_number(function(p, images, candidates), -1, images + 1, "an excess of accuracy")
        if value > 1:
            raise Wrong("the excess is a share of the images, between 0 and 1: divide the counts by their number.")
        if abs(value - p - expected) < 0.1 * expected:
            raise Wrong("that is the winner's accuracy; subtract the true accuracy p.")
        if abs(value) < 0.1 * expected:
            raise Wrong("that is the excess of an average candidate, which is zero; take the best of each round.")
        if abs(value - expected) > 0.15 * expected:
            raise Wrong(f"for p = {p}, {images} images and {candidates} candidates it should be near {expected:.3f}.")
    return "four times the images halve the luck; the number of candidates matters much less than the number of images."


@exercise("1.2.4")
def eight_scales_on_eighty_images(scales: Sequence[float]) -> str:
    """Eight scales that beat the common one on ten validation images per task."""
    suite = pocket8()
    tv = suite.task_vectors
    numbers = [expect_number(s, -1, 3, "a scale") for s in scales]
    if len(numbers) != len(tv):
        raise Wrong(f"one scale per task: expected {len(tv)}, got {len(numbers)}.")

    def gain(images: Suite) -> float:
        """Points over the common scale, on validation images."""
        mine, common = (images.evaluate(task_arithmetic(tv, scale=s), split="validation") for s in (numbers, 0.2))
        return 100 * (mine.average - common.average)

    on_eighty = gain(suite.cut(10))
    if on_eighty < 3:
        raise Wrong(
            f"on the eighty images of suite.cut(10) this is {on_eighty:+.1f} points from the common λ = 0.2; three "
            "are asked for. Move one scale at a time and keep what helps."
        )
    return f"{on_eighty:+.1f} points on the eighty images you chose by, {gain(suite):+.1f} on all validation images."


# ---------------------------------------------------------------- 1.3 Why merging works


@exercise("1.3.1")
def barrier(function: Callable[[Sequence[float]], float]) -> str:
    """How far a curve of accuracies dips below the straight line between its ends."""
    expect_function(function)
    cases = {
        (0.9, 0.5, 0.9): (0.4, "a dip of 0.4 between two ends of 0.9 is a barrier of 0.4."),
        (0.8, 0.7, 0.6): (0.0, "a straight line has no barrier, also if its ends differ."),
        (0.9, 0.4, 0.2, 0.7): (
            0.566667,
            "measure against the line between the ends at the same place, not their mean.",
        ),
        (0.5, 0.9, 0.7): (0.0, "a curve that stays above the line has the barrier 0."),
    }
    for curve, (expected, hint) in cases.items():
        if abs(float(function(list(curve))) - expected) > 1e-4:
            raise Wrong(f"for the accuracies {list(curve)}: {hint}")
    return "this is the number by which linear mode connectivity is judged."


@exercise("1.3.2")
def combine(function: Callable[..., Tensor]) -> str:
    """The outputs of a linearised merge, from the outputs of the base and of two experts."""
    expect_function(function)
    generator = torch.Generator().manual_seed(0)
    f0, f1, f2 = torch.randn(3, 5, 4, generator=generator)
    given = function(f0, f1, f2, 0.3, 0.6)
    if torch.allclose(given, 0.3 * f1 + 0.6 * f2):
        raise Wrong("the outputs are linear in the *steps* away from the base: subtract the base's outputs first.")
    if torch.allclose(given, 0.3 * (f1 - f0) + 0.6 * (f2 - f0)):
        raise Wrong("this is the change only; where does the linearised network start?")
    if not torch.allclose(given, f0 + 0.3 * (f1 - f0) + 0.6 * (f2 - f0)):
        raise Wrong("f_lin(θ0 + λ1 τ1 + λ2 τ2) = f0 + λ1 J τ1 + λ2 J τ2, and J τk = fk - f0.")
    return "a linearised merge is an ensemble of outputs: nothing more, and nothing to be found out by running it."


@exercise("1.3.3")
def shuffled(state: State) -> str:
    """The base plus icon_family's task vector with its entries shuffled within each tensor."""
    suite = pocket8()
    base, expert = suite.base, suite.experts["icon_family"]
    expect_state(state, base)
    if same(state, expert):
        raise Wrong("nothing is shuffled: this is the expert.")
    for name, theta0 in base.items():
        if not theta0.is_floating_point():
            continue
        given, tau = state[name] - theta0, expert[name] - theta0
        if not torch.allclose(given.flatten().sort().values, tau.flatten().sort().values, atol=1e-5):
            raise Wrong(
                f"in '{name}' the entries are not those of the task vector: shuffle τ, then add it to the base."
            )
    return "the same entries in every tensor, so the same length, and hardly any harm: the arrangement is what hurts."


@exercise("1.3.4")
def recentred(accuracy: float) -> str:
    """The validation average of task arithmetic at λ = 0.3 with each task's mean feature moved back."""
    suite = pocket8()
    base, merged = suite.build(), suite.build(task_arithmetic(suite.task_vectors, scale=0.3))
    value = expect_number(accuracy, 0, 1, "an accuracy")
    plain: list[float] = []
    moved_back: list[float] = []
    for name, task in suite.tasks.items():
        few, features = task.train[:200], suite.features(merged, task.validation)
        shift = suite.features(merged, few).mean(0) - suite.features(base, few).mean(0)
        for correct, seen in ((plain, features), (moved_back, features - shift)):
            predicted = suite.heads[name](seen).argmax(1)
            correct.append((predicted == task.validation.labels).float().mean().item())
    before, expected = sum(plain) / len(plain), sum(moved_back) / len(moved_back)
    if abs(value - before) < 1e-4:
        raise Wrong("this is the merge as it is; subtract the shift from its features before the head reads them.")
    if abs(value - expected) > 0.01:
        raise Wrong(
            f"expected about {expected:.2f}. The shift is the merge's mean feature minus the base's, both on the "
            "first 200 training images of the task."
        )
    return f"{100 * (expected - before):+.1f} points, without any label: part of what a merge loses is a mere shift."
