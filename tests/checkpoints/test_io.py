"""A training state is written by safetensors and JSON, named so that any strategy can take it up, or not at all."""

import errno
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from clip_exp.checkpoints import folders, io
from clip_exp.checkpoints.io import SafeCheckpointIO, join, name_optimizer_state, number_optimizer_state, split
from clip_exp.errors import CheckpointError, NumericError
from tests.checkpoints.test_folders import write

STATE = {"state_dict": {"model.weight": torch.ones(1000)}, "global_step": 5}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["EIO", "quota", "safetensors"],
)
def test_a_failure_of_the_storage_is_one_of_ours_that_says_how_much_room_is_needed(
    error: Exception, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 5, "old")

    def fail(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(io, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"step-000005: .*It needs 0\.0 MB, and .* MB are free.*untouched"):
        SafeCheckpointIO().save_checkpoint(STATE, folders.folder_of(tmp_path, 5))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    assert (folders.latest(tmp_path) / "model.safetensors").read_text() == "old"


def test_an_error_of_safetensors_that_is_not_the_storages_stays_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: dict[str, torch.Tensor], path: Path) -> None:
        raise SafetensorError("Error while serializing: invalid shape")

    monkeypatch.setattr(io, "save_file", fail)
    with pytest.raises(SafetensorError, match="invalid shape"):
        SafeCheckpointIO().save_checkpoint(STATE, folders.folder_of(tmp_path, 5))


@pytest.mark.parametrize(("free", "total", "written"), [(3999, 10**6, False), (4000, 10**6, True), (0, 0, True)])
def test_nothing_is_written_where_the_room_does_not_suffice(
    free: int, total: int, written: bool, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that reports zero for everything does not know."""
    saved: list[Path] = []
    monkeypatch.setattr(io, "save_file", lambda tensors, path: saved.append(path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free, total=total))
    checkpoint = folders.folder_of(tmp_path, 5)
    if written:
        SafeCheckpointIO().save_checkpoint(STATE, checkpoint)
    else:
        with pytest.raises(CheckpointError, match="No space left on device"):
            SafeCheckpointIO().save_checkpoint(STATE, checkpoint)
    assert bool(saved) == checkpoint.is_dir() == written


def test_a_training_state_survives_json_and_safetensors(tmp_path) -> None:
    state = {
        "state_dict": {"model.weight": torch.randn(2, 3), "model.logit_scale": torch.ones(1)},
        "global_step": 7,
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(2, 3)}}, "param_groups": [{"lr": 1e-3}]}
        ],
        "callbacks": {"Stop": {"best": torch.tensor(0.5), "none": None, "flag": True}},
    }
    io = SafeCheckpointIO()
    io.save_checkpoint(state, tmp_path / "step-000007")
    back = io.load_checkpoint(tmp_path / "step-000007")
    torch.testing.assert_close(back, state, rtol=0, atol=0)


def test_what_json_and_safetensors_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="callbacks/x"):
        split({"callbacks": {"x": object()}})


def test_split_and_join_are_inverse() -> None:
    tree = {"a": [1, {"b": torch.arange(3)}], 5: {"c": torch.zeros(())}, "d": {}}
    plain, tensors = split(tree)
    torch.testing.assert_close(join(plain, tensors), tree)


def test_an_optimizer_state_is_named_and_numbered() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    named = name_optimizer_state(optimizer.state_dict(), ["weight", "bias"])
    assert set(named["state"]) == {"weight", "bias"}
    assert [group["params"] for group in named["param_groups"]] == [["weight"], ["bias"]]
    back = number_optimizer_state(named, ["weight", "bias"])
    torch.testing.assert_close(back["state"], optimizer.state_dict()["state"])
    with pytest.raises(CheckpointError, match="bias"):
        number_optimizer_state(named, ["weight"])


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    return {"state_dict": weights, "global_step": 1, "optimizer_states": [optimizer.state_dict()], **more}


@pytest.fixture
def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_an_asynchronous_save_has_the_bytes_of_a_synchronous_one_although_training_continues(trained, tmp_path) -> None:
    model, optimizer = trained
    average = {name: value.clone() for name, value in model.state_dict().items()}
    state = state_of(model, optimizer, ema_state_dict=average)
    SafeCheckpointIO({"best": True}, {"record": {}}).save_checkpoint(state, tmp_path / "synchronous/step-000001")
    released, saved = threading.Event(), []
    io = SafeCheckpointIO({"best": True}, {"record": {}}, saved.append, asynchronous=lambda size: True)
    io._thread.submit(released.wait, 60)  # the writing thread is busy until training has continued
    io.save_checkpoint(state, tmp_path / "asynchronous/step-000001")
    with torch.no_grad():
        optimizer.step()
        average["weight"].zero_()
        torch.rand(3)
    assert (io.is_saving, saved) == (True, [])
    released.set()
    io.wait()
    assert (io.is_saving, saved) == (False, [1])
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / way / "step-000001").iterdir()}
        for way in ("asynchronous", "synchronous")
    )
    assert ours == theirs


def test_the_size_of_the_copy_decides(trained, tmp_path) -> None:
    model, optimizer = trained
    sizes: list[int] = []
    SafeCheckpointIO(asynchronous=lambda size: bool(sizes.append(size))).save_checkpoint(
        state_of(model, optimizer), tmp_path / "step-000001"
    )
    assert sizes == [3 * 4 * (30 * 20 + 20) + 2 * 4]  # weights, two moments, and a step per parameter


@pytest.mark.parametrize("part", ["weights", "optimizer", "average", "average of the loss"])
def test_what_is_not_finite_is_not_written(part: str, trained, tmp_path) -> None:
    model, optimizer = trained
    average = {name: value.clone() for name, value in model.state_dict().items()}
    of_loss = {"head": torch.ones(2)}
    for_part = {
        "weights": model.weight.data, "optimizer": optimizer.state[model.weight]["exp_avg"], "average": average["bias"],
        "average of the loss": of_loss["head"],
    }  # fmt: skip
    for_part[part].view(-1)[0] = torch.nan
    state = state_of(model, optimizer, ema_state_dict=average, ema_loss_state=of_loss)
    with pytest.raises(NumericError, match="not finite"):
        SafeCheckpointIO().save_checkpoint(state, tmp_path / "step-000001")
    assert list(tmp_path.iterdir()) == []
