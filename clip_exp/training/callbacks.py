"""Lightning callbacks of a run: progress, the last step, averaged weights and failures.

`fit` combines them with the callbacks that measure (`metrics`) and score tasks (`tasks`), and decides their order. The last section
checks and builds the additional callbacks of `callbacks.extra`.
"""

import copy
import inspect
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import rich.progress
import torch
from pytorch_lightning import callbacks as lightning
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities.model_helpers import is_overridden
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from clip_exp.checkpoints.io import EMA_KEY, EMA_OF_LOSS
from clip_exp.config.targets import build_extra, locate
from clip_exp.config.training import DeepSpeedConfig, StrategyName, TrainConfig
from clip_exp.data.loader import explain_worker_failure
from clip_exp.devices import is_out_of_memory
from clip_exp.errors import ConfigError, DeviceMemoryError, DistributedError, NumericError
from clip_exp.progress import NotebookProgress, in_notebook
from clip_exp.ranks import failure, group
from clip_exp.training.messages import LOG_ONLY
from clip_exp.training.metrics import StepMetrics, last_validation, seconds
from clip_exp.training.preflight import check_monitor, is_of_task, monitor_mode
from clip_exp.training.saving import Preempted
from clip_exp.training.skipped_steps import SkippedSteps

log = logging.getLogger(__name__)

ANOMALY = "returned nan values in its"  # torch's error under anomaly detection


# ------------------------------------------------------------------------------------------------------------- progress


class Progress(pl.Callback):
    """Progress on the terminal: a line for every logged step, validation and scoring of tasks, or a progress bar.

    `train.log` contains all lines in any case.

    Args:
        kind: `bar`, `lines`, `none`, or `auto` (a bar if standard output is a terminal or in a notebook, else lines).
        metrics: callback that measures the steps.
        note: text that is shown with the results of every validation.
    """

    def __init__(self, kind: str, metrics: StepMetrics, note: str = "") -> None:
        if kind == "auto":
            kind = "bar" if sys.stdout.isatty() or in_notebook() else "lines"
        self.metrics, self.note = metrics, note
        self.with_bar = kind == "bar"
        self.steps = {} if kind == "lines" else LOG_ONLY
        self.values = LOG_ONLY if kind == "none" else {}
        self.bar: rich.progress.Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.with_bar and trainer.is_global_zero:
            description = TextColumn("{task.description}")
            bar = NotebookProgress if in_notebook() else rich.progress.Progress
            self.bar = bar(BarColumn(), MofNCompleteColumn(), description, TimeElapsedColumn(), TimeRemainingColumn())
            self.bar.start()
            self.task = self.bar.add_task("", total=pl_module.total_steps, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        latest, description = self.metrics.latest, ""
        step, total = trainer.global_step, pl_module.total_steps
        if latest:
            times = f"{seconds(latest['train/data_wait_s'])} waiting for data + {seconds(latest['train/compute_s'])} computing"
            description = f"loss {latest.get('train/loss', math.nan):.4f}  {latest['train/samples_per_s']:,.0f} samples/s  {times}"
        if latest.get("samples_seen") == step * self.metrics.global_batch_size:
            left_s = (total - step) * self.metrics.global_batch_size / latest["train/samples_per_s"]
            left = f"{int(left_s // 60)}:{int(left_s % 60):02d} left"
            log.info(f"step {step}/{total}  {description}  {left}", extra=self.steps)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=description)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.show(last_validation(trainer), self.note)

    def scoring(self, tasks: list[str]) -> None:
        """Show on the bar which tasks are being scored."""
        if self.bar is not None:
            self.bar.update(self.task, description=f"scoring {', '.join(tasks)}")

    def show(self, values: dict[str, float], note: str = "") -> None:
        """Show results of validation or of tasks, with a note about them."""
        texts = [f"{name} {value:.4f}" for name, value in values.items()]
        log.info("  ".join([*texts, f"({note})"] if note else texts), extra=self.values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


# -------------------------------------------------------------------------------------------------------- the last step


class StopAtEnd(pl.Callback):
    """Callback that ends training after the last step, which makes Lightning validate it whatever the interval.

    A resumed run that had already exhausted its `patience` is not trained further.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        early = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
        exhausted = any(callback.wait_count >= callback.patience for callback in early)
        if exhausted or trainer.global_step >= pl_module.total_steps:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= pl_module.total_steps:
            trainer.should_stop = True


# ----------------------------------------------------------------------------------------------------- averaged weights


@dataclass(eq=False, repr=False)
class AveragedWeights(pl.Callback):
    """Exponential moving average of the model's weights, saved as `ema.safetensors` in every checkpoint, and of the loss's weights.

    A skipped step (`skipped_steps`) leaves it unchanged.
    """

    decay: float  # weight of the previous average in an update
    skipped: SkippedSteps  # acts before this callback
    every_n_steps: int = 1  # optimizer steps between updates
    average: nn.Module | None = field(default=None, init=False)
    average_of_loss: dict[str, Tensor] = field(default_factory=dict, init=False)
    _loaded: dict[str, Any] | None = field(default=None, init=False)
    _loaded_of_loss: dict[str, Tensor] = field(default_factory=dict, init=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        model = pl_module.model
        self.average = copy.deepcopy(model).requires_grad_(False)
        if self._loaded is not None:
            self.average.load_state_dict(self._loaded)
            self._loaded = None
        of_loss = {name: weight for name, weight in pl_module.loss.named_parameters() if weight.requires_grad}
        self.average_of_loss = {
            name: self._loaded_of_loss.get(name, weight).detach().to(weight, copy=True)
            for name, weight in of_loss.items()
        }
        # Listed once: iterating over the modules in every step is slow enough to make a GPU wait.
        averages = [*self.average.parameters(), *self.average_of_loss.values()]
        self._parameters = averages, [*model.parameters(), *of_loss.values()]
        self._buffers = list(self.average.buffers()), list(model.buffers())

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the average. Nothing here may synchronize with the GPU: the process must stay ahead of it."""
        if trainer.global_step % self.every_n_steps == 0:
            # Like `lerp`, which accepts no weight on the device for several tensors at once.
            averages, current = self._parameters
            distances = torch._foreach_sub(current, averages)
            torch._foreach_mul_(distances, (1 - self.decay) * ~self.skipped.now)
            torch._foreach_add_(averages, distances)
            if self._buffers[0]:
                torch._foreach_copy_(*self._buffers)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.average is not None and trainer.is_global_zero:  # only rank 0 writes
            checkpoint[EMA_KEY] = {key: value.cpu() for key, value in self.average.state_dict().items()}
            checkpoint[EMA_OF_LOSS] = {key: value.cpu() for key, value in self.average_of_loss.items()}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._loaded, self._loaded_of_loss = checkpoint.get(EMA_KEY), checkpoint.get(EMA_OF_LOSS, {})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Free the average, which would otherwise stay on the GPU after the run."""
        self.average, self.average_of_loss = None, {}
        self._parameters = self._buffers = [], []


# ------------------------------------------------------------------------------------------------------------- failures


class ReportFailure(pl.Callback):
    """Callback that reports the failure of a rank as soon as Lightning catches it.

    Lightning's cleanup may block forever: it moves the model to the CPU, which waits for the GPU, which may wait for other ranks.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if not isinstance(exception, Preempted):
            failure.report(explain(exception, trainer, self.config))


class SameRanks(pl.Callback):
    """Callback that checks before the first step that the group, Lightning and DeepSpeed agree on rank, number of ranks and device."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        device = trainer.strategy.root_device
        ours = f"rank {group.rank()} of {group.world_size()} on {group.device(device.type)}"
        found = {"Lightning": f"rank {trainer.global_rank} of {trainer.world_size} on {device}"}
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        if engine is not None:
            found["DeepSpeed"] = f"rank {engine.global_rank} of {engine.world_size} on {engine.device}"
        for library, theirs in found.items():
            if theirs != ours:
                raise DistributedError(
                    f"this process is {ours}, but {theirs} for {library}, so training would be wrong. Please report this with the "
                    "environment variables of your launcher."
                )


def explain(error: BaseException, trainer: pl.Trainer, config: TrainConfig) -> BaseException:
    """Return the error to report for an error in training: one of clip_exp's if the cause is known, else the same error."""
    worker_failure = explain_worker_failure(error, "data.num_workers")
    if worker_failure is not None:
        return worker_failure
    if config.trainer.detect_anomaly and ANOMALY in str(error):
        return NumericError(
            f"step {trainer.global_step + 1} has a gradient that is not a number (trainer.detect_anomaly): {error} The lines above in "
            "train.log show the operation. Lower optimizer.lr, or set precision=32-true."
        )
    if not is_out_of_memory(error):
        return group.lost_connection(error) or error
    device, peak = trainer.strategy.root_device, ""
    if device.type == "cuda":
        peak = f" after a peak of {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    per_rank = config.global_batch_size // group.world_size()
    micro = min(config.micro_batch_size or per_rank, per_rank)
    remedies = []
    if micro > 1:
        remedies.append(f"set micro_batch_size={max(1, micro // 2)} (now {micro}), which gives the same gradients")
    if config.strategy.name != StrategyName.deepspeed and group.world_size() > 1:
        remedies.append("shard the optimizer state over the ranks with strategy=deepspeed_stage_2 or deepspeed_stage_3")
    elif isinstance(config.strategy, DeepSpeedConfig) and not config.strategy.offload:
        remedies.append(
            "keep the optimizer state in host memory with strategy=deepspeed_stage_2_offload or deepspeed_stage_3_offload"
        )
    remedies.append(f"lower global_batch_size={config.global_batch_size}")
    first = str(error).strip().splitlines() or [type(error).__name__]
    return DeviceMemoryError(
        f"out of memory on {device} in step {trainer.global_step + 1}, rank {group.rank()} of {group.world_size()}{peak}: "
        f"{'; or '.join(remedies)}.\n  {first[0]}"
    )


# ------------------------------------------------------------------------------------------------- additional callbacks

NO_EPOCHS = "it acts at the ends of epochs, and a run is one stream of steps"
# Callbacks of Lightning that conflict with what a run does itself: why, and what to use instead
REFUSED: dict[type[pl.Callback], tuple[str, str]] = {
    lightning.Checkpoint: (
        "a run writes its checkpoints itself",
        "set checkpoint_every_n_steps, and monitor to keep the best checkpoint",
    ),
    lightning.ProgressBar: ("a run shows its progress itself", "set callbacks.progress to bar, lines or none"),
    lightning.ModelSummary: ("its table would not be shown", "set trainer.enable_model_summary=true"),
    lightning.BatchSizeFinder: (
        "it would change the batch of the loss",
        "set global_batch_size, and micro_batch_size for the memory that it needs",
    ),
    lightning.GradientAccumulationScheduler: (
        "the loss compares all pairs of a batch, so gradients of smaller batches do not add up to its gradient",
        "set global_batch_size, and micro_batch_size for the memory that it needs",
    ),
    lightning.LearningRateFinder: (
        "the learning rate is part of the configuration",
        "set optimizer.lr, or compare several with optimizer.lr=1e-3,3e-4 -m",
    ),
    lightning.StochasticWeightAveraging: (NO_EPOCHS, "set callbacks.ema_decay (callbacks=ema)"),
    lightning.WeightAveraging: (
        "it would save its average instead of the trained weights",
        "set callbacks.ema_decay (callbacks=ema)",
    ),
    lightning.BaseFinetuning: (NO_EPOCHS, "set finetune.freeze_towers_steps, or select finetune=lit"),
    lightning.ModelPruning: (
        "it renames the parameters, whose optimizer state is saved by name",
        "prune the weights of the finished run",
    ),
    lightning.SpikeDetection: (
        "it ends a run to repeat it without some batches, and the batches of a run depend only on its seed",
        "lower optimizer.lr or trainer.gradient_clip_val",
    ),
    lightning.ThroughputMonitor: (
        "a run measures its throughput itself",
        "read train/samples_per_s in metrics.csv of the run folder",
    ),
    lightning.BasePredictionWriter: ("a run predicts nothing", "use clip-exp predict"),
}
# They write to the loggers, which only rank 0 has
LOGGING = (lightning.DeviceStatsMonitor, lightning.LearningRateMonitor)


def extra_callbacks(config: TrainConfig) -> list[pl.Callback]:
    """Build the additional callbacks of this rank."""
    callbacks = build_extra(config.callbacks.extra, "callbacks.extra")
    return [each for each in callbacks if group.is_main() or not isinstance(each, LOGGING)]


def extra_problems(config: TrainConfig) -> Iterator[str]:
    """Yield an error message for every additional callback that cannot be built or conflicts with the run."""
    keys: dict[str, str] = {}
    if config.patience is not None and not is_of_task(config.monitor):
        mode = monitor_mode(config.monitor, config.monitor_mode)
        keys[EarlyStopping(str(config.monitor), mode=mode).state_key] = "patience"
    for name, node in config.callbacks.extra.items():
        where = f"callbacks.extra.{name}"
        try:
            # Before it is built: nobody should have to correct the arguments of a callback that is refused. Classes of the
            # package `lightning` have the same names.
            found = (getattr(lightning, node.target.rpartition(".")[2], None), locate(node.target, where))
            if refusals := [text for kind in found if inspect.isclass(kind) and (text := _refusal(kind, where))]:
                yield refusals[0]
                continue
            (callback,) = build_extra({name: node}, "callbacks.extra")
        except ConfigError as error:
            yield str(error)
            continue
        if not isinstance(callback, pl.Callback):
            kind = type(callback).__name__
            yield f"{where}: {kind} is not a callback: give a subclass of pytorch_lightning.Callback as _target_."
            continue
        if (refusal := _refusal(type(callback), where)) is not None:
            yield refusal
            continue
        yield from _hook_problems(callback, where)
        if isinstance(callback, EarlyStopping):
            yield from _stopping_problems(callback, config, where)
        if is_overridden("state_dict", callback, parent=pl.Callback):
            other = keys.setdefault(callback.state_key, where)
            if other != where:
                yield f"{where} and {other} would save their states under the same name: leave one of them out."


def _refusal(kind: type, where: str) -> str | None:
    """Return an error message for a class of callbacks that conflict with the run; None for other classes."""
    for refused, (reason, remedy) in REFUSED.items():
        if issubclass(kind, refused) and not issubclass(kind, lightning.RichModelSummary):
            return f"{where}: {kind.__name__} cannot be used, since {reason}: {remedy}."
    return None


def _hook_problems(callback: pl.Callback, where: str) -> Iterator[str]:
    """Yield an error message for every hook of a LambdaCallback that is not a function."""
    if isinstance(callback, lightning.LambdaCallback):
        for hook, function in vars(callback).items():
            if function is not None and not callable(function):
                yield (
                    f"{where}.{hook}={function} must be a function, which a configuration cannot hold: give a subclass of "
                    "pytorch_lightning.Callback as _target_."
                )


def _stopping_problems(callback: EarlyStopping, config: TrainConfig, where: str) -> Iterator[str]:
    """Yield an error message if the metric of an EarlyStopping is not measured at every validation."""
    if callback.monitor.partition("/")[0] in config.task:
        yield (
            f"{where}.monitor={callback.monitor} is a metric of a task, which is not measured at every validation: set "
            f"monitor={callback.monitor} and patience instead of this callback."
        )
    else:
        yield from (f"{where}.{problem}" for problem in check_monitor(config, callback.monitor, []))
