"""Tests that files of big_vision and of Google's Vision Transformers give the same features as with the loaders of open_clip and timm."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.convert import load_big_vision_weights
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from clip_exp.config.model import Activation, ModelConfig, ResizeMode
from clip_exp.errors import CheckpointError
from clip_exp.models.clip import build_model
from clip_exp.models.families.timm import TimmConfig
from clip_exp.renaming import rename
from clip_exp.weights.fit import load_weights
from clip_exp.weights.inspect import describe
from clip_exp.weights.read import _read_npz, find_model_weights, read_weights
from tests.models.twins import inputs, load_config, shallow_timm

WIDTH, HEADS, LAYERS, PATCH, GRID, CONTEXT, VOCABULARY = 48, 3, 2, 16, 3, 64, 300
Arrays = dict[str, np.ndarray[Any, Any]]


def drawn(*shape: int) -> np.ndarray[Any, Any]:
    return (0.2 * np.random.default_rng(sum(shape)).standard_normal(shape)).astype(np.float32)


def block(
    prefix: str, norm_2: str = "LayerNorm_1", attention: str = "0", mlp: str = "MlpBlock_0", scale: float = 1.0
) -> Arrays:
    """Return the weights of a Vision Transformer block in Flax."""
    heads, wide = (HEADS, WIDTH // HEADS), 4 * WIDTH
    multi = f"MultiHeadDotProductAttention_{attention}"
    shapes: dict[str, tuple[int, ...]] = {
        **{f"{norm}/{kind}": (WIDTH,) for norm in ("LayerNorm_0", norm_2) for kind in ("scale", "bias")},
        **{f"{multi}/{part}/kernel": (WIDTH, *heads) for part in ("query", "key", "value")},
        **{f"{multi}/{part}/bias": heads for part in ("query", "key", "value")},
        f"{multi}/out/kernel": (*heads, WIDTH),
        f"{multi}/out/bias": (WIDTH,),
        f"{mlp}/Dense_0/kernel": (WIDTH, wide),
        f"{mlp}/Dense_0/bias": (wide,),
        f"{mlp}/Dense_1/kernel": (wide, WIDTH),
        f"{mlp}/Dense_1/bias": (WIDTH,),
    }
    draw = np.random.default_rng(int(100 * scale))
    return {
        f"{prefix}/{name}": (0.2 * scale * draw.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def blocks(prefix: str, stacked: bool, **names: Any) -> Arrays:
    """Return separate weights for each block, or weights of all blocks stacked along the first axis."""
    each = [block("block", scale=1 + i / 4, **names) for i in range(LAYERS)]
    if stacked:
        return {
            name.replace("block", f"{prefix}encoderblock", 1): np.stack([part[name] for part in each])
            for name in each[0]
        }
    return {
        name.replace("block", f"{prefix}encoderblock_{i}", 1): array
        for i, part in enumerate(each)
        for name, array in part.items()
    }


def image_tower(stacked: bool) -> Arrays:
    """Return the weights of SigLIP's image tower, without a class token and with attention pooling."""
    head = {name: array for name, array in block("MAPHead_0").items() if "/LayerNorm_1/" not in name}
    return {
        "embedding/kernel": drawn(PATCH, PATCH, 3, WIDTH),
        "embedding/bias": drawn(WIDTH),
        "pos_embedding": drawn(1, GRID**2, WIDTH),
        **blocks("Transformer/", stacked),
        "Transformer/encoder_norm/scale": drawn(WIDTH),
        "Transformer/encoder_norm/bias": drawn(WIDTH),
        "MAPHead_0/probe": drawn(1, 1, WIDTH),
        **head,
    }


def siglip(stacked: bool = False) -> Arrays:
    text = {
        "Embed_0/embedding": drawn(VOCABULARY, WIDTH),
        "pos_embedding": drawn(1, CONTEXT, WIDTH),
        **blocks("Encoder_0/", stacked),
        "Encoder_0/encoder_norm/scale": drawn(WIDTH),
        "Encoder_0/encoder_norm/bias": drawn(WIDTH),
        "head/kernel": drawn(WIDTH, WIDTH),
        "head/bias": drawn(WIDTH),
    }
    return {
        **{f"img/{name}": array for name, array in image_tower(stacked).items()},
        **{f"txt/{name}": array for name, array in text.items()},
        "t": np.array([2.5], dtype=np.float32),
        "b": np.array([-9.0], dtype=np.float32),
    }


def below(prefix: str, arrays: Arrays) -> Arrays:
    return {prefix + name: array for name, array in arrays.items()}


def small_config() -> ModelConfig:
    """Return SigLIP with the activation of open_clip's configuration."""
    config: Any = load_config("siglip_b16")
    config.embed_dim, config.activation = WIDTH, Activation.gelu
    for tower in config.towers:
        tower.width, tower.layers, tower.heads = WIDTH, LAYERS, HEADS
    config.image.image_size, config.text.vocab_size = PATCH * GRID, VOCABULARY
    return config


def open_clip_model(path: Path) -> nn.Module:
    settings: dict[str, Any] = open_clip.get_model_config("ViT-B-16-SigLIP")
    settings["text_cfg"] |= {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "vocab_size": VOCABULARY}
    with shallow_timm(depth=LAYERS, embed_dim=WIDTH, num_heads=HEADS, img_size=PATCH * GRID):
        model = open_clip.model.CustomTextCLIP(WIDTH, settings["vision_cfg"], settings["text_cfg"], init_logit_bias=0.0)
    load_big_vision_weights(model, str(path))
    return model.eval()


LAYOUTS: dict[str, Callable[[], Arrays]] = {
    "with params": lambda: below("params/", siglip()),
    "without params": siglip,
    "with stacked blocks": lambda: below("params/", siglip(stacked=True)),
    "with an optimizer": lambda: below("params/", siglip()) | below("opt/0/mu/", siglip()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_siglip_has_the_features_that_open_clips_loader_gives_it(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "siglip.npz"
    np.savez(path, **LAYOUTS[layout]())
    theirs, config = open_clip_model(path), small_config()
    model = build_model(config, init_logit_bias=0.0).eval()
    assert load_weights(model, path, config) == []
    image_BCHW, tokens_BL = inputs(config)
    torch.testing.assert_close(model.encode_image(image_BCHW), theirs.encode_image(image_BCHW), rtol=0, atol=1e-5)  # type: ignore[operator]
    torch.testing.assert_close(model.encode_text(tokens_BL), theirs.encode_text(tokens_BL), rtol=0, atol=1e-5)  # type: ignore[operator]
    assert (model.logit_scale.item(), model.logit_bias.item()) == (2.5, -9.0)  # type: ignore[union-attr]


@torch.no_grad()
def test_siglip_loads_into_a_backbone_of_timm_as_well(tmp_path: Path) -> None:
    path = tmp_path / "siglip.npz"
    np.savez(path, **below("params/", siglip()))
    config = small_config()
    ours = build_model(config, init_logit_bias=0.0).eval()
    load_weights(ours, path, config)
    image = TimmConfig(name="vit_base_patch16_siglip_224", image_size=PATCH * GRID, projection="none")  # type: ignore[arg-type]
    with_timm = config.model_copy(update={"image": image})
    with shallow_timm(depth=LAYERS, embed_dim=WIDTH, num_heads=HEADS, img_size=PATCH * GRID):
        model = build_model(with_timm, init_logit_bias=0.0).eval()
    load_weights(model, path, with_timm)
    image_BCHW, _ = inputs(config)
    torch.testing.assert_close(model.encode_image(image_BCHW), ours.encode_image(image_BCHW), rtol=0, atol=1e-5)


VITS: dict[str, tuple[str, str, dict[str, str]]] = {  # by layout: where the positions are, and what a block is made of
    "big_vision": ("pos_embedding", "params/", {}),
    "vision_transformer": (
        "Transformer/posembed_input/pos_embedding",
        "",
        {"norm_2": "LayerNorm_2", "attention": "1", "mlp": "MlpBlock_3"},
    ),
}


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
@pytest.mark.parametrize("layout", VITS)
@torch.no_grad()
def test_a_vision_transformer_has_the_features_that_timms_loader_gives_it(
    layout: str, prefix: str, tmp_path: Path
) -> None:
    positions, own_prefix, names = VITS[layout]
    arrays = {
        "embedding/kernel": drawn(PATCH, PATCH, 3, WIDTH),
        "embedding/bias": drawn(WIDTH),
        "cls": drawn(1, 1, WIDTH),
        positions: drawn(1, GRID**2 + 1, WIDTH),
        **blocks("Transformer/", stacked=False, **names),
        "Transformer/encoder_norm/scale": drawn(WIDTH),
        "Transformer/encoder_norm/bias": drawn(WIDTH),
        "head/kernel": drawn(WIDTH, 10),
        "head/bias": drawn(10),
    }
    path = tmp_path / "vit.npz"
    np.savez(path, **below(prefix or own_prefix, arrays))
    sizes = {"img_size": PATCH * GRID, "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS}
    ours, theirs = (VisionTransformer(**sizes, num_classes=0).eval() for _ in range(2))  # type: ignore[arg-type]
    theirs.load_pretrained(str(path))
    start = (prefix or own_prefix).replace("/", ".")
    state = {name.removeprefix(start): tensor for name, tensor in _read_npz(path, with_values=True).items()}
    found = rename(state, TimmConfig.names[layout].rows, to_theirs=False)
    missing = ours.load_state_dict(
        {name.removeprefix("trunk."): tensor for name, tensor in found.items() if not name.startswith("head")}
    )
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    image_BCHW = torch.randn(2, 3, PATCH * GRID, PATCH * GRID)
    torch.testing.assert_close(ours(image_BCHW), theirs(image_BCHW), rtol=0, atol=1e-5)


def test_a_table_names_every_weight_of_timms_vision_transformers_both_ways() -> None:
    """Except for the axis of attention heads, whose number our weights do not contain."""
    ours = timm.create_model("test_vit", num_classes=0).state_dict()
    state = {f"trunk.{name}": tensor for name, tensor in ours.items()}
    for layout in VITS:
        rows = TimmConfig.names[layout].rows
        back = rename(rename(state, rows, to_theirs=True), rows, to_theirs=False)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("layout", VITS)
def test_a_vision_transformer_is_the_image_tower_of_a_model(layout: str, tmp_path: Path) -> None:
    """As read by `pretrained_image`: without the classifier, and without a projection, which the file does not have."""
    image = TimmConfig(name="test_vit", image_size=64)
    config = small_config().model_copy(update={"image": image})
    own = build_model(config).image.state_dict()
    theirs = rename(own, TimmConfig.names[layout].rows, to_theirs=True)
    arrays = {
        name.replace(".", "/"): tensor.numpy() for name, tensor in theirs.items() if not name.startswith("projection")
    }
    np.savez(
        tmp_path / "vit.npz", **below(VITS[layout][1], arrays | {"head/kernel": drawn(3, 3), "head/bias": drawn(3)})
    )
    named = {f"image.{name}": tensor for name, tensor in own.items()}
    found = find_model_weights(tmp_path / "vit.npz", config, named, tower="image").state
    assert named.keys() - found.keys() == {"image.projection.weight"}
    assert all(torch.equal(found[name], named[name]) for name in found)


def test_siglips_tables_name_every_weight_both_ways() -> None:
    config = small_config()
    model = build_model(config)
    for name, tower in (("image", config.image), ("text", config.text)):
        state = getattr(model, name).state_dict()
        rows = tower.names["big_vision"].rows
        theirs = rename(state, rows, to_theirs=True)
        start = ("img/" if name == "image" else "txt/",)
        assert set(theirs) == {part[4:].replace("/", ".") for part in siglip() if part.startswith(start)}
        back = rename(theirs, rows, to_theirs=False)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("backbone", ["test_convnext", "test_resnet", "test_efficientnet", "mlp_mixer", "swin"])
def test_tables_can_be_applied_to_any_backbone(backbone: str) -> None:
    """For a file of one tower, all tables of its family are tried, which do not fit most backbones."""
    name = {"mlp_mixer": "mixer_s32_224", "swin": "swin_tiny_patch4_window7_224"}.get(backbone, backbone)
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0).state_dict()
    for layout in VITS:
        theirs = rename(
            {f"trunk.{key}": value for key, value in state.items()}, TimmConfig.names[layout].rows, to_theirs=True
        )
        assert len(theirs) >= len(state)


def test_siglip_files_are_described_with_their_training_settings(tmp_path: Path) -> None:
    """The activation is Flax's tanh approximation; open_clip's registry has the exact gelu."""
    path = tmp_path / "siglip.npz"
    np.savez(path, **below("params/", siglip()))
    about = describe(path)
    assert (about.activation, about.mean, about.std) == (Activation.gelu_tanh, [0.5] * 3, [0.5] * 3)
    assert about.resize_mode is ResizeMode.squash
    np.savez(path, **image_tower(stacked=False))
    assert describe(path).activation is None


def test_arrays_of_every_dtype_are_read(tmp_path: Path) -> None:
    """Including bfloat16, for which NumPy has no type, Fortran order, and the other byte order; texts and dates are left out."""
    expected = torch.arange(6.0).reshape(2, 3)
    array = expected.numpy()
    np.savez(
        tmp_path / "a.npz",
        bfloat16=expected.bfloat16().view(torch.int16).numpy().view("V2"),
        columns=np.asfortranarray(array),
        bytes_swapped=array.astype(">f4"),
        half=array.astype(np.float16),
        scalar=np.float32(3.0),
        text=np.array("a note"),
        **{"img/embedding/kernel": array, "txt/a": array},
    )
    found = _read_npz(tmp_path / "a.npz", with_values=True)
    assert set(found) == {"bfloat16", "columns", "bytes_swapped", "half", "scalar", "img.embedding.kernel", "txt.a"}
    assert found["bfloat16"].dtype is torch.bfloat16
    assert found["scalar"].shape == ()
    assert all(torch.equal(found[name].float(), expected) for name in ("bfloat16", "columns", "bytes_swapped", "half"))
    shapes = _read_npz(tmp_path / "a.npz", with_values=False)
    assert {(name, value.shape, value.dtype) for name, value in shapes.items()} == {
        (name, value.shape, value.dtype) for name, value in found.items()
    }
    assert all(value.is_meta for value in shapes.values())


def with_header(shape: tuple[int, ...]) -> bytes:
    """Return an array file of four bytes whose header has `shape`."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.npy": with_header((10**12,))}, "is not a valid NumPy file (a.npy: the size does not match the header)"),
        ({"a.npy": b"not an array"}, "is not a valid NumPy file"),
        ({"a.npy": b""}, "is not a valid NumPy file"),
        ({"a.npy": with_header((1,)), "b.txt": b""}, "is a zip archive without weights of torch or NumPy"),
        ({"a.npy": with_header((1,))[:-3]}, "the size does not match the header"),
    ],
)
def test_damaged_files_are_named(members: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert reason in str(caught.value)


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.npz"
    np.savez(path, **siglip())
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="is truncated: its end is missing"):
        read_weights(path)


def test_compressed_arrays_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "packed.npz"
    np.savez_compressed(path, zeros=np.zeros(10**6))
    with pytest.raises(CheckpointError, match=r"compressed records \(8,\d+,\d+ bytes.* write it with numpy\.savez"):
        read_weights(path)


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_in_an_array_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path, ran = tmp_path / "bad.npz", tmp_path / "ran"
    np.savez(path, **{"img/embedding/kernel": np.array([RunsCode(ran)], dtype=object)})
    with pytest.raises(CheckpointError, match=r"unsafe: its array img/embedding/kernel\.npy is a pickle"):
        read_weights(path)
    assert not ran.exists()
