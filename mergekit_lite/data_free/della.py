r"""DELLA: drop entries at random, but small ones rather than large ones.

Deep et al., "DELLA-Merging: reducing interference in model merging through magnitude-based sampling", 2024
(arXiv:2406.11617), section 3. Between TIES, which keeps the largest entries for certain, and DARE, which gives
all the same chance, stands *MagPrune*: within each row of a weight matrix the entries are ranked by magnitude,
and the probability of being dropped falls linearly with the rank r = 0, ..., n - 1 (largest last) across a window
of width :math:`\epsilon` around p,

.. math:: p_r = p + \frac{\epsilon}{2} - \epsilon\,\frac{r}{n - 1}, \qquad \hat\tau = \frac{m \odot \tau}{1 - p_r} .

Then, as in TIES, a sign is elected per entry and the entries that agree with it are averaged. With a
window of 0 the dropping is that of DARE. Merging tools call half the window epsilon and rescale each tensor to its
former L1 norm instead of dividing by :math:`1 - p_r`.
"""

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import finite, number
from mergekit_lite.data_free.dare import LEVELS, draw_seed, random_levels
from mergekit_lite.data_free.ties import elect_and_merge
from mergekit_lite.geometry import rows_of
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors


@method(
    name="DELLA-Merging",
    paper="Deep et al., DELLA-Merging: reducing interference through magnitude-based sampling",
    arxiv="2406.11617",
    year=2024,
    need=Need.WEIGHTS,
)
def della(
    tv: TaskVectors,
    *,
    drop: float = 0.3,
    window: float = 0.14,
    scale: float = 1.1,
    generator: torch.Generator | None = None,
) -> StateDict:
    r"""Drop entries at random by rank, rescale the rest, elect signs, average what agrees.

    Args:
        tv: K task vectors.
        drop: p, the mean probability that an entry is dropped.
        window: :math:`\epsilon`; from the smallest entry of a row to its largest the probability falls by so much.
        scale: :math:`\lambda`.
        generator: of the random numbers; by default one with seed 0.

    Returns:
        The merged state dict. The defaults are those of the released code's example.

    Raises:
        ValueError: probabilities that leave [0, 1), or a scale that is not finite.
        TypeError: what should be a number, or a generator, is none.
    """
    finite("scale", scale)
    return elect_and_merge(magprune(tv, drop, window, generator), scale=scale)


def magprune(tv: TaskVectors, drop: float, window: float, generator: torch.Generator | None = None) -> TaskVectors:
    """Drop entries with a probability that falls with their rank in the row, and rescale the others.

    A tensor with fewer than two axes is one row; a convolution's kernel has a row per output.

    Raises:
        ValueError: a negative window, or probabilities that leave [0, 1).
    """
    drop, window = number("drop", drop), number("window", window)
    if not (window >= 0 and drop - window / 2 >= 0 and drop + window / 2 < 1):
        raise ValueError(
            f"the probabilities must stay in [0, 1): drop - window / 2 and drop + window / 2 are "
            f"{drop - window / 2:.3g} and {drop + window / 2:.3g}."
        )
    seed = draw_seed(generator)

    def prune(name: str, taus: Tensor) -> Tensor:
        rows = rows_of(taus)
        order = rows.abs().argsort(dim=-1)
        ranks = torch.empty_like(order).scatter_(
            -1, order, torch.arange(rows.shape[-1], device=order.device).expand_as(order)
        )
        survive = 1 - drop - window / 2 + window * ranks / max(1, rows.shape[-1] - 1)
        levels = (survive * LEVELS).round_().clamp_(min=1)  # as many of the random numbers spare the entry
        drawn = random_levels(rows.numel(), seed, name).view(rows.shape).to(taus.device)
        return torch.where(drawn < levels - LEVELS // 2, rows * (LEVELS / levels), 0.0).reshape(taus.shape)

    return tv.transform(prune)
