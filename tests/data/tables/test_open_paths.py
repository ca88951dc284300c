import os

import pytest

from clip_exp.data.tables.open import expand
from clip_exp.errors import ConfigError


@pytest.fixture
def shards(tmp_path):
    for name in ("s-0008.tar", "s-0009.tar", "s-0010.tar", "a.csv", "b.csv", "deep/er/c.csv", ".hidden.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("tables", "names"),
    [
        ("a.csv", ["a.csv"]),
        (["b.csv", "a.csv"], ["b.csv", "a.csv"]),
        ("*.csv", ["a.csv", "b.csv"]),
        ("**/*.csv", ["a.csv", "b.csv", "deep/er/c.csv"]),
        ("d*/**/*.csv", ["deep/er/c.csv"]),
        ("deep/**", ["deep/er/c.csv"]),
        ("deep/er", ["deep/er/c.csv"]),
        ("**/deep/**/**/*.csv", ["deep/er/c.csv"]),
        ("a**.csv", ["a.csv"]),
        ("s-{0008..0010}.tar", ["s-0008.tar", "s-0009.tar", "s-0010.tar"]),
        ("s-{0010..0008}.tar", ["s-0010.tar", "s-0009.tar", "s-0008.tar"]),
        ("{b,a}.csv", ["b.csv", "a.csv"]),
        (["{b,s}*", "a.csv"], ["b.csv", "s-0008.tar", "s-0009.tar", "s-0010.tar", "a.csv"]),
    ],
)
def test_patterns_name_files_in_a_fixed_order(shards, tables, names):
    given = [shards / table for table in tables] if isinstance(tables, list) else str(shards / tables)
    assert expand(given) == [shards / name for name in names]


def test_folders_that_links_lead_back_to_are_looked_into_once(shards):
    for name in ("one", "two", "deep/three"):  # two of them had no end
        (shards / name).symlink_to(shards)
    assert expand(f"{shards}/**/*.csv") == [shards / name for name in ("a.csv", "b.csv", "deep/er/c.csv")]


def test_paths_are_seen_from_the_working_folder_and_from_home(shards, monkeypatch):
    monkeypatch.chdir(shards)
    monkeypatch.setenv("HOME", str(shards))
    assert [str(path) for path in expand("*.csv")] == ["a.csv", "b.csv"]
    assert [str(path) for path in expand("**/*.csv")] == ["a.csv", "b.csv", "deep/er/c.csv"]
    assert expand("~/a.csv") == [shards / "a.csv"]


@pytest.mark.parametrize("name", ["x{1,2}.csv", "x[1].csv", "x*.csv", "open{.csv"])
def test_a_file_that_is_called_like_a_pattern_is_that_file(tmp_path, name):
    (tmp_path / name).touch()
    (tmp_path / "x1.csv").touch()
    assert expand(tmp_path / name) == [tmp_path / name]


@pytest.mark.parametrize(
    ("tables", "reported"),
    [
        ([], "No table is given"),
        ("absent.csv", r"absent\.csv does not exist"),
        ("*.jsonl", r"\*\.jsonl matches no file"),
        ("s-{0009..0012}.tar", r"s-0011\.tar does not exist(.|\n)*s-0012\.tar does not exist"),
        ("s-{0009..0019}.tar", r"and 6 more"),
        ("s-{0009..0010.tar", "close each brace"),
        ("s-{0..99999999999}.tar", "more than 1,000,000 files"),
        ("{000..999}/{000..999}/{0..9}.tar", "more than 1,000,000 files"),
        ("s-{" + "9" * 5_000 + "..0}.tar", "is not a valid pattern"),
        ("deep", "has neither tables nor images"),
        ("dangling.csv", "is a broken link"),
        ("pipe.csv", "is not a regular file"),
        (["a.csv", "*.csv"], r"a\.csv is named twice"),
        (["a.csv", "link.csv"], r"link\.csv is named twice \(it is .*a\.csv\)"),
        (["a.csv", None], "None is not the path"),
    ],
)
def test_what_names_no_file_is_reported(shards, monkeypatch, tables, reported):
    (shards / "dangling.csv").symlink_to("nowhere")
    (shards / "link.csv").symlink_to("a.csv") if "link.csv" in tables else None
    os.mkfifo(shards / "pipe.csv")
    monkeypatch.chdir(shards)
    with pytest.raises(ConfigError, match=reported):
        expand(tables)


def test_addresses_are_refused():
    with pytest.raises(ConfigError, match="download it first"):
        expand(["https://example.com/{000..009}.tar"])
