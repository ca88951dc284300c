"""One training run in one process (a rank of several, or the only one): build everything, fit, and tell what came out."""

import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from clip_exp.checkpoints.discovery import best, checkpoints, latest, set_damaged_aside
from clip_exp.checkpoints.io import SafeCheckpointIO
from clip_exp.config.load import read_run_config
from clip_exp.config.preflight import steps_of, world_size
from clip_exp.config.schema import TrainConfig
from clip_exp.config.targets import build
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.errors import PREEMPTED_EXIT_CODE, ClipExpError, DataError
from clip_exp.losses.build import build_loss
from clip_exp.models.build import build_model
from clip_exp.models.clip import CLIP
from clip_exp.runs import RunRecord
from clip_exp.training import distributed
from clip_exp.training.callbacks import AveragedWeights, Checkpointer, ValidateAtEnd, monitor_mode
from clip_exp.training.loggers import build_loggers
from clip_exp.training.metrics import MetricsCSV, StepMetrics
from clip_exp.training.module import CLIPModule, ZeroShot
from clip_exp.training.preemption import Preempted, Preemption
from clip_exp.training.progress import build_progress
from clip_exp.training.strategies import build_strategy
from clip_exp.training.summary import conclude
from clip_exp.weights.files import load_weights

log = logging.getLogger(__name__)


def train(run_dir: Path) -> int:
    """Train what `run_dir`/config.yaml describes, on from its newest checkpoint; return the exit code.

    Raises:
        ClipExpError: an expected failure, already noted in `run.json`.
    """
    config = read_run_config(run_dir)
    device_type = resolve_device(config)
    ranks = world_size(config)
    if ranks > 1 or config.strategy.name != "auto":
        distributed.start(device_type, config.strategy.timeout_s)
    record = RunRecord(run_dir)
    is_main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    try:
        trainer, module, datamodule, checkpoint = assemble(config, run_dir, device_type, ranks)
        if is_main:
            record.update(**facts(trainer, module, datamodule))
        started_s = time.perf_counter()
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        if is_main:
            conclude(run_dir, record, trainer, module, config, time.perf_counter() - started_s)
        return 0
    except Preempted:
        if is_main:
            record.finish("preempted")
            print(f"stopped by a signal; the same command goes on from {latest(run_dir)}")
        return PREEMPTED_EXIT_CODE
    except BaseException as error:
        if is_main:
            code = error.exit_code if isinstance(error, ClipExpError) else 1
            record.finish("failed", error=str(error).splitlines()[:20], exit_code=code)
        raise
    finally:
        distributed.stop()


def resolve_device(config: TrainConfig) -> str:
    """`cpu` or `cuda`."""
    if config.trainer.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if config.trainer.accelerator == "gpu" else "cpu"


def resolve_precision(config: TrainConfig, device_type: str) -> str:
    """bf16 where a GPU has it; float32 on CPUs, where bf16 is slower unless the processor has AMX."""
    if config.precision != "auto":
        return config.precision
    if device_type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "bf16-mixed" if torch.backends.cpu.get_cpu_capability() == "AMX" else "32-true"


def assemble(
    config: TrainConfig, run_dir: Path, device_type: str, ranks: int
) -> tuple[pl.Trainer, CLIPModule, PairsDataModule, Path | None]:
    """Everything that `Trainer.fit` takes: trainer, module, data, and the checkpoint to go on from."""
    torch.set_float32_matmul_precision("high")
    pl.seed_everything(config.seed, verbose=False)
    datamodule = PairsDataModule(
        config.data,
        image_size=config.model.image.image_size,
        context_length=config.model.text.context_length,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        output_dir=Path(config.output_dir),
        run_dir=run_dir,
        pad_multiple=8 if config.compile else 1,
    )
    datamodule.setup("fit")
    steps = steps_of(config, datamodule.num_rows)
    datamodule.total_steps = steps
    if datamodule.num_rows < config.global_batch_size:
        raise DataError(
            f"global_batch_size={config.global_batch_size} is more than the {datamodule.num_rows:,} training rows: lower it."
        )
    precision = resolve_precision(config, device_type)
    if precision == "16-mixed" and hasattr(config.optimizer, "fused"):
        config.optimizer.fused = False  # a fused step unscales the gradient itself, too late for clipping by its norm
    module = CLIPModule(_build_model(config), build_loss(config.loss), config, steps, _zero_shot(config, datamodule))
    if config.compile:
        module.model.image.compile()
        module.model.text.compile()
    torch.manual_seed(config.seed + 1 + (torch.distributed.get_rank() if ranks > 1 else 0))
    trainer = _build_trainer(config, run_dir, device_type, ranks, precision, module, datamodule)
    checkpoint = _continue_from(config, run_dir, trainer)
    return trainer, module, datamodule, checkpoint


def _build_model(config: TrainConfig) -> CLIP:
    loss = config.loss
    model = build_model(config.model, init_logit_scale=loss.init_logit_scale, init_logit_bias=loss.init_logit_bias)
    if config.pretrained is not None:
        load_weights(model, Path(config.pretrained))
    return model


def _zero_shot(config: TrainConfig, datamodule: PairsDataModule) -> ZeroShot | None:
    return ZeroShot(datamodule.class_names, config.data.templates) if datamodule.class_names else None


def _build_trainer(
    config: TrainConfig,
    run_dir: Path,
    device_type: str,
    ranks: int,
    precision: str,
    module: CLIPModule,
    datamodule: PairsDataModule,
) -> pl.Trainer:
    _quiet_lightning()
    steps = module.total_steps
    io = SafeCheckpointIO()
    deepspeed = config.strategy.name == "deepspeed"
    validate = datamodule.has_validation
    return pl.Trainer(
        accelerator="gpu" if device_type == "cuda" else "cpu",
        devices=_local_devices(config, device_type, ranks),
        num_nodes=config.trainer.num_nodes,
        strategy=build_strategy(config.strategy, device_type, ranks),
        precision=precision,  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=-1,
        min_epochs=0,
        val_check_interval=min(steps, config.val_every_n_steps or default_interval(steps)) if validate else None,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        gradient_clip_val=config.trainer.gradient_clip_val if deepspeed else None,
        deterministic=config.trainer.deterministic,
        profiler=_profiler(config.trainer.profiler, run_dir),
        logger=build_loggers(config.logger, run_dir, config.name) if _is_main() else False,
        callbacks=_build_callbacks(config, run_dir, io, steps, datamodule),
        plugins=[io],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
    )


def _build_callbacks(
    config: TrainConfig, run_dir: Path, io: SafeCheckpointIO, steps: int, datamodule: PairsDataModule
) -> list[pl.Callback]:
    """In the order in which they act at the end of a step: measure, show, average, stop, save."""
    metrics = StepMetrics(config.log_every_n_steps, config.global_batch_size, datamodule.num_rows)
    callbacks: list[pl.Callback | None] = [metrics, build_progress(config.callbacks.progress, metrics), ValidateAtEnd()]
    if config.callbacks.ema_decay is not None:
        callbacks.append(AveragedWeights(config.callbacks.ema_decay, config.callbacks.ema_every_n_steps))
    if config.patience is not None and config.monitor is not None:
        mode = monitor_mode(config.monitor, config.monitor_mode)
        callbacks.append(pl.callbacks.EarlyStopping(config.monitor, patience=config.patience, mode=mode))
    for name, values in config.callbacks.extra.items():
        arguments = {key: value for key, value in values.items() if key != "_target_"}
        callbacks.append(build(values["_target_"], f"callbacks.extra.{name}", **arguments))
    every = config.checkpoint_every_n_steps or default_interval(steps)
    metadata = {"samples_per_step": config.global_batch_size, "seed": config.seed}
    checkpointer = Checkpointer(run_dir, io, every, config.monitor, config.monitor_mode, metadata)
    callbacks += [checkpointer, Preemption(checkpointer)]
    return [callback for callback in callbacks if callback is not None]


def _continue_from(config: TrainConfig, run_dir: Path, trainer: pl.Trainer) -> Path | None:
    """The checkpoint to go on from, and the metrics cut back to its step."""
    if _is_main():
        set_damaged_aside(run_dir)
    trainer.strategy.barrier()
    if not checkpoints(run_dir):
        return None
    named = Path(config.resume)
    checkpoint = named if (named / "manifest.json").is_file() else latest(run_dir)
    step = int(checkpoint.name.rpartition("-")[2])
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.continue_from(step)
    if _is_main():
        print(f"going on from {checkpoint} (step {step:,})")
    return checkpoint


def default_interval(steps: int) -> int:
    """Steps between validations, and between checkpoints: ten in a run, and in short runs at least 50 steps apart."""
    return max(50, math.ceil(steps / 10))


def _local_devices(config: TrainConfig, device_type: str, ranks: int) -> Any:
    devices = config.trainer.devices
    if device_type == "cuda" and isinstance(devices, list) and ranks == 1:
        return devices
    return max(1, ranks // config.trainer.num_nodes)


def _profiler(name: str | None, run_dir: Path) -> Any:
    if name is None:
        return None
    from pytorch_lightning import profilers

    kinds = {
        "simple": profilers.SimpleProfiler,
        "advanced": profilers.AdvancedProfiler,
        "pytorch": profilers.PyTorchProfiler,
    }
    return kinds[name](dirpath=run_dir, filename="profile")


def facts(trainer: pl.Trainer, module: CLIPModule, datamodule: PairsDataModule) -> dict[str, Any]:
    """What `run.json` says about the run before its first step."""
    return {
        "device": str(trainer.strategy.root_device),
        "device_name": torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "cpu",
        "ranks": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": trainer.precision,
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "rows": datamodule.num_rows,
        "steps": module.total_steps,
    }


def _is_main() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _quiet_lightning() -> None:
    """Lightning's hints are about its own data loading and logging, which a run does not use."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ):
        warnings.filterwarnings("ignore", message=message)


__all__ = ["assemble", "best", "facts", "resolve_device", "resolve_precision", "train"]
