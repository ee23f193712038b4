"""Checkers of part 4: adapting without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mergekit_lite.lab.exercises.checking import (
    Wrong,
    exercise,
    expect_close,
    expect_function,
    expect_number,
    expect_pair,
    expect_tensor,
)

# ---------------------------------------------------------------- 4.1 Entropy as a teacher


@exercise("4.1.1")
def entropy_of_logits(function: Callable[[Tensor], float]) -> str:
    """The mean entropy of softmax predictions, in nats."""
    expect_function(function)
    logits = 2 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1)
    each = torch.special.entr(p).sum(1)
    expected = float(each.mean())
    value = float(function(logits))
    hints = {
        expected / math.log(2): "these are bits; nats have the natural logarithm.",
        float(each.sum()): "the mean over the images, not the sum.",
        expected / 5: "a sum over the classes, not a mean.",
        -expected: "the sign: an entropy is never negative.",
        float(torch.special.entr(p.mean(0)).sum()): "that is the entropy of the mean prediction.",
        float(torch.special.entr(p.amax(1)).mean()): "all classes count, not only the likeliest.",
    }
    expect_close(
        value, expected, hints, f"expected {expected:.3f} for a batch of 6 images, got {value:.3f}.", atol=1e-4
    )
    sure = float(function(torch.tensor([[1000.0, 0.0], [0.0, 0.0]])))
    if not abs(sure - math.log(2) / 2) < 1e-4:
        raise Wrong(f"logits (1000, 0) have entropy 0; yours makes the mean {sure:.3f}. Take log_softmax.")
    return "from 0 to the logarithm of the number of classes."


@exercise("4.1.2")
def push_of_entropy(function: Callable[[Tensor], Tensor]) -> str:
    """By how much descent on the entropy raises each logit."""
    expect_function(function)
    z = torch.tensor([1.5, 0.7, -0.2, -1.0])
    given = torch.as_tensor(function(z))
    if given.shape != z.shape:
        raise Wrong(f"expected a number per class, shape (4,); got {tuple(given.shape)}.")
    p, log_p = z.softmax(0), z.log_softmax(0)
    h = torch.special.entr(p).sum()
    hints = {
        "that is the gradient; descent goes against it.": -p * (log_p + h),
        "the entropy itself is missing in the brackets: the pushes of all classes add up to 0.": p * log_p,
        "each class's push is weighted by its p_c.": log_p + h,
        "that is the push of a label, the likeliest class; entropy is softer.": (
            torch.nn.functional.one_hot(p.argmax(), 4) - p
        ),
    }
    expect_tensor(
        given.to(p),
        p * (log_p + h),
        hints,
        "write H as a function of the p_j and use the chain rule; compare with torch.autograd.grad.",
        atol=1e-5,
    )
    return "winners are raised, whether they are right or not."


@exercise("4.1.3")
def slopes_of_tasks(function: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]) -> str:
    """The derivatives of a loss by task-wise coefficients, from its gradient by the weights."""
    expect_function(function)
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (4, 3), "b": (5,), "unused": (2,)}
    taus = {name: torch.randn(3, *shape, generator=generator) for name, shape in shapes.items()}
    gradient = {name: torch.randn(shapes[name], generator=generator) for name in ("a", "b")}
    parts = torch.stack([taus[name].flatten(1) @ g.flatten() for name, g in gradient.items()])
    given = torch.as_tensor(function(dict(gradient), dict(taus))).to(parts)
    hints = {
        "that is the mean over tensors; one coefficient moves all of them, so their effects add up.": parts.mean(0),
        "that is the first tensor alone.": parts[0],
        "descent's direction has this sign; the derivative has the other.": -parts.sum(0),
    }
    if given.shape == parts.shape:
        raise Wrong("these are layer-wise slopes; a task-wise coefficient acts on all tensors at once: add them up.")
    if given.shape != (3,):
        raise Wrong(f"expected K = 3 numbers, shape (3,); got {tuple(given.shape)}.")
    expect_tensor(
        given,
        parts.sum(0),
        hints,
        "per tensor and task the inner product of gradient and task vector, then the sum over tensors.",
        atol=1e-5,
    )
    return "all that labels, entropy or experts can say about K task vectors, in K numbers."


@exercise("4.1.4")
def information_of_logits(function: Callable[[Tensor], float]) -> str:
    """The mean entropy of a batch's predictions less the entropy of their mean."""
    expect_function(function)
    logits = 2 * torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    p = logits.softmax(1)
    each, together = torch.special.entr(p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()
    mean_logits = torch.special.entr(logits.mean(0).softmax(0)).sum()
    value = float(function(logits))
    hints = {
        float(each): "that is the entropy alone; one answer to everything is still rewarded.",
        float(together - each): "the sign: it should be low for certain and different answers.",
        float(each + together): "that rewards one answer twice; the second term is subtracted.",
        float(each - mean_logits): "you averaged the logits; average the predictions.",
    }
    expect_close(
        value,
        float(each - together),
        hints,
        f"expected {float(each - together):.3f} for a batch of 7 images, got {value:.3f}.",
        atol=1e-5,
    )
    return "0 for one answer to everything, however certain; lowest, -log C, for C classes alike, each image certain."


# ---------------------------------------------------------------- 4.2 A mask to share


@exercise("4.2.1")
def slopes_through_the_mean(slopes: Sequence[float]) -> str:
    """How a loss depends on the two entries of a mask that is divided by its mean."""
    hints = {
        (2.0, 6.0): "you divided by the mean, but raising one entry also raises the mean: subtract mean(g ⊙ m̂).",
        (1.0, 3.0): "these are the slopes by m̂.",
        (-0.4, 1.6): "now divide by the mean of the mask.",
        (-2.0, 2.0): "you subtracted the mean of g; it is the mean of g ⊙ m̂, with m̂ = (1.6, 0.4).",
    }
    expect_pair(slopes, (-0.8, 3.2), hints, "m̂ is (1.6, 0.4), and the mean of g ⊙ m̂ is 1.4.")
    return "both g are positive, and one slope is negative: the first entry rises at the other's cost."


@exercise("4.2.2")
def share_of_undecided(function: Callable[[float, float], float]) -> str:
    """The probability that an entry of a Concrete mask lies between 0.1 and 0.9."""
    expect_function(function)

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    def between(edge: float, x: float) -> float:
        return sigmoid(edge - x) - sigmoid(-edge - x)

    edge = math.log(9)
    for x, temperature in ((0.0, 0.25), (1.3, 0.2), (-0.7, 2.0)):
        value = expect_number(function(x, temperature), 0, 1, "a probability")
        wrong = {
            between(edge, x): "that is the share at temperature 1.",
            between(edge / temperature, x): "0.9 = σ(z / T) says z = T log 9.",
            sigmoid(temperature * edge - x): "that is the probability of less than 0.9; some are below 0.1.",
            1 - between(temperature * edge, x): "that is the share of the decided.",
        }
        expect_close(
            value,
            between(temperature * edge, x),
            wrong,
            f"not at x = {x:g} and T = {temperature:g}. The noise is logistic: P(noise < z) = σ(z).",
        )
    return "at x = 0: 50 % at T = 0.5, one in nine at T = 0.1."


@exercise("4.2.3")
def how_far_along(function: Callable[[Tensor, Tensor], float]) -> str:
    """How far one mask goes in the direction of another."""
    expect_function(function)
    generator = torch.Generator().manual_seed(0)
    mask, other = torch.rand(2, 8, 5, generator=generator, dtype=torch.float64) + 0.1
    first, second = mask / mask.mean() - 1, other / other.mean() - 1
    expected = float((first * second).sum() / first.square().sum())
    value = expect_number(function(mask, other), -1e6, 1e6, "a distance")
    wrong = {
        float((mask * other).sum() / mask.square().sum()): "divide both masks by their means, and subtract 1.",
        float(((mask - 1) * (other - 1)).sum() / (mask - 1).square().sum()): "divide both masks by their means first.",
        float((first * second).sum() / second.square().sum()): "you projected the mask on the other.",
        float((first * second).sum() / (first.norm() * second.norm())): "that is the cosine; how far is asked for.",
        float(second.norm() / first.norm()): "that is the ratio of the lengths, whatever their directions.",
        float((first * second).sum() / first.norm()): "count in steps of the mask's own change: divide once more.",
    }
    expect_close(
        value, expected, wrong, "minimise ‖(ĥ - 1) - t (m̂ - 1)‖² over t, where ĥ is the other mask divided by its mean."
    )
    return "a rounded mask and a stretched one can be the same walk."


@exercise("4.2.4")
def slopes_at_constant_length(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """The slopes by a mask that is divided by the root of its mean square."""
    expect_function(function)
    generator = torch.Generator().manual_seed(1)
    by_hat = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    m = torch.rand(6, 7, generator=generator, dtype=torch.float64) + 0.1
    given = torch.as_tensor(function(by_hat, m)).double()
    if given.shape != m.shape:
        raise Wrong(f"expected a slope per entry, shape {tuple(m.shape)}; got {tuple(given.shape)}.")
    root = m.square().mean().sqrt()
    hat = m / root
    right = (by_hat - hat * (by_hat * hat).mean()) / root
    plausible = {
        "that is the slope for the division by the mean.": (by_hat - (by_hat * m / m.mean()).mean()) / m.mean(),
        "the root depends on an entry in proportion to that entry: a factor m̂ is missing.": (
            (by_hat - (by_hat * hat).mean()) / root
        ),
        "the root changes with every entry; that term is missing.": by_hat / root,
        "divide by the root of the mean square.": by_hat - hat * (by_hat * hat).mean(),
    }
    expect_tensor(given, right, plausible, "the derivative of the root by m_i is m_i / (n root).")
    return "now a mask of ones and zeros may keep few entries without enlarging them as much."


# ---------------------------------------------------------------- 4.3 A mixture instead of a merge


@exercise("4.3.1")
def one_linear_layer(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """The outputs of one linear layer whose weights are merged for every input."""
    expect_function(function)
    generator = torch.Generator().manual_seed(2)
    base, taus, w, h = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 5), (3, 4, 5), (6, 3), (6, 5))
    )
    given = torch.as_tensor(function(base, taus, w, h)).double()
    if given.shape != (6, 4):
        raise Wrong(f"expected the outputs of all inputs, shape (6, 4); got {tuple(given.shape)}.")

    def outputs(w: Tensor, start: Tensor) -> Tensor:
        return torch.stack([(start + torch.tensordot(wi, taus, 1)) @ hi for wi, hi in zip(w, h, strict=True)])

    plausible = {
        "that is one merge for all inputs, with the mean of their weights.": outputs(w.mean(0).expand(6, 3), base),
        "the base's own answer is missing.": outputs(w, torch.zeros_like(base)),
        "no softmax: the weights are used as they are.": outputs(w.softmax(1), base),
        "the base comes once, not once per expert.": outputs(w, base) + (w.sum(1) - 1)[:, None] * (h @ base.T),
    }
    expect_tensor(
        given,
        outputs(w, base),
        plausible,
        "for input i: the base times h_i, plus the sum over k of w_ik times task vector k times h_i.",
    )
    return "no merged weight was formed; through a non-linearity that is another function."


@exercise("4.3.2")
def tokens_that_make_merging_cheap(tokens: float) -> str:
    """From how many tokens on merging weights takes less than a fifth of mixing outputs."""
    value = expect_number(tokens, 0, 1e6, "a number of tokens")
    if value == 10:
        raise Wrong("at 10 tokens it is a fifth exactly: 18 against 90.")
    if value < 11:
        raise Wrong("(K + 1) T must be more than five times K + T, with K = 8.")
    if value > 11:
        raise Wrong("that is enough, but fewer tokens do, too.")
    return "with one token nothing is saved; with many, merging saves nearly a factor of K + 1."


@exercise("4.3.3")
def shared_in_batches(function: Callable[[Tensor, int], Tensor]) -> str:
    """The routing weights that images get when those of a batch share one merge."""
    expect_function(function)
    w = torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    given = torch.as_tensor(function(w.clone(), 3)).double()

    def means(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([part.mean(0).expand_as(part) for part in parts])

    right = means(w.split(3))
    if given.shape == (3, 3):
        raise Wrong("one row per batch; give every image the row of its batch.")
    if given.shape == (6, 3):
        raise Wrong("the last batch is smaller, and was lost.")
    if given.shape != w.shape:
        raise Wrong(f"expected a row per image, shape (7, 3); got {tuple(given.shape)}.")
    padded = torch.cat([right[:6], right[6:] / 3])
    plausible = {
        "that is one mean over all images.": w.mean(0).expand_as(w),
        "those are three batches; 3 is the size of a batch.": means(w.tensor_split(3)),
        "the last batch has one image: divide by 1.": padded,
        "these are the images' own weights.": w,
    }
    plausible = {hint: wrong for hint, wrong in plausible.items() if not torch.allclose(wrong, right)}
    expect_tensor(given, right, plausible, "rows 0 to 2 get the mean of rows 0 to 2, and so on.")
    return "so an image's weights depend on who else is asked."


@exercise("4.3.4")
def share_of_the_task(function: Callable[[Tensor, Tensor], float]) -> str:
    """How much of the variance of routing weights is between tasks."""
    expect_function(function)
    generator = torch.Generator().manual_seed(4)
    tasks = torch.tensor([0] * 6 + [1] * 3 + [2] * 9)
    w = torch.randn(18, 4, generator=generator, dtype=torch.float64) + tasks[:, None] * torch.tensor([1.0, 0, 2, 3])
    centres = torch.stack([w[tasks == k].mean(0) for k in range(3)])
    total = (w - w.mean(0)).square().sum()
    within = (w - centres[tasks]).square().sum()
    expected = float(1 - within / total)
    value = expect_number(function(w, tasks), -1e9, 1e9, "a share")
    columns = 1 - (w - centres[tasks]).square().sum(0) / (w - w.mean(0)).square().sum(0)
    between = (centres - centres.mean(0)).square().sum() / total
    wrong = {
        float(within / total): "that is the share within tasks; the rest is asked for.",
        float(columns.mean()): "a sum over all experts above and below, not a mean of their shares.",
        float(between): "each task counts with the number of its images.",
        float((centres[tasks].square().sum()) / w.square().sum()): "around the mean over all images, not around zero.",
    }
    expect_close(
        value,
        expected,
        wrong,
        "replace every row by the mean of its task; divide the variance that is left by the whole.",
    )
    return "0: the task says nothing about the weights; 1: it says all, and the image itself nothing."
