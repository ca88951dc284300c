"""Lookup of the members of the open groups (towers, losses, tasks) by the names in a configuration.

A member is a model of the schema, a subclass of its group's base class, in a module that does not import torch. Thus,
typos are reported without waiting for the import of torch. Members of clip_exp are in one package per group. Custom
members are next to their options: with `--config-dir DIR`, `model/image=mine` needs the option
`DIR/model/image/mine.yaml` and the class in `DIR/model/image/mine.py`.
"""

import importlib
import importlib.util
import os
import pkgutil
import sys
import zlib
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
# Files that identify the folder of a run
OF_A_RUN = ("run.json", "config.yaml", "checkpoints", "manifest.json")


def folders() -> list[Path]:
    """Return the user's folders with options and custom members."""
    return [Path(path).absolute() for path in os.environ.get(FOLDERS, "").split(os.pathsep) if path]


def add_folder(folder: str | Path) -> None:
    """Add a folder with options and custom members, for this process and its child processes.

    Raises:
        ConfigError: the path contains the separator of paths in environment variables.
    """
    path = Path(folder).absolute()
    if os.pathsep in str(path):
        raise ConfigError(f"--config-dir {folder}: the path must not contain {os.pathsep!r}. Rename the folder.")
    if path not in folders():
        os.environ[FOLDERS] = os.pathsep.join(map(str, [*folders(), path]))


def load(group: str) -> None:
    """Import the modules with the members of a group. Importing a member registers it with the base class of its group.

    Code in run folders is not imported, since a run may come from a third party.

    Raises:
        ConfigError: a custom module cannot be imported, or is in a run folder.
    """
    _load_package(PACKAGES[group])
    for folder in folders():
        files = sorted(file for file in (folder / group).glob("*.py") if not file.name.startswith("_"))
        if files and (found := next((name for name in OF_A_RUN if (folder / name).exists()), None)):
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
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"{file} cannot be imported ({type(error).__name__}: {error}). Fix it, or remove it."
        ) from error
