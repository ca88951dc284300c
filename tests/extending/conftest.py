"""Each test starts without the user's folders and modules of the tests before it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_exp.config.registry import FOLDERS
from tests.extending.common import EXAMPLES


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget what commands in this process add: folders with options, folders to import from, and modules in them."""
    monkeypatch.setenv(FOLDERS, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    users = (EXAMPLES, tmp_path_factory.getbasetemp())
    for name, module in [*sys.modules.items()]:
        file = getattr(module, "__file__", None)
        if file is not None and any(Path(file).is_relative_to(folder) for folder in users):
            del sys.modules[name]
