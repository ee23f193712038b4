"""How deep tensors are in the networks that people merge: names of timm's and of Hugging Face's models."""

import pytest
import torch

from mergekit_lite.data_free.depth import block_of, is_last, relative_depths
from mergekit_lite.suites.vision import import_timm

timm = import_timm()

# By network: how many layers, and the first words of what is in no block, at the shallow end and at the deep one.
TIMM = {
    "deit_tiny_distilled_patch16_224": (12, "cls_token dist_token pos_embed patch_embed", "norm head head_dist"),
    "swinv2_tiny_window8_256": (15, "patch_embed", "norm head"),
    "convnext_tiny": (21, "stem", "head"),
    "resnet10t": (4, "conv1 bn1", "fc"),  # its stem has more numbered layers than it has blocks
    "efficientnet_b0": (16, "conv_stem bn1", "conv_head bn2 classifier"),
    "mobilenetv3_small_050": (12, "conv_stem bn1", "conv_head classifier"),
    "mobilenetv4_conv_small": (17, "conv_stem bn1", "conv_head norm_head classifier"),
    "regnety_002": (13, "stem", "head"),
    "nf_regnet_b0": (16, "stem", "final_conv head"),
    "mixer_s32_224": (8, "stem", "norm head"),
    "beit_base_patch16_224": (12, "cls_token patch_embed", "fc_norm head"),
    "vit_base_patch16_siglip_224": (12, "pos_embed patch_embed", "norm attn_pool"),
    "vit_base_patch16_clip_224": (12, "cls_token pos_embed patch_embed norm_pre", "norm head"),
    "cait_xxs24_224": (24, "cls_token pos_embed patch_embed", "blocks_token_only norm head"),
    "levit_128s": (11, "stem", "head head_dist"),
    "densenet121": (61, "features.conv0 features.norm0", "features.norm5 classifier"),
}


@pytest.mark.parametrize("model", TIMM)
def test_of_timm(model):
    layers, shallow, deep = TIMM[model]
    with torch.device("meta"):  # names and shapes only
        names = list(timm.create_model(model).state_dict())
    depths = relative_depths(names)
    assert sorted(set(depths.values())) == pytest.approx([i / (layers - 1) for i in range(layers)])
    ends = {0.0: shallow.split(), 1.0: deep.split()}
    for end, modules in ends.items():
        for module in modules:
            inside = {depths[name] for name in names if f"{name}.".startswith(f"{module}.")}
            assert inside == {end}, module
    listed = tuple(f"{module}." for modules in ends.values() for module in modules)
    rest = [name for name in names if not f"{name}.".startswith(listed)]
    assert all(block_of(name) for name in rest), "everything else stands in a block"
    assert [depths[name] for name in rest] == sorted(depths[name] for name in rest), "in a network's own order"
    assert relative_depths(sorted(names)) == {name: depths[name] for name in sorted(names)}


# Names as Hugging Face's models have them, with L for the numbers of the blocks: shallow, in the blocks, deep.
HUGGING_FACE = {
    "bert": (
        "embeddings.word_embeddings.weight embeddings.position_embeddings.weight "
        "embeddings.token_type_embeddings.weight embeddings.LayerNorm.weight",
        "encoder.layer.L.attention.self.query.weight encoder.layer.L.output.LayerNorm.bias",
        "pooler.dense.weight classifier.weight cls.predictions.bias cls.predictions.transform.dense.weight "
        "cls.predictions.transform.LayerNorm.weight cls.predictions.decoder.weight qa_outputs.weight",
    ),
    "roberta": (
        "roberta.embeddings.word_embeddings.weight roberta.embeddings.LayerNorm.bias",
        "roberta.encoder.layer.L.intermediate.dense.weight",
        "classifier.dense.weight classifier.out_proj.weight lm_head.dense.weight "
        "lm_head.layer_norm.weight lm_head.bias",
    ),
    "distilbert": (
        "distilbert.embeddings.word_embeddings.weight distilbert.embeddings.LayerNorm.weight",
        "distilbert.transformer.layer.L.ffn.lin1.weight",
        "pre_classifier.weight classifier.weight vocab_transform.weight vocab_layer_norm.weight vocab_projector.weight",
    ),
    "gpt2": (
        "transformer.wte.weight transformer.wpe.weight",
        "transformer.h.L.ln_1.weight transformer.h.L.attn.c_attn.weight",
        "transformer.ln_f.weight lm_head.weight score.weight",
    ),
    "llama": (
        "model.embed_tokens.weight",
        "model.layers.L.self_attn.q_proj.weight model.layers.L.input_layernorm.weight",
        "model.norm.weight lm_head.weight score.weight",
    ),
    "llama, as first released": ("tok_embeddings.weight", "layers.L.attention.wq.weight", "norm.weight output.weight"),
    "gpt_neox": (
        "gpt_neox.embed_in.weight",
        "gpt_neox.layers.L.attention.dense.weight",
        "gpt_neox.final_layer_norm.weight embed_out.weight",
    ),
    "t5": (
        "shared.weight encoder.embed_tokens.weight decoder.embed_tokens.weight",
        "encoder.block.L.layer.0.SelfAttention.q.weight encoder.block.L.layer.1.DenseReluDense.wi.weight "
        "decoder.block.L.layer.2.DenseReluDense.wo.weight",
        "encoder.final_layer_norm.weight decoder.final_layer_norm.weight lm_head.weight",
    ),
    "clip": (
        "text_model.embeddings.token_embedding.weight text_model.embeddings.position_embedding.weight "
        "vision_model.embeddings.class_embedding vision_model.embeddings.patch_embedding.weight "
        "vision_model.embeddings.position_embedding.weight vision_model.pre_layrnorm.weight",
        "text_model.encoder.layers.L.mlp.fc1.weight vision_model.encoder.layers.L.self_attn.out_proj.weight",
        "text_model.final_layer_norm.weight vision_model.post_layernorm.weight visual_projection.weight "
        "text_projection.weight logit_scale",
    ),
    "clip, as first released": (
        "visual.class_embedding visual.positional_embedding visual.conv1.weight visual.ln_pre.weight "
        "token_embedding.weight positional_embedding",
        "visual.transformer.resblocks.L.attn.in_proj_weight transformer.resblocks.L.ln_1.bias",
        "visual.ln_post.weight visual.proj ln_final.weight text_projection logit_scale",
    ),
    "siglip": (
        "vision_model.embeddings.patch_embedding.weight vision_model.embeddings.position_embedding.weight",
        "vision_model.encoder.layers.L.layer_norm1.weight",
        "vision_model.post_layernorm.weight vision_model.head.probe vision_model.head.attention.in_proj_weight "
        "vision_model.head.mlp.fc1.weight",
    ),
    "vit": (
        "vit.embeddings.cls_token vit.embeddings.position_embeddings vit.embeddings.patch_embeddings.projection.weight",
        "vit.encoder.layer.L.layernorm_before.weight",
        "vit.layernorm.weight vit.pooler.dense.weight classifier.weight",
    ),
    "dinov2": (
        "embeddings.cls_token embeddings.mask_token embeddings.position_embeddings "
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.L.layer_scale1.lambda1",
        "layernorm.weight",
    ),
    "swin": (
        "embeddings.patch_embeddings.projection.weight embeddings.norm.weight",
        "encoder.layers.0.blocks.L.layernorm_before.weight encoder.layers.0.blocks.L.attention.self.query.weight",
        "layernorm.weight classifier.weight",
    ),
    "convnext": (
        "convnext.embeddings.patch_embeddings.weight convnext.embeddings.layernorm.weight",
        "convnext.encoder.stages.1.layers.L.dwconv.weight",
        "convnext.layernorm.weight classifier.weight",
    ),
    "wav2vec2": (
        "wav2vec2.feature_extractor.conv_layers.0.conv.weight wav2vec2.feature_extractor.conv_layers.6.conv.weight "
        "wav2vec2.feature_projection.layer_norm.weight wav2vec2.feature_projection.projection.weight "
        "wav2vec2.masked_spec_embed wav2vec2.encoder.pos_conv_embed.conv.bias",
        "wav2vec2.encoder.layers.L.attention.k_proj.weight",
        "wav2vec2.encoder.layer_norm.weight lm_head.weight projector.weight classifier.weight",
    ),
    "torchvision's vit": (
        "class_token conv_proj.weight encoder.pos_embedding",
        "encoder.layers.encoder_layer_L.mlp.0.weight",
        "encoder.ln.weight heads.head.weight",
    ),
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("model", HUGGING_FACE)
def test_of_other_libraries(model, backwards):
    shallow, blocks, deep = (part.split() for part in HUGGING_FACE[model])
    in_blocks = {_numbered(name, i): i / 3 for name in blocks for i in range(4)}
    expected = dict.fromkeys(shallow, 0.0) | in_blocks | dict.fromkeys(deep, 1.0)
    names = list(expected)
    depths = relative_depths(names[::-1] if backwards else names)
    assert {name: depth for name, depth in depths.items() if depth != pytest.approx(expected[name])} == {}


def _numbered(name, i):
    """The block's number is the "L" that stands alone or at the end of a word."""
    words = [word[:-1] + str(i) if word == "L" or word.endswith("_L") else word for word in name.split(".")]
    return ".".join(words)


def test_towers_of_different_depths():
    """CLIP ViT-L/14: 24 blocks for images, 12 for words, each from its shallow end to its deep one."""
    sizes = {"vision_model": 5, "text_model": 3}
    names = [f"{tower}.encoder.layers.{i}.w" for tower, n in sizes.items() for i in range(n)]
    assert list(relative_depths(names).values()) == [0, 0.25, 0.5, 0.75, 1, 0, 0.5, 1]


def test_one_name_beside_another():
    """The second normalisation: EfficientNet's last one, or that of a stem of three convolutions (CLIP's ResNets)."""
    assert is_last("bn2.weight", {"conv_head.weight"})
    assert is_last("backbone.bn2.bias", {"backbone.conv_head.weight"})
    assert not is_last("visual.bn2.weight", {"visual.conv2.weight"})
    assert not is_last("bn2.weight", {"conv_head"})


def test_pocket8_is_as_it_was(suite):
    depths = relative_depths(suite.base)
    assert {depths[name] for name in suite.base if name.startswith(("conv_stem.", "bn1."))} == {0.0}
    blocks = dict.fromkeys(block_of(name) for name in suite.base if block_of(name))
    assert len(blocks) == 11
    for i, block in enumerate(blocks):
        assert {depths[name] for name in suite.base if block_of(name) == block} == {i / 10}


@pytest.mark.parametrize(
    ("depth", "error", "message"),
    [
        ("blocks", TypeError, "depth must be a function of names or a list of prefixes, got 'blocks'"),
        (3, TypeError, "depth must be a function"),
        (lambda name: "deep", TypeError, "depth must be a number, got 'deep'"),
        (lambda name: float("nan"), ValueError, "depth must be finite"),
    ],
)
def test_a_depth_by_hand_is_a_number(depth, error, message):
    with pytest.raises(error, match=message):
        relative_depths(["blocks.0.w", "blocks.1.w"], depth)
