"""What a model's configuration leaves open, filled in before training begins.

Weights decide the nonlinearity that they were trained with, and what happened to the pictures before. timm and Hugging Face decide
what their towers are, which is written out: a run folder is then opened without asking them.
"""

import sys
from collections.abc import Iterator
from operator import attrgetter

from clip_exp.config.model import Activation, ImageTower, ImageTowerConfig, Interpolation, ModelConfig
from clip_exp.config.names import known_models
from clip_exp.errors import ConfigError
from clip_exp.weights.find import Found
from clip_exp.weights.inspect import About, activation_contradiction

QUICK = "_clip_quickgelu_"  # in timm's names of backbones that compute what OpenAI's and its descendants' weights need
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
# The sizes of the inputs are left out: positions are made to fit.
ARCHITECTURE = (
    "embed_dim",
    *(f"image.{name}" for name in ("kind", "patch_size", "width", "layers", "stages", "heads")),
    *(f"text.{name}" for name in ("kind", "vocab_size", "width", "layers", "heads")),
)


def settle(model: ModelConfig, found: Found) -> ModelConfig:
    """The configuration with what it leaves open filled in from the weights; what was decided is printed.

    What pictures go through may be set to something else than in training; the nonlinearity may not.

    Raises:
        ConfigError: the configuration contradicts the weights in what their shapes do not tell.
    """
    if problems := list(_contradictions(model, found)):
        raise ConfigError("\n".join(problems))
    settled = model.model_copy(update={"image": _filled(model.image, found.about)})
    if model.activation is not None:
        return settled
    trained = _activation_of(model, found)
    if trained is not None and model.uses_activation:
        _tell(f"activation {trained}, as the weights {found.told}")
        return settled.model_copy(update={"activation": trained})
    if model.has_own_mlp:
        _tell(
            f"activation gelu: {found.told} does not say which its training used. If that was quick_gelu, as in OpenAI's models "
            "and their descendants, set model.activation=quick_gelu."
        )
        return settled.model_copy(update={"activation": Activation.gelu})
    return settled


def as_settled(model: ModelConfig, earlier: ModelConfig) -> ModelConfig:
    """The configuration with what it leaves open filled in as `earlier`, which was settled, has it."""
    filled = {name: getattr(earlier.image, name) for name in PREPROCESSING if getattr(model.image, name) is None}
    return model.model_copy(
        update={
            "activation": model.activation or earlier.activation,
            "image": model.image.model_copy(update=filled),
            "text": model.text.model_copy(
                update={"architecture": model.text.architecture or earlier.text.architecture}
            ),
        }
    )


def _contradictions(model: ModelConfig, found: Found) -> Iterator[str]:
    if problem := activation_contradiction(model, _activation_of(model, found), found.told):
        yield problem
    theirs = found.about.model
    if theirs is None or not (differing := list(_differing(model, theirs))):
        return
    known = [each for each in known_models() if not list(_differing(each, theirs))]
    known.sort(key=lambda each: each.image.image_size != theirs.image.image_size)
    way_out = f"Choose model={known[0].name}." if known else "Set these, or choose the `model` that it is of."
    yield f"{found.told} is of another model than model={model.name}: {', '.join(differing)}. {way_out}"


def _differing(ours: ModelConfig, theirs: ModelConfig) -> Iterator[str]:
    """What makes other weights, or other numbers out of the same ones, in towers of ours."""
    for key in ARCHITECTURE:
        tower = key.partition(".")[0]
        kinds = {getattr(model, tower).kind for model in (ours, theirs)} if tower != key else set()
        here, there = attrgetter(key)(ours), attrgetter(key)(theirs)
        if not any(kind.foreign for kind in kinds) and None not in (here, there) and here != there:
            yield f"model.{key}={there} instead of {here}"


def _activation_of(model: ModelConfig, found: Found) -> Activation | None:
    """What the weights say; a model whose configuration lies beside them has gelu unless that names another.

    Of open_clip's configurations each has its own, which holds where nothing is said.
    """
    about = found.about
    if about.activation or about.model is None or model.image.kind is ImageTower.open_clip:
        return about.activation
    return about.model.activation or Activation.gelu


def _filled(image: ImageTowerConfig, about: About) -> ImageTowerConfig:
    open_fields = [name for name in PREPROCESSING if getattr(image, name) is None]
    return image.model_copy(update={name: getattr(about, name) for name in open_fields})


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


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
    if model.has_encoder and not text.architecture:
        from clip_exp.models.huggingface import note_architecture as architecture_of  # imports torch

        text = text.model_copy(update={"architecture": architecture_of(text)})
    if image.kind is ImageTower.timm:
        from clip_exp.models.timm_tower import known_backbone  # imports torch

        known_backbone(image.name)
    if pretrained is None and image.pretrained and (backbone := model.backbone):
        image = _as_trained(image, backbone)
    return model.model_copy(update={"image": image, "text": text})


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
    return image.model_copy(
        update={
            "mean": image.mean or list(trained.mean),
            "std": image.std or list(trained.std),
            "interpolation": image.interpolation or Interpolation(interpolation),
        }
    )
