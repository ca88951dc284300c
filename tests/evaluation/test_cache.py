"""What is kept on disk: found by what it depends on, never half-written, never an obstacle."""

import os
import time
from pathlib import Path

import pytest
import torch

from clip_exp.config.models import named_model
from clip_exp.evaluation.cache import Cache
from clip_exp.evaluation.encode import EncodeOptions
from clip_exp.evaluation.subject import Subject, zero_shot_classifier
from clip_exp.models.clip import CLIP
from clip_exp.text.tokenizer import Tokenizer
from tests.processes import start_apart

TENSORS = {"features": torch.arange(6.0).view(2, 3), "kept": torch.tensor([0, 2])}
DAY_S = 86400


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", limit_gb=1)


def subject(nano: CLIP, cache: Cache, weights: str = "a") -> Subject:
    return Subject(nano, Tokenizer(77), named_model("vit_nano"), EncodeOptions(torch.device("cpu")), weights, cache)


def test_what_was_written_is_read(cache: Cache) -> None:
    entry = cache.entry("features", weights="a")
    assert cache.read(entry, "block-0000") is None
    cache.write(entry, "block-0000", TENSORS, {"bad": "[]"})
    found = cache.read(cache.entry("features", weights="a"), "block-0000")
    assert found is not None
    assert found[0].keys() == TENSORS.keys()
    assert all(torch.equal(found[0][name], TENSORS[name]) for name in TENSORS)
    assert found[1] == {"bad": "[]"}
    assert cache.names(entry) == {"block-0000"}


def test_entries_are_told_apart_by_everything_about_them(cache: Cache) -> None:
    entries = [
        cache.entry("features", weights="a", block=32),
        cache.entry("features", weights="b", block=32),
        cache.entry("features", weights="a", block=33),
        cache.entry("texts", weights="a", block=32),
        cache.entry("features", weights="a", block=32, model={"width": 1}),
        cache.entry("features", weights="a", block=32, model={"width": 2}),
    ]
    assert len({*entries}) == len(entries)


def write_again_and_again(folder: Path, times: int) -> None:
    cache = Cache(folder, 1)
    entry = cache.entry("features", weights="a")
    for _ in range(times):
        cache.write(entry, "block-0000", {"features": torch.ones(200, 200)})


def test_two_processes_that_write_the_same_never_show_half_a_file(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write(cache.entry("features", weights="a"), "block-0000", {"features": torch.ones(200, 200)})
    writers = [start_apart(write_again_and_again, cache.folder, 200) for _ in range(2)]
    entry, reads = cache.entry("features", weights="a"), 0
    while not all(writer.done() for writer in writers):
        found = cache.read(entry, "block-0000")
        reads += found is not None
        assert found is None or bool((found[0]["features"] == 1).all())
    assert [writer.result() for writer in writers] == [None, None]
    assert reads > 0
    assert not caplog.records
    assert [path.name for path in entry.iterdir()] == ["block-0000.safetensors"]


def fill(cache: Cache, weights: str, used_s_ago: float) -> Path:
    entry = cache.entry("features", weights=weights)
    cache.write(entry, "block-0000", {"features": torch.zeros(250_000)})  # 1 MB
    os.utime(entry, (time.time() - used_s_ago,) * 2)
    return entry


def test_pruning_removes_what_was_not_used_for_longest_down_to_the_limit(cache: Cache) -> None:
    oldest, older, recent, now = (
        fill(cache, name, age) for name, age in (("a", 3 * DAY_S), ("b", 2 * DAY_S), ("c", DAY_S), ("d", 0))
    )
    cache.limit_gb = 2.5e-3
    cache.prune()
    assert [entry.exists() for entry in (oldest, older, recent, now)] == [False, False, True, True]
    cache.limit_gb = 0
    cache.prune()
    assert [entry.exists() for entry in (recent, now)] == [False, True]  # somebody may be using the last


def test_reading_makes_an_entry_recent(cache: Cache) -> None:
    read, other = fill(cache, "a", 3 * DAY_S), fill(cache, "b", 2 * DAY_S)
    cache.entry("features", weights="a")
    cache.limit_gb = 1.5e-3
    cache.prune()
    assert (read.exists(), other.exists()) == (True, False)


def test_what_a_killed_writer_left_is_removed(cache: Cache) -> None:
    entry = fill(cache, "a", DAY_S)
    leftover, fresh = entry / ".block-0001.killed", entry / ".block-0002.writing"
    for path, age in ((leftover, DAY_S), (fresh, 0)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    cache.prune()
    assert sorted(path.name for path in entry.iterdir()) == [fresh.name, "block-0000.safetensors"]


def test_a_folder_that_vanishes_while_pruning_is_no_obstacle(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = fill(cache, "a", DAY_S)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [entry, entry.with_name("gone")])
    cache.limit_gb = 0
    cache.prune()
    assert not entry.exists()


def test_a_disk_that_cannot_be_written_is_told_once(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    cache.folder.write_text("a file where the folder should be")
    entry = cache.entry("features", weights="a")
    for name in ("block-0000", "block-0001"):
        cache.write(entry, name, TENSORS)
        assert cache.read(entry, name) is None
    assert caplog.text.count("cannot be kept in") == 1


def test_a_full_disk_is_told_once_and_leaves_nothing_half_written(
    cache: Cache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clip_exp.evaluation.cache.save_file", full)
    entry = cache.entry("features", weights="a")
    for name in ("block-0000", "block-0001"):
        cache.write(entry, name, TENSORS)
    assert caplog.text.count("No space left on device") == 1
    assert list(entry.iterdir()) == []


@pytest.mark.parametrize("change", ["nothing", "weights", "templates", "names", "a line break in a name"])
def test_a_classifier_is_kept_for_its_weights_names_and_templates(
    nano: CLIP, cache: Cache, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["cat", "dog\nwolf", "bird"] if change == "a line break in a name" else ["cat", "dog", "wolf"]
    first = zero_shot_classifier(names, ["a {}."], subject(nano, cache))
    encoded: list[int] = []
    encode_trees = nano.encode_text_trees
    monkeypatch.setattr(nano, "encode_text_trees", lambda *trees: encoded.append(1) or encode_trees(*trees))
    names = ["cat", "dog", "fox"] if change == "names" else names
    names = ["cat", "dog", "wolf\nbird"] if change == "a line break in a name" else names
    weights, templates = "b" if change == "weights" else "a", ["one {}." if change == "templates" else "a {}."]
    second = zero_shot_classifier(names, templates, subject(nano, cache, weights))
    assert bool(encoded) == (change != "nothing")
    if change in ("nothing", "weights"):
        assert torch.equal(second, first)


def test_cut_texts_are_counted_from_the_cache_too(nano: CLIP, cache: Cache) -> None:
    counts = []
    for _ in range(2):
        using = subject(nano, cache)
        zero_shot_classifier(["cat", "very " * 100], ["a {}.", "the {}."], using)
        counts.append(using.tokenizer.truncated)
    assert counts == [2, 2]
