"""A run on TIFF, AVIF and HEIC images, and the commands that use it."""

import json
from pathlib import Path

import pytest

import clip_exp
from clip_exp.data.decoders import image_decoder
from clip_exp.runs import RunRecord
from tests.conftest import DOOR, Run
from tests.data.conftest import noise, write_table
from tests.data.encoded import encoded
from tests.runs import Finished, Train, unfinish

SUFFIXES = {"TIFF": "tif", "AVIF": "avif", "HEIF": "HEIC", "PPM": "ppm"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images, four of each format, with a table of pairs."""
    folder = tmp_path_factory.mktemp("photos")
    rows = [["filepath", "title"]]
    for number in range(16):
        kind = list(SUFFIXES)[number % len(SUFFIXES)]
        name = f"{number:02d}.{SUFFIXES[kind]}"
        (folder / name).write_bytes(encoded(noise(number), kind))
        rows.append([name, f"image {number}"])
    write_table(folder / "pairs.csv", rows)
    return folder


def words(photos: Path, *more: str) -> tuple[str, ...]:
    return (
        "model=vit_nano", "data=csv", f"data.train={photos}/pairs.csv", f"data.val={photos}/pairs.csv", "data.on_bad_image=error",
        "data.image_formats=[tif,AVIF,HEIC,PPM]", "global_batch_size=8", "max_steps=2", "precision=32-true", "trainer.accelerator=cpu",
        "data.num_workers=0", "task=retrieval", f"task.retrieval.table={photos}/pairs.csv", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(train: Train, photos: Path) -> Finished:
    return train(*words(photos))


def test_every_command_of_a_run_reads_the_formats_that_it_was_trained_on(
    run: Finished, photos: Path, command: Run, tmp_path: Path
):
    assert run.record["image_decoder"] == image_decoder()
    assert json.loads((run.folder / "eval" / "retrieval.json").read_text())["protocol"]["images"] == 16
    of_run, cpu = f"run={run.folder}", ("accelerator=cpu", "num_workers=0")
    for script, *arguments in (
        ("evaluate.py", of_run, *cpu, "output_dir=outputs"),
        (DOOR, "predict", of_run, f"images={photos}", "texts=[a dog,a cat]", "output=found.json", *cpu),
        (DOOR, "search", of_run, f"images={photos}", "index=photos.index", f"image={photos}/00.tif", *cpu),
        (DOOR, "rank", of_run, f"images={photos}", "text=a dog", *cpu),
        (DOOR, "export", of_run, "format=safetensors", "output=exported"),
        (DOOR, "predict", "pretrained=exported", f"images={photos}/*.tif", "texts=[a dog,a cat]", *cpu),
    ):
        done = command(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, (arguments, done.stdout + done.stderr)
    assert len(json.loads((tmp_path / "found.json").read_text())["images"]) == 16
    clip = clip_exp.load(run.folder, accelerator="cpu")
    assert clip.classify(sorted(photos.glob("*.[!c]*")), ["a dog", "a cat"]).shape == (16, 2)


def test_resuming_with_another_decoder_warns_and_records_it(run: Finished, photos: Path, train: Train):
    record = json.loads((run.folder / "run.json").read_text())
    assert {"torchcodec", "Pillow"} <= record["packages"].keys()
    unfinish(run.folder)
    RunRecord(run.folder).update(image_decoder="Pillow 12.0.0")
    resumed = train(*words(photos), output_dir=run.folder.parents[2])
    assert resumed.folder == run.folder
    warning = f"Images are now decoded by {image_decoder()}, before by Pillow 12.0.0: their pixels may differ slightly."
    assert warning in (run.folder / "train.log").read_text()
    assert resumed.record["image_decoder"] == image_decoder()
