import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_exp.config.commands import OutputFormat, RankConfig
from clip_exp.config.evaluation import EvalOnBadImage
from clip_exp.errors import ConfigError, DataError
from clip_exp.inference.commands import rank
from clip_exp.inference.features import best
from clip_exp.inference.inputs import find_images
from clip_exp.inference.pipeline import Pipeline


def config_of(run_dir: Path, images: object, text: object, **values: object) -> RankConfig:
    given = {"format": OutputFormat.json, **values}
    return RankConfig(run=str(run_dir), images=images, text=text, accelerator="cpu", num_workers=0, **given)


def ranking(document: dict, number: int = 0) -> list[tuple[str, float]]:
    return [(match["path"], match["score"]) for match in document["rankings"][number]["matches"]]


def brute_force(clip: Pipeline, folder: Path, text: str) -> list[tuple[str, float]]:
    paths = find_images(folder)
    scores = (clip.encode_image(paths) @ clip.encode_text(text)[0]).tolist()
    return sorted(zip(paths, scores, strict=True), key=lambda pair: -pair[1])


def assert_same(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> None:
    assert [path for path, _ in found] == [path for path, _ in expected]
    torch.testing.assert_close([score for _, score in found], [score for _, score in expected], atol=1e-6, rtol=0)


def test_a_ranking_is_every_cosine_sorted(run_dir: Path, photos: Path, clip: Pipeline, capsys):
    assert rank(config_of(run_dir, str(photos), "a dog, running", top_k=None)) == 0
    expected = brute_force(clip, photos, "a dog, running")
    assert_same(ranking(json.loads(capsys.readouterr().out)), expected)
    rank(config_of(run_dir, str(photos), "a dog, running", top_k=3))
    assert_same(ranking(json.loads(capsys.readouterr().out)), expected[:3])


def test_the_python_api_ranks_folders_paths_and_images_alike(photos: Path, clip: Pipeline):
    expected = brute_force(clip, photos, "a cat")
    found = clip.rank("a cat", photos)
    assert_same([(match.path, match.score) for match in found], expected)
    paths = find_images(photos)
    assert [paths[match.position] for match in found] == [path for path, _ in expected]
    kept = clip.rank("a cat", [Image.open(path) for path in paths], top_k=2)
    assert [match.position for match in kept] == [match.position for match in found[:2]]
    with pytest.raises(ConfigError, match="a single string"):
        clip.rank(["a", "b"], photos)  # type: ignore[arg-type]


def test_equal_images_stay_in_their_order(photos: Path, clip: Pipeline):
    for number in range(7, 12):
        shutil.copy(photos / "0.png", photos / f"{number:02d}.png")
    paths = find_images(photos)
    copies = [path for path in paths if Path(path).read_bytes() == (photos / "0.png").read_bytes()]
    assert [match.path for match in clip.rank("a cat", paths) if match.path in copies] == copies


def test_the_best_of_equal_scores_are_the_first():
    scores = torch.tensor([0.5, 0.9, 0.5, 0.9, 0.5, 0.1])
    assert best(scores, 4).tolist() == [1, 3, 0, 2]
    assert best(scores).tolist() == [1, 3, 0, 2, 4, 5]
    assert best(scores, 100).tolist() == best(scores).tolist()


def test_every_text_has_its_own_ranking(run_dir: Path, photos: Path, clip: Pipeline, capsys):
    texts = ["a dog", "一只猫"]
    rank(config_of(run_dir, str(photos), [*texts, "a dog"]))
    document = json.loads(capsys.readouterr().out)
    assert [entry["text"] for entry in document["rankings"]] == texts
    for number, text in enumerate(texts):
        assert_same(ranking(document, number), brute_force(clip, photos, text))
    rank(config_of(run_dir, str(photos), texts, format=OutputFormat.csv, top_k=2))
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["query"], row["rank"], row["image"]) for row in rows] == [
        (text, str(place + 1), ranking(document, number)[place][0])
        for number, text in enumerate(texts)
        for place in range(2)
    ]


def test_the_ranked_images_are_copied_in_their_order(
    run_dir: Path, photos: Path, clip: Pipeline, tmp_path: Path, capsys
):
    rank(config_of(run_dir, str(photos), "a dog", top_k=3, copy_to=str(tmp_path / "best")))
    expected = [path for path, _ in brute_force(clip, photos, "a dog")[:3]]
    copies = sorted((tmp_path / "best").iterdir())
    assert [path.name for path in copies] == [
        f"{place:02d}_{Path(p).name}" for place, p in enumerate(expected, start=1)
    ]
    assert [path.read_bytes() for path in copies] == [Path(path).read_bytes() for path in expected]
    with pytest.raises(ConfigError, match="already exists and is not an empty folder"):
        rank(config_of(run_dir, str(photos), "a dog", copy_to=str(tmp_path / "best")))
    rank(config_of(run_dir, str(photos), ["a dog!", "猫/狗"], top_k=1, copy_to=str(tmp_path / "two")))
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["01_a_dog", "02_猫_狗"]


def test_a_broken_image_is_left_out_of_the_ranking_and_reported(run_dir: Path, photos: Path, capsys, caplog):
    (photos / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2\.png: empty file"):
        rank(config_of(run_dir, str(photos), "a dog"))
    rank(config_of(run_dir, str(photos), "a dog", on_bad_image=EvalOnBadImage.skip))
    document = json.loads(capsys.readouterr().out)
    assert len(ranking(document)) == 6
    assert document["left_out"] == [{"path": str(photos / "2.png"), "reason": "empty file"}]
    assert "left out 1 of 7 images" in caplog.text


def test_the_command_line_ranks(clip_exp_command: Callable, run_dir: Path, photos: Path, clip: Pipeline):
    done = clip_exp_command(
        "rank", f"run={run_dir}", "images=photos", "text=a dog, running (fast)", "top_k=2", "format=csv"
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["image"] for row in rows] == [
        str(Path(path).relative_to(photos.parent)) for path, _ in brute_force(clip, photos, "a dog, running (fast)")[:2]
    ]
    refused = clip_exp_command("rank", "images=absent")
    assert refused.returncode == 2
    for part in ("the model must be set by exactly one of", "absent", "text has no value"):
        assert part in refused.stderr
    refused = clip_exp_command("rank", "images=absent", "top_k=-1", "frames=0")
    assert refused.returncode == 2
    for part in ("top_k=-1 must be greater than 0.", "frames=0 must be greater than 0."):
        assert part in refused.stderr
