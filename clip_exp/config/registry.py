"""Names in a configuration to code: members of the open groups (towers, losses, tasks), and objects named by `_target_`.

A member is a model of the schema (a subclass of its group's base) in a module that does not import torch, so that a typo is answered
before torch is there. Those of clip_exp are in one package per group. Those of a user stand next to their options: with
`--config-dir DIR`, `model/image=mine` is `DIR/model/image/mine.yaml` and the class in `DIR/model/image/mine.py`.

A configuration may come from a third party, so `_target_` imports only below a module prefix that is allowed;
`CLIP_EXP_ALLOWED_TARGETS` adds prefixes, separated by commas: `export CLIP_EXP_ALLOWED_TARGETS=my_lab.optim`.
"""

import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from clip_exp.errors import ConfigError, nearest

PACKAGES = {  # by group
    "model/image": "clip_exp.models.families",
    "model/text": "clip_exp.models.families",
    "loss": "clip_exp.losses",
    "task": "clip_exp.evaluation.tasks",
}
FOLDERS = "CLIP_EXP_CONFIG_DIR"  # environment variable, which ranks, workers and the jobs of a sweep inherit
OF_A_RUN = ("run.json", "config.yaml", "checkpoints", "manifest.json")


def folders() -> list[Path]:
    """Return the user's folders of options and members."""
    return [Path(path).absolute() for path in os.environ.get(FOLDERS, "").split(os.pathsep) if path]


def add_folder(folder: str | Path) -> None:
    """Let members be found in a user's folder as well, in this process and in those that it starts.

    Raises:
        ConfigError: its path cannot be listed with others.
    """
    path = Path(folder).absolute()
    if os.pathsep in str(path):
        raise ConfigError(
            f"--config-dir {folder}: a path with {os.pathsep!r} cannot be listed with others: rename the folder."
        )
    if path not in folders():
        os.environ[FOLDERS] = os.pathsep.join(map(str, [*folders(), path]))


def load(group: str) -> None:
    """Import the modules that hold the members of a group; importing a member registers it with its group's base.

    A folder that holds a run may be a third party's, so its code is refused.

    Raises:
        ConfigError: a module of the user cannot be imported, or lies in the folder of a run.
    """
    _load_package(PACKAGES[group])
    for folder in folders():
        files = sorted(file for file in (folder / group).glob("*.py") if not file.name.startswith("_"))
        if files and (found := next((name for name in OF_A_RUN if (folder / name).exists()), None)):
            raise ConfigError(
                f"{files[0]} is not run, since {folder} holds a run ({found}): put options and code of your own into another folder."
            )
        for file in files:
            _load_file(group, file)


@cache
def _load_package(package: str) -> None:
    """Import the packages in a package, whose `__init__` has members; other modules have what these share, and may import torch."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if module.ispkg:
            importlib.import_module(module.name)


@cache
def _load_file(group: str, file: Path) -> None:
    # Without dots, and its own for each folder: classes in it can be pickled, and files of one name do not meet.
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


ALLOWED_PREFIXES = ("torch.optim", "timm.optim", "deepspeed.ops", "pytorch_lightning.", "clip_exp.training.")
ALLOWED_VARIABLE = "CLIP_EXP_ALLOWED_TARGETS"


def locate(target: str, where: str) -> Callable[..., Any]:
    """The class or function that `target` names.

    Raises:
        ConfigError: the name is outside the allowed prefixes, or there is nothing of that name.
    """
    module_name, _, name = target.rpartition(".")
    extra = [prefix.strip() for prefix in os.environ.get(ALLOWED_VARIABLE, "").split(",") if prefix.strip()]
    allowed = (*ALLOWED_PREFIXES, *extra)
    if not any(f"{target}.".startswith(f"{prefix.rstrip('.')}.") for prefix in allowed):
        raise ConfigError(
            f"{where}._target_={target} is not below an allowed module ({', '.join(p.rstrip('.') for p in allowed)}); "
            f"to allow your own, put its module into the environment variable {ALLOWED_VARIABLE}."
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
        raise ConfigError(f"{where}._target_={target} is {origin}.{name}, which is outside the allowed modules.")
    return found


def build(target: str, where: str, *args: Any, **kwargs: Any) -> Any:
    """Call what `target` names.

    Raises:
        ConfigError: see `locate`; or an argument that its signature does not have.
    """
    function = locate(target, where)
    parameters = inspect.signature(function).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        unknown = [
            f"{where}.{key} is no argument of {target}: {nearest(key, parameters)}"
            for key in kwargs
            if key not in parameters
        ]
        if unknown:
            raise ConfigError("\n".join(unknown))
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {target} refused its arguments: {error}") from error


def build_extra(nodes: Mapping[str, Any], where: str) -> list[Any]:
    """Return the objects of an `extra` node.

    Raises:
        ConfigError: see `build`.
    """
    return [build(node.target, f"{where}.{name}", **node.arguments) for name, node in nodes.items()]
