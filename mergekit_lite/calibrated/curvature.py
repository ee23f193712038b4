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
side by side as it has channels, each with a small Gram matrix.

The model is run as it is, in inference mode, and is not changed. Its layers are watched
(`mergekit_lite.calibrated.layers`): one that changes its weight before using it (weight standardisation) is refused. A
weight that is used without its layer being called (as within `torch.nn.MultiheadAttention`), or whose matrices would
have more than 16,384 rows, gets none; this is said once, with the names.

A library, curvlinops, computes such matrices, too; what is here agrees with it (`tests/parity`). It is not used, since
it averages the channels of a grouped convolution before it looks at them, refuses parameters of normalisation, and
since these pages are what a reader wants to see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergekit_lite.calibrated.blocks import Block, Curvature, Diagonal, Kronecker
from mergekit_lite.calibrated.layers import WIDEST, Layer, by_place, of, say_unseen, unseen, watched, width
from mergekit_lite.task_vectors import float64

Batch = Tensor | Sequence[Tensor]  # inputs, or inputs and labels
Head = Callable[[Tensor], Tensor]  # from the model's outputs to logits (images, classes)

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
        A `Kronecker` block with `inputs` alone for the weight of every layer that was called and has no more than
        16,384 inputs. Means are over images and places, so a task with more or larger images counts no more than
        others. Linear maps that have no block are named in a warning, once.

    Raises:
        ValueError: there are no batches, or none of the layers was called; a layer is not linear in its weight; a
            linear map among `names` was not seen.
        KeyError: the model has no tensor of a name among `names`.
    """
    wanted = None if names is None else set(names)
    grams = grams_of_called(model, batches, wanted, progress)
    if wanted is None and not grams:
        raise ValueError("no linear or convolutional layer of this model was called.")
    if wanted is None:
        say_unseen(model, grams, "They have no Gram matrices, and RegMean averages them.")
        return grams
    unknown = sorted(wanted - model.state_dict().keys())
    if unknown:
        raise KeyError(f"the model has no tensor '{unknown[0]}'.")
    hidden = sorted(wanted.intersection(unseen(model, grams)))
    if hidden:
        raise ValueError(
            f"nothing is known about the inputs of '{hidden[0]}': its layer was not called (the weight is used by "
            f"a module that is neither nn.Linear nor nn.Conv2d, or not at all), or is wider than {WIDEST:,}."
        )
    return grams


def grams_of_called(
    model: nn.Module, batches: Iterable[Batch], wanted: Collection[str] | None = None, progress: bool = False
) -> Curvature:
    """As `input_grams`, without a word about layers that were not called."""
    grams = _Grams()

    def watch(name: str, layer: Layer, a: Tensor, output: Tensor) -> Tensor:
        grams.add(of(name, "weight"), a)
        return output

    with _inference(model), torch.no_grad(), watched(model, watch, wanted):
        for batch in _shown(batches, progress):
            model(_inputs(batch))
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
        For the layers that were called and have no more than 16,384 inputs and outputs, a `Kronecker` block per weight
        and one with `outputs` alone per bias; for all other parameters a `Diagonal`. Linear maps that get a diagonal
        are named in a warning, once.

    Raises:
        ValueError: there are no batches, no labels, another word for `labels`, or outputs that are no logits; a layer
            is not linear in its weight.
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

    def largest(layer: Layer) -> int:
        return max(width(layer), len(layer.weight) // getattr(layer, "groups", 1))

    with _inference(model), torch.enable_grad(), watched(model, watch, size=largest):
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
                    outputs.add(name, by_place(layer, torch.zeros_like(nudge) if g is None else g))
    blocks: dict[str, Block] = {}
    for name in inputs.sums:
        block = Kronecker(inputs.per_place(name), outputs.sums[name] / images)
        blocks[of(name, "weight")] = block
        if model.get_submodule(name).bias is not None:
            blocks[of(name, "bias")] = Kronecker(outputs=block.outputs)  # its input is always 1
    say_unseen(model, blocks, "They get a diagonal.")
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


# ---------------------------------------------------------------- sums over places


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
