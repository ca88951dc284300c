"""Choice of the run folder: resume an earlier run that computes the same, or create a new folder. Done once, by one process.

The identity of a run consists of its configuration (except where and how it runs) and of the contents of its files: tables, images and
start weights. The paths themselves do not count, so a project that was moved can resume its runs. A command becomes a `Request`, which
is compared with the earlier runs of the same name, and then the run to resume or a new folder is opened. Opening also completes the
configuration with values that depend on the start weights, such as an activation.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clip_exp.checkpoints.folders import FOLDER, checkpoints, step_of, was_saved
from clip_exp.config.base import plain
from clip_exp.config.data import IMAGE_FORMATS, CustomDataConfig
from clip_exp.config.files import older_names, to_yaml
from clip_exp.config.targets import require_allowed
from clip_exp.config.training import TrainConfig
from clip_exp.data.preflight import changes, image_changes
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.reports.names import task_of
from clip_exp.runs import (
    CONFIG,
    LAST_CHECKPOINT,
    METRICS,
    RECORD,
    RunRecord,
    check_tokenizer,
    create_run_folder,
    is_free,
    read_config,
    read_record,
    record_problem,
    save_tokenizer,
    warn,
    write_text,
)
from clip_exp.storage import file_sha256, remove_all_leftovers
from clip_exp.training.preflight import rehearse
from clip_exp.weights.find import find_weights, hash_weights, key_of, local_weights
from clip_exp.weights.inspect import as_resolved, note_architecture, resolve_model

if TYPE_CHECKING:
    from clip_exp.config.jobs import Job  # imports Hydra

# Keys that may change when a run is resumed: they control where and how it runs, not what it computes.
NOT_IN_IDENTITY = (
    "resume", "output_dir", "allow_targets", "strategy.", "trainer.", "logger.", "micro_batch_size", "log_every_n_steps", "compile",
    "max_skipped_steps", "checkpoint_async",
    "checkpoint_every_n_steps", "keep_checkpoints", "keep_every_n_steps", "val_every_n_steps", "task", "data.num_workers", "data.max_bad_fraction",
    "data.max_empty_caption_fraction", "data.allow_changed", "data.timeout_s", "hang_timeout_s", "callbacks.progress", "callbacks.save_retry_s",
)  # fmt: skip
IN_IDENTITY = (
    "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm", "trainer.sync_batchnorm", "trainer.limit_val_batches",
)  # fmt: skip
# Keys of the identity that older versions did not have, with their defaults, which those versions computed with
LATER = {
    "data.columns": [],
    "min_delta": 0.001,  # older versions used 0, but only with `patience`; all other runs would not be recognized
    "trainer.gradient_clip_algorithm": "norm",
    "trainer.sync_batchnorm": False,
    "trainer.limit_val_batches": None,
}
# Keys whose default has changed: the present one, and that of older versions, whose runs are recognized by it
FORMER_DEFAULTS = {"data.image_formats": (list(IMAGE_FORMATS), ["JPEG", "PNG", "WEBP", "GIF", "BMP"])}
DATA_PATHS = ("data.train", "data.val", "data.image_root")
STARTS = ("pretrained", "pretrained_image", "pretrained_text")
LISTED = 3  # number of paths that a message lists
LENGTH = {"max_steps", "epochs"}  # may change if the run is named by resume=PATH
REPORT = "report.html"


# --------------------------------------------------------------------------------------------------- identity of a run


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return the values, by dotted key, that determine what the run computes, without those that control where and how it runs."""
    values = {key: value for key, value in flatten(plain(config)).items() if key not in LATER or value != LATER[key]}
    if isinstance(config.data, CustomDataConfig) and "image_root" in config.data.arguments:
        # Not a path of tables, whose contents are compared instead (`without_paths`).
        values["data.image_root (argument)"] = values.pop("data.image_root")
    return {key: value for key, value in values.items() if not key.startswith(NOT_IN_IDENTITY) or key in IN_IDENTITY}


def fingerprint(config: TrainConfig) -> str:
    """Return a hash of the run's identity without its paths."""
    return _hash(without_paths(identity(config)))


def without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Return an identity without paths: data and weights are compared by content, see `Request.differences`."""
    paths = (*DATA_PATHS, *STARTS)
    return {key: values[key] for key in values if key not in paths and not key.startswith("data.train.")}


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


class Differences(NamedTuple):
    """Differences between a request and an earlier run with the same configuration, each as a clause for messages.

    Facts that `run.json` does not contain do not count: an older version did not record them.
    """

    job: list[str]  # jobs of a sweep
    weights: list[str]  # start weights
    paths: list[str]  # paths of the data
    tables: list[str]  # rows of the tables
    images: list[str]  # images of equal tables

    def is_other_run(self, finished: bool) -> bool:
        """Return True if the request is for another run.

        Tables that were edited in place do not start an unfinished run from the beginning, as it may have trained for weeks. Training
        refuses to resume with them instead, unless `data.allow_changed`. Images may have been repaired.
        """
        return bool(self.job or self.weights or ((finished or self.paths) and (self.tables or self.images)))


@dataclass(eq=False)
class Request:
    """Request of a command to compute a run."""

    config: TrainConfig  # configuration from the command line
    data: dict[str, Any] | None  # description of its tables; see `open_run`
    job: "Job | None"  # job of a sweep

    def facts(self) -> dict[str, Any]:
        """Return the values that `run.json` records so that later requests can be compared."""
        return {
            "paths": self.paths,
            **({} if self.data is None else {"data": self.data}),
            **({} if self.job is None else {"job": self.job._asdict()}),
        }

    def differences(self, record: dict[str, Any]) -> Differences:
        """Compare this request with the record in a run's `run.json`."""
        before = record.get("paths", self.paths)
        keys = [key for key in (*DATA_PATHS, *STARTS) if before.get(key) != self.paths.get(key)]
        clauses = {
            key: f"{key} is {_listed(self.paths.get(key))} instead of {_listed(before.get(key))}" for key in keys
        }
        weights = []
        for key in STARTS:
            clause, recorded, now = clauses.pop(key, None), record.get(key), self.weights_sha256.get(key)
            sha256 = recorded.get("sha256") if isinstance(recorded, dict) else None
            if clause is None and sha256 is not None and now is not None:
                other = f"sha256 {now[:12]}… instead of {sha256[:12]}…"
                clause = f"{key}={getattr(self.config, key)} has other weights ({other})"
            if clause is not None and (sha256 is None or sha256 != now):
                weights.append(clause)
        paths = list(clauses.values())
        recorded = record.get("data")
        if recorded is None or self.data is None:  # contents are unknown, so other paths count as other data
            tables, images = paths, []
        else:
            tables = changes(recorded, self.data)
            images = [] if tables else image_changes(recorded, self.data)
        return Differences(self._other_job(record), weights, paths, tables, images)

    @cached_property
    def paths(self) -> dict[str, list[str]]:
        """Absolute paths by key, with those of all sources of `data.train` in one list. Names that are not paths are unchanged."""
        data = self.config.data
        found: dict[str, list[Any]] = {
            "data.train": [path for source in data.sources for path in source.paths],
            "data.val": data.val_paths,
            "data.image_root": [data.image_root, *(source.image_root for source in data.sources)],
        }
        paths = {key: [_absolute(path) for path in values if path is not None] for key, values in found.items()}
        for tower, start in self.config.starts.items():
            paths[key_of(tower)] = [_absolute(start) if os.path.exists(os.path.expanduser(start)) else start]
        return {key: values for key, values in paths.items() if values}

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """Hashes of the start weights, by key, without those that are not on this machine or cannot be read."""
        hashes = {}
        for tower, start in self.config.starts.items():
            with suppress(CheckpointError, OSError):  # a run that has already started does not need them
                if (found := local_weights(start, self.config.model)) is not None:
                    hashes[key_of(tower)] = hash_weights(found)
        return hashes

    @cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """Hashes of the configuration: the current one, then those of older versions (other names and defaults of keys; with paths)."""
        values = identity(self.config)
        former = {key: old for key, (new, old) in FORMER_DEFAULTS.items() if values.get(key) == new}
        return tuple(
            _hash(found)
            for known in (values, values | former)
            for found in (without_paths(known), older_names(without_paths(known)), older_names(known))
        )

    def _other_job(self, record: dict[str, Any]) -> list[str]:
        theirs = record.get("job")
        if self.job is None:
            return []
        if theirs is None:
            return ["it does not belong to a sweep"] if "paths" in record else []
        if theirs["overrides"] != self.job.overrides:
            return [f"it belongs to the job {' '.join(theirs['overrides'])} of a sweep"]
        same = theirs["sweep"] != self.job.sweep or theirs["number"] == self.job.number
        return [] if same else [f"it belongs to job {theirs['number']} of this sweep"]


def _absolute(path: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _listed(paths: list[str] | None) -> str:
    more = f" and {len(paths) - LISTED:,} more" if paths and len(paths) > LISTED else ""
    return ", ".join(paths[:LISTED]) + more if paths else "null"


# --------------------------------------------------------------------------------------------------------- earlier runs


class EarlierRun(NamedTuple):
    """Earlier run that was found in the output folder."""

    folder: Path
    record: dict[str, Any]  # contents of its `run.json`; empty if that is lost

    @property
    def saved(self) -> bool:
        """True if the run ever had a checkpoint, or if `run.json` is lost and it may have had one."""
        if self.finished or self.record.get(LAST_CHECKPOINT) is not None:
            return True
        return was_saved(self.folder) or ("fingerprint" not in self.record and _has_trained(self.folder))

    @property
    def finished(self) -> bool:
        return self.record.get("status") == "finished"

    @property
    def progress(self) -> tuple[float, str]:
        """Last step and start time from the run's own record, since folder names and file times can be wrong."""
        step = max([self.record.get(LAST_CHECKPOINT) or -1, *map(step_of, checkpoints(self.folder))])
        return inf if self.finished else step, str(self.record.get("start", ""))


def _has_trained(folder: Path) -> bool:
    return (folder / METRICS).exists() or (folder / FOLDER).exists()


def newest(runs: list[EarlierRun]) -> EarlierRun | None:
    """Return the run with the most steps, and among equal ones the one that was started last."""
    return max(runs, key=lambda run: run.progress, default=None)


def earlier_runs(request: Request) -> list[EarlierRun]:
    """Return the runs of the same name that compute what is requested.

    If none of them has a checkpoint, a message names the latest run with the same configuration that is not resumed, and why.

    Raises:
        CheckpointError: none was found, and a run can no longer be recognized, which may be the one to resume.
    """
    recognized, unknown = _recognized(request)
    compared = [(run, request.differences(run.record)) for run in recognized]
    others = {run.folder: differences for run, differences in compared if differences.is_other_run(run.finished)}
    found = [(run, differences) for run, differences in compared if run.folder not in others]
    if unknown and not found:
        raise CheckpointError(
            f"{unknown[0]} may be the run to resume, but cannot be identified: {record_problem(unknown[0])} Restore it, move the "
            "folder away, or set resume=never to start a new run."
        )
    other = newest([run for run in recognized if run.folder in others and run.saved])
    if other is not None and not any(run.saved for run, _ in found):
        reasons = dict.fromkeys(clause for clauses in others[other.folder] for clause in clauses)
        print(f"Not resuming {other.folder}: {'; '.join(reasons)}. Starting a new run.", flush=True)
    # Prefer runs with the same tables, since training would refuse others, and in a sweep runs of the same job.
    found = [(run, differences) for run, differences in found if not differences.tables] or found
    runs = [run for run, _ in found]
    if request.job is None:
        return runs
    return [run for run in runs if run.record.get("job", {}).get("number") == request.job.number] or runs


def _recognized(request: Request) -> tuple[list[EarlierRun], list[Path]]:
    """Return the runs with the same name and configuration, whatever their data, and folders of runs that cannot be identified."""
    found, unknown = [], []
    parent = Path(request.config.output_dir) / "train" / request.config.name
    for folder in sorted(path for path in parent.glob("*") if path.is_dir()):
        run = EarlierRun(folder, read_record(folder))
        recorded = run.record.get("fingerprint")
        same = recorded in request.fingerprints
        if recorded is None:
            with suppress(CheckpointError, ConfigError):
                same = not _different_keys(read_config(folder)[0], request.config)
        if same:
            found.append(run)
        elif recorded is None and run.saved:
            unknown.append(folder)
    return found, unknown


def _different_keys(run: TrainConfig, config: TrainConfig) -> list[str]:
    """Return the keys by which the computation of a run differs from that of `config`."""
    before, now = identity(run), identity(config.model_copy(update={"model": as_resolved(config.model, run.model)}))
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def run_to_resume(request: Request, runs: list[EarlierRun]) -> tuple[EarlierRun, bool] | None:
    """Return the earlier run to resume, and whether it is finished; None: start from step 0.

    Args:
        request: the request.
        runs: runs that compute what is requested, for `resume=auto`.

    Raises:
        ConfigError: `resume` is not a run or checkpoint, or names a run that computes something else.
        CheckpointError: the run had a checkpoint, but has none now.
    """
    config = request.config
    if config.resume == "never":
        return None
    run = newest([run for run in runs if run.saved]) if config.resume == "auto" else _named_run(request)
    if run is None:
        return None
    recognized = run.record.get("fingerprint") in request.fingerprints
    if run.finished and recognized and not request.differences(run.record).tables:
        return run, True
    if run.saved and not checkpoints(run.folder):
        raise lost(run.folder, run.record)
    return run, False


def _named_run(request: Request) -> EarlierRun:
    config = request.config
    path = Path(config.resume)
    for folder in (path, *path.parents[:2]):
        if (folder / RECORD).is_file() or was_saved(folder) or ((folder / CONFIG).is_file() and _has_trained(folder)):
            break
    else:
        raise ConfigError(f"resume={config.resume} must be auto, never, a run folder or a checkpoint in a run folder.")
    record = read_record(folder)
    differences = request.differences(record)
    same = {*LENGTH}
    # Paths may differ if their contents are the same. Records of older versions do not describe the contents.
    if "paths" in record and not (differences.tables or differences.images):
        same |= {*DATA_PATHS}
    if "paths" in record and not differences.weights:
        same |= {*STARTS}
    other = [key for key in _different_keys(read_config(folder)[0], config) if key not in same]
    if other:
        raise ConfigError(
            f"resume={config.resume}: {folder} was trained with other values of {', '.join(other)}. Set the same values, or start a new run "
            "from its weights (resume=never pretrained=<its checkpoint>/model.safetensors)."
        )
    return EarlierRun(folder, record)


def lost(folder: Path, record: dict[str, Any], reasons: str = "") -> CheckpointError:
    """Return the error for a run that had a checkpoint but has no usable one; `reasons` has a line for each damaged checkpoint."""
    step = record.get(LAST_CHECKPOINT)
    had = "has trained before" if step is None else f"had a checkpoint of step {step:,}"
    return CheckpointError(
        f"{folder} {had}, but {folder / FOLDER} has no usable checkpoint. Restore one, or set resume=never to start from step 0 in a new "
        f"folder.{reasons}"
    )


# ----------------------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class Opening:
    """Run that is about to start or to resume."""

    folder: Path
    finished: bool  # the run has finished: nothing is left to train
    requested: TrainConfig  # configuration as given, by which the same command finds the run again
    resolved: TrainConfig  # configuration to train with, completed with values that depend on the start weights
    facts: dict[str, Any]  # values for `run.json`
    warnings: tuple[str, ...] = ()  # warnings about damage to an earlier run
    tasks: tuple[str, ...] = ()  # tasks to score the finished run on

    @property
    def complete(self) -> bool:
        """True if nothing is left to do. A run that was killed after its last step still lacks its report."""
        return self.finished and not self.tasks and (self.folder / REPORT).is_file()

    def begin(self, arguments: list[str]) -> None:
        """Write `config.yaml`, the first values of `run.json` and the tokenizer to the folder, which this process has locked."""
        for folder in (self.folder, self.folder / "eval"):
            remove_all_leftovers(folder)
        for message in self.warnings:
            warn(self.folder, message)
        write_text(self.folder / CONFIG, to_yaml(self.resolved))
        record = RunRecord(self.folder)
        last = record.values.get(LAST_CHECKPOINT)
        if last is None:  # not recorded by older versions
            last = max(map(step_of, checkpoints(self.folder)), default=None)
        found_by = fingerprint(self.requested)
        current = {
            "fingerprint": found_by,
            "config_sha256": file_sha256(self.folder / CONFIG),
            LAST_CHECKPOINT: last,
            "scored_tasks": {},  # the tasks are scored again after the last step, which may be another one now
            **self.facts,
        }
        record.start(arguments, current, fingerprint=found_by, seed=self.resolved.seed)
        save_tokenizer(self.resolved.model, self.folder)

    def claim(self) -> None:
        """Record the job of a sweep that this finished run belongs to from now on, so that no other job of the sweep uses it."""
        if "job" in self.facts:
            RunRecord(self.folder).update(job=self.facts["job"])


def open_run(config: TrainConfig, data: dict[str, Any] | None = None, job: "Job | None" = None) -> Opening:
    """Open the folder of the run to resume, or a new one. Start weights are located, and downloaded if needed, only for a new run.

    Args:
        config: configuration from the command line.
        data: description of its tables (`data.preflight`); None: generated data, or unknown.
        job: job of a sweep, or None.

    Raises:
        ConfigError: `resume` is not a run, or names one that computes something else; see also `find_weights` and `resolve_model`.
        CheckpointError: the start weights are damaged or cannot be downloaded, the folder cannot be created, or see `run_to_resume`.
    """
    request = Request(config, data, job)
    runs = earlier_runs(request) if config.resume == "auto" else []
    earlier = run_to_resume(request, runs)
    if earlier is not None:
        return _resume(request, *earlier)
    model, facts = note_architecture(config.model, config.own_towers), request.facts()
    rehearse(config.model_copy(update={"model": model}))
    starts = [find_weights(start, model, tower=tower) for tower, start in config.starts.items()]
    model = resolve_model(model, *starts)
    for found in starts:
        path, key = found.path.absolute(), key_of(found.tower)
        facts[key] = {
            "description": found.description,
            "path": str(path),
            "sha256": request.weights_sha256.get(key) or hash_weights(path),
            "format": found.about.format,
            **({} if config.pretrained_prefix is None else {"prefix": config.pretrained_prefix}),
        }
        from clip_exp.weights.fit import check_weights  # imports torch

        random_projection = check_weights(path, model, config.pretrained_prefix, found.tower)
        if random_projection and (problems := list(config.projection_problems(str(found.tower)))):
            raise ConfigError("\n".join(f"{path} has no projection: {problem}" for problem in problems))
    check_tokenizer(model)
    resolved = config.model_copy(update={"model": model})
    unused = newest([run for run in runs if not run.saved and is_free(run.folder)])
    if unused is not None:
        folder = unused.folder
        _print_restart(folder)
    else:
        folder = create_run_folder(config.output_dir, "train", config.name, "" if job is None else f"-{job.number}")
    return Opening(folder, False, config, resolved, facts)


def _resume(request: Request, run: EarlierRun, finished: bool) -> Opening:
    """Open an earlier run: to continue training, or, if it is finished, to score it on tasks that have no scores yet."""
    config, folder, differences = request.config, run.folder, request.differences(run.record)
    if not run.saved:
        _print_restart(folder)
    if differences.paths and not differences.tables:
        print(
            f"{folder}: the data was moved, and its contents are the same: {'; '.join(differences.paths)}.", flush=True
        )
    try:
        read, problem = read_config(folder)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(
            f"{folder} cannot be resumed, and no checkpoint has a copy of its {CONFIG}: {error} Restore the file, or set "
            "resume=never to start a new run."
        ) from error
    resolved = config.model_copy(update={"model": as_resolved(config.model, read.model)})
    facts = request.facts()
    if (
        differences.tables and not config.data.allow_changed
    ):  # training will refuse these tables, so they are not recorded
        facts = {key: value for key, value in facts.items() if key not in ("paths", "data")}
    repaired = f"{folder}: {'; '.join(differences.images)} than when the run started." if differences.images else None
    warnings = tuple(filter(None, (record_problem(folder), problem, repaired)))
    tasks: tuple[str, ...] = ()
    if finished and (folder / REPORT).is_file():
        # Scored are the tasks that have results and unchanged settings; without a record, those of config.yaml are assumed.
        recorded = run.record.get("scored_tasks", plain(read.task))
        there = {task_of(path.stem) for path in (folder / "eval").glob("*.json")}
        scored = {name: task for name, task in read.task.items() if name in there and plain(task) == recorded.get(name)}
        tasks = tuple(name for name, values in config.task.items() if scored.get(name) != values)
        resolved.task = {**scored, **config.task}
        require_allowed(resolved, str(folder / CONFIG))
        kept = plain({name: values for name, values in scored.items() if name not in tasks})
        facts |= {"status": run.record["status"], "end": run.record.get("end"), "scored_tasks": kept}
    return Opening(folder, finished, config, resolved, facts, warnings, tasks)


def _print_restart(folder: Path) -> None:
    print(f"{folder} was stopped before its first checkpoint: starting again in the same folder.", flush=True)


def start_weights(config: TrainConfig, record: dict[str, Any], tower: str | None) -> Path:
    """Return the path of the start weights of a run, or of one of its towers, on this machine.

    `run.json` contains the path on the machine of rank 0; other machines may have to download the file.

    Raises:
        CheckpointError: the weights differ from those of rank 0.
    """
    recorded = record.get(key_of(tower), {})
    if "path" in recorded and Path(recorded["path"]).exists():
        return Path(recorded["path"])
    found = find_weights(config.starts[tower], config.model, tower=tower).path
    if recorded and hash_weights(found) != recorded["sha256"]:
        expected = f"sha256 {recorded['sha256']}"
        raise CheckpointError(
            f"{found} is not the file that the run started with ({expected}). Restore that file, or set resume=never to start a new run."
        )
    return found
