"""Which folder a run works in, and what its configuration leaves to the weights that it starts from: decided once, by one process."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clip_exp.config.load import read_run_config
from clip_exp.config.schema import TrainConfig
from clip_exp.errors import CheckpointError
from clip_exp.runs import begin, create_run_folder, run_to_go_on_in
from clip_exp.text.saved import check_tokenizer, save_tokenizer
from clip_exp.training.finetune_check import rehearse
from clip_exp.weights.find import find_weights, hash_weights
from clip_exp.weights.own import note_architecture
from clip_exp.weights.settle import as_settled, settle


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
