"""A run continues only with the data that it was started with, unless `data.allow_changed` is set."""

import csv
import json
import logging
from pathlib import Path

import pytest

from clip_exp.config.data import Captions, Shuffle
from clip_exp.errors import CheckpointError
from tests.data.conftest import Build, write_table


def records(file: Path) -> list[list[str]]:
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def saved(build: Build, train: object, **values: object) -> dict:
    """Return the state of a run as loaded from a checkpoint."""
    return json.loads(json.dumps(build(train, **values).state_dict()))


def refusal(build: Build, state: dict, train: object, **values: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        build(train, **values).load_state_dict(state)
    assert "data.allow_changed=true" in str(caught.value)
    return str(caught.value)


def test_the_same_data_goes_on(pairs, build: Build):
    build(pairs).load_state_dict(saved(build, pairs))


def test_a_row_more_is_reported_with_the_file(pairs, build: Build):
    state = saved(build, pairs)
    write_table(pairs, [*records(pairs), ["00.png", "one more"]])
    assert "pairs.csv has 26 rows instead of 25" in refusal(build, state, pairs)


def test_another_caption_is_reported_with_the_size(pairs, build: Build):
    state = saved(build, pairs)
    size = pairs.stat().st_size
    text = pairs.read_bytes().replace(b"caption 0 of image 5", b"caption 0 of image 6")
    pairs.write_bytes(text)
    assert "pairs.csv has different content in its 25 rows." in refusal(build, state, pairs)
    pairs.write_bytes(text.replace(b"caption 0 of image 6", b"caption 0 of an image 6", 1))
    reported = refusal(build, state, pairs)
    assert f"pairs.csv has different content in its 25 rows ({size + 3} bytes instead of {size})" in reported


def test_rows_in_another_order_are_reported(pairs, build: Build):
    state = saved(build, pairs)
    header, *rows = records(pairs)
    write_table(pairs, [header, *reversed(rows)])
    assert "pairs.csv has different content" in refusal(build, state, pairs)


def test_a_file_that_is_written_otherwise_but_says_the_same_goes_on(pairs, build: Build):
    state = saved(build, pairs)
    write_table(pairs, records(pairs), separator="\t")
    build(pairs).load_state_dict(state)


def test_the_same_files_elsewhere_go_on(pairs, build: Build):
    state = saved(build, pairs)
    moved = pairs.parent / "moved"
    moved.mkdir()
    pairs.rename(moved / "pairs.csv")
    build(moved / "pairs.csv", image_root=str(pairs.parent)).load_state_dict(state)


def test_files_that_come_go_or_change_places_are_reported_by_name(pairs, build: Build):
    other = write_table(pairs.parent / "other.csv", [["filepath", "title"], ["00.png", "another"]])
    alone, both = saved(build, pairs), saved(build, [pairs, other])
    assert "other.csv was not among the files" in refusal(build, alone, [pairs, other])
    assert "other.csv is no longer among the files" in refusal(build, both, pairs)
    assert "images" not in refusal(build, both, pairs)  # which follows from that
    assert "the order of the files has changed, other.csv is first" in refusal(build, both, [other, pairs])


def test_what_decides_the_stream_counts_too(pairs, build: Build):
    state = saved(build, pairs)
    reported = refusal(build, state, pairs, captions=Captions.all, max_rows=20)
    assert "data.captions is all instead of random" in reported
    assert "data.max_rows is 20 instead of None" in reported
    reported = refusal(build, state, pairs, shuffle=Shuffle.block, filter="title LIKE '%image%'")
    assert "shuffle is 256 blocks of 64 rows instead of full" in reported
    assert "filter is title LIKE '%image%' instead of None" in reported


def test_an_image_root_that_makes_equal_paths_one_image_counts_too(pairs, build: Build):
    """The files alone do not show it."""
    folder = pairs.parent / "folder"
    folder.mkdir()
    other = write_table(folder / "other.csv", [["filepath", "title"], ["00.png", "another"]])
    state = saved(build, [pairs, other])
    reported = refusal(build, state, [pairs, other], image_root=str(pairs.parent))
    assert "pairs.csv has 23 distinct images instead of 24" in reported


def test_sources_and_their_weights_count_too(pairs, build: Build):
    other = write_table(pairs.parent / "other.csv", [["filepath", "title"], ["00.png", "another"]])
    mixed = [{"path": str(pairs), "weight": 1}, {"path": str(other), "weight": 2}]
    state = saved(build, mixed)
    build(mixed).load_state_dict(state)
    assert "data.train has 1 sources instead of 2" in refusal(build, state, pairs)
    assert "weight of other.csv is 3 instead of 2" in refusal(build, state, [mixed[0], {**mixed[1], "weight": 3}])


def test_an_exchanged_validation_table_is_reported(pairs, build: Build):
    val = write_table(pairs.parent / "val.csv", [["filepath", "title"], ["00.png", "held out"]])
    state = saved(build, pairs, val=str(val))
    build(pairs, val=str(val)).load_state_dict(state)
    write_table(val, [["filepath", "title"], ["00.png", "something else"]])
    reported = refusal(build, state, pairs, val=str(val))
    assert reported.startswith(
        "The validation data has changed since the checkpoint: data.val: val.csv has different content"
    )
    assert "data.val is no longer given" in refusal(build, state, pairs)
    del state["data"]["val"]  # as older versions wrote it
    build(pairs, val=str(val)).load_state_dict(state)


def test_images_may_be_repaired_meanwhile(pairs, build: Build):
    (pairs.parent / "04.png").unlink()
    state = saved(build, pairs)
    (pairs.parent / "04.png").write_bytes((pairs.parent / "02.png").read_bytes())
    build(pairs).load_state_dict(state)


def test_a_changed_table_goes_on_with_a_warning_where_that_is_allowed(pairs, build: Build, caplog):
    state = {**saved(build, pairs), "samples_seen": 8}
    write_table(pairs, [*records(pairs), ["00.png", "one more"]])
    module = build(pairs, allow_changed=True)
    with caplog.at_level(logging.WARNING):
        module.load_state_dict(state)
    assert module.start_sample == 8
    (record,) = [record for record in caplog.records if "has changed since" in record.getMessage()]
    assert "pairs.csv has 26 rows instead of 25" in record.getMessage()


def test_a_checkpoint_of_an_older_version_goes_on(pairs, build: Build):
    module = build(pairs)
    module.load_state_dict({"samples_seen": 12})
    assert module.start_sample == 12
