"""Objects named by `_target_`: only for the open extension points (optimizer, scheduler, callbacks, loggers).

A configuration is data and may come from somebody else, so a name is imported only below a module prefix that is allowed.
`CLIP_EXP_ALLOWED_TARGETS` adds prefixes, separated by commas: `export CLIP_EXP_ALLOWED_TARGETS=my_lab.optim`.
"""

import inspect
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from clip_exp.config.base import Target, nearest
from clip_exp.errors import ConfigError

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
        module = import_module(module_name)
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


def build_extra(nodes: dict[str, Target], where: str) -> list[Any]:
    """Return the objects of an `extra` node.

    Raises:
        ConfigError: see `build`.
    """
    return [build(node.target, f"{where}.{name}", **node.arguments) for name, node in nodes.items()]
