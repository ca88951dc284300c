"""Which nonlinearity weights were trained with. Shapes do not tell it: weights of `quick_gelu` load into a model of `gelu` and score worse."""

from clip_exp.config.model_rules import uses_activation
from clip_exp.config.model_schema import Activation, ImageTower, ModelConfig
from clip_exp.open_clip_files import Entry


def of_entry(listed: Entry, model: ModelConfig) -> Activation | None:
    """Of published weights; None where they have the architecture's own.

    The registry marks `quick_gelu` alone. Without the mark it is gelu, where the architecture is not one of another kind.
    """
    if listed.quick_gelu:
        return Activation.quick_gelu
    own = model.activation is Activation.gelu_tanh or model.image.kind is ImageTower.open_clip
    return None if own and model.activation is not Activation.quick_gelu else Activation.gelu


def contradiction(model: ModelConfig, trained: Activation | None, told: str) -> str | None:
    """What to say where the configuration names another activation than that of training."""
    if trained is None or model.activation in (None, trained) or not uses_activation(model):
        return None
    return (
        f"model.activation={model.activation}, but {told} was trained with {trained}: leave it out, or give weights that were "
        f"trained with {model.activation}."
    )
