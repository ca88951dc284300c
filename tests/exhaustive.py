"""Which values of a parametrized test hold its promise in `make test`, and which repeat it in `make test-all` only."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def repeat_beyond(kept: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Return `values` as parameters, those that are not among `kept` marked as exhaustive."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.exhaustive) for value in values]
