"""Models from third-party weights, in Python and in every command, with the settings that the weights determine."""

import json
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import clip_exp
from clip_exp.cli import _guarded
from clip_exp.config.base import plain
from clip_exp.config.commands import ExportFormat
from clip_exp.config.files import read_evaluate_config
from clip_exp.config.model import Activation
from clip_exp.config.names import named_model
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.export.write import write_export
from clip_exp.inference.index import read_recipe
from clip_exp.loading import ModelSource, load_model
from clip_exp.models.clip import CLIP
from clip_exp.text.tokenizer import build_tokenizer
from clip_exp.weights.find import hash_weights
from tests.export.small import build, siglip
from tests.small_runs import write_image
from tests.weights.server import Served, serving
from tests.weights.test_hub import publish


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a small CLIP as written by transformers, with quick_gelu and another mean."""
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**text, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(
        text_config={**text, "hidden_act": "quick_gelu", "eos_token_id": 49407},
        vision_config={**vision, "hidden_act": "quick_gelu"},
        projection_dim=24,
    )
    folder = tmp_path_factory.mktemp("theirs")
    CLIPModel(config).eval().save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor.save_pretrained(folder)
    return folder


def image() -> Image.Image:
    """Return an image of the size of the tower: libraries resize differently."""
    return Image.effect_noise((32, 32), 80).convert("RGB")


def test_a_folder_of_transformers_gives_the_features_that_transformers_gives(theirs: Path) -> None:
    clip = clip_exp.load(theirs, accelerator="cpu")
    model = CLIPModel.from_pretrained(theirs)
    shown = image()
    pixels = CLIPImageProcessor.from_pretrained(theirs)(shown, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.get_image_features(pixels)
        features = getattr(features, "pooler_output", features)
    expected = torch.nn.functional.normalize(features, dim=1)
    torch.testing.assert_close(clip.encode_image(shown), expected, atol=1e-5, rtol=0)


def test_a_name_on_the_hub_is_a_model(theirs: Path, tmp_path: Path, monkeypatch) -> None:
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        server.files["/"] = Served(b"")
        publish(server, {path.name: path.read_bytes() for path in theirs.iterdir()}, large=("model.safetensors",))
        fetched, local = (clip_exp.load(name, accelerator="cpu") for name in ("hf-hub:org/clip", theirs))
    shown = image()
    assert torch.equal(fetched.encode_image(shown), local.encode_image(shown))


def test_openais_name_and_tag_are_openais_model(tmp_path: Path, monkeypatch, capsys) -> None:
    """Random weights are stored where open_clip's registry expects those of OpenAI."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval()
    state = {name: value.half() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    save_file(state, tmp_path / "made.safetensors")
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        server.files["/"] = Served(b"")
        content = (tmp_path / "made.safetensors").read_bytes()
        name = "timm/vit_base_patch32_clip_224.openai"
        publish(server, {"open_clip_model.safetensors": content}, large=("open_clip_model.safetensors",), name=name)
        clip = clip_exp.load("ViT-B/32", pretrained="openai", accelerator="cpu")
    assert (
        "model.activation=quick_gelu: the activation of the weights openai of open_clip's ViT-B-32"
        in capsys.readouterr().err
    )
    texts = ["a dog", "a very typical bus station"]
    with torch.no_grad():
        expected = model.encode_text(open_clip.tokenize(texts), normalize=True)
    torch.testing.assert_close(clip.encode_text(texts), expected, atol=1e-5, rtol=0)


def test_a_file_that_names_its_model_needs_no_other_name(nano: CLIP, tmp_path: Path) -> None:
    model = named_model("vit_nano")
    path = tmp_path / "exported.safetensors"
    save_file(nano.state_dict(), path, {"clip_exp.model": json.dumps(plain(model))})
    clip = clip_exp.load(path, accelerator="cpu")
    assert torch.equal(
        clip.encode_text("a dog"), clip_exp.load("vit_nano", path, accelerator="cpu").encode_text("a dog")
    )


def test_the_activation_of_the_weights_cannot_be_overridden(theirs: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.activation=gelu, but .* was trained with quick_gelu: leave it out"):
        clip_exp.load(theirs, activation="gelu")
    assert clip_exp.load(theirs, activation="quick_gelu", accelerator="cpu").config.activation is Activation.quick_gelu


def test_contradictions_of_a_tag_are_reported_before_a_download(monkeypatch) -> None:
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(
            ConfigError, match=r"model\.activation=gelu, but openai of open_clip's ViT-B-32 was trained"
        ):
            clip_exp.load("vit_b32", pretrained="openai", activation="gelu")
        with pytest.raises(ConfigError, match="wise_ft needs a run"):
            clip_exp.load("vit_b32", pretrained="openai", wise_ft=0.5)
        assert server.requests == []


def test_a_siglip_model_on_the_hub_comes_with_its_tokenizer(tmp_path: Path, monkeypatch) -> None:
    config = siglip(tmp_path / "tokenizer")
    model = build(config, bias=-10.0)
    tokens = build_tokenizer(config.text)("a cat")
    for chosen in (ExportFormat.huggingface, ExportFormat.safetensors):
        folder = write_export(model, config, None, tmp_path / chosen, chosen).folder
        with serving() as server, monkeypatch.context() as patch:
            patch.setenv("HF_ENDPOINT", server.url)
            patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / f"hub {chosen}"))
            server.files["/"] = Served(b"")
            publish(server, {path.name: path.read_bytes() for path in folder.iterdir()})
            clip = clip_exp.load("hf-hub:org/clip", accelerator="cpu")
        assert torch.equal(clip.tokenizer("a cat"), tokens)
        assert torch.equal(clip.model.encode_text(tokens), model.encode_text(tokens))


def test_a_path_without_permission_is_one_message(capsys) -> None:
    def command() -> int:  # what the tests' user may read is not known
        raise PermissionError(13, "Permission denied", "hidden/model.safetensors")

    assert _guarded(command, "predict", []) == 2
    assert capsys.readouterr().err.startswith("error: hidden/model.safetensors: permission denied")


def test_invalid_weights_give_no_model(nano: CLIP, tmp_path: Path) -> None:
    state = nano.state_dict()
    del state["text.ln_final.bias"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=r"text\.ln_final\.bias"):
        clip_exp.load("vit_nano", tmp_path / "cut.safetensors", accelerator="cpu")
    with pytest.raises(ConfigError, match="the model of these weights is unknown"):
        clip_exp.load(tmp_path / "cut.safetensors")


def test_resized_positions_are_reported(nano: CLIP, tmp_path: Path, caplog) -> None:
    save_file(nano.state_dict(), tmp_path / "nano.safetensors")
    model = named_model("vit_nano")
    image = model.image.model_copy(update={"image_size": 64})
    text = model.text.model_copy(update={"context_length": 32})
    larger = model.model_copy(update={"image": image, "text": text})
    load_model(ModelSource(larger, tmp_path / "nano.safetensors"))
    assert "interpolated (bicubic) from a grid of 4x4 patches to 8x8" in caplog.text
    assert "truncated from 77 to 32 positions" in caplog.text


def test_every_command_takes_a_folder_and_records_its_hash(theirs: Path, tmp_path: Path, clip_exp_command) -> None:
    for number in range(4):
        write_image(tmp_path / "classes" / "ab"[number % 2] / f"{number}.png", number)
    model = f"pretrained={theirs}"
    probable = clip_exp_command("predict", model, "images=classes", "texts=[a dog,a cat]", "format=json")
    assert probable.returncode == 0, probable.stderr
    assert len(json.loads(probable.stdout)["images"]) == 4
    assert "activation" not in probable.stderr, "nothing was left to decide"
    made = clip_exp_command("search", model, "images=classes", "index=photos.index")
    assert made.returncode == 0, made.stderr
    assert read_recipe(tmp_path / "photos.index").weights_sha256 == hash_weights(theirs)
    found = clip_exp_command("search", "index=photos.index", "text=a dog", "format=json")
    assert found.returncode == 0, found.stderr


def test_an_evaluation_by_several_ranks_resolves_the_model_once(theirs: Path, tmp_path: Path, clip_exp_command) -> None:
    for number in range(4):
        write_image(tmp_path / "classes" / "ab"[number % 2] / f"{number}.png", number)
    done = clip_exp_command(
        "evaluate", f"pretrained={theirs}", "task=image_folder", "task.image_folder.root=classes", "devices=2"
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs" / "evaluate").glob("*/*")
    config = read_evaluate_config(folder)
    assert config.model is not None
    assert (config.model.activation, config.model.image.mean) == (Activation.quick_gelu, [0.5] * 3)
    protocol = json.loads((folder / "eval" / "image_folder.json").read_text())["protocol"]
    assert protocol["weights_sha256"] == hash_weights(theirs)
    assert protocol["pretrained"] == str(theirs)


def test_the_weights_are_looked_for_after_all_checks(theirs: Path, tmp_path: Path, clip_exp_command) -> None:
    done = clip_exp_command("predict", "model=vit_b32", "pretrained=opnai", "images=absent", "texts=[a,b]")
    assert done.returncode == 2
    assert "did you mean 'openai'" in done.stderr
    assert "absent" in done.stderr
