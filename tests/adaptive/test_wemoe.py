"""A mixture whose modules are merged for every input: against merges built one by one, by hand."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

import mergekit_lite as mkl
from mergekit_lite.adaptive import WEMoE, entropy, imitation_loss, wemoe
from mergekit_lite.adaptive.wemoe import Mixture
from tests.adaptive.examples import merged_by_hand
from tests.adaptive.test_adamerging import same
from tests.data_free.test_tsv import random

QUICK = {"steps": 6, "batch": 5, "learning_rate": 0.02, "progress": False}
THERE = sys.modules[Mixture.__module__]  # the module, which the package's function of the same name hides


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- three small networks


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, width))

    def forward(self, h):
        return h + self.mlp(self.norm(h))


class Transformer(nn.Module):
    """Two blocks over 6 tokens of 4 numbers: (N, 6, 4) to (N, 5)."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.out = nn.Linear(4, 4), nn.ModuleList([Block(4), Block(4)]), nn.Linear(4, 5)

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.out(h.mean(1))


class Perceptron(nn.Module):
    """One hidden module: (N, 4) to (N, 5)."""

    def __init__(self):
        super().__init__()
        self.stem, self.mlp, self.out = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 7), nn.Tanh()), nn.Linear(7, 5)

    def forward(self, x):
        return self.out(self.mlp(self.stem(x)))


class Convolutional(nn.Module):
    """Two convolutional blocks with statistics of normalisation: (N, 2, 4, 3) to (N, 5)."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Conv2d(2, 3, 1), nn.Linear(4, 5)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        return self.out(self.second(self.first(self.stem(x))).mean((2, 3)))


NETWORKS = {
    "transformer": (Transformer, (6, 4), ["blocks.0.mlp", "blocks.1.mlp"]),
    "perceptron": (Perceptron, (4,), ["mlp"]),
    "convolutional": (Convolutional, (2, 4, 3), ["first", "second"]),
}
EACH = pytest.mark.parametrize("kind", NETWORKS)


def build(kind, seed):
    torch.manual_seed(seed)
    net = NETWORKS[kind][0]().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.3 * torch.randn(4))
            module.running_var.copy_(2 + torch.rand(4))
    return net


def problem(kind="transformer", tasks="abc"):
    """Task vectors, the network, a head of 3 classes and 12 images per task; in float64."""
    net, shape = build(kind, 0), NETWORKS[kind][1]
    tv = mkl.TaskVectors(net, {task: build(kind, 1 + k) for k, task in enumerate(tasks)})
    torch.manual_seed(9)
    heads = {task: nn.Linear(5, 3).double() for task in tasks}
    for head in heads.values():
        head.weight.data.mul_(5)
    return tv, net, heads, {task: torch.randn(12, *shape, dtype=torch.float64) for task in tasks}


def start(kind, *, spread=0.4, **options):
    """A mixture whose routers answer something else to every input, and the problem it was made from."""
    setting = problem(kind)
    tv, net, _, images = setting
    mixture = WEMoE.start(tv, net, images["a"], NETWORKS[kind][2], **{"scale": 0.25, "init": 0.35, **options})
    for k, router in enumerate(mixture.routers.values()):
        for i, p in enumerate(router.parameters()):
            p.data += spread * random(*p.shape, seed=10 * k + i)
    return mixture, *setting


def answers(router, token):
    first, _, last = router
    return last.weight @ torch.clamp(first.weight @ token + first.bias, min=0) + last.bias


@torch.no_grad()
def by_hand(mixture, tv, net, x, scale=0.25):
    """The network's outputs for a batch that shares its merges: before each module runs, its weights are written."""
    plain, record = copy.deepcopy(net), {}
    plain.load_state_dict(merged_by_hand(tv, lambda name: torch.full((len(tv),), scale, dtype=torch.float64)))

    def write(name, router):
        def hook(module, arguments):
            h = arguments[0].movedim(1, -1) if arguments[0].ndim == 4 else arguments[0]
            w = torch.stack([answers(router, token) for token in h.flatten(0, -2)]).mean(0)
            merged = merged_by_hand(tv, lambda _: w)
            module.load_state_dict({n: merged[f"{name}.{n}"] for n in module.state_dict()})
            record[name] = w

        return hook

    for name, router in mixture.routers.items():
        plain.get_submodule(name).register_forward_pre_hook(write(name, router))
    return plain(x), record


# ---------------------------------------------------------------- the forward pass


@EACH
def test_every_image_has_weights_of_its_own(kind):
    mixture, tv, net, _, images = start(kind)
    x = images["b"]
    outputs, routing = mixture(x), mixture.routing(x)
    for i in range(len(x)):
        expected, w = by_hand(mixture, tv, net, x[i : i + 1])
        torch.testing.assert_close(outputs[i : i + 1].detach(), expected, rtol=1e-10, atol=1e-12)
        assert list(routing) == list(w) == NETWORKS[kind][2]
        for name in w:
            torch.testing.assert_close(routing[name][i], w[name], rtol=1e-10, atol=1e-12)
    spread = torch.cat([w.std(0) for w in routing.values()])
    assert spread.min() > 3e-4, "the routers tell the images apart"


@EACH
def test_by_batch_all_images_share_the_mean_weights(kind):
    mixture, tv, net, _, images = start(kind)
    mixture.route = "batch"
    for x in (images["a"], images["b"][:5], images["c"][:1]):
        expected, w = by_hand(mixture, tv, net, x)
        torch.testing.assert_close(mixture(x).detach(), expected, rtol=1e-10, atol=1e-12)
        routing = mixture.routing(x)
        assert all(routing[name].shape == (len(x), 3) for name in routing)
        for name in w:
            torch.testing.assert_close(routing[name].mean(0), w[name], rtol=1e-10, atol=1e-12)
    alone = mixture(images["c"][:1])
    mixture.route = "image"
    torch.testing.assert_close(mixture(images["c"][:1]), alone, rtol=1e-10, atol=1e-12)


def test_coefficients_by_hand():
    # One token h: relu((h, -h)), then 1 · relu(h) + 2 · relu(-h) + 0.5 for task a and their difference for b.
    router = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    router[0].weight.data, router[0].bias.data = torch.tensor([[1.0], [-1.0]]), torch.zeros(2)
    router[2].weight.data, router[2].bias.data = torch.tensor([[1.0, 2.0], [1.0, -1.0]]), torch.tensor([0.5, 0.0])
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(10.0)
    mixture = Mixture(module, {"weight": torch.tensor([[[1.0]], [[-1.0]]])}, router)
    h = torch.tensor([[[1.0], [3.0]], [[-1.0], [-2.0]]])  # two inputs of two tokens
    # Answers (1.5, 1), (3.5, 3): mean (2.5, 2). Answers (2.5, -1), (4.5, -2): mean (3.5, -1.5).
    assert mixture.coefficients(h).tolist() == [[2.5, 2.0], [3.5, -1.5]]
    # Weights 10 + 2.5 - 2 = 10.5 and 10 + 3.5 + 1.5 = 15; by batch 10 + 3 - 0.25 = 12.75.
    assert mixture(h).tolist() == [[[10.5], [31.5]], [[-15.0], [-30.0]]]
    mixture.route = "batch"
    assert mixture(h).tolist() == [[[12.75], [38.25]], [[-12.75], [-25.5]]]


@EACH
def test_with_routers_that_answer_the_same_to_all_it_is_task_arithmetic(kind):
    tv, net, _, images = problem(kind)
    mixture = WEMoE.start(tv, net, images["a"], NETWORKS[kind][2], scale=0.4, init=0.4)
    for router in mixture.routers.values():
        for linear in (router[0], router[2]):
            linear.weight.data.zero_()
    plain = copy.deepcopy(net)
    plain.load_state_dict(mkl.task_arithmetic(tv, scale=0.4))
    for route in ("image", "batch"):
        mixture.route = route
        torch.testing.assert_close(mixture(images["b"]), plain(images["b"]), rtol=1e-5, atol=1e-6)  # a float32 bias
    different = WEMoE.start(tv, net, images["a"], NETWORKS[kind][2], scale=0.4, init=0.1)
    assert not torch.allclose(different(images["b"]), plain(images["b"]), atol=1e-2), "init is that of the modules"


@EACH
def test_before_the_first_step_it_is_nearly_task_arithmetic(kind):
    tv, net, heads, images = problem(kind)
    mixture = wemoe(tv, net, heads, images, modules=NETWORKS[kind][2], **QUICK | {"steps": 0})
    plain = copy.deepcopy(net)
    plain.load_state_dict(mkl.task_arithmetic(tv, scale=0.3))
    assert (mixture(images["b"]) - plain(images["b"])).abs().max() < 0.02
    for router in mixture.routers.values():
        assert router[2].bias.tolist() == pytest.approx([0.3] * 3)
        assert (router[0].bias == 0).all()
        assert 0.003 < router[0].weight.std() < 0.03
        assert 0 < router[2].weight.abs().max() < 0.05


@EACH
def test_chunks_give_the_same(kind, monkeypatch):
    mixture, _, _, _, images = start(kind)
    x = images["a"]
    whole = mixture(x)
    size = sum(t.numel() for t in mixture.mixtures[NETWORKS[kind][2][0]].module.state_dict().values())
    sizes = []
    merged = Mixture.merged
    monkeypatch.setattr(Mixture, "merged", lambda self, w: sizes.append(len(w)) or merged(self, w))
    for room in (1, 5 * size):
        sizes.clear()
        monkeypatch.setattr(THERE, "PER_CHUNK", room)
        torch.testing.assert_close(mixture(x), whole, rtol=1e-10, atol=1e-12)
        assert len(sizes) > len(mixture.mixtures), "in more than one chunk"
        assert sum(sizes) == 12 * len(mixture.mixtures)
    sizes.clear()
    monkeypatch.setattr(THERE, "PER_CHUNK", 1)
    mixture(x)
    assert set(sizes) == {1}


@EACH
def test_routed_by_image_an_image_is_answered_alike_in_any_company(kind):
    mixture, _, _, heads, images = start(kind)
    x, others = images["a"], images["b"]
    among = torch.cat([x, others])
    torch.testing.assert_close(mixture(among)[:12], mixture(x), rtol=1e-10, atol=1e-12)
    head = heads["a"]
    one_by_one = torch.stack([entropy(head(mixture(image[None]))) for image in x]).mean()
    torch.testing.assert_close(entropy(head(mixture(x))), one_by_one, rtol=1e-10, atol=0)
    mixture.route = "batch"
    assert not torch.allclose(mixture(among)[:12], mixture(x), atol=1e-4), "by batch its company matters"
    assert abs(entropy(head(mixture(among)[:12])) - entropy(head(mixture(x)))) > 1e-5


def test_channels_last_tokens_are_tokens():
    """The multilayer perceptrons of a ConvNeXt see (N, height, width, d)."""

    class Next(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.stem, self.mlp = nn.Conv2d(2, 4, 1), nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 4))

        def forward(self, x):
            return self.mlp(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2))

    tv = mkl.TaskVectors(Next(0), [Next(1), Next(2)])
    x = torch.randn(5, 2, 3, 7)
    mixture = WEMoE.start(tv, Next(0), x)
    assert [p.shape for p in mixture.routers["mlp"].parameters()] == [(4, 4), (4,), (2, 4), (2,)]
    tokens = mixture.network.stem(x).permute(0, 2, 3, 1).reshape(5, 21, 4)
    expected = torch.stack([torch.stack([answers(mixture.routers["mlp"], t) for t in h]).mean(0) for h in tokens])
    torch.testing.assert_close(mixture.routing(x)["mlp"], expected)
    assert mixture(torch.randn(2, 2, 5, 4)).shape == (2, 4), "images of another size"


# ---------------------------------------------------------------- the descent


@EACH
@pytest.mark.parametrize("route", ["image", "batch"])
def test_the_routers_gradient_is_that_of_finite_differences(kind, route):
    mixture, tv, net, heads, images = start(kind)
    if kind == "convolutional":  # through statistics there is no gradient, so they must be alike
        routers, tv = mixture.routers, with_the_bases_statistics(tv)
        mixture = WEMoE.start(tv, net, images["a"], NETWORKS[kind][2])
        for name, router in mixture.routers.items():
            router.load_state_dict(routers[name].state_dict())
    mixture.route = route

    def loss():
        return sum(entropy(heads[task](mixture(images[task]))) for task in images)

    parameters = [p for router in mixture.routers.values() for p in router.parameters()]
    slopes = torch.autograd.grad(loss(), parameters)
    with torch.no_grad():
        for p, slope in zip(parameters, slopes, strict=True):
            direction = random(*p.shape, seed=4)
            p += 1e-5 * direction
            above = loss()
            p -= 2e-5 * direction
            below = loss()
            p += 1e-5 * direction
            assert (above - below).item() / 2e-5 == pytest.approx((slope * direction).sum().item(), rel=1e-5, abs=1e-8)
    assert all(slope.abs().max() > 1e-5 for slope in slopes)


def step_by_step(setting, routers, route, *, steps, rate, size):
    """The same training of a perceptron's router, with the merged weights written out and Adam's rate on a cosine."""
    tv, _, heads, images = setting
    theta = merged_by_hand(tv, lambda name: torch.full((3,), 0.2, dtype=torch.float64))
    experts, base = tv._experts, tv.base
    w1, b1, w2, b2 = (p.detach().clone().requires_grad_() for p in routers["mlp"].parameters())
    adam, losses = torch.optim.Adam([w1, b1, w2, b2], lr=rate), []
    for step in range(steps):
        total = 0.0
        for task, x in images.items():
            x = x[[(size * (step + 1) + i) % 12 for i in range(size)]]  # the first batch was for the widths
            h = x @ theta["stem.weight"].T + theta["stem.bias"]
            w = (h @ w1.T + b1).relu() @ w2.T + b2
            w = w if route == "image" else w.mean(0, keepdim=True).expand(size, -1)
            hidden = []
            for i in range(size):
                weight, bias = base["mlp.0.weight"], base["mlp.0.bias"]
                for k, expert in enumerate(experts):
                    weight = weight + w[i, k] * (expert["mlp.0.weight"] - base["mlp.0.weight"])
                    bias = bias + w[i, k] * (expert["mlp.0.bias"] - base["mlp.0.bias"])
                hidden.append(torch.tanh(weight @ h[i] + bias))
            p = heads[task](torch.stack(hidden) @ theta["out.weight"].T + theta["out.bias"]).softmax(1)
            total = total - (p * p.log()).sum(1).mean()
        for group in adam.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        adam.zero_grad()
        total.backward()
        adam.step()
        losses.append(total.item() / 3)
    return [w1, b1, w2, b2], losses


@pytest.mark.parametrize("route", ["image", "batch"])
def test_the_whole_training_is_that_of_autograd_through_merges_by_hand(route):
    setting = problem("perceptron")
    tv, net, heads, images = setting
    given = dict.fromkeys(images, 0)

    def draw(task):
        def batch(count, generator):
            given[task] += 1
            return images[task][[(count * (given[task] - 1) + i) % 12 for i in range(count)]]

        return batch

    turns = {task: draw(task) for task in images}
    options = {"scale": 0.2, "init": 0.4, "train_route": route, **QUICK}
    fresh = wemoe(tv, net, heads, turns, **options | {"steps": 0})
    expected, losses = step_by_step(setting, fresh.routers, route, steps=6, rate=0.02, size=5)
    given.update(dict.fromkeys(images, 0))
    mixture = wemoe(tv, net, heads, turns, **options)
    for ours, theirs, before in zip(
        mixture.routers["mlp"].parameters(), expected, fresh.routers["mlp"].parameters(), strict=True
    ):
        torch.testing.assert_close(ours.data, theirs.data, rtol=1e-9, atol=1e-10)
        assert (ours - before).abs().max() > 0.02
    assert list(mixture.history.average("loss").values()) == pytest.approx(losses, rel=1e-10)


@EACH
def test_only_routers_are_trained(kind):
    tv, net, heads, images = problem(kind)
    options = {**QUICK, "modules": NETWORKS[kind][2]}
    before = wemoe(tv, net, heads, images, **options | {"steps": 0}).state_dict()
    mixture = wemoe(tv, net, heads, images, **options)
    after = mixture.state_dict()
    assert list(before) == list(after)
    trained = {name for name in after if not torch.equal(before[name], after[name])}
    assert trained == {name for name in after if ".router." in name}
    assert len(trained) == 4 * len(mixture.mixtures)
    assert {name for name, p in mixture.named_parameters() if p.requires_grad} == trained
    arithmetic = merged_by_hand(tv, lambda name: torch.full((3,), 0.3, dtype=torch.float64))
    for name, tensor in tv.base.items():  # the base's weights inside, task arithmetic outside
        inside = next((m for m in mixture.mixtures if name.startswith(m + ".")), None)
        if "running" in name:
            where = f"{inside}.module{name.removeprefix(inside)}" if inside else name
            torch.testing.assert_close(after[f"network.{where}"], arithmetic[name], rtol=1e-12, atol=1e-14)
        elif inside:
            assert torch.equal(after[f"network.{inside}.module{name.removeprefix(inside)}"], tensor)
        else:
            torch.testing.assert_close(after[f"network.{name}"], arithmetic[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("train_route", ["image", "batch"])
def test_the_loss_falls(train_route):
    tv, net, heads, images = problem()
    experts = dict(zip("abc", tv._experts, strict=True))
    for loss in (mkl.entropy_loss, imitation_loss(net, experts, heads)):
        options = {**QUICK, "steps": 30, "batch": 12, "loss": loss, "train_route": train_route}
        losses = list(wemoe(tv, net, heads, images, **options).history.average("loss").values())
        assert losses[-1] < losses[0] - 0.05


def test_a_seed_repeats_it():
    tv, net, heads, images = problem()

    def run(seed=None):
        generator = None if seed is None else seeded(seed)
        return wemoe(tv, net, heads, images, generator=generator, **QUICK).state_dict()

    state = torch.get_rng_state()
    same(run(), run(), rtol=0, atol=0)
    same(run(), run(0), rtol=0, atol=0)
    first, second = run(7), run(8)
    same(first, run(7), rtol=0, atol=0)
    assert not torch.equal(
        first["network.blocks.0.mlp.router.0.weight"], second["network.blocks.0.mlp.router.0.weight"]
    )
    assert torch.equal(state, torch.get_rng_state())
    a, b = (WEMoE.start(tv, net, images["a"]).state_dict() for _ in range(2))
    same(a, b, rtol=0, atol=0)


@EACH
def test_nothing_that_was_given_is_changed(kind):
    tv, net, heads, images = problem(kind)
    net.train()
    states = [tv.base, *tv._experts, net.state_dict(), images, *(head.state_dict() for head in heads.values())]
    before = [{name: t.clone() for name, t in state.items()} for state in states]
    tracked = {task: x.requires_grad_() for task, x in images.items()}
    mixture = wemoe(tv, net, heads, tracked, modules=NETWORKS[kind][2], **QUICK)
    mixture.routing(images["a"])
    for tensor in mixture.state_dict().values():
        tensor.zero_()
    for state, old in zip(states, before, strict=True):
        same(state, old, rtol=0, atol=0)
    assert net.training
    assert all(p.requires_grad and p.grad is None for module in (net, *heads.values()) for p in module.parameters())
    assert all(x.grad is None for x in tracked.values())
    assert not any(module._forward_pre_hooks for module in (*net.modules(), *mixture.modules()))


def test_it_is_looked_at_by_image_and_looking_changes_nothing():
    tv, net, heads, images = problem()
    looks = []

    def measure(network):
        looks.append((network.route, copy.deepcopy(network.state_dict())))
        return {"a": len(looks) / 10}

    options = {**QUICK, "train_route": "batch"}
    mixture = wemoe(tv, net, heads, images, measure=measure, every=4, **options)
    assert mixture.history.seen["accuracy"] == {0: {"a": 0.1}, 4: {"a": 0.2}, 6: {"a": 0.3}}
    assert [route for route, _ in looks] == ["image"] * 3
    assert mixture.route == "image"
    same(looks[0][1], wemoe(tv, net, heads, images, **options | {"steps": 0}).state_dict(), rtol=0, atol=0)
    same(looks[-1][1], mixture.state_dict(), rtol=0, atol=0)
    same(mixture.state_dict(), wemoe(tv, net, heads, images, **options).state_dict(), rtol=0, atol=0)
    stopped = wemoe(tv, net, heads, images, patience=2, **options | {"steps": 300, "learning_rate": 0.3})
    assert 4 <= stopped.history.steps < 300


def test_what_was_reached_before_an_image_was_bad_is_kept():
    tv, net, heads, images = problem()
    taken, reached = [], []

    def camera(count, generator):
        taken.append(count)
        return images["b"] * (math.nan if len(taken) == 5 else 1.0)  # the first batch is only looked at

    def measure(network):
        reached.append(copy.deepcopy(network))
        return {"a": 0.0}

    given = {"a": images["a"], "b": camera}
    options = {**QUICK, "train_route": "batch", "measure": measure, "every": 1}
    with pytest.raises(mkl.DivergenceError, match="after 3 steps the loss of 'b' is nan") as stopped:
        wemoe(tv, net, heads, given, **options)
    assert stopped.value.reached.route == "image"
    assert stopped.value.reached.history is stopped.value.history
    assert stopped.value.history.steps == 3
    assert len(reached) == 4
    same(stopped.value.reached.state_dict(), reached[3].state_dict(), rtol=0, atol=0)
    x = images["a"]
    torch.testing.assert_close(stopped.value.reached(x), reached[3](x), rtol=0, atol=0)  # a copy is whole
    assert not torch.allclose(reached[0](x), reached[3](x), atol=1e-6)


# ---------------------------------------------------------------- files


@EACH
def test_a_mixture_comes_back_from_a_file_bit_for_bit(kind, tmp_path):
    mixture, _, net, _, images = start(kind)
    mixture.save(tmp_path / "mixture.safetensors")
    before = {name: t.clone() for name, t in net.state_dict().items()}
    loaded = WEMoE.load(tmp_path / "mixture.safetensors", net)
    ours, theirs = (dict(sorted(m.state_dict().items())) for m in (mixture, loaded))
    same(ours, theirs, rtol=0, atol=0)
    assert torch.equal(loaded(images["a"]), mixture(images["a"]))
    mixture.route = loaded.route = "batch"
    assert torch.equal(loaded(images["a"]), mixture(images["a"]))
    assert loaded.tasks == ["a", "b", "c"]
    assert list(loaded.mixtures) == NETWORKS[kind][2]
    assert not loaded.training
    same(net.state_dict(), before, rtol=0, atol=0)
    (tmp_path / "mixture.safetensors").unlink()
    torch.testing.assert_close(loaded(images["a"]), mixture(images["a"]))  # nothing is left to be read


def test_other_files_and_other_networks_are_refused(tmp_path):
    mixture, tv, net, *_ = start("transformer")
    path = tmp_path / "mixture.safetensors"
    mixture.save(path)
    narrow = build("transformer", 0)
    narrow.stem = nn.Linear(3, 4).double()
    one_block = build("transformer", 0)
    one_block.blocks = one_block.blocks[:1]
    three_blocks = build("transformer", 0)
    three_blocks.blocks.append(Block(4).double())
    other_module = build("transformer", 0)
    other_module.blocks[1].mlp = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    for network in (build("perceptron", 0), narrow, one_block, three_blocks, other_module):
        with pytest.raises(ValueError, match="is a mixture of another network"):
            WEMoE.load(path, network)
    mkl.save(dict(tv.base), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"does not hold a mixture written by WEMoE\.save"):
        WEMoE.load(tmp_path / "plain.safetensors", net)
    with pytest.raises(mkl.CheckpointError, match="no such checkpoint"):
        WEMoE.load(tmp_path / "nowhere.safetensors", net)


# ---------------------------------------------------------------- which modules


def test_by_default_all_modules_called_mlp_are_taken():
    tv, net, _, images = problem()
    mixture = WEMoE.start(tv, net, images["a"])
    assert list(mixture.mixtures) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert sum("taus_" in name for name in mixture.state_dict()) == 2 * 4
    chosen = WEMoE.start(tv, net, images["a"], ["blocks.1.mlp", "stem", "stem"])
    assert list(chosen.mixtures) == ["blocks.1.mlp", "stem"]
    assert isinstance(chosen.network.blocks[0].mlp, nn.Sequential)


def test_a_vision_transformer_of_timm():
    timm = pytest.importorskip("timm")

    def vit(seed):
        torch.manual_seed(seed)
        options = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
        return timm.create_model("vit_tiny_patch16_224", **options).eval()

    nets = [vit(seed) for seed in range(3)]
    tv = mkl.TaskVectors(nets[0], {"a": nets[1], "b": nets[2]})
    images = {task: torch.randn(4, 3, 32, 32) for task in "ab"}
    heads = {task: nn.Linear(24, 3) for task in "ab"}
    mixture = wemoe(tv, nets[0], heads, images, **QUICK | {"steps": 2})
    assert list(mixture.mixtures) == ["blocks.0.mlp", "blocks.1.mlp"]
    x = images["a"]
    outputs = mixture(x)
    weights = mixture.state_dict()
    for i in range(2):
        plain = copy.deepcopy(nets[0])
        state = mkl.task_arithmetic(tv, scale=0.3)
        for name, w in mixture.routing(x[i : i + 1]).items():
            for n, tensor in mixture.mixtures[name].module.state_dict().items():
                state[f"{name}.{n}"] = tensor + torch.tensordot(
                    w[0], torch.stack([e[f"{name}.{n}"] - tensor for e in tv._experts]), dims=1
                )
        plain.load_state_dict(state)
        torch.testing.assert_close(plain(x[i : i + 1]), outputs[i : i + 1], rtol=1e-4, atol=1e-5)
    assert sum("router" in name for name in weights) == 8


def test_modules_that_cannot_be_mixtures_are_refused():
    tv, net, heads, images = problem("convolutional")

    def run(**options):
        wemoe(tv, net, heads, images, **{**QUICK, **options})

    with pytest.raises(ValueError, match=r"no module of this network is called 'mlp'; .* such as modules=\['stem'\]"):
        run()
    with pytest.raises(ValueError, match="no module of this network is called 'mlp'"):
        run(modules=[])
    for name in ("third", ""):
        with pytest.raises(KeyError, match=f"the network has no module '{name}'"):
            run(modules=["first", name])
    for modules in (["first", "first.0"], ["first.0", "first"]):
        with pytest.raises(ValueError, match=r"'first\.0' is a part of 'first'"):
            run(modules=modules)
    with pytest.raises(ValueError, match=r"the task vectors have no tensor of the module 'first\.2'"):
        run(modules=["first.2", "second"])

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.mlp = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="the network does not use its module 'mlp'"):
        WEMoE.start(mkl.TaskVectors(Idle(), [Idle()]), Idle(), torch.zeros(1, 2))


def test_wrong_input_says_why():
    tv, net, heads, images = problem()

    def run(heads=heads, images=images, net=net, **options):
        wemoe(tv, net, heads, images, **{**QUICK, **options})

    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="learning_rate must be positive and finite"):
            run(learning_rate=rate)
    for name in ("scale", "init"):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            run(**{name: math.nan})
    with pytest.raises(ValueError, match="route must be one of image, batch; got 'token'"):
        run(train_route="token")
    with pytest.raises(KeyError, match="no head for the task 'b'; there are heads for a"):
        run(heads={"a": heads["a"]})
    with pytest.raises(ValueError, match="no images of the task 'c'"):
        run(images={**images, "c": images["c"][:0]})
    with pytest.raises(ValueError, match="steps must not be negative"):
        run(steps=-1)
    with pytest.raises(TypeError, match="density"):
        run(density=0.2)
    smaller = copy.deepcopy(net)
    smaller.out = nn.Identity()
    with pytest.raises(KeyError, match=r"the model has no tensor 'out\.weight', which the task vectors have"):
        run(net=smaller)


# ---------------------------------------------------------------- unusual inputs


@EACH
def test_one_expert(kind):
    tv, net, heads, images = problem(kind, "a")
    mixture = wemoe(tv, net, heads, images, modules=NETWORKS[kind][2], scale=1.0, init=1.0, **QUICK | {"steps": 0})
    for router in mixture.routers.values():
        router[2].weight.data.zero_()
    torch.testing.assert_close(mixture(images["a"]), build(kind, 1)(images["a"]), rtol=1e-9, atol=1e-11)
    trained = wemoe(tv, net, heads, images, modules=NETWORKS[kind][2], **QUICK)
    assert {w.shape for w in trained.routing(images["a"]).values()} == {(12, 1)}


@pytest.mark.parametrize("train_route", ["image", "batch"])
@EACH
def test_experts_that_changed_nothing(kind, train_route):
    _, net, heads, images = problem(kind, "ab")
    tv = mkl.TaskVectors(net, {"a": net, "b": net})
    mixture = wemoe(tv, net, heads, images, modules=NETWORKS[kind][2], train_route=train_route, **QUICK)
    torch.testing.assert_close(mixture(images["a"]), net(images["a"]), rtol=1e-12, atol=1e-12)
    assert mixture.history.steps == 6


def test_a_network_that_is_merged_in_part_keeps_the_rest():
    whole = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    body = {name: t for name, t in whole.state_dict().items() if name.startswith("0.")}
    tv = mkl.TaskVectors(body, [{name: t + 1 for name, t in body.items()}])
    x = random(5, 4)
    mixture = WEMoE.start(tv, whole, x, ["0"], init=0.0)
    mixture.routers["0"][2].weight.data.zero_()
    torch.testing.assert_close(mixture(x), whole(x))


def test_statistics_of_normalisation_are_the_mean_of_the_experts_for_every_input():
    mixture, tv, _, heads, images = start("convolutional")
    held = {name for name, _ in mixture.mixtures["first"].named_buffers()}
    assert {"module.1.running_mean", "module.1.running_var", "module.1.num_batches_tracked"} <= held
    assert not any("running" in name for name in held if "taus" in name)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([expert[f"first.1.{name}"] for expert in tv._experts]).mean(0)
        torch.testing.assert_close(mixture.mixtures["first"].module.get_buffer(f"1.{name}"), mean)
    w = random(2, 3).requires_grad_()
    merged = mixture.mixtures["first"].merged(w)
    assert {name for name, t in merged.items() if t.requires_grad} == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for i in range(2):
        expected = merged_by_hand(tv, lambda _, i=i: w[i])
        for name, t in merged.items():
            torch.testing.assert_close(t[i], expected[f"first.{name}"])
    entropy(heads["a"](mixture(images["a"]))).backward()
    assert all(torch.isfinite(p.grad).all() for p in mixture.parameters() if p.requires_grad)


def with_the_bases_statistics(tv):
    experts = [{n: tv.base[n] if "running" in n else t for n, t in expert.items()} for expert in tv._experts]
    return mkl.TaskVectors(tv.base, experts, tv.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    tv, net, heads, images = problem()
    states = [{n: t.to(dtype) for n, t in s.items()} for s in (tv.base, *tv._experts)]
    coarse = mkl.TaskVectors(states[0], dict(zip("abc", states[1:], strict=True)))
    heads = {task: head.to(dtype) for task, head in heads.items()}
    given = {task: x.to(dtype) for task, x in images.items()}
    mixture = wemoe(coarse, copy.deepcopy(net).to(dtype), heads, given, **QUICK)
    assert {t.dtype for t in mixture.state_dict().values()} == {dtype}
    exact = wemoe(tv, net, {t: h.double() for t, h in heads.items()}, images, **QUICK)
    error = (mixture(given["a"]).double() - exact(images["a"])).abs().max()
    assert error < (0.2 if dtype == torch.bfloat16 else 1e-4)


def test_inputs_need_not_be_of_the_weights_kind():
    """Tokens of a language are integers; the routers are as the network is."""

    class Words(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.embed, self.mlp = nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x):
            return self.mlp(self.embed(x)).mean(1)

    tv = mkl.TaskVectors(Words(0), {"a": Words(1), "b": Words(2)})
    words = {task: torch.randint(9, (6, 5), generator=seeded(k)) for k, task in enumerate("ab")}
    mixture = wemoe(tv, Words(0), dict.fromkeys("ab", nn.Identity()), words, **QUICK)
    assert mixture(words["a"]).dtype == torch.float32
    assert mixture.history.steps == 6


def test_gradients_are_right_in_a_real_block():
    """With vmap they were not (torch 2.13), though values and the gradients of small networks were."""
    suite, name = mkl.load_suite("pocket8", device="cpu"), "blocks.4.2"
    net = nn.Sequential(suite.build().get_submodule(name))

    def part(state):
        return {f"0{n.removeprefix(name)}": tensor for n, tensor in state.items() if n.startswith(f"{name}.")}

    tv = mkl.TaskVectors(part(suite.base), [part(suite.experts[task]) for task in ("mnist", "letters")])
    x, direction = torch.randn(2, 2, 112, 4, 4, generator=seeded())
    network = mkl.WEMoE.start(tv, net, x, ["0"])

    def slopes(route, *which):
        network.route = route
        network.zero_grad()
        for images in which:
            (network(x[images]) * direction[images]).sum().backward()
        return network.routers["0"][2].bias.grad.clone()

    alone = slopes("batch", [0], [1])  # a batch of one image is routed by that image
    assert torch.allclose(slopes("image", [0, 1]), alone, rtol=1e-3)
