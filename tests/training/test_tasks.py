"""Tasks that are scored while training: the numbers of `evaluate.py`, under every strategy, and the same run as without them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_exp.checkpoints.folders import manifests
from clip_exp.config.data import GenerateConfig, Generator
from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.config.files import read_run_config
from clip_exp.data.generated import generate
from clip_exp.errors import ClipExpError, ConfigError, DataError
from clip_exp.evaluation.launch import evaluate
from clip_exp.models.clip import build_model
from clip_exp.training.preflight import check_train, training_tasks
from clip_exp.training.tasks import TaskScores, score_tasks
from tests.compose import train_config
from tests.exhaustive import repeat_beyond
from tests.runs import TINY, Finished, Train, unfinish
from tests.small_runs import write_image

TIMING = ("train/samples_per_s", "train/data_wait_s", "train/compute_s")
STEPS = ("max_steps=12", "log_every_n_steps=1", "val_every_n_steps=6", "checkpoint_every_n_steps=6")
RUN = (*(o for o in TINY if not o.startswith("resume")), *STEPS, "model.dropout=0.1")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 23 images with captions, other than those of the run."""
    config = GenerateConfig(kind=Generator.shapes, rows=31, val_rows=23, seed=1)
    return generate(config, tmp_path_factory.mktemp("pairs")).val


@pytest.fixture(scope="session")
def tasks(pairs: Path) -> tuple[str, ...]:
    return ("task=[digits,retrieval]", f"task.retrieval.table={pairs}", "task_every_n_steps=3")


@pytest.fixture(scope="session")
def scored(train: Train, tasks: tuple[str, ...]) -> Finished:
    return train(*RUN, *tasks)


@pytest.fixture(scope="session")
def one_device(train: Train, tasks: tuple[str, ...]) -> Finished:
    """Without dropout, which each rank draws for itself."""
    return train(*TINY, *STEPS, *tasks)


def scores(run: Finished) -> dict[int, dict[str, float]]:
    """What the tasks yielded, by step."""
    rows = {
        row["step"]: {k: v for k, v in row.items() if k.startswith(("digits/", "retrieval/"))} for row in run.metrics
    }
    return {step: values for step, values in rows.items() if values}


def without_timing(run: Finished) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in run.metrics]


def test_the_scores_are_those_of_an_evaluation_of_the_checkpoint(scored: Finished, pairs: Path, tmp_path: Path) -> None:
    assert list(scores(scored)) == [3, 6, 9, 12]
    shutil.copytree(scored.folder, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    config = EvaluateConfig(
        ckpt=str(tmp_path / "run" / "checkpoints" / "step-000012"),
        task={**train_config("task=digits").task, "retrieval": {"kind": "retrieval", "table": str(pairs)}},
        output_dir=str(scored.folder.parents[2]),
        accelerator="cpu",
        num_workers=0,
    )
    for name, result in evaluate(config).items():
        left = json.loads((scored.folder / "eval" / f"{name}.json").read_text())
        assert left["metrics"] == pytest.approx(result["metrics"], abs=1e-9)
        assert {**left["protocol"], "weights": None} == {**result["protocol"], "weights": None}
        for metric, value in result["metrics"].items():
            assert scores(scored)[12][f"{name}/{metric}"] == pytest.approx(value, abs=1e-9)
    assert scored.summary["metrics"]["digits/top1"] == scores(scored)[12]["digits/top1"]
    assert "digits/top1" in scored.output


def test_training_is_bitwise_the_same_with_and_without_tasks(scored: Finished, train: Train) -> None:
    plain = train(*RUN)
    assert scored.losses == plain.losses
    for name, weight in plain.weights.items():
        assert torch.equal(scored.weights[name], weight), name
    val = [[row.get(name) for row in run.metrics] for run in (scored, plain) for name in ("val/loss",)]
    assert val[0] == val[1]


def test_a_killed_run_ends_with_the_scores_of_an_uninterrupted_one(
    scored: Finished, train: Train, tasks: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "train" / scored.folder.parent.name / scored.folder.name
    shutil.copytree(scored.folder, folder, ignore=shutil.ignore_patterns("step-000012", "eval"))
    unfinish(folder)
    run = train(*RUN, *tasks, output_dir=tmp_path)
    assert run.folder == folder
    assert without_timing(run) == without_timing(scored)
    for name, weight in scored.weights.items():
        assert torch.equal(run.weights[name], weight), name
    for name in ("digits", "retrieval"):
        ours, theirs = (json.loads((r.folder / "eval" / f"{name}.json").read_text()) for r in (run, scored))
        assert ours["metrics"] == theirs["metrics"]


def test_a_run_that_was_killed_after_its_last_checkpoint_still_leaves_its_scores(
    scored: Finished, train: Train, tasks: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "train" / scored.folder.parent.name / scored.folder.name
    shutil.copytree(scored.folder, folder, ignore=shutil.ignore_patterns("eval", "summary.json"))
    unfinish(folder)
    run = train(*RUN, *tasks, output_dir=tmp_path)
    assert without_timing(run) == without_timing(scored)
    for name in ("digits", "retrieval"):
        ours, theirs = (json.loads((r.folder / "eval" / f"{name}.json").read_text()) for r in (run, scored))
        assert ours["metrics"] == theirs["metrics"]
    assert run.summary["metrics"] == scored.summary["metrics"]


@pytest.mark.parametrize("devices", repeat_beyond((1,), (1, 2)))
def test_a_finished_run_is_scored_on_new_tasks_and_not_trained(
    devices: int, scored: Finished, train: Train, tasks: tuple[str, ...], pairs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "train" / scored.folder.parent.name / scored.folder.name
    shutil.copytree(scored.folder, folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "eval").iterdir()}
    more = (*RUN, *tasks, f"+task.again={{kind: retrieval, table: {pairs}}}", f"trainer.devices={devices}")
    run = train(*more, output_dir=tmp_path)
    assert run.folder == folder
    assert "scoring its last checkpoint on again, without training" in run.output
    assert run.metrics == scored.metrics
    results = {name: json.loads((folder / "eval" / f"{name}.json").read_text()) for name in ("again", "retrieval")}
    assert results["again"]["metrics"] == results["retrieval"]["metrics"]
    assert results["again"]["protocol"]["step"] == 12
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was scored before stays"
    named = {f"again/{name}": value for name, value in results["again"]["metrics"].items()}
    assert run.summary == {**scored.summary, "metrics": {**scored.summary["metrics"], **named}}
    assert "again.html" in (folder / "report.html").read_text()
    assert list(read_run_config(folder).task) == ["digits", "retrieval", "again"]
    assert (run.record["status"], run.record["end"]) == ("finished", scored.record["end"])
    assert "this run is already finished. Set resume=never" in train(*more, output_dir=tmp_path).output
    assert "this run is already finished. Set resume=never" in train(*RUN, output_dir=tmp_path).output


@pytest.mark.parametrize("strategy", repeat_beyond(("ddp",), ("ddp", "deepspeed_stage_2", "deepspeed_stage_3")))
def test_two_devices_have_the_scores_of_one(
    strategy: str, one_device: Finished, train: Train, tasks: tuple[str, ...]
) -> None:
    run = train(*TINY, *STEPS, *tasks, f"strategy={strategy}", "trainer.devices=2")
    for step in (3, 6, 9, 12):
        assert scores(run)[step] == pytest.approx(scores(one_device)[step], abs=1e-5)


def test_a_monitor_of_a_task_keeps_its_best_checkpoint_without_validation_data(
    train: Train, pairs: Path, tasks: tuple[str, ...]
) -> None:
    data = (
        "data=csv",
        f"data.train={pairs.parent / 'train.csv'}",
        "global_batch_size=16",
        "data.num_workers=0",
        "optimizer.lr=1e-3",
    )
    run = train(
        "model=vit_nano", *data, "trainer.accelerator=cpu", "max_steps=12", "checkpoint_every_n_steps=100", *tasks,
        "task_every_n_steps=2", "monitor=retrieval/recall@10_t2i",
    )  # fmt: skip
    measured = {step: values["retrieval/recall@10_t2i"] for step, values in scores(run).items()}
    best = max(measured, key=lambda step: (measured[step], -step))
    marked = {manifest.step: manifest.metrics for manifest in manifests(run.folder).values() if manifest.best}
    assert list(marked)[-1] == best
    assert marked[best]["retrieval/recall@10_t2i"] == measured[best]
    assert run.summary["best_checkpoint"].endswith(f"step-{best:06d}")


def test_patience_counts_the_scorings_of_the_task_that_it_watches(train: Train, tmp_path: Path) -> None:
    write_image(tmp_path / "only" / "class" / "image.png", 0)  # top1 is 1 from the start
    run = train(
        *TINY, "max_steps=12", "val_every_n_steps=1", "task=image_folder", f"task.image_folder.root={tmp_path / 'only'}",
        "task.image_folder.templates=['a {}.']", "task_every_n_steps=3", "monitor=image_folder/top1", "patience=2",
    )  # fmt: skip
    assert run.metrics[-1]["step"] == 9
    assert run.summary["best_checkpoint"].endswith("step-000003")
    # The run's own weights are those of the best step: the last ones' scores are not under the task's name alone.
    assert [path.name for path in (run.folder / "eval").glob("*.json")] == ["image_folder.step-000009.json"]
    assert json.loads((run.folder / "eval" / "image_folder.step-000009.json").read_text())["protocol"]["step"] == 9


def test_images_that_are_scored_and_learned_from_are_reported_when_training_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, place in enumerate(("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png")):
        write_image(tmp_path / place, number)
    shutil.copy(tmp_path / "train/cat/1.png", tmp_path / "test/cat/copy.png")
    config = train_config(
        "task=knn", "task.knn.k=1", f"task.knn.root={tmp_path / 'test'}", f"task.knn.train.root={tmp_path / 'train'}"
    )
    scores = TaskScores(training_tasks(config), config, tmp_path, Any, lambda: None)
    scores.on_train_start(Any, None)
    assert "knn: evaluated images that are also training images: 1 (0 the same files, 1 copies)" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["task=auto"], ConfigError, "task.auto.kind=auto scores a run on its validation data"),
        (["task=image_folder", "task.image_folder.root=absent"], ConfigError, "task.image_folder.root=absent: no such folder"),
        (["task=imagenet", "task.imagenet.root={images}"], DataError, "these labels are not classes of ImageNet-1k: 'n99999999'"),
        (["+task.val={{kind: retrieval, table: {table}}}"], ConfigError, "task.val: this name is reserved"),
        (["+task.mine={{kind: retrieval, tabel: x.csv}}"], ConfigError, "task.mine.tabel does not exist: did you mean 'task.mine.table'?"),
        (["task_every_n_steps=5"], ConfigError, "task_every_n_steps=5 has no effect without a task"),
        (["task=digits", "task_every_n_steps=0"], ConfigError, "task_every_n_steps=0 must be greater than 0"),
        (["task=digits", "monitor=digits/top1"], ConfigError, "set task_every_n_steps"),
        (["task=digits", "task_every_n_steps=5", "monitor=digits/top3"], ConfigError, "did you mean 'digits/top"),
        (["monitor=digits/top1"], ConfigError, "is not a metric of validation or of a task"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_scored_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], error: type[ClipExpError], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "images" / "n99999999" / "1.png", 0)
    (tmp_path / "pairs.csv").write_text("filepath,title\nimages/n99999999/1.png,an image\n")
    places = {"images": tmp_path / "images", "table": tmp_path / "pairs.csv"}
    with pytest.raises(error) as caught:
        check_train(train_config(*(override.format(**places) for override in overrides)))
    assert message in str(caught.value)
    assert type(caught.value) is error


def test_an_unreadable_image_of_a_task_is_left_out_or_ends_the_run_as_one_of_training(tmp_path: Path) -> None:
    for number in range(4):
        write_image(tmp_path / "pets" / "ab"[number % 2] / f"{number}.png", number)
    (tmp_path / "pets/a/broken.png").write_bytes(b"broken")

    def score(policy: str) -> dict[str, Any]:
        config = train_config(
            "model=vit_nano", "data=shapes", f"data.on_bad_image={policy}", f"output_dir={tmp_path}", "data.num_workers=0",
            "task=image_folder", f"task.image_folder.root={tmp_path / 'pets'}",
        )  # fmt: skip
        model = build_model(config.model).eval()
        return score_tasks(training_tasks(config), config, model, torch.device("cpu"))["image_folder"].protocol

    assert (score("replace")["images"], score("replace")["bad_images"]) == (4, 1)
    with pytest.raises(DataError, match=r"broken\.png: .*leave such images out: data\.on_bad_image=replace\."):
        score("error")


def test_a_monitor_of_a_task_that_is_scored_often_enough_is_accepted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_train(train_config("task=digits", "task_every_n_steps=5", "monitor=digits/top1", "patience=3"))
