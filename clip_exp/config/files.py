"""Configurations in files: `conf/`, and the `config.yaml` of a run, which may be a third party's."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clip_exp.config import registry
from clip_exp.config.base import OWN_FOLDER, Config, parse, plain
from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.config.training import TrainConfig
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.secrets import OPEN_NODES, redact, texts

C = TypeVar("C", bound=Config)
MAX_YAML = 1_000_000  # bytes of a run's configuration, which has ten thousand
PATH_KEYS = {  # last parts of keys whose texts are paths of this machine; `pretrained` has names of its own for what is elsewhere
    "output_dir", "resume", "run", "ckpt", "output", "copy_to", "index", "images", "image", "table", "train", "val", "path", "root",
    "image_root", "ground_truth", "baseline_weights",
}  # fmt: skip
OLDER_KEYS = {"finetune.freeze_towers_steps": "finetune.linear_probe_steps"}  # names in the `config.yaml` of older runs
OLDER_METRICS = {"val/top1": "val/zeroshot_top1", "val/top5": "val/zeroshot_top5"}  # which `monitor` may be
ADDRESS = re.compile(r"[A-Za-z][\w+.:-]*://")


def conf_dir() -> Path:
    """Return the folder `conf/`: inside the package when it was installed from a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(
        f"conf/ is missing: looked in {package / 'conf'} and {package.parent / 'conf'}; reinstall clip_exp."
    )


def options(group: str, *, own: bool = True) -> list[str]:
    """Return the names of a configuration group's options, sorted: `options("model")` -> ["vit_b16", ...].

    Args:
        own: with those in the user's folders.
    """
    folders = [conf_dir(), *(registry.folders() if own else ())]
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def option_file(group: str, option: str) -> Path:
    """Return the file of an option; the user's own comes first, as in a composition."""
    places = [folder / group / f"{option}.yaml" for folder in (*registry.folders(), conf_dir())]
    return next((place for place in places if place.is_file()), places[-1])


def to_yaml(config: Config) -> str:
    """Return the complete configuration as YAML, from which the same configuration is read."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def read_run_config(run_dir: Path | str) -> TrainConfig:
    """Read the configuration that a run folder was made with.

    Raises:
        CheckpointError: the folder or its `config.yaml` is missing, or refers to values of this machine.
        ConfigError: the file has keys or values that this version does not know.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{run_dir} is not a run folder: it has no config.yaml. Give the folder that training printed."
        )
    return _written(TrainConfig, read_yaml(path), str(path))


def read_evaluate_config(folder: Path) -> EvaluateConfig:
    """Read the configuration that an evaluation's folder was made with."""
    path = folder / "config.yaml"
    return _written(EvaluateConfig, read_yaml(path), str(path))


def parse_run_config(text: str, where: str) -> TrainConfig:
    """Parse the text of a run's configuration.

    Args:
        where: place of the text, for messages.

    Raises:
        CheckpointError, ConfigError: see `read_run_config`.
    """
    return _written(TrainConfig, _parse_yaml(text.encode(), where), where)


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


def _written(model: type[C], config: DictConfig, where: str) -> C:
    values: Any = OmegaConf.to_container(config)
    require_literal(values, where)
    if model is TrainConfig:
        _renew(values)
    try:
        return parse(model, values)
    except ConfigError as error:
        if own := [line for line in str(error).splitlines() if OWN_FOLDER in line]:
            raise ConfigError("\n".join(f"{where}: {line}" for line in own)) from None
        raise ConfigError(
            f"{where} does not fit this version of clip_exp: it was written by another one, or edited. Use that version, or start "
            "again: resume=never.\n" + "\n".join(f"  {line}" for line in str(error).splitlines())
        ) from None


def read_yaml(path: Path) -> DictConfig:
    """Read a user-provided YAML file, where it is as large as it looks: with aliases a few lines stand for gigabytes.

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
    """Refuse `${…}` in a third party's file: it may ask for a secret of this machine (`${oc.env:…}`).

    Raises:
        CheckpointError: there is one.
    """
    if isinstance(values, str) and "${" in values:
        raise CheckpointError(
            f"{where}: refused, because it asks for a value of this machine: {values}. Write the value."
        )
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        require_literal(value, where)


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
