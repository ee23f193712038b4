"""RegMean++ against the same thing done by hand: a network written out, a merge block by block."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mergekit_lite as mkl
from tests.data_free.test_tsv import random

# The layers of each block, in the order in which they are called; stem and head go with the first and the last block.
BLOCKS = [
    ["stem", "blocks.0.fc1", "blocks.0.fc2"],
    ["blocks.1.fc1", "blocks.1.fc2"],
    ["blocks.2.fc1", "blocks.2.fc2", "head"],
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        for p in self.parameters():  # far apart, so that it matters what a layer sees
            p.data += 0.5 * torch.randn_like(p)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


@pytest.fixture
def net():
    return Net(0)


@pytest.fixture
def tv(net):
    return mkl.TaskVectors(net, {"a": Net(1), "b": Net(2), "c": Net(3)})


@pytest.fixture
def batches():
    return {name: list((random(12, 3, seed=k) * (k + 1)).split(5)) for k, name in enumerate("abc")}


def seen(state, x):
    """Run the network by hand; what every layer is multiplied with."""
    inputs = {}

    def linear(name, a):
        inputs[name] = a
        return a @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    z = linear("stem", x)
    for k in range(3):
        norm = f"blocks.{k}.norm"
        normed = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5) ** 0.5
        hidden = linear(f"blocks.{k}.fc1", normed * state[f"{norm}.weight"] + state[f"{norm}.bias"]).tanh()
        z = z + linear(f"blocks.{k}.fc2", hidden)
    linear("head", z)
    return inputs


def by_hand(tv, batches, alpha, blocks):
    """Block by block; within a block, tensors are those of the expert."""
    experts = dict(zip(tv.names, tv._experts, strict=True))
    merged = {name: sum(e[name] for e in experts.values()) / len(experts) for name in tv.base}
    for layers in blocks:
        within = [name for name in merged if any(name.startswith(part(layer)) for layer in layers)]
        top, bottom = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
        for task, expert in experts.items():
            inputs = seen({**merged, **{name: expert[name] for name in within}}, torch.cat(batches[task]))
            for layer in layers:
                gram = (inputs[layer].T @ inputs[layer] / len(inputs[layer])).numpy()
                gram = alpha * gram + (1 - alpha) * np.diag(np.diag(gram))
                top[layer], bottom[layer] = top[layer] + expert[f"{layer}.weight"].numpy() @ gram, bottom[layer] + gram
        for layer in layers:
            merged[f"{layer}.weight"] = torch.from_numpy(np.linalg.solve(bottom[layer].T, top[layer].T).T)
    return merged


def part(layer):
    """What belongs to a layer's block: all that stands under blocks.0., or under stem."""
    return ".".join(layer.split(".")[:2]) + "."


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-7, atol=1e-9, msg=name)


# ---------------------------------------------------------------- by hand


def test_the_network_by_hand_is_the_network(net):
    x = random(7, 3)
    inputs = seen(net.state_dict(), x)
    torch.testing.assert_close(net.head(inputs["head"]), net(x))


@pytest.mark.parametrize("alpha", [0.95, 1.0, 0.3, 0.0])
def test_against_explicit_loops(net, tv, batches, alpha):
    assert_same(mkl.regmean_plus_plus(tv, net, batches, alpha=alpha), by_hand(tv, batches, alpha, BLOCKS))


def test_the_default_is_the_authors(net, tv, batches):
    assert_same(mkl.regmean_plus_plus(tv, net, batches), mkl.regmean_plus_plus(tv, net, batches, alpha=0.95))


def test_blocks_can_be_said_by_hand(net, tv, batches):
    prefixes = ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]
    split = [["stem"], ["blocks.0.fc1", "blocks.0.fc2"], BLOCKS[1], ["blocks.2.fc1", "blocks.2.fc2"], ["head"]]
    expected = by_hand(tv, batches, 0.5, split)
    assert_same(mkl.regmean_plus_plus(tv, net, batches, alpha=0.5, depth=prefixes), expected)
    number = {"stem": 0, "blocks": 1, "head": 4}

    def depth(name):
        first, second, *_ = name.split(".")
        return number[first] + (int(second) if first == "blocks" else 0)

    assert_same(mkl.regmean_plus_plus(tv, net, batches, alpha=0.5, depth=depth), expected)
    assert not torch.allclose(expected["head.weight"], by_hand(tv, batches, 0.5, BLOCKS)["head.weight"], rtol=1e-3)


def test_every_layer_a_block_of_its_own(net, tv, batches):
    """Then each layer sees what all merged layers before it make of the images."""
    order = [layer for block in BLOCKS for layer in block]
    names = {name: name.rpartition(".")[0].replace("norm", "fc1") for name in tv.base}
    merged = mkl.regmean_plus_plus(tv, net, batches, alpha=1.0, depth=lambda name: order.index(names[name]))
    for layer in ("blocks.1.fc2", "blocks.2.fc1"):
        top, bottom = 0.0, 0.0
        for task, expert in zip(tv.names, tv._experts, strict=True):
            # What a layer sees depends on itself and what follows by nothing; only its own norm is the expert's.
            own = {name: expert[name] for name in tv.base if names[name] == layer}
            a = seen({**merged, **own}, torch.cat(batches[task]))[layer]
            gram = (a.T @ a / len(a)).numpy()
            top, bottom = top + expert[f"{layer}.weight"].numpy() @ gram, bottom + gram
        expected = torch.from_numpy(np.linalg.solve(bottom.T, top.T).T)
        torch.testing.assert_close(merged[f"{layer}.weight"], expected, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------- beside RegMean


class Plain(nn.Module):
    """Layers alone, and behind them a number that is no layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 4, 2, groups=2, bias=False)
        self.fc = nn.Linear(4, 3, bias=False)
        self.scale = nn.Parameter(torch.randn(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.fc(self.conv(x).tanh().mean((2, 3)))


@pytest.mark.parametrize("alpha", [0.95, 0.2])
def test_with_one_block_it_is_regmean(alpha):
    models = {name: Plain(seed) for seed, name in enumerate("ab")}
    tv = mkl.TaskVectors(Plain(9), models)
    batches = {name: [random(5, 2, 4, 4, seed=k)] for k, name in enumerate(models)}
    grams = {name: mkl.input_grams(model, batches[name]) for name, model in models.items()}
    expected = mkl.regmean(tv, grams, alpha=alpha)
    merged = mkl.regmean_plus_plus(tv, Plain(7), batches, alpha=alpha, depth=lambda name: int(name == "scale"))
    assert_same(merged, expected)
    merged = mkl.regmean_plus_plus(tv, Plain(7), batches, alpha=alpha, depth=["conv", "fc", "scale"])
    torch.testing.assert_close(merged["conv.weight"], expected["conv.weight"])
    assert not torch.allclose(merged["fc.weight"], expected["fc.weight"], rtol=1e-3)


def test_the_first_block_is_regmeans_and_the_others_are_not(net, tv, batches):
    grams = {name: mkl.input_grams(Net(k + 1), batches[name]) for k, name in enumerate(tv.names)}
    ours, regmean = mkl.regmean_plus_plus(tv, net, batches, alpha=1.0), mkl.regmean(tv, grams)
    for layer in (layer for block in BLOCKS for layer in block):
        same = torch.allclose(ours[f"{layer}.weight"], regmean[f"{layer}.weight"], rtol=1e-6)
        assert same == (layer in BLOCKS[0]), layer


def test_what_is_no_weight_of_a_layer_is_averaged(net, tv, batches):
    merged, mean = mkl.regmean_plus_plus(tv, net, batches), mkl.average(tv)
    weights = {f"{layer}.weight" for block in BLOCKS for layer in block}
    assert {name for name in mean if not torch.allclose(merged[name], mean[name])} == weights


# ---------------------------------------------------------------- what it does


def test_copies_of_one_expert_and_one_expert_give_that_expert(net, batches):
    expert = Net(1)
    for names in ("abc", "a"):
        tv = mkl.TaskVectors(net, dict.fromkeys(names, expert))
        merged = mkl.regmean_plus_plus(tv, net, batches)
        assert_same(merged, expert.state_dict())


def test_no_order_matters(net, tv, batches):
    expected = mkl.regmean_plus_plus(tv, net, batches)
    backwards = dict(reversed([*batches.items(), ("another task", [])]))
    assert_same(mkl.regmean_plus_plus(tv, net, backwards), expected)
    assert_same(mkl.regmean_plus_plus(tv.subset(["c", "a", "b"]), net, batches), expected)


def test_batches_may_have_labels_and_are_read_once(net, tv, batches):
    expected = mkl.regmean_plus_plus(tv, net, batches)
    streams = {name: ((x, torch.zeros(len(x))) for x in parts) for name, parts in batches.items()}
    assert_same(mkl.regmean_plus_plus(tv, net, streams), expected)


def test_the_network_gives_its_form_alone_and_is_not_changed(net, tv, batches):
    expected = mkl.regmean_plus_plus(tv, net, batches)
    other = Net(11).train()
    before = copy.deepcopy(other.state_dict())
    assert_same(mkl.regmean_plus_plus(tv, other, batches), expected)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())
    assert other.training
    assert not any(module._forward_hooks for module in other.modules())


def test_inputs_are_not_changed(net, tv, batches):
    sources = [t for state in (tv.base, *tv._experts) for t in state.values()]
    sources += [x for parts in batches.values() for x in parts]
    before = [t.clone() for t in sources]
    for tensor in mkl.regmean_plus_plus(tv, net, batches).values():
        tensor.zero_()
    assert all(torch.equal(old, new) for old, new in zip(before, sources, strict=True))


def test_half_precision_weights_are_kept(net, batches):
    half = [{n: t.half() for n, t in Net(seed).state_dict().items()} for seed in range(4)]
    tv = mkl.TaskVectors(half[0], dict(zip("abc", half[1:], strict=True)))
    merged = mkl.regmean_plus_plus(tv, net, batches)
    exact = [{n: t.double() for n, t in state.items()} for state in half]
    expected = mkl.regmean_plus_plus(mkl.TaskVectors(exact[0], dict(zip("abc", exact[1:], strict=True))), net, batches)
    assert all(t.dtype == torch.float16 for t in merged.values())
    for name, tensor in merged.items():
        # What was merged before is rounded, too, so later layers see slightly other inputs.
        assert (tensor.double() - expected[name]).norm() < 5e-3 * expected[name].norm()


def test_tied_names_stay_tied():
    class Tied(nn.Module):
        """The first block's layer and the last block's share one weight."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
            self.blocks[2][0].weight = self.blocks[0][0].weight
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x)

    models, images = {name: Tied(k) for k, name in enumerate("ab")}, {"a": [random(9, 4)], "b": [random(9, 4, seed=1)]}
    merged = mkl.regmean_plus_plus(mkl.TaskVectors(Tied(5), models), Tied(6), images, alpha=1.0)
    assert torch.equal(merged["blocks.0.0.weight"], merged["blocks.2.0.weight"])
    # It is merged where its first name stands, in the first block, which sees the images themselves.
    grams = [{"blocks.0.0.weight": mkl.Kronecker(inputs=(x.T @ x)[None])} for (x,) in images.values()]
    expected = mkl.regmean(mkl.TaskVectors(Tied(5), models), grams)["blocks.0.0.weight"]
    torch.testing.assert_close(merged["blocks.0.0.weight"], expected)


def test_files_are_merged_as_models_are(net, tv, batches, tmp_path):
    batches = {f"expert {k}": parts for k, parts in enumerate(batches.values())}
    files = ["base", *(f"expert {k}" for k in range(len(tv)))]
    states = [tv.base, *(mkl.average(tv[k]) for k in range(len(tv)))]
    paths = [mkl.save(dict(state), tmp_path / f"{f}.safetensors") for f, state in zip(files, states, strict=True)]
    out = mkl.merge_files(
        mkl.regmean_plus_plus, paths[0], paths[1:], tmp_path / "out.safetensors", model=net, batches=batches
    )
    expected = mkl.regmean_plus_plus(mkl.TaskVectors(net, [Net(1), Net(2), Net(3)]), net, batches)
    merged = mkl.load(out)
    assert_same({name: merged[name] for name in expected}, expected)


# ---------------------------------------------------------------- wrong input


def test_wrong_input_says_why(net, tv, batches):
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
            mkl.regmean_plus_plus(tv, net, batches, alpha=alpha)
    with pytest.raises(KeyError, match="no batches for the expert 'b'; there are some for a, c"):
        mkl.regmean_plus_plus(tv, net, {name: batches[name] for name in "ac"})
    with pytest.raises(ValueError, match="no batches"):
        mkl.regmean_plus_plus(tv, net, {**batches, "b": []})
    with pytest.raises(ValueError, match="none of the prefixes"):
        mkl.regmean_plus_plus(tv, net, batches, depth=["blocks"])
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        mkl.regmean_plus_plus(tv, Plain(0), batches)
    plain = mkl.TaskVectors(Plain(0), {"a": Plain(1)})
    with pytest.raises(ValueError, match="no stack of numbered blocks; say how deep they are with `depth`"):
        mkl.regmean_plus_plus(plain, Plain(0), batches)
