"""Repeated data: equal captions within a batch, and rows of one table that another one has as well."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clip_exp.config.targets import ALLOWED
from clip_exp.data import repeats
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.data.repeats import equal_captions
from clip_exp.data.stream import Stream
from clip_exp.training.diagnosis import data_problems
from tests.compose import train_config
from tests.data.conftest import data_module, noise, write_table
from tests.data.test_custom_dataset import module

ROWS = 40


@pytest.fixture
def _allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, "tests")


def table(folder: Path, captions: int = ROWS, name: str = "pairs.csv") -> str:
    """Write a table of `ROWS` images with this number of distinct captions and a column of parts; return its path."""
    folder.mkdir(exist_ok=True)
    rows = [["filepath", "title", "part"]]
    for i in range(ROWS):
        noise(i).save(folder / f"{i}.png")
        rows.append([f"{i}.png", f"caption {i % captions}", "val" if i < 10 else "train"])
    return str(write_table(folder / name, rows))


def opened(folder: Path, train: Any, **values: Any) -> PairsDataModule:
    data = data_module(folder / "outputs", train, global_batch_size=8, **values)
    data.setup()
    return data


def problems(data: PairsDataModule, *overrides: str) -> list[str]:
    config = train_config("data=csv", "global_batch_size=8", *overrides)
    return list(data_problems(config.model_copy(update={"data": data.config}), data))


# ------------------------------------------------------------------------------------------------------- equal captions


@pytest.mark.parametrize("captions", [1, 5, 20, 40])
def test_the_fraction_of_equal_captions_is_that_of_the_batches_that_training_sees(
    captions: int, tmp_path: Path
) -> None:
    data = opened(tmp_path, table(tmp_path, captions), total_steps=5)
    assert data.stream is not None
    found = equal_captions(data.stream, 8)
    repeated = 0
    for batch in data.train_dataloader():
        counts = Counter(batch.caption_id.tolist())
        repeated += sum(count for count in counts.values() if count > 1)
    assert found == (repeated / 40, captions, 40)


def test_the_time_does_not_grow_with_the_table_or_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(tmp_path, table(tmp_path, 5))
    assert data.stream is not None
    monkeypatch.setattr(repeats, "SAMPLED", 16)
    read: list[int] = []
    original = Stream.__getitem__
    monkeypatch.setattr(Stream, "__getitem__", lambda self, k: read.append(k) or original(self, k))
    for batch_size, positions in ((6, [*range(12)]), (8, [*range(16)]), (32, [*range(16)]), (10**6, [*range(16)])):
        read.clear()
        assert equal_captions(data.stream, batch_size) is not None
        assert read == positions, batch_size


def test_many_equal_captions_are_reported_with_the_key_unless_they_are_matches(tmp_path: Path) -> None:
    data = opened(tmp_path, table(tmp_path, 4))
    (message,) = problems(data)
    assert "in a batch of 8 have the caption of another pair" in message
    assert "(40 sampled captions, 4 distinct)" in message
    assert message.endswith("set loss.same_caption=positive.")
    assert problems(data, "loss.same_caption=positive") == []
    assert problems(data, "loss=custom", "loss._target_=torch.nn.CrossEntropyLoss") == []
    assert problems(opened(tmp_path / "distinct", table(tmp_path / "distinct"))) == []


@pytest.mark.usefixtures("_allowed")
def test_captions_of_a_dataset_are_not_read_before_training(tmp_path: Path) -> None:
    data = module(count=8)
    data.setup()
    assert data.stream is not None
    assert equal_captions(data.stream, 8) is None
    assert problems(data) == []


# ------------------------------------------------------------------------------------- validation rows that are trained on


def test_validation_on_training_rows_is_reported(tmp_path: Path) -> None:
    pairs = table(tmp_path)
    (message,) = problems(opened(tmp_path, pairs, val=pairs))
    assert message.startswith(f"data.val={pairs}: 100 % of the validation rows are also training rows")
    assert "Set data.val to other rows, or separate them with a filter" in message
    link = tmp_path / "link.csv"
    link.symlink_to(pairs)
    assert len(problems(opened(tmp_path, pairs, val=str(link)))) == 1, "another name of the file"
    shutil.copy(pairs, tmp_path / "copy.csv")
    assert len(problems(opened(tmp_path, pairs, val=str(tmp_path / "copy.csv")))) == 1, "a copy of the file"


def test_a_part_of_the_validation_rows_is_reported_as_such(tmp_path: Path) -> None:
    pairs, other = table(tmp_path), table(tmp_path / "other")
    of_train = {"path": pairs, "filter": "part = 'train'"}
    (message,) = problems(opened(tmp_path, of_train, val=pairs))
    assert ": 75 % of the validation rows" in message
    (message,) = problems(opened(tmp_path, pairs, val=[pairs, other]))
    assert ": 50 % of the validation rows" in message
    both = opened(tmp_path, [of_train, {"path": pairs, "filter": "part = 'val'"}], val=pairs)
    (message,) = problems(both, "loss.same_caption=positive")  # of a small source, a batch may have a row twice
    assert ": 100 % of the validation rows" in message


def test_other_rows_of_the_same_table_and_tables_of_other_images_are_not_reported(tmp_path: Path) -> None:
    pairs, other = table(tmp_path), table(tmp_path / "other")
    separated = opened(tmp_path, {"path": pairs, "filter": "part = 'train'"}, val=pairs, filter="part = 'val'")
    assert problems(separated) == []
    assert problems(opened(tmp_path, pairs, val=other)) == [], "equal tables, but their paths name other images"
    assert problems(opened(tmp_path, pairs)) == []


@pytest.mark.usefixtures("_allowed")
@pytest.mark.parametrize(
    ("name", "val", "reported"),
    [
        pytest.param("Pairs", {}, True, id="the same arguments"),
        pytest.param("Pairs", {"start": 48}, False, id="other arguments"),
        pytest.param("Versioned", {"version": 1}, True, id="the same fingerprint"),
        pytest.param("Versioned", {"version": 2}, False, id="another fingerprint"),
    ],
)
def test_a_dataset_that_is_trained_and_validated_on_is_reported(name: str, val: dict[str, Any], reported: bool) -> None:
    data = module(name, val={"_target_": f"tests.datasets.{name}", **val})
    data.setup()
    assert len(problems(data)) == reported
