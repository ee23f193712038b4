"""Gathered curvature against its definition: loops over images, classes and places, with one gradient at a time."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mergekit_lite as mkl
from mergekit_lite.calibrated import curvature as module
from mergekit_lite.suites.vision import import_timm
from tests.calibrated.examples import written_out
from tests.data_free.test_tsv import random

# Even kernels with padding="same" have a wider rim at one side.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

Conv2dSame = import_timm().layers.Conv2dSame
KINDS = ("given", "expected")
CLASSES = 3


class Net(nn.Module):
    """A layer to look at, and an uneven way from its outputs to logits, which overwrites them."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.LayerNorm(layer.weight.shape[0])
        self.top = nn.Linear(layer.weight.shape[0], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.layer(x))

    def rest(self, z: Tensor) -> Tensor:
        """From the layer's outputs to logits; squares make gradients differ from place to place."""
        z = F.relu(z, inplace=True) ** 2
        if isinstance(self.layer, nn.Conv2d):
            z = z.flatten(2).transpose(1, 2)
        return self.top(self.norm(z if z.ndim == 2 else z.mean(1)))


def conv(*args, **options):
    return nn.Conv2d(*args, **options), (4, args[0], 6, 5)


LAYERS = {
    "linear": lambda: (nn.Linear(5, 4), (6, 5)),
    "linear without bias": lambda: (nn.Linear(5, 4, bias=False), (6, 5)),
    "linear at places": lambda: (nn.Linear(5, 4), (4, 3, 5)),
    "linear on a grid": lambda: (nn.Linear(3, 4), (2, 2, 3)),
    "1x1": lambda: conv(3, 4, 1),
    "stride": lambda: conv(2, 4, 3, stride=2),
    "padding": lambda: conv(2, 4, 3, padding=1),
    "oblong": lambda: conv(2, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    "dilation": lambda: conv(2, 4, 2, dilation=2),
    "same": lambda: conv(2, 4, 4, padding="same"),
    "reflect": lambda: conv(2, 4, 3, padding=2, padding_mode="reflect"),
    "circular": lambda: conv(2, 4, 3, padding=1, padding_mode="circular"),
    "groups": lambda: conv(6, 4, 3, groups=2, padding=1),
    "depthwise": lambda: conv(4, 4, 3, groups=4, padding=1, stride=2, bias=False),
    "two outputs per channel": lambda: conv(2, 4, 3, groups=2, padding=1),
    "timm's same": lambda: (Conv2dSame(2, 4, 3, stride=2), (4, 2, 6, 5)),
    "timm's same, depthwise": lambda: (Conv2dSame(4, 4, 3, stride=2, groups=4), (4, 4, 6, 5)),
}


def example(kind):
    """A network in float64, images and labels."""
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]()
    net = Net(layer).double().eval()
    return net, random(*shape, seed=1), torch.arange(shape[0]) % CLASSES


# ---------------------------------------------------------------- the definition, one place at a time


def padded(layer, x):
    """An image (channels, height, width) with its rim, by numpy."""
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if isinstance(layer, Conv2dSame):
        steps = [math.ceil(n / s) - 1 for n, s in zip(x.shape[1:], layer.stride, strict=True)]
        rim = [max(t * s + r + 1 - n, 0) for t, s, r, n in zip(steps, layer.stride, reach, x.shape[1:], strict=True)]
        rim = [(r // 2, r - r // 2) for r in rim]
    elif layer.padding == "same":
        rim = [(r // 2, r - r // 2) for r in reach]
    else:
        rim = [(p, p) for p in layer.padding]
    mode = {"zeros": "constant", "circular": "wrap"}.get(layer.padding_mode, layer.padding_mode)
    return np.pad(x.numpy(), [(0, 0), *rim], mode=mode)


def patches(layer, x):
    """What the weight is multiplied with at every place of one image: (places, groups, numbers)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, 1, x.shape[-1]).numpy()
    image = padded(layer, x)
    (height, width), (down, right), (stretch, widen) = layer.kernel_size, layer.stride, layer.dilation
    found = []
    for top in range(0, image.shape[1] - stretch * (height - 1), down):
        for left in range(0, image.shape[2] - widen * (width - 1), right):
            rows, columns = top + stretch * np.arange(height), left + widen * np.arange(width)
            patch = image[:, rows[:, None], columns[None, :]]
            found.append(patch.reshape(layer.groups, -1))
    return np.stack(found)


def at_places(layer, g):
    """One image's gradient by the layer's outputs, as (places, groups, outputs of a group)."""
    if isinstance(layer, nn.Linear):
        return g.reshape(-1, 1, g.shape[-1]).numpy()
    return np.stack(
        [
            g[:, row, column].reshape(layer.groups, -1).numpy()
            for row in range(g.shape[1])
            for column in range(g.shape[2])
        ]
    )


def outer(vectors):
    """The sum over places of v vᵀ, in each group."""
    return sum(np.stack([np.outer(v, v) for v in place]) for place in vectors)


def weighted_labels(logits, label, kind):
    """Each label that counts for one image, and how much."""
    if kind == "given":
        return [(label.item(), 1.0)]
    return [(c, p.item()) for c, p in enumerate(logits.softmax(1)[0])]


def input_gram(net, x):
    """A, by loops over images and places."""
    every = np.concatenate([patches(net.layer, image) for image in x])
    return outer(every) / len(every)


def output_gram(net, x, labels, kind):
    """B, by loops over images, classes and places."""
    total = 0.0
    for image, label in zip(x, labels, strict=True):
        z = net.layer(image[None]).detach().requires_grad_()
        logits = net.rest(z.clone())
        for c, p in weighted_labels(logits.detach(), label, kind):
            (g,) = torch.autograd.grad(-logits.log_softmax(1)[0, c], z, retain_graph=True)
            total = total + p * outer(at_places(net.layer, g[0]))
    return total / len(x)


def gradients(net, image, c):
    """The gradient of one image's loss by every parameter."""
    loss = -net(image[None]).log_softmax(1)[0, c]
    return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))


def squared_gradients(net, x, labels, kind):
    """The diagonal of the Fisher information, by loops over images and classes."""
    totals = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for image, label in zip(x, labels, strict=True):
        for c, p in weighted_labels(net(image[None]).detach(), label, kind):
            for name, g in gradients(net, image, c).items():
                totals[name] += p * g**2 / len(x)
    return totals


def assert_same(ours, theirs, rtol=1e-9):
    """Two curvatures have the same blocks, up to rounding."""
    assert set(ours) == set(theirs)
    for name, block in ours.items():
        assert block.factors().keys() == theirs[name].factors().keys(), name
        for part, m in block.factors().items():
            expected = theirs[name].factors()[part]
            torch.testing.assert_close(m, expected, rtol=rtol, atol=rtol * float(expected.abs().max()), msg=name)


# ---------------------------------------------------------------- against the definition


@pytest.mark.parametrize("kind", LAYERS)
def test_the_reference_reads_the_layer_rightly(kind):
    """With the patches the loops find, the weight gives what the layer gives."""
    net, x, _ = example(kind)
    weight = net.layer.weight.detach().reshape(patches(net.layer, x[0]).shape[1], -1, net.layer.weight[0].numel())
    bias = 0.0 if net.layer.bias is None else net.layer.bias.detach().view(len(weight), -1).numpy()
    for image in x:
        by_place = np.einsum("goi,tgi->tgo", weight.numpy(), patches(net.layer, image)) + bias
        np.testing.assert_allclose(by_place, at_places(net.layer, net.layer(image[None])[0].detach()), rtol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_input_grams(kind):
    net, x, _ = example(kind)
    grams = mkl.input_grams(net, [x])
    assert set(grams) == {"layer.weight", "top.weight"}
    np.testing.assert_allclose(grams["layer.weight"].inputs, input_gram(net, x), rtol=1e-9, atol=1e-12)
    assert all(block.outputs is None for block in grams.values())
    # The next layer sees what is averaged over places.
    seen = []
    net.top.register_forward_hook(lambda _, args, output: seen.append(args[0].detach()))
    net(x)
    torch.testing.assert_close(grams["top.weight"].inputs[0], seen[0].T @ seen[0] / len(x))


@pytest.mark.parametrize("labels", KINDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_kfac(kind, labels):
    net, x, y = example(kind)
    gathered = mkl.kfac(net, [(x, y)], labels=labels)
    assert set(gathered) == {name for name, _ in net.named_parameters()}
    block = gathered["layer.weight"]
    np.testing.assert_allclose(block.inputs, input_gram(net, x), rtol=1e-9, atol=1e-12)
    expected = output_gram(net, x, y, labels)
    np.testing.assert_allclose(block.outputs, expected, rtol=1e-9, atol=1e-12)
    assert np.abs(expected).max() > 1e-4
    if net.layer.bias is not None:
        assert gathered["layer.bias"].inputs is None
        assert torch.equal(gathered["layer.bias"].outputs, block.outputs)
    diagonal = squared_gradients(net, x, y, labels)
    for name in ("norm.weight", "norm.bias"):
        torch.testing.assert_close(gathered[name].values, diagonal[name])


@pytest.mark.parametrize("labels", KINDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_diagonal_fisher(kind, labels):
    net, x, y = example(kind)
    gathered = mkl.diagonal_fisher(net, [(x, y)], labels=labels)
    expected = squared_gradients(net, x, y, labels)
    assert list(gathered) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(gathered[name].values, values, rtol=1e-9, atol=1e-14)
        assert values.abs().max() > 1e-6


def test_by_hand():
    """One layer is the whole model, with logits (x, 0), so p = 1/2, 1/2 and 3/4, 1/4 for x = 0 and log 3."""
    net = nn.Linear(1, 2).double()
    net.weight.data, net.bias.data = torch.tensor([[1.0], [0.0]]).double(), torch.zeros(2).double()
    square = math.log(3) ** 2
    x, y = torch.tensor([[0.0], [math.log(3)]]).double(), torch.tensor([0, 0])
    # The gradient by the logits is p - (1, 0): (-1/2, 1/2) and (-1/4, 1/4), and the opposite with label 1: (3/4, -3/4).
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()
    given, expected = ((1 / 4 + 1 / 16) / 2, (1 / 4 + 3 / 4 * 1 / 16 + 1 / 4 * 9 / 16) / 2)
    assert mkl.input_grams(net, [x])["weight"].inputs.item() == pytest.approx(square / 2)
    for labels, b in (("given", given), ("expected", expected)):
        gathered = mkl.kfac(net, [(x, y)], labels=labels)
        torch.testing.assert_close(gathered["weight"].outputs[0], b * signs)
        torch.testing.assert_close(gathered["bias"].outputs[0], b * signs)
        assert gathered["weight"].inputs.item() == pytest.approx(square / 2)
    fisher = mkl.diagonal_fisher(net, [(x, y)])
    assert fisher["weight"].values.flatten().tolist() == pytest.approx([square / 32] * 2)
    assert fisher["bias"].values.tolist() == pytest.approx([given] * 2)


# ---------------------------------------------------------------- where K-FAC is the Fisher information itself


@pytest.mark.parametrize("labels", KINDS)
@pytest.mark.parametrize("kind", ["linear", "convolution", "groups"])
def test_kfac_is_the_fisher_information_of_one_image_and_one_place(kind, labels):
    torch.manual_seed(0)
    groups = 2 if kind == "groups" else 1
    net = Net(nn.Linear(4, 4) if kind == "linear" else nn.Conv2d(4, 4, 2, groups=groups)).double()
    net.layer.bias.data += 2  # no output is cut off at zero
    x, y = random(*((1, 4) if kind == "linear" else (1, 4, 2, 2))), torch.tensor([2])
    gathered = mkl.kfac(net, [(x, y)], labels=labels)
    for name in ("layer.weight", "layer.bias"):
        fisher = 0.0
        for c, p in weighted_labels(net(x).detach(), y, labels):
            g = gradients(net, x[0], c)[name].flatten()
            fisher = fisher + p * torch.outer(g, g)
        whole = written_out(gathered[name], net.get_parameter(name).shape)
        # Weights of different groups are taken as independent.
        width = len(fisher) // groups
        kept = torch.block_diag(*[torch.ones(width, width)] * groups).double()
        torch.testing.assert_close(whole, fisher * kept, rtol=1e-9, atol=1e-12)
        assert fisher.abs().max() > 1e-3


def test_the_diagonal_of_kfac_is_the_fisher_information_where_inputs_are_all_alike():
    net, _, y = example("linear")
    x = random(1, 5).expand(6, 5)
    both, diagonal = mkl.kfac(net, [(x, y)]), mkl.diagonal_fisher(net, [(x, y)])
    weight = net.layer.weight
    torch.testing.assert_close(both["layer.weight"].diagonal(weight), diagonal["layer.weight"].values)


# ---------------------------------------------------------------- labels drawn from the model


def test_sampled_labels_are_some_labels():
    """Of one image the sampled curvature is that of one of the classes."""
    net, x, _ = example("linear")
    for gather in (mkl.kfac, mkl.diagonal_fisher):
        drawn = gather(net, [x[:1]], labels="sampled", generator=torch.Generator().manual_seed(0))["layer.weight"]
        factor = "outputs" if gather is mkl.kfac else "diagonal"
        possible = [gather(net, [(x[:1], torch.tensor([c]))])["layer.weight"].factors()[factor] for c in range(CLASSES)]
        assert sum(torch.allclose(drawn.factors()[factor], m) for m in possible) == 1


@pytest.mark.parametrize("gather", [mkl.kfac, mkl.diagonal_fisher])
def test_sampled_labels_average_to_the_expectation(gather):
    net, x, _ = example("linear")
    many = x[:2].repeat(2000, 1)
    drawn = gather(net, many.split(500), labels="sampled", generator=torch.Generator().manual_seed(0))
    expected = gather(net, [x[:2]], labels="expected")
    given = gather(net, [(x[:2], torch.tensor([0, 1]))])
    for name, block in expected.items():
        for part, m in block.factors().items():
            # Of 2,000 draws per image, each no larger than a few times the mean: a standard error of about 2 %.
            assert (drawn[name].factors()[part] - m).norm() < 0.08 * m.norm(), name
        if name != "top.weight" or gather is mkl.diagonal_fisher:
            last = list(block.factors())[-1]
            assert (given[name].factors()[last] - block.factors()[last]).norm() > 0.1 * block.factors()[last].norm()


@pytest.mark.parametrize("gather", [mkl.kfac, mkl.diagonal_fisher])
def test_sampled_labels_are_reproducible(gather):
    net, x, _ = example("linear")
    first, again, other = (
        gather(net, [x], labels="sampled", generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 2)
    )
    assert_same(first, again, rtol=0)
    assert any(not torch.equal(first[n].factors()[p], m) for n, b in other.items() for p, m in b.factors().items())


def test_the_empirical_fisher_vanishes_where_labels_are_certain_and_the_expected_one_does_not():
    net, x, _ = example("linear")
    y = net(x).argmax(1)
    given, expected = (mkl.diagonal_fisher(net, [(x, y)], labels=labels)["top.bias"].values for labels in KINDS)
    wrong = mkl.diagonal_fisher(net, [(x, (y + 1) % CLASSES)])["top.bias"].values
    assert given.sum() < expected.sum() < wrong.sum()


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("kind", ["linear at places", "groups", "timm's same"])
def test_how_images_are_batched_does_not_matter(kind, monkeypatch):
    net, x, y = example(kind)
    for sizes in ([1] * len(x), [1, len(x) - 1]):
        batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
        for labels in KINDS:
            for gather in (mkl.kfac, mkl.diagonal_fisher):
                assert_same(gather(net, batches, labels=labels), gather(net, [(x, y)], labels=labels))
        assert_same(mkl.input_grams(net, batches), mkl.input_grams(net, [x]))
    whole = mkl.kfac(net, [(x, y)])
    monkeypatch.setattr(module, "GRAM_PIECE", 7)
    monkeypatch.setattr(module, "PER_IMAGE", 3)
    assert_same(mkl.kfac(net, [(x, y)]), whole)


def test_batches_are_read_once_and_may_be_lists_or_a_generator():
    net, x, y = example("linear")
    for gather in (mkl.kfac, mkl.diagonal_fisher, mkl.input_grams):
        stream = ([part, label] for part, label in zip(x.split(2), y.split(2), strict=True))
        assert_same(gather(net, stream), gather(net, [(x, y)]))
    assert_same(mkl.kfac(net, iter([x]), labels="expected"), mkl.kfac(net, [(x, y)], labels="expected"))


def test_an_image_that_comes_twice_counts_twice():
    net, x, y = example("stride")
    twice = [(x, y), (x, y)]
    for gather in (mkl.kfac, mkl.diagonal_fisher, mkl.input_grams):
        assert_same(gather(net, twice), gather(net, [(x, y)]))
    weighted = mkl.diagonal_fisher(net, [(x[[0, 0, 1]], y[[0, 0, 1]])])["top.bias"].values
    alone = [mkl.diagonal_fisher(net, [(x[[k]], y[[k]])])["top.bias"].values for k in (0, 1)]
    torch.testing.assert_close(weighted, (2 * alone[0] + alone[1]) / 3)


# ---------------------------------------------------------------- the model is run as it is, and is not changed


class Busy(nn.Module):
    """Normalisation with statistics, dropout, a layer that is called twice and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.twice = nn.Linear(4, 4)
        self.idle = nn.Linear(2, 2)
        self.top = nn.Linear(4, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        z = F.relu(self.norm(self.conv(x)), inplace=True).mean((2, 3))
        return self.twice(torch.tanh(self.twice(self.drop(z))))

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.features(x))


@pytest.fixture
def busy():
    torch.manual_seed(0)
    net = Busy().double()
    net.norm.running_mean.copy_(random(4))
    net.norm.running_var.copy_(random(4).square() + 0.5)
    return net, random(5, 2, 5, 5), torch.arange(5) % CLASSES


def gather_all(net, x, y, **options):
    return {
        "inputs": mkl.input_grams(net, [x]),
        "fisher": mkl.diagonal_fisher(net, [(x, y)], **options),
        "kfac": mkl.kfac(net, [(x, y)], **options),
    }


def test_a_model_in_training_is_measured_in_inference_mode_and_left_as_it_was(busy):
    net, x, y = busy
    expected = gather_all(net.eval(), x, y)
    net.train()
    net.norm.eval()  # as a frozen normalisation layer is
    modes = [module.training for module in net.modules()]
    calls = []
    mine = net.conv.register_forward_hook(lambda *_: calls.append(1))
    state = copy.deepcopy(net.state_dict())
    for name, gathered in gather_all(net, x, y).items():
        assert_same(gathered, expected[name])
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert [list(module._forward_hooks) for module in net.modules() if module._forward_hooks] == [[mine.id]]
    assert len(calls) == 1 + 2 + 3, "one call to read inputs; K-FAC's, which reads its diagonals in two; Fisher's two"


def test_the_model_is_left_as_it_was_when_something_fails(busy):
    net, x, _ = busy
    net.train()
    for gather in (mkl.kfac, mkl.diagonal_fisher):
        with pytest.raises(ValueError, match="given labels need"):
            gather(net, [x])
    with pytest.raises(RuntimeError):
        mkl.input_grams(net, [torch.zeros(1, 7, 5, 5).double()])
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())


def test_weights_that_ask_for_no_gradients_have_curvature(busy):
    net, x, y = busy
    expected = gather_all(net, x, y)
    with torch.no_grad():
        for name, gathered in gather_all(net.requires_grad_(False), x, y).items():
            assert_same(gathered, expected[name])
    assert not any(p.requires_grad for p in net.parameters())


def test_a_layer_that_is_called_twice(busy):
    net, x, y = busy
    net.eval()
    gathered = mkl.kfac(net, [(x, y)])["twice.weight"]
    first = F.relu(net.norm(net.conv(x))).mean((2, 3)).detach()
    middle = net.twice(first).detach()
    inputs = torch.cat([first, middle.tanh()])
    torch.testing.assert_close(gathered.inputs[0], inputs.T @ inputs / 10)
    torch.testing.assert_close(mkl.input_grams(net, [x])["twice.weight"].inputs, gathered.inputs)
    z = middle.requires_grad_()
    end = net.twice(z.tanh())
    losses = F.cross_entropy(net.top(end), y, reduction="sum")
    g = torch.cat(torch.autograd.grad(losses, [z, end]))
    torch.testing.assert_close(gathered.outputs[0], g.T @ g / 5)  # sums over places, means over images


def test_a_layer_that_is_not_called(busy):
    net, x, y = busy
    gathered = gather_all(net, x, y)
    assert not any(name.startswith("idle") for name in gathered["inputs"])
    for kind in ("fisher", "kfac"):
        assert gathered[kind]["idle.weight"].values.tolist() == [[0.0, 0.0], [0.0, 0.0]]
        assert set(gathered[kind]) == {name for name, _ in net.named_parameters()}


def test_a_layer_that_does_not_reach_the_logits():
    class Aside(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.layer(x).detach())

    net = Aside(nn.Linear(5, 4)).double()
    gathered = mkl.kfac(net, [(random(6, 5), torch.arange(6) % CLASSES)])
    assert gathered["layer.weight"].outputs.count_nonzero() == 0
    assert gathered["layer.weight"].inputs.count_nonzero() == 25
    assert gathered["top.weight"].outputs.count_nonzero() == CLASSES**2


def test_attention_uses_weights_without_calling_their_modules():
    """Warnings are errors here, and torch warns where it does not know how to take gradients image by image."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.top = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.attention(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    net = Attending().double()
    x, y = random(3, 4, 4), torch.arange(3)
    assert set(mkl.input_grams(net, [x])) == {"top.weight"}
    gathered = mkl.kfac(net, [(x, y)])
    assert isinstance(gathered["attention.out_proj.weight"], mkl.Diagonal)
    by_loops = squared_gradients(net, x, y, "given")["attention.out_proj.weight"]
    torch.testing.assert_close(gathered["attention.out_proj.weight"].values, by_loops)


def test_a_weight_with_two_names():
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4))
            self.again = nn.Linear(4, 4)
            self.again.weight = self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.again(self.layer(x).tanh()))

    torch.manual_seed(0)
    net = Tied().double()
    x, y = random(6, 4), torch.arange(6) % CLASSES
    ours, loops = mkl.diagonal_fisher(net, [(x, y)]), squared_gradients(net, x, y, "given")
    assert list(ours) == list(loops)
    torch.testing.assert_close(ours["layer.weight"].values, loops["layer.weight"])
    assert {"layer.weight", "again.weight"} < set(mkl.kfac(net, [(x, y)]))


def test_float32_is_summed_in_float64():
    net, x, y = example("padding")
    exact, coarse = gather_all(net, x, y), gather_all(copy.deepcopy(net).float(), x.float(), y)
    for kind, gathered in coarse.items():
        assert all(m.dtype == torch.float64 for block in gathered.values() for m in block.factors().values())
        assert_same(gathered, exact[kind], rtol=1e-4)
    # 2¹² and then ones, which float32 would lose beside its square
    x = torch.cat([torch.tensor([[4096.0]]), torch.ones(64, 1)])
    total = mkl.input_grams(nn.Linear(1, 1), x.split(1))["weight"].inputs.item() * 65
    assert total == pytest.approx(2**24 + 64, rel=1e-12)


# ---------------------------------------------------------------- heads and names


def test_a_head_makes_logits_of_features(busy):
    net, x, y = busy
    backbone = copy.deepcopy(net)
    backbone.forward = backbone.features
    for labels in KINDS:
        for gather in (mkl.kfac, mkl.diagonal_fisher):
            ours, whole = gather(backbone, [(x, y)], head=net.top, labels=labels), gather(net, [(x, y)], labels=labels)
            for name in ("conv.weight", "norm.bias", "twice.weight"):
                assert_same({name: ours[name]}, {name: whole[name]})
    assert all(p.grad is None for p in net.top.parameters())


def test_only_what_is_asked_for(busy):
    net, x, y = busy
    every = mkl.diagonal_fisher(net, [(x, y)])
    some = mkl.diagonal_fisher(net, [(x, y)], names=["top.bias", "conv.weight"])
    assert_same(some, {name: every[name] for name in ("top.bias", "conv.weight")})
    grams = mkl.input_grams(net, [x], names=["top.weight", "norm.weight"])
    assert_same(grams, {"top.weight": mkl.input_grams(net, [x])["top.weight"]})
    assert len(mkl.input_grams(net, [x], names=["norm.weight"])) == 0
    with pytest.raises(ValueError, match=r"inputs of 'idle\.weight': its layer was not called"):
        mkl.input_grams(net, [x], names=["top.weight", "idle.weight"])
    with pytest.raises(KeyError, match=r"no tensor 'conv\.wait'"):
        mkl.input_grams(net, [x], names=["conv.wait"])
    with pytest.raises(KeyError, match=r"conv\.wait"):
        mkl.diagonal_fisher(net, [(x, y)], names=["conv.wait"])


# ---------------------------------------------------------------- what cannot be measured


@pytest.mark.parametrize("gather", [mkl.kfac, mkl.diagonal_fisher])
def test_labels_that_are_missing_or_wrong_are_named(gather):
    net, x, y = example("linear")
    for batch in (x, (x,), [x]):
        with pytest.raises(ValueError, match=r"given labels need batches of \(inputs, labels\); or use labels='exp"):
            gather(net, [batch])
    with pytest.raises(ValueError, match="labels must be one of given, sampled, expected; got 'true'"):
        gather(net, [(x, y)], labels="true")


@pytest.mark.parametrize("gather", [mkl.kfac, mkl.diagonal_fisher, mkl.input_grams])
def test_there_must_be_batches(gather):
    with pytest.raises(ValueError, match="no batches"):
        gather(example("linear")[0], [])


@pytest.mark.parametrize("gather", [mkl.kfac, mkl.diagonal_fisher])
def test_outputs_must_be_logits(gather):
    net, x, y = example("linear at places")
    with pytest.raises(ValueError, match=r"expected logits of shape \(images, classes\), got \(4, 3, 4\); pass a head"):
        gather(net.layer, [(x, y)])
    with pytest.raises(ValueError, match="got list"):
        gather(net, [(x, y)], head=lambda logits: [logits])
    with pytest.raises(ValueError, match=r"got \(1, 3\)"):
        gather(net, [(x, y)], head=lambda logits: logits.sum(0, keepdim=True))


def test_numbers_that_are_none_are_said():
    net, x, y = example("linear")
    net.layer.weight.data[0, 0] = math.nan
    for gather in (mkl.kfac, mkl.diagonal_fisher):
        with pytest.raises(ValueError, match=r"the curvature of '[\w.]+' has NaN or infinite entries"):
            gather(net, [(x, y)])
    with pytest.raises(ValueError, match=r"'top\.weight' has NaN"):
        mkl.input_grams(net, [x])


def test_models_without_a_layer():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    x, y = random(4, 3), torch.arange(4) % 3
    with pytest.raises(ValueError, match="no linear or convolutional layer of this model was called"):
        mkl.input_grams(Scale(), [x])
    gathered = mkl.kfac(Scale(), [(x, y)])
    assert_same(gathered, mkl.diagonal_fisher(Scale(), [(x, y)]))
    assert_same(mkl.kfac(Scale().requires_grad_(False), [(x, y)]), gathered)


def test_progress_is_shown_on_request(capsys):
    net, x, y = example("linear")
    for gather in (mkl.kfac, mkl.diagonal_fisher, mkl.input_grams):
        gather(net, [(x, y)])
    assert capsys.readouterr().err == ""
