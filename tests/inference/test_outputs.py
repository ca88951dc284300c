"""Names of output files: the ending is that of the content, or the command is refused before it does anything."""

from pathlib import Path

import pytest

from clip_exp.config.commands import SCHEMAS, OutputConfig
from tests.conftest import DOOR, Run

TABLES = [name for name, schema in SCHEMAS.items() if issubclass(schema, OutputConfig)]


@pytest.mark.parametrize("command", TABLES)
def test_a_file_with_an_unknown_ending_is_refused_with_the_endings_that_exist(
    command: str, refused: Run, tmp_path: Path
) -> None:
    for name in ("features.npy", "result.xlsx", "result"):
        done = refused(DOOR, command, f"output={name}", cwd=tmp_path)
        assert done.returncode == 2
        assert ".csv (csv) or .json (json) or .txt (table)" in done.stderr
        assert ("clip-exp embed" in done.stderr) == (name == "features.npy")
    assert list(tmp_path.iterdir()) == []


def test_an_ending_of_another_format_is_refused(refused: Run, tmp_path: Path) -> None:
    done = refused(DOOR, "models", "output=models.csv", "format=json", cwd=tmp_path)
    assert done.returncode == 2
    assert "output=models.csv has the ending of csv, but format=json: leave out one of them." in done.stderr


def test_every_command_with_an_output_file_checks_its_ending() -> None:
    with_output = {name for name, schema in SCHEMAS.items() if "output" in schema.model_fields}
    of_folders = {"export", "embed", "make-shards"}
    checks_itself = {"convert"}  # tests/weights/test_convert.py
    assert with_output == {*TABLES, *of_folders, *checks_itself}


def test_a_table_is_written_to_txt(command: Run, tmp_path: Path) -> None:
    done = command(DOOR, "models", "output=models.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vit_b32" in (tmp_path / "models.txt").read_text(encoding="utf-8")
