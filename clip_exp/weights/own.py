"""What a model's configuration leaves to timm and to Hugging Face, written out: a run folder is then opened without asking them."""

import sys
from dataclasses import replace

from clip_exp.config.model_rules import backbone_of, has_encoder
from clip_exp.config.model_schema import ImageTower, ImageTowerConfig, Interpolation, ModelConfig

QUICK = "_clip_quickgelu_"  # in timm's names of backbones that compute what OpenAI's and its descendants' weights need


def note_architecture(model: ModelConfig, pretrained: str | None = None) -> ModelConfig:
    """A configuration that says by itself what its towers of other libraries are.

    `text.architecture` is that of the Hugging Face encoder; mean, standard deviation and interpolation of pictures are those
    of a timm backbone's own weights where these are used. Imports transformers or timm only where they are asked.

    Args:
        pretrained: weights of the whole model, in whose place the backbone's own are not used.

    Raises:
        ConfigError: the encoder's configuration cannot be had, or there is no such backbone.
    """
    text, image = model.text, model.image
    if has_encoder(model) and not text.architecture:
        from clip_exp.models.huggingface import note_architecture as architecture_of  # imports torch

        text = replace(text, architecture=architecture_of(text))
    if image.kind is ImageTower.timm:
        from clip_exp.models.timm_tower import known_backbone  # imports torch

        known_backbone(image.name)
    if pretrained is None and image.pretrained and (backbone := backbone_of(model)):
        image = _as_trained(image, backbone)
    return replace(model, image=image, text=text)


def _as_trained(image: ImageTowerConfig, backbone: str) -> ImageTowerConfig:
    """With timm's preprocessing of the backbone where the configuration has none of its own."""
    import timm

    trained = timm.get_pretrained_cfg(backbone)
    twin = backbone.replace("_clip_", QUICK)
    if QUICK not in backbone and any("quickgelu" in note for note in trained.notes or ()) and timm.is_model(twin):
        print(
            f"{backbone} computes gelu, but its weights were trained with quick_gelu: model.image.name={twin} computes that.",
            file=sys.stderr,
            flush=True,
        )
    interpolation = trained.interpolation if trained.interpolation in list(Interpolation) else Interpolation.bicubic
    return replace(
        image,
        mean=image.mean or list(trained.mean),
        std=image.std or list(trained.std),
        interpolation=image.interpolation or Interpolation(interpolation),
    )
