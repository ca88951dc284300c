"""Which folder a run works in, and what its configuration leaves to the weights that it starts from: decided once, by one process."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clip_exp.checkpoints.discovery import checkpoints
from clip_exp.config.load import read_run_config, to_yaml
from clip_exp.config.schema import TrainConfig
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.runs import RunRecord, create_run_folder, write_text
from clip_exp.text.saved import check_tokenizer, save_tokenizer
from clip_exp.training.preflight_finetune import rehearse
from clip_exp.weights.find import find_weights, hash_weights
from clip_exp.weights.own import note_architecture
from clip_exp.weights.settle import as_settled, settle

# What may differ between the start of a run and its continuation: where and how it runs, not what it computes.
NOT_IN_IDENTITY = (
    "resume", "output_dir", "strategy.", "trainer.", "logger.", "micro_batch_size", "log_every_n_steps", "compile",
    "checkpoint_every_n_steps", "val_every_n_steps", "task", "data.num_workers", "data.max_bad_fraction",
    "data.allow_changed", "callbacks.progress", "callbacks.save_retry_s",
)  # fmt: skip
IN_IDENTITY = ("trainer.gradient_clip_val",)
LENGTH = {"max_steps", "epochs"}  # what a run that is named by resume=PATH may be given anew


@dataclass(frozen=True)
class Opening:
    """A run that is about to begin or to go on."""

    folder: Path
    finished: bool  # it has ended well before; there is nothing to do
    asked: TrainConfig  # by which the run is found again
    settled: TrainConfig  # by which it trains
    facts: dict[str, Any]  # for `run.json`

    def begin(self, arguments: list[str]) -> None:
        """Write what the run is into its folder, which this process holds.

        Args:
            arguments: of the command line.
        """
        begin(self.folder, self.settled, arguments, asked=self.asked, **self.facts)
        save_tokenizer(self.settled.model, self.folder)


def open_run(config: TrainConfig, suffix: str = "") -> Opening:
    """The folder to go on in, or a new one. Weights to start from are found, and fetched if need be, for a new one alone.

    Args:
        suffix: of the name of a new folder.
    Raises:
        ConfigError: `resume` names no run, or another one; see `find_weights` and `settle`.
        CheckpointError: the weights cannot be fetched or are damaged; the folder cannot be made.
    """
    earlier = run_to_go_on_in(config)
    if earlier is not None:
        folder, finished = earlier
        settled = replace(config, model=as_settled(config.model, read_run_config(folder).model))
        return Opening(folder, finished, config, settled, {})
    model, facts = note_architecture(config.model, config.pretrained), {}
    rehearse(replace(config, model=model))
    if config.pretrained is not None:
        found = find_weights(config.pretrained, model)
        model = settle(model, found)
        path = found.path.absolute()
        facts["pretrained"] = {
            "told": found.told,
            "path": str(path),
            "sha256": hash_weights(path),
            "format": found.about.format,
        }
    check_tokenizer(model)
    settled = replace(config, model=model)
    return Opening(create_run_folder(config.output_dir, "train", config.name, suffix), False, config, settled, facts)


def start_weights(config: TrainConfig, record: dict[str, Any]) -> Path:
    """The weights that a run starts from, on this machine.

    Args:
        record: the run's `run.json`. The file that it names was found on the machine of rank 0; another may have to fetch its own.
    Raises:
        ConfigError: see `find_weights`.
        CheckpointError: likewise; or what is found here is not what rank 0 found.
    """
    noted = record.get("pretrained", {})
    if "path" in noted and Path(noted["path"]).exists():
        return Path(noted["path"])
    found = find_weights(str(config.pretrained), config.model).path
    if noted and hash_weights(found) != noted["sha256"]:
        raise CheckpointError(
            f"{found} is not what the run began with (sha256 {noted['sha256']}): give that, or start anew."
        )
    return found


def identity(config: TrainConfig) -> dict[str, Any]:
    """What decides what the run computes, by dotted key; where and how it runs is left out."""
    values = flatten(dataclasses.asdict(config))
    return {key: value for key, value in values.items() if not key.startswith(NOT_IN_IDENTITY) or key in IN_IDENTITY}


def fingerprint(config: TrainConfig) -> str:
    """A hash of the run's identity."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True, default=str).encode()).hexdigest()[:16]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def find_run(config: TrainConfig) -> Path | None:
    """The newest folder of the run's name and fingerprint that has something to go on from, or has finished."""
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
