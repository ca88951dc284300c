"""One request for a file, or for the rest of one, that ends with more of it on the disk."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import requests

from clip_exp.errors import CheckpointError

TIMEOUT_S = (10.0, 60.0)  # to connect; between two pieces
PIECE = 1 << 16  # bytes that are written at a time; of a broken connection the last piece is lost
OTHER_WAY = "Download the file another way and give it (pretrained=FILE)."
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers of a server that may be better later
WHOLE_ALREADY = 416  # the answer to a request for the rest where there is none

Report = Callable[[int, int | None], None]  # (bytes that there are, of how many)


class TryAgain(Exception):
    """An attempt failed in a way that another may not."""


def attempt(session: requests.Session, url: str, part: Path, report: Report, secure: bool) -> None:
    """Ask for what is missing, or for all where the server has another version or cannot give a part.

    Raises:
        TryAgain: the server is not reached, is busy, or the connection broke.
        CheckpointError: the server will not give the file.
    """
    version = _version_file(part)
    have = size_of(part) if version.is_file() else 0
    headers = {"Accept-Encoding": "identity"}  # the file's own bytes, which a part can be added to
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version.read_text(encoding="latin-1")}
    try:
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            if response.status_code == WHOLE_ALREADY and have:
                if response.headers.get("Content-Range") == f"bytes */{have}":
                    return
                forget(part)
                raise TryAgain("the part that was kept does not fit the file")
            _require_file(response, url, secure)
            goes_on = response.status_code == 206
            if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                forget(part)
                raise TryAgain("the server sent another part than was asked for")
            _receive(response, part, have if goes_on else 0, report)
    except requests.TooManyRedirects as error:
        raise CheckpointError(f"{url} cannot be fetched: it leads in a circle. {OTHER_WAY}") from error
    except requests.RequestException as error:
        raise TryAgain(_reason(error)) from error


def _require_file(response: requests.Response, url: str, secure: bool) -> None:
    """Raises:
    TryAgain, CheckpointError: see `attempt`.
    """
    if response.status_code in PASSING:
        raise TryAgain(f"the server answered {response.status_code} {response.reason}")
    if not response.ok:
        raise CheckpointError(
            f"{url} cannot be fetched: the server answered {response.status_code} {response.reason}. {OTHER_WAY}"
        )
    way = [step.url for step in (*response.history, response)]
    if secure and (open_to_all := [step for step in way if urlsplit(step).scheme != "https"]):
        raise CheckpointError(f"{url} leads to {open_to_all[0]}: without a checksum only https is safe. {OTHER_WAY}")


def _receive(response: requests.Response, part: Path, have: int, report: Report) -> None:
    """Write what comes after the first `have` bytes of the part.

    Raises:
        TryAgain: less came than there is.
    """
    if not have:
        forget(part)
        if version := _version_of(response):
            _version_file(part).write_text(version, encoding="latin-1")
    total = _total(response)
    report(have, total)
    with part.open("ab") as file:
        for piece in response.iter_content(PIECE):
            file.write(piece)
            have += len(piece)
            report(have, total)
    if total is not None and have < total:
        raise TryAgain(f"the server gave {have:,} of {total:,} bytes")


def _total(response: requests.Response) -> int | None:
    """Bytes of the whole file, where the answer tells: it may be a part, or of a part (RFC 9110, 14.4)."""
    whole = response.headers.get("Content-Range", "").rpartition("/")[2] if response.status_code == 206 else ""
    told = whole or ("" if _packed(response) else response.headers.get("Content-Length", ""))
    return int(told) if told.isdecimal() else None


def _packed(response: requests.Response) -> bool:
    """Whether the server packs what it sends although it was asked not to: its bytes are then not the file's."""
    return response.headers.get("Content-Encoding", "identity") != "identity"


def _version_of(response: requests.Response) -> str | None:
    """What tells this version of the file from another; weak tags do not tell single bytes (RFC 9110, 13.1.5)."""
    if _packed(response):
        return None
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reason(error: requests.RequestException) -> str:
    """In a few words; what the libraries say names objects in memory."""
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    cause = str(error)
    known = {
        "timed out": "the server fell silent",
        "refused": "connection refused",
        "resolve": "no such server, or no network",
        "SSL": "no secure connection",
    }
    return next((words for sign, words in known.items() if sign in cause), f"no connection ({type(error).__name__})")
