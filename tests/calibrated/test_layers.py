"""Layers that can be watched, those that are refused, and those that nobody sees."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import mergekit_lite as mkl
from mergekit_lite.calibrated import layers as module
from mergekit_lite.calibrated.layers import unseen
from mergekit_lite.suites.vision import import_timm
from tests.data_free.test_tsv import random

timm = import_timm()


@pytest.fixture(autouse=True)
def nothing_said_yet():
    module._said.clear()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="mergekit_lite")
    return caplog


class Net(nn.Module):
    """A layer, and a linear layer on the mean of its outputs."""

    def __init__(self, layer: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.layer = layer
        self.top = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return self.top(z.mean((2, 3)) if z.ndim == 4 else z)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1


class Padded(nn.Conv2d):
    """More than nn.Conv2d, but linear in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0, 2, 1)))


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 2)


def hooked(layer):
    layer.register_forward_hook(lambda _, args, output: output * 1.5)
    return layer


conv, line = (2, 4, 3), (5, 4)
REFUSED = {
    "ScaledStdConv2d": lambda: timm.layers.ScaledStdConv2d(*conv),
    "ScaledStdConv2dSame": lambda: timm.layers.ScaledStdConv2dSame(*conv),
    "StdConv2d": lambda: timm.layers.StdConv2d(*conv),
    "Scaled": lambda: Scaled(*line),
    "Shifted": lambda: Shifted(*conv),
    "ParametrizedLinear": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(*line)),
    "ParametrizedConv2d": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(*conv)),
    "Linear": lambda: pruned(nn.Linear(*line)),
    "Conv2d": lambda: hooked(nn.Conv2d(*conv)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_change_their_weight_are_refused_by_name(name, dtype):
    torch.manual_seed(0)
    net = Net(REFUSED[name]()).to(dtype).eval()
    x = torch.randn(6, *((5,) if isinstance(net.layer, nn.Linear) else (2, 6, 6)), dtype=dtype)
    message = rf"the layer 'layer' \({name}\) does not answer with its weight times its inputs"
    with pytest.raises(ValueError, match=message):
        mkl.input_grams(net, [x])
    with pytest.raises(ValueError, match=message):
        mkl.kfac(net, [(x, torch.arange(6) % 3)])
    assert list(mkl.input_grams(net, [x], names=["top.weight"])) == ["top.weight"], "the others can be asked for"
    assert not [module for module in net.modules() for hook in module._forward_hooks.values() if "watched" in str(hook)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("normalise", ["weight_norm", "spectral_norm"])
def test_so_are_the_normalisations_of_old(normalise):
    net = Net(getattr(nn.utils, normalise)(nn.Linear(*line)))
    with pytest.raises(ValueError, match=r"the layer 'layer' \(Linear\) does not answer"):
        mkl.input_grams(net, [torch.randn(6, 5)])


def test_in_a_real_network():
    net = timm.create_model("nf_regnet_b0", num_classes=0).eval()
    with pytest.raises(ValueError, match=r"'stem\.conv' \(ScaledStdConv2d\)"):
        mkl.input_grams(net, [torch.randn(2, 3, 32, 32)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Padded, timm.layers.Conv2dSame, nn.Conv2d])
def test_layers_that_are_linear_in_their_weight_are_watched(kind, dtype):
    torch.manual_seed(0)
    net = Net(kind(2, 4, 3)).to(dtype)
    x = torch.randn(40, 2, 9, 9).to(dtype)
    gram = mkl.input_grams(net, [x])["layer.weight"].inputs[0]
    padded = {Padded: (1, 0, 2, 1), nn.Conv2d: (0, 0, 0, 0)}.get(kind, (1, 1, 1, 1))
    read = F.unfold(F.pad(x.double(), padded if kind is not timm.layers.Conv2dSame else (1, 1, 1, 1)), 3)
    read = read.transpose(1, 2).reshape(-1, 18)
    torch.testing.assert_close(gram, read.T @ read / len(read), rtol=1e-5, atol=1e-6)


def test_inputs_by_keyword_and_single_images():
    class ByKeyword(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.top(input=self.layer(input=x[0]).mean((1, 2))[None])

    torch.manual_seed(0)
    net, x = ByKeyword(nn.Conv2d(2, 4, 3)).double(), random(1, 2, 6, 5)
    read = F.unfold(x, 3)[0]
    torch.testing.assert_close(mkl.input_grams(net, [x])["layer.weight"].inputs[0], read @ read.T / read.shape[1])


# ---------------------------------------------------------------- weights that are used without their layer


class Fused(nn.Module):
    """Query, key and value from one layer, whose bias is put together from others, as in BEiT."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12, bias=False)
        self.q_bias = nn.Parameter(torch.ones(4))
        self.proj = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros(4), self.q_bias]))
        return self.proj(qkv[..., :4] * qkv[..., 4:8] + qkv[..., 8:])


def test_a_weight_that_is_used_without_its_layer_is_named_once(said):
    net, x = Fused(), torch.randn(5, 4)
    for _ in range(2):
        assert list(mkl.input_grams(net, [x])) == ["proj.weight"]
    assert len(said.records) == 1
    assert "the inputs of 'qkv.weight': their layers were not called" in said.text
    assert isinstance(mkl.kfac(net, [(x, torch.arange(5) % 3)])["qkv.weight"], mkl.Diagonal)
    assert "They get a diagonal" in said.text
    with pytest.raises(ValueError, match=r"inputs of 'qkv\.weight': its layer was not called"):
        mkl.input_grams(net, [x], names=["qkv.weight", "proj.weight"])


def test_attention_of_torch_is_named(said):
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.top = nn.Linear(4, 3)
            self.table = nn.Embedding(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.attention(x, x, x, need_weights=False)[0].mean(1))

    mkl.input_grams(Attending(), [torch.randn(2, 3, 4)])
    assert "'attention.in_proj_weight', 'attention.out_proj.weight': their" in said.text
    assert "table" not in said.text


def test_attention_in_real_networks(said):
    net = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2, img_size=32, num_classes=3)
    mkl.input_grams(net.eval(), [torch.randn(2, 3, 32, 32)])
    assert "the inputs of 'blocks.0.attn.qkv.weight': their" in said.text
    module._said.clear()
    said.clear()
    net = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2, img_size=32, num_classes=3)
    assert "blocks.0.attn.qkv.weight" in mkl.input_grams(net.eval(), [torch.randn(2, 3, 32, 32)])
    assert not said.records


def test_regmean_plus_plus_averages_what_nobody_sees(said):
    def net(seed):
        torch.manual_seed(seed)
        return nn.ModuleDict({"blocks": nn.ModuleList([Fused(), Fused()])})

    class Two(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.blocks = net(seed)["blocks"]

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](F.pad(self.blocks[0](x), (0, 1)))

    tv = mkl.TaskVectors(Two(0), {"a": Two(1), "b": Two(2)})
    batches = {task: [torch.randn(9, 4)] for task in "ab"}
    merged = mkl.regmean_plus_plus(tv, Two(0), batches)
    average = mkl.average(tv)
    for i in (0, 1):
        torch.testing.assert_close(merged[f"blocks.{i}.qkv.weight"], average[f"blocks.{i}.qkv.weight"])
        assert not torch.allclose(merged[f"blocks.{i}.proj.weight"], average[f"blocks.{i}.proj.weight"], atol=1e-4)
    assert "'blocks.0.qkv.weight', 'blocks.1.qkv.weight': their" in said.text
    assert "They are averaged." in said.text


def test_a_tied_weight_is_seen_under_either_name():
    net = Net(nn.Linear(4, 4))
    net.again = nn.Linear(4, 4)
    net.again.weight = net.layer.weight
    assert unseen(net, {"again.weight", "top.weight"}) == []
    assert unseen(net, {"top.weight"}) == ["layer.weight"]


@pytest.mark.parametrize("gather", [mkl.input_grams, mkl.kfac])
def test_matrices_that_would_be_huge_are_not_made(gather, monkeypatch, said):
    monkeypatch.setattr(module, "WIDEST", 6)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(4, 5), torch.arange(4) % 3
    blocks = gather(net, [(x, y)])
    kronecker = {name for name, block in blocks.items() if isinstance(block, mkl.Kronecker)}
    assert kronecker == ({"0.weight"} if gather is mkl.input_grams else set())
    assert "'2.weight': their layers were not called" in said.text or "'0.weight', '2.weight': their" in said.text
    with pytest.raises(ValueError, match=r"'2\.weight': its layer was not called .* or is wider than"):
        mkl.input_grams(net, [x], names=["2.weight"])


def test_in_pocket8_everything_is_seen(suite, said):
    batches = [x for x, _ in suite.calibration("mnist", 4)]
    model = suite.build(suite.base)
    grams = mkl.input_grams(model, batches)
    assert unseen(model, grams) == []
    assert not said.records
