"""Help text of a command: the options of each group, and all keys with their values and descriptions."""

from collections.abc import Iterator
from typing import Any, Literal, get_origin

import yaml

from clip_exp.config.base import Config, chosen, key_of, member_names, members, values_of

HELP_END = (
    "--cfg job prints the composed configuration and exits; --info shows which files it was composed from; -m runs a sweep.\n"
    "--config-dir DIR adds options and Python files of your own folder; hydra.searchpath=[DIR,pkg://PACKAGE] adds several folders.\n"
    "Your own data set, tower, loss, task, transform or schedule: _target_=module.Class (docs/extending.md).\n"
    "Documentation: docs/configuration.md; models: clip-exp models; weights for pretrained=: docs/weights.md."
)


def help_text(schema: type[Config], groups: dict[str, list[str]], values: dict[str, Any]) -> str:
    """Return the help text of a command.

    Args:
        schema: schema of the command.
        groups: options of each group; empty: the command has no groups to show.
        values: composed values.
    """
    options = "\n".join(f"{group}: {', '.join(found)}" for group, found in groups.items() if found)
    of_groups = ["== Options: select with group=option ==", options] if groups else []
    keys = "\n".join(_lines(schema, values, ""))
    return "\n\n".join([schema.usage, *of_groups, "== Keys: set with key=value ==", keys, HELP_END])


def _lines(model: type[Config], values: dict[str, Any], indent: str, choices: str = "") -> Iterator[str]:
    """Yield a line of YAML for every key of a model, with its description as a comment.

    Args:
        model: schema of the values.
        values: composed values.
        indent: indentation of the lines.
        choices: names of the members of the model's group, separated by commas.
    """
    for name, field in model.model_fields.items():
        key = key_of(name, field)
        described = field.description or (choices if choices and get_origin(field.annotation) is Literal else None)
        yield from _lines_of(field.annotation, key, values.get(key), described, indent)


def _lines_of(annotation: Any, key: str, value: Any, description: str | None, indent: str) -> Iterator[str]:
    meaning = f"  # {description}" if description else ""
    models, inside = members(annotation), values_of(annotation)
    if models and isinstance(value, dict) and (node := chosen(models, value)) is not None:
        yield f"{indent}{key}:"
        yield from _lines(node, value, f"{indent}  ", ", ".join(member_names(models)))
    elif value and isinstance(value, dict) and members(inside):
        yield f"{indent}{key}:{meaning}"
        for name, item in value.items():
            yield from _lines_of(inside, name, item, None, f"{indent}  ")
    else:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
        yield f"{indent}{key}: {text.removesuffix('...' + chr(10)).strip()}{meaning}"
