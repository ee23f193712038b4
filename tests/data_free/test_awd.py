"""AWD: few numbers do the work of d, in the descent and for the minimum; and what its merge amounts to."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

import mergekit_lite as mkl
from mergekit_lite.data_free.awd import combine, disentangle
from mergekit_lite.data_free.awd_solvers import coordinates, descend, minimise, objective
from mergekit_lite.geometry import cosines, grams, rows_of
from tests.test_task_vectors import vectors

# A smaller α than the paper's: the vectors here are short in dimension and long in length, so that at 0.1 the descent
# would only bounce around δ = 0, where each bounce multiplies what rounding left and two computations soon part.
OPTIONS = {"alpha": 0.01, "step": 0.01, "iterations": 300, "momentum": 0.0, "weight_decay": 0.0, "squared": False}


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
        "repelling": 3.0 * (own - own.mean(0)),
        "of different lengths": (own + 0.5 * shared) * lengths,
    }[kind]


KINDS = ["random", "correlated", "anticorrelated", "of different lengths"]


def in_coefficients(taus, **options):
    return descend(torch.eye(len(taus), dtype=torch.float64), taus @ taus.T, **options)


def assert_the_same_descent(kind, changes):
    taus, options = made(kind), OPTIONS | changes
    expected, expected_losses = descend_in_full(taus, **options)
    c, record = in_coefficients(taus, **options)
    assert expected.norm() > 0.01, "it goes somewhere"
    assert (c @ taus - expected).norm() <= 1e-8 * expected.norm()
    torch.testing.assert_close(
        torch.stack([value.loss for value in record]),
        torch.tensor(expected_losses, dtype=torch.float64),
        rtol=1e-8,
        atol=1e-12,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"squared": True}, {"weight_decay": 0.05}], ids=str)
def test_k_coefficients_follow_the_descent_in_full_dimension(kind, changes):
    assert_the_same_descent(kind, changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_they_follow_it_with_momentum(kind, decay):
    # Fifty steps: momentum makes it bounce in the end, on the kinks of the cosines.
    assert_the_same_descent(kind, {"momentum": 0.9, "weight_decay": decay, "iterations": 50})


def test_they_follow_it_all_the_way_where_it_does_not_bounce():
    assert_the_same_descent("correlated", {"momentum": 0.9})


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_is_that_of_automatic_differentiation(squared, smoothing):
    taus = made("correlated")
    delta = (torch.linspace(-0.3, 0.4, len(taus)).double() @ taus).requires_grad_()
    options = {"alpha": 0.2, "squared": squared, "smoothing": smoothing}
    value = objective(taus, None, delta, **options)
    (expected,) = torch.autograd.grad(value.loss, delta)
    torch.testing.assert_close(value.gradient, expected, rtol=1e-9, atol=1e-12)
    if smoothing == 0:
        assert value.loss.item() == pytest.approx(loss_in_full(delta, taus, 0.2, squared).item(), rel=1e-12)
        assert value.loss.item() == pytest.approx(
            (value.overlap + 0.2 * (value.length**2 if squared else value.length)).item()
        )


@pytest.mark.parametrize("squared", [False, True])
def test_every_basis_sees_the_same_objective(squared):
    taus = made("of different lengths")
    gram, c = taus @ taus.T, torch.linspace(-0.3, 0.4, len(taus)).double()
    inside = coordinates(gram)
    torch.testing.assert_close(inside @ inside.T, gram)
    assert inside[:, -1].abs().max() == 0, "one direction more"
    seen = [
        objective(points, metric, delta, alpha=0.2, squared=squared)
        for points, metric, delta in (
            (taus, None, c @ taus),
            (torch.eye(len(taus)).double(), gram, c),
            (inside, None, c @ inside),
        )
    ]
    for other in seen[1:]:
        assert [x.item() for x in other[:3]] == pytest.approx([x.item() for x in seen[0][:3]], rel=1e-10)
    torch.testing.assert_close(seen[1].gradient @ taus, seen[0].gradient)


def test_adam_leaves_the_span():
    """Why the descent has to be SGD: Adam scales every coordinate on its own."""
    taus = made("correlated")

    def outside(optimizer_class, **options):
        delta = torch.zeros(taus.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = optimizer_class([delta], **options)
        for _ in range(100):
            optimizer.zero_grad()
            loss_in_full(delta, taus, 0.1, False).backward()
            optimizer.step()
        found = delta.detach()
        inside = torch.linalg.lstsq(taus.T, found[:, None]).solution.T @ taus
        return ((found - inside[0]).norm() / found.norm()).item()

    assert outside(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-3) < 1e-12
    assert outside(torch.optim.Adam, lr=0.01) > 0.01


# ---------------------------------------------------------------- the minimum


def best_in_full(taus, alpha, squared, seed):
    """The lowest value that L-BFGS and Adam find in d dimensions, from several starts."""
    generator = torch.Generator().manual_seed(seed)
    starts = [taus.mean(0) * share for share in (0.1, 1.0)]
    starts += [torch.randn(taus.shape[1], generator=generator).double() * length for length in (0.02, 0.1, 0.3)]
    lowest = loss_in_full(torch.zeros_like(taus[0]), taus, alpha, squared).item()
    for start in starts:
        for optimizer_class, options, steps in (
            (torch.optim.LBFGS, {"max_iter": 300, "history_size": 40, "line_search_fn": "strong_wolfe"}, 2),
            (torch.optim.Adam, {"lr": 0.003}, 300),
        ):
            delta = start.clone().requires_grad_()
            optimizer = optimizer_class([delta], **options)

            def closure(delta=delta, optimizer=optimizer):
                optimizer.zero_grad()
                loss = objective(taus, None, delta, alpha=alpha, squared=squared).loss
                loss.backward()
                return loss

            for _ in range(steps):
                optimizer.step(closure)
            lowest = min(lowest, loss_in_full(delta.detach(), taus, alpha, squared).item())
    return lowest


@pytest.mark.parametrize("kind", [*KINDS, "repelling"])
@pytest.mark.parametrize(("alpha", "squared"), [(0.005, False), (0.02, False), (0.1, False), (0.02, True)])
def test_nothing_in_full_dimension_finds_less(kind, alpha, squared):
    taus = made(kind)
    _, _, (at_zero, best) = minimise(taus @ taus.T, alpha=alpha, squared=squared)
    assert best.loss <= best_in_full(taus, alpha, squared, seed=1) + 1e-6
    assert best.loss <= at_zero.loss
    _, record = in_coefficients(taus, **OPTIONS | {"alpha": alpha, "squared": squared})
    assert best.loss <= record[-1].loss + 1e-9


def test_what_it_says_is_what_it_found():
    for kind in [*KINDS, "repelling"]:
        taus = made(kind)
        c, e, (_, best) = minimise(taus @ taus.T, alpha=0.01)
        outside = torch.linalg.qr(torch.cat([taus, torch.eye(taus.shape[1])[:1].double()]).T)[0][:, -1]
        delta = c @ taus + e * outside
        assert loss_in_full(delta, taus, 0.01, False).item() == pytest.approx(best.loss.item(), rel=1e-9)
        assert best.length.item() == pytest.approx(delta.norm().item(), rel=1e-9)


def test_descent_from_zero_can_be_trapped_where_the_minimum_is_elsewhere():
    taus = made("repelling")
    options = OPTIONS | {"alpha": 0.02, "step": 1e-4}
    gradient = objective(taus, None, torch.zeros_like(taus[0]), alpha=0.0).gradient.norm()
    assert gradient < options["alpha"], "the price of the first step is higher than what it brings"
    _, record = in_coefficients(taus, **options)
    _, e, (at_zero, best) = minimise(taus @ taus.T, alpha=0.02)
    assert record[-1].loss > at_zero.loss - 1e-3, "trapped"
    assert best.loss < 0.95 * at_zero.loss
    assert best.overlap < 0.5 * at_zero.overlap
    assert e > 0.1, "out of the span: it adds e² to every inner product, and all are negative"


def test_a_shared_vector_cannot_undo_every_cosine():
    """K + 1 unknowns, K (K - 1) / 2 cosines: there is a floor, also where length costs nothing."""
    taus = made("correlated", k=8) * torch.tensor([1, 1, 1, 1, -1, -1, -1, -1]).double()[:, None]
    *_, best = minimise(taus @ taus.T, alpha=0.0)[2]
    assert best.overlap > 0.05


@pytest.mark.parametrize("granularity", ["whole", "layer", "row"])
def test_a_part_outside_the_span_is_really_there(granularity):
    """The task vectors that are handed out have the cosines that the solver promised."""
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.zeros(3, 30).double(), "b": torch.zeros(20).double(), "c": torch.zeros(2, 3).double()}
    own = [{n: torch.randn(t.shape, generator=generator).double() for n, t in base.items()} for _ in range(4)]
    mean = {n: sum(o[n] for o in own) / 4 for n in base}
    tv = mkl.TaskVectors(base, [{n: o[n] - mean[n] for n in base} for o in own])
    found = disentangle(tv, solver="exact", granularity=granularity, alpha=0.01)
    assert max(c[..., -1].abs().max().item() for c in found.coefficients.values()) > 1e-3, "it goes outside"
    after = torch.cat([gram.view(-1, 4, 4) for gram in grams(found.task_vectors, granularity).values()])
    lengths = after.diagonal(dim1=-2, dim2=-1).sqrt()
    cos = after / lengths.unsqueeze(-1) / lengths.unsqueeze(-2)
    off = (cos.abs().sum((-2, -1)) - 4) / 12
    assert off.mean().item() == pytest.approx(found.cosines[-1].item(), rel=1e-6)
    assert found.redundant.gram().sqrt().item() == pytest.approx(found.lengths[-1].item(), rel=1e-6)
    assert found.losses[-1] < found.losses[0]


@pytest.mark.parametrize("solver", ["trajectory", "exact"])
def test_in_relative_units_the_length_of_the_task_vectors_does_not_matter(net_vectors, solver):
    options = {"solver": solver, "granularity": "layer", "relative": True, "iterations": 20}
    short, long = disentangle(net_vectors, **options), disentangle(net_vectors * 100.0, **options)
    for name, c in short.coefficients.items():
        torch.testing.assert_close(c, long.coefficients[name], rtol=1e-5, atol=1e-7)
    assert long.lengths[-1].item() == pytest.approx(100 * short.lengths[-1].item(), rel=1e-5)
    torch.testing.assert_close(short.losses, long.losses)


# ---------------------------------------------------------------- layers and rows


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
    found = disentangle(net_vectors, granularity=granularity, iterations=50, alpha=0.01)
    options = OPTIONS | {"iterations": 50}
    moved = {name: taus for name, _, taus in found.task_vectors.layers()}
    for name, _, taus in net_vectors.layers():
        pieces = rows_of(taus).unbind(1) if granularity == "row" else [taus.flatten(1)]
        after = rows_of(moved[name]).unbind(1) if granularity == "row" else [moved[name].flatten(1)]
        for piece, result in zip(pieces, after, strict=True):
            if piece.norm() > 0:
                expected, _ = descend_in_full(piece, **options)
                torch.testing.assert_close(result, piece - expected, rtol=1e-8, atol=1e-10)


def test_the_recipe_of_a_coauthors_code(net_vectors):
    """Rows of matrices, the mean of their cosines plus the sum of their lengths, by SGD with momentum and decay."""

    def matrices(name, theta0):
        return theta0.ndim >= 2

    options = {"iterations": 200, "momentum": 0.9, "weight_decay": 1e-4, "step": 1e-5}
    found = disentangle(net_vectors, granularity="row", alpha=1e-3, row_mean=True, where=matrices, **options)
    moved = {name: taus for name, _, taus in found.task_vectors.layers()}
    compared = 0
    for name, theta0, taus in net_vectors.layers():
        if not matrices(name, theta0):
            assert torch.equal(moved[name], taus)
            continue
        delta = torch.zeros_like(rows_of(taus)[0], requires_grad=True)
        optimizer = torch.optim.SGD([delta], lr=1e-5, momentum=0.9, weight_decay=1e-4)
        for _ in range(200):
            optimizer.zero_grad()
            pieces = zip(rows_of(taus).unbind(1), delta.unbind(0), strict=True)
            overlaps = [loss_in_full(row_delta, row, 0.0, False) for row, row_delta in pieces]
            # At zero the length has the subgradient 0, and torch's norm takes it too.
            (torch.stack(overlaps).mean() + 1e-3 * delta.norm(dim=1).sum()).backward()
            optimizer.step()
        torch.testing.assert_close(rows_of(moved[name]), rows_of(taus) - delta.detach(), rtol=1e-8, atol=1e-11)
        assert (rows_of(taus) - rows_of(moved[name])).norm() > 1e-5, "it moved"
        compared += 1
    assert compared >= 2


def test_whole_vectors_share_one_redundant_vector(net_vectors):
    found = disentangle(net_vectors, alpha=OPTIONS["alpha"])
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
        scales = 0.4 * (1 - len(net_vectors) * found.coefficients[name])  # (K,) or (rows, K)
        torch.testing.assert_close(merged[name], theta0 + combine(scales, taus), rtol=1e-10, atol=1e-12)


def test_it_makes_task_vectors_more_orthogonal(suite):
    tv = suite.task_vectors
    found = disentangle(tv)
    before, after = cosines(tv).abs(), cosines(found.task_vectors).abs()
    assert after.sum() < before.sum()
    assert found.losses[-1] < found.losses[0]
    assert found.redundant.gram().item() < 0.1 * tv.gram().diagonal().min(), "and takes only a little away"


# ---------------------------------------------------------------- at the edges


@pytest.mark.parametrize("solver", ["trajectory", "exact"])
def test_a_single_task_vector_has_nothing_redundant(solver):
    merged = mkl.awd(vectors([1.0, 2.0]), scale=1.0, solver=solver)
    assert merged["w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("solver", ["trajectory", "exact"])
def test_zero_task_vectors_and_duplicates_do_no_harm(solver):
    found = disentangle(vectors([0.0, 0.0], [1.0, 0.0], [0.0, 1.0]), solver=solver)
    assert torch.isfinite(found.task_vectors.flat()).all()
    found = disentangle(vectors([0.0, 0.0], [0.0, 0.0]), solver=solver)
    assert found.task_vectors.flat().tolist() == [[0, 0], [0, 0]]
    found = disentangle(vectors([1.0, 0.0], [1.0, 0.0], [1.0, 1.0]), solver=solver)
    assert found.losses[-1] < found.losses[0]
    assert torch.isfinite(found.task_vectors.flat()).all()


def test_what_cannot_be_meant_is_said():
    tv = vectors([1.0, 0.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="whole, layer, row; got 'column'"):
        mkl.awd(tv, granularity="column")
    with pytest.raises(ValueError, match="trajectory, exact; got 'adam'"):
        mkl.awd(tv, solver="adam")
    with pytest.raises(ValueError, match="row_mean is about rows; the granularity is 'whole'"):
        mkl.awd(tv, row_mean=True)
    with pytest.raises(ValueError, match="no tensor to measure"):
        mkl.awd(tv, where=lambda name, theta0: False)
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        mkl.awd(tv, alpha=-1.0)
    with pytest.raises(ValueError, match="step must be finite and not negative"):
        mkl.awd(tv, step=float("nan"))


# ---------------------------------------------------------------- zero task vectors


def frozen(*shapes):
    """Three experts, of which the first has not moved the first tensor, and the second is the base."""
    generator = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.randn(*shape, generator=generator) for i, shape in enumerate(shapes)}
    experts = [{n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(3)]
    experts[0]["w0"] = base["w0"]
    return mkl.TaskVectors(base, [experts[0], base, experts[2], experts[1]])


@pytest.mark.parametrize("solver", ["trajectory", "exact"])
@pytest.mark.parametrize("granularity", ["whole", "layer", "row"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_layer_that_an_expert_froze(solver, granularity, relative):
    tv = frozen((6, 5), (4, 6), (3,), (2, 1, 3, 3))
    found = mkl.disentangle(tv, solver=solver, granularity=granularity, relative=relative)
    for values in (found.losses, found.cosines, found.lengths, *found.coefficients.values()):
        assert torch.isfinite(values).all()
    assert all(torch.isfinite(t).all() for t in mkl.awd(tv, solver=solver, granularity=granularity).values())


@pytest.mark.parametrize("granularity", ["whole", "layer", "row"])
def test_zero_task_vectors_take_no_part(granularity):
    """δ is that of the others, found with their share 2 (2 - 1) / (4 (4 - 1)) of all pairs."""
    tv = frozen((6, 5), (4, 6))
    moved = tv.subset([2, 3])
    zero = mkl.TaskVectors(tv.base, {"a": tv.base, "b": tv.base})
    base = dict(tv.base)
    both = [{n: base[n] + taus[k] for n, _, taus in moved.layers()} for k in range(2)]
    mixed = mkl.TaskVectors(base, [both[0], base, both[1], base])
    found = mkl.disentangle(mixed, granularity=granularity, step=0.01, alpha=0.1, iterations=40)
    alone = mkl.disentangle(
        mkl.TaskVectors(base, both), granularity=granularity, step=0.01 / 6, alpha=0.6, iterations=40
    )
    for name, c in found.coefficients.items():
        torch.testing.assert_close(c[..., [0, 2]], alone.coefficients[name], rtol=1e-6, atol=1e-9)
        assert not c[..., [1, 3]].any()
    assert not mkl.disentangle(zero, granularity=granularity).lengths.any()


def test_layers_without_entries():
    base = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.0), "w": torch.ones(2, 2)}
    experts = [{n: t + k for n, t in base.items()} for k in (1.0, -0.5, 2.0)]
    tv = mkl.TaskVectors(base, experts)
    for solver in ("trajectory", "exact"):
        for granularity in ("whole", "layer", "row"):
            merged = mkl.awd(tv, solver=solver, granularity=granularity)
            assert all(torch.isfinite(t).all() and t.shape == base[n].shape for n, t in merged.items())
