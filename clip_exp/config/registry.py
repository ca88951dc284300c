"""Where the members of the open groups are: towers, losses and tasks, each declared beside its code, and found here by its name alone.

A member is a model of the schema (a subclass of its group's base) in a module that does not import torch, so that a typo is answered
before torch is there. Those of clip_exp are in one package per group. Those of a user stand next to their options: with
`--config-dir DIR`, `model/image=mine` is `DIR/model/image/mine.yaml` and the class in `DIR/model/image/mine.py`.
"""

import importlib
import importlib.util
import os
import pkgutil
import sys
from functools import cache
from pathlib import Path

from clip_exp.errors import ConfigError

PACKAGES = {  # by group
    "model/image": "clip_exp.models.families",
    "model/text": "clip_exp.models.families",
    "loss": "clip_exp.losses",
    "task": "clip_exp.evaluation.tasks",
}
FOLDERS = "CLIP_EXP_CONFIG_DIR"  # environment variable, which ranks, workers and the jobs of a sweep inherit
RUN_FILES = ("run.json", "manifest.json")  # of folders that hold results: nothing of a run is executed


def add_folder(folder: str | Path) -> None:
    """Let members be found in a user's configuration folder as well, in this process and in those that it starts."""
    known = [path for path in os.environ.get(FOLDERS, "").split(os.pathsep) if path]
    if (path := str(Path(folder).absolute())) not in known:
        os.environ[FOLDERS] = os.pathsep.join([*known, path])


def load(group: str) -> None:
    """Import the modules that hold the members of a group; importing a member registers it with its group's base.

    Raises:
        ConfigError: a module of the user cannot be imported.
    """
    _load_package(PACKAGES[group])
    for folder in filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)):
        if not any((Path(folder) / name).exists() for name in RUN_FILES):
            for file in sorted((Path(folder) / group).glob("*.py")):
                _load_file(group, file)


@cache
def _load_package(package: str) -> None:
    """Import the packages in a package, whose `__init__` has members; other modules have what these share, and may import torch."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if module.ispkg:
            importlib.import_module(module.name)


@cache
def _load_file(group: str, file: Path) -> None:
    name = f"clip_exp_custom.{group.replace('/', '.')}.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can be pickled
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"{file} cannot be imported ({type(error).__name__}: {error}). Fix it, or remove it."
        ) from error
