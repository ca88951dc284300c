"""The schema of a training run: what is trained, on what, by which loss, optimizer and strategy, and what is logged and kept."""

import math
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from clip_exp.config.base import (
    Config,
    Count,
    Float,
    Index,
    Member,
    NonNegative,
    Positive,
    Proportion,
    Target,
    Unused,
    chosen,
    exactly,
    must_be,
)
from clip_exp.config.data import DataConfig, PairLabel
from clip_exp.config.evaluation import Accelerator, Devices, Tasks
from clip_exp.config.model import ModelConfig, Projection

if TYPE_CHECKING:
    from torch import nn

DEFAULT_EPOCHS = 30.0
TOWERS = ("image", "text")
MAX_LOGARITHM = 10.0  # of a logit scale: a factor of 22,000

Logarithm = Annotated[
    Float, Field(ge=0, le=MAX_LOGARITHM), must_be(f"between 0 and {MAX_LOGARITHM:g}: it is a natural logarithm")
]
Betas = Annotated[list[Annotated[Float, Field(ge=0, lt=1)]], exactly(2)]


class StrategyName(StrEnum):
    auto = "auto"
    ddp = "ddp"
    deepspeed = "deepspeed"


class Precision(StrEnum):
    """Lightning's names. `auto`: bf16-mixed on GPUs that have it, 32-true elsewhere."""

    auto = "auto"
    fp32 = "32-true"
    bf16_mixed = "bf16-mixed"
    fp16_mixed = "16-mixed"


# ----------------------------------------------------------------------------------------------------------- loss


class LossConfig(Member):
    """What every loss has."""

    group: ClassVar[str] = "loss"
    key: ClassVar[str] = "name"

    name: str
    same_caption: PairLabel = Field(
        PairLabel.negative, description="positive: equal captions in a batch are matches too"
    )
    same_image: PairLabel = Field(PairLabel.negative, description="positive: equal images in a batch are matches too")
    init_logit_scale: Logarithm = Field(
        math.log(1 / 0.07), description="natural logarithm of the scale of random weights"
    )
    max_logit_scale: Logarithm | None = Field(
        None, description="natural logarithm of the largest scale; null: the limit of the loss"
    )

    published_limit: ClassVar[float] = math.log(100)  # of the scale, a natural logarithm, where none is set

    @property
    def largest_logit_scale(self) -> float:
        """Natural logarithm of the largest scale of random weights while they train."""
        return self.published_limit if self.max_logit_scale is None else self.max_logit_scale

    @property
    def logit_bias(self) -> float | None:
        """Bias that random weights start with; None: the loss has none."""
        return None

    @property
    def matches(self) -> dict[str, bool]:
        """Which pairs of a batch match besides the own one: arguments of `losses.batch.repeated_matches`."""
        return {
            "same_caption": self.same_caption is PairLabel.positive,
            "same_image": self.same_image is PairLabel.positive,
        }

    def build(self) -> "nn.Module":
        """Return a module that takes (CLIPOutput, caption_id_B, image_id_B) of this rank's pairs and returns a scalar.

        The mean over the ranks of its values, and of their gradients, must be that of the global batch; `losses.batch` gathers.
        """
        raise NotImplementedError


# -------------------------------------------------------------------------------------------------- optimization


class OptimizerConfig(Config):
    """What every optimizer has."""

    target: str = Field(alias="_target_", description="class of the optimizer, below an allowed module")
    lr: Positive = Field(description="peak learning rate")
    weight_decay: NonNegative = Field(
        0.2, description="on matrices only: not on biases, norms, positions and the logit scale"
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the class."""
        return self.model_dump(exclude={"target"})


class AdamWConfig(OptimizerConfig):
    """CLIP's choice; one fused kernel per step."""

    target: Literal["torch.optim.AdamW"] = Field("torch.optim.AdamW", alias="_target_")
    lr: Positive = Field(5e-4, description="peak learning rate")
    betas: Betas = Field([0.9, 0.98], description="decay of the moments")
    eps: Positive = Field(1e-6, description="added to the denominator")
    fused: bool = Field(True, description="one kernel for all parameters")


class AdamConfig(AdamWConfig):
    """Adam, whose weight decay is added to the gradient."""

    target: Literal["torch.optim.Adam"] = Field("torch.optim.Adam", alias="_target_")  # type: ignore[assignment]
    weight_decay: NonNegative = Field(0.0, description="added to the gradient of matrices, times the weights")


class SGDConfig(OptimizerConfig):
    target: Literal["torch.optim.SGD"] = Field("torch.optim.SGD", alias="_target_")
    lr: Positive = Field(0.1, description="peak learning rate")
    weight_decay: NonNegative = Field(1e-4, description="on matrices only")
    momentum: NonNegative = Field(0.9, description="momentum")
    nesterov: bool = Field(False, description="Nesterov's momentum")


class LionConfig(OptimizerConfig):
    """Sign momentum (Chen et al. 2023): a rate 3 to 10 times below AdamW's, a decay as much above it."""

    target: Literal["timm.optim.Lion"] = Field("timm.optim.Lion", alias="_target_")
    lr: Positive = Field(1e-4, description="peak learning rate")
    weight_decay: NonNegative = Field(1.0, description="on matrices only")
    betas: Betas = Field([0.9, 0.99], description="decay of the moments")


class CustomOptimizerConfig(OptimizerConfig):
    kwargs: dict[str, Any] = Field({}, description="further arguments of the class")

    @property
    def arguments(self) -> dict[str, Any]:
        return {"lr": self.lr, "weight_decay": self.weight_decay, **self.kwargs}


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


class SchedulerConfig(Config):
    """Learning rate over its peak as a function of the step: linear warm-up, then `_target_`'s decay."""

    target: str = Field(
        "clip_exp.training.schedule.cosine",
        alias="_target_",
        description="function of the fraction of the decay that is done, 0..1, to a factor",
    )
    warmup_steps: Index | None = Field(None, description="steps of warm-up; null: a tenth of the run")
    final_factor: NonNegative = Field(0.0, description="the rate at the end over its peak")
    kwargs: dict[str, Any] = Field({}, description="further arguments of the function")

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "final_factor",
            lambda scheduler: scheduler.target == "clip_exp.training.schedule.constant",
            "on a constant learning rate",
            typed_only=True,
        ),
    )


# ------------------------------------------------------------------------------------------------------- strategy


class StrategyConfig(Config):
    """What every strategy has."""

    name: StrategyName
    timeout_s: Annotated[Count, Field(le=10**7)] = Field(
        1800, description="seconds of a collective, after which a lost rank ends the run"
    )

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state is in host memory."""
        return False


class AutoConfig(StrategyConfig):
    """One process on one device, DDP on several."""

    name: Literal[StrategyName.auto] = StrategyName.auto


class DDPConfig(StrategyConfig):
    """A copy of the model on every device, gradients averaged."""

    name: Literal[StrategyName.ddp] = StrategyName.ddp


class DeepSpeedConfig(StrategyConfig):
    """State split over the devices (ZeRO, Rajbhandari et al. 2020)."""

    name: Literal[StrategyName.deepspeed] = StrategyName.deepspeed
    stage: Literal[1, 2, 3] = Field(description="1: optimizer state is split, 2: gradients too, 3: weights too")
    offload: bool = Field(False, description="optimizer state, and under ZeRO-3 weights too, in host memory")
    config: dict[str, JsonValue] = Field({}, description="further keys of DeepSpeed's own configuration")

    @property
    def offloads(self) -> bool:
        return self.offload


Strategy = Annotated[AutoConfig | DDPConfig | DeepSpeedConfig, Field(discriminator="name")]


class TrainerConfig(Config):
    """What Lightning's Trainer needs to know; the names are Lightning's."""

    accelerator: Accelerator = Field("auto", description="auto, cpu, gpu (or cuda)")
    devices: Devices = Field("auto", description="auto (1 on CPU, all GPUs), a number, or a list of GPU indices")
    num_nodes: Count | None = Field(None, description="machines; null: as many as torchrun or srun uses")
    gradient_clip_val: Positive | None = Field(
        1.0, description="norm that the whole gradient is clipped to; null: none"
    )
    deterministic: bool = Field(False, description="deterministic algorithms only")
    profiler: Literal["simple", "advanced", "pytorch"] | None = Field(
        None, description="simple, advanced or pytorch: where the time goes"
    )


# ---------------------------------------------------------------------------------------------------- fine-tuning


class TowerTuningConfig(Config):
    """How one tower is trained. Depth counts from the embeddings (0) over the L blocks to what follows them (L + 1)."""

    freeze: bool = Field(
        False, description="its weights and batch-norm statistics stay as they are (LiT; Zhai et al. 2022)"
    )
    unfrozen_blocks: Annotated[Index, must_be("at least 0, which trains what follows the blocks")] | None = Field(
        None, description="under `freeze`: the last k blocks and what follows them are trained after all"
    )
    lr_factor: Annotated[Positive, must_be("above 0; freeze=true keeps a tower as it is")] = Field(
        1.0, description="learning rate over `optimizer.lr`"
    )
    layer_decay: Annotated[Positive, Field(le=1)] = Field(
        1.0, description="a further factor for each step of depth towards the input: layer_decay ** (L + 1 - depth)"
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "unfrozen_blocks", lambda tower: not tower.freeze, "without {at}freeze=true", "set that, or leave this out"
        ),
        Unused(
            "lr_factor layer_decay",
            lambda tower: tower.freeze and tower.unfrozen_blocks is None,
            "under {at}freeze=true without unfrozen_blocks",
        ),
    )


class LoRAConfig(Config):
    """Low-rank updates B A of linear layers instead of the weights themselves (Hu et al. 2022), by the `peft` library.

    All other weights of both towers stay as they are. Checkpoints hold the sum of both.
    """

    rank: Count = Field(16, description="rank of the updates")
    alpha: Positive = Field(32.0, description="the update is scaled by alpha / rank")
    dropout: Proportion = Field(0.0, description="dropout of what goes into A")
    image: bool = Field(True, description="whether the image tower has adapters")
    text: bool = Field(True, description="whether the text tower has adapters")
    targets: list[str] = Field(
        [], description="ends of names of linear layers, as attention.qkv; empty: all of the blocks"
    )

    def rules(self, at: str) -> Iterator[str]:
        if not (self.image or self.text):
            yield f"{at}image and {at}text are both false: one tower must get adapters."


def _kept_without_adapters(tower: str) -> Unused:
    return Unused(
        f"{tower}.lr_factor {tower}.layer_decay",
        lambda tuning: tuning.lora is not None and not getattr(tuning.lora, tower),
        f"since {{at}}lora.{tower}=false keeps the tower as it is",
    )


class FineTuneConfig(Config):
    """What is trained of pretrained weights, and how fast."""

    image: TowerTuningConfig = Field(default_factory=TowerTuningConfig)
    text: TowerTuningConfig = Field(default_factory=TowerTuningConfig)
    lora: LoRAConfig | None = None
    freeze_towers_steps: Index = Field(
        0,
        description="number of first steps in which only the projections and the logit scale learn (LP-FT, Kumar et al. 2022)",
    )

    unused: ClassVar[tuple[Unused, ...]] = (_kept_without_adapters("image"), _kept_without_adapters("text"))

    def rules(self, at: str) -> Iterator[str]:
        if self.lora is None:
            if all(tower.freeze and tower.unfrozen_blocks is None for tower in (self.image, self.text)):
                yield (
                    f"{at}image.freeze and {at}text.freeze leave nothing but the logit scale to train: "
                    "leave one out, or set unfrozen_blocks."
                )
            return
        for name, tower in (("image", self.image), ("text", self.text)):
            if tower.freeze:
                yield (
                    f"{at}{name}.freeze and {at}lora exclude each other: lora freezes all weights already, "
                    f"and {at}lora.{name}=false leaves the tower without adapters."
                )
        if self.freeze_towers_steps:
            yield f"{at}freeze_towers_steps and {at}lora exclude each other: lora freezes the projections."


# ------------------------------------------------------------------------------------------- callbacks and loggers


class CallbacksConfig(Config):
    progress: Literal["auto", "bar", "lines", "none"] = Field(
        "auto", description="bar, lines or none; auto: a bar on a terminal, lines elsewhere"
    )
    ema_decay: Annotated[Proportion, Field(gt=0)] | None = Field(
        None, description="keep an exponential moving average of the weights: evaluate.py run=DIR ema=true scores it"
    )
    ema_every_n_steps: Count = Field(1, description="steps between two updates of the average")
    save_retry_s: NonNegative = Field(
        300.0, description="seconds that the last save (at the end, or after a signal) is retried where it fails"
    )
    extra: dict[str, Target] = Field(
        {}, description="further callbacks of Lightning, name: {_target_: class, arguments}"
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "ema_every_n_steps",
            lambda callbacks: callbacks.ema_decay is None,
            "without {at}ema_decay",
            "set that (callbacks=ema), or leave this out",
        ),
    )


class WandbConfig(Config):
    """Weights & Biases. The key comes from WANDB_API_KEY or ~/.netrc, never from a configuration."""

    project: str = Field("clip_exp", description="project of the run")
    entity: str | None = Field(None, description="user or team; null: the key's own")
    group: str | None = Field(None, description="group of the run")
    tags: list[str] = Field([], description="tags of the run")
    mode: Literal["online", "offline", "disabled"] = Field(
        "online", description="online, offline or disabled; an unreachable server turns online into offline"
    )
    init_timeout_s: Count = Field(10, description="seconds that an answer of the server is waited for")


class LoggerConfig(Config):
    """Where metrics go besides `metrics.csv`, which is always written: a run's report is made from it."""

    tensorboard: bool = Field(False, description="write TensorBoard's event files")
    wandb: WandbConfig | None = None
    extra: dict[str, Target] = Field({}, description="further loggers of Lightning, name: {_target_: class, arguments}")


# ---------------------------------------------------------------------------------------------------- the command


def _kept_from_file(tower: str) -> Unused:
    return Unused(
        f"model.{tower}.pretrained",
        lambda config: tower in config.starts,
        f"with pretrained_{tower}={{c.pretrained_{tower}}}, which has the weights of the {tower} tower",
        typed_only=True,
    )


class TrainConfig(Config):
    """A training run."""

    usage: ClassVar = """\
python train.py [key=value …] [-m]        (or: clip-exp train …)

Values are set on the command line: python train.py model=vit_b32 optimizer.lr=1e-4
A sweep runs every combination: … optimizer.lr=1e-3,3e-4 -m"""

    model: ModelConfig
    data: DataConfig
    loss: LossConfig
    optimizer: Optimizer
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    strategy: Strategy
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    finetune: FineTuneConfig = Field(default_factory=FineTuneConfig)
    callbacks: CallbacksConfig = Field(default_factory=CallbacksConfig)
    logger: LoggerConfig = Field(default_factory=LoggerConfig)

    name: str = Field(description="name of the run; its folder is <output_dir>/train/<name>/<time>")
    seed: Annotated[Index, Field(le=2**32 - 1)] = Field(0, description="seed of weights, order and augmentation")
    output_dir: str = Field("outputs", description="folder for runs, sweeps, caches and generated data")
    resume: str = Field(
        "auto",
        description="auto: continue the run of the same name, configuration, data and start; never; or a run folder or checkpoint",
    )
    pretrained: str | None = Field(
        None,
        description="weights to start from: a tag of `clip-exp models`, hf-hub:org/name, a file, a folder, or a run",
    )
    pretrained_image: str | None = Field(
        None,
        description="weights of the image tower alone to start from, out of a file of that tower or of a model; as `pretrained`",
    )
    pretrained_text: str | None = Field(None, description="likewise of the text tower")
    pretrained_prefix: str | None = Field(
        None,
        description="which weights of the file, where several fit the model or tower, such as a student and a teacher: a key of the file, a prefix of names, or both with a dot between them",
    )
    max_steps: Count | None = Field(
        None, description="optimizer steps; exactly one of max_steps and epochs (neither: epochs=30)"
    )
    epochs: Positive | None = Field(None, description="passes over the training data")
    global_batch_size: Count = Field(128, description="pairs per optimizer step, over all devices")
    micro_batch_size: Count | None = Field(
        None,
        description="largest chunk a tower sees at once on a device; smaller: less memory, the same gradients; null: all at once",
    )
    precision: Precision = Field(Precision.auto, description="auto, 32-true, bf16-mixed or 16-mixed")
    compile: bool = Field(False, description="torch.compile on the towers")
    log_every_n_steps: Count = Field(10, description="steps between two rows of metrics")
    val_every_n_steps: Count | None = Field(
        None,
        description="steps between two validations; null: ten times in the run, 50 steps apart or more; the end is always validated",
    )
    checkpoint_every_n_steps: Count | None = Field(None, description="likewise of checkpoints; the end always has one")
    monitor: str | None = Field(
        None,
        description="metric of validation or of a task, such as val/recall@1_i2t or imagenet/top1: keep the checkpoint that is best in it",
    )
    monitor_mode: Literal["auto", "min", "max"] = Field(
        "auto", description="min or max; auto: min for the loss and median ranks, max for every other metric"
    )
    patience: Count | None = Field(None, description="measurements without a better `monitor` before the run stops")
    task: Tasks = Field(
        {},
        description="evaluation tasks to score while training: task=imagenet, or several: 'task=[imagenet,retrieval]'",
    )
    task_every_n_steps: Count | None = Field(
        None, description="steps between two scorings of the tasks; null: at the end only; there they always are"
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused("pretrained_prefix", lambda c: not c.starts, "without pretrained"),
        Unused(
            "loss.init_logit_scale",
            lambda c: c.pretrained is not None,
            "with pretrained={c.pretrained}, whose weights have a scale",
            typed_only=True,
        ),
        Unused(
            "model.image.pretrained model.text.pretrained",
            lambda c: c.pretrained is not None,
            "with pretrained={c.pretrained}, which has the weights of both towers",
            typed_only=True,
        ),
        *(_kept_from_file(tower) for tower in TOWERS),
        Unused(
            "patience monitor_mode",
            lambda c: c.monitor is None,
            "without a metric to watch",
            "set monitor (monitor=val/loss), or leave this out",
        ),
        Unused(
            "task_every_n_steps",
            lambda c: not c.task,
            "without a task",
            "choose one (task=imagenet), or leave this out",
        ),
        Unused(
            "val_every_n_steps",
            lambda c: not c.data.has_val,
            "without validation data",
            "set data.val, or leave this out",
            typed_only=True,
        ),
    )

    @property
    def starts(self) -> dict[str | None, str]:
        """What names weights to start from, by tower; None: those of the model."""
        given = {None: self.pretrained, "image": self.pretrained_image, "text": self.pretrained_text}
        return {tower: value for tower, value in given.items() if value is not None}

    @property
    def own_towers(self) -> set[str]:
        """Which towers start from the weights of their own library."""
        return set() if self.pretrained is not None else self.model.own_towers - self.starts.keys()

    @model_validator(mode="after")
    def _have_a_length(self) -> Self:
        if self.max_steps is None and self.epochs is None:
            self.epochs = DEFAULT_EPOCHS
        return self

    def rules(self, at: str) -> Iterator[str]:
        if self.max_steps is not None and self.epochs is not None:
            yield f"max_steps={self.max_steps} and epochs={self.epochs:g} are both set: give one (epochs=null or max_steps=null)."
        if self.max_steps is not None:
            yield from self.length_problems(self.max_steps)
        if self.precision is Precision.fp16_mixed and self.trainer.accelerator == "cpu":
            yield "precision=16-mixed does not train on a CPU: use precision=auto."
        limit = self.loss.largest_logit_scale
        if self.pretrained is None and self.loss.init_logit_scale > limit + 1e-4:
            yield f"loss.init_logit_scale={self.loss.init_logit_scale:g} must be at most {limit:g}, the limit of the loss."
        if isinstance(self.strategy, DeepSpeedConfig):
            if self.strategy.offload and not isinstance(self.optimizer, AdamWConfig):
                yield f"strategy.offload steps with DeepSpeed's CPU Adam: use optimizer=adamw or adam instead of {self.optimizer.target}."
            if self.callbacks.ema_decay is not None:
                yield "callbacks.ema_decay needs whole weights in every process: use strategy=auto or ddp."
        for tower in TOWERS:
            if self.pretrained is not None and tower in self.starts:
                yield f"pretrained and pretrained_{tower} exclude each other: pretrained has the weights of both towers. Leave one out."
        yield from self._check_start()

    def length_problems(self, steps: int) -> Iterator[str]:
        """Yield why a run of `steps` is too short for its warm-up and the steps with frozen towers before it."""
        frozen, warmup = self.finetune.freeze_towers_steps, self.scheduler.warmup_steps or 0
        if warmup > steps:
            yield f"scheduler.warmup_steps={warmup} is longer than the run of {steps} steps: the learning rate would never peak."
        elif frozen >= steps:
            yield f"finetune.freeze_towers_steps={frozen} must be less than the {steps} steps of the run: the towers would never learn."
        elif frozen and frozen + warmup > steps:
            yield (
                f"scheduler.warmup_steps={warmup} after finetune.freeze_towers_steps={frozen} is longer than the run of {steps} steps: "
                "the towers' learning rate would never peak."
            )

    def _check_start(self) -> Iterator[str]:
        """What stays as it is must come from somewhere."""
        tuning = self.finetune
        begun = set(TOWERS) if self.pretrained is not None else self.own_towers | self.starts.keys()
        for tower in TOWERS:
            frozen: TowerTuningConfig = getattr(tuning, tower)
            if tower not in begun and (frozen.freeze or tuning.lora is not None):
                key = f"finetune.{tower}.freeze" if tuning.lora is None else "finetune.lora"
                yield f"{key} would keep random weights in the {tower} tower: set pretrained=… or pretrained_{tower}=…"
            elif (
                tower in self.own_towers
                and getattr(getattr(self.model, tower), "projection", None) is not Projection.none
            ):
                yield from self.projection_problems(tower)
        if tuning.freeze_towers_steps and not begun:
            yield "finetune.freeze_towers_steps would fit projections to towers of random weights: set pretrained=…"

    def projection_problems(self, tower: str) -> Iterator[str]:
        """Yield why a tower cannot be tuned whose weights came without its projection, as those of its own library do."""
        tuning: TowerTuningConfig = getattr(self.finetune, tower)
        if self.finetune.lora is not None:
            yield (
                f"finetune.lora would keep the random projection of the {tower} tower: train that first "
                f"(finetune.{tower}.freeze=true finetune.{tower}.unfrozen_blocks=0), and start the adapters from that run."
            )
        elif tuning.freeze and tuning.unfrozen_blocks is None:
            yield (
                f"finetune.{tower}.freeze would keep the random projection of the {tower} tower: set "
                f"finetune.{tower}.unfrozen_blocks=0, which trains it."
            )
