"""Evaluation tasks during training, with the same code and settings as `evaluate.py`."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor

from clip_exp.checkpoints.folders import latest, step_of
from clip_exp.checkpoints.io import MODEL_PREFIX
from clip_exp.config.base import plain
from clip_exp.config.data import OnBadImage
from clip_exp.config.evaluation import EvalOnBadImage
from clip_exp.config.training import TrainConfig
from clip_exp.data.files import ImageLimits
from clip_exp.data.reading import ReadLimit
from clip_exp.errors import CheckpointError
from clip_exp.evaluation.evaluated_model import EvaluatedModel, about_weights, score
from clip_exp.evaluation.features import Cache, EncodeOptions
from clip_exp.evaluation.task import Task
from clip_exp.loading import ModelSource, load_model, source_of_checkpoint
from clip_exp.models.clip import CLIP, build_model
from clip_exp.progress import silence
from clip_exp.ranks.group import broadcast_from_main, from_main, is_main
from clip_exp.reports.evaluation import Result, show, write_result
from clip_exp.reports.names import name_in_run
from clip_exp.runs import RunRecord
from clip_exp.text.tokenizer import build_tokenizer
from clip_exp.training.callbacks import Progress
from clip_exp.training.lora import merge
from clip_exp.training.metrics import log_metrics
from clip_exp.training.preflight import training_tasks
from clip_exp.training.strategies import PortableDeepSpeedStrategy
from clip_exp.training.summary import add_scores

log = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class TaskScores(pl.Callback):
    """Callback that scores tasks every `task_every_n_steps` steps and at the end of the run, on all ranks together.

    It runs before the validation and the checkpoint of the step, which find the values in `trainer.callback_metrics` as
    `<task>/<metric>`. Scoring does not affect training, because it uses a separate copy of the model.
    """

    tasks: list[Task]  # tasks prepared by `evaluation.launch`
    config: TrainConfig
    run_dir: Path
    progress: Progress  # shows the values
    pause: Callable[[], None]  # called before scoring, to stop timing
    scored_step: int | None = field(default=None, init=False)
    values: dict[str, float] = field(default_factory=dict, init=False)  # metrics of `scored_step`
    _results: dict[str, Result] = field(default_factory=dict, init=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for task in self.tasks if is_main() else []:
            for warning in task.warnings():
                log.warning(warning)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        every, step = self.config.task_every_n_steps, trainer.global_step
        if step >= pl_module.total_steps or (every is not None and step % every == 0):
            self._score_step(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Score the last step of a run that `patience` ended."""
        if self.scored_step != trainer.global_step:
            self._score_step(trainer, pl_module)

    def _score_step(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.pause()
        device = trainer.strategy.root_device
        self.progress.scoring([task.name for task in self.tasks])
        with _isolated(device):
            self._results = score_tasks(self.tasks, self.config, plain_model(trainer, pl_module), device)
        self.scored_step = trainer.global_step
        self.values = metrics_of(self._results)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.values.items()})
        log_metrics(trainer, self.values, trainer.global_step)
        self.progress.show(self.values)

    def write(self, device: torch.device) -> list[str]:
        """Write the results of the last checkpoint to `eval/`, with HTML reports; return the names of the tasks. All ranks must call this.

        If the run was killed after its last checkpoint and resumed, there are no results yet, and the checkpoint is scored.
        """
        checkpoint = from_main(lambda: latest(self.run_dir))
        source = source_of_checkpoint(checkpoint)
        if self.scored_step != step_of(checkpoint):
            with _isolated(device):
                self._results = score_tasks(self.tasks, self.config, load_model(source, device), device)
        write_results(self._results, source, self.run_dir, device)
        return list(self._results)


def score_finished(config: TrainConfig, run_dir: Path, record: RunRecord, device: torch.device) -> None:
    """Score the last checkpoint of a finished run on the tasks of `config` that it has no scores for. All ranks must call this."""
    scored = record.values["scored_tasks"]
    new = {name: values for name, values in config.task.items() if name not in scored}
    source = source_of_checkpoint(from_main(lambda: latest(run_dir)))
    tasks = training_tasks(config.model_copy(update={"task": new}))
    results = score_tasks(tasks, config, load_model(source, device), device)
    write_results(results, source, run_dir, device)
    if is_main():
        record.update(scored_tasks={**scored, **plain(new)})
        add_scores(run_dir, metrics_of(results))
        show({name: {"metrics": found.metrics, "protocol": found.protocol} for name, found in results.items()}, run_dir)


def score_tasks(tasks: list[Task], config: TrainConfig, model: CLIP, device: torch.device) -> dict[str, Result]:
    """Score a model on the tasks of a run. All ranks must call this."""
    data = config.data
    # An image to score cannot be replaced by another row's: it is left out.
    on_bad_image = EvalOnBadImage.error if data.on_bad_image is OnBadImage.error else EvalOnBadImage.skip
    options = EncodeOptions(
        device,
        num_workers=data.num_workers,
        read_limit=ReadLimit(data.timeout_s, "data.timeout_s"),
        on_bad_image=on_bad_image,
        limits=ImageLimits.evaluated(run=data),
        skip_override=f"data.on_bad_image={OnBadImage.replace}",
    )
    tokenizer = build_tokenizer(config.model.text)
    # The cache is for features that stay the same between scorings: those of the supervised network of `robustness`.
    cache = Cache(Path(config.output_dir) / "cache", 10.0)
    evaluated = EvaluatedModel(model, tokenizer, config.model, options, weights_sha256=None, cache=cache)
    return {task.name: score(task, evaluated) for task in tasks}


def write_results(results: dict[str, Result], source: ModelSource, run_dir: Path, device: torch.device) -> None:
    """Write the results of a checkpoint to `eval/` of its run, on rank 0; warn about files that cannot be written.

    If the run has a `monitor` and another checkpoint is the best, the file names contain the step of the checkpoint.
    """
    if not is_main():
        return
    for name, result in results.items():
        result.protocol.update(about_weights(source, source.sha256(), device))
        try:
            write_result(result, name, run_dir, run_dir, name_in_run(name, source))
        except CheckpointError as error:
            again = f"Score the run again with evaluate.py run={run_dir}."
            log.warning("The results of task %s cannot be written: %s %s", name, error, again)


def metrics_of(results: dict[str, Result]) -> dict[str, float]:
    """Return the metrics of several tasks as `<task>/<metric>`."""
    return {f"{task}/{metric}": value for task, result in results.items() for metric, value in result.metrics.items()}


class TaskPatience(EarlyStopping):
    """Early stopping by the metric of a task, checked only when tasks are scored."""

    def __init__(self, scores: TaskScores, monitor: str, min_delta: float, patience: int, mode: str) -> None:
        super().__init__(monitor, min_delta, patience, mode=mode)
        self.scores = scores

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.scores.scored_step == trainer.global_step:
            self._run_early_stopping_check(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pass

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pass


def plain_model(trainer: pl.Trainer, pl_module: Any) -> CLIP:
    """Return the current model as a separate float32 module in evaluation mode, without a strategy's hooks. All ranks must call this.

    The weights are gathered once, here. A strategy that gathers them in every forward pass would deadlock, because ranks encode
    different numbers of batches. Weights that are already whole and float32 are shared, not copied.
    """
    trained, device = pl_module.model, trainer.strategy.root_device
    if isinstance(trainer.strategy, PortableDeepSpeedStrategy):
        weights = {
            name.removeprefix(MODEL_PREFIX): full.detach().to(device, full.dtype, copy=True)
            for name, full in trainer.strategy.whole_state()
            if name.startswith(MODEL_PREFIX)
        }
    else:
        weights = {name: _float32(value) for name, value in trained.state_dict().items()}
    with torch.device("meta"):
        model = build_model(pl_module.config.model, init_logit_bias=None if trained.logit_bias is None else 0.0)
    model.load_state_dict(merge(weights, pl_module.config.finetune.lora), assign=True)
    buffers = dict(trained.named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # not in the state dict, such as position ids
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, _float32(buffers[name]))
    broadcast_from_main(model.buffers())  # running statistics differ between ranks; checkpoints contain those of rank 0
    return model.eval().requires_grad_(False)


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


@contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Preserve the random state of training, and hide progress bars."""
    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []), silence():
        yield
