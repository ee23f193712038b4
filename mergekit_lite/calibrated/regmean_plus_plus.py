r"""RegMean++: RegMean with the inputs that the *merged* network's layers will see.

Nguyen et al., "RegMean++: enhancing effectiveness and generalization of regression mean for model merging", TMLR 2026
(arXiv:2508.03121). RegMean gathers the inputs of a layer from each expert. In the merged network they are different,
since all layers before have been merged. So RegMean++ merges from the first block of layers to the last, and the inputs
of each come out of the blocks merged before:

1. everything is averaged;
2. block by block: expert k's block reads what the merged blocks before it make of task k's images, which gives the Gram
   matrices of the layers in it; their weights are merged by RegMean's formula and replace the average.

Within a block, layers see the expert's own block: only between blocks do the inputs come from the merge. The authors'
blocks are those of a vision transformer, and the embedding before them, which is averaged, counts as merged; by default
a stem here belongs to the first block (say otherwise with `depth`). Everything that is no weight of a linear layer
stays averaged (in their code the last normalisation is left at the base).
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from mergekit_lite.calibrated.curvature import Batch, grams_of_called
from mergekit_lite.calibrated.layers import say_unseen
from mergekit_lite.calibrated.regmean import check_share, least_squares
from mergekit_lite.checkpoints import StateDict, tied_names
from mergekit_lite.data_free.average import average
from mergekit_lite.data_free.depth import Depth, relative_depths
from mergekit_lite.registry import Need, method
from mergekit_lite.task_vectors import TaskVectors


@method(
    name="RegMean++",
    paper="Nguyen et al., RegMean++, TMLR",
    arxiv="2508.03121",
    year=2025,
    need=Need.CALIBRATION,
)
def regmean_plus_plus(
    tv: TaskVectors,
    model: nn.Module,
    batches: Mapping[str, Iterable[Batch]],
    *,
    alpha: float = 0.95,
    depth: Depth | None = None,
    progress: bool = False,
) -> StateDict:
    r"""RegMean, block by block, on the inputs that the merged blocks before produce.

    Args:
        tv: K task vectors.
        model: a network that these weights fit; it is not changed.
        batches: of every task, by the task vectors' names: inputs, or pairs of inputs and labels, which are not used.
        alpha: :math:`\alpha \in [0, 1]`, what becomes of the entries of a Gram matrix beside its diagonal.
        depth: ``depth(name)``, a number that is equal for tensors of one block and grows with depth, or a list of
            prefixes of names; by default numbered blocks are found by name. A function that numbers the layers one by
            one makes every layer a block of its own.
        progress: show a progress bar.

    Returns:
        The merged state dict. Linear maps whose layers were not called are averaged, and named in a warning.

    Raises:
        ValueError: an alpha outside [0, 1], no batches, or no blocks; a layer is not linear in its weight.
        KeyError: a task has no batches.
    """
    from tqdm.auto import tqdm

    check_share(alpha)
    missing = [name for name in tv.names if name not in batches]
    if missing:
        raise KeyError(f"no batches for the expert '{missing[0]}'; there are some for {', '.join(batches)}.")
    depths = relative_depths([name for name, _, _ in tv.layers()], depth)
    in_memory = tv._with_collector(dict)  # networks that are run are not merged tensor by tensor
    experts = {name: in_memory[name].map(lambda _, taus: taus[0]) for name in tv.names}
    calls = {name: list(batches[name]) for name in tv.names}  # they are read once per block
    network = copy.deepcopy(model)
    merged = average(in_memory)
    first_names, seen = tied_names(merged), set[str]()
    for stage in tqdm(sorted(set(depths.values())), desc="blocks", disable=None if progress else True):
        block = [name for name, depth in depths.items() if depth == stage]
        grams = []
        for task, expert in experts.items():
            own = {name: expert[name] for name, first in first_names.items() if first in block}
            network.load_state_dict({**merged, **own})
            grams.append(grams_of_called(network, calls[task], block).mixed(alpha))
        seen.update(grams[0])
        for name in grams[0]:
            weights = torch.stack([expert[name] for expert in experts.values()])
            merged[name].copy_(least_squares(weights, [gram[name].factors()["inputs"] for gram in grams]))
    say_unseen(network, seen, "They are averaged.")
    return merged
