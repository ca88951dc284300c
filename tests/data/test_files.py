"""The files that are read as images, and the reasons for refused files."""

import os
import socket
import time
from pathlib import Path

import pytest

from clip_exp.config.data import DataConfig
from clip_exp.data import files
from clip_exp.data.files import BadImage, ImageLimits, kind_of, read_file, read_from_root, read_member

LIMITS = ImageLimits(max_bytes=1000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Create a data root with one file, and another file outside."""
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "sub" / "a.jpg").write_bytes(b"inside")
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "b.jpg").write_bytes(b"outside")
    return tmp_path / "root"


def reason(path: str | Path) -> str:
    start = time.process_time()
    with pytest.raises(BadImage) as caught:
        read_file(path, LIMITS)
    assert time.process_time() - start < 0.5
    assert kind_of(str(caught.value)) in files.KINDS
    return str(caught.value)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "empty").touch()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        assert reason(tmp_path / "socket") == "not a regular file: a socket"
    assert reason(tmp_path / "pipe") == "not a regular file: a pipe"
    assert reason(tmp_path) == "not a regular file: a folder"
    assert reason("/dev/zero") == "not a regular file: a device"
    assert reason(tmp_path / "dangling") == reason(tmp_path / "missing") == reason("") == "no such file"
    assert reason(tmp_path / "empty" / "below.jpg") == "no such file"
    assert reason(tmp_path / "empty") == "empty file"
    assert reason(tmp_path / "circle") == "cannot be opened: Too many levels of symbolic links"
    assert reason(tmp_path / ("x" * 300)) == "cannot be opened: File name too long"
    assert reason(f"{tmp_path}/nul\0.jpg") == "cannot be opened: embedded null byte"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (tmp_path / "secret.jpg").chmod(0)
    assert reason(tmp_path / "secret.jpg") == "cannot be opened: Permission denied"


def test_large_files_are_refused_unread(tmp_path):
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)
    assert reason(tmp_path / "large") == f"too many bytes: {1 << 40}, more than max_image_bytes=1000"


def test_a_file_that_shrinks_while_it_is_read_is_truncated(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(100))
    real, pieces = os.readv, [60, 0]
    monkeypatch.setattr(os, "readv", lambda fd, views: real(fd, [views[0][: pieces.pop(0)]]))
    assert reason(tmp_path / "a") == "truncated: the file ends after 60 of 100 bytes"


@pytest.mark.parametrize(
    "path", ["../root-2/b.jpg", "sub/../../root-2/b.jpg", "./..//root-2/b.jpg", "../root/sub/a.jpg", ".."]
)
def test_a_relative_path_that_leaves_the_root_is_refused_unless_that_is_allowed(root, path):
    with pytest.raises(BadImage, match=r"^outside the data root: .*allow_outside_root=true$"):
        read_from_root(root, path, LIMITS)
    if path != "..":
        assert read_from_root(root, path, ImageLimits(outside_root=True)) in (b"inside", b"outside")


def test_absolute_paths_are_read_and_links_are_followed(root, tmp_path):
    (root / "link.jpg").symlink_to(tmp_path / "root-2" / "b.jpg")
    (root / "folder").symlink_to(tmp_path / "root-2")
    for path in (str(tmp_path / "root-2" / "b.jpg"), "link.jpg", "folder/b.jpg"):
        assert read_from_root(root, path, LIMITS) == b"outside"


def test_files_that_stay_inside_are_read_however_they_are_named(root, tmp_path, monkeypatch):
    (tmp_path / "alias").symlink_to("root")
    monkeypatch.chdir(tmp_path)
    for below, path in [
        (root, "sub/a.jpg"),
        (root, "sub/../sub/a.jpg"),
        (root, ".//sub/./a.jpg"),
        (tmp_path / "alias", "sub/a.jpg"),
        (Path("root"), "sub/a.jpg"),
        (Path("."), "root/sub/a.jpg"),
    ]:
        assert read_from_root(below, path, LIMITS) == b"inside"


def test_members_of_a_shard_are_read_within_the_limits(tmp_path):
    shard = tmp_path / "a.tar"
    shard.write_bytes(b"0123456789")
    assert read_member(shard, 2, 3, LIMITS) == b"234"
    for offset, size, expected in [
        (0, 0, "empty file"),
        (0, 1001, "too many bytes: 1001, more than max_image_bytes=1000"),
        (8, 5, "truncated: the file ends after 2 of 5 bytes"),
        (90, 5, "truncated: the file ends after 0 of 5 bytes"),
    ]:
        with pytest.raises(BadImage, match=expected):
            read_member(shard, offset, size, LIMITS)
    with pytest.raises(BadImage, match="no such file"):
        read_member(tmp_path / "b.tar", 0, 5, LIMITS)


def test_no_descriptor_stays_open(root):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        for path in (root / "sub" / "a.jpg", root, root / "missing"):
            try:
                read_file(path, LIMITS)
            except BadImage:
                continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_limits_are_the_configurations():
    config = DataConfig(
        max_image_pixels=1, max_image_bytes=2, image_formats=["PNG", "TIFF"], allow_outside_root=True, name="csv"
    )
    assert ImageLimits.of(config) == ImageLimits(1, 2, ("PNG", "TIFF"), outside_root=True)
    assert ImageLimits.of(DataConfig(name="csv")) == ImageLimits()
