"""Methods that need inputs, against fusion-bench; and K-FAC against curvlinops.

RegMean, RegMean++ and Fisher merging are compared in float64: both packages then agree to far less than 1e-6 wherever
they compute the same. What fusion-bench calls Fisher information is something else. The matrices of curvlinops are the
same as ours, without a factor between them, for all layers but grouped convolutions and paddings other than zeros.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from curvlinops import KFACLinearOperator
from fusion_bench.method.fisher_merging import fisher_merging as their_fisher
from fusion_bench.method.regmean import regmean as their_regmean
from fusion_bench.method.regmean_plusplus import RegMeanAlgorithmForCLIPPlusPlus, RegMeanAlgorithmPlusPlus
from fusion_bench.modelpool import BaseModelPool
from torch import nn

import mergekit_lite as mkl
from mergekit_lite.calibrated import Curvature, Diagonal, Kronecker
from tests.parity.checkpoints import assert_same, difference

LINEAR = ("tall", "wide", "square")  # of the random checkpoints' layers
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # for matrices that both packages compute in float64


class Trainer:
    """As much of a trainer of transformers as fusion-bench's functions use: it hands out batches."""

    def __init__(self, batches):
        self.batches, self._train_batch_size = batches, len(batches[0])

    def get_train_dataloader(self):
        return [{"x": batch} for batch in self.batches]

    @staticmethod
    def _prepare_inputs(inputs):
        return inputs


def together(states):
    """By name the tensors of all models: what fusion-bench's functions merge."""
    return {name: [state[name] for state in states] for name in states[0]}


# ---------------------------------------------------------------- RegMean


def random_grams(models, vectors=60):
    """For every expert and linear layer the mean a aᵀ over random a, whose entries vary together."""
    generator = torch.Generator().manual_seed(0)

    def gram(width):
        mixing = torch.randn(width, width, generator=generator, dtype=torch.double)
        a = torch.randn(vectors, width, generator=generator, dtype=torch.double) @ mixing
        return a.T @ a / vectors

    return [{name: gram(models.base[f"{name}.weight"].shape[1]) for name in LINEAR} for _ in models.experts]


def as_curvatures(grams):
    return [Curvature({f"{name}.weight": Kronecker(gram[None]) for name, gram in g.items()}) for g in grams]


@pytest.mark.parametrize("alpha", [1.0, 0.95, 0.1, 0.0])
def test_regmean(models, alpha):
    """Both average biases, norms and what has no Gram matrix; alpha is `reduce_non_diagonal_ratio` there."""
    double, grams = models.double(), random_grams(models)
    theirs = their_regmean.merging_with_regmean_weights(together(double.experts), grams, alpha)
    for same in (double, models):
        assert_same(mkl.regmean(same.tv, as_curvatures(grams), alpha=alpha), theirs, same.base)
    assert difference(mkl.average(double.tv), theirs, double.base) > 0.1


def test_regmean_from_inputs_to_the_merge():
    """They divide Gram matrices by the number of tokens, as we do: batches of different sizes make no difference."""
    networks = [tokens_network(seed) for seed in range(4)]
    inputs = [[tokens(seed, n) for n in (9, 4)] for seed in (1, 2, 3)]
    theirs = their_regmean.regmean_merging(networks[1:], [Trainer(batches) for batches in inputs], [], [13] * 3, 0.95)
    base, *experts = (network.state_dict() for network in networks)
    grams = [mkl.input_grams(network, batches) for network, batches in zip(networks[1:], inputs, strict=True)]
    tv = mkl.TaskVectors(base, experts)
    assert_same(mkl.regmean(tv, grams, alpha=0.95), theirs, base)
    assert difference(mkl.average(tv), theirs, base) > 0.1


def test_regmean_where_an_input_never_occurs(models):
    """Their sum of Gram matrices then has no inverse; we keep the average in that input's column."""
    double, grams = models.double(), random_grams(models)
    for gram in grams:
        gram["tall"][3], gram["tall"][:, 3] = 0, 0
    with pytest.raises(RuntimeError, match="singular"):
        their_regmean.merging_with_regmean_weights(together(double.experts), grams)
    ours, average = mkl.regmean(double.tv, as_curvatures(grams))["tall.weight"], mkl.average(double.tv)["tall.weight"]
    same = (ours - average).norm(dim=0) < 1e-9
    assert same.nonzero().flatten().tolist() == [3]


# ---------------------------------------------------------------- RegMean++

WIDTH, TOKENS, DEPTH = 8, 5, 3
BLOCKS = ["embed", *(f"layers.{number}" for number in range(DEPTH)), "norm"]


class Block(nn.Module):
    """A block of a transformer: attention with one head, then two layers, each upon a normalisation."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        a = self.norm1(x)
        x = x + self.out(F.scaled_dot_product_attention(self.query(a), self.key(a), self.value(a)))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """From tokens to the mean of their features; beneath the blocks no layer is linear."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential()
        self.embed.table, self.embed.norm = nn.Embedding(20, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean(1)


def tokens_network(seed):
    network = Transformer().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            spread = 0.3 if name.endswith("bias") or "norm" in name else 0.5
            p.copy_(("norm" in name) * 1.0 + spread * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return network


def tokens(seed, texts):
    return torch.randint(20, (texts, TOKENS), generator=torch.Generator().manual_seed(seed))


class RegMeanPlusPlus(RegMeanAlgorithmPlusPlus):
    """fusion-bench's algorithm for the transformer above; its Gram matrices are gathered by its own class for CLIP."""

    fabric = SimpleNamespace(setup=lambda module: module)
    get_regmean_weights = RegMeanAlgorithmForCLIPPlusPlus.get_regmean_weights

    def merge_embedding_layer(self, models_to_merge_dict):
        states = [model.state_dict() for model in models_to_merge_dict.values()]
        return {n: torch.stack(t).mean(0) for n, t in together(states).items() if n.startswith("embed.")}

    def get_input_for_first_layer(self, model, train_dataset):
        return [model.embed(batch) for batch in train_dataset]

    def get_layers(self, model):
        return model.layers

    def update_merged_params_dict(self, merged_params_dict, new_merged_params, layer_idx):
        return merged_params_dict | {f"layers.{layer_idx}.{name}": t for name, t in new_merged_params.items()}

    def layer_batches_forward(self, layer, batches_input):
        return [layer(batch) for batch in batches_input]


@pytest.fixture(params=[1.0, 0.95], ids=lambda alpha: f"alpha={alpha}")
def merged(request):
    """Three networks, their texts, and their merge by fusion-bench; base weights and merge without the last norm."""
    networks = [tokens_network(seed) for seed in range(4)]
    base, *experts = (dict(copy.deepcopy(network).state_dict()) for network in networks)  # they change their modules
    texts = {f"task{k}": [tokens(10 * k, 12), tokens(10 * k + 1, 7)] for k in range(3)}
    pool = BaseModelPool(dict(zip(["_pretrained_", *texts], networks, strict=True)))
    pool.load_train_dataset = texts.get
    algorithm = RegMeanPlusPlus(
        num_regmean_examples=19,
        exclude_param_names_regex=[],
        reduce_non_diagonal_ratio=request.param,
        weight_transpose=True,
    )
    with torch.no_grad():
        theirs = algorithm.run(pool).state_dict()
    return SimpleNamespace(
        alpha=request.param,
        tv=mkl.TaskVectors(base, dict(zip(texts, experts, strict=True))),
        texts=texts,
        theirs=theirs,
        base=base,
    )


def part(state, *prefixes):
    """The tensors whose names begin with one of these prefixes."""
    return {name: t for name, t in state.items() if name.startswith(prefixes)}


def test_regmean_plus_plus(merged):
    """Embeddings averaged, then block by block. The last normalisation stays at the base there; we average it."""
    m = merged
    ours = mkl.regmean_plus_plus(m.tv, Transformer().double(), m.texts, alpha=m.alpha, depth=BLOCKS)
    average = mkl.average(m.tv)
    shared = [part(state, *BLOCKS[:-1]) for state in (ours, m.theirs, m.base)]
    assert_same(*shared)
    assert difference(part(average, *BLOCKS[:-1]), *shared[1:]) > 0.1
    for name in part(ours, "norm."):
        assert torch.equal(m.theirs[name], m.base[name])
        assert torch.equal(ours[name], average[name])


def test_regmean_plus_plus_where_embeddings_belong_to_the_first_block(merged):
    """So they do by default here, if `depth` does not say otherwise: then the first block reads the experts' own ones.

    It is what RegMean makes of it; fusion-bench lets it read the averaged embeddings.
    """
    m, grams = merged, []
    ours = mkl.regmean_plus_plus(m.tv, Transformer().double(), m.texts, alpha=m.alpha)
    for task in m.tv.names:
        expert = Transformer().double()
        expert.load_state_dict(m.tv[task].map(lambda _, taus: taus[0]))
        grams.append(mkl.input_grams(expert, m.texts[task]))
    regmean = mkl.regmean(m.tv, grams, alpha=m.alpha)
    first, base = part(ours, "layers.0."), part(m.base, "layers.0.")
    assert_same(first, part(regmean, "layers.0."), base)
    assert difference(first, part(m.theirs, "layers.0."), base) > 0.01
    last, base = part(ours, "layers.2."), part(m.base, "layers.2.")
    assert difference(last, part(regmean, "layers.2."), base) > 0.01


# ---------------------------------------------------------------- Fisher merging


def random_fishers(models):
    """A positive number per weight, larger for some experts than for others, and of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    return [
        {n: (k + 1) * 1e-4 * torch.randn(t.shape, generator=generator).double() ** 4 for n, t in models.base.items()}
        for k in range(len(models.experts))
    ]


def diagonals(fishers, plus=0.0):
    return [Curvature({name: Diagonal(values + plus) for name, values in f.items()}) for f in fishers]


@pytest.mark.parametrize("floor", [1e-6, 1e-3])
def test_fisher(models, floor):
    """Their `minimal_fisher_weight` is added, as our floor is; coefficients are weights of the tasks."""
    double, fishers = models.double(), random_fishers(models)
    weights = [1.0 + k for k in range(len(fishers))]
    arguments = together(double.experts), fishers
    equal = their_fisher.merging_with_fisher_weights(*arguments, torch.ones(len(fishers)), False, floor)
    assert_same(mkl.fisher(double.tv, diagonals(fishers), floor=floor), equal, double.base)
    theirs = their_fisher.merging_with_fisher_weights(*arguments, torch.tensor(weights), False, floor)
    weighted = [w * curvature for w, curvature in zip(weights, diagonals(fishers, floor), strict=True)]
    assert_same(mkl.fisher(double.tv, weighted), theirs, double.base)
    assert difference(equal, theirs, double.base) > 0.01


@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_fisher_divided_by_its_length(models, floor):
    """By default each expert's is divided by its length over all tensors: here, multiply the curvature.

    The floor is added before the division, in the Fisher's own unit, and to the length as well.
    """
    double, fishers = models.double(), random_fishers(models)
    theirs = their_fisher.merging_with_fisher_weights(
        together(double.experts), fishers, torch.ones(len(fishers)), True, floor
    )
    lengths = [torch.cat([values.flatten() for values in f.values()]).norm() for f in fishers]
    curvatures = diagonals(fishers, floor)
    scaled = [(1 / float(n + floor)) * curvature for n, curvature in zip(lengths, curvatures, strict=True)]
    assert_same(mkl.fisher(double.tv, scaled), theirs, double.base)
    assert difference(mkl.fisher(double.tv, curvatures), theirs, double.base) > 0.01


class TwoClasses(nn.Module):
    """Logits (w x, 0) with w = ln 4: for x = 1 the classes' probabilities are 0.8 and 0.2."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 2, bias=False)
        self.layer.weight = nn.Parameter(torch.tensor([[4.0], [1.0]]).log())

    def forward(self, x):
        return SimpleNamespace(logits=self.layer(x))


def their_fisher_of(model, batches, monkeypatch):
    """What fusion-bench's `fisher_merging` computes before it merges."""
    monkeypatch.setattr(their_fisher, "merging_with_fisher_weights", dict)
    images = sum(map(len, batches))
    found = their_fisher.fisher_merging([model], [Trainer(batches)], [], [images])
    return found["models_to_merge_fisher_weights_list"][0]["layer.weight"].flatten().tolist()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_fusion_bench_calls_fisher_information(size, monkeypatch):
    r"""It squares the gradient of a batch, summed over images and classes, and divides by the number of images.

    For a class with probability p beside another with q = 1 - p, the Fisher information of its row is p q x^2: with
    x = 1 here 0.16, from batches of any size. Theirs is (sqrt(p) q - sqrt(q) p)^2 = 0.032 for batches of one image, as
    the classes' gradients have opposite signs, and for n equal images n times as large.
    """
    model, batches = TwoClasses(), list(torch.ones(4, 1).split(size))
    theirs = their_fisher_of(model, batches, monkeypatch)
    ours = mkl.diagonal_fisher(model, batches, head=lambda out: out.logits, labels="expected")
    assert theirs == pytest.approx([0.032 * size] * 2)
    assert ours["layer.weight"].values.flatten().tolist() == pytest.approx([0.16, 0.16])


def test_fisher_information_of_undecided_networks(monkeypatch):
    """Where all classes are equally probable the Fisher information is large; theirs is zero."""
    model, batches = TwoClasses(), [torch.ones(2, 1)]
    model.layer.weight.data.zero_()
    ours = mkl.diagonal_fisher(model, batches, head=lambda out: out.logits, labels="expected")
    assert ours["layer.weight"].values.flatten().tolist() == pytest.approx([0.25, 0.25])
    assert their_fisher_of(model, batches, monkeypatch) == pytest.approx([0.0, 0.0], abs=1e-12)


# ---------------------------------------------------------------- K-FAC


class OverTokens(nn.Module):
    """Linear layers at every token (a layer that is used at several places), then the mean over tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.second(self.first(x).tanh()).mean(1)


def convolutions():
    """Convolutions with stride, padding and dilation, and linear layers."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, dilation=(1, 2), padding="same", bias=False),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def case(make, *shape, sizes=(5, 3)):
    """A network in float64 and batches of normally distributed inputs with labels of three classes."""
    generator = torch.Generator().manual_seed(0)
    network = make().double()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
    inputs = [torch.randn(n, *shape, generator=generator, dtype=torch.double) for n in sizes]
    return network, [(x, torch.randint(3, (len(x),), generator=generator)) for x in inputs]


CASES = {"linear": (OverTokens, 7, 4), "convolutions": (convolutions, 2, 8, 8)}


def by_curvlinops(network, batches, fisher_type, reduction="mean"):
    """Its operator, and its factors A and B by the names of the layers."""
    operator = KFACLinearOperator(
        network,
        nn.CrossEntropyLoss(reduction=reduction),
        list(network.parameters()),
        batches,
        fisher_type=fisher_type,
        kfac_approx="expand",
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    state = operator.state_dict()
    return operator, state["input_covariances"], state["gradient_covariances"]


@pytest.mark.parametrize(("fisher_type", "labels"), [("empirical", "given"), ("type-2", "expected")])
@pytest.mark.parametrize("name", CASES)
def test_kfac(name, fisher_type, labels):
    """The same factors, and the same product with both, for weights and biases.

    "expand": each place of an image counts as an input of its own. A is the mean over images and places, B the mean
    over images and the sum over places, of the loss of each image. If its loss is the batches' sum, their B is the sum
    over images.
    """
    network, batches = case(*CASES[name])
    ours = mkl.kfac(network, batches, labels=labels)
    operator, inputs, outputs = by_curvlinops(network, batches, fisher_type)
    _, _, sums = by_curvlinops(network, batches, fisher_type, reduction="sum")
    for layer, a in inputs.items():
        block = ours[f"{layer}.weight"]
        torch.testing.assert_close(block.inputs[0], a, **EXACT)
        torch.testing.assert_close(block.outputs[0], outputs[layer], **EXACT)
        torch.testing.assert_close(block.outputs[0] * 8, sums[layer], **EXACT)

    generator = torch.Generator().manual_seed(1)
    names = [n for n, _ in network.named_parameters()]
    v = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in network.parameters()]
    assert set(ours) == set(names)
    for n, mine, theirs in zip(names, v, operator @ v, strict=True):
        torch.testing.assert_close(ours[n](mine), theirs, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_forward_only(name):
    """Their curvature without gradients has A of the inputs and the identity: it is what RegMean uses."""
    network, batches = case(*CASES[name])
    ours = mkl.input_grams(network, batches)
    _, inputs, outputs = by_curvlinops(network, batches, "forward-only")
    assert {f"{layer}.weight" for layer in inputs} == set(ours)
    for layer, a in inputs.items():
        torch.testing.assert_close(ours[f"{layer}.weight"].inputs[0], a, **EXACT)
        assert ours[f"{layer}.weight"].outputs is None
        assert torch.equal(outputs[layer], torch.eye(len(outputs[layer]), dtype=torch.double))


# What curvlinops does otherwise.


def depthwise():
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Flatten(), nn.Linear(16, 3))


def test_depthwise_convolutions():
    """To us they are layers side by side, one per channel, with an A each.

    curvlinops takes the mean of the channels *before* it multiplies, so that its one A is of an image that no channel
    has seen: independent channels cancel, and A becomes too small. Its B is of all channels, ours the diagonal.
    """
    network, batches = case(depthwise, 4, 4, 4)
    ours = mkl.kfac(network, batches)["0.weight"]
    _, inputs, outputs = by_curvlinops(network, batches, "empirical")
    assert ours.inputs.shape == (4, 9, 9)
    assert ours.outputs.shape == (4, 1, 1)
    torch.testing.assert_close(ours.outputs.flatten(), outputs["0"].diagonal(), **EXACT)
    assert (outputs["0"] - outputs["0"].diagonal().diag()).norm() > 0.1 * outputs["0"].norm()

    one = nn.Conv2d(1, 1, 3).double()
    mean = mkl.input_grams(one, [x.mean(1, keepdim=True) for x, _ in batches])
    torch.testing.assert_close(mean["weight"].inputs[0], inputs["0"], **EXACT)
    assert inputs["0"].trace() < 0.4 * ours.inputs.mean(0).trace()  # a quarter, for independent channels
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(16, 3))
    network, batches = case(lambda: grouped, 4, 4, 4)
    assert mkl.kfac(network, batches)["0.weight"].inputs.shape == (2, 18, 18)
    assert by_curvlinops(network, batches, "empirical")[1]["0"].shape == (18, 18)


def padded(padding, mode="zeros", kernel=3):
    """A network that begins with a convolution of an image with a border."""
    return nn.Sequential(nn.Conv2d(2, 3, kernel, padding=padding, padding_mode=mode), nn.Flatten(), nn.Linear(48, 3))


def test_paddings():
    """Our patches come from the layer itself. curvlinops takes zeros for the border whatever the layer does, ..."""
    (zeros, theirs), (circular, unchanged) = (
        (mkl.input_grams(*made)["0.weight"].inputs[0], by_curvlinops(*made, "forward-only")[1]["0"])
        for made in (case(lambda mode=mode: padded(1, mode), 2, 4, 4) for mode in ("zeros", "circular"))
    )
    torch.testing.assert_close(zeros, theirs, **EXACT)
    torch.testing.assert_close(unchanged, theirs, **EXACT)
    assert (circular - zeros).norm() > 0.1 * zeros.norm()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_uneven_paddings():
    """... and has none that is wider on one side, as "same" is for kernels of even size."""
    network, batches = case(lambda: padded("same", kernel=2), 2, 4, 4)
    assert mkl.input_grams(network, batches)["0.weight"].inputs.shape == (1, 8, 8)
    with pytest.raises(NotImplementedError, match="Unequal padding"):
        by_curvlinops(network, batches, "forward-only")


def test_normalisations():
    """They get a diagonal from us; curvlinops refuses parameters of other layers."""
    network, batches = case(lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)), 4)
    assert isinstance(mkl.kfac(network, batches)["1.weight"], Diagonal)
    with pytest.raises(NotImplementedError, match="un-supported layers"):
        by_curvlinops(network, batches, "empirical")
