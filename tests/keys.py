"""Every key of a configuration, from its schema, and what changing one is expected to do."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from clip_exp.config.base import Config, key_of, members


@dataclass(frozen=True)
class Changes:
    """A value of a key with which the result is another one.

    Attributes:
        value: as it is typed.
        given: options under which the key has an effect; without them it is refused, unless it asks for nothing.
        also: overrides that are part of the change.
        refused: the models, or other subjects, that refuse the key all the same.
    """

    value: str
    given: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def asks_for_nothing(self) -> bool:
        return self.value in ("false", "null")

    def override(self, key: str) -> str:
        """Return what is typed; Hydra needs `++` to add keys to a mapping."""
        return f"{'++' if self.value.startswith('{') else ''}{key}={self.value}"


def leaf_keys(model: type[Config], at: str = "") -> Iterator[str]:
    """Yield the full keys of a model of the schema, with those of the models in it, of a union all.

    A key that takes a model or a value of another type, as a path, is yielded itself too.

    Args:
        at: the beginning of the keys.
    """
    for name, field in model.model_fields.items():
        key = f"{at}{key_of(name, field)}"
        nested = members(field.annotation)
        if not nested or takes_values(field.annotation):
            yield key
        yield from dict.fromkeys(leaf for of in nested for leaf in leaf_keys(of, f"{key}."))


def nested_models(*models: type[Config]) -> set[type[Config]]:
    """Return models of the schema and all models in them, and the classes that they derive from."""
    found: set[type[Config]] = set()
    for model in models:
        found |= {base for base in model.__mro__ if issubclass(base, Config)}
        for field in model.model_fields.values():
            found |= nested_models(*members(field.annotation))
    return found


def takes_values(annotation: Any) -> bool:
    """Return whether a union with models in it has other types as well; null does not count."""
    if isinstance(annotation, type):
        return not issubclass(annotation, Config | NoneType)
    origin = get_origin(annotation)
    parts = get_args(annotation)[:1] if origin is Annotated else get_args(annotation)
    return origin in (list, dict, Literal) or any(map(takes_values, parts))


def explained(key: str, reasons: Mapping[str, str]) -> bool:
    """Return whether a key, or a node that it is in, has a reason not to change the result."""
    parts = key.split(".")
    return any(".".join(parts[:depth]) in reasons for depth in range(1, len(parts) + 1))


def without_expectation(keys: Iterable[str], changes: Mapping[str, Any], reasons: Mapping[str, str]) -> list[str]:
    """Return the keys of which nothing is expected."""
    return [key for key in keys if key not in changes and not explained(key, reasons)]
