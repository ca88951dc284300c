"""The types, units and documentation of every key in `conf/`.

Hydra composes YAML against these dataclasses, so a wrong key or type is refused while composing; `config.load` then turns
the result into instances of them, and nothing past it sees a DictConfig. Here is what training needs; models are in
`config.model_schema`, data in `config.data_schema`, tasks in `config.evaluation_schema`, the commands that use a model in
`config.use_schema`. These modules import neither torch nor Hydra.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from clip_exp.config.data_schema import DataConfig, PairLabel
from clip_exp.config.missing import MISSING
from clip_exp.config.model_schema import ModelConfig


class LossName(StrEnum):
    softmax = "softmax"
    sigmoid = "sigmoid"


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


@dataclass
class LossConfig:
    name: LossName = MISSING
    same_caption: PairLabel = PairLabel.negative  # equal captions in a batch
    same_image: PairLabel = PairLabel.negative  # equal pictures in a batch
    init_logit_scale: float = 2.659260036932778  # ln(1 / 0.07), without `pretrained`
    max_logit_scale: float | None = (
        None  # natural logarithm; null: ln 100 (softmax), none (sigmoid), or what the weights have if more
    )
    init_logit_bias: float | None = None  # sigmoid only
    chunk_size: int = 1024  # rows of similarities that are held at a time (sigmoid)

    @property
    def largest_logit_scale(self) -> float:
        """Natural logarithm of the largest scale of random weights while they train.

        OpenAI clipped it at 100 (Radford et al. 2021, section 2.5). SigLIP was trained without a limit (big_vision), and its published
        weights have 112 and more.
        """
        if self.max_logit_scale is not None:
            return self.max_logit_scale
        return math.log(100) if self.name == LossName.softmax else math.inf


# -------------------------------------------------------------------------------------------------- optimisation


@dataclass
class OptimizerConfig:
    """What every optimizer has. `_target_` is a class below an allowed module prefix (`config.targets`)."""

    _target_: str = MISSING
    lr: float = MISSING
    weight_decay: float = 0.2  # on matrices only: not on biases, norms, positions and the logit scale


@dataclass
class AdamConfig(OptimizerConfig):
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    fused: bool = True


@dataclass
class SGDConfig(OptimizerConfig):
    momentum: float = 0.9
    nesterov: bool = False


@dataclass
class LionConfig(OptimizerConfig):
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])


@dataclass
class CustomOptimizerConfig(OptimizerConfig):
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the class


@dataclass
class SchedulerConfig:
    """Learning rate over its peak as a function of the step: linear warm-up, then `_target_`'s decay."""

    _target_: str = MISSING  # function of the share of the decay that is done, 0..1, to a factor
    warmup_steps: int | None = None  # null: a tenth of the run
    final_factor: float = 0.0  # the rate at the end over its peak
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class StrategyConfig:
    name: StrategyName = MISSING
    stage: int | None = None  # ZeRO 1, 2 or 3 (deepspeed)
    offload: bool = False  # optimizer state, and under ZeRO-3 parameters too, in host memory (deepspeed)
    config: dict[str, Any] = field(default_factory=dict)  # further keys of DeepSpeed's own configuration
    timeout_s: int = 1800  # of a collective, after which a lost rank ends the run


@dataclass
class TrainerConfig:
    """What Lightning's Trainer needs to know; the names are Lightning's."""

    accelerator: str = "auto"  # auto, cpu, gpu (or cuda)
    devices: Any = "auto"  # auto (1 on CPU, all GPUs), a number, or a list of GPU indices
    num_nodes: int | None = None  # machines; null: as many as torchrun or srun uses
    gradient_clip_val: float | None = 1.0  # norm of the whole gradient
    deterministic: bool = False
    profiler: str | None = None  # null, simple, advanced, pytorch


# ---------------------------------------------------------------------------------------------------- fine-tuning


@dataclass
class TowerTuningConfig:
    """How one tower is trained. Depth counts from the embeddings (0) over the L blocks to what follows them (L + 1)."""

    freeze: bool = False  # its weights and batch-norm statistics stay as they are (LiT; Zhai et al. 2022)
    unfrozen_blocks: int | None = None  # under `freeze`: the last k blocks and what follows them are trained after all
    lr_factor: float = 1.0  # of `optimizer.lr`
    layer_decay: float = (
        1.0  # a further factor for each step of depth towards the input: layer_decay ** (L + 1 - depth)
    )


@dataclass
class LoRAConfig:
    """Low-rank updates B A of linear layers instead of the weights themselves (Hu et al. 2022), by the `peft` library.

    All other weights of both towers stay as they are. Checkpoints hold the sum of both.
    """

    rank: int = 16
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # of what goes into A
    image: bool = True  # whether the tower gets them
    text: bool = True
    targets: list[str] = field(default_factory=list)  # ends of names of linear layers; empty: all of the blocks


@dataclass
class FineTuneConfig:
    image: TowerTuningConfig = field(default_factory=TowerTuningConfig)
    text: TowerTuningConfig = field(default_factory=TowerTuningConfig)
    lora: LoRAConfig | None = None
    linear_probe_steps: int = 0  # first steps in which only the projections and the scale learn (Kumar et al. 2022)


# ------------------------------------------------------------------------------------------- callbacks and loggers


@dataclass
class CallbacksConfig:
    progress: str = "auto"  # auto (a bar on a terminal, lines elsewhere), bar, lines, none
    ema_decay: float | None = None  # keep an exponential moving average of the weights
    ema_every_n_steps: int = 1
    save_retry_s: float = 300.0  # how long the last save (at the end, or after a signal) is retried where it fails
    extra: dict[str, Any] = field(default_factory=dict)  # name: {_target_: lightning callback, …}


@dataclass
class WandbConfig:
    project: str = "clip_exp"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str = "online"  # online, offline, disabled; an unreachable server turns online into offline
    init_timeout_s: int = 10


@dataclass
class LoggerConfig:
    """`metrics.csv` is always written: a run's report is made from it. The others come on top."""

    tensorboard: bool = False
    wandb: WandbConfig | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # name: {_target_: lightning logger, …}


# ------------------------------------------------------------------------------------------------------- commands


@dataclass
class TrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: Any = MISSING  # an OptimizerConfig, chosen by its `_target_` in `config.load`
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    finetune: FineTuneConfig = field(default_factory=FineTuneConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    name: str = MISSING  # of the run; its folder is <output_dir>/train/<name>/<time>
    seed: int = 0
    output_dir: str = "outputs"
    resume: str = "auto"  # auto, never, or a run folder or checkpoint
    pretrained: str | None = None  # weights to start from: a tag, hf-hub:org/name, a file, a folder, or a run
    max_steps: int | None = None  # exactly one of max_steps and epochs; neither: 30 epochs
    epochs: float | None = None
    global_batch_size: int = 128  # pairs per optimizer step, over all devices
    micro_batch_size: int | None = None  # the largest chunk a tower sees at once on a device; null: all at once
    precision: str = "auto"  # auto, 32-true, bf16-mixed, 16-mixed
    compile: bool = False  # torch.compile on the towers
    log_every_n_steps: int = 10
    val_every_n_steps: int | None = (
        None  # null: ten times in the run, 50 steps apart or more; the end is always validated
    )
    checkpoint_every_n_steps: int | None = None  # likewise; the end always has one
    monitor: str | None = None  # a validation metric, such as val/recall@1_i2t: keep its best checkpoint
    monitor_mode: str = "auto"  # min, max; auto: min for the loss and median ranks, max for every other metric
    patience: int | None = None  # validations without a better `monitor` before the run stops
    task: dict[str, Any] = field(
        default_factory=dict
    )  # evaluation tasks to score while training (`EvaluateConfig.task`)
    task_every_n_steps: int | None = None  # null: only at the end
