"""`clip-exp make-shards`: the shards have the pairs of the table, whatever happened while they were written."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clip_exp.config.commands import ShardFormat
from clip_exp.config.compose import compose
from clip_exp.data.files import ImageLimits
from clip_exp.data.manifest import Manifest
from clip_exp.data.stream import Stream, open_sources
from clip_exp.errors import CheckpointError, ConfigError, DataError
from clip_exp.shards import files as module
from clip_exp.shards.command import make_shards
from clip_exp.shards.files import Tar
from tests.conftest import DOOR, REPOSITORY, Run
from tests.data.tables.shard_files import jpeg, write_shard
from tests.processes import THREADS, start_forked
from tests.runs import TINY, Train
from tests.test_contract import listed

CAPTIONS = [
    "a dog",
    "two dogs, running",
    "一只猫",
    "",
    "\ufeffmarked",
    " verbatim\n",
    "null",
    "a\tb",
    "e\u0301",
    "last",
]
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]


def write_table(folder: Path, captions: list[str] = CAPTIONS, per_image: int = 1) -> Path:
    """Write images of all formats and a table in which each image has `per_image` rows, which are not adjacent."""
    images = len(captions) // per_image
    rows = []
    for number, caption in enumerate(captions):
        image = number % images
        path = folder / "images" / f"{image}.{FORMATS[image % 5].lower()}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(image).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path, FORMATS[image % 5])
        rows.append({"filepath": f"images/{path.name}", "title": caption, "source": f"s{number}", "score": number / 3})
    table = folder / "pairs.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return table


def make(table: Path, output: Path, *overrides: str) -> int:
    given = (f"data.train={table}", f"output={output}", f"output_dir={table.parent}/outputs", "num_workers=2")
    return make_shards(compose("make-shards", [*given, *overrides]))


def pairs(tables: Path | str, *overrides: str) -> list[tuple[str, bytes, dict[str, Any]]]:
    """Return caption, image and further columns of two epochs of training, in its order."""
    given = (*TINY, "data=csv", f"data.train={tables}", "data.shuffle=full")
    data = compose(
        "train", [word for word in (*given, *overrides) if not word.startswith("data.generate")] + ["max_steps=1"]
    ).data
    stream = Stream(open_sources(data), data, seed=3)
    loaded = []
    for position in range(2 * len(stream)):
        source, epoch, row = stream[position]
        pair = source.load(epoch, row, ImageLimits())
        columns = {name: value if isinstance(value, str) else value.tolist() for name, value in pair.columns.items()}
        loaded.append((pair.caption, bytes(pair.image), columns))
    return loaded


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


@pytest.mark.parametrize("captions", ["random", "all"])
def test_training_on_the_shards_sees_the_pairs_of_the_table_in_the_same_order(
    tmp_path: Path, captions: str, capsys
) -> None:
    table, out, read = write_table(tmp_path), tmp_path / "out", f"data.captions={captions}"
    assert make(table, out, "shard_size=4", "data.columns=[source,score]", read) == 0
    assert sorted(content(out)) == ["00000.tar", "00001.tar", "00002.tar"]
    printed = capsys.readouterr().out
    assert f"written: {out}/*.tar (10 samples, " in printed
    assert f"data=csv 'data.train={out}/*.tar' 'data.columns=[source,score]'" in printed
    columns = ("data.columns=[source,score]", read)
    assert pairs(f"{out}/*.tar", *columns) == pairs(table, *columns)


def test_a_run_on_the_shards_has_the_losses_of_a_run_on_the_table(tmp_path: Path, train: Train) -> None:
    table = write_table(tmp_path, [f"image {number}" for number in range(32)])
    make(table, tmp_path / "out", "shard_size=10")
    options = [word for word in TINY if not word.startswith("data")]
    runs = [
        train(*options, "data=csv", f"data.train={data}", "data.num_workers=0", "data.shuffle=full", "max_steps=4", "log_every_n_steps=1")
        for data in (table, f"{tmp_path}/out/*.tar")
    ]  # fmt: skip
    assert runs[0].losses == runs[1].losses
    assert len(runs[0].losses) == 4


def test_an_image_with_several_captions_is_one_sample_or_a_sample_per_pair(tmp_path: Path, capsys) -> None:
    table = write_table(tmp_path, per_image=2)
    make(table, tmp_path / "by_image", "shard_size=3")
    with tarfile.open(tmp_path / "by_image" / "00000.tar") as tar:
        names = tar.getnames()
        records = [json.loads(tar.extractfile(name).read()) for name in names if name.endswith(".json")]  # type: ignore[union-attr]
        texts = [tar.extractfile(name).read().decode() for name in names if name.endswith(".txt")]  # type: ignore[union-attr]
    assert names[:4] == ["000000000.jpg", "000000000.txt", "000000000.json", "000000001.png"]
    assert records == [{"captions": [CAPTIONS[number], CAPTIONS[number + 5]]} for number in range(3)]
    assert texts == CAPTIONS[:3]
    assert "data.caption_key=captions" in capsys.readouterr().out
    make(table, tmp_path / "pairs", "data.captions=all", "shard_size=6")
    given = "data.captions=all"
    assert pairs(f"{tmp_path}/pairs/*.tar", given) == pairs(table, given)


def test_parquet_has_the_images_as_the_library_datasets_declares_them(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    make(table, tmp_path / "out", "format=parquet", "data.columns=[source,score]", "shard_size=6")
    read = pq.read_table(sorted((tmp_path / "out").glob("*.parquet")))
    assert [str(field.type) for field in read.schema] == [
        "struct<bytes: binary, path: string>",
        "string",
        "string",
        "float",
    ]
    declared = json.loads(read.schema.metadata[b"huggingface"])
    assert declared == {"info": {"features": {"image": {"_type": "Image"}}}}
    rows = read.to_pylist()
    assert [row["caption"] for row in rows] == CAPTIONS
    assert [row["source"] for row in rows] == [f"s{number}" for number in range(10)]
    for number, row in enumerate(rows):
        extension = {"JPEG": "jpg"}.get(FORMATS[number % 5], FORMATS[number % 5].lower())
        assert row["image"]["path"] == f"{number:09d}.{extension}"
        assert row["image"]["bytes"] == next((tmp_path / "images").glob(f"{number}.*")).read_bytes()
    several = write_table(tmp_path / "several", per_image=2)
    make(several, tmp_path / "lists", "format=parquet")
    lists = pq.read_table(tmp_path / "lists")["caption"].to_pylist()
    assert lists == [[CAPTIONS[number], CAPTIONS[number + 5]] for number in range(5)]


def test_files_and_parts_of_samples_are_those_of_the_contract(tmp_path: Path) -> None:
    table = write_table(tmp_path, ["a", "b", "c", "d"], per_image=2)
    (tmp_path / "images" / "1.png").write_bytes(b"")
    files, parts = set(), {"captions"}  # see the test of several captions
    for format in ShardFormat:
        make(table, tmp_path / format, f"format={format}", "data.max_bad_fraction=0.5")
        files |= {path.name for path in (tmp_path / format).iterdir()}
    with tarfile.open(tmp_path / "webdataset" / "00000.tar") as tar:
        parts |= {name.partition(".")[2] for name in tar.getnames()}
    fields = pq.read_table(tmp_path / "parquet").flatten().column_names
    assert listed("Files of `make-shards`") == files
    assert listed("Samples of `make-shards`") == {*parts, *fields}


def test_any_number_of_processes_writes_the_same_bytes_from_tables_and_from_shards(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    for workers in (1, 3):
        make(table, tmp_path / f"by{workers}", "shard_size=3", f"num_workers={workers}")
    assert content(tmp_path / "by1") == content(tmp_path / "by3")
    assert len(content(tmp_path / "by1")) == 4
    make(Path(f"{tmp_path}/by1/*.tar"), tmp_path / "again", "shard_size=3", f"output_dir={tmp_path}/outputs")
    assert content(tmp_path / "again") == content(tmp_path / "by1")


def test_several_sources_follow_each_other(tmp_path: Path) -> None:
    one, two = write_table(tmp_path / "one", ["a", "b"]), write_table(tmp_path / "two", ["c", "d", "e"])
    sources = f"data.train=[{{path: {one}}},{{path: {two}}}]"
    config = compose("make-shards", [sources, f"output={tmp_path}/out", f"output_dir={tmp_path}/outputs"])
    make_shards(config)
    captions = sorted(caption for caption, _, _ in pairs(f"{tmp_path}/out/*.tar"))
    assert captions == sorted(2 * ["a", "b", "c", "d", "e"])
    one.write_text(one.read_text().replace('"a"', '"other"'))
    with pytest.raises(ConfigError, match=r"pairs\.jsonl of source 1 has changed"):
        make_shards(config)


def test_bad_images_are_left_out_and_listed_or_stop_the_command(tmp_path: Path, capsys) -> None:
    table = write_table(tmp_path, [f"image {number}" for number in range(20)])
    (tmp_path / "images" / "4.bmp").unlink()
    (tmp_path / "images" / "15.jpeg").write_bytes(b"<html>")
    with pytest.raises(
        DataError, match=r"The image 'images/4\.bmp' \(.*pairs\.jsonl, line 5\) cannot be used: no such file"
    ):
        make(table, tmp_path / "stops", "data.on_bad_image=error", "shard_size=5")
    assert [path.name for path in (tmp_path / "stops").glob(".writing-*")] == []
    assert make(table, tmp_path / "out", "shard_size=5") == 0
    assert "left out: 2 images (1 no such file, 1 not an image), listed in" in capsys.readouterr().out
    with (tmp_path / "out" / "_bad_samples.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [(row["path"], row["where"]) for row in listed] == [
        ("images/4.bmp", f"{table}, line 5"), ("images/15.jpeg", f"{table}, line 16"),
    ]  # fmt: skip
    assert len({caption for caption, _, _ in pairs(f"{tmp_path}/out/*.tar")}) == 18
    with pytest.raises(DataError, match=r"of 20 images cannot be used, more than data\.max_bad_fraction=0\.01"):
        make(table, tmp_path / "strict", "data.max_bad_fraction=0.01")


def test_a_shard_of_bad_images_only_is_not_written(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    for number in (2, 3):
        next((tmp_path / "images").glob(f"{number}.*")).write_bytes(b"")
    make(table, tmp_path / "out", "shard_size=2", "data.max_bad_fraction=0.5")
    assert sorted(content(tmp_path / "out")) == ["00000.tar", "00002.tar", "00003.tar", "00004.tar"]


def test_bad_rows_follow_the_key_of_training(tmp_path: Path, capsys) -> None:
    table = write_table(tmp_path)
    table.write_text(table.read_text(encoding="utf-8") + '{"filepath": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 11: .*data\.on_bad_row=skip"):
        make(table, tmp_path / "out")
    make(table, tmp_path / "out", "data.on_bad_row=skip")
    assert "skipped: 1 bad rows" in capsys.readouterr().out


# Interruption.


def _kill_after_two_shards() -> None:
    add = Manifest.add

    def adding(self: Manifest, part: Any) -> None:
        add(self, part)
        if len(self.finished) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Manifest.add = adding  # type: ignore[method-assign]


def _kill_while_a_shard_is_written() -> None:
    write = Tar.write

    def writing(self: Tar, path: Path, samples: Any) -> Iterator[bytes]:
        for number, digest in enumerate(write(self, path, samples)):
            if number == 1 and "00002" in path.name:
                os.kill(os.getppid(), signal.SIGKILL)
                signal.pause()  # until the kernel ends this process too
            yield digest

    Tar.write = writing  # type: ignore[method-assign]


def _kill_a_process_of_the_pool() -> None:
    def writing(*_: object) -> Iterator[bytes]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield b""

    Tar.write = writing  # type: ignore[method-assign,assignment]


def start(tmp_path: Path, table: Path, before: Any) -> tuple[int, str]:
    """Run the command in a process of its own, and return its exit code and what it printed."""
    arguments = ("make-shards", f"data.train={table}", "output=out", "shard_size=3", "num_workers=1")
    outputs = [tmp_path / "stdout", tmp_path / "stderr"]
    environment = {**os.environ, **THREADS}
    process = start_forked(
        REPOSITORY / DOOR, arguments, cwd=tmp_path, environment=environment, outputs=outputs, before=before
    )
    process.join(120)
    return process.exitcode, outputs[1].read_text()  # type: ignore[return-value]


@pytest.mark.parametrize("kill", [_kill_after_two_shards, _kill_while_a_shard_is_written])
def test_the_same_command_continues_after_a_kill(tmp_path: Path, kill: Any) -> None:
    table = write_table(tmp_path)
    make(table, tmp_path / "whole", "shard_size=3")
    code, _ = start(tmp_path, table, kill)
    assert code == -signal.SIGKILL
    kept = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in ("00000.tar", "00001.tar")}
    code, errors = start(tmp_path, table, None)
    assert code == 0, errors
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_a_killed_process_of_the_pool_ends_it_with_one_message(tmp_path: Path) -> None:
    code, errors = start(tmp_path, write_table(tmp_path), _kill_a_process_of_the_pool)
    assert code == 3
    assert "was killed by a signal, usually because memory ran out. Use fewer (num_workers=" in errors
    assert "Traceback" not in errors


def test_a_signal_ends_it_with_143_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    table, add = write_table(tmp_path), Manifest.add

    def stopping(self: Manifest, part: Any) -> None:
        add(self, part)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Manifest, "add", stopping)
    assert make(table, tmp_path / "out", "shard_size=1") == 143
    assert "The same command continues" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []
    monkeypatch.undo()
    assert make(table, tmp_path / "out", "shard_size=1") == 0
    assert len(content(tmp_path / "out")) == 10


def test_only_shards_whose_images_or_bytes_changed_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, out = write_table(tmp_path), tmp_path / "out"
    make(table, out, "shard_size=2")
    (tmp_path / "images" / "5.jpeg").write_bytes(jpeg(99))
    (out / "00004.tar").write_bytes(b"damaged")
    written: list[int] = []
    add = Manifest.add
    monkeypatch.setattr(Manifest, "add", lambda self, part: (written.append(part.number), add(self, part))[1])
    make(table, out, "shard_size=2")
    assert sorted(written) == [2, 4]
    assert pairs(f"{out}/*.tar") == pairs(table)
    with pytest.raises(ConfigError, match=r"other input or settings: shard_size=2, now 3\."):
        make(table, out, "shard_size=3")


def test_a_file_that_is_read_back_differently_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = module._digest
    monkeypatch.setattr(Tar, "read", lambda self, path: iter([digest("0", b"other bytes", [])]))
    with pytest.raises(CheckpointError, match=r"00000\.tar was read back, and differs from what was written"):
        make(write_table(tmp_path), tmp_path / "out", "num_workers=1")
    assert content(tmp_path / "out") == {}


def test_a_full_disk_ends_it_with_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_add", full)
    with pytest.raises(CheckpointError, match=r"out cannot be written: No space left on device\. .*the same command"):
        make(write_table(tmp_path), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_manifest.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["output=out"], 2, "data.train has no value"),
        (["data.train=missing.csv", "output=out"], 2, "missing.csv does not exist"),
        (["data.train=pairs.csv"], 2, "output has no value"),
        (["data.train=pairs.csv", "output=pairs.csv"], 2, "output=pairs.csv is a file"),
        (["data.train=pairs.csv", "output=images"], 2, "output=images is not empty (a.txt)"),
        (["data.train=pairs.csv", "output=out", "shard_size=0"], 2, "shard_size=0 must be greater than 0."),
        (["data.train=pairs.csv", "output=out", "format=zip"], 2, "format=zip must be one of webdataset, parquet."),
        (["data.train=pairs.csv", "output=out", "data.val=pairs.csv"], 2, "data.val=pairs.csv has no effect on shards"),
        (
            ["data.train=pairs.csv", "output=out", "data.columns=[captions]"],
            2,
            "'captions', which shards use themselves",
        ),
        (["data.train=[{path: pairs.csv, weight: 2}]", "output=out"], 2, "data.train has weights"),
        (["data=custom", "data._target_=tests.datasets.Pairs", "output=out"], 2, "make-shards reads tables"),
        (["data.train=pairs.csv", "output=out"], 3, "none of 1 images sampled from"),
        (["data.train=pairs.csv", "output=out", "data.caption_key=text"], 3, "has no column 'text'"),
    ],
)
def test_wrong_input_is_refused_with_one_message_and_leaves_no_folder(
    refused: Run, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "pairs.csv").write_text("filepath,title\na.jpg,a dog\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.txt").touch()
    done = refused(DOOR, "make-shards", *arguments, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_torch_is_not_imported_which_would_take_seconds(tmp_path: Path) -> None:
    code = (
        f"import sys\nfrom clip_exp.cli import run\ncode = run('make-shards', ['data.train={write_table(tmp_path)}', 'output=out'])\n"
        "assert (code, 'torch' in sys.modules) == (0, False)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_further_columns_need_a_sample_per_pair_if_images_have_several_rows(tmp_path: Path) -> None:
    table = write_table(tmp_path, per_image=2)
    with pytest.raises(ConfigError, match=r"set data\.captions=all to make each row a sample"):
        make(table, tmp_path / "out", "data.columns=[source]")


def test_a_real_shard_is_repacked_with_the_same_images_and_captions(real_data: Path, tmp_path: Path) -> None:
    shard = real_data / "webdataset" / "cc12m-train-0000.tar"
    make(shard, tmp_path / "out", "shard_size=10", f"output_dir={tmp_path}/outputs")
    assert pairs(f"{tmp_path}/out/*.tar") == pairs(shard)


def test_a_jpeg_of_several_images_is_stored_as_jpg(tmp_path: Path) -> None:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(stream, "MPO", save_all=True, append_images=frames[1:])
    shard = write_shard(tmp_path / "a.tar", {"x.jpg": stream.getvalue(), "x.txt": "two images"})
    make(shard, tmp_path / "out", f"output_dir={tmp_path}/outputs")
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert tar.getnames() == ["000000000.jpg", "000000000.txt"]
