"""Tests that the package works without its checkout, that help needs no torch, and of import boundaries."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def test_the_wheel_carries_conf_and_its_console_script_composes(repository: Path, tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(repository),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    wheel = next(tmp_path.glob("clip_exp-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "clip_exp/conf/model/vit_b32.yaml" in names
    assert "clip_exp/reports/templates/report.css" in names
    assert "clip_exp/export/templates/card.md" in names
    assert not any(name.startswith(("tests/", "conf/")) for name in names)
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "site" / "bin" / "clip-exp"), "train", "model=vit_b32", "--cfg", "job"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "name: vit_b32" in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["--version"]])
def test_help_is_printed(arguments: list[str], tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "clip_exp", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    assert ("usage" if arguments == ["--help"] else "0." if arguments == ["--version"] else "vit_b32") in result.stdout


def test_an_unknown_command_is_reported_with_the_nearest(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "clip_exp", "trian"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert "did you mean 'train'" in result.stderr


def test_building_a_model_loads_neither_configuration_files_nor_weights() -> None:
    unwanted = (
        "omegaconf",
        "yaml",
        "hydra",
        "pytorch_lightning",
        "clip_exp.weights",
        "clip_exp.data",
        "clip_exp.training",
    )
    code = (
        "import sys; import clip_exp.losses, clip_exp.models, clip_exp.models.clip\n"
        f"print([name for name in {unwanted} if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
