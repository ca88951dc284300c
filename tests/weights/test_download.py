"""Tests of downloads from a local server: they end with the right file, or without a file and with a message."""

import hashlib
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.weights import download
from clip_exp.weights.download import cached_path, fetch
from tests.conftest import REPOSITORY
from tests.weights.server import Served, Server, serving

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = CONTENT[::-1]


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("CLIP_EXP_CACHE", str(tmp_path / "files"))
    monkeypatch.setattr(download, "PAUSES_S", (0.01, 0.01, None))
    return tmp_path / "files"


def get(server: Server, sha256: str | None = SHA256) -> Path:
    return fetch(f"{server.url}/w.pt", sha256)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once_and_checked_again_from_the_disk(server, folder) -> None:
    server.files["/w.pt"] = Served(CONTENT)
    path = get(server)
    assert path == folder / "w.pt"
    assert path.read_bytes() == CONTENT
    assert get(server, SHA256[:8]) == path
    assert len(server.requests) == 1
    path.write_bytes(OTHER)
    with pytest.raises(CheckpointError, match=f"has sha256 {hashlib.sha256(OTHER).hexdigest()} instead of {SHA256}"):
        get(server)


def test_an_interrupted_download_is_retried_and_finally_given_up(server, folder) -> None:
    server.files["/w.pt"] = Served(CONTENT, cut=[300_000, 700_000])
    assert get(server).read_bytes() == CONTENT
    assert names(folder) == ["w.pt", "w.pt.lock"]
    (folder / "w.pt").unlink()
    server.files["/w.pt"] = Served(CONTENT, cut=[300_000] * 9)
    with pytest.raises(CheckpointError, match=rf"/w\.pt cannot be downloaded: .*{SHA256}"):
        get(server)
    assert len(server.requests) == 6
    assert names(folder) == ["w.pt.lock"]


def test_a_redirect_is_followed(server) -> None:
    with serving() as other:
        other.files["/else"] = Served(CONTENT)
        server.files["/w.pt"] = Served(b"", statuses=[302], headers={"Location": f"{other.url}/else"})
        path = get(server)
    assert (path.name, path.read_bytes()) == ("w.pt", CONTENT)


def test_a_redirect_loop_is_reported_at_once(server) -> None:
    server.files["/w.pt"] = Served(b"", statuses=[302] * 99, headers={"Location": "/w.pt"})
    with pytest.raises(
        CheckpointError, match=r"the server answered 302 .*infinite loop\. Try again later, or save"
    ) as caught:
        get(server)
    assert len(str(caught.value).splitlines()) == 1
    assert len(server.requests) < 40


def test_a_server_timeout_is_reported(server, monkeypatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT_S", 0.4)
    server.files["/w.pt"] = Served(CONTENT, hold=(hold := threading.Event()))
    with pytest.raises(CheckpointError, match=r"cannot be downloaded: .*timed out.*save the file as"):
        get(server)
    hold.set()


def test_a_terminal_gets_a_bar_and_anything_else_a_line(server, folder, monkeypatch, capsys) -> None:
    server.files["/w.pt"] = Served(CONTENT)
    path = get(server)
    line = f"downloading {server.url}/w.pt to {folder}\n"
    assert capsys.readouterr().err == line
    path.unlink()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    get(server)
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert "100%" in shown


def test_a_file_is_cached_in_the_folder_for_any_url(folder, monkeypatch) -> None:
    for name in ("w%20x.pt", "..%2Fw%20x.pt", "%2Ftmp%2Fw%20x.pt?a=/b"):
        assert cached_path(f"https://example.com/a/{name}") == folder / "w x.pt"
    monkeypatch.setenv("CLIP_EXP_CACHE", "s3://bucket/files")
    with pytest.raises(ConfigError, match="CLIP_EXP_CACHE=s3://bucket/files is a URL"):
        cached_path("https://example.com/w.pt")


@pytest.mark.parametrize("known", [SHA256, SHA256[:8]], ids=["whole", "first digits"])
def test_damaged_bytes_are_refused_with_both_sums_and_nothing_is_left(server, folder, known) -> None:
    server.files["/w.pt"] = Served(OTHER)
    with pytest.raises(CheckpointError) as caught:
        get(server, known)
    assert hashlib.sha256(OTHER).hexdigest() in str(caught.value)
    assert known in str(caught.value)
    assert names(folder) == ["w.pt.lock"]
    server.files["/w.pt"] = Served(CONTENT)
    assert get(server, known).read_bytes() == CONTENT


@pytest.mark.parametrize("variable", ["CLIP_EXP_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_only_what_is_on_disk_is_used(server, folder, monkeypatch, variable) -> None:
    monkeypatch.setenv(variable, "1")
    server.files["/w.pt"] = Served(CONTENT)
    with pytest.raises(CheckpointError) as caught:
        get(server)
    assert f"{folder}/w.pt not found" in str(caught.value)
    assert "copy the file from" in str(caught.value)
    folder.mkdir()
    (folder / "w.pt").write_bytes(CONTENT)
    assert get(server) == folder / "w.pt"
    assert server.requests == []


def test_an_unreachable_server_or_a_missing_file_is_reported(server) -> None:
    with pytest.raises(CheckpointError, match=r"the server answered 404 Not Found.*save the file as"):
        get(server)
    assert len(server.requests) == 1, "asking again would not help"
    with serving() as other:
        gone = other.url
    with pytest.raises(CheckpointError, match=r"cannot be downloaded: Connection refused.*save the file as"):
        fetch(f"{gone}/w.pt", SHA256)


def test_a_busy_server_is_retried(server) -> None:
    server.files["/w.pt"] = Served(CONTENT, statuses=[503, 429])
    path = get(server)
    assert path.read_bytes() == CONTENT
    server.files["/w.pt"] = Served(CONTENT, statuses=[503] * 9)
    path.unlink()
    with pytest.raises(CheckpointError, match="the server answered 503"):
        get(server)


def test_a_full_disk_is_reported_and_no_file_is_left(server, folder) -> None:
    server.files["/w.pt"] = Served(CONTENT)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"w\.pt cannot be written: .* Free space, or set CLIP_EXP_CACHE"):
            get(server)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(server.requests) == 1, "the disk will not be less full"
    assert names(folder) == ["w.pt.lock"]
    assert get(server).read_bytes() == CONTENT


def test_a_folder_that_cannot_be_created_is_reported(server, folder) -> None:
    folder.write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        get(server)


def test_without_a_checksum_only_https_is_fetched_from(server) -> None:
    server.files["/w.pt"] = Served(CONTENT)
    with pytest.raises(ConfigError, match="without a checksum, only https is safe"):
        get(server, None)
    assert server.requests == []


def test_without_a_checksum_redirects_are_refused_and_the_length_is_checked(server, folder) -> None:
    """As for an https URL; the test server has no certificate."""
    target = folder / "w.pt"
    folder.mkdir()
    server.files["/else"] = Served(CONTENT)
    server.files["/w.pt"] = Served(b"", statuses=[302], headers={"Location": "/else"})
    with pytest.raises(CheckpointError, match=r"redirects to http://.*/else, which is not safe without a checksum"):
        download._download(f"{server.url}/w.pt", None, target)
    server.files["/w.pt"] = Served(CONTENT, cut=[300_000] * 3)
    with pytest.raises(CheckpointError, match="the connection was closed"):
        download._download(f"{server.url}/w.pt", None, target)
    assert names(folder) == []
    download._download(f"{server.url}/w.pt", None, target)
    assert target.read_bytes() == CONTENT


FETCH = """
import sys
from clip_exp.weights.download import fetch
print(fetch(sys.argv[1], sys.argv[2]))
"""


def start(server: Server) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, f"{server.url}/w.pt", SHA256],
        cwd=REPOSITORY, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def until(condition, timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_of_two_processes_one_downloads_and_the_other_waits(server, folder) -> None:
    hold = threading.Event()
    server.files["/w.pt"] = Served(CONTENT, hold=hold)
    one = start(server)
    until(lambda: server.requests)
    two = start(server)
    assert two.stderr is not None
    assert "waiting for another process that downloads" in two.stderr.readline()
    hold.set()
    for process in (one, two):
        out, _ = process.communicate(timeout=60)
        assert out.strip() == str(folder / "w.pt")
    assert server.gets("/w.pt") == [None]


def test_without_locks_two_downloads_at_once_do_not_mix_and_leave_one_file(server, folder, no_locks) -> None:
    hold = threading.Event()
    server.files["/w.pt"] = Served(CONTENT, hold=hold)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(get(server).read_bytes())) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: len(server.requests) == 2)
    hold.set()
    for thread in threads:
        thread.join(60)
    assert found == [CONTENT, CONTENT]
    assert sorted(path.name for path in folder.iterdir()) == ["w.pt", "w.pt.lock"]


def test_waiting_ends_after_its_limit_and_names_the_file(server, folder, monkeypatch) -> None:
    hold = threading.Event()
    server.files["/w.pt"] = Served(CONTENT, hold=hold)
    one = start(server)
    until(lambda: server.requests)
    monkeypatch.setattr(download, "WAIT_S", 0.2)
    with pytest.raises(CheckpointError, match=r"waiting 0\.2 s for another process that downloads .*w\.pt"):
        get(server)
    hold.set()
    assert one.communicate(timeout=60)[0].strip() == str(folder / "w.pt")


def test_a_process_that_waits_for_a_killed_one_downloads_and_removes_its_leftovers(server, folder) -> None:
    hold = threading.Event()
    server.files["/w.pt"] = Served(CONTENT, hold=hold)
    one = start(server)
    until(lambda: server.requests)
    two = start(server)
    assert two.stderr is not None
    assert "waiting for another process that downloads" in two.stderr.readline()
    server.files["/w.pt"] = Served(CONTENT)
    assert len(names(folder)) == 3, "the lock, and what is not complete yet under two names"
    one.kill()
    one.communicate(timeout=60)
    out, _ = two.communicate(timeout=60)
    hold.set()
    assert out.strip() == str(folder / "w.pt")
    assert names(folder) == ["w.pt", "w.pt.lock"]
