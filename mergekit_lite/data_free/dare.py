r"""DARE: drop most entries of a task vector at random, and rescale the rest.

Yu et al., "Language models are super Mario: absorbing abilities from homologous models as a free lunch",
ICML 2024 (arXiv:2311.03099), section 3.2. Every entry survives with probability :math:`1 - p` and is then
divided by it (equations 1 and 2),

.. math::
   m_k \sim \text{Bernoulli}(1 - p), \qquad \hat\tau_k = \frac{m_k \odot \tau_k}{1 - p} ,

so that :math:`\mathbb{E}\,\hat\tau_k = \tau_k`: whatever is linear in the weights stays the same on average. The
price is a variance of :math:`\frac{p}{1-p}\,\tau_k^2` per entry; the gain, that few entries of different tasks still
meet in one place. DARE is a preparation, not a merge: the thinned task vectors are then added (task
arithmetic) or given to another method, such as steps 2 and 3 of TIES.

The paper's networks are large language models, whose task vectors bear p = 0.9 and more; it reports that
much smaller models with larger task vectors do not (section 4.5).
"""

import hashlib

import torch
from torch import Tensor

from mergekit_lite.checkpoints import StateDict
from mergekit_lite.checks import finite, number
from mergekit_lite.data_free.task_arithmetic import task_arithmetic
from mergekit_lite.data_free.ties import elect_and_merge
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import Place, TaskVectors

LEVELS = 1 << 16  # a random number has 16 bits: drawing it costs a quarter of a float's time


@method(
    name="DARE",
    paper="Yu et al., Language models are super Mario, ICML",
    arxiv="2311.03099",
    year=2024,
    need=Need.WEIGHTS,
)
def dare(
    tv: TaskVectors,
    *,
    drop: float = 0.9,
    scale: float = 0.3,
    combine: str = "linear",
    generator: torch.Generator | None = None,
) -> StateDict:
    r"""Drop entries at random, rescale the rest, and merge what is left.

    Args:
        tv: K task vectors.
        drop: p, the probability that an entry is dropped, in [0, 1).
        scale: :math:`\lambda` of the merge that follows.
        combine: ``"linear"`` adds the task vectors, :math:`\theta_0 + \lambda \sum_k \hat\tau_k`; ``"ties"`` elects
            a sign per entry and averages what agrees with it.
        generator: of the random numbers; by default one with seed 0, so that a merge can be repeated.

    Returns:
        The merged state dict.

    Raises:
        ValueError: drop outside [0, 1), a scale that is not finite, another combination.
        TypeError: what should be a number, or a generator, is none.
    """
    if combine not in ("linear", "ties"):
        raise ValueError(f"combine must be 'linear' or 'ties', got '{combine}'.")
    finite("scale", scale)
    thinned = drop_and_rescale(tv, drop, generator)
    return (task_arithmetic if combine == "linear" else elect_and_merge)(thinned, scale=scale)


def drop_and_rescale(tv: TaskVectors, drop: float, generator: torch.Generator | None = None) -> TaskVectors:
    """Set each entry to 0 with probability `drop` and divide the others by 1 - `drop`.

    Args:
        tv: K task vectors.
        drop: in [0, 1); realised to the nearest multiple of 2^-16, and rescaled by what was realised.
        generator: gives the seed; by default one with seed 0.

    Returns:
        K task vectors to merge by any method. Reading them again gives the same entries.

    Raises:
        ValueError: drop outside [0, 1).
    """
    if not 0 <= number("drop", drop) < 1:
        raise ValueError(f"drop is the probability of dropping an entry, in [0, 1); got {drop}.")
    seed = draw_seed(generator)
    survivors = max(1, round((1 - drop) * LEVELS))  # so many of the 2^16 random numbers spare an entry

    def thin(place: Place, taus: Tensor) -> Tensor:
        drawn = random_levels(taus.numel(), seed, place).view(taus.shape)
        survives = torch.le(drawn, survivors - LEVELS // 2 - 1, out=torch.empty(taus.shape, dtype=taus.dtype))
        return taus.mul_(survives.to(taus.device)).mul_(LEVELS / survivors)

    return tv.transform_pieces(thin)


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed from the caller's generator; each piece of the model makes a generator of its own from it.

    Raises:
        TypeError: it is no generator.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return int(torch.randint(1 << 62, (), generator=generator, device=generator.device))


def random_levels(n: int, seed: int, where: object) -> Tensor:
    """N random numbers from -2^15 to 2^15 - 1 (int16), always the same for a seed and a place."""
    digest = hashlib.blake2b(f"{seed} {where}".encode(), digest_size=8).digest()
    own = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    wide = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=own)  # four in one
    return wide.view(torch.int16)[:n]
