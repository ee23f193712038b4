"""Merges by their singular values, and what two task matrices share: against cases known by hand."""

import matplotlib.pyplot as plt
import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.lab import spectra
from mergekit_lite.lab.plots import plot_directions, plot_spectra
from mergekit_lite.lab.widgets import spectrum_at


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def vectors(*taus, bias=(2.0, 0.0)):
    """Task vectors of a 2 x 2 matrix and a bias, from a base of zeros."""
    base = {"w": torch.zeros(2, 2, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}
    b = torch.tensor(bias, dtype=torch.float64)
    return mkl.TaskVectors(base, [{"w": tau, "b": b} for tau in taus])


@pytest.fixture
def tv():
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(16, 24, generator=generator), "b": torch.randn(16, generator=generator)}
    return mkl.TaskVectors(
        base, [{n: t + torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(3)]
    )


def test_the_spectrum_of_the_sum_is_changed_and_the_rest_averaged():
    tv = vectors(diagonal(3.0, 1.0), diagonal(3.0, 1.0))  # singular values 6 and 2, mean 4
    for change, expected in (
        (lambda sigma: sigma, (6, 2)),
        (spectra.raised, (6, 4)),
        (spectra.capped, (4, 2)),
        (spectra.flattened(1.0), (4, 4)),
        (spectra.flattened(0.5), (24**0.5, 8**0.5)),
    ):
        merged = spectra.reshaped(tv, change, scale=0.5)
        torch.testing.assert_close(merged["w"], 0.5 * diagonal(*expected))
        torch.testing.assert_close(merged["b"], torch.tensor([2.0, 0.0]).double())


def test_flat_spectra_are_iso_c_and_unchanged_ones_task_arithmetic(tv):
    iso, sum_ = mkl.iso_c(tv), mkl.task_arithmetic(tv, scale=0.3)
    torch.testing.assert_close(spectra.reshaped(tv, spectra.flattened(1.0)), iso)
    torch.testing.assert_close(spectra.reshaped(tv, spectra.flattened(0.0), scale=0.3)["w"], sum_["w"])
    with pytest.raises(ValueError, match=r"a share in \[0, 1\]; got 1\.5"):
        spectra.flattened(1.5)


def test_zero_task_vectors_stay_at_the_base():
    tv = vectors(diagonal(0.0, 0.0), diagonal(0.0, 0.0))
    for change in (spectra.raised, spectra.capped, spectra.flattened(0.5)):
        torch.testing.assert_close(spectra.reshaped(tv, change)["w"], diagonal(0.0, 0.0))


def test_tsv_with_both_steps_is_tsv_and_with_none_the_sum(tv):
    both = spectra.tsv_steps(tv, truncate=True, orthogonal=True)
    torch.testing.assert_close(both, mkl.tsv(tv))
    none = spectra.tsv_steps(tv, truncate=False, orthogonal=False, scale=0.3)
    torch.testing.assert_close(none["w"], mkl.task_arithmetic(tv, scale=0.3)["w"])


def test_leaving_out_a_step_of_tsv():
    tv = vectors(diagonal(3.0, 1.0), diagonal(3.0, 1.0))
    truncated = spectra.tsv_steps(tv, truncate=True, orthogonal=False)["w"]
    torch.testing.assert_close(truncated, diagonal(6.0, 0.0))  # one triple of each, twice the same
    orthogonal = spectra.tsv_steps(tv, truncate=False, orthogonal=True)["w"]
    torch.testing.assert_close(orthogonal, diagonal(3.0, 1.0))  # [I I] becomes [I I] / √2 on either side


def test_inputs_may_be_shared_by_orthogonal_task_vectors():
    first = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # input 1 to output 1
    second = torch.tensor([[0.0, 0.0], [1.0, 0.0]])  # input 1 to output 2
    third = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # input 2 to output 1
    deltas = torch.stack([first, second, third])
    inner = deltas.flatten(1) @ deltas.flatten(1).T
    torch.testing.assert_close(inner, torch.eye(3))
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    torch.testing.assert_close(spectra.shared_inputs(deltas), expected)


def test_turning_keeps_the_singular_values_only(tv):
    deltas = spectra.matrices(tv)["w"]
    turned = spectra.turned_at_random(deltas)
    torch.testing.assert_close(torch.linalg.svdvals(turned), torch.linalg.svdvals(deltas))
    assert (turned - deltas).norm() > deltas.norm()


def test_what_is_kept_of_a_tasks_own_answer():
    delta = diagonal(3.0, 1.0)
    torch.testing.assert_close(spectra.kept_of_own(diagonal(1.5, 2.0), delta), torch.tensor([0.5, 2.0]).double())


def test_alignment_counts_the_directions_that_hold_the_length():
    deltas = torch.stack([diagonal(1.0, 0.0), diagonal(3.0, 4.0)])
    steep, flat = diagonal(10.0, 1.0), diagonal(1.0, 1.0)
    torch.testing.assert_close(spectra.alignment(steep, deltas), torch.tensor([1.0, 0.6]).double())
    torch.testing.assert_close(spectra.alignment(flat, deltas), torch.ones(2).double())


def test_pictures():
    figure = plot_spectra({"one": torch.tensor([3.0, 1.0]), "two": torch.tensor([2.0, 1.0, 0.5])})
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [2, 3]
    assert figure.axes[0].get_yscale() == "log"
    figure = plot_directions(
        {"left": {"task 1": torch.tensor([1.0, 0.0])}, "right": {"task 2": torch.tensor([0.0, 1.0])}}
    )
    assert [axis.get_title() for axis in figure.axes] == ["left", "right"]
    assert "task 2" in [text.get_text() for text in figure.axes[1].texts]
    plt.close("all")


def test_the_explorers_figure_says_the_accuracy(suite):
    small = suite.cut(10, tasks=list(suite.tasks)[:2])
    layer = next(iter(spectra.matrices(small.task_vectors)))
    figure = spectrum_at(small, layer, [(0.0, 0.2), (1.0, 1.0)], kept=0.5)
    steep, flat = (line.get_ydata() for line in figure.axes[0].lines)
    half = len(flat) // 2
    assert steep[0] > 1.5 * steep[1 if half < 3 else half // 2]
    assert flat[0] == pytest.approx(flat[half - 2])
    assert flat[-1] == steep[-1] == 0
    assert figure.get_label().count("accuracy") == 2
    plt.close("all")
