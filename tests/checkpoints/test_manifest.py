"""A manifest is believed only where all of it is right; whatever is wrong with it is a reason to use the checkpoint before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from clip_exp.checkpoints import discovery
from clip_exp.checkpoints.io import SafeCheckpointIO
from clip_exp.checkpoints.manifest import damage, read_manifest
from clip_exp.errors import CheckpointError
from clip_exp.storage import sealed
from tests.checkpoints.test_writer import write

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
    assert discovery.latest(tmp_path).name == discovery.best(tmp_path).name == "step-000010"
    assert [path.name for path in discovery.manifests(tmp_path)] == ["step-000010"]


FILE = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"files": {}}, "files lacks model.safetensors, state.json, state.safetensors"),
        ({"files": []}, "files must be a mapping"),
        ({"files": None}, "files must be a mapping"),
        ({"step": 6}, "it is of step 6"),
        ({"step": -5}, "step must be a whole number"),
        ({"step": 5.0}, "step must be a whole number"),
        ({"step": True}, "step must be a whole number"),
        ({"step": "5"}, "step must be a whole number"),
        ({"step": float("nan")}, "step must be a whole number"),
        ({"step": 10**400}, "it is of step 1000"),
        *(({"more": {name: FILE}}, "cannot be a file of a checkpoint") for name in ("../x", "/etc/passwd", "a\0", "", "..")),
        *(
            ({"more": {"x": entry}}, "no size and hash of 'x'")
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
    copy = discovery.folder_of(tmp_path, 23)
    shutil.copytree(discovery.folder_of(tmp_path, 20), copy)
    assert damage(copy) == "manifest.json is damaged: it is of step 20"
    rewrite(copy, step=23)
    assert damage(copy) == "state.json is of step 20"
    assert discovery.latest(tmp_path).name == "step-000020"


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
    io, checkpoint = SafeCheckpointIO(), discovery.folder_of(tmp_path, 3)
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
    found = discovery.checkpoints(tmp_path)
    assert [damage(path) for path in found] == [None, None]
    content = (discovery.latest(tmp_path) / "model.safetensors").read_text()
    assert content == ("old" if after < 2 else "new")
    discovery.recover(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] in (
        ["step-000010", "step-000020"],
        ["step-000020", "step-000010"],
    )
    assert (discovery.latest(tmp_path) / "model.safetensors").read_text() == content
