r"""How deep in a network a tensor is, read from its name.

A layer is a block with a number in its name. Of all stacks of numbered blocks in a network the one with the most
blocks counts (two of one size, such as an image and a text tower, count each for itself), and its blocks are ordered
by their numbers:

======================================  ==================  ==========
tensor                                  stack               numbers
======================================  ==================  ==========
``encoder.layers.11.mlp.fc1.weight``    ``encoder.layers``  11
``blocks.0.1.conv_pw.weight``           ``blocks``          0, 1
``stages.2.blocks.0.norm.weight``       ``stages``          2, 0
``layer4.0.downsample.0.weight``        ``layer``           4, 0
``conv1.weight``, ``head.fc.weight``    none                none
======================================  ==================  ==========

What stands in no block is as deep as the last one if its name says that it ends the network (``head``,
``classifier``, ``norm``, ``ln_post``, ...: `END`), else as shallow as the first one: stem and embeddings. The order of
the tensors plays no part, since files keep another one than networks.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

# How deep a tensor is, said by hand: a function from its name to a number, or prefixes of names from shallow to deep.
Depth = Callable[[str], int] | Sequence[str]

# The first number that stands between dots, with one right before it (layer4.0) and those after it (0.1, 2.blocks.0).
BLOCK = re.compile(r"(?P<stack>.*?)(?P<numbers>\d*(?:^|\.|_)\d+(?:\.(?:blocks?\.)?\d+)*)\.")

# What ends a network; "patch_embed.norm" and "stem.norm" do not.
END = re.compile(
    r"(?!.*(?:embed|stem))(?:.*\.)?(?:head|lm_head|conv_head|bn2|fc|fc_norm|classifier|pooler|norm|ln_f|ln_final|ln_post|"
    r"post_layernorm|final_layer_norm|proj|\w+_projection)(?:\.|$)"
)


def relative_depths(names: Iterable[str], depth: Depth | None = None) -> dict[str, float]:
    """(l - 1) / (L - 1) by tensor name, for a network of L layers: 0 is the shallow end, 1 the deep one.

    Args:
        names: of the tensors.
        depth: ``depth(name)``, a whole number that grows from the shallow end to the deep one; or a list of prefixes
            such as ``["stem", "layer1", "layer2", "head"]``. By default numbered blocks are looked for.

    Raises:
        ValueError: there are no numbered blocks, all tensors are equally deep, or a name has none of the prefixes.
    """
    if depth is None:
        return _depths_of_blocks(list(names))
    levels = {name: depth(name) if callable(depth) else _position(name, depth) for name in names}
    first, last = min(levels.values()), max(levels.values())
    if first == last:
        raise ValueError("all tensors are equally deep: there is nothing between the shallow end and the deep one.")
    return {name: (level - first) / (last - first) for name, level in levels.items()}


def block_of(name: str) -> tuple[str, tuple[int, ...]] | None:
    """The stack that a tensor's block stands in, and the block's numbers there (see the table above)."""
    match = BLOCK.match(name)
    return (match["stack"], tuple(map(int, re.findall(r"\d+", match["numbers"])))) if match else None


def _depths_of_blocks(names: Sequence[str]) -> dict[str, float]:
    found = {name: block for name in names if (block := block_of(name))}
    stacks: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for stack, numbers in found.values():
        stacks[stack].add(numbers)
    most = max(map(len, stacks.values()), default=0)
    if most < 2:
        raise ValueError("these tensors' names show no stack of numbered blocks; say how deep they are with `depth`.")
    ordered = {stack: sorted(blocks) for stack, blocks in stacks.items() if len(blocks) == most}

    depths = {}
    for name in names:
        stack, numbers = found.get(name, ("", ()))
        in_block = numbers and stack in ordered
        depths[name] = ordered[stack].index(numbers) / (most - 1) if in_block else float(bool(END.match(name)))
    return depths


def _position(name: str, prefixes: Sequence[str]) -> int:
    """The position of the (longest) prefix that a name has."""
    fitting = [p for p in prefixes if name == p or name.startswith(p.rstrip(".") + ".")]
    if not fitting:
        raise ValueError(f"'{name}' has none of the prefixes that `depth` lists.")
    return prefixes.index(max(fitting, key=len))
