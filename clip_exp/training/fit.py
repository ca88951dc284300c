"""One training run in one process (a rank of several, or the only one): build everything, fit, and tell what came out."""

import logging
import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from clip_exp.checkpoints.discovery import latest, step_of
from clip_exp.checkpoints.io import SafeCheckpointIO, read_state
from clip_exp.config.load import read_run_config
from clip_exp.config.model_rules import own_towers
from clip_exp.config.schema import LossConfig, StrategyName, TrainConfig
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.data.images import preprocessing_of
from clip_exp.devices import resolve_accelerator
from clip_exp.errors import PREEMPTED_EXIT_CODE, CheckpointError, ClipExpError, ConfigError, DataError
from clip_exp.losses.build import build_loss
from clip_exp.models.build import build_model
from clip_exp.models.clip import CLIP
from clip_exp.precision import benchmarks_convolutions
from clip_exp.ranks import group
from clip_exp.ranks.environment import started_by_launcher
from clip_exp.ranks.group import is_main
from clip_exp.ranks.signals import StopRequest, note_signals
from clip_exp.runs import RunRecord
from clip_exp.text.build import build_tokenizer
from clip_exp.text.saved import with_saved_tokenizer
from clip_exp.training.failures import explained_failures
from clip_exp.training.finetune import prepare
from clip_exp.training.measures import check_validation_classes, training_tasks
from clip_exp.training.messages import LOG_ONLY
from clip_exp.training.module import CLIPModule, ZeroShot
from clip_exp.training.opening import start_weights
from clip_exp.training.preemption import Preempted, Preemption
from clip_exp.training.preflight import steps_of
from clip_exp.training.preflight_finetune import probe_problems
from clip_exp.training.resuming import Candidates, candidates, first_that_loads, report_damage, take_back
from clip_exp.training.summary import conclude
from clip_exp.training.tasks import TaskScores, score_finished
from clip_exp.training.trainer import build_trainer
from clip_exp.weights.fit import load_weights

log = logging.getLogger(__name__)


def train(run_dir: Path) -> int:
    """Train what `run_dir`/config.yaml describes, on from its newest checkpoint, or score the finished run; return the exit code.

    Raises:
        ClipExpError: an expected failure, noted in `run.json` where this process is alone.
    """
    config = read_run_config(run_dir)
    config.model = with_saved_tokenizer(config.model, run_dir)
    record = RunRecord(run_dir)
    device_type = resolve_accelerator(config.trainer.accelerator, "trainer.")
    several = started_by_launcher() or config.strategy.name != StrategyName.auto
    finished = record.values.get("status") == "finished"
    with note_signals() as stop:
        try:
            with group.membership(device_type, config.strategy.timeout_s) if several else nullcontext():
                if not finished:
                    return _fit_or_stop(config, run_dir, record, stop, device_type)
                score_finished(config, run_dir, record, group.device(device_type))
                return 0
        except BaseException as error:
            if is_main():
                # Of several ranks, whoever watches them notes the failure that was first.
                if group.world_size() == 1 and not finished:
                    code = error.exit_code if isinstance(error, ClipExpError) else 1
                    record.finish("failed", error=str(error).splitlines()[:20], exit_code=code)
                # The terminal shows it when the process ends.
                log.error("%s", error, exc_info=not isinstance(error, ClipExpError), extra=LOG_ONLY)
            raise


def _fit_or_stop(config: TrainConfig, run_dir: Path, record: RunRecord, stop: StopRequest, device_type: str) -> int:
    try:
        _fit(config, run_dir, record, stop, device_type)
        return 0
    except Preempted:
        if is_main():
            record.finish("preempted")
            log.info("stopped by a signal; the same command resumes from %s", latest(run_dir))
        return PREEMPTED_EXIT_CODE


def _fit(config: TrainConfig, run_dir: Path, record: RunRecord, stop: StopRequest, device_type: str) -> None:
    torch.set_float32_matmul_precision("high")
    pl.seed_everything(config.seed, verbose=False)
    datamodule = _build_data(config, run_dir)
    datamodule.require_same_tables(group.gather_objects)
    found = group.from_main(lambda: candidates(config, run_dir, record))
    resumes = bool(found.usable)
    if resumes:
        _require_same_data(datamodule, found.usable[0])
    steps = steps_of(config, datamodule.num_rows)
    if problems := [*probe_problems(config, steps), *check_validation_classes(config, len(datamodule.class_names))]:
        raise ConfigError("\n".join(problems))
    datamodule.total_steps = steps
    tasks = training_tasks(config)
    zero_shot = ZeroShot(datamodule.class_names, config.data.templates) if datamodule.class_names else None
    model = _build_model(config, run_dir, resumes=resumes)
    torch.backends.cudnn.benchmark = benchmarks_convolutions(model.image, device_type, config.trainer.deterministic)
    module = CLIPModule(model, build_loss(config.loss), config, steps, zero_shot)
    trainer = build_trainer(
        config,
        run_dir,
        device=group.device(device_type),
        steps=steps,
        datamodule=datamodule,
        preemption=Preemption(stop),
        tasks=tasks,
    )
    checkpoint = group.from_main(lambda: _start_from(found, config, run_dir, record, trainer, module, datamodule))
    started_s = time.perf_counter()
    with explained_failures(trainer, config):
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TaskScores):
                names = callback.write(trainer.strategy.root_device)
                record.values["scored_tasks"] = {name: config.task[name] for name in names}
    if is_main():
        conclude(run_dir, record, trainer, module, config, time.perf_counter() - started_s)


def _build_data(config: TrainConfig, run_dir: Path) -> PairsDataModule:
    """The data module after its setup, which tells how many rows there are."""
    datamodule = PairsDataModule(
        config.data,
        preprocessing=preprocessing_of(config.model.image),
        tokenizer=build_tokenizer(config.model.text),
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        output_dir=Path(config.output_dir),
        run_dir=run_dir,
        pad_multiple=8 if config.compile else 1,
    )
    datamodule.setup("fit")
    rows, batch = datamodule.num_rows, config.global_batch_size
    if rows < batch:
        raise DataError(f"global_batch_size={batch} is more than the {rows:,} training rows: lower it or add data.")
    return datamodule


def _build_model(config: TrainConfig, run_dir: Path, *, resumes: bool) -> CLIP:
    """Build the model with the weights that a new run starts from; those of a run that resumes come from its checkpoint."""
    loss = config.loss
    # Weights of timm and Hugging Face are for a run that begins, and from nothing else.
    begins = config.pretrained is None and not resumes
    build = partial(
        build_model,
        config.model,
        init_logit_scale=loss.init_logit_scale,
        init_logit_bias=loss.init_logit_bias,
        own_weights=begins,
    )
    model = group.main_first(build) if begins and own_towers(config.model) else build()
    if config.pretrained is not None and not resumes:
        for note in load_weights(model, start_weights(config, RunRecord(run_dir).values), config.model):
            log.info(note)
    if not resumes:
        _limit_logit_scale(model, loss)
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


def _start_from(
    found: Candidates,
    config: TrainConfig,
    run_dir: Path,
    record: RunRecord,
    trainer: pl.Trainer,
    module: CLIPModule,
    datamodule: PairsDataModule,
) -> Path | None:
    """Bring the run's folder to where the run starts; the checkpoint that it resumes from, None: it starts from step 0."""
    checkpoint = first_that_loads(found, run_dir, record, module, datamodule) if found.usable else None
    step = 0 if checkpoint is None else step_of(checkpoint)
    report_damage(found, run_dir, record, checkpoint)
    if checkpoint is not None:
        record.acknowledge(step)
        log.info("resuming from %s (step %s)", checkpoint, f"{step:,}")
    take_back(run_dir, found.damaged, trainer.loggers, step)
    facts = _facts(trainer, module, datamodule)
    record.update(**facts)
    log.info(_headline(config, facts))
    io = trainer.strategy.checkpoint_io
    assert isinstance(io, SafeCheckpointIO)
    io.run_copy, io.on_saved = record.run_copy(), record.acknowledge
    return checkpoint


def _require_same_data(datamodule: PairsDataModule, checkpoint: Path) -> None:
    """On every rank, before Lightning takes over: what one rank finds ends all of them with the same code.

    Raises:
        CheckpointError: the data of a rank is not what the checkpoint was trained on.
    """
    if datamodule.config.allow_changed:
        return
    state = read_state(checkpoint, type(datamodule).__qualname__)
    for problem in group.gather_objects(datamodule.changed_since(state)):
        if problem is not None:
            raise CheckpointError(problem)


def _facts(trainer: pl.Trainer, module: CLIPModule, datamodule: PairsDataModule) -> dict[str, Any]:
    """What `run.json` says about the run before its first step."""
    return {
        "device": str(trainer.strategy.root_device),
        "device_name": torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "cpu",
        "ranks": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": trainer.precision,
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "trained_parameters": sum(p.numel() for p in module.model.parameters() if p.requires_grad),
        "rows": datamodule.num_rows,
        "steps": module.total_steps,
    }


def _headline(config: TrainConfig, facts: dict[str, Any]) -> str:
    """Return what is about to be trained, on what and how, in one line."""
    return (
        f"{config.name}: model {config.model.name} ({facts['parameters']:,} parameters, {facts['trained_parameters']:,} trained), "
        f"data {config.data.name} ({facts['rows']:,} rows), strategy {config.strategy.name} on {facts['ranks']} x {facts['device_name']}, "
        f"precision {facts['precision']}, {facts['steps']:,} steps of {config.global_batch_size:,} pairs"
    )
