"""Description of the schema as text: the keys of a command with type, default and meaning, for `--help` and docs/reference/."""

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import JsonValue
from pydantic.fields import FieldInfo

from clip_exp.config.base import (
    Config,
    Target,
    default_of,
    inside_lists,
    is_path,
    key_of,
    members,
    plain,
    selector,
    shown,
    values_of,
)

# Stands for a name that the user chooses, in the keys of a mapping
ANY_NAME = "<name>"
FROM_OPTION = "set by the option"


class Key(NamedTuple):
    """Key of a configuration.

    Attributes:
        name: full key.
        type: type or choices, in words.
        default: default as it is written on the command line; None if the key is required.
        meaning: description of the field, or the first sentence of the docstring of its model.
        no_effect: conditions under which the key has no effect, each as the end of the sentence "<key> has no effect …".
    """

    name: str
    type: str
    default: str | None
    meaning: str
    no_effect: tuple[str, ...] = ()


class Section(NamedTuple):
    """Keys of a node. The keys of a group's members are in a section for all members, and sections for some of them.

    Attributes:
        at: full key of the node; empty for the keys of the command itself.
        meaning: description of the node; empty in a section for some of the members.
        choices: meaning of each member by `member_label`; empty if there is a single one, or in a section for some of them.
        only: labels of the members that have these keys; empty for all.
        keys: the keys.
        parents: labels of the members that have the node, if it is in a member of a group; empty for all.
    """

    at: str
    meaning: str
    choices: dict[str, str]
    only: tuple[str, ...]
    keys: list[Key]

    parents: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Full key of the node, with the members that have the keys, or the node."""
        of = labels_text(self.only or self.parents)
        return f"{self.at} with {of}" if of else self.at


def sections(schema: type[Config]) -> list[Section]:
    """Return the sections of a command's schema: its own keys first, then those of its nodes."""
    return list(_sections([schema], "", summary(schema), {}, ()))


def keys_of(schema: type[Config]) -> Iterator[Key]:
    """Yield all keys of a command's schema."""
    for section in sections(schema):
        yield from section.keys


def meaning_of(model: type[Config], name: str) -> str:
    """Return the meaning of a field: its description, also that of a base class, or what its model represents."""
    for base in model.__mro__:
        if issubclass(base, Config) and (field := base.model_fields.get(name)) is not None and field.description:
            return field.description
    annotation = model.model_fields[name].annotation
    return next((summary(each) for each in members(annotation)[:1]), "")


def summary(model: type[Config]) -> str:
    """Return the first paragraph of a model's docstring, in one line and without its period."""
    return " ".join((model.__doc__ or "").split("\n\n")[0].split()).removesuffix(".")


NoEffect = Mapping[str, tuple[str, ...]]


def _sections(
    models: list[type[Config]], at: str, meaning: str, inherited: NoEffect, parents: tuple[str, ...]
) -> Iterator[Section]:
    """Yield the sections of a node and of the nodes in it.

    Args:
        models: models of the node: one, or the members of a group.
        at: prefix of its full keys.
        meaning: description of the node.
        inherited: conditions under which keys have no effect, by full key, from the models that the node is in.
        parents: see `Section`.
    """
    labels = tuple(map(member_label, models))
    keys: dict[Key, list[str]] = {}
    nodes: dict[tuple[str, str, tuple[type[Config], ...]], list[str]] = {}
    no_effect = dict(inherited)
    for model, label in zip(models, labels, strict=True):
        for full, why in _no_effect(model, at):
            no_effect[full] = tuple(dict.fromkeys((*no_effect.get(full, ()), why)))
        for name, field in model.model_fields.items():
            full, about = f"{at}{key_of(name, field)}", meaning_of(model, name)
            if (key := _key(models, model, field, full, about)) is not None:
                keys.setdefault(key, []).append(label)
            for node, inner in _nodes(field.annotation, full):
                nodes.setdefault((node, about, tuple(inner)), []).append(label)
    by_members: dict[tuple[str, ...], list[Key]] = {labels: []}
    for key, of in keys.items():
        by_members.setdefault(tuple(of), []).append(key._replace(no_effect=no_effect.get(key.name, ())))
    choices = {member_label(model): summary(model) for model in models} if len(models) > 1 else {}
    yield Section(at.removesuffix("."), meaning, choices, (), by_members.pop(labels), parents)
    for only, of_some in sorted(by_members.items(), key=lambda item: -len(item[0])):
        yield Section(at.removesuffix("."), "", {}, only, of_some, parents)
    for (node, about, inner_models), of in nodes.items():
        yield from _sections(
            list(inner_models), f"{node}.", about, no_effect, tuple(of) if len(of) < len(labels) else ()
        )


def _key(models: list[type[Config]], model: type[Config], field: FieldInfo, full: str, meaning: str) -> Key | None:
    """Return the key of a field; None if its value can only be a node."""
    selected = selector(model)
    if len(models) > 1 and selected is not None and full.rpartition(".")[2] == selected[0]:
        return _selection(models, full, meaning)
    if _is_node(field.annotation):
        return None
    return Key(full, type_of(field.annotation, field.metadata), _default(field), meaning)


def _selection(models: list[type[Config]], full: str, meaning: str) -> Key:
    """Return the key that selects a member of a group."""
    named = [named for model in models if (named := selector(model)) is not None]
    default = next((d for model in models if (d := getattr(model, "default_member", None))), FROM_OPTION)
    return Key(full, ", ".join(value for _, values in named for value in values), default, meaning)


def member_label(model: type[Config]) -> str:
    """Return the override that selects a member of a union, such as `kind=vit`."""
    named = selector(model)
    if named is not None:
        return f"{named[0]}={'|'.join(named[1])}"
    return "_target_=…" if issubclass(model, Target) else "without _target_"


def labels_text(labels: tuple[str, ...]) -> str:
    """Return the labels of several members in short: `kind=vit, resnet`."""
    by_key: dict[str, list[str]] = {}
    for label in labels:
        key, _, value = label.partition("=")
        by_key.setdefault(key, []).append(value)
    return " or ".join(f"{key}={', '.join(values)}" if any(values) else key for key, values in by_key.items())


def _nodes(annotation: Any, full: str) -> list[tuple[str, list[type[Config]]]]:
    """Return the nodes in the value of a key, each with its models."""
    found = [(full, members(annotation)), (f"{full}.{ANY_NAME}", members(values_of(annotation)))]
    lists = [model for model in inside_lists(annotation) if model not in found[0][1]]
    return [(node, models) for node, models in [*found, (f"{full}[]", lists)] if models]


def _is_node(annotation: Any) -> bool:
    """Return True if a value can only be a node, which has keys of its own."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _is_node(parts[0])
    if origin in (Union, UnionType):
        return all(map(_is_node, parts))
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _no_effect(model: type[Config], at: str) -> Iterator[tuple[str, str]]:
    """Yield the full key and the condition of every entry in a model's table of keys without effect."""
    for unused in model.unused:
        why = re.sub(r"\{c\.[^}]*\}", "…", unused.why).replace("{at}", at)
        for key in unused.keys.split():
            yield f"{at}{key}", why


def _default(field: FieldInfo) -> str | None:
    return None if field.is_required() else value_text(default_of(field))


def value_text(value: Any) -> str:
    """Return a value as it is written on the command line, with six digits of a fraction at most."""
    value = plain(value)
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return "''" if value == "" else shown(value)


# ---------------------------------------------------------------------------------------------------------- types

NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", NoneType: "null"}


def type_of(annotation: Any, metadata: Any = ()) -> str:
    """Return the type of a field in words: `integer ≥ 1`, `path or list of paths`, or the choices."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(parts[0], (*parts[1:], *metadata))
    if annotation is JsonValue or annotation is Any:
        return "any value"
    if origin in (Union, UnionType):
        *first, last = dict.fromkeys(_alternatives(annotation))
        return f"{', '.join(first)} or {last}" if first else last
    if origin is Literal:
        return ", ".join(value_text(value) for value in parts)
    if origin is list:
        return f"list of {_plural(type_of(parts[0]))}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(str(value.value) for value in annotation)
    if annotation is str and any(map(is_path, metadata)):
        return "path"
    if annotation in (int, float):
        return f"{NAMES[annotation]}{_bounds(_constraints(metadata), whole=annotation is int)}"
    return NAMES.get(annotation, "mapping")


def _alternatives(annotation: Any) -> Iterator[str]:
    """Yield the types of a union, also of unions in it; null comes last."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated and get_origin(parts[0]) in (Union, UnionType):
        yield from _alternatives(parts[0])
    elif origin in (Union, UnionType):
        for part in sorted(parts, key=lambda part: part is NoneType):
            yield from _alternatives(part)
    else:
        yield type_of(annotation)


def _plural(name: str) -> str:
    first, _, rest = name.partition(" ")
    if first not in ("text", "path", "integer", "number", "mapping"):
        return name
    return f"{first}s {rest}".strip().replace(" or text", " or texts").replace(" or mapping", " or mappings")


def _constraints(metadata: Any) -> Iterator[Any]:
    for each in metadata:
        yield from each.metadata if isinstance(each, FieldInfo) else (each,)


def _bounds(constraints: Iterator[Any], whole: bool) -> str:
    """Return the limits of a number in words; of several limits of the same kind, the last counts."""
    lower = upper = ""
    for each in constraints:
        if isinstance(each, Ge):
            lower = f"≥ {value_text(each.ge)}"
        elif isinstance(each, Gt):
            lower = f"≥ {each.gt + 1}" if whole and isinstance(each.gt, int) else f"> {value_text(each.gt)}"
        elif isinstance(each, Le):
            upper = f"≤ {value_text(each.le)}"
        elif isinstance(each, Lt):
            upper = f"< {value_text(each.lt)}"
    return " " + " and ".join(filter(None, (lower, upper))) if lower or upper else ""
