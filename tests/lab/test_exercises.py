"""The checkers: each accepts what is right and answers plausible mistakes with the hint that helps.

That the chapters' own solutions pass is tested with the chapters, in tests/test_chapters.py.
"""

import math

import numpy as np
import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.awd_solvers import objective
from mergekit_lite.data_free.tsv import is_matrix
from mergekit_lite.geometry import cosines, rows_of, slopes
from mergekit_lite.lab import check
from mergekit_lite.lab.exercises import Verdict, checking, exercise, exercises, part1, part2, part3, part4
from mergekit_lite.lab.regression import common_directions


def weighted(tv, heavy, weight=3.0):
    return mkl.average(tv, weights=[weight if name == heavy else 1.0 for name in tv.names])


def merged_with(tv, fashion):
    return mkl.task_arithmetic(tv, scale=[fashion if name == "fashion" else 0.2 for name in tv.names])


def forgot(tv, mnist, photo_digits):
    return mkl.task_arithmetic(tv.subset(["mnist", "photo_digits"]), scale=[-mnist, -photo_digits])


def ratio(tv):
    gram = tv.gram()
    return float(gram.sum() / gram.trace())


def median_by(what):
    return lambda tv, scale=1.0: tv.map(lambda name, taus: what(taus, scale))


def binomial(p, images, candidates):
    return np.random.default_rng(1).binomial(images, p, (4000, candidates)) / images


def moved(tv, change):
    """The base moved by a changed task vector of icon_family."""
    return tv["icon_family"].map(lambda name, taus: change(taus[0]))


def dip(curve):
    line = np.linspace(curve[0], curve[-1], len(curve))
    return (line - np.array(curve)).max()


def chance(d, tasks):
    x = torch.randn(200, tasks, d, generator=torch.Generator().manual_seed(5))
    x = x / x.norm(dim=-1, keepdim=True)
    return (x @ x.transpose(1, 2) - torch.eye(tasks)).abs()


def pairs(tv):
    return cosines(tv)[~torch.eye(len(tv), dtype=torch.bool)]


def first_order(own=False, at_base=False, factor=1.0):
    """What the first order predicts for a merge, and ways to get it wrong."""

    def predicted(suite, task, scale):
        tv = suite.task_vectors
        i = tv.names.index(task)
        state = None if at_base else mkl.task_arithmetic(tv[i], scale=scale)
        along = slopes(tv, suite.gradient(state, task))
        return factor * scale * (along.sum() - (0 if own else along[i])).item()

    return predicted


def slope_at_zero(tv):
    """The gradient of L_O at δ = 0: the length of its coefficients, and its own."""
    gram = tv.gram()
    zero = torch.zeros(len(gram)).double()
    b = objective(torch.eye(len(gram)).double(), gram, zero, alpha=0.0).gradient
    return b.norm().item(), (b @ gram @ b).sqrt().item()


def shortened(change):
    """Row by row, the sum of the task vectors times a function of Σ ‖τ‖² / ‖Σ τ‖²."""

    def method(tv, scale=1.0):
        def merge(name, taus):
            rows = rows_of(taus)
            ratio = rows.square().sum((0, 2)) / rows.sum(0).square().sum(1)
            return (scale * change(ratio)[:, None] * rows.sum(0)).view(taus.shape[1:])

        return tv.map(merge)

    return method


def by_ranks(factor=6, rank=lambda x: np.argsort(np.argsort(x))):
    """Spearman's rank correlation, and ways to get it wrong."""

    def correlation(a, b):
        squared = np.square(rank(a) - rank(b)).sum()
        return 1 - factor * squared / (len(a) * (len(a) ** 2 - 1))

    return correlation


def t_value(differences, ddof=1):
    return np.mean(differences) / np.std(differences, ddof=ddof) * len(differences) ** 0.5


def capped(tv):
    """The sum of the task vectors, no singular value of a matrix larger than their mean."""

    def merge(name, taus):
        if taus.ndim < 3 or taus.shape[2] == 1:
            return taus.mean(0)
        u, sigma, vt = torch.linalg.svd(taus.sum(0).flatten(1), full_matrices=False)
        return ((u * sigma.clamp(max=sigma.mean())) @ vt).view(taus.shape[1:])

    return tv.map(merge)


def thinned_to(solve):
    """The highest p from a layer's coherence and the error that is allowed."""

    def function(taus, x, error):
        c = (x @ taus.T).square().mean() / (x.square() @ taus.T.square()).mean()
        return float(solve(c, error))

    return function


def at_distance(unit):
    """A method's merge, its step divided by some length."""

    def function(tv, method, far):
        direction = mkl.TaskVectors(tv.base, [method(tv)])
        return direction.add(direction.flat()[0] * float(far / unit(direction.flat()[0])))

    return function


def with_spectrum(change, rest=1.0):
    """The sum of the task vectors with other singular values, and ways to get it wrong."""

    def method(tv, scale=1.0):
        def merge(name, taus):
            if not is_matrix(taus[0]):
                return scale * rest * taus.mean(0)
            u, sigma, v = torch.linalg.svd(taus.flatten(2).sum(0), full_matrices=False)
            return scale * ((u * change(sigma, scale)) @ v).view(taus.shape[1:])

        return tv.map(merge)

    return method


def energy_triples(power, extra=1):
    """How many singular values hold a share of the sum of their powers."""

    def count(matrix, share):
        held = (torch.linalg.svdvals(matrix) ** power).cumsum(0)
        return int((held < share * held[-1]).sum()) + extra

    return count


def whitened(power):
    def function(u):
        w, e = torch.linalg.eigh(u.T @ u)
        return u @ (e * w**power) @ e.T

    return function


def squared_gradients(pieces=1, power=2, total=False, factor=1):
    """The mean over images of the squared gradient, and ways to get it wrong."""

    def function(model, x, y):
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for part in torch.arange(len(x)).split(pieces):
            loss = torch.nn.functional.cross_entropy(model(x[part]), y[part])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for name, g in zip(sums, gradients, strict=True):
                sums[name] += g**power
        count = 1 if total else -(-len(x) // pieces)
        return {name: factor * s / count for name, s in sums.items()}

    return function


def across(curvature, own=1.0):
    """A bowl around (0, 0), and one around (2, 1) that is curved across the line between them alone."""
    normal = torch.tensor([-1.0, 2.0]) / 5**0.5
    return own * torch.eye(2), curvature * torch.outer(normal, normal)


def from_gram(form):
    """The squared error of a layer's outputs by some formula of D = W - W_k and A."""
    return lambda weight, expert, gram: float(form(weight - expert, gram))


def one_layer(weights, grams, *, keep=True, inverse=torch.linalg.pinv):
    """RegMean of a layer, and ways to get it wrong."""
    average = weights.mean(0) if keep else 0
    return average + ((weights - average) @ grams).sum(0) @ inverse(grams.sum(0))


def in_the_space(gram, candidates):
    """Whether a candidate has no part outside of what the Gram matrix saw."""
    sizes, vectors = torch.linalg.eigh(gram)
    outside = candidates @ vectors[:, sizes < 1e-9 * sizes[-1]]
    return outside.norm(dim=1) < 1e-6 * candidates.norm(dim=1)


def onto(inputs, targets, size=lambda x: x.shape[1]):
    """Least squares from inputs to targets, task by task divided by a size."""
    pairs = list(zip(inputs, targets, strict=True))
    return sum(y @ x.T / size(x) for x, y in pairs) @ torch.linalg.inv(sum(x @ x.T / size(x) for x, _ in pairs))


# (exercise, an answer made from the task vectors, what the hint says); None where the answer is right.
def bounded_steps(root=np.sqrt, factor=2.0, of=lambda error: error, whole=np.ceil):
    """Steps until the bound on conjugate gradients is as low as an error, and ways to get it wrong."""

    def steps(kappa, error):
        rate = (root(kappa) - 1) / (root(kappa) + 1)
        return int(whole(np.log(of(error) / factor) / np.log(rate)))

    return steps


def for_two_tasks(a, b, w):
    """The K-FAC system of two tasks, in the coordinates in which all four matrices are diagonal."""
    (s, u), (p, t) = common_directions(*a), common_directions(*b)
    first, second = torch.outer(p, s), torch.outer(1 - p, 1 - s)
    z = (first * (t.T @ w[0] @ u) + second * (t.T @ w[1] @ u)) / (first + second)
    return torch.linalg.inv(t.T) @ z @ torch.linalg.inv(u)


def logistic(value):
    return 1 / (1 + math.exp(-value))


def along(mask, other):
    return (mask * other).sum() / mask.square().sum()


def entropies(p, dim=1):
    return torch.special.entr(p).sum(dim)


def push_by_entropy(inside=lambda log_p, h: log_p + h, sign=1.0, weight=lambda p: p):
    """What descent on the entropy does to logits, and ways to get it wrong."""

    def push(logits):
        p = logits.softmax(0)
        return sign * weight(p) * inside(p.log(), entropies(p, 0))

    return push


def task_slopes(combine=sum, sign=1.0):
    """Inner products with task vectors, tensor by tensor, then combined."""
    return lambda gradient, taus: sign * combine([taus[n].flatten(1) @ g.flatten() for n, g in gradient.items()])


def information(first=1.0, second=-1.0, mean=lambda logits: logits.softmax(1).mean(0)):
    return lambda logits: float(first * entropies(logits.softmax(1)).mean() + second * entropies(mean(logits), 0))


def routed_layer(change=lambda w: w):
    """One linear layer with merged weights for every input, of changed routing weights."""
    return lambda base, taus, w, h: h @ base.T + torch.einsum("nk,kij,nj->ni", change(w), taus, h)


def by_task(w, tasks):
    """The mean row of its task, for every row."""
    return torch.stack([w[tasks == k].mean(0) for k in tasks.unique()])[tasks]


def scatter(w):
    return w.square().sum()


def share_by_column(w, tasks):
    left = (w - by_task(w, tasks)).square().sum(0) / (w - w.mean(0)).square().sum(0)
    return 1 - float(left.mean())


def share_of_centres(w, tasks):
    centres = torch.stack([w[tasks == k].mean(0) for k in tasks.unique()])
    return float(scatter(centres - centres.mean(0)) / scatter(w - w.mean(0)))


ANSWERS = [
    ("1.1.1", lambda tv: weighted(tv, "mnist"), None),
    ("1.1.1", mkl.average, "this is the plain average"),
    ("1.1.1", lambda tv: weighted(tv, "fashion"), "went to fashion"),
    ("1.1.1", lambda tv: weighted(tv, "mnist", 4.0), "weight 1, all of them"),
    ("1.1.1", lambda tv: 0.5, "expected a state dict"),
    ("1.1.1", lambda tv: {"w": torch.zeros(1)}, "another network"),
    ("1.1.2", lambda tv: 0.7, None),
    ("1.1.2", lambda tv: 0.2, "best λ for eight tasks"),
    ("1.1.2", lambda tv: 2.0, "beyond 1"),
    ("1.1.2", lambda tv: "large", "expected a scale, a number; got str"),
    ("1.1.3", lambda tv: ratio(tv) ** 0.5, None),
    ("1.1.3", ratio, "squared lengths"),
    ("1.1.3", lambda tv: 1.0, "only the diagonal remains"),
    ("1.1.4", lambda tv: median_by(lambda taus, scale: scale * taus.quantile(0.5, dim=0)), None),
    ("1.1.4", lambda tv: median_by(lambda taus, scale: scale * taus.median(0).values), "the lower of the two middle"),
    ("1.1.4", lambda tv: median_by(lambda taus, scale: scale * taus.mean(0)), "the mean, not the median"),
    ("1.1.4", lambda tv: median_by(lambda taus, scale: taus.quantile(0.5, dim=0)), "no effect"),
    ("1.1.4", lambda tv: median_by(lambda taus, scale: scale * taus.median(1).values), "could not be used"),
    ("1.1.4", lambda tv: median_by(lambda taus, scale: scale * taus.quantile(0.5).expand(taus.shape[1:])), "axis 0"),
    ("1.1.4", lambda tv: mkl.average(tv), "the function itself"),
    ("1.2.1", lambda tv: merged_with(tv, 0.0), None),
    ("1.2.1", lambda tv: merged_with(tv, 0.2), "still in it"),
    ("1.2.1", lambda tv: merged_with(tv, -0.8), "only 0.2 of it"),
    ("1.2.1", lambda tv: merged_with(tv, 0.4), "the sign"),
    ("1.2.1", lambda tv: mkl.average(tv), "and nothing else"),
    ("1.2.2", lambda tv: forgot(tv, 0.2, 0.1), None),
    ("1.2.2", lambda tv: forgot(tv, -0.2, -0.1), "not along them"),
    ("1.2.2", lambda tv: forgot(tv, 0.01, 0.0), "10 are asked for"),
    ("1.2.2", lambda tv: forgot(tv, 1.0, 1.0), "smaller scales"),
    ("1.2.3", lambda tv: lambda p, n, m: binomial(p, n, m).max(1).mean() - p, None),
    ("1.2.3", lambda tv: lambda p, n, m: binomial(p, n, m).max(1).mean(), "subtract the true accuracy"),
    ("1.2.3", lambda tv: lambda p, n, m: binomial(p, n, m).mean() - p, "take the best"),
    ("1.2.3", lambda tv: lambda p, n, m: n * (binomial(p, n, m).max(1).mean() - p), "share of the images"),
    ("1.2.3", lambda tv: lambda p, n, m: (p * (1 - p) / n * 2 * np.log(m)) ** 0.5, "should be near"),
    ("1.2.4", lambda tv: [0.2] * 8, "from the common λ = 0.2"),
    ("1.2.4", lambda tv: [0.2] * 7, "expected 8, got 7"),
    ("1.2.4", lambda tv: 0.2, "could not be used"),
    ("1.3.1", lambda tv: dip, None),
    ("1.3.1", lambda tv: lambda curve: max(curve) - min(curve), "has no barrier"),
    ("1.3.1", lambda tv: lambda curve: max(0, (curve[0] + curve[-1]) / 2 - min(curve)), "has no barrier"),
    ("1.3.1", lambda tv: lambda curve: curve[0] - curve[-1], "a barrier of 0.4"),
    ("1.3.2", lambda tv: lambda f0, f1, f2, a, b: f0 + a * (f1 - f0) + b * (f2 - f0), None),
    ("1.3.2", lambda tv: lambda f0, f1, f2, a, b: a * f1 + b * f2, "subtract the base's outputs"),
    ("1.3.2", lambda tv: lambda f0, f1, f2, a, b: a * (f1 - f0) + b * (f2 - f0), "the change only"),
    ("1.3.3", lambda tv: moved(tv, lambda tau: tau.flatten().flip(0).view_as(tau)), None),
    ("1.3.3", lambda tv: moved(tv, lambda tau: tau), "this is the expert"),
    ("1.3.3", lambda tv: moved(tv, lambda tau: torch.full_like(tau, tau.mean().item())), "shuffle τ"),
    ("1.3.4", lambda tv: 0.9, "expected about 0.4"),
    ("1.3.4", lambda tv: 47, "between 0 and 1"),
    ("2.1.1", lambda tv: lambda d, K: chance(d, K).amax((1, 2)).mean().item(), None),
    (
        "2.1.1",
        lambda tv: lambda d, K: chance(d, K).sum((1, 2)).mean().item() / (K * (K - 1)),
        "the largest of each draw",
    ),
    ("2.1.1", lambda tv: lambda d, K: 1 / d, "should be near"),
    ("2.1.2", lambda tv: 0.7071, None),
    ("2.1.2", lambda tv: 0.25, "solve arccos"),
    ("2.1.3", lambda tv: 1 / pairs(tv).square().mean().item(), None),
    ("2.1.3", lambda tv: 1 / pairs(tv).mean().item() ** 2, "the mean of the squares"),
    ("2.1.3", lambda tv: tv.dimension, "invert it"),
    ("2.1.4", lambda tv: first_order(), None),
    ("2.1.4", lambda tv: first_order(own=True), "it does not count"),
    ("2.1.4", lambda tv: first_order(at_base=True), "gradient at the base"),
    ("2.1.4", lambda tv: first_order(factor=5.0), "multiply by the scale"),
    ("2.1.4", lambda tv: first_order(factor=-1.0), "it should be"),
    ("2.2.1", lambda tv: lambda c, scale: scale * (1 - len(c) * c), None),
    ("2.2.1", lambda tv: lambda c, scale: scale * (1 - c), "counts K times"),
    ("2.2.1", lambda tv: lambda c, scale: 1 - len(c) * c, "λ is missing"),
    ("2.2.1", lambda tv: lambda c, scale: scale - c, "collect what stands"),
    ("2.2.2", lambda tv: lambda G, c: (torch.eye(5) - c).double() @ G @ (torch.eye(5) - c).double().T, None),
    ("2.2.2", lambda tv: lambda G, c: G - (G @ c)[:, None] - (G @ c)[None], "the last term is missing"),
    ("2.2.2", lambda tv: lambda G, c: G - c @ G @ c, "two mixed terms"),
    ("2.2.2", lambda tv: lambda G, c: G, "four inner products"),
    ("2.2.2", lambda tv: lambda G, c: G @ c, "a K x K matrix"),
    ("2.2.3", lambda tv: slope_at_zero(tv)[1], None),
    ("2.2.3", lambda tv: slope_at_zero(tv)[0], "the length of the coefficients"),
    ("2.2.3", lambda tv: slope_at_zero(tv)[1] ** 2, "the squared length"),
    ("2.2.3", lambda tv: 3.0, "per unit of length"),
    ("2.2.4", lambda tv: shortened(lambda ratio: ratio.sqrt().clamp(max=1)), None),
    ("2.2.4", lambda tv: mkl.task_arithmetic, "plain task arithmetic"),
    ("2.2.4", lambda tv: shortened(lambda ratio: ratio.sqrt()), "only shorten"),
    ("2.2.4", lambda tv: shortened(lambda ratio: ratio.clamp(max=1)), "take its square root"),
    ("2.2.4", lambda tv: shortened(lambda ratio: ratio.sqrt().clamp(max=0.5)), "row by row"),
    ("2.3.1", lambda tv: lambda G: G.diagonal() / G.trace(), None),
    ("2.3.1", lambda tv: lambda G: G.diagonal().sqrt() / G.diagonal().sqrt().sum(), "the squared lengths"),
    ("2.3.1", lambda tv: lambda G: G.diagonal() / G.sum(), "the trace"),
    ("2.3.1", lambda tv: lambda G: torch.ones(3) / 3, "the diagonal of the Gram matrix"),
    ("2.3.2", lambda tv: 8, None),
    ("2.3.2", lambda tv: 2, "its scale grows"),
    ("2.3.2", lambda tv: 4, "the vector is twice as long"),
    ("2.3.2", lambda tv: 16, "proportional"),
    ("2.3.3", lambda tv: lambda v, t: (t.square().sum(1) * (v - t).square().sum(1)).sum(), None),
    ("2.3.3", lambda tv: lambda v, t: (v - t).square().sum(), "are weighted"),
    ("2.3.3", lambda tv: lambda v, t: (t.norm(dim=1) * (v - t).norm(dim=1)).sum(), "both lengths are squared"),
    ("2.3.3", lambda tv: lambda v, t: t.square().sum(1) * (v - t).square().sum(1), "one number"),
    ("2.3.3", lambda tv: lambda v, t: v.sum(), "Σ_i"),
    ("2.3.4", lambda tv: mkl.task_arithmetic(tv.subset(["fashion", "letters", "icon_family"]), scale=0.35), None),
    ("2.3.4", lambda tv: dict(tv.base), "Give all task vectors the same length"),
    ("2.4.1", lambda tv: lambda x, t, p: p / (1 - p) * (x * t).square().sum(), None),
    ("2.4.1", lambda tv: lambda x, t, p: p * (1 - p) * (x * t).square().sum(), "without rescaling"),
    ("2.4.1", lambda tv: lambda x, t, p: p / (1 - p) * (x * t).sum() ** 2, "square each term"),
    ("2.4.1", lambda tv: lambda x, t, p: p / (1 - p) * t.square().sum(), "the inputs count"),
    ("2.4.1", lambda tv: lambda x, t, p: (1 - p) / p * (x * t).square().sum(), "the more is dropped"),
    ("2.4.1", lambda tv: lambda x, t, p: 0.0, "it should be"),
    ("2.4.2", lambda tv: lambda taus: taus.sign().sum(0).sign(), None),
    ("2.4.2", lambda tv: lambda taus: taus.sum(0).sign(), "by mass"),
    ("2.4.2", lambda tv: lambda taus: taus.sign().sum(0), "take its sign"),
    ("2.4.2", lambda tv: lambda taus: (taus.sign().sum(0) >= 0) * 2.0 - 1, "with a draw"),
    ("2.4.2", lambda tv: lambda taus: taus.sign().sum(1).sign(), "one sign per entry"),
    ("2.4.2", lambda tv: lambda taus: -taus.sign().sum(0).sign(), "sum the signs"),
    ("2.4.3", lambda tv: thinned_to(lambda c, error: c * error / (1 + c * error)), None),
    ("2.4.3", lambda tv: thinned_to(lambda c, error: c * error), "solve it for p"),
    ("2.4.3", lambda tv: thinned_to(lambda c, error: error / (1 + error)), "the coherence is missing"),
    ("2.4.3", lambda tv: thinned_to(lambda c, error: error / (c + error)), "upside down"),
    ("2.4.3", lambda tv: thinned_to(lambda c, error: 0.5), "with a coherence of"),
    ("2.4.4", lambda tv: at_distance(lambda v: v.norm()), None),
    ("2.4.4", lambda tv: at_distance(lambda v: 1.0), "not a scale"),
    ("2.4.4", lambda tv: at_distance(lambda v: v.norm() ** 2), "take its root"),
    ("2.4.4", lambda tv: at_distance(lambda v: 2 * v.norm()), "from the base"),
    (
        "2.4.4",
        lambda tv: lambda v, method, far: at_distance(lambda u: u.norm())(v[0], mkl.average, far),
        "the direction",
    ),
    ("2.5.1", lambda tv: energy_triples(2), None),
    ("2.5.1", lambda tv: energy_triples(1), "the sum of their squares"),
    ("2.5.1", lambda tv: energy_triples(2, extra=0), "one too few"),
    ("2.5.1", lambda tv: energy_triples(2, extra=3), "for singular values proportional to"),
    ("2.5.2", lambda tv: whitened(-0.5), None),
    ("2.5.2", lambda tv: lambda u: torch.linalg.qr(u).Q, "Gram and Schmidt"),
    ("2.5.2", lambda tv: lambda u: u / u.norm(dim=0), "not orthogonal"),
    ("2.5.2", lambda tv: whitened(-1.0), "minus one half"),
    ("2.5.2", lambda tv: lambda u: u.T @ u, "expected a matrix of shape"),
    ("2.5.3", lambda tv: [3.0, -1.0], None),
    ("2.5.3", lambda tv: torch.tensor([4, 1]), "the sum of the task vectors"),
    ("2.5.3", lambda tv: [2.0, 0.5], "the average"),
    ("2.5.3", lambda tv: [3.0, 1.0], "task 1 is answered"),
    ("2.5.3", lambda tv: [0.0, 0.0], "both terms can be zero"),
    ("2.5.3", lambda tv: 3.0, "expected two numbers"),
    ("2.5.4", lambda tv: with_spectrum(lambda s, _: s.clamp(max=s.mean().item())), None),
    ("2.5.4", lambda tv: mkl.iso_c, "Iso-C changes them"),
    ("2.5.4", lambda tv: with_spectrum(lambda s, _: s.clamp(min=s.mean().item())), "lower what is above"),
    ("2.5.4", lambda tv: mkl.task_arithmetic, "nothing was lowered"),
    ("2.5.4", lambda tv: with_spectrum(lambda s, scale: s.clamp(max=s.mean().item()) / scale), "no effect"),
    ("2.5.4", lambda tv: with_spectrum(lambda s, _: s.clamp(max=s.mean().item()) / 3), "not of the average"),
    ("2.5.4", lambda tv: with_spectrum(lambda s, _: s.clamp(max=1.0)), "read as outputs"),
    ("2.5.4", lambda tv: with_spectrum(lambda s, _: s.clamp(max=s.mean().item()), rest=3.0), "is no matrix"),
    ("2.6.1", lambda tv: by_ranks(), None),
    ("2.6.1", lambda tv: lambda a, b: np.corrcoef(a, b)[0, 1], "correlation of the values"),
    ("2.6.1", lambda tv: by_ranks(factor=1), "factor 6"),
    ("2.6.1", lambda tv: by_ranks(rank=np.argsort), "a rank is the place"),
    ("2.6.1", lambda tv: by_ranks(factor=12), "for 4 methods"),
    ("2.6.2", lambda tv: lambda a, b: t_value(np.subtract(a, b)), None),
    (
        "2.6.2",
        lambda tv: lambda a, b: np.mean(np.subtract(a, b)) / np.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / len(a)),
        "seed by seed",
    ),
    ("2.6.2", lambda tv: lambda a, b: t_value(np.subtract(a, b)) / len(a) ** 0.5, "smaller by √n"),
    ("2.6.2", lambda tv: lambda a, b: t_value(np.subtract(a, b), ddof=0), "n - 1"),
    ("2.6.2", lambda tv: lambda a, b: -t_value(np.subtract(a, b)), "it should be"),
    ("2.6.3", lambda tv: lambda v, t: max(t) - t[int(np.argmax(v))], None),
    ("2.6.3", lambda tv: lambda v, t: max(v) - max(t), "of different images"),
    ("2.6.3", lambda tv: lambda v, t: max(v) - t[int(np.argmax(v))], "equally hard"),
    ("2.6.3", lambda tv: lambda v, t: 0.0, "on test images it should be"),
    ("2.6.4", lambda tv: "Consensus", None),
    ("2.6.4", lambda tv: "TIES", "keeps a weight only if"),
    ("2.6.4", lambda tv: "AWD", "choose one of"),
    ("2.6.5", lambda tv: capped, None),
    ("2.6.5", lambda tv: lambda any_tv: mkl.average(tv), "and at nothing else"),
    ("2.6.5", lambda tv: lambda any_tv: dict(any_tv.base), "this is the base"),
    ("2.6.5", lambda tv: lambda any_tv: mkl.task_arithmetic(any_tv[0], scale=1.0), "one of the experts"),
    ("2.6.5", lambda tv: lambda any_tv: mkl.task_arithmetic(any_tv.subset(any_tv.names[:2]), scale=0.4), "the order"),
    ("2.6.5", lambda tv: mkl.average, "two points more"),
    ("3.1.1", lambda tv: [1.5, 0.0], None),
    ("3.1.1", lambda tv: torch.tensor([2, 1]), "that is the average"),
    ("3.1.1", lambda tv: [6.0, 0.0], "the right-hand side"),
    ("3.1.1", lambda tv: [1.0, 1.0], "four times the identity"),
    ("3.1.1", lambda tv: [1.5], "expected two numbers"),
    ("3.1.2", lambda tv: lambda p: p.diag() - torch.outer(p, p), None),
    ("3.1.2", lambda tv: lambda p: p.diag(), "1_c - p"),
    ("3.1.2", lambda tv: lambda p: (p - p * p).diag(), "beside the diagonal are missing"),
    ("3.1.2", lambda tv: lambda p: torch.outer(p, p), "what is subtracted"),
    ("3.1.2", lambda tv: lambda p: (torch.eye(4) - p).T @ (torch.eye(4) - p) / 4, "all the same weight"),
    ("3.1.2", lambda tv: lambda p: torch.eye(4), "multiply out"),
    ("3.1.2", lambda tv: lambda p: p, "expected a matrix"),
    ("3.1.3", lambda tv: lambda c, v: float(c.diagonal() @ v**2) / 2, None),
    ("3.1.3", lambda tv: lambda c, v: float(v @ c @ v) / 2, "with the signs it has"),
    ("3.1.3", lambda tv: lambda c, v: float(c.diagonal() @ v**2), "factor 1/2"),
    ("3.1.3", lambda tv: lambda c, v: float(v.abs() @ c.abs() @ v.abs()) / 2, "pairs of entries cancel"),
    ("3.1.3", lambda tv: lambda c, v: float(c.trace()) / 2, "square it"),
    ("3.1.3", lambda tv: lambda c, v: 0.0, "is 0 for i ≠ j"),
    ("3.1.4", lambda tv: squared_gradients(), None),
    ("3.1.4", lambda tv: squared_gradients(pieces=7), "the square of the mean gradient"),
    (
        "3.1.4",
        lambda tv: lambda m, x, y: {n: 49 * g for n, g in squared_gradients(7)(m, x, y).items()},
        "added up before",
    ),
    ("3.1.4", lambda tv: squared_gradients(total=True), "not their sum"),
    ("3.1.4", lambda tv: squared_gradients(power=1), "clear p.grad"),
    ("3.1.4", lambda tv: lambda m, x, y: {}, "expected a dict"),
    ("3.1.5", lambda tv: across(100.0), None),
    ("3.1.5", lambda tv: across(5.0), "worse than the average"),
    ("3.1.5", lambda tv: [[[8, -4], [-4, 4]], [[2, 2], [2, 6]]], "times what the average costs"),
    ("3.1.5", lambda tv: across(100.0, own=0.0), "costs nothing here"),
    ("3.1.5", lambda tv: across(-1.0), "negative eigenvalue"),
    ("3.1.5", lambda tv: [torch.eye(3), torch.eye(3)], "must be a symmetric matrix"),
    ("3.1.5", lambda tv: [torch.eye(2)], "expected two matrices"),
    ("3.2.1", lambda tv: [2.0, 2.0], None),
    ("3.2.1", lambda tv: [1.0, 2.0], "the average"),
    ("3.2.1", lambda tv: [1.0, 4.0], "column by column"),
    ("3.2.1", lambda tv: torch.tensor([2, 4]), "answered with 6"),
    ("3.2.1", lambda tv: [3.0, 1.0], "both errors can be zero"),
    ("3.2.1", lambda tv: [2.0], "expected two numbers"),
    ("3.2.2", lambda tv: from_gram(lambda d, a: (d @ a @ d.T).trace()), None),
    ("3.2.2", lambda tv: from_gram(lambda d, a: (d @ a).square().sum()), "A twice"),
    ("3.2.2", lambda tv: from_gram(lambda d, a: (d.square() * a.diagonal()).sum()), "diagonal alone"),
    ("3.2.2", lambda tv: from_gram(lambda d, a: d.square().sum() * a.trace()), "which inputs meet which weights"),
    ("3.2.2", lambda tv: from_gram(lambda d, a: (d @ a @ d.T).sum()), "not the sum of all entries"),
    ("3.2.2", lambda tv: from_gram(lambda d, a: (d @ a @ d.T).trace() / len(d)), "a sum over outputs"),
    ("3.2.2", lambda tv: from_gram(lambda d, a: d.norm()), "as a trace of"),
    ("3.2.3", lambda tv: one_layer, None),
    ("3.2.3", lambda tv: lambda w, a: w.mean(0), "this is the average"),
    ("3.2.3", lambda tv: lambda w, a: one_layer(w, a, keep=False), "you return 0"),
    ("3.2.3", lambda tv: lambda w, a: w.sum(0), "is not the sum of W_k A_k"),
    (
        "3.2.3",
        lambda tv: lambda w, a: one_layer(w, a.flip(0)),
        "to the left",
    ),
    ("3.2.3", lambda tv: lambda w, a: torch.full((2, 5), torch.nan), "use the pseudo-inverse"),
    ("3.2.3", lambda tv: lambda w, a: one_layer(w, torch.diag_embed(a.diagonal(dim1=1, dim2=2)), keep=False), "α = 0"),
    ("3.2.3", lambda tv: lambda w, a: a.sum(0), "expected a weight of shape"),
    ("3.2.4", lambda tv: in_the_space, None),
    ("3.2.4", lambda tv: lambda a, c: [True] * 6, "were never seen"),
    ("3.2.4", lambda tv: lambda a, c: ((c @ a) * c).sum(1) > 5, "how long a candidate is"),
    ("3.2.4", lambda tv: lambda a, c: [False] * 6, "has no part along"),
    ("3.2.4", lambda tv: lambda a, c: [True], "one answer for each"),
    ("3.2.5", lambda tv: onto, None),
    ("3.2.5", lambda tv: lambda x, y: onto(x, y, size=lambda x: 1), "counts twice"),
    ("3.2.5", lambda tv: lambda x, y: onto(y, x), "of shape (3, 5)"),
    ("3.2.5", lambda tv: lambda x, y: torch.zeros(3, 5), "each term divided"),
    ("3.3.1", lambda tv: lambda a, b, v: (b @ v @ a).sum(0), None),
    ("3.3.1", lambda tv: lambda a, b, v: b.sum(0) @ v @ a.sum(0), "the product of the sums"),
    ("3.3.1", lambda tv: lambda a, b, v: (b @ v @ a).mean(0), "has the sum"),
    ("3.3.1", lambda tv: lambda a, b, v: (b @ v + v @ a).sum(0), "one after the other"),
    ("3.3.1", lambda tv: lambda a, b, v: (v @ a).sum(0), "RegMean's C"),
    ("3.3.1", lambda tv: lambda a, b, v: (b @ v).sum(0), "outputs from the left"),
    ("3.3.1", lambda tv: lambda a, b, v: (a @ v.T @ b).sum(0), "of v's shape"),
    ("3.3.2", lambda tv: bounded_steps(), None),
    ("3.3.2", lambda tv: bounded_steps(root=lambda kappa: kappa), "have its root"),
    ("3.3.2", lambda tv: bounded_steps(factor=1), "factor 2"),
    ("3.3.2", lambda tv: bounded_steps(of=np.sqrt), "not of its square"),
    ("3.3.2", lambda tv: bounded_steps(whole=np.floor), "the next whole number"),
    ("3.3.3", lambda tv: lambda g: lambda v: torch.einsum("n,noi->oi", (g * v).sum((1, 2)), g) / len(g), None),
    ("3.3.3", lambda tv: lambda g: lambda v: (g.mean(0) * v).sum() * g.mean(0), "the mean of the outer products"),
    ("3.3.3", lambda tv: lambda g: lambda v: g.square().mean(0) * v, "the diagonal alone"),
    ("3.3.3", lambda tv: lambda g: lambda v: torch.einsum("n,noi->oi", (g * v).sum((1, 2)), g), "not a sum"),
    (
        "3.3.3",
        lambda tv: lambda g: lambda v: v * torch.einsum("n,noi->oi", (g * v).sum((1, 2)), g) / len(g),
        "one number per image",
    ),
    ("3.3.3", lambda tv: lambda g: lambda v: v, "the mean over images of"),
    ("3.3.3", lambda tv: lambda g: g.mean(0), "return a function"),
    ("3.3.3", lambda tv: lambda g: lambda v: g.mean((1, 2)), "V's shape"),
    ("3.3.4", lambda tv: for_two_tasks, None),
    ("3.3.4", lambda tv: lambda a, b, w: (w @ a).sum(0) @ torch.linalg.inv(a.sum(0)), "this is RegMean"),
    ("3.3.4", lambda tv: lambda a, b, w: torch.linalg.inv(b.sum(0)) @ (b @ w).sum(0), "the inputs' matrices"),
    (
        "3.3.4",
        lambda tv: lambda a, b, w: torch.linalg.inv(b.sum(0)) @ (b @ w @ a).sum(0) @ torch.linalg.inv(a.sum(0)),
        "not the product of the sums' inverses",
    ),
    ("3.3.4", lambda tv: lambda a, b, w: w.mean(0), "this is the average"),
    ("3.3.4", lambda tv: lambda a, b, w: w.sum(0), "put it into the system"),
    ("3.3.4", lambda tv: lambda a, b, w: a[0], "expected a weight"),
    ("4.1.1", lambda tv: lambda z: float(entropies(z.softmax(1)).mean()), None),
    ("4.1.1", lambda tv: lambda z: float(entropies(z.softmax(1)).mean()) / np.log(2), "these are bits"),
    ("4.1.1", lambda tv: lambda z: float(entropies(z.softmax(1)).sum()), "the mean over the images"),
    ("4.1.1", lambda tv: lambda z: float(torch.special.entr(z.softmax(1)).mean()), "a sum over the classes"),
    ("4.1.1", lambda tv: lambda z: -float(entropies(z.softmax(1)).mean()), "never negative"),
    ("4.1.1", lambda tv: lambda z: float(entropies(z.softmax(1).mean(0), 0)), "of the mean prediction"),
    ("4.1.1", lambda tv: lambda z: float(torch.special.entr(z.softmax(1).amax(1)).mean()), "all classes count"),
    ("4.1.1", lambda tv: lambda z: 0.0, "for a batch of 6 images"),
    ("4.1.1", lambda tv: lambda z: -float((z.softmax(1) * z.softmax(1).log()).sum(1).mean()), "Take log_softmax"),
    ("4.1.2", lambda tv: push_by_entropy(), None),
    ("4.1.2", lambda tv: push_by_entropy(sign=-1.0), "descent goes against it"),
    ("4.1.2", lambda tv: push_by_entropy(inside=lambda log_p, h: log_p), "add up to 0"),
    ("4.1.2", lambda tv: push_by_entropy(weight=lambda p: 1.0), "weighted by its p_c"),
    ("4.1.2", lambda tv: lambda z: (z == z.max()).float() - z.softmax(0), "entropy is softer"),
    ("4.1.2", lambda tv: lambda z: z, "use the chain rule"),
    ("4.1.2", lambda tv: lambda z: z.sum(), "a number per class"),
    ("4.1.3", lambda tv: task_slopes(), None),
    ("4.1.3", lambda tv: task_slopes(lambda parts: torch.stack(parts).mean(0)), "their effects add up"),
    ("4.1.3", lambda tv: task_slopes(lambda parts: parts[0]), "the first tensor alone"),
    ("4.1.3", lambda tv: task_slopes(sign=-1.0), "has the other"),
    ("4.1.3", lambda tv: task_slopes(torch.stack), "layer-wise slopes"),
    ("4.1.3", lambda tv: lambda g, taus: torch.zeros(3), "then the sum over tensors"),
    ("4.1.3", lambda tv: lambda g, taus: g["a"], "expected K = 3"),
    ("4.1.3", lambda tv: lambda g, taus: sum((taus[n] * g[n]).flatten(1).sum(1) for n in taus), "KeyError"),
    ("4.1.4", lambda tv: information(), None),
    ("4.1.4", lambda tv: information(second=0.0), "rewarded"),
    ("4.1.4", lambda tv: information(-1.0, 1.0), "certain and different"),
    ("4.1.4", lambda tv: information(1.0, 1.0), "is subtracted"),
    ("4.1.4", lambda tv: information(mean=lambda z: z.mean(0).softmax(0)), "average the predictions"),
    ("4.1.4", lambda tv: information(first=0.0), "for a batch of 7 images"),
    ("4.2.1", lambda tv: [-0.8, 3.2], None),
    ("4.2.1", lambda tv: [2.0, 6.0], "also raises the mean"),
    ("4.2.1", lambda tv: [1.0, 3.0], "slopes by m̂"),
    ("4.2.1", lambda tv: [-0.4, 1.6], "divide by the mean of the mask"),
    ("4.2.1", lambda tv: [-2.0, 2.0], "the mean of g ⊙ m̂, with"),
    ("4.2.1", lambda tv: [0.0, 1.0], "m̂ is (1.6, 0.4)"),
    ("4.2.2", lambda tv: lambda x, t: logistic(t * math.log(9) - x) - logistic(-t * math.log(9) - x), None),
    ("4.2.2", lambda tv: lambda x, t: logistic(math.log(9) - x) - logistic(-math.log(9) - x), "at temperature 1"),
    ("4.2.2", lambda tv: lambda x, t: logistic(math.log(9) / t - x) - logistic(-math.log(9) / t - x), "z = T log 9"),
    ("4.2.2", lambda tv: lambda x, t: logistic(t * math.log(9) - x), "some are below 0.1"),
    ("4.2.2", lambda tv: lambda x, t: 1 - logistic(t * math.log(9) - x) + logistic(-t * math.log(9) - x), "decided"),
    ("4.2.2", lambda tv: lambda x, t: 0.4, "not at x = 0"),
    ("4.2.2", lambda tv: lambda x, t: logistic(t * math.log(9)) - logistic(-t * math.log(9)), "not at x = 1.3"),
    ("4.2.3", lambda tv: lambda m, other: along(m / m.mean() - 1, other / other.mean() - 1), None),
    ("4.2.3", lambda tv: along, "and subtract 1"),
    ("4.2.3", lambda tv: lambda m, other: along(m - 1, other - 1), "by their means first"),
    ("4.2.3", lambda tv: lambda m, other: along(other / other.mean() - 1, m / m.mean() - 1), "the mask on the other"),
    (
        "4.2.3",
        lambda tv: lambda m, other: np.corrcoef(m.flatten(), other.flatten())[0, 1],
        "that is the cosine",
    ),
    ("4.2.3", lambda tv: lambda m, other: (other / other.mean()).std() / (m / m.mean()).std(), "the lengths, whatever"),
    (
        "4.2.3",
        lambda tv: lambda m, other: along(m / m.mean() - 1, other / other.mean() - 1) * (m / m.mean() - 1).norm(),
        "divide once more",
    ),
    ("4.2.3", lambda tv: lambda m, other: 0.0, "minimise"),
    ("4.2.4", lambda tv: lambda g, m: (g - m * (g * m).mean() / m.square().mean()) / m.square().mean().sqrt(), None),
    ("4.2.4", lambda tv: lambda g, m: (g - (g * m).mean() / m.mean()) / m.mean(), "division by the mean"),
    (
        "4.2.4",
        lambda tv: lambda g, m: g / m.square().mean().sqrt() - (g * m).mean() / m.square().mean(),
        "a factor m̂ is missing",
    ),
    ("4.2.4", lambda tv: lambda g, m: g / m.square().mean().sqrt(), "that term is missing"),
    ("4.2.4", lambda tv: lambda g, m: g - m * (g * m).mean() / m.square().mean(), "divide by the root"),
    ("4.2.4", lambda tv: lambda g, m: g[0], "a slope per entry"),
    ("4.2.4", lambda tv: lambda g, m: m, "m_i / (n root)"),
    ("4.3.1", lambda tv: routed_layer(), None),
    ("4.3.1", lambda tv: routed_layer(lambda w: w.mean(0).expand_as(w)), "one merge for all inputs"),
    ("4.3.1", lambda tv: routed_layer(lambda w: w.softmax(1)), "no softmax"),
    ("4.3.1", lambda tv: lambda base, taus, w, h: torch.einsum("nk,kij,nj->ni", w, taus, h), "own answer is missing"),
    ("4.3.1", lambda tv: lambda b, taus, w, h: torch.einsum("nk,kij,nj->ni", w, taus + b, h), "comes once"),
    ("4.3.1", lambda tv: lambda base, taus, w, h: h @ base.T, "for input i"),
    ("4.3.1", lambda tv: lambda base, taus, w, h: h, "expected the outputs"),
    ("4.3.2", lambda tv: 11, None),
    ("4.3.2", lambda tv: 10, "a fifth exactly"),
    ("4.3.2", lambda tv: 5, "more than five times"),
    ("4.3.2", lambda tv: 40, "fewer tokens"),
    ("4.3.3", lambda tv: lambda w, n: torch.cat([p.mean(0).expand_as(p) for p in w.split(n)]), None),
    ("4.3.3", lambda tv: lambda w, n: torch.stack([p.mean(0) for p in w.split(n)]), "one row per batch"),
    ("4.3.3", lambda tv: lambda w, n: w[:6], "was lost"),
    ("4.3.3", lambda tv: lambda w, n: w.mean(0).expand_as(w), "one mean over all"),
    ("4.3.3", lambda tv: lambda w, n: torch.cat([p.mean(0).expand_as(p) for p in w.tensor_split(n)]), "three batches"),
    ("4.3.3", lambda tv: lambda w, n: torch.cat([(p.sum(0) / n).expand_as(p) for p in w.split(n)]), "divide by 1"),
    ("4.3.3", lambda tv: lambda w, n: w, "own weights"),
    ("4.3.3", lambda tv: lambda w, n: 0 * w, "rows 0 to 2"),
    ("4.3.3", lambda tv: lambda w, n: w.T, "a row per image"),
    ("4.3.4", lambda tv: lambda w, tasks: 1 - float(scatter(w - by_task(w, tasks)) / scatter(w - w.mean(0))), None),
    ("4.3.4", lambda tv: lambda w, tasks: float(scatter(w - by_task(w, tasks)) / scatter(w - w.mean(0))), "within"),
    ("4.3.4", lambda tv: lambda w, tasks: float(scatter(by_task(w, tasks)) / scatter(w)), "not around zero"),
    ("4.3.4", lambda tv: share_by_column, "not a mean of their shares"),
    ("4.3.4", lambda tv: share_of_centres, "the number of its images"),
    ("4.3.4", lambda tv: lambda w, tasks: 0.0, "replace every row"),
]


@pytest.mark.parametrize(
    ("number", "answer", "hint"), ANSWERS, ids=lambda x: x if isinstance(x, str) else "" if callable(x) else "right"
)
def test_right_answers_pass_and_wrong_ones_get_a_hint(number, answer, hint, suite, monkeypatch):
    for module in (checking, part1, part2, part3, part4):
        monkeypatch.setattr(module, "pocket8", lambda: suite, raising=False)
    verdict = check(number, answer(suite.task_vectors))
    assert bool(verdict) == (hint is None), verdict
    assert (hint or "right") in repr(verdict)


def test_every_exercise_is_tried_with_a_wrong_answer():
    assert {number for number, _, hint in ANSWERS if hint} == set(exercises())


def test_an_open_exercise_is_no_error():
    for number in exercises():
        verdict = check(number, None)
        assert not verdict
        assert repr(verdict) == f"Exercise {number}: not answered yet."


def test_an_answer_that_fails_gets_a_verdict():
    def broken(tv, scale):
        raise RuntimeError("I don't work")

    assert "could not be used (RuntimeError: I don't work)" in repr(check("1.1.4", broken))


def test_exercises_that_do_not_exist_are_said():
    with pytest.raises(KeyError, match=r"no exercise '9\.9\.9'; there are 1\.1\.1"):
        check("9.9.9", 1)
    with pytest.raises(ValueError, match="has a checker already"):
        exercise("1.1.1")(lambda answer: "")


def test_a_verdict_is_shown_in_colour_and_escaped():
    shown = Verdict("1.1.1", "wrong", "a < b")._repr_html_()
    assert "a &lt; b" in shown
    assert "not yet" in shown
    assert shown != Verdict("1.1.1", "right", "a < b")._repr_html_()
