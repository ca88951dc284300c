"""What a model's configuration leaves open, filled in before training begins.

Weights decide the nonlinearity that they were trained with, and what happened to the pictures before. timm and Hugging Face decide
what their towers are, which is written out: a run folder is then opened without asking them.
"""

import sys
from collections.abc import Collection, Iterator

from clip_exp.config.model import Activation, ImageTowerConfig, ModelConfig, Tower
from clip_exp.config.names import known_models
from clip_exp.errors import ConfigError
from clip_exp.weights.find import Found
from clip_exp.weights.inspect import About, activation_contradiction

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def settle(model: ModelConfig, *starts: Found) -> ModelConfig:
    """The configuration with what it leaves open filled in from the weights; what was decided is printed.

    What pictures go through may be set to something else than in training; the nonlinearity may not.

    Args:
        starts: weights of the model, or of its towers.

    Raises:
        ConfigError: the configuration contradicts the weights in what their shapes do not tell, or those of one tower the other's.
    """
    if problems := [problem for found in starts for problem in _contradictions(model, found)]:
        raise ConfigError("\n".join(problems))
    settled = model
    for found in starts:
        if found.tower != "text":
            settled = settled.model_copy(update={"image": _filled(model.image, found.about)})
    acting = [found for found in starts if any(tower.takes_activation for tower in _of(model, found))]
    if model.activation is not None or not acting:
        return settled
    trained = {activation: found.told for found in acting if (activation := _activation_of(model, found)) is not None}
    if len(trained) > 1:
        told = " and ".join(f"{name} was trained with {activation}" for activation, name in trained.items())
        raise ConfigError(f"{told}, and model.activation is that of both towers: give weights of one activation.")
    for activation, name in trained.items():
        _tell(f"activation {activation}, as the weights {name}")
        return settled.model_copy(update={"activation": activation})
    if any(tower.takes_activation and not tower.own_activation for found in acting for tower in _of(model, found)):
        _tell(
            f"activation gelu: {' and '.join(found.told for found in acting)} does not say which its training used. If that was "
            "quick_gelu, as in OpenAI's models and their descendants, set model.activation=quick_gelu."
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
            "text": model.text.as_resolved(earlier.text),
        }
    )


def _contradictions(model: ModelConfig, found: Found) -> Iterator[str]:
    acts = any(tower.takes_activation for tower in _of(model, found))
    if acts and (problem := activation_contradiction(model, _activation_of(model, found), found.told)):
        yield problem
    theirs = found.about.model
    if theirs is None or not (differing := list(_differing(model, theirs, found.tower))):
        return
    alike = (each for each in known_models() if _kinds(each) == _kinds(theirs))
    known = [each for each in alike if not list(_differing(each, theirs, found.tower))]
    known.sort(key=lambda each: each.image.image_size != theirs.image.image_size)
    way_out = f"Choose model={known[0].name}." if known else "Set these, or choose the `model` that it is of."
    yield f"{found.told} is of another model than model={model.name}: {', '.join(differing)}. {way_out}"


def _of(model: ModelConfig, found: Found) -> tuple[Tower, ...]:
    """Return the towers that the weights are of."""
    return model.towers if found.tower is None else (getattr(model, found.tower),)


def _differing(ours: ModelConfig, theirs: ModelConfig, tower: str | None) -> Iterator[str]:
    """Yield what makes other weights, or other numbers out of the same ones; sizes of inputs do not: positions are made to fit."""
    if ours.embed_dim != theirs.embed_dim and tower is None:
        yield f"model.embed_dim={theirs.embed_dim} instead of {ours.embed_dim}"
    for name, here, there in zip(("image", "text"), ours.towers, theirs.towers, strict=True):
        if tower not in (None, name):
            continue
        if here.kind != there.kind and (here.foreign or there.foreign):  # open_clip's may be any of the others
            continue
        keys = ("kind", *here.architecture_keys) if here.kind == there.kind else ("kind",)
        for key in keys:
            if getattr(here, key) != getattr(there, key):
                yield f"model.{name}.{key}={getattr(there, key)} instead of {getattr(here, key)}"


def _kinds(model: ModelConfig) -> list[str]:
    return [tower.kind for tower in model.towers]


def _activation_of(model: ModelConfig, found: Found) -> Activation | None:
    """What the weights say; a model whose configuration lies beside them has gelu unless that names another.

    Of open_clip's configurations each has its own, which holds where nothing is said.
    """
    about = found.about
    if about.activation or about.model is None or model.image.own_activation:
        return about.activation
    return about.model.activation or Activation.gelu


def _filled(image: ImageTowerConfig, about: About) -> ImageTowerConfig:
    open_fields = [name for name in PREPROCESSING if getattr(image, name) is None]
    return image.model_copy(update={name: getattr(about, name) for name in open_fields})


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def note_architecture(model: ModelConfig, own_weights: Collection[str] = ("image", "text")) -> ModelConfig:
    """A configuration that says by itself what its towers of other libraries are.

    Args:
        own_weights: towers, image and text, that start from the weights of their own library where the configuration says so.

    Raises:
        ConfigError: the encoder's configuration cannot be had, or there is no such backbone.
    """
    return model.model_copy(
        update={
            "image": model.image.resolved("image" in own_weights),
            "text": model.text.resolved("text" in own_weights),
        }
    )
