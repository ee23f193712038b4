r"""Which tensors are matrices: linear maps, with a row per output and a column per input.

Methods that look at singular vectors, or at what a layer reads, must know which tensors *multiply* their inputs. Two
axes are not enough. A table of position embeddings has a row per position: nothing is multiplied with it. A tensor
is taken for a linear map if

- it has at least two axes, and more than one row (`shape[0]`: outputs) and input (`shape[1]`);
- its name does not say that it is a table, a token or a bias (see `NO_MAP`).

===============================================  =============  ============================================
tensor                                           shape          a linear map?
===============================================  =============  ============================================
``blocks.0.mlp.fc1.weight``                      (768, 192)     yes
``attn.in_proj_weight``                          (576, 192)     yes
``conv1.weight``, ``patch_embedding.weight``     (64, 3, 7, 7)  yes: outputs x (inputs x height x width)
``conv_dw.weight``                               (32, 1, 3, 3)  no: depthwise, each output reads one channel
``head.weight`` with one output                  (1, 192)       no: one row has one direction only
``pos_embed``, ``cls_token``                     (1, 197, 192)  no: a leading axis of length 1 is no row
``wte.weight``, ``position_embedding.weight``    (50257, 768)   no: a row is looked up
``relative_position_bias_table``, ``rel_pos_h``  (169, 3)       no: a row is looked up, or added
===============================================  =============  ============================================

Some networks store a linear map transposed (GPT-2's layers, CLIP's ``visual.proj``). Names and shapes do not say so;
they are maps all the same, with rows and columns exchanged.
"""

import re

from torch import Tensor

# The last word of the name (without ".weight") of what is looked up or added and multiplies nothing.
NO_MAP = re.compile(
    r"""(?:^|\.)(?!\w*(?:patch|conv))(?:
        \w*(?:pos|position|positional|word|token|tok|type|entity|label|time)\w*_emb(?:ed(?:ding)?s?)?\w*   # pos_embed
      | (?:absolute|relative|abs|rel)_pos(?:ition)?s?(?:_[hwdt])?           # rel_pos_h
      | \w*embeddings? | embed_(?:tokens|positions|in) | \w*_emb | w[tp]e | shared
      | \w*tokens?                                                         # cls_token, mask_token, register_tokens
      | \w*bias(?:es)? | \w*bias_table | \w*_table                     # relative_position_bias_table, attention_biases
      | (?:query|object)_embed | A_log
    )\d*(?:\.weight)?$""",
    re.VERBOSE,
)


def is_matrix(weight: Tensor, name: str = "") -> bool:
    """Whether a tensor is a linear map from many inputs to many outputs.

    Args:
        weight: the tensor, or its task vector; only the shape counts.
        name: its name in the state dict; without one the shape alone decides.

    Examples:
        >>> import torch
        >>> is_matrix(torch.zeros(197, 768), "blocks.0.attn.proj.weight")
        True
        >>> is_matrix(torch.zeros(197, 768), "embeddings.position_embeddings.weight")
        False
    """
    if weight.ndim < 2 or min(weight.shape[:2]) < 2 or weight.numel() == 0:
        return False
    return NO_MAP.search(name) is None
