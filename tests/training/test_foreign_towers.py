"""Runs with towers of other libraries, by the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import ChineseCLIPModel, ChineseCLIPProcessor

import clip_exp
from clip_exp.checkpoints.folders import latest
from tests.encoders import CHINESE, write_chinese_clip, write_encoder
from tests.exhaustive import repeat_beyond
from tests.runs import Finished, Train
from tests.small_runs import write_image

SHORT = (
    "model=vit_nano", "data=digits", "task=digits", "max_steps=3", "global_batch_size=16", "log_every_n_steps=1",
    "precision=32-true", "trainer.accelerator=cpu", "optimizer.lr=1e-3", "resume=never",
)  # fmt: skip
TIMM = ("model/image=timm", "model.image.name=test_vit", "model.image.image_size=64")


def evaluated(folder: Path, output_dir: Path) -> dict[str, float]:
    """`digits/top1` and the like of a finished run, by an evaluation of its own."""
    settings = (f"run={folder}", "task=digits", "accelerator=cpu", "num_workers=0", f"output_dir={output_dir}")
    return clip_exp.evaluate(*settings)["digits"]["metrics"]


def scored(folder: Path) -> dict[str, float]:
    """The same, measured by the run itself at its end."""
    return json.loads((folder / "eval" / "digits.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), "xlm-roberta")


@pytest.fixture(scope="module")
def overrides(encoder: Path) -> tuple[str, ...]:
    return (*SHORT, *TIMM, "model/text=huggingface", f"model.text.name={encoder}", "model.text.context_length=20")


@pytest.fixture(scope="module")
def both(overrides: tuple[str, ...], train: Train) -> Finished:
    """A backbone of timm and an encoder of Hugging Face, trained in one process."""
    return train(*overrides)


def test_a_run_trains_both_towers_and_scores_the_same_afterwards(both: Finished, tmp_path: Path) -> None:
    assert both.losses[-1] < both.losses[0]
    assert both.weights.keys() > {"image.trunk.blocks.0.attn.qkv.weight", "text.encoder.embeddings.LayerNorm.bias"}
    assert evaluated(both.folder, tmp_path) == pytest.approx(scored(both.folder))


@pytest.mark.parametrize("strategy", repeat_beyond((), ("ddp", "deepspeed_stage_3")))
def test_every_strategy_trains_towers_of_other_libraries_alike(
    strategy: str, overrides: tuple[str, ...], both: Finished, train: Train
) -> None:
    run = train(*overrides, f"strategy={strategy}", "trainer.devices=2")
    assert run.losses == pytest.approx(both.losses, rel=1e-5)
    assert scored(run.folder) == pytest.approx(scored(both.folder), abs=5e-3)


def test_a_run_with_an_encoder_needs_neither_the_encoders_folder_nor_its_own_place(
    both: Finished, encoder: Path, tmp_path: Path
) -> None:
    texts = ["一只猫坐在垫子上", "the digit 3"]
    expected = clip_exp.load(both.folder, accelerator="cpu").encode_text(texts)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    moved = Path(shutil.copytree(both.folder, tmp_path / "moved"))
    away = encoder.rename(encoder.with_name("away"))
    original = both.folder.rename(both.folder.with_name("original"))
    try:
        for source in (moved, latest(moved) / "model.safetensors"):
            assert torch.equal(clip_exp.load(source, accelerator="cpu").encode_text(texts), expected)
        assert evaluated(moved, tmp_path) == pytest.approx(scored(moved))
    finally:
        away.rename(encoder)
        original.rename(both.folder)


@pytest.mark.exhaustive
def test_a_configuration_of_open_clip_trains_and_scores_the_same_afterwards(train: Train, tmp_path: Path) -> None:
    run = train(*SHORT[1:], "model=open_clip", "model.name=ViT-S-32-alt", "model.image.image_size=64", "optimizer=sgd")
    assert "image.transformer.resblocks.0.attn.in_proj_weight" in run.weights
    assert evaluated(run.folder, tmp_path) == pytest.approx(scored(run.folder))


def test_a_folder_of_chinese_clip_is_trained_scored_and_exported_to_transformers(train: Train, tmp_path: Path) -> None:
    """With captions in Chinese, from weights as ChineseCLIPModel saves them to such a folder again."""
    start = write_chinese_clip(tmp_path / "start")
    rows = [f"{write_image(tmp_path / f'{i}.png', i)},{CHINESE[i % 3]}，数字{i}" for i in range(12)]
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(["filepath,title", *rows]) + "\n", encoding="utf-8")
    config = clip_exp.load(start, accelerator="cpu").config
    sizes = [
        f"model.image.{key}={getattr(config.image, key)}"
        for key in ("image_size", "patch_size", "width", "layers", "heads")
    ]
    sizes += [f"model.text.architecture.{key}={value}" for key, value in config.text.architecture.items()]  # type: ignore[attr-defined]
    run = train(
        *("model=chinese_clip_b16", f"model.embed_dim={config.embed_dim}", *sizes, f"model.text.tokenizer={start}"),
        *(
            f"pretrained={start}",
            "data=csv",
            f"data.train={table}",
            f"data.val={table}",
            "max_steps=2",
            "global_batch_size=4",
        ),
        *("precision=32-true", "trainer.accelerator=cpu", "resume=never", "data.num_workers=0"),
    )
    assert {"val/loss", "val/recall@1_i2t"} <= set(run.metrics[-1])
    clip = clip_exp.load(run.folder, accelerator="cpu")
    exported = clip.export(tmp_path / "exported", format="huggingface")
    theirs, info = ChineseCLIPModel.from_pretrained(exported, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    texts = [*CHINESE, "Pokémon 皮卡丘！", "狗" * 100]
    inputs = ChineseCLIPProcessor.from_pretrained(exported)(
        text=texts, padding=True, truncation=True, return_tensors="pt"
    )
    assert torch.equal(inputs["input_ids"], clip.tokenizer(texts))
    features = theirs.eval().get_text_features(**inputs).pooler_output.detach()
    torch.testing.assert_close(torch.nn.functional.normalize(features), clip.encode_text(texts), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["model/text=huggingface", "model.text.name=./none"],
            "model.text.name=./none could not be loaded (FileNotFoundError",
        ),
        (["model/image=timm", "model.image.name=resnt18"], "is not a model of timm: did you mean resnet18"),
        ([*TIMM, "model.image.image_size=65"], "model.image.image_size=65 does not fit test_vit"),
    ],
)
def test_a_tower_that_cannot_be_loaded_ends_with_code_2_and_leaves_no_folder(
    overrides: list[str], expected: str, command, tmp_path: Path
) -> None:
    result = command("train.py", *SHORT[3:], "model=vit_nano", *overrides, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
