"""Features of batches and of datasets: each image is encoded once, with the same features on any number of ranks, and cached.

Cache entries are identified by what they depend on, written atomically, and never the cause of an error. On a GPU, batches are
launched one after the other, without waiting for their results.
"""

import gc
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from clip_exp.config.evaluation import EvalOnBadImage
from clip_exp.config.model import ModelConfig
from clip_exp.config.names import named_model
from clip_exp.data.files import ImageLimits
from clip_exp.data.image_sets import ImageFiles
from clip_exp.data.images import preprocessing_of
from clip_exp.errors import DataError
from clip_exp.evaluation.evaluated_model import EvaluatedModel
from clip_exp.evaluation.features import (
    Cache,
    EncodeOptions,
    ImageEncoder,
    encode_images,
    encode_pixels,
    encode_texts,
)
from clip_exp.models.clip import CLIP, build_model
from clip_exp.text.tokenizer import Tokenizer, build_tokenizer
from tests.compose import train_config
from tests.fake_cuda import fake_model, fake_tensors
from tests.processes import run_on_ranks, start_apart
from tests.small_runs import write_image
from tests.synchronization import SynchronizationWatch

OPTIONS = EncodeOptions(torch.device("cpu"), batch_size=10, num_workers=0)
FORGIVING = replace(OPTIONS, on_bad_image=EvalOnBadImage.skip)


class Opened(ImageFiles):
    """Image files that record which of them were opened."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)
        self.opened: list[int] = []

    def open(self, index: int, limits: ImageLimits) -> Image.Image:
        self.opened.append(index)
        return super().open(index, limits)


def encoder(weights: str = "a", model: CLIP | None = None) -> ImageEncoder:
    if model is None:
        torch.manual_seed(0)
        model = build_model(named_model("vit_nano")).eval()
    return EvaluatedModel(model, Tokenizer(77), named_model("vit_nano"), OPTIONS, weights).image_encoder()


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return [write_image(tmp_path / "images" / f"{number:03d}.png", number) for number in range(71)]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", limit_gb=1)


def test_a_second_evaluation_opens_no_image(paths: list[str], cache: Cache, nano: CLIP) -> None:
    first, second = Opened(paths), Opened(paths)
    computed = encode_images(encoder(model=nano), first, OPTIONS, cache)
    read = encode_images(encoder(model=nano), second, OPTIONS, cache)
    assert (sorted(first.opened), second.opened) == (list(range(71)), [])
    assert torch.equal(read.features, computed.features)
    assert torch.equal(read.kept, computed.kept)


def test_without_an_identity_nothing_is_cached(paths: list[str], cache: Cache, nano: CLIP) -> None:
    encode_images(replace(encoder(model=nano), identity=None), Opened(paths), OPTIONS, cache)
    assert not cache.folder.exists()


@pytest.mark.parametrize("change", ["content", "time", "order", "weights", "precision", "limits", "formats"])
def test_what_the_features_depend_on_is_computed_again(paths: list[str], cache: Cache, nano: CLIP, change: str) -> None:
    encode_images(encoder(model=nano), Opened(paths), OPTIONS, cache)
    weights, options, given = "a", OPTIONS, paths
    if change == "content":
        write_image(Path(paths[3]), seed=1000, size=(41, 36))
    elif change == "time":
        Path(paths[3]).touch()
    elif change == "order":
        given = paths[::-1]
    elif change == "weights":
        weights = "b"
    elif change == "precision":
        options = replace(OPTIONS, precision="bf16-mixed")
    elif change == "limits":
        options = replace(OPTIONS, limits=replace(OPTIONS.limits, max_pixels=10**6))
    else:
        options = replace(OPTIONS, limits=replace(OPTIONS.limits, formats=("PNG",)))
    images = Opened(given)
    encode_images(encoder(weights, nano), images, options, cache)
    assert sorted(images.opened) == list(range(71))


def test_an_interrupted_evaluation_encodes_only_the_missing_blocks(paths: list[str], cache: Cache, nano: CLIP) -> None:
    alone = encode_images(encoder(model=nano), Opened(paths), OPTIONS)
    whole, encoded = encoder(model=nano), []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        if sum(encoded) >= 40:
            raise KeyboardInterrupt
        encoded.append(len(pixels))
        return whole.encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        encode_images(replace(whole, encode=encode), Opened(paths), OPTIONS, cache)
    rest = Opened(paths)
    result = encode_images(whole, rest, OPTIONS, cache)
    assert sorted(rest.opened) == list(range(32, 71))
    assert torch.equal(result.features, alone.features)


@pytest.mark.parametrize("damage", ["cut short", "changed", "of zeros", "empty"])
def test_a_damaged_block_is_computed_again(
    paths: list[str], cache: Cache, nano: CLIP, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = encode_images(encoder(model=nano), Opened(paths), OPTIONS, cache)
    block = sorted(cache.folder.rglob("block-*.safetensors"))[1]
    content = block.read_bytes()
    damaged = {"cut short": content[:-1], "changed": content[:-1] + b"?", "of zeros": bytes(len(content)), "empty": b""}
    block.write_bytes(damaged[damage])
    images = Opened(paths)
    again = encode_images(encoder(model=nano), images, OPTIONS, cache)
    assert sorted(images.opened) == list(range(32, 64))
    assert torch.equal(again.features, whole.features)
    assert caplog.text.count("computed again") == 1
    third = Opened(paths)
    encode_images(encoder(model=nano), third, OPTIONS, cache)
    assert third.opened == []


def test_bad_images_are_cached_with_their_reasons_and_still_refused_where_they_are_an_error(
    paths: list[str], cache: Cache, nano: CLIP
) -> None:
    for number in (5, 70):
        Path(paths[number]).write_bytes(b"not an image")
    first, second, third = Opened(paths), Opened(paths), Opened(paths)
    computed = encode_images(encoder(model=nano), first, FORGIVING, cache)
    read = encode_images(encoder(model=nano), second, FORGIVING, cache)
    good = [number for number in range(71) if number not in (5, 70)]
    assert read.kept.tolist() == computed.kept.tolist() == good
    assert read.bad == computed.bad
    assert [reason.split(":")[0] for reason in read.bad] == [paths[5], paths[70]]
    assert torch.equal(read.features, computed.features)
    with pytest.raises(DataError, match=r"005\.png: .*on_bad_image=skip"):
        encode_images(encoder(model=nano), third, OPTIONS, cache)
    assert second.opened == third.opened == []


def test_a_block_without_a_good_image_is_not_an_error_but_a_dataset_of_them_is(
    paths: list[str], cache: Cache, nano: CLIP
) -> None:
    for number in range(32):
        Path(paths[number]).write_bytes(b"")
    for _ in range(2):
        encoded = encode_images(encoder(model=nano), Opened(paths), FORGIVING, cache)
        assert encoded.kept.tolist() == list(range(32, 71))
        assert len(encoded.features) == 39
    with pytest.raises(DataError, match="none of the 32 images can be read"):
        encode_images(encoder(model=nano), Opened(paths[:32]), FORGIVING, cache)


def test_a_cache_that_cannot_be_written_is_warned_about_once(
    paths: list[str], tmp_path: Path, nano: CLIP, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    encoded = encode_images(encoder(model=nano), Opened(paths), OPTIONS, Cache(tmp_path / "cache", 1))
    assert len(encoded.features) == 71
    assert caplog.text.count("cannot be cached") == 1


def on_ranks(rank: int, ranks: int, folder: str, paths: list[str]) -> None:
    """Encode without a cache, with a cache, and with a cache without the second half of its blocks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    few = encode_images(encoder(), ImageFiles(paths[:7]), OPTIONS)
    alone = encode_images(encoder(), ImageFiles(paths), OPTIONS)
    cache = Cache(Path(folder) / f"cache-{ranks}", 1)
    kept = encode_images(encoder(), ImageFiles(paths), OPTIONS, cache)
    dist.barrier()
    if rank == 0:
        for block in sorted(cache.folder.rglob("block-*.safetensors"))[1:]:
            block.unlink()
    dist.barrier()
    images = Opened(paths)
    rest = encode_images(encoder(), images, OPTIONS, cache)
    found = {"few": few.features, "alone": alone.features, "kept": kept.features, "rest": rest.features}
    torch.save((found, rest.kept, images.opened), Path(folder) / f"{ranks}-{rank}.pt")
    dist.destroy_process_group()


def test_features_are_the_same_bits_on_1_2_and_3_ranks(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{number:03d}.png", number) for number in range(101)]
    results = {}
    for ranks in (1, 2, 3):
        run_on_ranks(on_ranks, ranks, ranks, str(tmp_path), paths)
        results[ranks] = [torch.load(tmp_path / f"{ranks}-{rank}.pt") for rank in range(ranks)]
    expected = results[1][0][0]["alone"]
    assert len(expected) == 101
    for of_ranks in results.values():
        for found, kept, _ in of_ranks:
            assert kept.tolist() == list(range(101))
            assert torch.equal(found["few"], results[1][0][0]["few"])
            assert all(torch.equal(found[way], expected) for way in ("alone", "kept", "rest"))
        assert sorted(number for _, _, opened in of_ranks for number in opened) == list(range(32, 101))
        assert all(opened for _, _, opened in of_ranks)


class Deadly(ImageFiles):
    """Images that kill the worker that opens the last of them."""

    def open(self, index: int, limits: ImageLimits) -> Image.Image:
        if index == len(self) - 1 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(index, limits)


# torch may tell a second time, while the loader is taken down.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_is_killed_is_reported_with_a_remedy(paths: list[str], nano: CLIP) -> None:
    with pytest.raises(DataError, match=r"Use fewer workers \(num_workers\)"):
        encode_images(encoder(model=nano), Deadly(paths), replace(OPTIONS, num_workers=1))
    with suppress(RuntimeError):  # from torch's signal handler, where the connection broke before the signal came
        time.sleep(0.5)
        gc.collect()  # the loader, which would tell it in another test


TENSORS = {"features": torch.arange(6.0).view(2, 3), "kept": torch.tensor([0, 2])}
DAY_S = 86400


def evaluated_model(nano: CLIP, cache: Cache, weights: str = "a") -> EvaluatedModel:
    return EvaluatedModel(
        nano, Tokenizer(77), named_model("vit_nano"), EncodeOptions(torch.device("cpu")), weights, cache
    )


def test_written_contents_are_read(cache: Cache) -> None:
    entry = cache.entry("features", weights="a")
    assert cache.read(entry, "block-0000") is None
    cache.write(entry, "block-0000", TENSORS, {"bad": "[]"})
    found = cache.read(cache.entry("features", weights="a"), "block-0000")
    assert found is not None
    assert found[0].keys() == TENSORS.keys()
    assert all(torch.equal(found[0][name], TENSORS[name]) for name in TENSORS)
    assert found[1] == {"bad": "[]"}
    assert cache.names(entry) == {"block-0000"}


def test_entries_are_distinguished_by_everything_that_they_depend_on(cache: Cache) -> None:
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


def test_two_processes_that_write_the_same_never_expose_a_partial_file(
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


def test_pruning_removes_the_least_recently_used_entries_above_the_limit(cache: Cache) -> None:
    oldest, older, recent, now = (
        fill(cache, name, age) for name, age in (("a", 3 * DAY_S), ("b", 2 * DAY_S), ("c", DAY_S), ("d", 0))
    )
    cache.limit_gb = 2.5e-3
    cache.prune()
    assert [entry.exists() for entry in (oldest, older, recent, now)] == [False, False, True, True]
    cache.limit_gb = 0
    cache.prune()
    assert [entry.exists() for entry in (recent, now)] == [False, True]  # the last one may be in use


def test_reading_makes_an_entry_recent(cache: Cache) -> None:
    read, other = fill(cache, "a", 3 * DAY_S), fill(cache, "b", 2 * DAY_S)
    cache.entry("features", weights="a")
    cache.limit_gb = 1.5e-3
    cache.prune()
    assert (read.exists(), other.exists()) == (True, False)


def test_leftovers_of_a_killed_writer_are_removed(cache: Cache) -> None:
    entry = fill(cache, "a", DAY_S)
    leftover, fresh = entry / ".block-0001.killed", entry / ".block-0002.writing"
    for path, age in ((leftover, DAY_S), (fresh, 0)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    cache.prune()
    assert sorted(path.name for path in entry.iterdir()) == [fresh.name, "block-0000.safetensors"]


def test_a_folder_that_vanishes_while_pruning_is_not_an_error(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = fill(cache, "a", DAY_S)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [entry, entry.with_name("gone")])
    cache.limit_gb = 0
    cache.prune()
    assert not entry.exists()


def test_a_disk_that_cannot_be_written_is_warned_about_once(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    cache.folder.write_text("a file where the folder should be")
    entry = cache.entry("features", weights="a")
    for name in ("block-0000", "block-0001"):
        cache.write(entry, name, TENSORS)
        assert cache.read(entry, name) is None
    assert caplog.text.count("cannot be cached in") == 1


def test_a_full_disk_is_warned_about_once_and_leaves_no_partial_file(
    cache: Cache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clip_exp.evaluation.features.save_file", full)
    entry = cache.entry("features", weights="a")
    for name in ("block-0000", "block-0001"):
        cache.write(entry, name, TENSORS)
    assert caplog.text.count("No space left on device") == 1
    assert list(entry.iterdir()) == []


@pytest.mark.parametrize("change", ["nothing", "weights", "templates", "names", "a line break in a name"])
def test_a_classifier_is_cached_for_its_weights_names_and_templates(
    nano: CLIP, cache: Cache, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["cat", "dog\nwolf", "bird"] if change == "a line break in a name" else ["cat", "dog", "wolf"]
    first = evaluated_model(nano, cache).classifier(names, ["a {}."])
    encoded: list[int] = []
    encode_trees = nano.encode_text_trees
    monkeypatch.setattr(nano, "encode_text_trees", lambda *trees: encoded.append(1) or encode_trees(*trees))
    names = ["cat", "dog", "fox"] if change == "names" else names
    names = ["cat", "dog", "wolf\nbird"] if change == "a line break in a name" else names
    weights, templates = "b" if change == "weights" else "a", ["one {}." if change == "templates" else "a {}."]
    second = evaluated_model(nano, cache, weights).classifier(names, templates)
    assert bool(encoded) == (change != "nothing")
    if change in ("nothing", "weights"):
        assert torch.equal(second, first)


def test_truncated_texts_are_counted_from_the_cache_too(nano: CLIP, cache: Cache) -> None:
    counts = []
    for _ in range(2):
        using = evaluated_model(nano, cache)
        using.classifier(["cat", "very " * 100], ["a {}.", "the {}."])
        counts.append(using.tokenizer.truncated)
    assert counts == [2, 2]


TEXTS = [f"{a} {b} {c}" for a in ("one", "two", "three", "four") for b in ("red", "blue", "green") for c in range(25)]


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return train_config("model=vit_nano").model


def test_a_batch_of_images_does_not_wait_for_the_gpu(config: ModelConfig) -> None:
    preprocessing = preprocessing_of(config.image)
    with fake_tensors():
        model = fake_model(config, "cuda")
        pixels = torch.zeros(4, 3, config.image.image_size, config.image.image_size, dtype=torch.uint8)
        for watch in (SynchronizationWatch(), SynchronizationWatch()):  # the first batch of a process may wait
            with watch:
                features = encode_pixels(model, pixels, preprocessing, torch.device("cuda"))
    assert watch.found == []
    assert features.device.type == "cuda"


@pytest.mark.parametrize(("trees", "texts"), [(True, TEXTS), (False, TEXTS[:5])])
def test_texts_wait_for_the_gpu_equally_often_in_one_batch_and_in_many(
    config: ModelConfig, trees: bool, texts: list[str]
) -> None:
    found = {}
    with fake_tensors():
        model = fake_model(config, "cuda")
        model.text.shares_prefixes = trees
        for batch_size in (1, len(TEXTS) * 100):
            with SynchronizationWatch() as watch:
                encode_texts(model, build_tokenizer(config.text), texts, batch_size, "cuda")
            found[batch_size] = len(watch.found)
    assert len(set(found.values())) == 1, found
