import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import clip_exp
from clip_exp.config.commands import OutputFormat, SearchConfig
from clip_exp.config.evaluation import EvalOnBadImage
from clip_exp.config.targets import TargetNotAllowedError
from clip_exp.errors import CheckpointError, ConfigError, DataError
from clip_exp.inference import index as index_module
from clip_exp.inference import pipeline as pipeline
from clip_exp.inference.commands import search
from clip_exp.inference.features import Encoded
from clip_exp.inference.index import held, read_entries, read_recipe, write_index
from clip_exp.inference.inputs import find_images
from clip_exp.inference.pipeline import Pipeline
from clip_exp.models.clip import build_model
from tests.conftest import DOOR, Run
from tests.data.tables.shard_files import jpeg, write_shard
from tests.small_runs import write_image, write_run


def config_of(index: Path, **values: object) -> SearchConfig:
    given = {"format": OutputFormat.json, **values}
    return SearchConfig(index=str(index), accelerator="cpu", num_workers=0, **given)


@pytest.fixture
def index(tmp_path: Path, run_dir: Path, photos: Path, capsys) -> Path:
    """Return the path of an index of the seven photos."""
    path = tmp_path / "photos.index"
    assert search(config_of(path, run=str(run_dir), images=str(photos))) == 0
    assert "7 images (7 new)" in capsys.readouterr().out
    return path


def matches(capsys, number: int = 0) -> list[tuple[str, float]]:
    document = json.loads(capsys.readouterr().out)
    return [(match["path"], match["score"]) for match in document["rankings"][number]["matches"]]


def test_results_equal_brute_force(index: Path, photos: Path, clip: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(photos.parent)
    paths = find_images("photos")
    features = clip.encode_image(paths)
    for query, kind in (("two dogs", "text"), ("photos/3.png", "image")):
        assert search(config_of(index, **{kind: query}, top_k=4)) == 0
        vector = clip.encode_text(query)[0] if kind == "text" else features[3]
        expected = sorted(zip(paths, (features @ vector).tolist(), strict=True), key=lambda pair: -pair[1])[:4]
        found = matches(capsys)
        assert [path for path, _ in found] == [path for path, _ in expected]
        torch.testing.assert_close([s for _, s in found], [s for _, s in expected], atol=1e-6, rtol=0)


def test_scores_do_not_depend_on_the_tiles(index: Path, clip: Pipeline, monkeypatch: pytest.MonkeyPatch):
    whole = clip.index(path=index).search("two dogs", top_k=7)
    monkeypatch.setattr("clip_exp.inference.features.ROWS", 2)
    tiled = clip.index(path=index).search("two dogs", top_k=7)
    assert [match.path for match in tiled] == [match.path for match in whole]
    torch.testing.assert_close([m.score for m in tiled], [m.score for m in whole], atol=1e-6, rtol=0)


def assert_equal(one: Path, other: Path) -> None:
    """Check that two indexes have the same images, and features up to the rounding of other batches."""
    first, second = read_entries(one), read_entries(other)
    assert (first.paths, first.size.tolist(), first.mtime_ns.tolist()) == (
        second.paths,
        second.size.tolist(),
        second.mtime_ns.tolist(),
    )
    torch.testing.assert_close(first.features, second.features, rtol=0, atol=1e-6)


def test_an_extended_index_equals_one_created_at_once(index: Path, run_dir: Path, photos: Path, capsys):
    for number in (10, 11, 12):
        write_image(photos / f"new{number}.png", number)
    write_image(photos / "2.png", 99)
    (photos / "4.png").unlink()
    (photos / "broken.png").write_bytes(b"broken")
    assert search(config_of(index, images=str(photos))) == 0
    assert "9 images (3 new, 1 changed, 1 dropped, 1 left out)" in capsys.readouterr().out
    at_once = index.with_name("at_once.index")
    search(config_of(at_once, run=str(run_dir), images=str(photos)))
    assert_equal(at_once, index)


def test_an_image_replaced_by_one_of_equal_size_and_time_is_encoded_again(index: Path, photos: Path, capsys):
    file, before = photos / "2.png", read_entries(index)
    data, status = file.read_bytes(), file.stat()
    write_image(file, 99)
    new = file.read_bytes()
    size = max(len(data), len(new))  # what comes after a PNG's end is not a part of the image
    file.write_bytes(data.ljust(size, b"\0"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    search(config_of(index, images=str(photos)))
    file.write_bytes(new.ljust(size, b"\0"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    capsys.readouterr()
    search(config_of(index, images=str(photos)))
    assert "7 images (1 changed)" in capsys.readouterr().out
    after = read_entries(index)
    row = after.paths.index("photos/2.png")
    assert not torch.equal(after.features[row], before.features[row])


def test_nothing_new_changes_nothing_and_encodes_nothing(index: Path, photos: Path, monkeypatch, capsys):
    before = index.read_bytes(), index.stat().st_mtime_ns
    monkeypatch.setattr(pipeline.Pipeline, "encode_each", lambda *_: pytest.fail("an image was encoded"))
    assert search(config_of(index, images=[str(photos), f"{photos}/*.png"])) == 0
    assert "7 images (nothing new)" in capsys.readouterr().out
    assert (index.read_bytes(), index.stat().st_mtime_ns) == before


def test_images_outside_the_given_folders_stay(index: Path, photos: Path, tmp_path: Path, capsys):
    write_image(tmp_path / "other" / "a.png", 50)
    shutil.rmtree(photos)  # as a disk that is not there today
    search(config_of(index, images=str(tmp_path / "other")))
    assert "8 images (1 new)" in capsys.readouterr().out
    photos.mkdir()
    with pytest.raises(DataError, match="contains no images"):
        search(config_of(index, images=str(photos)))
    assert len(read_entries(index).paths) == 8


def test_a_table_fills_an_index_and_unreachable_images_remain(run_dir: Path, photos: Path, tmp_path: Path, capsys):
    (tmp_path / "list.csv").write_text("path,title\nphotos/0.png,x\nphotos/1.png,y\nphotos/0.png,z\nabsent.png,a\n")
    search(config_of(tmp_path / "t.index", run=str(run_dir), table=str(tmp_path / "list.csv"), image_key="path"))
    assert "2 images (2 new, 1 left out)" in capsys.readouterr().out
    assert read_entries(tmp_path / "t.index").paths == ["photos/0.png", "photos/1.png"]
    (photos / "1.png").unlink()
    search(config_of(tmp_path / "t.index", table=str(tmp_path / "list.csv"), image_key="path"))
    assert "2 images (1 left out)" in capsys.readouterr().out
    (photos / "0.png").write_bytes(b"broken")
    search(config_of(tmp_path / "t.index", table=str(tmp_path / "list.csv"), image_key="path"))
    assert "1 images (1 dropped, 2 left out)" in capsys.readouterr().out


def test_a_table_indexes_paths_outside_its_folder_only_if_allowed(run_dir: Path, photos: Path, tmp_path: Path):
    (tmp_path / "lists").mkdir()
    table = tmp_path / "lists" / "list.csv"
    table.write_text(f"filepath\n{photos}/0.png\n../photos/1.png\n")
    values = {"run": str(run_dir), "table": str(table)}
    with pytest.raises(DataError, match=r"list\.csv, line 3: '\.\./photos/1\.png' leaves .*allow_outside_root=true"):
        search(config_of(tmp_path / "t.index", **values))
    search(config_of(tmp_path / "t.index", **values, allow_outside_root=True))
    assert read_entries(tmp_path / "t.index").paths == ["photos/0.png", "photos/1.png"]


def test_images_and_their_index_can_be_moved_together(index: Path, tmp_path: Path, run_dir: Path, capsys):
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "photos", tmp_path / "moved" / "photos")
    moved = Path(shutil.move(index, tmp_path / "moved" / "photos.index"))
    search(config_of(moved, images=str(tmp_path / "moved" / "photos"), text="a dog"))
    captured = capsys.readouterr()
    assert "nothing new" in captured.err
    document = json.loads(captured.out)
    assert all(Path(match["path"]).is_file() for match in document["rankings"][0]["matches"])


def test_an_index_of_other_weights_is_refused(index: Path, photos: Path, tmp_path: Path, run_dir: Path):
    torch.manual_seed(1)
    from clip_exp.config.names import named_model

    other = write_run(tmp_path / "other", build_model(named_model("vit_nano")))
    for values in ({"text": "a dog"}, {"images": str(photos)}):
        with pytest.raises(
            CheckpointError, match=r"was created by vit_nano with .*run/checkpoints.*not by .*other/checkp"
        ):
            search(config_of(index, run=str(other), **values))
    with pytest.raises(CheckpointError, match="cannot be compared"):
        clip_exp.load(other, accelerator="cpu").index(path=index)
    with pytest.raises(CheckpointError, match="with other settings"):
        clip_exp.load(run_dir, accelerator="cpu", activation="quick_gelu").index(path=index)


def test_an_index_loads_its_model_or_reports_why_it_cannot(index: Path, run_dir: Path, tmp_path: Path, capsys):
    weights = next(run_dir.glob("checkpoints/*/model.safetensors"))
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run_dir, elsewhere)
    with pytest.raises(CheckpointError, match="which does not exist anymore: give the new location"):
        search(config_of(index, text="a dog"))
    assert search(config_of(index, run=str(elsewhere), text="a dog", top_k=3)) == 0
    assert len(matches(capsys)) == 3
    weights.parent.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, weights)
    with pytest.raises(CheckpointError, match="has changed since"):
        search(config_of(index, text="a dog"))


def test_other_frames_or_another_precision_are_not_mixed(index: Path, photos: Path, capsys):
    with pytest.raises(ConfigError, match=r"frames=4, but .* was created with frames=8"):
        search(config_of(index, images=str(photos), frames=4))
    with pytest.raises(ConfigError, match=r"precision=bf16-mixed, but"):
        search(config_of(index, images=str(photos), precision="bf16-mixed"))


def test_interrupted_indexing_resumes_where_it_stopped(index: Path, run_dir: Path, photos: Path, monkeypatch, capsys):
    real, seen = Pipeline.encode_each, []

    def interrupted(self, media, *rest) -> Iterator[Encoded]:
        for number, encoded in enumerate(real(self, media, *rest)):
            if number == 3 and len(seen) == 3:
                raise KeyboardInterrupt
            seen.append(str(media.paths[encoded.item]))
            yield encoded

    monkeypatch.setattr(pipeline.Pipeline, "encode_each", interrupted)
    again = index.with_name("again.index")
    with pytest.raises(KeyboardInterrupt):
        search(config_of(again, run=str(run_dir), images=str(photos)))
    assert [Path(path).name for path in read_entries(again).paths] == sorted(Path(path).name for path in seen)
    search(config_of(again, images=str(photos)))
    assert len(seen) == len(set(seen)) == 7
    assert_equal(again, index)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_loses_only_what_it_had_not_saved(
    index: Path, run_dir: Path, photos: Path, tmp_path: Path, number
):
    script = f"""
import os, sys
from clip_exp import cli
from clip_exp.inference import index
index.SAVE_EVERY_S, index.SAVE_FRACTION = 0.0, 1e9
write, saves = index.write_index, []
def save(*arguments):
    write(*arguments)
    saves.append(1)
    if len(saves) == 2:
        os.kill(os.getpid(), {int(number)})
index.write_index = save
sys.exit(cli.run("search", sys.argv[1:]))
"""
    again = tmp_path / "again.index"
    arguments = [
        f"index={again}",
        f"run={run_dir}",
        f"images={photos}",
        "accelerator=cpu",
        "num_workers=0",
        "batch_size=1",
    ]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    if number is signal.SIGTERM:
        assert done.returncode == 143
        assert "The same command resumes" in done.stderr
    else:
        assert done.returncode == -number
    kept = read_entries(again).paths
    assert 0 < len(kept) < 7
    search(config_of(again, images=str(photos), batch_size=1))
    single = tmp_path / "single.index"
    search(config_of(single, run=str(run_dir), images=str(photos), batch_size=1))
    assert_equal(again, single)
    assert [path.name for path in tmp_path.glob(".*.index*") if "lock" not in path.name] == []


def test_two_processes_do_not_write_the_same_index(index: Path, photos: Path, capsys):
    with held(index), pytest.raises(ConfigError, match=rf"being changed by process {os.getpid()} on"):
        search(config_of(index, images=str(photos)))
    assert search(config_of(index, images=str(photos))) == 0
    assert not list(index.parent.glob(".*"))


def test_without_locks_an_index_is_extended_and_temporary_files_of_other_processes_remain(
    index: Path, photos: Path, no_locks, capsys
):
    writing = index.with_name(f".writing-{index.name}-0123")
    writing.touch()
    assert search(config_of(index, images=str(photos))) == 0
    assert writing.exists()


def test_threads_take_turns_and_none_is_lost(index: Path):
    """The holder removes the lock file, so a process that opened it earlier must not take it for the lock of the next holder."""
    inside, most, turns = [], [], []

    def work() -> None:
        while len(turns) < 50:
            try:
                with held(index):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    turns.append(1)
            except ConfigError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


def test_an_open_index_is_not_touched_by_an_extension(index: Path, photos: Path, clip: Pipeline):
    opened = clip.index(path=index)
    before = opened.search("a dog", top_k=7)
    for number in range(20, 25):
        write_image(photos / f"{number}.png", number)
    assert len(clip.index(photos, index)) == 12
    assert len(opened) == 7
    assert opened.search("a dog", top_k=7) == before


def test_the_python_api_creates_extends_and_searches_an_index(photos: Path, clip: Pipeline, tmp_path: Path, caplog):
    index = clip.index(photos, path=tmp_path / "api.index")
    assert len(index) == 7
    assert index.paths == [str(photos / Path(name).relative_to(photos)) for name in find_images(photos)]
    best = index.search(image=photos / "3.png", top_k=1)[0]
    assert (best.path, round(best.score, 5)) == (str(photos / "3.png"), 1.0)
    assert [m.path for m in index.search("two dogs", top_k=3)] == [
        m.path for m in clip.rank("two dogs", photos, top_k=3)
    ]
    (photos / "broken.png").write_bytes(b"broken")
    assert len(clip.index([photos], path=tmp_path / "api.index")) == 7
    assert "left out 1 of 8 images" in caplog.text
    with pytest.raises(DataError, match=r"broken\.png"):
        clip.index(photos, path=tmp_path / "api.index", on_bad_image="error")
    with pytest.raises(ConfigError, match=r"on_bad_image=replace must be one of error, skip\."):
        clip.index(photos, path=tmp_path / "api.index", on_bad_image="replace")
    with pytest.raises(ConfigError, match="no such file"):
        clip.index(path=tmp_path / "absent.index")
    with pytest.raises(ConfigError, match="either a text or an image"):
        index.search()


def test_images_in_shards_are_refused_since_an_index_refers_to_files(run_dir: Path, tmp_path: Path):
    shard = write_shard(tmp_path / "s.tar", {"1.jpg": jpeg(1), "1.txt": "x"})
    with pytest.raises(
        ConfigError, match=r"s\.tar: an index refers to image files, not to members of shards: unpack the shards"
    ):
        search(config_of(tmp_path / "x.index", table=str(shard), run=str(run_dir)))


def test_an_index_without_a_readable_image_is_not_written(run_dir: Path, tmp_path: Path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"none of the 1 images can be read.*a\.png: not an image"):
        search(config_of(tmp_path / "x.index", run=str(run_dir), images=str(tmp_path / "bad")))
    with pytest.raises(DataError, match="on_bad_image=skip"):
        search(
            config_of(
                tmp_path / "x.index", run=str(run_dir), images=str(tmp_path / "bad"), on_bad_image=EvalOnBadImage.error
            )
        )
    assert not (tmp_path / "x.index").exists()


def test_a_file_that_is_not_an_index_is_refused(index: Path, tmp_path: Path, run_dir: Path):
    whole = index.read_bytes()
    index.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not an index, or damaged"):
        search(config_of(index, text="a dog"))
    index.write_text("text")
    with pytest.raises(CheckpointError, match="not an index, or damaged"):
        read_recipe(index)
    with pytest.raises(CheckpointError, match="not an index, or damaged"):
        read_recipe(next(run_dir.glob("checkpoints/*/model.safetensors")))


def test_an_index_whose_model_has_other_keys_is_refused_by_name(index: Path):
    recipe, entries = read_recipe(index), read_entries(index)
    write_index(index, replace(recipe, model={**recipe.model, "channels": 3}), entries)
    with pytest.raises(CheckpointError, match=r"photos\.index was created by another version") as caught:
        search(config_of(index, text="a dog"))
    assert "model.channels does not exist" in str(caught.value)


def test_names_that_are_not_utf8_are_preserved(photos: Path, run_dir: Path, clip: Pipeline, tmp_path: Path):
    odd = os.fsdecode(b"caf\xe9 \xff.png")
    try:
        shutil.copy(photos / "0.png", photos / odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    index = clip.index(photos, path=tmp_path / "odd.index")
    assert str(photos / odd) in index.paths


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search"], 2, "index has no value"),
        (["search", "index=x.index"], 2, "nothing to do"),
        (["search", "index=x.index", "text=a"], 2, "no such file. Create it"),
        (["search", "index=photos", "text=a"], 2, "is a folder"),
        (["search", "index=x.index", "images=photos"], 2, "the model must be set by exactly one of"),
        (["search", "index=run/config.yaml", "text=a"], 4, "not an index, or damaged"),
        (["search", "index=x.index", "images=photos", "run=photos"], 4, "not a run folder"),
    ],
)
def test_errors_are_one_message_with_their_exit_code(
    refused: Run, run_dir: Path, photos: Path, tmp_path: Path, arguments: list[str], code: int, message: str
):
    done = refused(DOOR, *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr


def test_saves_are_not_more_than_a_tenth_of_the_time(index: Path, photos: Path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(index_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(index_module, "write_index", lambda *_: now.__setitem__(0, now[0] + 30.0))
    contents = index_module._Contents(index, read_recipe(index), [])
    contents.unsaved = True
    contents.save()
    assert contents.next_save == 30.0 + 300.0


def test_an_index_that_names_custom_code_is_refused_without_running_it(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "canary.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Thing: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with safe_open(index, "pt") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["clip_exp.index"])
    recipe["model"]["image"] = {"kind": "custom", "_target_": "canary.Thing"}
    save_file(load_file(index), index, {**metadata, "clip_exp.index": json.dumps(recipe)})
    with pytest.raises(
        TargetNotAllowedError, match=r"index=.* names custom code.*model\.image\._target_=canary\.Thing"
    ):
        search(config_of(index, text="a dog"))
    assert not (tmp_path / "ran").exists()
