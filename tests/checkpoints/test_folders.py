"""A checkpoint is whole or absent; what is damaged is found, and the one before it is used."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from clip_exp.checkpoints import folders
from clip_exp.checkpoints.folders import atomic_checkpoint, damage, read_manifest
from clip_exp.checkpoints.io import SafeCheckpointIO
from clip_exp.errors import CheckpointError
from clip_exp.storage import sealed


def write_state(folder: Path, step: int) -> None:
    """What a checkpoint has besides weights."""
    (folder / "state.json").write_text(json.dumps({"global_step": step}))
    save_file({}, folder / "state.safetensors")


def write(run_dir: Path, step: int, content: str = "weights", **metadata: object) -> Path:
    target = folders.folder_of(run_dir, step)
    with atomic_checkpoint(target, {"step": step, **metadata}) as folder:
        (folder / "model.safetensors").write_text(content)
        write_state(folder, step)
    return target


def test_the_newest_undamaged_checkpoint_is_used(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    assert folders.latest(tmp_path).name == "step-000020"
    (folders.folder_of(tmp_path, 20) / "model.safetensors").write_text("weightz")
    with caplog.at_level(logging.WARNING):
        assert folders.latest(tmp_path).name == "step-000010"
    assert (
        "step-000020 is damaged (model.safetensors was changed after it was written): using step-000010 instead"
        in caplog.text
    )


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "manifest"])
def test_every_kind_of_damage_is_found(tmp_path, harm: str) -> None:
    checkpoint = write(tmp_path, 1, "0123456789")
    file = checkpoint / "model.safetensors"
    if harm == "truncate":
        file.write_text("01234")
    elif harm == "flip":
        file.write_text("0123456780")
    elif harm == "remove":
        file.unlink()
    else:
        (checkpoint / "manifest.json").write_text("{")
    assert folders.damage(checkpoint)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        folders.latest(tmp_path)


def test_damaged_checkpoints_and_leftovers_are_set_aside(tmp_path) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / "model.safetensors").write_text("")
    (tmp_path / "checkpoints" / ".writing-step-000003-99").mkdir()
    folders.recover(tmp_path)
    folders.set_aside(tmp_path, {folders.folder_of(tmp_path, 2): "empty"}, after=9)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["damaged-step-000002", "step-000001"]


def test_a_checkpoint_that_cannot_be_renamed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write(tmp_path, 1)

    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(
        CheckpointError, match=r"step-000001 cannot be renamed to damaged-step-000001: No space left on"
    ):
        folders.set_aside(tmp_path, {checkpoint: "empty"}, after=9)
    assert folders.latest(tmp_path) == checkpoint


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path) -> None:
    write(tmp_path, 5, "old")

    def fail() -> None:
        with atomic_checkpoint(folders.folder_of(tmp_path, 5), {}) as folder:
            (folder / "model.safetensors").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device.*untouched"):
        fail()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    assert (folders.latest(tmp_path) / "model.safetensors").read_text() == "old"


def test_best_is_the_last_that_was_marked(tmp_path) -> None:
    write(tmp_path, 1, best=True)
    write(tmp_path, 2, best=True)
    write(tmp_path, 3, best=False)
    assert folders.best(tmp_path).name == "step-000002"


def test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, best=step == 3)
    folders.set_aside(tmp_path, {}, after=1)
    assert folders.best(tmp_path) == folders.latest(tmp_path) == folders.folder_of(tmp_path, 1)
    assert (tmp_path / "checkpoints" / "superseded-step-000003").is_dir()


def test_a_replacement_that_was_killed_half_way_keeps_the_old_copy(tmp_path) -> None:
    checkpoint = write(tmp_path, 4, "old")
    checkpoint.rename(checkpoint.with_name(".writing-step-000004-77.old"))
    assert (folders.latest(tmp_path) / "model.safetensors").read_text() == "old"
    folders.recover(tmp_path)
    assert folders.latest(tmp_path) == checkpoint
    assert (checkpoint / "model.safetensors").read_text() == "old"


# A manifest is believed only where all of it is right; whatever is wrong with it is a reason to use the checkpoint before.

DEEP = b'{"files": ' * 100_000


def rewrite(checkpoint: Path, **values: Any) -> None:
    """Change a manifest as its writer could have written it, with the right hash."""
    file = checkpoint / "manifest.json"
    file.write_text(json.dumps(sealed({**json.loads(file.read_bytes()), **values})))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"17", b'"text"', b"\xff\xfe{}", b"\0" * 300, DEEP, b"[" * 100_000, b"9" * 10_000, b'{"step": NaN}'],
)  # fmt: skip
def test_a_manifest_of_any_bytes_makes_the_checkpoint_before_it_the_newest(content: bytes, tmp_path: Path) -> None:
    write(tmp_path, 10)
    (write(tmp_path, 20) / "manifest.json").write_bytes(content)
    assert folders.latest(tmp_path).name == folders.best(tmp_path).name == "step-000010"
    assert [path.name for path in folders.manifests(tmp_path)] == ["step-000010"]


FILE = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"files": {}}, "files does not list model.safetensors, state.json, state.safetensors"),
        ({"files": []}, "files must be a mapping"),
        ({"files": None}, "files must be a mapping"),
        ({"step": 6}, "it is of step 6"),
        ({"step": -5}, "step must be a non-negative integer"),
        ({"step": 5.0}, "step must be a non-negative integer"),
        ({"step": True}, "step must be a non-negative integer"),
        ({"step": "5"}, "step must be a non-negative integer"),
        ({"step": float("nan")}, "step must be a non-negative integer"),
        ({"step": 10**400}, "it is of step 1000"),
        *(({"more": {name: FILE}}, "which is not a valid file name") for name in ("../x", "/etc/passwd", "a\0", "", "..")),
        *(
            ({"more": {"x": entry}}, "no valid size and hash for 'x'")
            for entry in (None, [], {}, {**FILE, "size": -1}, {**FILE, "size": 1e400}, {**FILE, "sha256": "0"}, {**FILE, "sha256": 0})
        ),
    ],
)  # fmt: skip
def test_a_manifest_says_all_that_it_must(values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 5)
    files = json.loads((checkpoint / "manifest.json").read_bytes())["files"]
    rewrite(checkpoint, **({"files": files | values["more"]} if "more" in values else values))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: ") as caught:
        read_manifest(checkpoint)
    assert reason in str(caught.value)


def test_a_copy_of_a_checkpoint_is_not_one_of_another_step(tmp_path: Path) -> None:
    write(tmp_path, 20)
    copy = folders.folder_of(tmp_path, 23)
    shutil.copytree(folders.folder_of(tmp_path, 20), copy)
    assert damage(copy) == "manifest.json is damaged: it is of step 20"
    rewrite(copy, step=23)
    assert damage(copy) == "state.json is of step 20"
    assert folders.latest(tmp_path).name == "step-000020"


def test_a_changed_manifest_is_found_and_one_of_an_older_version_has_no_hash(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 7, best=False)
    file = checkpoint / "manifest.json"
    values = json.loads(file.read_bytes())
    file.write_text(json.dumps({**values, "best": True}))
    assert damage(checkpoint) == "manifest.json is damaged: it was changed after it was written"
    del values["sha256"]
    file.write_text(json.dumps(values))
    assert damage(checkpoint) is None


def test_a_manifest_of_today_needs_its_hash(tmp_path: Path) -> None:
    io, checkpoint = SafeCheckpointIO(), folders.folder_of(tmp_path, 3)
    io.run_copy = {"record": {}, "config": ""}
    io.save_checkpoint({"state_dict": {}, "global_step": 3}, checkpoint)
    file = checkpoint / "manifest.json"
    values = json.loads(file.read_bytes())
    assert damage(checkpoint) is None
    del values["sha256"]
    file.write_text(json.dumps(values))
    assert damage(checkpoint) == "manifest.json is damaged: its hash is missing"


def test_averaged_weights_count_only_where_the_manifest_has_them(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 3)
    (checkpoint / "notes.txt").write_text("mine")
    assert damage(checkpoint) is None
    (checkpoint / "ema.safetensors").write_text("from elsewhere")
    assert damage(checkpoint) == "ema.safetensors is not in manifest.json"


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_two_checkpoints_are_there_whenever_the_replacement_of_one_is_killed(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`after`: renames or removals of folders that still happen."""
    write(tmp_path, 10, "ten")
    write(tmp_path, 20, "old")
    left = after

    def killed_in_time(action: Any) -> Any:
        def act(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return action(*arguments, **options)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_in_time(Path.rename))
        patch.setattr(shutil, "rmtree", killed_in_time(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 20, "new")
    found = folders.checkpoints(tmp_path)
    assert [damage(path) for path in found] == [None, None]
    content = (folders.latest(tmp_path) / "model.safetensors").read_text()
    assert content == ("old" if after < 2 else "new")
    folders.recover(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] in (
        ["step-000010", "step-000020"],
        ["step-000020", "step-000010"],
    )
    assert (folders.latest(tmp_path) / "model.safetensors").read_text() == content
