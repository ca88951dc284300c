"""From what `pretrained` says to weights on this disk: a file, a folder, a run, a name on the hub, or a tag of open_clip's."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import clip_exp.open_clip_files as open_clip_files
from clip_exp.checkpoints import folders
from clip_exp.checkpoints.folders import MANIFEST, WEIGHTS
from clip_exp.config.model import Interpolation, ModelConfig, ResizeMode
from clip_exp.config.names import known_models
from clip_exp.errors import CheckpointError, ConfigError, nearest
from clip_exp.runs import CONFIG, require_run, run_config
from clip_exp.storage import file_sha256
from clip_exp.weights.download import HUB, fetch, fetch_repository, is_hub_name, kept_at
from clip_exp.weights.inspect import (
    Found,
    activation_contradiction,
    activation_of_entry,
    describe,
    format_of,
    weight_files,
)

log = logging.getLogger(__name__)
FILE_ENDINGS = {".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".npz"}

LookUp = Callable[[str | None, str], open_clip_files.Entry | None]  # (open_clip's name of the architecture, tag)


def key_of(tower: str | None) -> str:
    """Return the key that names weights: those of the model, or of one tower."""
    return "pretrained" if tower is None else f"pretrained_{tower}"


def find_weights(
    pretrained: str,
    model: ModelConfig | None,
    look_up: LookUp = open_clip_files.entry,
    tower: str | None = None,
) -> Found:
    """The weights that `pretrained` names, downloaded where they are not on this disk.

    Tried in this order: a path that exists (a file; a run folder, of which the best checkpoint if it has a `monitor`, else the
    last; a checkpoint; a folder as Hugging Face's or open_clip's `save_pretrained` write), `hf-hub:org/name[@revision]`, a
    tag that open_clip's registry has for `model.open_clip_name`.

    Args:
        model: whose tags count; None where the weights must tell it themselves.
        look_up: the registry.
        tower: image or text, for which alone the weights are wanted: `pretrained` is the value of `pretrained_image` or `pretrained_text`.
    Raises:
        ConfigError: none of these, the nearest tag is named; or a tag that contradicts the model.
        CheckpointError: the weights cannot be fetched, or are damaged.
    """
    if problems := check_pretrained(pretrained, model, look_up, tower):
        raise ConfigError("\n".join(problems))
    chosen = local_weights(pretrained, model, look_up)
    if chosen is not None:
        return Found(chosen, describe(chosen), str(chosen), tower)
    if is_hub_name(pretrained):
        folder = fetch_repository(pretrained.removeprefix(HUB))
        return Found(folder, describe(folder), pretrained, tower)
    assert model is not None
    listed = look_up(model.open_clip_name, pretrained)
    assert listed is not None
    return _published(listed, model, tower)


def local_weights(pretrained: str, model: ModelConfig | None, look_up: LookUp = open_clip_files.entry) -> Path | None:
    """Return the file or folder of weights on this disk that `pretrained` names; None: a name on the hub or a tag.

    Args:
        model, look_up: see `find_weights`.

    Raises:
        CheckpointError: a run has no undamaged checkpoint, or a folder no weights.
    """
    path = _place(pretrained)
    if path is None or path.is_file():
        return path
    listed = look_up(model.open_clip_name, pretrained) if model is not None else None
    return _in_folder(path) if listed is None or _holds_weights(path) else None


def check_pretrained(
    pretrained: str,
    model: ModelConfig | None,
    look_up: LookUp = open_clip_files.entry,
    tower: str | None = None,
) -> list[str]:
    """What can be seen to be wrong with `pretrained`, or with the weights of one tower, before anything is fetched or read."""
    key = key_of(tower)
    if not pretrained.strip():
        return [f"{key} has no value: give a tag, a file, a folder, or hf-hub:org/name."]
    if _place(pretrained) is not None or is_hub_name(pretrained):
        return []
    listed = look_up(model.open_clip_name, pretrained) if model is not None else None
    if model is None or listed is None:
        return [_problem(pretrained, model, key)]
    problem = activation_contradiction(model, activation_of_entry(listed, model), _told(listed))
    return [problem] if problem else []


def hash_weights(path: Path) -> str:
    """SHA-256 of a file of weights; of weights in several files, that of the list of their hashes and names."""
    files = weight_files(path)
    if len(files) == 1:
        return file_sha256(files[0])
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_part(sha256: str, prefix: str | None) -> str:
    """Return a hash of the weights below `pretrained_prefix` in a file, from the file's; None: that of the file."""
    return sha256 if prefix is None else hashlib.sha256(f"{sha256} {prefix}".encode()).hexdigest()


def _place(pretrained: str) -> Path | None:
    """The file or folder of that name; None where there is none, or none could be."""
    try:
        path = Path(pretrained).expanduser()
        return path if path.is_file() or path.is_dir() else None
    except PermissionError:
        raise
    except (OSError, RuntimeError):  # too long for a name; in the home of a user who does not exist
        return None


def _holds_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(_in_folder(folder)))
    except CheckpointError:
        return False


def _in_folder(folder: Path) -> Path:
    """The weights in a run folder or a checkpoint; any other folder is read as it is.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
    """
    if (folder / CONFIG).is_file() and (folder / "checkpoints").is_dir():
        run = run_config(folder)
        return (folders.best(folder) if run.monitor else folders.latest(folder)) / WEIGHTS
    if (folder / MANIFEST).is_file() and (folder / WEIGHTS).is_file():
        if problem := folders.damage(folder):
            raise CheckpointError(f"{folder} is damaged: {problem}. Give an earlier checkpoint of the run.")
        return folder / WEIGHTS
    try:
        weight_files(folder)
    except CheckpointError:  # which says what is missing
        require_run(folder)
        raise
    return folder


def _published(listed: open_clip_files.Entry, model: ModelConfig, tower: str | None) -> Found:
    """Weights of the registry. What it says about them holds, since a file alone may not tell."""
    path = _fetch(listed)
    about = replace(
        describe(path),
        activation=activation_of_entry(listed, model),
        mean=listed.mean,
        std=listed.std,
        interpolation=Interpolation(listed.interpolation),
        resize_mode=ResizeMode(listed.resize_mode),
    )
    return Found(path, about, _told(listed), tower)


def _fetch(listed: open_clip_files.Entry) -> Path:
    """From the hub, where weights are safetensors mostly; from the address of old where the hub has them not."""
    address = listed.url
    if listed.hub is None or (address and kept_at(address).is_file()):
        assert address is not None
        return _from_address(address, listed.sha256)
    try:
        return fetch_repository(listed.hub, listed.hub_file, kept_is_enough=True)
    except CheckpointError as error:
        if address is None:
            raise
        try:
            return _from_address(address, listed.sha256)
        except CheckpointError as second:
            raise CheckpointError(f"{error}\n{second}") from second


def _from_address(address: str, sha256: str | None) -> Path:
    path = fetch(address, sha256)
    if sha256 is None:
        try:
            format_of(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error} Delete what lies there first: it is taken for whole.") from error
    return path


def _told(listed: open_clip_files.Entry) -> str:
    return f"{listed.tag} of open_clip's {listed.model}"


def _problem(pretrained: str, model: ModelConfig | None, key: str) -> str:
    looks_like_a_path = "/" in pretrained or Path(pretrained).suffix.lower() in FILE_ENDINGS
    others = "a file, a folder (a run, a checkpoint, Hugging Face's or open_clip's), or hf-hub:org/name"
    if pretrained.startswith(HUB):
        return f"{key}={pretrained} cannot be read: write hf-hub:org/name, or hf-hub:org/name@revision."
    if "://" in pretrained:
        page = pretrained.partition("://huggingface.co/")[2].strip("/")
        hint = f" ({key}={HUB}{page})" if is_hub_name(HUB + page) else ""
        return f"{key}={pretrained}: addresses are not fetched. Give {HUB}org/name{hint}, or download the file and give it."
    if is_hub_name(HUB + pretrained) and Path(pretrained).suffix.lower() not in FILE_ENDINGS:
        others = f"{HUB}{pretrained} if it is on the Hugging Face hub, or a file, or a folder"
    if looks_like_a_path or model is None:
        tag = " A tag needs its model=NAME." if not looks_like_a_path else ""
        return f"{key}={pretrained} does not exist (looked in {Path.cwd()}). Give {others}.{tag}"
    tags = open_clip_files.tags(model.open_clip_name)
    if not tags:
        return f"{key}={pretrained} does not exist, and model={model.name} has no published weights: give {others}."
    having = [
        other.name for other in known_models() if open_clip_files.entry(other.open_clip_name, pretrained) is not None
    ]
    meant = (
        f"model={' or model='.join(having)} has that tag; of model={model.name} they are {', '.join(tags)}."
        if having
        else nearest(open_clip_files.clean(pretrained), tags)
    )
    return f"{key}={pretrained} does not exist, and is no tag of model={model.name}: {meant} Or give {others}."
