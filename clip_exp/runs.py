"""Run folders: made exclusively, described by `run.json` and `metrics.csv`, with the run's own copy of its tokenizer, free of secrets."""

import csv
import errno
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
from clip_exp.config.training import TrainConfig
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.secrets import redact

log = logging.getLogger(__name__)
RECORD, CONFIG, METRICS = "run.json", "config.yaml", "metrics.csv"
TOKENIZER = "tokenizer"  # the folder of a run's own copy
LAST_CHECKPOINT = "last_checkpoint_step"  # in `run.json`; older versions did not have it
TYPES: dict[str, Any] = {  # of what is read again from `run.json`
    "fingerprint": str, "config_sha256": str, "start": str, "status": str, "argv": list, "resumed": list, "pretrained": dict | str,
    "pretrained_image": dict, "pretrained_text": dict,
    "paths": dict, "data": dict, "job": dict, "scored_tasks": dict, LAST_CHECKPOINT: int | None,
}  # fmt: skip
MAX_NAME = 200  # bytes of a run's name; file systems have 255 for a folder's
SHOWN_RUNS = 10  # of a folder of runs, in a message
COUNTS = ("step", "samples_seen")  # columns of `metrics.csv` that are whole numbers
OLDER_COLUMNS = {  # names of columns in older run folders, which `read_metrics` translates
    **{
        name: f"train/{name}"
        for name in ("lr", "grad_norm", "logit_scale", "samples_per_s", "data_wait_s", "compute_s", "peak_memory_gb")
    },
    **{older: name for name, older in OLDER_METRICS.items()},
}
PACKAGES = (  # whose versions are noted
    "torch", "torchvision", "pytorch-lightning", "deepspeed", "hydra-core", "omegaconf", "open_clip_torch", "Pillow",
)  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, without secrets; raise a CheckpointError where it cannot be written."""
    try:
        with storage.atomic_file(path) as temporary:
            temporary.write_text(redact(text), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from error


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def name_problems(name: str) -> Iterator[str]:
    """Yield what is wrong with the name of a run, which is one of a folder."""
    size = len(name.encode("utf-8", errors="replace"))
    if size > MAX_NAME:
        yield f"name={name[:20]!r}… has {size} bytes, and a folder's name may have {MAX_NAME}: give a shorter one (name=…)."
    elif not name or "/" in name or name.startswith(".") or not name.isprintable():
        yield f"name={name!r} must be a plain folder name, of printable characters and without slashes (name=…)."


def create_run_folder(output_dir: Path | str, command: str, name: str, suffix: str = "") -> Path:
    """Make `<output_dir>/<command>/<name>/<time><suffix>/`, a folder that nobody else has, or raise a CheckpointError."""
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
            for place in (parent, parent.parent, parent.parent.parent):
                storage.sync(place)
            return folder
    except OSError as error:
        raise CheckpointError(
            f"cannot make a run folder in {parent}: {error.strerror}. Set output_dir to a folder you can write."
        ) from error
    raise CheckpointError(f"{parent} already has 999 folders of this second.")


def read_record(folder: Path) -> dict[str, Any]:
    """Read what `run.json` says, or, where that is missing or damaged, what the run's newest checkpoint says; empty where none does."""
    return _read_record(folder)[0]


def record_problem(folder: Path) -> str | None:
    """Say what is wrong with a folder's `run.json`, and what is used instead."""
    return _read_record(folder)[1]


def read_config(folder: Path) -> tuple[TrainConfig, str | None]:
    """Read a run's `config.yaml`, or, where that is missing or damaged, the copy in the run's newest checkpoint.

    Returns:
        The configuration, and what is wrong with the file and what is used instead, if anything.

    Raises:
        CheckpointError, ConfigError: see `read_run_config`; and no checkpoint has a copy.
    """
    path = folder / CONFIG
    expected = read_record(folder).get("config_sha256")
    if not path.is_file():
        reason = "is missing"
    elif expected not in (None, storage.file_sha256(path)):
        reason = "was changed after it was written"
    else:
        try:
            return read_run_config(folder), None
        except (CheckpointError, ConfigError):
            reason = "is damaged"
    for checkpoint, copy in _run_copies(folder):
        with suppress(CheckpointError, ConfigError):
            copied = parse_run_config(str(copy.get("config")), str(checkpoint / RUN_COPY))
            return copied, f"{path} {reason}: the copy in {checkpoint.name} is used instead."
    return read_run_config(folder), f"{path} {reason}, and no checkpoint has a copy: it is used as it is."


def require_run(folder: Path) -> None:
    """Refuse a folder that is not a run's but holds runs, and name them.

    Raises:
        CheckpointError: it does.
    """
    if (folder / CONFIG).is_file():
        return
    below = [path.parent for pattern in ("*/", "*/*/") for path in folder.glob(f"{pattern}{RECORD}")]
    if runs := sorted((run for run in below if (run / CONFIG).is_file()), key=lambda run: run.name, reverse=True):
        more = f" and {len(runs) - SHOWN_RUNS} older ones" if len(runs) > SHOWN_RUNS else ""
        raise CheckpointError(
            f"{folder} holds runs, and is none itself. Name one, newest first: {', '.join(map(str, runs[:SHOWN_RUNS]))}{more}."
        )


def run_config(folder: Path) -> TrainConfig:
    """Read a run's configuration as `read_config` does, with a warning where it is not that of `config.yaml`."""
    config, problem = read_config(folder)
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
        kept = copy.get("record")
        if isinstance(kept, dict):
            with suppress(ValueError):
                _check_record(storage.sealed(kept))
                return kept, f"{problem}: the copy in {checkpoint.name} is used instead."
    return {}, f"{problem}, and no checkpoint has a copy."


def _check_record(values: dict[str, Any]) -> None:
    """Raise a ValueError that says what is wrong."""
    if not TYPES.keys() & values.keys():
        raise ValueError("it is not the record of a run")
    if storage.SEAL not in values and LAST_CHECKPOINT in values:
        raise ValueError("its hash is missing")
    for key, kind in TYPES.items():
        if key in values and not isinstance(values[key], kind):
            raise ValueError(f"{key} is not what a run writes there")


def _run_copies(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """What the run's checkpoints keep of `run.json` and `config.yaml`, the newest first."""
    copies = []
    for checkpoint, manifest in reversed(manifests(folder).items()):
        path, entry = checkpoint / RUN_COPY, manifest.files.get(RUN_COPY)
        with suppress(OSError, ValueError):
            if entry is not None and changed(path, entry) is None:
                copies.append((checkpoint, storage.read_json_object(path)))
    return copies


def refuse_links(folder: Path) -> None:
    """Refuse to write into a run folder that holds a link: what is written there would go through it.

    The folder itself may be one, as may its parents. wandb's own folder has links, which wandb replaces.

    Raises:
        CheckpointError: there is a link, or a pipe or a device, which would block whoever opens it.
    """
    folders = [str(folder)]
    while folders:
        with suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:  # another process may be removing files
            for entry in entries:
                if entry.is_symlink():
                    raise CheckpointError(
                        f"{entry.path} is a link, and nothing is written through links in a run folder: put the file or folder "
                        "itself there, or remove the link."
                    )
                if entry.is_dir(follow_symlinks=False):
                    folders += [entry.path] if entry.name != "wandb" else []
                elif not entry.is_file(follow_symlinks=False):
                    raise CheckpointError(f"{entry.path} is neither a file nor a folder: remove it.")


class RunRecord:
    """`run.json`: who started what, where, with which versions, and how it ended."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD
        self.values = read_record(folder)

    def start(self, arguments: list[str], current: dict[str, Any] | None = None, **values: Any) -> None:
        """Note the beginning; a continued run keeps its first beginning and gains a line in `resumed`.

        The values of `current` are those of the last start.
        """
        if self.values:
            self.values.setdefault("resumed", []).append({"time": _now(), "argv": arguments, **values})
        else:
            self.values = {"argv": arguments, "start": _now(), **provenance(), **values}
        self.values.update({"status": "running", "end": None, **(current or {})})
        write_text(self.path, self._text())

    def update(self, **values: Any) -> None:
        """Note facts. A full disk does not end the work for it: what cannot be written is written with the next facts."""
        self.values.update(values)
        text = self._text()
        try:
            write_text(self.path, text)
        except CheckpointError as error:
            if not _overwrite(self.path, text, error.__cause__):
                log.warning("%s", error)

    def finish(self, status: str, **values: Any) -> None:
        """Note the end, `finished`, `failed` or `preempted`; the error of an earlier one is dropped."""
        self.values = {key: value for key, value in self.values.items() if key not in ("error", "exit_code")}
        self.update(status=status, end=_now(), **values)

    def acknowledge(self, step: int) -> None:
        """Note that the checkpoint of `step` is on the disk, as the rows of `metrics.csv` before it then are, too."""
        with suppress(OSError):  # there are no rows yet, or there is no room for them
            storage.sync(self.path.with_name(METRICS))
        self.update(**{LAST_CHECKPOINT: step})

    def run_copy(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that this record and `config.yaml` can be restored from it."""
        config = self.path.with_name(CONFIG).read_text(encoding="utf-8")
        return {"record": self._plain(), "config": config}

    def _plain(self) -> dict[str, Any]:
        """The values as they are read again: plain, and without secrets."""
        return dict(json.loads(redact(json.dumps(self.values, default=str))))

    def _text(self) -> str:
        return json.dumps(storage.sealed(self._plain()), indent=2) + "\n"


def _overwrite(path: Path, text: str, problem: BaseException | None) -> bool:
    """Write a text into the blocks that a file has already, where the disk is full; return whether it could be done.

    A loss of power meanwhile may damage the file, but a run that a full disk ends would be `running` forever.
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
    """Commit and cleanliness of the checkout; None for an installed package."""
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
    """Hold the folder for this process; the lock ends with the process, however it ends.

    Where the file system has no locks, a warning is logged, and the folder is used without one.

    Raises:
        ConfigError: another process holds it.
        CheckpointError: the folder cannot be written, or has links (`refuse_links`).
    """

    def warn_of_no_locks(folder: Path, reason: str) -> None:
        warn(
            folder,
            f"{folder} cannot be locked, since its file system has no locks ({reason}; Lustre has them with the mount option flock). "
            "Do not train in it with two processes at once: nothing would stop the second one, and each would overwrite the "
            "other's checkpoints.",
        )

    with ExitStack() as stack:
        try:
            refuse_links(folder)
            stack.enter_context(storage.lock(folder / ".lock", on_no_locks=warn_of_no_locks))
        except storage.InUse as error:
            raise ConfigError(
                f"{folder} is in use by {error.owner}: wait for it, or start another run with resume=never."
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be locked: {error.strerror or error}. Set output_dir to a folder where files can be written."
            ) from error
        yield


def is_free(folder: Path) -> bool:
    """Return whether no living process holds the folder; False also where the file system has no locks, which could tell."""
    try:
        refuse_links(folder)
        with storage.lock(folder / ".lock", on_no_locks=lambda *_: None) as held:
            return held
    except (storage.InUse, OSError, CheckpointError):
        return False


def warn(folder: Path, message: str) -> None:
    """Print a warning, and write it into `train.log`: logging to it starts later, and in other processes where there are several ranks."""
    message = redact(message)
    print(f"warning: {message}", file=sys.stderr, flush=True)
    with suppress(OSError), (folder / "train.log").open("a", encoding="utf-8") as file:
        file.write(f"{_now()} WARNING {message}\n")


def check_tokenizer(model: ModelConfig) -> None:
    """Raise a ConfigError where a model's tokenizer is not available, or does not fit the text tower."""
    if model.text.tokenizer_source is not None:
        from clip_exp.text.tokenizer import HuggingFaceTokenizer  # imports torch

        HuggingFaceTokenizer.of(model.text)


def save_tokenizer(model: ModelConfig, run_dir: Path) -> None:
    """Copy the model's tokenizer into a run folder, unless it is there already.

    Raises:
        ConfigError: it cannot be had.
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    source, folder = model.text.tokenizer_source, run_dir / TOKENIZER
    if source is None or folder.is_dir():
        return
    from clip_exp.text.tokenizer import save_huggingface  # imports torch

    try:
        with storage.atomic_folder(folder) as temporary:
            save_huggingface(source, temporary)
    except Exception as error:
        problem = storage.system_error(error)
        if problem is None:
            raise
        raise CheckpointError(f"{folder} cannot be written: {problem.strerror or problem}.") from error


def with_saved_tokenizer(model: ModelConfig, run_dir: Path) -> ModelConfig:
    """The configuration of a run's model, with the run's own copy of the tokenizer if it has one."""
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
