"""Configuration of a loss that is the user's own module or function, named by `_target_`. No torch."""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import Float, Target, Unused
from clip_exp.config.targets import instantiate, locate, parameters_of
from clip_exp.config.training import LossConfig
from clip_exp.errors import ConfigError, nearest

if TYPE_CHECKING:
    from clip_exp.losses.custom.loss import CustomLoss

# Arguments of a custom loss; the columns of `data.columns` and the outputs of `per_rank` are passed as well
INPUTS = ("image_features", "text_features", "logit_scale", "logit_bias", "caption_ids", "image_ids")


class CustomLossConfig(LossConfig, Target):
    """Module, or function with `_partial_: true`, that computes the loss of a global batch."""

    name: Literal["custom"] = "custom"
    target: str = Field(
        alias="_target_", description="full name of the loss's class, or of a function with _partial_=true"
    )
    gather: bool = Field(
        True,
        description="pass the rows of the global batch, gathered from all ranks with gradient; false: pass the rows of this rank, and the "
        "loss returns their mean",
    )
    init_logit_bias: Annotated[Float, Field(ge=-1e3, le=1e3)] | None = Field(
        None, description="initial logit bias for random weights; null: the model has no bias"
    )

    takes_columns: ClassVar[bool] = True

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "same_caption same_image",
            lambda loss: True,
            "on a custom loss, which is given caption_ids and image_ids",
        ),
    )

    @property
    def logit_bias(self) -> float | None:
        return self.init_logit_bias

    def custom_problems(self, columns: Collection[str]) -> Iterator[str]:
        """Create the loss, and yield an error message for every argument that it will not be given.

        Args:
            columns: names of the data's further columns, `data.columns`.

        Raises:
            ConfigError: the loss cannot be created.
        """
        found = locate(self.target, "loss")
        is_unbound = not isinstance(found, type) and not self.node.get("_partial_")
        if is_unbound and "image_features" in (parameters_of(found) or ()):
            yield f"loss._target_={self.target} is a function that computes a loss: set loss._partial_=true, so that its arguments are bound."
            return
        loss = self.build()
        has_bias = self.init_logit_bias is not None
        given = {name for name in INPUTS if has_bias or name != "logit_bias"} | {*columns}
        for name in sorted(loss.required - given) if loss.per_rank is None else ():
            if name == "logit_bias":
                yield f"loss._target_={self.target} takes logit_bias, but the model has none: set loss.init_logit_bias."
            else:
                yield (
                    f"loss._target_={self.target} takes {name!r}, which is neither an input of losses nor in data.columns: "
                    f"{nearest(name, [*INPUTS, *columns])}"
                )
        if not loss.names and not loss.takes_all:
            yield f"loss._target_={self.target} takes no input by name: give its forward arguments such as {', '.join(INPUTS[:3])}."
        elif has_bias and not loss.takes_all and "logit_bias" not in loss.names:
            yield f"loss.init_logit_bias={self.init_logit_bias:g} has no effect: {self.target} does not take logit_bias. Leave it out."

    def build(self) -> "CustomLoss":
        from clip_exp.losses.custom.loss import CustomLoss  # imports torch

        function = instantiate(self, "loss")
        if not callable(function):
            raise ConfigError(
                f"loss._target_={self.target} is not a loss: name a torch.nn.Module, or a function with _partial_=true."
            )
        return CustomLoss(function, self.target, gather=self.gather)
