"""Building blocks of the configuration schema: field types, rules across fields, and error messages for invalid values.

A field declares its type, constraints, default, unit and meaning in one place. `parse` reports all problems of a
configuration at once, by full key. Rules across fields are methods of the model that contains the fields
(`Config.rules`). Keys that have no effect given the other values are listed in a table of the model (`Config.unused`).
The schema modules import neither torch nor Hydra.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import Enum
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from clip_exp.config import registry, words
from clip_exp.errors import ConfigError

# Identifies messages about custom members, whose class is in the user's folder
CONFIG_DIR_HINT = "--config-dir (or CLIP_EXP_CONFIG_DIR)"
# OmegaConf's marker of a value that must be set
MISSING = "???"
# Marker of a value that is interpolated from a missing one
UNKNOWN = "???…"
# Groups whose options are recipes, which set keys of all groups
GLOBAL_GROUPS = ("experiment", "debug")
# Name of the member of an open group whose object is named by `_target_`
CUSTOM = "custom"

# ----------------------------------------------------------------------------------------------------------- types


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "must be a number")
    return value


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _typed_text(value: Any) -> Any:
    return value if value is None or isinstance(value, dict | list) else shown(value)


def _typed_item(value: Any) -> Any:
    return "null" if value is None else _typed_text(value)


def _not_float(value: Any) -> Any:
    if isinstance(value, float):
        raise PydanticCustomError("text", "must be a string: put it in quotes")
    return value


def is_path(annotation: Any) -> bool:
    """Return True for the annotation by which `PathText` differs from a text."""
    return isinstance(annotation, BeforeValidator) and annotation.func is _path_text


def must_be(what: str) -> WrapValidator:
    """Return an annotation that reports an invalid value once, instead of once for each member of a union."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("must_be", "must be {what}", {"what": what}) from None

    return WrapValidator(validate)


def exactly(count: int) -> AfterValidator:
    """Return an annotation that requires a list of `count` values."""

    def validate(values: list[Any]) -> list[Any]:
        if len(values) != count:
            raise PydanticCustomError("count", "must have {count} values", {"count": count})
        return values

    return AfterValidator(validate)


NOT_EMPTY = Field(min_length=1)
Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Count = Annotated[Int, Field(ge=1)]
Size = Annotated[Int, Field(gt=0)]
Index = Annotated[Int, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
# Fraction that is removed, such as dropout: less than 1
Proportion = Annotated[Float, Field(ge=0, lt=1)]
PathText = Annotated[str, BeforeValidator(_path_text)]
Paths = Annotated[PathText | list[PathText], must_be("a path, or a list of paths")]
# A float is refused since YAML would have turned the name 2.50 into 2.5.
Name = Annotated[str, BeforeValidator(_not_float)]
TEXT_OR_LIST = "a text or a list of texts; put texts with special characters in quotes"
Texts = Annotated[Name | list[Name], must_be(TEXT_OR_LIST)]
# Values that YAML parses as a number, a boolean or null are converted back to text.
TypedTexts = Annotated[
    Annotated[str, BeforeValidator(_typed_text)] | list[Annotated[str, BeforeValidator(_typed_item)]],
    must_be(TEXT_OR_LIST),
]

# ------------------------------------------------------------------------------------------------------ base model


class Unused(NamedTuple):
    """Keys that have no effect under a condition.

    A key that is set but unused is an error, since the run would differ from the one that was requested. A key counts
    as set if its value differs from the default, wherever the value comes from, or if the key is on the command line.
    The values null and false are always allowed.

    Attributes:
        keys: keys relative to the model that has the table, separated by spaces.
        when: function that takes the model and returns True if the keys have no effect.
        why: end of the sentence "<key> has no effect …"; `{c.name}` inserts a value of the model, `{at}` the prefix of
            the full keys.
        fix: what to do instead.
        typed_only: report the key only if it is on the command line, since a file in `conf/` may set it for other
            options.
    """

    keys: str
    when: Callable[[Any], bool]
    why: str
    fix: str = "leave it out"
    typed_only: bool = False


class Config(BaseModel):
    """Base class of the schema's models; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", coerce_numbers_to_str=True, validate_by_name=True, serialize_by_alias=True, protected_namespaces=(),
        defer_build=True,
    )  # fmt: skip
    unused: ClassVar[tuple[Unused, ...]] = ()
    # Usage text, for the schema of a command
    usage: ClassVar[str] = ""
    # Whether a composed configuration contains the defaults of keys that were not set
    written_out: ClassVar[bool] = True

    def rules(self, at: str) -> Iterator[str]:
        """Yield an error message for every invalid combination of fields.

        Args:
            at: prefix of the model's full keys, such as `model.`; empty for the schema of a command.
        """
        yield from ()


C = TypeVar("C", bound=Config)


class Target(Config):
    """Object of the user or of another library, in Hydra's form: `_target_` and the arguments (`config.targets`).

    A model with fields of its own lists `Target` last among its bases: pydantic takes `extra` from the last one.
    """

    model_config = ConfigDict(extra="allow")

    target: str = Field(alias="_target_", description="full name of a class or function, such as mine.Loss")

    # Number of positional arguments, and names of arguments that the object may have, which clip_exp passes
    supplied: ClassVar[int] = 0
    optional: ClassVar[tuple[str, ...]] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the class or function, without those of clip_exp."""
        return dict(self.model_extra or {})

    @property
    def node(self) -> dict[str, Any]:
        """Node for Hydra's `instantiate`: `_target_` and arguments, as plain values."""
        return {"_target_": self.target, **plain(self.arguments)}


def plain(value: Any) -> Any:
    """Return a configuration, or a part of it, as dictionaries, lists and scalars that YAML and JSON can represent."""
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def key_of(name: str, field: FieldInfo) -> str:
    """Return the key of a field; only `_target_` differs from the name of its field."""
    return field.alias or name


def default_of(field: FieldInfo) -> Any:
    """Return the default of a field; `PydanticUndefined` if the field is required."""
    return field.get_default(call_default_factory=True, validated_data={})


# ---------------------------------------------------------------------------------------------------- open groups


class Member(Config):
    """Base class of open groups, to which users can add members: towers, losses and tasks.

    Each group has a base class that sets `group`. A field of that type accepts any member of the group, selected by the
    field `key`. A member subclasses the base class of its group and declares its name: `kind: Literal["mine"] =
    "mine"`. `config.registry` describes where members are looked for.
    """

    # Folder of the group's options in conf/
    group: ClassVar[str] = ""
    # Name of the field that selects the member
    key: ClassVar[str] = "name"
    # Member that is used if `key` is not set: the one with `is_default`
    default_member: ClassVar[str | None] = None
    is_default: ClassVar[bool] = False
    # Members by name
    registered: ClassVar[dict[str, type["Member"]]]

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "group" in cls.__dict__:
            cls.registered, cls.default_member = {}, None
        elif get_origin((named := cls.model_fields[cls.key]).annotation) is Literal:
            name = str(get_args(named.annotation)[0])
            other = cls.registered.get(name, cls)
            # A class with the same module and name comes from a file that was imported again.
            again = (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
            if not again and registry.in_effect(other.__module__):
                places = [f"{each.__qualname__} of {sys.modules[each.__module__].__file__}" for each in (other, cls)]
                raise ConfigError(
                    f"{cls.group}: {' and '.join(places)} both declare {cls.key}={name}. Rename one of them."
                )
            cls.registered[name] = cls
            if cls.__dict__.get("is_default"):
                next(base for base in cls.__mro__ if "registered" in base.__dict__).default_member = name  # type: ignore[attr-defined]

    @classmethod
    def members(cls) -> list[type[Config]]:
        """Return the members of the group, including custom ones, in the order of their names."""
        registry.load(cls.group)
        return [model for _, model in sorted(cls.registered.items()) if registry.in_effect(model.__module__)]

    @classmethod
    def of(cls, values: Any) -> Self:
        """Validate values as the member that they name.

        Raises:
            ValidationError, PydanticKnownError, PydanticCustomError: the member is unknown, or a value is invalid.
                Pydantic handles these.
        """
        if isinstance(values, cls):
            return values
        if not isinstance(values, dict):
            raise PydanticKnownError("dict_type")
        found = cls.members()
        model = chosen(found, values)
        if model is None:
            names = ", ".join(f"'{name}'" for name, member in sorted(cls.registered.items()) if member in found)
            about = {"key": cls.key, "tag": str(values.get(cls.key)), "names": names, "group": cls.group}
            raise PydanticCustomError("no_member", "must be one of {names}", about)
        return model.model_validate(values)  # type: ignore[return-value]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return a schema that accepts any member for the base class of a group, and pydantic's schema for a member."""
        return core_schema.no_info_plain_validator_function(cls.of) if "group" in cls.__dict__ else handler(source)


def members(annotation: Any) -> list[type[Config]]:
    """Return the models in a field's annotation: a single model, the members of a union, or the members of an open group."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return (
            annotation.members() if issubclass(annotation, Member) and "group" in annotation.__dict__ else [annotation]
        )
    if get_origin(annotation) in (list, dict):
        return []
    return [model for part in get_args(annotation) for model in members(part)]


def values_of(annotation: Any) -> Any:
    """Return the annotation of a mapping's values; None if the annotation has no mapping."""
    mapping = next((part for part in (annotation, *get_args(annotation)) if get_origin(part) is dict), None)
    return None if mapping is None else get_args(mapping)[1]


def chosen(models: list[type[Config]], values: Any) -> type[Config] | None:
    """Return the model of a union that values select, or None.

    It is the model whose discriminating field, a `Literal`, allows the given value. A model without such a field
    accepts values that match no model before it. In an open group, `_target_` selects the member `custom`.
    """
    if len(models) == 1:
        return models[0]
    named = [(model, selector(model)) for model in models]
    if "_target_" in values and (custom := [model for model, names in named if names and CUSTOM in names[1]]):
        return custom[0]
    for model, names in named:
        if names is None and issubclass(model, Target) and "_target_" not in values:
            continue
        if names is None or str(values.get(names[0], getattr(model, "default_member", None))) in names[1]:
            return model
    return None


def selector(model: type[Config]) -> tuple[str, list[str]] | None:
    """Return the discriminating key of a model and the values that select the model."""
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is Literal:
            return key_of(name, field), [str(value) for value in get_args(field.annotation)]
    return None


def complete(model: type[Config], values: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of all missing keys to plain values, in place, also in nested models; `???` for required keys."""
    if not model.written_out:
        return values
    given = dict(values)
    values.clear()
    for name, field in model.model_fields.items():
        key = key_of(name, field)
        values[key] = given.pop(key) if key in given else _written_default(field)
        if isinstance(values[key], dict):
            _complete_node(field.annotation, values[key])
    values.update(given)
    return values


def _written_default(field: FieldInfo) -> Any:
    models = members(field.annotation)
    if field.is_required():
        return complete(models[0], {}) if len(models) == 1 else {} if models else MISSING
    return complete(models[0], {}) if field.default_factory in models else plain(default_of(field))


def _complete_node(annotation: Any, values: dict[str, Any]) -> None:
    if (model := chosen(models, values) if (models := members(annotation)) else None) is not None:
        complete(model, values)
        return
    if (inside := values_of(annotation)) is not None:
        for value in values.values():
            if isinstance(value, dict):
                _complete_node(inside, value)


# ------------------------------------------------------------------------------------------------------- problems


def parse(model: type[C], values: dict[str, Any], at: str = "", typed: Collection[str] = ()) -> C:
    """Validate values as a model.

    Args:
        model: schema of the values.
        values: plain values, as in YAML.
        at: prefix of the full keys, such as `model.`; empty for the schema of a command.
        typed: keys on the command line; see `problems`.

    Raises:
        ConfigError: one line for every unknown key, missing value, invalid value and, as far as the valid values show
            it, broken rule.
    """
    leaves = list(_leaves(values, at))
    missing = [key for key, value in leaves if value in (MISSING, UNKNOWN)]
    found = [(key, f"{key} has no value: set it ({key}=…).") for key, value in leaves if value == MISSING]
    try:
        parsed = model.model_validate(_without(values, missing, at))
        if not missing:
            return parsed
    except ValidationError as error:
        found += [(key, sentence) for key, sentence in _sentences(error, model, values, at) if key not in missing]
    # Invalid values are removed, so that broken rules between the remaining values are reported as well.
    wrong = {key.partition("[")[0] for key, _ in found}
    try:
        rest = model.model_validate(_without(values, wrong, at))
    except ValidationError:
        broken = []
    else:
        about_wrong = [re.compile(rf"(?<![\w.]){re.escape(key)}(?!\w)") for key in wrong]
        broken = [rule for rule in problems(rest, typed, at) if not any(key.search(rule) for key in about_wrong)]
    raise ConfigError("\n".join([sentence for _, sentence in found] + broken))


def problems(config: Config, typed: Collection[str] = (), at: str = "") -> Iterator[str]:
    """Yield an error message for every broken rule of a configuration and every key that is set but unused.

    Args:
        config: configuration to check.
        typed: full keys on the command line; see `typed_keys`.
        at: prefix of the configuration's full keys.
    """
    for each, prefix in nested(config, at):
        yield from each.rules(prefix)
        yield from _unused_keys(each, typed, prefix)


def broken_rules(config: Config, at: str = "") -> list[str]:
    """Return an error message for every broken rule of a configuration."""
    return [message for each, prefix in nested(config, at) for message in each.rules(prefix)]


def unused_keys(config: Config, typed: Collection[str] = (), at: str = "") -> list[str]:
    """Return an error message for every key of a configuration that is set but has no effect."""
    return [message for each, prefix in nested(config, at) for message in _unused_keys(each, typed, prefix)]


def nested(config: Config, at: str) -> Iterator[tuple[Config, str]]:
    """Yield a configuration and all configurations nested in it, each with the prefix of its full keys."""
    yield config, at
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), f"{at}{key_of(name, field)}."
        if isinstance(value, Config):
            yield from nested(value, key)
        elif isinstance(value, dict):
            for inner, item in value.items():
                if isinstance(item, Config):
                    yield from nested(item, f"{key}{inner}.")


def typed_keys(arguments: Iterable[str]) -> set[str]:
    """Return the keys of overrides: `key=value`, `+key=value` and `++key=value`."""
    return {argument.partition("=")[0].lstrip("+") for argument in arguments if "=" in argument}


def shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    value = plain(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _unused_keys(config: Config, typed: Collection[str], at: str) -> Iterator[str]:
    for unused in (unused for unused in config.unused if unused.when(config)):
        for key in unused.keys.split():
            node, _, name = key.rpartition(".")
            parent = attrgetter(node)(config) if node else config
            if isinstance(parent, Member) and name not in type(parent).model_fields:
                # The key belongs to another member of the group.
                continue
            value = getattr(parent, name)
            is_default = value == default_of(type(parent).model_fields[name])
            is_set = f"{at}{key}" in typed or (not unused.typed_only and not is_default)
            if is_set and value is not None and value is not False and value not in ([], {}):
                why, fix = unused.why.format(c=config, at=at), unused.fix.format(at=at)
                yield f"{at}{key}={shown(value)} has no effect {why}: {fix}."


def _leaves(values: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the full key and the value of every leaf of nested mappings."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _leaves(value, f"{key}{name}.")
    else:
        yield key.removesuffix("."), values


def _without(values: Any, keys: Collection[str], at: str) -> Any:
    """Return nested values without the given full keys."""
    if not isinstance(values, dict):
        return values
    return {key: _without(value, keys, f"{at}{key}.") for key, value in values.items() if f"{at}{key}" not in keys}


def _sentences(error: ValidationError, model: type[Config], values: dict[str, Any], at: str) -> list[tuple[str, str]]:
    """Return the full key and an error message for every problem that pydantic found."""
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        path = _path(problem["loc"], values, ends_in_key=problem["type"] == "missing")
        key = _join(at, path)
        if problem["type"] == "extra_forbidden":
            sentence = _unknown(path, model, values, at)
        elif problem["type"] == "missing":
            sentence = f"{key} has no value: set it ({key}=…)."
        elif problem["type"] == "no_member":
            about = problem["ctx"]
            custom = f"A custom one must be declared in a Python file in {about['group']}/ of {CONFIG_DIR_HINT}."
            sentence = f"{key}.{about['key']}={about['tag']} {_one_of(about['tag'], about['names'])} {custom}"
        elif problem["type"] == "union_tag_invalid":
            about = problem["ctx"]
            sentence = f"{key}.{about['discriminator'].strip(chr(39))}={about['tag']} {_one_of(about['tag'], about['expected_tags'])}"
        else:
            value = "" if isinstance(problem["input"], dict) else f"={shown(problem['input'])}"
            sentence = f"{key}{value} {_wrong(problem, key)}"
        found.setdefault(key, sentence)
    return list(found.items())


def _path(loc: tuple[int | str, ...], values: Any, ends_in_key: bool) -> list[str]:
    """Return the keys that lead to a problem: pydantic's location without the names of union members, which are not keys of the values."""
    path: list[str] = []
    for position, part in enumerate(loc):
        if isinstance(values, dict) and part in values:
            path, values = [*path, str(part)], values[part]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            path, values = [*path, f"[{part}]"], values[part]
        elif ends_in_key and position == len(loc) - 1:
            path = [*path, str(part)]
    return path


def _wrong(problem: Any, key: str) -> str:
    """Return what an invalid value must be, as the end of a sentence."""
    kind, about = problem["type"], problem.get("ctx", {})
    if (instead := words.of_value(key, problem["input"])) is not None:
        return f"does not exist: {instead}"
    bounds = {
        "greater_than": "greater than",
        "less_than": "less than",
        "greater_than_equal": "at least",
        "less_than_equal": "at most",
    }
    bound = {"greater_than": "gt", "less_than": "lt", "greater_than_equal": "ge", "less_than_equal": "le"}
    if kind in bounds:
        limit = about[bound[kind]]
        return (
            "must be greater than 0."
            if kind == "greater_than_equal" and limit == 1
            else f"must be {bounds[kind]} {limit:g}."
        )
    if kind in ("enum", "literal_error"):
        return _one_of(str(problem["input"]), about["expected"])
    # The only minimum length is 1; fixed lengths are checked by `exactly`.
    if kind == "too_short":
        return "must not be empty."
    if kind in ("model_type", "model_attributes_type", "dict_type", "union_tag_not_found"):
        return f"must be a mapping: set its keys ({key}.<key>=…)."
    kinds = {
        "int": "an integer",
        "float": "a number",
        "finite": "a finite number",
        "bool": "true or false",
        "string": "a string",
        "list": "a list",
    }
    what = next((text for name, text in kinds.items() if kind.startswith(name)), None)
    return f"must be {what}." if what is not None else f"{problem['msg'].removeprefix('Value error, ').rstrip('.')}."


def _one_of(value: str, choices: str) -> str:
    """Return the valid choices as the end of a sentence; `choices` is pydantic's text: 'a', <Enum.b: 'b'> or 3."""
    valid = re.findall(r"'([^']+)'", choices) or re.split(r", | or ", choices)
    close = difflib.get_close_matches(value, valid, n=1, cutoff=0.5)
    return f"must be one of {', '.join(valid)}." + (f" Did you mean '{close[0]}'?" if close else "")


def _join(at: str, path: Iterable[str]) -> str:
    return at + ".".join(path).replace(".[", "[")


# Similarity, from 0 to 1, below which no key is suggested
SIMILAR = 0.7
# Shortest beginning of a key that is completed
SHORTEST = 3


def _unknown(path: list[str], model: type[Config], values: dict[str, Any], at: str) -> str:
    """Return an error message for an unknown key, with the key to use instead: a line for each key of a mapping that has one."""
    key, name = _join(at, path), path[-1]
    siblings, others = _siblings(model, values, path[:-1])
    if owners := [
        _join(at, [*path[:-1], f"{names[0]}={' or '.join(names[1])}"])
        for other in others
        if name in _keys(other) and (names := selector(other))
    ]:
        return f"{key} is a key of {' and of '.join(owners)}, which is not selected: select it, or leave this out."
    everywhere = list(_tree(model, values, at))
    value, roots = _value_at(values, path), roots_of(everywhere)
    # Words are those of the whole configuration, not of an entry of a list.
    has_words = not any(part.startswith("[") for part in path)
    whole = words.answer(key, value, roots) if has_words else None
    # A mapping, such as `callbacks.early_stopping`, may have keys with words of their own.
    leaves = _leaves(value, f"{key}.") if has_words else ()
    own = {leaf: words.answer(leaf, inner, roots) for leaf, inner in leaves}
    if any(own.values()):
        return "\n".join(f"{leaf} does not exist: {own[leaf] or whole or 'leave it out.'}" for leaf in own)
    if whole is not None:
        return f"{key} does not exist: {whole}"
    best = _nearest(path, siblings, everywhere, at)
    return f"{key} does not exist: " + (
        f"did you mean '{best}'?" if best else f"valid keys are {', '.join(sorted(siblings))}."
    )


def nearest_key(model: type[Config], key: str) -> str | None:
    """Return the full key of a command's schema that is nearest to an unknown key; None if none is similar."""
    path = key.split(".")
    return _nearest(path, _siblings(model, {}, path[:-1])[0], list(_tree(model, {}, "")), "")


def roots_of(keys: Iterable[str]) -> set[str]:
    """Return the first parts of the keys of a command, and the groups of recipes if it has them."""
    roots = {re.split(r"[.\[]", key, maxsplit=1)[0] for key in keys}
    return roots | (set(GLOBAL_GROUPS) if "epochs" in roots else set())


def _nearest(path: list[str], siblings: list[str], everywhere: list[str], at: str) -> str | None:
    """Return the nearest full key: of the keys next to it, then of the whole tree."""
    key, name = _join(at, path), path[-1]
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=SIMILAR)
    if not close and len(name) >= SHORTEST:
        close = [sibling for sibling in siblings if sibling.startswith(name)]
    if close:
        return _join(at, [*path[:-1], close[0]])
    of_name: dict[str, list[str]] = {}
    for full in everywhere:
        of_name.setdefault(full.rpartition(".")[2], []).append(full)
    similar = difflib.get_close_matches(name, of_name, n=1, cutoff=SIMILAR)
    return difflib.get_close_matches(key, of_name[similar[0]], n=1, cutoff=0)[0] if similar else None


def _value_at(values: Any, path: list[str]) -> Any:
    for part in path:
        index = re.fullmatch(r"\[(\d+)\]", part)
        values = values[int(index[1])] if index else values[part]
    return values


def _keys(model: type[Config]) -> list[str]:
    return [key_of(name, field) for name, field in model.model_fields.items()]


def _siblings(model: type[Config], values: Any, path: list[str]) -> tuple[list[str], list[type[Config]]]:
    """Return the valid keys of the node at a path, and the models of its union that are not selected."""
    node: type[Config] | None = model
    others: list[type[Config]] = []
    # Annotation of the values of a mapping
    inside: Any = None
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
        if inside is None:
            fields = {} if node is None else {key_of(name, field): field for name, field in node.model_fields.items()}
            annotation = fields[part].annotation if part in fields else None
        else:
            annotation, inside = inside, None
        models = members(annotation)
        # An entry of a list
        if part.startswith("["):
            node, inside = next(iter(inside_lists(annotation)), None), None
            continue
        node = chosen(models, values) if models and isinstance(values, dict) else None
        inside = annotation if isinstance(values, list) else None
        others = [other for other in models if other is not node]
        if node is None and not isinstance(values, list):
            inside = values_of(annotation)
    return ([] if node is None else _keys(node)), others


def inside_lists(annotation: Any) -> list[type[Config]]:
    """Return the models in the lists of an annotation."""
    found = [model for part in get_args(annotation) for model in inside_lists(part)]
    return found + (members(get_args(annotation)[0]) if get_origin(annotation) is list else [])


def _tree(model: type[Config], values: Any, at: str) -> Iterator[str]:
    """Yield all valid full keys; for a union, those of the selected member."""
    for name, field in model.model_fields.items():
        key = key_of(name, field)
        value = values.get(key) if isinstance(values, dict) else None
        models = members(field.annotation)
        if isinstance(value, list):
            yield f"{at}{key}"
            for inside in inside_lists(field.annotation):
                for i, item in enumerate(value):
                    yield from _tree(inside, item, f"{at}{key}[{i}].")
            continue
        node = chosen(models, value or {}) if models else None
        if node is None:
            yield f"{at}{key}"
        else:
            yield from _tree(node, value, f"{at}{key}.")
