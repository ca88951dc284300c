import math
from collections import Counter
from pathlib import Path

import pytest

from clip_exp.config.base import parse, problems
from clip_exp.config.data import Captions, DataConfig
from clip_exp.data.stream import SLOTS, Stream, configured, open_sources, quotas
from clip_exp.errors import ConfigError, DataError
from tests.data.conftest import Build, noise, write_table
from tests.data.test_loader import digest, read


def data_of(train: object) -> DataConfig:
    return parse(DataConfig, {"name": "csv", "train": train}, "data.")


def sources_of(train: object) -> list[tuple[list[str], float | None, dict[str, object]]]:
    """Return paths, weight and reading options of each source."""
    return [(source.paths, source.weight, source.reading) for source in data_of(train).sources]


def test_paths_alone_are_one_source():
    assert sources_of(None) == sources_of([]) == []
    assert sources_of("a.csv") == [(["a.csv"], None, {})]
    assert sources_of(["a.csv", Path("b.csv")]) == [(["a.csv", "b.csv"], None, {})]


def test_mappings_are_sources_with_ways_of_their_own():
    data = data_of(
        [
            {"path": ["a.csv", "b.csv"], "weight": 3, "caption_key": "text", "filter": "width > 9", "image_root": None},
            {"path": "c.tar", "weight": 0.5},
        ]
    )
    first, second = data.sources
    assert (first.paths, first.weight) == (["a.csv", "b.csv"], 3)
    assert (second.paths, second.weight, second.reading) == (["c.tar"], 0.5, {})
    data.caption_key, data.image_key, data.image_root = "title", "file", "img"
    own = configured(first, data)
    assert (own.caption_key, own.image_key, own.filter, own.image_root) == ("text", "file", "width > 9", None)
    assert configured(second, data) == data
    assert sources_of({"path": "a.csv", "image_root": "img"}) == [(["a.csv"], None, {"image_root": "img"})]


def test_a_number_names_a_column_or_a_file():
    assert sources_of([{"path": 3, "caption_key": 1}]) == [(["3"], None, {"caption_key": "1"})]


WRONG = {
    "unknown key": (
        [{"path": "a.csv", "wieght": 1}],
        "data.train[0].wieght does not exist: did you mean 'data.train[0].weight'?",
    ),
    "unknown key of a later source": (
        ["a.csv", {"path": "b.csv", "sep": ","}],
        "data.train[1].sep does not exist: did you mean 'data.train[1].separator'?",
    ),
    "no path": ([{"weight": 1}], "data.train[0].path has no value: set it"),
    "null for a path": ([{"path": None}], "data.train[0].path=null must be a path, or a list of paths"),
    "no paths": ([{"path": []}], "data.train[0].path=[] must not be empty"),
    "no weight at all": ([{"path": "a.csv", "weight": 0}], "data.train[0].weight=0 must be greater than 0"),
    "negative": ([{"path": "a.csv", "weight": -1}], "weight=-1 must be greater than 0"),
    "infinite": ([{"path": "a.csv", "weight": math.inf}], "weight=inf must be a finite number"),
    "not a number": ([{"path": "a.csv", "weight": math.nan}], "weight=nan must be a finite number"),
    "text": ([{"path": "a.csv", "weight": "often"}], "weight=often must be a number"),
    "truth": ([{"path": "a.csv", "weight": True}], "weight=true must be a number"),
    "truth for a path": ([True], "data.train[0]=true must be a string"),
    "truth for a column": ({"path": "a.csv", "caption_key": True}, "data.train.caption_key=true must be a string"),
    "null for a column": ({"path": "a.csv", "caption_key": None}, "data.train.caption_key=null must be a string"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), WRONG.values(), ids=WRONG.keys())
def test_sources_that_make_no_sense_are_refused_by_name(value, expected):
    with pytest.raises(ConfigError) as caught:
        data_of(value)
    assert expected in str(caught.value)


def test_weights_for_some_sources_are_refused():
    some = data_of([{"path": "a.csv", "weight": 1}, "b.csv"])
    assert [problem.partition(":")[0] for problem in problems(some, at="data.")] == ["data.train"]
    assert "set a weight for every source or for none" in next(problems(some, at="data."))
    assert not list(problems(data_of([{"path": "a.csv"}, "b.csv"]), at="data."))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["a", "b", "a"], "data.columns names a column twice: name each once."),
        (["filepath"], "data.columns names 'filepath', which is data.image_key: leave it out"),
        (["title", "a"], "data.columns names 'title', which is data.caption_key: leave it out"),
    ],
)
def test_columns_that_the_loss_has_already_are_refused(columns, expected):
    data = data_of("a.csv").model_copy(update={"columns": columns})
    (problem,) = problems(data, at="data.")
    assert problem.startswith(expected)


def test_all_problems_of_all_sources_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        data_of([{"path": "a.csv", "weight": 0, "sep": ","}, {"weight": 1}])
    assert len(str(caught.value).splitlines()) == 3


def table(folder: Path, name: str, rows: int) -> str:
    """Write a table of images that do not exist; an order does not need them."""
    return str(
        write_table(folder / f"{name}.csv", [["filepath", "title"], *([f"{name}{i}.png", name] for i in range(rows))])
    )


def mixture(folder: Path, sizes: list[int], weights: list[float] | None, **values: object) -> Stream:
    train = [{"path": table(folder, f"t{i}", rows)} for i, rows in enumerate(sizes)]
    for entry, weight in zip(train, weights or [], strict=False):
        entry["weight"] = weight  # type: ignore[assignment]
    config = DataConfig(name="csv", train=train, **values)  # type: ignore[arg-type]
    return Stream(open_sources(config), config, seed=0)


@pytest.mark.parametrize(
    ("weights", "expected"), [([3, 1], [3072, 1024]), ([1, 1, 1], [1366, 1365, 1365]), ([0.5, 1e-3], [4088, 8])]
)
def test_every_round_is_divided_exactly_by_the_weights(tmp_path, weights, expected):
    stream = mixture(tmp_path, [5] * len(weights), weights)
    for start in (0, SLOTS, 7 * SLOTS):
        drawn = Counter(stream.sources.index(stream[start + i].source) for i in range(SLOTS))
        assert [drawn[i] for i in range(len(weights))] == expected


def test_the_fraction_of_a_source_in_a_batch_is_near_the_weights_and_differs_from_round_to_round(tmp_path):
    stream = mixture(tmp_path, [50, 50], [1, 1])
    orders = [[stream[start + i].source is stream.sources[0] for i in range(256)] for start in (0, SLOTS)]
    assert all(90 < sum(order) < 166 for order in orders)
    assert orders[0] != orders[1]


def test_each_source_goes_through_all_its_rows_before_it_begins_again(tmp_path):
    stream = mixture(tmp_path, [700, 30], [1, 1])
    assert len(stream) == 730
    samples = [stream[i] for i in range(2 * SLOTS)]
    for source, rows in zip(stream.sources, (700, 30), strict=True):
        of_source = Counter((sample.epoch, sample.row) for sample in samples if sample.source is source)
        assert set(of_source.values()) == {1}
        epochs = Counter(epoch for epoch, _ in of_source)
        assert all(epochs[epoch] == rows for epoch in range(SLOTS // rows))


def test_sources_without_weights_are_drawn_as_often_as_they_have_rows(tmp_path):
    stream = mixture(tmp_path, [3000, 1000], None)
    drawn = Counter(stream.sources.index(stream[i].source) for i in range(SLOTS))
    assert drawn == {0: 3072, 1: 1024}


def test_a_source_that_would_never_be_drawn_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"t1\.csv would never be drawn: its fraction of the samples \(weight=1e-05\)"
    ):
        mixture(tmp_path, [5, 5], [1, 1e-5])
    with pytest.raises(ConfigError, match=r"t0\.csv would never be drawn: its fraction of the samples \(1 rows\)"):
        mixture(tmp_path, [1, 9000], None)


def test_weights_of_any_size_give_their_fractions(tmp_path):
    config = DataConfig(name="csv", train=[{"path": table(tmp_path, f"t{i}", 2), "weight": 1e308} for i in range(3)])
    assert quotas(open_sources(config)) == [1366, 1365, 1365]


def test_the_rows_of_each_source_can_be_limited(tmp_path):
    assert [len(source.rows) for source in mixture(tmp_path, [30, 4], None, max_rows=10).sources] == [10, 4]


def images(folder: Path, color: int, bad: int | None = None) -> Path:
    """Write a table of six images with the same names in every folder."""
    folder.mkdir()
    for i in range(6):
        if i != bad:
            noise(100 * color + i).save(folder / f"{i}.png")
    return write_table(
        folder / "pairs.csv", [["image", "title"], *([f"{i}.png", f"{folder.name} {i}"] for i in range(6))]
    )


@pytest.fixture
def two(tmp_path: Path) -> list[dict[str, object]]:
    one, other = images(tmp_path / "one", 1, bad=2), images(tmp_path / "other", 2, bad=2)
    return [{"path": str(one), "weight": 2}, {"path": str(other), "weight": 1}]


def test_equal_paths_of_two_sources_are_different_images(two, build: Build, tmp_path):
    module = build(two, image_key="image", global_batch_size=32, run_dir=tmp_path, max_bad_fraction=0.5)
    batches = read(module)
    for batch in batches:
        module.on_before_batch_transfer(batch, 0)
    assert len({i for batch in batches for i in batch.image_id.tolist()}) == 10
    assert module.bad_samples is not None
    assert module.bad_samples.reasons == {str(tmp_path / name / "2.png"): "no such file" for name in ("one", "other")}
    assert dict(module.bad_samples.kinds()) == {"no such file": 2}


def test_an_image_of_two_sources_is_one_image(two, build: Build, tmp_path):
    rows = [
        ["image", "title"],
        ["./one/../one/1.png", "again"],
        [str(tmp_path / "other" / "1.png"), "again"],
        ["one/2.png", "x"],
    ]
    third = {"path": str(write_table(tmp_path / "third.csv", rows)), "weight": 1}
    sources = build([*two, third], image_key="image")._stream.sources
    assert [sources[2].rows.image_id(row) for row in range(3)] == [
        sources[0].rows.image_id(1), sources[1].rows.image_id(1), sources[0].rows.image_id(2),
    ]  # fmt: skip
    assert len({source.rows.image_id(row) for source in sources[:2] for row in range(6)}) == 12
    (tmp_path / "copy").mkdir()
    elsewhere = images(tmp_path / "copy" / "one", 1), images(tmp_path / "copy" / "other", 2)
    moved = build(
        [{**two[i], "path": str(table)} for i, table in enumerate(elsewhere)], image_key="image"
    )._stream.sources
    assert [source.rows.image_id(3) for source in moved] == [source.rows.image_id(3) for source in sources[:2]]


def test_a_bad_image_is_replaced_from_its_own_source(two, build: Build):
    drawn = Counter[bool]()
    module = build(two, image_key="image", global_batch_size=SLOTS // 8, total_steps=8)
    stream = module._stream
    for position in range(SLOTS):
        drawn[stream[position].source is stream.sources[0]] += 1
    of_first = {stream.sources[0].rows.image_id(row) for row in range(6)}
    got = Counter(i in of_first for batch in read(module) for i in batch.image_id.tolist())
    assert got == drawn == {True: 2731, False: 1365}


def test_the_fraction_of_bad_images_is_over_all_sources(two, build: Build):
    module = build(two, image_key="image", global_batch_size=64, max_bad_fraction=2 / 12)
    list(map(module.on_before_batch_transfer, read(module), range(3)))
    module = build(two, image_key="image", global_batch_size=64, max_bad_fraction=0.1)
    with pytest.raises(DataError, match="2 of 12 training images"):
        list(map(module.on_before_batch_transfer, read(module), range(3)))


def test_a_source_alone_gives_the_stream_of_its_table(pairs, build: Build):
    plain = digest(read(build(str(pairs), total_steps=8)))
    assert digest(read(build({"path": str(pairs)}, total_steps=8))) == plain
    assert digest(read(build([{"path": str(pairs), "weight": 5}], total_steps=8))) == plain
    assert build([str(pairs)], captions=Captions.all).num_rows == 25
