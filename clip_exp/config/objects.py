"""Objects of this Python process as parts of a configuration: a data set, loss, transform or tower that was passed to the Python API.

A configuration contains the name of an object, `<object mine.Loss 1f2e3d4c>`, as its `_target_`. The name ends with a digest of the
object's code and state, so that a run with another object is another run. The objects themselves are known by their full keys, for
the duration of a call (`given`).
"""

import copy
import functools
import hashlib
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from clip_exp.errors import ConfigError

PREFIX = "<object "
# Arguments of the Python API that pass an object, by its key
ARGUMENTS = {
    "data": "dataset=…",
    "data.val": "val_dataset=…",
    "data.transform": "transform=…",
    "loss": "loss=…",
    "model.image": "image=…",
    "model.text": "text=…",
}
# Size of an array above which only some of its rows are read for the digest
MAX_BYTES = 1 << 26
_given: ContextVar[Mapping[str, Any]] = ContextVar("given", default=types.MappingProxyType({}))


@contextmanager
def given(found: Mapping[str, Any]) -> Iterator[None]:
    """Make objects known by their full keys, in the block only."""
    token = _given.set(found)
    try:
        yield
    finally:
        _given.reset(token)


def current() -> Mapping[str, Any]:
    """Return the objects that are known now."""
    return _given.get()


def is_object(target: str) -> bool:
    """Return True if a `_target_` is the name of an object."""
    return target.startswith(PREFIX)


def factory(target: str, where: str) -> Callable[[], Any]:
    """Return a function that returns the object at a key; a copy if it is a module, whose weights would be changed otherwise.

    Raises:
        ConfigError: no object was given.
    """
    if where not in _given.get():
        argument = ARGUMENTS.get(where)
        raise ConfigError(
            f"{where}._target_={target} is an object of the Python process that started the run"
            + (f": pass it again in Python ({argument})." if argument else ", which is not supported for this key.")
        )
    found = _given.get()[where]
    return lambda: copy.deepcopy(found) if _is_module(found) else found


def name_of(value: Any, key: str) -> str:
    """Return the name of an object in a configuration.

    Raises:
        ConfigError: objects are not supported for the key, or the object is a class.
    """
    if key not in ARGUMENTS:
        raise ConfigError(
            f"{key} has a value of type {type(value).__name__}: give a text, a number, a list or a mapping. Objects are supported for "
            f"{', '.join(ARGUMENTS)}."
        )
    if isinstance(value, type):
        raise ConfigError(f"{key} is the class {value.__name__}: pass an object of it ({value.__name__}(…)).")
    named = value if hasattr(value, "__qualname__") else type(value)
    digest = hashlib.sha256()
    for part in _parts(value, {}):
        digest.update(hashlib.sha256(part).digest())
    return f"{PREFIX}{named.__module__}.{named.__qualname__} {digest.hexdigest()[:8]}>"


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _parts(value: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    """Yield what identifies an object in every process: code and state of the user, names and state of what libraries define."""
    if _is_simple(value) or (isinstance(value, list | tuple) and all(map(_is_simple, value))):
        yield repr(value).encode()
        return
    yield type(value).__qualname__.encode()
    if id(value) in seen or isinstance(value, types.ModuleType):
        return
    seen[id(value)] = value  # keeps it alive, so that its id is not used again
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _parts(key, seen)
            yield from _parts(item, seen)
    elif isinstance(value, set | frozenset):
        yield from sorted(b"".join(_parts(item, seen)) for item in value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, types.CodeType):
        yield value.co_code
        yield from _parts((value.co_names, value.co_varnames, value.co_consts), seen)
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value, seen)
    elif isinstance(value, types.MethodType):
        yield from _parts((value.__func__, value.__self__), seen)
    elif isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), seen)
    elif isinstance(value, type):
        yield from _of_class(value, seen)
    elif hasattr(value, "to_dict") and hasattr(value, "columns"):  # a table of pandas
        yield from _parts(value.to_dict("list"), seen)
    elif getattr(getattr(value, "dtype", None), "kind", None) == "O":
        yield from _parts(value.tolist(), seen)
    elif hasattr(value, "detach") or hasattr(value, "tobytes"):
        yield from _of_array(value)
    else:
        yield getattr(value, "__qualname__", "").encode()
        yield from _parts(type(value), seen)
        yield from _parts({**_slots(value), **getattr(value, "__dict__", {})}, seen)


def _is_simple(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | complex | str | bytes | os.PathLike)


def _slots(value: Any) -> dict[str, Any]:
    names = [name for cls in type(value).__mro__ for name in _names(cls.__dict__.get("__slots__", ()))]
    return {name: getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)}


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def _of_function(function: types.FunctionType, seen: dict[int, Any]) -> Iterator[bytes]:
    yield f"{function.__module__}.{function.__qualname__}".encode()
    if _is_library(function.__module__):
        return
    yield from _parts((function.__code__, function.__defaults__, function.__kwdefaults__), seen)
    for cell in function.__closure__ or ():
        try:
            yield from _parts(cell.cell_contents, seen)
        except ValueError:  # empty
            continue
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield from _parts(function.__globals__[name], seen)


def _of_class(cls: type, seen: dict[int, Any]) -> Iterator[bytes]:
    yield f"{cls.__module__}.{cls.__qualname__}".encode()
    if not _is_library(cls.__module__):
        yield from _parts(cls.__bases__, seen)
        # Without inherited attributes: those of the user's classes come with the bases, and libraries change each other's.
        for name, item in sorted(cls.__dict__.items()):
            if isinstance(item, types.FunctionType | staticmethod | classmethod | property):
                for function in (item,) if isinstance(item, types.FunctionType) else _functions(item):
                    yield name.encode()
                    yield from _parts(function, seen)
            elif not name.startswith("__"):
                yield name.encode()
                yield from _parts(item, seen)


def _functions(item: Any) -> list[Any]:
    return [f for f in (getattr(item, "__func__", None), getattr(item, "fget", None)) if f is not None]


def _of_array(value: Any) -> Iterator[bytes]:
    """Yield the content of a tensor, array or image; of a large one, such as a mapped file, that of evenly spaced rows."""
    yield f"{getattr(value, 'dtype', '')} {tuple(getattr(value, 'shape', getattr(value, 'size', ())))}".encode()
    if (step := getattr(value, "nbytes", 0) // MAX_BYTES + 1) > 1:
        value = value[::step]
    if hasattr(value, "detach"):
        value = value.detach().cpu().contiguous().reshape(-1)
        value = value.view(sys.modules["torch"].uint8).numpy()
    yield value.tobytes()


def _is_library(module: str | None) -> bool:
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if module is None or module == "__main__":
        return False
    return file is None or "site-packages" in file or module.partition(".")[0] in sys.stdlib_module_names
