r"""What K-FAC leaves out, and how conjugate gradients walk: for chapter 3.3.

Weights of a layer are stacked column by column, :math:`\text{vec} V`, so that

.. math:: (A \otimes B)\, \text{vec} V = \text{vec}(B V A) \qquad (A \text{ symmetric}).

The Fisher information of one layer is the matrix

.. math:: F = \frac1n \sum_x \sum_c p_c(x)\, \text{vec} G_{xc}\, (\text{vec} G_{xc})^\top ,

with the gradients :math:`G_{xc}` of :math:`\log p_c(x)` by the layer's weight: exact, in as many numbers as
(weights)\ :sup:`2`. It is kept here as its *roots*, the matrices :math:`\sqrt{p_c(x) / n}\; G_{xc}`, a few hundred of
the weight's shape; for a small layer it can be written out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from mergekit_lite.calibrated.blocks import Block, Diagonal
from mergekit_lite.calibrated.conjugate_gradient import LinearMap, conjugate_gradient
from mergekit_lite.calibrated.curvature import Head
from mergekit_lite.task_vectors import TaskVectors, float64

# ---------------------------------------------------------------- the Fisher information of a layer, written out


def fisher_roots(
    model: nn.Module, images: Tensor, names: Iterable[str], *, head: Head | None = None
) -> dict[str, Tensor]:
    """The roots of the exact Fisher information of some layers.

    Args:
        model: an expert, from images to logits, or to what `head` makes logits of.
        images: (n, ...), as the model reads them.
        names: of weights with two axes or more; what follows the first axis is read as one.
        head: makes logits (n, classes).

    Returns:
        (n · classes, outputs, inputs) by name, float64. The Fisher information is the sum of their outer products.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    wanted = {name: state[name] for name in names}

    def log_probabilities(weights: Mapping[str, Tensor], image: Tensor) -> Tensor:
        outputs = functional_call(model, {**state, **weights}, (image[None],))
        return (outputs if head is None else head(outputs)).log_softmax(1)[0]

    def of_class(label: int) -> dict[str, Tensor]:
        by_image = vmap(grad(lambda w, x: log_probabilities(w, x)[label]), in_dims=(None, 0))
        found: dict[str, Tensor] = by_image(wanted, images.contiguous())
        return found

    training = model.training
    model.eval()
    with torch.no_grad():
        likely = float64(vmap(log_probabilities, in_dims=(None, 0))(wanted, images).exp())
    by_class = [of_class(label) for label in range(likely.shape[1])]
    model.train(training)
    shares = (likely.T / len(images)).sqrt()[..., None, None]  # classes x n
    return {
        name: (shares * float64(torch.stack([g[name] for g in by_class])).flatten(3)).flatten(0, 1) for name in wanted
    }


def fisher_of_equal_places(model: nn.Module, images: Tensor, name: str, *, head: Head | None = None) -> Tensor:
    r"""The Fisher information of a 1 x 1 convolution without the terms of two different places.

    The gradient of one image is a sum over places, :math:`\sum_t g_t a_t^\top`, and its outer product with itself has a
    term for every pair of places. Of these, K-FAC keeps the pairs of a place with itself. This is that sum as it is;
    K-FAC then takes `a` and `g` for independent, too.

    Args:
        model: an expert.
        images: (n, ...), as the model reads them.
        name: of the convolution's weight, (o, i, 1, 1).
        head: makes logits (n, classes).

    Returns:
        The matrix (o · i, o · i), with weights stacked column by column.
    """
    seen: list[Tensor] = []
    layer = model.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    training = model.training
    model.eval()
    with torch.enable_grad():
        outputs = model(images)
        logs = (outputs if head is None else head(outputs)).log_softmax(1)
    handle.remove()
    model.train(training)
    a = seen[0].detach().flatten(2).mT  # n x places x inputs
    total = torch.zeros(())
    for by_image in logs.T:
        g = torch.autograd.grad(by_image.sum(), seen[1], retain_graph=True)[0].flatten(2).mT
        roots = a[..., :, None] * g[..., None, :] * (by_image.detach().exp() / len(images)).sqrt()[:, None, None, None]
        stacked = roots.flatten(2).flatten(0, 1)
        total = total + stacked.T @ stacked
    return float64(total)


def outer_products(roots: Tensor) -> Tensor:
    """The matrix itself, (o · i, o · i), with weights stacked column by column."""
    stacked = roots.mT.flatten(1)
    return stacked.T @ stacked


def written_out(block: Block, like: Tensor) -> Tensor:
    """The matrix of a block for weights `like` this, stacked column by column; of one group only."""
    outputs, inputs = like.flatten(1).shape
    if isinstance(block, Diagonal):
        return block.values.view(outputs, inputs).T.flatten().diag()
    if block.groups > 1:
        raise ValueError(f"expected one group, got {block.groups}: a grouped layer is several, each with its matrix.")
    a, b = (
        torch.eye(n, dtype=torch.float64) if factor is None else factor[0]
        for n, factor in ((inputs, block.inputs), (outputs, block.outputs))
    )
    return torch.kron(a, b)


def cosine_to(roots: Tensor, block: Block) -> float:
    r"""The cosine of the angle between the Fisher information and an approximation, both read as long vectors.

    With the best factor in front of the approximation, the relative error is :math:`\sqrt{1 - \cos^2}`. No matrix is
    written out: :math:`\langle F, C \rangle` is the sum of :math:`\langle R, C R \rangle` over the roots.
    """
    if isinstance(block, Diagonal):
        length = block.values.norm()
    else:
        sizes = zip(roots.shape[:0:-1], (block.inputs, block.outputs), strict=True)
        length = torch.stack(
            [torch.tensor(n**0.5, dtype=torch.float64) if f is None else f.norm() for n, f in sizes]
        ).prod()
    flat = roots.flatten(1)
    product = sum((root * block(root)).sum() for root in roots)
    return float(product / (flat @ flat.T).norm() / length)


def cosine_of_draws(roots: Tensor, others: Tensor) -> float:
    """The same cosine between the exact Fisher informations of two draws of images."""
    a, b = roots.flatten(1), others.flatten(1)
    return float((a @ b.T).square().sum() / (a @ a.T).norm() / (b @ b.T).norm())


# ---------------------------------------------------------------- one layer as a system of its own


def one_layer(tv: TaskVectors, name: str) -> TaskVectors:
    """The task vectors of a single tensor."""
    theta0, taus = next((theta0, taus) for layer, theta0, taus in tv.layers() if layer == name)
    experts = {task: {name: theta0 + tau} for task, tau in zip(tv.names, taus, strict=True)}
    return TaskVectors({name: theta0}, experts)


def solve_directly(blocks: Sequence[Block], taus: Tensor) -> Tensor:
    """The merged task vector of a small layer, by writing the system out: (weights) x (weights) numbers.

    Args:
        blocks: of K experts.
        taus: their task vectors, (K, *shape).
    """
    total = torch.stack([written_out(block, taus[0]) for block in blocks]).sum(0)
    right = torch.stack([block(tau) for block, tau in zip(blocks, float64(taus), strict=True)]).sum(0)
    solution = torch.linalg.lstsq(total, right.flatten(1).T.flatten(), driver="gelsd").solution
    return solution.view(-1, len(right)).T.reshape(right.shape)


# ---------------------------------------------------------------- two ways down


def steepest_descent(
    apply: LinearMap, b: Tensor, x: Tensor, *, precondition: LinearMap | None = None
) -> Iterator[Tensor]:
    """Yield the start and the point after each step: straight down, as far as the bowl falls.

    Args:
        apply: x to A x, symmetric and positive.
        b: the right-hand side.
        x: the start.
        precondition: r to an approximation of the solution of A x = r.
    """
    precondition = precondition or (lambda residual: residual)
    while True:
        yield x
        residual = b - apply(x)
        direction = precondition(residual)
        curvature = float((direction * apply(direction)).sum())
        if curvature <= 0:
            return
        x = x + float((residual * direction).sum()) / curvature * direction


def ways_down(
    matrix: Tensor, start: Tensor, *, jacobi: bool = False, share: float = 1e-4, most: int = 1000
) -> dict[str, Tensor]:
    """Steepest descent and conjugate gradients to the bottom of a bowl at the origin, as points (steps + 1, n).

    Args:
        matrix: of the bowl, (n, n).
        start: (n,).
        jacobi: divide by the matrix's diagonal, both.
        share: a way ends where this share of the starting height is left.
        most: steps.
    """
    diagonal, zero = matrix.diagonal(), torch.zeros_like(start)
    options = {"precondition": (lambda r: r / diagonal) if jacobi else None}
    ways = {
        "steepest descent": steepest_descent(matrix.mv, zero, start, **options),
        "conjugate gradients": (x for x, _ in conjugate_gradient(matrix.mv, zero, start, **options)),
    }
    low = share * float(start @ matrix @ start)

    def until_low(way: Iterator[Tensor]) -> Tensor:
        points = []
        for x in islice(way, most + 1):
            points.append(x)
            if float(x @ matrix @ x) <= low:
                break
        return torch.stack(points)

    return {name: until_low(way) for name, way in ways.items()}


def bowl(elongation: float, degrees: float) -> Tensor:
    """A 2 x 2 matrix with eigenvalues 1 and `elongation`, the valley (eigenvalue 1) turned by an angle."""
    along, across = direction(degrees), direction(degrees + 90)
    return torch.outer(along, along) + elongation * torch.outer(across, across)


def direction(degrees: float) -> Tensor:
    """The unit vector at an angle from the horizontal, (2,)."""
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()])
