import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clip_exp.config.commands import OutputFormat, PredictConfig
from clip_exp.config.compose import compose
from clip_exp.config.evaluation import EvalOnBadImage
from clip_exp.data.images import eval_transform, normalize, preprocessing_of
from clip_exp.errors import CheckpointError, ConfigError, DataError
from clip_exp.inference.commands import predict
from clip_exp.inference.pipeline import Pipeline

TEXTS = ["a diagram", "a dog, running", "一只猫"]


def config_of(run_dir: Path, images: object, **values: object) -> PredictConfig:
    given = {"texts": TEXTS, "format": OutputFormat.json, **values}
    return PredictConfig(run=str(run_dir), images=images, accelerator="cpu", num_workers=0, **given)


def probabilities(document: dict, texts: list[str] = TEXTS) -> torch.Tensor:
    """Return probabilities [images, texts] in the order of the texts."""
    rows = [{entry["text"]: entry["probability"] for entry in image["texts"]} for image in document["images"]]
    return torch.tensor([[row[text] for text in texts] for row in rows])


def test_probabilities_are_the_softmax_of_logit_scale_times_cosine(run_dir: Path, photos: Path, clip: Pipeline, capsys):
    assert predict(config_of(run_dir, str(photos))) == 0
    document = json.loads(capsys.readouterr().out)
    paths = [image["path"] for image in document["images"]]
    assert paths == sorted(paths)
    assert len(paths) == 7
    tower = preprocessing_of(clip.config.image)
    pixels = torch.stack([eval_transform(Image.open(path), tower.size) for path in paths])
    with torch.no_grad():
        image_features = F.normalize(clip.model.encode_image(normalize(pixels, tower.mean, tower.std)), dim=-1)
        text = F.normalize(clip.model.encode_text(clip.tokenizer(TEXTS)), dim=-1)
    expected = (clip.model.logit_scale.exp() * image_features @ text.T).softmax(dim=-1)
    torch.testing.assert_close(probabilities(document), expected, atol=1e-6, rtol=1e-5)
    for image in document["images"]:
        shown = [entry["probability"] for entry in image["texts"]]
        assert shown == sorted(shown, reverse=True)


def test_the_command_and_the_python_api_agree_to_the_last_digit(run_dir: Path, photos: Path, clip: Pipeline, capsys):
    predict(config_of(run_dir, str(photos)))
    document = json.loads(capsys.readouterr().out)
    expected = clip.classify([image["path"] for image in document["images"]], TEXTS)
    assert torch.equal(probabilities(document), torch.tensor([[float(f"{p:.7g}") for p in row] for row in expected]))


def test_labels_of_a_file_go_into_templates(run_dir: Path, photos: Path, clip: Pipeline, tmp_path: Path, capsys):
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    templates = ["a photo of a {}.", "art of the {}."]
    values = {"texts": None, "labels": str(tmp_path / "names.txt"), "templates": templates}
    predict(config_of(run_dir, str(photos / "0.png"), **values))
    found = probabilities(json.loads(capsys.readouterr().out), ["dog", "cat"])
    expected = clip.classify(photos / "0.png", labels=["dog", "cat"], templates=templates)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_only_the_top_k_most_probable_texts_are_shown(run_dir: Path, photos: Path, capsys):
    predict(config_of(run_dir, str(photos)))
    whole = json.loads(capsys.readouterr().out)
    predict(config_of(run_dir, str(photos), top_k=2))
    best = json.loads(capsys.readouterr().out)
    assert [p["texts"] for p in best["images"]] == [p["texts"][:2] for p in whole["images"]]


def test_csv_json_and_the_table_hold_the_same(run_dir: Path, photos: Path, tmp_path: Path, capsys):
    predict(config_of(run_dir, str(photos), format=None, output=str(tmp_path / "out.json")))
    predict(config_of(run_dir, str(photos), format=None, output=str(tmp_path / "out.csv")))
    assert "written: " in capsys.readouterr().out
    predict(config_of(run_dir, str(photos), format=None))
    shown = capsys.readouterr().out
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    flat = [(p["path"], t["text"], t["probability"]) for p in document["images"] for t in p["texts"]]
    assert [(row["image"], row["text"], float(row["probability"])) for row in rows] == flat
    for path, text, probability in flat:
        assert path in shown
        assert text in shown
        assert f"{probability:.4f}" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.json", "photos", "run"]


def test_a_broken_image_stops_the_command_or_is_left_out_and_reported(run_dir: Path, photos: Path, capsys, caplog):
    (photos / "2.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"2\.png: not an image.*on_bad_image=skip"):
        predict(config_of(run_dir, str(photos)))
    assert capsys.readouterr().out == ""
    predict(config_of(run_dir, str(photos), on_bad_image=EvalOnBadImage.skip))
    document = json.loads(capsys.readouterr().out)
    assert len(document["images"]) == 6
    assert [left_out["path"] for left_out in document["left_out"]] == [str(photos / "2.png")]
    assert "left out 1 of 7 images" in caplog.text
    assert "2.png: not an image" in caplog.text


def test_truncated_texts_are_reported_with_their_number(run_dir: Path, photos: Path, capsys, caplog):
    predict(config_of(run_dir, str(photos / "0.png"), texts=["a dog", "many " * 100, "很" * 60]))
    assert "2 texts are longer than the context length of 77 tokens and were truncated" in caplog.text


def test_all_problems_are_reported_together(run_dir: Path, tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        compose(
            "predict", ["images=absent.png", "top_k=0", "frames=0", "batch_size=0", "precision=fp8", "accelerator=tpu"]
        )
    keys = [line.partition(" ")[0] for line in str(caught.value).splitlines()]
    assert sorted(keys) == ["accelerator=tpu", "batch_size=0", "frames=0", "precision=fp8", "top_k=0"]
    config = PredictConfig(images="absent.png", templates=["no place"], output=f"{tmp_path}/no/o.csv")
    with pytest.raises(ConfigError) as caught:
        predict(config)
    for part in (
        "is not a folder",
        "the model must be set by exactly one of",
        "absent.png",
        "exactly one of texts",
        "has no {}",
    ):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 5
    with pytest.raises(CheckpointError, match="not a run folder"):
        predict(config_of(tmp_path, str(run_dir / "config.yaml")))


def test_templates_of_whole_texts_are_refused(run_dir: Path, photos: Path):
    with pytest.raises(ConfigError, match=r"templates are for class names: give labels=… instead of texts"):
        predict(config_of(run_dir, str(photos), templates="openai"))


def test_a_single_text_is_refused_since_its_probability_says_nothing(run_dir: Path, photos: Path):
    with pytest.raises(ConfigError, match="a single text always has probability 1"):
        predict(config_of(run_dir, str(photos), texts=["a dog"]))


def test_problems_are_reported_before_torch_is_imported(tmp_path: Path):
    code = (
        "import sys\nfrom clip_exp.cli import run\n"
        "assert run('predict', ['images=absent']) == 2\nassert run('rank', ['images=absent']) == 2\n"
        "assert run('search', ['index=a/b']) == 2\nassert run('embed', ['images=absent', 'output=o']) == 2\nassert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_line_accepts_texts_as_typed_and_leaves_no_folder(
    clip_exp_command: Callable, run_dir: Path, photos: Path, tmp_path: Path
):
    before = sorted(tmp_path.rglob("*"))
    texts = "texts=[a (small) dog, it's a cat!,x=1,一只狗]"
    done = clip_exp_command("predict", f"run={run_dir}", f"images={photos}", "format=json", texts)
    assert done.returncode == 0, done.stderr
    found = {entry["text"] for entry in json.loads(done.stdout)["images"][0]["texts"]}
    assert found == {"a (small) dog", "it's a cat!", "x=1", "一只狗"}
    assert sorted(tmp_path.rglob("*")) == before
