"""Tests that third-party text in CSV files is not a formula in a spreadsheet, and is unchanged when it is read back."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from clip_exp.checks.scan import bad_samples_file
from clip_exp.config.commands import OutputConfig, OutputFormat
from clip_exp.inference.outputs import Report, write
from clip_exp.reports.classification_report import as_csv
from clip_exp.storage import TextWriter, original
from tests.reports.examples import classified, noise_files

FORMULAS = [
    '=HYPERLINK("http://x","y")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "\uff1d1+1",
    "@a\r=1",
]


@pytest.mark.parametrize("text", [*FORMULAS, *(f"'{text}" for text in FORMULAS), "''=1"])
def test_a_formula_gets_an_apostrophe_that_is_removed_again(text: str) -> None:
    file = io.StringIO(newline="")
    TextWriter(file).writerows([["head", "number"], [text, -1.5]])
    file.seek(0)
    _, (cell, number) = csv.reader(file)
    assert cell == f"'{text}"
    assert original(cell) == text
    assert number == "-1.5"


@pytest.mark.parametrize(
    "text", ["a.jpg", "/data/a=b.jpg", "img/-1.jpg", "'quoted'", "", "'", "it's -1", "一只猫.jpg", "a\r=1", "a\n=1"]
)
def test_other_text_is_written_unchanged(text: str) -> None:
    file = io.StringIO(newline="")
    TextWriter(file).writerow([text, "x"])
    file.seek(0)
    assert next(csv.reader(file))[0] == text
    assert original(text) == text


def test_every_csv_of_third_party_text_is_written_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(Report(("text", "cosine"), [("=1", -0.5)], {}), OutputConfig(format=OutputFormat.csv))
    with bad_samples_file(tmp_path / "bad_samples.csv") as writer:
        writer.writerow(["=1", "no such file", "train", "pairs.csv, line 2"])
    details = replace(
        classified(noise_files(tmp_path / "images", 8), 2, 8), class_names=["=1", "+2"], keys=["-1", "@2"]
    )
    cells = [
        *list(csv.reader(io.StringIO(capsys.readouterr().out)))[1],
        *list(csv.reader(io.StringIO((tmp_path / "bad_samples.csv").read_text())))[1],
        *(cell for row in csv.reader(io.StringIO(as_csv(details))) for cell in row),
    ]
    formulas = [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert formulas == ["-0.5"]  # a number
    assert cells.count("'=1") >= 3
    assert {"'-1", "'@2", "'+2"} <= set(cells)
