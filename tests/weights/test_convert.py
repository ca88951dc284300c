"""Tests of `clip-exp convert`: tensors of torch files become safetensors, and code in a pickle runs only with trust_pickle=true."""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from clip_exp.config.commands import ConvertConfig
from clip_exp.errors import CheckpointError, ClipExpError, ConfigError
from clip_exp.models.clip import build_model
from clip_exp.weights.convert import convert
from clip_exp.weights.fit import load_weights
from tests.conftest import DOOR, Run
from tests.models.small import small_config


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def saved(tmp_path: Path, content: Any) -> Path:
    torch.save(content, tmp_path / "old.pt")
    return tmp_path / "old.pt"


def converted(file: Path, **options: Any) -> dict[str, torch.Tensor]:
    output = file.with_suffix(".safetensors")
    assert convert(ConvertConfig(file=str(file), output=str(output), **options)) == 0
    return load_file(output)


def test_a_pickle_with_code_is_converted_only_where_it_is_trusted(tmp_path: Path, capsys) -> None:
    model = build_model(small_config())
    settings = argparse.Namespace(lr=1e-3)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {"state_dict": state, "args": settings, "epoch": 3, "ran": RunsCode(tmp_path / "ran")}
    file, output = saved(tmp_path, content), tmp_path / "old.safetensors"
    with pytest.raises(CheckpointError, match=r"clip-exp convert .*old\.pt output=old\.safetensors trust_pickle=true"):
        convert(ConvertConfig(file=str(file), output=str(output)))
    assert not output.exists()
    assert not (tmp_path / "ran").exists()
    found = converted(file, trust_pickle=True)
    captured = capsys.readouterr()
    assert "warning: loading" in captured.err
    assert "left out, not tensors: args, epoch, ran" in captured.out
    assert found.keys() == {f"state_dict.{name}" for name in state}
    again = build_model(small_config())
    load_weights(again, output)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_pickle_of_weights_needs_no_trust(tmp_path: Path, capsys) -> None:
    numbers = torch.arange(6.0).reshape(2, 3)
    content = {
        "model": {
            "a": numbers,
            "transposed": numbers.T,
            "tied": numbers,
            "half": numbers.half(),
            "scalar": torch.tensor(2),
        },
        "optimizer": {"state": {0: {"exp_avg": numbers}}, "param_groups": [{"lr": 0.1}]},
        "wave": torch.ones(2, dtype=torch.complex64),
    }
    found = converted(saved(tmp_path, content))
    assert found.keys() == {
        *(f"model.{name}" for name in ("a", "transposed", "tied", "half", "scalar")),
        "optimizer.state.0.exp_avg",
    }
    assert all(torch.equal(found[f"model.{name}"], tensor) for name, tensor in content["model"].items())
    captured = capsys.readouterr()
    assert "left out, not tensors: optimizer.param_groups, wave" in captured.out
    assert captured.err == ""


def test_a_whole_module_gives_its_weights(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3))
    found = converted(saved(tmp_path, {"model": module}), trust_pickle=True)
    assert found.keys() == {"model.0.weight", "model.0.bias"}
    file = saved(tmp_path, module)
    (tmp_path / "old.safetensors").unlink()
    assert converted(file, trust_pickle=True).keys() == {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"file": None}, ConfigError, "file has no value"),
        ({"output": None}, ConfigError, "output has no value"),
        ({"output": "new.pt"}, ConfigError, "must end with .safetensors"),
        ({"output": "there.safetensors"}, ConfigError, "already exists"),
        ({"output": "none/new.safetensors"}, ConfigError, "not found. Create it"),
        ({"file": "none.pt"}, CheckpointError, "does not exist or is a folder"),
        ({"file": "there.safetensors"}, ConfigError, "is already a safetensors file"),
        ({"file": "page.pt"}, CheckpointError, "is a web page instead of weights"),
        ({"file": "empty.pt"}, CheckpointError, "contains no tensors"),
    ],
)
def test_what_cannot_be_converted_is_named(
    options: dict[str, Any], error: type[ClipExpError], expected: str, tmp_path: Path
) -> None:
    converted(saved(tmp_path, {"a": torch.ones(1)}))
    (tmp_path / "old.safetensors").rename(tmp_path / "there.safetensors")
    (tmp_path / "page.pt").write_text("<html></html>")
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    before = (tmp_path / "there.safetensors").read_bytes()
    values = {"file": "old.pt", "output": "new.safetensors"} | options
    paths = {key: value and str(tmp_path / value) for key, value in values.items()}
    with pytest.raises(error, match=expected):
        convert(ConvertConfig(**paths))
    assert not (tmp_path / "new.safetensors").exists()
    assert (tmp_path / "there.safetensors").read_bytes() == before


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "old.pt"
    module = types.ModuleType("no_such_package")
    module.Settings = type("Settings", (), {"__module__": "no_such_package"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "no_such_package", module)
    torch.save({"a": torch.ones(1), "args": module.Settings()}, file)  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "no_such_package")
    with pytest.raises(
        CheckpointError, match=r"needs a package that is not installed .*no_such_package.* Run this where the project"
    ):
        convert(ConvertConfig(file=str(file), output=str(tmp_path / "new.safetensors"), trust_pickle=True))


def test_on_the_command_line_a_bare_path_is_the_file(command: Run, tmp_path: Path) -> None:
    saved(tmp_path, {"a": torch.ones(1), "args": argparse.Namespace(lr=1.0)})
    refused = command(DOOR, "convert", "old.pt", "output=new.safetensors", cwd=tmp_path)
    assert refused.returncode == 4
    assert "loads argparse.Namespace" in refused.stderr
    done = command(DOOR, "convert", "old.pt", "output=new.safetensors", "trust_pickle=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "written: new.safetensors (1 tensors" in done.stdout
    assert load_file(tmp_path / "new.safetensors")["a"].item() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.safetensors", "old.pt"]
    shown = command(DOOR, "convert", "--help", cwd=tmp_path)
    assert shown.stdout.startswith("clip-exp convert FILE output=NAME.safetensors")
    assert "\ntrust_pickle: " in shown.stdout


def test_values_that_safetensors_cannot_store_are_left_out(tmp_path: Path, capsys) -> None:
    """Such as a recursive dictionary, the name of the format's metadata, and unsupported dtypes."""
    content: dict[str, Any] = {
        "weight": torch.ones(2),
        "__metadata__": torch.ones(1),
        "complex": torch.ones(1, dtype=torch.complex64),
    }
    content["itself"] = content
    found = converted(saved(tmp_path, content))
    assert torch.equal(found["weight"], torch.ones(2))
    assert not {"__metadata__", "complex"} & found.keys()
    assert "__metadata__, complex" in capsys.readouterr().out


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    file = saved(tmp_path, {"weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"output=.* cannot be written: .*No space left on device"):
        converted(file)
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]
