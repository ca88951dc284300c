"""Features of a whole set: each picture once, the same on any number of ranks, and read where they are kept."""

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

from clip_exp.config.data_schema import OnBadImage
from clip_exp.config.models import named_model
from clip_exp.data.pictures import PictureFiles
from clip_exp.errors import DataError
from clip_exp.evaluation.cache import Cache
from clip_exp.evaluation.encode import EncodeOptions, ImageEncoder
from clip_exp.evaluation.features import encode_pictures
from clip_exp.evaluation.subject import Subject
from clip_exp.models.build import build_model
from clip_exp.models.clip import CLIP
from clip_exp.text.tokenizer import Tokenizer
from tests.processes import run_on_ranks
from tests.small_runs import write_picture

OPTIONS = EncodeOptions(torch.device("cpu"), batch_size=10, num_workers=0)
FORGIVING = replace(OPTIONS, on_bad_image=OnBadImage.replace)


class Opened(PictureFiles):
    """Pictures in files that remember which of them were opened."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)
        self.opened: list[int] = []

    def open(self, index: int, max_pixels: int) -> Image.Image:
        self.opened.append(index)
        return super().open(index, max_pixels)


def encoder(weights: str = "a", model: CLIP | None = None) -> ImageEncoder:
    if model is None:
        torch.manual_seed(0)
        model = build_model(named_model("vit_nano")).eval()
    return Subject(model, Tokenizer(77), named_model("vit_nano"), OPTIONS, weights).image_encoder()


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return [write_picture(tmp_path / "pictures" / f"{number:03d}.png", number) for number in range(71)]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", limit_gb=1)


def test_a_second_evaluation_opens_no_picture(paths: list[str], cache: Cache, nano: CLIP) -> None:
    first, second = Opened(paths), Opened(paths)
    computed = encode_pictures(encoder(model=nano), first, OPTIONS, cache)
    read = encode_pictures(encoder(model=nano), second, OPTIONS, cache)
    assert (sorted(first.opened), second.opened) == (list(range(71)), [])
    assert torch.equal(read.features, computed.features)
    assert torch.equal(read.kept, computed.kept)


def test_without_an_identity_nothing_is_kept(paths: list[str], cache: Cache, nano: CLIP) -> None:
    encode_pictures(replace(encoder(model=nano), identity=None), Opened(paths), OPTIONS, cache)
    assert not cache.folder.exists()


@pytest.mark.parametrize("change", ["content", "time", "order", "weights", "precision", "max_image_pixels"])
def test_what_the_features_depend_on_is_computed_again(paths: list[str], cache: Cache, nano: CLIP, change: str) -> None:
    encode_pictures(encoder(model=nano), Opened(paths), OPTIONS, cache)
    weights, options, given = "a", OPTIONS, paths
    if change == "content":
        write_picture(Path(paths[3]), seed=1000, size=(41, 36))
    elif change == "time":
        Path(paths[3]).touch()
    elif change == "order":
        given = paths[::-1]
    elif change == "weights":
        weights = "b"
    elif change == "precision":
        options = replace(OPTIONS, precision="bf16-mixed")
    else:
        options = replace(OPTIONS, max_image_pixels=10**6)
    pictures = Opened(given)
    encode_pictures(encoder(weights, nano), pictures, options, cache)
    assert sorted(pictures.opened) == list(range(71))


def test_an_interrupted_evaluation_encodes_only_the_missing_blocks(paths: list[str], cache: Cache, nano: CLIP) -> None:
    alone = encode_pictures(encoder(model=nano), Opened(paths), OPTIONS)
    whole, encoded = encoder(model=nano), []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        if sum(encoded) >= 40:
            raise KeyboardInterrupt
        encoded.append(len(pixels))
        return whole.encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        encode_pictures(replace(whole, encode=encode), Opened(paths), OPTIONS, cache)
    rest = Opened(paths)
    result = encode_pictures(whole, rest, OPTIONS, cache)
    assert sorted(rest.opened) == list(range(32, 71))
    assert torch.equal(result.features, alone.features)


@pytest.mark.parametrize("damage", ["cut short", "changed", "of zeros", "empty"])
def test_a_damaged_block_is_made_again(
    paths: list[str], cache: Cache, nano: CLIP, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = encode_pictures(encoder(model=nano), Opened(paths), OPTIONS, cache)
    block = sorted(cache.folder.rglob("block-*.safetensors"))[1]
    content = block.read_bytes()
    damaged = {"cut short": content[:-1], "changed": content[:-1] + b"?", "of zeros": bytes(len(content)), "empty": b""}
    block.write_bytes(damaged[damage])
    pictures = Opened(paths)
    again = encode_pictures(encoder(model=nano), pictures, OPTIONS, cache)
    assert sorted(pictures.opened) == list(range(32, 64))
    assert torch.equal(again.features, whole.features)
    assert caplog.text.count("made again") == 1
    third = Opened(paths)
    encode_pictures(encoder(model=nano), third, OPTIONS, cache)
    assert third.opened == []


def test_bad_pictures_are_kept_with_their_reasons_and_still_refused_where_they_are_an_error(
    paths: list[str], cache: Cache, nano: CLIP
) -> None:
    for number in (5, 70):
        Path(paths[number]).write_bytes(b"not a picture")
    first, second, third = Opened(paths), Opened(paths), Opened(paths)
    computed = encode_pictures(encoder(model=nano), first, FORGIVING, cache)
    read = encode_pictures(encoder(model=nano), second, FORGIVING, cache)
    good = [number for number in range(71) if number not in (5, 70)]
    assert read.kept.tolist() == computed.kept.tolist() == good
    assert read.bad == computed.bad
    assert [reason.split(":")[0] for reason in read.bad] == [paths[5], paths[70]]
    assert torch.equal(read.features, computed.features)
    with pytest.raises(DataError, match=r"005\.png: .*on_bad_image=replace"):
        encode_pictures(encoder(model=nano), third, OPTIONS, cache)
    assert second.opened == third.opened == []


def test_a_block_without_a_good_picture_is_no_obstacle_but_a_set_of_them_is(
    paths: list[str], cache: Cache, nano: CLIP
) -> None:
    for number in range(32):
        Path(paths[number]).write_bytes(b"")
    for _ in range(2):
        encoded = encode_pictures(encoder(model=nano), Opened(paths), FORGIVING, cache)
        assert encoded.kept.tolist() == list(range(32, 71))
        assert len(encoded.features) == 39
    with pytest.raises(DataError, match="none of the 32 pictures can be read"):
        encode_pictures(encoder(model=nano), Opened(paths[:32]), FORGIVING, cache)


def test_a_cache_that_cannot_be_written_is_told_once(
    paths: list[str], tmp_path: Path, nano: CLIP, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    encoded = encode_pictures(encoder(model=nano), Opened(paths), OPTIONS, Cache(tmp_path / "cache", 1))
    assert len(encoded.features) == 71
    assert caplog.text.count("cannot be kept") == 1


def on_ranks(rank: int, ranks: int, folder: str, paths: list[str]) -> None:
    """Encode without a cache; with one; and, where the second half of its blocks is missing, with that."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    few = encode_pictures(encoder(), PictureFiles(paths[:7]), OPTIONS)
    alone = encode_pictures(encoder(), PictureFiles(paths), OPTIONS)
    cache = Cache(Path(folder) / f"cache-{ranks}", 1)
    kept = encode_pictures(encoder(), PictureFiles(paths), OPTIONS, cache)
    dist.barrier()
    if rank == 0:
        for block in sorted(cache.folder.rglob("block-*.safetensors"))[1:]:
            block.unlink()
    dist.barrier()
    pictures = Opened(paths)
    rest = encode_pictures(encoder(), pictures, OPTIONS, cache)
    found = {"few": few.features, "alone": alone.features, "kept": kept.features, "rest": rest.features}
    torch.save((found, rest.kept, pictures.opened), Path(folder) / f"{ranks}-{rank}.pt")
    dist.destroy_process_group()


def test_features_are_the_same_bits_on_1_2_and_3_ranks(tmp_path: Path) -> None:
    paths = [write_picture(tmp_path / f"{number:03d}.png", number) for number in range(101)]
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


class Deadly(PictureFiles):
    """The worker that opens the last of them is killed."""

    def open(self, index: int, max_pixels: int) -> Image.Image:
        if index == len(self) - 1 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(index, max_pixels)


# torch may tell a second time, while the loader is taken down.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_is_killed_is_told_with_a_remedy(paths: list[str], nano: CLIP) -> None:
    with pytest.raises(DataError, match=r"use fewer of them \(num_workers\)"):
        encode_pictures(encoder(model=nano), Deadly(paths), replace(OPTIONS, num_workers=1))
    with suppress(RuntimeError):  # from torch's signal handler, where the connection broke before the signal came
        time.sleep(0.5)
        gc.collect()  # the loader, which would tell it in another test
