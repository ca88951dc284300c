"""Problems with the data of a run are reported before its folder is created."""

import sys
from pathlib import Path
from typing import Any

import pytest

from clip_exp.config.base import parse, plain
from clip_exp.config.data import DataConfig, OnBadRow
from clip_exp.config.training import TrainConfig
from clip_exp.data.files import reads_heif
from clip_exp.errors import ClipExpError, ConfigError, DataError
from clip_exp.training.preflight import check_train
from tests.compose import train_config
from tests.data.conftest import noise, write_table
from tests.data.encoded import encoded


def config_of(folder: Path, train: Any, **values: Any) -> TrainConfig:
    config = train_config(
        "data=csv", "model=vit_nano", "global_batch_size=2", "max_steps=2", f"output_dir={folder}/o", "data.train=x"
    )
    config.data = parse(DataConfig, {**plain(config.data), "train": train, **values}, "data.")
    return config


def refusal(folder: Path, train: Any, error: type[ClipExpError] = ConfigError, **values: Any) -> str:
    with pytest.raises(ClipExpError) as caught:
        check_train(config_of(folder, train, **values))
    assert type(caught.value) is error, caught.value
    return str(caught.value)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for i in range(4):
        noise(i).save(tmp_path / f"{i}.png")
    return write_table(tmp_path / "pairs.csv", [["filepath", "title"], *([f"{i}.png", "an image"] for i in range(4))])


def test_patterns_lists_and_sources_pass(tmp_path, table):
    for i in range(2):
        (tmp_path / f"part-{i}.csv").write_bytes(table.read_bytes())
    for train in (
        str(table),
        f"{tmp_path}/part-*.csv",
        f"{tmp_path}/part-{{0..1}}.csv",
        [str(table), f"{tmp_path}/part-*.csv"],
        [{"path": str(table), "weight": 3}, {"path": f"{tmp_path}/part-*.csv", "weight": 1}],
    ):
        check_train(config_of(tmp_path, train, val=f"{tmp_path}/part-*.csv"))


def test_what_is_wrong_with_each_source_is_reported(tmp_path, table):
    train = [
        {"path": "none.csv", "weight": 1},
        {"path": str(table), "weight": 1, "image_root": "nowhere", "filter": "width >"},
    ]
    reported = refusal(tmp_path, train)
    assert "data.train: The table none.csv does not exist" in reported
    assert f"image_root=nowhere of {table} is not a directory" in reported
    assert "data.filter='width >' is not a valid condition" in reported
    assert "did you mean 'data.train[0].weight'" in refusal(tmp_path, [{"path": str(table), "weigth": 1}])


def test_validation_has_no_weights_and_its_tables_must_exist(tmp_path, table):
    assert "data.val.weight has no effect" in refusal(tmp_path, str(table), val=[{"path": str(table), "weight": 1}])
    assert "data.val: The table none.csv does not exist" in refusal(tmp_path, str(table), val="none.csv")


def test_a_wrong_image_root_is_reported_at_the_start(tmp_path, table):
    (tmp_path / "empty").mkdir()
    reported = refusal(tmp_path, str(table), DataError, image_root=str(tmp_path / "empty"))
    assert f"data.train: none of 4 images sampled from {table} can be read" in reported
    assert f"{tmp_path}/empty/0.png ({table}, line 2): no such file" in reported
    assert f"Relative paths start from {tmp_path}/empty: set data.image_root." in reported


def test_more_bad_rows_than_may_be_bad_end_the_start_as_they_end_a_check(tmp_path, table):
    """A filter that leaves few rows does not make the bad ones many."""
    with table.open("a") as file:
        file.write("one field\n,no path\n" + "0.png,more\n" * 6)
    reported = refusal(tmp_path, str(table), DataError, on_bad_row=OnBadRow.skip)
    assert (
        f"data.train: 2 of 12 rows of {table} are bad (1 wrong number of fields, 1 no image path), more than"
        in reported
    )
    assert "data.max_bad_fraction=0.1" in reported
    check_train(config_of(tmp_path, str(table), on_bad_row=OnBadRow.skip, max_bad_fraction=0.17))
    check_train(
        config_of(tmp_path, str(table), on_bad_row=OnBadRow.skip, max_bad_fraction=0.17, filter="title = 'an image'")
    )


@pytest.mark.parametrize("which", ["train", "val"])
def test_more_empty_captions_than_may_be_end_the_start(tmp_path, table, which):
    captions = ["a caption", "an image", "", "\u00a0\u200b \t"]
    empty = write_table(
        tmp_path / "empty.csv", [["filepath", "title"], *([f"{i}.png", text] for i, text in enumerate(captions))]
    )
    train, val = (str(empty), None) if which == "train" else (str(table), str(empty))
    reported = refusal(tmp_path, train, DataError, val=val)
    assert f"data.{which}: 2 of 4 captions of {empty} are empty or blank" in reported
    assert "data.max_empty_caption_fraction=0.1" in reported
    assert reported.endswith("or allow them with data.max_empty_caption_fraction=1.")
    check_train(config_of(tmp_path, train, val=val, max_empty_caption_fraction=0.5))
    check_train(config_of(tmp_path, train, val=val, filter="title IN ('an image', 'a caption')"))


def test_an_image_with_two_labels_ends_the_start(tmp_path, table):
    rows = [["filepath", "title", "kind"], ["0.png", "a", "dog"], ["1.png", "b", "cat"], ["0.png", "c", "Dog"]]
    val = write_table(tmp_path / "val.csv", rows)
    reported = refusal(tmp_path, str(table), DataError, val=str(val), label_key="kind")
    assert f"{val}, line 4: the label of 0.png is 'Dog' here, but 'dog' in" in reported
    check_train(config_of(tmp_path, str(table), val=str(val)))


def test_the_way_out_fits_the_fault_of_the_images(tmp_path, table):
    reported = refusal(tmp_path, str(table), DataError, max_image_bytes=10)
    assert reported.endswith("Increase data.max_image_bytes, or use smaller images.")
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"")
    reported = refusal(tmp_path, str(table), DataError)
    assert "empty file" in reported
    assert "image_root" not in reported


def test_urls_are_reported_with_what_downloads_them(tmp_path, table):
    write_table(table, [["filepath", "title"], *[["https://somewhere/a.jpg", "an image"]] * 4])
    assert "not from URLs: download them first" in refusal(tmp_path, str(table), DataError)


def test_the_validation_table_is_looked_at_too(tmp_path, table):
    val = write_table(tmp_path / "val.csv", [["filepath", "title"], ["img/0.png", "an image"]])
    assert "data.val: none of 1 images" in refusal(tmp_path, str(table), DataError, val=str(val))


def test_images_outside_the_root_are_reported_at_the_start_with_the_way_out(tmp_path, table):
    elsewhere = tmp_path / "tables"
    elsewhere.mkdir()
    rows = [["filepath", "title"], *([f"../{i}.png", "an image"] for i in range(4))]
    moved = write_table(elsewhere / "pairs.csv", rows)
    reported = refusal(tmp_path, str(moved), DataError)
    assert f"The root is now {elsewhere}." in reported
    assert "allow_outside_root=true" in reported
    check_train(config_of(tmp_path, str(moved), allow_outside_root=True))


def test_absolute_paths_and_links_pass_wherever_they_lead(tmp_path, table):
    elsewhere = tmp_path / "tables"
    elsewhere.mkdir()
    (elsewhere / "link.png").symlink_to(tmp_path / "1.png")
    rows = [["filepath", "title"], [str(tmp_path / "0.png"), "an image"], ["link.png", "an image"]]
    check_train(config_of(tmp_path, str(write_table(elsewhere / "pairs.csv", rows))))


def test_a_table_of_which_some_images_are_missing_passes(tmp_path, table):
    for i in range(3):
        (tmp_path / f"{i}.png").unlink()
    check_train(config_of(tmp_path, str(table), captions="all"))


def test_an_empty_path_is_a_bad_row(tmp_path, table):
    write_table(table, [["filepath", "title"], ["", "an image"], *([f"{i}.png", "an image"] for i in range(4))])
    assert f"{table}, line 2:" in refusal(tmp_path, str(table), DataError)


def test_the_rows_of_all_sources_count(tmp_path, table):
    train = [{"path": str(table), "weight": 1}, {"path": str(table), "weight": 1}]
    config = config_of(tmp_path, train)
    config.global_batch_size = 8
    check_train(config)
    config.global_batch_size = 9
    with pytest.raises(ConfigError, match="global_batch_size=9 is more than the 8 training rows"):
        check_train(config)


def test_images_that_nothing_decodes_are_one_message_at_the_start(tmp_path, monkeypatch):
    """As in a folder of an iPhone's photos."""
    names = [f"IMG_{i}.HEIC" for i in range(4)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(noise(i), "HEIF"))
    heic = write_table(tmp_path / "pairs.csv", [["filepath", "title"], *([name, "an image"] for name in names)])
    check_train(config_of(tmp_path, str(heic)))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    reads_heif.cache_clear()
    try:
        found = refusal(tmp_path, str(heic), DataError)
    finally:
        reads_heif.cache_clear()
    assert found == (
        f"data.train: none of 4 images sampled from {heic} can be read; the first is {tmp_path}/IMG_0.HEIC "
        f"({heic}, line 2): no decoder: HEIC needs "
        "pillow-heif: pip install pillow-heif."
    )
    assert "HEIF is not in data.image_formats" in refusal(
        tmp_path, str(heic), DataError, image_formats=["JPEG", "TIFF"]
    )
