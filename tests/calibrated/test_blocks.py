"""Blocks of curvature: what they do to a weight, and how they are kept."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekit_lite as mkl
from mergekit_lite.calibrated.blocks import blocks_of, in_order, pseudo_inverse
from tests.calibrated.examples import SHAPES, gram, kronecker, layer, written_out
from tests.data_free.test_tsv import random

A = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]])
B = torch.tensor([[[1.0, 0.5], [0.5, 2.0]]])
V = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def every_block(shape, groups):
    """A block of each form, with one factor and with both."""
    both = kronecker(shape, groups)
    return [
        mkl.Diagonal(random(*shape).square()),
        both,
        mkl.Kronecker(inputs=both.inputs),
        mkl.Kronecker(outputs=both.outputs),
    ]


def same(block, expected):
    """Whether two blocks have the same factors."""
    return {name: m.tolist() for name, m in block.factors().items()} == {
        name: m.tolist() for name, m in expected.factors().items()
    }


# ---------------------------------------------------------------- by hand


def test_a_diagonal_by_hand():
    block = mkl.Diagonal(torch.tensor([[1.0, 0.0], [0.5, 4.0]]))
    assert block(V).tolist() == [[1.0, 0.0], [1.5, 16.0]]
    assert block.inverse().values.tolist() == [[1.0, 0.0], [2.0, 0.25]]
    assert block.scaled(2.0)(V).tolist() == [[2.0, 0.0], [3.0, 32.0]]
    assert block.damped(2.0).values.tolist() == [[3.75, 2.75], [3.25, 6.75]]  # the mean is 11 / 8
    assert block.mixed(0.3).values.tolist() == block.values.tolist()


def test_a_kronecker_product_by_hand():
    # V A = [[4, 7], [10, 15]], and B times it
    assert mkl.Kronecker(A, B)(V).tolist() == [[9.0, 14.5], [22.0, 33.5]]
    assert mkl.Kronecker(inputs=A)(V).tolist() == [[4.0, 7.0], [10.0, 15.0]]
    assert mkl.Kronecker(outputs=B)(V).tolist() == [[2.5, 4.0], [6.5, 9.0]]
    assert mkl.Kronecker(outputs=B)(V[:, 0]).tolist() == [2.5, 6.5], "a bias"
    assert mkl.Kronecker(A, B).diagonal(V).tolist() == [[2.0, 3.0], [4.0, 6.0]]
    assert mkl.Kronecker(A, B).mixed(0.5).inputs.tolist() == [[[2.0, 0.5], [0.5, 3.0]]]
    assert mkl.Kronecker(A, B).mixed(0.5).outputs.tolist() == [[[1.0, 0.25], [0.25, 2.0]]]
    damped = mkl.Kronecker(A, B).damped(2.0)  # the mean eigenvalues are 2.5 and 1.5
    assert damped.inputs.tolist() == [[[7.0, 1.0], [1.0, 8.0]]]
    assert damped.outputs.tolist() == [[[4.0, 0.5], [0.5, 5.0]]]


def test_groups_are_layers_side_by_side():
    block = mkl.Kronecker(torch.cat([A, 10 * A]), torch.cat([B, B]))
    weight = torch.cat([V, V])
    assert block(weight).tolist() == [[9.0, 14.5], [22.0, 33.5], [90.0, 145.0], [220.0, 335.0]]
    assert block.groups == 2
    assert block.damped(2.0).inputs[1].tolist() == [[70.0, 10.0], [10.0, 80.0]], "each by its own mean"


# ---------------------------------------------------------------- against the dense matrix


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_a_block_is_the_dense_matrix(shape, groups):
    v = random(*shape, seed=7)
    for block in every_block(shape, groups):
        matrix = written_out(block, shape)
        assert block(v).shape == v.shape
        torch.testing.assert_close(block(v).flatten(), matrix @ v.flatten(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(block.diagonal(v).flatten(), matrix.diagonal())
        torch.testing.assert_close(written_out(block.scaled(0.3), shape), 0.3 * matrix)
        if len(block.factors()) == 2 or isinstance(block, mkl.Diagonal):
            assert block.trace() == pytest.approx(matrix.trace().item())
        inverse = np.linalg.pinv(matrix.numpy(), hermitian=True, rtol=1e-12)
        torch.testing.assert_close(written_out(block.inverse(), shape).numpy(), inverse, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_a_block_reads_a_weight_however_it_lies_in_memory(shape, groups):
    v = random(*shape, seed=7)
    transposed = v.transpose(0, -1).contiguous().transpose(0, -1)
    for block in every_block(shape, groups):
        assert torch.equal(block(transposed), block(v))
        assert torch.equal(block.diagonal(transposed), block.diagonal(v))


def test_kronecker_agrees_with_numpy():
    """Outputs are rows, so B comes first."""
    block = kronecker((3, 4))
    v = random(3, 4, seed=5)
    expected = np.kron(block.outputs[0].numpy(), block.inputs[0].numpy()) @ v.numpy().ravel()
    np.testing.assert_allclose(block(v).numpy().ravel(), expected, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(SHAPES), st.integers(0, 3))
def test_a_block_is_symmetric_and_never_negative(seed, shape_and_groups, which):
    shape, groups = shape_and_groups
    block = every_block(shape, groups)[which]
    u, v = random(*shape, seed=seed), random(*shape, seed=seed + 1)
    assert (u * block(v)).sum().item() == pytest.approx((block(u) * v).sum().item(), rel=1e-9, abs=1e-9)
    assert (v * block(v)).sum() >= 0


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_mixed_and_damped(shape, groups):
    block = kronecker(shape, groups)
    assert same(block.mixed(1.0), block)
    bare = block.mixed(0.0)
    torch.testing.assert_close(bare.diagonal(torch.zeros(shape)), block.diagonal(torch.zeros(shape)))
    assert written_out(bare, shape).count_nonzero() == math.prod(shape)
    for factor, lifted in zip(block.factors().values(), block.damped(0.1).factors().values(), strict=True):
        added = torch.linalg.eigvalsh(lifted) - torch.linalg.eigvalsh(factor)
        mean = torch.linalg.eigvalsh(factor).mean(1, keepdim=True)
        torch.testing.assert_close(added, (0.1 * mean).expand_as(added))


# ---------------------------------------------------------------- pseudo-inverses


def test_the_pseudo_inverse_leaves_out_what_is_zero():
    singular = gram(3, 6, rank=2)
    expected = np.linalg.pinv(singular.numpy(), hermitian=True, rtol=1e-10)
    torch.testing.assert_close(pseudo_inverse(singular).numpy(), expected, rtol=1e-8, atol=1e-8)
    assert torch.linalg.matrix_rank(pseudo_inverse(singular), rtol=1e-8).tolist() == [2, 2, 2]
    assert torch.equal(pseudo_inverse(torch.zeros(1, 2, 2)), torch.zeros(1, 2, 2))


def test_the_pseudo_inverse_takes_rounding_errors_for_zero_in_either_precision():
    """Of a matrix of rank two the other eigenvalues are a few units in the last place, of either sign."""
    for dtype in (torch.float32, torch.float64):
        inverse = pseudo_inverse(gram(1, 40, rank=2).to(dtype))
        assert torch.linalg.matrix_rank(inverse, rtol=1e-4).item() == 2
        assert inverse.abs().max() < 10


def test_small_eigenvalues_are_inverted_as_long_as_they_are_no_rounding_errors():
    matrix = torch.diag(torch.tensor([1.0, 1e-9, 1e-14], dtype=torch.float64))
    torch.testing.assert_close(pseudo_inverse(matrix).diagonal(), torch.tensor([1.0, 1e9, 0.0], dtype=torch.float64))


def test_the_inverse_of_next_to_nothing_is_finite():
    values = torch.tensor([1.0, 1e-40, 0.0])  # the second has no reciprocal in float32
    assert torch.isfinite(mkl.Diagonal(values).inverse().values).all()


# ---------------------------------------------------------------- what no block can be


def test_factors_must_be_square_with_groups():
    with pytest.raises(ValueError, match=r"'inputs' must have shape \(groups, n, n\); it has \(2, 2\)"):
        mkl.Kronecker(inputs=torch.eye(2))
    with pytest.raises(ValueError, match=r"'outputs' must have shape \(groups, n, n\); it has \(1, 2, 3\)"):
        mkl.Kronecker(A, torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="as many groups"):
        mkl.Kronecker(A, torch.cat([B, B]))
    with pytest.raises(ValueError, match="at least one factor"):
        mkl.Kronecker()


# ---------------------------------------------------------------- the curvature of a model


@pytest.fixture
def curvature():
    outputs = gram(1, 4)
    return mkl.Curvature(
        {
            "fc.weight": mkl.Kronecker(gram(1, 3), outputs),
            "fc.bias": mkl.Kronecker(outputs=outputs),
            "conv.weight": mkl.Kronecker(inputs=gram(2, 3).float()),
            "norm.weight": mkl.Diagonal(random(4).square()),
        }
    )


def test_a_curvature_is_a_mapping(curvature):
    assert list(curvature) == ["fc.weight", "fc.bias", "conv.weight", "norm.weight"]
    assert len(curvature) == 4
    assert "fc.bias" in curvature
    assert "conv.bias" not in curvature
    assert repr(curvature) == "Curvature(3 Kronecker and 1 diagonal blocks, 63 numbers)"
    assert repr(mkl.Curvature({})) == "Curvature(0 Kronecker and 0 diagonal blocks, 0 numbers)"


def test_a_curvature_does_what_its_blocks_do(curvature):
    for name, block in curvature.items():
        assert same((3 * curvature)[name], block.scaled(3.0))
        assert same((curvature * 3)[name], block.scaled(3.0))
        assert same(curvature.mixed(0.3)[name], block.mixed(0.3))
        assert same(curvature.damped(0.3)[name], block.damped(0.3))
    assert (0 * curvature)["fc.weight"](random(4, 3)).count_nonzero() == 0, "a task that does not count"


def test_normalised_curvatures_have_one_size():
    # Traces: of A 5, of B 3, of both 15; a factor that is missing counts as a single 1, so 5 for A alone.
    one = mkl.Curvature({"v": mkl.Kronecker(A, B), "w": mkl.Kronecker(inputs=A), "x": mkl.Diagonal(V)})
    assert [block.trace() for block in one.values()] == [15.0, 5.0, 10.0]
    normalised = one.normalised()
    assert sum(block.trace() for block in normalised.values()) == pytest.approx(1.0)
    torch.testing.assert_close(normalised["v"](V), mkl.Kronecker(A, B)(V) / 30)
    torch.testing.assert_close(normalised["x"].values, V / 30)
    assert same((8 * one).normalised()["w"], normalised["w"])
    groups = mkl.Kronecker(torch.cat([A, 2 * A]), torch.cat([B, 10 * B]))
    assert groups.trace() == 5 * 3 + 10 * 30, "groups are not mixed"
    with pytest.raises(ValueError, match="zero everywhere"):
        (0 * one).normalised()


def test_a_curvature_wants_sensible_numbers(curvature):
    for weight in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="weight must be finite and not negative"):
            weight * curvature
        with pytest.raises(ValueError, match="damping must be finite and not negative"):
            curvature.damped(weight)
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            curvature.mixed(weight)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="the curvature of 'w' has NaN or infinite entries"):
            mkl.Curvature({"v": mkl.Diagonal(torch.ones(2)), "w": mkl.Kronecker(A, B * bad)})


def test_a_curvature_is_saved_and_loaded(curvature, tmp_path):
    curvature.save(tmp_path / "new" / "c.safetensors")
    loaded = mkl.Curvature.load(tmp_path / "new" / "c.safetensors")
    assert set(loaded) == set(curvature)
    for name, block in curvature.items():
        assert type(loaded[name]) is type(block)
        assert same(loaded[name], block)
        assert all(loaded[name].factors()[part].dtype == m.dtype for part, m in block.factors().items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.safetensors"]


def test_what_a_bias_shares_with_its_weight_is_stored_once(tmp_path):
    outputs = gram(1, 64)
    both = {"w": mkl.Kronecker(outputs=outputs), "b": mkl.Kronecker(outputs=outputs)}
    mkl.Curvature(both).save(tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").stat().st_size < 1.5 * outputs.nbytes
    loaded = mkl.Curvature.load(tmp_path / "c.safetensors")
    assert torch.equal(loaded["w"].outputs, outputs)
    assert torch.equal(loaded["b"].outputs, outputs)


def test_files_that_hold_something_else(tmp_path):
    with pytest.raises(mkl.CheckpointError, match="no such checkpoint"):
        mkl.Curvature.load(tmp_path / "missing.safetensors")
    for name in ("fc.weight", "w:diagonals"):
        mkl.save({name: torch.ones(2, 2)}, tmp_path / "other.safetensors")
        with pytest.raises(mkl.CheckpointError, match=r"holds no curvature, as Curvature\.save writes it"):
            mkl.Curvature.load(tmp_path / "other.safetensors")
    mkl.save({"w:diagonal": torch.tensor([math.nan])}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="'w' has NaN"):
        mkl.Curvature.load(tmp_path / "nan.safetensors")


# ---------------------------------------------------------------- those of K experts


def test_curvatures_come_in_order_or_by_name():
    tv = mkl.TaskVectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}})
    first, second = ({"w": mkl.Diagonal(torch.full((2,), value))} for value in (1.0, 2.0))
    assert in_order(tv, [first, second]) == [first, second]
    by_name = in_order(tv, {"b": second, "another": {}, "a": first})
    assert by_name[0] is first
    assert by_name[1] is second
    assert blocks_of("w", by_name) == [first["w"], second["w"]]
    assert blocks_of("v", by_name) == []


def test_curvatures_that_do_not_fit_say_why():
    tv = layer(torch.ones(2), torch.ones(2))
    block = mkl.Diagonal(torch.ones(2))
    with pytest.raises(ValueError, match="2 experts need as many curvatures; got 1"):
        in_order(tv, [{"w": block}])
    with pytest.raises(KeyError, match="no curvature for the expert 'expert 1'; there is one for expert 0, c"):
        in_order(tv, {"expert 0": {}, "c": {}})
    with pytest.raises(KeyError, match="a block for 'v', which is no tensor of the model"):
        in_order(tv, [{"w": block}, {"v": block}])
    with pytest.raises(KeyError, match="only 1 of 2 experts have a curvature for 'w'"):
        blocks_of("w", [{"w": block}, {}])


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_blocks_for_weights_of_another_shape_are_refused(shape, groups):
    def refuses(block, other):
        with pytest.raises(ValueError, match="block for 'w' does not fit weights of shape"):
            in_order(layer(torch.ones(other), base=torch.ones(other)), [{"w": block}])

    diagonal, both, inputs, outputs = blocks = every_block(shape, groups)
    for block in blocks:
        assert in_order(layer(random(*shape)), [{"w": block}]) == [{"w": block}]
        refuses(block, ())
    wider, higher = (shape[0], shape[1] + 1, *shape[2:]), (shape[0] + groups, *shape[1:])
    for block, other in [(diagonal, wider), (both, wider), (inputs, wider), (both, higher), (outputs, higher)]:
        refuses(block, other)


def test_blocks_for_biases_and_functions_fit():
    assert in_order(layer(torch.ones(4)), [{"w": mkl.Kronecker(outputs=gram(1, 4))}])
    assert in_order(layer(torch.ones(4)), [{"w": lambda v: v}]), "of a function nothing is known"
