"""Python API: `clip_exp.load`, the commands train and evaluate as functions, and `Run`, a training run with its results."""

import difflib
import html
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import clip_exp.open_clip_files as open_clip_files
from clip_exp.checkpoints import folders
from clip_exp.checkpoints.folders import STEP, was_saved
from clip_exp.config import objects, registry
from clip_exp.config.base import typed_keys
from clip_exp.config.compose import compose
from clip_exp.config.evaluation import OUTPUTS
from clip_exp.config.keywords import PARAMETERS, EvaluateKeywords, TrainKeywords, overrides_of
from clip_exp.config.model import Activation
from clip_exp.config.names import named_model, names, resolve
from clip_exp.config.targets import allowed
from clip_exp.config.training import TrainConfig
from clip_exp.devices import check_accelerator
from clip_exp.errors import PREEMPTED_EXIT_CODE, CheckpointError, ClipExpError, ConfigError, nearest
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
from clip_exp.reports.run_report import next_step
from clip_exp.runs import METRICS, RunRecord, newest_run, read_config, read_metrics, require_run
from clip_exp.storage import read_json_object
from clip_exp.training.launch import train_here
from clip_exp.training.preflight import requested_devices
from clip_exp.weights.download import HUB, is_hub_name

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from clip_exp.inference.pipeline import Pipeline

__all__ = ["Run", "evaluate", "find_images", "load", "train"]
# Folders with the user's options and Python files
ConfigDir = str | Path | Sequence[str | Path] | None


def load(
    source: str | os.PathLike[str],
    pretrained: str | os.PathLike[str] | None = None,
    *,
    accelerator: str = "auto",
    activation: str | None = None,
    wise_ft: float | None = None,
    prefix: str | None = None,
    allow_targets: Sequence[str] = (),
    config_dir: ConfigDir = None,
    image: "nn.Module | None" = None,
    text: "nn.Module | None" = None,
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
        image: module of the image tower, if the model was trained with an object (`train(model={"image": …})`). The
            pipeline has a copy of it with the trained weights.
        text: module of the text tower, likewise.

    Returns:
        The model with its preprocessing: `encode_image`, `classify`, `rank`, `index`, `export` (docs/use.md).

    Raises:
        TargetNotAllowedError: the configuration of the weights names custom code that is not allowed.
        ConfigError: the model, tag, file or folder is unknown, or the weights were trained with another activation.
        CheckpointError: the weights cannot be downloaded or read, or do not fit the model.
    """
    if activation is not None and activation not in list(Activation):
        raise ConfigError(f"activation={activation} must be one of {', '.join(Activation)}.")
    source, pretrained = os.fspath(source), None if pretrained is None else os.fspath(pretrained)
    # Problems are reported before torch is imported.
    check_accelerator(accelerator)
    if wise_ft is not None and (pretrained is not None or source.startswith(HUB)):
        raise ConfigError(NO_START)
    with allowed(allow_targets), registry.added(config_dir), objects.given(_towers(image, text)):
        found = mixed(_source(source, pretrained, Activation(activation) if activation else None, prefix), wise_ft)
        for name, module in (("image", image), ("text", text)):
            if module is not None and not objects.is_object(str(getattr(getattr(found.model, name), "target", ""))):
                raise ConfigError(
                    f"{name}=… has no effect: the {name} tower of {source} was not trained from an object. Leave it out."
                )
        # Imports torch
        from clip_exp.inference.pipeline import load_pipeline

        return load_pipeline(found, accelerator)


def train(
    *overrides: str,
    config_dir: ConfigDir = None,
    dataset: Any = None,
    val_dataset: Any = None,
    transform: Callable[[Any], Any] | None = None,
    **keywords: Unpack[TrainKeywords],
) -> "Run":
    """Train a model as `clip-exp train` does, in this process and its child processes, and return the finished run.

    An interrupted run is resumed, as is one that `trainer.max_time` ended. If a finished run has the same configuration,
    data and initial weights, it is returned, after running tasks that have no results yet: see `resume` in
    docs/training.md.

    Objects are supported with one device. `config.yaml` has their names, so `load` and `evaluate` need the modules of
    the towers again; the returned run has them.

    Args:
        overrides: overrides as on the command line: "experiment=digits", "optimizer.lr=1e-3".
        config_dir: folder or folders with your options and Python files, as `--config-dir` on the command line.
        dataset: training data: an object with `__len__` and `__getitem__` that returns images and captions
            (docs/extending.md).
        val_dataset: validation data, likewise.
        transform: function from a uint8 image [3, H, W] to a uint8 image [3, image_size, image_size], instead of the
            augmentation.
        keywords: keys of the configuration (docs/python.md). A text selects an option of a group (`model="vit_tiny"`) or sets a
            key (`max_steps=20`); a mapping sets the keys below (`optimizer={"lr": 1e-3}`). `loss` may be a module or
            function, and `model` a pair of modules (image, text), or {"image": module} or {"text": module}.

    Returns:
        The finished run: its folder, configuration, metrics and checkpoints.

    Raises:
        ConfigError: the configuration is invalid; one line for every problem.
        ClipExpError: the run failed; the class gives the reason, as the exit code does on the command line.
        KeyboardInterrupt: a signal stopped the run; the same call resumes it.
    """
    parameters = {"dataset": dataset, "val_dataset": val_dataset, "transform": transform}
    for name, value in parameters.items():
        if isinstance(value, str | os.PathLike | Mapping):
            key = PARAMETERS[name].partition(".")[2] or "train"
            raise ConfigError(f"{name}={value!r} is not an object: set a key with data={{{key!r}: {value!r}}}.")
    passed = {PARAMETERS[name]: value for name, value in parameters.items() if value is not None}
    with allowed(()), registry.added(config_dir):  # what the call allows is allowed for its duration only
        further, found = overrides_of("train", keywords, overrides, passed)
        arguments = [*overrides, *further]
        if found and "trainer.devices" not in typed_keys(arguments):
            arguments.append("trainer.devices=1")
        with objects.given(found):
            config = compose("train", arguments)
            if started_by_launcher():
                raise ConfigError("clip_exp.train starts its own processes: run it without torchrun or srun.")
            devices = requested_devices(config)
            if found and (devices.gpus is not None or devices.requested != 1):
                raise ConfigError(
                    f"{devices.value}: objects ({', '.join(found)}) exist in this process only. Leave {devices.keys}devices out, and choose a "
                    "GPU by CUDA_VISIBLE_DEVICES; for several devices, name the class by _target_ in a file of yours (docs/extending.md)."
                )
            shown = next_step.set("run.evaluate(task=…), run.load(), run.metrics")
            try:
                run_dir, code = train_here(config, arguments)
            finally:
                next_step.reset(shown)
    if code == PREEMPTED_EXIT_CODE:
        raise KeyboardInterrupt(f"stopped by a signal; the same call resumes {run_dir}")
    if code:
        message = "\n".join(RunRecord(run_dir).values.get("error", [])) or f"{run_dir} failed."
        classes = {cls.exit_code: cls for cls in ClipExpError.__subclasses__()}
        raise classes.get(code, ClipExpError)(message)
    return Run._with_objects(run_dir, found)


def evaluate(
    *overrides: str,
    config_dir: ConfigDir = None,
    image: "nn.Module | None" = None,
    text: "nn.Module | None" = None,
    **keywords: Unpack[EvaluateKeywords],
) -> dict[str, dict[str, Any]]:
    """Evaluate a model as `clip-exp evaluate` does, in this process. The results are also written to the evaluation's folder.

    Args:
        overrides: overrides as on the command line: "run=DIR", "task=[imagenet,retrieval]", ….
        config_dir: folder or folders with your options and Python files, as `--config-dir` on the command line.
        image: module of the image tower, if the model was trained with an object; see `load`.
        text: module of the text tower, likewise.
        keywords: keys of the configuration, as for `train`: `run=run, task={"imagenet": {"root": "imagenet"}}`.

    Returns:
        For each task, its metrics and evaluation settings: `{"metrics": {name: value}, "protocol": {…}}`. Accuracies
        are fractions.

    Raises:
        ClipExpError: the configuration, the data or the model cannot be used.
        KeyboardInterrupt: a signal stopped the evaluation; the same call continues from the cached features.
    """
    with allowed(()), registry.added(config_dir):  # what the call allows is allowed for its duration only
        further, found = overrides_of("evaluate", keywords, overrides)
        arguments = [*overrides, *further]
        with objects.given({**found, **_towers(image, text)}):
            config = compose("evaluate", arguments)
            if str(config.devices) not in ("auto", "1"):
                raise ConfigError(
                    f"devices={config.devices}: several processes are supported on the command line only (clip-exp evaluate)."
                )
            try:
                return evaluate_here(config, arguments)
            except Stopped as stopped:
                raise KeyboardInterrupt(str(stopped)) from stopped


def _towers(image: Any, text: Any) -> dict[str, Any]:
    return {f"model.{name}": module for name, module in (("image", image), ("text", text)) if module is not None}


class Run:
    """Training run with its configuration, metrics and checkpoints. `train` returns it; `Run(path)` opens an existing one.

    It is a path: `Path(run)`, `os.fspath(run)`, `run / "report.html"` and `f"run={run}"` give the folder. The files are
    read when they are asked for, so the metrics of a run in progress are those so far.

    Args:
        path: the run folder, the name of a run in `outputs/train`, or `latest`.

    Attributes:
        path: the run folder.

    Raises:
        ConfigError: there is no such run.
        CheckpointError: the folder is not a run folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = run_folder(os.fspath(path), OUTPUTS)
        require_run(self.path)
        if not (self.path / CONFIG).is_file() and not was_saved(self.path):
            raise CheckpointError(f"{self.path} is not a run folder: it has no {CONFIG}. clip_exp.train returns a run.")
        self._objects: dict[str, Any] = {}

    @classmethod
    def _with_objects(cls, path: Path, found: Mapping[str, Any]) -> Self:
        run = cls(path)
        run._objects = {key.removeprefix("model."): each for key, each in found.items() if key.startswith("model.")}
        return run

    @property
    def config(self) -> TrainConfig:
        """Complete configuration, as `config.yaml` in the folder: `run.config.optimizer.lr`."""
        return read_config(self.path)[0]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Metrics of the logged steps, as `metrics.csv`: one dictionary for each step, with the values that it has."""
        with suppress(FileNotFoundError):
            return read_metrics(self.path / METRICS)
        return []

    @property
    def metrics(self) -> "pd.DataFrame":
        """Table of `rows`, for example for `run.metrics.plot(x="step", y="train/loss")`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("run.metrics needs pandas: pip install pandas, or use run.rows, a list.") from error
        return pandas.DataFrame(self.rows)

    @property
    def summary(self) -> dict[str, Any]:
        """Contents of `summary.json`: steps, time, data problems, and the last value of each metric under `metrics`.

        Raises:
            CheckpointError: the run is not finished.
        """
        try:
            return read_json_object(self.path / "summary.json")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} has no summary.json, which is written at the end of a run: train it to its end, or use run.rows."
            ) from error

    @property
    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, in order of their steps."""
        return folders.checkpoints(self.path)

    @property
    def best_checkpoint(self) -> Path:
        """Checkpoint that is best in `monitor`; without it, the last one.

        Raises:
            CheckpointError: there is no usable checkpoint.
        """
        return folders.best(self.path)

    def load(self, **options: Any) -> "Pipeline":
        """Load the model of the run, as `clip_exp.load(run)` does, and with its options.

        Raises:
            ClipExpError: see `clip_exp.load`.
        """
        return load(self.path, **{**self._objects, **options})

    def evaluate(self, *overrides: str, **keywords: Any) -> dict[str, dict[str, Any]]:
        """Evaluate the run's model and return the results, as `clip_exp.evaluate(run=run, …)` does.

        Raises:
            ClipExpError, KeyboardInterrupt: see `clip_exp.evaluate`.
        """
        return evaluate(*overrides, **{"run": self.path, **self._objects, **keywords})

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run | Path) and Path(other) == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={value}" for name, value in self._facts().items())
        return f"Run({str(self.path)!r}, {facts})"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in {"folder": str(self.path), **self._facts()}.items()
        )
        report = self.path / "report.html"
        link = f"<p><a href='{html.escape(str(report))}' target='_blank'>report</a></p>" if report.is_file() else ""
        points = [(row["step"], row["train/loss"]) for row in self.rows if "train/loss" in row]
        return f"<table>{cells}</table>{_curve(points)}{link}"

    def _facts(self) -> dict[str, str]:
        """Return the status and the last value of each metric."""
        status = RunRecord(self.path).values.get("status", "unknown")
        last: dict[str, Any] = {}
        for row in self.rows:
            last |= row
        names = [name for name in last if name == "train/loss" or ("/" in name and not name.startswith("train/"))]
        return {"status": status, "step": str(last.get("step", 0)), **{name: f"{last[name]:.4g}" for name in names}}


def _curve(points: list[tuple[int, float]], width: int = 360, height: int = 90) -> str:
    """Return the curve of the loss as SVG; empty for fewer than two points."""
    if len(points) < 2:
        return ""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    across, up = width / max(1, steps[-1] - steps[0]), height / ((high - low) or 1.0)
    line = " ".join(f"{(step - steps[0]) * across:.1f},{(high - value) * up:.1f}" for step, value in points)
    return (
        f"<svg width='{width}' height='{height}' viewBox='-2 -2 {width + 4} {height + 4}' role='img'><title>train/loss from "
        f"{high:.4g} to {low:.4g}</title><polyline points='{line}' fill='none' stroke='#1f77b4' stroke-width='2'/></svg>"
    )


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
