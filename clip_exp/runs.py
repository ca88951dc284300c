"""Run folders: made exclusively, described by `run.json`, found again by name and configuration, free of secrets."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clip_exp import storage
from clip_exp.config.evaluation_schema import EvaluateConfig
from clip_exp.config.load import read_run_config, to_yaml
from clip_exp.config.schema import TrainConfig
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.provenance import provenance
from clip_exp.secrets import redact
from clip_exp.weights.settle import as_settled

# What may differ between the start of a run and its continuation: where and how it runs, not what it computes.
NOT_IN_IDENTITY = (
    "resume", "output_dir", "strategy.", "trainer.", "logger.", "micro_batch_size", "log_every_n_steps", "compile",
    "checkpoint_every_n_steps", "val_every_n_steps", "task", "data.num_workers", "data.max_bad_fraction",
    "data.allow_changed", "callbacks.progress",
)  # fmt: skip
IN_IDENTITY = ("trainer.gradient_clip_val",)
LENGTH = {"max_steps", "epochs"}  # what a run that is named by resume=PATH may be given anew


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, without secrets."""
    with storage.atomic_file(path) as temporary:
        temporary.write_text(redact(text), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def name_problems(name: str) -> Iterator[str]:
    """What is wrong with the name of a run, which is one of a folder."""
    if not name or "/" in name or name.startswith("."):
        yield f"name={name!r} must be a plain folder name."


def create_run_folder(output_dir: Path | str, command: str, name: str, suffix: str = "") -> Path:
    """Make `<output_dir>/<command>/<name>/<time><suffix>/`, a folder that nobody else has.

    Raises:
        CheckpointError: the folder cannot be made there.
    """
    parent = Path(output_dir) / command / name
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            folder = parent / (f"{stamp}{suffix}" if attempt == 1 else f"{stamp}_{attempt}{suffix}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise CheckpointError(
            f"cannot make a run folder in {parent}: {error.strerror}. Set output_dir to a folder you can write."
        ) from error
    raise CheckpointError(f"{parent} already has 999 folders of this second.")


def identity(config: TrainConfig) -> dict[str, Any]:
    """What decides what the run computes, by dotted key; where and how it runs is left out."""
    values = _flatten(dataclasses.asdict(config))
    return {key: value for key, value in values.items() if not key.startswith(NOT_IN_IDENTITY) or key in IN_IDENTITY}


def fingerprint(config: TrainConfig) -> str:
    """A hash of the run's identity."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True, default=str).encode()).hexdigest()[:16]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


class RunRecord:
    """`run.json`: who started what, where, with which versions, and how it ended."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.json"
        self.values: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def start(self, arguments: list[str], **values: Any) -> None:
        """Note the beginning; a continued run keeps its first beginning and gains a line in `resumed`."""
        if self.values:
            self.values.setdefault("resumed", []).append({"time": _now(), "argv": arguments, **values})
        else:
            self.values = {"argv": arguments, "start": _now(), **provenance(), **values}
        self.update(status="running", end=None)

    def update(self, **values: Any) -> None:
        self.values.update(values)
        write_json(self.path, self.values)

    def finish(self, status: str, **values: Any) -> None:
        """`status`: finished, failed or preempted."""
        self.update(status=status, end=_now(), **values)


def find_run(config: TrainConfig) -> Path | None:
    """The newest folder of the run's name and fingerprint that has something to go on from, or has finished."""
    from clip_exp.checkpoints.discovery import checkpoints

    wanted = fingerprint(config)
    parent = Path(config.output_dir) / "train" / config.name
    for path in sorted(parent.glob("*/run.json"), reverse=True):  # folders sort by their time
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        if values.get("fingerprint") == wanted and (values.get("status") == "finished" or checkpoints(path.parent)):
            return path.parent
    return None


def run_to_go_on_in(config: TrainConfig) -> tuple[Path, bool] | None:
    """The folder of an earlier run that this one goes on in, and whether it has finished; None: it begins anew.

    `resume=auto` goes on in the newest unfinished folder of the same name and identity that has a checkpoint.

    Raises:
        ConfigError: `resume` names nothing, or a run that computes something else.
    """
    if config.resume == "never":
        return None
    folder = find_run(config) if config.resume == "auto" else _named_run(config)
    if folder is None:
        return None
    values = RunRecord(folder).values
    return folder, values.get("status") == "finished" and fingerprint(config) == values.get("fingerprint")


def begin(
    folder: Path, config: TrainConfig, arguments: list[str], asked: TrainConfig | None = None, **facts: Any
) -> None:
    """Write `config.yaml` and the beginning of `run.json` into a folder that this process holds.

    Args:
        config: by which the run trains.
        asked: what the user gave, by which the same command finds the run again; it may leave to the weights what `config` has.
        facts: further values of `run.json`.
    """
    write_text(folder / "config.yaml", to_yaml(config))
    RunRecord(folder).start(arguments, fingerprint=fingerprint(asked or config), seed=config.seed, **facts)


def _named_run(config: TrainConfig) -> Path:
    path = Path(config.resume)
    folder = next((p for p in (path, *path.parents[:2]) if (p / "run.json").is_file()), None)
    if folder is None:
        raise ConfigError(f"resume={config.resume} is neither auto, never, a run folder nor a checkpoint in one.")
    run = read_run_config(folder)
    before, now = identity(run), identity(dataclasses.replace(config, model=as_settled(config.model, run.model)))
    other = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and key not in LENGTH)
    if other:
        raise ConfigError(
            f"{folder} was trained with another {', '.join(other)}: give the same values, or start a new run from its weights "
            "(resume=never pretrained=<its checkpoint>/model.safetensors)."
        )
    return folder


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock ends with the process, however it ends.

    Raises:
        ConfigError: another process holds it.
        CheckpointError: the folder cannot be written, or its file system has no locks.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(storage.lock(folder / ".lock"))
        except storage.InUse as error:
            raise ConfigError(
                f"{folder} is in use by {error.owner}: wait for it, or start another run with resume=never."
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be locked: {error.strerror or error}. Set output_dir to a folder where files can be written and locked."
            ) from error
        yield


def evaluation_folder(config: EvaluateConfig, name: str) -> Path:
    """A new folder for an evaluation, holding its configuration."""
    folder = create_run_folder(config.output_dir, "evaluate", name)
    write_text(folder / "config.yaml", to_yaml(config))
    return folder


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
