"""AWD: the descent in K coefficients is the descent in d dimensions; and what its merge amounts to."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

import mergekit_lite as mkl
from mergekit_lite.data_free.awd import combine, descend, disentangle, loss_and_gradient, rows_of
from tests.test_task_vectors import vectors

OPTIONS = {"alpha": 0.1, "step": 0.01, "iterations": 300, "momentum": 0.0, "weight_decay": 0.0, "squared": False}


def loss_in_full(delta, taus, alpha, squared):
    """The paper's objective, written with d-dimensional vectors."""
    k, residual = len(taus), taus - delta
    cosines = [cosine_similarity(residual[i], residual[j], dim=0).abs() for i in range(k) for j in range(k) if i != j]
    length = delta.norm()
    return sum(cosines) / (k * (k - 1)) + alpha * (length**2 if squared else length)


def descend_in_full(taus, *, alpha, step, iterations, momentum, weight_decay, squared):
    """The same descent by torch's own SGD and automatic differentiation, in d dimensions."""
    delta = torch.zeros(taus.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([delta], lr=step, momentum=momentum, weight_decay=weight_decay)
    losses = []
    for _ in range(iterations):
        optimizer.zero_grad()
        loss = loss_in_full(delta, taus, alpha, squared)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return delta.detach(), [*losses, loss_in_full(delta, taus, alpha, squared).item()]


def made(kind, seed=0, k=5, d=40):
    """Task vectors of several kinds, (k, d) in float64."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(k, d, generator=generator).double()
    shared = torch.randn(d, generator=generator).double()
    lengths = torch.linspace(0.5, 3.0, k).double()[:, None]
    return {
        "random": own,
        "correlated": own + shared,
        "anticorrelated": own - own.mean(0) * 1.1,
        "of different lengths": (own + 0.5 * shared) * lengths,
    }[kind]


KINDS = ["random", "correlated", "anticorrelated", "of different lengths"]


def assert_the_same_descent(kind, changes):
    taus, options = made(kind), OPTIONS | changes
    expected, expected_losses = descend_in_full(taus, **options)
    c, losses = descend(taus @ taus.T, **options)
    assert (c @ taus - expected).norm() <= 1e-8 * max(expected.norm().item(), 1e-3)
    torch.testing.assert_close(losses, torch.tensor(expected_losses, dtype=torch.float64), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"squared": True}, {"weight_decay": 0.05}], ids=str)
def test_k_coefficients_follow_the_descent_in_full_dimension(kind, changes):
    assert_the_same_descent(kind, changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_they_follow_it_with_momentum(kind, decay):
    # Fifty steps: where momentum makes δ bounce around the norm's kink at zero, each bounce multiplies what
    # rounding left, so that any two ways of computing the same descent part after a hundred steps or so.
    assert_the_same_descent(kind, {"momentum": 0.9, "weight_decay": decay, "iterations": 50})


def test_they_follow_it_all_the_way_where_it_does_not_bounce():
    assert_the_same_descent("correlated", {"momentum": 0.9})


@pytest.mark.parametrize("squared", [False, True])
def test_the_gradient_is_that_of_automatic_differentiation(squared):
    taus = made("correlated")
    c = torch.linspace(-0.3, 0.4, len(taus)).double()
    delta = (c @ taus).requires_grad_()
    loss = loss_in_full(delta, taus, 0.2, squared)
    loss.backward()
    gram = taus @ taus.T
    in_gram_space, slope = loss_and_gradient(gram, c, 0.2, squared)
    torch.testing.assert_close(slope @ taus, delta.grad, rtol=1e-9, atol=1e-12)
    assert in_gram_space.item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.fixture
def net_vectors(tv):
    """Task vectors of the small network, in float64."""
    base = {name: t.double() if t.is_floating_point() else t for name, t in tv.base.items()}
    experts = []
    for k in range(len(tv)):
        moved = {name: theta0.double() + taus[k].double() for name, theta0, taus in tv.layers()}
        experts.append({name: moved.get(name, t) for name, t in base.items()})
    return mkl.TaskVectors(base, experts)


@pytest.mark.parametrize("granularity", ["layer", "row"])
def test_layers_and_rows_have_descents_of_their_own(net_vectors, granularity):
    found = disentangle(net_vectors, granularity=granularity, iterations=50)
    options = OPTIONS | {"iterations": 50}
    moved = {name: taus for name, _, taus in found.task_vectors.layers()}
    for name, _, taus in net_vectors.layers():
        pieces = rows_of(taus).unbind(1) if granularity == "row" else [taus.flatten(1)]
        after = rows_of(moved[name]).unbind(1) if granularity == "row" else [moved[name].flatten(1)]
        for piece, result in zip(pieces, after, strict=True):
            if piece.norm() > 0:
                expected, _ = descend_in_full(piece, **options)
                torch.testing.assert_close(result, piece - expected, rtol=1e-8, atol=1e-10)


def test_whole_vectors_share_one_redundant_vector(net_vectors):
    found = disentangle(net_vectors)
    expected, losses = descend_in_full(net_vectors.flat(), **OPTIONS)
    torch.testing.assert_close(found.redundant.flat()[0], expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.task_vectors.flat(), net_vectors.flat() - expected, rtol=1e-8, atol=1e-10)
    assert found.losses.tolist() == pytest.approx(losses, rel=1e-8)
    assert found.task_vectors.names == net_vectors.names


# ---------------------------------------------------------------- what the merge is


def test_awd_is_task_arithmetic_with_a_scale_per_task(suite):
    tv = suite.task_vectors.subset(["mnist", "fashion", "letters"])
    found = disentangle(tv)
    c = next(iter(found.coefficients.values()))
    scales = 0.4 * (1 - len(tv) * c)
    expected = mkl.task_arithmetic(tv, scale=scales.tolist())
    for name, merged in mkl.awd(tv, scale=0.4).items():
        torch.testing.assert_close(merged, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["layer", "row"])
def test_finer_awd_has_scales_per_layer_or_row(net_vectors, granularity):
    found = disentangle(net_vectors, granularity=granularity)
    merged = mkl.awd(net_vectors, scale=0.4, granularity=granularity)
    for name, theta0, taus in net_vectors.layers():
        scales = 0.4 * (1 - len(net_vectors) * found.coefficients[name])
        torch.testing.assert_close(merged[name], theta0 + combine(scales, taus), rtol=1e-10, atol=1e-12)


def test_it_makes_task_vectors_more_orthogonal(suite):
    from mergekit_lite.geometry import cosines

    tv = suite.task_vectors
    found = disentangle(tv)
    before, after = cosines(tv).abs(), cosines(found.task_vectors).abs()
    assert after.sum() < before.sum()
    assert found.losses[-1] < found.losses[0]
    assert found.redundant.gram().item() < 0.1 * tv.gram().diagonal().min(), "and takes only a little away"


# ---------------------------------------------------------------- at the edges


def test_a_single_task_vector_has_nothing_redundant():
    merged = mkl.awd(vectors([1.0, 2.0]), scale=1.0)
    assert merged["w"].tolist() == [1.0, 2.0]


def test_zero_task_vectors_and_duplicates_do_no_harm():
    found = disentangle(vectors([0.0, 0.0], [1.0, 0.0], [0.0, 1.0]))
    assert torch.isfinite(found.task_vectors.flat()).all()
    found = disentangle(vectors([1.0, 0.0], [1.0, 0.0], [1.0, 1.0]))
    assert found.losses[-1] < found.losses[0]
    assert torch.isfinite(found.task_vectors.flat()).all()


def test_what_cannot_be_meant_is_said():
    tv = vectors([1.0, 0.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="whole, layer, row; got 'column'"):
        mkl.awd(tv, granularity="column")
    with pytest.raises(ValueError, match="alpha must not be negative"):
        mkl.awd(tv, alpha=-1.0)
    with pytest.raises(ValueError, match="step must not be negative"):
        mkl.awd(tv, step=float("nan"))
