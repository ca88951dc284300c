import csv
import logging

import pytest

from clip_exp.data.bad_samples import LOGGED_SINGLY, VALIDATION, BadSamples
from clip_exp.data.loader import UnreadableImage
from clip_exp.errors import DataError


def test_the_log_names_the_first_bad_images_and_counts_the_others(tmp_path, caplog):
    bad = BadSamples(200_000, 1, what="training", file=tmp_path / "bad_samples.csv")
    with caplog.at_level(logging.WARNING):
        for i in range(0, 1100, 5):
            bad.add(
                UnreadableImage(f"{k}.jpg", "no such file" if k % 3 else f"truncated: at byte {k}")
                for k in range(i, i + 5)
            )
    reported = [record.getMessage() for record in caplog.records]
    assert sum("cannot be read: " in line and "image " in line for line in reported) == LOGGED_SINGLY
    assert f"More bad images are only counted and listed in {tmp_path}/bad_samples.csv." in reported
    assert reported[-2:] == [
        "100 training images cannot be read so far: 66 no such file, 34 truncated.",
        "1,000 training images cannot be read so far: 666 no such file, 334 truncated.",
    ]
    assert len(reported) == LOGGED_SINGLY + 3
    assert dict(bad.kinds()) == {"no such file": 733, "truncated": 367}
    assert len((tmp_path / "bad_samples.csv").read_text().splitlines()) == 1101


def test_a_restart_knows_what_was_bad_before_it(tmp_path, caplog):
    file = tmp_path / "bad_samples.csv"
    BadSamples(10, 1, what="training", file=file).add([UnreadableImage("a.jpg", "empty file")])
    BadSamples(10, 1, what="validation", mark=VALIDATION, file=file).add([UnreadableImage("v.jpg", "no such file")])
    caplog.clear()
    again = BadSamples(10, 1, what="training", file=file)
    again.add([UnreadableImage("a.jpg", "empty file")])
    assert again.reasons == {"a.jpg": "empty file"}
    assert caplog.records == []
    assert BadSamples(10, 1, what="validation", mark=VALIDATION, file=file).reasons == {"v.jpg": "no such file"}


def test_a_line_that_a_kill_cut_short_does_not_spoil_the_next(tmp_path):
    file = tmp_path / "bad_samples.csv"
    file.write_text("path,reason\na.jpg,empty file\nb.j")
    bad = BadSamples(10, 1, what="training", file=file)
    bad.add([UnreadableImage("c.jpg", "no such file")])
    assert bad.reasons == {"a.jpg": "empty file", "c.jpg": "no such file"}
    assert BadSamples(10, 1, what="training", file=file).reasons == bad.reasons


def test_the_way_out_after_too_many_names_the_list(tmp_path):
    bad = BadSamples(10, 0.1, what="training", file=tmp_path / "bad_samples.csv")
    bad.add([UnreadableImage("a.jpg", "empty file")])
    with pytest.raises(
        DataError, match=r"2 of 10 training images.*bad_samples\.csv; remove that file when they are repaired"
    ):
        bad.add([UnreadableImage("b.jpg", "empty file")])


@pytest.mark.parametrize(
    "name",
    [
        "a\rb",
        "a\nb",
        "a\0b",
        'a"b',
        "a\u2028b",
        "\ud800a",
        "",
        "path",
        "validation: a",
        "a,b",
        "\r",
        "=1",
        "'=1",
        "-1.jpg",
        "''@x",
    ],
)
def test_odd_names_are_the_same_image_after_a_restart(name, tmp_path):
    bad = BadSamples(10, 1, what="training", file=tmp_path / "bad_samples.csv")
    bad.add([UnreadableImage(name, "no such file")])
    again = BadSamples(10, 1, what="training", file=tmp_path / "bad_samples.csv")
    assert again.reasons == bad.reasons
    again.add([UnreadableImage(name, "no such file")])
    assert len(again) == 1


def test_a_name_that_a_spreadsheet_would_compute_is_listed_as_text(tmp_path):
    file = tmp_path / "bad_samples.csv"
    BadSamples(10, 1, what="training", file=file).add([UnreadableImage('=HYPERLINK("http://x","y")', "no such file")])
    with file.open(newline="", encoding="utf-8") as stream:
        assert list(csv.reader(stream))[1] == ['\'=HYPERLINK("http://x","y")', "no such file"]


def test_a_list_that_cannot_be_written_is_reported_once_and_ends_nothing(tmp_path, caplog):
    (tmp_path / "bad_samples.csv").symlink_to(tmp_path / "gone" / "bad_samples.csv")
    bad = BadSamples(10, 1, what="training", file=tmp_path / "bad_samples.csv")
    for i in range(3):
        bad.add([UnreadableImage(f"{i}.jpg", "no such file")])
    assert len(bad) == 3
    assert caplog.text.count("Bad images are not listed") == 1
