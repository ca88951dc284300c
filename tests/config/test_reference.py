"""Tests of docs/reference/: the pages are generated from the schema, and the JSON Schemas accept what the commands accept."""

import re
from collections.abc import Iterator
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any

import pytest
import yaml

from clip_exp.config.base import plain
from clip_exp.config.commands import SCHEMAS
from clip_exp.config.compose import compose
from clip_exp.config.describe import keys_of
from clip_exp.config.json_schema import json_schema
from clip_exp.config.reference import COMMANDS, PAGES, files, write
from tests.conftest import REPOSITORY

REFERENCE = REPOSITORY / "docs" / "reference"
RECIPES = sorted(path for group in ("experiment", "debug") for path in (REPOSITORY / "conf" / group).glob("*.yaml"))
TRAIN = json_schema(SCHEMAS["train"])
TYPES = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": dict}
LIMITS = {"minimum": ge, "exclusiveMinimum": gt, "maximum": le, "exclusiveMaximum": lt}


def problems(schema: Any, value: Any, root: dict[str, Any], at: str = "") -> Iterator[str]:
    """Yield where a value breaks a JSON Schema; for the keywords that clip_exp writes, others are an error."""
    for keyword, of in ({} if schema is True else schema).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        match keyword:
            case "$ref":
                yield from problems(root["$defs"][of.removeprefix("#/$defs/")], value, root, at)
            case "type":
                names = [of] if isinstance(of, str) else of
                fits = {"number": number, "integer": number and int(value) == value}
                if not any(fits[name] if name in fits else isinstance(value, TYPES[name]) for name in names):
                    yield f"{at} is not {of}"
            case "enum" | "const":
                if value not in (of if keyword == "enum" else [of]):
                    yield f"{at} is not {of}"
            case "minimum" | "exclusiveMinimum" | "maximum" | "exclusiveMaximum":
                if number and not LIMITS[keyword](value, of):
                    yield f"{at} is out of range"
            case "minItems" | "minLength":
                if isinstance(value, list if keyword == "minItems" else str) and len(value) < of:
                    yield f"{at} is too short"
            case "pattern":
                if isinstance(value, str) and not re.search(of, value):
                    yield f"{at} does not match"
            case "anyOf":
                if all(list(problems(each, value, root, at)) for each in of):
                    yield f"{at} fits no alternative"
            case "not":
                if not list(problems(of, value, root, at)):
                    yield f"{at} is excluded"
            case "required":
                yield from (f"{at}.{key} is missing" for key in of if isinstance(value, dict) and key not in value)
            case "items":
                for i, item in enumerate(value if isinstance(value, list) else ()):
                    yield from problems(of, item, root, f"{at}[{i}]")
            case "properties":
                for key in of.keys() & value.keys() if isinstance(value, dict) else ():
                    yield from problems(of[key], value[key], root, f"{at}.{key}")
            case "additionalProperties":
                others = value.keys() - schema.get("properties", {}).keys() if isinstance(value, dict) else ()
                for key in others:
                    yield from (
                        [f"{at}.{key} is unknown"] if of is False else problems(of, value[key], root, f"{at}.{key}")
                    )
            case "$schema" | "$defs" | "description" | "default":
                pass
            case _:
                raise NotImplementedError(keyword)


def test_the_committed_files_are_generated_from_the_schema() -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in REFERENCE.iterdir()}
    generated = files()
    assert committed.keys() == generated.keys(), "run make reference"
    assert [name for name in generated if committed[name] != generated[name]] == [], "run make reference"


def test_the_generator_writes_them_to_the_given_folder(tmp_path: Path) -> None:
    write(tmp_path / "reference")
    assert {path.name for path in (tmp_path / "reference").iterdir()} == files().keys()


def test_every_key_of_every_command_is_in_a_page() -> None:
    text = "".join(files().values())
    for command in SCHEMAS:
        for key in keys_of(SCHEMAS[command]):
            assert f"| `{key.name.rpartition('.')[2]}` | " in text, key.name
    assert {*PAGES, *COMMANDS} - {"model", "data", "tasks"} == SCHEMAS.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_the_schema_for_editors(path: Path) -> None:
    assert list(problems(TRAIN, yaml.safe_load(path.read_text(encoding="utf-8")), TRAIN)) == []


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("train", []),
        ("train", ["model=vit_b16", "model/image=timm", "model.image.name=resnet50", "loss=sigmoid", "finetune=lora"]),
        (
            "train",
            ["strategy=deepspeed_stage_2", "optimizer=lion", "logger=wandb", "data=csv", "data.train=[a.csv,b.csv]"],
        ),
        ("evaluate", ["task=[imagenet,knn,retrieval]", "task.imagenet.root=a", "task.retrieval.table=b"]),
    ],
)
def test_a_complete_configuration_fits(command: str, overrides: list[str]) -> None:
    schema = json_schema(SCHEMAS[command])
    assert list(problems(schema, plain(compose(command, overrides)), schema)) == []


@pytest.mark.parametrize(
    "part",
    [
        {"optimizer": {"lr": "${oc.env:LR}"}},
        {"optimizer": {"_target_": "mine.Optimizer", "lr": 1e-3, "rho": 2}},
        {"loss": {"_target_": "mine.Loss", "gamma": 2}},
        {"data": {"train": [{"path": "a.csv", "weight": 3}], "val": {"_target_": "mine.Pairs", "root": "x"}}},
        {"name": 2026, "defaults": [{"override /model": "vit_b32"}]},
        {"scheduler": {"_target_": "mine.schedule", "power": 2}},
    ],
)
def test_parts_of_a_configuration_fit(part: dict[str, Any]) -> None:
    assert list(problems(TRAIN, part, TRAIN)) == []


@pytest.mark.parametrize(
    "part",
    [
        {"nmae": "x"},
        {"max_steps": 0},
        {"max_steps": "many"},
        {"precision": "fp8"},
        {"optimizer": {"lrr": 1}},
        {"optimizer": {"lr": -1}},
        {"optimizer": {"_target_": "torch.optim.AdamW", "lrr": 1}},
        {"model": {"image": {"patch_sise": 8}}},
        {"model": {"dropout": 1}},
        {"loss": {"name": "sotfmax"}},
        {"task": {"mine": {"kind": "knn", "kk": 3}}},
        {"data": {"augmentation": {"scale": 3}}},
    ],
)
def test_a_mistake_does_not_fit(part: dict[str, Any]) -> None:
    assert list(problems(TRAIN, part, TRAIN)) != []


def test_editors_are_shown_defaults_and_meanings() -> None:
    key = TRAIN["properties"]["global_batch_size"]
    assert key["default"] == 128
    assert key["description"] == "image-text pairs per optimizer step, over all devices"
    assert "default" not in TRAIN["$defs"]["ModelConfig"]["properties"]["embed_dim"]
