"""Run folders: creation, locking, and their files `run.json`, `config.yaml`, `metrics.csv` and the tokenizer. Secrets are never written."""

import csv
import errno
import glob
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import clip_exp.storage as storage
from clip_exp._version import __version__
from clip_exp.checkpoints.folders import RUN_COPY, changed, manifests
from clip_exp.config.files import OLDER_METRICS, parse_run_config, read_run_config
from clip_exp.config.model import ModelConfig
from clip_exp.config.targets import require_allowed
from clip_exp.config.training import TrainConfig
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.secrets import redact

log = logging.getLogger(__name__)
RECORD, CONFIG, METRICS = "run.json", "config.yaml", "metrics.csv"
# Name that stands for the newest run
LATEST = "latest"
# Folder in a run folder with a copy of the tokenizer
TOKENIZER = "tokenizer"
# Key of `run.json`; missing in runs of older versions
LAST_CHECKPOINT = "last_checkpoint_step"
# Types of the values that are read from `run.json`
TYPES: dict[str, Any] = {
    "fingerprint": str, "config_sha256": str, "start": str, "status": str, "argv": list, "resumed": list, "pretrained": dict | str,
    "pretrained_image": dict, "pretrained_text": dict,
    "paths": dict, "data": dict, "job": dict, "scored_tasks": dict, LAST_CHECKPOINT: int | None,
}  # fmt: skip
# Maximum size of a run's name in bytes; file systems allow 255 for a folder
MAX_NAME = 200
# Maximum number of runs to list in a message
SHOWN_RUNS = 10
# Integer columns of `metrics.csv`
COUNTS = ("step", "samples_seen")
# Names of columns in older run folders, which `read_metrics` translates
OLDER_COLUMNS = {
    **{
        name: f"train/{name}"
        for name in ("lr", "grad_norm", "logit_scale", "samples_per_s", "data_wait_s", "compute_s", "peak_memory_gb")
    },
    **{older: name for name, older in OLDER_METRICS.items()},
}
# Packages whose versions are recorded
PACKAGES = (
    "torch", "torchvision", "pytorch-lightning", "deepspeed", "hydra-core", "omegaconf", "open_clip_torch", "Pillow",
    "torchcodec",
)  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write a file atomically and without secrets.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        with storage.atomic_file(path) as temporary:
            temporary.write_text(redact(text), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically and without secrets; see `write_text`."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def name_problems(name: str) -> Iterator[str]:
    """Yield an error message if a name cannot be that of a run, which is the name of a folder."""
    size = len(name.encode("utf-8", errors="replace"))
    if size > MAX_NAME:
        yield f"name={name[:20]!r}… has {size} bytes, but at most {MAX_NAME} are allowed: set a shorter name (name=…)."
    elif not name or "/" in name or name.startswith(".") or not name.isprintable():
        yield (
            f"name={name!r} is not a valid folder name: use printable characters without slashes, and no dot at the start "
            "(name=…)."
        )


def create_run_folder(output_dir: Path | str, command: str, name: str, suffix: str = "") -> Path:
    """Create the new folder `<output_dir>/<command>/<name>/<time><suffix>/` and return it.

    Raises:
        CheckpointError: the folder cannot be created.
    """
    parent = Path(output_dir) / command / name
    time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            folder = parent / (f"{time}{suffix}" if attempt == 1 else f"{time}_{attempt}{suffix}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            for place in (parent, parent.parent, parent.parent.parent):
                storage.sync(place)
            return folder
    except OSError as error:
        raise CheckpointError(
            f"cannot create a run folder in {parent}: {error.strerror}. Set output_dir to a writable folder."
        ) from error
    raise CheckpointError(f"cannot create a run folder in {parent}: it already has 999 folders for this second.")


def read_record(folder: Path) -> dict[str, Any]:
    """Read `run.json`, or its copy in the newest checkpoint if the file is missing or damaged; empty if there is no copy either."""
    return _read_record(folder)[0]


def record_problem(folder: Path) -> str | None:
    """Return a message about a missing or damaged `run.json` and what is used instead; None if the file is valid."""
    return _read_record(folder)[1]


def read_config(folder: Path) -> tuple[TrainConfig, str | None]:
    """Read a run's `config.yaml`, or its copy in the newest checkpoint if the file is missing or damaged, for comparisons.

    Code that it names may not be allowed: `run_config` checks that.

    Returns:
        The configuration, and a message about a missing or damaged file and what is used instead (None if the file is
        valid).

    Raises:
        CheckpointError, ConfigError: see `read_run_config`. Only raised if no checkpoint has a copy.
    """
    path = folder / CONFIG
    expected = read_record(folder).get("config_sha256")
    if not path.is_file():
        reason = "is missing"
    elif expected not in (None, storage.file_sha256(path)):
        reason = "was changed after it was written"
    else:
        try:
            return read_run_config(folder, check_targets=False), None
        except (CheckpointError, ConfigError):
            reason = "is damaged"
    for checkpoint, copy in _run_copies(folder):
        with suppress(CheckpointError, ConfigError):
            copied = parse_run_config(str(copy.get("config")), str(checkpoint / RUN_COPY))
            return copied, f"{path} {reason}: the copy in {checkpoint.name} is used instead."
    return read_run_config(
        folder, check_targets=False
    ), f"{path} {reason}, and no checkpoint has a copy: the changed file is used."


def newest_run(name: str, output_dir: Path | str) -> Path | None:
    """Return the newest run of a name, or of all names for `latest`; None if there is none."""
    names = "*" if name == LATEST else glob.escape(name)
    runs = [path.parent for path in Path(output_dir, "train").glob(f"{names}/*/{CONFIG}")]
    return max(runs, key=lambda folder: folder.name, default=None)


def require_run(folder: Path) -> None:
    """Check that a folder is not one that contains run folders.

    Raises:
        CheckpointError: the folder contains run folders, which the message lists.
    """
    if (folder / CONFIG).is_file():
        return
    inside = [path.parent for pattern in ("*/", "*/*/") for path in folder.glob(f"{pattern}{RECORD}")]
    if runs := sorted((run for run in inside if (run / CONFIG).is_file()), key=lambda run: run.name, reverse=True):
        more = f" and {len(runs) - SHOWN_RUNS} older ones" if len(runs) > SHOWN_RUNS else ""
        raise CheckpointError(
            f"{folder} is not a run folder, but contains runs. Give one of them, newest first: "
            f"{', '.join(map(str, runs[:SHOWN_RUNS]))}{more}."
        )


def run_config(folder: Path) -> TrainConfig:
    """Read a run's configuration as `read_config` does, and log a warning if `config.yaml` is missing or damaged.

    Raises:
        CheckpointError, ConfigError: see `read_run_config`; also if the configuration names code that is not allowed.
    """
    config, problem = read_config(folder)
    require_allowed(config, str(folder / CONFIG))
    if problem is not None:
        log.warning(problem)
    return config


def _read_record(folder: Path) -> tuple[dict[str, Any], str | None]:
    path = folder / RECORD
    try:
        values = storage.read_json_object(path)
        _check_record(values)
        return {key: value for key, value in values.items() if key != storage.SEAL}, None
    except FileNotFoundError:
        problem = f"{path} is missing"
    except OSError as error:
        problem = f"{path} cannot be read ({error.strerror or error})"
    except ValueError as error:
        problem = f"{path} is damaged ({error})"
    for checkpoint, copy in _run_copies(folder):
        saved = copy.get("record")
        if isinstance(saved, dict):
            with suppress(ValueError):
                _check_record(storage.sealed(saved))
                return saved, f"{problem}: the copy in {checkpoint.name} is used instead."
    return {}, f"{problem}, and no checkpoint has a copy."


def _check_record(values: dict[str, Any]) -> None:
    """Raise a ValueError if values are not a valid record of a run."""
    if not TYPES.keys() & values.keys():
        raise ValueError("it is not the record of a run")
    if storage.SEAL not in values and LAST_CHECKPOINT in values:
        raise ValueError("its hash is missing")
    for key, kind in TYPES.items():
        if key in values and not isinstance(values[key], kind):
            raise ValueError(f"{key} has a wrong type")


def _run_copies(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the checkpoints with valid copies of `run.json` and `config.yaml`, and the copies, newest first."""
    copies = []
    for checkpoint, manifest in reversed(manifests(folder).items()):
        path, entry = checkpoint / RUN_COPY, manifest.files.get(RUN_COPY)
        with suppress(OSError, ValueError):
            if entry is not None and changed(path, entry) is None:
                copies.append((checkpoint, storage.read_json_object(path)))
    return copies


def refuse_links(folder: Path) -> None:
    """Check that a run folder contains no symbolic links, since writing a file would write to the link's target.

    The folder itself and its parents may be links. The subfolder `wandb` is skipped: wandb creates and replaces links
    in it.

    Raises:
        CheckpointError: the folder contains a link, or a pipe or device, which could block the process that opens it.
    """
    folders = [str(folder)]
    while folders:
        # Another process may remove a folder meanwhile.
        with suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise CheckpointError(
                        f"{entry.path} is a symbolic link, which is not allowed in a run folder: replace it by the file or folder "
                        "itself, or remove it."
                    )
                if entry.is_dir(follow_symlinks=False):
                    folders += [entry.path] if entry.name != "wandb" else []
                elif not entry.is_file(follow_symlinks=False):
                    raise CheckpointError(f"{entry.path} is neither a file nor a folder: remove it.")


class RunRecord:
    """Record of a run in `run.json`: command line, machine, package versions, start, end and status."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD
        self.values = read_record(folder)

    def start(self, arguments: list[str], current: dict[str, Any] | None = None, **values: Any) -> None:
        """Record the start of a run. For a resumed run, add an entry to `resumed` and leave the first start unchanged.

        Args:
            arguments: arguments of the command line.
            current: values that are replaced at every start.
            **values: values that are recorded for this start.
        """
        if self.values:
            self.values.setdefault("resumed", []).append({"time": _now(), "argv": arguments, **values})
        else:
            self.values = {"argv": arguments, "start": _now(), **provenance(), **values}
        self.values.update({"status": "running", "end": None, **(current or {})})
        write_text(self.path, self._text())

    def update(self, **values: Any) -> None:
        """Record values. If the disk is full, log a warning and write the values with the next update."""
        self.values.update(values)
        text = self._text()
        try:
            write_text(self.path, text)
        except CheckpointError as error:
            if not _overwrite(self.path, text, error.__cause__):
                log.warning("%s", error)

    def finish(self, status: str, **values: Any) -> None:
        """Record the end of a run with status `finished`, `failed` or `preempted`, and drop the error of an earlier end."""
        self.values = {key: value for key, value in self.values.items() if key not in ("error", "exit_code")}
        self.update(status=status, end=_now(), **values)

    def acknowledge(self, step: int) -> None:
        """Record that the checkpoint of `step` is on disk, after syncing the rows of `metrics.csv` up to it."""
        # There may be no rows yet, or the disk may be full.
        with suppress(OSError):
            storage.sync(self.path.with_name(METRICS))
        self.update(**{LAST_CHECKPOINT: step})

    def run_copy(self) -> dict[str, Any]:
        """Return a copy of this record and `config.yaml` for a checkpoint, from which both can be restored."""
        config = self.path.with_name(CONFIG).read_text(encoding="utf-8")
        return {"record": self._plain(), "config": config}

    def _plain(self) -> dict[str, Any]:
        """Return the values as they are written: plain values without secrets."""
        return dict(json.loads(redact(json.dumps(self.values, default=str))))

    def _text(self) -> str:
        return json.dumps(storage.sealed(self._plain()), indent=2) + "\n"


def _overwrite(path: Path, text: str, problem: BaseException | None) -> bool:
    """Write a text to the existing blocks of a file if the disk is full; return True on success.

    A power failure during the write may damage the file. But without it, a run that ends because of a full disk would
    keep the status `running`.
    """
    if not isinstance(problem, OSError) or problem.errno not in (errno.ENOSPC, errno.EDQUOT):
        return False
    data = redact(text).encode()
    try:
        with path.open("r+b", buffering=0) as file:
            about = os.fstat(file.fileno())
            if len(data) > about.st_blocks * 512:
                return False
            file.write(data.ljust(about.st_size, b"\n"))
    except OSError:
        return False
    return True


def provenance() -> dict[str, Any]:
    """Return plain values for `run.json`: versions, machine, and the state of the checkout that the code runs from."""
    packages: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "clip_exp": __version__,
        "python": platform.python_version(),
        "packages": packages,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "executable": sys.executable,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    """Return the commit of the checkout and whether it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    run = partial(subprocess.run, capture_output=True, text=True, timeout=5, check=True)
    try:
        commit, changed = (
            run(["git", "-C", str(root), *arguments]).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changed)}


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a run folder for this process. The lock is released when the process ends, even if it is killed.

    If the file system does not support locks, a warning is logged, and the folder is used without a lock.

    Raises:
        ConfigError: another process holds the lock.
        CheckpointError: the folder is not writable, or contains links (`refuse_links`).
    """

    def warn_of_no_locks(folder: Path, reason: str) -> None:
        warn(
            folder,
            f"{folder} cannot be locked, since its file system does not support locks ({reason}; Lustre supports them with the mount "
            "option flock). Do not start two processes in this folder at once: they would overwrite each other's checkpoints.",
        )

    with ExitStack() as stack:
        try:
            refuse_links(folder)
            stack.enter_context(storage.lock(folder / ".lock", on_no_locks=warn_of_no_locks))
        except storage.InUse as error:
            raise ConfigError(
                f"{folder} is in use by {error.owner}: wait until it ends, or start a new run with resume=never."
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be locked: {error.strerror or error}. Set output_dir to a writable folder."
            ) from error
        yield


def is_free(folder: Path) -> bool:
    """Return True if no process holds the lock of a folder; False if it is locked or cannot be locked."""
    try:
        refuse_links(folder)
        with storage.lock(folder / ".lock", on_no_locks=lambda *_: None) as held:
            return held
    except (storage.InUse, OSError, CheckpointError):
        return False


def warn(folder: Path, message: str) -> None:
    """Print a warning and append it to `train.log`. Logging to this file is not set up yet when this function is called."""
    message = redact(message)
    print(f"warning: {message}", file=sys.stderr, flush=True)
    with suppress(OSError), (folder / "train.log").open("a", encoding="utf-8") as file:
        file.write(f"{_now()} WARNING {message}\n")


def check_tokenizer(model: ModelConfig) -> None:
    """Raise a ConfigError if a model's tokenizer is not available or does not fit the text tower."""
    if model.text.tokenizer_source is not None:
        # Imports torch
        from clip_exp.text.tokenizer import HuggingFaceTokenizer

        HuggingFaceTokenizer.of(model.text)


def save_tokenizer(model: ModelConfig, run_dir: Path) -> None:
    """Copy the model's tokenizer to a run folder, unless it is already there.

    Raises:
        ConfigError: the tokenizer is not available.
        CheckpointError: the disk is full, or the folder is not writable.
    """
    source, folder = model.text.tokenizer_source, run_dir / TOKENIZER
    if source is None or folder.is_dir():
        return
    # Imports torch
    from clip_exp.text.tokenizer import save_huggingface

    try:
        with storage.atomic_folder(folder) as temporary:
            save_huggingface(source, temporary)
    except Exception as error:
        problem = storage.system_error(error)
        if problem is None:
            raise
        raise CheckpointError(f"{folder} cannot be written: {problem.strerror or problem}.") from error


def with_saved_tokenizer(model: ModelConfig, run_dir: Path) -> ModelConfig:
    """Return the configuration of a run's model, with the copy of the tokenizer in the run folder if there is one."""
    folder = run_dir / TOKENIZER
    if not folder.is_dir():
        return model
    return model.model_copy(update={"text": model.text.model_copy(update={"tokenizer": str(folder)})})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.csv`, in the order of the file; numbers as numbers, without empty cells and incomplete rows.

    Columns of older runs get their present names, so that reports and resumed runs have one curve per metric.
    """
    rows = []
    with path.open(newline="", encoding="utf-8", errors="replace") as handle, suppress(csv.Error):
        reader = csv.DictReader(handle)
        header = reader.fieldnames or ()
        # A file that has the present name keeps the other one: it may be the column of a custom callback.
        names = {name: OLDER_COLUMNS[name] for name in OLDER_COLUMNS if OLDER_COLUMNS[name] not in header}
        for row in reader:
            with suppress(TypeError, ValueError):
                rows.append(
                    {
                        names.get(key, key): (int if key in COUNTS else float)(value)
                        for key, value in row.items()
                        if value
                    }
                )
    return [row for row in rows if "step" in row]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
