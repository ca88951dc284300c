"""Output, exit codes and interruption of `clip-exp check-data`."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_exp.checks.command import check_data
from clip_exp.config.compose import compose
from tests.checks.planted import plant
from tests.checks.test_planted import folder_of
from tests.conftest import DOOR, Run
from tests.small_runs import write_image


def test_the_table_names_problems_report_and_next_command(command: Run, tmp_path: Path) -> None:
    planted = plant(tmp_path)
    done = command(
        DOOR, "check-data", f"data.train={planted.train}", f"data.val={planted.val}", "model=vit_tiny", "num_workers=2",
        "data/augmentation=strong", "data.max_bad_fraction=0.5", cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, "error" in done.stderr) == (0, False), done.stderr
    assert "7 bad images (18.9" in done.stdout
    opened, following = done.stdout.splitlines()[-2:]
    assert (tmp_path / opened.removeprefix("Open:").strip()).is_file()
    assert "train data.train=" in following.replace(".py", "")
    assert following.endswith("data=csv data.on_bad_row=skip loss.same_caption=positive")
    assert "model=vit_tiny" in following
    assert "data/augmentation=strong" in following
    assert "num_workers" not in following


def test_json_is_all_that_is_printed_and_equals_the_file(command: Run, tmp_path: Path) -> None:
    done = command(DOOR, "check-data", "data=digits", "model=vit_nano", "format=json", cwd=tmp_path)
    assert done.returncode == 0
    report = json.loads(done.stdout)
    folder = next((tmp_path / "outputs" / "check_data" / "digits").iterdir())
    assert report == json.loads((folder / "report.json").read_text())
    assert report["splits"]["train"]["rows"] == 1442
    assert report["splits"]["train"]["captions"]["distinct"] == 30  # ten digits in three sentences
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "data.train has no value"),
        (["data.train=missing.csv"], 2, "missing.csv does not exist"),
        (["data.train=pairs.csv", "max_images=0"], 2, "max_images=0"),
        (["data.train=pairs.csv", "max_leakage=2"], 2, "max_leakage=2"),
        (["data.train=pairs.csv", "data.max_image_bytes=0"], 2, "data.max_image_bytes=0"),
        (["data.train=pairs.csv", "data.num_workers=-1"], 2, "data.num_workers=-1"),
        (["data.train=pairs.csv", "name=a/b"], 2, "not a valid folder name"),
        (["data.train=pairs.csv", "data.caption_key=caption"], 3, "caption"),
        (["data.train=pairs.csv", "maximages=3"], 2, "did you mean 'max_images'"),
    ],
)
def test_errors_have_their_exit_code_and_leave_no_folder(
    refused: Run, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "pairs.csv").write_text("filepath,title\na.jpg,a dog\n")
    done = refused(DOOR, "check-data", *arguments, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "outputs" / "check_data").exists()


def test_a_table_of_missing_images_is_a_report_and_not_a_failure(command: Run, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("filepath,title\na.jpg,a dog\nb.jpg,a cat\n")
    done = command(DOOR, "check-data", "data.train=pairs.csv", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.startswith("error: train: 2 bad images (100.0")
    assert "data.image_root" in done.stderr
    assert "report.html" in done.stdout
    assert "Next:" not in done.stdout, "training would end at once"


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tar", "sources"])
def test_other_forms_of_the_same_pairs_are_found_alike(tmp_path: Path, kind: str) -> None:
    pairs = [(write_image(tmp_path / f"images/{number}.png", number), f"image {number}") for number in range(4)]
    pairs[3] = (str((tmp_path / "images/3.png").rename(tmp_path / "images/odd.png")), "image 3")
    (tmp_path / "images/odd.png").write_bytes((tmp_path / "images/0.png").read_bytes())
    train = _written(tmp_path, kind, pairs)
    config = compose("check-data", [f"data.train={train}", f"output_dir={tmp_path}/outputs", "num_workers=2"])
    check_data(config, [])
    split = json.loads((folder_of(config) / "report.json").read_text())["splits"]["train"]
    assert (split["rows"], split["images"], split["bad_images"]["count"]) == (4, 4, 0)
    assert split["duplicates"]["images"]["copies"] == 1
    assert split["captions"]["distinct"] == 4


def _written(folder: Path, kind: str, pairs: list[tuple[str, str]]) -> str:
    path = folder / f"pairs.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"filepath": [pair[0] for pair in pairs], "title": [pair[1] for pair in pairs]}), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"filepath": pair[0], "title": pair[1]}) + "\n" for pair in pairs))
    elif kind == "tar":
        with tarfile.open(path, "w") as shard:
            for number, (image, caption) in enumerate(pairs):
                (folder / "caption.txt").write_text(caption)
                shard.add(image, f"{number:03}.png")
                shard.add(folder / "caption.txt", f"{number:03}.txt")
    else:
        for name, part in (("a", pairs[:2]), ("b", pairs[2:])):
            (folder / f"{name}.csv").write_text("filepath,title\n" + "".join(f"{p},{c}\n" for p, c in part))
        return f"[{{path: {folder}/a.csv, weight: 3}},{{path: {folder}/b.csv, weight: 1}}]"
    return str(path)


def test_flickr8k_is_what_its_readme_says(real_data: Path, tmp_path: Path) -> None:
    flickr = real_data / "flickr8k"
    overrides = [f"data.train={flickr}/train.csv", f"data.val={flickr}/dev.csv", f"output_dir={tmp_path}"]
    config = compose("check-data", overrides)
    assert check_data(config, []) == 0
    report = json.loads((folder_of(config) / "report.json").read_text())
    for name, images in (("train", 2000), ("val", 400)):
        split = report["splits"][name]
        assert (split["rows"], split["images"], split["bad_rows"]["count"]) == (5 * images, images, 0)
        assert split["bad_images"]["count"] == split["captions"]["truncated"]["count"] == 0
        assert split["formats"] == {"JPEG": images}
        assert split["sizes"]["width"]["min"] == split["sizes"]["height"]["max"] == 224
        assert list(split["captions"]["scripts"]) == ["Latin"]
    assert report["leakage"]["images"] == 0


@contextmanager
def scanning(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the command in a new session, and yield once its two workers read images."""
    original = write_image(folder / "original.png", 0, (1200, 1200))
    for number in range(3000):
        os.link(original, folder / f"{number}.png")
    (folder / "pairs.csv").write_text("filepath,title\n" + "".join(f"{n}.png,number {n}\n" for n in range(3000)))
    process = subprocess.Popen(
        [sys.executable, "-m", "clip_exp", "check-data", "data.train=pairs.csv", "num_workers=2"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(_of_session(process.pid)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        assert process.poll() is None, process.communicate()
        yield process
        assert _of_session(process.pid) == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_ctrl_c_ends_it_at_once_with_130_and_leaves_no_process(tmp_path: Path) -> None:
    with scanning(tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors.splitlines()[-1]) == (130, "error: interrupted.")
        assert "Traceback" not in errors


@pytest.mark.exhaustive
def test_a_killed_worker_ends_it_with_an_error(tmp_path: Path) -> None:
    with scanning(tmp_path) as process:
        os.kill(max(_of_session(process.pid)), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 3
        assert "was killed by a signal" in errors
        assert "Traceback" not in errors


def _of_session(session: int) -> list[int]:
    """Return the processes that are alive in a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, _, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(of) == session and state != "Z":
                found.append(int(entry.name))
    return found
