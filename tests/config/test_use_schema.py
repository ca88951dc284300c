"""Tests of the configurations of predict, rank, search and export."""

import re
from pathlib import Path

import pytest

from clip_exp.config.commands import SCHEMAS, ExportFormat
from clip_exp.config.compose import compose
from tests.conftest import DOOR, Run

COMMANDS = ("predict", "rank", "search")


@pytest.mark.parametrize("command", [*COMMANDS, "embed", "export", "convert", "models"])
def test_the_file_and_the_dataclass_have_the_same_defaults(command: str) -> None:
    assert compose(command, []) == SCHEMAS[command]()


@pytest.mark.parametrize("use", COMMANDS)
def test_help_shows_the_usage_and_lists_the_keys(use: str, command: Run, tmp_path: Path) -> None:
    done = command(DOOR, use, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"clip-exp {use} ")
    for key in ("run", "ckpt", "pretrained", "images", "format", "output", "frames"):
        assert re.search(rf"^{key}: \S+ +# \w", done.stdout, re.M), key


def test_help_of_check_data_lists_its_keys_and_what_it_writes(command: Run, tmp_path: Path) -> None:
    done = command(DOOR, "check-data", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("clip-exp check-data ")
    for key in ("max_images", "max_leakage", "decode", "global_batch_size", "format", "data", "model"):
        assert f"\n{key}:" in done.stdout
    assert "bad_samples.csv" in done.stdout


@pytest.mark.parametrize(
    ("use", "keys"),
    [
        (
            "embed",
            ("run", "images", "table", "caption_key", "output", "format", "dtype", "similarity", "rows_per_file"),
        ),
        ("make-shards", ("output", "format", "shard_size", "num_workers", "data")),
    ],
)
def test_help_of_what_writes_folders_lists_its_keys(use: str, keys: list[str], command: Run, tmp_path: Path) -> None:
    done = command(DOOR, use, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"clip-exp {use} ")
    for key in keys:
        assert f"\n{key}:" in done.stdout
    assert "The same command continues after an interruption." in done.stdout


def test_help_of_export_shows_how_to_load_each_format(command: Run, tmp_path: Path) -> None:
    done = command(DOOR, "export", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("clip-exp export run=DIR format=open_clip output=DIR")
    for key in ("run", "ckpt", "pretrained", "ema", "format", "output", "overwrite"):
        assert f"\n{key}: " in done.stdout
    for chosen in ExportFormat:
        assert f"\n  {chosen} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "image=a.jpg"], "did you mean 'images'"),
        (["predict", "+foo=1"], "foo does not exist"),
        (["rank", "format=xml"], "table, json, csv"),
        (["search", "top_k=many"], "top_k=many must be an integer."),
        *(
            (
                [command, f"{key}=3"],
                f"{key} does not exist: type top_k=3.",
            )
            for command, key in (("predict", "k"), ("rank", "keep"), ("search", "top"))
        ),
        *(
            ([command, "on_bad_image=replace"], "on_bad_image=replace must be one of error, skip.")
            for command in ("evaluate", *COMMANDS)
        ),
        (["predict", "model=vit_b23"], "did you mean 'vit_b32'"),
    ],
)
def test_a_typo_ends_with_code_2_and_a_hint(arguments: list[str], message: str, refused: Run, tmp_path: Path) -> None:
    done = refused(DOOR, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
