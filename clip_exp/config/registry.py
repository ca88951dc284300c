"""Lookup of the members of the open groups (towers, losses, tasks) by the names in a configuration.

A member is a model of the schema, a subclass of its group's base class, in a module that does not import torch. Thus,
typos are reported without waiting for the import of torch. Members of clip_exp are in one package per group. Custom
members are next to their options: with `--config-dir DIR`, `model/image=mine` needs the option
`DIR/model/image/mine.yaml` and the class in `DIR/model/image/mine.py`. Folders in `hydra.searchpath` of the command line
and `config_dir` of the Python API are searched too.
"""

import importlib
import importlib.util
import os
import pkgutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from clip_exp.errors import ConfigError

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
