"""Tests that weights of TorchScript archives are read as by torch, without executing the archive's program."""

import sys
import tracemalloc
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.openai import load_openai_model
from torch import nn

from clip_exp.errors import CheckpointError
from clip_exp.models.clip import build_model
from clip_exp.weights.fit import load_weights
from clip_exp.weights.torchscript import read_torchscript
from tests.weights.published import (
    Storage,
    Stored,
    inputs,
    jit_state_dict,
    logits,
    openai_model,
    our_config,
    pickled,
    write_archive,
    write_openai_archive,
)

BOTH = pytest.mark.parametrize("image", ["vit", "resnet"])


def assert_as_torch_reads_it(path: Path) -> None:
    ours, theirs = read_torchscript(path), jit_state_dict(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@BOTH
def test_an_archive_like_openais_is_read_as_torch_reads_it(image: str, tmp_path: Path) -> None:
    path = tmp_path / "openai.pt"
    write_openai_archive(openai_model(image), path)
    assert_as_torch_reads_it(path)
    assert read_torchscript(path)["visual.conv1.weight"].dtype == torch.float16


@BOTH
def test_logits_are_those_of_open_clip_with_the_same_archive(image: str, tmp_path: Path) -> None:
    path = tmp_path / "openai.pt"
    write_openai_archive(openai_model(image), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit
        theirs = load_openai_model(str(path), precision="fp32", device="cpu")
    ours = build_model(our_config(image)).eval()
    assert load_weights(ours, path) == []
    batch = inputs(image_size=64 if image == "resnet" else 32)
    torch.testing.assert_close(logits(ours, *batch), logits(theirs, *batch), rtol=0, atol=1e-5)


class Odd(nn.Module):
    """Module with tensors of several dtypes, a submodule with two names, views of one storage, lists and numbers."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(3, 3)
        self.first, self.second = shared, shared
        self.low = nn.Parameter(torch.randn(4, 2).bfloat16())
        numbers = torch.arange(12.0)
        self.register_buffer("head", numbers[:4])
        self.register_buffer("tail", numbers.view(3, 4)[1:].T)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.empty(0))
        self.sizes, self.names = [1, 2], {"a": 1.5}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) * self.sizes[0] * self.names["a"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:Warning")
def test_a_scripted_module_with_various_attributes_is_read_as_by_torch(tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    torch.jit.script(Odd()).save(str(path))
    assert_as_torch_reads_it(path)


class Talks(nn.Module):
    """Module whose program prints a message when torch loads it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x

    @torch.jit.export
    def __getstate__(self) -> torch.Tensor:
        return self.weight

    @torch.jit.export
    def __setstate__(self, state: torch.Tensor) -> None:
        print("the program ran")
        self.weight = state
        self.training = False


@pytest.mark.filterwarnings("ignore:.*torch.jit:Warning")
def test_setstate_in_the_archives_program_does_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "talks.pt"
    torch.jit.script(Talks()).save(str(path))
    read_torchscript(path)
    assert "the program ran" not in capfd.readouterr().out
    jit_state_dict(path)
    assert "the program ran" in capfd.readouterr().out  # as torch would have it


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> type:
    """Create a class that a handmade pickle can use as a module of an archive."""
    parent, place = types.ModuleType("__torch__"), types.ModuleType("__torch__.net")
    made = type(
        "Net", (), {"__module__": "__torch__.net", "__init__": lambda self, **values: self.__dict__.update(values)}
    )
    place.Net = made
    monkeypatch.setitem(sys.modules, "__torch__", parent)
    monkeypatch.setitem(sys.modules, "__torch__.net", place)
    return made


FOUR = {"data/0": torch.arange(4.0).numpy().tobytes()}


def test_a_hand_made_archive_is_read(module: type, tmp_path: Path) -> None:
    inner = module(weight=Stored(Storage("0", 4), (2, 2), (2, 1)))
    path = tmp_path / "hand.pt"
    write_archive(path, pickled(module(inner=inner, epoch=3)), FOUR)
    state = read_torchscript(path)
    assert state.keys() == {"inner.weight"}
    assert state["inner.weight"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("stored", "records", "reason"),
    [
        (Stored(Storage("0", 4), (5,), (1,)), FOUR, "in a storage of 4 values"),
        (Stored(Storage("0", 4), (4,), (1,), offset=1), FOUR, "out of bounds"),
        (Stored(Storage("0", 4), (2,), (1 << 40,)), FOUR, "out of bounds"),
        (Stored(Storage("0", 4), (1 << 40,), (0,)), FOUR, "in a storage of 4 values"),
        (Stored(Storage("0", 4), (2,), (-1,)), FOUR, "is not a valid TorchScript archive"),
        (Stored(Storage("0", 1 << 40), (2,), (1,)), FOUR, "16 bytes for 1099511627776"),
        (Stored(Storage("0", 4, torch.HalfStorage), (2,), (1,)), FOUR, "16 bytes for 4 torch.float16"),
        (Stored(Storage("1", 4), (2,), (1,)), FOUR, "data/1"),
        (Stored(Storage("../version", 2), (2,), (1,)), FOUR, "is not a valid TorchScript archive"),
        (Stored(Storage("0", 4), "22", (2, 1)), FOUR, "is not a valid TorchScript archive"),  # type: ignore[arg-type]
    ],
)
def test_a_tensor_outside_of_its_numbers_is_refused(
    module: type, tmp_path: Path, stored: Stored, records: dict[str, bytes], reason: str
) -> None:
    path = tmp_path / "hand.pt"
    write_archive(path, pickled(module(weight=stored)), records)
    with pytest.raises(CheckpointError, match=reason):
        read_torchscript(path)


def test_a_class_of_the_main_module_is_read(module: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch names classes of a script."""
    monkeypatch.setattr(sys.modules["__torch__"], "Net", module, raising=False)
    monkeypatch.setattr(module, "__module__", "__torch__")
    test_a_hand_made_archive_is_read(module, tmp_path)


def test_recursive_modules_are_refused(module: type, tmp_path: Path) -> None:
    circle = module()
    circle.again = circle
    wide = module()
    for _ in range(40):  # two to the power of forty modules in a few hundred bytes
        wide = module(a=wide, b=wide)
    for root in (circle, wide):
        write_archive(tmp_path / "hand.pt", pickled(root), {})
        with pytest.raises(CheckpointError, match="nested too deeply"):
            read_torchscript(tmp_path / "hand.pt")


def test_a_few_bytes_cannot_allocate_a_large_table(tmp_path: Path) -> None:
    write_archive(tmp_path / "hand.pt", b"\x80\x02Nr" + (1 << 23).to_bytes(4, "little") + b".", {})  # 64 MB and more
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="it contains no module"):
            read_torchscript(tmp_path / "hand.pt")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [[1, 2], {"weight": 1}, None])
def test_a_pickle_of_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    write_archive(tmp_path / "hand.pt", pickled(content), {})
    with pytest.raises(CheckpointError, match="it contains no module"):
        read_torchscript(tmp_path / "hand.pt")


def test_a_changed_byte_or_a_compressed_record_is_refused(module: type, tmp_path: Path) -> None:
    root = pickled(module(weight=Stored(Storage("0", 4), (4,), (1,))))
    path = tmp_path / "hand.pt"
    write_archive(path, root, FOUR)
    content = bytearray(path.read_bytes())
    content[content.find(FOUR["data/0"]) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="Bad CRC"):
        read_torchscript(path)
    write_archive(path, root, FOUR, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        read_torchscript(path)


def test_a_pickle_cannot_change_what_it_is_given_for_the_next_one(module: type, tmp_path: Path) -> None:
    """BUILD can set attributes of any object: here, of the function that rebuilds tensors, and of a module's class."""
    hostile = (
        b"\x80\x02c%s\n(N}X\x0c\x00\x00\x00__setstate__K\x01stb."  # GLOBAL, then the state (None, {"__setstate__": 1})
    )
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"__torch__.net\nNet", b"collections\nOrderedDict"):
        write_archive(tmp_path / "hand.pt", hostile % name, {})
        with pytest.raises(CheckpointError):
            read_torchscript(tmp_path / "hand.pt")
        test_a_hand_made_archive_is_read(module, tmp_path)
