"""Downloads end with the right file under its name, or with nothing there and a message; against a local server."""

import gzip
import hashlib
import io
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.weights import download, transfer
from clip_exp.weights.download import fetch, kept_at
from clip_exp.weights.transfer import PIECE
from tests.conftest import REPOSITORY
from tests.weights.server import Served, Server, serving

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = CONTENT[::-1]


@pytest.fixture
def server():
    with serving() as server:
        yield server


def get(server: Server, folder: Path, sha256: str | None = SHA256, **options) -> Path:
    return fetch(f"{server.url}/w.pt", sha256, folder, pause_s=0.01, **options)


def test_a_file_is_fetched_once_and_checked_again_from_the_disk(server, tmp_path) -> None:
    server.files["/w.pt"] = Served(CONTENT)
    path = get(server, tmp_path / "new")
    assert path == tmp_path / "new" / "w.pt"
    assert path.read_bytes() == CONTENT
    assert get(server, tmp_path / "new", SHA256[:8]) == path
    assert len(server.requests) == 1
    path.write_bytes(OTHER)
    with pytest.raises(CheckpointError, match=f"has sha256 {hashlib.sha256(OTHER).hexdigest()} instead of {SHA256}"):
        get(server, tmp_path / "new")


def test_only_the_rest_is_fetched_after_a_broken_connection(server, tmp_path) -> None:
    server.files["/w.pt"] = Served(CONTENT, cut=[4 * PIECE, 7 * PIECE + 9])
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.gets("/w.pt") == [None, f"bytes={4 * PIECE}-", f"bytes={11 * PIECE}-"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["w.pt"]


def test_a_later_process_goes_on_from_what_an_earlier_one_left(server, tmp_path) -> None:
    server.files["/w.pt"] = Served(CONTENT, cut=[4 * PIECE], statuses=[])
    script = (
        "import sys; from pathlib import Path; import clip_exp.weights.download as d\n"
        "d.ATTEMPTS = 0\n"  # the first broken connection ends it, as a kill would
        f"d.fetch({server.url + '/w.pt'!r}, {SHA256!r}, Path({str(tmp_path)!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert "CheckpointError" in ended.stderr
    assert not (tmp_path / "w.pt").exists()
    assert (tmp_path / "w.pt.part").stat().st_size == 4 * PIECE
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.gets("/w.pt") == [None, f"bytes={4 * PIECE}-"]


def test_a_part_that_was_whole_already_is_not_fetched_again(server, tmp_path) -> None:
    (tmp_path / "w.pt.part").write_bytes(CONTENT)
    (tmp_path / "w.pt.part.version").write_text('"1"')
    server.files["/w.pt"] = Served(CONTENT)
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.gets("/w.pt") == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize(
    "served", [Served(CONTENT, etag='"2"'), Served(CONTENT, ranges=False)], ids=["changed", "no ranges"]
)
def test_a_part_of_another_version_and_a_server_without_ranges_start_over(server, tmp_path, served) -> None:
    (tmp_path / "w.pt.part").write_bytes(OTHER[:300_000])
    (tmp_path / "w.pt.part.version").write_text('"1"')
    server.files["/w.pt"] = served
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.gets("/w.pt") == ["bytes=300000-"]


def test_another_part_than_was_asked_for_is_not_taken(server, tmp_path) -> None:
    (tmp_path / "w.pt.part").write_bytes(CONTENT[:300_000])
    (tmp_path / "w.pt.part.version").write_text('"1"')
    server.files["/w.pt"] = Served(CONTENT, statuses=[206], headers={"Content-Range": "bytes 5-9/10"})
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.gets("/w.pt") == ["bytes=300000-", None]


def test_a_server_that_gives_little_at_a_time_is_asked_until_there_is_all(server, tmp_path) -> None:
    server.files["/w.pt"] = Served(CONTENT, cut=[4 * PIECE], most=300_000)
    assert get(server, tmp_path).read_bytes() == CONTENT
    starts = [4 * PIECE, 4 * PIECE + 300_000, 4 * PIECE + 600_000]
    assert server.gets("/w.pt") == [None, *(f"bytes={start}-" for start in starts)]


def test_what_a_server_packs_is_unpacked_and_never_gone_on_from(server, tmp_path) -> None:
    """A part of the unpacked file does not tell where in the packed one it ended."""
    packed = gzip.compress(os.urandom(300_000))
    content = gzip.decompress(packed)
    served = Served(packed, headers={"Content-Encoding": "gzip"}, cut=[200_000])
    server.files["/w.pt"] = served
    assert get(server, tmp_path, hashlib.sha256(content).hexdigest()).read_bytes() == content
    assert server.gets("/w.pt") == [None, None]


def test_a_server_that_cannot_go_on_and_breaks_off_anywhere_is_left_in_the_end(server, tmp_path) -> None:
    server.files["/w.pt"] = Served(CONTENT, ranges=False, cut=[2 * PIECE, 3 * PIECE] * 20)
    with pytest.raises(CheckpointError, match="5 times in a row"):
        get(server, tmp_path)
    assert len(server.requests) <= 8


def test_who_asks_is_not_told_to_another_server(server, tmp_path) -> None:
    with serving() as other:
        other.files["/w.pt"] = Served(CONTENT)
        server.files["/w.pt"] = Served(b"", statuses=[302], headers={"Location": f"{other.url}/w.pt"})
        path = get(server, tmp_path, name="mine", headers={"authorization": "Bearer secret"})
    assert (path.name, path.read_bytes()) == ("mine", CONTENT)
    assert [request.authorization for request in server.requests] == ["Bearer secret"]
    assert [request.authorization for request in other.requests] == [None]


def test_a_circle_of_addresses_is_told_at_once(server, tmp_path) -> None:
    server.files["/w.pt"] = Served(b"", statuses=[302] * 99, headers={"Location": "/w.pt"})
    with pytest.raises(CheckpointError, match=r"/w\.pt cannot be fetched: it leads in a circle\. .*pretrained=FILE"):
        get(server, tmp_path)
    assert len(server.requests) < 40


def test_a_server_that_falls_silent_is_told(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT_S", (5, 0.4))
    server.files["/w.pt"] = Served(CONTENT, hold=(hold := threading.Event()))
    with pytest.raises(CheckpointError, match="the server fell silent, 5 times in a row"):
        get(server, tmp_path)
    hold.set()


def test_a_terminal_gets_a_bar_and_anything_else_a_line(server, tmp_path, monkeypatch, capsys) -> None:
    server.files["/w.pt"] = Served(CONTENT)
    get(server, tmp_path / "a")
    assert capsys.readouterr().err == f"downloading {server.url}/w.pt to {tmp_path / 'a'}\n"
    monkeypatch.setenv("TERM", "xterm")  # rich draws nothing on a dumb one
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(download, "Console", lambda stderr: screen)
    get(server, tmp_path / "b")
    assert "downloading w.pt" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert "1.0/1.0 MB" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert capsys.readouterr().err == ""


def test_a_file_is_kept_in_the_folder_whatever_its_address(tmp_path) -> None:
    for name in ("w%20x.pt", "..%2Fw%20x.pt", "%2Ftmp%2Fw%20x.pt?a=/b"):
        assert kept_at(f"https://example.com/a/{name}", tmp_path) == tmp_path / "w x.pt"


def test_a_weak_tag_is_no_version_but_a_date_is(server, tmp_path) -> None:
    served = Served(CONTENT, etag='W/"1"', cut=[4 * PIECE], headers={"Last-Modified": "Tue, 01 Nov 2022 10:00:00 GMT"})
    server.files["/w.pt"] = served
    assert get(server, tmp_path).read_bytes() == CONTENT  # the server compares tags alone, so it sends all of it
    assert server.gets("/w.pt") == [None, f"bytes={4 * PIECE}-"]
    served.cut, served.headers = [4 * PIECE], {}
    (tmp_path / "w.pt").unlink()
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.gets("/w.pt")[2:] == [None, None], "what tells no version is not gone on from"


@pytest.mark.parametrize("known", [SHA256, SHA256[:8]], ids=["whole", "first digits"])
def test_damaged_bytes_are_refused_with_both_sums_and_nothing_is_left(server, tmp_path, known) -> None:
    server.files["/w.pt"] = Served(OTHER)
    with pytest.raises(CheckpointError) as caught:
        get(server, tmp_path, known)
    assert hashlib.sha256(OTHER).hexdigest() in str(caught.value)
    assert known in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    server.files["/w.pt"] = Served(CONTENT)
    assert get(server, tmp_path, known).read_bytes() == CONTENT


@pytest.mark.parametrize("variable", ["CLIP_EXP_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_only_what_is_on_disk_is_used(server, tmp_path, monkeypatch, variable) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("CLIP_EXP_CACHE", str(tmp_path))
    server.files["/w.pt"] = Served(CONTENT)
    with pytest.raises(CheckpointError) as caught:
        fetch(f"{server.url}/w.pt", SHA256)
    assert f"{tmp_path}/w.pt is not there" in str(caught.value)
    assert "by hand" in str(caught.value)
    (tmp_path / "w.pt").write_bytes(CONTENT)
    assert fetch(f"{server.url}/w.pt", SHA256) == tmp_path / "w.pt"
    assert server.requests == []


def test_a_server_that_is_gone_or_has_no_such_file_is_told_at_the_end(server, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"the server answered 404 Not Found.*pretrained=FILE"):
        get(server, tmp_path)
    assert len(server.requests) == 1, "asking again would not help"
    with serving() as other:
        gone = other.url
    with pytest.raises(CheckpointError, match=r"connection refused, 5 times in a row.*by hand"):
        fetch(f"{gone}/w.pt", SHA256, tmp_path, pause_s=0.01)


def test_a_busy_server_is_asked_again(server, tmp_path) -> None:
    server.files["/w.pt"] = Served(CONTENT, statuses=[503, 429])
    assert get(server, tmp_path).read_bytes() == CONTENT
    server.files["/w.pt"] = Served(CONTENT, statuses=[503] * 9)
    (tmp_path / "w.pt").unlink()
    with pytest.raises(CheckpointError, match="the server answered 503"):
        get(server, tmp_path)


def test_a_connection_that_always_breaks_goes_on_while_it_brings_something(server, tmp_path) -> None:
    server.files["/w.pt"] = Served(CONTENT, cut=[PIECE] * 10)
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 11


def test_a_full_disk_is_told_and_what_came_is_kept(server, tmp_path) -> None:
    server.files["/w.pt"] = Served(CONTENT)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"w\.pt cannot be written: .* Make room there, or set CLIP_EXP_CACHE"
        ):
            get(server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "w.pt").exists()
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.gets("/w.pt")[1] is not None


def test_a_folder_that_cannot_be_made_is_told(server, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        get(server, tmp_path / "file" / "folder")


def test_without_a_checksum_only_https_is_fetched_from(server, tmp_path) -> None:
    server.files["/w.pt"] = Served(CONTENT)
    with pytest.raises(ConfigError, match="without a checksum only https is safe"):
        get(server, tmp_path, None)
    assert server.requests == []
    way = [SimpleNamespace(url="https://a/w.pt"), SimpleNamespace(url="http://b/w.pt")]
    answer: Any = SimpleNamespace(ok=True, status_code=200, url="https://c/w.pt", history=way)
    with pytest.raises(CheckpointError, match=r"leads to http://b/w\.pt: without a checksum only https is safe"):
        transfer._require_file(answer, "https://a/w.pt", secure=True)


FETCH = """
import sys
from pathlib import Path
from clip_exp.weights.download import fetch
print(fetch(sys.argv[1], sys.argv[2], Path(sys.argv[3]), wait_s=float(sys.argv[4])))
"""


def start(server: Server, folder: Path, wait_s: float = 30) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", FETCH, f"{server.url}/w.pt", SHA256, str(folder), str(wait_s)]
    return subprocess.Popen(
        arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def until(condition, timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_of_two_processes_one_downloads_and_the_other_waits(server, tmp_path) -> None:
    hold = threading.Event()
    server.files["/w.pt"] = Served(CONTENT, hold=hold)
    one = start(server, tmp_path)
    until(lambda: server.requests)
    two = start(server, tmp_path)
    assert two.stderr is not None
    assert "waiting for another process that downloads" in two.stderr.readline()
    hold.set()
    for process in (one, two):
        out, _ = process.communicate(timeout=60)
        assert out.strip() == str(tmp_path / "w.pt")
    assert server.gets("/w.pt") == [None]


def test_without_locks_two_downloads_at_once_do_not_mix_and_leave_one_file(server, tmp_path, no_locks) -> None:
    hold = threading.Event()
    server.files["/w.pt"] = Served(CONTENT, hold=hold)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(get(server, tmp_path).read_bytes())) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: len(server.requests) == 2)
    hold.set()
    for thread in threads:
        thread.join(60)
    assert found == [CONTENT, CONTENT]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.pt", "w.pt.lock"]


def test_waiting_ends_after_its_limit_and_names_the_file(server, tmp_path) -> None:
    hold = threading.Event()
    server.files["/w.pt"] = Served(CONTENT, hold=hold)
    one = start(server, tmp_path)
    until(lambda: server.requests)
    with pytest.raises(CheckpointError, match=r"waited 0\.2 s for another process that downloads .*w\.pt"):
        get(server, tmp_path, wait_s=0.2)
    hold.set()
    assert one.communicate(timeout=60)[0].strip() == str(tmp_path / "w.pt")


def test_who_waits_for_a_process_that_is_killed_goes_on_from_its_part(server, tmp_path) -> None:
    hold = threading.Event()
    server.files["/w.pt"] = Served(CONTENT, hold=hold)
    one = start(server, tmp_path)
    part = tmp_path / "w.pt.part"
    until(lambda: part.exists() and part.stat().st_size)
    two = start(server, tmp_path)
    assert two.stderr is not None
    assert "waiting for another process that downloads" in two.stderr.readline()
    server.files["/w.pt"] = Served(CONTENT)
    have = part.stat().st_size
    one.kill()
    one.communicate(timeout=60)
    out, _ = two.communicate(timeout=60)
    hold.set()
    assert out.strip() == str(tmp_path / "w.pt")
    assert server.gets("/w.pt") == [None, f"bytes={have}-"]
    assert not part.exists()
