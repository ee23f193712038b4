r"""Gathering curvature: from a few inputs, a few small matrices per layer.

A layer computes :math:`W a` for every image, or for every place of an image (a pixel, a token): `a` is the input at
that place, and :math:`g` the gradient of the image's loss by the layer's output there. The gradient of one image's
loss by the weight is :math:`\sum_t g_t a_t^\top`, the sum over its places. Three kinds of curvature are made of `a`
and `g`:

- `input_grams`: :math:`A`, the mean of :math:`a a^\top` over all places of all images. For RegMean (Jin et al., 2023,
  arXiv:2212.09849) it is all: it asks the layer's outputs to stay, whatever follows. It needs no labels.
- `diagonal_fisher`: the mean over images of the *squared* gradient, weight by weight (Matena and Raffel, 2022,
  arXiv:2111.09832). The gradients are those of single images (`torch.func`): a batch's gradient is a
  mean, and its square is something else.
- `kfac`: :math:`A \otimes B`, where B is the mean over images of :math:`\sum_t g_t g_t^\top` (Martens and Grosse, 2015,
  arXiv:1503.05671; for convolutions Grosse and Martens, 2016, arXiv:1602.01057). It would be the Fisher information of
  the layer, if inputs and gradients were independent, and places, too. Parameters of normalisation get a diagonal.

**Whose labels.** The Fisher information is an expectation over labels drawn from the *model's* own predictions:
``labels="expected"`` computes it exactly, at the price of one backward pass per class; ``"sampled"`` draws one label
per image. ``"given"`` takes the data's labels: that is the *empirical* Fisher, which MaTS's released code uses
and which vanishes where the expert has learnt its training images by heart.

**Convolutions** are linear layers over pixels: `a` is the patch that a kernel sees. A depthwise one is as many layers
side by side as it has channels, each with a small Gram matrix. Patches come from the layer itself, with unit vectors
for kernels, so padding and stride are always the layer's own.

Layers are watched by hooks: the model is run as it is, in inference mode, and is not changed. A weight that is used
without its module being called (as within `torch.nn.MultiheadAttention`) is not seen by them: it gets no Gram matrices.
Layers that change their weight before using it (weight standardisation) are not linear in it and do not belong here.

A library, curvlinops, computes such matrices, too; what is here agrees with it (`tests/parity`). It is not used, since
it averages the channels of a grouped convolution before it looks at them, refuses parameters of normalisation, and
since these pages are what a reader wants to see.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergekit_lite.calibrated.blocks import Block, Curvature, Diagonal, Kronecker
from mergekit_lite.task_vectors import float64

Batch = Tensor | Sequence[Tensor]  # inputs, or inputs and labels
Head = Callable[[Tensor], Tensor]  # from the model's outputs to logits (images, classes)
Layer = nn.Linear | nn.Conv2d

LABELS = ("given", "sampled", "expected")
GRAM_PIECE = 1 << 20  # numbers turned into float64 at a time: they stay in a core's cache
PER_IMAGE = 25  # images whose gradients are held at a time: each is as large as the model


def input_grams(
    model: nn.Module, batches: Iterable[Batch], *, names: Iterable[str] | None = None, progress: bool = False
) -> Curvature:
    r"""The Gram matrix :math:`A = \text{mean}(a a^\top)` of every linear and convolutional layer's inputs.

    Args:
        model: an expert.
        batches: inputs (images first), or pairs of inputs and labels, of which the labels are not used.
        names: of the weights wanted; by default all.
        progress: show a progress bar.

    Returns:
        A `Kronecker` block with `inputs` alone for the weight of every layer that was called. Means are over images and
        places, so a task with more or larger images counts no more than others.

    Raises:
        ValueError: there are no batches, or none of the layers was called.
    """
    grams = _Grams()
    wanted = None if names is None else set(names)

    def watch(name: str, layer: Layer, a: Tensor, output: Tensor) -> Tensor:
        grams.add(_of(name, "weight"), a)
        return output

    with _inference(model), torch.no_grad(), _watched(model, watch, wanted):
        for batch in _shown(batches, progress):
            model(_inputs(batch))
    if not grams.sums and wanted is None:
        raise ValueError("no linear or convolutional layer of this model was called.")
    return Curvature({name: Kronecker(inputs=grams.per_place(name)) for name in grams.sums})


def kfac(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    head: Head | None = None,
    labels: str = "given",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Curvature:
    r"""Kronecker-factored curvature :math:`A \otimes B` of every linear and convolutional layer.

    Args:
        model: an expert, in which images do not influence each other.
        batches: pairs of inputs and class labels (images,); inputs alone, if labels are not ``"given"``.
        head: from the model's outputs to logits (images, classes); by default the outputs are the logits.
        labels: ``"given"``, ``"sampled"`` or ``"expected"``: whose labels, see above.
        generator: for sampled labels.
        progress: show a progress bar.

    Returns:
        For the layers that were called, a `Kronecker` block per weight and one with `outputs` alone per bias; for all
        other parameters a `Diagonal`.

    Raises:
        ValueError: there are no batches, no labels, another word for `labels`, or outputs that are no logits.
    """
    inputs, outputs = _Grams(), _Grams()
    nudges: list[tuple[str, Layer, Tensor]] = []

    def watch(name: str, layer: Layer, a: Tensor, output: Tensor) -> Tensor:
        inputs.add(name, a)
        # The gradient by a zero that is added to the output is the gradient by the output. It can be had even if
        # no weight asks for gradients, or the next layer overwrites the output.
        nudges.append((name, layer, torch.zeros_like(output, requires_grad=True)))
        return output + nudges[-1][2]

    batches, images = list(batches) if isinstance(batches, Iterator) else batches, 0  # they may be read twice
    with _inference(model), torch.enable_grad(), _watched(model, watch):
        for batch in _shown(batches, progress):
            nudges.clear()
            logits = _logits(model, head, _inputs(batch))
            images += len(logits)
            zeros = [nudge for _, _, nudge in nudges]
            for targets, weights in _targets(logits.detach(), batch, labels, generator):
                if not zeros:
                    break  # no such layer: all parameters get a diagonal
                losses = F.cross_entropy(logits, targets, reduction="none")
                # Images are independent, so the sum's gradients are those of every image. The weight comes in with
                # its root, as g gᵀ squares it.
                gradients = torch.autograd.grad(weights.sqrt() @ losses, zeros, retain_graph=True, allow_unused=True)
                for (name, layer, nudge), g in zip(nudges, gradients, strict=True):
                    outputs.add(name, _by_place(layer, torch.zeros_like(nudge) if g is None else g))
    blocks: dict[str, Block] = {}
    for name in inputs.sums:
        block = Kronecker(inputs.per_place(name), outputs.sums[name] / images)
        blocks[_of(name, "weight")] = block
        if model.get_submodule(name).bias is not None:
            blocks[_of(name, "bias")] = Kronecker(outputs=block.outputs)  # its input is always 1
    others = [name for name, _ in model.named_parameters() if name not in blocks]
    if not others:
        return Curvature(blocks)
    rest = diagonal_fisher(model, batches, head=head, labels=labels, generator=generator, names=others)
    return Curvature({**blocks, **rest})


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    head: Head | None = None,
    labels: str = "given",
    generator: torch.Generator | None = None,
    names: Iterable[str] | None = None,
    progress: bool = False,
) -> Curvature:
    r"""The diagonal of the Fisher information: the mean over images of the squared gradient, weight by weight.

    Args:
        model: an expert, in which images do not influence each other.
        batches: pairs of inputs and class labels (images,); inputs alone, if labels are not ``"given"``.
        head: from the model's outputs to logits (images, classes); by default the outputs are the logits.
        labels: ``"given"``, ``"sampled"`` or ``"expected"``: whose labels, see above.
        generator: for sampled labels.
        names: of the parameters wanted; by default all.
        progress: show a progress bar.

    Returns:
        A `Diagonal` for every parameter asked for.

    Raises:
        ValueError: there are no batches, no labels, another word for `labels`, or outputs that are no logits.
        KeyError: there is no such parameter.
    """
    frozen = {name: p.detach() for name, p in (*model.named_parameters(), *model.named_buffers())}
    wanted = {name: frozen[name] for name in (dict(model.named_parameters()) if names is None else names)}

    def loss(weights: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        outputs = functional_call(model, {**frozen, **weights}, (x[None],))
        return F.cross_entropy(outputs if head is None else head(outputs), target[None])

    per_image = vmap(grad(loss), in_dims=(None, 0, 0))
    sums = {name: float64(torch.zeros_like(p)) for name, p in wanted.items()}
    images = 0
    with _inference(model):
        for batch in _shown(batches, progress):
            x = _inputs(batch).contiguous()  # other layouts are slow under vmap
            with torch.no_grad():
                logits = _logits(model, head, x)
            images += len(logits)
            for targets, weights in _targets(logits, batch, labels, generator):
                for piece in torch.arange(len(x)).split(PER_IMAGE):
                    for name, g in per_image(wanted, x[piece], targets[piece]).items():
                        sums[name] += torch.tensordot(float64(weights[piece]), float64(g).square(), dims=1)
    return Curvature({name: Diagonal(total / images) for name, total in sums.items()})


# ---------------------------------------------------------------- whose labels


def _targets(
    logits: Tensor, batch: Batch, labels: str, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels (images,) with weights (images,): an expectation over labels is the weighted sum over what is yielded."""
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}; got '{labels}'.")
    if labels == "given":
        if isinstance(batch, Tensor) or len(batch) < 2:
            raise ValueError("given labels need batches of (inputs, labels); or use labels='expected'.")
        yield batch[1].to(logits.device), torch.ones_like(logits[:, 0])
        return
    probabilities = logits.softmax(1)
    if labels == "sampled":
        drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0]
        yield drawn.to(logits.device), torch.ones_like(logits[:, 0])
        return
    for label in range(logits.shape[1]):
        yield torch.full_like(logits[:, 0], label, dtype=torch.long), probabilities[:, label]


def _logits(model: nn.Module, head: Head | None, x: Tensor) -> Tensor:
    outputs = model(x)
    logits = outputs if head is None else head(outputs)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected logits of shape (images, classes), got {shape}; pass a head that makes them.")
    return logits


# ---------------------------------------------------------------- what a layer sees


def _by_place(layer: Layer, outputs: Tensor) -> Tensor:
    """A layer's outputs, or gradients by them, as (places, groups, outputs of a group), images one after another."""
    if isinstance(layer, nn.Linear):
        return outputs.reshape(-1, 1, outputs.shape[-1])
    return outputs.flatten(2).transpose(1, 2).reshape(-1, layer.groups, outputs.shape[1] // layer.groups)


def reader(layer: Layer) -> Callable[[Tensor], Tensor]:
    """A function from a layer's inputs to what its weight is multiplied with: (places, groups, inputs of a group)."""
    if isinstance(layer, nn.Linear):
        return lambda x: x.reshape(-1, 1, x.shape[-1])
    # The same convolution with a unit vector for every kernel: its outputs are the entries of the patches.
    probe, size = copy.deepcopy(layer), layer.weight[0].numel()
    kernels = torch.eye(size).view(size, *layer.weight.shape[1:]).repeat(layer.groups, 1, 1, 1)
    probe.weight, probe.bias = nn.Parameter(kernels.to(layer.weight), requires_grad=False), None
    return lambda x: _by_place(layer, probe.forward(x))  # without the hooks that the copy has, too


class _Grams:
    """Sums of v vᵀ over many vectors v, by name, in float64; and how many there were."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count: Counter[str] = Counter()

    def add(self, name: str, vectors: Tensor) -> None:
        """Add the vectors (n, groups, width)."""
        for part in vectors.detach().split(max(1, GRAM_PIECE // vectors[0].numel())):
            columns = float64(part).transpose(0, 1)
            gram = columns.transpose(1, 2) @ columns
            self.sums[name] = self.sums[name] + gram if name in self.sums else gram
        self.count[name] += len(vectors)

    def per_place(self, name: str) -> Tensor:
        """The mean v vᵀ."""
        return self.sums[name] / self.count[name]


# ---------------------------------------------------------------- running the model


@contextmanager
def _watched(
    model: nn.Module, watch: Callable[[str, Layer, Tensor, Tensor], Tensor], weights: Collection[str] | None = None
) -> Iterator[None]:
    """Within the block, `watch(name, layer, a, output)` sees every call of a layer and returns the output to go on.

    By default of all linear and convolutional layers, or else of those with these `weights`.
    """

    def hook(name: str, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        read = reader(layer)
        return lambda _, args, output: watch(name, layer, read(args[0]), output)

    handles = [
        layer.register_forward_hook(hook(name, layer))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and (weights is None or _of(name, "weight") in weights)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of(layer: str, parameter: str) -> str:
    """The full name of a layer's parameter; a model that is a single layer has no name before it."""
    return f"{layer}.{parameter}" if layer else parameter


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Within the block, images do not influence each other: no batch statistics, no dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention are slow under vmap, and warn
            yield
    finally:
        for module in training:
            module.training = True


def _inputs(batch: Batch) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]


def _shown(batches: Iterable[Batch], progress: bool) -> Iterator[Batch]:
    """The batches, with a progress bar where one is wanted.

    Raises:
        ValueError: there are none.
    """
    from tqdm.auto import tqdm

    batch = None
    for batch in tqdm(batches, desc="batches", disable=None if progress else True):
        yield batch
    if batch is None:
        raise ValueError("no batches: the curvature is gathered from at least one.")
