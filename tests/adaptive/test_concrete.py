"""A mask that all tasks share: its distribution, its slopes, the two nested descents, and the merge."""

import math

import pytest
import torch
from torch import nn

import mergekit_lite as mkl
from mergekit_lite.adaptive import ConcreteMask, concrete, imitation_loss, learn_mask, masked
from mergekit_lite.adaptive.concrete import relaxed, slope_of_logits
from tests.adaptive.examples import merged_by_hand, problem, tiny_net, uncertainty
from tests.adaptive.test_adamerging import odd_problem, same
from tests.conftest import small_net
from tests.data_free.test_tsv import random

QUICK = {"steps": 6, "batch": 5, "learning_rate": 0.05, "progress": False}
LOGITS = torch.tensor([-4.0, -1.0, 0.0, 0.3, 2.5], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mean_of(x, temperature):
    return ConcreteMask({"w": x}, temperature).mean()["w"]


# ---------------------------------------------------------------- the distribution


@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_an_entry_is_more_kept_than_not_with_probability_sigma_of_its_logit(temperature):
    count = 40_000
    drawn = relaxed(LOGITS.expand(count, -1), temperature, seeded())
    expected = LOGITS.sigmoid()
    error = 4 * (expected * (1 - expected) / count).sqrt()
    assert ((drawn > 0.5).double().mean(0) - expected).abs().lt(error).all()
    # The whole distribution, where float64 has room for it: solved for u, the draws are uniform. The largest distance
    # of the two distribution functions exceeds 1.95 / sqrt(count) once in a thousand times.
    if temperature >= 0.5:
        u = (temperature * drawn.logit() - LOGITS).sigmoid().sort(0).values
        uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        assert (u - uniform[:, None]).abs().max() < 1.95 / count**0.5


@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0, 4.0])
def test_the_mean_is_that_of_many_samples_and_of_an_integral_by_another_route(temperature):
    mean = mean_of(LOGITS, temperature)
    drawn = relaxed(LOGITS.expand(40_000, -1), temperature, seeded(1))
    assert (drawn.mean(0) - mean).abs().lt(4 * drawn.std(0) / 200 + 1e-3).all()
    # log u - log(1 - u) has the density σ(z) σ(-z): the trapezoidal rule for that variable.
    z = torch.linspace(-60, 60, 24_001, dtype=torch.float64)[:, None]
    integral = (z.sigmoid() * (-z).sigmoid() * ((LOGITS + z) / temperature).sigmoid()).sum(0) * 120 / 24_000
    torch.testing.assert_close(mean, integral, rtol=0, atol=1e-3)


def test_at_temperature_one_the_mean_has_a_closed_form():
    # m = a u / (1 - u + a u) with a = exp(x); its integral over u is a / (a - 1) · (1 - x / (a - 1)).
    x = LOGITS[LOGITS != 0]
    expected = x.exp() / x.expm1() * (1 - x / x.expm1())
    torch.testing.assert_close(mean_of(x, 1.0), expected, rtol=0, atol=1e-3)


def test_the_mean_is_symmetric_and_rises_with_the_logit():
    mean = mean_of(LOGITS, 0.5)
    torch.testing.assert_close(mean + mean_of(-LOGITS, 0.5), torch.ones_like(mean))
    assert mean[2].item() == pytest.approx(0.5, abs=1e-12)
    assert (mean.diff() > 0).all()
    assert mean_of(LOGITS.float(), 0.5).dtype == torch.float32


def test_limits_of_the_temperature():
    drawn = relaxed(LOGITS.expand(2000, -1), 1e-4, seeded())
    assert ((drawn < 1e-3) | (drawn > 1 - 1e-3)).double().mean() > 0.999, "a choice of yes and no"
    torch.testing.assert_close(mean_of(LOGITS, 1e-4), LOGITS.sigmoid(), rtol=0, atol=1 / 128)
    assert (relaxed(LOGITS, 1e6, seeded()) - 0.5).abs().max() < 1e-4, "no choice at all"
    assert (mean_of(LOGITS, 1e6) - 0.5).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_and_draws_are_finite(dtype):
    x = torch.tensor([-1e4, -50.0, 50.0, 1e4], dtype=dtype).repeat(1000, 1)
    drawn, mean = relaxed(x, 0.5, seeded()), mean_of(x, 0.5)
    for m in (drawn, mean):
        assert m.dtype == dtype
        assert ((m >= 0) & (m <= 1)).all()
    assert torch.equal(mean[0, [0, 3]], torch.tensor([0.0, 1.0], dtype=dtype))


def test_draws_are_those_of_the_generator():
    mask = ConcreteMask({"v": torch.zeros(50), "w": torch.zeros(50)})
    state = torch.get_rng_state()
    same(mask.sample(), mask.sample(seeded(0)), rtol=0, atol=0)
    same(mask.sample(seeded(5)), mask.sample(seeded(5)), rtol=0, atol=0)
    first, second = mask.sample(seeded(5)), mask.sample(seeded(6))
    assert not torch.equal(first["w"], second["w"])
    assert not torch.equal(first["v"], first["w"])
    assert torch.equal(state, torch.get_rng_state())
    assert all((x == 0).all() for x in mask.values())


def test_a_mask_as_a_mapping_and_in_one_line():
    mask = ConcreteMask({"v": torch.tensor([1.0, -1.0, 0.0, 2.0]), "w": -torch.ones(2, 3), "none": torch.zeros(0)})
    assert mask.kept() == {"v": 0.5, "w": 0.0, "none": 0.0}
    assert (list(mask), len(mask), mask["w"].shape) == (["v", "w", "none"], 3, (2, 3))
    assert repr(mask) == "ConcreteMask(3 tensors, 10 entries, temperature 0.5; History(0 steps))"


# ---------------------------------------------------------------- the slope of the logits


def test_slopes_by_hand():
    # μ = 1/2, so the mask of mean 1 is (0.4, 1.6); h = (1, 0), mean(h m̂) = 0.2; m (1 - m) = 0.16 twice.
    m, h = torch.tensor([0.2, 0.8]), torch.tensor([1.0, 0.0])
    assert slope_of_logits(h, m, 1.0).tolist() == pytest.approx([0.8 / 0.5 * 0.16, -0.2 / 0.5 * 0.16])
    assert slope_of_logits(h, m, 0.5).tolist() == pytest.approx([2 * 0.256, 2 * -0.064])
    flat = slope_of_logits(torch.ones(2), m, 1.0)
    assert flat.abs().max() < 1e-7, "what all entries gain alike is lost in the mean"


@pytest.mark.parametrize("temperature", [0.2, 0.5, 2.0])
def test_slopes_are_those_of_finite_differences_through_the_mean(temperature):
    x, weight, target = random(3, 4), random(3, 4, seed=1), random(3, 4, seed=2)

    def loss(x):
        m = relaxed(x, temperature, seeded())
        return ((m / m.mean() * weight - target) ** 2).sum(), m

    _, m = loss(x)
    h = 2 * (m / m.mean() * weight - target) * weight
    expected = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros(12, dtype=torch.float64)
        step[i] = 1e-5
        expected.view(-1)[i] = (loss(x + step.view(3, 4))[0] - loss(x - step.view(3, 4))[0]) / 2e-5
    torch.testing.assert_close(slope_of_logits(h, m, temperature), expected, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------- the descent


def in_turns(images, size):
    """Images as functions that give one batch after another, of everything in turn, and forget nothing."""
    given = {task: [] for task in images}

    def draw(task):
        def batch(count, generator):
            start = size * len(given[task])
            given[task].append(images[task][[(start + i) % 12 for i in range(size)]])
            return given[task][-1]

        return batch

    return {task: draw(task) for task in images}, given


def by_autograd(setting, coefficients, clamp, temperature, inner_rate, *, rate, steps, size, scale=0.3):
    """The same descents with torch.optim.Adam and autograd through mask, merge and network, in float64."""
    tv, net, heads, images = setting
    parameters, names = dict(net.named_parameters()), [name for name, _, _ in tv.layers()]
    logits = {name: torch.zeros_like(p, requires_grad=True) for name, p in parameters.items()}
    rows = len(names) if coefficients == "layer" else 1
    lambdas = torch.full((rows, len(tv)), scale, dtype=torch.float64, requires_grad=True)
    outer, inner = torch.optim.Adam(logits.values(), lr=rate), torch.optim.Adam([lambdas], lr=inner_rate)
    seed = int(torch.randint(1 << 62, (), generator=seeded(0)))
    noise = seeded(seed)

    def merged(lambdas, hats):
        kept = lambdas.clamp(0, 1) if clamp else lambdas
        rows = dict(zip(names, kept.expand(len(names), -1), strict=True))
        unmasked = merged_by_hand(tv, rows.__getitem__)
        state = {n: tv.base[n] + hats[n] * (t - tv.base[n]) if n in hats else t for n, t in unmasked.items()}
        return {n: t if n in parameters else t.detach() for n, t in state.items()}

    def batch(count):
        return {t: x[[(size * count + i) % 12 for i in range(size)]] for t, x in images.items()}

    losses, count = [], 0
    for _ in range(steps):
        images_of_mask, count = batch(count), count + 1
        hats = {}
        for name, x in logits.items():
            u = torch.rand(x.shape, generator=noise, dtype=torch.float64)
            m = 1 / (1 + torch.exp(-(x + torch.log(u / (1 - u))) / temperature))
            hats[name] = m / m.mean()
        lambdas.data.fill_(scale)
        if coefficients is not None:
            images_of_coefficients, count = batch(count), count + 1
            inner.zero_grad()
            held = {name: hat.detach() for name, hat in hats.items()}
            uncertainty(merged(lambdas, held), net, heads, images_of_coefficients).backward()
            inner.step()
        outer.zero_grad()
        loss = uncertainty(merged(lambdas.detach(), hats), net, heads, images_of_mask)
        loss.backward()
        outer.step()
        losses.append(loss.item())
    return logits, losses


@pytest.mark.parametrize(
    ("coefficients", "clamp", "inner_rate"),
    [(None, False, 1.0), ("layer", False, 0.2), ("layer", True, 1.0), ("task", True, 1.0), ("task", True, 0.05)],
)
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_the_descents_are_those_of_autograd_through_everything(coefficients, clamp, inner_rate, temperature):
    setting = problem()
    tv, net, heads, images = setting
    expected, losses = by_autograd(
        setting,
        coefficients,
        clamp,
        temperature=temperature,
        rate=0.1,
        inner_rate=inner_rate,
        scale=0.3,
        steps=6,
        size=5,
    )
    ours = learn_mask(
        tv,
        net,
        heads,
        in_turns(images, 5)[0],
        coefficients=coefficients,
        clamp=clamp,
        temperature=temperature,
        steps=6,
        learning_rate=0.1,
        inner_learning_rate=inner_rate,
        progress=False,
    )
    same(ours, {name: x.detach() for name, x in expected.items()}, rtol=1e-9, atol=1e-9)
    assert [3 * loss for loss in ours.history.average("loss").values()] == pytest.approx(losses, rel=1e-10)
    assert ours.temperature == temperature
    assert all(x.abs().max() > 0.1 for x in ours.values()), "Adam has moved every tensor's logits"


@pytest.mark.parametrize("generator", [None, 4])
def test_coefficients_and_mask_are_shown_different_images(generator):
    tv, net, heads, images = problem()
    seen = []

    def loss(task, inputs, logits):
        seen.append(sorted(inputs.mean((1, 2, 3)).tolist()))
        return mkl.entropy_loss(task, inputs, logits)

    generator = None if generator is None else seeded(generator)
    learn_mask(tv, net, heads, images, coefficients="task", clamp=True, loss=loss, generator=generator, **QUICK)
    steps = [seen[n : n + 6] for n in range(0, len(seen), 6)]  # three tasks for the coefficients, three for the mask
    assert len(steps) == 6
    assert all(batches[k] != batches[3 + k] for batches in steps for k in range(3))
    seen.clear()
    learn_mask(tv, net, heads, images, loss=loss, **QUICK)
    assert len(seen) == 6 * 3


def test_the_loss_falls():
    tv, net, heads, images = problem()
    options = {**QUICK, "steps": 60, "batch": 12}
    before = uncertainty(mkl.task_arithmetic(tv, scale=0.3), net, heads, images)
    merged = concrete(tv, net, heads, images, **options)
    assert uncertainty(merged, net, heads, images) < 0.9 * before
    experts = dict(zip(tv.names, tv._experts, strict=True))
    imitation = imitation_loss(net, experts, heads)
    losses = learn_mask(tv, net, heads, images, loss=imitation, **options).history.average("loss")
    assert sum(losses[n] for n in range(50, 60)) < 0.9 * sum(losses[n] for n in range(10))


def test_a_seed_repeats_it():
    tv, net, heads, images = problem()

    def run(seed=None):
        generator = None if seed is None else seeded(seed)
        return learn_mask(tv, net, heads, images, coefficients="task", clamp=True, generator=generator, **QUICK)

    state = torch.get_rng_state()
    same(run(), run(), rtol=0, atol=0)
    first, second = run(7), run(8)
    same(first, run(7), rtol=0, atol=0)
    assert all(not torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_that_was_given_is_changed():
    tv, net, heads, images = problem()
    net.train()
    scale = torch.full((3,), 0.3, dtype=torch.float64)
    states = [tv.base, *tv._experts, net.state_dict(), images, *(h.state_dict() for h in heads.values()), {"": scale}]
    before = [{name: t.clone() for name, t in state.items()} for state in states]
    learnt = learn_mask(tv, net, heads, images, coefficients="layer", clamp=True, scale=scale, **QUICK)
    mean = learnt.mean()
    kept = {name: m.clone() for name, m in mean.items()}
    merged = mkl.task_arithmetic(masked(tv, mean))
    for tensor in merged.values():
        tensor.zero_()
    for mask in ("mean", "sample"):
        concrete(tv, net, heads, images, adamerging="layer", clamp=True, coefficient_steps=2, mask=mask, **QUICK)
    for state, old in zip([*states, mean], [*before, kept], strict=True):
        same(state, old, rtol=0, atol=0)
    assert net.training
    assert all(p.grad is None for module in (net, *heads.values()) for p in module.parameters())
    assert learnt.history.steps == 6


def test_the_order_of_experts_does_not_matter():
    tv, net, heads, images = problem()
    for coefficients in (None, "layer"):
        options = {"coefficients": coefficients, "clamp": True, **QUICK}
        first = learn_mask(tv, net, heads, images, **options)
        second = learn_mask(tv.subset(["c", "a", "b"]), net, heads, {t: images[t] for t in "bca"}, **options)
        same(first, second, rtol=1e-7, atol=1e-9)


def test_what_one_sees_on_the_way_is_the_mean_mask_and_changes_nothing():
    tv, net, heads, images = problem()
    states = []

    def measure(state):
        states.append(state)
        return {"a": len(states) / 10}

    options = {"scale": [0.1, 0.2, 0.4], "coefficients": "task", "clamp": True, **QUICK}
    learnt = learn_mask(tv, net, heads, images, measure=measure, every=4, **options)
    assert learnt.history.seen["accuracy"] == {0: {"a": 0.1}, 4: {"a": 0.2}, 6: {"a": 0.3}}
    row = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    rows = {name: row for name, _, _ in tv.layers()}
    same(states[0], mkl.merge_with(tv, rows))
    same(states[-1], mkl.merge_with(masked(tv, learnt.mean()), rows))
    same(learnt, learn_mask(tv, net, heads, images, **options), rtol=0, atol=0)
    shares = learnt.history.seen["share kept"]
    assert shares[0] == {"mask": 0.0}
    positive = sum(int((x > 0).sum()) for x in learnt.values()) / sum(x.numel() for x in learnt.values())
    assert shares[6]["mask"] == pytest.approx(positive)
    assert 0.2 < positive < 0.8


# ---------------------------------------------------------------- masked task vectors


def test_masked_task_vectors_by_hand():
    base = {"v": torch.zeros(4), "w": torch.zeros(2)}
    experts = [
        {"v": torch.tensor([1.0, 2.0, 3.0, 4.0]), "w": torch.tensor([5.0, 6.0])},
        {"v": torch.tensor([0.0, -8.0, 0.0, 1.0]), "w": torch.tensor([1.0, 1.0])},
    ]
    tv = mkl.TaskVectors(base, experts)
    mask = {"v": torch.tensor([0.8, 0.2, 0.0, 1.0])}  # its mean is 1/2: (1.6, 0.4, 0, 2)
    changed = masked(tv, mask)
    assert changed.names == tv.names
    rows = changed.flat()
    torch.testing.assert_close(rows, torch.tensor([[1.6, 0.8, 0, 8, 5, 6], [0, -3.2, 0, 2, 1, 1]]))
    assert torch.equal(tv.flat(), torch.tensor([[1.0, 2, 3, 4, 5, 6], [0, -8, 0, 1, 1, 1]]))
    assert torch.equal(rows, changed.flat()), "each reading masks once"
    torch.testing.assert_close(masked(tv, {"v": 7 * mask["v"]}).flat(), rows)


def test_a_mask_keeps_the_amount_of_change_of_every_tensor():
    tv, *_ = problem()
    equal = tv.transform(lambda name, taus: torch.ones_like(taus))
    mask = {name: random(*theta0.shape).sigmoid() for name, theta0, _ in tv.layers()}
    for _, _, taus in masked(equal, mask).layers():
        torch.testing.assert_close(taus.flatten(1).mean(1), torch.ones(3, dtype=torch.float64))
        assert taus.numel() < 10 or taus.std() > 0.1
    alike = {name: torch.full_like(m, 0.2) for name, m in mask.items()}
    torch.testing.assert_close(masked(tv, alike).flat(), tv.flat())


def test_a_mask_that_does_not_fit_is_refused():
    tv, *_ = problem()
    for mask in (torch.zeros(5), torch.ones(1), torch.ones(()), torch.ones(2, 5)):
        with pytest.raises(ValueError, match=r"'4\.bias' needs a mask of shape \(5,\) that is not all 0"):
            masked(tv, {"4.bias": mask}).flat()


# ---------------------------------------------------------------- the merge


@pytest.mark.parametrize("adamerging", [None, "task", "layer"])
def test_before_the_first_step_it_is_task_arithmetic(tv, adamerging):
    heads, images = {"expert 0": nn.Identity()}, {"expert 0": torch.randn(2, 3, 3, 3)}
    none = {"steps": 0, "coefficient_steps": 0, "progress": False}
    merged = concrete(tv, small_net(0), heads, images, adamerging=adamerging, **none)
    same(merged, mkl.task_arithmetic(tv, scale=0.3))
    beyond = concrete(tv, small_net(0), heads, images, adamerging=adamerging, scale=1.7, **none)
    same(beyond, mkl.task_arithmetic(tv, scale=1.7))  # by default there are no bounds


def test_float64_is_merged_in_float64():
    tv, net, heads, images = problem()
    merged = concrete(tv, net, heads, images, steps=0, scale=0.1, progress=False)
    expected = merged_by_hand(tv, lambda name: torch.full((3,), 0.1, dtype=torch.float64))
    same(merged, expected, rtol=1e-14, atol=1e-14)  # 0.1 in float32 is wrong in the ninth digit


@pytest.mark.parametrize("mask", ["mean", "sample"])
@pytest.mark.parametrize("adamerging", [None, "task", "layer"])
def test_it_is_mask_then_coefficients(adamerging, mask):
    tv, net, heads, images = problem()
    loss = imitation_loss(net, dict(zip(tv.names, tv._experts, strict=True)), heads)
    common = {"loss": loss, "batch": 4, "progress": False}
    merged = concrete(
        tv,
        net,
        heads,
        images,
        adamerging=adamerging,
        mask=mask,
        scale=0.2,
        coefficient_steps=4,
        coefficient_learning_rate=0.02,
        clamp=True,
        generator=seeded(3),
        steps=4,
        learning_rate=0.1,
        **common,
    )
    generator = seeded(3)
    options = {"scale": 0.2, "clamp": True, "steps": 4, "learning_rate": 0.1, "generator": generator}
    learnt = learn_mask(tv, net, heads, images, coefficients=adamerging, **options, **common)
    fixed = masked(tv, learnt.mean() if mask == "mean" else learnt.sample(generator))
    if adamerging is None:
        expected = mkl.task_arithmetic(fixed, scale=0.2)
    else:
        options = {"init": 0.2, "clamp": True, "steps": 4, "learning_rate": 0.02, "generator": generator}
        found = mkl.learn_coefficients(fixed, net, heads, images, granularity=adamerging, **options, **common)
        expected = mkl.merge_with(fixed, found)
    same(merged, expected, rtol=1e-9, atol=1e-12)
    plain = mkl.task_arithmetic(tv, scale=0.2)
    assert not torch.allclose(merged["4.weight"], plain["4.weight"], atol=1e-2)


def test_statistics_have_no_mask_and_unused_weights_no_slope():
    class Half(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.used, self.unused = tiny_net(seed), nn.Linear(2, 2).double()

        def forward(self, x):
            return self.used(x)

    _, _, heads, images = problem(2)
    tv = mkl.TaskVectors(Half(0), {"a": Half(1), "b": Half(2)})
    learnt = learn_mask(tv, Half(0), heads, images, **QUICK)
    assert set(learnt) == {name for name, _ in Half(0).named_parameters()}
    assert (learnt["unused.weight"] == 0).all()
    merged = concrete(tv, Half(0), heads, images, **QUICK)
    plain = mkl.task_arithmetic(tv, scale=0.3)
    for name in ("used.1.running_mean", "used.1.running_var", "unused.weight"):
        torch.testing.assert_close(merged[name], plain[name])
    assert not torch.allclose(merged["used.0.weight"], plain["used.0.weight"])


def test_one_expert_and_no_change():
    tv, net, heads, images = problem(1)
    learnt = learn_mask(tv, net, heads, images, **QUICK)
    assert all(x.abs().max() > 0 for x in learnt.values())
    zero = mkl.TaskVectors(tv.base, {"a": tv.base, "b": tv.base})
    for adamerging in (None, "layer"):
        for mask in ("mean", "sample"):
            options = {"adamerging": adamerging, "mask": mask, "coefficient_steps": 2, **QUICK}
            same(concrete(zero, net, heads, images, **options), tv.base, rtol=0, atol=0)


def test_tensors_without_axes_and_without_entries():
    tv, net, heads, images = odd_problem()
    for coefficients in (None, "layer"):
        learnt = learn_mask(tv, net, heads, images, coefficients=coefficients, **QUICK)
        for mask in (learnt.mean(), learnt.sample()):
            merged = mkl.task_arithmetic(masked(tv, mask))
            assert merged["scale"].item() == pytest.approx(1 + 0.3 * (1 - 2)), "one entry alone is always the mean"
            assert merged["none"].shape == (0, 3)
            assert torch.isfinite(merged["weight"]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_precisions(dtype):
    tv, net, heads, images = problem()
    states = [{n: t.to(dtype) if t.is_floating_point() else t for n, t in s.items()} for s in (tv.base, *tv._experts)]
    coarse = mkl.TaskVectors(states[0], dict(zip(tv.names, states[1:], strict=True)))
    options = {**QUICK, "adamerging": "layer", "clamp": True, "coefficient_steps": 2, "inner_learning_rate": 0.1}
    exact = concrete(tv, net, heads, images, steps=0, **{n: v for n, v in options.items() if n != "steps"})
    heads = {task: head.to(dtype) for task, head in heads.items()}
    merged = concrete(coarse, net.to(dtype), heads, {t: x.to(dtype) for t, x in images.items()}, **options)
    assert all(merged[name].dtype == states[0][name].dtype for name in merged)
    assert all(torch.isfinite(t).all() for t in merged.values())
    for name in exact:
        assert (merged[name].double() - exact[name].double()).abs().max() < 1.0
    mixed = learn_mask(coarse, tiny_net(), problem()[2], images, **QUICK)  # the network is in float64, all the same
    assert {x.dtype for x in mixed.values()} == {torch.float32}


# ---------------------------------------------------------------- wrong input


def test_wrong_input_says_why():
    tv, net, heads, images = problem()

    def run(heads=heads, images=images, **options):
        concrete(tv, net, heads, images, **{**QUICK, **options})

    with pytest.raises(ValueError, match="mask must be 'mean' or 'sample'; got 'round'"):
        run(mask="round")
    with pytest.raises(ValueError, match="granularity must be one of layer, task; got 'row'"):
        run(adamerging="row")
    for name in ("temperature", "learning_rate", "inner_learning_rate"):
        for value in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"must be positive and finite; got {value}"):
                run(**{name: value})
    with pytest.raises(ValueError, match=r"outside \[0, 1\] would be clamped and never move; use clamp=False"):
        run(scale=1.5, clamp=True)
    with pytest.raises(ValueError, match="init must be finite"):
        run(scale=math.nan)
    with pytest.raises(KeyError, match="no head for the task 'z'; there are heads for a, b, c"):
        run(images={**images, "z": images["a"]})
    with pytest.raises(ValueError, match="no images of the task 'c'"):
        run(images={**images, "c": images["c"][:0]})
    with pytest.raises(ValueError, match="steps must not be negative"):
        run(steps=-1)
    with pytest.raises(TypeError, match="density"):
        run(density=0.2)
    with pytest.raises(KeyError, match=r"the model has no tensor '4\.weight'"):
        learn_mask(tv, net[:3], heads, images, **QUICK)


@pytest.mark.parametrize("coefficients", [None, "layer"])
def test_what_was_reached_before_an_image_was_bad_is_kept(coefficients):
    tv, net, heads, images = problem()
    bad = 7 if coefficients is None else 12  # with coefficients, every second batch is theirs
    taken = []

    def camera(count, generator):
        taken.append(count)
        return images["b"] * (math.nan if len(taken) == bad else 1.0)

    given, options = {"a": images["a"], "b": camera}, {**QUICK, "coefficients": coefficients, "clamp": True}
    done = 6 if coefficients is None else 5
    with pytest.raises(mkl.DivergenceError, match=f"after {done} steps") as stopped:
        learn_mask(tv, net, heads, given, **options | {"steps": 20})
    taken.clear()
    same(stopped.value.reached, learn_mask(tv, net, heads, given, **options | {"steps": done}), rtol=0, atol=0)
    assert stopped.value.reached.history is stopped.value.history
    assert stopped.value.history.steps == done
