import pickle

import numpy as np
import pyarrow as pa
import pytest

from clip_exp.data.tables.filters import parse
from clip_exp.errors import ConfigError

LINES = np.arange(9)
COLUMNS = {
    "width": pa.array(["256", " 12 ", "+3.5", "many", "", None, "-.5", "1.", "2e2"], pa.large_string()),
    "n": pa.array([1, 2, None, 4, 5, 6, 7, 8, 9]),
    "score": pa.array([1.0, float("nan"), 3, 4, 5, 6, 7.5, 8, 9]),
    "title": pa.array(["a dog", None, "Dog", "", "dogs", "it's", "y", "true", "0"]),
    "tags": pa.array([["dog"], [], None, ["x", "dog"], ["d"], ["dog"], [], [], []]),
    "sizes": pa.array([[1, 2], [], None, [3], [4], [], [], [], [2]]),
    "is safe": pa.array([True, False, None] * 3),
    "kind": pa.array(["a", "b", None] * 3).dictionary_encode(),
    "empty": pa.nulls(9),
    "id": pa.array([2**53, 2**53 + 1, 2**63 - 1, *range(6)], pa.uint64()),
    "word": pa.array([str(2**53), f" +{2**53 + 1}", "many", None, *"12345"]),
    "half": pa.array([str(2**53), str(2**53 + 1), "0.5", *"123456"]),
}
MATCHES = {
    # numbers; a text is one where it is written like one
    "n > 4": "5 6 7 8 9", "4 < n": "5 6 7 8 9", "2 < n <= 6": "4 5 6", "n == 4.0": "4", "n != 4": "1 2 5 6 7 8 9",
    "n in [1, 9, 'x']": "1 9", "n not in (1, 2, 4)": "5 6 7 8 9", "n == 4 or n == 6": "4 6", "n > -1e999": "1 2 4 5 6 7 8 9",
    "n < 99999999999999999999": "1 2 4 5 6 7 8 9", "score != 3": "1 4 5 6 7 8 9", "score >= n": "1 4 5 6 7 8 9",
    "width >= 3": "1 2 3 9", "width == 1": "8", "width < 0": "7", "width == '1.'": "8", "n == '4'": "4",
    # identifiers, which float64 would mix up
    "id == 9007199254740993": "2", "id > 9007199254740992": "2 3", "word == 9007199254740993": "2", "score < 9007199254740993": "1 3 4 5 6 7 8 9",
    "half == 9007199254740993": "1 2", "word > id": "", "id in [9007199254740993, 0.5]": "2",
    # what is missing or no number matches nothing, nor does its negation
    "not width >= 3": "7 8", "not score > 3": "1 3", "empty > 1 or n == 1": "1", "not (empty > 1 or n == 1)": "", "not empty == 'x'": "",
    # text
    "'dog' in title": "1 5", "'dog' not in title": "3 4 6 7 8 9", "title == \"it's\"": "6", "title in ['dogs', '']": "4 5", "title > 'a'": "1 5 6 7 8",
    "len(title) > 3": "1 5 6 8", "len(title) == 0": "4", "kind == 'b'": "2 5 8", "kind < 'b'": "1 4 7", "'b' in kind": "2 5 8",
    # lists
    "'dog' in tags": "1 4 6", "not 'dog' in tags": "2 5 7 8 9", "2 in sizes": "1 9", "len(tags) == 2": "4",
    # truth values, and names that Python would not have
    "`is safe` == True": "1 4 7", "`is safe` != True and n > 2": "5 8", "title == True": "8", "title == False": "9", "'`x`' in title": "",
    # columns with each other: in order as numbers
    "width > n": "1 2 9", "title == kind": "",
}  # fmt: skip


@pytest.mark.parametrize("condition", MATCHES)
def test_rows_match_as_the_condition_reads(condition):
    found = parse(condition)
    extra = {name: COLUMNS[name] for name in found.names}
    mask = found.select(extra, LINES)[0]
    assert (mask.dtype, mask.shape) == (np.bool_, (9,))
    assert " ".join(str(row + 1) for row in np.flatnonzero(mask)) == MATCHES[condition]
    sliced = {name: column.slice(2, 5) for name, column in extra.items()}
    assert parse(condition).select(sliced, LINES[2:7])[0].tolist() == mask[2:7].tolist()
    assert pickle.loads(pickle.dumps(found)).select(extra, LINES)[0].tolist() == mask.tolist()


def test_values_that_cannot_be_compared_are_counted_and_missing_ones_apart():
    written = [" 256", "1,024", "512 px", "", None, "nan", "3e2", " ", "x" * 90]
    columns = {
        "width": pa.array(written, pa.large_string()),
        "n": COLUMNS["n"],
        "score": COLUMNS["score"],
        "ok": pa.array(["true", "yes", "0", *[""] * 6], pa.string()).dictionary_encode(),
        "tags": COLUMNS["tags"],
    }

    def found(condition: str, start: int = 0) -> dict[str, tuple[object, ...]]:
        condition_, rest = parse(condition), {name: column.slice(start) for name, column in columns.items()}
        return {each.column: tuple(vars(each).values())[1:] for each in condition_.select(rest, LINES[start:] + 2)[1]}

    assert found("256 <= width and (n > 3 or width < 1000)") == {
        "width": ("numbers", 4, 3, "1,024", 3),
        "n": ("numbers", 0, 1, "", 0),
    }
    assert found("width > 1", start=5) == {"width": ("numbers", 2, 1, "nan", 7)}
    assert found("width > 1", start=8)["width"][3] == "x" * 40 + "…"
    assert found("score > 1 and ok == True and tags == 'dog'") == {
        "score": ("numbers", 0, 1, "", 0),
        "ok": ("truth values", 1, 6, "yes", 3),
        "tags": ("text", 8, 1, "['dog']", 2),
    }
    assert found("width == '' and len(width) > 3 and 'x' in width") == {"width": ("text", 0, 1, "", 0)}


def test_the_names_are_those_of_the_columns():
    assert parse("len(a) > 1 and `b c` in ['x'] or not 'd' in e").names == {"a", "b c", "e"}


NOT_UNDERSTOOD = {
    "width": "compare it, for example with `== True`", "not width": "compare it", "width & n > 3": "join comparisons with `and`, `or`",
    "width > n + 1": r"'n \+ 1' is not supported", "width = 3": "is not a valid condition", "len(width, n) > 1": "the only function is len",
    "open('x') > 1": r"open\('x'\)", "__import__('os').system('x') == 1": "not supported", "1 < 2": "one side must be a column",
    "x is None": "use ==", "x == None": "None", "'a' in 'b'": "'text' in column", "x in y": "'text' in column", "x in []": "'text' in column",
    "x[0] == 1": r"x\[0\]", "x.y == 1": r"x\.y", "`a b` + 1 > 2": r"`a b` \+ 1", "-'x' == y": "not supported", "f'{x}' == y": "not supported",
    "x == b'y'": "not supported", "": "is not a valid condition", "lambda: 1": "not supported", "x == 1j": "1j", "(x := 3) > 1": "not supported",
    "x > 1\0": "is not a valid condition", "`a": "is not a valid condition", "(" * 500 + "x>1" + ")" * 500: "is not a valid condition", "not " * 5000 + "x>1": "is not a valid condition",
    "x == '\\ud800'": "not supported", "x > 1; import os": "is not a valid condition", "x if y > 1 else z": "not supported", "[x for x in y]": "not supported",
}  # fmt: skip


@pytest.mark.parametrize("condition", NOT_UNDERSTOOD, ids=lambda condition: condition[:30].replace("\0", ""))
def test_what_is_not_understood_is_named(condition):
    with pytest.raises(ConfigError, match=NOT_UNDERSTOOD[condition]):
        parse(condition)
