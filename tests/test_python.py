"""Tests of the Python API's keywords, objects and runs (`tests/inference/test_api.py` has those of its other functions)."""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import clip_exp
from clip_exp.config import objects
from clip_exp.config.commands import SCHEMAS
from clip_exp.config.compose import compose
from clip_exp.config.files import read_run_config
from clip_exp.config.keywords import EvaluateKeywords, TrainKeywords, overrides_of
from clip_exp.config.training import TrainConfig
from clip_exp.errors import CheckpointError, ConfigError
from tests.small_runs import nano, run_dir

__all__ = ["nano", "run_dir"]


def composed(*overrides: str, **keywords: Any) -> TrainConfig:
    """Return the configuration of a call of `clip_exp.train`."""
    return compose("train", [*overrides, *overrides_of("train", keywords, overrides)[0]])


# ------------------------------------------------------------------------------------------------------------ keywords


@pytest.mark.parametrize(
    ("keywords", "overrides"),
    [
        ({"model": "vit_tiny", "max_steps": 20}, ["model=vit_tiny", "max_steps=20"]),
        ({"optimizer": {"lr": 1e-3}, "loss": "sigmoid"}, ["optimizer.lr=1e-3", "loss=sigmoid"]),
        ({"optimizer": {"name": "sgd", "lr": 0.1}}, ["optimizer=sgd", "optimizer.lr=0.1"]),
        ({"model": {"name": "ViT-B/32", "dropout": 0.1}}, ["model=vit_b32", "model.dropout=0.1"]),
        ({"model": {"image": "timm"}, "model.image.name": "a"}, ["model/image=timm", "model.image.name=a"]),
        ({"data": {"augmentation": "flip"}}, ["data/augmentation=flip"]),
        ({"task": {"digits": {"templates": ["a {}."]}}}, ["task=digits", "task.digits.templates=['a {}.']"]),
        ({"task": ["digits", "digits_knn"]}, ["task=[digits,digits_knn]"]),
        ({"finetune": {"lora": {"rank": 2}}, "logger": ["csv", "wandb"]},
         ["finetune=lora", "finetune.lora.rank=2", "logger=[csv,wandb]"]),
        ({"data": {"train": "a.csv"}, "experiment": "digits"}, ["experiment=digits", "data=csv", "data.train=a.csv"]),
        ({"data": {"_target_": "mine.Pairs", "root": "x"}}, ["data=custom", "data._target_=mine.Pairs", "data.root=x"]),
        ({"compile": True, "monitor": None, "data": {}, "epochs": 2.5}, ["compile=true", "monitor=null", "epochs=2.5"]),
    ],
)  # fmt: skip
def test_keywords_are_the_overrides_that_they_stand_for(keywords: dict[str, Any], overrides: list[str]):
    assert composed(**keywords) == compose("train", overrides)


TEXTS = [
    "a,b.csv", "it's", 'say "yes"', "x=y.csv", "shards-{000..009}.tar", "[a].csv", "photo (1).csv", "1e-3", "true", "null", " a ",
    "一只猫.csv", "back\\slash", "end\\", "#1", "~/a.csv", "a:b", "'quoted'", "*.csv", "",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_passed_exactly(text: str):
    config = composed(data={"name": "csv", "train": [{"path": text or "x"}, text or "y"], "image_root": text})
    assert config.data.image_root == text
    assert isinstance(config.data.train, list)
    assert config.data.train[1] == (text or "y")
    assert config.data.train[0].path == (text or "x")  # type: ignore[union-attr]


def test_paths_numbers_of_numpy_and_tuples_are_values(tmp_path: Path):
    config = composed(
        data={"train": tmp_path / "a b.csv", "columns": ("x", "y")}, optimizer={"lr": np.float32(0.5)}, seed=np.int64(3),
        compile=np.bool_(True),
    )  # fmt: skip
    assert (config.data.train, config.data.columns) == (str(tmp_path / "a b.csv"), ["x", "y"])
    assert (config.optimizer.lr, config.seed, config.compile) == (0.5, 3, True)


def test_a_table_replaces_generated_data_but_not_an_option_of_the_user(tmp_path: Path):
    assert composed(data={"train": "a.csv"}).data.name == "csv"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("name: mine\ncaption_key: text\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /data: mine\n")
    from clip_exp.config import registry

    with registry.added(tmp_path):
        config = composed(experiment="mine", data={"train": "a.csv"})
    assert (config.data.name, config.data.caption_key) == ("mine", "text")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"optimzer": {"lr": 1}}, r"optimzer.lr does not exist: type optimizer.lr=1\."),
        ({"data": {"trian": "a.csv"}}, "did you mean 'data.train'"),
        ({"model": "vit_b23"}, "did you mean 'vit_b32'"),
        ({"max_steps": 0}, "max_steps=0 must be"),
        ({"data": {"a b": 1}}, "'data.a b' is not a key"),
        ({"optimizer": nn.Linear(1, 1)}, "optimizer has a value of type Linear: .*Objects are supported for data,"),
        ({"loss": nn.Linear}, r"loss is the class Linear: pass an object of it \(Linear"),
        ({"dataset": "a.csv"}, r"dataset='a.csv' is not an object: set a key with data=\{'train': 'a.csv'\}"),
        ({"val_dataset": Path("a")}, r"set a key with data=\{'val': "),
        ({"seed": {1, 2}}, "seed has a value of type set"),
        ({"model": (nn.Linear(1, 1),)}, "model has 1 objects: pass a pair"),
        ({"dataset": [1], "trainer": {"devices": 2, "accelerator": "cpu"}}, r"trainer.devices=2: objects \(data\) exist in this"),
    ],
)  # fmt: skip
def test_wrong_keywords_are_reported_with_the_fix(keywords: dict[str, Any], message: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        clip_exp.train(**keywords)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "keywords"), [("train", TrainKeywords), ("evaluate", EvaluateKeywords)])
def test_the_types_of_keywords_name_every_key(command: str, keywords: type):
    recipes = {"experiment", "debug"} if command == "train" else set()
    assert get_type_hints(keywords).keys() == {*SCHEMAS[command].model_fields, *recipes}


# ------------------------------------------------------------------------------------------------------------- objects

COLORS = ["red", "green", "blue", "yellow"]


class Pairs:
    """Images of one color, with its name."""

    classes = COLORS

    def __init__(self, count: int = 16) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        color = COLORS[index % len(COLORS)]
        return {"image": Image.new("RGB", (40, 40), color), "caption": f"the color {color}", "label": color}


class ImageTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.mean((2, 3)))


class TextTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(49408, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens).mean(1)


class Margin(nn.Module):
    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        logits = logit_scale * (image_features @ text_features.T - self.margin * torch.eye(len(image_features)))
        return F.cross_entropy(logits, torch.arange(len(logits)))


def scaled(image: Tensor) -> Tensor:
    return F.interpolate(image[None].float(), (32, 32))[0].to(torch.uint8)


def towers() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return ImageTower(), TextTower()


def train_objects(output_dir: Path, **changed: Any) -> clip_exp.Run:
    image, text = towers()
    given: dict[str, Any] = {
        "dataset": Pairs(), "val_dataset": Pairs(8), "transform": scaled, "loss": Margin(0.1),
        "model": {"name": "vit_nano", "image": {"_target_": image, "image_size": 32}, "text": text},
        "max_steps": 2, "global_batch_size": 8, "log_every_n_steps": 1, "data": {"num_workers": 1},
        "trainer": {"accelerator": "cpu"}, "output_dir": output_dir,
    }  # fmt: skip
    return clip_exp.train(**given | changed)


def test_objects_train_and_the_run_needs_its_towers_again(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = train_objects(tmp_path)
    assert "next:        run.evaluate(" in capsys.readouterr().out
    saved = read_run_config(run.path)
    assert saved.data.num_workers == 1
    names = [
        saved.data.target,
        saved.data.val.target,
        saved.data.transform.target,
        saved.loss.target,
        saved.model.image.target,
    ]  # type: ignore[union-attr]
    assert [name.split()[1].rpartition(".")[2] for name in names] == [
        "Pairs",
        "Pairs",
        "scaled",
        "Margin",
        "ImageTower",
    ]
    red = Image.new("RGB", (40, 40), "red")
    image, text = towers()
    features = run.load(accelerator="cpu").encode_image(red)
    torch.testing.assert_close(
        clip_exp.load(run, image=image, text=text, accelerator="cpu").encode_image(red), features
    )
    exported = run.load(accelerator="cpu").export(tmp_path / "exported", format="safetensors")
    loaded = clip_exp.load(exported, image=image, text=text, accelerator="cpu")
    torch.testing.assert_close(loaded.encode_image(red), features)
    assert run.evaluate(task="digits", accelerator="cpu", num_workers=0, output_dir=tmp_path)["digits"]["metrics"]
    assert [row["step"] for row in run.rows] == [1, 2]
    with pytest.raises(
        ConfigError, match=r"model.image._target_=<object .*ImageTower.* pass it again in Python \(image=…\)"
    ):
        clip_exp.load(run.path)
    # The modules of the caller keep their weights.
    assert torch.equal(image.linear.weight, towers()[0].linear.weight)


def test_equal_objects_give_the_same_run_and_another_state_a_new_one(tmp_path: Path):
    run = train_objects(tmp_path, max_steps=1)
    assert train_objects(tmp_path, max_steps=1) == run
    assert train_objects(tmp_path, max_steps=1, loss=Margin(0.2)) != run


def test_the_name_of_an_object_depends_on_code_and_state_and_not_on_the_process():
    names = [objects.name_of(Margin(margin), "loss") for margin in (0.1, 0.2)]
    assert names[0] != names[1]
    assert objects.name_of(lambda x: x + 1, "loss") != objects.name_of(lambda x: x + 2, "loss")
    assert objects.name_of(scaled, "loss").startswith("<object tests.test_python.scaled ")
    code = "from clip_exp.config import objects; from tests.test_python import Margin; print(objects.name_of(Margin(0.1), 'loss'))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == names[0]


class Slotted:
    __slots__ = ("value",)
    scale = 1

    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Slotted(1), Slotted(2)),
        (Slotted(np.zeros(4)), Slotted(np.ones(4))),
        (Slotted(np.array(["a", None], dtype=object)), Slotted(np.array(["b", None], dtype=object))),
        (Slotted(pd.DataFrame({"a": ["x"]})), Slotted(pd.DataFrame({"a": ["y"]}))),
        (Slotted(torch.zeros(2, dtype=torch.bfloat16)), Slotted(torch.ones(2, dtype=torch.bfloat16))),
        (Slotted({"a", "b"}), Slotted({"a", "c"})),
        (Slotted([[1], [2]]), Slotted([[1], [3]])),
        (Slotted(Image.new("RGB", (2, 2), "red")), Slotted(Image.new("RGB", (2, 2), "blue"))),
        (partial(scaled, a=1), partial(scaled, a=2)),
        (Margin(0.1).forward, Margin(0.2).forward),
    ],
)
def test_the_name_of_an_object_depends_on_state_of_any_kind(one: Any, other: Any):
    assert objects.name_of(copy.deepcopy(one), "data") == objects.name_of(one, "data") != objects.name_of(other, "data")


def test_class_attributes_and_globals_are_part_of_the_code(monkeypatch: pytest.MonkeyPatch):
    before = objects.name_of(Slotted(1), "data"), objects.name_of(Pairs(), "data")
    monkeypatch.setattr(Slotted, "scale", 2)
    monkeypatch.setitem(globals(), "COLORS", ["red"])
    assert objects.name_of(Slotted(1), "data") != before[0]
    assert objects.name_of(Pairs(), "data") != before[1]


def test_large_arrays_are_sampled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objects, "MAX_BYTES", 64)
    rows = np.zeros((100, 8))
    before = objects.name_of(Slotted(rows), "data")
    rows[0] = 1
    assert objects.name_of(Slotted(rows), "data") != before


def test_a_module_for_a_tower_that_is_no_object_is_refused(run_dir: Path):
    with pytest.raises(ConfigError, match="image=… has no effect"):
        clip_exp.load(run_dir, image=ImageTower())


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_is_a_path_with_results(tmp_path: Path):
    run = clip_exp.train(
        model="vit_nano", data={"name": "digits", "num_workers": 0}, max_steps=3, log_every_n_steps=1, trainer={"accelerator": "cpu"},
        optimizer={"lr": 1e-3}, output_dir=tmp_path,
    )  # fmt: skip
    assert os.fspath(run) == str(run) == f"{Path(run)}"
    assert clip_exp.Run(run) == run == run.path
    assert (run / "config.yaml").is_file()
    assert run.config == read_run_config(run.path)
    assert run.config.optimizer.lr == 1e-3
    assert list(run.metrics["step"]) == [row["step"] for row in run.rows] == [1, 2, 3]
    assert run.summary == {**json.loads((run / "summary.json").read_text()), **run.summary}
    assert run.checkpoints[-1] == run.best_checkpoint
    assert repr(run).startswith(f"Run('{run}', status=finished, step=3, train/loss=")
    html = run._repr_html_()
    assert "<polyline" in html
    assert "report.html" in html
    assert run.load(accelerator="cpu").encode_text("a dog").shape == (1, 64)


def test_what_a_run_does_not_have_is_said(run_dir: Path, tmp_path: Path, monkeypatch):
    run = clip_exp.Run(run_dir)
    assert run.rows == []
    with pytest.raises(CheckpointError, match=r"has no summary\.json"):
        _ = run.summary
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install pandas, or use run\.rows"):
        _ = run.metrics
    with pytest.raises(ConfigError, match="run=absent: folder not found"):
        clip_exp.Run("absent")
    with pytest.raises(CheckpointError, match="is not a run folder"):
        clip_exp.Run(tmp_path)
