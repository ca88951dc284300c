"""`clip-exp embed`: its files are read as clip-retrieval, DataComp and other tools read them."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from clip_exp.config.commands import EmbedConfig, EmbedFormat
from clip_exp.errors import CheckpointError, ConfigError, DataError
from clip_exp.inference import embed as module
from clip_exp.inference.embed import embed
from clip_exp.inference.feature_files import Layout
from clip_exp.inference.pipeline import Pipeline
from tests.data.tables.shard_files import jpeg, write_shard
from tests.small_runs import write_image
from tests.test_contract import listed

CAPTIONS = ["a dog", "two dogs, running", "一只猫", "", "a cat", "the same cat", "=formula"]
# The image of each caption: one has two captions, in rows that are not adjacent.
IMAGES = ["0.png", "1.png", "2.png", "3.png", "more/5.png", "1.png", "more/6.png"]


@pytest.fixture
def pairs(photos: Path) -> Path:
    lines = [json.dumps({"filepath": image, "title": text}) for image, text in zip(IMAGES, CAPTIONS, strict=True)]
    (photos / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return photos / "pairs.jsonl"


def config_of(run_dir: Path, output: Path, **values: object) -> EmbedConfig:
    return EmbedConfig(run=str(run_dir), output=str(output), accelerator="cpu", num_workers=0, **values)


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Read image features, text features and metadata as clip-retrieval does: arrays and tables in the order of their names."""
    image, text = (
        np.concatenate([np.load(path) for path in sorted((folder / name).iterdir())])
        for name in ("img_emb", "text_emb")
    )
    rows = [row for path in sorted((folder / "metadata").iterdir()) for row in pq.read_table(path).to_pylist()]
    return image, text, rows


def test_clip_retrieval_finds_in_row_i_the_features_of_pair_i(
    run_dir: Path, pairs: Path, clip: Pipeline, tmp_path: Path
):
    out = tmp_path / "out"
    assert embed(config_of(run_dir, out, table=str(pairs), rows_per_file=2, dtype="float32", similarity=True)) == 0
    image, text, rows = read(out)
    assert [path.name for path in sorted((out / "img_emb").iterdir())] == [f"img_emb_{n}.npy" for n in range(4)]
    assert list(rows[0]) == ["image_path", "caption", "key", "similarity"]
    assert [row["caption"] for row in rows] == CAPTIONS
    assert [row["key"] for row in rows] == IMAGES
    assert [row["image_path"] for row in rows] == [str(pairs.parent / image) for image in IMAGES]
    expected_image = clip.encode_image([pairs.parent / image for image in IMAGES]).numpy()
    expected_text = clip.encode_text(CAPTIONS).numpy()
    np.testing.assert_allclose(image, expected_image, atol=1e-6)
    np.testing.assert_allclose(text, expected_text, atol=1e-6)
    np.testing.assert_allclose(
        [row["similarity"] for row in rows], (expected_image * expected_text).sum(axis=1), atol=1e-6
    )


@pytest.mark.parametrize("count", [1, 9, 10, 99, 100, 1000])
def test_numbers_are_as_wide_as_those_of_clip_retrieval(count: int):
    digits = int(math.log10(count)) + 1  # clip_inference/writer.py
    name = f"img_emb/img_emb_{str(count - 1).zfill(digits)}.npy"
    assert Layout(config_of(Path(), Path()).format, count, True, "l14").files(count - 1)[0] == name


def test_features_are_float16_and_of_unit_norm_by_default(run_dir: Path, pairs: Path, tmp_path: Path):
    embed(config_of(run_dir, tmp_path / "out", table=str(pairs)))
    image, text, rows = read(tmp_path / "out")
    assert image.dtype == text.dtype == np.float16
    for features in (image, text):
        np.testing.assert_allclose(np.linalg.norm(features.astype(np.float32), axis=1), 1, atol=1e-3)
    assert "similarity" not in rows[0]


def test_images_without_captions_have_no_text_features(run_dir: Path, photos: Path, clip: Pipeline, tmp_path: Path):
    embed(config_of(run_dir, tmp_path / "out", images=str(photos), dtype="float32"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_manifest.jsonl", "img_emb", "metadata"]
    rows = pq.read_table(tmp_path / "out/metadata/metadata_0.parquet").to_pylist()
    assert list(rows[0]) == ["image_path", "key"]
    expected = clip.encode_image([row["image_path"] for row in rows]).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out/img_emb/img_emb_0.npy"), expected, atol=1e-6)
    assert len(rows) == 7


def test_the_filters_of_datacomp_find_their_columns_and_arrays(run_dir: Path, clip: Pipeline, tmp_path: Path):
    uids = [f"{number:032x}" for number in (3, 1)]
    members = [
        (f"{key}.{ending}", content)
        for key, (uid, text) in enumerate(zip(uids, ["a dog", "a cat"], strict=True))
        for ending, content in (("jpg", jpeg(key)), ("txt", text), ("json", {"uid": uid}))
    ]
    shard = write_shard(tmp_path / "0.tar", members)
    given = {"table": str(shard), "format": "datacomp", "datacomp_name": "b32", "columns": ["uid"], "dtype": "float32"}
    embed(config_of(run_dir, tmp_path / "out", **given))
    # As baselines/apply_filter.py reads them
    root = tmp_path / "out" / "00000000"
    table = pq.read_table(f"{root}.parquet", columns=["uid", "text", "clip_b32_similarity_score"]).to_pylist()
    with open(f"{root}.npz", "rb") as file:
        arrays = np.load(file)
        image, text = arrays["b32_img"], arrays["b32_txt"]
    assert [row["uid"] for row in table] == uids
    assert [(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids] == [(0, 3), (0, 1)]
    np.testing.assert_allclose(text, clip.encode_text(["a dog", "a cat"]).numpy(), atol=1e-6)
    scores = [row["clip_b32_similarity_score"] for row in table]
    np.testing.assert_allclose(scores, (image * text).sum(axis=1), atol=1e-6)


def test_without_identifiers_datacomp_gets_distinct_ones(run_dir: Path, pairs: Path, tmp_path: Path):
    embed(config_of(run_dir, tmp_path / "out", table=str(pairs), format="datacomp"))
    uids = pq.read_table(tmp_path / "out/00000000.parquet")["uid"].to_pylist()
    assert len(set(uids)) == len(CAPTIONS)
    assert all(len(uid) == 32 and int(uid, 16) for uid in uids)


def test_files_and_columns_are_those_of_the_contract(run_dir: Path, pairs: Path, tmp_path: Path):
    (pairs.parent / "1.png").write_bytes(b"broken")
    files, columns = set(), set()
    for format in EmbedFormat:
        out = tmp_path / format
        embed(config_of(run_dir, out, table=str(pairs), format=format, similarity=True, on_bad_image="skip"))
        files |= {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        columns |= {name for path in out.rglob("*.parquet") for name in pq.read_schema(path).names}
    assert listed("Files of `embed`") == files
    assert listed("Columns of `embed`") == columns


def test_parquet_has_the_features_in_columns(run_dir: Path, pairs: Path, clip: Pipeline, tmp_path: Path):
    embed(config_of(run_dir, tmp_path / "out", table=str(pairs), format="parquet", dtype="float32", similarity=True))
    table = pq.read_table(tmp_path / "out" / "00000.parquet")
    assert table["key"].to_pylist() == IMAGES
    image = np.array(table["image_embedding"].to_pylist(), np.float32)
    text = np.array(table["text_embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(image[2], clip.encode_image(pairs.parent / "2.png")[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(table["similarity"].to_numpy(), (image * text).sum(axis=1), atol=1e-6)


def test_the_key_of_a_sample_in_a_shard_is_its_name_without_extension(run_dir: Path, tmp_path: Path):
    shard = write_shard(tmp_path / "0.tar", {"a/b.x.jpg": jpeg(0), "a/b.txt": "", "c.jpg": jpeg(1), "c.txt": "a cat"})
    with pytest.raises(DataError, match="sample 'a/b'"):
        embed(config_of(run_dir, tmp_path / "out", table=str(shard)))
    shard = write_shard(tmp_path / "1.tar", {"a/b.jpg": jpeg(0), "a/b.txt": "a dog"})
    embed(config_of(run_dir, tmp_path / "out", table=str(shard)))
    row = pq.read_table(tmp_path / "out/metadata/metadata_0.parquet").to_pylist()[0]
    assert (row["key"], row["image_path"]) == ("a/b", f"{shard}/a/b.jpg")


def test_a_broken_image_stops_the_command_or_is_left_out_and_listed(run_dir: Path, pairs: Path, tmp_path: Path, capsys):
    (pairs.parent / "1.png").write_bytes(b"broken")
    config = config_of(run_dir, tmp_path / "out", table=str(pairs), rows_per_file=4)
    with pytest.raises(DataError, match=r"1\.png: not an image.*on_bad_image=skip"):
        embed(config)
    assert embed(config.model_copy(update={"on_bad_image": "skip"})) == 0
    image, text, rows = read(tmp_path / "out")
    assert [row["key"] for row in rows] == [name for name in IMAGES if name != "1.png"]
    assert len(image) == len(text) == 5
    listed = (tmp_path / "out" / "_bad_samples.csv").read_text().splitlines()
    assert listed[1] == f'{pairs.parent}/1.png,not an image,"{pairs}, line 2"'
    assert "left out: 2 images" in capsys.readouterr().out  # once in each of two files


def test_if_no_image_can_be_read_the_command_fails(run_dir: Path, tmp_path: Path):
    (tmp_path / "pairs.csv").write_text("filepath,title\nabsent.png,a dog\n")
    config = config_of(run_dir, tmp_path / "out", table=str(tmp_path / "pairs.csv"), on_bad_image="skip")
    with pytest.raises(DataError, match=r"none of the 1 images can be read; the first: .*absent\.png: no such file"):
        embed(config)


def test_the_same_command_continues_with_the_missing_files(
    run_dir: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    values = {"table": str(pairs), "rows_per_file": 2}
    embed(config_of(run_dir, whole, **values))
    write, written = Layout.write, []

    def stopping(self: Layout, folder: Path, number: int, features: object) -> list[str]:
        if len(written) == 2:
            signal.raise_signal(signal.SIGTERM)
        written.append(number)
        return write(self, folder, number, features)  # type: ignore[arg-type]

    monkeypatch.setattr(Layout, "write", stopping)
    assert embed(config_of(run_dir, out, **values)) == 143
    assert "The same command continues" in capsys.readouterr().err
    assert written == [0, 1]
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/*_[01].*")}
    assert len(kept) == 6
    written.clear()
    monkeypatch.setattr(Layout, "write", write)
    with (out / "_manifest.jsonl").open("a") as manifest:  # as left by a process that was killed while it wrote
        manifest.write('{"number": 3, "files": ["img_')
    assert embed(config_of(run_dir, out, **values)) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for one, other in zip(read(whole), read(out), strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(module, "_features", lambda *_: pytest.fail("an image was encoded again"))
    assert embed(config_of(run_dir, out, **values)) == 0


def test_changed_images_and_files_are_written_again(
    run_dir: Path, pairs: Path, clip: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(run_dir, tmp_path / "out", table=str(pairs), rows_per_file=2, dtype="float32")
    embed(config)
    write_image(pairs.parent / "2.png", 99)
    (tmp_path / "out/text_emb/text_emb_3.npy").write_bytes(b"damaged")
    written: list[int] = []
    write = Layout.write
    monkeypatch.setattr(Layout, "write", lambda *given: (written.append(given[2]), write(*given))[1])
    embed(config)
    assert written == [1, 3]
    image, text, _ = read(tmp_path / "out")
    np.testing.assert_allclose(image[2], clip.encode_image(pairs.parent / "2.png")[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(text, clip.encode_text(CAPTIONS).numpy(), atol=1e-6)


def test_other_settings_or_another_table_do_not_mix_with_what_is_there(run_dir: Path, pairs: Path, tmp_path: Path):
    embed(config_of(run_dir, tmp_path / "out", table=str(pairs)))
    with pytest.raises(ConfigError, match=r"other input or settings: dtype=float16, now float32\. Give a new folder"):
        embed(config_of(run_dir, tmp_path / "out", table=str(pairs), dtype="float32"))
    pairs.write_text(pairs.read_text(encoding="utf-8").replace("a dog", "a big dog"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"pairs\.jsonl has changed"):
        embed(config_of(run_dir, tmp_path / "out", table=str(pairs)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"is not empty \(notes\.txt\)"):
        embed(config_of(run_dir, tmp_path / "mine", table=str(pairs)))


def test_a_full_disk_ends_it_with_one_message(
    run_dir: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        CheckpointError, match=r"output=.*out cannot be written: No space left on device\. .*same command"
    ):
        embed(config_of(run_dir, tmp_path / "out", table=str(pairs)))
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["_manifest.jsonl"]


def test_the_command_line_embeds_and_reports_all_problems_together(
    clip_exp_command: Callable, run_dir: Path, pairs: Path, tmp_path: Path
):
    done = clip_exp_command("embed", f"run={run_dir}", f"table={pairs}", "output=out", "similarity=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "written: out (7 rows, 10,000 per file)"
    assert len(read(tmp_path / "out")[2]) == 7
    refused = clip_exp_command("embed", "table=absent.csv")
    assert refused.returncode == 2
    for part in ("the model must be set by exactly one of", "absent.csv does not exist", "output has no value"):
        assert part in refused.stderr
    refused = clip_exp_command("embed", "images=photos", "format=datacomp", "caption_key=text", "rows_per_file=0")
    for part in ("rows_per_file=0 must be greater than 0.", "caption_key=text has no effect without table"):
        assert part in refused.stderr
