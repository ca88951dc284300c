"""A user's Dataset joins the same stream as a table: order, workers, ranks, captions, bad images, validation and messages."""

import io
import json
import multiprocessing
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clip_exp.config.base import parse
from clip_exp.config.data import Captions, CustomDataConfig
from clip_exp.config.targets import ALLOWED
from clip_exp.data.custom import DatasetItems, DatasetRows, ItemError, UserDataset, image_id, open_dataset
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.data.files import ImageLimits
from clip_exp.data.images import preprocessing_of
from clip_exp.errors import CheckpointError, ConfigError, DataError
from clip_exp.models.families.clip import ViTConfig
from clip_exp.text.tokenizer import Tokenizer
from tests.data.conftest import Build
from tests.data.test_loader import Place, digest, read
from tests.datasets import CLASSES, Fields, Noisy, Pairs, Record, Returning, Versioned, pixels

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
LIMITS = ImageLimits()


@pytest.fixture(autouse=True)
def _allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, "tests")


def config(name: str = "Pairs", **values: Any) -> CustomDataConfig:
    given = {"name": "custom", "_target_": f"tests.datasets.{name}", "num_workers": 0, **values}
    return parse(CustomDataConfig, given, at="data.")


def module(name: str = "Pairs", *, steps: int = 9, seed: int = 0, batch: int = 16, **values: Any) -> PairsDataModule:
    return PairsDataModule(
        config(name, **values),
        preprocessing=preprocessing_of(ViTConfig(image_size=16, patch_size=8, width=8, layers=1, heads=1)),
        tokenizer=Tokenizer(77),
        global_batch_size=batch,
        total_steps=steps,
        seed=seed,
    )


def returning(item: Any, count: int = 8, **attributes: Any) -> UserDataset:
    return UserDataset(Returning(item, count, **attributes), "mine.Pairs", "data")


def encoded(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


# The stream.


@pytest.mark.parametrize("captions", Captions)
def test_the_pairs_of_a_table_come_from_a_dataset_as_from_the_table(
    captions: Captions, pairs: Path, build: Build
) -> None:
    table = read(build(pairs, total_steps=15, captions=captions))
    dataset = read(module("OfTable", table=str(pairs), batch=4, steps=15, captions=captions))
    assert len(table) == len(dataset) == 15
    for ours, theirs in zip(dataset, table, strict=True):
        assert torch.equal(ours.image, theirs.image)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.caption_id, theirs.caption_id)


def test_samples_do_not_depend_on_workers_although_the_dataset_draws_random_numbers() -> None:
    whole = read(module("Noisy"))
    for workers in (1, 2):
        assert digest(read(module("Noisy", num_workers=workers))) == digest(whole)
    assert digest(read(module("Noisy", seed=1))) != digest(whole)
    first, second = whole[:3], whole[3:6]  # the epochs of 48 samples
    assert {*torch.cat([b.image_id for b in first]).tolist()} != {*torch.cat([b.image_id for b in second]).tolist()}


def test_the_generators_of_the_training_process_are_left_as_they_were() -> None:
    def drawn() -> tuple[float, int, float]:
        return random.random(), int(np.random.randint(1 << 30)), float(torch.rand(()))

    batches = iter(module("Noisy").train_dataloader())
    next(batches)  # the DataLoader draws a seed when it starts
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = drawn()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    next(batches)
    assert drawn() == expected


def test_ranks_share_out_the_batches_of_one_process() -> None:
    whole, halves = read(module("Noisy")), []
    for rank in range(2):
        of_rank = module("Noisy")
        of_rank.trainer = Place(rank, 2)
        halves.append(read(of_rank))
    for batch, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(batch.image, torch.cat([part.image for part in parts]))
        assert torch.equal(batch.image_id, torch.cat([part.image_id for part in parts]))


def test_a_restart_in_the_middle_of_an_epoch_sees_the_same_samples() -> None:
    whole = read(module("Noisy"))
    first = module("Noisy")
    first.trainer = Place(0, 1, global_step=4)
    second = module("Noisy", num_workers=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert digest(read(second)) == digest(whole[4:])


def test_every_item_comes_once_per_epoch_and_is_read_once_per_sample() -> None:
    calls: list[int] = []
    pairs = Pairs(12)

    def item(index: int) -> Any:
        calls.append(index)
        return pairs[index]

    rows = DatasetRows(returning(item, 12), Captions.random)
    loaded = [rows.load(row, seed=0, epoch=0, limits=LIMITS) for row in range(12)]
    assert calls == [*range(12)]
    assert len({pair.image_id for pair in loaded}) == 12
    assert {pair.caption.split()[0] for pair in loaded} == {"image", "the"}


def test_all_captions_are_rows_and_wrong_numbers_of_them_are_reported() -> None:
    rows = DatasetRows(UserDataset(Pairs(3), "mine.Pairs", "data"), Captions.all)
    assert len(rows) == 6
    captions = [rows.load(row, 0, 0, LIMITS).caption for row in range(6)]
    assert captions == [caption for i in range(3) for caption in Pairs()[i]["captions"]]
    three = returning(lambda i: (pixels(i), ["a", "b", "c"]), 2, num_captions=lambda i: 2)
    with pytest.raises(DataError, match=r"mine.Pairs\[1\] has 3 captions, but num_captions\(1\) returned 2"):
        DatasetRows(three, Captions.all).load(2, 0, 0, LIMITS)
    with pytest.raises(
        ConfigError, match=r"add the method num_captions\(index\) to mine.Pairs, or use data.captions=random"
    ):
        DatasetRows(returning(lambda i: (pixels(i), "a")), Captions.all)
    with pytest.raises(ConfigError, match=r"num_captions\(0\) returned 0: return an integer of at least 1"):
        DatasetRows(returning(lambda i: (pixels(i), "a"), num_captions=lambda i: 0), Captions.all)


def test_a_string_and_a_list_of_one_string_are_the_same_caption() -> None:
    one, other = (DatasetRows(returning(lambda i, c=c: (pixels(i), c)), Captions.random) for c in ("a dog", ["a dog"]))
    assert one.load(2, 0, 1, LIMITS).caption == other.load(2, 0, 1, LIMITS).caption == "a dog"


def test_max_rows_takes_the_first_items_and_a_block_shuffle_keeps_neighbors_together() -> None:
    few = module(max_rows=20, batch=20, steps=1)
    assert few.num_rows == 20
    blocks = module(shuffle="block", shuffle_block=2, shuffle_window=2)
    order = [blocks._stream[position].row for position in range(48)]
    assert sorted(order) == [*range(48)]
    windows = [sorted(order[start : start + 4]) for start in range(0, 40, 4)]
    assert sum(window[1] - window[0] in (1, 47) and window[3] - window[2] in (1, 47) for window in windows) >= 8
    full = [module()._stream[position].row for position in range(48)]
    assert full != order


# Items.

FORMS = {
    "mapping": lambda i: {"image": Image.fromarray(pixels(i)), "caption": f"image {i}"},
    "mapping with further columns": lambda i: {"image": pixels(i), "captions": [f"image {i}"], "score": 0.5},
    "tuple": lambda i: (Image.fromarray(pixels(i)), f"image {i}"),
    "tuple with a label": lambda i: (pixels(i), (f"image {i}",), "odd"),
    "list": lambda i: [pixels(i), f"image {i}"],
    "named tuple": lambda i: Fields(pixels(i), f"image {i}"),
    "dataclass": lambda i: Record(pixels(i), [f"image {i}"]),
    "tensor": lambda i: (torch.from_numpy(pixels(i)).permute(2, 0, 1), f"image {i}"),
    "bytes": lambda i: (encoded(pixels(i)), f"image {i}"),
    "memoryview": lambda i: (memoryview(encoded(pixels(i))), f"image {i}"),
    "palette": lambda i: (Image.fromarray(pixels(i)).convert("RGBA"), f"image {i}"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("validation", [False, True], ids=["training", "validation"])
def test_every_form_of_an_item_gives_the_same_sample(form: str, validation: bool, monkeypatch) -> None:
    def sample(form: str) -> Any:
        monkeypatch.setattr("tests.datasets.Pairs.__getitem__", lambda self, i: FORMS[form](i))
        built = module(val={"_target_": "tests.datasets.Pairs"})
        batch = next(iter(built.val_dataloader() if validation else built.train_dataloader()))
        return batch.image, batch.tokens, batch.caption_id

    assert all(torch.equal(*both) for both in zip(sample(form), sample("mapping"), strict=True))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_read_as_a_file(kind: type, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(encoded(pixels(1)))
    dataset = returning(lambda i: (kind(tmp_path / f"{i}.png"), "one"))
    assert dataset.read(1, (0,), LIMITS).image == bytearray(encoded(pixels(1)))


def test_equal_images_have_equal_ids_and_others_do_not() -> None:
    images = [
        pixels(0),
        pixels(1),
        pixels(0),
        pixels(0).reshape(20, 80, 3),
        Image.fromarray(pixels(1)),
        encoded(pixels(1)),
    ]
    rows = DatasetRows(returning(lambda i: (images[i], f"caption {i}"), len(images)), Captions.random)
    ids = [rows.load(row, 0, 0, LIMITS).image_id for row in range(len(images))]
    assert ids[0] == ids[2]
    assert len(set(ids)) >= 4
    assert ids[3] != ids[0]
    assert ids[5] != ids[1]


def test_palette_images_that_differ_only_in_their_palettes_have_different_ids() -> None:
    images = []
    for color in ((255, 0, 0), (0, 0, 255), (255, 0, 0)):
        image = Image.new("P", (8, 8))
        image.putpalette(color)
        images.append(image)
    first, other, equal = map(image_id, images)
    assert first == equal != other


EXPECTED = r"an item must be a mapping with the keys image and caption \(or captions\), or a tuple"
WRONG = {
    "nothing": (None, rf"returned None, but {EXPECTED}"),
    "only an image": (pixels(0), rf"returned a uint8 ndarray \[40, 40, 3\], but {EXPECTED}"),
    "four values": ((1, 2, 3, 4), r"returned a tuple of 4 values \(int, int, int, int\)"),
    "other keys": ({"img": 1, "text": 2}, "has the keys img, text, but"),
    "two captions": ({"image": 1, "caption": "a", "captions": ["b"]}, "has the keys image, caption, captions, but"),
    "a class as caption": ((pixels(0), 3), "has a value of type int as caption, but it must be a string or a list"),
    "no caption": ((pixels(0), []), "has an empty list as caption"),
    "a mixed list": ((pixels(0), ["a", None]), r"has a list of 2 values \(str, NoneType\) as caption"),
    "a normalized tensor": (
        (torch.zeros(3, 8, 8), "a"),
        r"has a float32 Tensor \[3, 8, 8\] as image, but it must be .* before any normalization",
    ),
    "channels last": ((torch.zeros(8, 8, 3, dtype=torch.uint8), "a"), r"has a uint8 Tensor \[8, 8, 3\] as image"),
    "channels first": ((np.zeros((3, 8, 8), np.uint8), "a"), r"has a uint8 ndarray \[3, 8, 8\] as image"),
    "a number as image": ((7, "a"), "has a value of type int as image"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_invalid_item_is_reported_with_its_index_and_what_is_expected(wrong: str) -> None:
    item, message = WRONG[wrong]
    with pytest.raises(DataError, match=rf"^mine.Pairs\[5\] {message}") as raised:
        returning(lambda i: item).read(5, (0,), LIMITS)
    assert str(raised.value).endswith("docs/extending.md describes what a data set returns.")


# Further columns.


def columns_of(values: Callable[[int], dict[str, Any]], columns: list[str], count: int = 8) -> DatasetRows:
    dataset = returning(lambda i: {"image": pixels(i), "caption": f"image {i}", **values(i)}, count)
    return DatasetRows(dataset, Captions.random, columns)


def test_columns_are_texts_or_numbers_of_every_form_and_other_fields_are_left_out() -> None:
    rows = columns_of(
        lambda i: {
            "negative": f"not {i}",
            "score": i / 2,
            "feature": torch.full((2, 3), float(i)),
            "list": [i, 2],
            "unused": {},
        },
        ["negative", "score", "feature", "list"],
    )
    assert rows.shapes == {"negative": None, "score": (), "feature": (2, 3), "list": (2,)}
    columns = rows.load(3, 0, 0, LIMITS).columns
    assert columns["negative"] == "not 3"
    assert {name: columns[name].tolist() for name in ("score", "feature", "list")} == {
        "score": 1.5, "feature": [[3.0] * 3] * 2, "list": [3.0, 2.0],
    }  # fmt: skip
    assert all(columns[name].dtype == np.float32 for name in ("score", "feature", "list"))


def test_columns_reach_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def item(self: Pairs, index: int) -> dict[str, Any]:
        return {"image": pixels(index), "caption": "a", "negative": f"not {index}", "score": float(index)}

    monkeypatch.setattr("tests.datasets.Pairs.__getitem__", item)
    for workers in (0, 2):
        (batch,) = read(module(columns=["negative", "score"], steps=1, batch=48, num_workers=workers))
        assert sorted(batch.columns["score"].tolist()) == [*map(float, range(48))]
        assert batch.columns["negative"].dtype == torch.int64
        assert len(batch.columns["negative"]) == 48


def test_wrong_columns_are_reported() -> None:
    with pytest.raises(
        DataError, match=r"mine.Pairs\[0\] has no field 'score' \(data.columns\): its fields are image, caption, scor\."
    ):
        columns_of(lambda i: {"scor": 1}, ["score"])
    with pytest.raises(
        DataError, match=r"mine.Pairs\[0\]: 'score' \(data.columns\) is .*, but it must be a string, a finite number"
    ):
        columns_of(lambda i: {"score": None}, ["score"])
    rows = columns_of(lambda i: {"score": [1.0] * (1 + i)}, ["score"])
    with pytest.raises(
        DataError,
        match=r"mine.Pairs\[2\]: 'score' .* has numbers of shape \[3\], but the first item has numbers of shape",
    ):
        rows.load(2, 0, 0, LIMITS)
    with pytest.raises(DataError, match="its fields are none, as it is a tuple"):
        DatasetRows(returning(lambda i: (pixels(i), "a")), Captions.random, ["score"])


# Errors of the user's code.


@pytest.mark.parametrize("workers", [0, 2])
def test_an_oserror_of_the_dataset_is_a_bad_image_with_its_reason(workers: int) -> None:
    built = module("Failing", error="os", num_workers=workers, max_bad_fraction=0.5)
    batches = [built.on_before_batch_transfer(batch, 0) for batch in read(built)]
    assert built.bad_samples is not None
    expected = {f"tests.datasets.Failing[{i}]": "cannot be opened: the server is busy" for i in range(1, 48, 4)}
    assert built.bad_samples.reasons == expected
    assert all(len(batch.image) == 16 for batch in batches)


def test_too_many_bad_items_stop_the_run_and_on_bad_image_error_at_the_first() -> None:
    built = module("Failing", error="os")
    batches = read(built)
    with pytest.raises(DataError, match=r"more than data.max_bad_fraction=0.1; the first is tests.datasets.Failing\["):
        [built.on_before_batch_transfer(batch, 0) for batch in batches]
    with pytest.raises(DataError, match=r"The image of tests.datasets.Failing\[\d+\] cannot be read: cannot be opened"):
        read(module("Failing", error="os", on_bad_image="error", num_workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_another_exception_stops_the_run_with_index_message_and_line_and_without_a_traceback(workers: int) -> None:
    with pytest.raises(DataError) as raised:
        read(module("Failing", error="value", num_workers=workers))
    assert type(raised.value) is ItemError
    text = str(raised.value)
    assert text.startswith("tests.datasets.Failing[")
    assert "] failed: ValueError: no such row (datasets.py, line " in text
    assert "Traceback" not in text
    assert "\n" not in text


BAD = {
    "missing": (lambda: "/nowhere/1.png", "no such file"),
    "not an image": (lambda: b"<html>", "not an image: a web page"),
    "empty": (lambda: b"", "empty file"),
    "truncated": (lambda: encoded(pixels(0))[:300], "truncated"),
    "too many bytes": (lambda: bytes(2000), "too many bytes: 2000, more than max_image_bytes=1500"),
    "too many pixels": (
        lambda: Image.new("RGB", (80, 80)),
        "too many pixels: 80 x 80 pixels, more than max_image_pixels",
    ),
    "array of too many pixels": (lambda: np.zeros((80, 80, 3), np.uint8), "too many pixels: 80 x 80"),
    "unloadable": (lambda: Image.open(io.BytesIO(encoded(pixels(0))[:300])), "truncated"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("validation", [False, True], ids=["training", "validation"])
def test_an_image_that_cannot_be_used_is_bad_for_the_same_reasons_as_in_a_table(
    bad: str, validation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, reason = BAD[bad]

    def item(self: Pairs, index: int) -> Any:
        return (image() if index == 3 else pixels(index)), f"image {index}"

    monkeypatch.setattr("tests.datasets.Pairs.__getitem__", item)
    limits = {"max_image_pixels": 5000, "max_image_bytes": 1500}
    built = module(val={"_target_": "tests.datasets.Pairs"}, **limits)
    found = [bad for batch in (built.val_dataloader() if validation else read(built)) for bad in batch.bad]
    assert {each.path for each in found} == {"tests.datasets.Pairs[3]"}
    assert found[0].reason.startswith(reason)


# Validation.


def test_validation_items_come_with_all_captions_and_labels() -> None:
    built = module(val={"_target_": "tests.datasets.Pairs", "count": 5, "start": 100})
    (batch,) = built.val_dataloader()
    assert built.class_names == CLASSES
    assert batch.label.tolist() == [0, 1, 0, 1, 0]
    assert batch.caption_image.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert batch.caption_index.tolist() == sorted({*batch.caption_index.tolist()})
    assert len({*batch.caption_id.tolist()}) == 10


def test_a_table_validates_a_dataset_and_a_dataset_validates_a_table(pairs: Path, build: Build) -> None:
    of_table = module(val=str(pairs))
    assert sum(len(batch.image) for batch in of_table.val_dataloader()) == 23
    of_dataset = build(pairs, val={"_target_": "tests.datasets.Pairs", "count": 5})
    assert sum(len(batch.image) for batch in of_dataset.val_dataloader()) == 5


@pytest.mark.parametrize(
    ("label", "position"),
    [("odd", 1), (0, 0), (np.int64(1), 1), (torch.tensor(1), 1), (None, -1), (-1, -1), ("", -1)],
)
def test_a_label_is_a_name_or_a_position_or_nothing(label: Any, position: int) -> None:
    items = DatasetItems(returning(lambda i: (pixels(i), "a", label), classes=CLASSES))
    assert items.load(2, LIMITS).label == position


@pytest.mark.parametrize("label", ["cat", 2, 1.5, [1]])
def test_a_label_that_is_not_a_class_is_reported(label: Any) -> None:
    items = DatasetItems(returning(lambda i: (pixels(i), "a", label), classes=CLASSES))
    with pytest.raises(
        DataError, match=r"mine.Pairs\[2\] has the label .*, but it must be one of the 2 names in mine.Pairs.classes"
    ):
        items.load(2, LIMITS)


def test_labels_without_classes_are_ignored() -> None:
    items = DatasetItems(returning(lambda i: (pixels(i), "a", "cat")))
    assert items.class_names == []
    assert items.load(2, LIMITS).label == -1


# Checks before a run, and of changed data.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "Streamed"},
            r"data._target_=tests.datasets.Streamed is an IterableDataset.*write its samples to shards",
        ),
        (
            {"name": "Several"},
            r"train_dataloader returned a list of 1 values .*, but a DataLoader with one data set is needed",
        ),
        ({"name": "WithoutLength"}, r"creates a value of type WithoutLength, which has no __len__ or no __getitem__"),
        ({"count": 0}, r"data._target_=tests.datasets.Pairs has no items \(len\(\) is 0\): check its arguments"),
    ],
)
def test_what_is_not_a_map_style_dataset_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        module(**values).setup()


def test_the_data_sets_of_a_lightning_data_module_join_the_stream_and_a_warning_says_what_is_not_used(caplog) -> None:
    opened = open_dataset(config("Module"), "data")
    assert isinstance(opened.dataset, Pairs)
    assert len(opened) == 48
    assert "its sampler, batch size, collate function and hooks are not used" in caplog.text.replace("Its", "its")
    assert open_dataset(config("Module"), "data.val").dataset.start == 100
    own, same = (digest(read(module(name))) for name in ("Module", "Pairs"))
    assert own == same


def test_invalid_fingerprints_and_classes_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data._target_=mine.Pairs: fingerprint is not a value that JSON can represent"
    ):
        returning(lambda i: None, fingerprint={1, 2})
    with pytest.raises(
        ConfigError, match=r"fingerprint failed: ZeroDivisionError: division by zero \(test_custom_dataset.py, line"
    ):
        returning(lambda i: None, fingerprint=lambda: 1 / 0)
    for classes in (["a", "a"], [1, 2]):
        with pytest.raises(ConfigError, match="classes must be a list of distinct class names"):
            DatasetItems(returning(lambda i: None, classes=classes))


def test_a_dataset_that_cannot_be_pickled_is_refused_only_if_workers_are_not_forked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Pairs, "__reduce__", lambda self: (_ for _ in ()).throw(TypeError("cannot pickle a socket")))
    open_dataset(config(), "data")
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(ConfigError, match=r"cannot be pickled for worker processes \(cannot pickle a socket\)"):
        open_dataset(config(), "data")
    open_dataset(config(), "data", num_workers=0)


def test_workers_that_are_not_forked_load_the_same_samples() -> None:
    rows = DatasetRows(UserDataset(Noisy(4), "mine.Noisy", "data"), Captions.all)
    copy = pickle.loads(pickle.dumps(rows))
    for row in range(8):
        ours, theirs = (each.load(row, 3, 1, LIMITS) for each in (rows, copy))
        assert (ours.caption, ours.image_id) == (theirs.caption, theirs.image_id)


def test_data_that_has_changed_is_refused_and_without_a_fingerprint_a_warning_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = module("Versioned").state_dict()
    module("Versioned").load_state_dict(state)
    assert not caplog.records
    with pytest.raises(CheckpointError, match=r"tests.datasets.Versioned has different content in its 48 rows"):
        module("Versioned", version=2).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"tests.datasets.Versioned has 40 rows instead of 48"):
        module("Versioned", count=40).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"tests.datasets.Pairs has 40 rows instead of 48"):
        module(count=40).load_state_dict(module().state_dict())
    assert not caplog.records
    module().load_state_dict(module().state_dict())
    assert "only the length of tests.datasets.Pairs is compared" in caplog.text
    assert Versioned(3).fingerprint() == {"version": 3}


# Names of arguments.


def test_a_required_parameter_gets_the_key_of_data_with_its_name_and_an_optional_one_keeps_its_default() -> None:
    given = open_named(max_rows=12)
    assert given == (12, None, "own", "own")


def test_keys_of_tables_are_arguments_unless_validation_data_is_a_table(pairs: Path) -> None:
    assert open_named(max_rows=12, image_root="/photos") == (12, "/photos", "own", "own")
    assert open_named(max_rows=12, image_root="/photos", val=str(pairs)) == (12, None, "own", "own")
    assert config("Named", max_rows=12, image_root="/photos").node == {
        "_target_": "tests.datasets.Named",
        "image_root": "/photos",
    }


def open_named(**values: Any) -> tuple[Any, ...]:
    settings = config("Named", **values)
    given: tuple[Any, ...] = open_dataset(settings, "data", shared=settings.shared).dataset.given
    return given


def test_a_noisy_item_depends_on_the_epoch_and_the_seed() -> None:
    rows = DatasetRows(UserDataset(Noisy(4), "mine.Noisy", "data"), Captions.random)
    ids = {(seed, epoch): rows.load(1, seed, epoch, LIMITS).image_id for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(set(ids.values())) >= 4
    assert rows.load(1, 0, 0, LIMITS).image_id == ids[0, 0]
