"""Lookup of code by names in a configuration: members of the open groups (towers, losses, tasks), and objects named by `_target_`.

A member is a model of the schema, a subclass of its group's base class, in a module that does not import torch. Thus,
typos are reported without waiting for the import of torch. Members of clip_exp are in one package per group. Custom
members are next to their options: with `--config-dir DIR`, `model/image=mine` needs the option
`DIR/model/image/mine.yaml` and the class in `DIR/model/image/mine.py`. Folders in `hydra.searchpath` of the command line
and `config_dir` of the Python API are searched too.

Since a configuration may come from a third party, `_target_` can only name objects in allowed modules.
`CLIP_EXP_ALLOWED_TARGETS` adds module prefixes, separated by commas: `export CLIP_EXP_ALLOWED_TARGETS=my_lab.optim`.
"""

import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from clip_exp.errors import ConfigError, nearest

# Package of the members of each group
PACKAGES = {
    "model/image": "clip_exp.models.families",
    "model/text": "clip_exp.models.families",
    "loss": "clip_exp.losses",
    "task": "clip_exp.evaluation.tasks",
}
# An environment variable, so that ranks, workers and jobs of a sweep inherit it
FOLDERS = "CLIP_EXP_CONFIG_DIR"
# Files with custom members, by the name of the module as which they were imported
_imported: dict[str, Path] = {}
# Files that identify the folder of a run
OF_A_RUN = ("run.json", "config.yaml", "checkpoints", "manifest.json")


def folders() -> list[Path]:
    """Return the user's folders with options and custom members."""
    return [Path(path).absolute() for path in os.environ.get(FOLDERS, "").split(os.pathsep) if path]


def require_folder(folder: str | Path, origin: str) -> None:
    """Raise a ConfigError if a folder does not exist; `origin` is the flag, key or variable that names it."""
    if not Path(folder).is_dir():
        raise ConfigError(f"{origin}: {folder} is not a folder. Give an existing folder.")


def add_folder(folder: str | Path, origin: str) -> None:
    """Add a folder with options and custom members, for this process and its child processes.

    Args:
        folder: path of the folder.
        origin: flag or key that names the folder, for messages.

    Raises:
        ConfigError: the folder does not exist, or its path contains the separator of paths in environment variables.
    """
    require_folder(folder, origin)
    path = Path(folder).absolute()
    if os.pathsep in str(path):
        raise ConfigError(f"{origin}: the path {folder} must not contain {os.pathsep!r}. Rename the folder.")
    if path not in folders():
        os.environ[FOLDERS] = os.pathsep.join(map(str, [*folders(), path]))


@contextmanager
def added(given: str | Path | Sequence[str | Path] | None) -> Iterator[None]:
    """Add the folders of `config_dir` inside the block, for this process and its child processes; see `add_folder`.

    Folders that the block itself adds are removed at its end too.
    """
    before = os.environ.get(FOLDERS)
    try:
        for folder in [given] if isinstance(given, str | Path) else given or ():
            add_folder(folder, "config_dir")
        yield
    finally:
        if os.environ.get(FOLDERS) != before:
            # Members of the removed folders are imported again if a folder is added again.
            _load_file.cache_clear()
            os.environ.pop(FOLDERS, None)
            if before is not None:
                os.environ[FOLDERS] = before


def trace_of_a_run(folder: Path) -> str | None:
    """Return the name of a file or folder that shows that `folder` is a run folder; None if it is not."""
    return next((name for name in OF_A_RUN if (folder / name).exists()), None)


def in_effect(module: str) -> bool:
    """Return False for a module with custom members if its folder is no longer one of the user's folders."""
    file = _imported.get(module)
    return file is None or any(file.is_relative_to(folder) for folder in folders())


def load(group: str) -> None:
    """Import the modules with the members of a group. Importing a member registers it with the base class of its group.

    Code in run folders is not imported, since a run may come from a third party.

    Raises:
        ConfigError: a custom module cannot be imported, or is in a run folder.
    """
    _load_package(PACKAGES[group])
    for folder in folders():
        files = sorted(file for file in (folder / group).glob("*.py") if not file.name.startswith("_"))
        if files and (found := trace_of_a_run(folder)):
            raise ConfigError(
                f"{files[0]} is not imported, since {folder} is a run folder ({found}): move custom options and code to another folder."
            )
        for file in files:
            _load_file(group, file)


@cache
def _load_package(package: str) -> None:
    """Import the subpackages of a package, whose `__init__` defines members. Other modules are not imported, since they may import torch."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if module.ispkg:
            importlib.import_module(module.name)


@cache
def _load_file(group: str, file: Path) -> None:
    # The name has no dots, so that classes can be pickled, and contains a hash of the path, since files may have equal
    # names.
    name = f"clip_exp_custom_{zlib.crc32(str(file).encode()):08x}_{group.replace('/', '_')}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _imported[name] = file
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"{file} cannot be imported ({type(error).__name__}: {error}). Fix it, or remove it."
        ) from error


ALLOWED_PREFIXES = ("torch.optim", "timm.optim", "deepspeed.ops", "pytorch_lightning.", "clip_exp.training.")
ALLOWED_VARIABLE = "CLIP_EXP_ALLOWED_TARGETS"


def locate(target: str, where: str) -> Callable[..., Any]:
    """Return the class or function that `target` names.

    Args:
        target: full name, such as `torch.optim.AdamW`.
        where: key that has the `_target_`, for messages.

    Raises:
        ConfigError: the name is not in an allowed module, or does not exist.
    """
    module_name, _, name = target.rpartition(".")
    extra = [prefix.strip() for prefix in os.environ.get(ALLOWED_VARIABLE, "").split(",") if prefix.strip()]
    allowed = (*ALLOWED_PREFIXES, *extra)
    if not any(f"{target}.".startswith(f"{prefix.rstrip('.')}.") for prefix in allowed):
        raise ConfigError(
            f"{where}._target_={target} is not in an allowed module ({', '.join(p.rstrip('.') for p in allowed)}). "
            f"To allow another module, add it to the environment variable {ALLOWED_VARIABLE}."
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{where}._target_={target} cannot be imported: {error}.") from None
    found = getattr(module, name, None)
    if not callable(found):
        valid = (n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n)))
        raise ConfigError(f"{where}._target_: {module_name} has no {name}: {nearest(name, valid)}")
    origin = getattr(found, "__module__", None) or ""
    if not any(f"{origin}.".startswith(f"{prefix.rstrip('.').split('.')[0]}.") for prefix in allowed):
        raise ConfigError(f"{where}._target_={target} is {origin}.{name}, which is not in an allowed module.")
    return found


def build(target: str, where: str, *args: Any, **kwargs: Any) -> Any:
    """Call the class or function that `target` names.

    Raises:
        ConfigError: see `locate`; an argument is unknown, or the call raises a TypeError or ValueError.
    """
    function = locate(target, where)
    parameters = inspect.signature(function).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        unknown = [
            f"{where}.{key} is not an argument of {target}: {nearest(key, parameters)}"
            for key in kwargs
            if key not in parameters
        ]
        if unknown:
            raise ConfigError("\n".join(unknown))
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {target} rejected its arguments: {error}") from error


def build_extra(nodes: Mapping[str, Any], where: str) -> list[Any]:
    """Build the objects of an `extra` node.

    Raises:
        ConfigError: see `build`.
    """
    return [build(node.target, f"{where}.{name}", **node.arguments) for name, node in nodes.items()]
