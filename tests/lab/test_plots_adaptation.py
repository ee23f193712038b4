"""The pictures and the explorers of part 4."""

import pandas as pd
import pytest
import torch

from mergekit_lite.lab.plots import COLOURS
from mergekit_lite.lab.plots_adaptation import plot_certainty, plot_predictions
from mergekit_lite.lab.widgets import certainty_at, explore_certainty
from tests.lab.test_lab import extremes

# ---------------------------------------------------------------- 4.1 Entropy as a teacher


def test_predictions_stand_below_their_images():
    from matplotlib.colors import to_hex

    images = [torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(3, 6, 6, dtype=torch.uint8)]
    p = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    figure = plot_predictions(images, p, [0, 1], ["two", "three"])
    above, below = figure.axes[:2], figure.axes[2:]
    assert [axis.get_title() for axis in above] == ["two", "three"]
    assert [axis.images[0].get_array().shape for axis in above] == [(4, 4), (6, 6, 3)]
    assert [bar.get_height() for axis in below for bar in axis.patches] == pytest.approx(p.flatten().tolist())
    assert [axis.get_title() for axis in below] == ["H = 0.69, loss 0.69", "H = 0.80, loss 1.61"]
    for axis, true in zip(below, (0, 1), strict=True):
        assert [to_hex(bar.get_facecolor()).upper() == COLOURS[1] for bar in axis.patches].index(True) == true


@pytest.fixture
def table():
    index = pd.MultiIndex.from_product([[0.1, 0.2, 0.5], ["one", "two_words"]], names=["scale", "task"])
    columns = {"entropy": range(1, 7), "loss": range(2, 8), "right": [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]}
    return pd.DataFrame(columns, index=index)


def test_entropy_is_drawn_beside_the_loss(table):
    left, right = plot_certainty(table, 0.2).axes
    assert [bar.get_height() for bar in left.patches] == [3, 4, 4, 5]
    assert [label.get_text() for label in left.get_xticklabels()] == ["one\n(0.50)", "two\nwords\n(0.70)"]
    entropy, loss, here = right.lines
    assert (list(entropy.get_ydata()), list(loss.get_ydata())) == ([1.5, 3.5, 5.5], [2.5, 4.5, 6.5])
    assert list(entropy.get_xdata()) == [0.1, 0.2, 0.5]
    assert here.get_xdata() == [0.2, 0.2]


def test_the_explorer_of_certainty_at_its_extremes(table):
    assert certainty_at(table, 0.5).get_label() == "λ = 0.5: entropy 5.50, loss 6.50, accuracy 0.95"
    explorer = explore_certainty(table)
    assert explorer.children[0].options == (0.1, 0.2, 0.5)
    assert [at["scale λ"] for at in extremes(explorer)] == [0.5]
