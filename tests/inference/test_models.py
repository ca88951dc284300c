"""`clip-exp models` lists models and weights, with numbers as in open_clip."""

import csv
import io
import json
import re

import open_clip
import pytest
import torch

from clip_exp.config.commands import ModelsConfig, OutputFormat
from clip_exp.config.files import conf_dir
from clip_exp.inference.models import models
from tests.conftest import DOOR, Run


def listed(capsys, **values) -> dict:
    assert models(ModelsConfig(format=OutputFormat.json, **values)) == 0
    return json.loads(capsys.readouterr().out)


def test_every_model_of_conf_is_listed_with_the_parameters_that_its_file_names(capsys) -> None:
    found = {model["name"]: model for model in listed(capsys)["models"]}
    files = {path.stem: path.read_text() for path in (conf_dir() / "model").glob("*.yaml")}
    assert found.keys() == files.keys() - {"open_clip"}
    for name, text in files.items():
        if said := re.search(r"([\d,]+) parameters", text):
            assert found[name]["parameters"] == int(said[1].replace(",", "")), name
    for model in found.values():
        assert model["tags"] == open_clip.list_pretrained_tags_by_model(model["open_clip_name"] or "")


@pytest.mark.parametrize("name", ["vit_b32", "rn50"])
def test_parameters_are_those_that_open_clip_counts(capsys, name: str) -> None:
    model = listed(capsys, name=name)
    with torch.device("meta"):
        theirs = open_clip.create_model(model["open_clip_name"], device="meta")
    assert model["parameters"] == sum(p.numel() for p in theirs.parameters())


def test_one_model_is_listed_with_its_published_weights(capsys) -> None:
    model = listed(capsys, name="ViT-B/32")
    assert model["name"] == "vit_b32"
    weights = {one["tag"]: one for one in model["weights"]}
    assert list(weights) == model["tags"]
    assert weights["openai"]["activation"] == "quick_gelu"
    assert weights["laion2b_s34b_b79k"]["activation"] == "gelu"
    assert weights["openai"]["hub"] == "timm/vit_base_patch32_clip_224.openai"
    assert weights["openai"]["url"].endswith("ViT-B-32.pt")


def test_all_adds_open_clips_other_configurations(capsys) -> None:
    names = {model["open_clip_name"] for model in listed(capsys, all=True)["models"]}
    ours = {model["open_clip_name"] for model in listed(capsys)["models"]}
    images = {name for name in open_clip.list_models() if "vision_cfg" in open_clip.get_model_config(name)}
    assert ours - {None} <= images
    assert names - {None} == {name for name in images if name in ours or name.removesuffix("-quickgelu") not in ours}


def test_the_list_is_a_table_or_csv_too(capsys) -> None:
    assert models(ModelsConfig(format=OutputFormat.csv)) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["name"]: row["image_size"] for row in rows}["rn50x4"] == "288"
    assert models(ModelsConfig(name="vit_b32")) == 0
    assert "laion2b_s34b_b79k" in capsys.readouterr().out


def test_a_typo_is_reported_with_the_nearest_name(tmp_path, command: Run) -> None:
    done = command(DOOR, "models", "name=vit_b23", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'vit_b32'" in done.stderr
