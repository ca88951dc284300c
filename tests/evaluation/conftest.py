from pathlib import Path

import pytest

from tests.small_runs import nano, run_dir, write_image

__all__ = ["nano", "run_dir"]


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Return a folder of three classes with four images each, and with other files and folders."""
    root = tmp_path / "images"
    for position, name in enumerate(["tabby_cat", "dog", "Zebra"]):
        for number in range(4):
            write_image(root / name / f"{number}.png", 10 * position + number)
    (root / "dog" / "notes.txt").write_text("no image")
    (root / "dog" / ".hidden.png").write_text("no image")
    (root / ".cache").mkdir()
    return root
