"""One training run in one process (a rank of several, or the only one): build everything, fit, and tell what came out.

From top to bottom: what is done (`train`, `_fit`), data and model, the Trainer with its callbacks in the order in which they act, and
the checkpoint that the run starts from: the newest that is undamaged and that the model takes. Rank 0 decides which that is.
"""

import logging
import math
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from pytorch_lightning.utilities import rank_zero_only

from clip_exp.checkpoints.folders import STEP, checkpoints, damage, latest, recover, set_aside, step_of
from clip_exp.checkpoints.io import SafeCheckpointIO, read_state
from clip_exp.config.base import plain
from clip_exp.config.files import read_run_config
from clip_exp.config.registry import build_extra
from clip_exp.config.training import DDPConfig, DeepSpeedConfig, LossConfig, StrategyConfig, StrategyName, TrainConfig
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.data.images import preprocessing_of
from clip_exp.data.preflight import RunTables
from clip_exp.devices import benchmarks_convolutions, resolve_accelerator, training_precision
from clip_exp.errors import PREEMPTED_EXIT_CODE, CheckpointError, ClipExpError, ConfigError
from clip_exp.evaluation.task import Task
from clip_exp.models.clip import CLIP, build_model
from clip_exp.ranks import group
from clip_exp.ranks.environment import started_by_launcher
from clip_exp.ranks.failure import StopRequest, note_signals
from clip_exp.ranks.group import is_main
from clip_exp.runs import LAST_CHECKPOINT, RunRecord, with_saved_tokenizer
from clip_exp.text.tokenizer import build_tokenizer
from clip_exp.training.callbacks import (
    AveragedWeights,
    Checkpointer,
    Preempted,
    Preemption,
    Progress,
    ReportFailure,
    SameRanks,
    StopAtEnd,
    explain,
)
from clip_exp.training.messages import LOG_ONLY
from clip_exp.training.metrics import MetricsCSV, StepMetrics, build_loggers, start_loggers
from clip_exp.training.module import CLIPModule, ZeroShot
from clip_exp.training.opening import EarlierRun, lost, start_weights
from clip_exp.training.optim import prepare
from clip_exp.training.preflight import check_validation_classes, is_of_task, monitor_mode, steps_of, training_tasks
from clip_exp.training.strategies import GroupEnvironment, deepspeed_strategy
from clip_exp.training.summary import conclude
from clip_exp.training.tasks import TaskPatience, TaskScores, score_finished
from clip_exp.weights.fit import load_weights

log = logging.getLogger(__name__)
PROFILERS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}
PARTS = ("epoch", "global_step", "loops", "optimizer_states", "lr_schedulers", "random_states")  # of a training state


def train(run_dir: Path, config: TrainConfig | None = None, tables: RunTables | None = None) -> int:
    """Train in a run folder, resuming from its newest checkpoint, or score the finished run; return the exit code.

    Args:
        config: configuration of the run; None: as `run_dir`/config.yaml has it.
        tables: its tables where they are open already.

    Raises:
        ClipExpError: an expected failure, noted in `run.json` where this process is alone.
    """
    config = config or read_run_config(run_dir)
    config = config.model_copy(update={"model": with_saved_tokenizer(config.model, run_dir)})
    record = RunRecord(run_dir)
    device_type = resolve_accelerator(config.trainer.accelerator, "trainer.")
    several = started_by_launcher() or config.strategy.name != StrategyName.auto
    finished = record.values.get("status") == "finished"
    with note_signals() as stop:
        try:
            with group.membership(device_type, config.strategy.timeout_s) if several else nullcontext():
                if finished:
                    score_finished(config, run_dir, record, group.device(device_type))
                    return 0
                try:
                    _fit(config, tables, run_dir, record, stop, device_type)
                    return 0
                except Preempted:
                    if is_main():
                        record.finish("preempted")
                        log.info("stopped by a signal; the same command resumes from %s", latest(run_dir))
                    return PREEMPTED_EXIT_CODE
        except BaseException as error:
            if is_main():
                # Of several ranks, whoever watches them notes the failure that was first.
                if group.world_size() == 1 and not finished:
                    code = error.exit_code if isinstance(error, ClipExpError) else 1
                    record.finish("failed", error=str(error).splitlines()[:20], exit_code=code)
                # The terminal shows it when the process ends.
                log.error("%s", error, exc_info=not isinstance(error, ClipExpError), extra=LOG_ONLY)
            raise


def _fit(
    config: TrainConfig, tables: RunTables | None, run_dir: Path, record: RunRecord, stop: StopRequest, device_type: str
) -> None:
    torch.set_float32_matmul_precision("high")
    pl.seed_everything(config.seed, verbose=False)
    datamodule = PairsDataModule(
        config.data,
        preprocessing=preprocessing_of(config.model.image),
        tokenizer=build_tokenizer(config.model.text),
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        output_dir=Path(config.output_dir),
        run_dir=run_dir,
        pad_multiple=8 if config.compile else 1,
        tables=None if tables is None else tables.opened,
    )
    datamodule.setup("fit")  # after which it knows how many rows there are
    datamodule.require_same_tables(group.gather_objects)
    found = group.from_main(lambda: candidates(config, run_dir, record))
    resumes = bool(found.usable)
    if resumes:
        _require_same_data(datamodule, found.usable[0])
    steps = steps_of(config, datamodule.num_rows)
    if problems := list(check_validation_classes(config, len(datamodule.class_names))):
        raise ConfigError("\n".join(problems))
    datamodule.total_steps = steps
    tasks = training_tasks(config)
    zero_shot = ZeroShot(datamodule.class_names, config.data.templates) if datamodule.class_names else None
    model = _build_model(config, run_dir, resumes=resumes)
    torch.backends.cudnn.benchmark = benchmarks_convolutions(model.image, device_type, config.trainer.deterministic)
    module = CLIPModule(model, config.loss.build(), config, steps, zero_shot)
    device, preemption = group.device(device_type), Preemption(stop)
    trainer = build_trainer(
        config, run_dir, device=device, steps=steps, datamodule=datamodule, preemption=preemption, tasks=tasks
    )
    checkpoint = group.from_main(lambda: _start_from(found, config, run_dir, record, trainer, module, datamodule))
    started_s = time.perf_counter()
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TaskScores):
                names = callback.write(trainer.strategy.root_device)
                record.values["scored_tasks"] = {name: plain(config.task[name]) for name in names}
    except Exception as error:
        explained = explain(error, trainer, config)
        if explained is error:
            raise
        raise explained from error
    if is_main():
        conclude(run_dir, record, trainer, module, config, time.perf_counter() - started_s)


# ---------------------------------------------------------------------------------------------------------------- model


def _build_model(config: TrainConfig, run_dir: Path, *, resumes: bool) -> CLIP:
    """Build the model with the weights that a new run starts from; those of a run that resumes come from its checkpoint."""
    loss = config.loss
    # Weights of timm and Hugging Face are for a run that begins, and from nothing else.
    own_weights = set() if resumes else config.own_towers
    scale, bias = loss.init_logit_scale, loss.logit_bias
    build = partial(build_model, config.model, init_logit_scale=scale, init_logit_bias=bias, own_weights=own_weights)
    model = group.main_first(build) if own_weights else build()
    for tower in () if resumes else config.starts:
        start = start_weights(config, RunRecord(run_dir).values, tower)
        for note in load_weights(model, start, config.model, config.pretrained_prefix, tower):
            log.info(note)
    if not resumes:
        _limit_logit_scale(model, loss)
    # Layers are frozen and adapted after the weights are in, whose names are those of a plain model.
    prepare(model, config.finetune, config.model)
    if config.compile:
        model.image.compile()
        model.text.compile()
    return model


def _limit_logit_scale(model: CLIP, loss: LossConfig) -> None:
    """Report weights whose logit scale is above the limit of the loss, and cut it where the limit was set."""
    start = model.logit_scale.item()
    if start < loss.largest_logit_scale + 1e-3:  # ln 100 in float16 is a little more than ln 100
        return
    had = f"The weights have a logit scale of {math.exp(start):.4g}, above the limit of {math.exp(loss.largest_logit_scale):.4g}"
    if loss.max_logit_scale is None:
        log.info(
            "%s (loss=%s): what they have is the limit of this run. loss.max_logit_scale sets another.", had, loss.name
        )
        return
    with torch.no_grad():
        model.logit_scale.fill_(loss.max_logit_scale)
    log.warning("%s that loss.max_logit_scale=%g sets: the run starts at the limit.", had, loss.max_logit_scale)


# -------------------------------------------------------------------------------------------------------------- Trainer


def build_trainer(
    config: TrainConfig,
    run_dir: Path,
    *,
    device: torch.device,
    steps: int,
    datamodule: PairsDataModule,
    preemption: Preemption,
    tasks: list[Task],
) -> pl.Trainer:
    """Return the Trainer of this rank, for a data module that is set up; `tasks` are scored while it trains."""
    _quiet_lightning()
    # Lightning takes it from whatever variables a scheduler has left in the environment.
    rank_zero_only.rank = group.rank()  # type: ignore[attr-defined]
    io = SafeCheckpointIO()
    validate = datamodule.has_validation
    deepspeed = isinstance(config.strategy, DeepSpeedConfig)
    callbacks = _build_callbacks(config, run_dir, io, steps, datamodule, tasks)
    profiler = None
    if config.trainer.profiler is not None:
        profiler = PROFILERS[config.trainer.profiler](dirpath=run_dir, filename="profile")
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        # One device per process, on a node of its own: see `GroupEnvironment`.
        devices=[device.index] if device.type == "cuda" else 1,
        num_nodes=group.world_size(),
        strategy=build_strategy(config.strategy, device),
        precision=training_precision(config.precision, device.type),  # type: ignore[arg-type]
        # A run is a stream of optimizer steps: sample k depends on the seed alone, and the only state is how many were seen. So
        # workers, ranks and restarts cannot change what is trained on, and nothing is counted in epochs.
        max_steps=steps,
        max_epochs=-1,
        min_epochs=0,
        val_check_interval=min(steps, config.val_every_n_steps or default_interval(steps)) if validate else None,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # a rank takes its slice of each step's samples itself
        # Otherwise `CLIPModule` clips, which logs the norm.
        gradient_clip_val=config.trainer.gradient_clip_val if deepspeed else None,
        deterministic=config.trainer.deterministic,
        profiler=profiler,
        logger=start_loggers(build_loggers(config.logger, run_dir, config.name), config) if is_main() else False,
        callbacks=[*callbacks, preemption],
        plugins=[io, GroupEnvironment()],
        enable_checkpointing=False,  # `Checkpointer` saves: every rank learns of a failed save, which need not end the run
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
    )
    preemption.take_over(trainer, next(c for c in callbacks if isinstance(c, Checkpointer)))
    return trainer


def build_strategy(config: StrategyConfig, device: torch.device) -> Strategy | str:
    """Lightning's strategy for the configured one; `auto` is DDP where there are several ranks."""
    if isinstance(config, DeepSpeedConfig):
        return deepspeed_strategy(config, device)
    if isinstance(config, DDPConfig) or group.world_size() > 1:
        return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
    return SingleDeviceStrategy(str(device))


def default_interval(steps: int) -> int:
    """Steps between validations, and between checkpoints: ten in a run, and in short runs at least 50 steps apart."""
    return max(50, math.ceil(steps / 10))


def _build_callbacks(
    config: TrainConfig, run_dir: Path, io: SafeCheckpointIO, steps: int, datamodule: PairsDataModule, tasks: list[Task]
) -> list[pl.Callback]:
    """In the order in which they act at the end of a step: measure, show, average, score, stop, save."""
    metrics = StepMetrics(config.log_every_n_steps, config.global_batch_size, datamodule.num_rows)
    progress = Progress(config.callbacks.progress, metrics)
    callbacks: list[pl.Callback] = [ReportFailure(config), SameRanks(), metrics, progress, StopAtEnd()]
    if config.callbacks.ema_decay is not None:
        callbacks.append(AveragedWeights(config.callbacks.ema_decay, config.callbacks.ema_every_n_steps))
    scores = TaskScores(tasks, config, run_dir, progress, metrics.pause) if tasks else None
    callbacks += [scores] if scores else []
    if config.patience is not None and config.monitor is not None:
        mode = monitor_mode(config.monitor, config.monitor_mode)
        if scores is not None and is_of_task(config.monitor):
            callbacks.append(TaskPatience(scores, config.monitor, config.patience, mode))
        else:
            callbacks.append(pl.callbacks.EarlyStopping(config.monitor, patience=config.patience, mode=mode))
    callbacks += build_extra(config.callbacks.extra, "callbacks.extra")
    checkpointer = Checkpointer(
        run_dir,
        io,
        config.checkpoint_every_n_steps or default_interval(steps),
        config.monitor,
        config.monitor_mode,
        metadata={"samples_per_step": config.global_batch_size, "seed": config.seed},
        pause=metrics.pause,
        scores=scores,
        retry_s=config.callbacks.save_retry_s,
    )
    return [*callbacks, checkpointer]


def _quiet_lightning() -> None:
    """Lightning's hints are about its own data loading and logging, which a run does not use."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*in eval mode at the start of training.*",  # frozen ones
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ):
        warnings.filterwarnings("ignore", message=message)


# ------------------------------------------------------------------------------------------------- where the run starts


class Candidates(NamedTuple):
    """A run's checkpoints."""

    usable: list[Path]  # undamaged, the newest first; empty: the run starts from step 0
    damaged: dict[Path, str]  # with what is wrong
    named: bool  # by the user: no other may be used instead


def candidates(config: TrainConfig, run_dir: Path, record: RunRecord) -> Candidates:
    """Find the checkpoint that `resume` names, or those of the run; raise a CheckpointError where all that it had are damaged."""
    recover(run_dir)
    damaged: dict[Path, str] = {}
    if config.resume not in ("auto", "never") and STEP.search(Path(config.resume).name):
        named = Path(config.resume)
        if problem := damage(named):
            raise CheckpointError(
                f"resume={named} is damaged: {problem}. Name another, or the run's folder for its newest undamaged one."
            )
        return Candidates([named], damaged, True)
    for checkpoint in checkpoints(run_dir):
        if problem := damage(checkpoint):
            damaged[checkpoint] = problem
    usable = [checkpoint for checkpoint in reversed(checkpoints(run_dir)) if checkpoint not in damaged]
    if not usable and EarlierRun(run_dir, record.values).saved:
        raise lost(run_dir, record.values, _listed(damaged))
    return Candidates(usable, damaged, False)


def _require_same_data(datamodule: PairsDataModule, checkpoint: Path) -> None:
    """On every rank, before Lightning takes over: what one rank finds ends all of them with the same code."""
    if datamodule.config.allow_changed:
        return
    state = read_state(checkpoint, type(datamodule).__qualname__)
    for problem in group.gather_objects(datamodule.changed_since(state)):
        if problem is not None:
            raise CheckpointError(problem)


def _start_from(
    found: Candidates,
    config: TrainConfig,
    run_dir: Path,
    record: RunRecord,
    trainer: pl.Trainer,
    module: CLIPModule,
    datamodule: PairsDataModule,
) -> Path | None:
    """Bring the run's folder to where the run starts; the checkpoint that it resumes from, None: it starts from step 0.

    The checkpoint is loaded here, on rank 0, before Lightning gets it: what fails inside `Trainer.fit` could not fall back to another.
    """
    checkpoint = first_that_loads(found, run_dir, record, module, datamodule) if found.usable else None
    step = 0 if checkpoint is None else step_of(checkpoint)
    report_damage(found, run_dir, record, checkpoint)
    if checkpoint is not None:
        record.acknowledge(step)
        log.info("resuming from %s (step %s)", checkpoint, f"{step:,}")
    # What the run wrote after this step is set aside, as is what is damaged.
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.continue_from(step)
    set_aside(run_dir, found.damaged, after=step)
    device, parameters = trainer.strategy.root_device, list(module.model.parameters())
    facts = {
        "device": str(device),
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "ranks": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": trainer.precision,
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "rows": datamodule.num_rows,
        "steps": module.total_steps,
    }
    record.update(**facts)
    log.info(
        f"{config.name}: model {config.model.name} ({facts['parameters']:,} parameters, {facts['trained_parameters']:,} trained), "
        f"data {config.data.name} ({facts['rows']:,} rows), strategy {config.strategy.name} on {facts['ranks']} x {facts['device_name']}, "
        f"precision {facts['precision']}, {facts['steps']:,} steps of {config.global_batch_size:,} pairs"
    )
    io = trainer.strategy.checkpoint_io
    assert isinstance(io, SafeCheckpointIO)
    io.run_copy, io.on_saved = record.run_copy(), record.acknowledge
    return checkpoint


def first_that_loads(
    found: Candidates, run_dir: Path, record: RunRecord, module: CLIPModule, datamodule: PairsDataModule
) -> Path:
    """Return the newest usable checkpoint that the model takes, whose weights it then has; raise a CheckpointError where none is."""
    problems: dict[Path, str] = {}
    for checkpoint in found.usable:
        try:
            _load(checkpoint, module, datamodule)
        except MemoryError:
            raise
        except Exception as error:  # whatever a state may lack
            problems[checkpoint] = f"cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}"
        else:
            if problems:
                log.warning(_instead(problems, checkpoint))
            return checkpoint
    if found.named:
        raise CheckpointError(
            f"resume={found.usable[0]} {problems[found.usable[0]]}. Name another, or the run's folder."
        )
    raise lost(run_dir, record.values, _listed(found.damaged | problems))


def _load(checkpoint: Path, module: CLIPModule, datamodule: PairsDataModule) -> None:
    """Load a checkpoint as Lightning will, as far as it can be done before training is set up."""
    state = SafeCheckpointIO().load_checkpoint(checkpoint)
    position = type(datamodule).__qualname__
    if missing := [part for part in (*PARTS, position) if part not in state]:
        raise ValueError(f"its state lacks {', '.join(missing)}")
    seen = state[position]["samples_seen"]
    if seen != state["global_step"] * datamodule.global_batch_size:
        raise ValueError(f"its state has {seen} samples seen after {state['global_step']} steps")
    (optimizer,) = state["optimizer_states"]
    members = [part["params"] for part in optimizer["param_groups"]]
    sizes, names = [len(part) for part in members], [name for part in members for name in part]
    if sizes != module.group_sizes or names != module.parameter_names:
        raise ValueError("its optimizer has other parameters than the model trains")
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"])


def report_damage(found: Candidates, run_dir: Path, record: RunRecord, used: Path | None) -> None:
    """Warn of every checkpoint that is damaged or gone, and say what is used instead."""
    if used is None or found.named:
        return
    if found.damaged:
        log.warning(_instead(found.damaged, used))
    last = record.values.get(LAST_CHECKPOINT)
    there = {step_of(path) for path in (*found.usable, *found.damaged)}
    if last is not None and last > step_of(used) and last not in there:
        log.warning(
            "%s had a checkpoint of step %s, which is gone: %s is used instead.", run_dir, f"{last:,}", used.name
        )


def _instead(problems: Mapping[Path, str], used: Path) -> str:
    return f"Damaged checkpoints in {used.parent} are left out, and {used.name} is used:{_listed(problems)}"


def _listed(problems: Mapping[Path, str]) -> str:
    return "".join(f"\n  {path.name}: {problem}" for path, problem in sorted(problems.items(), reverse=True))
