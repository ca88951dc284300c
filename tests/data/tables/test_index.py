import errno
import fcntl
import io
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clip_exp import storage
from clip_exp.config.data import Captions, OnBadRow
from clip_exp.data.files import ImageLimits
from clip_exp.data.pairs import TableRows
from clip_exp.data.tables import index, open, scan
from clip_exp.data.tables.open import open_table, read_table
from clip_exp.data.tables.reader import FileSignature, TableOptions
from clip_exp.data.tables.scan import BATCH_ROWS
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import CheckpointError, ConfigError, DataError

SPAWN = multiprocessing.get_context("spawn")
MANY = BATCH_ROWS + 5_000


def write_rows(file: Path, rows: int, captions_per_image: int = 1) -> Path:
    text = "".join(f"{i // captions_per_image}.jpg,caption {i}\n" for i in range(rows))
    file.write_text(f"filepath,title\n{text}")
    return file


def open_indexed(file: Path | list[Path], **options: object) -> PairTable:
    folder = (file if isinstance(file, Path) else file[0]).parent / "index"
    return open_table(file, TableOptions(**options), index_dir=folder)  # type: ignore[arg-type]


def index_folder(file: Path) -> Path:
    (folder,) = (each for each in (file.parent / "index").iterdir() if each.is_dir() and not each.name.startswith("."))
    return folder


def contents(table: PairTable) -> list[tuple[str, str, str]]:
    return [(table.path(row), table.caption(row), table.where(row)) for row in range(len(table))]


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list to which the folder of each built index is appended."""
    made: list[Path] = []

    def counted(folder: Path, source: index.TableSource) -> None:
        made.append(folder)
        write_index(folder, source)

    write_index = index.write_index
    monkeypatch.setattr(index, "write_index", counted)
    return made


@pytest.mark.parametrize("captions_per_image", [1, 3])
def test_an_index_holds_what_the_table_does_and_is_made_once(tmp_path, builds, captions_per_image):
    file = write_rows(tmp_path / "pairs.csv", MANY, captions_per_image)
    in_memory, made, again = read_table(file), open_indexed(file), open_indexed(file)
    assert len(builds) == 1
    assert index_folder(file).name.startswith("pairs-")
    for table in (made, again):
        assert contents(table) == contents(in_memory)
        assert table.image_index().tolist() == [row // captions_per_image for row in range(MANY)]
        assert table.fingerprint() == in_memory.fingerprint()
        assert table.captions.to_pylist() == in_memory.captions.to_pylist()


def test_the_stream_is_the_same_from_the_index(tmp_path):
    file = write_rows(tmp_path / "pairs.csv", 1000, captions_per_image=3)
    for captions in Captions:
        rows, indexed = (TableRows(table, captions) for table in (read_table(file), open_indexed(file)))
        assert len(rows) == len(indexed)
        assert rows.images == indexed.images == 334
        for row in range(len(rows)):
            assert rows.table_row(row, 1, 2) == indexed.table_row(row, 1, 2)


def test_images_are_numbered_by_first_appearance_across_files_and_batches(tmp_path):
    files = []
    for name, rows in (("one", BATCH_ROWS - 10), ("two", 3000)):
        (tmp_path / name).mkdir()
        files.append(write_rows(tmp_path / name / "pairs.csv", rows, captions_per_image=2))
    for roots, key in (
        (None, lambda table, row: table.image_path(row)),
        (tmp_path, lambda table, row: table.path(row)),
    ):
        table = open_table(files, TableOptions(), image_root=roots, index_dir=tmp_path / "index")
        numbers: dict[str, int] = {}
        expected = [numbers.setdefault(key(table, row), len(numbers)) for row in range(len(table))]
        assert table.image_index().tolist() == expected
        for image in (0, table.images - 1):
            assert table.rows_of(image).tolist() == [row for row, each in enumerate(expected) if each == image]
    assert list(table.fingerprint()) == ["pairs.csv", "pairs.csv (2)"]


def test_shards_keep_the_places_of_their_images(tmp_path):
    files = [tmp_path / f"{number}.tar" for number in range(2)]
    for file in files:
        with tarfile.open(file, "w") as tar:
            for sample in range(5):
                for name, data in (
                    (f"{sample}.jpg", b"image %d of " % sample + file.name.encode()),
                    (f"{sample}.txt", b"x"),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    in_memory, indexed = read_table(files), open_indexed(files)
    for table in (in_memory, indexed, pickle.loads(pickle.dumps(indexed))):
        assert table.members.shape == (10, 2)
        assert table.read_image(7, ImageLimits()) == b"image 2 of 1.tar"
        assert table.image_index().tolist() == list(range(10))  # equal names in two shards are two images
    assert indexed.fingerprint() == in_memory.fingerprint()
    assert contents(indexed) == contents(in_memory)


def test_bad_rows_are_reported_again_from_the_index(tmp_path, caplog):
    file = tmp_path / "pairs.csv"
    file.write_text("filepath,title\na.jpg,x\nb.jpg\n,y\nc.jpg,z\n")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            table = open_indexed(file, on_bad_row=OnBadRow.skip)
        assert table.skipped == 2
        assert table.parts[0].bad == {"wrong number of fields": 1, "no image path": 1}
        assert table.parts[0].bad_examples == ((3, "wrong number of fields"), (4, "no image path"))
        assert "2 bad rows were skipped" in caplog.text


def test_a_link_before_two_dots_is_followed_not_cut_out_of_the_name(tmp_path, builds):
    """`link/../pairs.csv` is not `pairs.csv` here, but the file next to the target of the link."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    near, far = write_rows(tmp_path / "pairs.csv", 10), write_rows(tmp_path / "far" / "pairs.csv", 20)
    for _ in range(2):
        assert len(open_table(tmp_path / "link" / ".." / "pairs.csv", TableOptions(), index_dir=tmp_path / "i")) == 20
        assert len(open_table([near, far], TableOptions(), index_dir=tmp_path / "i")) == 30
    assert len(builds) == 2


def test_images_are_found_from_another_working_directory(tmp_path, monkeypatch):
    (tmp_path / "0.jpg").write_bytes(b"an image")
    write_rows(tmp_path / "pairs.csv", 1)
    monkeypatch.chdir(tmp_path)
    tables = [read_table("pairs.csv"), open_table("pairs.csv", TableOptions(), index_dir=Path("index"))]
    monkeypatch.chdir("/")
    for table in (*tables, *map(pickle.loads, map(pickle.dumps, tables))):
        assert table.read_image(0, ImageLimits()) == b"an image"


def test_a_policy_for_bad_rows_finds_the_index_that_another_one_made(tmp_path, builds):
    """Training can then use the index of `check-data`."""
    file = write_rows(tmp_path / "pairs.csv", 100)
    open_indexed(file, on_bad_row=OnBadRow.skip)
    open_indexed(file, on_bad_row=OnBadRow.error)
    assert len(builds) == 1
    with file.open("a") as stream:
        stream.write("bad.jpg\n")
    open_indexed(file, on_bad_row=OnBadRow.skip)
    for _ in range(2):
        with pytest.raises(DataError, match="line 102: 1 field instead of 2"):
            open_indexed(file, on_bad_row=OnBadRow.error)
    assert open_indexed(file, on_bad_row=OnBadRow.skip).skipped == 1
    assert len(builds) == 4  # of which those that found the bad row came to nothing


def test_other_options_are_another_index(tmp_path, builds):
    file = write_rows(tmp_path / "pairs.csv", 100)
    assert [len(open_indexed(file, max_rows=rows)) for rows in (None, 7, None, 7)] == [100, 7, 100, 7]
    assert len(builds) == 2


def change_size(file: Path) -> None:
    with file.open("a") as stream:
        stream.write("new.jpg,a new one\n")


def change_text(file: Path) -> None:
    """Size and modification time are unchanged, so only the sample shows it."""
    before = file.stat()
    file.write_text(file.read_text().replace("caption 7\n", "CAPTION 7\n"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_time(file: Path) -> None:
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize("change", [change_size, change_text, change_time])
def test_a_table_that_has_changed_is_read_again(tmp_path, builds, change):
    file = write_rows(tmp_path / "pairs.csv", 100)
    before = open_indexed(file)
    change(file)
    assert contents(open_indexed(file)) == contents(read_table(file))
    assert len(builds) == 2
    assert before.caption(7) == "caption 7"  # who has mapped the old one keeps it
    open_indexed(file)
    assert len(builds) == 2


def test_the_sample_of_a_large_file_sees_its_start_its_end_and_places_between(tmp_path):
    file = tmp_path / "large"
    data = bytearray(16 << 20)
    file.write_bytes(data)
    signature = FileSignature.of(file)
    for place in (0, len(data) - 1, *range(1 << 20, len(data), 5 << 20)):
        changed = data.copy()
        changed[place : place + (1 << 17)] = b"x" * len(changed[place : place + (1 << 17)])
        file.write_bytes(changed)
        assert FileSignature.of(file).sample != signature.sample


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 0x40
        (folder / name).write_bytes(data)

    return damage


def put(name: str, content: bytes) -> Callable[[Path], int]:
    return lambda folder: (folder / name).write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "strings cut": lambda folder: os.truncate(folder / "rows.arrow", 1000),
    "strings changed": flip("rows.arrow"),
    "lines changed": flip("lines.npy"),
    "groups gone": lambda folder: (folder / "order.npy").unlink(),
    "record changed": flip("index.json"),
    "record empty": put("index.json", b""),
    "record of another kind": put("index.json", b"[1]"),
    "record without its parts": put("index.json", b'{"record": {}, "sha256": ""}'),
    "record not text": put("index.json", b"\xff\xfe"),
    "record gone": lambda folder: (folder / "index.json").unlink(),
    "all gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_index_is_made_anew(tmp_path, builds, damage):
    file = write_rows(tmp_path / "pairs.csv", 100, captions_per_image=2)
    open_indexed(file)
    damage(index_folder(file))
    assert contents(open_indexed(file)) == contents(read_table(file))
    assert len(builds) == 2
    assert {each.name for each in (tmp_path / "index").iterdir()} == {builds[0].name, f".{builds[0].name}.lock"}


def test_nothing_in_an_index_is_unpickled(tmp_path, builds):
    file = write_rows(tmp_path / "pairs.csv", 100)
    open_indexed(file)
    folder = index_folder(file)
    np.save(folder / "lines.npy", np.array([Canary(tmp_path / "ran")] * 100, dtype=object), allow_pickle=True)
    record = index._read_record(folder)
    record["stored"]["lines.npy"] = index._stored(folder / "lines.npy")
    (folder / "index.json").write_text(json.dumps({"record": record, "sha256": index.checksum(record)}))
    assert contents(open_indexed(file)) == contents(read_table(file))
    assert not (tmp_path / "ran").exists()


class Canary:
    """Object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "stage",
    ["index._write_groups", "index.asdict", "storage._put_folder_in_place", "storage.sync"],
)
def test_a_killed_builder_leaves_nothing_that_hurts(tmp_path, builds, stage):
    file = write_rows(tmp_path / "pairs.csv", 100)
    open_indexed(file)
    change_size(file)
    code = (
        "import os, sys; from pathlib import Path; from clip_exp import storage; "
        "from clip_exp.data.tables import index, open; "
        "from clip_exp.data.tables.reader import TableOptions; file = Path(sys.argv[1]); "
        f"{stage} = lambda *_: os.kill(os.getpid(), 9); "
        "open.open_table(file, TableOptions(), index_dir=file.parent / 'index')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(file)], check=False).returncode == -9
    assert any(each.name.startswith(storage.TEMPORARY) for each in (tmp_path / "index").iterdir())
    assert contents(open_indexed(file)) == contents(read_table(file))
    assert not any(each.name.startswith(storage.TEMPORARY) for each in (tmp_path / "index").iterdir())


def test_a_kill_between_the_two_renames_costs_only_time(tmp_path, builds):
    file = write_rows(tmp_path / "pairs.csv", 100)
    open_indexed(file)
    folder = index_folder(file)
    folder.rename(folder.with_name(f"{storage.TEMPORARY}{folder.name}-77{storage.REPLACED}"))
    assert contents(open_indexed(file)) == contents(read_table(file))
    assert len(list((tmp_path / "index").iterdir())) == 2


def open_and_note(file: Path, notes: Path) -> None:
    write_index = index.write_index

    def noted(folder: Path, source: index.TableSource) -> None:
        (notes / str(os.getpid())).touch()
        write_index(folder, source)

    index.write_index = noted
    assert len(open_indexed(file)) == 50_000


def test_processes_that_open_a_table_at_once_make_one_index(tmp_path):
    file = write_rows(tmp_path / "pairs.csv", 50_000)
    notes = tmp_path / "notes"
    notes.mkdir()
    processes = [SPAWN.Process(target=open_and_note, args=(file, notes)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(notes.iterdir())) == 1


def test_without_locks_a_table_that_is_opened_twice_at_once_has_its_index(tmp_path, monkeypatch, no_locks, caplog):
    file = write_rows(tmp_path / "pairs.csv", 100)
    put, others = storage._put_folder_in_place, []

    def put_after_another(temporary: Path, target: Path, replace: bool) -> None:
        if not others:
            others.append("opened while the first one writes")
            assert len(open_indexed(file)) == 100
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))  # as a rename to where another has put its own
        put(temporary, target, replace)

    monkeypatch.setattr(storage, "_put_folder_in_place", put_after_another)
    assert contents(open_indexed(file)) == contents(read_table(file))
    assert others
    assert [path.name for path in (tmp_path / "index").iterdir() if not path.name.endswith(".lock")] == [
        index_folder(file).name
    ]
    assert caplog.text.count("is on a file system without locks") == 1


def test_who_waits_for_another_process_says_so(tmp_path, caplog):
    file = write_rows(tmp_path / "pairs.csv", 100)
    (tmp_path / "index").mkdir()
    source = index.TableSource([file], [file.parent], TableOptions())
    with (tmp_path / "index" / f".{source.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(1.2, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        assert len(open_indexed(file)) == 100
    assert f"Waiting for another process that is reading {file}." in caplog.text


def private_dirty_kb() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


def touch_all(pickled: bytes, results: "multiprocessing.SimpleQueue[tuple[int, int]]") -> None:
    table = pickle.loads(pickled)
    before_kb, characters = private_dirty_kb(), 0
    for row in range(len(table)):
        characters += len(table.path(row)) + len(table.caption(row))
    results.put((characters, private_dirty_kb() - before_kb))


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="private memory of a process is known only on Linux"
)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_map_the_index_instead_of_a_copy(tmp_path, start):
    file = write_rows(tmp_path / "pairs.csv", 200_000, captions_per_image=2)
    table = open_indexed(file)
    pickled = pickle.dumps(table)
    assert len(pickled) < 2000
    context = multiprocessing.get_context(start)
    results = context.SimpleQueue()
    worker = context.Process(target=touch_all, args=(pickled, results))
    worker.start()
    worker.join()
    characters, added_kb = results.get()
    assert characters == sum(map(len, table.paths.to_pylist())) + sum(map(len, table.captions.to_pylist()))
    assert added_kb < 5 * 1024 * 0.2 + 1024  # 5 MB per million rows, and a little of the interpreter's own


def test_an_index_that_was_replaced_is_not_taken_for_the_one_in_use(tmp_path):
    file = write_rows(tmp_path / "pairs.csv", 100)
    pickled = pickle.dumps(open_indexed(file))
    assert len(pickle.loads(pickled)) == 100
    shutil.rmtree(index_folder(file))
    open_indexed(file)
    assert len(pickle.loads(pickled)) == 100  # equal rows
    change_size(file)
    open_indexed(file)
    with pytest.raises(DataError, match="removed or rebuilt while it was in use"):
        pickle.loads(pickled)


def test_a_table_in_memory_can_be_pickled_too(tmp_path):
    file = write_rows(tmp_path / "pairs.csv", 100, captions_per_image=2)
    table = pickle.loads(pickle.dumps(read_table(file)))
    assert contents(table) == contents(read_table(file))
    assert table.image_index().max() == 49


def test_without_a_place_for_the_index_small_tables_are_held_in_memory(tmp_path, caplog, monkeypatch):
    file = write_rows(tmp_path / "pairs.csv", 100)
    (tmp_path / "index").write_text("a file, not a folder")
    with caplog.at_level(logging.WARNING):
        assert contents(open_indexed(file)) == contents(read_table(file))
    assert "reading its rows into memory" in caplog.text
    assert "damaged" not in caplog.text
    monkeypatch.setattr(open, "_MEMORY_BYTES", 100)
    with pytest.raises(CheckpointError, match="output_dir"):
        open_indexed(file)


def test_a_full_disk_leaves_nothing_behind(tmp_path, caplog, monkeypatch):
    file = write_rows(tmp_path / "pairs.csv", 100)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "sync", full)
    assert len(open_indexed(file)) == 100
    assert "No space left on device" in caplog.text
    assert not [each for each in (tmp_path / "index").iterdir() if each.is_dir()]


def test_an_index_is_used_where_nothing_can_be_written(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "pairs.csv", 100)
    open_indexed(file)

    def refuse(*_: object) -> None:
        raise AssertionError("written to")

    for name in ("lock", "write_index"):
        monkeypatch.setattr(index, name, refuse)
    assert len(open_indexed(file)) == 100


def test_a_table_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "pairs.csv", 100)
    open_reader = scan.open_reader

    def change_then_open(path: Path, options: TableOptions) -> object:
        change_size(path)
        return open_reader(path, options)

    monkeypatch.setattr(scan, "open_reader", change_then_open)
    with pytest.raises(DataError, match="changed while it was being read"):
        open_indexed(file)


def test_a_bad_table_leaves_no_index(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("filepath,title\na.jpg,x\nb.jpg\n")
    with pytest.raises(DataError, match="line 3"):
        open_indexed(file)
    assert not (tmp_path / "index").exists()
    file.unlink()
    with pytest.raises(ConfigError):
        open_indexed(file)


def test_fingerprints_tell_tables_apart_and_not_their_places(tmp_path):
    file = write_rows(tmp_path / "pairs.csv", 100)
    before = read_table(file).fingerprint()
    assert before["pairs.csv"]["rows"] == 100
    assert before["pairs.csv"]["bytes"] == file.stat().st_size
    (tmp_path / "elsewhere").mkdir()
    assert read_table(shutil.copy(file, tmp_path / "elsewhere")).fingerprint() == before
    change_text(file)
    after = read_table(file).fingerprint()
    assert after["pairs.csv"]["bytes"] == before["pairs.csv"]["bytes"]
    assert after["pairs.csv"]["digest"] != before["pairs.csv"]["digest"]


def test_an_index_belongs_to_its_further_columns_and_one_without_them_is_reused(tmp_path, builds):
    file = tmp_path / "pairs.csv"
    file.write_text('filepath,title,negative,features\na.jpg,one,not one,"[1, 2]"\nb.jpg,two,not two,"[3, 4]"\n')
    open_indexed(file)
    assert builds == [index_folder(file)]
    for columns, count in (((), 1), (("negative",), 2), (("negative", "features"), 3), (("negative",), 3), ((), 3)):
        table = open_indexed(file, columns=columns)
        assert len(builds) == count
        assert list(table.shapes) == list(columns)
        worker = pickle.loads(pickle.dumps(table))
        assert [worker.column(name, 1) for name in columns[:1]] == ["not two"] * len(columns[:1])
    file.write_text(file.read_text().replace("[3, 4]", "[3, 5]"))
    assert open_indexed(file, columns=("negative", "features")).column("features", 1).tolist() == [3, 5]


def test_an_index_without_further_columns_has_the_name_that_older_versions_gave_it():
    file, root = Path("/data/pairs.csv"), Path("/data")
    assert index.TableSource([file], [root], TableOptions()).name == "pairs-16663b4b3817b220"
    assert index.TableSource([file], [root], TableOptions(columns=("a",))).name != "pairs-16663b4b3817b220"
