import torch

from clip_exp.config.model_schema import ImageTower, ImageTowerConfig, ModelConfig, TextTower, TextTowerConfig
from clip_exp.config.schema import FineTuneConfig
from clip_exp.models import build_model
from clip_exp.training.optim import named_groups

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def test_positions_and_class_tokens_of_other_libraries_are_not_decayed_and_their_matrices_are() -> None:
    config = ModelConfig(
        name="foreign",
        embed_dim=32,
        image=ImageTowerConfig(kind=ImageTower.timm, name="vit_tiny_patch16_224", image_size=32),
        text=TextTowerConfig(kind=TextTower.huggingface, name="bert", architecture={**BERT, "pad_token_id": 0}),
    )
    with torch.device("meta"):
        groups = named_groups(build_model(config), FineTuneConfig())
    kind_of = {name: group.kind for group, members in groups.items() for name, _ in members}
    free = ["image.trunk.pos_embed", "image.trunk.cls_token", "text.encoder.embeddings.position_embeddings.weight"]
    assert {kind_of[name] for name in free} == {"no_decay"}
    decayed = ["image.trunk.patch_embed.proj.weight", "text.encoder.embeddings.word_embeddings.weight"]
    assert {kind_of[name] for name in decayed} == {"decay"}
