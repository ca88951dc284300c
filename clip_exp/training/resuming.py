"""Which checkpoint a run resumes from: the newest that is undamaged and that the model takes. Rank 0 decides."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from clip_exp.checkpoints.discovery import checkpoints, recover, set_aside
from clip_exp.checkpoints.io import SafeCheckpointIO
from clip_exp.checkpoints.manifest import STEP, damage, step_of
from clip_exp.config.schema import TrainConfig
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.errors import CheckpointError
from clip_exp.runs import LAST_CHECKPOINT, RunRecord
from clip_exp.training.metrics import MetricsCSV
from clip_exp.training.module import CLIPModule
from clip_exp.training.opening import EarlierRun, lost

log = logging.getLogger(__name__)
PARTS = ("epoch", "global_step", "loops", "optimizer_states", "lr_schedulers", "random_states")  # of a training state


class Candidates(NamedTuple):
    """A run's checkpoints."""

    usable: list[Path]  # undamaged, the newest first; empty: the run starts from step 0
    damaged: dict[Path, str]  # with what is wrong
    named: bool  # by the user: no other may be used instead


def candidates(config: TrainConfig, run_dir: Path, record: RunRecord) -> Candidates:
    """Find the checkpoint that `resume` names, or those of the run.

    Raises:
        CheckpointError: the named one is damaged; or the run had a checkpoint, and all that are left are damaged.
    """
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


def first_that_loads(
    found: Candidates, run_dir: Path, record: RunRecord, module: CLIPModule, datamodule: PairsDataModule
) -> Path:
    """Return the newest usable checkpoint that the model takes, whose weights it then has.

    Raises:
        CheckpointError: none does, or the named one does not.
    """
    problems: dict[Path, str] = {}
    for checkpoint in found.usable:
        try:
            _load(checkpoint, module, datamodule)
        except MemoryError:
            raise
        except Exception as error:  # whatever a state may lack
            problems[checkpoint] = f"cannot be loaded: {_first_line(error)}"
        else:
            if problems:
                log.warning(_instead(problems, checkpoint))
            return checkpoint
    if found.named:
        raise CheckpointError(
            f"resume={found.usable[0]} {problems[found.usable[0]]}. Name another, or the run's folder."
        )
    raise lost(run_dir, record.values, _listed(found.damaged | problems))


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


def take_back(run_dir: Path, damaged: Mapping[Path, str], loggers: Iterable[Any], step: int) -> None:
    """Set aside what the run wrote after `step`, and what is damaged."""
    for logger in loggers:
        if isinstance(logger, MetricsCSV):
            logger.continue_from(step)
    set_aside(run_dir, damaged, after=step)


def _load(checkpoint: Path, module: CLIPModule, datamodule: PairsDataModule) -> None:
    """Load a checkpoint as Lightning will, as far as it can be done before training is set up.

    Raises: any exception.
    """
    state = SafeCheckpointIO().load_checkpoint(checkpoint)
    position = type(datamodule).__qualname__
    if missing := [part for part in (*PARTS, position) if part not in state]:
        raise ValueError(f"its state lacks {', '.join(missing)}")
    seen = state[position]["samples_seen"]
    if seen != state["global_step"] * datamodule.global_batch_size:
        raise ValueError(f"its state has {seen} samples seen after {state['global_step']} steps")
    (optimizer,) = state["optimizer_states"]
    sizes = [len(group["params"]) for group in optimizer["param_groups"]]
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    if sizes != module.group_sizes or names != module.parameter_names:
        raise ValueError("its optimizer has other parameters than the model trains")
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"])


def _instead(problems: Mapping[Path, str], used: Path) -> str:
    return f"Damaged checkpoints in {used.parent} are left out, and {used.name} is used:{_listed(problems)}"


def _listed(problems: Mapping[Path, str]) -> str:
    return "".join(f"\n  {path.name}: {problem}" for path, problem in sorted(problems.items(), reverse=True))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
