"""Weights from the Hugging Face hub, in its own library's cache; its large files come by our own download.

The library neither goes on with a download that another process began, nor compares checksums, and waits for other processes
without a limit.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.storage import file_sha256
from clip_exp.weights.download import fetch, offline
from clip_exp.weights.inspect import IN_FOLDER, INDEX, part_names, weight_files
from clip_exp.weights.transfer import PASSING

log = logging.getLogger(__name__)
HUB = "hf-hub:"
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")
SHA256 = re.compile(r"[0-9a-f]{64}")  # the tag of a large file
# How the weights were made, and what their texts are made into tokens with.
ABOUT = ("open_clip_config.json", "config.json", "preprocessor_config.json", "processor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
TIMEOUT_S = 10.0


def is_hub_name(name: str) -> bool:
    """Whether `name` is written as `hf-hub:org/name` or `hf-hub:org/name@revision`."""
    return name.startswith(HUB) and NAME.fullmatch(name.removeprefix(HUB)) is not None


def fetch_repository(name: str, file: str | None = None, *, kept_is_enough: bool = False) -> Path:
    """A repository's weights on this disk, with what it says about them.

    Args:
        name: `org/name`, or `org/name@revision`.
        file: of the weights in it, of which a `.safetensors` of the same name is preferred; None: the first of `formats.IN_FOLDER`.
        kept_is_enough: take what is on disk without asking whether the hub has something newer.
    Returns:
        the file, if one was named, else the folder that holds weights, configuration and tokenizer.
    Raises:
        ConfigError: `name` is not written so.
        CheckpointError: offline, not reached, no such repository, access not granted, no weights in it, or damaged ones.
    """
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"{HUB}{name}: write {HUB}org/name, or {HUB}org/name@revision.")
    kept = _on_disk(name, file)
    if kept is None or not (kept_is_enough or offline()):
        try:
            kept = _download(name, file)
        except HubUnreachable as error:
            if kept is None:
                raise
            log.warning("%s What is on this disk is used: %s", error, kept)
    for part in weight_files(kept):
        _verify(part, name)
    return kept


class HubUnreachable(CheckpointError):
    """The hub did not answer, or is not to be asked."""


def _download(name: str, file: str | None) -> Path:
    _require_reachable(name)
    from huggingface_hub import HfApi

    repository, revision = _split(name)
    with _translated(name):
        info = HfApi(endpoint=_endpoint()).model_info(repository, revision=revision, timeout=TIMEOUT_S)
        there = {sibling.rfilename for sibling in info.siblings or ()}
    wanted = next((choice for choice in _choices(file) if choice in there), None)
    if wanted is None:
        raise CheckpointError(
            f"{HUB}{name} has no weights that clip_exp knows: it needs one of {', '.join(_choices(file))}, and has "
            f"{', '.join(sorted(there)[:10]) or 'no files'}."
        )
    with _translated(name):
        for about in ABOUT if file else ABOUT + TOKENIZER:
            if about in there:
                _get(repository, about, revision)
        path = _get(repository, wanted, revision)
        for part in part_names(path) if wanted.endswith(INDEX) else ():
            _get(repository, part, revision)
    return path if file else path.parent


def _get(repository: str, file: str, revision: str | None) -> Path:
    """A file of a repository in the library's cache. A large one is put where the library finds it, and only links to it."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repository, file, revision=revision, endpoint=_endpoint())
    tag = get_hf_file_metadata(url, timeout=TIMEOUT_S, endpoint=_endpoint()).etag or ""
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "blobs"
    if SHA256.fullmatch(tag) and not (blobs / tag).is_file():
        fetch(url, tag, blobs, name=tag, headers=build_hf_headers())
    return Path(hf_hub_download(repository, file, revision=revision, endpoint=_endpoint()))


def _choices(file: str | None) -> tuple[str, ...]:
    return IN_FOLDER if file is None else (str(Path(file).with_suffix(".safetensors")), file)


def _split(name: str) -> tuple[str, str | None]:
    repository, _, revision = name.partition("@")
    return repository, revision or None


def _on_disk(name: str, file: str | None) -> Path | None:
    """What the hub's cache holds of a repository, if it is whole."""
    from huggingface_hub import try_to_load_from_cache

    repository, revision = _split(name)
    for choice in _choices(file):
        path = try_to_load_from_cache(repository, choice, revision=revision)
        if isinstance(path, str):
            try:
                weight_files(Path(path))
            except CheckpointError:  # a part is missing
                return None
            return Path(path) if file else Path(path).parent
    return None


def _require_reachable(name: str) -> None:
    """The hub's library would try for half a minute, a line of warning each time."""
    if offline():
        raise HubUnreachable(
            f"{HUB}{name} is not on this disk, and nothing is downloaded offline (CLIP_EXP_OFFLINE or HF_HUB_OFFLINE is set): "
            "fetch its files elsewhere and give their folder (pretrained=DIR)."
        )
    try:
        requests.head(_endpoint(), timeout=TIMEOUT_S)
    except requests.RequestException as error:
        raise HubUnreachable(
            f"{HUB}{name} cannot be fetched: {_endpoint()} is not reached ({type(error).__name__}). Look at the network, or fetch "
            "the files elsewhere and give their folder (pretrained=DIR)."
        ) from error


def _endpoint() -> str:
    """The hub, or the mirror that the hub's own variable names."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """The hub library's errors as one sentence each."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except CheckpointError:
        raise
    except GatedRepoError as error:
        raise CheckpointError(
            f"{HUB}{name} is given only to those who have accepted its conditions: accept them at "
            f"{_endpoint()}/{_split(name)[0]}, and log in (hf auth login)."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{HUB}{name}: there is no such repository, or it is private: check the name, or log in (hf auth login)."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{HUB}{name}: the repository has no such revision: give a branch, tag or commit."
        ) from error
    except (
        Exception
    ) as error:  # the library's transport, and with it the errors of connections, differ between versions
        if isinstance(error, OSError) and error.filename is not None:  # of this disk
            raise CheckpointError(
                f"{HUB}{name}: {error.filename} cannot be written: {error.strerror}. Make room there, or set HF_HOME to another folder."
            ) from error
        status = getattr(getattr(error, "response", None), "status_code", None)
        kind = HubUnreachable if status is None or status in PASSING else CheckpointError
        raise kind(f"{HUB}{name} cannot be fetched: {_first_line(error)}. Run again later to go on.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _verify(path: Path, name: str) -> None:
    """Large files lie in the hub's cache under their hash, which the hub's library does not compare.

    Raises:
        CheckpointError: another hash; the file is removed.
    """
    kept = path.resolve()
    if SHA256.fullmatch(kept.name) and (found := file_sha256(kept)) != kept.name:
        path.unlink()
        kept.unlink(missing_ok=True)
        raise CheckpointError(
            f"{HUB}{name}: {path.name} has sha256 {found} instead of {kept.name}, so it was damaged, and is removed. Run again."
        )
