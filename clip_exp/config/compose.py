"""Composition of a typed configuration from a command line: Hydra merges `conf/` and overrides, and the schema validates the result.

Hydra finds and merges files and handles groups, overrides and sweeps, with the loader of `loader.py`.
"""

import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from omegaconf.resolvers import oc

from clip_exp.config import registry, targets
from clip_exp.config.base import (
    MISSING,
    UNKNOWN,
    parse,
    typed_keys,
)
from clip_exp.config.command_line import check_arguments, quote, sweeps
from clip_exp.config.commands import SCHEMAS
from clip_exp.config.files import addresses, conf_dir
from clip_exp.config.help import explain_topics, overview, split_topics
from clip_exp.config.loader import Loader, container
from clip_exp.config.messages import explain, from_resolver
from clip_exp.config.names import open_clip_field, translate
from clip_exp.errors import ConfigError
from clip_exp.secrets import names_secret

Work = Callable[[Callable[[], Any]], None]
# Name of OmegaConf's resolver of environment variables
ENVIRONMENT = "oc.env"

# -------------------------------------------------------------------------------------------------- configurations


def compose(command: str, overrides: list[str]) -> Any:
    """Compose the typed configuration of a command (train, evaluate, …), as the command line does.

    Raises:
        ConfigError: one line for every unknown key or option, missing or invalid value, malformed override, or flag.
    """
    flags = [text for text in overrides if text.startswith("-")]
    if flags:
        what = "sweeps are" if sweeps(flags) else "flags are"
        raise ConfigError(f"{flags[0]}: {what} supported on the command line only. Give overrides as key=value.")
    check_arguments(overrides)
    return typed_config(command, compose_config(command, overrides), overrides)


def compose_config(command: str, overrides: list[str]) -> DictConfig:
    """Compose the configuration of a command with Hydra, with all defaults of the schema and unresolved interpolations.

    Raises:
        ConfigError: unknown option or malformed override.
    """
    try:
        hydra = _hydra(command)
        config = hydra.compose_config(
            config_name(command),
            quote(translate(overrides)),
            RunMode.RUN,
            with_log_configuration=False,
            from_shell=False,
        )
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        raise ConfigError(message) from error
    with open_dict(config):
        del config["hydra"]
    return config


def typed_config(command: str, config: DictConfig, overrides: list[str], *, own_file: bool = True) -> Any:
    """Convert a composed configuration to the command's schema. All other code uses the typed configuration.

    Code that the user names is allowed from now on: by `_target_` on the command line or in the user's options, and by
    `allow_targets`.

    Args:
        command: name of the command.
        config: composed configuration.
        overrides: overrides from the command line; each of their keys must have an effect.
        own_file: whether the primary configuration is the user's or ours; False: it may be that of a third party's run.

    Raises:
        ConfigError: one line for every problem.
    """
    found: list[str] = []
    keys = [key for key in map(str, config) if key != "hydra"]
    with open_dict(config):
        config[targets.TOTAL_STEPS] = targets.TOTAL_STEPS
    with secrets_refused():
        values = {key: _resolved_item(config, key, key, found) for key in keys}
    with open_dict(config):
        del config[targets.TOTAL_STEPS]
    found += addresses(values)
    try:
        typed = parse(SCHEMAS[command], values, typed=typed_keys(overrides))
    except ConfigError as error:
        raise ConfigError("\n".join([*found, *str(error).splitlines()])) from None
    if found:
        raise ConfigError("\n".join(found))
    _allow_targets(values, overrides, own_file=own_file)
    targets.require_allowed(values, f"{config_name(command)}.yaml")
    return typed


# `_target_` in an override, on its own or in a mapping
_TYPED_TARGET = re.compile(rf"{targets.TARGET}['\"]?\s*[:=]\s*['\"]?([\w.]+)")


def _allow_targets(values: dict[str, Any], overrides: list[str], *, own_file: bool) -> None:
    """Allow the custom code that the user names; see `typed_config`."""
    named = {name for _, name in targets.targets_of(values)}
    # Options, too, may be those of a third party's run, if its folder is given as a folder of the user.
    own_file = own_file and not any(map(registry.trace_of_a_run, registry.folders()))
    if own_file or "allow_targets" in typed_keys(overrides):
        targets.allow(values.get("allow_targets") or ())
    targets.allow(sorted(named if own_file else named & {*_TYPED_TARGET.findall(" ".join(overrides))}))


def config_name(command: str) -> str:
    """Return the name of a command's file in `conf/`, without the extension."""
    return command.replace("-", "_")


def _resolved(node: Any, at: str, found: list[str]) -> Any:
    """Resolve a node to plain values.

    Interpolations that fail are appended to `found`. An interpolation of a missing value counts as missing.
    """
    if isinstance(node, ListConfig):
        return [_resolved_item(node, i, f"{at}[{i}]", found) for i in range(len(node))]
    if isinstance(node, DictConfig):
        return {str(key): _resolved_item(node, key, f"{at}.{key!s}" if at else str(key), found) for key in node}
    return node


def _resolved_item(node: Any, key: Any, full_key: str, found: list[str]) -> Any:
    if OmegaConf.is_missing(node, key):
        return MISSING
    try:
        value = node[key]
    except InterpolationToMissingValueError:
        return UNKNOWN
    except OmegaConfBaseException as error:
        refusal = from_resolver(error)
        if (
            problem := str(refusal) if refusal is not None else f"{full_key}: {str(error).splitlines()[0]}"
        ) not in found:
            found.append(problem)
        return UNKNOWN
    return _resolved(value, full_key, found)


# --------------------------------------------------------------------------------------------------------- Hydra


def _hydra(command: str, config_dir: str | None = None, config_name: str | None = None) -> Hydra:
    """Return a Hydra instance that searches `conf/` and the user's folders.

    Args:
        command: name of the command.
        config_dir: value of --config-dir.
        config_name: name of a file in `config_dir`. The folder may be that of a run to repeat, so options are found
            there, but Python files in it are not executed.
    """
    version.setbase("1.3")
    search_path = create_config_search_path(str(conf_dir()))
    user_dirs = dict.fromkeys(registry.folders(), registry.FOLDERS)
    if config_dir is not None:
        user_dirs.setdefault(Path(config_dir).absolute(), "--config-dir")
        if config_name is None:
            registry.add_folder(config_dir, "--config-dir")
    for folder, origin in user_dirs.items():
        registry.require_folder(folder, origin)
        search_path.prepend(origin, f"file://{folder}", SearchPathQuery(provider="schema", path=None))
    hydra = Hydra(command, Loader(search_path, SCHEMAS[command]))
    OmegaConf.register_new_resolver("open_clip", open_clip_field, replace=True)
    return hydra


def run_hydra(command: str, arguments: list[str], job: Work) -> None:
    """Run a job, run the jobs of a sweep, or show the configuration, depending on the flags.

    Args:
        command: name of the command.
        arguments: flags and overrides.
        job: work of the command. Its argument is a function that returns the typed configuration or raises a ConfigError.

    Raises:
        ConfigError: the command line or the configuration is invalid. Errors of Hydra and OmegaConf also propagate; see
            `explain`.
    """
    topics, arguments = split_topics(arguments)
    check_arguments(arguments)
    parser = get_args_parser()
    args = parser.parse_args(arguments)
    hydra = _hydra(command, args.config_dir, args.config_name)
    args.overrides = quote(translate(args.overrides), sweeping=args.multirun)
    name, overrides = args.config_name or config_name(command), args.overrides
    if args.help:
        text = help_of(command, hydra, name, overrides, topics)
        try:
            print(text, flush=True)
        except BrokenPipeError:
            # The reader, such as `head`, has closed the pipe: prevent a second error when Python flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif args.hydra_help:
        hydra.hydra_help(config_name=name, args_parser=parser, args=args)
    elif args.cfg is not None:
        _show(command, hydra, name, args)
    elif args.shell_completion:
        hydra.shell_completion(config_name=name, overrides=overrides)
    elif args.info is not None:
        hydra.show_info(args.info, config_name=name, overrides=overrides)
    else:
        _run(command, hydra, name, overrides, job, sweeps=args.multirun)


def _run(command: str, hydra: Hydra, name: str, overrides: list[str], job: Work, sweeps: bool) -> None:
    typed_of = partial(typed_config, command, overrides=overrides, own_file=name == config_name(command))
    if not sweeps:
        config = hydra.compose_config(name, overrides, RunMode.RUN, with_log_configuration=False)
        sweeps = config.hydra.mode == RunMode.MULTIRUN
    if sweeps:
        hydra.multirun(
            name,
            lambda of_job: job(lambda: typed_of(of_job)),
            [*overrides, "hydra.mode=MULTIRUN"],
        )
        return
    typed = typed_of(config)
    assert isinstance(hydra.config_loader, Loader)
    hydra.config_loader.cache(config, name, overrides)
    hydra.run(name, lambda _: job(lambda: typed), overrides)


def _show(command: str, hydra: Hydra, name: str, args: Namespace) -> None:
    """Print a configuration. Raise a ConfigError if it is invalid; missing values are allowed."""
    if args.cfg == "job":
        config = hydra.compose_config(name, args.overrides, RunMode.RUN, with_log_configuration=False)
        with _missing_allowed():
            typed_config(command, config, args.overrides)
        assert isinstance(hydra.config_loader, Loader)
        hydra.config_loader.cache(config, name, args.overrides)
    hydra.show_cfg(name, args.overrides, cfg_type=args.cfg, package=args.package, resolve=args.resolve)


@contextmanager
def _missing_allowed() -> Iterator[None]:
    """Suppress errors about missing values, and raise all others."""
    try:
        yield
    except ConfigError as error:
        if other := [line for line in str(error).splitlines() if " has no value" not in line]:
            raise ConfigError("\n".join(other)) from None


def help_of(command: str, hydra: Hydra, name: str, overrides: list[str], topics: list[str]) -> str:
    """Return the help text of a command, or of the groups, options and keys in `topics`."""
    assert isinstance(hydra.config_loader, Loader)
    # The loader's method `get_group_options` would copy the repository for each group.
    repository = hydra.config_loader._parse_overrides_and_create_caching_repo(name, overrides)[1]
    config = hydra.compose_config(name, overrides, RunMode.RUN, with_log_configuration=False)
    groups = sorted(group for group in config.hydra.runtime.choices if not group.startswith("hydra/"))
    found = {group: sorted(repository.get_group_options(group, ObjectType.CONFIG)) for group in groups}
    selectable = {group: names for group, names in found.items() if names}
    if topics:
        return explain_topics(command, topics, selectable)
    return overview(command, container(config), selectable)


# ------------------------------------------------------------------------------------------------------ resolvers


@contextmanager
def secrets_refused() -> Iterator[None]:
    """Make `${oc.env:NAME}` of a secret an error inside the block, since the resolved value would be saved in the run folder.

    The former resolver is restored afterwards, since clip_exp may run inside another program that uses OmegaConf.
    """
    # OmegaConf has no public function that returns a registered resolver.
    resolvers = BaseContainer._resolvers
    before = resolvers[ENVIRONMENT]
    OmegaConf.register_new_resolver(ENVIRONMENT, environment_variable, replace=True)
    try:
        yield
    finally:
        resolvers[ENVIRONMENT] = before


def environment_variable(name: str, *default: Any) -> Any:
    """Resolve `${oc.env:<name>}`.

    Raises:
        ConfigError: the name of the variable looks like that of a secret, whether or not the variable is set.
    """
    if names_secret(name):
        raise ConfigError(
            f"${{oc.env:{name}}} is not allowed: {name} looks like the name of a secret, and the configuration is saved in the run "
            "folder. Libraries read their secrets from the environment themselves. If the value is not a secret, rename the variable."
        )
    return oc.env(name, *default)
