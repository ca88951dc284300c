"""Every key of an evaluation and of its tasks changes the result, is refused, or is listed here with the reason why not.

A new key fails the first test until it has a line; see `tests/training/test_every_key.py`.
"""

import csv
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clip_exp.config.base import members
from clip_exp.config.compose import compose
from clip_exp.config.evaluation import EvaluateConfig, TaskConfig
from clip_exp.config.model import ModelConfig
from clip_exp.config.names import named_model
from clip_exp.errors import ClipExpError
from clip_exp.evaluation.evaluated_model import _load, score
from clip_exp.evaluation.launch import check
from clip_exp.models.clip import build_model
from clip_exp.weights.find import hash_weights
from tests.exhaustive import repeat_beyond
from tests.keys import Changes, explained, leaf_keys, without_expectation
from tests.small_runs import write_checkpoint, write_run
from tests.training.test_every_key import CHANGES as OF_TRAINING

MODELS = {"run": ("run=<run>",), "weights": ("model=vit_nano", "pretrained=<averaged>")}
BOTH = tuple(MODELS)
TASKS = {
    "zero_shot": "{kind: zero_shot, table: <table>}",
    "retrieval": "{kind: retrieval, table: <table>}",
    "knn": "{kind: knn, table: <table>, k: 5, train: {table: <other>}}",
    "linear_probe": "{kind: linear_probe, table: <table>, train: {table: <other>}}",
    "robustness": "{kind: robustness, baseline: null, root: <folder>}",
}
COMMAND = {
    "run": Changes("<other_run>", refused=("weights",)),
    "ckpt": Changes("<checkpoint>", also=("run=null",), refused=("weights",)),
    "pretrained": Changes("<other_weights>", refused=("run",)),
    "pretrained_prefix": Changes("state_dict_ema", refused=("run",)),
    "ema": Changes("true", refused=("weights",)),
    "wise_ft": Changes("0.5", refused=("weights",)),
    "precision": Changes("bf16-mixed"),
    "max_image_pixels": Changes("100", refused=BOTH),  # all are larger
}


def generated(at: str) -> dict[str, Changes]:
    """Return what is expected of the keys of generated data."""
    digits = (f"{at}table=null", f"++{at}generate={{kind: digits, rows: 60, val_rows: 40}}")
    shapes = (f"{at}table=null", f"++{at}generate={{kind: shapes, rows: 20, val_rows: 20}}", f"{at}label_key=title")
    return {
        "generate.kind": Changes("shapes", given=digits, also=(f"{at}label_key=title",)),
        "generate.rows": Changes("30", given=(*digits, f"{at}split=train")),
        "generate.val_rows": Changes("30", given=digits),
        "generate.image_size": Changes("32", given=shapes),
        "generate.seed": Changes("1", given=shapes),
        "split": Changes("train", given=digits),
    }


def labeled(at: str) -> dict[str, Changes]:
    """Return what is expected of the keys of `LabeledDataConfig`, which start with `at`, for tables."""
    return {
        "root": Changes("<folder>", also=(f"{at}table=null",)),
        "ground_truth": Changes("<labels>", refused=BOTH),  # without flat images
        "table": Changes("<third>"),
        "download": Changes("true", refused=BOTH),
        "image_root": Changes("<elsewhere>"),
        "image_key": Changes("other_path"),
        "label_key": Changes("other_label"),
        "separator": Changes("'|'", refused=BOTH),
        "encoding": Changes("utf-16", refused=BOTH),
        "filter": Changes("'score > 2'"),
        "classes": Changes("{cat: house, dog: tree, cow: car}"),
    }


OF_TASKS: dict[str, Changes] = {
    **{
        f"task.{kind}.{key}": change
        for kind in ("zero_shot", "knn", "linear_probe")
        for key, change in labeled(f"task.{kind}.").items()
    },
    **{
        f"task.{kind}.train.{key}": change
        for kind in ("knn", "linear_probe")
        for key, change in labeled(f"task.{kind}.train.").items()
    },
    **{f"task.zero_shot.{key}": change for key, change in generated("task.zero_shot.").items()},
    "task.zero_shot.templates": Changes("['nothing but {}']"),
    "task.retrieval.table": Changes("<third>"),
    "task.retrieval.image_root": Changes("<elsewhere>"),
    "task.retrieval.image_key": Changes("other_path"),
    "task.retrieval.caption_key": Changes("other_title"),
    "task.retrieval.separator": Changes("'|'", refused=BOTH),
    "task.retrieval.encoding": Changes("utf-16", refused=BOTH),
    "task.retrieval.filter": Changes("'score > 2'"),
    "task.knn.k": Changes("1"),
    "task.knn.temperature": Changes("1.0"),
    "task.linear_probe.c": Changes("[0.001]"),
    "task.linear_probe.val_fraction": Changes("0.5"),
    "task.linear_probe.max_iter": Changes("1"),
    "task.linear_probe.seed": Changes("1"),
    "task.robustness.baseline_weights": Changes("<start>", refused=BOTH),
}
EXPECTED = COMMAND | OF_TASKS

NOT_THE_RESULT = {
    "allow_targets": "which code of others may run (tests/test_extending.py)",
    "accelerator": "where it runs",
    "devices": "where it runs (tests/evaluation/test_ranks.py)",
    "batch_size": "memory: features differ in the last bit at most",
    "num_workers": "who decodes",
    "on_bad_image": "acts on bad images alone (tests/evaluation/test_features.py)",
    "task": "below, by kind",
    "name": "where it is written",
    "output_dir": "where it is written",
    "cache_gb": "what is cached (tests/evaluation/test_features.py)",
    "model.name": "a label",
    "model.open_clip_name": "the name under which `pretrained` knows tags",
    "model.text.trim": "saves time: the features are the same",
    **{f"task.{kind}.kind": "the task itself" for kind in TaskConfig.kinds()},
    **{
        f"task.{at}{key}": reason
        for at in ("zero_shot.", "retrieval.", "knn.", "knn.train.", "linear_probe.", "linear_probe.train.")
        for key, reason in {
            "on_bad_row": "acts on bad rows alone (tests/data/tables)",
            "allow_outside_root": "acts on paths that leave the root alone (tests/data/test_files.py)",
            "torchvision": "needs sets of others (tests/evaluation/sets/test_torchvision_sets.py)",
        }.items()
    },
    **{
        f"task.{at}{key}": "read as in a zero_shot task, by `labeled_images`"
        for at in ("knn.", "knn.train.", "linear_probe.", "linear_probe.train.")
        for key in ("generate", "split")
    },
    **{
        f"task.robustness.{key}": "needs ImageNet's classes (tests/evaluation/test_robustness.py)"
        for key in ("root", "sets", "templates", "baseline")
    },
}
KEYS = [
    *leaf_keys(EvaluateConfig),
    *(
        key
        for model in members(TaskConfig)
        for key in leaf_keys(model, at=f"task.{model.model_fields['kind'].default}.")
    ),
]
OF_MODEL = [key for key in leaf_keys(ModelConfig, at="model.") if not explained(key, NOT_THE_RESULT)]
PROMISED = {
    ("run", "ema"), ("weights", "pretrained"), ("weights", "task.zero_shot.download"), ("run", "task.retrieval.caption_key"),
    ("run", "task.knn.temperature"), ("run", "task.linear_probe.seed"),
}  # fmt: skip


def test_of_every_key_something_is_expected() -> None:
    assert without_expectation(KEYS, EXPECTED | dict.fromkeys(OF_MODEL), NOT_THE_RESULT) == []
    assert set(EXPECTED) <= set(KEYS)
    assert [key for key in OF_MODEL if key not in OF_TRAINING] == []


def write_table(folder: Path, name: str, seed: int) -> str:
    """Write a table of 24 images of three classes, and return its path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    rows = []
    for i in range(24):
        paths = [f"images/{name}{i}.png", f"images/{name}{i}b.png"]
        for path in paths:
            Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / path)
        label, other = ("cat", "dog", "cow")[i % 3], ("cat", "dog", "cow")[(i + i // 3) % 3]
        rows.append(
            [
                *paths,
                f"{label} {i} and more words than a short context holds",
                f"not {label} {i * 3}",
                label,
                other,
                str(i),
            ]
        )
    table = folder / f"{name}.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        header = ["filepath", "other_path", "title", "other_title", "label", "other_label", "score"]
        csv.writer(file).writerows([header, *rows])
    return str(table)


class Scores:
    """Scores of this process, cached by list of overrides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = ("table", "other", "third")
        self.places = {name: write_table(folder / "data", name, seed) for seed, name in enumerate(names)}
        for seed, name in enumerate(names):
            write_table(folder / "elsewhere", name, seed + 10)
        self.places |= {
            "elsewhere": str(folder / "elsewhere"),
            "folder": str(folder / "classes"),
            "labels": str(folder / "labels.txt"),
        }
        for i, path in enumerate(sorted((folder / "data" / "images").glob("third*.png"))):
            target = folder / "classes" / ("cat", "dog", "cow")[i % 3] / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(path)
        (folder / "labels.txt").write_text("cat\n")
        models = []
        for seed in range(4):
            torch.manual_seed(seed)
            models.append(build_model(named_model("vit_nano")))
        for name, model in zip(("start", "other_weights"), models, strict=False):
            save_file(model.state_dict(), folder / f"{name}.safetensors")
            self.places[name] = str(folder / f"{name}.safetensors")
        both = {"state_dict": models[0].state_dict(), "state_dict_ema": models[1].state_dict()}
        torch.save(both, folder / "averaged.pt")
        self.places["averaged"] = str(folder / "averaged.pt")
        run = write_run(folder / "run", models[1])
        write_checkpoint(run, models[2], 2, averaged=models[3].state_dict())
        start = {"path": self.places["start"], "sha256": hash_weights(Path(self.places["start"]))}
        (run / "run.json").write_text(json.dumps({"pretrained": start}))
        self.places |= {"run": str(run), "checkpoint": str(run / "checkpoints" / "step-000001")}
        self.places["other_run"] = str(write_run(folder / "other_run", models[3]))
        self.result = cache(self._result)

    def _result(self, model: str, task: str, *overrides: str) -> str:
        """Return the complete result of a task, to the last bit."""
        words = [
            *MODELS[model],
            "~task.auto",
            f"+task.{task}={TASKS[task]}",
            "num_workers=0",
            "accelerator=cpu",
            "cache_gb=0",
        ]
        words += [*overrides, f"output_dir={self.folder / 'outputs'}"]
        for name, place in self.places.items():
            words = [word.replace(f"<{name}>", place) for word in words]
        config = compose("evaluate", words)
        source, tasks = check(config, words)
        result = score(tasks[0], _load(config, source)[0])
        arrays = [
            np.asarray(value).tolist()
            for value in vars(result.details).values()
            if isinstance(value, np.ndarray | list)
        ]
        tensors = {
            name: {key: value.tolist() for key, value in file.tensors.items()} for name, file in result.files.items()
        }
        return repr((result.metrics, arrays, tensors))

    def outcome(self, model: str, *overrides: str) -> str | ClipExpError:
        """Return the result of a retrieval, or the error."""
        try:
            return self.result(model, "retrieval", *overrides)
        except ClipExpError as error:
            return error


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return Scores(tmp_path_factory.mktemp("every_key"))


def task_of(key: str) -> str:
    """Return the task that shows if a key has an effect."""
    return key.split(".")[1] if key.startswith("task.") else "retrieval"


def assert_refused(scores: Scores, model: str, key: str, *overrides: str) -> None:
    with pytest.raises(ClipExpError) as caught:
        scores.result(model, task_of(key), *overrides)
    assert (f"task.{task_of(key)}" if key in OF_TASKS else key) in str(caught.value), str(caught.value)


CASES = [(model, key) for model in MODELS for key in EXPECTED]


@pytest.mark.parametrize("case", repeat_beyond(PROMISED, CASES), ids=" ".join)
def test_every_key_changes_the_result_or_is_refused(case: tuple[str, str], scores: Scores) -> None:
    model, key = case
    change = EXPECTED[key]
    changed = (change.override(key), *change.also)
    if model in change.refused:
        assert_refused(scores, model, key, *change.given, *changed)
        return
    assert scores.result(model, task_of(key), *change.given, *changed) != scores.result(
        model, task_of(key), *change.given
    )
    if change.given and not change.asks_for_nothing:
        assert_refused(scores, model, key, *changed)


@pytest.mark.parametrize("key", repeat_beyond(["model.dropout"], OF_MODEL))
def test_every_key_of_the_model_changes_the_result_or_is_refused(key: str, scores: Scores) -> None:
    changed = scores.outcome("weights", OF_TRAINING[key].override(key))
    if isinstance(changed, ClipExpError):
        assert "model." in str(changed) or "does not fit the model" in str(changed)
    elif OF_TRAINING[key].asks_for_nothing:
        assert changed == scores.result("weights", "retrieval")
    else:
        assert changed != scores.result("weights", "retrieval")


def test_a_run_has_its_model(scores: Scores) -> None:
    for override in ("model.dropout=0.1", "model=vit_nano"):
        assert isinstance(scores.outcome("run", override), ClipExpError)
