"""Third-party text in CSV files is text to a spreadsheet, and the same text when it is read back."""

import csv
import io

import pytest

from clip_exp.spreadsheets import TextWriter, original

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
def test_a_formula_gets_an_apostrophe_which_is_taken_off_again(text: str) -> None:
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
def test_other_text_is_written_as_it_is(text: str) -> None:
    file = io.StringIO(newline="")
    TextWriter(file).writerow([text, "x"])
    file.seek(0)
    assert next(csv.reader(file))[0] == text
    assert original(text) == text
