"""What decides what a run computes, and in what an earlier run with the same configuration differs from what is requested.

A run is its configuration, but for where and how it runs, and what lies at the paths in it: tables, images, weights to start from. The
paths themselves do not count: a moved project, or a scheduler's folder of another job, resumes where it was.
"""

import dataclasses
import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clip_exp.config.schema import TrainConfig
from clip_exp.data.fingerprint import changes, image_changes
from clip_exp.data.stream import parse
from clip_exp.errors import CheckpointError
from clip_exp.weights.find import hash_weights, local_weights

if TYPE_CHECKING:
    from clip_exp.config.sweep import Job  # imports Hydra

# What may differ between the start of a run and its continuation: where and how it runs, not what it computes.
NOT_IN_IDENTITY = (
    "resume", "output_dir", "strategy.", "trainer.", "logger.", "micro_batch_size", "log_every_n_steps", "compile",
    "checkpoint_every_n_steps", "val_every_n_steps", "task", "data.num_workers", "data.max_bad_fraction",
    "data.max_empty_caption_fraction", "data.allow_changed", "callbacks.progress", "callbacks.save_retry_s",
)  # fmt: skip
IN_IDENTITY = ("trainer.gradient_clip_val",)
DATA_PATHS = ("data.train", "data.val", "data.image_root")
START = "pretrained"
LISTED = 3  # paths of a difference


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return what decides what the run computes, by dotted key; where and how it runs is left out."""
    values = flatten(dataclasses.asdict(config))
    return {key: value for key, value in values.items() if not key.startswith(NOT_IN_IDENTITY) or key in IN_IDENTITY}


def fingerprint(config: TrainConfig) -> str:
    """Return a hash of the run's identity without its paths."""
    return _hash({key: value for key, value in identity(config).items() if not is_path(key)})


def is_path(key: str) -> bool:
    """Return whether a key of the identity holds paths, which count by what lies there."""
    return key in (*DATA_PATHS, START) or key.startswith("data.train.")


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

    @property
    def reasons(self) -> list[str]:
        return list(dict.fromkeys(clause for clauses in self for clause in clauses))

    def is_other_run(self, finished: bool) -> bool:
        """Return whether the request is for another run.

        Tables that changed in their place are no reason to start an unfinished run again, which may have trained for weeks: training
        refuses to continue in them, by name, unless `data.allow_changed`. Images may be repaired meanwhile.
        """
        return bool(self.job or self.weights or ((finished or self.paths) and (self.tables or self.images)))


class Request:
    """What a command wants to be computed.

    Args:
        config: as the command line gives it.
        data: `data.fingerprint.describe` of its tables; None: generated, as the configuration says, or unknown.
        job: of a sweep, or None.
    """

    def __init__(self, config: TrainConfig, data: dict[str, Any] | None = None, job: "Job | None" = None) -> None:
        self.config, self.data, self.job = config, data, job

    def facts(self) -> dict[str, Any]:
        """Return what `run.json` notes, for `differences`."""
        return {
            "paths": self.paths,
            **({} if self.data is None else {"data": self.data}),
            **({} if self.job is None else {"job": self.job._asdict()}),
        }

    def recognizes(self, noted: str | None) -> bool:
        """Return whether a fingerprint is that of the configuration; older versions hashed the paths as well."""
        return noted in self._fingerprints

    def differences(self, record: dict[str, Any]) -> Differences:
        """Compare with a run's `run.json`."""
        before = record.get("paths", self.paths)
        keys = [key for key in (*DATA_PATHS, START) if before.get(key) != self.paths.get(key)]
        clauses = {
            key: f"{key} is {_listed(self.paths.get(key))} instead of {_listed(before.get(key))}" for key in keys
        }
        weights = [clauses.pop(START)] if START in clauses else []
        paths = list(clauses.values())
        noted = record.get("data")
        if noted is None or self.data is None:  # other paths of unknown contents are other data
            tables, images = paths, []
        else:
            tables = changes(noted, self.data)
            images = [] if tables else image_changes(noted, self.data)
        return Differences(self._other_job(record), self._other_weights(record, weights), paths, tables, images)

    @cached_property
    def paths(self) -> dict[str, list[str]]:
        """Absolute paths by key; those of the sources of `data.train` are put together. A name that is no path stays as it is."""
        data, start = self.config.data, self.config.pretrained
        specs = parse(data.train)
        found: dict[str, list[Any]] = {
            "data.train": [path for spec in specs for path in spec.paths],
            "data.val": data.val if isinstance(data.val, list) else [data.val],
            "data.image_root": [data.image_root, *(spec.reading.get("image_root") for spec in specs)],
        }
        paths = {key: [_absolute(path) for path in values if path is not None] for key, values in found.items()}
        if start is not None:
            paths[START] = [_absolute(start) if os.path.exists(os.path.expanduser(start)) else start]
        return {key: values for key, values in paths.items() if values}

    @cached_property
    def weights_sha256(self) -> str | None:
        """Hash of the weights to start from; None: they are not on this disk, or cannot be read."""
        if self.config.pretrained is None:
            return None
        try:
            found = local_weights(self.config.pretrained, self.config.model)
            return None if found is None else hash_weights(found)
        except (CheckpointError, OSError):  # a run that has begun needs them no more
            return None

    @cached_property
    def _fingerprints(self) -> tuple[str, str]:
        return fingerprint(self.config), _hash(identity(self.config))

    def _other_weights(self, record: dict[str, Any], other_path: list[str]) -> list[str]:
        noted = record.get(START)
        before = noted.get("sha256") if isinstance(noted, dict) else None
        if before is None or self.weights_sha256 is None:
            return other_path
        if before == self.weights_sha256:
            return []
        changed = f"{START}={self.config.pretrained} has other weights (sha256 {self.weights_sha256[:12]}… instead of {before[:12]}…)"
        return other_path or [changed]

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


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
