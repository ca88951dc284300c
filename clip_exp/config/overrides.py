"""Hydra's command-line grammar for people: quoting what it cannot read, and its errors in one sentence."""

import difflib
import re
import traceback
from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from clip_exp.config.load import addresses, from_resolver, nearest, unknown_key
from clip_exp.config.models import names
from clip_exp.config.paths import conf_dir, options
from clip_exp.errors import ConfigError
from clip_exp.secrets import leaks

MULTIRUN_FLAGS = {"-m", "--multirun"}
RERUN_FLAG = "--experimental-rerun"
ALWAYS_CHOSEN = [
    "model",
    "data",
    "loss",
    "optimizer",
    "scheduler",
    "strategy",
    "logger",
    "task",
]


# An element of a list: in quotes, or up to a comma that is in no brackets.
_ELEMENT = re.compile(
    r"""\s*"(?:[^"\\]|\\.)*"\s*(?=,|$)|\s*'(?:[^'\\]|\\.)*'\s*(?=,|$)|(?:\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}|[^,])+"""
)


def quote(arguments: list[str]) -> list[str]:
    """Quote the values that Hydra's grammar cannot read: `=` in a path, Chinese text, parentheses, `{000..009}`.

    In a list the elements are quoted (`texts=[a dog (running),一只猫]`). Outside a sweep a comma is quoted as well
    (`text=a dog, running`), where Hydra would take it for a list of choices. A key of a task may be one that the task's file
    leaves out; whether the task's kind has it is seen when the task is parsed.
    """
    parser = OverridesParser.create()
    sweeping = bool(MULTIRUN_FLAGS & set(arguments))
    quoted = [_quoted(parser, argument, sweeping) for argument in arguments]
    return [f"++{argument}" if re.match(r"task\.[\w@.+-]+=", argument) else argument for argument in quoted]


def check_arguments(arguments: list[str]) -> None:
    """Refuse what Hydra would do or keep before a configuration is composed.

    That is its flag that unpickles a file, also as argparse lets it be abbreviated; `optimizer=null` and `optimizer=3`, for which it
    has no words (names are left to it: they may be the user's own); and of a sweep, whose folder it makes itself and fills with the
    overrides, addresses and secrets.

    Raises:
        ConfigError: a line for every problem.
    """
    problems = []
    sweeping = bool(MULTIRUN_FLAGS & set(arguments))
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if len(key) > len("--") and RERUN_FLAG.startswith(key):
            problems.append(
                f"{RERUN_FLAG} is refused: it runs code from the file. Give the overrides of that run instead."
            )
        if equals and key in ALWAYS_CHOSEN and re.fullmatch(r"(null)?|[\d.+-]+", value.strip("[] ")):
            problems.append(f"{key}={value} is no option: {nearest(value, options(key))}")
        if equals and sweeping:
            problems += [*addresses(value, key), *leaks(value, key)]
    if problems:
        raise ConfigError("\n".join(problems))


def _quoted(parser: OverridesParser, argument: str, sweeping: bool) -> str:
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    try:
        if sweeping or not parser.parse_override(argument).is_sweep_override():
            return argument
    except HydraException:
        pass
    return next((text for text in _spellings(parser, key, value) if _readable(parser, text)), argument)


def _spellings(parser: OverridesParser, key: str, value: str) -> Iterator[str]:
    """A list with its elements in quotes where they need them; then the whole value in quotes."""
    if value.strip().startswith("[") and value.strip().endswith("]"):
        elements = _ELEMENT.findall(value.strip()[1:-1])
        quoted = [e if _readable(parser, f"{key}=[{e}]") else _in_quotes(e.strip()) for e in elements]
        yield f"{key}=[{','.join(quoted)}]"
    yield f"{key}={_in_quotes(value)}"


def _readable(parser: OverridesParser, argument: str) -> bool:
    try:
        parser.parse_override(argument)
    except HydraException:
        return False
    return True


def _in_quotes(text: str) -> str:
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", text) + "'"


def explain(error: BaseException) -> str | None:
    """One sentence for an error of Hydra or OmegaConf, or for a path that is closed to the user: what, where, how to fix.

    None for any other error.
    """
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"{error.filename} may not be read or written by you: change its permissions, or name another."
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException) and (refused := from_resolver(cause)) is not None:
            return str(refused)
        if isinstance(cause, OverrideParseException):
            return f"cannot read the override {cause.override}: write key=value, and quote odd values: \"key='value'\"."
        if isinstance(cause, MissingConfigException):
            return _missing_option(cause)
    for cause in reversed(chain):
        if isinstance(cause, OmegaConfBaseException) and (cause.full_key or cause.key) is not None:
            return _bad_key(cause)
    if isinstance(error, AssertionError) and any(
        "omegaconf" in frame.filename for frame in traceback.extract_tb(error.__traceback__)
    ):
        return (
            "a key is set below a node that is empty here: choose the option that has it first "
            "(logger=wandb before logger.wandb.project, data=digits or data=shapes before data.generate.rows, finetune=lora before finetune.lora.rank)."
        )
    for cause in chain:
        if isinstance(cause, HydraException):
            return _missing_group(str(cause)) or " ".join(str(cause).split())
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _missing_option(error: MissingConfigException) -> str:
    file = error.missing_cfg_file or ""
    if not error.options:
        return " ".join(str(error).split())
    if file.startswith("model/") and not file.startswith(("model/image/", "model/text/")):
        name = file.removeprefix("model/")  # which may have a slash: ViT-B/32
        return f"model={name} does not exist: {nearest(name, {*error.options, *names()})}"
    group, _, name = file.rpartition("/")
    return f"{group}={name} does not exist: {nearest(name, error.options)}"


def _missing_group(message: str) -> str | None:
    """`optimzer=sgd`: Hydra knows neither a group nor a key of that name."""
    match = re.search(r"Could not override '([^'@]+)'", message)
    if match is None:
        return None
    name = match.group(1)
    groups = ["trainer", *(path.name for path in conf_dir().iterdir() if path.is_dir())]
    close = difflib.get_close_matches(name, groups, n=1)
    return f"{name} does not exist" + (
        f": did you mean '{close[0]}'?" if close else ". See --help for the groups and keys."
    )


def _bad_key(error: OmegaConfBaseException) -> str:
    full_key = str(error.full_key or error.key)
    parent = error.parent_node
    valid = [str(key) for key in parent] if parent is not None and hasattr(parent, "keys") else []
    missing = str(error.key) not in valid
    if missing and valid and type(error).__name__ in ("ConfigKeyError", "ConfigAttributeError"):
        return unknown_key(full_key, valid)
    message = str(error.msg if getattr(error, "msg", None) else error).splitlines()[0]
    if "is not a subclass of" in message:  # a node of keys is given one value, as a group is given an option
        return f"{full_key} has no such option: set its keys ({full_key}.<key>=…)."
    return f"{full_key}: {message}"
