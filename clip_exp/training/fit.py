"""One training run as every rank executes it: build the data, the model and the Trainer, fit, and report the results.

`train` is the entry point of each process, and `_fit` the whole run in order. The sections after them build the model, the Trainer
with its callbacks, and choose the checkpoint to resume from: the newest undamaged one that the model can load. Rank 0 chooses it
for all ranks.
"""

import logging
import math
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.model_summary import summarize

from clip_exp.checkpoints.folders import (
    STEP,
    WEIGHTS,
    checkpoints,
    damage,
    folder_of,
    latest,
    recover,
    set_aside,
    step_of,
)
from clip_exp.checkpoints.io import SafeCheckpointIO, read_state
from clip_exp.config.base import plain
from clip_exp.config.files import read_run_config
from clip_exp.config.training import DDPConfig, DeepSpeedConfig, LossConfig, StrategyConfig, StrategyName, TrainConfig
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.data.decoders import image_decoder
from clip_exp.data.images import preprocessing_of
from clip_exp.data.preflight import RunTables
from clip_exp.devices import benchmarks_convolutions, free_memory, resolve_accelerator, training_precision
from clip_exp.errors import PREEMPTED_EXIT_CODE, CheckpointError, ClipExpError, ConfigError, NumericError
from clip_exp.evaluation.task import Task
from clip_exp.models.clip import CLIP, build_model
from clip_exp.ranks import group, heartbeat
from clip_exp.ranks.environment import started_by_launcher
from clip_exp.ranks.failure import StopRequest, note_signals
from clip_exp.ranks.group import is_main
from clip_exp.ranks.heartbeat import Phase
from clip_exp.reports.names import few_images
from clip_exp.runs import LAST_CHECKPOINT, RunRecord, with_saved_tokenizer
from clip_exp.text.tokenizer import build_tokenizer
from clip_exp.training.callbacks import (
    AveragedWeights,
    Progress,
    ReportFailure,
    SameRanks,
    StopAtEnd,
    explain,
    extra_callbacks,
)
from clip_exp.training.diagnosis import Diagnosis, data_problems
from clip_exp.training.goodput import note_restart
from clip_exp.training.liveness import Liveness, living
from clip_exp.training.messages import LOG_ONLY
from clip_exp.training.metrics import MetricsCSV, StepMetrics, build_loggers, start_loggers
from clip_exp.training.module import CLIPModule, ZeroShot
from clip_exp.training.opening import EarlierRun, lost, start_weights
from clip_exp.training.optim import prepare
from clip_exp.training.preflight import check_validation_classes, is_of_task, monitor_mode, steps_of, training_tasks
from clip_exp.training.saving import Checkpointer, Preempted, Preemption, TimeIsUp
from clip_exp.training.skipped_steps import SkippedSteps
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
# Key of `run.json`; missing in runs of older versions
DECODER = "image_decoder"
# Depth of the modules in the summary of `trainer.enable_model_summary`: the towers, and their parts
SUMMARY_DEPTH = 3
# Part of the free host memory that the copy of a training state may take, to be written while training continues
FRACTION_TO_COPY = 0.25
# Keys that a training state must have: without one of them Lightning would fail, or silently start that part from the beginning.
STATE_KEYS = ("epoch", "global_step", "loops", "optimizer_states", "lr_schedulers", "random_states")


def train(run_dir: Path, config: TrainConfig | None = None, tables: RunTables | None = None) -> int:
    """Train in a run folder, resuming from its newest checkpoint, or score a finished run on its new tasks; return the exit code.

    Args:
        run_dir: the run folder.
        config: configuration of the run; None: read from `config.yaml` in the run folder.
        tables: the run's tables if they are already open.

    Raises:
        ClipExpError: an expected failure; a single process also writes it to `run.json`.
    """
    config = config or read_run_config(run_dir)
    config = config.model_copy(update={"model": with_saved_tokenizer(config.model, run_dir)})
    record = RunRecord(run_dir)
    device_type = resolve_accelerator(config.trainer.accelerator, "trainer.")
    distributed = started_by_launcher() or config.strategy.name != StrategyName.auto
    finished = record.values.get("status") == "finished"
    with note_signals() as stop, living(config, run_dir):
        try:
            with group.membership(device_type, config.strategy.timeout_s) if distributed else nullcontext():
                if finished:
                    heartbeat.enter(Phase.scoring)
                    score_finished(config, run_dir, record, group.device(device_type))
                    return 0
                try:
                    _fit(config, tables, run_dir, record, stop, device_type)
                    return 0
                except Preempted as stopped:
                    planned = isinstance(stopped, TimeIsUp)
                    if is_main():
                        record.finish("preempted")
                        why = "after trainer.max_time" if planned else "by a signal"
                        log.info("stopped %s; the same command resumes from %s", why, latest(run_dir))
                    return 0 if planned else PREEMPTED_EXIT_CODE
        except BaseException as error:
            if is_main():
                # With several ranks, the process that watches them records the first failure.
                if group.world_size() == 1 and not finished:
                    code = error.exit_code if isinstance(error, ClipExpError) else 1
                    record.finish("failed", error=str(error).splitlines()[:20], exit_code=code)
                # Only to train.log: the entry point prints the error when the process ends.
                log.error("%s", error, exc_info=not isinstance(error, ClipExpError), extra=LOG_ONLY)
            raise


def _fit(
    config: TrainConfig, tables: RunTables | None, run_dir: Path, record: RunRecord, stop: StopRequest, device_type: str
) -> None:
    """Build data, model and Trainer, train, and report the results, as one rank."""
    # TF32 for float32 matrix products on CUDA. Validation and tasks turn it off, so that scores are exact.
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
        # Compiled towers are specialized for each text length: fewer lengths mean fewer compilations.
        pad_multiple=8 if config.compile else 1,
        opened=None if tables is None else tables.opened,
    )
    # Before Lightning does: the number of steps depends on the number of rows.
    datamodule.setup("fit")
    datamodule.require_same_tables(group.gather_objects)
    # Rank 0 reads the folder for all ranks, so that they cannot resume from different checkpoints.
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
    torch.backends.cudnn.benchmark = benchmarks_convolutions(
        model.image, device_type, bool(config.trainer.deterministic)
    )
    module = CLIPModule(model, config.loss.build(), config, steps, zero_shot)
    device, preemption = group.device(device_type), Preemption(stop, config.trainer.max_time_s)
    trainer = build_trainer(
        config, run_dir, device=device, steps=steps, datamodule=datamodule, preemption=preemption, tasks=tasks
    )
    if is_main():
        for problem in data_problems(config, datamodule):
            log.warning(problem)
        _note_decoder(record)
    # Set-up ends here: the folder is brought to the state of the checkpoint, and Lightning loads that checkpoint on every rank.
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


def _note_decoder(record: RunRecord) -> None:
    """Record the decoder of images in `run.json`; warn if the run was trained with another one."""
    before, now = record.values.get(DECODER), image_decoder()
    if before not in (None, now):
        log.warning("Images are now decoded by %s, before by %s: their pixels may differ slightly.", now, before)
    record.update(**{DECODER: now})


# ---------------------------------------------------------------------------------------------------------------- model


def _build_model(config: TrainConfig, run_dir: Path, *, resumes: bool) -> CLIP:
    """Build the model; load start weights into it unless the run resumes, where Lightning loads the checkpoint."""
    loss = config.loss
    # Weights of timm and Hugging Face are needed, and downloaded, only for a new run whose towers have no other start weights.
    own_weights = set() if resumes else config.own_towers
    scale, bias = loss.init_logit_scale, loss.logit_bias
    build = partial(build_model, config.model, init_logit_scale=scale, init_logit_bias=bias, own_weights=own_weights)
    # Rank 0 first: it downloads, and the others read its cache.
    model = group.main_first(build) if own_weights else build()
    for tower in () if resumes else config.starts:
        start = start_weights(config, RunRecord(run_dir).values, tower)
        for note in load_weights(model, start, config.model, config.pretrained_prefix, tower):
            log.info(note)
    if not resumes:
        _limit_logit_scale(model, loss)
    # Freezing and adapters come after the weights: adapters rename the layers, and the files have the names of a plain model.
    prepare(model, config.finetune, config.model)
    if config.compile:
        model.image.compile()
        model.text.compile()
    return model


def _limit_logit_scale(model: CLIP, loss: LossConfig) -> None:
    """Log it if the start weights have a logit scale above the limit of the loss; clamp the scale if the user set the limit."""
    start = model.logit_scale.item()
    # Published weights are often stored in float16, where ln 100 is slightly larger than ln 100.
    if start < loss.largest_logit_scale + 1e-3:
        return
    had = f"The start weights have a logit scale of {math.exp(start):.4g}, above the limit of {math.exp(loss.largest_logit_scale):.4g}"
    if loss.max_logit_scale is None:
        log.info(
            "%s (loss=%s): this run uses their value as its limit. Set loss.max_logit_scale to change it.",
            had,
            loss.name,
        )
        return
    with torch.no_grad():
        model.logit_scale.fill_(loss.max_logit_scale)
    log.warning("%s set by loss.max_logit_scale=%g: the run starts at the limit.", had, loss.max_logit_scale)


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
    """Build the Trainer of this rank.

    Args:
        config: configuration of the run.
        run_dir: the run folder.
        device: device of this rank.
        steps: optimizer steps of the run.
        datamodule: the data, already set up.
        preemption: callback that ends the run after a signal.
        tasks: evaluation tasks to score during training.
    """
    _silence_lightning()
    # Lightning would guess the rank from variables that a scheduler left in the environment.
    rank_zero_only.rank = group.rank()  # type: ignore[attr-defined]
    io = SafeCheckpointIO(asynchronous=partial(_saves_asynchronously, config.checkpoint_async))
    options = config.trainer
    validate = datamodule.has_validation and options.limit_val_batches != 0
    deepspeed = isinstance(config.strategy, DeepSpeedConfig)
    callbacks = _build_callbacks(config, run_dir, io, steps, datamodule, tasks)
    profiler = None
    if options.profiler is not None:
        profiler = PROFILERS[options.profiler](dirpath=run_dir, filename="profile")
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        # For Lightning every process is a node with one device; `GroupEnvironment` explains why.
        devices=[device.index] if device.type == "cuda" else 1,
        num_nodes=group.world_size(),
        strategy=build_strategy(config.strategy, device),
        precision=training_precision(config.precision, device.type),  # type: ignore[arg-type]
        # A run is one stream of optimizer steps. Sample k of the stream depends only on the seed, so the position is the only state
        # of the data, and workers, ranks and restarts cannot change what the model sees. Nothing is counted in epochs.
        max_steps=steps,
        max_epochs=-1,
        min_epochs=0,
        val_check_interval=min(steps, config.val_every_n_steps or default_interval(steps)) if validate else None,
        check_val_every_n_epoch=None,
        limit_val_batches=datamodule.limited_val_batches(options.limit_val_batches) if validate else 0,
        num_sanity_val_steps=options.num_sanity_val_steps,
        use_distributed_sampler=False,  # each rank takes its own slice of every global batch
        # Without DeepSpeed, `CLIPModule` clips the gradient itself, to log the norm before clipping.
        gradient_clip_val=options.gradient_clip_val if deepspeed else None,
        deterministic=options.deterministic,
        benchmark=options.benchmark,
        sync_batchnorm=options.sync_batchnorm,
        detect_anomaly=options.detect_anomaly,
        profiler=profiler,
        log_every_n_steps=config.log_every_n_steps,
        logger=start_loggers(build_loggers(config.logger, run_dir, config.name), config) if is_main() else False,
        callbacks=[*callbacks, preemption],
        plugins=[io, GroupEnvironment()],
        # `Checkpointer` saves instead: a failed save is known to all ranks and need not end the run.
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
    )
    preemption.take_over(trainer, next(c for c in callbacks if isinstance(c, Checkpointer)))
    return trainer


def build_strategy(config: StrategyConfig, device: torch.device) -> Strategy | str:
    """Build Lightning's strategy for the configured one; `auto` is DDP if there are several ranks."""
    if isinstance(config, DeepSpeedConfig):
        return deepspeed_strategy(config, device)
    if isinstance(config, DDPConfig) or group.world_size() > 1:
        return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
    return SingleDeviceStrategy(str(device))


def default_interval(steps: int) -> int:
    """Return the default number of steps between validations, and between checkpoints: a tenth of the run, at least 50 steps."""
    return max(50, math.ceil(steps / 10))


def _build_callbacks(
    config: TrainConfig, run_dir: Path, io: SafeCheckpointIO, steps: int, datamodule: PairsDataModule, tasks: list[Task]
) -> list[pl.Callback]:
    """Build the callbacks in the order in which they act at the end of a step.

    Skip, measure, show, diagnose, average, score, stop, save: a checkpoint contains the averaged weights and the scores of its own step.
    """
    skipped = SkippedSteps(config.max_skipped_steps, datamodule.images_of_step)
    metrics = StepMetrics(config.log_every_n_steps, config.global_batch_size, datamodule.num_rows, skipped)
    progress = Progress(config.callbacks.progress, metrics, note=few_images(datamodule.val_images))
    liveness = Liveness(config)
    callbacks: list[pl.Callback] = [
        ReportFailure(config),
        liveness,
        SameRanks(),
        skipped,
        metrics,
        progress,
        StopAtEnd(),
    ]
    callbacks += [Diagnosis(config, metrics)] if is_main() else []
    if config.callbacks.ema_decay is not None:
        callbacks.append(AveragedWeights(config.callbacks.ema_decay, skipped, config.callbacks.ema_every_n_steps))
    before_scoring = liveness.before(Phase.scoring, metrics.pause)
    scores = TaskScores(tasks, config, run_dir, progress, before_scoring) if tasks else None
    callbacks += [scores] if scores else []
    if config.patience is not None and config.monitor is not None:
        mode = monitor_mode(config.monitor, config.monitor_mode)
        if scores is not None and is_of_task(config.monitor):
            callbacks.append(TaskPatience(scores, config.monitor, config.min_delta, config.patience, mode))
        else:
            callbacks.append(pl.callbacks.EarlyStopping(config.monitor, config.min_delta, config.patience, mode=mode))
    callbacks += extra_callbacks(config)
    checkpointer = Checkpointer(
        run_dir,
        io,
        config.checkpoint_every_n_steps or default_interval(steps),
        config.monitor,
        config.monitor_mode,
        metadata={"samples_per_step": config.global_batch_size, "seed": config.seed},
        pause=liveness.before(Phase.saving, metrics.pause),
        skipped=skipped,
        scores=scores,
        retry_s=config.callbacks.save_retry_s,
        keep_last=None if config.keep_checkpoints == "all" else config.keep_checkpoints,
        keep_every_n_steps=config.keep_every_n_steps,
    )
    return [*callbacks, checkpointer]


def _saves_asynchronously(configured: bool | Literal["auto"], size: int) -> bool:
    """Return True if a training state of `size` bytes is copied, and written while training continues."""
    return size <= FRACTION_TO_COPY * free_memory() if configured == "auto" else configured


def _silence_lightning() -> None:
    """Suppress Lightning's hints: they concern its own data loading and logging, which a run does not use."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*in eval mode at the start of training.*",  # frozen modules are
        ".*turned on `Trainer\\(detect_anomaly=True\\)`.*",
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ):
        warnings.filterwarnings("ignore", message=message)


# ------------------------------------------------------------------------------------------------- where the run starts


class Candidates(NamedTuple):
    """Checkpoints that a run may resume from."""

    usable: list[Path]  # undamaged, newest first; empty: the run starts from step 0
    damaged: dict[Path, str]  # with a description of the damage
    named: bool  # the user named the checkpoint, so no other may replace it


def candidates(config: TrainConfig, run_dir: Path, record: RunRecord) -> Candidates:
    """Find the checkpoint named by `resume`, or all of the run's; raise a CheckpointError if the run had some and none is usable."""
    recover(run_dir)
    damaged: dict[Path, str] = {}
    if config.resume not in ("auto", "never") and STEP.search(Path(config.resume).name):
        named = Path(config.resume)
        if problem := damage(named):
            raise CheckpointError(
                f"resume={named} is damaged: {problem}. Set resume to another checkpoint, or to the run folder to use its newest undamaged one."
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
    """Raise a CheckpointError on all ranks if the tables of any rank have changed since the checkpoint was written.

    Done before Lightning takes over, so that all ranks end with the same error and exit code.
    """
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
    """Choose the checkpoint to resume from, and bring the run folder to its state; return None if the run starts from step 0.

    Runs on rank 0. The checkpoint is loaded here once before Lightning loads it, because a failure inside `Trainer.fit` could not fall
    back to an earlier checkpoint.
    """
    checkpoint = first_that_loads(found, run_dir, record, module, datamodule) if found.usable else None
    step = 0 if checkpoint is None else step_of(checkpoint)
    report_damage(found, run_dir, record, checkpoint)
    if checkpoint is not None:
        record.acknowledge(step)
        log.info("resuming from %s (step %s)", checkpoint, f"{step:,}")
        # From now on, `run.json` is about this start.
        code, error = record.values.pop("exit_code", None), record.values.pop("error", [])
        if code == NumericError.exit_code:
            log.warning(
                "This run ended with exit code %d: %s\nUnchanged, it will meet the same rows again. Repair or remove them "
                "(data.allow_changed=true), allow more skipped steps (max_skipped_steps), or start a new run from these weights with other "
                "settings (resume=never pretrained=%s).",
                code,
                " ".join(error),
                checkpoint / WEIGHTS,
            )
    # Rows, checkpoints and results from after this step belong to a future that is now trained again, perhaps differently.
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            note_restart(record.values, step, last_logged=logger.continue_from(step) or 0)
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
    if config.trainer.enable_model_summary:
        # Lightning would print it with Rich, so the run's log would lack it.
        log.info("%s", summarize(module, max_depth=SUMMARY_DEPTH))
    checkpointer = next(each for each in trainer.callbacks if isinstance(each, Checkpointer))  # type: ignore[attr-defined]

    def acknowledge(step: int) -> None:
        record.acknowledge(step)
        log.info("saved %s", folder_of(run_dir, step), extra=LOG_ONLY)
        checkpointer.prune(step)

    checkpointer.io.run_copy, checkpointer.io.on_saved = record.run_copy(), acknowledge
    return checkpoint


def first_that_loads(
    found: Candidates, run_dir: Path, record: RunRecord, module: CLIPModule, datamodule: PairsDataModule
) -> Path:
    """Load the newest usable checkpoint that the model accepts, and return its path; raise a CheckpointError if there is none."""
    problems: dict[Path, str] = {}
    for checkpoint in found.usable:
        try:
            _load(checkpoint, module, datamodule)
        except MemoryError:
            raise
        except Exception as error:  # a damaged state can fail in any way
            problems[checkpoint] = f"cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}"
        else:
            if problems:
                log.warning(_instead(problems, checkpoint))
            return checkpoint
    if found.named:
        raise CheckpointError(
            f"resume={found.usable[0]} {problems[found.usable[0]]}. Set resume to another checkpoint or to the run folder."
        )
    raise lost(run_dir, record.values, _listed(found.damaged | problems))


def _load(checkpoint: Path, module: CLIPModule, datamodule: PairsDataModule) -> None:
    """Load a checkpoint into the model as Lightning will, and check the parts that can only be loaded during training."""
    state = SafeCheckpointIO().load_checkpoint(checkpoint)
    position = type(datamodule).__qualname__
    if missing := [part for part in (*STATE_KEYS, position) if part not in state]:
        raise ValueError(f"its state lacks {', '.join(missing)}")
    seen = state[position]["samples_seen"]
    if seen != state["global_step"] * datamodule.global_batch_size:
        raise ValueError(f"its state has {seen} samples seen after {state['global_step']} steps")
    (optimizer,) = state["optimizer_states"]
    members = [part["params"] for part in optimizer["param_groups"]]
    sizes, names = [len(part) for part in members], [name for part in members for name in part]
    if sizes != module.group_sizes or names != module.parameter_names:
        raise ValueError("its optimizer state is for other parameters than this model trains")
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"])


def report_damage(found: Candidates, run_dir: Path, record: RunRecord, used: Path | None) -> None:
    """Warn about every damaged or missing checkpoint, and name the one that is used instead."""
    if used is None or found.named:
        return
    if found.damaged:
        log.warning(_instead(found.damaged, used))
    last = record.values.get(LAST_CHECKPOINT)
    there = {step_of(path) for path in (*found.usable, *found.damaged)}
    if last is not None and last > step_of(used) and last not in there:
        log.warning(
            "%s had a checkpoint of step %s, which is missing: using %s instead.", run_dir, f"{last:,}", used.name
        )


def _instead(problems: Mapping[Path, str], used: Path) -> str:
    return f"Skipping damaged checkpoints in {used.parent}, using {used.name}:{_listed(problems)}"


def _listed(problems: Mapping[Path, str]) -> str:
    return "".join(f"\n  {path.name}: {problem}" for path, problem in sorted(problems.items(), reverse=True))
