import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clip_exp.errors import CheckpointError
from clip_exp.models.clip import CLIP, build_model
from clip_exp.weights.fit import load_weights
from clip_exp.weights.names import to_open_clip
from clip_exp.weights.read import read_weights
from tests.models.small import small_config
from tests.weights.published import inputs, logits, openai_model, our_config, write_openai_archive


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
    assert_same(read_weights(tmp_path), model.state_dict())  # as a checkpoint's folder
    other = fresh()
    load_weights(other, path)
    assert_same(other.state_dict(), model.state_dict())


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


TRAINERS = {
    "plain": lambda state: state,
    "open_clip": lambda state: {
        "epoch": 3,
        "name": "run",
        "state_dict": state,
        "optimizer": {"state": {0: torch.ones(1)}},
    },
    "distributed": lambda state: {"epoch": 3, "state_dict": prefixed(state, "module.")},
    "compiled": lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
    "averaged": lambda state: {"state_dict": state, "state_dict_ema": {name: 2 * x for name, x in state.items()}},
    "FlagAI or DeepSpeed": lambda state: {"module": state, "iteration": 5, "lr_scheduler": {"last_epoch": 1}},
    "model": lambda state: {"model": state, "args": {"lr": 1e-3}},
    "Lightning": lambda state: {"state_dict": prefixed(state, "model."), "global_step": 4, "hparams_name": "kwargs"},
    "twice": lambda state: {"model": {"state_dict": state}, "step": 1},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_weights_are_found_in_a_trainers_file(model: CLIP, tmp_path: Path, trainer: str, legacy: bool) -> None:
    path = tmp_path / "weights.pt"
    torch.save(TRAINERS[trainer](to_open_clip(model.state_dict())), path, _use_new_zipfile_serialization=not legacy)
    assert_same(read_weights(path), model.state_dict())


@pytest.mark.parametrize("layout", ["ours", "open_clip"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ""])
def test_the_format_is_detected_by_the_content(model: CLIP, tmp_path: Path, layout: str, suffix: str) -> None:
    state = model.state_dict() if layout == "ours" else to_open_clip(model.state_dict())
    path = tmp_path / f"weights{suffix}"
    save_file(state, path)
    assert_same(read_weights(path), model.state_dict())


PUBLISHED = ["TorchScript", "state dict", "FlagAI", "FlagAI's trainer", "open_clip.pt", "open_clip.safetensors"]


@pytest.mark.parametrize("image", ["vit", "resnet"])
@pytest.mark.parametrize("published", PUBLISHED)
def test_logits_are_those_of_the_model_that_was_published(image: str, published: str, tmp_path: Path) -> None:
    theirs = openai_model(image)
    state = theirs.state_dict()
    path = tmp_path / ("model.safetensors" if published.endswith("safetensors") else "pytorch_model.bin")
    match published:
        case "TorchScript":
            write_openai_archive(theirs, path)
        case "state dict":
            halves = {name: parameter.half() for name, parameter in theirs.named_parameters()}
            torch.save(state | halves | {"input_resolution": torch.tensor(32)}, path)
        case "FlagAI":
            torch.save(state, path)
        case "FlagAI's trainer":
            torch.save({"module": state, "iteration": 1000}, path)
        case "open_clip.pt":
            torch.save({"epoch": 1, "state_dict": prefixed(state, "module.")}, path)
        case "open_clip.safetensors":
            save_file(state, path)
    ours = build_model(our_config(image)).eval()
    assert load_weights(ours, path) == []
    batch = inputs(image_size=64 if image == "resnet" else 32)
    torch.testing.assert_close(logits(ours, *batch), logits(theirs, *batch), rtol=0, atol=1e-5)


def test_a_model_with_a_text_tower_of_its_own_name_is_read(tmp_path: Path) -> None:
    theirs = openai_model()
    custom = open_clip.CustomTextCLIP(
        40, {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}, {"context_length": 16, "vocab_size": 500, "width": 64, "layers": 2, "heads": 1}, quick_gelu=True
    ).eval()  # fmt: skip
    custom.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(theirs.state_dict()))
    torch.save(custom.state_dict(), tmp_path / "custom.pt")
    ours = build_model(our_config()).eval()
    load_weights(ours, tmp_path / "custom.pt")
    torch.testing.assert_close(logits(ours, *inputs()), logits(theirs, *inputs()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_model_in_parts_is_read_through_its_index(model: CLIP, tmp_path: Path, ending: str) -> None:
    state = model.state_dict()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names, weight_map = sorted(state), {}
    for i, part in enumerate((names[:10], names[10:]), start=1):
        file = f"{stem}-0000{i}-of-00002.{ending}"
        values = {name: state[name] for name in part}
        save_file(values, tmp_path / file) if ending == "safetensors" else torch.save(values, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(read_weights(tmp_path), state)
    assert_same(read_weights(index), state)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=rf"1 of 2 parts are missing: {file}"):
        read_weights(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no valid `weight_map`"):
        read_weights(tmp_path)


def test_of_a_folder_open_clips_own_file_is_read_first(model: CLIP, tmp_path: Path) -> None:
    torch.save(to_open_clip(model.state_dict()), tmp_path / "open_clip_pytorch_model.bin")
    save_file({"patch_embed.proj.weight": torch.ones(1)}, tmp_path / "model.safetensors")  # as timm puts a tower beside
    assert_same(read_weights(tmp_path), model.state_dict())


def test_a_folder_without_weights_is_reported_with_the_required_files(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no weights: the folder must contain one of open_clip_model\.safetensors"
    ):
        read_weights(tmp_path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 605157884\n"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.bin"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "file not found"),
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>not found</html>", "is a web page instead of weights"),
        (b"\xef\xbb\xbf\n <?xml version='1.0'?><Error/>", "is a web page instead of weights"),
        (LFS, "is a Git LFS pointer instead of the file"),
        (b"PK\x03\x04 cut short", "is truncated"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{not json......}", "is not a valid safetensors file"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "contains no weights"),
        (b"\xff" * 7 + b"\x7f{", "is not a valid safetensors file"),
        (b'\x50\xc3\x00\x00\x00\x00\x00\x00{"a":' + b"[" * 49_995, "is not a valid safetensors file"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}:? {reason}"):
        read_weights(path)


def test_a_header_may_have_any_length(tmp_path: Path) -> None:
    """The first bytes are its length, and may equal the start of a web page."""
    path = tmp_path / "model.safetensors"
    save_file({"logit_scale": torch.ones(1)}, path)
    content = path.read_bytes()
    header = content[8:-4].ljust(0x3C20)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[-4:])
    assert path.read_bytes().lstrip().startswith(b"<")
    assert read_weights(path).keys() == {"logit_scale"}


@pytest.mark.parametrize(
    "content", [b"\x89HDF\r\n\x1a\n", b"\x1f\x8b\x08gzip", b"text: 1", b"cos\nsystem\n(S'ls'\ntR."]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt does not contain weights"):
        read_weights(tmp_path / "a.pt")


def test_a_zip_with_other_content_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("photos/a.txt", "no weights")
    with pytest.raises(CheckpointError, match=r"a\.zip is a zip archive without weights of torch or NumPy"):
        read_weights(tmp_path / "a.zip")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "TorchScript"])
def test_a_file_cut_short_anywhere_is_refused_in_a_line(model: CLIP, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.bin"
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    elif kind == "TorchScript":
        write_openai_archive(openai_model(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    for part in range(1, 32):
        path.write_bytes(content[: len(content) * part // 32 - part % 2])
        with pytest.raises(CheckpointError) as caught:
            read_weights(path)
        assert str(caught.value).startswith(f"{path} ")
        assert "\n" not in str(caught.value)


def test_a_truncated_safetensors_file_is_reported_with_its_size(model: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"is truncated: it has {size - 1000:,} of {size:,} bytes"):
        read_weights(path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "no dictionary of weights, not even under a key such as state_dict, module or model"),
        (torch.ones(2), "no dictionary of weights"),
        ({}, "no dictionary of weights"),
        ({"epoch": 3}, "values that are not weights: epoch"),
        ({"state_dict": {"a": torch.ones(1), "b": [1], "c": "text"}}, "values that are not weights: b, c"),
        ({1: torch.ones(1)}, "values that are not weights: 1"),
        ({"a": torch.ones(2).to_sparse()}, "sparse, nested or quantized tensors, which are not supported: a"),
        (
            {"visual.conv1.weight": torch.ones(2), "logit_scale": torch.ones(2)},
            "the shape of a weight does not fit its name",
        ),
    ],
)
def test_a_file_without_weights_is_reported(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=reason):
        read_weights(path)


def test_an_old_tar_file_is_refused_without_advice_to_trust_it(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.pt", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as opened:
        opened.addfile(tarfile.TarInfo("\x80storages"))
    with pytest.raises(CheckpointError, match=r"is not a valid torch file \([^()]*tar format\)\. Download") as caught:
        read_weights(tmp_path / "a.pt")
    assert "False" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_tensors_without_one_shape_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="sparse, nested or quantized tensors, which are not supported: a"):
        read_weights(tmp_path / "a.pt")
