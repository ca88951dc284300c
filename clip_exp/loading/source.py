"""Which model: found and checked from paths and names, before torch is imported and weights are read."""

from dataclasses import dataclass, replace
from pathlib import Path

from clip_exp.checkpoints import folders
from clip_exp.checkpoints.folders import EMA_WEIGHTS, MANIFEST, RUN_COPY, WEIGHTS, read_manifest
from clip_exp.config.evaluation import ModelChoice
from clip_exp.config.files import read_run_config
from clip_exp.config.model import Activation, ModelConfig
from clip_exp.config.training import TrainConfig
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.loading.wise_ft import Mix, mix_of
from clip_exp.runs import CONFIG, require_run, run_config, with_saved_tokenizer
from clip_exp.weights.find import check_pretrained, find_weights, hash_part, hash_weights
from clip_exp.weights.inspect import note_architecture, settle

NO_START = "wise_ft needs a run or its checkpoint: other weights do not tell what they started from."


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
