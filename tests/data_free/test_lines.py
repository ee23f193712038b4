"""LiNeS, and how deep a tensor is."""

import math

import pytest
import timm
import torch

import mergekit_lite as mkl
from mergekit_lite.data_free.depth import block_of, relative_depths
from mergekit_lite.data_free.lines import scales_by_depth
from tests.data_free.test_simple_merges import flat

# ---------------------------------------------------------------- depth


@pytest.mark.parametrize(
    ("name", "stack", "numbers"),
    [
        ("encoder.layers.11.mlp.fc1.weight", "encoder.layers", (11,)),
        ("visual.transformer.resblocks.3.attn.in_proj_weight", "visual.transformer.resblocks", (3,)),
        ("blocks.0.1.conv_pw.weight", "blocks", (0, 1)),
        ("stages.2.blocks.0.norm.weight", "stages", (2, 0)),
        ("layer4.0.downsample.0.weight", "layer", (4, 0)),
        ("encoder.layers.encoder_layer_7.mlp.0.weight", "encoder.layers.encoder_layer", (7,)),
        ("3.weight", "", (3,)),
    ],
)
def test_blocks_by_name(name, stack, numbers):
    assert block_of(name) == (stack, numbers)


@pytest.mark.parametrize(
    "name", ["conv1.weight", "layer1.weight", "head.fc.weight", "patch_embed.proj.weight", "bn2.bias"]
)
def test_what_is_in_no_block(name):
    assert block_of(name) is None


@pytest.mark.parametrize(
    ("model", "blocks", "shallow", "deep"),
    [
        ("resnet18", 8, ["conv1.weight", "bn1.bias"], ["fc.weight"]),
        (
            "vit_tiny_patch16_224",
            12,
            ["cls_token", "pos_embed", "patch_embed.proj.weight"],
            ["norm.weight", "head.bias"],
        ),
        (
            "efficientnet_lite0",
            16,
            ["conv_stem.weight", "bn1.weight"],
            ["conv_head.weight", "bn2.bias", "classifier.bias"],
        ),
        # Three stages begin with a layer of their own that halves the resolution.
        ("convnext_atto", 15, ["stem.0.weight", "stem.1.bias"], ["head.norm.weight", "head.fc.weight"]),
        ("swin_tiny_patch4_window7_224", 15, ["patch_embed.norm.weight"], ["norm.weight", "head.fc.bias"]),
    ],
)
def test_depths_in_real_networks(model, blocks, shallow, deep):
    with torch.device("meta"):  # names and shapes only
        names = list(timm.create_model(model).state_dict())
    depths = relative_depths(names)
    assert sorted(set(depths.values())) == pytest.approx([i / (blocks - 1) for i in range(blocks)])
    assert all(depths[name] == 0 for name in shallow)
    assert all(depths[name] == 1 for name in deep)
    in_blocks = [depths[name] for name in names if block_of(name) and depths[name] not in (0, 1)]
    assert in_blocks == sorted(in_blocks), "a network's own order is from shallow to deep"
    assert relative_depths(sorted(names)) == {name: depths[name] for name in sorted(names)}


def test_two_towers_count_each_for_itself():
    names = [f"{tower}.layers.{i}.weight" for tower in ("text", "vision") for i in range(3)] + ["merge.0.weight"]
    assert list(relative_depths(names).values()) == [0, 0.5, 1, 0, 0.5, 1, 0]


def test_depth_by_hand():
    names = ["stem.conv.weight", "body.weight", "body.deep.weight", "head"]
    assert list(relative_depths(names, ["stem", "body", "body.deep", "head"]).values()) == [0, 1 / 3, 2 / 3, 1]
    assert list(relative_depths(names, lambda name: len(name)).values()) == [1, 7 / 12, 1, 0]
    with pytest.raises(ValueError, match="'head' has none of the prefixes"):
        relative_depths(names, ["stem", "body"])
    with pytest.raises(ValueError, match="equally deep"):
        relative_depths(names, lambda name: 1)
    with pytest.raises(ValueError, match="no stack of numbered blocks"):
        relative_depths(names)


# ---------------------------------------------------------------- LiNeS


def model(*values):
    names = ["stem.weight", "blocks.0.weight", "blocks.1.weight", "blocks.2.weight", "head.weight"]
    return {name: torch.tensor([value]) for name, value in zip(names, values, strict=True)}


@pytest.fixture
def deep() -> mkl.TaskVectors:
    return mkl.TaskVectors(
        model(0.0, 0.0, 0.0, 0.0, 0.0), [model(1.0, 2.0, 3.0, 4.0, 5.0), model(1.0, 0.0, 1.0, 0.0, 1.0)]
    )


def test_by_hand(deep):
    # Sums 2, 2, 4, 4, 6, with the scales .2, .2, .6, 1, 1.
    merged = mkl.lines(deep, shallow=0.2, deep=1.0)
    assert flat(merged).tolist() == pytest.approx([0.4, 0.4, 2.4, 4.0, 6.0])
    assert flat(mkl.lines(deep, deep=1.5)).tolist() == pytest.approx([1.0, 1.0, 4.0, 6.0, 9.0])  # from 1/K = .5
    assert flat(mkl.lines(deep[0], shallow=0.0, deep=1.0)).tolist() == pytest.approx([0.0, 0.0, 1.5, 4.0, 5.0])


def test_the_formula_of_the_paper():
    """CLIP's image encoder, with 12 blocks; the released code gives α to all that is in no block."""
    names = ["visual.class_embedding", "visual.conv1.weight", "visual.ln_post.weight"]
    blocks = {f"visual.transformer.resblocks.{i}.mlp.c_fc.weight": 0.3 + 0.5 * i / 11 for i in range(12)}
    scales = scales_by_depth([*names, *blocks], 0.3, 0.8)
    assert {name: scales[name] for name in blocks} == pytest.approx(blocks)
    assert [scales[name] for name in names] == pytest.approx([0.3, 0.3, 0.8])

    def as_released(name):
        return block_of(name)[1][0] if block_of(name) else 0

    released = scales_by_depth([*names, *blocks], 0.3, 0.8, as_released)
    assert released == pytest.approx(blocks | dict.fromkeys(names, 0.3))


def test_one_scale_is_task_arithmetic(deep):
    expected = flat(mkl.task_arithmetic(deep, scale=0.4))
    torch.testing.assert_close(flat(mkl.lines(deep, shallow=0.4, deep=0.4)), expected, rtol=1e-6, atol=1e-7)


def test_scaling_task_vectors_first(deep):
    scaled = mkl.scale_by_depth(deep, shallow=0.2, deep=1.0)
    expected = flat(mkl.lines(deep, shallow=0.2, deep=1.0))
    torch.testing.assert_close(flat(mkl.task_arithmetic(scaled, scale=1.0)), expected, rtol=1e-6, atol=1e-7)
    assert scaled.names == deep.names
    assert deep.flat()[0].tolist() == [1, 2, 3, 4, 5], "the old ones are as they were"


def test_another_merge(deep):
    merged = model(1.0, 1.0, 1.0, 2.0, 4.0)
    # The sum's 1-norm is 18, this merge's 9, so the shallow end has the scale 18 / 9 / 2 = 1.
    assert flat(mkl.lines(deep, deep=2.0, merged=merged)).tolist() == pytest.approx([1.0, 1.0, 1.5, 4.0, 8.0])
    assert flat(mkl.lines(deep, shallow=0.0, deep=1.0, merged=merged)).tolist() == pytest.approx([0, 0, 0.5, 2, 4])
    total = mkl.task_arithmetic(deep, scale=1.0)
    torch.testing.assert_close(flat(mkl.lines(deep, merged=total)), flat(mkl.lines(deep)))
    base = model(0.0, 0.0, 0.0, 0.0, 0.0)
    assert not flat(mkl.lines(deep, merged=base)).any()
    with pytest.raises(KeyError, match="merged lacks"):
        mkl.lines(deep, merged={})


def test_order_zero_vectors_and_copies(deep):
    torch.testing.assert_close(flat(mkl.lines(deep.subset([1, 0]))), flat(mkl.lines(deep)))
    torch.testing.assert_close(flat(mkl.lines(-deep)), -flat(mkl.lines(deep)))
    base = model(1.0, 2.0, 3.0, 4.0, 5.0)
    assert torch.equal(flat(mkl.lines(mkl.TaskVectors(base, [base, base]))), flat(base))
    expert = model(1.5, 2.5, 3.5, 4.5, 5.5)
    copies = mkl.lines(mkl.TaskVectors(base, [expert] * 4), deep=0.25)  # from 1/4 to 1/4: the average
    torch.testing.assert_close(flat(copies), flat(expert))


def test_files_are_merged_alike(tmp_path, deep):
    """A file keeps its tensors in another order than the network."""
    states = [model(0.0, 0.0, 0.0, 0.0, 0.0), model(1.0, 2.0, 3.0, 4.0, 5.0), model(1.0, 0.0, 1.0, 0.0, 1.0)]
    paths = [mkl.save(dict(sorted(state.items())), tmp_path / f"{i}.safetensors") for i, state in enumerate(states)]
    assert list(mkl.TaskVectors(paths[0], paths[1:]).base) != list(deep.base)
    merged = mkl.load(mkl.merge_files(mkl.lines, paths[0], paths[1:], tmp_path / "out.safetensors", deep=0.7))
    expected = mkl.lines(deep, deep=0.7)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_in_pocket8_deep_layers_bear_less(suite):
    """As the module says: here a falling scale does no worse than a constant one, and a rising one does."""
    tv = suite.task_vectors
    falling, constant, rising = (
        suite.evaluate(mkl.lines(tv, shallow=a, deep=b), split="validation").average
        for a, b in ((0.3, 0.2), (0.2, 0.2), (0.125, 0.3))
    )
    assert falling >= constant > rising + 0.03


def test_wrong_input(deep):
    for shallow, end in ((math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match="finite"):
            mkl.lines(deep, shallow=shallow, deep=end)
