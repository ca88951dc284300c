"""Tests that the package works without its checkout, that help needs no torch, and of import boundaries."""

import os
import pydoc
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

import clip_exp
from clip_exp import __version__


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
    assert "clip_exp/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
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


def test_the_metadata_of_the_package_are_complete(repository: Path, tmp_path: Path) -> None:
    code = f"from hatchling.build import prepare_metadata_for_build_wheel as write; print(write({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    metadata = message_from_string((tmp_path / done.stdout.strip() / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Author"] == "the clip_exp authors"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    readme = (repository / "README.md").read_text(encoding="utf-8")
    for extra in metadata.get_all("Provides-Extra", []):
        assert f"'.[{extra}]'" in readme, f"the README does not explain the extra {extra}"


def test_the_sdist_has_what_a_user_and_a_contributor_need(repository: Path, tmp_path: Path) -> None:
    code = f"from hatchling.build import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    with tarfile.open(tmp_path / done.stdout.strip()) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {
        "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "train.py",
        "clip_exp/py.typed", "conf/train.yaml", "docs/reference/train.md", "docs/reference/train.schema.json", "tests/conftest.py",
    }  # fmt: skip


def test_the_version_is_that_of_the_changelog_and_the_citation(repository: Path) -> None:
    changelog = (repository / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(.+)\] - (\d{4}-\d\d-\d\d)$", changelog, re.M)
    assert newest is not None
    citation = yaml.safe_load((repository / "CITATION.cff").read_text(encoding="utf-8"))
    assert newest[1] == citation["version"] == __version__
    assert newest[2] == citation["date-released"]
    assert citation["license"] == "Apache-2.0"


def test_the_api_is_listed_before_it_is_imported() -> None:
    code = "import sys, clip_exp; print(*dir(clip_exp)); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, torch = done.stdout.splitlines()
    assert {"load", "train", "evaluate", "Run", "find_images", "__version__"} <= set(names.split())
    assert torch == "False"


def test_help_of_the_package_shows_the_api() -> None:
    shown = pydoc.render_doc(clip_exp, renderer=pydoc.plaintext)
    for name in ("load", "train", "evaluate", "find_images"):
        assert f"\n    {name}(" in shown


USER_SCRIPT = """
import clip_exp

clip = clip_exp.load("run")
reveal_type(clip)
reveal_type(clip_exp.train("max_steps=1"))
reveal_type(clip_exp.evaluate("run=x"))
clip_exp.load(3)
"""


def test_type_checkers_know_the_api(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER_SCRIPT)
    # Types of other libraries are left out, since reading torch takes ten seconds.
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = skip\n[mypy-clip_exp.*]\nfollow_imports = silent\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir=cache", "user.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": str(repository)}, capture_output=True, text=True,
    )  # fmt: skip
    assert re.findall(r"(?:Revealed type is|error:) (.+?)(?:  \[.*)?$", done.stdout, re.M) == [
        '"clip_exp.inference.pipeline.Pipeline"',
        '"pathlib.Path"',
        '"dict[str, dict[str, Any]]"',
        'Argument 1 to "load" has incompatible type "int"; expected "str | Path"',
    ], done.stdout


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
