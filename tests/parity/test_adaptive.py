"""AdaMerging, Concrete and WEMoE against fusion-bench: its wrappers, and the loops of its algorithms, as released.

All in float64, on the same inputs and with the same random numbers, so that both packages agree to far less than 1e-9
wherever they compute the same, also after several steps of Adam. Where they do not, a test says in what.
"""

import copy
import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fusion_bench.method.adamerging.entropy_loss import entropy_loss as their_entropy
from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
from fusion_bench.method.adamerging.task_wise_adamerging import TaskWiseAdaMergingAlgorithm
from fusion_bench.method.concrete_subspace.clip_concrete_adamerging import (
    ConcreteLayerWiseAdaMergingForCLIP,
    ConcreteTaskWiseAdaMergingForCLIP,
)
from fusion_bench.method.concrete_subspace.clip_concrete_task_arithmetic import ConcreteTaskArithmeticAlgorithmForCLIP
from fusion_bench.method.we_moe.we_moe import WeightEnsemblingMoEAlgorithm
from fusion_bench.models.masks import MaskModel
from fusion_bench.models.we_moe import WeightEnsemblingMoE
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel
from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel
from omegaconf import OmegaConf
from torch import nn
from torch.func import functional_call

import mergekit_lite as mkl
from mergekit_lite.adaptive.adamerging import losses_and_slopes
from mergekit_lite.adaptive.concrete import relaxed, slope_of_logits
from mergekit_lite.adaptive.wemoe import Mixture, router
from mergekit_lite.data_free.dare import draw_seed
from tests.adaptive.examples import TASKS, tiny_net
from tests.adaptive.examples import problem as with_statistics
from tests.parity.checkpoints import assert_same

EXACT = {"rtol": 1e-9, "atol": 1e-12}
WIDTH, ALL = 4, 99  # of a token; more images than there are, so that every batch has all of them
FINER = pytest.mark.parametrize("granularity", ["layer", "task"])


class Block(nn.Module):
    """The half of a transformer's block that WEMoE is about."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, WIDTH))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Network(nn.Module):
    """Two blocks, then the mean over tokens: (N, T, d) to (N, d). It has no buffers."""

    def __init__(self, seed):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.double().named_parameters():
            p.data = ("norm.weight" in name) + 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)

    def forward(self, x):
        return self.blocks(x).mean(1)


@pytest.fixture
def problem():
    """A base and three experts, their task vectors, heads of 3 classes, and 6 inputs of 5 tokens per task."""
    base, *experts = (Network(seed).eval() for seed in range(4))
    tv = mkl.TaskVectors(base.state_dict(), {t: e.state_dict() for t, e in zip(TASKS, experts, strict=True)})
    torch.manual_seed(9)
    heads = {task: nn.Linear(WIDTH, 3).double() for task in TASKS}
    images = {task: torch.randn(6, 5, WIDTH, dtype=torch.double) for task in TASKS}
    return SimpleNamespace(base=base, experts=experts, tv=tv, heads=heads, images=images)


def start(problem, granularity):
    """Their initial coefficients: per task, or per task and parameter."""
    sizes = {"task": (len(TASKS),), "layer": (len(TASKS), len(list(problem.base.parameters())))}
    return torch.full(sizes[granularity], 0.3, dtype=torch.double)


def wrapped(problem, granularity, weights, clamp=True):
    """Their wrapper; it turns the experts it is given into task vectors."""
    wrapper = TaskWiseMergedModel if granularity == "task" else LayerWiseMergedModel
    return wrapper(weights.clone(), copy.deepcopy(problem.base), copy.deepcopy(problem.experts), clamp_weights=clamp)


class Released(SimpleNamespace):
    """What the loops of fusion-bench's algorithms use of themselves; `config` as in their files."""

    fabric = _fabric = SimpleNamespace(
        setup=lambda *them: them,
        backward=lambda loss, **options: loss.backward(**options),
        log_dict=lambda metrics, step: None,
        is_global_zero=True,
    )
    is_debug_mode, merge_dtype, modelpool = False, torch.double, SimpleNamespace(model_names=TASKS)

    def __init__(self, problem, **config):
        super().__init__(config=OmegaConf.create({"optimizer": "adam", **config}), problem=problem)

    def get_shuffled_test_loader_iter(self, task):
        return itertools.repeat((self.problem.images[task], None))

    def compute_logits(self, module, batch, task):
        return self.problem.heads[task](module(batch if isinstance(batch, torch.Tensor) else batch[0]))

    def profile(self, name):
        return nullcontext()

    def to_device(self, tensor):
        return tensor

    def on_test_time_adaptation_start(self):
        pass

    print_profile_summary = on_test_time_adaptation_start


def by_their_entropy(task, inputs, logits):
    """Their loss for our methods, so that both descend on the same."""
    return their_entropy(logits)


# ---------------------------------------------------------------- AdaMerging


@FINER
@pytest.mark.parametrize("clamp", [True, False])
def test_gradient_of_coefficients(problem, granularity, clamp):
    """Losses and slopes at coefficients inside, outside, and at the ends of [0, 1]."""
    tv = problem.tv
    torch.manual_seed(0)
    weights = 2 * torch.rand_like(start(problem, granularity)) - 0.5
    weights.view(-1)[0], weights.view(-1)[1], weights.view(-1)[-1] = 0, 1.5, 1
    module = wrapped(problem, granularity, weights, clamp)
    losses = {t: their_entropy(problem.heads[t](module(x)), eps=0) for t, x in problem.images.items()}
    sum(losses.values()).backward()

    layers = {name: (theta0, taus) for name, theta0, taus in tv.layers()}
    of_weights = mkl.LossOfWeights(problem.base, problem.heads, tv)
    ours, slopes = losses_and_slopes(weights.movedim(0, -1), clamp, layers, of_weights, problem.images)  # (tensors, K)
    assert ours == pytest.approx({t: loss.item() for t, loss in losses.items()}, rel=1e-12)
    torch.testing.assert_close(slopes.movedim(-1, 0), module.merge_weight.grad, **EXACT)
    assert (slopes == 0).any() == clamp


@FINER
@pytest.mark.parametrize("clamp", [True, False])
def test_adamerging(problem, granularity, clamp):
    """Coefficients and merge after twelve steps of the released loops."""
    module = wrapped(problem, granularity, start(problem, granularity), clamp)
    algorithm = LayerWiseAdaMergingAlgorithm if granularity == "layer" else TaskWiseAdaMergingAlgorithm
    algorithm.test_time_adaptation(Released(problem, lr=0.1, max_steps=12), module)
    ours = mkl.learn_coefficients(
        problem.tv,
        problem.base,
        problem.heads,
        problem.images,
        granularity=granularity,
        clamp=clamp,
        loss=by_their_entropy,
        steps=12,
        batch=ALL,
        learning_rate=0.1,
        progress=False,
    )
    lambdas = torch.stack(list(ours.values()))
    assert ((lambdas < 0) | (lambdas > 1)).any() != clamp
    theirs = module.merge_weight.detach().movedim(0, -1).expand_as(lambdas)
    torch.testing.assert_close(lambdas, theirs.clamp(0, 1) if clamp else theirs, **EXACT)
    assert_same(mkl.merge_with(problem.tv, ours), module.merge_and_unload().state_dict(), problem.tv.base, 1e-9)


def test_entropy():
    """They add 1e-8 to each probability before its logarithm, so their entropy is too low by 1e-8 per class.

    A certain prediction then has an entropy below 0; and in half precision 1e-8 is nothing, and 0 log 0 no number.
    """
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.double)
    torch.testing.assert_close(mkl.entropy(logits), their_entropy(logits, eps=0), **EXACT)
    assert (mkl.entropy(logits) - their_entropy(logits)).item() == pytest.approx(7e-8, rel=1e-4)
    certain = torch.tensor([[0.0, -100.0]])
    assert mkl.entropy(certain.double()) >= 0 > their_entropy(certain.double())
    assert 0 <= mkl.entropy(certain.half()) < 1e-7
    assert their_entropy(certain.half()).isnan()


@FINER
def test_statistics_of_normalisation(granularity):
    """They merge parameters only and keep the base's running statistics; we merge these as well.

    And their loops put the network into training mode: batch normalisation then takes each batch's own statistics, and
    the base's running ones move with every test image. We stay in inference mode.
    """
    tv, base, heads, images = with_statistics()
    experts = [tiny_net(1 + k) for k in range(len(TASKS))]
    problem = SimpleNamespace(base=base, experts=experts, tv=tv, heads=heads, images=images)
    parameters = [name for name, _ in base.named_parameters()]
    module = wrapped(problem, granularity, start(problem, granularity))
    ours = mkl.task_arithmetic(tv, scale=0.3)
    kept = ours | {name: t for name, t in tv.base.items() if name not in parameters}
    theirs = module(images["a"])
    torch.testing.assert_close(functional_call(base, kept, images["a"]), theirs, **EXACT)
    assert (functional_call(base, ours, images["a"]) - theirs).norm() > 0.1 * theirs.norm()

    before = base[1].running_mean.clone()
    algorithm = LayerWiseAdaMergingAlgorithm if granularity == "layer" else TaskWiseAdaMergingAlgorithm
    algorithm.test_time_adaptation(Released(problem, lr=0.1, max_steps=1), module)
    assert (module.pretrained_model[1].running_mean - before).norm() > 0.1


# ---------------------------------------------------------------- Concrete


def mask_of(base):
    """Their mask, with logits around 0."""
    mask = MaskModel(base, parameter_type="logits")
    generator = torch.Generator().manual_seed(1)
    for p in mask.parameters():
        p.data = 2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return mask


def drawn(mask, seed, temperature=0.5):
    """Their random masks, and ours for the same logits with the same uniform noise."""
    torch.manual_seed(seed)
    theirs = mask.sample_mask("continuous", temperature=temperature)
    noise = torch.Generator().manual_seed(seed)
    return theirs, {n: relaxed(x.detach(), temperature, noise) for n, x in mask.named_parameters()}


@pytest.mark.parametrize("temperature", [0.5, 0.1, 3.0])
def test_sample_of_the_concrete_distribution(problem, temperature):
    theirs, ours = drawn(mask_of(problem.base), 3, temperature)
    assert list(theirs) == list(ours) == list(problem.tv.base)
    for name, m in theirs.items():
        torch.testing.assert_close(ours[name], m.detach(), **EXACT)


def test_large_logits():
    """They go by way of the probability, whose rounding bounds the logits, in float32 at 15.9: no gradient beyond."""
    mask = MaskModel({"x": torch.zeros(1)}, parameter_type="logits")
    mask.fill_(30.0)
    theirs, ours = drawn(mask, 0, temperature=30.0)
    theirs["x"].backward()
    assert ours["x"].logit().item() - theirs["x"].logit().item() == pytest.approx((30 - 15.9) / 30, abs=0.01)
    assert mask["x"].grad.item() == 0


def test_gradient_of_logits(problem):
    """Through the division by the mean, the merge and the network, at coefficients that differ."""
    tv, weights, temperature = problem.tv, torch.tensor([0.2, 0.5, 0.9], dtype=torch.double), 0.5
    mask, module = mask_of(problem.base), wrapped(problem, "task", weights)
    theirs, ours = drawn(mask, 3)
    module.merge_weights(task_vector_mask={name: m / m.mean() for name, m in theirs.items()})
    sum(their_entropy(problem.heads[t](module(x)), eps=0) for t, x in problem.images.items()).backward()

    merged = mkl.merge_with(mkl.adaptive.masked(tv, ours), dict.fromkeys(tv.base, weights))
    _, gradient = mkl.LossOfWeights(problem.base, problem.heads, tv)(merged, problem.images)
    for name, _, taus in tv.layers():
        by_mask = gradient[name] * torch.tensordot(weights, taus, dims=1)
        torch.testing.assert_close(slope_of_logits(by_mask, ours[name], temperature), mask[name].grad, **EXACT)


def trained_masks(problem, coefficients, steps, *, put_back=True):
    """Our logits after some steps and theirs by the released loop, whose coefficients are put back in time or not."""
    algorithm = {
        None: ConcreteTaskArithmeticAlgorithmForCLIP,
        "task": ConcreteTaskWiseAdaMergingForCLIP,
        "layer": ConcreteLayerWiseAdaMergingForCLIP,
    }[coefficients]
    lambdas = start(problem, coefficients or "task")
    module, mask = wrapped(problem, coefficients or "task", lambdas, clamp=False), mask_of(problem.base)
    mask.fill_(0.0)
    mask.device = "cpu"
    if put_back:
        sample = mask.sample_mask

        def put_back_and_sample(**options):
            module.merge_weight.data = lambdas.clone()
            return sample(**options)

        mask.sample_mask = put_back_and_sample
    config = {"lr": 0.1, "base_lr": 1.0, "temperature": 0.5, "max_steps": steps, "save_interval": 1000}
    released = Released(problem, **config)
    released.init_task_wise_weight = released.init_layer_wise_weight = lambdas
    torch.manual_seed(draw_seed(None))  # as for our masks
    algorithm.train_mask(released, module, mask)

    ours = mkl.learn_mask(
        problem.tv,
        problem.base,
        problem.heads,
        problem.images,
        coefficients=coefficients,
        loss=by_their_entropy,
        steps=steps,
        batch=ALL,
        learning_rate=0.1,
        progress=False,
    )
    theirs = torch.cat([x.detach().flatten() for x in mask.parameters()])
    return torch.cat([x.flatten() for x in ours.values()]), theirs


def test_concrete_task_arithmetic(problem):
    ours, theirs = trained_masks(problem, None, 8)
    assert ours.abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, **EXACT)


@FINER
def test_concrete_adamerging(problem, granularity):
    ours, theirs = trained_masks(problem, granularity, 8)
    assert ours.abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, **EXACT)


@FINER
def test_concrete_adamerging_as_released(problem, granularity):
    """They put the coefficients back to their start *after* they have merged the weights for the inner step.

    So from the second step on, the inner gradient is that of the coefficients which the step before has left, a step
    of Adam with a learning rate of 1 away. Ours is the start's, as in the paper's algorithm.
    """
    first, its_first = trained_masks(problem, granularity, 1, put_back=False)
    torch.testing.assert_close(first, its_first, **EXACT)
    ours, theirs = trained_masks(problem, granularity, 8, put_back=False)
    assert (ours - theirs).norm() > 0.1 * theirs.norm()


def test_masks_of_networks_with_buffers():
    """Their mask cannot be made of a network with running statistics; ours leaves these alone."""
    tv, base, heads, images = with_statistics()
    with pytest.raises(RuntimeError, match="mutated during iteration"):
        MaskModel(base, parameter_type="logits")
    mask = mkl.learn_mask(tv, base, heads, images, steps=1, progress=False)
    assert list(mask) == [name for name, _ in base.named_parameters()]


# ---------------------------------------------------------------- WEMoE


def their_mixture(base, experts, ours, batch_reduce):
    """Theirs with the weights of our router; it turns the experts it is given into task vectors."""
    theirs = WeightEnsemblingMoE(
        WIDTH, copy.deepcopy(base), copy.deepcopy(experts), batch_first=True, batch_reduce=batch_reduce
    ).double()
    theirs.gate.fc1.load_state_dict(ours[0].state_dict())
    theirs.gate.fc2.load_state_dict(ours[2].state_dict())
    return theirs


def mlps(network):
    return [block.mlp for block in network.blocks]


@pytest.mark.parametrize("route", ["image", "batch"])
def test_mixture(problem, route):
    """Outputs, and the gradient of the router's weights, for images of all tasks."""
    base, experts = mlps(problem.base)[0], [mlps(expert)[0] for expert in problem.experts]
    taus = {n: torch.stack([e.state_dict()[n] - t for e in experts]) for n, t in base.state_dict().items()}
    ours = Mixture(copy.deepcopy(base), taus, router(WIDTH, len(experts), 0.3, torch.Generator()).double())
    generator = torch.Generator().manual_seed(2)
    for p in ours.router.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    ours.route = route
    theirs = their_mixture(base, experts, ours.router, batch_reduce=route == "batch")
    h = torch.cat(list(problem.images.values()))
    assert ours.coefficients(h).std(0).min() > 0.1
    directions = torch.randn(h.shape, generator=generator, dtype=h.dtype)
    outputs = [mixture(h) for mixture in (ours, theirs)]
    torch.testing.assert_close(*outputs, **EXACT)
    for output in outputs:
        (output * directions).sum().backward()
    for mine, other in zip(ours.router.parameters(), theirs.gate.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, **EXACT)
        assert mine.grad.norm() > 0


def their_network(problem, routers, batch_reduce):
    """Task arithmetic with their mixtures of the blocks' MLPs, as their algorithm for CLIP makes it."""
    network = copy.deepcopy(problem.base).requires_grad_(False)
    network.load_state_dict(mkl.task_arithmetic(problem.tv, scale=0.3))
    experts = zip(*map(mlps, problem.experts), strict=True)
    for block, base, its, ours in zip(network.blocks, mlps(problem.base), experts, routers, strict=True):
        block.mlp = their_mixture(base, list(its), ours, batch_reduce)
    return network


@pytest.mark.parametrize("route", ["image", "batch"])
def test_wemoe(problem, monkeypatch, route):
    """A whole network, before and after eight steps of the released loop.

    Its learning rate stays where it is. Ours falls along half a cosine, which is held here.
    """

    def ours(steps):
        return mkl.wemoe(
            problem.tv,
            problem.base,
            problem.heads,
            problem.images,
            train_route=route,
            loss=by_their_entropy,
            steps=steps,
            batch=ALL,
            learning_rate=0.01,
            progress=False,
        )

    untrained, x = ours(0), torch.cat(list(problem.images.values()))
    network = their_network(problem, list(untrained.routers.values()), batch_reduce=route == "batch")
    untrained.route = route
    torch.testing.assert_close(untrained(x), network(x), **EXACT)

    loop = WeightEnsemblingMoEAlgorithm.test_time_adaptation
    loop(Released(problem, lr=0.01, max_steps=8, use_grad_accumulate=True), network)
    falling = ours(8)
    monkeypatch.setattr(torch.optim.lr_scheduler, "CosineAnnealingLR", lambda adam, steps: held(adam))
    constant = ours(8)
    falling.route = constant.route = route
    torch.testing.assert_close(constant(x), network(x), **EXACT)
    for other in (untrained, falling):
        assert (other(x) - network(x)).norm() > 1e-3 * network(x).norm()


def held(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def test_wemoe_after_training(problem):
    """At the end their algorithm turns routing by batch off, for the network; its mixtures go on with it.

    So an image is answered differently in other company, and one of batches of one task profits from it. Ours routes by
    image, whatever it was trained with.
    """
    ours = mkl.wemoe(problem.tv, problem.base, problem.heads, problem.images, train_route="batch", steps=0)
    for p in nn.ModuleList(ours.routers.values()).parameters():
        p.data.mul_(1 + 30 * (p.ndim > 1))  # so that routes differ
    network = their_network(problem, list(ours.routers.values()), batch_reduce=True)
    released = Released(problem, checkpoint="here")
    released.construct_moe_model, released.load_checkpoint = lambda: network, lambda model, path: None
    theirs = WeightEnsemblingMoEAlgorithm.run(released, released.modelpool)
    assert theirs.batch_reduce is False
    assert all(block.mlp.batch_reduce for block in theirs.blocks)
    a, b = problem.images["a"], problem.images["b"]
    alone, together = theirs(a), theirs(torch.cat([a, b]))[: len(a)]
    assert (alone - together).norm() > 0.01 * alone.norm()
    torch.testing.assert_close(ours(a), ours(torch.cat([a, b]))[: len(a)], **EXACT)
