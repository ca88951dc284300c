"""Tests of the detection of formats and training settings, without torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import get_model_config
from safetensors.torch import save_file

from clip_exp.config.base import plain
from clip_exp.config.model import Activation, Interpolation, ModelConfig, ResizeMode
from clip_exp.config.names import known_models, named_model
from clip_exp.errors import CheckpointError
from clip_exp.models.clip import build_model
from clip_exp.weights.fit import load_weights
from clip_exp.weights.inspect import About, describe, described_model
from clip_exp.weights.names import to_open_clip
from tests.models.small import small_config
from tests.small_runs import write_checkpoint, write_run
from tests.weights.published import inputs, logits, openai_model, our_config, write_openai_archive

DESCRIPTION = {
    "embed_dim": 40,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 500, "width": 64, "heads": 1, "layers": 2},
}
NOTHING_KNOWN = {
    "activation": None,
    "mean": None,
    "std": None,
    "interpolation": None,
    "resize_mode": None,
    "model": None,
}


def weights(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"logit_scale": torch.ones(1)}, path)
    return path


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("quick", "activation"), [(True, Activation.quick_gelu), (False, Activation.gelu)])
def test_openais_archive_has_quick_gelu_and_another_one_the_activation_in_its_program(
    quick: bool, activation: Activation, tmp_path: Path
) -> None:
    write_openai_archive(openai_model(quick_gelu=quick), tmp_path / "ViT-B-32.pt")
    assert describe(tmp_path / "ViT-B-32.pt") == About("TorchScript archive", activation)


def test_openais_state_dict_is_recognized_by_its_other_names(tmp_path: Path) -> None:
    state = openai_model().state_dict()
    torch.save(state | {"input_resolution": torch.tensor(32)}, tmp_path / "clip.pt")
    assert describe(tmp_path / "clip.pt") == About("OpenAI's state dict", Activation.quick_gelu)
    torch.save(state, tmp_path / "clip.pt")
    assert describe(tmp_path / "clip.pt") == About("torch file")
    torch.save(state, tmp_path / "clip.pt", _use_new_zipfile_serialization=False)
    assert describe(tmp_path / "clip.pt") == About("torch file")


def test_a_plain_safetensors_file_tells_nothing(tmp_path: Path) -> None:
    about = describe(weights(tmp_path / "weights.safetensors"))
    assert about == About("safetensors file", **NOTHING_KNOWN)


def test_our_export_carries_its_configuration(tmp_path: Path) -> None:
    config = small_config(Activation.gelu_tanh)
    config.image.mean, config.image.std, config.image.resize_mode = [0.1] * 3, [0.2] * 3, ResizeMode.squash
    state = build_model(config).state_dict()
    save_file(state, tmp_path / "any.safetensors", {"format": "pt", "clip_exp.model": json.dumps(plain(config))})
    about = describe(tmp_path / "any.safetensors")
    assert about.model == config
    assert (about.activation, about.mean, about.std) == (Activation.gelu_tanh, [0.1] * 3, [0.2] * 3)
    assert (about.interpolation, about.resize_mode) == (None, ResizeMode.squash)
    save_file(state, tmp_path / "any.safetensors", {"clip_exp.model": "{"})
    with pytest.raises(CheckpointError, match=r"the metadata clip_exp\.model is not valid JSON"):
        describe(tmp_path / "any.safetensors")


def test_a_checkpoint_is_described_by_its_run(tmp_path: Path) -> None:
    nano = build_model(named_model("vit_nano"))
    run_dir = write_run(tmp_path / "run", nano)
    checkpoint = write_checkpoint(run_dir, nano, step=3)
    for path in (run_dir, checkpoint, checkpoint / "model.safetensors"):
        assert describe(path).model == named_model("vit_nano")
    beside = weights(tmp_path / "taken out" / "model.safetensors")
    (beside.parent / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert describe(beside) == About("checkpoint of a run", model=named_model("vit_nano"))


@pytest.mark.parametrize("words", [{"quick_gelu": True}, {}])
def test_flagais_folder_loads_as_openais_weights(words: dict[str, bool], tmp_path: Path) -> None:
    """Its published models are OpenAI's, although its configuration may not name the activation."""
    theirs = openai_model()
    torch.save({"module": theirs.state_dict(), "iteration": 1}, tmp_path / "pytorch_model.bin")
    write_json(tmp_path / "config.json", DESCRIPTION | words)
    about = describe(tmp_path)
    assert about.format == "FlagAI folder"
    assert about.activation is Activation.quick_gelu
    assert about.model == our_config().model_copy(update={"name": tmp_path.name})
    model = build_model(about.model).eval()
    assert load_weights(model, tmp_path) == []
    torch.testing.assert_close(logits(model, *inputs()), logits(theirs, *inputs()), rtol=0, atol=1e-5)
    assert describe(tmp_path / "pytorch_model.bin") == about


def test_flagais_configuration_may_set_gelu(tmp_path: Path) -> None:
    torch.save(openai_model().state_dict(), tmp_path / "pytorch_model.bin")
    write_json(tmp_path / "config.json", DESCRIPTION | {"quick_gelu": False})
    assert describe(tmp_path).activation is Activation.gelu


def test_an_open_clip_folder_tells_model_and_preprocessing(tmp_path: Path) -> None:
    save_file(to_open_clip(build_model(our_config()).state_dict()), tmp_path / "open_clip_model.safetensors")
    preprocessing = {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bilinear",
        "resize_mode": "squash",
        "size": 32,
    }
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": DESCRIPTION, "preprocess_cfg": preprocessing})
    write_json(tmp_path / "config.json", {"architecture": "of a timm tower"})
    for path in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        about = describe(path)
        assert (about.format, about.activation) == ("open_clip folder", Activation.gelu)
        assert (about.mean, about.std) == ([0.5] * 3, [0.25] * 3)
        assert (about.interpolation, about.resize_mode) == (Interpolation.bilinear, ResizeMode.squash)
        expected = our_config(activation=Activation.gelu).model_copy(update={"name": tmp_path.name})
        for name in ("mean", "std", "interpolation", "resize_mode"):
            setattr(expected.image, name, getattr(about, name))
        assert about.model == expected
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": DESCRIPTION | {"quick_gelu": True}})
    assert describe(tmp_path).activation is Activation.quick_gelu
    write_json(
        tmp_path / "open_clip_config.json", {"model_cfg": DESCRIPTION, "preprocess_cfg": {"resize_mode": "longest"}}
    )
    with pytest.raises(CheckpointError, match="preprocess_cfg has an unsupported value: 'longest'"):
        describe(tmp_path)


def test_an_architecture_that_is_not_ours_is_left_to_the_user(tmp_path: Path) -> None:
    weights(tmp_path / "open_clip_model.safetensors")
    for tower in ("vision_cfg", "text_cfg"):
        strange = DESCRIPTION | {tower: DESCRIPTION[tower] | {"ls_init_value": 1e-5}}  # type: ignore[operator]
        write_json(tmp_path / "open_clip_config.json", {"model_cfg": strange})
        assert describe(tmp_path).model is None


@pytest.mark.parametrize("model", [model.name for model in known_models() if model.open_clip_name])
def test_open_clips_description_of_a_model_of_ours_is_understood(model: str) -> None:
    config = named_model(model)
    understood = described_model(get_model_config(config.open_clip_name), model)
    assert understood is not None
    expected = config.model_copy(
        update={"open_clip_name": understood.open_clip_name, "activation": understood.activation}
    )
    assert understood == expected


PROCESSOR = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": {"shortest_edge": 32}, "resample": 3}, (Interpolation.bicubic, ResizeMode.shortest)),
        ({"size": {"height": 32, "width": 32}, "resample": 2}, (Interpolation.bilinear, ResizeMode.squash)),
        ({"size": 32}, (None, ResizeMode.shortest)),  # as CLIP's were once written
        ({}, (None, None)),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_hugging_face_folder_tells_its_preprocessing(
    processor: dict[str, Any], expected: tuple[Any, Any], nested: bool, tmp_path: Path
) -> None:
    weights(tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"model_type": "clip", "text_config": {}, "vision_config": {"patch_size": 16}})
    values = PROCESSOR | processor
    name = "processor_config.json" if nested else "preprocessor_config.json"
    write_json(tmp_path / name, {"image_processor": values} if nested else values)
    about = describe(tmp_path)
    assert about.activation is Activation.quick_gelu
    assert (about.mean, about.std) == (PROCESSOR["image_mean"], PROCESSOR["image_std"])
    assert (about.interpolation, about.resize_mode) == expected
    assert isinstance(about.model, ModelConfig)
    assert (about.model.image.patch_size, about.model.image.mean) == (16, about.mean)


def test_an_unknown_resampling_is_refused(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"model_type": "clip"})
    write_json(tmp_path / "preprocessor_config.json", {"resample": 0})
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: resample=0 must be 2"):
        describe(tmp_path)


def test_a_config_json_counts_for_files_of_a_published_name_only(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "clip"})
    assert describe(weights(tmp_path / "downloaded.safetensors")) == About("safetensors file")
    assert describe(weights(tmp_path / "model.safetensors")).model is not None
    write_json(tmp_path / "config.json", {"model_type": "bert"})
    assert describe(tmp_path / "model.safetensors") == About(
        "weights file next to a config.json with model_type=bert", **NOTHING_KNOWN
    )
    write_json(tmp_path / "config.json", {"architecture": "vit_base_patch16_224"})
    assert describe(tmp_path / "model.safetensors") == About("safetensors file")


def test_damaged_configurations_are_named(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors")
    for name in ("config.json", "open_clip_config.json"):
        (tmp_path / name).write_text("[1")
        with pytest.raises(CheckpointError, match=rf"{name} is not valid JSON"):
            describe(tmp_path)
        (tmp_path / name).write_text("[1]")
        with pytest.raises(CheckpointError, match=rf"{name} is not a JSON object"):
            describe(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"model_type": ["clip"]}),
        ("config.json", {"model_type": "clip", "text_config": [1]}),
        ("config.json", {"model_type": "clip", "vision_config": {"hidden_size": 0}}),
        ("config.json", DESCRIPTION | {"embed_dim": "wide"}),
        ("config.json", DESCRIPTION | {"vision_cfg": {"width": 64, "head_width": 0}}),
        ("open_clip_config.json", {"model_cfg": DESCRIPTION | {"vision_cfg": {"image_size": [32, 40]}}}),
        ("open_clip_config.json", {"model_cfg": DESCRIPTION, "preprocess_cfg": [1]}),
        ("preprocessor_config.json", {"image_mean": 0.5}),
        ("preprocessor_config.json", {"resample": [3]}),
    ],
)
def test_a_configuration_of_nonsense_is_refused_in_a_line(name: str, content: Any, tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"model_type": "clip"})
    write_json(tmp_path / name, content)
    with pytest.raises(CheckpointError) as caught:
        describe(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


def test_a_configuration_cannot_read_secrets_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    config = plain(small_config()) | {"name": "x-${oc.env:TOKEN}"}
    save_file({"logit_scale": torch.ones(1)}, tmp_path / "a.safetensors", {"clip_exp.model": json.dumps(config)})
    run_dir = write_run(tmp_path / "run", build_model(named_model("vit_nano")))
    values = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(values.replace("name: vit_nano", "name: x-${oc.env:TOKEN}"))
    for path in (tmp_path / "a.safetensors", run_dir):
        with pytest.raises(CheckpointError, match=r"interpolations are not allowed") as caught:
            describe(path)
        assert "secret" not in str(caught.value)


def test_describing_imports_no_torch(tmp_path: Path) -> None:
    write_openai_archive(openai_model(), tmp_path / "a.pt")
    weights(tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"model_type": "clip"})
    program = (
        "import sys; from clip_exp.weights.inspect import describe; describe('a.pt'); describe('model.safetensors'); "
        "wrong = {'torch', 'open_clip', 'transformers', 'timm'} & sys.modules.keys(); assert not wrong, wrong"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)


def test_a_config_yaml_of_something_else_is_passed_over(tmp_path: Path) -> None:
    aliases = "a: &a [1]\nmodel: {embed_dim: 1, a: *a}"  # ten lines of them can take all memory
    for content in (
        "model: {name: x}",
        "a: [1",
        "- 1",
        "model: big",
        aliases,
        "model: {embed_dim: 1}" + " " * 1_000_000,
    ):
        weights(tmp_path / "model.safetensors")
        (tmp_path / "config.yaml").write_text(content)
        assert describe(tmp_path / "model.safetensors") == About("safetensors file")
