"""Names of one file are one image, and no other file is opened for it."""

import os
from pathlib import Path

import pytest

from clip_exp.config.data import Captions
from clip_exp.data.files import ImageLimits, normal_path
from clip_exp.data.pairs import TableRows
from clip_exp.data.tables.open import open_table, read_table
from clip_exp.data.tables.reader import TableOptions
from clip_exp.data.tables.table import PairTable
from tests.data.conftest import write_table


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Create `root/1.png` and `root/img/1.png`, links to `far/away` and `root/img`, and another `1.png` above these."""
    root = tmp_path / "root"
    for folder in (root / "img", tmp_path / "far" / "away"):
        folder.mkdir(parents=True)
    for file in (root / "1.png", root / "img" / "1.png", tmp_path / "far" / "1.png"):
        file.write_bytes(str(file).encode())
    (root / "link").symlink_to("../far/away")
    (root / "same").symlink_to(root / "img")
    (root / "chain").symlink_to("link")
    (root / "loop").symlink_to("loop")
    return root


NAMES = ("1.png", "img/1.png", "same/1.png", "link/../1.png", "img/../1.png", "none/../1.png", "loop/../1.png")
SAME = {
    "img/1.png": ("./img/1.png", "img//1.png", "img/./1.png", "{root}/img/1.png", "{root}//./img/1.png", "../root/img/1.png"),
    "1.png": ("img/../1.png", "./img/.././1.png", "same/../1.png", "{root}/1.png"),
    "link/../1.png": ("chain/../1.png", "link/.././1.png", "../far/1.png", "../far/away/../1.png"),
}  # fmt: skip


def test_a_name_in_another_spelling_is_the_same_name_and_the_same_file(files, monkeypatch):
    monkeypatch.chdir(files)
    for name, others in SAME.items():
        for other in (written.format(root=files) for written in others):
            assert normal_path(other) == normal_path(name)
            assert os.path.samefile(normal_path(other), other)
    assert normal_path("///") == normal_path("/..") == "/"
    assert normal_path("/img/1.png") == "/img/1.png"


def test_what_lies_behind_a_link_and_what_is_not_there_keep_their_names(files, monkeypatch):
    monkeypatch.chdir(files)
    kept = {"link/../1.png": files.parent / "far/1.png", "same/1.png": files / "same/1.png"}
    kept |= {f"{folder}/../1.png": files / folder / "../1.png" for folder in ("none", "loop")}
    assert {name: normal_path(name) for name in kept} == {name: str(path) for name, path in kept.items()}


def groups(table: PairTable) -> list[list[str]]:
    return [[table.path(row) for row in table.rows_of(image)] for image in range(table.images)]


@pytest.mark.parametrize("kept", ["in memory", "in an index"])
def test_names_of_a_file_are_one_image_with_several_captions(files, tmp_path, kept):
    paths = [written.format(root=files) for name, others in SAME.items() for written in (name, *others)]
    rows = [["filepath", "title"], *([path, f"caption {i}"] for i, path in enumerate([*paths, *NAMES[-2:]]))]
    index_dir = None if kept == "in memory" else tmp_path / "index"
    table = open_table(write_table(files / "pairs.csv", rows), TableOptions(), index_dir=index_dir)
    assert [len(group) for group in groups(table)] == [7, 5, 5, 1, 1]
    assert len(TableRows(table, Captions.random)) == 5
    limits = ImageLimits(outside_root=True)
    for image in range(3):
        assert len({bytes(table.read_image(row, limits)) for row in table.rows_of(image)}) == 1


def test_files_of_a_table_in_several_folders_agree_on_their_images(files, tmp_path):
    tables = [
        write_table(files / "pairs.csv", [["filepath", "title"], ["img/1.png", "a"], ["1.png", "b"]]),
        write_table(files / "img" / "pairs.csv", [["filepath", "title"], ["1.png", "c"], ["../1.png", "d"]]),
        write_table(tmp_path / "pairs.csv", [["filepath", "title"], ["root/1.png", "e"], [f"{files}/img/1.png", "f"]]),
    ]
    assert read_table(tables).image_index().tolist() == [0, 1, 0, 1, 1, 0]
    assert read_table(tables, max_rows=3).image_index().tolist() == [0, 1, 0]


def test_another_root_is_another_index_since_names_may_be_other_files(files, tmp_path):
    rows = [["filepath", "title"], ["1.png", "a"], [f"{files}/1.png", "b"]]
    table = write_table(files / "pairs.csv", rows)
    found = [
        open_table(table, TableOptions(), image_root=root, index_dir=tmp_path / "index").images
        for root in (files, files / "img", files)
    ]
    assert found == [1, 2, 1]
