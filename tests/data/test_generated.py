import csv
import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from clip_exp.config.base import broken_rules, parse
from clip_exp.config.data import GenerateConfig, Generator
from clip_exp.data import generated
from clip_exp.data.generated import count_rows, generate
from clip_exp.data.tables.open import read_table
from clip_exp.errors import CheckpointError, ConfigError
from tests.data.conftest import load


def records(table: Path) -> list[dict[str, str]]:
    with open(table, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return generate(GenerateConfig(kind=Generator.digits), tmp_path_factory.mktemp("digits"))


def test_digits_hold_out_a_stratified_fifth(made):
    train, val = records(made.train), records(made.val)
    assert len(train) + len(val) == 1797
    assert len(train) == count_rows(GenerateConfig(kind=Generator.digits))
    counts, held_out = Counter(r["label"] for r in train), Counter(r["label"] for r in val)
    assert set(counts) == set(held_out) == set(generated.WORDS)
    for word in generated.WORDS:
        assert held_out[word] / (counts[word] + held_out[word]) == pytest.approx(0.2, abs=0.01)


def test_digit_captions_come_from_the_templates_of_the_configuration(made, repository):
    config = yaml.safe_load((repository / "conf" / "data" / "digits.yaml").read_text(encoding="utf-8"))
    assert tuple(config["templates"]) == generated.TEMPLATES
    used = Counter()
    for record in records(made.train):
        used.update(t for t in generated.TEMPLATES if t.format(record["label"]) == record["title"])
    assert sum(used.values()) == len(records(made.train))
    assert min(used.values()) > 400


def test_digit_images_are_the_ones_of_scikit_learn(made):
    from sklearn.datasets import load_digits

    table = read_table(made.train, label_key="label")
    first = load(table.image_path(0))
    assert first.size == (8, 8)
    assert [[round(v * 255 / 16) for v in row] for row in load_digits().images[0].tolist()] == [
        [first.getpixel((x, y)) for x in range(8)] for y in range(8)
    ]


def test_what_is_there_is_used_again(made):
    before = made.train.stat().st_mtime_ns
    assert generate(GenerateConfig(kind=Generator.digits), made.train.parents[2]) == made
    assert made.train.stat().st_mtime_ns == before


def shapes(rows: int = 60, val_rows: int = 20, seed: int = 0) -> GenerateConfig:
    return GenerateConfig(kind=Generator.shapes, rows=rows, val_rows=val_rows, image_size=48, seed=seed)


def test_shapes_depend_on_the_seed_alone(tmp_path):
    one, again = generate(shapes(), tmp_path / "a"), generate(shapes(), tmp_path / "b")
    other = generate(shapes(seed=1), tmp_path / "a")
    assert digest(one.train.parent) == digest(again.train.parent)
    assert digest(one.train.parent) != digest(other.train.parent)
    more = generate(shapes(rows=80), tmp_path / "a")
    assert records(more.train)[:60] == records(one.train)


def test_captions_of_shapes_say_what_is_drawn_where(tmp_path):
    from clip_exp.data.generated import COLORS

    table = read_table(generate(shapes(rows=200), tmp_path).train)
    checked = 0
    for row in range(200):
        words = table.caption(row).split()
        if "above" not in words or words[2] == words[7]:
            continue
        image = load(table.image_path(row))
        assert image.size == (48, 48)
        centers = []
        for color in (COLORS[words[2]], COLORS[words[7]]):
            rows = [y for y in range(48) for x in range(48) if image.getpixel((x, y)) == color]
            centers.append(sum(rows) / len(rows))
        assert centers[0] < centers[1]
        checked += 1
    assert checked > 20


def test_several_writers_at_once_leave_one_whole_folder(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        results = set(pool.map(lambda _: generate(shapes(), tmp_path), range(4)))
    assert len(results) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == [results.pop().train.parent.name]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    folder = generate(shapes(rows=5, val_rows=5), tmp_path).train.parent
    folder.rename(folder.with_name(f".writing-{folder.name}-0123"))
    folder.with_name(f".lock-{folder.name}").touch()
    generate(shapes(rows=5, val_rows=5), tmp_path)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [folder.name]


def test_rows_can_be_limited(tmp_path):
    data = generate(GenerateConfig(kind=Generator.digits, rows=30, val_rows=10), tmp_path)
    assert (len(records(data.train)), len(records(data.val))) == (30, 10)


def test_impossible_sizes_and_places_are_reported(tmp_path):
    for key in ("rows", "val_rows"):
        with pytest.raises(ConfigError, match=rf"data\.generate\.{key}=0 must be greater than 0"):
            parse(GenerateConfig, {"kind": "shapes", key: 0}, "data.generate.")
    for image_size in (15, 1025):
        (reported,) = broken_rules(GenerateConfig(kind=Generator.shapes, image_size=image_size), "data.generate.")
        assert reported == f"data.generate.image_size={image_size} must be between 16 and 1024 pixels."
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Set output_dir"):
        generate(shapes(), tmp_path / "file")
