"""Which folder a run works in, and what its configuration leaves to the weights that it starts from: decided once, by one process.

A run is its configuration, but for where and how it runs, and what lies at the paths in it: tables, images, weights to start from. The
paths themselves do not count: a moved project, or a scheduler's folder of another job, resumes where it was. So a command is first a
`Request`, with what decides what it computes; then the earlier runs of its name are compared with it, part by part; and the one
that it resumes, or a new folder, is opened.
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
from clip_exp.config.files import to_yaml
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
from clip_exp.storage import file_sha256
from clip_exp.training.preflight import rehearse
from clip_exp.weights.find import find_weights, hash_weights, key_of, local_weights
from clip_exp.weights.inspect import as_resolved, note_architecture, resolve_model

if TYPE_CHECKING:
    from clip_exp.config.compose import Job  # imports Hydra

# What may differ between the start of a run and its continuation: where and how it runs, not what it computes.
NOT_IN_IDENTITY = (
    "resume", "output_dir", "strategy.", "trainer.", "logger.", "micro_batch_size", "log_every_n_steps", "compile",
    "checkpoint_every_n_steps", "val_every_n_steps", "task", "data.num_workers", "data.max_bad_fraction",
    "data.max_empty_caption_fraction", "data.allow_changed", "callbacks.progress", "callbacks.save_retry_s",
)  # fmt: skip
IN_IDENTITY = ("trainer.gradient_clip_val",)
DATA_PATHS = ("data.train", "data.val", "data.image_root")
STARTS = ("pretrained", "pretrained_image", "pretrained_text")
LISTED = 3  # paths of a difference
LENGTH = {"max_steps", "epochs"}  # what a run that is named by resume=PATH may be given anew
REPORT = "report.html"


# -------------------------------------------------------------------------------------------------------- what a run is


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return what decides what the run computes, by dotted key; where and how it runs is left out."""
    values = flatten(plain(config))
    return {key: value for key, value in values.items() if not key.startswith(NOT_IN_IDENTITY) or key in IN_IDENTITY}


def fingerprint(config: TrainConfig) -> str:
    """Return a hash of the run's identity without its paths."""
    values = identity(config)
    paths = (*DATA_PATHS, *STARTS)  # which count by what lies there
    return _hash({key: values[key] for key in values if key not in paths and not key.startswith("data.train.")})


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


class Differences(NamedTuple):
    """In what an earlier run with the same configuration differs from what is requested, a clause each.

    What its `run.json` does not say is no difference: an older version did not note it.
    """

    job: list[str]  # it belongs to another job of a sweep
    weights: list[str]  # to start from
    paths: list[str]  # of the data
    tables: list[str]  # their rows
    images: list[str]  # in equal tables

    def is_other_run(self, finished: bool) -> bool:
        """Return whether the request is for another run.

        Tables that changed in their place are no reason to start an unfinished run again, which may have trained for weeks: training
        refuses to continue in them, by name, unless `data.allow_changed`. Images may be repaired meanwhile.
        """
        return bool(self.job or self.weights or ((finished or self.paths) and (self.tables or self.images)))


@dataclass(eq=False)
class Request:
    """What a command wants to be computed."""

    config: TrainConfig  # as the command line gives it
    data: dict[str, Any] | None  # see `open_run`
    job: "Job | None"  # of a sweep

    def facts(self) -> dict[str, Any]:
        """Return what `run.json` notes, for `differences`."""
        return {
            "paths": self.paths,
            **({} if self.data is None else {"data": self.data}),
            **({} if self.job is None else {"job": self.job._asdict()}),
        }

    def differences(self, record: dict[str, Any]) -> Differences:
        """Compare with a run's `run.json`."""
        before = record.get("paths", self.paths)
        keys = [key for key in (*DATA_PATHS, *STARTS) if before.get(key) != self.paths.get(key)]
        clauses = {
            key: f"{key} is {_listed(self.paths.get(key))} instead of {_listed(before.get(key))}" for key in keys
        }
        weights = []
        for key in STARTS:
            clause, noted, now = clauses.pop(key, None), record.get(key), self.weights_sha256.get(key)
            sha256 = noted.get("sha256") if isinstance(noted, dict) else None
            if clause is None and sha256 is not None and now is not None:
                other = f"sha256 {now[:12]}… instead of {sha256[:12]}…"
                clause = f"{key}={getattr(self.config, key)} has other weights ({other})"
            if clause is not None and (sha256 is None or sha256 != now):
                weights.append(clause)
        paths = list(clauses.values())
        noted = record.get("data")
        if noted is None or self.data is None:  # other paths of unknown contents are other data
            tables, images = paths, []
        else:
            tables = changes(noted, self.data)
            images = [] if tables else image_changes(noted, self.data)
        return Differences(self._other_job(record), weights, paths, tables, images)

    @cached_property
    def paths(self) -> dict[str, list[str]]:
        """Absolute paths by key; those of the sources of `data.train` are put together. A name that is no path stays as it is."""
        data = self.config.data
        found: dict[str, list[Any]] = {
            "data.train": [path for source in data.sources for path in source.paths],
            "data.val": data.val if isinstance(data.val, list) else [data.val],
            "data.image_root": [data.image_root, *(source.image_root for source in data.sources)],
        }
        paths = {key: [_absolute(path) for path in values if path is not None] for key, values in found.items()}
        for tower, start in self.config.starts.items():
            paths[key_of(tower)] = [_absolute(start) if os.path.exists(os.path.expanduser(start)) else start]
        return {key: values for key, values in paths.items() if values}

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """Hashes of the weights to start from, by key; those that are not on this disk, or cannot be read, have none."""
        hashes = {}
        for tower, start in self.config.starts.items():
            with suppress(CheckpointError, OSError):  # a run that has begun needs them no more
                if (found := local_weights(start, self.config.model)) is not None:
                    hashes[key_of(tower)] = hash_weights(found)
        return hashes

    @cached_property
    def fingerprints(self) -> tuple[str, str]:
        """Of the configuration; the second, which has the paths in it, is that of older versions."""
        return fingerprint(self.config), _hash(identity(self.config))

    def _other_job(self, record: dict[str, Any]) -> list[str]:
        theirs = record.get("job")
        if self.job is None:
            return []
        if theirs is None:
            return ["it belongs to no job of a sweep"] if "paths" in record else []
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
    """A run that is there already."""

    folder: Path
    record: dict[str, Any]  # of its `run.json`; empty where that is lost

    @property
    def saved(self) -> bool:
        """Whether it ever had a checkpoint; where `run.json` is lost, whether it may have had one."""
        if self.finished or self.record.get(LAST_CHECKPOINT) is not None:
            return True
        return was_saved(self.folder) or ("fingerprint" not in self.record and _has_trained(self.folder))

    @property
    def finished(self) -> bool:
        return self.record.get("status") == "finished"

    @property
    def progress(self) -> tuple[float, str]:
        """How far it got, and when it was started, as it recorded that itself: names and clocks may mislead."""
        step = max([self.record.get(LAST_CHECKPOINT) or -1, *map(step_of, checkpoints(self.folder))])
        return inf if self.finished else step, str(self.record.get("start", ""))


def _has_trained(folder: Path) -> bool:
    return (folder / METRICS).exists() or (folder / FOLDER).exists()


def newest(runs: list[EarlierRun]) -> EarlierRun | None:
    """Return the run that got furthest, and of equal ones the one that was started last."""
    return max(runs, key=lambda run: run.progress, default=None)


def earlier_runs(request: Request) -> list[EarlierRun]:
    """Return the runs of the same name that compute what is requested.

    Where none has a checkpoint, another run of the same configuration is named, or, where one can no longer be recognized, refused.
    """
    recognized, unknown = _recognized(request)
    compared = [(run, request.differences(run.record)) for run in recognized]
    others = {run.folder: differences for run, differences in compared if differences.is_other_run(run.finished)}
    found = [(run, differences) for run, differences in compared if run.folder not in others]
    if unknown and not found:
        raise CheckpointError(
            f"{unknown[0]} may be the run to resume, but cannot be recognized: {record_problem(unknown[0])} Restore it, move the "
            "folder away, or start a new run with resume=never."
        )
    other = newest([run for run in recognized if run.folder in others and run.saved])
    if other is not None and not any(run.saved for run, _ in found):
        reasons = dict.fromkeys(clause for clauses in others[other.folder] for clause in clauses)
        print(f"{other.folder} is not resumed: {'; '.join(reasons)}. A new run begins.", flush=True)
    # One in the same tables rather than one that would only be refused; in a sweep the same job's rather than another's.
    found = [(run, differences) for run, differences in found if not differences.tables] or found
    runs = [run for run, _ in found]
    if request.job is None:
        return runs
    return [run for run in runs if run.record.get("job", {}).get("number") == request.job.number] or runs


def _recognized(request: Request) -> tuple[list[EarlierRun], list[Path]]:
    """Return the runs of the same name and configuration, whatever lies at their paths, and folders that may be such a run's."""
    found, unknown = [], []
    parent = Path(request.config.output_dir) / "train" / request.config.name
    for folder in sorted(path for path in parent.glob("*") if path.is_dir()):
        run = EarlierRun(folder, read_record(folder))
        noted = run.record.get("fingerprint")
        same = noted in request.fingerprints
        if noted is None:
            with suppress(CheckpointError, ConfigError):
                same = not _different_keys(read_config(folder)[0], request.config)
        if same:
            found.append(run)
        elif noted is None and run.saved:
            unknown.append(folder)
    return found, unknown


def _different_keys(run: TrainConfig, config: TrainConfig) -> list[str]:
    """The keys in which what a run computes differs from what `config` would compute."""
    before, now = identity(run), identity(config.model_copy(update={"model": as_resolved(config.model, run.model)}))
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def run_to_resume(request: Request, runs: list[EarlierRun]) -> tuple[EarlierRun, bool] | None:
    """Return the earlier run that this one resumes, and whether that has finished; None: it starts from the beginning.

    Args:
        runs: that compute what is requested, for `resume=auto`.

    Raises:
        ConfigError: `resume` names nothing, or a run that computes something else.
        CheckpointError: the run had a checkpoint, and has none now.
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
        raise ConfigError(f"resume={config.resume} is neither auto, never, a run folder nor a checkpoint in one.")
    record = read_record(folder)
    differences = request.differences(record)
    same = {*LENGTH}
    # Paths may differ where what lies there is the same; older versions did not note what that was.
    if "paths" in record and not (differences.tables or differences.images):
        same |= {*DATA_PATHS}
    if "paths" in record and not differences.weights:
        same |= {*STARTS}
    other = [key for key in _different_keys(read_config(folder)[0], config) if key not in same]
    if other:
        raise ConfigError(
            f"{folder} was trained with another {', '.join(other)}: give the same values, or start a new run from its weights "
            "(resume=never pretrained=<its checkpoint>/model.safetensors)."
        )
    return EarlierRun(folder, record)


def lost(folder: Path, record: dict[str, Any], reasons: str = "") -> CheckpointError:
    """Return the error of a run that had a checkpoint, and has none now that can be used; `reasons` has a line for each that is there."""
    step = record.get(LAST_CHECKPOINT)
    had = "has trained before" if step is None else f"had a checkpoint of step {step:,}"
    return CheckpointError(
        f"{folder} {had}, and {folder / FOLDER} has no checkpoint that can be used. Put one back, or start over from step 0 in a new "
        f"folder: resume=never.{reasons}"
    )


# ----------------------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class Opening:
    """A run that is about to begin or to go on."""

    folder: Path
    finished: bool  # it has ended well before; there is nothing to train
    asked: TrainConfig  # by which the same command finds the run again; it may leave to the weights what `settled` has
    settled: TrainConfig  # by which it trains
    facts: dict[str, Any]  # for `run.json`
    warnings: tuple[str, ...] = ()  # about damage to an earlier run
    tasks: tuple[str, ...] = ()  # on which the finished run is to be scored

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do: a run that was killed after its last step lacks its report."""
        return self.finished and not self.tasks and (self.folder / REPORT).is_file()

    def begin(self, arguments: list[str]) -> None:
        """Write `config.yaml`, the beginning of `run.json` and the tokenizer into the folder, which this process holds."""
        for message in self.warnings:
            warn(self.folder, message)
        write_text(self.folder / CONFIG, to_yaml(self.settled))
        record = RunRecord(self.folder)
        last = record.values.get(LAST_CHECKPOINT)
        if last is None:  # an older version did not note it
            last = max(map(step_of, checkpoints(self.folder)), default=None)
        found_by = fingerprint(self.asked)
        current = {
            "fingerprint": found_by,
            "config_sha256": file_sha256(self.folder / CONFIG),
            LAST_CHECKPOINT: last,
            "scored_tasks": {},  # the run's tasks are scored again after its last step, which is another one now
            **self.facts,
        }
        record.start(arguments, current, fingerprint=found_by, seed=self.settled.seed)
        save_tokenizer(self.settled.model, self.folder)

    def claim(self) -> None:
        """Note the job of a sweep to which the finished run belongs from now on: no other job of the sweep is given it."""
        if "job" in self.facts:
            RunRecord(self.folder).update(job=self.facts["job"])


def open_run(config: TrainConfig, data: dict[str, Any] | None = None, job: "Job | None" = None) -> Opening:
    """The folder to go on in, or a new one. Weights to start from are found, and fetched if need be, for a new one alone.

    Args:
        data: `data.fingerprint.describe` of its tables; None: generated, as the configuration says, or unknown.
        job: of a sweep, or None.

    Raises:
        ConfigError: `resume` names no run, or another one; see `find_weights` and `resolve_model`.
        CheckpointError: the weights cannot be fetched or are damaged; the folder cannot be made; see `run_to_resume`.
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
            "told": found.description,
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
    settled = config.model_copy(update={"model": model})
    unused = newest([run for run in runs if not run.saved and is_free(run.folder)])
    if unused is not None:
        folder = unused.folder
        _say_again(folder)
    else:
        folder = create_run_folder(config.output_dir, "train", config.name, "" if job is None else f"-{job.number}")
    return Opening(folder, False, config, settled, facts)


def _resume(request: Request, run: EarlierRun, finished: bool) -> Opening:
    """Open an earlier run: to train on in it, or, where it has finished, to score it on the tasks that it has not been scored on."""
    config, folder, differences = request.config, run.folder, request.differences(run.record)
    if not run.saved:
        _say_again(folder)
    if differences.paths and not differences.tables:
        print(f"{folder}: the data has moved, and is the same: {'; '.join(differences.paths)}.", flush=True)
    try:
        read, problem = read_config(folder)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(
            f"{folder} cannot be resumed, and no checkpoint has a copy of its {CONFIG}: {error} Restore the file, or start a new "
            "run with resume=never."
        ) from error
    settled = config.model_copy(update={"model": as_resolved(config.model, read.model)})
    facts = request.facts()
    if differences.tables and not config.data.allow_changed:  # training will refuse them
        facts = {key: value for key, value in facts.items() if key not in ("paths", "data")}
    repaired = f"{folder}: {'; '.join(differences.images)} than when the run began." if differences.images else None
    warnings = tuple(filter(None, (record_problem(folder), problem, repaired)))
    tasks: tuple[str, ...] = ()
    if finished and (folder / REPORT).is_file():
        # On these it was scored, as its `config.yaml` has them; a record that was lost does not say which.
        noted = run.record.get("scored_tasks", plain(read.task))
        there = {task_of(path.stem) for path in (folder / "eval").glob("*.json")}
        scored = {name: task for name, task in read.task.items() if name in there and plain(task) == noted.get(name)}
        tasks = tuple(name for name, values in config.task.items() if scored.get(name) != values)
        settled.task = {**scored, **config.task}
        kept = plain({name: values for name, values in scored.items() if name not in tasks})
        facts |= {"status": run.record["status"], "end": run.record.get("end"), "scored_tasks": kept}
    return Opening(folder, finished, config, settled, facts, warnings, tasks)


def _say_again(folder: Path) -> None:
    print(f"{folder} was stopped before its first checkpoint: the run starts again in it.", flush=True)


def start_weights(config: TrainConfig, record: dict[str, Any], tower: str | None) -> Path:
    """Return the weights that a run, or a tower of it, starts from, on this machine; raise a CheckpointError where they are not what rank 0 found.

    The file that `run.json` names was found on the machine of rank 0; another may have to fetch its own.
    """
    noted = record.get(key_of(tower), {})
    if "path" in noted and Path(noted["path"]).exists():
        return Path(noted["path"])
    found = find_weights(config.starts[tower], config.model, tower=tower).path
    if noted and hash_weights(found) != noted["sha256"]:
        began = f"sha256 {noted['sha256']}"
        raise CheckpointError(f"{found} is not what the run began with ({began}): give that, or start anew.")
    return found
