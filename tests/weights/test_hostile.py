"""Tests that no weights file executes code: every unsafe pickle is refused with one message, in every file format."""

import argparse
import builtins
import contextlib
import functools
import importlib
import json
import os
import pickle
import runpy
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clip_exp.errors import CheckpointError
from clip_exp.weights.inspect import MAX_JSON, MAX_TEXT, describe
from clip_exp.weights.read import read_weights
from tests.weights.published import Storage, Stored, pickled, write_archive

CANARY = Path("canary")  # in the test's own folder


class Call:
    """Object that is pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Sets:
    """Object that runs code when its state is set."""

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}

    def __setstate__(self, state: dict[str, int]) -> None:
        CANARY.touch()


class Makes(dict):  # type: ignore[type-arg]
    """Object that runs code when an entry is set."""

    def __setitem__(self, key: Any, value: Any) -> None:
        CANARY.touch()


class Tensorlike(torch.Tensor):
    """Object that runs code when it is rebuilt."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return CANARY.touch, ()


TOUCH, PYTHON = "touch canary", "open('canary', 'w').close()"
INNER = pickle.dumps(Call(os.system, TOUCH))

HOSTILE: dict[str, Callable[[], Any]] = {
    "os.system": lambda: Call(os.system, TOUCH),
    "builtins.eval": lambda: Call(builtins.eval, PYTHON),
    "builtins.exec": lambda: Call(builtins.exec, PYTHON),
    "builtins.__import__": lambda: Call(builtins.__import__, "this"),
    "builtins.getattr": lambda: Call(builtins.getattr, Call(importlib.import_module, "os"), "system"),
    "subprocess": lambda: Call(subprocess.check_call, ["touch", "canary"]),
    "runpy": lambda: Call(runpy.run_path, "program.py"),
    "pathlib": lambda: Call(Path.touch, CANARY),
    "functools.partial": lambda: Call(functools.partial(os.system, TOUCH)),
    "functools.reduce": lambda: Call(functools.reduce, os.system, [TOUCH, TOUCH]),
    "a pickle in torch's storage": lambda: Call(torch.storage._load_from_bytes, INNER),
    "a pickle in a pickle": lambda: Call(pickle.loads, INNER),
    "torch.load": lambda: Call(functools.partial(torch.load, weights_only=False), "inner.pt"),
    "torch.hub": lambda: Call(torch.hub.load, ".", "model", "local"),
    "numpy.load": lambda: Call(functools.partial(np.load, allow_pickle=True), "inner.npy"),
    "an array of objects": lambda: np.array([Call(os.system, TOUCH)], dtype=object),
    "nested": lambda: {"state_dict": {"module.visual.conv1.weight": [torch.ones(1), {"a": (Call(os.system, TOUCH),)}]}},
    "beside weights": lambda: {"state_dict": {"logit_scale": torch.ones(1)}, "optimizer": Call(os.system, TOUCH)},
    "__setstate__": Sets,
    "a dictionary of its own": lambda: Makes(a=torch.ones(1)),
    "a tensor of its own": lambda: torch.ones(2).as_subclass(Tensorlike),
    "a module": lambda: torch.nn.Linear(2, 2),
    "a namespace": lambda: {"args": argparse.Namespace(lr=1), "state_dict": {"logit_scale": torch.ones(1)}},
}  # fmt: skip


def as_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def as_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=4))


def as_joblib(content: Any, path: Path) -> None:
    joblib.dump(content, path)


def as_torchscript(content: Any, path: Path) -> None:
    write_archive(path, pickled(content), {"code/__torch__.py": b"import os\nos.system('touch canary')\n"})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PYTHON)
    (tmp_path / "hubconf.py").write_text(PYTHON)
    (tmp_path / "inner.pt").write_bytes(INNER)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*pickle:UserWarning")
@pytest.mark.parametrize("save", [as_zip, as_legacy, as_pickle, as_joblib, as_torchscript])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_with_code_is_refused_and_not_run(name: str, save: Callable[[Any, Path], None], folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    save(HOSTILE[name](), path)
    CANARY.unlink(missing_ok=True)
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"{path} ")
    assert "\n" not in str(caught.value)
    describe(path)
    assert not CANARY.exists()


def test_the_corpus_would_run_code(folder: Path) -> None:
    """Most of these pickles run code if they are not refused, so the test above is meaningful."""
    ran = []
    for name, make in HOSTILE.items():
        as_pickle(make(), folder / "a.pkl")
        CANARY.unlink(missing_ok=True)
        with contextlib.suppress(Exception):  # whatever the code leads to
            pickle.loads((folder / "a.pkl").read_bytes())
        ran += [name] * CANARY.exists()
    assert len(ran) >= 13, ran


@pytest.mark.parametrize("save", [as_zip, as_legacy, as_torchscript])
def test_the_refused_name_is_reported(save: Callable[[Any, Path], None], folder: Path) -> None:
    path = folder / "model.pt"
    save({"a": Call(runpy.run_path, "program.py")}, path)
    with pytest.raises(CheckpointError, match=r"model\.pt is unsafe: its pickle loads runpy\.run_path"):
        read_weights(path)


def test_a_pickle_named_safetensors_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    as_zip(Call(os.system, TOUCH), path)
    with pytest.raises(CheckpointError, match="is unsafe"):
        read_weights(path)
    as_pickle(Call(os.system, TOUCH), path)
    with pytest.raises(CheckpointError, match="is not a valid safetensors file"):
        read_weights(path)
    assert not CANARY.exists()


def archive(path: Path, *members: tuple[str, bytes], **options: Any) -> Path:
    """Write a file like torch's, with given records."""
    with zipfile.ZipFile(path, "w", **options) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in (("a/version", b"3\n"), *members):
            opened.writestr(name, content)
    return path


def test_compressed_or_ambiguous_archives_are_refused_unread(folder: Path) -> None:
    """Compressed zeros could take all memory, and readers may disagree on two records with the same name."""
    root = pickled({"a": Stored(Storage("0", 500_000), (500_000,), (1,))})
    small = pickled({"a": Stored(Storage("0", 2), (2,), (1,))})
    zeros, record = ("a/data/0", bytes(2_000_000)), ("a/data/0", bytes(8))
    assert read_weights(archive(folder / "a.pt", ("a/data.pkl", root), zeros))["a"].shape == (500_000,)
    for scripted in ((), (("a/constants.pkl", b"\x80\x02)."),)):
        packed = archive(folder / "a.pt", ("a/data.pkl", root), zeros, *scripted, compression=zipfile.ZIP_DEFLATED)
        with pytest.raises(CheckpointError, match=r"compressed records \(2,000,\d+ bytes in a file of 2,\d+ bytes"):
            read_weights(packed)
        for name in ("a/data.pkl", "b/data.pkl"):
            twice = archive(folder / "a.pt", ("a/data.pkl", small), (name, small), record, *scripted)
            with pytest.raises(CheckpointError, match=r"two records data\.pkl"):
                read_weights(twice)


def test_a_program_without_end_is_not_searched(folder: Path) -> None:
    code = [(f"a/code/{i}.py", bytes(MAX_TEXT // 2 + 1)) for i in range(2)]
    members = [("a/data.pkl", pickled({})), ("a/constants.pkl", b""), *code]
    path = archive(folder / "a.pt", *members, compression=zipfile.ZIP_DEFLATED, compresslevel=1)
    with pytest.raises(CheckpointError, match="its program is too large for a model"):
        describe(path)


def test_a_huge_configuration_is_not_read(folder: Path) -> None:
    save_file({"logit_scale": torch.ones(1)}, folder / "model.safetensors")
    with (folder / "config.json").open("wb") as file:
        file.truncate(MAX_JSON + 1)  # takes no room
    with pytest.raises(CheckpointError, match=r"config\.json is too large for a configuration: 100,000,001 bytes"):
        describe(folder)


def test_parts_of_a_model_are_read_in_its_folder_only(folder: Path) -> None:
    index = folder / "model" / "pytorch_model.bin.index.json"
    index.parent.mkdir()
    for outside in ("../inner.pt", str(folder / "inner.pt"), "..", ".", "", "a/../b", "a\0b", "a" * 300):
        index.write_text(json.dumps({"weight_map": {"logit_scale": outside}}))
        with pytest.raises(CheckpointError, match="outside its folder"):
            read_weights(index.parent)
