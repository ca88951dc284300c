"""Tests of the model card: its facts, its code snippets, and that it has no paths of this machine."""

import ast
import json
import re
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

import clip_exp
from clip_exp.config.commands import ExportConfig, ExportFormat
from clip_exp.config.data import DataConfig
from clip_exp.config.finetune import FineTuneConfig, TowerTuningConfig
from clip_exp.config.model import ModelConfig
from clip_exp.export.history import _recipe
from clip_exp.export.write import write_export
from clip_exp.loading import find_source, load_model, source_of_run
from clip_exp.models.clip import CLIP
from clip_exp.weights.find import hash_weights
from tests.exhaustive import repeat_beyond
from tests.export.small import build, resnet, siglip, vit
from tests.small_runs import write_checkpoint, write_run

Export = Callable[..., Path]


@pytest.fixture
def trained(tmp_path: Path, nano: CLIP) -> Path:
    """Create a run folder with all facts of a card, some of them about other weights than the last."""
    tables = [str(tmp_path / "private" / name) for name in ("pairs.csv", "more_pairs.csv")]
    run = write_run(tmp_path / "run", nano, DataConfig(name="csv", train=tables, val=str(tmp_path / "held|out.csv")))
    record = {
        "clip_exp": "0.1.0", "python": "3.12.1", "packages": {"torch": "2.14.1"}, "host": "secret-host", "rows": 123456,
        "ranks": 8, "device_name": "NVIDIA H100", "precision": "bf16-mixed", "steps": 1, "start": "2026-11-24T10:00:00+00:00",
        "git": {"commit": "0123456789abcdef", "dirty": False}, "argv": [f"data.train={tables[0]}"],
        "executable": str(tmp_path / "python"),
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(record))
    (run / "metrics.csv").write_text("step,train/loss,val/loss,val/recall@1_i2t\n1,2.5,,\n1,,2.25,0.125\n2,,9.0,0.9\n")
    (run / "eval").mkdir()
    sha256 = source_of_run(run).sha256()
    for task, weights, top1 in (("imagenet", sha256, 0.6321), ("cifar10", "0" * 64, 0.1111)):
        protocol = {"weights_sha256": weights, "data": str(tmp_path / "sets"), "weights": str(run)}
        (run / "eval" / f"{task}.json").write_text(json.dumps({"metrics": {"top1": top1}, "protocol": protocol}))
    return run


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def rows_of(body: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", body, re.MULTILINE))


def test_a_run_s_card_has_data_recipe_scores_and_provenance(trained: Path, tmp_path: Path) -> None:
    folder = clip_exp.load(trained, accelerator="cpu").export(tmp_path / "exported")
    front, body = read_card(folder)
    assert front == {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "clip_exp", "open_clip"],
    }
    rows = rows_of(body)
    assert rows["training data"] == "pairs.csv, more_pairs.csv"
    assert rows["validation data"] == r"held\|out.csv"
    assert rows["rows"] == "123,456"
    assert rows["initial weights"] == "random"
    assert rows["loss"] == "softmax"
    assert rows["steps"] == "1, with 128 pairs each"
    assert rows["optimizer"] == "AdamW, lr 0.001, weight decay 0.2"
    assert rows["schedule"] == "cosine, warm-up a tenth of the run"
    assert rows["precision"] == "bf16-mixed"
    assert rows["devices"] == "8 x NVIDIA H100"
    assert rows["seed"] == "0"
    assert rows["git revision of clip_exp"] == "0123456789abcdef"
    assert "torch 2.14.1" in rows["versions"]
    assert rows["weights, sha256"] == source_of_run(trained).sha256()
    assert "in the run vit_nano_csv, step 1." in body


def test_scores_are_those_of_the_exported_weights(trained: Path, tmp_path: Path) -> None:
    _, body = read_card(clip_exp.load(trained, accelerator="cpu").export(tmp_path / "exported"))
    assert re.search(r"\| imagenet \| top1 \| 63\.2.% \|", body)
    assert "| validation | loss | 2.2500 |" in body
    assert re.search(r"\| validation \| recall@1_i2t \| 12\.5.% \|", body)
    assert "11.1" not in body
    assert "90.0" not in body
    assert "Scores of other checkpoints of the run are not listed: cifar10." in body


@pytest.mark.parametrize("chosen", repeat_beyond({*ExportFormat} - {ExportFormat.onnx}, ExportFormat))
def test_no_file_contains_a_path_of_this_machine(chosen: str, trained: Path, tmp_path: Path) -> None:
    folder = clip_exp.load(trained, accelerator="cpu").export(tmp_path / "exported", chosen)
    for path in folder.iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content, path.name
        assert b"secret-host" not in content, path.name


def test_secrets_of_the_environment_are_left_out(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")  # the git revision, for want of a better place
    _, body = read_card(clip_exp.load(trained, accelerator="cpu").export(tmp_path / "exported"))
    assert "0123456789abcdef" not in body


def test_the_card_of_weights_without_a_run_names_their_source(trained: Path, tmp_path: Path) -> None:
    weights = trained / "checkpoints" / "step-000001" / "model.safetensors"
    foreign = tmp_path / "somebody's.safetensors"
    foreign.write_bytes(weights.read_bytes())
    folder = clip_exp.load("vit_nano", pretrained=foreign, accelerator="cpu").export(tmp_path / "exported")
    _, body = read_card(folder)
    assert "Weights of somebody's.safetensors, loaded as vit_nano; their training is unknown." in body
    assert "## Recipe" not in body
    assert rows_of(body)["activation"] == "gelu"


def test_the_card_lists_the_fine_tuning_of_initial_weights(trained: Path) -> None:
    run = source_of_run(trained).run
    assert run is not None
    run.pretrained = "/home/somebody/ViT-B-32.pt"
    run.finetune = FineTuneConfig(image=TowerTuningConfig(freeze=True, unfrozen_blocks=2))
    facts = _recipe(run, {}, 40)
    assert facts["initial weights"] == "ViT-B-32.pt"
    assert facts["fine-tuning"] == "image.freeze True, image.unfrozen_blocks 2"


def test_averaged_weights_have_no_score_of_the_raw_ones(trained: Path, nano: CLIP, tmp_path: Path) -> None:
    doubled = {name: 2 * tensor for name, tensor in nano.state_dict().items()}
    averaged = write_checkpoint(trained, nano, 1, averaged=doubled) / "ema.safetensors"
    _, body = read_card(clip_exp.load(averaged, accelerator="cpu").export(tmp_path / "exported"))
    assert "in the run vit_nano_csv, step 1, exponential moving average (EMA)." in body
    assert "## Scores" not in body
    assert "not listed: cifar10, imagenet." in body


def test_the_card_of_averaged_weights_names_the_fraction(trained: Path, nano: CLIP, tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    save_file({name: 0 * tensor for name, tensor in nano.state_dict().items()}, start)
    record = json.loads((trained / "run.json").read_text())
    record["pretrained"] = {"path": str(start), "sha256": hash_weights(start)}
    (trained / "run.json").write_text(json.dumps(record))
    source = find_source(ExportConfig(run=str(trained), wise_ft=0.25))
    write_export(load_model(source), source.model, source, tmp_path / "exported")
    _, body = read_card(tmp_path / "exported")
    assert (
        "step 1, averaged with its initial weights start.safetensors (WiSE-FT with a fraction of 0.25 for the run)."
        in body
    )
    assert "## Scores" not in body
    assert "weights and fraction, sha256" in body


MODELS: dict[str, Callable[[Path], tuple[ModelConfig, float | None]]] = {
    "vit": lambda folder: (vit(), None),
    "vit with a bias": lambda folder: (vit(), -3.0),
    "resnet": lambda folder: (resnet(), None),
    "siglip": lambda folder: (siglip(folder / "tokenizer"), -10.0),
}


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ("open_clip", "vit"), ("open_clip", "vit with a bias"), ("open_clip", "resnet"),
        ("huggingface", "vit"), ("huggingface", "vit with a bias"), ("huggingface", "siglip"),
        ("safetensors", "resnet"), ("safetensors", "siglip"),
        pytest.param("onnx", "vit", marks=pytest.mark.exhaustive), pytest.param("onnx", "siglip", marks=pytest.mark.exhaustive),
    ],
)  # fmt: skip
def test_its_snippet_runs_and_gives_our_probabilities(
    chosen: str, name: str, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image has a single color, for which all methods of resizing give the same result."""
    config, bias = MODELS[name](tmp_path)
    folder = export(build(config, bias), config, chosen)
    (snippet,) = re.findall(r"```python\n(.*?)```", read_card(folder)[1], re.DOTALL)
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "image.jpg")
    (tmp_path / "snippet.py").write_text(snippet.replace("print(clip.", "probabilities = (clip."))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="unclosed file.*image.jpg", category=ResourceWarning)
        found = runpy.run_path("snippet.py")["probabilities"]
    labels = ["a diagram", "a dog", "a cat"]
    clip = clip_exp.load(folder, accelerator="cpu") if chosen != "onnx" else None
    if clip is not None:
        cosines = clip.encode_image("image.jpg") @ clip.encode_text(labels).T
        logits = clip.model.logit_scale.exp() * cosines
        expected = logits.softmax(dim=-1) if bias is None or chosen == "safetensors" else (logits + bias).sigmoid()
        assert found.tolist()[0] == pytest.approx(expected.tolist()[0], abs=1e-4)
    else:
        assert found.shape == (1, 3)
        assert bias is not None or found.sum() == pytest.approx(1)


def test_a_checkpoint_s_card_has_its_step(trained: Path, nano: CLIP, tmp_path: Path) -> None:
    write_checkpoint(trained, nano, 2)
    folder = clip_exp.load(trained / "checkpoints" / "step-000002", accelerator="cpu").export(tmp_path / "exported")
    _, body = read_card(folder)
    assert rows_of(body)["steps"] == "2 (out of 1), with 128 pairs each"
    assert "| validation | loss | 9.0000 |" in body


def test_its_snippet_names_a_folder_of_any_name(tmp_path: Path) -> None:
    config = vit()
    folder = write_export(build(config), config, None, tmp_path / 'a "quoted" \\ 一', ExportFormat.safetensors).folder
    (snippet,) = re.findall(r"```python\n(.*?)```", read_card(folder)[1], re.DOTALL)
    texts = [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]
    assert folder.name in texts
