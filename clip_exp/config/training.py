"""Schema of a training run: model, data, loss, optimizer, scheduler, strategy, fine-tuning, callbacks and logging."""

import math
import os
import re
from collections.abc import Collection, Iterator
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from clip_exp.config import words
from clip_exp.config.base import (
    Config,
    Count,
    Float,
    Fraction,
    Index,
    Int,
    Member,
    NonNegative,
    Positive,
    Proportion,
    Target,
    Unused,
    must_be,
)
from clip_exp.config.data import Data, PairLabel
from clip_exp.config.evaluation import ALLOW_TARGETS, Accelerator, Devices, Tasks
from clip_exp.config.finetune import FineTuneConfig, TowerTuningConfig
from clip_exp.config.model import TOWERS, ModelConfig, Projection
from clip_exp.config.optimization import AdamWConfig, Optimizer, SchedulerConfig

if TYPE_CHECKING:
    from torch import nn

DEFAULT_EPOCHS = 30.0
# Largest natural logarithm of a logit scale, a factor of 22,000
MAX_LOGARITHM = 10.0

Logarithm = Annotated[
    Float, Field(ge=0, le=MAX_LOGARITHM), must_be(f"between 0 and {MAX_LOGARITHM:g}: it is a natural logarithm")
]


class StrategyName(StrEnum):
    auto = "auto"
    ddp = "ddp"
    deepspeed = "deepspeed"


class Precision(StrEnum):
    """Precisions, by Lightning's names. `auto`: bf16-mixed if the device supports it well, else 16-mixed on GPUs and 32-true on CPUs."""

    auto = "auto"
    fp32 = "32-true"
    bf16_mixed = "bf16-mixed"
    fp16_mixed = "16-mixed"


# ----------------------------------------------------------------------------------------------------------- loss


class LossConfig(Member):
    """Base class of losses."""

    group: ClassVar[str] = "loss"
    key: ClassVar[str] = "name"

    name: str = Field(description="loss")
    same_caption: PairLabel = Field(
        PairLabel.negative,
        description="positive or negative: how pairs with an equal caption in the same batch count",
    )
    same_image: PairLabel = Field(
        PairLabel.negative, description="positive or negative: how pairs with an equal image in the same batch count"
    )
    init_logit_scale: Logarithm = Field(
        math.log(1 / 0.07), description="initial logit scale as a natural logarithm, for training from scratch"
    )
    max_logit_scale: Logarithm | None = Field(
        None, description="largest logit scale as a natural logarithm; null: the default of the loss"
    )

    # Whether the loss reads the columns in `data.columns`
    takes_columns: ClassVar[bool] = False
    # Default of `max_logit_scale`: natural logarithm of the limit in the CLIP paper
    published_limit: ClassVar[float] = math.log(100)

    @property
    def largest_logit_scale(self) -> float:
        """Largest logit scale in training from scratch, as a natural logarithm."""
        return self.published_limit if self.max_logit_scale is None else self.max_logit_scale

    @property
    def logit_bias(self) -> float | None:
        """Initial logit bias in training from scratch; None if the loss has no bias."""
        return None

    @property
    def matches(self) -> dict[str, bool]:
        """Additional matches in a batch, as arguments of `losses.batch.repeated_matches`."""
        return {
            "same_caption": self.same_caption is PairLabel.positive,
            "same_image": self.same_image is PairLabel.positive,
        }

    def chance_level(self, pairs: int) -> float | None:
        """Return the lowest loss of a model that gives all pairs the same similarity; None if it is not known.

        A run whose loss stays there learns nothing (`training.diagnosis`).

        Args:
            pairs: pairs of the global batch, at least 2.
        """
        return None

    def custom_problems(self, columns: Collection[str]) -> Iterator[str]:
        """Create a custom loss, and yield an error message for every argument that it will not be given.

        Args:
            columns: names of the data's further columns, `data.columns`.
        """
        yield from ()

    def build(self) -> "nn.Module":
        """Return the loss module, which takes (CLIPOutput, caption_id_B, image_id_B) of this rank's pairs and returns a scalar.

        The mean of the values over all ranks, and the mean of their gradients, must be those of the global batch.
        `losses.batch` has functions that gather the batch.
        """
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------- strategy


class StrategyConfig(Config):
    """Base class of strategies."""

    name: StrategyName = Field(description="strategy")
    timeout_s: Annotated[Count, Field(le=10**7)] = Field(
        1800, description="seconds after which a collective operation fails, for example because another rank died"
    )

    @property
    def offloads(self) -> bool:
        """True if the optimizer state is in host memory."""
        return False


class AutoConfig(StrategyConfig):
    """A single process on one device, DDP on several devices."""

    name: Literal[StrategyName.auto] = StrategyName.auto


class DDPConfig(StrategyConfig):
    """Distributed data parallel: every device has a copy of the model, and gradients are averaged."""

    name: Literal[StrategyName.ddp] = StrategyName.ddp


def _not_file(value: Any) -> Any:
    if isinstance(value, str):
        raise PydanticCustomError(
            "file",
            "is not a mapping: files are not read. Type each of its keys: strategy.config.<key>=…, such as "
            "strategy.config.zero_optimization.overlap_comm=true",
        )
    return value


class DeepSpeedConfig(StrategyConfig):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020), which shards the training state across devices."""

    name: Literal[StrategyName.deepspeed] = StrategyName.deepspeed
    stage: Literal[1, 2, 3] = Field(
        description="ZeRO stage; 1: shard the optimizer state, 2: also the gradients, 3: also the weights"
    )
    offload: bool = Field(False, description="keep the optimizer state in host memory; in stage 3 the weights as well")
    config: Annotated[dict[str, JsonValue], BeforeValidator(_not_file)] = Field(
        {}, description="additional keys of DeepSpeed's configuration"
    )

    @property
    def offloads(self) -> bool:
        return self.offload


Strategy = Annotated[AutoConfig | DDPConfig | DeepSpeedConfig, Field(discriminator="name")]


UNITS = ("weeks", "days", "hours", "minutes", "seconds")


def _duration(value: str | dict[str, float]) -> timedelta:
    """Parse a duration as Lightning's Timer does; raise a ValueError if it is invalid, or not positive."""
    if isinstance(value, str):
        if not (match := re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", value.strip())):
            raise ValueError
        value = dict(zip(UNITS[1:], map(int, match.groups()), strict=True))
    if not value.keys() <= {*UNITS} or (duration := timedelta(**value)) <= timedelta():
        raise ValueError
    return duration


def _valid_duration(value: str | dict[str, float]) -> str | dict[str, float]:
    _duration(value)
    return value


MaxTime = Annotated[
    str | dict[str, NonNegative],
    AfterValidator(_valid_duration),
    must_be(f"a time above 0 as DD:HH:MM:SS, in quotes in a file, or a mapping with some of {', '.join(UNITS)}"),
]
LimitValBatches = Annotated[
    Index | Fraction, must_be("a fraction of the validation data (1.0 is all), or a number of batches (1 is one)")
]


class TrainerConfig(Config):
    """Arguments of Lightning's Trainer, under Lightning's names."""

    accelerator: Accelerator = Field("auto", description="auto, cpu, gpu or cuda (the same as gpu)")
    devices: Devices = Field(
        "auto",
        description="devices per machine: auto (all GPUs, or one CPU process), a number, or a list of GPU indices",
    )
    num_nodes: Count | None = Field(None, description="number of machines; null: as started by torchrun or srun")
    gradient_clip_val: Positive | None = Field(1.0, description="maximum norm of the gradient; null: no clipping")
    gradient_clip_algorithm: Literal["norm", "value"] = Field(
        "norm",
        description="norm: scale the gradient to a norm of at most gradient_clip_val; value: limit each element to +-gradient_clip_val",
    )
    deterministic: Annotated[bool | Literal["warn"], must_be("true, false or warn")] = Field(
        False, description="use deterministic algorithms only; warn: where there is none, warn and use another one"
    )
    benchmark: bool | None = Field(
        None,
        description="let cuDNN time its algorithms (torch.backends.cudnn.benchmark); null: if the image tower has several convolutions, "
        "unless deterministic",
    )
    sync_batchnorm: bool = Field(
        False,
        description="compute batch normalization statistics over all GPUs (strategy=auto or ddp) instead of on each",
    )
    detect_anomaly: bool = Field(
        False, description="end the run at the operation whose gradient is not a number; slow, for debugging"
    )
    max_time: MaxTime | None = Field(
        None,
        description="time after which this start of the run saves a checkpoint and ends, as DD:HH:MM:SS or a mapping, {hours: 12}; the same "
        "command resumes it; null: none",
    )
    limit_val_batches: LimitValBatches | None = Field(
        None,
        description="part of the validation data to use: a fraction (1.0: all), or a number of batches of 64 images per device; 0: no "
        "validation; null: all",
    )
    num_sanity_val_steps: Annotated[Int, Field(ge=-1)] = Field(
        0,
        description="batches of 64 images per device to validate on before the first step, without logging the result; -1: all",
    )
    enable_model_summary: bool = Field(False, description="show the modules of the model and their sizes at the start")
    profiler: Literal["simple", "advanced", "pytorch"] | None = Field(
        None, description="Lightning profiler: simple, advanced or pytorch; null: none"
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "gradient_clip_algorithm",
            lambda trainer: trainer.gradient_clip_val is None,
            "with {at}gradient_clip_val=null",
        ),
        Unused(
            "num_sanity_val_steps",
            lambda trainer: trainer.limit_val_batches == 0,
            "with {at}limit_val_batches=0",
            typed_only=True,
        ),
    )

    def rules(self, at: str) -> Iterator[str]:
        if self.benchmark and self.deterministic is True:
            yield (
                f"{at}benchmark=true and {at}deterministic=true exclude each other: the fastest algorithm may differ between starts. "
                "Leave one out."
            )

    @property
    def max_time_s(self) -> float:
        """Value of `max_time` in seconds; infinite for null."""
        return math.inf if self.max_time is None else _duration(self.max_time).total_seconds()


# ------------------------------------------------------------------------------------------- callbacks and loggers


class CallbacksConfig(Config):
    """Progress display, exponential moving average, retries of the last checkpoint, and additional callbacks."""

    progress: Literal["auto", "bar", "lines", "none"] = Field(
        "auto",
        description="progress display: bar, lines or none; auto: a bar on a terminal or in a notebook, else lines",
    )
    ema_decay: Annotated[Proportion, Field(gt=0)] | None = Field(
        None,
        description="decay of an exponential moving average of the weights, which evaluate.py run=DIR ema=true evaluates; null: no average",
    )
    ema_every_n_steps: Count = Field(1, description="optimizer steps between updates of the average")
    save_retry_s: NonNegative = Field(
        300.0,
        description="seconds during which the last checkpoint, at the end or after a signal, is retried if saving fails",
    )
    extra: dict[str, Target] = Field(
        {}, description="additional Lightning callbacks, as name: {_target_: class, arguments}"
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
    """Weights & Biases. The API key is read from WANDB_API_KEY or ~/.netrc, never from the configuration."""

    project: str = Field("clip_exp", description="Weights & Biases project")
    entity: str | None = Field(None, description="Weights & Biases user or team; null: the default of the API key")
    group: str | None = Field(None, description="Weights & Biases group of the run; null: none")
    tags: list[str] = Field([], description="Weights & Biases tags of the run")
    mode: Literal["online", "offline", "disabled"] = Field(
        "online", description="online, offline or disabled; online falls back to offline if the server is unreachable"
    )
    init_timeout_s: Count = Field(10, description="seconds to wait for the Weights & Biases server at the start")


class LoggerConfig(Config):
    """Loggers in addition to `metrics.csv`, which is always written since the run's report is generated from it."""

    tensorboard: bool = Field(False, description="write TensorBoard event files")
    wandb: WandbConfig | None = Field(None, description="log to Weights & Biases (logger=wandb); null: do not")
    extra: dict[str, Target] = Field(
        {}, description="additional Lightning loggers, as name: {_target_: class, arguments}"
    )


# ---------------------------------------------------------------------------------------------------- the command

KeepCheckpoints = Annotated[
    Annotated[Int, Field(ge=2)] | Literal["all"],
    must_be("all or at least 2: the one before the last is used if the last is damaged"),
]


def _loaded_from_file(tower: str) -> Unused:
    return Unused(
        f"model.{tower}.pretrained",
        lambda config: tower in config.starts,
        f"with pretrained_{tower}={{c.pretrained_{tower}}}, which contains the weights of the {tower} tower",
        typed_only=True,
    )


class TrainConfig(Config):
    """Configuration of a training run."""

    usage: ClassVar = """\
python train.py [key=value …] [-m]        (or: clip-exp train …)

Set keys on the command line: python train.py model=vit_b32 optimizer.lr=1e-4
With -m, every combination of values runs: … optimizer.lr=1e-3,3e-4 -m"""

    model: ModelConfig
    data: Data = Field(description="training and validation data: your tables or Dataset, or a generated data set")
    loss: LossConfig = Field(description="contrastive loss over the global batch")
    optimizer: Optimizer = Field(description="optimizer, its learning rate and weight decay")
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    strategy: Strategy = Field(description="distribution of a run over devices and machines")
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    finetune: FineTuneConfig = Field(default_factory=FineTuneConfig)
    callbacks: CallbacksConfig = Field(default_factory=CallbacksConfig)
    logger: LoggerConfig = Field(default_factory=LoggerConfig)

    name: str = Field(description="name of the run; its folder is <output_dir>/train/<name>/<time>")
    seed: Annotated[Index, Field(le=2**32 - 1)] = Field(
        0, description="seed of the initial weights, the order of the data and the augmentation"
    )
    output_dir: str = Field("outputs", description="folder for runs, sweeps, caches and generated data")
    resume: str = Field(
        "auto",
        description="auto: resume the run with the same name, configuration, data and initial weights, if there is one; never: start a "
        "new run; or the run folder or checkpoint to resume from",
    )
    pretrained: str | None = Field(
        None,
        description="initial weights of the model: a tag of `clip-exp models`, hf-hub:org/name, a file, a folder, or a run; null: random",
    )
    pretrained_image: str | None = Field(
        None,
        description="initial weights of the image tower only, from weights of this tower or of a whole model; values as for pretrained",
    )
    pretrained_text: str | None = Field(
        None,
        description="initial weights of the text tower only, from weights of this tower or of a whole model; values as for pretrained",
    )
    pretrained_prefix: str | None = Field(
        None,
        description="selects the weights in a file with several models, such as a student and a teacher: a key of the file, a prefix of "
        "names, or both joined by a dot; null: the only weights that fit",
    )
    max_steps: Count | None = Field(
        None, description="length of the run in optimizer steps; set max_steps or epochs, not both (neither: epochs=30)"
    )
    epochs: Positive | None = Field(None, description="length of the run in passes over the training data")
    global_batch_size: Count = Field(128, description="image-text pairs per optimizer step, over all devices")
    micro_batch_size: Count | None = Field(
        None,
        description="maximum number of images or texts that a tower processes at once on a device; a smaller value needs less memory and "
        "gives the same gradients; null: all at once",
    )
    precision: Precision = Field(
        Precision.auto,
        description="32-true, bf16-mixed or 16-mixed; auto: bf16-mixed if the device supports it well, else 16-mixed on GPUs and 32-true on "
        "CPUs",
    )
    compile: bool = Field(False, description="compile the towers with torch.compile")
    max_skipped_steps: Index = Field(
        10,
        description="steps in a row that may be skipped because their gradient is not finite; more end the run with exit code 5",
    )
    log_every_n_steps: Count = Field(10, description="optimizer steps between logged metrics")
    val_every_n_steps: Count | None = Field(
        None,
        description="optimizer steps between validations; null: a tenth of the run, but at least 50; the last step is always validated",
    )
    checkpoint_every_n_steps: Count | None = Field(
        None,
        description="optimizer steps between checkpoints; null: a tenth of the run, but at least 50; the last step is always saved",
    )
    checkpoint_async: Annotated[bool | Literal["auto"], must_be("true, false or auto")] = Field(
        "auto",
        description="copy the training state in host memory and write it to disk while training continues; auto: if the copy takes at most a "
        "quarter of the free memory",
    )
    hang_timeout_s: Positive | None = Field(
        300.0,
        description="seconds without progress after which a run ends as hanging: in a step, or 20 times the usual step if that is longer; "
        "12 times as long in the first step, in compiled steps, in validation and saving; null: never",
    )
    keep_checkpoints: KeepCheckpoints = Field(
        2, description="number of last checkpoints to keep, at least 2, in addition to the best one; or all"
    )
    keep_every_n_steps: Count | None = Field(
        None,
        description="also save a checkpoint every n optimizer steps, and never remove it; null: none",
    )
    monitor: str | None = Field(
        None,
        description="metric of validation or of a task, such as val/recall@1_i2t or imagenet/top1: keep the checkpoint that is best in it",
    )
    monitor_mode: Literal["auto", "min", "max"] = Field(
        "auto", description="min or max; auto: min for the loss and median ranks, max for every other metric"
    )
    patience: Count | None = Field(
        None,
        description="early stopping: number of measurements of monitor without improvement after which the run ends; null: never",
    )
    # Not 0 as in Lightning: the loss of a run that learns nothing still falls by 1e-4 now and then, so `patience` would never end it.
    # One number is enough for all metrics. Smaller changes of a loss or of a fraction are noise, and ranks change by at least 0.5.
    min_delta: NonNegative = Field(
        0.001,
        description="smallest change of monitor that patience counts as an improvement; the best checkpoint is chosen without it",
    )
    task: Tasks = Field(
        {},
        description="evaluation tasks to run during training: task=imagenet, or several: 'task=[imagenet,retrieval]'",
    )
    task_every_n_steps: Count | None = Field(
        None,
        description="optimizer steps between runs of the evaluation tasks; null: only at the end, where they always run",
    )

    allow_targets: list[str] = Field([], description=ALLOW_TARGETS)

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused("pretrained_prefix", lambda c: not c.starts, "without pretrained"),
        Unused(
            "loss.init_logit_scale",
            lambda c: c.pretrained is not None,
            "with pretrained={c.pretrained}, which contains a logit scale",
            typed_only=True,
        ),
        Unused(
            "model.image.pretrained model.text.pretrained",
            lambda c: c.pretrained is not None,
            "with pretrained={c.pretrained}, which contains the weights of both towers",
            typed_only=True,
        ),
        *(_loaded_from_file(tower) for tower in TOWERS),
        Unused(
            "patience monitor_mode",
            lambda c: c.monitor is None,
            "without a metric to monitor",
            "set monitor (monitor=val/loss), or leave this out",
        ),
        Unused(
            "min_delta",
            lambda c: c.patience is None,
            "without patience",
            "set that (patience=3), or leave this out",
        ),
        Unused(
            "task_every_n_steps",
            lambda c: not c.task,
            "without a task",
            "select one (task=imagenet), or leave this out",
        ),
        Unused("keep_every_n_steps", lambda c: c.keep_checkpoints == "all", "with keep_checkpoints=all"),
        Unused(
            "data.columns",
            lambda c: not c.loss.takes_columns,
            "with loss.name={c.loss.name}, which reads no further columns",
        ),
        Unused(
            "val_every_n_steps",
            lambda c: not c.data.has_val,
            "without validation data",
            "set data.val, or leave this out",
            typed_only=True,
        ),
        Unused(
            "val_every_n_steps",
            lambda c: c.trainer.limit_val_batches == 0,
            "with trainer.limit_val_batches=0",
            typed_only=True,
        ),
        Unused(
            "trainer.limit_val_batches trainer.num_sanity_val_steps",
            lambda c: not c.data.has_val,
            "without validation data",
            "set data.val, or leave this out",
            typed_only=True,
        ),
    )

    @property
    def starts(self) -> dict[str | None, str]:
        """Values of the `pretrained…` keys that are set, by tower; the key None is for the whole model."""
        given = {None: self.pretrained, "image": self.pretrained_image, "text": self.pretrained_text}
        return {tower: value for tower, value in given.items() if value is not None}

    @property
    def own_towers(self) -> set[str]:
        """Names of the towers that start from weights of their own library, such as timm."""
        return set() if self.pretrained is not None else self.model.own_towers - self.starts.keys()

    @model_validator(mode="after")
    def _have_a_length(self) -> Self:
        if self.max_steps is None and self.epochs is None:
            self.epochs = DEFAULT_EPOCHS
        return self

    def rules(self, at: str) -> Iterator[str]:
        if self.max_steps is not None and self.epochs is not None:
            yield f"max_steps={self.max_steps} and epochs={self.epochs:g} are both set: set only one (epochs=null or max_steps=null)."
        if (instead := words.of_value("resume", self.resume)) and not os.path.exists(self.resume):
            yield f"resume={self.resume} is not a run folder: {instead}"
        if self.max_steps is not None:
            yield from self.length_problems(self.max_steps)
        if self.precision is Precision.fp16_mixed and self.trainer.accelerator == "cpu":
            yield "precision=16-mixed is not supported on a CPU: use precision=auto."
        limit = self.loss.largest_logit_scale
        if self.pretrained is None and self.loss.init_logit_scale > limit + 1e-4:
            yield f"loss.init_logit_scale={self.loss.init_logit_scale:g} must be at most {limit:g}, the largest logit scale."
        if isinstance(self.strategy, DeepSpeedConfig):
            if self.strategy.offload and not isinstance(self.optimizer, AdamWConfig):
                yield f"strategy.offload uses DeepSpeed's CPU Adam: set optimizer=adamw or adam instead of {self.optimizer.target}."
            if self.trainer.gradient_clip_algorithm == "value":
                yield "trainer.gradient_clip_algorithm=value is not supported by DeepSpeed: use norm, or strategy=ddp."
            if self.trainer.sync_batchnorm:
                yield "trainer.sync_batchnorm is not supported with DeepSpeed: use strategy=ddp."
            if self.callbacks.ema_decay is not None:
                yield "callbacks.ema_decay is not supported with DeepSpeed, which shards the weights: use strategy=auto or ddp."
        for tower in TOWERS:
            if self.pretrained is not None and tower in self.starts:
                yield f"pretrained and pretrained_{tower} exclude each other: pretrained sets the weights of both towers. Leave one out."
        yield from self._check_start()

    def length_problems(self, steps: int) -> Iterator[str]:
        """Yield an error message if a run of `steps` steps is too short for its warm-up and the steps with frozen towers before it."""
        frozen, warmup = self.finetune.freeze_towers_steps, self.scheduler.warmup_steps or 0
        if warmup > steps:
            yield f"scheduler.warmup_steps={warmup} is longer than the run of {steps} steps: the learning rate would never reach its peak."
        elif frozen >= steps:
            yield f"finetune.freeze_towers_steps={frozen} must be less than the {steps} steps of the run: the towers would never be trained."
        elif frozen and frozen + warmup > steps:
            yield (
                f"scheduler.warmup_steps={warmup} after finetune.freeze_towers_steps={frozen} is longer than the run of {steps} steps: "
                "the towers' learning rate would never reach its peak."
            )

    def _check_start(self) -> Iterator[str]:
        """Yield an error message for every part of the model that would be frozen with random weights."""
        tuning = self.finetune
        initialized = set(TOWERS) if self.pretrained is not None else self.own_towers | self.starts.keys()
        for tower in TOWERS:
            frozen: TowerTuningConfig = getattr(tuning, tower)
            if tower not in initialized and (frozen.freeze or tuning.lora is not None):
                key = f"finetune.{tower}.freeze" if tuning.lora is None else "finetune.lora"
                yield f"{key} would freeze random weights in the {tower} tower: set pretrained=… or pretrained_{tower}=…"
            elif (
                tower in self.own_towers
                and getattr(getattr(self.model, tower), "projection", None) is not Projection.none
            ):
                yield from self.projection_problems(tower)
        if tuning.freeze_towers_steps and not initialized:
            yield "finetune.freeze_towers_steps would fit projections to towers with random weights: set pretrained=…"

    def projection_problems(self, tower: str) -> Iterator[str]:
        """Yield an error message if a tower's random projection would be frozen: weights of the tower's own library have none."""
        tuning: TowerTuningConfig = getattr(self.finetune, tower)
        if self.finetune.lora is not None:
            yield (
                f"finetune.lora would freeze the random projection of the {tower} tower: train the projection first "
                f"(finetune.{tower}.freeze=true finetune.{tower}.unfrozen_blocks=0), then train the adapters with pretrained=<that run>."
            )
        elif tuning.freeze and tuning.unfrozen_blocks is None:
            yield (
                f"finetune.{tower}.freeze would freeze the random projection of the {tower} tower: set "
                f"finetune.{tower}.unfrozen_blocks=0, which trains it."
            )
