"""Class names from lists, mappings and files, matched with the labels of the data."""

import json
import unicodedata
from pathlib import Path

import pytest

from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.sets.class_names import class_set, imagenet_classes, imagenet_index, read_lines, read_names
from clip_exp.evaluation.sets.labeled import Matched, match
from clip_exp.open_clip_files import package_folder


def matched(labels: list[str], classes) -> Matched:
    return match(labels, [label.replace("_", " ") for label in labels], classes, "the data", "task.t")


def names(path: Path, content: str | bytes) -> list[str] | dict[str, str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return read_names(str(path), "classes", "a file")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.txt", "猫\n\n  chien noir \r\nno\n"),
        ("names.txt", b"\xef\xbb\xbf" + "猫\nchien noir\nno".encode()),
        ("names.yaml", "- 猫\n- chien noir\n- no\n"),
        ("names.json", '["猫", "chien noir", "no"]'),
    ],
)
def test_a_list_of_names_is_the_same_from_any_kind_of_file(tmp_path: Path, file: str, content: str | bytes) -> None:
    assert names(tmp_path / file, content) == ["猫", "chien noir", "no"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.tsv", "0\t猫\nn02084071\t dog: a pet \n"),
        ("names.yml", '0: 猫\nn02084071: "dog: a pet"\n'),
        ("names.json", '{"0": "猫", "n02084071": "dog: a pet"}'),
    ],
)
def test_names_by_label_are_the_same_from_any_kind_of_file(tmp_path: Path, file: str, content: str) -> None:
    assert names(tmp_path / file, content) == {"0": "猫", "n02084071": "dog: a pet"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("names.txt", "", "names.txt has no texts"),
        ("names.txt", " \n\n", "has no texts"),
        ("names.txt", "猫".encode("utf-16"), "is not UTF-8 text .*save it as UTF-8"),
        ("names.txt", "a\tcat\ndog\n", "'dog' has no tab between label and name"),
        ("names.txt", "a\tcat\na\tdog\n", "has the label 'a' twice"),
        ("names.yaml", "a: [1", "is not valid YAML: .*line 1"),
        ("names.yaml", "a: cat\na: dog\n", "has the label 'a' twice"),
        ("names.yaml", "- cat\n- [dog]\n", "entry 2 is empty, not a text"),
        ("names.yaml", "cat", "has no texts"),
        ("names.json", '["cat", ', "is not valid JSON: .*line 1"),
        ("names.json", '["cat", null]', "entry 2 is empty, not a text"),
        ("names.json", '["cat", true]', "entry 2 is True, not a text. Put it in quotes"),
        ("names.json", '{"a": ["n01440764", "tench"]}', "entry 1 is a list, not a text"),
        ("names.json", "7", "has no texts"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, file: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        names(tmp_path / file, content)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / file) in str(caught.value)


def test_templates_are_a_list_not_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "templates.yaml").write_text("a: a photo of a {}.\n")
    with pytest.raises(ConfigError, match="must not be a mapping: use a list"):
        read_lines(str(tmp_path / "templates.yaml"), "templates", "a list")


def test_the_subsets_of_imagenet_a_and_r_are_timms(tmp_path: Path) -> None:
    for name in ("imagenet_a", "imagenet_r"):
        wnids = (package_folder("timm") / f"data/_info/{name}_synsets.txt").read_text().split()
        subset = class_set(name)
        assert subset.wnids == wnids
        assert [imagenet_classes()[index] for index in subset.indices] == list(zip(wnids, subset.names, strict=True))


def test_numbers_count_the_classes_of_a_published_list_never_in_the_order_of_texts() -> None:
    found = matched(["2", "10", "100", "999"], "imagenet")
    assert found.position == {"2": 2, "10": 10, "100": 100, "999": 999}
    assert found.names[10] == "brambling"
    with pytest.raises(DataError, match="these labels are not classes of ImageNet-A: '200'"):
        matched(["0", "200"], "imagenet_a")


def test_a_subset_is_scored_against_its_own_names_and_knows_them_among_all() -> None:
    found = matched(["n01498041", "n01531178", "n12267677"], "imagenet_a")
    assert len(found.names) == 200
    assert [found.names[place] for place in found.position.values()] == ["stingray", "goldfinch", "acorn"]
    assert found.imagenet is not None
    assert [found.imagenet[place] for place in found.position.values()] == [[6], [11], [988]]
    with pytest.raises(
        DataError, match="these labels are not classes of ImageNet-A: 'n01440764'"
    ):  # of ImageNet-1k it is
        matched(["n01440764"], "imagenet_a")


def test_a_thousand_names_in_any_language_belong_to_the_wnids_in_their_order(tmp_path: Path) -> None:
    own = [f"类 {index}" for index in range(1000)]
    own[744] = own[657]  # two classes of one name stay two
    for classes in (own, dict(zip(imagenet_index(), own, strict=True))):
        found = matched(["n01440764", "n04008634"], classes)
        assert (found.position, found.names) == ({"n01440764": 0, "n04008634": 744}, own)
        assert found.imagenet == [[index] for index in range(1000)]


def test_names_in_another_order_than_the_classes_are_refused_by_name() -> None:
    assert matched(["Faces", "accordion", "zebra"], ["face", "accordion", "zebra"]).position["zebra"] == 2
    with pytest.raises(ConfigError, match=r"'accordion' as name 1, but it is class 2 of the data \('accordion'\)"):
        matched(["Faces", "accordion", "zebra"], ["accordion", "face", "zebra"])


def test_numbers_from_zero_count_a_longer_list_of_names() -> None:
    assert matched(["0", "2", "10"], [f"name {index}" for index in range(12)]).position == {"0": 0, "2": 2, "10": 10}
    with pytest.raises(ConfigError, match="12 names, the data has 2 classes"):  # from 0 or from 1?
        matched(["2", "10"], [f"name {index}" for index in range(12)])


def test_accents_are_the_same_letters_however_a_file_system_writes_them() -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    assert matched([decomposed, "thé"], ["thé", "café", "lait"]).position == {decomposed: 1, "thé": 0}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("objectnet", "requires the folder of ObjectNet: set task.t.root"),
        ("imagenett", "imagenett: no such file. Use labels, imagenet, imagenet_a"),
        (5, "task.t.classes has no texts"),
        ([], "has no texts"),
        ([True, "b"], "entry 1 is True"),
    ],
)
def test_an_invalid_choice_of_names_is_reported_with_the_valid_ones(classes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        matched(["a", "b"], classes)


def test_json_of_a_mapping_keeps_its_order(tmp_path: Path) -> None:
    content = {"b": "second", "a": "first"}
    assert list(names(tmp_path / "n.json", json.dumps(content))) == ["b", "a"]
