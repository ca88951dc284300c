"""Command lines: flags, `--key=value`, positional arguments, quoting, and problems to find before Hydra composes a configuration.

`read` brings the arguments of a command into the form that Hydra parses: overrides, then Hydra's own flags.
"""

import re
from collections import deque
from collections.abc import Iterator
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from clip_exp.config import words
from clip_exp.config.base import Config, key_of, nearest_key, roots_of
from clip_exp.config.commands import SCHEMAS
from clip_exp.config.files import addresses, conf_dir, options
from clip_exp.config.help import split_topics
from clip_exp.config.names import ADAPTER, resolve
from clip_exp.errors import ConfigError, nearest
from clip_exp.secrets import leaks

MULTIRUN_FLAGS = {"-m", "--multirun"}
RERUN_FLAG = "--experimental-rerun"
# Flags of old torch launchers; the rank is read from the environment
IGNORED_FLAGS = {"--local_rank", "--local-rank"}
ALWAYS_CHOSEN = ["model", "data", "loss", "optimizer", "scheduler", "strategy", "logger", "task"]
# Key of a command's positional argument
POSITIONAL = {"convert": "file"}

# ---------------------------------------------------------------------------------------------------------- flags


def sweeps(arguments: list[str]) -> bool:
    """Return True if the arguments have Hydra's flag for sweeps."""
    return bool(MULTIRUN_FLAGS & set(arguments))


def read(command: str, arguments: list[str]) -> list[str]:
    """Return the overrides of a command line, then its flags for Hydra.

    `--key=value` with a full key is an override. Topics of `--help` are left as they are. Flags may stand between
    overrides. The ranks that old torch launchers append are left out.

    Raises:
        ConfigError: one line for every flag that is neither a key nor Hydra's, with the override to type.
    """
    hydras = {option: action for action in get_args_parser()._actions for option in action.option_strings}
    overrides, flags, problems = [], [], []
    topics, others = split_topics(arguments)
    rest = deque(others)
    while rest:
        argument = rest.popleft()
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            overrides.append(_positional(command, argument))
        elif name in IGNORED_FLAGS:
            if not equals and rest and rest[0].isdecimal():
                rest.popleft()
        elif equals and _is_key(command, name):
            overrides.append(f"{name[2:]}={value}")
        elif name in hydras and name != RERUN_FLAG:
            flags.append(argument)
            if not equals and rest and _takes(hydras[name], rest[0]):
                flags.append(rest.popleft())
        else:
            given = value if equals else rest.popleft() if rest and _is_value(rest[0]) else None
            problems.append(_flag_problem(command, argument, name, given, [*hydras]))
    if problems:
        raise ConfigError("\n".join(problems))
    return [*overrides, *topics, *flags]


def _positional(command: str, argument: str) -> str:
    """Add the key to a positional argument, if the command accepts one."""
    key = POSITIONAL.get(command)
    return argument if key is None or "=" in argument or argument.startswith(("+", "~")) else f"{key}={argument}"


def _takes(action: Any, following: str) -> bool:
    """Return True if a flag of Hydra takes the following argument as its value."""
    return following in action.choices if action.nargs == "?" else action.nargs is None


def _is_key(command: str, flag: str) -> bool:
    """Return True if the name of a flag is a full key or a group of the command. The schema checks nested keys later."""
    key = flag.removeprefix("--")
    known = key in _top_level(SCHEMAS[command]) or key in groups()
    return flag.startswith("--") and ("." in key or "/" in key or known)


def groups() -> list[str]:
    """Return the names of the groups in `conf/`, without nested ones."""
    return [path.name for path in conf_dir().iterdir() if path.is_dir()]


def _top_level(schema: type[Config]) -> dict[str, Any]:
    return {key_of(name, field): field.annotation for name, field in schema.model_fields.items()}


def _is_value(argument: str) -> bool:
    """Return True for an argument after an unknown flag that is the flag's value."""
    return re.fullmatch(r"-[\d.]\S*", argument) is not None or not (argument.startswith("-") or "=" in argument)


def _flag_problem(command: str, argument: str, name: str, value: str | None, hydras: list[str]) -> str:
    """Return an error message for an unknown flag, with the override or flag to type."""
    typed = argument if value is None or "=" in argument else f"{argument} {value}"
    schema, key = SCHEMAS[command], name.lstrip("-").replace("-", "_")
    top_level = _top_level(schema)
    if len(name) > len("--") and RERUN_FLAG.startswith(name) and key not in groups():
        return f"{RERUN_FLAG} is not supported, since it executes code from the file. Pass the overrides of that run instead."
    if key in top_level or key in groups() or "." in key:
        given = value if value is not None else "true" if top_level.get(key) is bool else "…"
        override = words.in_shell(f"{key}={given}")
        return f"{typed} is not a flag: {words.of_value(key, given) or f'type {override}.'}"
    if instead := words.answer(key, value, roots_of(top_level)):
        return f"{typed} is not a flag: {instead}"
    full = [option for option in hydras if option.startswith(name.replace("_", "-"))]
    if len(full) == 1 and name.startswith("--"):
        return f"{typed} is not a flag: type {full[0]}."
    best = nearest_key(schema, key)
    hint = f"did you mean {best}={value or '…'}?" if best else "keys are set with key=value; --help lists them."
    return f"{typed} is not a flag: {hint}"


# --------------------------------------------------------------------------------------------------------- checks


def check_arguments(arguments: list[str]) -> None:
    """Check arguments for problems that must be found before Hydra composes a configuration.

    - For `optimizer=null` and `optimizer=3`, Hydra's own message is unclear. Unknown names are left to Hydra, since
      options can be custom.
    - `model.name=ViT-B-32` would only rename the selected model.
    - In a sweep, Hydra saves the overrides in a folder of its own, so URLs and secrets are refused here.

    Raises:
        ConfigError: one line for every problem.
    """
    problems = [*_misnamed_model(arguments)]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ALWAYS_CHOSEN and re.fullmatch(r"(null)?|[\d.+-]+", value.strip("[] ")):
            problems.append(f"{key}={value} does not exist: {nearest(value, options(key))}")
        if equals and sweeps(arguments):
            problems += [*addresses(value, key), *leaks(value, key)]
    if problems:
        raise ConfigError("\n".join(problems))


def _misnamed_model(arguments: list[str]) -> Iterator[str]:
    """Yield an error message for a `model.name` that is the name of another model than the selected one."""
    values = dict(argument.lstrip("+").split("=", 1) for argument in arguments if "=" in argument)
    named, model = resolve(values.get("model.name", "")), values.get("model")
    # Options of the user have any name.
    selected = None if model is None else resolve(model)
    if named is None or (model is not None and selected is None) or {"--config-name", "-cn"} & {*arguments}:
        return
    if selected is None or selected.option not in (named.option, ADAPTER):
        name = values["model.name"]
        yield f"model.name={name} does not select the model {name}, but only renames the selected one: type model={name}."


# -------------------------------------------------------------------------------------------------------- quoting

# An element of a list: a quoted string, or all characters up to the next comma outside brackets.
_ELEMENT = re.compile(
    r"""\s*"(?:[^"\\]|\\.)*"\s*(?=,|$)|\s*'(?:[^'\\]|\\.)*'\s*(?=,|$)|(?:\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}|[^,])+"""
)


def quote(overrides: list[str], *, sweeping: bool = False) -> list[str]:
    """Quote the values that Hydra's grammar cannot parse: `=` in a path, Chinese text, parentheses, `{000..009}`.

    The elements of a list are quoted one by one (`texts=[a dog (running),一只猫]`). Outside a sweep, a value with commas
    is quoted as well (`text=a dog, running`), which Hydra would parse as a choice sweep.
    """
    parser = OverridesParser.create()
    return [_quoted(parser, override, sweeping) for override in overrides]


def _quoted(parser: OverridesParser, argument: str, sweeping: bool) -> str:
    key, equals, value = argument.partition("=")
    if not equals:
        return argument
    try:
        if sweeping or not parser.parse_override(argument).is_sweep_override():
            return argument
    except HydraException:
        pass
    return next((text for text in _spellings(parser, key, value) if _readable(parser, text)), argument)


def _spellings(parser: OverridesParser, key: str, value: str) -> Iterator[str]:
    """Yield candidates for a quoted override: a list with only those elements quoted that need it, then the whole value quoted."""
    if value.strip().startswith("[") and value.strip().endswith("]"):
        elements = _ELEMENT.findall(value.strip()[1:-1])
        quoted = [e if _readable(parser, f"{key}=[{e}]") else in_quotes(e.strip()) for e in elements]
        yield f"{key}=[{','.join(quoted)}]"
    yield f"{key}={in_quotes(value)}"


def _readable(parser: OverridesParser, argument: str) -> bool:
    try:
        parser.parse_override(argument)
    except HydraException:
        return False
    return True


def in_quotes(text: str) -> str:
    """Return a text in single quotes, in Hydra's grammar."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"
