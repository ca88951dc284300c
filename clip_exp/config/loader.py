"""Hydra's configuration loader, extended by the schema: defaults of all keys, exact option names, and checks of a user's files.

Hydra parses overrides and merges files, but it does not know the schema. `Loader` adds the defaults of all keys of the
schema to a composed configuration, so that every key can be set, interpolated and completed by the shell. Unknown keys
are left for `compose.typed_config`, which reports all problems at once.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override, OverrideType
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from clip_exp.config import registry, targets
from clip_exp.config.base import GLOBAL_GROUPS, MISSING, Config, chosen, complete, key_of, members
from clip_exp.config.evaluation import TaskConfig
from clip_exp.config.files import options
from clip_exp.config.names import option_like
from clip_exp.errors import ConfigError, nearest

GLOBAL_HEADER = "# @package _global_"
SEARCH_PATH = "hydra.searchpath"
# Keys of the length of a run, which exclude each other
LENGTHS = ("max_steps", "epochs")
NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
# Folders of Hydra's own. clip_exp creates the run folder itself, since it must not exist before.
RUN_DIR, SWEEP_SUBDIR = ".", "."
SWEEP_DIR = "${output_dir}/sweeps/${now:%Y-%m-%d_%H-%M-%S}"
# What to do about a key of a node that is null, by node
HINTS = {
    "logger.wandb": "select logger=wandb",
    "data.generate": "select data=digits or data=shapes",
    "finetune.lora": "select finetune=lora",
    "model": "select a model (model=vit_b32)",
}


class Repository(ConfigRepository):
    """Configuration files in the folders of the search path, with a ConfigError for each problem of a user's files and folders."""

    def initialize_sources(self, config_search_path: Any) -> None:
        given = [each.path for each in config_search_path.get_path() if each.provider.startswith(SEARCH_PATH)]
        if problems := [problem for path in given if (problem := _search_path_problem(path)) is not None]:
            raise ConfigError("\n".join(problems))
        super().initialize_sources(config_search_path)

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None:
            return None
        file = f"{source.full_path().removeprefix('file://')}/{config_path.removesuffix('.yaml')}.yaml"
        try:
            found = super().load_config(config_path)
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}. Fix it.") from error
        assert found is not None
        group, package = config_path.split("/")[0], found.header.get("package") or "_group_"
        if group in GLOBAL_GROUPS and package.split(".")[0] in ("_group_", group):
            raise ConfigError(
                f'{file} needs "{GLOBAL_HEADER}" as its first line: without it, all of its keys are placed under {group}.'
            )
        if not isinstance(found.config, DictConfig):
            raise ConfigError(f"{file} is not a mapping: write a line key: value for every key.")
        return found


def _search_path_problem(path: str) -> str | None:
    """Return an error message for an entry of `hydra.searchpath` that cannot be used; None if it can."""
    scheme, _, place = path.rpartition("://")
    if scheme in ("", "file"):
        return None if Path(place).is_dir() else f"{SEARCH_PATH}: {path} is not a folder. Give an existing folder."
    if scheme != "pkg":
        return f"{SEARCH_PATH}: {path} is not supported. Give a folder (file:///folder) or a Python package (pkg://package)."
    try:
        problem = None if SourcesRegistry.instance().resolve(scheme)(SEARCH_PATH, path).available() else "is not found"
    except Exception as error:  # of the package's own code
        problem = f"cannot be imported ({type(error).__name__}: {error})"
    if problem is None:
        return None
    return f"{SEARCH_PATH}: {path} {problem}. Give a package with an __init__.py that Python can import, or a folder."


class RunFile(NamedTuple):
    """Configuration file in a run folder, which may be that of a third party."""

    file: str
    reason: str  # why its folder is known to be a run folder

    def refuse_packages(self, paths: Any) -> None:
        """Raise a ConfigError if the file adds a package to the search path, which would be imported."""
        for path in (path for path in map(str, paths or ()) if path.startswith("pkg://")):
            raise ConfigError(
                f"{self.file}: {SEARCH_PATH} has {path}, which is not imported, since {self.reason}. If you trust the package, give "
                f"{SEARCH_PATH}=[{path}] on the command line."
            )

    def refuse_hydra(self, keys: list[str]) -> None:
        """Raise a ConfigError if the file sets keys of Hydra: its callbacks, logging and environment variables run any code."""
        if keys:
            raise ConfigError(
                f"{self.file} sets {', '.join(keys)}, which is not used, since {self.reason}. Remove it from the file. If you trust it, "
                "give it on the command line."
            )


class Loader(ConfigLoaderImpl):
    """Hydra's configuration loader, extended by a schema. It is pickled when a sweep starts other processes."""

    def __init__(self, search_path: Any, schema: type[Config]) -> None:
        super().__init__(search_path)
        self.repository = Repository(search_path)
        self.schema = schema
        self._cached: tuple[Any, DictConfig] | None = None
        self._overrides: list[Override] = []
        self._deleted: list[str] = []
        self._composed: dict[str, Any] = {}
        self._of_run: RunFile | None = None

    def cache(self, config: DictConfig, config_name: str | None, overrides: list[str]) -> None:
        """Cache a composed configuration, so that Hydra does not compose it again."""
        self._cached = ((config_name, overrides, RunMode.RUN), config)

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        if self._cached is not None and self._cached[0] == (config_name, overrides, run_mode):
            config, self._cached = self._cached[1], None
            return config
        config = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        if problems := list(_folder_problems(config.hydra, self.schema)):
            raise ConfigError("\n".join(problems))
        if config_name is not None:
            self._apply_schema(config)
        return config

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: list[Override], repo: Any) -> None:
        """Add the folders of `hydra.searchpath`.

        Python files are imported only from folders on the command line. A file that sets `hydra.searchpath` may be that of a
        run to repeat, which may come from a third party.
        """
        given = next((each.value() for each in parsed_overrides if each.get_key_element() == SEARCH_PATH), None)
        if isinstance(given, str):
            raise ConfigError(f"{SEARCH_PATH}={given} must be a list: write {SEARCH_PATH}=[{given}].")
        if config_name is not None and (primary := repo.load_config(config_name)) is not None:
            folder = primary.path.removeprefix("file://")
            trace = registry.trace_of_a_run(Path(folder))
            if trace is not None:
                self._of_run = RunFile(f"{folder}/{config_name}.yaml", f"{folder} is a run folder ({trace})")
                if given is None:
                    self._of_run.refuse_packages(OmegaConf.select(primary.config, SEARCH_PATH))
        super()._process_config_searchpath(config_name, parsed_overrides, repo)
        for path in map(str, given if isinstance(given, list) else ()):
            if path.startswith("file://") or "://" not in path:
                registry.add_folder(path.removeprefix("file://"), SEARCH_PATH)

    def _parse_overrides_and_create_caching_repo(self, config_name: str | None, overrides: list[str]) -> Any:
        """Parse overrides. Values may be set for any key, since the schema checks keys later. A deleted key gets its default."""
        parsed, repository = super()._parse_overrides_and_create_caching_repo(config_name, overrides)
        self._overrides, self._deleted = [], []
        remaining = []
        for override in parsed:
            _name_option(override, repository)
            is_value = not override.is_hydra_override() and (
                not repository.group_exists(override.key_or_group) or isinstance(override._value, dict)
            )
            if is_value and override.is_delete() and override.package is None:
                self._deleted.append(override.key_or_group)
                continue
            if is_value and override.package is None:
                self._overrides.append(Override(**vars(override)))
                override.type = OverrideType.FORCE_ADD
            remaining.append(override)
        return remaining, repository

    def _compose_config_from_defaults_list(self, defaults: Any, repo: Any) -> DictConfig:
        """Merge Hydra's own configuration files, adapted to clip_exp, with all other files, completed by the schema's defaults."""
        hydras = [default for default in defaults if str(default.config_path).startswith("hydra/")]
        config = super()._compose_config_from_defaults_list(hydras, repo)
        _configure_hydra(
            config.hydra, {default.config_path for default in hydras}, "output_dir" in self.schema.model_fields
        )
        rest = OmegaConf.create()
        for default in (default for default in defaults if default not in hydras):
            file = super()._compose_config_from_defaults_list([default], repo)
            before, given = container(rest), set(_keys_set("", container(file)))
            rest.merge_with(file)
            if before:
                merged = container(rest)
                if _drop_other_members(self.schema, before, merged, given, ""):
                    rest = OmegaConf.create(merged)
        hydra = rest.pop("hydra", None)
        if self._of_run is not None:
            paths = [str(default.config_path) for default in hydras]
            own = [path for path in paths if repo.load_config(path).path.startswith("file://")]
            self._of_run.refuse_hydra([*own, *(f"hydra.{key}" for key in hydra or () if f"hydra.{key}" != SEARCH_PATH)])
        if hydra is not None:
            config.merge_with({"hydra": hydra})
        if any(default.primary for default in defaults):
            self._composed = complete(self.schema, container(rest))
            for key, value in self._composed.items():
                config[key] = value
            self._require_nodes()
        return config

    def _require_nodes(self) -> None:
        """Raise a ConfigError if an override sets a key of a node that is null or a list, unless the key is added with `+`."""
        given = {override.key_or_group: override.value() for override in self._overrides if not override.is_delete()}
        problems = list(_unselected_tasks(self._composed.get("task"), given))
        for override in self._overrides:
            parts = override.key_or_group.split(".")
            value: Any = self._composed
            for depth, part in enumerate(parts[:-1], start=1):
                value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
                node = ".".join(parts[:depth])
                creates = f"{node}.{targets.TARGET}" in given
                if value is None and node not in given and not creates and override.type is OverrideType.CHANGE:
                    hint = HINTS.get(
                        node, f"select an option that sets it, or add the key with +{override.key_or_group}=…"
                    )
                    problems.append(f"{override.key_or_group} cannot be set, since {node} is null: {hint}.")
                    break
                if isinstance(given.get(node, value), list) and not _part_of_list(parts[depth]):
                    problems.append(
                        f"{override.key_or_group} cannot be set, since {node} is a list: set all of it ({node}=[…])."
                    )
                    break
        if problems:
            raise ConfigError("\n".join(problems))

    def _apply_schema(self, config: DictConfig) -> None:
        """Add defaults after overrides were applied. If an override selected another member of a group, drop the former member's keys."""
        composed = container(config)
        del composed["hydra"]
        values = copy.deepcopy(composed)
        for key in self._deleted:
            if not _delete(values, key.split(".")):
                # Not a key of the schema, so that the key to delete is reported as unknown.
                values[f"~{key}"] = None
        typed = {key for override in self._overrides for key in _keys_set(override.key_or_group, override.value())}
        _drop_other_members(self.schema, self._composed, values, typed, "")
        _prefer_typed_length(values, typed)
        complete(self.schema, values)
        with open_dict(config):
            for key in composed.keys() - values.keys():
                del config[key]
            for key, value in values.items():
                if key not in composed or composed[key] != value:
                    config[key] = value


def _name_option(override: Override, repository: Any) -> None:
    """Give an override the exact names of its options: `optimizer=AdamW` and `strategy=DeepSpeed-Stage-2` are accepted.

    Raises:
        ConfigError: several options differ only in case, `-` and `_`.
    """
    group = override.key_or_group
    value: Any = override.value()
    typed = value if isinstance(value, list) else [value]
    if override.is_delete() or not all(isinstance(name, str) for name in typed) or not repository.group_exists(group):
        return
    valid = repository.get_group_options(group, ObjectType.CONFIG)
    found = [option_like(group, name, valid) for name in typed]
    if found != typed:
        override._value = found if isinstance(value, list) else found[0]


def _prefer_typed_length(values: dict[str, Any], typed: set[str]) -> None:
    """Let `max_steps` or `epochs` of the command line replace the other one, which a recipe or file may set."""
    given = [key for key in LENGTHS if key in typed and values.get(key) is not None]
    if len(given) == 1:
        values.update((key, None) for key in LENGTHS if key in values and key not in given)


def _keys_set(key: str, value: Any) -> Iterator[str]:
    """Yield the full keys that an override sets; its value may be a mapping."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _keys_set(f"{key}.{name}".removeprefix("."), inner)
    else:
        yield key


def _part_of_list(key: str) -> bool:
    """Return True if a key is an index into a list."""
    return key.removeprefix("-").isdecimal()


def _unselected_tasks(tasks: Any, given: dict[str, Any]) -> Iterator[str]:
    """Yield an error message for every task whose keys are set, but which is neither selected nor a custom task."""
    names = {parts[1] for key in given if len(parts := key.split(".")) > 2 and parts[0] == "task"}
    kinds = ", ".join(TaskConfig.kinds())
    for name in sorted(names - set(tasks or ())):
        if not {f"task.{name}", f"task.{name}.kind", f"task.{name}.{targets.TARGET}"} & given.keys():
            hint = f"add it to task=[…,{name}]." if name in options("task") else nearest(name, options("task"))
            yield f"task.{name} is not selected: {hint} A custom task needs a kind: {kinds}."


def _configure_hydra(hydra: DictConfig, files: set[str], has_output_dir: bool) -> None:
    """Replace some of Hydra's defaults, unless the user has selected another option of the group."""
    if "hydra/output/default" in files:
        hydra.output_subdir = None
        hydra.run.dir = RUN_DIR
        hydra.sweep.dir = SWEEP_DIR if has_output_dir else RUN_DIR
        hydra.sweep.subdir = SWEEP_SUBDIR
    hydra.job.chdir = False
    for group in ("hydra_logging", "job_logging"):
        if f"hydra/{group}/default" in files:
            hydra[group] = NO_LOGGING


def _folder_problems(hydra: DictConfig, schema: type[Config]) -> Iterator[str]:
    """Yield an error message for every key that would move Hydra's folders, in which clip_exp writes nothing."""
    values: Any = OmegaConf.to_container(hydra, resolve=False)
    fields = schema.model_fields
    folder = "output_dir" if "output_dir" in fields else "output"
    found = {
        "run.dir": (values["run"]["dir"], (RUN_DIR,), folder),
        "sweep.dir": (values["sweep"]["dir"], (RUN_DIR, SWEEP_DIR), folder),
        "sweep.subdir": (values["sweep"]["subdir"], (SWEEP_SUBDIR,), "name" if "name" in fields else folder),
    }
    where = (
        "results are in <output_dir>/<command>/<name>/<time>" if folder == "output_dir" else "results are written there"
    )
    for key, (value, ours, instead) in found.items():
        if value not in ours:
            yield f"hydra.{key}={value} is not supported: set {instead}={value}, since {where}."
    if values["output_subdir"] is not None:
        yield "hydra.output_subdir is not supported: leave it out, since the folder of a run has its config.yaml and run.json."
    if values["job"]["chdir"]:
        yield "hydra.job.chdir=true is not supported: leave it out, since paths are relative to the folder of the command."


def container(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain values, with unresolved interpolations."""
    return OmegaConf.to_container(config, resolve=False, enum_to_str=True)  # type: ignore[return-value]


def _delete(values: Any, parts: list[str]) -> bool:
    """Delete a nested key; return True if it existed."""
    for part in parts[:-1]:
        values = values.get(part) if isinstance(values, dict) else None
    if not isinstance(values, dict) or parts[-1] not in values:
        return False
    del values[parts[-1]]
    return True


def _drop_other_members(model: type[Config], before: Any, after: Any, typed: set[str], at: str) -> bool:
    """Remove the values of a group's former member after another member was selected, except values that the new member requires.

    Args:
        model: schema of the values.
        before: values before the selection.
        after: values after the selection; changed in place.
        typed: full keys of the overrides, or of the file, that made the selection; their values are retained.
        at: prefix of the values' full keys.

    Returns:
        True if a value was removed.
    """
    removed = False
    for name, field in model.model_fields.items():
        key, models = key_of(name, field), members(field.annotation)
        old, new = before.get(key), after.get(key)
        if not models or not isinstance(old, dict) or not isinstance(new, dict):
            continue
        was, now = chosen(models, old), chosen(models, new)
        if now is None:
            continue
        if was is now:
            removed |= _drop_other_members(now, old, new, typed, f"{at}{key}.")
            continue
        needed = {key_of(name, field) for name, field in now.model_fields.items() if field.is_required()}
        for each in list(new):
            if each not in needed and not any(f"{given}.".startswith(f"{at}{key}.{each}.") for given in typed):
                del new[each]
                removed = True
    return removed
