"""Download of weights from the Hugging Face hub and from URLs. Files are verified and cached.

Repositories are downloaded to the cache of `huggingface_hub`, files from URLs by `torch.hub` to the folder
`CLIP_EXP_CACHE`.
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
# Name of a large file in the hub's cache
SHA256 = re.compile(r"[0-9a-f]{64}")
# Files with the configuration of the model and of its preprocessing
ABOUT = ("open_clip_config.json", "config.json", "preprocessor_config.json", "processor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model", "vocab.txt")

# Seconds to wait after each failed attempt; None: give up
PAUSES_S = (1.0, 2.0, None)
# Seconds to wait for a response
TIMEOUT_S = 30.0
# Seconds to wait for another process that downloads the same file
WAIT_S = 3600.0
# HTTP status codes of temporary failures
TEMPORARY_FAILURES = {408, 425, 429, 500, 502, 503, 504}
NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)


def fetch(url: str, sha256: str | None = None) -> Path:
    """Return the file at a URL, from the cache or downloaded. If several processes need a file, one downloads it while the others wait.

    Args:
        url: https URL. http is allowed only with `sha256`, since the file could be changed in transit.
        sha256: SHA-256 of the file in hexadecimal, or its first digits. A cached file is verified, too.

    Raises:
        ConfigError: the URL is http, and there is no checksum.
        CheckpointError: offline, the file is not available, the checksum differs, or the file cannot be written.
    """
    target = cached_path(url)
    if target.is_file():
        _verify(target, sha256)
        return target
    if offline():
        raise CheckpointError(
            f"{target} not found, and downloads are disabled (CLIP_EXP_OFFLINE or HF_HUB_OFFLINE is set): "
            f"copy the file from {url} there, or set CLIP_EXP_CACHE to the folder that contains it."
        )
    if urlsplit(url).scheme != "https" and sha256 is None:
        raise ConfigError(
            f"{url} is not downloaded: without a checksum, only https is safe. Download the file yourself and give its path."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(
            target.with_name(f"{target.name}.lock"),
            wait_s=WAIT_S,
            on_wait=lambda: _report(f"waiting for another process that downloads {target}"),
            # Without locks, concurrent downloads are harmless, since their temporary names differ.
            on_no_locks=lambda folder, reason: None,
        ) as alone:
            # Another process may have downloaded the file meanwhile.
            if target.is_file():
                _verify(target, sha256)
            else:
                if alone:
                    remove_leftovers(target)
                _download(url, sha256, target)
    except InUse:
        raise CheckpointError(
            f"timed out after waiting {WAIT_S:g} s for another process that downloads {target}: check that process, and run again."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}. Free space, or set CLIP_EXP_CACHE to another folder."
        ) from error
    return target


def cached_path(url: str) -> Path:
    """Return the cached path of a URL: its file name in CLIP_EXP_CACHE (default `~/.cache/clip_exp/weights`).

    Raises:
        ConfigError: CLIP_EXP_CACHE is a URL.
    """
    folder = os.environ.get("CLIP_EXP_CACHE") or "~/.cache/clip_exp/weights"
    if "://" in folder:
        raise ConfigError(
            f"CLIP_EXP_CACHE={folder} is a URL, but downloads are cached in a local folder: set it to a local path."
        )
    return Path(folder).expanduser() / Path(unquote(urlsplit(url).path)).name


def offline() -> bool:
    """Return True if downloads are disabled by CLIP_EXP_OFFLINE=1 or the hub's HF_HUB_OFFLINE=1."""
    values = (os.environ.get(name, "") for name in ("CLIP_EXP_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.lower() in ("1", "true", "yes", "on") for value in values)


def is_hub_name(name: str) -> bool:
    """Return True if `name` has the form `hf-hub:org/name` or `hf-hub:org/name@revision`."""
    return name.startswith(HUB) and NAME.fullmatch(name.removeprefix(HUB)) is not None


def fetch_repository(name: str, file: str | None = None, *, prefer_cached: bool = False) -> Path:
    """Return the local copy of a repository's weights and configuration, downloaded if it is missing or the hub has a newer one.

    Args:
        name: `org/name` or `org/name@revision`.
        file: weights file in the repository; a `.safetensors` file of the same name is preferred. None: the first of
            `IN_FOLDER`.
        prefer_cached: use a cached copy without checking whether the hub has a newer one.

    Returns:
        The file, if `file` was given, else the folder with weights, configuration and tokenizer.

    Raises:
        ConfigError: `name` has another form.
        CheckpointError: offline, the hub cannot be reached, the repository does not exist or access is not granted, or
            it has no weights, or damaged ones.
    """
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"{HUB}{name} is not a valid name: write {HUB}org/name, or {HUB}org/name@revision.")
    cached = _on_disk(name, file)
    if cached is None and offline():
        raise CheckpointError(
            f"{HUB}{name} is not in the local cache, and downloads are disabled (CLIP_EXP_OFFLINE or HF_HUB_OFFLINE is set): "
            "download its files on another machine and give their folder (pretrained=DIR)."
        )
    if cached is None or not (prefer_cached or offline()):
        if cached is None:
            # The library shows progress on terminals only.
            _report(f"downloading {HUB}{name}")
        try:
            cached = _download_repository(name, file)
        except CheckpointError:
            raise
        except Exception as error:
            # The classes of connection errors differ between versions of the library.
            problem = _sentence(error, name)
            if cached is None or not _may_pass(error):
                raise CheckpointError(problem) from error
            log.warning("%s The cached copy is used instead: %s", problem, cached)
    for part in weight_files(cached):
        _verify_in_cache(part, name)
    return cached


def _download(url: str, sha256: str | None, target: Path) -> None:
    """Download a file, and retry after temporary failures."""
    # Imported here, since it takes seconds and cached files do not need it
    import torch.hub

    _report(f"downloading {url} to {target.parent}")
    for pause_s in PAUSES_S:
        try:
            with atomic_file(target) as file, _default_timeout():
                size = _size_of(url) if sha256 is None else None
                torch.hub.download_url_to_file(url, str(file), sha256, progress=sys.stderr.isatty())
                if size is not None and file.stat().st_size != size:
                    raise ConnectionError("the connection was closed")
            return
        # A wrong checksum is a RuntimeError, and may be temporary, too: torch.hub does not detect interrupted
        # connections.
        except (RuntimeError, *NETWORK) as error:
            if isinstance(error, HTTPError):
                # The error is also the response, which holds the connection.
                error.close()
            if pause_s is None or (isinstance(error, HTTPError) and error.code not in TEMPORARY_FAILURES):
                raise CheckpointError(
                    f"{url} cannot be downloaded: {_reason(error)}. Try again later, or save the file as {target}."
                ) from error
        time.sleep(pause_s)


@contextmanager
def _default_timeout() -> Iterator[None]:
    """Set a default timeout for connections, since torch.hub has no argument for it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _size_of(url: str) -> int | None:
    """Return the size of the file at a URL in bytes, and refuse redirects, which torch.hub would follow to http as well."""
    with urlopen(Request(url, method="HEAD")) as answer:
        if answer.geturl() != url:
            raise CheckpointError(
                f"{url} redirects to {answer.geturl()}, which is not safe without a checksum. Download the file and give its path "
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
            "Delete it to download it again."
        )


def _on_disk(name: str, file: str | None) -> Path | None:
    """Return the weights of a repository in the hub's cache; None if they are missing or incomplete."""
    from huggingface_hub import try_to_load_from_cache

    repository, revision = _split(name)
    cached = (try_to_load_from_cache(repository, choice, revision=revision) for choice in _choices(file))
    path = next((Path(found) for found in cached if isinstance(found, str)), None)
    # Raised if a part is missing
    with suppress(CheckpointError):
        if path is not None and weight_files(path):
            return path if file else path.parent
    return None


def _download_repository(name: str, file: str | None) -> Path:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint())
    repository, revision = _split(name)
    # This fails immediately if the hub cannot be reached, while the download of a file would retry for half a minute.
    info = api.model_info(repository, revision=revision, timeout=TIMEOUT_S)
    available = {sibling.rfilename for sibling in info.siblings or ()}
    weights = next((choice for choice in _choices(file) if choice in available), None)
    if weights is None:
        raise CheckpointError(
            f"{HUB}{name} has no weights in a supported format: one of {', '.join(_choices(file))} is required, but the repository has "
            f"{', '.join(sorted(available)[:10]) or 'no files'}."
        )
    for about in ABOUT if file else ABOUT + TOKENIZER:
        if about in available:
            api.hf_hub_download(repository, about, revision=revision)
    path = Path(api.hf_hub_download(repository, weights, revision=revision))
    for part in part_names(path) if weights.endswith(INDEX) else ():
        api.hf_hub_download(repository, part, revision=revision)
    return path if file else path.parent


def _split(name: str) -> tuple[str, str | None]:
    repository, _, revision = name.partition("@")
    return repository, revision or None


def _choices(file: str | None) -> tuple[str, ...]:
    return IN_FOLDER if file is None else (str(Path(file).with_suffix(".safetensors")), file)


def _endpoint() -> str:
    """Return the URL of the hub, or of the mirror in HF_ENDPOINT."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _may_pass(error: Exception) -> bool:
    """Return True for temporary failures: the hub did not respond, or is busy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in TEMPORARY_FAILURES or (status is None and getattr(error, "errno", None) is None)


def _sentence(error: Exception, name: str) -> str:
    """Return a message for an error of the hub's library."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        page = f"{_endpoint()}/{_split(name)[0]}"
        problem = f" is a gated repository: accept its conditions at {page}, and log in (hf auth login)."
    elif isinstance(error, RepositoryNotFoundError):
        problem = ": repository not found, or it is private. Check the name, or log in (hf auth login)."
    elif isinstance(error, RevisionNotFoundError):
        problem = ": revision not found in the repository. Give a branch, tag or commit."
    # Local errors have a number, those of the library have none.
    elif isinstance(error, OSError) and error.errno is not None:
        place = error.filename or HF_HUB_CACHE
        problem = f": {place} cannot be written: {error.strerror}. Free space, or set HF_HOME to another folder."
    else:
        problem = (
            f" cannot be downloaded from {_endpoint()}: {_first_line(error)}. Try again later, or download its files elsewhere and "
            "give their folder (pretrained=DIR)."
        )
    return f"{HUB}{name}{problem}"


def _verify_in_cache(path: Path, name: str) -> None:
    """Check the hash of a large file in the hub's cache, where it is the name of the file. The library compares only the size.

    Raises:
        CheckpointError: the hash differs; the file is removed.
    """
    blob = path.parent / path.readlink() if path.is_symlink() else path
    if SHA256.fullmatch(blob.name) and (found := file_sha256(path)) != blob.name:
        # A blob may itself be a link to a blob that several repositories share.
        for file in (path.resolve(), blob, path):
            file.unlink(missing_ok=True)
        raise CheckpointError(
            f"{HUB}{name}: {path.name} was damaged (sha256 {found} instead of {blob.name}) and has been removed. Run again to download it."
        )


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _report(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
