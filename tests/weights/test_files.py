import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clip_exp.errors import CheckpointError
from clip_exp.models import CLIP, build_model
from clip_exp.weights import load_weights, read_weights, to_open_clip
from tests.models.small import small_config


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(0)
    return build_model(small_config())


def fresh() -> CLIP:
    torch.manual_seed(1)
    return build_model(small_config())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_our_safetensors_are_read_back(model: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    assert_same(read_weights(path), model.state_dict())
    other = fresh()
    load_weights(other, path)
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("layout", ["safetensors", "plain", "trainer", "ours"])
def test_other_layouts_load_into_the_same_model(model: CLIP, tmp_path: Path, layout: str) -> None:
    theirs = to_open_clip(model.state_dict())
    path = tmp_path / ("weights.safetensors" if layout == "safetensors" else "weights.pt")
    if layout == "safetensors":
        save_file(theirs, path)
    elif layout == "plain":
        torch.save(theirs, path)
    elif layout == "trainer":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in theirs.items()}}, path)
    else:
        torch.save(model.state_dict(), path)
    other = fresh()
    load_weights(other, path)
    assert_same(other.state_dict(), model.state_dict())


def test_half_precision_files_load_into_float32(model: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    torch.save({name: tensor.half() for name, tensor in to_open_clip(model.state_dict()).items()}, path)
    other = fresh()
    load_weights(other, path)
    assert other.image.class_embedding.dtype == torch.float32
    assert torch.equal(other.image.class_embedding, model.image.class_embedding.half().float())


def test_what_does_not_fit_is_named_and_nothing_is_loaded(model: CLIP, tmp_path: Path) -> None:
    state = model.state_dict()
    del state["text.ln_final.bias"]
    state["image.extra"] = torch.zeros(1)
    state["image.positional_embedding"] = torch.zeros(50, 64)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    other = fresh()
    with pytest.raises(CheckpointError) as caught:
        load_weights(other, path)
    message = str(caught.value)
    assert str(path) in message
    assert "missing in the file: text.ln_final.bias" in message
    assert "not in the model: image.extra" in message
    assert "image.positional_embedding [50, 64] instead of [17, 64]" in message
    assert_same(other.state_dict(), fresh().state_dict())


class Touch:
    """What an attacker would pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, save: Any) -> None:
    path, trace = tmp_path / "weights.pt", tmp_path / "trace"
    save({"logit_scale": Touch(trace)}, path)
    with pytest.raises(CheckpointError, match=r"weights\.pt: refused"):
        read_weights(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.safetensors", None, "no such file"),
        ("a.safetensors", b"not weights", "not a readable safetensors file"),
        ("a.pt", b"", "not a readable torch file"),
        ("a.pt", b"<html>not found</html>", "refused"),
        ("a.pt", b"PK\x03\x04 cut short", "not a readable torch file"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: {reason}"):
        read_weights(path)


def test_a_file_without_weights_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content, reason in [([1, 2], "no dictionary of weights"), ({"epoch": 3}, "not weights: epoch")]:
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=reason):
            read_weights(path)
