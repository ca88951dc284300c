"""Every weight of every kind of tower lies at the depth that its forward pass gives it."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import open_clip
import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from torch import nn
from transformers import AutoConfig

from clip_exp.config.base import plain
from clip_exp.config.finetune import TowerTuningConfig
from clip_exp.config.model import ModelConfig, Pooler, Projection
from clip_exp.errors import ConfigError
from clip_exp.models.clip import build_model
from clip_exp.models.depth import depths, projection_names
from clip_exp.models.families.huggingface.tower import HuggingFaceText, build_encoder
from clip_exp.models.layers import ProjectedTower, build_projection
from clip_exp.training.optim import freeze
from tests.models.small import small_config


def at(tower: nn.Module, depth: int) -> set[str]:
    return {name for name, found in depths(tower).of.items() if found == depth}


# ------------------------------------------------------------------------------------------------------------ families


class Family(NamedTuple):
    """A tower, and the beginnings of its parameters' names: before the blocks, of the last two blocks, and behind them."""

    build: Callable[[], nn.Module]
    blocks: int
    before: tuple[str, ...]
    last: tuple[str, ...]
    second_last: tuple[str, ...]
    after: tuple[str, ...]


def ours(tower: str, **kinds: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = small_config()
        values = plain(getattr(config, tower)) | kinds
        kind = next(
            of
            for of in ModelConfig.model_fields[tower].annotation.members()
            if of.model_fields["kind"].default == values["kind"]
        )
        values = {key: value for key, value in values.items() if key in kind.model_fields}
        setattr(config, tower, kind.model_validate(values))
        if config.image.kind == "siglip":
            config.embed_dim = 64
        return getattr(build_model(config), tower)

    return build


def of_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: ProjectedTower(timm.create_model(name, num_classes=0), build_projection(8, 8, Projection.linear))


def of_transformers(kind: str, **options: Any) -> Callable[[], nn.Module]:
    sizes = {"num_hidden_layers": 3, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 12}

    def build() -> nn.Module:
        config = AutoConfig.for_model(kind, vocab_size=50, pad_token_id=0, **(options or sizes))
        return HuggingFaceText(build_encoder(config, with_pooler=False), 8, Pooler.mean, Projection.mlp)

    return build


def of_open_clip(tower: str, **vision: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        image = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16, **vision}
        text = {"context_length": 8, "vocab_size": 50, "width": 48, "layers": 3, "heads": 3}
        return getattr(open_clip.CustomTextCLIP(40, image, text), tower)

    return build


ENCODER = ("encoder.encoder.layer.2.", "encoder.encoder.layer.1.")
FAMILIES = {
    "vit": Family(ours("image", layers=3), 3, ("class_embedding", "positional_embedding", "patch_embedding.", "ln_pre."),
        ("transformer.blocks.2.",), ("transformer.blocks.1.",), ("ln_post.", "projection.")),
    "text": Family(ours("text", layers=3), 3, ("token_embedding.", "positional_embedding"),
        ("transformer.blocks.2.",), ("transformer.blocks.1.",), ("ln_final.", "projection.")),
    "resnet": Family(ours("image", kind="resnet", stages=[2, 1, 1, 2], width=8), 6, ("stem.",),
        ("stages.3.1.",), ("stages.3.0.",), ("pool.",)),
    "siglip": Family(ours("image", kind="siglip", layers=3), 3, ("positional_embedding", "patch_embedding."),
        ("transformer.blocks.2.",), ("transformer.blocks.1.",), ("ln_post.", "pool.")),
    "siglip text": Family(ours("text", kind="siglip", layers=3, tokenizer="of-nobody"), 3, ("token_embedding.", "positional_embedding"),
        ("transformer.blocks.2.",), ("transformer.blocks.1.",), ("ln_final.", "projection.")),
    "vit_tiny_patch16_224": Family(of_timm("vit_tiny_patch16_224"), 12, ("trunk.cls_token", "trunk.pos_embed", "trunk.patch_embed."),
        ("trunk.blocks.11.",), ("trunk.blocks.10.",), ("trunk.norm.", "projection.")),
    "vit_base_patch16_siglip_224": Family(of_timm("vit_base_patch16_siglip_224"), 12, ("trunk.pos_embed", "trunk.patch_embed."),
        ("trunk.blocks.11.",), ("trunk.blocks.10.",), ("trunk.norm.", "trunk.attn_pool.", "projection.")),
    "eva02_tiny_patch14_224": Family(of_timm("eva02_tiny_patch14_224"), 12, ("trunk.cls_token", "trunk.pos_embed", "trunk.patch_embed."),
        ("trunk.blocks.11.",), ("trunk.blocks.10.",), ("trunk.fc_norm.", "projection.")),
    "beit_base_patch16_224": Family(of_timm("beit_base_patch16_224"), 12, ("trunk.cls_token", "trunk.patch_embed."),
        ("trunk.blocks.11.",), ("trunk.blocks.10.",), ("trunk.fc_norm.", "projection.")),
    "deit3_small_patch16_224": Family(of_timm("deit3_small_patch16_224"), 12, ("trunk.cls_token", "trunk.pos_embed", "trunk.patch_embed."),
        ("trunk.blocks.11.",), ("trunk.blocks.10.",), ("trunk.norm.", "projection.")),
    "cait_xxs24_224": Family(of_timm("cait_xxs24_224"), 26, ("trunk.cls_token", "trunk.pos_embed", "trunk.patch_embed."),
        ("trunk.blocks_token_only.1.",), ("trunk.blocks_token_only.0.",), ("trunk.norm.", "projection.")),
    "mixer_s32_224": Family(of_timm("mixer_s32_224"), 8, ("trunk.stem.",),
        ("trunk.blocks.7.",), ("trunk.blocks.6.",), ("trunk.norm.", "projection.")),
    "convnext_atto": Family(of_timm("convnext_atto"), 12, ("trunk.stem.",),
        ("trunk.stages.3.blocks.1.",), ("trunk.stages.3.blocks.0.", "trunk.stages.3.downsample."), ("trunk.head.norm.", "projection.")),
    "swin_tiny_patch4_window7_224": Family(of_timm("swin_tiny_patch4_window7_224"), 12, ("trunk.patch_embed.",),
        ("trunk.layers.3.blocks.1.",), ("trunk.layers.3.blocks.0.", "trunk.layers.3.downsample."), ("trunk.norm.", "projection.")),
    "pvt_v2_b0": Family(of_timm("pvt_v2_b0"), 8, ("trunk.patch_embed.",),
        ("trunk.stages.3.blocks.1.",), ("trunk.stages.3.blocks.0.", "trunk.stages.3.downsample.", "trunk.stages.2.norm."), ("trunk.stages.3.norm.", "projection.")),
    "resnet50": Family(of_timm("resnet50"), 16, ("trunk.conv1.", "trunk.bn1."),
        ("trunk.layer4.2.",), ("trunk.layer4.1.",), ("projection.",)),
    "regnety_002": Family(of_timm("regnety_002"), 13, ("trunk.stem.",),
        ("trunk.s4.b7.",), ("trunk.s4.b6.",), ("projection.",)),
    "efficientnet_b0": Family(of_timm("efficientnet_b0"), 16, ("trunk.conv_stem.", "trunk.bn1."),
        ("trunk.blocks.6.0.",), ("trunk.blocks.5.3.",), ("trunk.conv_head.", "trunk.bn2.", "projection.")),
    "bert": Family(of_transformers("bert"), 3, ("encoder.embeddings.",), ENCODER[:1], ENCODER[1:], ("projection.",)),
    "xlm-roberta": Family(of_transformers("xlm-roberta"), 3, ("encoder.embeddings.",), ENCODER[:1], ENCODER[1:], ("projection.",)),
    "mpnet": Family(of_transformers("mpnet"), 3, ("encoder.embeddings.", "encoder.encoder.relative_attention_bias."),
        ENCODER[:1], ENCODER[1:], ("projection.",)),
    "deberta-v2": Family(
        of_transformers("deberta-v2", num_hidden_layers=3, hidden_size=12, num_attention_heads=2, intermediate_size=12,
            relative_attention=True, norm_rel_ebd="layer_norm"),
        3, ("encoder.embeddings.", "encoder.encoder.rel_embeddings.", "encoder.encoder.LayerNorm."),
        ENCODER[:1], ENCODER[1:], ("projection.",)),
    "distilbert": Family(of_transformers("distilbert", n_layers=3, dim=12, n_heads=2, hidden_dim=12), 3, ("encoder.embeddings.",),
        ("encoder.transformer.layer.2.",), ("encoder.transformer.layer.1.",), ("projection.",)),
    "mt5": Family(of_transformers("mt5", d_model=12, d_kv=6, d_ff=12, num_layers=3, num_heads=2), 3, ("encoder.embed_tokens.",),
        ("encoder.block.2.",), ("encoder.block.1.",), ("encoder.final_layer_norm.", "projection.")),
    "open_clip": Family(of_open_clip("visual"), 3, ("class_embedding", "positional_embedding", "conv1.", "ln_pre."),
        ("transformer.resblocks.2.",), ("transformer.resblocks.1.",), ("ln_post.", "proj")),
    "open_clip pooled by attention": Family(of_open_clip("visual", attentional_pool=True, attn_pooler_heads=2), 3,
        ("class_embedding", "positional_embedding", "conv1.", "ln_pre."),
        ("transformer.resblocks.2.",), ("transformer.resblocks.1.",), ("attn_pool.", "ln_post.", "proj")),
    "open_clip text": Family(of_open_clip("text"), 3, ("token_embedding.", "positional_embedding"),
        ("transformer.resblocks.2.",), ("transformer.resblocks.1.",), ("ln_final.", "text_projection")),
    "open_clip resnet": Family(of_open_clip("visual", layers=[1, 1, 1, 2]), 5, ("conv", "bn"),
        ("layer4.1.",), ("layer4.0.",), ("attnpool.",)),
    "open_clip of timm": Family(lambda: TimmModel("vit_tiny_patch16_224", 40, image_size=224, proj="mlp"), 12,
        ("trunk.cls_token", "trunk.pos_embed", "trunk.patch_embed."),
        ("trunk.blocks.11.",), ("trunk.blocks.10.",), ("trunk.norm.", "head.")),
}  # fmt: skip


@cache
def built(name: str) -> nn.Module:
    """Without memory, and once for all tests."""
    with torch.device("meta"):
        return FAMILIES[name].build()


def learning(tower: nn.Module, unfrozen_blocks: int) -> set[str]:
    tower.requires_grad_(True)
    freeze(tower, TowerTuningConfig(freeze=True, unfrozen_blocks=unfrozen_blocks), "finetune.image")
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_k_blocks_and_what_follows_them_learn(name: str) -> None:
    family, tower = FAMILIES[name], built(name)
    names = [name for name, _ in tower.named_parameters()]

    def beginning_with(*beginnings: str) -> set[str]:
        found = {name for name in names if name.startswith(beginnings)}
        assert all(any(name.startswith(each) for name in found) for each in beginnings)
        return found

    assert learning(tower, 0) == beginning_with(*family.after)
    assert learning(tower, 1) == beginning_with(*family.after, *family.last)
    assert learning(tower, 2) == beginning_with(*family.after, *family.last, *family.second_last)
    assert set(names) - learning(tower, family.blocks) == beginning_with(*family.before)
    with pytest.raises(ConfigError, match=f"must be at most {family.blocks}, the number of blocks"):
        learning(tower, family.blocks + 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_depth_from_the_embeddings_to_what_follows_the_blocks_has_weights(name: str) -> None:
    assert set(depths(built(name)).of.values()) == set(range(FAMILIES[name].blocks + 2))


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if timm.is_model(name) and name not in ("cait_xxs24_224", "pvt_v2_b0")]
)
def test_blocks_of_timm_are_numbered_as_timm_does_for_rates_by_layer(name: str) -> None:
    """But for what follows the blocks, which timm counts to the last of them or as a further one. CaiT's overlap in timm, and PVT's are stages."""
    tower = built(name)
    of, blocks = depths(tower)
    theirs = group_parameters(tower.trunk, tower.trunk.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    ours = {name: of[f"trunk.{name}"] for name in theirs}
    assert {name: depth for name, depth in ours.items() if depth <= blocks} == {
        name: theirs[name] for name, depth in ours.items() if depth <= blocks
    }
    assert all(theirs[name] >= blocks for name, depth in ours.items() if depth > blocks)


# ---------------------------------------------------------------------------------------------------------- projections


def test_a_projection_is_found_by_its_name_wherever_it_is_registered() -> None:
    """open_clip's towers hold it as a parameter of their own, which comes first."""
    assert projection_names(built("open_clip")) == {"proj"}
    assert projection_names(built("vit")) == {"projection.weight"}
    bert = built("bert")
    assert projection_names(bert) == {"projection.0.weight", "projection.2.weight"} <= at(bert, 4)


def test_a_tower_without_a_projection_has_its_last_layer_as_projection() -> None:
    tower = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.LayerNorm(2))
    assert projection_names(tower) == {"1.weight", "1.bias"}
