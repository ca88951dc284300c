"""Schema of the optimizer and of the learning rate schedule."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from clip_exp.config.base import Config, Float, Index, NonNegative, Positive, Target, Unused, chosen, exactly
from clip_exp.config.targets import TOTAL_STEPS

Betas = Annotated[list[Annotated[Float, Field(ge=0, lt=1)]], exactly(2)]


class OptimizerConfig(Config):
    """Base class of optimizers."""

    target: str = Field(alias="_target_", description="full name of the optimizer's class, in an allowed module")
    lr: Positive = Field(description="peak learning rate")
    weight_decay: NonNegative = Field(
        0.2,
        description="weight decay of matrices; biases, norms, position embeddings and the logit scale have none",
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the class."""
        return self.model_dump(exclude={"target"})


class AdamWConfig(OptimizerConfig):
    """AdamW, the optimizer of CLIP, with a fused kernel."""

    target: Literal["torch.optim.AdamW"] = Field("torch.optim.AdamW", alias="_target_")
    lr: Positive = Field(5e-4, description="peak learning rate")
    betas: Betas = Field([0.9, 0.98], description="decay rates of the first and second moment estimates")
    eps: Positive = Field(1e-6, description="term added to the denominator for numerical stability")
    fused: bool = Field(True, description="use PyTorch's fused implementation, one kernel for all parameters")


class AdamConfig(AdamWConfig):
    """Adam with L2 regularization: the weight decay is added to the gradient."""

    target: Literal["torch.optim.Adam"] = Field("torch.optim.Adam", alias="_target_")  # type: ignore[assignment]
    weight_decay: NonNegative = Field(0.0, description="L2 penalty of matrices, added to the gradient")


class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    target: Literal["torch.optim.SGD"] = Field("torch.optim.SGD", alias="_target_")
    lr: Positive = Field(0.1, description="peak learning rate")
    weight_decay: NonNegative = Field(1e-4, description="weight decay of matrices")
    momentum: NonNegative = Field(0.9, description="momentum factor")
    nesterov: bool = Field(False, description="use Nesterov momentum")


class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023). Its learning rate should be 3 to 10 times lower than AdamW's, its weight decay 3 to 10 times higher."""

    target: Literal["timm.optim.Lion"] = Field("timm.optim.Lion", alias="_target_")
    lr: Positive = Field(1e-4, description="peak learning rate")
    weight_decay: NonNegative = Field(1.0, description="weight decay of matrices")
    betas: Betas = Field([0.9, 0.99], description="decay rates of the update and of the momentum")


class CustomOptimizerConfig(OptimizerConfig, Target):
    """Any other optimizer class, whose further arguments stand next to `_target_`. It is given the parameter groups."""

    target: str = Field(alias="_target_", description="full name of the optimizer's class, such as torch.optim.RAdam")

    supplied: ClassVar[int] = 1

    @property
    def arguments(self) -> dict[str, Any]:
        return {"lr": self.lr, "weight_decay": self.weight_decay, **(self.model_extra or {})}


OPTIMIZERS: list[type[Config]] = [AdamWConfig, AdamConfig, SGDConfig, LionConfig, CustomOptimizerConfig]


def _optimizer(values: Any) -> str:
    cls = type(values) if isinstance(values, Config) else chosen(OPTIMIZERS, values if isinstance(values, dict) else {})
    return cls.__name__ if cls is not None else CustomOptimizerConfig.__name__


Optimizer = Annotated[
    Annotated[AdamWConfig, Tag("AdamWConfig")]
    | Annotated[AdamConfig, Tag("AdamConfig")]
    | Annotated[SGDConfig, Tag("SGDConfig")]
    | Annotated[LionConfig, Tag("LionConfig")]
    | Annotated[CustomOptimizerConfig, Tag("CustomOptimizerConfig")],
    Discriminator(_optimizer),
]


class SchedulerConfig(Target):
    """Learning rate schedule: linear warm-up to the peak, then a decay by the function or scheduler class `_target_`.

    Arguments stand next to `_target_`. A function maps the progress of the decay (0 to 1) to a factor of the learning
    rate. A class is a scheduler of torch, which is given the optimizer and stepped once per optimizer step after the
    warm-up; `${total_steps}` stands for the number of these steps.
    """

    target: str = Field(
        "clip_exp.training.schedule.cosine",
        alias="_target_",
        description="full name of a function from the progress of the decay (0 to 1) to a factor of the learning rate, or of a scheduler "
        "class such as torch.optim.lr_scheduler.CosineAnnealingLR",
    )
    warmup_steps: Index | None = Field(None, description="optimizer steps of linear warm-up; null: a tenth of the run")
    final_factor: NonNegative = Field(0.0, description="final learning rate as a fraction of the peak")

    supplied: ClassVar[int] = 1
    optional: ClassVar[tuple[str, ...]] = (TOTAL_STEPS,)

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "final_factor",
            lambda scheduler: scheduler.target == "clip_exp.training.schedule.constant",
            "on a constant learning rate",
            typed_only=True,
        ),
    )
