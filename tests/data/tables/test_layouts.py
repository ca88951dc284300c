"""Every layout of a data set gives the same images with the same captions, in the same order."""

import json
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest

from clip_exp.config.data import DataConfig
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.image_sets import TableImages
from clip_exp.data.stream import open_all, open_sources
from clip_exp.data.tables.open import read_table
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import CheckpointError, ConfigError, DataError
from tests.data.layouts import IMAGES, LAYOUTS, captions_of, content_of, write_images


def open_layout(name: str, folder: Path, index_dir: Path | None, **keys: object) -> PairTable:
    path, written = LAYOUTS[name](folder / name)
    values = {key: json.loads(value) if value in ("true",) else value for key, value in written.items()}
    for key in ("header", "caption_key"):
        if str(values.get(key, "")).startswith("["):
            values[key] = str(values[key])[1:-1].split(",")
    config = DataConfig.model_validate({"name": "test", "train": str(path), **values, **keys})
    return open_sources(config, index_dir)[0].rows.origin


def contents(table: PairTable) -> list[tuple[bytes, list[str]]]:
    return [
        (
            bytes(table.read_image(int(table.rows_of(image)[0]), ImageLimits())),
            [table.caption(row) for row in table.rows_of(image).tolist()],
        )
        for image in range(table.images)
    ]


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_pairs(name: str, indexed: bool, tmp_path: Path) -> None:
    index_dir = tmp_path / "index" if indexed else None
    table = open_layout(name, tmp_path, index_dir)
    expected = [(content_of(number), captions_of(number)) for number in range(IMAGES)]
    assert contents(table) == expected
    rows = [int(table.rows_of(image)[0]) for image in range(table.images)]
    images = TableImages(table, rows)  # type: ignore[arg-type]
    places = [images.stored(index) for index in range(IMAGES)]
    read = [Path(place.file).read_bytes()[place.offset :][: place.size] for place in places]
    assert read == [content for content, _ in expected], "signatures of images are taken there"


def test_class_folders_give_the_templates_as_captions_and_the_classes_as_labels(tmp_path: Path) -> None:
    for name in ("golden_retriever", "cat"):
        write_images(tmp_path / "train" / name)
    templates = ("a photo of a {}.", "a drawing of a {}.")
    table = read_table(tmp_path / "train", templates=templates, label_key="class")
    assert (table.images, len(table)) == (2 * IMAGES, 4 * IMAGES)
    assert [table.caption(row) for row in (0, 1, len(table) - 1)] == [
        "a photo of a cat.", "a drawing of a cat.", "a drawing of a golden retriever.",
    ]  # fmt: skip
    assert table.label(len(table) - 1) == "golden retriever"


def test_a_changed_sidecar_file_changes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_dir = tmp_path / "index"
    LAYOUTS["files_of_one_name"](tmp_path / "files")
    monkeypatch.chdir(tmp_path)
    folder = Path("files")
    config = DataConfig.model_validate({"name": "test", "train": str(folder)})
    assert open_sources(config, index_dir)[0].rows.origin.caption(0) == captions_of(0)[0]
    (folder / "0000.json").write_text(json.dumps({"title": "another"}))
    assert open_sources(config, index_dir)[0].rows.origin.caption(0) == "another"


def test_two_images_of_one_name_share_its_caption(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content_of(0))
    (tmp_path / "a.webp").write_bytes(content_of(1))
    (tmp_path / "a.txt").write_text("a scene")
    table = read_table(tmp_path)
    assert sorted(table.path(row) for row in range(2)) == ["a.png", "a.webp"]
    assert {table.caption(row) for row in range(2)} == {"a scene"}


@pytest.mark.parametrize(
    ("files", "reported"),
    [
        ({"t.csv": "0,a.jpg,a dog\n1,b.jpg,a cat\n"}, r"no header row.*data\.header=\[column0,filepath,title\]"),
        ({"x_imgs.tsv": f"1\t{'_9j_' * 100}\n"}, r"Chinese-CLIP.*data\.format=chinese_clip"),
        ({"t.json": '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": []}]}'}, "annotations without captions"),
        ({"t.json": '{"a": 1,\n "b": {}}'}, "JSON document with 'a', 'b', but it must be"),
        ({"t.json": "[1, 2]"}, "entry 1: it is not an object"),
        ({"t.json": '[{"filepath": "a.jpg", "title": "x"}'}, "not valid JSON.*complete"),
        ({"d/x.txt": "x"}, "neither tables nor images"),
        ({"d/train/state.json": "{}", "d/dataset_dict.json": "{}"}, r"several splits \(train\): name one of them"),
        ({"d/train-0.parquet": "", "d/test-0.parquet": ""}, "has several tables: name those to read"),
        ({"d/a.png": "x", "d/b.png": "x", "d/b.txt": "y"}, r"no caption.*image 'a\.png'"),
        ({"t.jsonl": '{"filepath": "a.jpg", "title": ["", " "]}'}, "line 1: every caption is empty"),
    ],
)  # fmt: skip
def test_a_layout_that_is_not_read_is_named_with_the_way_out(
    files: dict[str, str], reported: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises((ConfigError, DataError), match=reported) as caught:
        read_table(tmp_path / next(iter(files)).partition("/")[0])
    assert "a dog" not in str(caught.value), "values are not offered as names of columns"


def test_members_that_are_not_adjacent_are_named_as_the_cause(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a.png", "b.png", "a.txt", "b.txt"):
            (tmp_path / name).write_text("x")
            tar.add(tmp_path / name, name)
    with pytest.raises(DataError, match=r"not adjacent.*--sort=name"):
        read_table(tmp_path / "s.tar")


def test_lists_and_lines_that_were_not_split_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.csv").write_text('filepath,title\n1.jpg,"[\'a dog\', \'a pet\']"\n2.jpg,"[""a cat""]"\n')
    assert read_table(tmp_path / "t.csv").caption(0) == "['a dog', 'a pet']"
    assert "2 of 2 captions look like a list of captions" in caplog.text
    assert "caption_list=true" in caplog.text
    (tmp_path / "u.csv").write_text('filepath,title\n1.jpg,"a dog\na pet\n"\n')
    assert len(read_table(tmp_path / "u.csv")) == 1
    assert "1 of 1 captions have several lines" in caplog.text
    assert [*map(read_table(tmp_path / "u.csv", caption_lines=True).caption, range(2))] == ["a dog", "a pet"]


def test_a_caption_is_drawn_by_the_weights_of_the_columns_that_have_one(tmp_path: Path) -> None:
    table = "filepath,alt,re\n1.jpg,alt text,\n2.jpg,alt text,recaption\n"
    (tmp_path / "t.csv").write_text(table)
    keys = {"caption_key": ["alt", "re"], "caption_weights": [0.25, 0.75]}
    config = DataConfig.model_validate({"name": "test", "train": str(tmp_path / "t.csv"), **keys})
    (source,) = open_sources(config)
    assert {source.rows.caption(0, 0, epoch) for epoch in range(50)} == {"alt text"}
    drawn = [source.rows.caption(1, 0, epoch) for epoch in range(4000)]
    assert 0.72 < drawn.count("recaption") / len(drawn) < 0.78
    assert drawn[:50] == [source.rows.caption(1, 0, epoch) for epoch in range(50)]


def test_held_out_images_are_disjoint_from_the_others_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    rows = [f"{number % 500}.jpg,caption {number}" for number in range(1000)]
    (tmp_path / "t.csv").write_text("\n".join(["filepath,title", *rows]))

    def split(**keys: object) -> tuple[set[str], set[str]]:
        config = DataConfig.model_validate(
            {"name": "test", "train": str(tmp_path / "t.csv"), "val_fraction": 0.2, **keys}
        )
        opened = open_all(config)
        assert opened.val is not None
        return tuple(
            {table.path(row) for row in range(len(table))}
            for table in (opened.train[0].rows.origin, opened.val.origins[0])
        )  # type: ignore[return-value]

    train, val = split()
    assert not train & val
    assert len(train | val) == 500
    assert 70 < len(val) < 130
    assert split() == (train, val)
    assert split(val_seed=1) != (train, val)


def test_validation_reads_several_sources_with_filters(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [f"{number}.jpg,caption {name}{number},{'train' if number % 2 else 'val'}" for number in range(4)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["filepath,title,split", *rows]))
    sources = [{"path": str(tmp_path / f"{name}.csv"), "filter": "split = 'val'"} for name in ("a", "b")]
    val = open_all(DataConfig.model_validate({"name": "test", "train": sources, "val": sources})).val
    assert val is not None
    assert len(val) == 4
    assert [len(origin) for origin in val.origins] == [2, 2]


def test_a_damaged_arrow_file_is_an_error_or_has_fewer_rows(tmp_path: Path) -> None:
    folder, _ = LAYOUTS["saved_to_disk"](tmp_path / "saved")
    file = folder / "data-00000-of-00002.arrow"
    intact, chance = file.read_bytes(), np.random.default_rng(0)
    for number in range(150):
        damaged = bytearray(intact[: len(intact) if number % 3 else int(chance.integers(len(intact)))])
        for place in chance.integers(0, max(1, len(damaged)), 8 if number % 3 else 0):
            damaged[int(place)] = int(chance.integers(256))
        file.write_bytes(damaged)
        try:
            table = read_table(file, on_bad_row="skip")
        except (ConfigError, DataError):
            continue
        for row in range(len(table)):
            assert table.caption(row)
            with suppress(BadImage):
                table.read_image(row, ImageLimits())


def test_a_caption_in_brackets_is_no_list_unless_it_is_written_as_one(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("filepath,title\n1.jpg,(photo) a dog\n2.jpg,[1] a cat\n")
    table = read_table(tmp_path / "t.csv", caption_list=True)
    assert [table.caption(row) for row in range(2)] == ["(photo) a dog", "[1] a cat"]


ODD = (None, 7, -0.5, True, "", "x", [], {}, ["x", 7], {"raw": 7}, [["x"]], "\ud800", "a\0b", 10**30)


@pytest.mark.parametrize("name", ["coco", "karpathy", "json_array", "captions_by_path", "chinese_clip"])
def test_odd_values_in_annotations_are_errors_or_bad_rows(name: str, tmp_path: Path) -> None:
    path, keys = LAYOUTS[name](tmp_path / "data")
    file = path.with_name("train_texts.jsonl") if name == "chinese_clip" else path
    lines = file.read_text().splitlines() if name == "chinese_clip" else [file.read_text()]
    chance = Random(0)
    for _ in range(120):
        documents = [json.loads(line) for line in lines]
        holder = documents[chance.randrange(len(documents))]
        while True:  # a random place, at any depth
            place = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            if not isinstance(holder[place], dict | list) or not holder[place] or chance.random() < 0.3:
                break
            holder = holder[place]
        holder[place] = chance.choice(ODD)
        file.write_text("\n".join(map(json.dumps, documents)))
        try:
            table = read_table(path, on_bad_row="skip", **{k: v for k, v in keys.items() if k in ("format", "filter")})
        except (ConfigError, DataError):
            continue
        assert all(table.caption(row) and table.path(row) for row in range(len(table)))


@pytest.mark.parametrize(
    "path", ["file://{root}/a%20dog.png", "photos\\\\a dog.png", "photos/a dog.png", "~/a dog.png"]
)
def test_paths_of_other_systems_lead_to_the_image(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    for folder in (tmp_path, tmp_path / "photos"):
        (folder / "a dog.png").write_bytes(content_of(0))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.csv").write_text(f"filepath,title\n{path.format(root=tmp_path)},a dog\n")
    table = read_table(tmp_path / "t.csv")
    assert table.read_image(0, ImageLimits()) == content_of(0)
    assert Path(table.image_path(0)).is_file()


def test_a_backslash_in_a_name_is_no_separator_if_the_file_exists(tmp_path: Path) -> None:
    (tmp_path / "a\\b.png").write_bytes(content_of(1))
    (tmp_path / "t.csv").write_text("filepath,title\na\\b.png,a dog\n")
    assert read_table(tmp_path / "t.csv").read_image(0, ImageLimits()) == content_of(1)


def test_templates_of_classes_do_not_change_the_index_of_a_table(tmp_path: Path) -> None:
    path, _ = LAYOUTS["csv"](tmp_path / "data")
    for template in ("a {}", "the {}"):
        config = DataConfig.model_validate({"name": "test", "train": str(path), "templates": [template]})
        open_sources(config, tmp_path / "index")
    assert len(list((tmp_path / "index").glob("pairs-*"))) == 1


def test_images_that_do_not_fit_in_the_temporary_folder_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = LAYOUTS["parquet"](tmp_path / "data")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match=r"cannot be copied to .*missing.*TMPDIR"):
        read_table(folder)
