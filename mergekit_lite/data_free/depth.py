r"""How deep in a network a tensor is, read from its name.

A layer is a block with a number in its name. Of all stacks of numbered blocks in a network the one with the most
blocks counts (others of the same size, or called alike, such as an image and a text tower, count each for itself), and
its blocks are ordered by their numbers:

======================================  ==================  ==========
tensor                                  stack               numbers
======================================  ==================  ==========
``encoder.layers.11.mlp.fc1.weight``    ``encoder.layers``  11
``blocks.0.1.conv_pw.weight``           ``blocks``          0, 1
``stages.2.blocks.0.norm.weight``       ``stages``          2, 0
``layer4.0.downsample.0.weight``        ``layer``           4, 0
``s1.b2.conv1.conv.weight``             ``s``               1, 2
``conv1.weight``, ``head.fc.weight``    none                none
======================================  ==================  ==========

What stands in no block is at one of the ends, and its name says at which. Where the network begins there are stems,
embeddings, patches, positions and tokens (`FIRST`): as shallow as the first block. Where it ends there are heads,
classifiers, poolers, projections and the last normalisation (`LAST`): as deep as the last block. What neither says
counts as shallow. The order of the tensors plays no part, since files keep another one than networks.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from mergekit_lite.checks import finite

# How deep a tensor is, said by hand: a function from its name to a number, or prefixes of names from shallow to deep.
Depth = Callable[[str], int] | Sequence[str]

# The first number that stands between dots, with one right before it (layer4.0) and those after it (0.1, 2.blocks.0);
# or two words with a number each (s1.b2, denseblock1.denselayer2).
BLOCK = re.compile(
    r"(?P<stack>.*?)(?P<numbers>\d*(?:^|\.|_)\d+(?:\.(?:(?:blocks?|layers)\.)?\d+)*)\."
    r"|(?P<words>(?:.*\.)?(?:s|stage|denseblock|block))(?P<pair>\d+\.(?:b|block|unit|denselayer|layer)\d+)\."
)

# Words of a name, between its dots, that say where the network begins, and where it ends. Who says both begins
# ("patch_embed.norm", "embeddings.LayerNorm", "stem.norm"), but for what is in `SURELY_LAST`.
FIRST = re.compile(
    r"""(?:^|\.)(?:
        \w*stem\w* | \w*embed\w* | \w*emb | \w*patch\w* | \w*tokens? | \w*pos | pos(?:_|it)\w* | rel_pos\w* | w[tp]e
      | shared | (?:feature|input|in)_\w+ | (?:norm|ln|bn)_pre | pre_(?:la?ye?r_?)?norm | pre_layrnorm | ln_pre
      | project_in | preprocess\w* | norm0 | conv_proj | to_patch\w*
    )(?:\.|$)""",
    re.VERBOSE | re.IGNORECASE,
)
SURELY_LAST = re.compile(
    r"""(?:^|\.)(?:
        (?:\w+_)?heads?(?:_\w+)?\d* | (?:\w+_)?classifiers?\d* | pre_classifier | embed_out | cls | score | logit_\w+
      | \w*attn_?pool\w* | pooler | pre_logits | lm_\w+ | cls_attn\w* | blocks_token_only | post_network
    )(?:\.|$)""",
    re.VERBOSE | re.IGNORECASE,
)
LAST = re.compile(
    r"""(?:^|\.)(?:
        (?:layer_?)?norm[s\d]? | ln | ln_(?:f|final|post|out) | norm_(?:f|final|post|out|head|last) | fc_norm
      | (?:final|last|post|out|output)_?\w* | \w+_last | \w+_final | outputs?
      | fc\d? | linear | top | proj | \w*projection | projector | project_(?:hid|out) | proj_out
      | qa_outputs | vocab_\w+ | predictions? | to_logits | logits | generator
    )(?:\.|$)""",
    re.VERBOSE | re.IGNORECASE,
)


def relative_depths(names: Iterable[str], depth: Depth | None = None) -> dict[str, float]:
    """(l - 1) / (L - 1) by tensor name, for a network of L layers: 0 is the shallow end, 1 the deep one.

    Args:
        names: of the tensors.
        depth: ``depth(name)``, a whole number that grows from the shallow end to the deep one; or a list of prefixes
            such as ``["stem", "layer1", "layer2", "head"]``. By default numbered blocks are looked for.

    Raises:
        ValueError: there are no numbered blocks, all tensors are equally deep, a name has none of the prefixes, or a
            depth is not finite.
        TypeError: `depth` is neither a function nor a list, or its answers are no numbers.
    """
    names = list(names)
    if depth is None:
        return _depths_of_blocks(names)
    if not callable(depth) and (isinstance(depth, str | bytes) or not isinstance(depth, Sequence)):
        raise TypeError(f"depth must be a function of names or a list of prefixes, got {depth!r}.")
    levels = {name: finite("depth", depth(name) if callable(depth) else _position(name, depth)) for name in names}
    first, last = min(levels.values(), default=0), max(levels.values(), default=0)
    if first == last:
        raise ValueError("all tensors are equally deep: there is nothing between the shallow end and the deep one.")
    return {name: (level - first) / (last - first) for name, level in levels.items()}


def block_of(name: str) -> tuple[str, tuple[int, ...]] | None:
    """The stack that a tensor's block stands in, and the block's numbers there (see the table above)."""
    # DenseNet's transition1 follows the layers of denseblock1.
    match = BLOCK.match(re.sub(r"\btransition(\d+)\.", r"denseblock\1.denselayer999.", name))
    if not match:
        return None
    stack, numbers = (match["words"], match["pair"]) if match["stack"] is None else (match["stack"], match["numbers"])
    return stack, tuple(map(int, re.findall(r"\d+", numbers)))


def is_last(name: str, names: Iterable[str] = ()) -> bool:
    """Whether a tensor that stands in no block ends the network rather than begins it.

    Args:
        name: of the tensor.
        names: of all tensors (a set, best), since one name speaks only beside another: "bn2" belongs to the last
            convolution where there is a "conv_head", and to the stem where there is none.
    """
    module, _, _ = name.rpartition(".")
    if module.rpartition(".")[2] == "bn2":
        return f"{module.removesuffix('bn2')}conv_head.weight" in names
    return bool(SURELY_LAST.search(name) or (LAST.search(name) and not FIRST.search(name)))


def _depths_of_blocks(names: Sequence[str]) -> dict[str, float]:
    found = {name: block for name in names if (block := block_of(name))}
    stacks: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for stack, numbers in found.values():
        stacks[stack].add(numbers)
    # Layers of a stem, or of a head, may be numbered, too.
    inner = {s: blocks for s, blocks in stacks.items() if not (_is_stem(s) or SURELY_LAST.search(s))}
    most = max(map(len, inner.values()), default=0)
    if most < 2:
        raise ValueError("these tensors' names show no stack of numbered blocks; say how deep they are with `depth`.")
    called = {stack.rpartition(".")[2] for stack, blocks in inner.items() if len(blocks) == most}
    ordered = {
        stack: sorted(blocks)
        for stack, blocks in inner.items()
        if len(blocks) == most or (stack.rpartition(".")[2] in called and stack and len(blocks) > 1)
    }

    depths, known = {}, set(names)
    for name in names:
        stack, numbers = found.get(name, ("", ()))
        if numbers and stack in ordered:
            depths[name] = ordered[stack].index(numbers) / (len(ordered[stack]) - 1)
        else:
            depths[name] = float(is_last(name, known))
    return depths


def _is_stem(stack: str) -> bool:
    """Whether a stack of numbered layers is the beginning of a network: conv1.0, stem.1, feature_extractor.layers.2."""
    return bool(FIRST.search(stack)) or stack.rpartition(".")[2] == "conv"


def _position(name: str, prefixes: Sequence[str]) -> int:
    """The position of the (longest) prefix that a name has."""
    fitting = [p for p in prefixes if name == p or name.startswith(p.rstrip(".") + ".")]
    if not fitting:
        raise ValueError(f"'{name}' has none of the prefixes that `depth` lists.")
    return prefixes.index(max(fitting, key=len))
