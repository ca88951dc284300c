"""Rows with several captions: lists, several caption columns, and texts with a caption per line.

A row with several captions becomes as many rows of the same image. Empty and blank ones are left out.
"""

import ast
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_exp.data.tables.columns import (
    bool_array,
    bool_numpy,
    int32_numpy,
    is_list,
    string_array,
    string_buffers,
    trimmed,
)
from clip_exp.data.tables.reader import BadRows, BadValue, RowBlock, TableOptions, is_caption, text_of

COLUMN = "caption_columns"  # name of the numbers that say from which of several columns a caption is


def list_array(values: Sequence[str | list[str]]) -> pa.Array:
    """Convert captions to an array of strings, or of lists of strings if any of them is a list."""
    if not any(isinstance(value, list) for value in values):
        return string_array(values)  # type: ignore[arg-type]  # no value is a list
    lists = [value if isinstance(value, list) else [value] for value in values]
    offsets = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(each) for each in lists], out=offsets[1:])
    texts = string_array([text for each in lists for text in each])
    ends = pa.Array.from_buffers(pa.int64(), len(offsets), [None, pa.py_buffer(offsets)])
    return pa.LargeListArray.from_arrays(ends, texts)


def expand_captions(block: RowBlock, options: TableOptions, bad: BadRows) -> RowBlock:
    """Return a row per caption, whose columns and numbers are those of its row.

    Args:
        block: rows with one or several caption columns, of strings or lists of strings.
        options: options of the table.
        bad: record of the bad rows, to which rows without a caption are added if they might have several.
    """
    settings = [setting for setting in block.columns if is_caption(setting)]
    plain = not (options.caption_list or options.caption_lines or isinstance(options.caption_key, tuple))
    if not len(block) or not settings or (plain and not any(is_list(block.columns[each].type) for each in settings)):
        return block
    good = np.ones(len(block), dtype=bool)
    texts, rows, columns = [], [], []
    for column, setting in enumerate(settings):
        captions, lengths = _split(block, setting, options, good, bad)
        texts.append(captions)
        rows.append(np.repeat(np.arange(len(block)), lengths))
        columns.append(np.full(len(captions), column, dtype=np.int8))
    captions, row, column_of = pa.concat_arrays(texts), np.concatenate(rows), np.concatenate(columns)
    starts, _ = string_buffers(trimmed(captions))
    chosen = np.flatnonzero((np.diff(starts) > 0) & good[row])
    chosen = chosen[np.argsort(row[chosen], kind="stable")]
    for missing in np.flatnonzero(good & (np.bincount(row[chosen], minlength=len(block)) == 0)).tolist():
        bad.add(int(block.lines[missing]), "no caption", f"every caption is empty ({_named(options)})")
    others = {name: array for name, array in block.columns.items() if not is_caption(name)}
    expanded = RowBlock(others, block.numbers).take(row[chosen])
    places = pa.Array.from_buffers(pa.int64(), len(chosen), [None, pa.py_buffer(chosen.astype(np.int64))])
    numbers = expanded.numbers
    if isinstance(options.caption_key, tuple):
        numbers = {**numbers, COLUMN: column_of[chosen]}
    return RowBlock({**expanded.columns, "caption_key": captions.take(places)}, numbers)


def _named(options: TableOptions) -> str:
    names = options.caption_key if isinstance(options.caption_key, tuple) else (options.caption_key,)
    return f"data.caption_key={', '.join(map(str, names))}"


def _split(
    block: RowBlock, setting: str, options: TableOptions, good: np.ndarray, bad: BadRows
) -> tuple[pa.LargeStringArray, np.ndarray]:
    """Return all captions of a column in order, and their number in each row; mark rows that are bad in `good`."""
    array = block.columns[setting]
    if is_list(array.type):
        texts = pc.cast(pc.list_flatten(array), pa.large_string())
        lengths = int32_numpy(pc.cast(pc.list_value_length(array), pa.int32())).astype(np.int64)
    else:
        texts, lengths = array, np.ones(len(array), dtype=np.int64)
    for split in (parse_list if options.caption_list else None, _lines if options.caption_lines else None):
        if split is None:
            continue
        name = options.requested[setting]
        found: list[list[str]] = []
        row_of = np.repeat(np.arange(len(block)), lengths)
        for row, text in zip(row_of.tolist(), texts.to_pylist(), strict=True):
            try:
                found.append([text_of(setting, name, each) for each in split(text)])
            except (BadValue, ValueError) as error:
                found.append([])
                if good[row]:
                    good[row] = False
                    detail = f"the caption {name!r} is not a list of texts (data.caption_list): {_start(text)}"
                    bad.add(
                        int(block.lines[row]), "not a list", error.detail if isinstance(error, BadValue) else detail
                    )
        lengths = np.bincount(row_of, [len(each) for each in found], minlength=len(block)).astype(np.int64)
        texts = string_array([text for each in found for text in each])
    return texts, lengths


def _start(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _lines(text: str) -> list[str]:
    return text.splitlines()


def parse_list(text: str) -> list[str]:
    """Return the texts of a list written as in JSON or Python, or a text that is not written as a list.

    Raises: ValueError if it starts as a list and is none.
    """
    written = text.strip()
    if (written[:1], written[-1:]) not in (("[", "]"), ("(", ")")):
        return [text]
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(written)
        except (SyntaxError, MemoryError, RecursionError, TypeError) as error:
            raise ValueError("not a list") from error
    if not isinstance(value, list | tuple) or not all(isinstance(each, str | None) for each in value):
        raise ValueError("not a list of texts")
    return [each for each in value if each is not None]


def count_lists(column: pa.LargeStringArray) -> int:
    """Return the number of texts that look like a list of texts."""
    starts, data = string_buffers(column)
    if not len(data):
        return 0
    # Only few texts start so, and matching all would take a second for ten million.
    first = data[np.minimum(starts[:-1], len(data) - 1)]
    column = column.filter(bool_array(np.isin(first, np.frombuffer(b"[( \t\n", np.uint8))))
    quoted = pc.match_substring_regex(column, r"""^\s*[\[(]\s*['"].*['"]\s*,?\s*[\])]\s*$""")
    return int(np.count_nonzero(bool_numpy(quoted)))


def count_lines(column: pa.LargeStringArray) -> int:
    """Return the number of texts with a line break between other characters."""
    starts, data = string_buffers(column)
    if not len(data) or not (data[starts[0] : starts[-1]] == ord("\n")).any():
        return 0
    return int(np.count_nonzero(bool_numpy(pc.match_substring(trimmed(column), "\n"))))
