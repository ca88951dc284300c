"""Configuration of a loss that is the user's own module or function, named by `_target_`. No torch."""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import Float, Target, Unused
from clip_exp.config.targets import instantiate, locate, parameters_of
from clip_exp.config.training import LossConfig
from clip_exp.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import nn

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
        """Yield an error message for every argument of the loss that it will not be given.

        Args:
            columns: names of the data's further columns, `data.columns`.
        """
        try:
            found: Any = locate(self.target, "loss")
        except ConfigError:
            return  # reported by `targets.problems`
        called = getattr(found, "forward", None) if isinstance(found, type) else found
        parameters = parameters_of(called) if called is not None else None
        if called is found and not self.node.get("_partial_"):
            if parameters is not None and "image_features" in parameters:
                yield f"loss._target_={self.target} is a function that computes a loss: set loss._partial_=true, so that its arguments are bound."
            return
        if parameters is None or hasattr(found, "per_rank"):
            return
        names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        known = {"self", *INPUTS, *columns, *self.arguments}
        for name in names:
            if name not in known and parameters[name].default is parameters[name].empty:
                yield (
                    f"loss._target_={self.target} takes {name!r}, which is neither an input of losses nor in data.columns: "
                    f"{nearest(name, [*INPUTS, *columns])}"
                )
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if self.init_logit_bias is not None and not takes_all and "logit_bias" not in names:
            yield f"loss.init_logit_bias={self.init_logit_bias:g} has no effect: {self.target} does not take logit_bias. Leave it out."

    def build(self) -> "nn.Module":
        from clip_exp.losses.custom.loss import CustomLoss  # imports torch

        function = instantiate(self, "loss")
        if not callable(function):
            raise ConfigError(
                f"loss._target_={self.target} is not a loss: name a torch.nn.Module, or a function with _partial_=true."
            )
        return CustomLoss(function, self.target, gather=self.gather)
