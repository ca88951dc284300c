from pathlib import Path

import pytest

from clip_exp.config.evaluation import EvalOnBadImage
from clip_exp.errors import ConfigError, DataError
from clip_exp.inference import inputs
from clip_exp.inference.inputs import as_text_list, as_texts, check_videos, find_images, read_labels


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


def test_a_folder_is_searched_recursively_in_a_fixed_order(photos: Path):
    assert names(find_images(photos)) == [f"{number}.png" for number in range(7)]


def test_folders_files_and_globs_can_be_mixed_and_every_image_counts_once(photos: Path):
    wanted = [str(photos / "3.png"), f"{photos}/./3.png", f"{photos}/**/[56].png", f"{photos}//*", str(photos)]
    assert names(find_images(wanted)) == ["3.png", "5.png", "6.png", "0.png", "1.png", "2.png", "4.png"]


def test_a_given_file_is_used_with_any_suffix(photos: Path):
    assert names(find_images(photos / "notes.txt")) == ["notes.txt"]


def test_links_are_followed_and_cycles_end(photos: Path):
    (photos / "more" / "again").symlink_to(photos, target_is_directory=True)
    assert len(find_images(photos)) == 7


def test_all_missing_paths_are_reported_together(photos: Path):
    with pytest.raises(ConfigError) as caught:
        find_images([f"{photos}/no{number}.png" for number in range(7)] + [f"{photos}/*.jpg"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert "no0.png: no such file or folder" in lines[0]
    assert "3 more" in lines[-1]
    with pytest.raises(ConfigError, match="matches no image or video"):
        find_images(f"{photos}/*.jpg")
    with pytest.raises(ConfigError, match="images has no value"):
        find_images(None)


def test_a_folder_without_images_is_reported(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no images or videos"):
        find_images(tmp_path / "empty")


def test_texts_that_look_like_other_yaml_types_are_texts():
    assert as_texts([1, 2.5, True, None, "007"], "texts") == ["1", "2.5", "true", "null", "007"]
    assert as_texts("a dog, running", "text") == ["a dog, running"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "texts has no value"),
        ([], "texts has no value"),
        (["a", " "], "empty text"),
        ([{}], "Put texts with special characters in quotes"),
        ("a dog", r"'texts=\[a dog,a cat\]'"),
        (__file__, "labels="),
    ],
)
def test_invalid_lists_of_texts_are_refused_with_the_valid_form(value: object, message: str):
    with pytest.raises(ConfigError, match=message):
        as_text_list(value, "texts")


def test_labels_come_from_lists_and_files_in_any_language(tmp_path: Path):
    expected = ["a dog", "猫", "no"]
    (tmp_path / "a.txt").write_text("a dog\n\n猫\nno\n", encoding="utf-8")
    (tmp_path / "a.json").write_text('["a dog", "猫", "no"]', encoding="utf-8")
    (tmp_path / "a.yaml").write_text("- a dog\n- 猫\n- no\n", encoding="utf-8")
    assert read_labels(expected) == read_labels([f" {label}\u200b" for label in expected]) == expected
    for path in tmp_path.iterdir():
        assert read_labels(str(path)) == expected
    assert len(read_labels("imagenet")) == 1000
    with pytest.raises(ConfigError, match=r"labels=absent\.txt: no such file"):
        read_labels("absent.txt")


def test_videos_without_a_decoder_are_reported_with_the_command_that_installs_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inputs, "can_decode_videos", lambda: False)
    with pytest.raises(ConfigError, match=r"1 of the 2 files are videos \(b\.MP4\).*pip install av"):
        check_videos(["a.png", "b.MP4"], EvalOnBadImage.error)
    check_videos(["a.png", "b.MP4"], EvalOnBadImage.skip)
    check_videos(["a.png"], EvalOnBadImage.error)
