"""A run, a checkpoint, a file or a name to a model in memory: found and checked without torch, loaded when all is known to be right.

With `wise_ft` the weights are a mixture of a run's and of those that it started from (Wortsman et al. 2022).
"""

import hashlib
import logging
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
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.runs import CONFIG, read_record, require_run, run_config, with_saved_tokenizer
from clip_exp.weights.find import check_pretrained, find_weights, hash_part, hash_weights
from clip_exp.weights.inspect import note_architecture, settle

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from clip_exp.models.clip import CLIP

log = logging.getLogger(__name__)
NO_START = "wise_ft needs a run or its checkpoint: other weights do not tell what they started from."


@dataclass(frozen=True)
class Mix:
    """How much of a run's weights is taken, the rest from its start."""

    share: float  # 0: the start, 1: the run
    start: str  # file or folder of its weights
    start_sha256: str
    prefix: str | None = None  # `pretrained_prefix` of the run

    def sha256(self, weights_sha256: str) -> str:
        """A hash that stands for the mixture, from that of the run's weights."""
        start = hash_part(self.start_sha256, self.prefix)
        return hashlib.sha256(f"{weights_sha256} {start} {self.share!r}".encode()).hexdigest()

    def check(self) -> None:
        """See that the start is what it was.

        Raises:
            CheckpointError: it is no longer there, or others' weights are.
        """
        where = f"wise_ft={self.share:g}: {self.start}, which the run started from,"
        if not Path(self.start).exists():
            raise CheckpointError(f"{where} is no longer there: put it back, or leave wise_ft out.")
        if hash_weights(Path(self.start)) != self.start_sha256:
            raise CheckpointError(f"{where} holds other weights now: its sha256 was {self.start_sha256}.")


def mix_of(run_dir: Path, share: float) -> Mix:
    """The weights that a run started from, as its `run.json` tells, found and checked.

    Raises:
        ConfigError: the share is not in 0..1, or the run did not start from weights.
        CheckpointError: they are no longer there, or others.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"wise_ft={share:g} must be a share of the run's weights, from 0 to 1.")
    record = read_record(run_dir)
    if towers := sorted({"pretrained_image", "pretrained_text"} & record.keys()):
        raise ConfigError(
            f"wise_ft={share:g} goes between a run and weights of the whole model, and {run_dir} started from {' and '.join(towers)}. "
            "Leave wise_ft out."
        )
    start = record.get("pretrained")
    if not isinstance(start, dict):
        raise ConfigError(
            f"wise_ft={share:g} goes between a run and the weights that it started from, and {run_dir} started from none: "
            "its run.json has no `pretrained`. Leave wise_ft out."
        )
    mix = Mix(share, start["path"], start["sha256"], start.get("prefix"))
    mix.check()
    return mix


def interpolate(start: "Mapping[str, Tensor]", tuned: "Mapping[str, Tensor]", share: float) -> "dict[str, Tensor]":
    """(1 - share) * start + share * tuned of every tensor of two state dicts with the same names; integers are the tuned ones'."""
    return {
        name: (1 - share) * start[name] + share * value if value.is_floating_point() else value
        for name, value in tuned.items()
    }


@dataclass(frozen=True)
class ModelSource:
    """A model's configuration and its weights."""

    model: ModelConfig
    weights: Path  # a file, or a folder that `read_weights` reads
    run: TrainConfig | None = None  # the configuration of the run that trained it
    run_dir: Path | None = None
    step: int | None = None  # completed optimizer steps, where the folder of the weights tells
    told: str | None = None  # what `pretrained` was found to be
    mix: Mix | None = None  # with what the weights are mixed
    prefix: str | None = None  # `pretrained_prefix`: which of the file's weights

    @property
    def ema(self) -> bool:
        """Whether these are a checkpoint's averaged weights."""
        return self.weights.name == EMA_WEIGHTS

    def sha256(self) -> str:
        """Hash of the weights; of a checkpoint, the one in its manifest, which `find_source` has verified.

        Of a mixture, a hash of both hashes and the share.
        """
        folder = self.weights.parent
        recorded = read_manifest(folder).files if (folder / MANIFEST).is_file() else {}
        own = recorded[self.weights.name].sha256 if self.weights.name in recorded else hash_weights(self.weights)
        own = hash_part(own, self.prefix)
        return own if self.mix is None else self.mix.sha256(own)


def find_source(config: ModelChoice) -> ModelSource:
    """The model that a command names by `run`, by `ckpt`, or by `pretrained` with its `model` where the weights do not tell it.

    Weights that are named by a tag or on the hub are fetched: what else may be wrong is better told before, see `check_source`.

    Raises:
        ConfigError: none of the three or several; a path or a tag that does not exist; a model that the weights contradict.
        CheckpointError: a run without a usable checkpoint, damaged weights, or weights that cannot be fetched.
    """
    return check_source(config) or source_of_file(config.model, str(config.pretrained), prefix=config.pretrained_prefix)


def check_source(config: ModelChoice) -> ModelSource | None:
    """As `find_source`, but of `pretrained` only what can be seen without fetching or reading it is checked: None."""
    model = config.model.name if config.model else None
    values = {"run": config.run, "ckpt": config.ckpt, "model": model, "pretrained": config.pretrained}
    given = {key: value for key, value in values.items() if value is not None}
    if set(given) == {"run"}:
        return mixed(source_of_run(Path(given["run"]), config.ema), config.wise_ft)
    if set(given) == {"ckpt"}:
        return mixed(source_of_checkpoint(Path(given["ckpt"]), config.ema), config.wise_ft)
    if set(given) not in ({"model", "pretrained"}, {"pretrained"}):
        listed = ", ".join(f"{key}={value}" for key, value in given.items()) or "nothing"
        raise ConfigError(
            f"which model? Give run=DIR, or ckpt=PATH, or model=NAME with pretrained=TAG or FILE; given: {listed}."
        )
    if config.ema:
        raise ConfigError("ema=true needs run=DIR or ckpt=PATH: what pretrained names holds one set of weights.")
    if config.wise_ft is not None:
        raise ConfigError(
            "wise_ft needs run=DIR or ckpt=PATH: what pretrained names does not tell what it started from."
        )
    if problems := check_pretrained(given["pretrained"], config.model):
        raise ConfigError("\n".join(problems))
    return None


def source_of_run(run_dir: Path, ema: bool = False) -> ModelSource:
    """A run's best checkpoint if it has a `monitor`, else its last one.

    Raises:
        ConfigError: no such folder.
        CheckpointError: it is no run folder, or has no usable checkpoint.
    """
    if not run_dir.is_dir():
        raise ConfigError(
            f"run={run_dir}: no such folder. Training prints its run folder: outputs/train/<name>/<time>."
        )
    require_run(run_dir)
    run = run_config(run_dir)
    checkpoint = folders.best(run_dir) if run.monitor else folders.latest(run_dir)
    return _of_checkpoint_folder(checkpoint, run, run_dir, ema)


def is_own(source: ModelSource) -> bool:
    """Return whether these are the weights that `run=DIR` names now: of the best or last checkpoint, not averaged, not mixed."""
    if source.run is None or source.run_dir is None or source.ema or source.mix is not None:
        return False
    found = folders.manifests(source.run_dir)
    marked = [checkpoint for checkpoint, manifest in found.items() if manifest.best] if source.run.monitor else []
    return source.weights.parent.resolve() in [checkpoint.resolve() for checkpoint in (marked or [*found])[-1:]]


def source_of_checkpoint(path: Path, ema: bool = False) -> ModelSource:
    """A checkpoint folder of a run, or the weights file in it.

    Raises:
        ConfigError: no such path.
        CheckpointError: it is not inside a run folder, or damaged.
    """
    if not path.exists():
        raise ConfigError(f"ckpt={path}: no such file or folder. Give <run folder>/checkpoints/step-<number>.")
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name not in (WEIGHTS, EMA_WEIGHTS):
        raise ConfigError(
            f"ckpt={path} is not the {WEIGHTS} of a checkpoint; for other files: model=NAME pretrained={path}."
        )
    run_dir = folder.resolve().parents[1]
    if not any(path.is_file() for path in (run_dir / CONFIG, folder / RUN_COPY)):
        raise CheckpointError(
            f"{path} is not in a run folder ({run_dir} has no {CONFIG}), so nothing tells which model it is: "
            f"give model=NAME pretrained={folder / WEIGHTS}."
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
    """Weights by a file, a folder, a tag or a name on the hub; the model's configuration settled by them.

    Args:
        model: None where the weights tell it: a folder of Hugging Face's or open_clip's, an export of clip_exp's, a run.
        activation: in place of the configuration's.
        prefix: `pretrained_prefix`, where several weights in the file fit.
    Raises:
        ConfigError: see `find_weights` and `settle`; or nothing tells which model the weights are of.
        CheckpointError: the weights cannot be fetched, or are damaged.
    """
    if model is not None:
        model = model.model_copy(update={"activation": activation or model.activation})
    found = find_weights(str(pretrained), model)
    model = model or found.about.model
    if model is None:
        raise ConfigError(
            f"{found.told} ({found.about.format}): nothing tells which model these weights are of: no configuration that clip_exp "
            f'reads is in it, beside it, or in a run folder around it. Name the model: model=vit_b32 pretrained={pretrained}, or load("vit_b32", pretrained="{pretrained}").'
        )
    model = model.model_copy(update={"activation": activation or model.activation})
    model = note_architecture(settle(model, found), own_weights=())
    return ModelSource(model, found.path, told=found.told, prefix=prefix)


def source_of_weights(path: Path, activation: Activation | None = None, prefix: str | None = None) -> ModelSource:
    """A weights file that lies in a run folder's checkpoint, beside the `config.yaml` of its run, or that tells its model.

    Raises:
        ConfigError: none of these.
    """
    folder = path.resolve().parent
    if (folder / CONFIG).is_file():
        run = read_run_config(folder)
        return ModelSource(with_saved_tokenizer(run.model, folder), path, run)
    if path.name in (WEIGHTS, EMA_WEIGHTS) and (folder.parents[1] / CONFIG).is_file():
        return source_of_checkpoint(path)
    return source_of_file(None, path, activation, prefix)


def mixed(source: ModelSource, share: float | None) -> ModelSource:
    """A run's weights, of which `share` is taken and the rest from what the run started from; None: the run's own.

    Raises:
        ConfigError: the source is no run, or one that did not start from weights.
        CheckpointError: those weights are no longer there, or others.
    """
    if share is None:
        return source
    if source.run_dir is None:
        raise ConfigError(NO_START)
    return replace(source, mix=mix_of(source.run_dir, share))


def _of_checkpoint_folder(folder: Path, run: TrainConfig, run_dir: Path, ema: bool) -> ModelSource:
    weights = folder / (EMA_WEIGHTS if ema else WEIGHTS)
    if not weights.is_file():
        fix = "it was trained without callbacks=ema; leave out ema=true" if ema else "give another checkpoint"
        raise CheckpointError(f"{folder} has no {weights.name}: {fix}.")
    step = folders.step_of(folder) if folders.STEP.search(folder.name) else None
    return ModelSource(with_saved_tokenizer(run.model, run_dir), weights, run, run_dir, step)


def load_model(source: ModelSource, device: "torch.device | str" = "cpu") -> "CLIP":
    """The model with its weights, in float32, in evaluation mode, without gradients.

    Raises:
        CheckpointError: the file cannot be read, or holds another model's weights.
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
