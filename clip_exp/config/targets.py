"""Objects that a configuration names by `_target_`, in Hydra's form: an importable class or function with its arguments next to it.

A run folder or a checkpoint may come from a third party, and creating an object runs code. So `_target_` may name an
object of a built-in module, or one that the user allowed: by typing it in a command, with the key `allow_targets`, or
with the environment variable `CLIP_EXP_ALLOWED_TARGETS`, which child processes inherit.

`problems` checks names and arguments before anything is created, and `instantiate` creates an object.
"""

import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from clip_exp.config import objects, registry
from clip_exp.config.base import Config, Target, nested, plain
from clip_exp.errors import ClipExpError, ConfigError, nearest

# Modules whose public classes run no command and load no file when they are created. Loggers write to the folder or server
# that their arguments name.
BUILT_IN = (
    "torch.optim", "torch.nn", "torchvision.transforms", "timm.optim", "deepspeed.ops.adam", "deepspeed.ops.lion",
    "deepspeed.ops.lamb", "deepspeed.ops.adagrad", "pytorch_lightning.callbacks", "pytorch_lightning.loggers",
    "clip_exp.training.schedule",
)  # fmt: skip
# Those whose functions are built in too. The others have functions that import a module or run a program by name.
FUNCTIONS = ("torchvision.transforms", "clip_exp.training.schedule")
# Packages that also have functions which run any code
LIBRARIES = {*sys.stdlib_module_names, *(place.partition(".")[0] for place in BUILT_IN)}
_CLASS, _FUNCTION = re.compile(r"([a-z]\w*\.)+[A-Z]\w*"), re.compile(r"([a-z]\w*\.)+[a-z]\w*")
# Environment variable with the names of allowed modules or objects, separated by commas
ALLOWED = "CLIP_EXP_ALLOWED_TARGETS"
TARGET = "_target_"
# Value of `${total_steps}`, which becomes the number of optimizer steps when the scheduler is created
TOTAL_STEPS = "total_steps"
PACKAGE, STDLIB = Path(__file__).resolve().parents[1], sysconfig.get_path("stdlib")
# Hydra's keys, which are not arguments
RESERVED = {TARGET, "_args_", "_partial_", "_recursive_", "_convert_"}


# -------------------------------------------------------------------------------------------------------------- trust


class TargetNotAllowedError(ConfigError):
    """Error raised for a `_target_` outside the built-in modules that comes from a file and was not allowed.

    Attributes:
        packages: value of `allow_targets` that allows it.
    """

    def __init__(self, message: str, packages: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.packages = packages


def allow(names: Iterable[str]) -> None:
    """Allow objects, or all objects of modules, as `_target_`, in this process and its child processes."""
    os.environ[ALLOWED] = ",".join(dict.fromkeys([*_allowed(), *names]))


@contextmanager
def allowed(names: Iterable[str]) -> Iterator[None]:
    """Allow objects or modules as `allow` does, in the block only."""
    before = os.environ.get(ALLOWED)
    allow(names)
    try:
        yield
    finally:
        if before is None:
            del os.environ[ALLOWED]
        else:
            os.environ[ALLOWED] = before


def is_allowed(target: str) -> bool:
    """Return True if an object is built in, or was allowed."""
    return is_built_in(target) or _is_in(target, _allowed())


def is_built_in(target: str) -> bool:
    """Return True for the name of a public class, or of some functions, of a built-in module."""
    places = BUILT_IN if _CLASS.fullmatch(target) else FUNCTIONS if _FUNCTION.fullmatch(target) else ()
    return _is_in(target, places)


def targets_of(values: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Yield the full key of every node with a `_target_` that can be imported in plain values, and the name of its object."""
    if isinstance(values, dict):
        if isinstance(target := values.get(TARGET), str) and not objects.is_object(target):
            yield at, target
        for key, value in values.items():
            yield from targets_of(value, f"{at}.{key}".removeprefix("."))
    elif isinstance(values, list):
        for i, value in enumerate(values):
            yield from targets_of(value, f"{at}[{i}]")


def custom_packages(values: Any) -> list[str]:
    """Return the value of `allow_targets` that allows all objects that plain values name: packages without built-in modules."""
    return _packages(target for _, target in targets_of(plain(values)) if not is_built_in(target))


def require_allowed(values: Any, where: str) -> None:
    """Check that all objects that a file names are allowed.

    Args:
        values: configuration, or plain values.
        where: file that the values come from.

    Raises:
        TargetNotAllowedError: an object is not allowed.
    """
    if refused := {at: target for at, target in targets_of(plain(values)) if not is_allowed(target)}:
        raise _not_allowed(f"{where} names custom code", refused)


def _not_allowed(what: str, refused: dict[str, str]) -> TargetNotAllowedError:
    packages = _packages(refused.values())
    named = ", ".join(f"{at}.{TARGET}={target}" for at, target in refused.items())
    return TargetNotAllowedError(
        f"{what}, which runs only if it is allowed: {named}. If you trust this code, set allow_targets=[{','.join(packages)}], "
        f"or the environment variable {ALLOWED}={','.join(packages)}.",
        packages,
    )


def _packages(names: Iterable[str]) -> list[str]:
    """Return the packages of objects; full names for those of Python and of libraries, which have functions that run any code."""
    return sorted({name if (package := name.partition(".")[0]) in LIBRARIES else package for name in names})


def _allowed() -> list[str]:
    return [name for part in os.environ.get(ALLOWED, "").split(",") if (name := part.strip().rstrip("."))]


def _is_in(name: str, places: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{place}.") for place in places)


# ------------------------------------------------------------------------------------------------------------- checks


def problems(config: Config) -> Iterator[str]:
    """Yield an error message for every name that cannot be imported and every argument that its object does not take.

    Nothing is created, but the modules of the objects are imported.
    """
    for each, prefix in nested(config, ""):
        if isinstance(each, Target):
            yield from _problems_of(each.node, prefix.removesuffix("."), each.supplied, each.optional)


def _problems_of(node: dict[str, Any], where: str, supplied: int = 0, optional: Iterable[str] = ()) -> Iterator[str]:
    try:
        found = locate(str(node[TARGET]), where)
    except ConfigError as error:
        yield str(error)
    else:
        yield from _argument_problems(found, node, where, supplied, optional)
    for key, value in node.items():
        for at, inner in _nodes(value, f"{where}.{key}"):
            yield from _problems_of(inner, at)


def _nodes(values: Any, at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the outermost nodes with a `_target_`."""
    if isinstance(values, dict) and TARGET in values:
        yield at, values
    elif isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield from _nodes(value, f"{at}[{key}]" if isinstance(values, list) else f"{at}.{key}")


def _argument_problems(
    found: Callable[..., Any], node: dict[str, Any], where: str, supplied: int, optional: Iterable[str]
) -> Iterator[str]:
    parameters = parameters_of(found)
    if parameters is None:
        return
    target, given = node[TARGET], [key for key in node if key not in RESERVED]
    named = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in given:
            if key not in named:
                hint = nearest(key, named) if named else "it has no arguments, so leave this out."
                yield f"{where}.{key} is not an argument of {target}: {hint}"
    if not inspect.isclass(found) or node.get("_partial_"):
        return
    positional = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    args = node.get("_args_")
    known = {*given, *positional[: supplied + (len(args) if isinstance(args, list) else 0)], *optional}
    required = [name for name in named if parameters[name].default is inspect.Parameter.empty]
    for name in (name for name in parameters if name in required and name not in known):
        yield f"{where}.{name} has no value, but {target} requires it: set it ({where}.{name}=…)."


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a class or function by name; None if they are unknown, as those of some built-in functions."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------------------ objects


def locate(target: str, where: str) -> Callable[..., Any]:
    """Return the class or function that `target` names.

    The current folder and the parents of the user's configuration folders are searched last.

    Args:
        target: full name, such as `torch.optim.AdamW` or `mine.Pairs`.
        where: key that has the `_target_`, for messages.

    Raises:
        ConfigError: the object is not allowed, does not exist, or its module cannot be imported.
    """
    if objects.is_object(target):
        return objects.factory(target, where)
    if not is_allowed(target):
        raise _not_allowed("this is custom code", {where: target})
    found, names = _import(target, where)
    for name in names:
        if not hasattr(found, name):
            valid = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            hint = nearest(name, valid) if valid else "it has no classes or functions."
            # An installed module may have the name of the user's, and is found first.
            file = getattr(found, "__file__", None)
            file = None if is_built_in(target) or file is None or not _is_library(file) else file
            place = getattr(found, "__name__", type(found).__name__) + (f" ({file})" if file else "")
            raise ConfigError(f"{where}.{TARGET}={target}: {place} has no {name}: {hint}")
        found = getattr(found, name)
        if inspect.ismodule(found):
            _require_origin(target, where, found.__name__, with_package=False)
    if not callable(found):
        raise ConfigError(f"{where}.{TARGET}={target} is not a class or function: name one of this module.")
    if is_built_in(target) or inspect.isclass(found) or inspect.isroutine(found):
        _require_origin(target, where, getattr(found, "__module__", None) or "", with_package=True)
    return found


def _require_origin(target: str, where: str, module: str, *, with_package: bool) -> None:
    """Raise a ConfigError if a name leads to the code of another module, which an allowed one has imported: `mine.os.system`.

    Args:
        target: the name. If it was allowed itself, not only its package, it may lead anywhere.
        where: its key, for messages.
        module: module of the code.
        with_package: whether a package allows what it imported from others, as `open_clip.ClipLoss`; not from Python's library
            and from those with built-in modules, which have functions that run any code.
    """
    if is_built_in(target):
        permitted = _is_in(module, BUILT_IN)
    else:
        permitted = target in _allowed() or _is_in(module, (*BUILT_IN, *_allowed()))
        permitted = permitted or (with_package and module.partition(".")[0] not in LIBRARIES)
    if not permitted:
        raise ConfigError(
            f"{where}.{TARGET}={target} is code of {module or 'Python'}, which is not an allowed module: name it by its own module."
        )


def instantiate(
    node: Target | dict[str, Any], where: str, *args: Any, optional: Mapping[str, Any] | None = None, **kwargs: Any
) -> Any:
    """Create the object of a node, or call its function, as `hydra.utils.instantiate` does.

    With `_partial_: true` and without arguments of clip_exp, the result is a function that takes the missing arguments.

    Args:
        node: `_target_` and arguments.
        where: full key of the node, for messages.
        *args: positional arguments, before those of `_args_`.
        optional: arguments that are passed if the object has parameters of these names, and the node does not set them.
        **kwargs: further arguments.

    Raises:
        ConfigError: the object is not allowed or does not exist, or creating it fails.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as create

    values = node.node if isinstance(node, Target) else node
    if objects.is_object(str(values[TARGET])):
        return objects.factory(values[TARGET], where)()
    located = _located(values, where)
    found = located[TARGET]
    try:
        # Hydra copies the arguments that it is given, so it only creates those of the node.
        own = create({**located, "_partial_": True}, _convert_="all")
        taken = [*(parameters_of(found) or {})][len(args) + len(own.args) :]
        passed = {key: value for key, value in (optional or {}).items() if key in taken and key not in values} | kwargs
        if values.get("_partial_") and not args and not passed:
            return partial(found, *own.args, **own.keywords)
        return found(*args, *own.args, **passed, **own.keywords)
    except MemoryError:
        raise
    except ClipExpError as error:
        # Raised by clip_exp for the user's object, for example for a model that it loads: name the key of the object.
        if not str(error).startswith(where):
            error.args = (f"{where}: {error}",)
        raise
    except InstantiationException as error:
        why = failure(error.__cause__) if error.__cause__ is not None else " ".join(str(error).split())
        raise ConfigError(f"{where}: {why}") from error
    except Exception as error:
        raise ConfigError(f"{where}: {values[TARGET]} could not be created: {failure(error)}") from error


def _located(values: Any, where: str) -> Any:
    """Return plain values with objects instead of the names of `_target_`, so that Hydra creates exactly what was checked.

    Hydra finds names in another way, and would resolve an interpolation here, which may yield another `_target_`.
    """
    if isinstance(values, dict):
        found = {key: _located(value, f"{where}.{key}") for key, value in values.items()}
        return found | {TARGET: locate(str(values[TARGET]), where)} if TARGET in values else found
    if isinstance(values, list):
        return [_located(value, f"{where}[{i}]") for i, value in enumerate(values)]
    if isinstance(values, str) and "${" in values:
        raise ConfigError(f"{where}={values} has an interpolation that was not resolved: write the value instead.")
    return values


def build_extra(nodes: Mapping[str, Target], where: str) -> list[Any]:
    """Create the objects of an `extra` node.

    Raises:
        ConfigError: see `instantiate`.
    """
    return [instantiate(node, f"{where}.{name}") for name, node in nodes.items()]


def _import(target: str, where: str) -> tuple[Any, list[str]]:
    """Import the longest prefix of a name that is a module; return it and the rest of the name."""
    parts = target.split(".")
    # A folder of the user must not supply a built-in module that is not installed.
    for searched in (False,) if is_built_in(target) else (False, True):
        if searched:
            sys.path += [path for path in _user_folders() if path not in sys.path]
            importlib.invalidate_caches()
        for length in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:length])
            try:
                return importlib.import_module(module), parts[length:]
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                    raise _not_importable(where, target, module, error) from error
            except Exception as error:
                raise _not_importable(where, target, module, error) from error
    missing = parts[0] if len(parts) > 1 else target
    fix = "write module.name" if len(parts) == 1 else f"{missing}.py is searched in the current folder, {os.getcwd()}"
    install = f" To install a package of this name: pip install {missing}." if len(parts) > 1 else ""
    raise ConfigError(
        f"{where}.{TARGET}={target}: there is no module {missing}. Check the name: {fix}, the parent of --config-dir, and Python's "
        f"own path (PYTHONPATH).{install}"
    )


def _not_importable(where: str, target: str, module: str, error: BaseException) -> ConfigError:
    return ConfigError(f"{where}.{TARGET}={target}: {module} cannot be imported: {failure(error)}")


def _user_folders() -> list[str]:
    return [os.getcwd(), *(str(folder.parent) for folder in registry.folders())]


def failure(error: BaseException) -> str:
    """Return the type and message of an error of a user's code, with the line that raised it, as a sentence."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    line = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}{line}." if text else f"{type(error).__name__}{line}."


def _is_library(file: str) -> bool:
    return file.startswith(("<frozen", STDLIB)) or "site-packages" in file or Path(file).is_relative_to(PACKAGE)
