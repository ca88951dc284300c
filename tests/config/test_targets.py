"""Tests of the objects that a configuration names by `_target_`: which are created without permission, and how arguments are passed."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from clip_exp.config import targets
from clip_exp.errors import ConfigError

ORDERED = {"_target_": "torch.nn.modules.module.OrderedDict"}
MINE = """
import os
from subprocess import run
from torch import load
from open_clip.loss import ClipLoss

class Kept:
    def __init__(self, a, *more, b=None, **others):
        self.given = (a, more, b, others)
"""


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Create a user's module that imports other modules, and allow its package."""
    module = ModuleType("mine")
    exec(MINE, module.__dict__)
    monkeypatch.setitem(sys.modules, "mine", module)
    with targets.allowed(["mine"]):
        yield module


def nested(node: dict[str, Any]) -> dict[str, Any]:
    """Return a node of built-in objects with another node deep inside."""
    return {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Sequential", "_args_": [node]}]}


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "builtins.eval", "torch.load", "deepspeed.ops.op_builder.builder.OpBuilder.command_exists",
        "timm.optim._optim_factory._import_class", "torch.nn.modules.module.torch.load", "torch.nn.modules.module.torch.os.system",
        "torch.nn.parallel.parallel_apply", "pytorch_lightning.loggers.csv_logs.os.remove", "clip_exp.training.launch.train",
        "mine.Kept", "torch.nnn.Linear", "torch.nn.Module.__init__",
    ],
)  # fmt: skip
def test_no_other_code_than_built_in_classes_runs_without_permission(target: str) -> None:
    for node in ({"_target_": target}, nested({"_target_": target})):
        with pytest.raises(targets.TargetNotAllowedError, match=f"_target_={target}"):
            targets.require_allowed({"x": node}, "config.yaml")
        with pytest.raises(targets.TargetNotAllowedError):
            targets.instantiate(node, "x")


def test_a_class_that_a_built_in_module_imports_from_another_is_refused_at_any_depth() -> None:
    for node in (ORDERED, nested(ORDERED)):
        with pytest.raises(ConfigError, match="is code of collections"):
            targets.instantiate(node, "x")


@pytest.mark.parametrize("name", ["os.system", "run", "load"])
@pytest.mark.usefixtures("mine")
def test_an_allowed_package_does_not_allow_what_it_imports(name: str) -> None:
    with pytest.raises(ConfigError, match="name it by its own module"):
        targets.locate(f"mine.{name}", "x")
    with targets.allowed([f"mine.{name}"]):
        assert callable(targets.locate(f"mine.{name}", "x")), "the name itself is allowed"


def test_an_allowed_package_allows_the_classes_of_other_packages_that_it_offers(mine: ModuleType) -> None:
    assert targets.locate("mine.ClipLoss", "x") is mine.ClipLoss


def test_a_module_in_the_current_folder_does_not_replace_a_missing_built_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deepspeed" / "ops"
    folder.mkdir(parents=True)
    for place in (folder.parent, folder):
        (place / "__init__.py").write_text("")
    (folder / "adam.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass FusedAdam: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path and path])
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="there is no module deepspeed"):
        targets.locate("deepspeed.ops.adam.FusedAdam", "optimizer")
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("mine")
def test_a_text_that_would_become_a_node_is_refused() -> None:
    for text in ("${oc.env:HOME}", "${oc.create:'{_target_: torch.load}'}"):
        with pytest.raises(ConfigError, match=r"^x\.a=.*was not resolved"):
            targets.instantiate({"_target_": "mine.Kept", "a": text}, "x")


def test_hydras_keys_work_as_in_hydra(mine: ModuleType) -> None:
    node = {
        "_target_": "mine.Kept",
        "_args_": [{"_target_": "torch.nn.Identity"}, 2],
        "b": {"_target_": "mine.Kept", "a": 1},
        "c": [3],
    }
    first, more, b, others = targets.instantiate(node, "x").given
    assert isinstance(first, nn.Identity)
    assert (more, b.given, others) == ((2,), (1, (), None, {}), {"c": [3]})
    assert targets.instantiate({"_target_": "mine.Kept", "_partial_": True, "b": 2}, "x")(1).given == (1, (), 2, {})
    plain = {"_target_": "mine.Kept", "a": 1}
    assert targets.instantiate({"_target_": "mine.Kept", "_recursive_": False, "a": plain}, "x").given[0] == plain
    with targets.allowed(["os.path.join"]):
        assert targets.instantiate({"_target_": "os.path.join", "_args_": ["a", "b"]}, "x") == "a/b"


@pytest.mark.usefixtures("mine")
def test_an_argument_of_clip_exp_is_passed_only_if_the_user_does_not_set_it() -> None:
    for node, expected in (
        ({}, (5, (), None, {})),
        ({"a": 1}, (1, (), None, {})),
        ({"_args_": [1]}, (1, (), None, {})),
    ):
        made = targets.instantiate({"_target_": "mine.Kept", **node}, "x", optional={"a": 5, "unknown": 6})
        assert made.given == expected


def test_packages_are_printed_for_a_users_code_and_full_names_for_that_of_libraries() -> None:
    named = {
        "a": {"_target_": "mine.sub.Loss"},
        "b": [{"_target_": "torch.load"}],
        "c": {"_target_": "torch.optim.SGD"},
    }
    assert targets.custom_packages(named) == ["mine", "torch.load"]
