"""Tests of weights of a single tower, in files of its library, of CLIP models, and of trainers: features equal those of the library."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertForMaskedLM,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from clip_exp.config.base import plain
from clip_exp.config.model import Activation, ModelConfig, Pooler
from clip_exp.config.names import named_model
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.loading import mix_of
from clip_exp.models.clip import build_model
from clip_exp.models.families.huggingface import HuggingFaceTextConfig
from clip_exp.models.families.siglip import SigLIPImageConfig
from clip_exp.models.families.timm import TimmConfig
from clip_exp.training.opening import open_run
from clip_exp.training.preflight import check_train
from clip_exp.weights.fit import check_weights, load_weights
from clip_exp.weights.inspect import describe
from clip_exp.weights.names import to_huggingface
from tests.checkpoints.test_folders import write
from tests.compose import train_config
from tests.encoders import small_encoder, write_encoder
from tests.models.small import CONTEXT_LENGTH, VOCAB_SIZE, batch, small_config
from tests.runs import TINY, Train, run_folders

State = dict[str, Tensor]
Features = Callable[[Tensor], Tensor]
BLOCKS = {"num_hidden_layers": 2, "projection_dim": 40, "hidden_act": "gelu"}
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, **BLOCKS,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 3, "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": CONTEXT_LENGTH, "bos_token_id": VOCAB_SIZE - 2, "eos_token_id": VOCAB_SIZE - 1, **BLOCKS,
}  # fmt: skip
BERT = small_encoder("bert")


def drawn(model: nn.Module, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def with_image(**image: Any) -> ModelConfig:
    return small_config().model_copy(update={"image": TimmConfig(name="test_vit", image_size=32, **image)})


def with_bert(**text: Any) -> ModelConfig:
    architecture = {**BERT.to_diff_dict(), "model_type": "bert"}
    tower = HuggingFaceTextConfig(name="bert", context_length=30, architecture=architecture, pooler=Pooler.cls, **text)
    return small_config().model_copy(update={"text": tower})


def open_clip_model(custom_text: bool = False) -> Any:
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": VOCAB_SIZE, "width": 48, "layers": 2, "heads": 3}
    return drawn((open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(40, vision, text))


def below(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


class Case(NamedTuple):
    """File of a tower, and the features that its library computes."""

    config: ModelConfig
    state: Any
    features: Features  # of images or tokens, behind the projection, or before it where the file has none
    left: str = ""  # what is reported as left out


def open_clip_image(place: Callable[[Any], Any], left: str = "") -> Case:
    model = open_clip_model()
    return Case(small_config(), place(model), model.encode_image, left)


def open_clip_text(custom_text: bool, left: str) -> Case:
    model = open_clip_model(custom_text)
    return Case(small_config(), model.state_dict(), model.encode_text, left)


def transformers_image(cls: Any, output: str) -> Case:
    model = drawn(cls(CLIPVisionConfig(**VISION)))
    return Case(small_config(), model.state_dict(), lambda images: getattr(model(pixel_values=images), output))


def transformers_text(cls: Any, output: str) -> Case:
    model = drawn(cls(CLIPTextConfig(**TEXT)))
    return Case(small_config(), model.state_dict(), lambda tokens: getattr(model(input_ids=tokens), output))


def siglip_image() -> Case:
    model = drawn(SiglipVisionModel(SiglipVisionConfig(**VISION)))
    image = SigLIPImageConfig(image_size=32, patch_size=8, width=64, layers=2, heads=4)
    config = small_config().model_copy(update={"image": image, "embed_dim": 64})
    return Case(config, model.state_dict(), lambda images: model(pixel_values=images).pooler_output)


def timm_image(place: Callable[[State], Any], left: str = "") -> Case:
    model = drawn(timm.create_model("test_vit", num_classes=5, img_size=32))
    return Case(
        with_image(),
        place(model.state_dict()),
        lambda images: model.forward_head(model.forward_features(images), pre_logits=True),
        left,
    )


def bert_text(place: Callable[[State], Any] = lambda state: state, left: str = "") -> Case:
    model = drawn(AutoModel.from_config(BERT))
    return Case(
        with_bert(),
        place(model.state_dict()),
        lambda tokens: model(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state[:, 0],
        left,
    )


def masked_bert() -> Case:
    model = drawn(BertForMaskedLM(BERT))
    return Case(
        with_bert(),
        model.state_dict(),
        lambda tokens: model.bert(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state[:, 0],
        "cls",
    )


def ours(tower: str, place: Callable[[State], Any], left: str = "") -> Case:
    model = drawn(build_model(small_config()))
    return Case(small_config(), place(model.state_dict()), getattr(model, tower), left)


def published_bert(state: State) -> State:
    return {
        f"bert.{name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')}": x
        for name, x in state.items()
    }


def part(tower: str, state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith(tower)}


STEP = {"step": torch.ones(())}
CASES: dict[str, tuple[str, Callable[[], Case]]] = {
    "visual.* of open_clip": ("image", lambda: open_clip_image(lambda model: part("visual.", model.state_dict()))),
    "conv1.weight, class_embedding of OpenAI": ("image", lambda: open_clip_image(lambda model: model.visual.state_dict())),
    "the image tower of a CLIP of open_clip": ("image", lambda: open_clip_image(lambda model: model.state_dict(), "token_embedding")),
    "the same in a trainer's file": ("image", lambda: open_clip_image(lambda model: {"state_dict": below("module.net.clip.", model.state_dict())}, "net")),
    "the text tower of a CLIP of open_clip": ("text", lambda: open_clip_text(False, "visual")),
    "the text tower of a CustomTextCLIP": ("text", lambda: open_clip_text(True, "visual")),
    "CLIPVisionModel": ("image", lambda: transformers_image(CLIPVisionModel, "pooler_output")),
    "CLIPVisionModelWithProjection": ("image", lambda: transformers_image(CLIPVisionModelWithProjection, "image_embeds")),
    "CLIPTextModel": ("text", lambda: transformers_text(CLIPTextModel, "pooler_output")),
    "CLIPTextModelWithProjection": ("text", lambda: transformers_text(CLIPTextModelWithProjection, "text_embeds")),
    "the image tower of a CLIPModel": ("image", lambda: ours("image", lambda state: to_huggingface(state, small_config()), "text_model")),
    "the text tower of a CLIPModel": ("text", lambda: ours("text", lambda state: to_huggingface(state, small_config()), "vision_model")),
    "SiglipVisionModel": ("image", siglip_image),
    "timm": ("image", lambda: timm_image(lambda state: state, "head (2 tensors)")),
    "timm's trainer": ("image", lambda: timm_image(lambda state: {"state_dict": below("module.", state), "state_dict_ema": {n: 2 * x for n, x in state.items()}}, "head")),
    "a teacher": ("image", lambda: timm_image(lambda state: {"teacher": below("backbone.", state) | STEP, "epoch": 3}, "head")),
    "BertModel": ("text", lambda: bert_text(left="pooler")),
    "BertForMaskedLM": ("text", masked_bert),
    "BERT as it was published": ("text", lambda: bert_text(published_bert, "bert.pooler (2 tensors)")),
    "a BERT in Lightning": ("text", lambda: bert_text(lambda state: {"state_dict": below("model.encoder.", state)}, "model.encoder.pooler")),
    "image.* of ours": ("image", lambda: ours("image", partial(part, "image."))),
    "the text tower of a CLIP of ours": ("text", lambda: ours("text", lambda state: state, "image")),
}  # fmt: skip


def inputs(tower: str, config: ModelConfig) -> Tensor:
    images, tokens = batch(3)
    if tower == "image":
        return images
    return tokens if config.text.kind == "clip" else tokens[:, :20].remainder(BERT.vocab_size)


@pytest.mark.parametrize(("tower", "case"), CASES.values(), ids=CASES.keys())
def test_features_are_those_of_the_library(tower: str, case: Callable[[], Case], tmp_path: Path) -> None:
    config, state, features, left = case()
    torch.save(state, tmp_path / "tower.pt")
    random = check_weights(tmp_path / "tower.pt", config, tower=tower)
    model = drawn(build_model(config), seed=1)
    other = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith(tower)}
    notes = load_weights(model, tmp_path / "tower.pt", config, tower=tower)
    batch_of = inputs(tower, config)
    with torch.inference_mode():
        expected = features(batch_of)
        if random:
            expected = getattr(model, tower).projection(expected)
        torch.testing.assert_close(getattr(model, tower)(batch_of), expected, rtol=0, atol=1e-5)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.items())
    assert [left in note for note in notes if "left out" in note] == ([True] if left else [])
    assert any("random projection" in note for note in notes) == bool(random)


def timm_file(path: Path, name: str = "test_vit", seed: int = 0, **options: Any) -> Path:
    torch.save(drawn(timm.create_model(name, num_classes=5, **options), seed).state_dict(), path)
    return path


def refusal(path: Path, config: ModelConfig, tower: str, prefix: str | None = None) -> str:
    messages = []
    for refused in (
        lambda: check_weights(path, config, prefix, tower),
        lambda: load_weights(build_model(config), path, config, prefix, tower),
    ):
        with pytest.raises(CheckpointError) as caught:
            refused()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    return messages[0]


def test_what_a_tower_has_more_or_less_of_is_named(tmp_path: Path) -> None:
    config = small_config()
    state = drawn(build_model(config)).image.state_dict()
    torch.save({name: tensor for name, tensor in state.items() if "ln_post" not in name}, tmp_path / "less.pt")
    assert "missing in the file: image.ln_post.* (2 weights)" in refusal(tmp_path / "less.pt", config, "image")
    deeper = {name.replace("blocks.1.", "blocks.2."): tensor for name, tensor in state.items() if "blocks.1." in name}
    torch.save(state | deeper, tmp_path / "deeper.pt")
    assert "not in the model: image.transformer.blocks.2.* (12 weights)" in refusal(
        tmp_path / "deeper.pt", config, "image"
    )
    torch.save(state | {"projection.weight": torch.zeros(48, 64)}, tmp_path / "wider.pt")
    assert "image.projection.weight [48, 64] instead of [40, 64]" in refusal(tmp_path / "wider.pt", config, "image")
    torch.save({"state_dict": below("net.", state) | {"net.ln_post.scale": torch.ones(2)}}, tmp_path / "scaled.pt")
    assert "not in the model: image.ln_post.scale" in refusal(tmp_path / "scaled.pt", config, "image")
    torch.save({"layer9.weight": torch.ones(2)}, tmp_path / "other.pt")
    assert refusal(tmp_path / "other.pt", config, "image").endswith(
        "has no weights of the image tower (model.image.kind=vit)."
    )
    scaled = timm.create_model("vit_tiny_patch16_224", num_classes=0, init_values=1.0).state_dict()
    torch.save(scaled, tmp_path / "scaled.pt")
    image = TimmConfig(name="vit_tiny_patch16_224", image_size=224)
    assert "not in the model: image.trunk.blocks.0-11.ls1.gamma" in refusal(
        tmp_path / "scaled.pt", config.model_copy(update={"image": image}), "image"
    )


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = drawn(build_model(small_config())).image.state_dict()
    torch.save(state | {"class_embedding": torch.full([64], torch.nan)}, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"not finite \(NaN or infinite\) in image.class_embedding"):
        load_weights(build_model(small_config()), tmp_path / "nan.pt", small_config(), tower="image")


def test_positions_are_interpolated(tmp_path: Path) -> None:
    path = timm_file(tmp_path / "a.pt", img_size=64)
    model = build_model(with_image())
    (*_, resized, projection) = load_weights(model, path, with_image(), tower="image")
    assert resized.startswith("image.trunk.pos_embed: interpolated (bicubic) from a grid of 4x4 patches to 2x2")
    assert projection == "image.projection.weight: not in the file, so the tower starts with a random projection."


def test_of_two_towers_that_fit_one_can_be_selected(tmp_path: Path) -> None:
    """As in DINO's files."""
    student, teacher = (torch.load(timm_file(tmp_path / "a.pt", seed=seed)) for seed in (0, 1))
    both = {"student": below("module.backbone.", student), "teacher": below("backbone.", teacher)}
    path = tmp_path / "dino.pth"
    torch.save(both, path)
    assert refusal(path, with_image(), "image") == (
        f"{path} has 2 complete sets of weights of the image tower. Select one: pretrained_prefix=student.backbone, "
        "pretrained_prefix=teacher.backbone."
    )
    named = refusal(path, with_image(), "image", "teacher")
    assert (
        "pretrained_prefix=teacher matches no weights of the image tower. The file has pretrained_prefix=stud" in named
    )
    model = build_model(with_image())
    load_weights(model, path, with_image(), "teacher.backbone", "image")
    assert torch.equal(model.image.trunk.cls_token, teacher["cls_token"])


# ------------------------------------------------------------------------------------------------------- in training

TIMM = (*TINY, "model/image=timm", "model.image.name=test_vit", "model.image.image_size=64")


def test_a_frozen_tower_from_a_file_is_unchanged_by_training(train: Train, tmp_path: Path) -> None:
    path = timm_file(tmp_path / "vit.pt", img_size=64)
    lit = (*TIMM, f"pretrained_image={path}", "finetune=lit", "max_steps=2", "scheduler.warmup_steps=0")
    for projection in (("model.image.projection=none", "model.embed_dim=64"), ("finetune.image.unfrozen_blocks=0",)):
        run = train(*lit, *projection)
        learned = run.weights
        kept = {name: tensor for name, tensor in torch.load(path).items() if not name.startswith(("head.", "norm."))}
        assert all(torch.equal(learned[f"image.trunk.{name}"], tensor) for name, tensor in kept.items())
        noted = run.record["pretrained_image"]
        assert (noted["path"], noted["description"], noted["format"]) == (str(path), str(path), "torch file")
    with pytest.raises(ConfigError, match=r"started from pretrained_image: leave out wise_ft"):
        mix_of(run.folder, 0.5)


def test_towers_come_from_two_runs(train: Train, tmp_path: Path) -> None:
    small = (*TINY, "max_steps=1", "scheduler.warmup_steps=0")
    one, other = (train(*small, f"seed={seed}") for seed in (1, 2))
    both = train(*small, f"pretrained_image={one.folder}", f"pretrained_text={other.folder}", "optimizer.lr=1e-30")
    for run, tower in ((one, "image."), (other, "text.")):
        weights = {name: tensor for name, tensor in run.weights.items() if name.startswith(tower)}
        assert [name for name, tensor in weights.items() if (both.weights[name] - tensor).abs().max() > 1e-20] == []


REFUSED = {
    "a projection that nobody trained": (["finetune=lit"], ConfigError, "set finetune.image.unfrozen_blocks=0"),
    "the other tower": (["finetune.text.freeze=true"], ConfigError, "set pretrained=… or pretrained_text=…"),
    "another backbone": (["model.image.name=test_vit2"], CheckpointError, "does not fit the model"),
    "weights of the whole model too": (["pretrained=x.pt"], ConfigError, "pretrained and pretrained_image exclude each"),
    "the library's weights too": (
        ["model.image.pretrained=true"], ConfigError, "model.image.pretrained=true has no effect with pretrained_image=",
    ),
    "a file that is not there": (["pretrained_text=no.pt"], ConfigError, "pretrained_text=no.pt does not exist"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "error", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_it_is_refused_before_a_run_has_a_folder(overrides, error, reason: str, tmp_path: Path) -> None:
    path = timm_file(tmp_path / "vit.pt", img_size=64)
    arguments = [*TIMM, f"pretrained_image={path}", f"output_dir={tmp_path / 'out'}", *overrides]
    config = train_config(*arguments)

    def start() -> None:
        check_train(config, arguments)
        open_run(config)

    with pytest.raises(error) as caught:
        start()
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_is_found_by_its_towers_and_needs_their_files_no_more(tmp_path: Path) -> None:
    path = timm_file(tmp_path / "vit.pt", img_size=64)
    given = [word for word in TIMM if not word.startswith("resume")]
    config = train_config(*given, f"pretrained_image={path}", f"output_dir={tmp_path / 'out'}")
    opening = open_run(config)
    opening.begin([])
    write(opening.folder, 10)
    timm_file(path, seed=1, img_size=64)
    assert open_run(config).folder != opening.folder
    path.unlink()
    assert open_run(config).folder == opening.folder
    assert open_run(config.model_copy(update={"pretrained_image": None})).folder != opening.folder


def test_a_library_is_not_used_for_weights_that_a_file_has(tmp_path: Path, train: Train) -> None:
    encoder = write_encoder(tmp_path / "bert", "bert")
    text = ("model/text=huggingface", f"model.text.name={encoder}", "model.text.context_length=20")
    (encoder / "model.safetensors").rename(tmp_path / "bert.safetensors")
    run = train(*TINY, *text, f"pretrained_text={tmp_path / 'bert.safetensors'}", "max_steps=1", "optimizer.lr=1e-30")
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(run.weights[f"text.encoder.{words}"], load_file(tmp_path / "bert.safetensors")[words])


# ------------------------------------------------------------------------------------------- what files say of themselves


def write_tower(path: Path, activation: Activation) -> Path:
    config = named_model("vit_nano").model_copy(update={"activation": activation})
    save_file(build_model(config).state_dict(), path, {"clip_exp.model": json.dumps(plain(config))})
    return path


def test_files_of_towers_set_the_activation_and_must_agree(tmp_path: Path, capsys) -> None:
    quick = write_tower(tmp_path / "quick.safetensors", Activation.quick_gelu)
    gelu = write_tower(tmp_path / "gelu.safetensors", Activation.gelu)
    nano = ("model=vit_nano", f"output_dir={tmp_path / 'out'}", f"pretrained_image={quick}")
    assert open_run(train_config(*nano)).resolved.model.activation is Activation.quick_gelu
    assert f"model.activation=quick_gelu: the activation of the weights {quick}" in capsys.readouterr().err
    before = run_folders(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"with quick_gelu and .* with gelu, but model\.activation applies to"):
        open_run(train_config(*nano, f"pretrained_text={gelu}"))
    with pytest.raises(
        ConfigError, match=r"model\.activation=gelu, but .*quick\.safetensors was trained with quick_gelu"
    ):
        open_run(train_config(*nano, "model.activation=gelu"))
    assert run_folders(tmp_path / "out") == before


def test_folders_of_one_tower_describe_themselves(tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**VISION | {"hidden_act": "quick_gelu"})).save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "resample": 3}')
    about = describe(tmp_path / "clip")
    assert (about.activation, about.mean, about.model) == (Activation.quick_gelu, [0.1, 0.2, 0.3], None)
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(timm.create_model("test_vit").state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(
        '{"architecture": "test_vit", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "random"}}'
    )
    about = describe(folder)
    assert (about.mean, about.std, about.interpolation) == ([0.5] * 3, [0.2] * 3, None)
