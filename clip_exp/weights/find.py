"""Lookup of the weights that `pretrained` names: a file, a folder, a run, a name on the Hugging Face hub, or a tag of open_clip."""

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
from clip_exp.weights.download import HUB, cached_path, fetch, fetch_repository, is_hub_name
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

# Function of open_clip's name of the architecture and a tag
LookUp = Callable[[str | None, str], open_clip_files.Entry | None]


def key_of(tower: str | None) -> str:
    """Return the key that names the weights of the model (None) or of a tower."""
    return "pretrained" if tower is None else f"pretrained_{tower}"


def find_weights(
    pretrained: str,
    model: ModelConfig | None,
    look_up: LookUp = open_clip_files.entry,
    tower: str | None = None,
) -> Found:
    """Find the weights that `pretrained` names, and download them if they are not on disk.

    The value is tried in this order as an existing path (a file; a run folder, with its best checkpoint if it has a
    `monitor`, else its last; a checkpoint; a folder written by `save_pretrained` of Hugging Face or open_clip), as
    `hf-hub:org/name[@revision]`, and as a tag of `model.open_clip_name` in open_clip's registry.

    Args:
        pretrained: value of `pretrained`, `pretrained_image` or `pretrained_text`.
        model: configuration of the model, for its tags; None if the weights must contain their configuration.
        look_up: function that looks up a tag in the registry.
        tower: image or text, to start only this tower from the weights; None: the whole model.

    Raises:
        ConfigError: the value is none of these (the message suggests the nearest tag), or the tag does not fit the model.
        CheckpointError: the weights cannot be downloaded, or are damaged.
    """
    if problems := check_pretrained(pretrained, model, look_up, tower):
        raise ConfigError("\n".join(problems))
    local = local_weights(pretrained, model, look_up)
    if local is not None:
        return Found(local, describe(local), str(local), tower)
    if is_hub_name(pretrained):
        folder = fetch_repository(pretrained.removeprefix(HUB))
        return Found(folder, describe(folder), pretrained, tower)
    assert model is not None
    listed = look_up(model.open_clip_name, pretrained)
    assert listed is not None
    return _published(listed, model, tower)


def local_weights(pretrained: str, model: ModelConfig | None, look_up: LookUp = open_clip_files.entry) -> Path | None:
    """Return the local file or folder of weights that `pretrained` names; None for a name on the hub or a tag.

    Args:
        pretrained, model, look_up: see `find_weights`.

    Raises:
        CheckpointError: a run has no undamaged checkpoint, or a folder has no weights.
    """
    path = _existing(pretrained)
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
    """Return error messages about a value of `pretrained`, without downloading or reading weights.

    Args:
        pretrained, model, look_up, tower: see `find_weights`.
    """
    key = key_of(tower)
    if not pretrained.strip():
        return [f"{key} has no value: set it to a tag, a file, a folder, or hf-hub:org/name."]
    if _existing(pretrained) is not None or is_hub_name(pretrained):
        return []
    listed = look_up(model.open_clip_name, pretrained) if model is not None else None
    if model is None or listed is None:
        return [_problem(pretrained, model, key)]
    problem = activation_contradiction(model, activation_of_entry(listed, model), _description(listed))
    return [problem] if problem else []


def hash_weights(path: Path) -> str:
    """Return the SHA-256 of a weights file; for weights in several files, that of the list of their hashes and names."""
    files = weight_files(path)
    if len(files) == 1:
        return file_sha256(files[0])
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_part(sha256: str, prefix: str | None) -> str:
    """Return a hash of the weights under `pretrained_prefix` in a file.

    Args:
        sha256: hash of the file.
        prefix: value of `pretrained_prefix`; None: return the hash of the file.
    """
    return sha256 if prefix is None else hashlib.sha256(f"{sha256} {prefix}".encode()).hexdigest()


def _existing(pretrained: str) -> Path | None:
    """Return the file or folder of that name; None if it does not exist."""
    try:
        path = Path(pretrained).expanduser()
        return path if path.is_file() or path.is_dir() else None
    except PermissionError:
        raise
    except (OSError, RuntimeError):
        # The name is too long, or in the home of an unknown user.
        return None


def _holds_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(_in_folder(folder)))
    except CheckpointError:
        return False


def _in_folder(folder: Path) -> Path:
    """Return the weights in a run folder or a checkpoint; another folder with weights is returned itself.

    Raises:
        CheckpointError: there are no weights, or the checkpoint is damaged.
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
    except CheckpointError:
        # If the folder contains runs, a message that lists them is more helpful.
        require_run(folder)
        raise
    return folder


def _published(listed: open_clip_files.Entry, model: ModelConfig, tower: str | None) -> Found:
    """Fetch weights of the registry. The registry's data take precedence, since a file may not contain them."""
    path = _fetch(listed)
    about = replace(
        describe(path),
        activation=activation_of_entry(listed, model),
        mean=listed.mean,
        std=listed.std,
        interpolation=Interpolation(listed.interpolation),
        resize_mode=ResizeMode(listed.resize_mode),
    )
    return Found(path, about, _description(listed), tower)


def _fetch(listed: open_clip_files.Entry) -> Path:
    """Fetch weights from the hub, where most of them are safetensors files, or from their original URL if the hub does not have them."""
    address = listed.url
    if listed.hub is None or (address and cached_path(address).is_file()):
        assert address is not None
        return _from_address(address, listed.sha256)
    try:
        return fetch_repository(listed.hub, listed.hub_file, prefer_cached=True)
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
            raise CheckpointError(
                f"{error} Delete {path} first, since an existing file is not downloaded again."
            ) from error
    return path


def _description(listed: open_clip_files.Entry) -> str:
    return f"{listed.tag} of open_clip's {listed.model}"


def _problem(pretrained: str, model: ModelConfig | None, key: str) -> str:
    looks_like_a_path = "/" in pretrained or Path(pretrained).suffix.lower() in FILE_ENDINGS
    others = "a file, a folder (a run, a checkpoint, Hugging Face's or open_clip's), or hf-hub:org/name"
    if pretrained.startswith(HUB):
        return f"{key}={pretrained} is not a valid name: write hf-hub:org/name, or hf-hub:org/name@revision."
    if "://" in pretrained:
        page = pretrained.partition("://huggingface.co/")[2].strip("/")
        hint = f" ({key}={HUB}{page})" if is_hub_name(HUB + page) else ""
        return f"{key}={pretrained}: URLs are not supported. Give {HUB}org/name{hint}, or download the file and give its path."
    if is_hub_name(HUB + pretrained) and Path(pretrained).suffix.lower() not in FILE_ENDINGS:
        others = f"{HUB}{pretrained} if it is on the Hugging Face hub, or a file, or a folder"
    if looks_like_a_path or model is None:
        tag = " A tag also needs model=NAME." if not looks_like_a_path else ""
        return f"{key}={pretrained} does not exist (current folder: {Path.cwd()}). Give {others}.{tag}"
    tags = open_clip_files.tags(model.open_clip_name)
    if not tags:
        return f"{key}={pretrained} does not exist, and model={model.name} has no published weights: give {others}."
    having = [
        other.name for other in known_models() if open_clip_files.entry(other.open_clip_name, pretrained) is not None
    ]
    hint = (
        f"model={' or model='.join(having)} has this tag; the tags of model={model.name} are {', '.join(tags)}."
        if having
        else nearest(open_clip_files.clean(pretrained), tags)
    )
    return f"{key}={pretrained} is neither an existing path nor a tag of model={model.name}: {hint} Or give {others}."
