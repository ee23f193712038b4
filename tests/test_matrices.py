"""Which tensors are linear maps, and that every method that asks keeps to the answer."""

import pytest
import torch

import mergekit_lite as mkl
from mergekit_lite.geometry import principal_cosines
from mergekit_lite.matrices import is_matrix
from mergekit_lite.suites.vision import import_timm

MAPS = [
    "blocks.0.mlp.fc1.weight",
    "attn.in_proj_weight",
    "embeddings.patch_embedding.weight",
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "encoder.pos_conv_embed.conv.weight",
    "rel_pos.mlp.fc1.weight",
    "cpb_mlp.0.weight",
    "lm_head.weight",
    "class_embed.weight",
    "embedding_hidden_mapping_in.weight",
    "blocks.0.mlp_tokens.fc1.weight",
    "visual.proj",
    "text_projection",
    "conv1.weight",
    "x_embedder.weight",
    "time_embed.0.weight",
    "score.weight",
    "w",
    "0.weight",
    "weight",
    "position.dense.weight",
    "decoder.block.0.layer.0.SelfAttention.q.weight",
    "h.0.attn.c_attn.weight",
    "layers.0.self_attn.k_proj.weight",
    "pos_proj.weight",
    "encoder.layer.0.attention.self.pos_key_proj.weight",
    "proj_out.weight",
]
TABLES = [
    "pos_embed",
    "pos_embed.weight",
    "position_embedding.weight",
    "embeddings.position_embeddings.weight",
    "absolute_pos_embed",
    "layers.0.blocks.0.attn.relative_position_bias_table",
    "rel_pos_bias.relative_position_bias_table",
    "rel_pos_h",
    "rel_pos_w",
    "blocks.3.attn.rel_pos_h",
    "wpe.weight",
    "transformer.wte.weight",
    "model.embed_tokens.weight",
    "shared.weight",
    "pos_emb",
    "embeddings.token_type_embeddings.weight",
    "embeddings.word_embeddings.weight",
    "positional_embedding",
    "visual.positional_embedding",
    "token_embedding.weight",
    "encoder.pos_embedding",
    "embed_positions.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "stages.0.blocks.0.attention_biases",
    "register_tokens",
    "cls_token",
    "mask_token",
    "pos_embed_window",
    "query_position_embeddings.weight",
    "query_embed.weight",
    "tok_embeddings.weight",
    "gpt_neox.embed_in.weight",
    "mixer.A_log",
]


@pytest.mark.parametrize("name", MAPS)
def test_names_of_maps(name):
    assert is_matrix(torch.zeros(4, 5), name)


@pytest.mark.parametrize("name", TABLES)
def test_names_of_tables(name):
    assert not is_matrix(torch.zeros(4, 5), name)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 5), True),
        ((4, 3, 7, 7), True),
        ((4, 3, 5), True),
        ((4, 1, 3, 3), False),  # depthwise
        ((1, 5), False),  # a single output
        ((1, 197, 192), False),
        ((1, 1, 192), False),
        ((3, 1, 1), False),
        ((0, 5), False),
        ((3, 0), False),
        ((3, 2, 0), False),
        ((5,), False),
        ((), False),
    ],
)
def test_shapes(shape, expected):
    assert is_matrix(torch.zeros(shape)) is expected


@pytest.mark.parametrize(
    ("model", "others"),
    [
        ("vit_tiny_patch16_224", {"cls_token", "pos_embed"}),
        ("deit_tiny_distilled_patch16_224", {"cls_token", "dist_token", "pos_embed"}),
        ("swin_tiny_patch4_window7_224", {"relative_position_bias_table"}),
        ("beit_base_patch16_224", {"cls_token", "relative_position_bias_table"}),
        ("levit_128s", {"attention_biases"}),
        ("resnet18", set()),
    ],
)
def test_in_real_networks_all_weights_of_linear_layers_and_full_convolutions_are_maps(model, others):
    timm = import_timm()
    with torch.device("meta"):
        net = timm.create_model(model)
    layers = {
        f"{name}.weight"
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module.weight.shape[1] > 1
    }
    found = {name for name, p in net.named_parameters() if is_matrix(p, name)}
    assert found == layers
    rest = {name.rpartition(".")[2] for name, p in net.named_parameters() if name not in found and p.ndim > 1}
    assert rest == others


def test_in_pocket8_the_shapes_alone_decide(suite):
    for name, weight in suite.base.items():
        assert is_matrix(weight, name) == (weight.ndim >= 2 and weight.shape[1] > 1)


@pytest.mark.parametrize("name", ["pos_embed", "embeddings.position_embeddings.weight", "cls_token"])
def test_methods_do_not_take_a_table_for_a_matrix(name):
    """It is averaged, as a bias is, or left at the base; and a layer of the same numbers is not."""
    generator = torch.Generator().manual_seed(0)
    base, *experts = ({key: torch.randn(6, 5, generator=generator) for key in (name, "fc.weight")} for _ in range(3))
    base, *experts = ({key: state[name].clone() for key in state} for state in (base, *experts))
    tv = mkl.TaskVectors(base, experts)
    mean = torch.stack([expert[name] for expert in experts]).mean(0)
    for method in (mkl.tsv, mkl.iso_c, mkl.iso_cts):
        merged = method(tv)
        torch.testing.assert_close(merged[name], mean)
        assert not torch.allclose(merged["fc.weight"], mean, atol=0.01)
    for solver in ("adam", "exact"):
        merged = mkl.wudi(tv, solver=solver, learning_rate=0.1, steps=3)
        assert torch.equal(merged[name], base[name])
        assert not torch.allclose(merged["fc.weight"], base[name], atol=0.01)
    assert list(principal_cosines(tv, 2)) == ["fc.weight"]
