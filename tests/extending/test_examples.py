"""Every example of examples/extending trains through its YAML; the printed command evaluates the run, and its export can be loaded."""

import json
from pathlib import Path

import pytest
import torch

import clip_exp
from clip_exp.config.targets import TargetNotAllowedError
from tests.conftest import Run
from tests.extending.common import (
    DIGITS,
    EXAMPLES,
    EXTENDED,
    SMALL,
    after,
    csv_of,
    only_run,
    typed,
    write_pairs,
    write_photos,
)
from tests.runs import Finished

# Overrides of a run, the modules that its configuration names, and those of its towers
RUNS: dict[str, tuple[tuple[str, ...], list[str], list[str]]] = {
    "towers, transform and schedule": (
        ("model/image=convnet", "model/text=bag_of_words", "model.image.image_size=32", "model.image.width=8", "data/transform=cutout",
         "scheduler=restarts", "scheduler.T_0=2", *DIGITS),
        ["bag_of_words", "convnet", "cutout"],
        ["bag_of_words", "convnet"],
    ),
    "hard negatives, scored by the task": (
        ("loss=hard_negatives", "data=csv", "data.train=pairs/pairs.csv", "data.val=pairs/pairs.csv",
         "task=wrong_captions", "task.wrong_captions.table=pairs/pairs.csv", "monitor=wrong_captions/accuracy", "task_every_n_steps=1"),
        ["hard_negatives", "wrong_captions"],
        [],
    ),
    "all captions": (
        ("loss=multi_positive", "data=csv", "data.train=pairs/pairs.csv", "data.val=pairs/pairs.csv", "data.captions=all"), ["multi_positive"], [],
    ),
    "stored distillation": (
        ("loss=stored_distillation", "data=csv", "data.train=pairs/pairs.parquet", "data.val=pairs/pairs.parquet"), ["stored_distillation"], [],
    ),
    "a folder of photos and a head": (
        ("data=photo_folder", "data.root=photos", "loss=predictor", "data.val=pairs/pairs.csv"), ["photo_folder", "predictor"], [],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    write_pairs(folder / "pairs")
    write_photos(folder / "photos")
    return folder


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_one_short_file_and_one_yaml(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 60
    options = [path for path in (EXAMPLES / "conf").rglob("*.yaml") if f"_target_: {file.stem}." in path.read_text()]
    assert [path.stem for path in options] == [file.stem]


def train_and_evaluate(command: Run, here: Path, tmp_path: Path, options: tuple[str, ...], packages: list[str]) -> Path:
    """Train in a folder, type the next command there, and return the run folder."""
    for name in ("pairs", "photos"):
        (tmp_path / name).symlink_to(here / name)
    done = command("train.py", *EXTENDED, *SMALL, *options, "max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = Finished(only_run(tmp_path), done.stdout)
    assert len(run.losses) == 2
    line = after("next:", done.stdout)
    assert f"allow_targets=[{','.join(packages)}]" in line
    evaluated = typed(command, line, tmp_path, "num_workers=0", "accelerator=cpu")
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    assert "val_retrieval/recall@1_i2t" in evaluated.stdout
    return run.folder


def assert_exported(run: Path, tmp_path: Path, packages: list[str], of_towers: list[str]) -> None:
    """Check that the exported file gives the run's features, and needs no code of the run but that of its towers."""
    with pytest.raises(TargetNotAllowedError):
        clip_exp.load(run, accelerator="cpu")
    clip = clip_exp.load(run, accelerator="cpu", allow_targets=packages, config_dir=EXAMPLES / "conf")
    file = clip.export(tmp_path / "exported", format="safetensors") / "model.safetensors"
    alone = clip_exp.load(file, accelerator="cpu", allow_targets=of_towers, config_dir=EXAMPLES / "conf")
    texts = ["a photo of a red 1", "the digit 7"]
    assert torch.equal(alone.encode_text(texts), clip.encode_text(texts))
    assert alone.model.state_dict().keys() == clip.model.state_dict().keys()


@pytest.mark.parametrize("name", RUNS)
def test_an_example_is_trained_evaluated_exported_and_loaded(
    name: str, command: Run, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, packages, of_towers = RUNS[name]
    run = train_and_evaluate(command, here, tmp_path, options, packages)
    if "wrong_captions" in packages:
        (scores,) = (run / "eval").glob("wrong_captions*.json")
        assert 0 <= json.loads(scores.read_text())["metrics"]["accuracy"] <= 1
    monkeypatch.chdir(tmp_path)
    assert_exported(run, tmp_path, packages, of_towers)


def test_a_teacher_is_named_by_its_run_and_allowed_if_it_names_code(command: Run, here: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs").symlink_to(here / "pairs")
    data = csv_of(Path("pairs"))
    taught_by = command(
        "train.py", *EXTENDED, *SMALL, *data, "loss=predictor", "max_steps=1", "output_dir=teachers", cwd=tmp_path
    )
    assert taught_by.returncode == 0, taught_by.stderr
    (teacher,) = tmp_path.glob("teachers/train/*/*")
    words = (
        *EXTENDED,
        *SMALL,
        *data,
        "loss=distillation",
        f"loss.teacher={teacher.relative_to(tmp_path)}",
        "max_steps=2",
    )
    refused = command("train.py", *words, cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert (
        "config.yaml names custom code, which runs only if it is allowed: loss._target_=predictor.Predictor"
        in refused.stderr
    )
    assert not (tmp_path / "outputs" / "train").exists()
    done = typed(command, refused.stderr.strip().splitlines()[-1], tmp_path)
    assert done.returncode == 0, done.stderr
    evaluated = typed(command, after("next:", done.stdout), tmp_path, "num_workers=0", "accelerator=cpu")
    assert evaluated.returncode == 0, evaluated.stderr
