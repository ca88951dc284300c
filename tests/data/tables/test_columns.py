"""Blanks are trimmed and counted in columns of strings."""

import pyarrow as pa

from clip_exp.data.tables.columns import BLANKS, count_blank, trimmed


def test_blanks_are_what_python_holds_for_them_and_what_shows_nothing():
    assert not [chr(code) for code in range(0x110000) if chr(code).isspace() and chr(code) not in BLANKS]
    column = pa.array(["", BLANKS, f"{BLANKS}a b{BLANKS}", "\x00"], pa.large_string())
    assert trimmed(column).to_pylist() == ["", "", "a b", "\x00"]
    assert count_blank(column) == 2
    assert count_blank(column[:0]) == 0
