"""Further columns of the training table (`data.columns`) in samples and batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from clip_exp.checks.splits import open_splits
from clip_exp.config.data import Captions, DataConfig
from clip_exp.data.loader import Batch, _IntoSharedMemory, _tensors
from clip_exp.errors import CheckpointError, DataError
from clip_exp.text.tokenizer import HuggingFaceTokenizer, Tokenizer
from tests.data.conftest import Build, noise, write_table
from tests.data.test_loader import Place
from tests.encoders import write_encoder

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")

COLUMNS = ["negative", "score", "features"]
SEVERAL = 3  # image with three captions


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Write a table of 11 rows with 9 images. A row's numbers contain the number of the row."""
    records = [["filepath", "title", *COLUMNS]]
    for i in range(9):
        noise(i).save(tmp_path / f"{i}.png")
        for variant in range(3 if i == SEVERAL else 1):
            row = len(records) - 1
            caption = f"caption {variant} of image {i}"
            records.append([f"{i}.png", caption, f"not {caption}{' at all' * (i % 4)}", str(row), f"[{row}, 0.1, {i}]"])
    return write_table(tmp_path / "wide.csv", records)


def read(build: Build, file: object, **values: object) -> list[Batch]:
    return list(build(file, **{"columns": COLUMNS, "total_steps": 9, **values}).train_dataloader())


def tensors(batches: list[Batch]) -> list[Tensor]:
    return [tensor for batch in batches for tensor in (*batch[:4], *batch.columns.values())]


def assert_equal(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    for one, other in zip(tensors(batches), tensors(expected), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_texts_become_padded_tokens_and_numbers_float32_in_the_table_s_order(wide: Path, build: Build) -> None:
    batch = read(build, wide)[0]
    assert list(batch.columns) == COLUMNS
    negative, score, features = batch.columns.values()
    assert (negative.dtype, score.dtype, features.dtype) == (torch.int64, torch.float32, torch.float32)
    assert (score.shape, features.shape) == ((4,), (4, 3))
    assert torch.equal(features[:, 0], score)
    assert torch.equal(features[:, 1:], torch.stack([torch.full((4,), 0.1), batch.image_id.float()], dim=1))
    lines = [line.split(",") for line in wide.read_text().splitlines()[1:]]
    rows = [lines[int(row)] for row in score]
    tokenizer = Tokenizer(77)
    expected = tokenizer([row[1] for row in rows] + [row[2] for row in rows])  # padded together
    assert torch.equal(torch.cat([batch.tokens, negative]), expected)


def test_without_columns_batches_have_none(wide: Path, build: Build) -> None:
    batches, others = read(build, wide, columns=[]), read(build, wide)
    assert all(batch.columns == {} for batch in batches)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.image, other.image)
        length = min(
            batch.tokens.shape[1], other.tokens.shape[1]
        )  # with longer texts, captions are padded to their length
        assert torch.equal(batch.tokens[:, :length], other.tokens[:, :length])
        assert not other.tokens[:, length:].any()


def test_texts_are_padded_to_a_multiple_by_the_model_s_tokenizer(wide: Path, build: Build, tmp_path: Path) -> None:
    module = build(wide, columns=COLUMNS)
    module.pad_multiple = 8
    for batch in module.train_dataloader():
        assert batch.columns["negative"].shape[1] in (8, 16)
    folder = write_encoder(tmp_path / "bert", "bert", 0)
    module.tokenizer = tokenizer = HuggingFaceTokenizer(str(folder), 16)
    batch = next(iter(module.train_dataloader()))
    captions = [line.split(",")[2] for line in wide.read_text().splitlines()[1:]]
    expected = tokenizer([captions[int(row)] for row in batch.columns["score"]])
    assert torch.equal(batch.columns["negative"], expected)


def test_batches_are_bitwise_equal_for_any_number_of_workers_and_after_a_restart(wide: Path, build: Build) -> None:
    whole = read(build, wide)
    for workers in (1, 2):
        assert_equal(read(build, wide, num_workers=workers), whole)
    first = build(wide, columns=COLUMNS, total_steps=9)
    first.trainer = Place(0, 1, global_step=4)
    second = build(wide, columns=COLUMNS, total_steps=9, num_workers=2)
    second.load_state_dict(first.state_dict())
    assert_equal(list(second.train_dataloader()), whole[4:])


@pytest.mark.parametrize("captions", Captions)
def test_a_random_caption_comes_with_the_columns_of_its_own_row(wide: Path, build: Build, captions: Captions) -> None:
    tokenizer, drawn = Tokenizer(77), set()
    lines = [line.split(",") for line in wide.read_text().splitlines()[1:]]
    for batch in read(build, wide, captions=captions, total_steps=20):
        rows = batch.columns["score"].int().tolist()
        expected = tokenizer([lines[row][1] for row in rows] + [lines[row][2] for row in rows])
        assert torch.equal(torch.cat([batch.tokens, batch.columns["negative"]]), expected)
        drawn |= {row for row, image in zip(rows, batch.image_id.tolist(), strict=True) if image == SEVERAL}
    assert drawn == {3, 4, 5}


def test_the_replacement_of_a_bad_image_brings_its_own_columns(wide: Path, build: Build) -> None:
    (wide.parent / "0.png").unlink()
    batches = read(build, wide)
    assert any(batch.bad for batch in batches)
    for batch in batches:
        assert torch.equal(batch.columns["features"][:, 2].long(), batch.image_id)
        assert 0 not in batch.columns["score"]


def test_a_truncated_text_counts_once_per_sample_as_a_caption_does(wide: Path, build: Build) -> None:
    module = build(wide, columns=["negative"], global_batch_size=9, total_steps=1)
    module.tokenizer.context_length = 7
    (batch,) = module.train_dataloader()
    assert batch.truncated == 9, "'caption 0 of image 0' has five words and numbers, and 'not' makes six"
    assert batch.columns["negative"].shape[1] == 7
    module.on_before_batch_transfer(batch, 0)
    assert module.truncated == 9
    without = build(wide, columns=[], global_batch_size=9, total_steps=1)
    without.tokenizer.context_length = 7
    assert next(iter(without.train_dataloader())).truncated == 0


def test_columns_of_a_batch_are_shared_between_processes_and_moved_to_the_device(wide: Path, build: Build) -> None:
    dataset = build(wide, columns=COLUMNS).train_dataloader().loader
    batch = _IntoSharedMemory(dataset.collate_fn)([dataset.dataset[position] for position in range(4)])
    assert len(list(_tensors(batch))) == 7
    assert all(tensor.is_shared() for tensor in _tensors(batch))
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, Batch)
    assert {tensor.device.type for tensor in _tensors(moved)} == {"meta"}
    assert list(moved.columns) == COLUMNS


def test_shared_memory_is_estimated_with_the_features(wide: Path, build: Build) -> None:
    for columns, features in (([], 0), (["negative"], 0), (COLUMNS, 4)):
        loader = build(wide, columns=columns, num_workers=1).train_dataloader().loader
        assert loader.batch_bytes == 4 * (3 * 16 * 16 + 4 * features)


def test_only_the_training_table_has_columns(wide: Path, build: Build) -> None:
    val = write_table(wide.parent / "val.csv", [["filepath", "title"], ["0.png", "held out"]])
    module = build(wide, columns=COLUMNS, val=str(val))
    (batch,) = module.val_dataloader()
    assert len(batch.index) == 1


def test_a_changed_value_is_changed_data_and_other_columns_are_not(wide: Path, build: Build) -> None:
    without = build(wide).state_dict()
    states = {name: json.loads(json.dumps(build(wide, columns=[name]).state_dict())) for name in COLUMNS}
    text = wide.read_text()
    wide.write_text(text.replace("[7, 0.1, 5]", "[7, 0.2, 5]"))
    assert wide.read_text() != text
    build(wide).load_state_dict(without)
    build(wide, columns=["negative"]).load_state_dict(states["negative"])
    with pytest.raises(CheckpointError, match=r"wide\.csv has different content in its 11 rows"):
        build(wide, columns=["features"]).load_state_dict(states["features"])


def test_a_table_without_columns_has_the_fingerprint_of_older_versions(wide: Path, build: Build) -> None:
    (file,) = build(wide).state_dict()["data"]["sources"][0]["files"].values()
    assert file["digest"] == "e7a9a9d74611ca11872b3af0801d39d98c07bb5b2c7d16b329534d19a88f60bb"


def test_sources_must_agree_on_the_values_of_a_column(wide: Path, build: Build) -> None:
    for value, reported in (("[1, 2]", r"numbers of shape \[2\]"), ("a dog", "text")):
        other = write_table(wide.parent / "other.csv", [["filepath", "title", "features"], ["0.png", "another", value]])
        sources = [{"path": str(wide), "weight": 1}, {"path": str(other), "weight": 1}]
        with pytest.raises(
            DataError,
            match=rf"data\.train: 'features' \(data\.columns\) has {reported} in .*other\.csv, but numbers of shape \[3\] in .*wide\.csv",
        ):
            build(sources, columns=["features"]).setup()
    write_table(other, [["filepath", "title", "features"], ["0.png", "another", "[100, 2, 3]"]])
    batches = read(build, sources, columns=["features"])
    assert any(100 in batch.columns["features"] for batch in batches)


def test_numbers_in_shards_reach_the_batch_exactly(build: Build, tmp_path: Path) -> None:
    from tests.data.tables.shard_files import jpeg, write_shard

    values = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    members: dict[str, object] = {}
    for i in range(6):
        members |= {
            f"{i}.jpg": jpeg(i),
            f"{i}.txt": f"image {i}",
            f"{i}.json": {"n": i, "features": values[i].tolist()},
        }
    file = write_shard(tmp_path / "t.tar", members)  # type: ignore[arg-type]
    (batch,) = build(file, columns=["n", "features"], global_batch_size=6, total_steps=1).train_dataloader()
    assert np.array_equal(batch.columns["features"].numpy(), values[batch.columns["n"].long().numpy()])


def test_check_data_counts_rows_whose_columns_do_not_fit_as_bad_rows(wide: Path, tmp_path: Path) -> None:
    wide.write_text(wide.read_text().replace("[7, 0.1, 5]", "[7, 0.1]").replace('"[8, 0.1, 6]"', ""))
    config = DataConfig(name="csv", train=str(wide), columns=COLUMNS)
    (split,) = open_splits(config, tmp_path / "outputs")
    (part,) = split.parts
    assert part.bad == {"value of features unlike the first row's": 2}
    assert [line for line, _ in part.bad_examples] == [9, 10]
