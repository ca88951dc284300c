"""What a backbone of timm brings from its own library."""

import pytest

from clip_exp.config.model_schema import ImageTower, ImageTowerConfig, ModelConfig, TextTowerConfig
from clip_exp.weights.own import note_architecture


def with_backbone(name: str, pretrained: bool = True) -> ModelConfig:
    image = ImageTowerConfig(kind=ImageTower.timm, name=name, image_size=224, pretrained=pretrained)
    return ModelConfig(name="timm", embed_dim=64, image=image, text=TextTowerConfig())


@pytest.mark.parametrize(
    ("name", "pretrained", "twin"),
    [
        ("vit_base_patch32_clip_224.openai", True, "vit_base_patch32_clip_quickgelu_224.openai"),
        ("vit_base_patch16_clip_224.metaclip_400m", True, "vit_base_patch16_clip_quickgelu_224.metaclip_400m"),
        ("vit_base_patch32_clip_224.openai", False, None),
        ("vit_base_patch32_clip_quickgelu_224.openai", True, None),
        ("vit_base_patch32_clip_224.laion2b", True, None),
        ("vit_tiny_patch16_224", True, None),
    ],
)
def test_a_backbone_of_another_activation_than_its_weights_is_told(
    name: str, pretrained: bool, twin: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    note_architecture(with_backbone(name, pretrained))
    said = capsys.readouterr().err
    assert said.count(f"model.image.name={twin} computes that.") == (twin is not None)
    assert bool(said) == (twin is not None)
