"""MaTS against dense linear algebra: written out, the system has a few dozen rows."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekit_lite as mkl
from mergekit_lite.calibrated.preconditioners import approximate_inverse, nearest_product
from tests.calibrated.examples import SHAPES, gram, kronecker, layer, of, written_out
from tests.data_free.test_tsv import random

PRECONDITIONERS = ("none", "jacobi", "kronecker")
# Enough to end where rounding ends.
EXACT = {"iterations": 3000, "tolerance": 1e-13}


def dense_solution(weights, matrices):
    """The solution of (Σ C) x = Σ C x_k by numpy."""
    total = sum(matrices).numpy()
    right = sum(c @ w.flatten() for c, w in zip(matrices, weights, strict=True)).numpy()
    return torch.from_numpy(np.linalg.solve(total, right)).view(weights[0].shape)


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


class Record(defaultdict):
    """What `watch` sees: a list of (step, tau, residual) by tensor."""

    def __init__(self):
        super().__init__(list)

    def __call__(self, name, step, tau, residual):
        self[name].append((step, tau, residual))


# ---------------------------------------------------------------- by hand


def test_mats_by_hand():
    # One output, two inputs: C = b A. Σ b A = 2 [[1, 0], [0, 2]] + 1 [[2, 1], [1, 1]] = [[4, 1], [1, 5]], and
    # Σ w b A = 2 (1, 2) [[1, 0], [0, 2]] + (3, 0) [[2, 1], [1, 1]] = (2, 8) + (6, 3) = (8, 11).
    blocks = of(
        mkl.Kronecker(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[2.0]]])),
        mkl.Kronecker(torch.tensor([[[2.0, 1.0], [1.0, 1.0]]]), torch.tensor([[[1.0]]])),
    )
    tv = layer(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]))
    for preconditioner in PRECONDITIONERS:
        merged = mkl.mats(tv, blocks, preconditioner=preconditioner)["w"]
        torch.testing.assert_close(merged, torch.tensor([[29 / 19, 36 / 19]]))


# ---------------------------------------------------------------- against the dense system


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_kfac_blocks_against_the_dense_solution(shape, groups, preconditioner):
    weights = random(3, *shape)
    blocks = [kronecker(shape, groups, seed=k) for k in range(3)]
    expected = dense_solution(weights, [written_out(block, shape) for block in blocks])
    merged = mkl.mats(layer(*weights), of(*blocks), preconditioner=preconditioner, **EXACT)["w"]
    assert relative(merged, expected) < 1e-7
    assert relative(weights.mean(0), expected) > 0.05, "it is no trivial system"


def test_numpys_kronecker_products():
    """The same once more without any code of ours: outputs are rows, so B comes first."""
    weights, blocks = random(3, 6, 5), [kronecker((6, 5), seed=k) for k in range(3)]
    matrices = [torch.from_numpy(np.kron(b.outputs[0], b.inputs[0])) for b in blocks]
    merged = mkl.mats(layer(*weights), of(*blocks), **EXACT)["w"]
    assert relative(merged, dense_solution(weights, matrices)) < 1e-8


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_input_grams_give_regmean(preconditioner):
    for shape, groups in SHAPES:
        weights = random(3, *shape)
        grams = of(*(mkl.Kronecker(inputs=kronecker(shape, groups, seed=k).inputs) for k in range(3)))
        merged = mkl.mats(layer(*weights), grams, preconditioner=preconditioner, **EXACT)["w"]
        assert relative(merged, mkl.regmean(layer(*weights), grams)["w"]) < 1e-8


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_diagonals_give_fisher(preconditioner):
    weights = random(3, 4, 3)
    fishers = of(*map(mkl.Diagonal, random(3, 4, 3, seed=1).square() + 0.01))
    merged = mkl.mats(layer(*weights), fishers, preconditioner=preconditioner, **EXACT)["w"]
    assert relative(merged, mkl.fisher(layer(*weights), fishers)["w"]) < 1e-8


def test_no_curvature_gives_the_average(tv):
    merged, mean = mkl.mats(tv, [{}, {}, {}]), mkl.average(tv)
    for name in mean:
        torch.testing.assert_close(merged[name], mean[name])
        assert merged[name].dtype == mean[name].dtype


def test_the_identity_gives_the_average_in_one_step():
    weights, record = random(3, 4), Record()
    merged = mkl.mats(layer(*weights), of(*[lambda v: v] * 3), init={"w": random(4, seed=5)}, watch=record)["w"]
    torch.testing.assert_close(merged, weights.mean(0))
    assert len(record["w"]) == 2


def test_linear_functions_of_your_own():
    """Any symmetric matrix without negative eigenvalues: here whole ones, which no block can write down."""
    weights, matrices = random(3, 2, 3), [gram(1, 6, seed=k)[0] for k in range(3)]
    functions = of(*(lambda v, c=c: (c @ v.flatten()).view(v.shape) for c in matrices))
    merged = mkl.mats(layer(*weights), functions, **EXACT)["w"]
    assert relative(merged, dense_solution(weights, matrices)) < 1e-8


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_experts_may_know_different_things_about_a_tensor(preconditioner):
    weights, shape = random(3, 4, 3), (4, 3)
    blocks = [kronecker(shape), mkl.Diagonal(random(4, 3).square()), mkl.Diagonal(random(4, 3, seed=2).square())]
    merged = mkl.mats(layer(*weights), of(*blocks), preconditioner=preconditioner, **EXACT)["w"]
    assert relative(merged, dense_solution(weights, [written_out(b, shape) for b in blocks])) < 1e-8


def test_a_model_of_several_tensors(base, experts, tv):
    """From images to the merge: each tensor is its own system, with the block its experts have."""
    images = [torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    gathered = [mkl.kfac(model, [x], labels="expected").damped(0.01) for model, x in zip(experts, images, strict=True)]
    base.load_state_dict(mkl.mats(tv, gathered, preconditioner="kronecker", **EXACT))
    for name in gathered[0]:
        shape = tv.base[name].shape
        weights = [model.state_dict()[name].double() for model in experts]
        expected = dense_solution(weights, [written_out(c[name], shape) for c in gathered])
        torch.testing.assert_close(base.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- what the steps do


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_residuals_can_be_watched(preconditioner):
    weights, shape, record = random(3, 6, 5), (6, 5), Record()
    blocks, base = [kronecker(shape, seed=k) for k in range(3)], random(6, 5, seed=9)
    tv = layer(*weights, base=base)
    merged = mkl.mats(tv, of(*blocks), tolerance=1e-6, preconditioner=preconditioner, watch=record)
    assert list(record) == ["w"]
    steps, taus, residuals = zip(*record["w"], strict=True)
    assert steps == tuple(range(len(steps)))
    total = sum(written_out(b, shape) for b in blocks)
    right = sum(written_out(b, shape) @ (w - base).flatten() for b, w in zip(blocks, weights, strict=True))
    for tau, residual in zip(taus, residuals, strict=True):
        assert tau.shape == shape
        assert residual == pytest.approx(((right - total @ tau.flatten()).norm() / right.norm()).item(), rel=1e-4)
    assert residuals[-1] <= 1e-6 < min(residuals[:-1]), "it stops as soon as it may"
    torch.testing.assert_close(taus[0], weights.mean(0) - base)
    torch.testing.assert_close(merged["w"], base + taus[-1])


def test_the_number_of_steps_is_bounded():
    weights, blocks = random(3, 6, 5), of(*(kronecker((6, 5), seed=k) for k in range(3)))
    for iterations in (0, 1, 4):
        record = Record()
        mkl.mats(layer(*weights), blocks, iterations=iterations, tolerance=0.0, watch=record)
        assert len(record["w"]) == iterations + 1
    record = Record()
    mkl.mats(layer(*weights), blocks, tolerance=1e9, watch=record)
    assert len(record["w"]) == 1


def test_every_step_costs_the_tasks_less():
    weights, shape, record = random(3, 6, 5), (6, 5), Record()
    blocks = [kronecker(shape, seed=k) for k in range(3)]
    base = random(6, 5, seed=9)
    mkl.mats(layer(*weights, base=base), of(*blocks), iterations=20, watch=record)
    costs = [
        sum(((base + tau - w) * b(base + tau - w)).sum().item() for b, w in zip(blocks, weights, strict=True))
        for _, tau, _ in record["w"]
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.9 * costs[0]


def test_all_tensors_with_curvature_are_watched(tv):
    record = Record()
    curvatures = [
        {"3.bias": mkl.Diagonal(random(5, seed=k).square()), "0.bias": mkl.Diagonal(random(4, seed=k).square())}
        for k in range(3)
    ]
    mkl.mats(tv, curvatures, watch=record)
    assert list(record) == ["0.bias", "3.bias"]


# ---------------------------------------------------------------- where it starts


def test_no_step_leaves_the_start():
    weights, start = random(3, 4, 3), random(4, 3, seed=7)
    tv, blocks = layer(*weights), of(*(kronecker((4, 3), seed=k) for k in range(3)))
    torch.testing.assert_close(mkl.mats(tv, blocks, init={"w": start}, iterations=0)["w"], start)
    torch.testing.assert_close(mkl.mats(tv, blocks, iterations=0)["w"], weights.mean(0))
    solution = mkl.mats(tv, blocks, **EXACT)
    record = Record()
    again = mkl.mats(tv, blocks, init=solution, watch=record)["w"]
    torch.testing.assert_close(again, solution["w"])
    assert len(record["w"]) == 1


def test_the_start_does_not_matter_in_the_end():
    tv, blocks = layer(*random(3, 4, 3)), of(*(kronecker((4, 3), seed=k) for k in range(3)))
    ends = [mkl.mats(tv, blocks, init=init, **EXACT)["w"] for init in (None, {"w": 10 * random(4, 3, seed=7)})]
    torch.testing.assert_close(*ends)


def test_where_no_task_has_curvature_the_merge_stays_where_it_began():
    weights, start = random(2, 4, 8), random(4, 8, seed=7)
    x = random(2, 3, 8, seed=1)  # six directions of eight
    grams = of(*(mkl.Kronecker(inputs=(a.T @ a)[None]) for a in x))
    unseen = torch.from_numpy(np.linalg.svd(np.concatenate(list(x.numpy())))[2][6:]).T
    for preconditioner in ("none", "kronecker"):
        options = {**EXACT, "preconditioner": preconditioner}
        merged = mkl.mats(layer(*weights), grams, init={"w": start}, **options)["w"]
        torch.testing.assert_close(merged @ unseen, start @ unseen)
        merged = mkl.mats(layer(*weights), grams, **options)["w"]
        assert relative(merged, mkl.regmean(layer(*weights), grams)["w"]) < 1e-7
    fishers = of(*(mkl.Diagonal(torch.tensor([[1.0, 0.0]])), mkl.Diagonal(torch.tensor([[3.0, 0.0]]))))
    tv = layer(torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 4.0]]))
    for preconditioner in PRECONDITIONERS:
        merged = mkl.mats(tv, fishers, init={"w": torch.tensor([[9.0, 9.0]])}, preconditioner=preconditioner)["w"]
        torch.testing.assert_close(merged, torch.tensor([[4.0, 9.0]]))


def test_of_all_solutions_the_one_nearest_to_the_start_is_found_without_a_preconditioner():
    weights, shape, start = random(2, 4, 5), (4, 5), random(4, 5, seed=7)
    blocks = [mkl.Kronecker(gram(1, 5, rank=2, seed=k), gram(1, 4, rank=1, seed=k + 9)) for k in range(2)]
    total = sum(written_out(b, shape) for b in blocks)
    right = sum(written_out(b, shape) @ w.flatten() for b, w in zip(blocks, weights, strict=True))
    nearest = start.flatten() + torch.linalg.pinv(total, hermitian=True, rtol=1e-9) @ (right - total @ start.flatten())
    for preconditioner in PRECONDITIONERS:
        options = {**EXACT, "preconditioner": preconditioner, "init": {"w": start}}
        merged = mkl.mats(layer(*weights), of(*blocks), **options)["w"].flatten()
        assert relative(total @ merged, right) < 1e-9, "all are solutions"
        assert (relative(merged, nearest) < 1e-8) == (preconditioner == "none")


# ---------------------------------------------------------------- preconditioners


def rearranged(matrix, outputs, inputs):
    """Van Loan and Pitsianis: B ⊗ A as the matrix of rank one vec(B) vec(A)ᵀ."""
    return matrix.reshape(outputs, inputs, outputs, inputs).permute(0, 2, 1, 3).reshape(outputs**2, inputs**2)


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_the_nearest_product_is_the_leading_singular_triple_of_the_rearranged_sum(shape, groups):
    """Of each group: numpy's decomposition of the dense sum, written out and rearranged."""
    blocks = [kronecker(shape, groups, seed=k) for k in range(3)]
    ours = nearest_product(blocks)
    outputs, inputs = shape[0] // groups, torch.Size(shape[1:]).numel()
    for g in range(groups):
        dense = sum(torch.kron(b.outputs[g], b.inputs[g]) for b in blocks)
        u, s, v = np.linalg.svd(rearranged(dense, outputs, inputs).numpy())
        nearest = s[0] * np.outer(u[:, 0], v[0])
        found = rearranged(torch.kron(ours.outputs[g], ours.inputs[g]), outputs, inputs).numpy()
        np.testing.assert_allclose(found, nearest, rtol=1e-6, atol=1e-9 * s[0])
        assert torch.linalg.eigvalsh(ours.inputs[g]).min() > 0
        assert torch.linalg.eigvalsh(ours.outputs[g]).min() > 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(-15, 15), st.floats(-15, 15))
def test_the_nearest_product_has_the_unit_of_its_terms(seed, a, b):
    """Squared gradients are tiny, and their squares tinier."""
    blocks = [kronecker((4, 3), seed=seed + k) for k in range(3)]
    scaled = [mkl.Kronecker(10**a * block.inputs, 10**b * block.outputs) for block in blocks]
    expected = 10 ** (a + b) * written_out(nearest_product(blocks), (4, 3))
    torch.testing.assert_close(written_out(nearest_product(scaled), (4, 3)), expected, rtol=1e-8, atol=0)


def test_products_of_one_factor_are_summed_exactly():
    blocks = [kronecker((4, 3), seed=k) for k in range(3)]
    for name in ("inputs", "outputs"):
        some = [mkl.Kronecker(**{name: getattr(block, name)}) for block in blocks]
        torch.testing.assert_close(getattr(nearest_product(some), name), sum(getattr(b, name) for b in blocks))
    with pytest.raises(ValueError, match="must have the same factors"):
        nearest_product([blocks[0], mkl.Kronecker(inputs=blocks[1].inputs)])


def steps_needed(weights, blocks, preconditioner, **options):
    record = Record()
    options = {"iterations": 2000, "tolerance": 1e-8, **options}
    mkl.mats(layer(*weights), of(*blocks), preconditioner=preconditioner, watch=record, **options)
    assert record["w"][-1][2] <= options["tolerance"]
    return len(record["w"]) - 1


def test_where_the_sum_is_a_product_one_step_is_enough():
    weights, shape = random(3, 4, 3), (4, 3)
    one = kronecker(shape)
    proportional = [one, one.scaled(0.1), one.scaled(7.0)]
    same_inputs = [mkl.Kronecker(one.inputs, gram(1, 4, seed=k)) for k in range(3)]
    assert steps_needed(weights, proportional, "kronecker", tolerance=1e-10) <= 1
    assert steps_needed(weights, same_inputs, "kronecker", tolerance=1e-10) == 1
    assert steps_needed(weights, same_inputs, "none", tolerance=1e-10) > 5
    diagonals = list(map(mkl.Diagonal, random(3, 4, 3).square() + 0.1))
    assert steps_needed(weights, diagonals, "jacobi", tolerance=1e-10) == 1
    assert steps_needed(weights, diagonals, "kronecker", tolerance=1e-10) == 1, "diagonals are no products"


def test_depthwise_layers_of_very_different_channels_take_one_step():
    """With one output per group the sum is a product in each, whatever the unit of its gradients."""
    weights, units = random(3, 5, 1, 3, 3), torch.logspace(-14, 2, 5, dtype=torch.float64)
    blocks = [
        mkl.Kronecker(gram(5, 9, seed=k) * units.flip(0)[:, None, None], (units * (k + 1)).view(5, 1, 1) * 1e-6)
        for k in range(3)
    ]
    assert steps_needed(weights, blocks, "kronecker") <= 2
    assert steps_needed(weights, blocks, "none") > 5


def test_a_dead_channel_disturbs_no_other():
    weights = random(3, 3, 1, 2, 2)
    alive = torch.tensor([1.0, 0.0, 1.0]).double().view(3, 1, 1)
    blocks = [
        mkl.Kronecker(gram(3, 4, seed=k) * (alive if k else 1), gram(3, 1, seed=k + 5) * (1 if k else alive))
        for k in range(3)
    ]
    for preconditioner in PRECONDITIONERS:
        merged = mkl.mats(layer(*weights), of(*blocks), preconditioner=preconditioner, **EXACT)["w"]
        torch.testing.assert_close(merged[1], weights[:, 1].mean(0))
        for g in (0, 2):
            matrices = [b.outputs[g, 0, 0] * b.inputs[g] for b in blocks]
            expected = dense_solution(weights[:, g], matrices)
            assert relative(merged[g], expected) < 1e-7


def test_no_task_is_left_out_of_the_preconditioner():
    """Tasks whose inputs and outputs are perpendicular: the nearest product is the larger of the two alone."""
    one, two = torch.diag(torch.tensor([1.0, 0.0]).double())[None], torch.diag(torch.tensor([0.0, 0.5]).double())[None]
    weights = random(2, 2, 2)
    merged = mkl.mats(
        layer(*weights), of(mkl.Kronecker(one, one), mkl.Kronecker(two, two)), preconditioner="kronecker"
    )["w"]
    expected = weights.mean(0)
    expected[0, 0], expected[1, 1] = weights[0, 0, 0], weights[1, 1, 1]
    torch.testing.assert_close(merged, expected)


def test_preconditioners_save_steps_where_scales_differ():
    shape, weights = (6, 5), random(3, 6, 5)
    scales = torch.logspace(-1, 1, 5, dtype=torch.float64)
    blocks = [
        mkl.Kronecker(scales[:, None] * (gram(1, 5, seed=k) + 3 * gram(1, 5, seed=50)) * scales, gram(1, 6, seed=k))
        for k in range(3)
    ]
    plain, jacobi, product = (steps_needed(weights, blocks, preconditioner) for preconditioner in PRECONDITIONERS)
    assert product < plain
    assert jacobi < plain
    inverse = approximate_inverse(blocks, weights[0], "jacobi")
    diagonal = sum(written_out(b, shape).diagonal().view(shape) for b in blocks)
    torch.testing.assert_close(inverse(weights[0]), weights[0] / diagonal)
    assert approximate_inverse(blocks, weights[0], "none") is None


# ---------------------------------------------------------------- what it does


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(3)), st.floats(-12, 12), st.sampled_from(PRECONDITIONERS))
def test_neither_the_order_nor_a_common_unit_matters(seed, order, unit, preconditioner):
    weights, blocks = random(3, 4, 3, seed=seed), [kronecker((4, 3), seed=seed + k) for k in range(3)]
    options = {"iterations": 500, "tolerance": 1e-12, "preconditioner": preconditioner}
    expected = mkl.mats(layer(*weights), of(*blocks), **options)["w"]
    turned = of(*(blocks[k].scaled(10**unit) for k in order))
    merged = mkl.mats(layer(*weights[list(order)]), turned, **options)["w"]
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_copies_of_one_expert_and_one_expert_give_that_expert(preconditioner):
    expert, options = random(4, 3), {"preconditioner": preconditioner, **EXACT}
    blocks = [kronecker((4, 3), rank=1, seed=k) for k in range(3)]
    torch.testing.assert_close(mkl.mats(layer(expert, expert, expert), of(*blocks), **options)["w"], expert)
    torch.testing.assert_close(mkl.mats(layer(expert), of(blocks[0]), **options)["w"], expert)


def test_curvatures_by_name_and_with_weights():
    weights, blocks = random(2, 4, 3), [kronecker((4, 3), seed=k) for k in range(2)]
    tv = mkl.TaskVectors({"w": random(4, 3, seed=9)}, {"a": {"w": weights[0]}, "b": {"w": weights[1]}})
    by_name = {"b": mkl.Curvature({"w": blocks[1]}), "a": 5 * mkl.Curvature({"w": blocks[0]})}
    expected = dense_solution(weights, [5 * written_out(blocks[0], (4, 3)), written_out(blocks[1], (4, 3))])
    assert relative(mkl.mats(tv, by_name, **EXACT)["w"], expected) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_experts_in_any_precision(dtype, preconditioner):
    weights, blocks = random(3, 4, 3).to(dtype), [kronecker((4, 3), seed=k) for k in range(3)]
    tv = layer(*weights, base=torch.zeros(4, 3, dtype=dtype))
    merged = mkl.mats(tv, of(*blocks), preconditioner=preconditioner, **EXACT)["w"]
    exact = dense_solution(weights.double(), [written_out(b, (4, 3)) for b in blocks])
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    start = random(4, 3, seed=5).to(dtype)
    assert torch.equal(mkl.mats(tv, of(*blocks), init={"w": start}, iterations=0)["w"], start)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_computing_in_float32(preconditioner):
    weights, blocks = random(3, 6, 5), of(*(kronecker((6, 5), seed=k) for k in range(3)))
    exact, record = mkl.mats(layer(*weights), blocks, **EXACT)["w"], Record()
    options = {"preconditioner": preconditioner, "dtype": torch.float32, "iterations": 500, "tolerance": 1e-6}
    merged = mkl.mats(layer(*weights), blocks, watch=record, **options)["w"]
    assert merged.dtype == torch.float64
    assert all(tau.dtype == torch.float32 for _, tau, _ in record["w"])
    assert 1e-12 < relative(merged, exact) < 1e-3


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_tiny_gradients_are_none_too_small_for_float32(preconditioner):
    """Where an expert knows its images by heart, B is tiny, and squares of residuals would be zero in float32."""
    weights, blocks = random(3, 4, 3), [kronecker((4, 3), seed=k) for k in range(3)]
    tiny = of(*(mkl.Kronecker(b.inputs, 1e-25 * b.outputs) for b in blocks))
    options = {"preconditioner": preconditioner, "dtype": torch.float32}
    expected = dense_solution(weights, [written_out(b, (4, 3)) for b in blocks])
    assert relative(mkl.mats(layer(*weights), tiny, **options)["w"], expected) < 1e-4


def test_inputs_are_not_changed():
    weights, blocks = random(3, 4, 3), [kronecker((4, 3), seed=k) for k in range(3)]
    base, init = random(4, 3, seed=9), {"w": random(4, 3, seed=8)}
    given_tensors = [weights, base, init["w"], *(m for b in blocks for m in b.factors().values())]
    before = [t.clone() for t in given_tensors]
    for preconditioner in PRECONDITIONERS:
        mkl.mats(layer(*weights, base=base), of(*blocks), init=init, preconditioner=preconditioner)["w"].zero_()
    assert all(torch.equal(old, new) for old, new in zip(before, given_tensors, strict=True))


def test_tied_names_stay_tied_and_are_merged_once():
    def tied(weight):
        return {"embed.weight": weight, "head.weight": weight}

    weights, blocks, record = random(2, 3, 3), [kronecker((3, 3), seed=k) for k in range(2)], Record()
    curvatures = [{"embed.weight": block, "head.weight": block} for block in blocks]
    tv = mkl.TaskVectors(tied(random(3, 3, seed=5)), [tied(w) for w in weights])
    merged = mkl.mats(tv, curvatures, watch=record, **EXACT)
    assert merged["head.weight"] is merged["embed.weight"]
    assert list(record) == ["embed.weight"]
    assert relative(merged["head.weight"], dense_solution(weights, [written_out(b, (3, 3)) for b in blocks])) < 1e-8


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_files_are_merged_as_models_are(tv, tmp_path, preconditioner):
    curvatures = {
        name: {"3.weight": kronecker((5, 4), seed=k), "3.bias": mkl.Diagonal(random(5, seed=k).square())}
        for k, name in enumerate(tv.names)
    }
    options = {"curvatures": curvatures, "preconditioner": preconditioner, "init": mkl.task_arithmetic(tv, scale=0.3)}
    files = ["base", *(f"expert {k}" for k in range(len(tv)))]
    states = [tv.base, *(mkl.average(tv[k]) for k in range(len(tv)))]
    paths = [mkl.save(dict(state), tmp_path / f"{f}.safetensors") for f, state in zip(files, states, strict=True)]
    merged = mkl.load(mkl.merge_files(mkl.mats, paths[0], paths[1:], tmp_path / "out.safetensors", **options))
    expected = mkl.mats(tv, **options)
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], t) for name, t in expected.items())


def test_tensors_without_numbers():
    for shape in ((0, 3), (3, 0), ()):
        ones = torch.ones(shape, dtype=torch.float64)
        for preconditioner in PRECONDITIONERS:
            fishers = of(mkl.Diagonal(ones), mkl.Diagonal(3 * ones))
            tv = layer(0 * ones, ones, base=5 * ones)
            merged = mkl.mats(tv, fishers, preconditioner=preconditioner)["w"]
            torch.testing.assert_close(merged, 0.75 * ones)


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preconditioner": "jacobian"}, "preconditioner must be one of none, jacobi, kronecker; got 'jacobian'"),
        ({"iterations": -1}, "iterations must be finite and not negative; got -1"),
        ({"tolerance": -1e-9}, "tolerance must be finite and not negative"),
        ({"tolerance": math.nan}, "tolerance must be finite and not negative"),
        ({"init": {"w": torch.ones(3, 4)}}, r"'w' has shape \(3, 4\) instead of \(4, 3\)"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        mkl.mats(layer(*random(2, 4, 3)), of(kronecker((4, 3)), kronecker((4, 3), seed=1)), **options)


def test_curvatures_that_do_not_fit():
    tv, blocks = layer(*random(2, 4, 3)), of(kronecker((4, 3)), kronecker((4, 3), seed=1))
    with pytest.raises(ValueError, match="2 experts need as many curvatures; got 1"):
        mkl.mats(tv, blocks[:1])
    with pytest.raises(KeyError, match="no curvature for the expert 'expert 1'"):
        mkl.mats(tv, {"expert 0": blocks[0]})
    with pytest.raises(KeyError, match="only 1 of 2 experts have a curvature for 'w'"):
        mkl.mats(tv, [blocks[0], {}])
    with pytest.raises(KeyError, match="'v', which is no tensor of the model"):
        mkl.mats(tv, [blocks[0], {"v": blocks[1]["w"]}])
    with pytest.raises(KeyError, match="the state dict to start from lacks 'w'"):
        mkl.mats(tv, blocks, init={})
    for preconditioner in ("jacobi", "kronecker"):
        with pytest.raises(TypeError, match="for functions of your own use 'none'"):
            mkl.mats(tv, of(lambda v: v, blocks[1]["w"]), preconditioner=preconditioner)
