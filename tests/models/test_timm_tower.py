import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from torch import nn

from clip_exp.config.model import Interpolation, ModelConfig, Projection
from clip_exp.data.images import OPENAI_MEAN, preprocessing_of
from clip_exp.errors import ConfigError
from clip_exp.models.clip import build_model
from clip_exp.models.families.clip import CLIPTextConfig
from clip_exp.models.families.timm import TimmConfig
from clip_exp.models.layers import ProjectedTower
from clip_exp.weights.inspect import note_architecture

BACKBONES = ["test_resnet", "test_vit", "test_convnext", "mobilenetv3_small_050"]


def small(name: str, size: int = 64, dropout: float = 0.0, **image: object) -> ModelConfig:
    return ModelConfig(
        name="small",
        embed_dim=24,
        image=TimmConfig(name=name, image_size=size, **image),  # type: ignore[arg-type]
        text=CLIPTextConfig(width=32, layers=1, heads=2),
        dropout=dropout,
    )


def build_image_tower(config: ModelConfig, own_weights: bool = False) -> ProjectedTower:
    tower = config.image.build(config, own_weights)
    assert isinstance(tower, ProjectedTower)
    return tower


def images(size: int = 64, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def load_twin(twin: TimmModel, tower: ProjectedTower, names: dict[str, str]) -> None:
    state = tower.state_dict()
    for ours, theirs in names.items():
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    twin.load_state_dict(state)


@pytest.mark.parametrize("projection", [Projection.linear, Projection.mlp])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_features_equal_open_clip(name: str, projection: Projection) -> None:
    size = timm.get_pretrained_cfg(name).input_size[-1]
    tower = build_image_tower(small(name, size, projection=projection)).eval()
    twin = TimmModel(name, 24, size, pool="", proj=projection.value).eval()
    mlp = {"projection.0": "head.mlp.fc1", "projection.2": "head.mlp.fc2"}
    load_twin(twin, tower, {"projection.weight": "head.proj.weight"} if projection is Projection.linear else mlp)
    torch.testing.assert_close(tower(images(size)), twin(images(size)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_takes_the_requested_size(name: str) -> None:
    tower = build_image_tower(small(name, 96)).eval()
    assert tower(images(96)).shape == (3, 24)


def test_without_a_projection_the_channels_are_the_space() -> None:
    with pytest.raises(ConfigError, match=r"it has 64, and model.embed_dim=24. Set model.embed_dim=64"):
        build_image_tower(small("test_vit", projection=Projection.none))
    tower = build_image_tower(small("test_vit", projection=Projection.none).model_copy(update={"embed_dim": 64})).eval()
    torch.testing.assert_close(tower(images()), tower.trunk(images()))


def test_patch_dropout_and_dropout_act_in_training_only() -> None:
    for options in ({"patch_dropout": 0.5}, {"dropout": 0.5}):
        tower = build_image_tower(small("test_vit", **options))  # type: ignore[arg-type]
        assert not torch.equal(tower(images()), tower(images()))
        tower.eval()
        assert torch.equal(tower(images()), tower(images()))


def test_a_backbone_brings_no_dropout_of_its_own() -> None:
    tower = build_image_tower(small("test_vit"))
    assert {module.p for module in tower.modules() if isinstance(module, nn.Dropout)} <= {0.0}


def test_the_whole_model_is_built_and_also_without_memory() -> None:
    names = set(build_model(small("test_vit")).state_dict())
    assert {"image.trunk.pos_embed", "image.projection.weight"} <= names
    with torch.device("meta"):
        model = build_model(small("test_vit"))
        assert set(model.state_dict()) == names
        assert model.encode_image(torch.zeros(2, 3, 64, 64)).shape == (2, 24)


REFUSED = {
    "unknown": (small("resnet19"), r"is not a model of timm: did you mean .*resnet18"),
    "unknown weights": (small("resnet18.nope"), r"unknown weights 'nope'. timm has resnet18.*a1_in1k"),
    "size between patches": (small("test_vit", 65), r"image_size=65 does not fit test_vit .*Its default size is 160"),
    "patch dropout of a convolution": (
        small("test_resnet", patch_dropout=0.5),
        "model.image.patch_dropout is not supported by",
    ),
    "dropout of a convolution": (small("test_resnet", dropout=0.1), "model.dropout is not supported by"),
}


@pytest.mark.parametrize(("config", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_backbone_cannot_be_is_refused(config: ModelConfig, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build_model(config)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A hub with the weights of one backbone, classifier included."""
    torch.manual_seed(1)
    published = timm.create_model("test_vit")

    def load(repository: object, *_: object, **__: object) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in published.state_dict().items()}

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", load)
    return published


def test_a_backbone_starts_from_its_own_weights_where_requested(hub: nn.Module) -> None:
    published = hub.state_dict()
    config = small("test_vit", 160, pretrained=True)
    own = build_image_tower(config, own_weights=True).trunk.state_dict()
    assert all(torch.equal(value, published[name]) for name, value in own.items())
    fresh = build_image_tower(config).trunk.state_dict()
    assert not torch.equal(fresh["pos_embed"], published["pos_embed"])
    resized = build_image_tower(small("test_vit", 64, pretrained=True), own_weights=True).trunk.state_dict()
    assert torch.equal(resized["blocks.0.attn.qkv.weight"], published["blocks.0.attn.qkv.weight"])
    assert resized["pos_embed"].shape != published["pos_embed"].shape


def test_weights_that_cannot_be_fetched_are_an_error_and_leave_no_random_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(ConfigError, match=r"could not be loaded \(OSError: no route to the hub\)"):
        build_model(small("test_vit", 160, pretrained=True), own_weights={"image"})
    build_model(small("test_vit", 160, pretrained=True))


def test_a_backbone_without_published_weights_has_none() -> None:
    name = next(name for name in timm.list_models("vit_*") if not timm.is_model_pretrained(name))
    with pytest.raises(ConfigError, match=r"timm has no weights for this model: set model.image.pretrained=false"):
        build_image_tower(small(name, timm.get_pretrained_cfg(name).input_size[-1], pretrained=True), own_weights=True)


def test_null_preprocessing_is_that_of_the_backbones_weights_where_they_are_used() -> None:
    config = small("vit_tiny_patch16_224.augreg_in21k", pretrained=True)
    noted = note_architecture(config).image
    assert (noted.mean, noted.std, noted.interpolation) == ([0.5] * 3, [0.5] * 3, Interpolation.bicubic)
    assert preprocessing_of(noted).mean == [0.5] * 3
    assert note_architecture(small("mobilenetv3_large_100", pretrained=True)).image.interpolation == "bicubic"
    assert note_architecture(config, own_weights=()) == config
    assert preprocessing_of(note_architecture(small("test_vit")).image).mean == OPENAI_MEAN
    mine = small("test_vit", pretrained=True, mean=[0.1] * 3)
    assert note_architecture(mine).image.mean == [0.1] * 3
    assert config.own_towers == {"image"}
    assert not small("test_vit").own_towers
