"""Which model: found and checked from paths and names, before torch is imported and weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clip_exp.checkpoints import discovery
from clip_exp.checkpoints.writer import EMA_WEIGHTS, MANIFEST, WEIGHTS, sha256
from clip_exp.config.evaluation_schema import SubjectConfig
from clip_exp.config.load import nearest, read_run_config, strict_dataclass
from clip_exp.config.model_schema import ModelConfig
from clip_exp.config.paths import conf_dir, options
from clip_exp.config.schema import TrainConfig
from clip_exp.errors import CheckpointError, ConfigError

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Source:
    """A model's configuration and the file of its weights."""

    model: ModelConfig
    weights: Path
    run: TrainConfig | None = None  # the configuration of the run that trained it
    run_dir: Path | None = None
    step: int | None = None  # completed optimizer steps, where the folder of the weights tells

    def sha256(self) -> str:
        """Hash of the weights file; of a checkpoint, the one in its manifest, which `find_source` has verified."""
        folder = self.weights.parent
        recorded = discovery.manifest(folder)["files"] if (folder / MANIFEST).is_file() else {}
        return recorded[self.weights.name]["sha256"] if self.weights.name in recorded else sha256(self.weights)


def find_source(config: SubjectConfig) -> Source:
    """The model that an evaluation names by `run`, by `ckpt`, or by `model` with `pretrained`.

    Raises:
        ConfigError: none of the three or several; a path that does not exist.
        CheckpointError: a run without a usable checkpoint, or a damaged one.
    """
    model = config.model.name if config.model else None
    values = {"run": config.run, "ckpt": config.ckpt, "model": model, "pretrained": config.pretrained}
    given = {key: value for key, value in values.items() if value is not None}
    if set(given) == {"run"}:
        return source_of_run(Path(given["run"]), config.ema)
    if set(given) == {"ckpt"}:
        return source_of_checkpoint(Path(given["ckpt"]), config.ema)
    if set(given) == {"model", "pretrained"}:
        if config.ema:
            raise ConfigError(
                "ema=true needs run=DIR or ckpt=PATH: a file given by pretrained holds one set of weights."
            )
        assert config.model is not None
        return source_of_file(config.model, given["pretrained"])
    listed = ", ".join(f"{key}={value}" for key, value in given.items()) or "nothing"
    raise ConfigError(f"which model? Give run=DIR, or ckpt=PATH, or model=NAME with pretrained=FILE; given: {listed}.")


def source_of_run(run_dir: Path, ema: bool = False) -> Source:
    """A run's best checkpoint if it has a `monitor`, else its last one.

    Raises:
        ConfigError: no such folder.
        CheckpointError: it is no run folder, or has no usable checkpoint.
    """
    if not run_dir.is_dir():
        raise ConfigError(
            f"run={run_dir}: no such folder. Training prints its run folder: outputs/train/<name>/<time>."
        )
    run = read_run_config(run_dir)
    checkpoint = discovery.best(run_dir) if run.monitor else discovery.latest(run_dir)
    return _of_checkpoint_folder(checkpoint, run, run_dir, ema)


def source_of_checkpoint(path: Path, ema: bool = False) -> Source:
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
    if not (run_dir / CONFIG).is_file():
        raise CheckpointError(
            f"{path} is not in a run folder ({run_dir} has no {CONFIG}), so nothing tells which model it is: "
            f"give model=NAME pretrained={folder / WEIGHTS}."
        )
    if (folder / MANIFEST).is_file() and (problem := discovery.damage(folder)):
        raise CheckpointError(f"{folder} is damaged: {problem}. Give an earlier checkpoint of the run.")
    return _of_checkpoint_folder(folder, read_run_config(run_dir), run_dir, ema or path.name == EMA_WEIGHTS)


def source_of_file(model: ModelConfig, pretrained: str | Path) -> Source:
    """A file of weights for a model that is known by its configuration.

    Raises:
        ConfigError: no such file.
    """
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"pretrained={pretrained} is no file: give a .safetensors or .pt file of weights for model={model.name}."
        )
    return Source(model, path)


def source_of_weights(path: Path) -> Source:
    """A weights file that lies in a run folder's checkpoint, or beside the `config.yaml` of its run.

    Raises:
        ConfigError: neither.
    """
    folder = path.resolve().parent
    if (folder / CONFIG).is_file():
        run = read_run_config(folder)
        return Source(run.model, path, run)
    if path.name in (WEIGHTS, EMA_WEIGHTS) and (folder.parents[1] / CONFIG).is_file():
        return source_of_checkpoint(path)
    raise ConfigError(
        f"{path}: nothing tells which model these weights are of: it is in no run folder and no {CONFIG} is beside it. "
        f'Name the model: load("vit_b32", pretrained="{path}").'
    )


def named_model(name: str) -> ModelConfig:
    """The configuration of a model of `conf/model/`.

    Raises:
        ConfigError: there is none of that name.
    """
    path = conf_dir() / "model" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"there is no model '{name}': {nearest(name, options('model'))}")
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    return strict_dataclass(ModelConfig, values, "model")


def _of_checkpoint_folder(folder: Path, run: TrainConfig, run_dir: Path, ema: bool) -> Source:
    weights = folder / (EMA_WEIGHTS if ema else WEIGHTS)
    if not weights.is_file():
        fix = "it was trained without callbacks=ema; leave out ema=true" if ema else "give another checkpoint"
        raise CheckpointError(f"{folder} has no {weights.name}: {fix}.")
    step = discovery.step_of(folder) if discovery.STEP.search(folder.name) else None
    return Source(run.model, weights, run, run_dir, step)
