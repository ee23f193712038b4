r"""What a merge can be judged by without labels: its own certainty, or the experts' answers.

A loss sees a task's name, some of its inputs and the merge's logits for them. Three teachers, from the merge alone to
the experts:

.. math::
   \text{entropy:}\quad H(p) = -\sum_c p_c \log p_c, \qquad p(x) = \mathrm{softmax}(\text{logits of } x),

averaged over the inputs: from 0 (all on one class) to the logarithm of the number of classes (all classes alike). To
be certain is not to be right, and a network that always gives one answer is the most certain of all. It teaches well
where the merge is good already, so that certain predictions are mostly right ones.

.. math::
   \text{information:}\quad \overline{H(p)} - H(\bar p)

also asks the predictions of a batch to differ, by the entropy of their mean :math:`\bar p`: one answer to everything
does not pay any longer. It is the negative of what predictions say about inputs (Hu et al., "Learning discrete
representations via information maximizing self-augmented training", ICML 2017, arXiv:1702.08720; Liang et al.,
"Do we really need to access the source data?", ICML 2020, arXiv:2002.08546). It supposes that a batch holds about as
many images of each class, and is too low for small batches: n images cannot show more than n classes.

.. math::
   \text{imitation:}\quad -\sum_c q_c \log p_c, \qquad q = \text{what the task's own expert predicts,}

needs nothing more than the others, as whoever merges has the experts; the merge can learn what they know, not more
(Jung et al., "SyMerge: from non-interference to synergistic merging via single-layer adaptation",
2024, arXiv:2412.19098, learn from the experts' most likely class; here it is their whole distribution).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

Head = Callable[[Tensor], Tensor]  # from the model's outputs to logits (images, classes)
Loss = Callable[[str, Tensor, Tensor], Tensor]  # loss(task, inputs, logits): a number in nats


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy of softmax(logits), in nats, over all but the last axis; a logit may be minus infinity.

    Examples:
        >>> entropy(torch.zeros(10, 2))  # log 2
        tensor(0.6931)
    """
    log_p = _log_softmax(logits)
    return _cross_entropy(log_p.exp(), log_p).mean()


def entropy_loss(task: str, inputs: Tensor, logits: Tensor) -> Tensor:
    """The mean entropy of a batch's predictions: AdaMerging's loss."""
    return entropy(logits)


def information_loss(task: str, inputs: Tensor, logits: Tensor) -> Tensor:
    """The mean entropy of a batch's predictions, less the entropy of their mean."""
    log_p = _log_softmax(logits)
    p = log_p.exp()
    mean = p.mean(0)
    log_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()  # at 0 a logarithm has no slope
    return (_cross_entropy(p, log_p) - _cross_entropy(mean, log_mean)).mean()


def imitation_loss(model: nn.Module, experts: Mapping[str, Mapping[str, Tensor]], heads: Mapping[str, Head]) -> Loss:
    """How far a merge is from the answers of the task's own expert: a loss for every task that has one.

    Args:
        model: a network that the experts' weights fit; it is not changed, and used in inference mode.
        experts: state dicts by task; held, not copied.
        heads: by task, from the network's outputs to logits.

    Returns:
        ``loss(task, inputs, logits)``, the mean cross-entropy to the expert's predictions, in nats. It raises a
        KeyError for a task without an expert or a head.
    """
    network = copy.deepcopy(model).eval()

    def loss(task: str, inputs: Tensor, logits: Tensor) -> Tensor:
        if task not in experts:
            raise KeyError(f"no expert for the task '{task}'; there are {', '.join(experts)}.")
        weights = {name: tensor.to(inputs.device) for name, tensor in experts[task].items()}
        with torch.no_grad():
            outputs = functional_call(network, weights, (inputs,))
            q = _log_softmax(logits_of(task, inputs, outputs, heads)).exp()
        return _cross_entropy(q, _log_softmax(logits)).mean()

    return loss


def logits_of(task: str, inputs: Tensor, outputs: Tensor, heads: Mapping[str, Head]) -> Tensor:
    """A head's logits for a network's outputs.

    Raises:
        KeyError: the task has no head.
        ValueError: what the head makes are no logits.
    """
    if task not in heads:
        raise KeyError(f"no head for the task '{task}'; there are heads for {', '.join(heads)}.")
    logits = heads[task](outputs)
    if logits.ndim < 2 or len(logits) != len(inputs):
        raise ValueError(
            f"the head of '{task}' makes a tensor of shape {tuple(logits.shape)} from {len(inputs)} images; "
            "expected logits (images, classes)."
        )
    return logits


def _log_softmax(logits: Tensor) -> Tensor:
    # Half precision is too coarse for a sum over classes.
    return (logits.float() if logits.dtype.itemsize < 4 else logits).log_softmax(-1)


def _cross_entropy(q: Tensor, log_p: Tensor) -> Tensor:
    # A probability of 0 has a logarithm of minus infinity; their product is 0, not NaN.
    return -(q * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
