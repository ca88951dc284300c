"""Values of the further columns for the loss (`data.columns`): texts, or numbers that become float32 features.

A table stores each value as text: texts verbatim, numbers and lists of numbers as JSON.
"""

import json
from typing import Any

import numpy as np

Shape = tuple[int, ...] | None  # shape of the numbers in each row of a column; None for a column of texts


def numbers_of(value: Any) -> np.ndarray:
    """Convert a number or a list of numbers, possibly nested, to float32.

    Raises: ValueError with a phrase for the value.
    """
    try:
        array = np.array(value)
    except ValueError as error:
        raise ValueError("a list of unequal lists") from error
    if array.dtype.kind not in "iuf":
        raise ValueError("a list of other values than numbers")
    if not array.size:
        raise ValueError("an empty list")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("NaN or a number that is too large for float32")
    return array


def to_json(numbers: np.ndarray) -> str:
    """Return float32 numbers as JSON, from which `parse_numbers` returns the same numbers."""
    if numbers.ndim > 1:
        return f"[{','.join(map(to_json, numbers))}]"
    # Nine digits distinguish all float32 numbers, also after parsing as float64. JSON itself would write up to 17.
    values = [f"{value:.9g}" for value in np.atleast_1d(numbers).tolist()]
    return f"[{','.join(values)}]" if numbers.ndim else values[0]


def parse_numbers(text: str) -> np.ndarray | None:
    """Return the numbers of a stored value, float32; None for any other text."""
    if not text.lstrip().startswith(("[", "-", *"0123456789")):  # without parsing every text
        return None
    try:
        return numbers_of(json.loads(text, parse_int=float))  # -0 as an integer would lose its sign
    except (ValueError, RecursionError):
        return None


def shape_of(text: str) -> Shape:
    """Return the shape of the numbers of a stored value; None for a text."""
    numbers = parse_numbers(text)
    return None if numbers is None else numbers.shape


def describe(shape: Shape) -> str:
    """Return a phrase for the values of a column."""
    if shape is None:
        return "text"
    return f"numbers of shape {list(shape)}" if shape else "a number"
