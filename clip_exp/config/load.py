"""From what Hydra composed, or a run folder holds, to typed dataclasses; strict about every key.

Hydra already refuses a wrong key or type in YAML and in overrides, because the schema is the first entry of the defaults list.
It does not refuse `+key=…`, and cannot type a node whose class depends on its contents (`optimizer`, tasks): that is done here.
"""

import dataclasses
import difflib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from clip_exp.config.check_schema import CheckDataConfig
from clip_exp.config.environment import secrets_refused
from clip_exp.config.evaluation_schema import EvaluateConfig
from clip_exp.config.schema import (
    AdamConfig,
    CustomOptimizerConfig,
    LionConfig,
    OptimizerConfig,
    SGDConfig,
    TrainConfig,
)
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.secrets import OPEN_NODES, redact, texts

T = TypeVar("T")
MAX_YAML = 1_000_000  # bytes of a run's configuration, which has ten thousand

OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "torch.optim.AdamW": AdamConfig,
    "torch.optim.Adam": AdamConfig,
    "torch.optim.SGD": SGDConfig,
    "timm.optim.Lion": LionConfig,
}
DEFAULT_EPOCHS = 30.0
PATH_KEYS = {  # last parts of keys whose texts are paths of this machine; `pretrained` has names of its own for what is elsewhere
    "output_dir", "resume", "run", "ckpt", "output", "copy_to", "index", "images", "image", "table", "train", "val", "path", "root",
    "image_root", "ground_truth", "baseline_weights",
}  # fmt: skip
ADDRESS = re.compile(r"[A-Za-z][\w+.:-]*://")
EXPLAINED = {  # keys of other frameworks that have no counterpart of the same meaning
    "accumulate_grad_batches": (
        "a contrastive loss would not see more negatives. Raise global_batch_size and set micro_batch_size: the same memory, "
        "the gradient of the whole batch."
    ),
}


def nearest(name: str, valid: Iterable[str]) -> str:
    """A sentence that helps after a typo: the closest valid name, or all of them where none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(names)}."


def unknown_key(key: str, valid: Iterable[str]) -> str:
    """Return a sentence for a key that does not exist: what to use in its place, or the nearest valid one.

    Args:
        key: the full key.
        valid: names next to it.
    """
    name = key.rpartition(".")[2]
    return f"{key} does not exist: {EXPLAINED.get(name) or nearest(name, valid)}"


def strict_dataclass(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Turn a plain mapping into the dataclass `cls`.

    Args:
        where: the key that the mapping stands at, for messages; empty for the whole configuration.

    Raises:
        ConfigError: keys that `cls` does not have, a line each; or a value that is missing or of the wrong type.
    """
    prefix = f"{where}." if where else ""
    if unknown := list(_unknown_keys(values, cls, prefix)):
        raise ConfigError("\n".join(unknown))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        key = f"{prefix}{error.full_key or error.key}"
        raise ConfigError(f"{key} has no value: set it ({key}=…).") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{prefix}{error.full_key or error.key}: {str(error).splitlines()[0]}") from None


def load_train(config: DictConfig) -> TrainConfig:
    """The typed configuration of a training run, every default written out.

    Raises:
        ConfigError: unknown keys, missing values, wrong types; all that were found, a line each.
    """
    loaded = strict_dataclass(TrainConfig, _local(_resolve(config)))
    loaded.optimizer = _optimizer(loaded.optimizer or {})
    if loaded.max_steps is None and loaded.epochs is None:
        loaded.epochs = DEFAULT_EPOCHS
    return loaded


def load_evaluate(config: DictConfig) -> EvaluateConfig:
    """The typed configuration of an evaluation; its tasks stay mappings, which `evaluation.tasks` types and finds complete."""
    values = _local(_resolve(config, throw_on_missing=False))
    tasks = values.pop("task", {})
    loaded = strict_dataclass(EvaluateConfig, values)
    loaded.task = tasks or {}
    return loaded


def load_use(config: DictConfig, cls: type[T]) -> T:
    """The typed configuration of predict, rank, search or export."""
    return strict_dataclass(cls, _local(_resolve(config)))


def read_run_config(run_dir: Path | str) -> TrainConfig:
    """The configuration that a run folder was made with.

    Raises:
        CheckpointError: the folder or its `config.yaml` is missing, or refers to values of this machine.
        ConfigError: the file has keys or values that this version does not know.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{run_dir} is not a run folder: it has no config.yaml. Give the folder that training printed."
        )
    return _run_config(read_yaml(path), str(path))


def parse_run_config(text: str, where: str) -> TrainConfig:
    """Parse the text of a run's configuration.

    Args:
        where: place of the text, for messages.

    Raises:
        CheckpointError, ConfigError: see `read_run_config`.
    """
    return _run_config(_parse_yaml(text.encode(), where), where)


def _run_config(config: DictConfig, where: str) -> TrainConfig:
    require_literal(OmegaConf.to_container(config), where)
    return load_train(_without_retired(config))


def _without_retired(config: DictConfig) -> DictConfig:
    """Read keys of older runs as they were meant: their folders stay readable."""
    trainer, logger = config.get("trainer"), config.get("logger")
    if isinstance(trainer, DictConfig):
        trainer.pop("accumulate_grad_batches", None)  # was always 1
    if isinstance(logger, DictConfig) and not isinstance(logger.get("tensorboard"), bool):
        logger["tensorboard"] = logger.get("tensorboard") is not None  # was a node of its own, or null
    return config


def read_yaml(path: Path) -> DictConfig:
    """Somebody's file of YAML, where it is as large as it looks: with aliases a few lines stand for gigabytes.

    Raises:
        CheckpointError: it is larger than any configuration, is no mapping, or is not YAML.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    return _parse_yaml(text, str(path))


def _parse_yaml(text: bytes, where: str) -> DictConfig:
    problem = "it is no mapping of keys"
    try:
        if len(text) > MAX_YAML:
            problem = f"it has {len(text):,} bytes, where a configuration has thousands"
        elif any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            problem = "it has aliases (*name), which no configuration of ours needs"
        elif isinstance(config := OmegaConf.load(io.BytesIO(text)), DictConfig):
            return config
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
    raise CheckpointError(f"{where}: refused, because {problem}. Give the folder as it was written.")


def require_literal(values: Any, where: str) -> None:
    """Refuse `${…}` in what a file of somebody's says: it may ask for a secret of this machine (`${oc.env:…}`).

    Raises:
        CheckpointError: there is one.
    """
    if isinstance(values, str) and "${" in values:
        raise CheckpointError(
            f"{where}: refused, because it asks for a value of this machine: {values}. Write the value."
        )
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        require_literal(value, where)


def read_evaluate_config(folder: Path) -> EvaluateConfig:
    """The configuration that an evaluation's folder was made with."""
    return load_evaluate(read_yaml(folder / "config.yaml"))


def to_yaml(config: TrainConfig | EvaluateConfig | CheckDataConfig) -> str:
    """The complete configuration as YAML that `read_run_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def plain(value: Any) -> Any:
    """Dataclasses and enumerations as the mappings and texts that YAML and JSON have."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.value if hasattr(value, "value") else value


def _resolve(config: DictConfig, throw_on_missing: bool = True) -> dict[str, Any]:
    try:
        with secrets_refused():
            return OmegaConf.to_container(config, resolve=True, throw_on_missing=throw_on_missing, enum_to_str=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
            missing = sorted(_missing_keys(OmegaConf.to_container(config)))
            raise ConfigError("\n".join(f"{key} has no value: set it ({key}=…)." for key in missing)) from None
        if (refusal := from_resolver(error)) is not None:
            raise refusal from None
        raise ConfigError(f"{error.full_key or error.key}: {str(error).splitlines()[0]}") from None


def _local(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration whose paths are of this machine.

    Raises:
        ConfigError: some are addresses (s3://bucket/folder), a line each.
    """
    if problems := list(addresses(values)):
        raise ConfigError("\n".join(problems))
    return values


def addresses(values: Any, below: str = "") -> Iterator[str]:
    """Yield a sentence for every path in a configuration, or a part of it, that is an address.

    Args:
        values, below: see `texts`, where `below` is `key`.
    """
    for key, value in texts(values, below):
        if not ADDRESS.match(value) or not _is_path_key(key):
            continue
        local = value.removeprefix("file://") if value.startswith("file:///") else "/local/path"
        yield (
            f"{key}={redact(value)} is an address, and only local files are read and written: download or mount what is there, and "
            f"give {key}={local}."
        )


def _is_path_key(key: str) -> bool:
    return key.rpartition(".")[2] in PATH_KEYS and not key.startswith(OPEN_NODES)  # where classes of others take them


def from_resolver(error: BaseException | None) -> ConfigError | None:
    """Return the error of a resolver of ours (`config.open_clip`, `config.environment`), which OmegaConf wraps."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def _missing_keys(values: Any, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _missing_keys(value, f"{prefix}{key}.")
        elif value == MISSING:
            yield f"{prefix}{key}"


def _unknown_keys(values: dict[str, Any], cls: type, prefix: str) -> Iterator[str]:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            yield unknown_key(f"{prefix}{key}", fields)
        elif isinstance(value, dict) and (nested := _dataclass_of(fields[key].type)):
            yield from _unknown_keys(value, nested, f"{prefix}{key}.")


def _dataclass_of(annotation: Any) -> type | None:
    candidates = getattr(annotation, "__args__", None) or (annotation,)
    return next((cls for cls in candidates if dataclasses.is_dataclass(cls)), None)  # type: ignore[return-value]


def _optimizer(values: dict[str, Any]) -> OptimizerConfig:
    if "_target_" not in values:
        raise ConfigError("optimizer._target_ has no value: choose an option (optimizer=adamw) or name a class.")
    return strict_dataclass(OPTIMIZERS.get(values["_target_"], CustomOptimizerConfig), values, "optimizer")
