"""Text of `--help`: an overview of a command with one line per key, and full descriptions of a group, an option or a key."""

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any

import yaml

from clip_exp.config.base import Config, chosen, key_of, members, values_of
from clip_exp.config.commands import SCHEMAS
from clip_exp.config.describe import ANY_NAME, FROM_OPTION, Key, Section, labels_text, meaning_of, sections
from clip_exp.config.files import option_file
from clip_exp.errors import ConfigError, nearest

HELP_FLAGS = ("--help", "-h")
# Flags of Hydra that are followed by a value
WITH_VALUE = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c")
# Width of text that is not printed to a terminal
WIDTH = 100
UNLIMITED = 10_000
# Column of the meanings in the overview
COLUMN = 32
HELP_END = (
    "--cfg job prints the composed configuration and exits; --info shows which files it was composed from; -m runs a sweep.\n"
    "--config-dir DIR adds options and Python files of your own folder; hydra.searchpath=[DIR,pkg://PACKAGE] adds several folders.\n"
    "Your own data set, tower, loss, task, transform or schedule: _target_=module.Class (docs/extending.md).\n"
    "Documentation: docs/configuration.md and docs/reference/; models: clip-exp models; weights for pretrained=: docs/weights.md."
)
# Group and key in the overview of a command
EXAMPLES = {
    "train": ("optimizer", "lr"),
    "evaluate": ("task", "cache_gb"),
    "convert": ("file", "trust_pickle"),
    "models": ("name", "all"),
    "check-data": ("data", "max_leakage"),
    "make-shards": ("data", "shard_size"),
}
# Options of the groups by name: {"optimizer": ["adamw", "sgd"]}
Options = dict[str, list[str]]


def split_topics(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate the topics of `--help data` and `--help=data` from the other arguments.

    A topic is a group or a key, which has no `=`. Without `--help`, all arguments are returned.
    """
    if not any(argument.partition("=")[0] in HELP_FLAGS for argument in arguments):
        return [], arguments
    topics, rest, is_value = [], [], False
    for argument in arguments:
        flag, equals, topic = argument.partition("=")
        if flag in HELP_FLAGS:
            topics += [topic] if topic else []
            argument = flag
        elif not (is_value or equals or argument.startswith(("-", "~"))):
            topics.append(argument)
            continue
        is_value = argument in WITH_VALUE
        rest.append(argument)
    return topics, rest


# ------------------------------------------------------------------------------------------------------- overview


def overview(command: str, values: dict[str, Any], groups: Options) -> str:
    """Return the help text of a command: its usage, the options of each group, and all keys with their values and meanings.

    A line is cut at the width of the terminal. Without a terminal it is complete, as for `grep`.

    Args:
        command: name of the command.
        values: composed values.
        groups: options by group.
    """
    schema = SCHEMAS[command]
    width = shutil.get_terminal_size((0, 0)).columns
    group, key = EXAMPLES.get(command, ("model", "run"))
    more = f"--help {group} explains a group with its options and keys in full; --help {key} explains a key."
    parts = [*schema.usage.split("\n"), "", more, ""]
    if groups and command in ("train", "evaluate", "check-data", "make-shards"):
        parts += ["== Options: select with group=option ==", ""]
        parts += [f"{group}: {', '.join(names)}" for group, names in groups.items()]
        parts.append("")
    parts = [line for part in parts for line in _wrapped(part, width or UNLIMITED, "    ")]
    keys = [_cut(line, width) for line in _lines(schema, values, "")]
    end = [line for part in HELP_END.split("\n") for line in _wrapped(part, width or UNLIMITED, "    ")]
    return "\n".join([*parts, "== Keys: set with key=value ==", "", *keys, "", *end])


def _wrapped(line: str, width: int, indent: str) -> list[str]:
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _cut(line: str, width: int) -> str:
    return f"{line[: width - 1]}…" if width and len(line) > width else line


def _lines(model: type[Config], values: dict[str, Any], indent: str, choices: str = "") -> Iterator[str]:
    """Yield a line of YAML for every key of a model, with its meaning as a comment; nodes follow the other keys.

    Args:
        model: schema of the values.
        values: composed values.
        indent: indentation of the lines.
        choices: names of the members of the model's group, separated by commas.
    """
    fields = [(key_of(name, field), name, field) for name, field in model.model_fields.items()]
    for key, name, field in sorted(
        fields, key=lambda item: bool(isinstance(values.get(item[0]), dict) and values[item[0]])
    ):
        yield from _lines_of(field.annotation, key, values.get(key), meaning_of(model, name), indent)


def _lines_of(annotation: Any, key: str, value: Any, meaning: str, indent: str) -> Iterator[str]:
    models, inside = members(annotation), values_of(annotation)
    if models and isinstance(value, dict) and (node := chosen(models, value)) is not None:
        yield _line(f"{indent}{key}:", meaning)
        yield from _lines(node, value, f"{indent}  ")
    elif value and isinstance(value, dict) and members(inside):
        yield _line(f"{indent}{key}:", meaning)
        for name, item in value.items():
            yield from _lines_of(inside, name, item, "", f"{indent}  ")
    else:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
        yield _line(f"{indent}{key}: {text.removesuffix('...' + chr(10)).strip()}", meaning)


def _line(setting: str, meaning: str) -> str:
    return f"{setting:<{COLUMN}}  # {meaning}" if meaning else setting


# --------------------------------------------------------------------------------------------------------- topics


def explain_topics(command: str, topics: Iterable[str], groups: Options) -> str:
    """Return the full descriptions of groups, options or keys.

    Args:
        command: name of the command.
        topics: `data`, `data.augmentation`, `task.imagenet` or `optimizer.lr`; or the last part of a key.
        groups: options by group.

    Raises:
        ConfigError: a topic is unknown.
    """
    width = shutil.get_terminal_size((WIDTH, 0)).columns
    found = sections(SCHEMAS[command])
    return "\n\n".join("\n".join(_topic(topic, found, groups, command, width)) for topic in topics)


def _topic(topic: str, found: list[Section], groups: Options, command: str, width: int) -> list[str]:
    name = topic.replace("/", ".").strip(".")
    by_name = {group.replace("/", "."): group for group in groups}
    parent, _, last = name.rpartition(".")
    nodes = {section.at.removesuffix(f".{ANY_NAME}") for section in found if section.at}
    if name in by_name or name in nodes:
        return list(_group(name, by_name.get(name), found, groups, width))
    if parent in by_name and last in groups[by_name[parent]]:
        return list(_option(by_name[parent], last, found, width))
    if member := of_member(found, parent, last):
        return list(_sections_text([member, *_nodes_of(member, found)], width))
    matching = [(section, key) for section in found for key in section.keys]
    matching = [each for each in matching if each[1].name == name] or [
        each for each in matching if each[1].name.rpartition(".")[2] == name
    ]
    if not matching:
        valid = {*by_name, *nodes, *(key.name for section in found for key in section.keys)}
        raise ConfigError(f"--help {topic}: there is no group or key {topic} in {command}: {nearest(name, valid)}")
    return [line for section, key in matching for line in _key_text(key, width, labels_text(section.only))]


def _is_at(section: Section, name: str) -> bool:
    return section.at.removesuffix(f".{ANY_NAME}") == name


def of_member(found: list[Section], at: str, member: str) -> Section | None:
    """Return all keys of a member of a group in one section; None if there is no member of this name."""
    of_node = [section for section in found if _is_at(section, at)]
    label = next((label for s in of_node for label in s.choices if member in label.partition("=")[2].split("|")), None)
    if label is None:
        return None
    keys = [key for section in of_node if not section.only or label in section.only for key in section.keys]
    return Section(of_node[0].at, "", {}, (label,), keys)


def _group(name: str, group: str | None, found: list[Section], groups: Options, width: int) -> Iterator[str]:
    own = [section for section in found if _is_at(section, name)]
    below = [section for section in found if section.at.startswith(f"{name}.") and section not in own]
    meaning = own[0].meaning if own else "options that set keys of all groups"
    yield from _wrapped(f"{name}: {meaning}.", width, "    ")
    if group is not None:
        yield from ("", f"Options: {group}=NAME")
        yield from _table({option: option_summary(group, option) for option in groups[group]}, width)
        inner = [other for other in groups if other.startswith(f"{group}/")]
        if inner:
            yield from ("", *(f"Options of {other}: {', '.join(groups[other])}" for other in inner))
    yield from _sections_text([*own, *below], width)


def _option(group: str, option: str, found: list[Section], width: int) -> Iterator[str]:
    """Yield an option's comments and values, and for a task the keys of its kind."""
    file = option_file(group, option)
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    yield from (f"{group}={option} sets:", "")
    yield from (f"  {line}" for line in text.strip().split("\n"))
    kinds = [values.get("kind") for values in (yaml.safe_load(text) or {}).values() if isinstance(values, dict)]
    for own in (section for kind in kinds if group == "task" and (section := of_member(found, group, str(kind)))):
        yield from _sections_text([_renamed(each, option) for each in (own, *_nodes_of(own, found))], width)
    if group != "task":
        yield from ("", f"Keys: --help {group.replace('/', '.')}")


def _renamed(section: Section, task: str) -> Section:
    """Return a section with the name of a task in its keys."""
    before, after = f"task.{ANY_NAME}", f"task.{task}"
    keys = [
        key._replace(
            name=key.name.replace(before, after), no_effect=tuple(why.replace(before, after) for why in key.no_effect)
        )
        for key in section.keys
    ]
    return section._replace(at=section.at.replace(before, after), keys=keys)


def _nodes_of(own: Section, found: list[Section]) -> Iterator[Section]:
    """Yield the sections of the nodes in a member of a group."""
    inside: set[str] = set()
    for section in found:
        node, _, _ = section.at.removesuffix(f".{ANY_NAME}").rpartition(".")
        in_member = node == own.at and (not section.parents or own.only[0] in section.parents)
        if in_member or node in inside:
            inside.add(section.at)
            yield section._replace(parents=())


def _sections_text(shown: list[Section], width: int) -> Iterator[str]:
    for section in shown:
        if section.choices:
            yield from ("", f"Members of {section.at}:")
            yield from _table(section.choices, width)
        if section.keys:
            yield from ("", *_wrapped(f"Keys of {section.title}:", width, "    "))
        for key in section.keys:
            yield from _key_text(key, width)


def _key_text(key: Key, width: int, of: str = "") -> Iterator[str]:
    """Yield the lines about a key: its default and type, its meaning, and when it has no effect."""
    default = " (required)" if key.default is None else "" if key.default == FROM_OPTION else f"={key.default}"
    gap = max(2, COLUMN - len(key.name) - len(default))
    indent = " " * 6
    yield from _wrapped(f"  {key.name}{default}{' ' * gap}{key.type}{f', with {of}' if of else ''}", width, indent)
    for text in (key.meaning, *(f"No effect {why}." for why in key.no_effect)):
        yield from textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)


def _table(rows: dict[str, str], width: int) -> Iterator[str]:
    column = min(max(map(len, rows)), COLUMN)
    for name, meaning in rows.items():
        indent = " " * (column + 4)
        yield from _wrapped(f"  {name:<{column}}  {meaning}".rstrip(), width, indent)


def option_summary(group: str, option: str) -> str:
    """Return the first comment line of an option's file, or its first sentence if that is longer; empty without a comment."""
    file = option_file(group, option)
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    comment = [re.sub(r"^#\s*", "", line) for line in takewhile(lambda line: line.startswith("#"), lines)]
    first, *rest = [line for line in comment if not line.startswith("@package")] or [""]
    if rest and rest[0][:1].islower():
        first = re.split(r"\. (?=[A-Z])", " ".join([first, *rest]))[0]
    return first.removesuffix(".")
