"""Tests that the scripts in benchmarks/ import existing code."""

import importlib
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "benchmarks"
OF_THE_EXTRA = "webdataset"  # of `.[bench]`: the peer's trainer


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    try:
        importlib.import_module(path.stem)
    except ModuleNotFoundError as error:
        if error.name != OF_THE_EXTRA:
            raise
        pytest.skip(f"{error.name} is not installed")
    finally:
        for benchmark in FOLDER.glob("*.py"):
            sys.modules.pop(benchmark.stem, None)
