"""Files of an evaluation in its own folder and in the run's, and its output on the terminal."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from clip_exp.reports.evaluation import Result, TensorFile, show, write_result
from clip_exp.reports.run_report import update_report
from tests.reports.examples import (
    classification_result,
    classified,
    compared_result,
    noise_files,
    retrieval_result,
    retrieved,
)


@pytest.fixture
def pets(tmp_path: Path) -> Result:
    return classification_result(classified(noise_files(tmp_path / "images", 8), 5, 60))


@pytest.fixture
def pairs(tmp_path: Path) -> Result:
    return retrieval_result(
        retrieved(noise_files(tmp_path / "images", 10), [f"caption {number}" for number in range(10)])
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a started evaluation."""
    path = tmp_path / "evaluate" / "vit_nano" / "now"
    path.mkdir(parents=True)
    record = {"argv": ["run=outputs/my run", "task=[pets,pairs]"], "start": "2026-01-02T03:04:05+00:00"}
    (path / "run.json").write_text(json.dumps(record))
    return path


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Return the folder of a finished run."""
    path = tmp_path / "train" / "now"
    path.mkdir(parents=True)
    summary = {
        "name": "my run", "model": "vit_nano", "data": "csv", "steps": 20, "samples_seen": 320, "epochs": 1.5, "parameters": 12345,
        "seconds": 61.5, "metrics": {"val/loss": 1.25, "val/median_rank_i2t": 7.0, "val/none": None},
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "run.json").write_text(json.dumps({"argv": ["model=vit_nano"], "rows": 1000}))
    (path / "config.yaml").write_text("name: my run\n")
    (path / "metrics.csv").write_text("step\n")
    Image.new("RGB", (8, 8)).save(path / "report.png")
    update_report(path)
    return path


def results(**of: Result) -> dict:
    return {name: {"metrics": result.metrics, "protocol": result.protocol} for name, result in of.items()}


def test_a_classification_writes_metrics_a_table_and_a_report_in_its_folder_and_in_the_run(
    pets: Result, folder: Path, trained: Path
):
    write_result(pets, "pets", folder, trained)
    for place in (folder, trained):
        assert json.loads((place / "eval" / "pets.json").read_text()) == results(pets=pets)["pets"]
        assert len(list(csv.DictReader((place / "eval" / "pets.csv").read_text().splitlines()))) == 5
    page = (folder / "eval" / "pets.html").read_text()
    assert (trained / "eval" / "pets.html").read_text() == page
    assert "&#39;run=outputs/my run&#39; &#39;task=[pets,pairs]&#39;" in page


def test_results_are_not_written_through_a_link_in_the_runs_folder(
    pets: Result, folder: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "theirs").mkdir()
    (trained / "eval").symlink_to(tmp_path / "theirs")
    write_result(pets, "pets", folder, trained)
    assert list((tmp_path / "theirs").iterdir()) == []
    assert (folder / "eval" / "pets.json").is_file()
    assert f"{trained / 'eval'} is a symbolic link" in caplog.text
    assert f"the results are only in {folder}" in caplog.text


def test_the_report_of_a_run_evaluated_after_training_has_its_training_command(pets: Result, trained: Path):
    write_result(pets, "pets", trained)
    assert "model=vit_nano resume=never" in (trained / "eval" / "pets.html").read_text()


def test_the_runs_report_links_its_evaluations(pets: Result, pairs: Result, folder: Path, trained: Path):
    assert "Evaluations" not in (trained / "report.html").read_text()
    write_result(pets, "pets", folder, trained)
    write_result(pairs, "pairs", folder, trained)
    report = (trained / "report.html").read_text()
    assert 'href="eval/pets.html"' in report
    assert 'href="eval/pairs.html"' in report
    assert "12,345 parameters" in report
    assert ">1.2500<" in report
    assert ">7<" in report
    assert not (folder / "report.html").exists()


def test_a_run_with_damaged_files_keeps_its_report_and_gets_the_one_of_the_task(
    pets: Result, folder: Path, trained: Path, caplog: pytest.LogCaptureFixture
):
    before = (trained / "report.html").read_text()
    (trained / "summary.json").write_text("{")
    write_result(pets, "pets", folder, trained)
    assert (trained / "report.html").read_text() == before
    assert (trained / "eval" / "pets.html").is_file()
    assert "could not be updated" in caplog.text


def test_a_run_folder_that_cannot_be_written_is_a_warning(
    pets: Result, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "a file").touch()
    write_result(pets, "pets", folder, tmp_path / "a file")
    assert (folder / "eval" / "pets.html").is_file()
    assert "cannot be written" in caplog.text


def test_tensors_are_saved_next_to_the_metrics(pets: Result, folder: Path):
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    files = {"probe": TensorFile({"weight": weights}, {"classes": "2"})}
    write_result(Result(pets.metrics, pets.protocol, pets.details, files), "pets", folder)
    assert (load_file(folder / "eval" / "pets.probe.safetensors")["weight"] == weights).all()


def test_one_task_ends_with_the_path_of_its_report(
    pets: Result, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "40")  # a path is not broken
    write_result(pets, "pets", folder)
    show(results(pets=pets), folder)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["Open:", str(folder / "eval" / "pets.html")]
    assert not (folder / "report.html").exists()


def test_several_tasks_end_with_the_path_of_an_index_of_their_reports(
    pets: Result, pairs: Result, folder: Path, capsys: pytest.CaptureFixture[str]
):
    tasks = {"pets": pets, "pairs": pairs, "robustness": compared_result()}
    for name, result in tasks.items():
        write_result(result, name, folder)
    show(results(**tasks), folder)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["Open:", str(folder / "report.html")]
    index = (folder / "report.html").read_text()
    for name in tasks:
        assert f'<a href="eval/{name}.html">{name}</a>' in index
    assert f"{100 * pets.metrics['top1']:.1f}\u202f%" in index
    assert "median_rank_t2i" in index


def test_reports_leave_no_temporary_files(pets: Result, folder: Path):
    write_result(pets, "pets", folder)
    assert sorted(path.name for path in (folder / "eval").iterdir()) == ["pets.csv", "pets.html", "pets.json"]


def test_values_are_shown_by_the_scale_of_the_metric_whatever_the_task_is_called(
    pairs: Result, trained: Path, capsys: pytest.CaptureFixture
):
    summary = json.loads((trained / "summary.json").read_text())
    summary["metrics"] = {"coco_ranking/recall@5_i2t": 0.25, "lossless/median_rank_i2t": 7.0}
    (trained / "summary.json").write_text(json.dumps(summary))
    report = update_report(trained).read_text()
    assert ">0.2500<" in report
    assert ">7<" in report
    show({"coco_ranking": {"metrics": {"recall@5_i2t": 0.25}, "protocol": pairs.protocol}}, trained)
    assert "0.2500" in capsys.readouterr().out


def test_an_overlap_of_scored_and_training_images_is_in_the_report_and_on_the_terminal(
    pets: Result, folder: Path, caplog: pytest.LogCaptureFixture
):
    overlap = {"images": 3, "same_file": 1, "equal_content": 2, "examples": ["/data/pets/cat/1.jpg"]}
    result = Result(pets.metrics, {**pets.protocol, "overlap": overlap}, pets.details)
    write_result(result, "pets", folder)
    page = (folder / "eval" / "pets.html").read_text()
    assert "<li><b>3</b> also in the training set</li>" in page
    assert "<li>equal_content: 2</li>" in page
    show(results(pets=result), folder)
    assert "pets: evaluated images that are also training images: 3 (1 the same files, 2 copies)" in caplog.text
    assert "/data/pets/cat/1.jpg" in caplog.text


def test_brackets_in_the_path_of_the_results_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show({}, tmp_path / "[/b]")
    assert f"Results: {tmp_path}/[/b]\n" in capsys.readouterr().out
