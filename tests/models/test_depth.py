"""Every weight of every kind of tower lies at the depth that its forward pass gives it."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from clip_exp.config.model_schema import ImageTower
from clip_exp.models import build_model
from clip_exp.models.depth import block_names, depths, projection_names
from tests.models.small import small_config


def at(tower: nn.Module, depth: int) -> set[str]:
    return {name for name, found in depths(tower).of.items() if found == depth}


def test_a_transformer_begins_with_its_embeddings_and_ends_with_its_norm_and_projection() -> None:
    model = build_model(small_config())
    for tower, first, last in (
        (model.image, {"class_embedding", "positional_embedding", "patch_embedding.weight"}, "ln_post"),
        (model.text, {"token_embedding.weight", "positional_embedding"}, "ln_final"),
    ):
        assert depths(tower).blocks == 2
        assert first <= at(tower, 0)
        assert all(name.startswith("transformer.blocks.0.") for name in at(tower, 1))
        assert all(name.startswith("transformer.blocks.1.") for name in at(tower, 2))
        assert at(tower, 3) == {f"{last}.weight", f"{last}.bias", "projection.weight"}
        assert projection_names(tower) == {"projection.weight"}


def test_the_blocks_of_a_residual_network_count_across_its_stages() -> None:
    config = small_config()
    config.image.kind, config.image.stages, config.image.width = ImageTower.resnet, [2, 1, 1, 2], 8
    tower = build_model(config).image
    assert depths(tower).blocks == len(block_names(tower)) == 6
    assert {name.split(".")[0] for name in at(tower, 7)} & {name.split(".")[0] for name in at(tower, 6)} == set()
    order = list(depths(tower).of.values())
    assert order == sorted(order)


@pytest.mark.parametrize(("name", "blocks"), [("vit_tiny_patch16_224", 12), ("resnet18", 8)])
def test_a_backbone_of_timm_says_its_depth_itself(name: str, blocks: int) -> None:
    """Equal to the layers that timm's own groups for layer-wise decay count."""
    with torch.device("meta"):
        trunk = timm.create_model(name, num_classes=0)
    tower = nn.Module()
    tower.trunk, tower.projection = trunk, nn.Linear(8, 8)
    of, found = depths(tower)
    assert found == blocks
    names = {id(parameter): f"trunk.{name}" for name, parameter in trunk.named_parameters()}
    for group in param_groups_layer_decay(trunk, layer_decay=0.5):
        for parameter in group["params"]:
            assert 0.5 ** (blocks - of[names[id(parameter)]]) == group["lr_scale"]
    assert at(tower, blocks + 1) == {"projection.weight", "projection.bias"}


def test_an_encoder_of_transformers_ends_with_the_projection_whatever_it_is_made_of() -> None:
    from transformers import BertConfig, BertModel

    tower = nn.Module()
    tower.encoder = BertModel(BertConfig(num_hidden_layers=1, hidden_size=12, intermediate_size=12, vocab_size=50))
    tower.projection = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8))
    assert block_names(tower) == ["encoder.encoder.layer.0"]
    assert projection_names(tower) == {f"projection.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert projection_names(tower) <= at(tower, 2)
    assert all(name.startswith("encoder.embeddings.") for name in at(tower, 0))


def test_a_weight_that_is_registered_first_but_projects_is_the_last() -> None:
    """open_clip's towers hold their projection as a parameter of their own."""
    import open_clip

    twin = open_clip.CLIP(
        40,
        {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16},
        {"context_length": 8, "vocab_size": 50, "width": 48, "layers": 2, "heads": 3},
    )
    assert projection_names(twin.visual) == {"proj"}
    assert at(twin.visual, 3) == {"proj", "ln_post.weight", "ln_post.bias"}


def test_a_tower_without_a_projection_is_probed_by_its_last_layer() -> None:
    tower = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.LayerNorm(2))
    assert projection_names(tower) == {"1.weight", "1.bias"}
