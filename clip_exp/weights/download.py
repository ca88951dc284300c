"""Weights from the Hugging Face hub and from other addresses, downloaded once by libraries that do it, checked, and kept on this disk.

`huggingface_hub` keeps repositories in its own cache, `torch.hub` writes files from addresses to `CLIP_EXP_CACHE`.
"""

import http.client
import logging
import os
import re
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.storage import InUse, atomic_file, file_sha256, lock, remove_leftovers
from clip_exp.weights.inspect import IN_FOLDER, INDEX, part_names, weight_files

log = logging.getLogger(__name__)

HUB = "hf-hub:"
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")
SHA256 = re.compile(r"[0-9a-f]{64}")  # the name of a large file in the hub's cache
# How the weights were made, and what their texts are made into tokens with.
ABOUT = ("open_clip_config.json", "config.json", "preprocessor_config.json", "processor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model", "vocab.txt")

PAUSES_S = (1.0, 2.0, None)  # after each attempt that failed
TIMEOUT_S = 30.0  # for an answer of a server
WAIT_S = 3600.0  # for another process that downloads the same file
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers of a server that may be better later
NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)


def fetch(url: str, sha256: str | None = None) -> Path:
    """Return the file behind an address, downloaded unless it is on this disk, by one process while others wait.

    Args:
        url: https; or http where `sha256` is known, since anyone on the way could change the file.
        sha256: of the file in hexadecimal, or its first digits. A file that is on this disk is checked too.

    Raises:
        ConfigError: http without a checksum.
        CheckpointError: offline, not available, another checksum, or no room.
    """
    target = kept_at(url)
    if target.is_file():
        _verify(target, sha256)
        return target
    if offline():
        raise CheckpointError(
            f"{target} is not there, and nothing is downloaded offline (CLIP_EXP_OFFLINE or HF_HUB_OFFLINE is set): "
            f"put the file of {url} there by hand, or set CLIP_EXP_CACHE to the folder that has it."
        )
    if urlsplit(url).scheme != "https" and sha256 is None:
        raise ConfigError(
            f"{url} is not fetched: without a checksum only https is safe. Download it and give the file."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(
            target.with_name(f"{target.name}.lock"),
            wait_s=WAIT_S,
            on_wait=lambda: _report(f"waiting for another process that downloads {target}"),
            on_no_locks=lambda folder, reason: None,  # two downloads have two temporary names
        ) as alone:
            if target.is_file():  # of the process that was waited for
                _verify(target, sha256)
            else:
                if alone:
                    remove_leftovers(target)
                _download(url, sha256, target)
    except InUse:
        raise CheckpointError(
            f"waited {WAIT_S:g} s for another process that downloads {target}: see whether it still works, and run again."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}. Make room there, or set CLIP_EXP_CACHE to another folder."
        ) from error
    return target


def kept_at(url: str) -> Path:
    """Return where the file behind an address is kept: under its own name in CLIP_EXP_CACHE, else in `~/.cache/clip_exp/weights`.

    Raises:
        ConfigError: the variable is an address.
    """
    folder = os.environ.get("CLIP_EXP_CACHE") or "~/.cache/clip_exp/weights"
    if "://" in folder:
        raise ConfigError(
            f"CLIP_EXP_CACHE={folder} is an address, and downloads are kept in a local folder: set it to one."
        )
    return Path(folder).expanduser() / Path(unquote(urlsplit(url).path)).name


def offline() -> bool:
    """Return whether the user wants no network: CLIP_EXP_OFFLINE=1, or the hub's own HF_HUB_OFFLINE=1."""
    values = (os.environ.get(name, "") for name in ("CLIP_EXP_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.lower() in ("1", "true", "yes", "on") for value in values)


def is_hub_name(name: str) -> bool:
    """Return whether `name` is written as `hf-hub:org/name` or `hf-hub:org/name@revision`."""
    return name.startswith(HUB) and NAME.fullmatch(name.removeprefix(HUB)) is not None


def fetch_repository(name: str, file: str | None = None, *, kept_is_enough: bool = False) -> Path:
    """Return a repository's weights on this disk, with what it says about them, downloaded where the hub has newer ones.

    Args:
        name: `org/name`, or `org/name@revision`.
        file: of the weights in it, of which a `.safetensors` of the same name is preferred; None: the first of `IN_FOLDER`.
        kept_is_enough: take what is on disk without asking whether the hub has something newer.

    Returns:
        The file, if one was named, else the folder that holds weights, configuration and tokenizer.

    Raises:
        ConfigError: `name` is not written so.
        CheckpointError: offline, not reached, no such repository, access not granted, no weights in it, or damaged ones.
    """
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"{HUB}{name}: write {HUB}org/name, or {HUB}org/name@revision.")
    kept = _on_disk(name, file)
    if kept is None and offline():
        raise CheckpointError(
            f"{HUB}{name} is not on this disk, and nothing is downloaded offline (CLIP_EXP_OFFLINE or HF_HUB_OFFLINE is set): "
            "fetch its files elsewhere and give their folder (pretrained=DIR)."
        )
    if kept is None or not (kept_is_enough or offline()):
        if kept is None:
            _report(f"downloading {HUB}{name}")  # the library's bars are for terminals
        try:
            kept = _download_repository(name, file)
        except CheckpointError:
            raise
        except Exception as error:  # of connections they differ between the library's versions
            problem = _sentence(error, name)
            if kept is None or not _may_pass(error):
                raise CheckpointError(problem) from error
            log.warning("%s What is on this disk is used: %s", problem, kept)
    for part in weight_files(kept):
        _verify_in_cache(part, name)
    return kept


def _download(url: str, sha256: str | None, target: Path) -> None:
    """Download a file, in a few attempts where the failure may pass."""
    import torch.hub  # takes seconds, which files that are on this disk need not wait for

    _report(f"downloading {url} to {target.parent}")
    for pause_s in PAUSES_S:
        try:
            with atomic_file(target) as file, _default_timeout():
                size = _size_of(url) if sha256 is None else None
                torch.hub.download_url_to_file(url, str(file), sha256, progress=sys.stderr.isatty())
                if size is not None and file.stat().st_size != size:
                    raise ConnectionError("the connection broke")
            return
        # A wrong checksum is a RuntimeError, and may pass too: torch.hub does not notice where a connection broke.
        except (RuntimeError, *NETWORK) as error:
            if isinstance(error, HTTPError):
                error.close()  # it is the answer too, and holds the connection
            if pause_s is None or (isinstance(error, HTTPError) and error.code not in PASSING):
                raise CheckpointError(
                    f"{url} cannot be fetched: {_reason(error)}. Run again later, or put the file at {target} by hand."
                ) from error
        time.sleep(pause_s)


@contextmanager
def _default_timeout() -> Iterator[None]:
    """Give up on a silent server: torch.hub takes no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _size_of(url: str) -> int | None:
    """Return the bytes behind an address, and refuse one that leads to another, which torch.hub would follow to http too."""
    with urlopen(Request(url, method="HEAD")) as answer:
        if answer.geturl() != url:
            raise CheckpointError(
                f"{url} leads to {answer.geturl()}: without a checksum no other address is safe. Download the file and give it "
                "(pretrained=FILE)."
            )
        length = answer.headers["Content-Length"]
    return int(length) if length else None


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answered {error.code} {_first_line(error.reason)}"
    reason = error.reason if isinstance(error, URLError) else error
    return getattr(reason, "strerror", None) or _first_line(reason)


def _verify(path: Path, sha256: str | None) -> None:
    if sha256 is not None and not (found := file_sha256(path)).startswith(sha256):
        raise CheckpointError(
            f"{path} has sha256 {found} instead of {sha256}{'…' * (len(sha256) < 64)}: it is damaged, or another file. "
            "Delete it, and it is fetched again."
        )


def _on_disk(name: str, file: str | None) -> Path | None:
    """Return what the hub's cache holds of a repository, if it is whole."""
    from huggingface_hub import try_to_load_from_cache

    repository, revision = _split(name)
    kept = (try_to_load_from_cache(repository, choice, revision=revision) for choice in _choices(file))
    path = next((Path(found) for found in kept if isinstance(found, str)), None)
    with suppress(CheckpointError):  # a part is missing
        if path is not None and weight_files(path):
            return path if file else path.parent
    return None


def _download_repository(name: str, file: str | None) -> Path:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint())
    repository, revision = _split(name)
    # Fails at once where the hub is not reached; the download of a file would retry for half a minute.
    info = api.model_info(repository, revision=revision, timeout=TIMEOUT_S)
    there = {sibling.rfilename for sibling in info.siblings or ()}
    wanted = next((choice for choice in _choices(file) if choice in there), None)
    if wanted is None:
        raise CheckpointError(
            f"{HUB}{name} has no weights that clip_exp knows: it needs one of {', '.join(_choices(file))}, and has "
            f"{', '.join(sorted(there)[:10]) or 'no files'}."
        )
    for about in ABOUT if file else ABOUT + TOKENIZER:
        if about in there:
            api.hf_hub_download(repository, about, revision=revision)
    path = Path(api.hf_hub_download(repository, wanted, revision=revision))
    for part in part_names(path) if wanted.endswith(INDEX) else ():
        api.hf_hub_download(repository, part, revision=revision)
    return path if file else path.parent


def _split(name: str) -> tuple[str, str | None]:
    repository, _, revision = name.partition("@")
    return repository, revision or None


def _choices(file: str | None) -> tuple[str, ...]:
    return IN_FOLDER if file is None else (str(Path(file).with_suffix(".safetensors")), file)


def _endpoint() -> str:
    """Return the hub, or the mirror that the hub's own variable names."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _may_pass(error: Exception) -> bool:
    """Return whether the hub did not answer, or is busy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in PASSING or (status is None and getattr(error, "errno", None) is None)


def _sentence(error: Exception, name: str) -> str:
    """Return what an error of the hub's library means."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        page = f"{_endpoint()}/{_split(name)[0]}"
        said = f" is given only to those who have accepted its conditions: accept them at {page}, and log in (hf auth login)."
    elif isinstance(error, RepositoryNotFoundError):
        said = ": there is no such repository, or it is private: check the name, or log in (hf auth login)."
    elif isinstance(error, RevisionNotFoundError):
        said = ": the repository has no such revision: give a branch, tag or commit."
    elif isinstance(error, OSError) and error.errno is not None:  # of this disk: the library's own have no number
        place = error.filename or HF_HUB_CACHE
        said = f": {place} cannot be written: {error.strerror}. Make room there, or set HF_HOME to another folder."
    else:
        said = (
            f" cannot be fetched from {_endpoint()}: {_first_line(error)}. Run again later, or fetch its files elsewhere and give "
            "their folder (pretrained=DIR)."
        )
    return f"{HUB}{name}{said}"


def _verify_in_cache(path: Path, name: str) -> None:
    """Check a large file, which the hub's cache keeps under its hash: its library compares only the size.

    Raises:
        CheckpointError: another hash; the file is removed.
    """
    blob = path.parent / path.readlink() if path.is_symlink() else path
    if SHA256.fullmatch(blob.name) and (found := file_sha256(path)) != blob.name:
        for file in (path.resolve(), blob, path):  # a blob may itself be a link to one that repositories share
            file.unlink(missing_ok=True)
        raise CheckpointError(
            f"{HUB}{name}: {path.name} has sha256 {found} instead of {blob.name}, so it was damaged, and is removed. Run again."
        )


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _report(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
