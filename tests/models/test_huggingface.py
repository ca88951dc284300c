import json
from pathlib import Path

import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from clip_exp.config.base import plain
from clip_exp.config.model import ModelConfig, Pooler, Projection
from clip_exp.errors import ConfigError
from clip_exp.models.clip import build_model
from clip_exp.models.families.clip import ViTConfig
from clip_exp.models.families.huggingface import HuggingFaceTextConfig, note_architecture
from clip_exp.models.families.huggingface.tower import HuggingFaceText
from clip_exp.text.tokenizer import build_tokenizer
from clip_exp.weights.inspect import note_architecture as noted
from tests.encoders import CAPTIONS, SMALL, small_encoder, write_encoder

POOLERS = {Pooler.mean: "mean_pooler", Pooler.cls: "cls_last_hidden_state_pooler", Pooler.own: "cls_pooler"}


def small(name: Path, **text: object) -> ModelConfig:
    return ModelConfig(
        name="small",
        embed_dim=24,
        image=ViTConfig(image_size=16, patch_size=8, width=32, layers=1, heads=2),
        text=HuggingFaceTextConfig(name=str(name), context_length=30, **text),  # type: ignore[arg-type]
    )


def build_text_tower(config: ModelConfig, own_weights: bool = False) -> HuggingFaceText:
    tower = config.text.build(config, own_weights)
    assert isinstance(tower, HuggingFaceText)
    return tower


def load_twin(twin: HFTextEncoder, tower: HuggingFaceText) -> None:
    theirs = {name.replace("encoder.", "transformer.", 1): value for name, value in tower.state_dict().items()}
    twin.load_state_dict({name.replace("projection.", "proj.", 1): value for name, value in theirs.items()})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: write_encoder(tmp_path_factory.mktemp(kind), kind) for kind in ("bert", "roberta", "xlm-roberta", "mt5")
    }


def tokens(config: ModelConfig) -> Tensor:
    return build_tokenizer(config.text)(CAPTIONS)


@pytest.mark.parametrize("projection", [Projection.linear, Projection.mlp])
@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_features_equal_open_clip(folders, kind: str, pooler: Pooler, projection: Projection) -> None:
    config = small(folders[kind], pooler=pooler, projection=projection)
    tower = build_text_tower(config, own_weights=True).eval()
    twin = HFTextEncoder(str(folders[kind]), 24, pooler_type=POOLERS[pooler], proj_type=projection.value).eval()
    own = {name: value.clone() for name, value in twin.transformer.state_dict().items()}
    load_twin(twin, tower)
    assert all(torch.equal(value, own[name]) for name, value in twin.transformer.state_dict().items()), "own weights"
    tokens_BL = tokens(config)
    torch.testing.assert_close(tower(tokens_BL), twin(tokens_BL), rtol=0, atol=1e-5)


def test_of_an_encoder_and_decoder_the_encoder_is_used_as_by_open_clip(folders) -> None:
    config = small(folders["mt5"])
    tower = build_text_tower(config, own_weights=True).eval()
    twin = HFTextEncoder(str(folders["mt5"]), 24, pooler_type="mean_pooler", proj_type="mlp").eval()
    load_twin(twin, tower)
    torch.testing.assert_close(tower(tokens(config)), twin(tokens(config)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "mt5"])
def test_a_batch_that_is_cut_to_its_longest_text_has_the_same_features(folders, kind: str) -> None:
    config = small(folders[kind])
    tower = build_text_tower(config, own_weights=True).eval()
    cut_BL = tokens(config)
    whole_BL = build_tokenizer(config.text.model_copy(update={"trim": False}))(CAPTIONS)
    assert cut_BL.shape[1] < whole_BL.shape[1] == 30
    torch.testing.assert_close(tower(cut_BL), tower(whole_BL), rtol=0, atol=1e-5)
    single = torch.cat([tower(build_tokenizer(config.text)(text)) for text in CAPTIONS])
    torch.testing.assert_close(single, tower(cut_BL), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooler", [Pooler.mean, Pooler.cls])
def test_every_weight_gets_a_gradient(folders, pooler: Pooler) -> None:
    """Distributed training waits for every one of them."""
    config = small(folders["bert"], pooler=pooler)
    tower = build_text_tower(config)
    tower(tokens(config)).square().sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []


def test_a_noted_architecture_builds_the_encoder_without_its_folder(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "encoder", "roberta")
    config = noted(small(folder))
    assert json.loads(json.dumps(plain(config.text.architecture))) == config.text.architecture
    before = build_text_tower(config, own_weights=True).eval()
    tokens_BL = tokens(config)
    folder.rename(tmp_path / "gone")
    tower = build_text_tower(config).eval()
    tower.load_state_dict(before.state_dict())
    torch.testing.assert_close(tower(tokens_BL), before(tokens_BL))
    with pytest.raises(ConfigError, match="could not be loaded"):
        build_text_tower(config, own_weights=True)
    with pytest.raises(ConfigError, match="could not be loaded"):
        note_architecture(config.text.name)


def test_own_weights_are_requested_by_the_configuration(folders) -> None:
    assert small(folders["bert"]).own_towers == {"text"}
    assert not small(folders["bert"], pretrained=False).own_towers


def test_dropout_is_the_models(folders) -> None:
    def rates(dropout: float) -> set[float]:
        config = small(folders["bert"]).model_copy(update={"dropout": dropout})
        return {module.p for module in build_text_tower(config).modules() if isinstance(module, nn.Dropout)}

    assert small_encoder("bert").hidden_dropout_prob == 0.1
    assert rates(0.0) == {0.0}
    assert rates(0.25) == {0.25}


def test_the_whole_model_is_built_and_also_without_memory(folders) -> None:
    config = small(folders["bert"])
    names = set(build_model(config).state_dict())
    assert {"text.encoder.embeddings.word_embeddings.weight", "text.projection.0.weight"} <= names
    with torch.device("meta"):
        assert set(build_model(config).state_dict()) == names


def described(kind: str, length: int, trim: bool = True, **numbers: int | None) -> ModelConfig:
    """With an encoder of a kind, as a run notes it."""
    architecture = {"model_type": kind, "vocab_size": 300, "max_position_embeddings": 40, **SMALL, **numbers}
    architecture = {key: value for key, value in architecture.items() if value is not None}
    text = HuggingFaceTextConfig(
        name=kind,
        context_length=length,
        architecture=architecture,
        pretrained=False,
        trim=trim,
    )
    return small(Path(kind)).model_copy(update={"text": text})


@pytest.mark.parametrize(
    ("kind", "positions"),
    [("bert", 40), ("roberta", 38), ("xlm-roberta", 38), ("camembert", 38), ("mpnet", 38), ("ibert", 38)],
)
def test_a_context_has_a_position_for_each_token_or_is_refused(kind: str, positions: int) -> None:
    """Some kinds count from behind the padding id."""
    tower = build_text_tower(described(kind, positions))
    assert tower(torch.full((1, positions), 7)).isfinite().all()
    with pytest.raises(
        ConfigError, match=f"context_length={positions + 1} must be at most {positions}, the number of positions"
    ):
        build_text_tower(described(kind, positions + 1))


@pytest.mark.parametrize(
    ("kind", "numbers", "expected"),
    [
        ("fnet", {"pad_token_id": 0}, "model.text.name=fnet does not accept attention_mask"),
        ("blip_2_qformer", {"pad_token_id": 0}, "model.text.name=blip_2_qformer does not accept input_ids"),
        ("funnel", {"pad_token_id": 0, "num_hidden_layers": None}, "transformers has no base model of type funnel"),
        ("beit", {}, "model.text.name=beit has no pad_token_id"),
    ],
)
def test_what_is_no_text_encoder_with_masked_padding_is_refused(kind: str, numbers, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_text_tower(described(kind, 20, **numbers))
    assert expected in str(caught.value)


def test_an_encoder_whose_features_depend_on_the_padding_is_given_whole_contexts() -> None:
    tower = build_text_tower(described("convbert", 20, trim=False, embedding_size=32)).eval()
    whole_BL = torch.full((1, 20), tower.pad_id)
    whole_BL[0, :5] = torch.arange(5, 10)
    assert not torch.allclose(tower(whole_BL), tower(whole_BL[:, :5]), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"set model\.text\.trim=false"):
        build_text_tower(described("convbert", 20, embedding_size=32))


def test_a_pooler_that_an_encoder_cannot_do_without_and_nobody_reads_does_not_learn() -> None:
    """Distributed training would wait for its gradient."""
    tower = build_text_tower(described("squeezebert", 20, embedding_size=32))
    tower(torch.full((1, 5), 7)).square().sum().backward()
    assert [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None] == []
    assert {name for name, p in tower.named_parameters() if not p.requires_grad} == {
        f"encoder.pooler.dense.{kind}" for kind in ("weight", "bias")
    }


REFUSED = {
    "too long a context": (
        {"context_length": 39},
        "model.text.context_length=39 must be at most 38, the number of positions",
    ),
    "no projection to another width": ({"projection": Projection.none}, "Set model.embed_dim=32, or a projection"),
    "no encoder": ({"architecture": {"model_type": "nonsense"}}, "not a valid encoder of transformers"),
    "heads that do not divide": (
        {"architecture": {"model_type": "bert", "vocab_size": 300, **SMALL, "num_attention_heads": 7}},
        "model.text.architecture cannot be built",
    ),
    "no such folder": ({"name": "/nowhere/encoder"}, "model.text.name=/nowhere/encoder could not be loaded"),
}


@pytest.mark.parametrize(("values", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(folders, values, expected: str) -> None:
    config = small(folders["roberta"])
    with pytest.raises(ConfigError) as caught:
        build_text_tower(config.model_copy(update={"text": config.text.model_copy(update=values)}))
    assert expected in str(caught.value)


def test_an_encoder_without_a_pooler_has_none_of_its_own(folders) -> None:
    with pytest.raises(ConfigError, match="has no pooler"):
        build_text_tower(small(folders["mt5"], pooler=Pooler.own))


def test_weights_come_from_safetensors_only(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, "bert")
    weights = build_text_tower(small(folder), own_weights=True).encoder.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only from safetensors"):
        build_text_tower(small(folder), own_weights=True)


def test_weights_that_do_not_cover_the_encoder_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_encoder(tmp_path, "bert")
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.attention.self.query.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack encoder.layer.1.attention.self.query.weight"):
        build_text_tower(small(folder), own_weights=True)


def test_a_noted_architecture_names_no_code(folders) -> None:
    """It may come with a third party's weights: transformers would load what these keys name."""
    architecture = {"model_type": "bert", "vocab_size": 300, "pad_token_id": 0, **SMALL}
    named = {
        "attn_implementation": "org/kernel",
        "auto_map": {"AutoModel": "org/code--model.Model"},
        "_attn_implementation": "org/kernel",
    }
    config = small(folders["bert"], architecture={**architecture, **named}, pretrained=False)
    tower = build_text_tower(config)
    assert tower.encoder.config._attn_implementation != "org/kernel"
    assert not hasattr(tower.encoder.config, "auto_map")
