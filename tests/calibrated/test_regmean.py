"""RegMean: the weights whose outputs are nearest to the experts' outputs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mergekit_lite as mkl
from tests.calibrated.examples import SHAPES, gram, kronecker, layer, of
from tests.data_free.test_tsv import random


def inputs(*grams):
    return of(*(mkl.Kronecker(inputs=gram if gram.ndim == 3 else gram[None]) for gram in grams))


# ---------------------------------------------------------------- by hand


def test_regmean_by_hand():
    w1, w2 = torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 3.0]])
    g1, g2 = torch.tensor([[2.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    # G1 + G2 = [[3, 1], [1, 4]], inverse [[4, -1], [-1, 3]] / 11; W1 G1 + W2 G2 = [[2, 4], [6, 12]].
    expected = torch.tensor([[4.0, 10.0], [12.0, 30.0]]) / 11
    torch.testing.assert_close(mkl.regmean(layer(w1, w2), inputs(g1, g2))["w"], expected)
    # alpha = 1/2: G1 = [[2, .5], [.5, 1]], so [[3, .5], [.5, 4]], inverse [[4, -.5], [-.5, 3]] / 11.75;
    # W1 G1 + W2 G2 = [[2, 3.5], [5.5, 11]].
    expected = torch.tensor([[6.25, 9.5], [16.5, 30.25]]) / 11.75
    torch.testing.assert_close(mkl.regmean(layer(w1, w2), inputs(g1, g2), alpha=0.5)["w"], expected)
    # alpha = 0: columns with weights (2, 1) and (1, 3).
    expected = torch.tensor([[2 / 3, 3 / 4], [5 / 3, 10 / 4]])
    torch.testing.assert_close(mkl.regmean(layer(w1, w2), inputs(g1, g2), alpha=0.0)["w"], expected)


def test_a_tasks_weight_multiplies_its_gram_matrix():
    first, second = (mkl.Curvature(g) for g in inputs(torch.eye(2), torch.eye(2)))
    merged = mkl.regmean(layer(torch.ones(1, 2), 4 * torch.ones(1, 2)), [2 * first, second])["w"]
    torch.testing.assert_close(merged, torch.tensor([[2.0, 2.0]]))


# ---------------------------------------------------------------- by another route


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_regmean_is_least_squares_on_all_inputs(experts):
    """Stack every expert's inputs and answers, and let numpy fit one matrix."""
    weights, x = random(experts, 6, 5), random(experts, 9, 5, seed=1)
    answers = np.concatenate([(w @ a.T).T.numpy() for w, a in zip(weights, x, strict=True)])
    fitted, *_ = np.linalg.lstsq(np.concatenate(list(x.numpy())), answers)
    merged = mkl.regmean(layer(*weights), inputs(*(a.T @ a for a in x)))["w"]
    np.testing.assert_allclose(merged, fitted.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_each_group_is_a_layer_of_its_own(shape, groups):
    weights = random(3, *shape)
    width = torch.Size(shape[1:]).numel()
    columns = [random(groups, 2 * width, width, seed=k + 1) for k in range(3)]
    merged = mkl.regmean(layer(*weights), inputs(*(c.mT @ c for c in columns)))["w"]
    expected = []
    for g in range(groups):
        rows = weights.view(3, groups, -1, width)[:, g]
        answers = np.concatenate([(c[g] @ w.T).numpy() for c, w in zip(columns, rows, strict=True)])
        expected.append(np.linalg.lstsq(np.concatenate([c[g].numpy() for c in columns]), answers)[0].T)
    np.testing.assert_allclose(merged.reshape(-1, width), np.concatenate(expected), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_alpha_zero_is_a_weighted_average_of_columns(shape, groups):
    weights, width = random(3, *shape), torch.Size(shape[1:]).numel()
    grams = [gram(groups, width, seed=k) for k in range(3)]
    merged = mkl.regmean(layer(*weights), inputs(*grams), alpha=0.0)["w"]
    sizes = torch.stack([g.diagonal(dim1=1, dim2=2) for g in grams])[:, :, None, :]  # by group and input
    by_group = weights.view(3, groups, -1, width)
    expected = np.average(by_group, axis=0, weights=sizes.expand_as(by_group))
    np.testing.assert_allclose(merged.view(by_group.shape[1:]), expected, rtol=1e-12)


def test_alpha_mixes_whole_matrices_and_their_diagonals():
    weights, grams = random(3, 4, 5), [gram(1, 5, seed=k) for k in range(3)]
    mixed = [0.3 * g + 0.7 * torch.diag(g[0].diagonal()) for g in grams]
    ours = mkl.regmean(layer(*weights), inputs(*grams), alpha=0.3)["w"]
    torch.testing.assert_close(ours, mkl.regmean(layer(*weights), inputs(*mixed))["w"])
    assert not torch.allclose(ours, mkl.regmean(layer(*weights), inputs(*grams))["w"])


def test_the_outputs_cannot_be_nearer():
    weights, x = random(3, 4, 5), random(3, 7, 5, seed=1)
    merged = mkl.regmean(layer(*weights), inputs(*(a.T @ a for a in x)))["w"]

    def distance(weight):
        return sum(((weight - w) @ a.T).square().sum() for w, a in zip(weights, x, strict=True))

    for seed in range(20):
        assert distance(merged + 0.01 * random(4, 5, seed=seed)) > distance(merged)


def test_from_images_to_outputs():
    """The inputs of three linear experts, gathered and merged: the outputs are numpy's best fit."""
    torch.manual_seed(0)
    models = [nn.Conv2d(2, 3, 2, bias=False).double() for _ in range(3)]
    images = [random(4, 2, 4, 4, seed=k) for k in range(3)]
    grams = [mkl.input_grams(m, [x]) for m, x in zip(models, images, strict=True)]
    merged = mkl.regmean(mkl.TaskVectors(models[0], models), grams)["weight"]
    columns = [nn.functional.unfold(x, 2).transpose(1, 2).reshape(-1, 8) for x in images]
    answers = torch.cat([c @ m.weight.detach().flatten(1).T for c, m in zip(columns, models, strict=True)])
    expected, *_ = np.linalg.lstsq(torch.cat(columns).numpy(), answers.numpy())
    np.testing.assert_allclose(merged.flatten(1), expected.T, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- where nothing is known


def test_along_inputs_that_never_occurred_the_average_is_kept():
    weights = random(3, 6, 8)
    x = random(3, 2, 8, seed=1)  # two inputs of each task: six directions of eight
    merged = mkl.regmean(layer(*weights), inputs(*(a.T @ a for a in x)))["w"]
    seen = np.concatenate(list(x.numpy()))
    unseen = torch.from_numpy(np.linalg.svd(seen)[2][6:]).T
    torch.testing.assert_close(merged @ unseen, weights.mean(0) @ unseen)
    # Six directions, six inputs: every expert's answers are kept to the letter.
    for w, a in zip(weights, x, strict=True):
        torch.testing.assert_close(merged @ a.T, w @ a.T, rtol=1e-6, atol=1e-8)


def test_inputs_that_are_always_zero_keep_the_average():
    weights = random(2, 3, 4)
    x = random(2, 9, 4, seed=1)
    x[:, :, 2] = 0  # a channel that died
    for alpha in (1.0, 0.5, 0.0):
        merged = mkl.regmean(layer(*weights), inputs(*(a.T @ a for a in x)), alpha=alpha)["w"]
        torch.testing.assert_close(merged[:, 2], weights.mean(0)[:, 2])
    nothing = mkl.regmean(layer(*weights), inputs(torch.zeros(4, 4), torch.zeros(4, 4)))["w"]
    torch.testing.assert_close(nothing, weights.mean(0))


def test_inputs_of_one_task_alone_are_answered_as_its_expert_did():
    weights = random(2, 3, 4)
    x = torch.eye(4, dtype=torch.float64)
    merged = mkl.regmean(layer(*weights), inputs(x[:2].T @ x[:2], x[2:].T @ x[2:]))["w"]
    torch.testing.assert_close(merged, torch.cat([weights[0, :, :2], weights[1, :, 2:]], 1))


# ---------------------------------------------------------------- what it does


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 8), st.floats(1e-12, 1e12))
def test_copies_of_one_expert_give_that_expert(seed, alpha, rank, unit):
    expert = random(4, 5, seed=seed)
    grams = inputs(*(unit * gram(1, 5, rank=rank, seed=seed + k) for k in range(3)))
    torch.testing.assert_close(mkl.regmean(layer(expert, expert, expert), grams, alpha=alpha)["w"], expert)


def test_one_expert_is_kept():
    expert = random(4, 5)
    torch.testing.assert_close(mkl.regmean(layer(expert), inputs(gram(1, 5, rank=2)))["w"], expert)


def test_equal_inputs_give_the_average():
    weights, g = random(3, 4, 5), gram(1, 5)
    torch.testing.assert_close(mkl.regmean(layer(*weights), inputs(g, g, g))["w"], weights.mean(0))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(3)), st.floats(1e-9, 1e9))
def test_neither_the_order_nor_a_common_unit_matters(seed, order, unit):
    weights, grams = random(3, 4, 5, seed=seed), [gram(1, 5, seed=seed + k) for k in range(3)]
    expected = mkl.regmean(layer(*weights), inputs(*grams), alpha=0.7)["w"]
    turned = mkl.regmean(layer(*weights[list(order)]), inputs(*(unit * grams[k] for k in order)), alpha=0.7)["w"]
    torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-8)


def test_the_merge_turns_with_its_inputs_and_outputs():
    weights, grams = random(3, 4, 5), [gram(1, 5, seed=k) for k in range(3)]
    (left, _), (right, _) = torch.linalg.qr(random(4, 4, seed=1)), torch.linalg.qr(random(5, 5, seed=2))
    turned = mkl.regmean(layer(*(left @ weights @ right)), inputs(*(right.T @ g @ right for g in grams)))["w"]
    torch.testing.assert_close(turned, left @ mkl.regmean(layer(*weights), inputs(*grams))["w"] @ right)


def test_only_input_factors_count():
    weights, shape = random(3, 4, 5), (4, 5)
    blocks = [kronecker(shape, seed=k) for k in range(3)]
    expected = mkl.regmean(layer(*weights), inputs(*(b.inputs for b in blocks)))["w"]
    assert torch.equal(mkl.regmean(layer(*weights), of(*blocks))["w"], expected)
    for others in (of(*(mkl.Kronecker(outputs=b.outputs) for b in blocks)), of(*map(mkl.Diagonal, weights.square()))):
        torch.testing.assert_close(mkl.regmean(layer(*weights), others)["w"], weights.mean(0))


def test_what_is_no_weight_of_a_layer_is_averaged(base, experts, tv):
    images = [torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    grams = [mkl.input_grams(model, [x]) for model, x in zip(experts, images, strict=True)]
    merged, mean = mkl.regmean(tv, grams), mkl.average(tv)
    base.load_state_dict(merged)
    for name in mean:
        same = torch.allclose(merged[name].double(), mean[name].double(), atol=1e-6)
        assert same == (name not in ("0.weight", "3.weight")), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_experts_in_any_precision(dtype):
    weights, grams = random(3, 8, 6).to(dtype), inputs(*(gram(1, 6, seed=k) for k in range(3)))
    merged = mkl.regmean(layer(*weights, base=torch.zeros(8, 6, dtype=dtype)), grams)["w"]
    exact = mkl.regmean(layer(*weights.double()), grams)["w"]
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_tied_names_stay_tied():
    def tied(weight):
        return {"embed.weight": weight, "head.weight": weight}

    weights, g = random(2, 3, 3), [gram(1, 3, seed=k) for k in range(2)]
    merged = mkl.regmean(
        mkl.TaskVectors(tied(random(3, 3, seed=5)), [tied(w) for w in weights]),
        [{"embed.weight": mkl.Kronecker(inputs=m)} for m in g],
    )
    assert merged["head.weight"] is merged["embed.weight"]
    torch.testing.assert_close(merged["embed.weight"], mkl.regmean(layer(*weights), inputs(*g))["w"])


def test_files_are_merged_as_models_are(tv, tmp_path):
    grams = {name: {"3.weight": mkl.Kronecker(inputs=gram(1, 4, seed=k))} for k, name in enumerate(tv.names)}
    files = ["base", *(f"expert {k}" for k in range(len(tv)))]
    states = [tv.base, *(mkl.average(tv[k]) for k in range(len(tv)))]
    paths = [mkl.save(dict(state), tmp_path / f"{f}.safetensors") for f, state in zip(files, states, strict=True)]
    out = mkl.merge_files(mkl.regmean, paths[0], paths[1:], tmp_path / "out.safetensors", grams=grams, alpha=0.5)
    merged, expected = mkl.load(out), mkl.regmean(tv, grams, alpha=0.5)
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], t) for name, t in expected.items())


def test_inputs_are_not_changed():
    weights, grams = random(2, 3, 4), inputs(gram(1, 4), gram(1, 4, seed=1))
    before = [weights.clone(), *(g["w"].inputs.clone() for g in grams)]
    for alpha in (1.0, 0.5):
        mkl.regmean(layer(*weights), grams, alpha=alpha)["w"].zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, [weights, *(g["w"].inputs for g in grams)], strict=True))


# ---------------------------------------------------------------- wrong input


def test_wrong_input_says_why():
    tv, grams = layer(*random(2, 3, 4)), inputs(gram(1, 4), gram(1, 4, seed=1))
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
            mkl.regmean(tv, grams, alpha=alpha)
    with pytest.raises(ValueError, match="2 experts need as many curvatures; got 3"):
        mkl.regmean(tv, [*grams, grams[0]])
    with pytest.raises(KeyError, match="no curvature for the expert 'expert 1'"):
        mkl.regmean(tv, {"expert 0": grams[0]})
    with pytest.raises(KeyError, match="'v', which is no tensor of the model"):
        mkl.regmean(tv, [grams[0], {"v": grams[1]["w"]}])
    with pytest.raises(KeyError, match="only 1 of 2 experts have a curvature for 'w'"):
        mkl.regmean(tv, [grams[0], {}])
    for other in (mkl.Diagonal(torch.ones(3, 4)), mkl.Kronecker(outputs=gram(1, 3))):
        with pytest.raises(KeyError, match="only 1 of 2 experts have a Gram matrix for 'w'"):
            mkl.regmean(tv, [grams[0], {"w": other}])
