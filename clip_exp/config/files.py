"""Configuration files: `conf/`, and `config.yaml` in run folders, which may come from a third party."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clip_exp.config import registry
from clip_exp.config.base import CONFIG_DIR_HINT, Config, parse, plain
from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.config.targets import require_allowed
from clip_exp.config.training import TrainConfig
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.secrets import OPEN_NODES, redact, texts

C = TypeVar("C", bound=Config)
# Maximum size in bytes of a run's configuration, which usually has about 10,000
MAX_YAML = 1_000_000
# Last parts of keys whose values are local paths. `pretrained` is none of them: it also accepts names of remote weights.
PATH_KEYS = {
    "output_dir", "resume", "run", "ckpt", "output", "copy_to", "index", "images", "image", "table", "train", "val", "path", "root",
    "image_root", "ground_truth", "baseline_weights",
}  # fmt: skip
OLDER_KEYS = {"finetune.freeze_towers_steps": "finetune.linear_probe_steps"}  # names in the `config.yaml` of older runs
OLDER_METRICS = {"val/top1": "val/zeroshot_top1", "val/top5": "val/zeroshot_top5"}  # which `monitor` may be
ADDRESS = re.compile(r"[A-Za-z][\w+.:-]*://")


def conf_dir() -> Path:
    """Return the folder `conf/`: inside the package if it was installed from a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"conf/ not found in {package / 'conf'} and {package.parent / 'conf'}: reinstall clip_exp.")


def options(group: str, *, custom: bool = True) -> list[str]:
    """Return the sorted names of a configuration group's options: `options("model")` -> ["vit_b16", ...].

    Args:
        group: name of the group, such as `model/image`.
        custom: include options in the user's folders.
    """
    folders = [conf_dir(), *(registry.folders() if custom else ())]
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def option_file(group: str, option: str) -> Path:
    """Return the file of an option; `conf/` takes precedence over the user's folders, as in a composition."""
    places = [folder / group / f"{option}.yaml" for folder in (conf_dir(), *registry.folders())]
    return next((place for place in places if place.is_file()), places[0])


def to_yaml(config: Config) -> str:
    """Return the complete configuration as YAML; parsing it gives an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def read_run_config(run_dir: Path | str, *, check_targets: bool = True) -> TrainConfig:
    """Read the configuration of a run.

    Args:
        run_dir: run folder.
        check_targets: require that custom code is allowed. False: the caller only compares the configuration.

    Raises:
        CheckpointError: the folder or its `config.yaml` is missing, or the file has interpolations.
        ConfigError: the file has keys or values that this version does not support.
        TargetNotAllowedError: the file names custom code that is not allowed.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{run_dir} is not a run folder: it has no config.yaml. Give the folder that training printed at its start."
        )
    config = _parse_saved(TrainConfig, read_yaml(path), str(path))
    if check_targets:
        require_allowed(config, str(path))
    return config


def read_evaluate_config(folder: Path) -> EvaluateConfig:
    """Read the configuration of an evaluation from its folder."""
    path = folder / "config.yaml"
    config = _parse_saved(EvaluateConfig, read_yaml(path), str(path))
    require_allowed(config, str(path))
    return config


def parse_run_config(text: str, where: str) -> TrainConfig:
    """Parse the text of a run's configuration.

    Args:
        text: content of a `config.yaml`.
        where: location of the text, for messages.

    Raises:
        CheckpointError, ConfigError: see `read_run_config`.
    """
    return _parse_saved(TrainConfig, _parse_yaml(text.encode(), where), where)


def older_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return flat values of a training run, by dotted key, with the names that older versions gave to keys and metrics."""
    older = {OLDER_KEYS.get(key, key): value for key, value in values.items()}
    if older.get("monitor") in OLDER_METRICS:
        older["monitor"] = OLDER_METRICS[older["monitor"]]
    return older


def _renew(values: dict[str, Any]) -> None:
    """Replace the names that older versions gave to keys and metrics, in the configuration of a training run."""
    for key, older in OLDER_KEYS.items():
        *path, name = key.split(".")
        part: Any = values
        for step in path:
            part = part.get(step) if isinstance(part, dict) else None
        if isinstance(part, dict) and (former := older.rpartition(".")[2]) in part:
            part.setdefault(name, part.pop(former))
    for metric, older in OLDER_METRICS.items():
        if values.get("monitor") == older:
            values["monitor"] = metric
    for group in ("optimizer", "scheduler"):
        if isinstance(part := values.get(group), dict):
            part.update(part.pop("kwargs", None) or {})


def _parse_saved(model: type[C], config: DictConfig, where: str) -> C:
    values: Any = OmegaConf.to_container(config)
    require_literal(values, where)
    if model is TrainConfig:
        _renew(values)
    try:
        return parse(model, values)
    except ConfigError as error:
        if custom := [line for line in str(error).splitlines() if CONFIG_DIR_HINT in line]:
            raise ConfigError("\n".join(f"{where}: {line}" for line in custom)) from None
        raise ConfigError(
            f"{where} does not fit this version of clip_exp: it was written by another version, or edited. Use that version, or "
            "start a new run with resume=never.\n" + "\n".join(f"  {line}" for line in str(error).splitlines())
        ) from None


def read_yaml(path: Path) -> DictConfig:
    """Read a user-provided YAML file.

    Aliases are refused, since with them a few lines can expand to gigabytes.

    Raises:
        CheckpointError: the file cannot be read, is too large, has aliases, is not YAML, or is not a mapping.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    return _parse_yaml(text, str(path))


def _parse_yaml(text: bytes, where: str) -> DictConfig:
    problem = "it is not a mapping"
    try:
        if len(text) > MAX_YAML:
            problem = f"it has {len(text):,} bytes, and at most {MAX_YAML:,} are allowed"
        elif any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            problem = "it has aliases (*name), which are not allowed"
        elif isinstance(config := OmegaConf.load(io.BytesIO(text)), DictConfig):
            return config
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
    raise CheckpointError(f"{where} is not a valid configuration: {problem}. Give the folder as training wrote it.")


def require_literal(values: Any, where: str) -> None:
    """Check that a user-provided file has no interpolations `${…}`, which could read secrets of this machine (`${oc.env:…}`).

    Raises:
        CheckpointError: a value has an interpolation.
    """
    if isinstance(values, str) and "${" in values:
        raise CheckpointError(
            f"{where}: interpolations are not allowed in a user-provided configuration: {values}. Write the value instead."
        )
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        require_literal(value, where)


def addresses(values: Any, key: str = "") -> Iterator[str]:
    """Yield an error message for every URL that a configuration has instead of a local path.

    Args:
        values: configuration, or a part of it, as plain values.
        key: full key of `values`; empty for a whole configuration.
    """
    for full_key, value in texts(values, key):
        if not ADDRESS.match(value) or not _is_path_key(full_key):
            continue
        local = value.removeprefix("file://") if value.startswith("file:///") else "/local/path"
        yield (
            f"{full_key}={redact(value)} is a URL, but only local paths are supported: download or mount the files, and "
            f"set {full_key}={local}."
        )


def _is_path_key(key: str) -> bool:
    # In open nodes, a class of another library may accept a URL.
    return key.rpartition(".")[2] in PATH_KEYS and not key.startswith(OPEN_NODES)
