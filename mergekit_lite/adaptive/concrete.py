r"""Concrete subspace learning: one mask for all tasks, learnt so that the masked task vectors disturb each other less.

Tang et al., "Concrete subspace learning based interference elimination for multi-task model fusion", 2023
(arXiv:2312.06173). All task vectors are multiplied by one mask, with an entry :math:`m_i \in (0, 1)` for each parameter
of the network, and merged as before:

.. math:: \theta = \theta_0 + \sum_k \lambda_k\, \hat m \odot \tau_k, \qquad \hat m^l = m^l / \mathrm{mean}(m^l)
   \quad\text{for every tensor } l,

so a mask moves change from some entries of a tensor to others, and leaves its amount. To learn which entries to keep
one would like to try yes and no, but a choice has no gradient. The *Concrete* distribution is a random choice that has
one (Maddison et al. and Jang et al., ICLR 2017, arXiv:1611.00712 and arXiv:1611.01144): with a logit :math:`x_i`, which
is what is learnt, a temperature :math:`T` and u uniform in (0, 1),

.. math:: m = \sigma\!\left(\frac{x + \log u - \log(1 - u)}{T}\right), \qquad P(m > 1/2) = \sigma(x).

Small temperatures give masks near 0 and 1. Each step draws a new mask, asks for the merge's loss on a batch, and moves
the logits downhill; :math:`\theta` is a function of them, so the chain rule needs the gradient by the weights alone.

**With coefficients** (Concrete AdaMerging) two things are learnt, one inside the other. The mask should be good not for
the coefficients as they are, but for those that AdaMerging will choose *for this mask*. So every step first takes one
step on the coefficients, from their start, with the mask held; then the mask's step is taken there, with these held
(the mask's influence on the first step is ignored, a first-order approximation). In the end the mask is fixed and
AdaMerging runs on the masked task vectors.

**What the released code does differently.** Its inner step is one of Adam with a learning rate of 1: some
coefficients jump across the whole interval, and Adam's averages outlive the coefficients, which go back to their start.
So does ours (`inner_learning_rate`). It merges for the inner step before the coefficients go back, so from the second
step on the inner slope belongs to those of the step before; ours is taken at the start. Its final mask is one more
random draw (``mask="sample"``). The mean of the distribution is the default here: the weights depend linearly on the
mask, so it is the mean of all the merges that could be drawn, up to the division by the mean, and needs no luck.
Buffers have no gradient and no mask; running statistics are the mean of the experts', as in every merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lite.adaptive.adamerging import bounded, learn_coefficients, losses_and_slopes
from mergekit_lite.adaptive.adaptation import Images, LossOfWeights, adapt, draws
from mergekit_lite.adaptive.coefficients import Init, merge_with, starting, weighted_sum
from mergekit_lite.adaptive.history import History
from mergekit_lite.adaptive.losses import Head, Loss, entropy_loss
from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import flag, positive
from mergekit_lite.data_free.dare import draw_seed
from mergekit_lite.data_free.task_arithmetic import task_arithmetic
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors

NODES = 64  # points at which the mean over u is taken


@dataclass(frozen=True, eq=False, repr=False)
class ConcreteMask(Mapping[str, Tensor]):
    """A random mask for every masked tensor: its logits, by tensor name.

    Attributes:
        logits: x, of the tensors' shapes; an entry is more likely kept than not where x > 0.
        temperature: T.
        history: of the adaptation.
    """

    logits: Mapping[str, Tensor]
    temperature: float = 0.5
    history: History = field(default_factory=History)

    def __getitem__(self, name: str) -> Tensor:
        return self.logits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.logits)

    def __len__(self) -> int:
        return len(self.logits)

    def mean(self) -> dict[str, Tensor]:
        r"""The expected mask, :math:`\mathbb{E}_u\, m`, by tensor name: in (0, 1), 1/2 where the logit is 0."""
        noise = ((torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES).logit().tolist()  # midpoints of u

        def expected(x: Tensor) -> Tensor:
            total = torch.zeros_like(x)
            for n in noise:
                total += torch.sigmoid((x + n) / self.temperature)
            return total / NODES

        return {name: expected(x) for name, x in self.items()}

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw of the mask, by tensor name; by default with a generator of seed 0."""
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        return {name: relaxed(x, self.temperature, generator) for name, x in self.items()}

    def kept(self) -> dict[str, float]:
        """The share of entries that are more likely kept than not, by tensor name."""
        return {name: _share_kept({name: x}) for name, x in self.items()}

    def __repr__(self) -> str:
        entries = sum(x.numel() for x in self.values())
        return f"ConcreteMask({len(self)} tensors, {entries:,} entries, temperature {self.temperature}; {self.history})"


@method(
    name="Concrete",
    paper="Tang et al., Concrete subspace learning based interference elimination for multi-task model fusion",
    arxiv="2312.06173",
    year=2023,
    need=Need.TEST_INPUTS,
)
def concrete(
    tv: TaskVectors,
    model: nn.Module,
    heads: Mapping[str, Head],
    images: Images,
    *,
    adamerging: str | None = None,
    mask: str = "mean",
    scale: float = 0.3,
    coefficient_steps: int = 1000,
    coefficient_learning_rate: float = 1e-3,
    clamp: bool = False,
    generator: torch.Generator | None = None,
    **options: Any,
) -> StateDict:
    r"""Learn a mask that all task vectors share, then add the masked task vectors.

    Args:
        tv: K task vectors.
        model: a network that these weights fit; it is not changed.
        heads: by task, from the network's outputs to logits.
        images: by task, inputs without labels, as `learn_mask` takes them.
        adamerging: with ``"task"`` or ``"layer"`` the coefficients are learnt, too; by default all are `scale`.
        mask: ``"mean"`` of the learnt distribution, or a ``"sample"`` of it.
        scale: :math:`\lambda`, or where the coefficients start.
        coefficient_steps: of AdaMerging on the masked task vectors.
        coefficient_learning_rate: of these steps.
        clamp: keep the coefficients in [0, 1].
        generator: of the draws of images and masks; by default one with seed 0.
        **options: further arguments of `learn_mask`.

    Returns:
        The merged state dict. For mask and history call `learn_mask`, then `masked`.

    Raises:
        KeyError, ValueError, DivergenceError: as for `learn_mask`.
    """
    if mask not in ("mean", "sample"):
        raise ValueError(f"mask must be 'mean' or 'sample'; got '{mask}'.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    learnt = learn_mask(
        tv, model, heads, images, coefficients=adamerging, scale=scale, clamp=clamp, generator=generator, **options
    )
    fixed = masked(tv, learnt.mean() if mask == "mean" else learnt.sample(generator))
    if adamerging is None:
        return task_arithmetic(fixed, scale=scale)
    shared = {name: options[name] for name in ("loss", "batch", "progress") if name in options}
    found = learn_coefficients(
        fixed,
        model,
        heads,
        images,
        granularity=adamerging,
        init=scale,
        clamp=clamp,
        steps=coefficient_steps,
        learning_rate=coefficient_learning_rate,
        generator=generator,
        **shared,
    )
    return merge_with(fixed, found)


def masked(tv: TaskVectors, mask: Mapping[str, Tensor]) -> TaskVectors:
    r"""Task vectors multiplied by a mask of mean 1: :math:`\hat m \odot \tau_k`; what has no mask stays as it is.

    Args:
        tv: K task vectors.
        mask: by tensor name, of the tensor's shape; not all 0.

    Returns:
        K task vectors to merge by any method.

    Raises:
        ValueError: when they are read, if a tensor's mask is of another shape or all 0.
    """

    def multiply(name: str, taus: Tensor) -> Tensor:
        if name not in mask:
            return taus
        m = mask[name].to(taus)
        if m.shape != taus.shape[1:] or (m.numel() > 0 and not m.any()):
            raise ValueError(f"'{name}' needs a mask of shape {tuple(taus.shape[1:])} that is not all 0.")
        return taus.mul_(m / m.mean())

    return tv.transform(multiply)


def learn_mask(
    tv: TaskVectors,
    model: nn.Module,
    heads: Mapping[str, Head],
    images: Images,
    *,
    coefficients: str | None = None,
    scale: Init = 0.3,
    clamp: bool = False,
    temperature: float = 0.5,
    steps: int = 2000,
    batch: int = 16,
    learning_rate: float = 1e-3,
    inner_learning_rate: float = 1.0,
    loss: Loss = entropy_loss,
    generator: torch.Generator | None = None,
    measure: Callable[[StateDict], Mapping[str, float]] | None = None,
    every: int = 50,
    patience: int | None = None,
    progress: bool = True,
) -> ConcreteMask:
    r"""Find the logits of a mask that all task vectors share. The task vectors are held in memory.

    Args:
        tv: K task vectors.
        model: a network that these weights fit; it is not changed.
        heads: by task, from the network's outputs to logits.
        images: inputs by task, as `draws` takes them.
        coefficients: ``"task"`` or ``"layer"``: every step on the mask is taken at coefficients that one step of
            AdaMerging has moved from `scale`, on another batch. By default they stay there.
        scale: :math:`\lambda`: a number, K numbers, or for layers what `learn_coefficients` takes as init.
        clamp: keep the coefficients in [0, 1].
        temperature: T; small ones give masks near 0 and 1, and large gradients that are seldom there.
        steps: of Adam on the logits.
        batch: images per task and step.
        learning_rate: of Adam on the logits, about how far a logit moves in a step.
        inner_learning_rate: of Adam on the coefficients.
        loss: what to descend on; the paper's is the entropy.
        generator: of the draws of images and masks; by default one with seed 0.
        measure: accuracies by name of a merged state dict (that of the mean mask at `scale`), for the history alone.
        every: how many steps apart they are measured.
        patience: stop as soon as the mean loss of the last so many steps is not below that of as many before.
        progress: show a progress bar.

    Returns:
        The logits by tensor name, and their history: losses, and the share of positive logits as ``"share kept"``.

    Raises:
        KeyError: a task has no head, or a tensor is missing in the model.
        ValueError: no images, another kind of coefficients, or a number that makes no sense.
        DivergenceError: a loss or its gradient is not finite; `reached` has the mask so far.
    """
    positive("temperature", temperature)
    positive("learning_rate", learning_rate)
    positive("inner_learning_rate", inner_learning_rate)
    flag("clamp", clamp)
    of_weights = LossOfWeights(model, heads, tv, loss)
    layers = {name: (theta0, taus) for name, theta0, taus in tv.layers()}
    logits = {name: torch.zeros_like(layers[name][0]) for name in of_weights.trainable}
    start = starting(scale, list(layers), len(tv), "layer" if coefficients is None else coefficients, clamp)
    free = start.clone()
    inner = torch.optim.Adam([free], lr=inner_learning_rate)
    batches = draws(images, batch, generator)
    noise = torch.Generator().manual_seed(draw_seed(generator))

    def objective(inputs: Mapping[str, Tensor]) -> Mapping[str, float]:
        masks = {name: relaxed(x, temperature, noise) for name, x in logits.items()}
        hats = {name: m / m.mean() for name, m in masks.items()}
        if coefficients is not None:  # one step of AdaMerging from the start, for these masks, on images of its own
            free.copy_(start)
            covered = {n: (theta0, hats.get(n, 1.0) * taus) for n, (theta0, taus) in layers.items()}
            _, free.grad = losses_and_slopes(free, clamp, covered, of_weights, next(batches))
            inner.step()
        lambdas = bounded(free, clamp).expand(len(layers), len(tv))
        sums = {n: weighted_sum(row, taus) for (n, (_, taus)), row in zip(layers.items(), lambdas, strict=True)}
        merged = {n: theta0 + hats.get(n, 1.0) * sums[n] for n, (theta0, _) in layers.items()}
        losses, gradient = of_weights(merged, inputs)
        for name, g in gradient.items():
            logits[name].grad = slope_of_logits(g.to(sums[name]) * sums[name], masks[name], temperature)
        return losses

    def found(history: History | None = None) -> ConcreteMask:
        return ConcreteMask({name: x.clone() for name, x in logits.items()}, temperature, history or History())

    def measure_mean() -> Mapping[str, float]:
        rows = dict(zip(layers, start.expand(len(layers), len(tv)), strict=True))
        assert measure is not None
        return measure(merge_with(masked(tv, found().mean()), rows))

    history = adapt(
        torch.optim.Adam(list(logits.values()), lr=learning_rate),
        objective,
        batches,
        steps=steps,
        record=lambda: {"share kept": {"mask": _share_kept(logits)}},
        measure=None if measure is None else measure_mean,
        every=every,
        patience=patience,
        progress=progress,
        reached=found,
    )
    return found(history)


def relaxed(x: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    r"""A draw of the Concrete distribution: :math:`\sigma((x + \log u - \log(1 - u)) / T)`, of x's shape."""
    tiny = torch.finfo(x.dtype).eps
    u = torch.rand(x.shape, generator=generator, dtype=x.dtype).clamp_(tiny, 1 - tiny).to(x.device)
    return torch.sigmoid((x + u.logit()) / temperature)


def slope_of_logits(by_weight: Tensor, m: Tensor, temperature: float) -> Tensor:
    r"""How a loss depends on the logits of one tensor, from how it depends on the mask of mean 1.

    Args:
        by_weight: :math:`h = \partial L / \partial \hat m`.
        m: the mask before it was divided by its mean :math:`\mu`.
        temperature: T.

    Returns:
        :math:`\frac{h_i - \mathrm{mean}(h \odot \hat m)}{\mu} \cdot \frac{m_i (1 - m_i)}{T}`: raising one entry lowers
        all others a little, as the mean is divided by.
    """
    mu = m.mean()
    return (by_weight - (by_weight * m / mu).mean()) / mu * m * (1 - m) / temperature


def _share_kept(logits: Mapping[str, Tensor]) -> float:
    return sum(float((x > 0).sum()) for x in logits.values()) / max(1, sum(x.numel() for x in logits.values()))
