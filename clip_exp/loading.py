"""Loading of models from runs, checkpoints, files and published weights. Sources are found and checked without torch before loading.

With `wise_ft`, the weights are an average of a run's weights and its initial weights (Wortsman et al. 2022).
"""

import hashlib
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clip_exp.checkpoints import folders
from clip_exp.checkpoints.folders import EMA_WEIGHTS, MANIFEST, RUN_COPY, WEIGHTS, read_manifest
from clip_exp.config.evaluation import ModelChoice
from clip_exp.config.files import read_run_config
from clip_exp.config.model import Activation, ModelConfig
from clip_exp.config.training import TrainConfig
from clip_exp.data.files import MAX_EVALUATED_PIXELS, ImageLimits
from clip_exp.errors import CheckpointError, ConfigError, nearest
from clip_exp.runs import CONFIG, newest_run, read_record, require_run, run_config, with_saved_tokenizer
from clip_exp.weights.find import check_pretrained, find_weights, hash_part, hash_weights
from clip_exp.weights.inspect import note_architecture, resolve_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from clip_exp.models.clip import CLIP

log = logging.getLogger(__name__)
NO_START = "wise_ft needs a run or a checkpoint of a run: the initial weights of other files are unknown."


@dataclass(frozen=True)
class Mix:
    """Average of a run's weights and its initial weights.

    Attributes:
        share: fraction of the run's weights, 0 to 1.
        start: file or folder of the initial weights.
        start_sha256: hash of the initial weights.
        prefix: `pretrained_prefix` of the run.
    """

    share: float
    start: str
    start_sha256: str
    prefix: str | None = None

    def sha256(self, weights_sha256: str) -> str:
        """Return a hash of the average.

        Args:
            weights_sha256: hash of the run's weights.
        """
        start = hash_part(self.start_sha256, self.prefix)
        return hashlib.sha256(f"{weights_sha256} {start} {self.share!r}".encode()).hexdigest()

    def check(self) -> None:
        """Check that the initial weights are unchanged.

        Raises:
            CheckpointError: the initial weights are missing or have changed.
        """
        where = f"wise_ft={self.share:g}: {self.start}, the initial weights of the run,"
        if not Path(self.start).exists():
            raise CheckpointError(f"{where} not found: restore the file, or leave out wise_ft.")
        if hash_weights(Path(self.start)) != self.start_sha256:
            raise CheckpointError(f"{where} have changed: their sha256 was {self.start_sha256}.")


def mix_of(run_dir: Path, fraction: float) -> Mix:
    """Find and check the initial weights of a run, as recorded in its `run.json`.

    Args:
        run_dir: run folder.
        fraction: fraction of the run's weights in the average, 0 to 1.

    Raises:
        ConfigError: the fraction is not in 0..1, or the run started from random weights or from weights of single towers.
        CheckpointError: the initial weights are missing or have changed.
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"wise_ft={fraction:g} must be a fraction of the run's weights, from 0 to 1.")
    record = read_record(run_dir)
    if towers := sorted({"pretrained_image", "pretrained_text"} & record.keys()):
        raise ConfigError(
            f"wise_ft={fraction:g} needs a run that started from weights of the whole model, but {run_dir} started from "
            f"{' and '.join(towers)}: leave out wise_ft."
        )
    start = record.get("pretrained")
    if not isinstance(start, dict):
        raise ConfigError(
            f"wise_ft={fraction:g} needs a run that started from pretrained weights, but the run.json of {run_dir} has no `pretrained`: "
            "leave out wise_ft."
        )
    mix = Mix(fraction, start["path"], start["sha256"], start.get("prefix"))
    mix.check()
    return mix


def interpolate(start: "Mapping[str, Tensor]", tuned: "Mapping[str, Tensor]", fraction: float) -> "dict[str, Tensor]":
    """Return (1 - fraction) * start + fraction * tuned for all tensors of two state dicts with the same names.

    Integer tensors are those of `tuned`.
    """
    return {
        name: (1 - fraction) * start[name] + fraction * value if value.is_floating_point() else value
        for name, value in tuned.items()
    }


@dataclass(frozen=True)
class ModelSource:
    """Configuration of a model and the location of its weights.

    Attributes:
        model: configuration of the model.
        weights: file, or folder that `read_weights` reads.
        run: configuration of the run that trained the model, if any.
        run_dir: folder of this run.
        step: number of completed optimizer steps, if the name of the folder of the weights contains it.
        description: description of the weights that `pretrained` names.
        mix: average with the initial weights of the run, if requested.
        prefix: `pretrained_prefix`, which selects the weights in a file with several models.
    """

    model: ModelConfig
    weights: Path
    run: TrainConfig | None = None
    run_dir: Path | None = None
    step: int | None = None
    description: str | None = None
    mix: Mix | None = None
    prefix: str | None = None

    @property
    def ema(self) -> bool:
        """True if the weights are the exponential moving average in a checkpoint."""
        return self.weights.name == EMA_WEIGHTS

    def image_limits(self, max_pixels: int = MAX_EVALUATED_PIXELS) -> ImageLimits:
        """Return the limits for images of the model: what a run was trained on can be evaluated."""
        return ImageLimits.evaluated(max_pixels, None if self.run is None else self.run.data)

    def sha256(self) -> str:
        """Return a hash of the weights. For a checkpoint, it is the one in the manifest, which `find_source` has verified."""
        folder = self.weights.parent
        recorded = read_manifest(folder).files if (folder / MANIFEST).is_file() else {}
        sha256 = recorded[self.weights.name].sha256 if self.weights.name in recorded else hash_weights(self.weights)
        sha256 = hash_part(sha256, self.prefix)
        return sha256 if self.mix is None else self.mix.sha256(sha256)


def find_source(config: ModelChoice) -> ModelSource:
    """Find the model that a command names by `run`, by `ckpt`, or by `pretrained`, with `model` unless the weights name their model.

    Weights named by a tag or on the hub are downloaded. Call `check_source` before, to report other problems first.

    Raises:
        ConfigError: none or several of the three keys are set, a path or tag is unknown, or the model does not fit the
            weights.
        CheckpointError: the run has no usable checkpoint, or the weights are damaged or cannot be downloaded.
    """
    return check_source(config) or source_of_file(config.model, str(config.pretrained), prefix=config.pretrained_prefix)


def check_source(config: ModelChoice) -> ModelSource | None:
    """Find the model as `find_source` does, but for `pretrained` only check the values without downloading or reading weights.

    Returns:
        The source; None for `pretrained`.
    """
    model = config.model.name if config.model else None
    values = {"run": config.run, "ckpt": config.ckpt, "model": model, "pretrained": config.pretrained}
    given = {key: value for key, value in values.items() if value is not None}
    if set(given) == {"run"}:
        return mixed(source_of_run(run_folder(given["run"], config.runs_in), config.ema), config.wise_ft)
    if set(given) == {"ckpt"}:
        return mixed(source_of_checkpoint(Path(given["ckpt"]), config.ema), config.wise_ft)
    if set(given) not in ({"model", "pretrained"}, {"pretrained"}):
        listed = f"got {', '.join(f'{key}={value}' for key, value in given.items())}" if given else "none is set"
        raise ConfigError(
            f"the model must be set by exactly one of run=DIR, ckpt=PATH, and model=NAME with pretrained=TAG or FILE; {listed}."
        )
    if config.ema:
        raise ConfigError("ema=true needs run=DIR or ckpt=PATH: only checkpoints of runs contain averaged weights.")
    if config.wise_ft is not None:
        raise ConfigError("wise_ft needs run=DIR or ckpt=PATH: the initial weights of pretrained=… are unknown.")
    if problems := check_pretrained(given["pretrained"], config.model):
        raise ConfigError("\n".join(problems))
    return None


def run_folder(run: str, output_dir: str) -> Path:
    """Return the folder of a run, given as a folder, by its name, or as `latest`; a message reports the choice.

    Args:
        run: value of the key `run`.
        output_dir: output folder in which runs are looked for by name.

    Raises:
        ConfigError: there is no such folder and no run of that name.
    """
    if Path(run).is_dir():
        return Path(run)
    if "/" not in run and (newest := newest_run(run, output_dir)) is not None:
        print(f"run={run}: {newest}", file=sys.stderr, flush=True)
        return newest
    where = Path(output_dir, "train")
    known = sorted({path.parents[1].name for path in where.glob(f"*/*/{CONFIG}")})
    name = "" if "/" in run or not known else f", and no run in {where} has this name: {nearest(run, known)}"
    raise ConfigError(
        f"run={run}: folder not found{name or '.'} Training prints its run folder: outputs/train/<name>/<time>."
    )


def source_of_run(run_dir: Path, ema: bool = False) -> ModelSource:
    """Return the source for a run: its best checkpoint if it has a `monitor`, else its last one.

    Raises:
        CheckpointError: the folder is not a run folder, or has no usable checkpoint.
    """
    require_run(run_dir)
    run = run_config(run_dir)
    checkpoint = folders.best(run_dir) if run.monitor else folders.latest(run_dir)
    return _of_checkpoint_folder(checkpoint, run, run_dir, ema)


def is_own(source: ModelSource) -> bool:
    """Return True for the weights that `run=DIR` selects: those of the best or last checkpoint, without `ema` and `wise_ft`."""
    if source.run is None or source.run_dir is None or source.ema or source.mix is not None:
        return False
    found = folders.manifests(source.run_dir)
    marked = [checkpoint for checkpoint, manifest in found.items() if manifest.best] if source.run.monitor else []
    return source.weights.parent.resolve() in [checkpoint.resolve() for checkpoint in (marked or [*found])[-1:]]


def source_of_checkpoint(path: Path, ema: bool = False) -> ModelSource:
    """Return the source for a checkpoint folder of a run, or for the weights file in it.

    Raises:
        ConfigError: the path does not exist, or is another file.
        CheckpointError: the checkpoint is not in a run folder, or is damaged.
    """
    if not path.exists():
        raise ConfigError(f"ckpt={path}: file or folder not found. Give <run folder>/checkpoints/step-<number>.")
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name not in (WEIGHTS, EMA_WEIGHTS):
        raise ConfigError(
            f"ckpt={path} is not the {WEIGHTS} of a checkpoint. For other files, set model=NAME pretrained={path}."
        )
    run_dir = folder.resolve().parents[1]
    if not any(path.is_file() for path in (run_dir / CONFIG, folder / RUN_COPY)):
        raise CheckpointError(
            f"{path} is not in a run folder ({run_dir} has no {CONFIG}), so its model is unknown: "
            f"set model=NAME pretrained={folder / WEIGHTS}."
        )
    if (folder / MANIFEST).is_file() and (problem := folders.damage(folder)):
        raise CheckpointError(f"{folder} is damaged: {problem}. Give an earlier checkpoint of the run.")
    return _of_checkpoint_folder(folder, run_config(run_dir), run_dir, ema or path.name == EMA_WEIGHTS)


def source_of_file(
    model: ModelConfig | None,
    pretrained: str | Path,
    activation: Activation | None = None,
    prefix: str | None = None,
) -> ModelSource:
    """Return the source for weights in a file or folder, by a tag, or on the hub, with the model's configuration completed from the weights.

    Args:
        model: configuration of the model; None if the weights contain it: a folder of Hugging Face or open_clip, an
            export, or a run.
        pretrained: value of the key `pretrained`.
        activation: overrides the activation of the configuration.
        prefix: value of `pretrained_prefix`, which selects the weights in a file with several models.

    Raises:
        ConfigError: see `find_weights` and `resolve_model`; or the model is unknown.
        CheckpointError: the weights cannot be downloaded, or are damaged.
    """
    if model is not None:
        model = model.model_copy(update={"activation": activation or model.activation})
    found = find_weights(str(pretrained), model)
    model = model or found.about.model
    if model is None:
        raise ConfigError(
            f"{found.description} ({found.about.format}): the model of these weights is unknown, since there is no configuration in the file, "
            f"next to it, or in a run folder that contains it. Name the model: model=vit_b32 pretrained={pretrained}, or "
            f'load("vit_b32", pretrained="{pretrained}").'
        )
    model = model.model_copy(update={"activation": activation or model.activation})
    model = note_architecture(resolve_model(model, found), own_weights=())
    return ModelSource(model, found.path, description=found.description, prefix=prefix)


def source_of_weights(path: Path, activation: Activation | None = None, prefix: str | None = None) -> ModelSource:
    """Return the source for a weights file in a checkpoint of a run, next to the `config.yaml` of a run, or with its own configuration.

    Raises:
        ConfigError: the model of the weights is unknown.
    """
    folder = path.resolve().parent
    if (folder / CONFIG).is_file():
        run = read_run_config(folder)
        return ModelSource(with_saved_tokenizer(run.model, folder), path, run)
    if path.name in (WEIGHTS, EMA_WEIGHTS) and (folder.parents[1] / CONFIG).is_file():
        return source_of_checkpoint(path)
    return source_of_file(None, path, activation, prefix)


def mixed(source: ModelSource, fraction: float | None) -> ModelSource:
    """Return the source for an average of a run's weights and its initial weights.

    Args:
        source: source for the run.
        fraction: fraction of the run's weights, 0 to 1; None: return `source` unchanged.

    Raises:
        ConfigError: the source is not a run, or the run did not start from pretrained weights.
        CheckpointError: the initial weights are missing or have changed.
    """
    if fraction is None:
        return source
    if source.run_dir is None:
        raise ConfigError(NO_START)
    return replace(source, mix=mix_of(source.run_dir, fraction))


def _of_checkpoint_folder(folder: Path, run: TrainConfig, run_dir: Path, ema: bool) -> ModelSource:
    weights = folder / (EMA_WEIGHTS if ema else WEIGHTS)
    if not weights.is_file():
        fix = "the run was trained without callbacks=ema, so leave out ema=true" if ema else "give another checkpoint"
        raise CheckpointError(f"{folder} has no {weights.name}: {fix}.")
    step = folders.step_of(folder) if folders.STEP.search(folder.name) else None
    return ModelSource(with_saved_tokenizer(run.model, run_dir), weights, run, run_dir, step)


def load_model(source: ModelSource, device: "torch.device | str" = "cpu") -> "CLIP":
    """Load a model in float32, in evaluation mode and without gradients.

    Raises:
        CheckpointError: the file cannot be read, or its weights do not fit the model.
    """
    import torch
    from torch import nn

    from clip_exp.models.clip import build_model
    from clip_exp.weights.fit import fit_weights, load_weights
    from clip_exp.weights.read import BIAS, find_model_weights

    model = build_model(source.model)
    weights = find_model_weights(source.weights, source.model, model.state_dict(), source.prefix)
    if BIAS in weights.state:
        model.logit_bias = nn.Parameter(torch.zeros(1))
    for note in filter(None, (weights.note, *fit_weights(model, weights.state, weights.source))):
        log.warning(note)
    if source.mix is not None:
        tuned = {name: value.clone() for name, value in model.state_dict().items()}
        load_weights(model, source.mix.start, source.model, source.mix.prefix)
        model.load_state_dict(interpolate(model.state_dict(), tuned, source.mix.share))
    return model.to(device).eval().requires_grad_(False)
