"""Python API: `clip_exp.load`, and the commands train and evaluate as functions."""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import clip_exp.open_clip_files as open_clip_files
from clip_exp.checkpoints.folders import STEP, was_saved
from clip_exp.config import registry
from clip_exp.config.compose import compose
from clip_exp.config.evaluation import OUTPUTS
from clip_exp.config.model import Activation
from clip_exp.config.names import named_model, names, resolve
from clip_exp.config.targets import allowed
from clip_exp.devices import check_accelerator
from clip_exp.errors import PREEMPTED_EXIT_CODE, ClipExpError, ConfigError, nearest
from clip_exp.evaluation.launch import evaluate as evaluate_here
from clip_exp.inference.inputs import find_images
from clip_exp.loading import (
    CONFIG,
    NO_START,
    ModelSource,
    mixed,
    run_folder,
    source_of_checkpoint,
    source_of_file,
    source_of_run,
    source_of_weights,
)
from clip_exp.ranks.environment import started_by_launcher
from clip_exp.ranks.failure import Stopped
from clip_exp.runs import RunRecord, newest_run
from clip_exp.training.launch import train_here
from clip_exp.weights.download import HUB, is_hub_name

if TYPE_CHECKING:
    from clip_exp.inference.pipeline import Pipeline

__all__ = ["evaluate", "find_images", "load", "train"]
# Folders with the user's options and Python files
ConfigDir = str | Path | Sequence[str | Path] | None


def load(
    source: str | Path,
    pretrained: str | Path | None = None,
    *,
    accelerator: str = "auto",
    activation: str | None = None,
    wise_ft: float | None = None,
    prefix: str | None = None,
    allow_targets: Sequence[str] = (),
    config_dir: ConfigDir = None,
) -> "Pipeline":
    """Load a model for inference.

    Args:
        source: with `pretrained`, the name of a model: one of `conf/model/`, or the name in OpenAI's repository
            (`ViT-B/32`), open_clip or FlagAI. Without `pretrained`, weights with their configuration: a run folder (its
            best checkpoint if it has a `monitor`, else its last), the name of a run in `outputs/train` or `latest` (the
            newest one), a checkpoint folder, a weights file in one of those
            or next to its `config.yaml`, a folder written by `save_pretrained` of Hugging Face or open_clip, or
            `hf-hub:org/name`.
        pretrained: tag of open_clip's registry (`openai`; `clip-exp models` lists them), `hf-hub:org/name`, or a file
            or folder with weights of clip_exp, open_clip, OpenAI, FlagAI or Hugging Face.
        accelerator: `auto` (a GPU if there is one), `cpu` or `gpu`.
        activation: `gelu`, `quick_gelu` or `gelu_tanh`, for weights whose files do not contain their activation.
        prefix: selects the weights in a file with several models: see `pretrained_prefix` in docs/weights.md.
        wise_ft: fraction of a fine-tuned run's weights, 0 to 1, in an average with the run's initial weights
            (docs/finetuning.md).
        allow_targets: packages or modules whose code may run if the configuration of the weights names it by `_target_`
            (docs/extending.md).
        config_dir: folder or folders with the custom towers of the model, as `--config-dir` on the command line.

    Raises:
        TargetNotAllowedError: the configuration of the weights names custom code that is not allowed.
        ConfigError: the model, tag, file or folder is unknown, or the weights were trained with another activation.
        CheckpointError: the weights cannot be downloaded or read, or do not fit the model.
    """
    if activation is not None and activation not in list(Activation):
        raise ConfigError(f"activation={activation} must be one of {', '.join(Activation)}.")
    # Problems are reported before torch is imported.
    check_accelerator(accelerator)
    if wise_ft is not None and (pretrained is not None or str(source).startswith(HUB)):
        raise ConfigError(NO_START)
    with allowed(allow_targets), registry.added(config_dir):
        found = mixed(_source(str(source), pretrained, Activation(activation) if activation else None, prefix), wise_ft)
        # Imports torch
        from clip_exp.inference.pipeline import load_pipeline

        return load_pipeline(found, accelerator)


def train(*overrides: str, config_dir: ConfigDir = None) -> Path:
    """Train a model as `clip-exp train` does, in this process and its child processes, and return the folder of the finished run.

    An interrupted run is resumed. If a finished run has the same configuration, data and initial weights, its folder is
    returned, after running tasks that have no results yet: see `resume` in docs/training.md.

    Args:
        overrides: overrides as on the command line: "model=vit_tiny", "data=csv", "data.train=pairs.csv".
        config_dir: folder or folders with your options and Python files, as `--config-dir` on the command line.

    Raises:
        ConfigError: the configuration is invalid; one line for every problem.
        ClipExpError: the run failed; the class gives the reason, as the exit code does on the command line.
        KeyboardInterrupt: a signal stopped the run; the same call resumes it.
    """
    with allowed(()), registry.added(config_dir):  # what the call allows is allowed for its duration only
        config = compose("train", list(overrides))
        if started_by_launcher():
            raise ConfigError("clip_exp.train starts its own processes: run it without torchrun or srun.")
        run_dir, code = train_here(config, list(overrides))
    if code == PREEMPTED_EXIT_CODE:
        raise KeyboardInterrupt(f"stopped by a signal; the same call resumes {run_dir}")
    if code:
        message = "\n".join(RunRecord(run_dir).values.get("error", [])) or f"{run_dir} failed."
        classes = {cls.exit_code: cls for cls in ClipExpError.__subclasses__()}
        raise classes.get(code, ClipExpError)(message)
    return run_dir


def evaluate(*overrides: str, config_dir: ConfigDir = None) -> dict[str, dict[str, Any]]:
    """Evaluate a model as `clip-exp evaluate` does, in this process. The results are also written to the evaluation's folder.

    Args:
        overrides: overrides as on the command line: "run=DIR", "task=[imagenet,retrieval]", ….
        config_dir: folder or folders with your options and Python files, as `--config-dir` on the command line.

    Returns:
        For each task, its metrics and evaluation settings: `{"metrics": {name: value}, "protocol": {…}}`. Accuracies
        are fractions.

    Raises:
        ClipExpError: the configuration, the data or the model cannot be used.
        KeyboardInterrupt: a signal stopped the evaluation; the same call continues from the cached features.
    """
    with allowed(()), registry.added(config_dir):  # what the call allows is allowed for its duration only
        config = compose("evaluate", list(overrides))
        if str(config.devices) not in ("auto", "1"):
            raise ConfigError(
                f"devices={config.devices}: several processes are supported on the command line only (clip-exp evaluate)."
            )
        try:
            return evaluate_here(config, list(overrides))
        except Stopped as stopped:
            raise KeyboardInterrupt(str(stopped)) from stopped


def _source(
    source: str, pretrained: str | Path | None, activation: Activation | None, prefix: str | None
) -> ModelSource:
    path = Path(source).expanduser()
    if pretrained is not None:
        if path.exists() and resolve(source) is None:
            raise ConfigError(
                f"{source} is a path with its own weights: leave out pretrained={pretrained}, or give the name of a model instead."
            )
        return source_of_file(named_model(source), pretrained, activation, prefix)
    if path.is_file():
        found = source_of_weights(path, activation, prefix)
    elif (path / CONFIG).is_file() or was_saved(path):
        found = source_of_run(path)
    elif path.is_dir() and STEP.search(path.resolve().name):
        found = source_of_checkpoint(path)
    elif path.is_dir() or source.startswith(HUB):
        found = source_of_file(None, source, activation, prefix)
    elif resolve(source) is None and "/" not in source and newest_run(source, OUTPUTS) is not None:
        found = source_of_run(run_folder(source, OUTPUTS))
    elif resolve(source) is None:
        if is_hub_name(HUB + source) and not difflib.get_close_matches(source, names(), n=1, cutoff=0.85):
            raise ConfigError(
                f"file or folder not found: '{source}'. For weights on the Hugging Face hub: load(\"{HUB}{source}\")."
            )
        raise ConfigError(f"'{source}' is neither an existing file or folder nor a model: {nearest(source, names())}")
    elif tags := open_clip_files.tags(named_model(source).open_clip_name):
        raise ConfigError(
            f'{source} needs weights: load("{source}", pretrained=TAG or FILE), with a file or folder of weights, or one of these tags: '
            f"{', '.join(tags)}."
        )
    else:
        raise ConfigError(
            f'{source} needs weights: load("{source}", pretrained=FILE), with a .safetensors or .pt file.'
        )
    if activation is None:
        return found
    return replace(found, model=found.model.model_copy(update={"activation": activation}))
