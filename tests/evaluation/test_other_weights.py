"""Results of an earlier step or of averaged weights are stored next to the run's own results and never replace them."""

import json
from pathlib import Path
from typing import Any

import pytest

from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.evaluation.launch import evaluate, prepare_tasks
from clip_exp.evaluation.tasks.zero_shot import ZeroShotTaskConfig
from clip_exp.models.clip import CLIP
from clip_exp.reports.run_report import evaluations
from tests.small_runs import write_checkpoint, write_run


@pytest.fixture
def score(tmp_path: Path, class_folders: Path):
    """Score two templates on three classes; the keywords select the model."""

    def run(**which: Any) -> dict[str, Any]:
        task = {"pets": {"kind": "zero_shot", "root": str(class_folders), "templates": ["a {}.", "the {}."]}}
        config = EvaluateConfig(
            task=task, output_dir=str(tmp_path / "outputs"), accelerator="cpu", num_workers=0, **which
        )
        return evaluate(config)["pets"]

    return run


def steps(run_dir: Path) -> dict[str, tuple[int, bool]]:
    """Return the step and kind of weights of each result."""
    protocols = {path.stem: json.loads(path.read_text())["protocol"] for path in (run_dir / "eval").glob("*.json")}
    return {name: (protocol["step"], protocol["ema"]) for name, protocol in protocols.items()}


def test_an_earlier_step_and_averaged_weights_have_their_own_files(run_dir: Path, nano: CLIP, score) -> None:
    last = write_checkpoint(run_dir, nano, 2, averaged=nano.state_dict())
    own = score(run=str(run_dir))
    score(ckpt=str(run_dir / "checkpoints" / "step-000001" / "model.safetensors"))
    score(run=str(run_dir), ema=True)
    assert steps(run_dir) == {"pets": (2, False), "pets.step-000001": (1, False), "pets.step-000002.ema": (2, True)}
    assert json.loads((run_dir / "eval" / "pets.json").read_text()) == own
    for name in ("pets.step-000001", "pets.step-000002.ema"):
        assert {path.suffix for path in (run_dir / "eval").glob(f"{name}.*")} == {".json", ".csv", ".html"}
    assert "averaged weights (EMA)" in (run_dir / "eval" / "pets.step-000002.ema.html").read_text()
    listed = [(each["name"], each["weights"], each["link"]) for each in evaluations(run_dir)]
    assert listed == [
        ("pets", "step 2", "eval/pets.html"),
        ("pets", "step 1", "eval/pets.step-000001.html"),
        ("pets", "step 2, averaged weights (EMA)", "eval/pets.step-000002.ema.html"),
    ]
    score(ckpt=str(last))  # the run's own, by its path
    assert len(steps(run_dir)) == 3


def test_results_of_an_earlier_step_are_renamed_after_more_training(run_dir: Path, nano: CLIP, score) -> None:
    score(run=str(run_dir))
    before = {path.suffix: path.read_bytes() for path in (run_dir / "eval").iterdir()}
    write_checkpoint(run_dir, nano, 2)
    score(run=str(run_dir))
    assert steps(run_dir) == {"pets": (2, False), "pets.step-000001": (1, False)}
    kept = {path.suffix: path.read_bytes() for path in (run_dir / "eval").glob("pets.step-000001.*")}
    assert kept == before


def test_of_a_run_with_a_monitor_the_best_weights_are_its_own(tmp_path: Path, nano: CLIP, score) -> None:
    run_dir = write_run(tmp_path / "monitored", nano, monitor="val/loss")
    write_checkpoint(run_dir, nano, 2, best=True)
    last = write_checkpoint(run_dir, nano, 3)
    score(ckpt=str(last))
    score(run=str(run_dir))
    assert steps(run_dir) == {"pets": (2, False), "pets.step-000003": (3, False)}


@pytest.mark.parametrize("name", ["pets.step-000002", "pets.step-2.ema", "pets.superseded-step-000002"])
def test_a_task_cannot_have_a_name_of_results_of_other_weights(name: str) -> None:
    def problems(name: str) -> str:
        return "\n".join(map(str, prepare_tasks({name: ZeroShotTaskConfig()}, "outputs", None)[1]))

    assert "rename the task" in problems(name)
    assert "rename" not in problems("pets.v2")
