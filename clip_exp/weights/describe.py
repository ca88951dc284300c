"""What a file or folder of weights itself tells about how they were made, without torch.

Shapes do not tell a model's nonlinearity, nor what happened to the pictures it was trained on. Formats that come with a
configuration do, and so do OpenAI's own files.
"""

import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clip_exp.checkpoints.writer import EMA_WEIGHTS, WEIGHTS
from clip_exp.config.load import plain, read_run_config, read_yaml, require_literal, strict_dataclass
from clip_exp.config.model_schema import Activation, ImageTower, Interpolation, ModelConfig, ResizeMode
from clip_exp.errors import CheckpointError, ClipExpError, ConfigError
from clip_exp.text.saved import with_saved_tokenizer
from clip_exp.weights.formats import (
    INDEX,
    PICKLED,
    Format,
    format_of,
    read_json,
    read_safetensors_header,
    weight_files,
    zip_members,
)
from clip_exp.weights.huggingface_config import is_huggingface_config, model_config_of
from clip_exp.weights.open_clip_config import is_open_clip_description, model_of_description

OUR_METADATA = "clip_exp.model"  # in a safetensors file: its model's configuration as JSON
HERE = "."  # as the tokenizer in it: in the folder of the file
BESIDE_CONFIG = ("model", "pytorch_model")  # files that a `config.json` beside them is about
MAX_TEXT = 20_000_000  # bytes of a pickle or program that are searched; those of large models have one million
RESAMPLING = {2: Interpolation.bilinear, 3: Interpolation.bicubic}  # Pillow's numbers


@dataclass(frozen=True)
class About:
    """What is known of weights before they are read; None where nothing tells."""

    format: str  # for people
    activation: Activation | None = None
    mean: list[float] | None = None  # RGB, of pixels in 0..1
    std: list[float] | None = None
    interpolation: Interpolation | None = None
    resize_mode: ResizeMode | None = None
    model: ModelConfig | None = None


def describe(path: str | Path) -> About:
    """What weights tell about how they were made.

    Told by, in this order: the metadata of a safetensors file that clip_exp exported; a run's `config.yaml`; an
    `open_clip_config.json` beside the file; a `config.json` beside `model.safetensors` or `pytorch_model.bin`, transformers' or
    FlagAI's; the program of a TorchScript archive; the names that only OpenAI's state dicts have.

    Args:
        path: as for `read_weights`, or a run folder.

    Raises:
        CheckpointError: no weights, a damaged file, or a configuration that no model here can follow.
    """
    path = Path(path).expanduser()
    try:
        about = _describe(path)
        return about if about.model is None else replace(about, model=_checked(plain(about.model), path))
    except (ClipExpError, PermissionError):
        raise
    except Exception as error:  # a damaged configuration can break its reader in any way
        raise CheckpointError(
            f"{path}: what is said about the model, in the file or beside it, cannot be read ({_first_line(error)}). Fetch it "
            "again, or give the file of weights alone, in a folder of its own, with its model."
        ) from error


def _checked(values: dict[str, Any], path: Path) -> ModelConfig:
    """The configuration of a model that somebody else wrote, with the types that ours has.

    Raises:
        CheckpointError: other keys, values of other types, or references.
    """
    require_literal(values, str(path))
    try:
        return strict_dataclass(ModelConfig, values, "model")
    except ConfigError as error:
        lines = str(error).splitlines()
        raise CheckpointError("\n".join(f"{path}: the configuration of its model: {line}" for line in lines)) from error


def _describe(path: Path) -> About:
    if path.is_dir() and (run := _run_config(path)) is not None:
        return _of_model("run folder", run)
    file = weight_files(path)[0]
    kind = format_of(file)
    if kind is Format.safetensors and (model := _exported_model(file)) is not None:
        return _of_model("clip_exp's safetensors", model)
    if file.name in (WEIGHTS, EMA_WEIGHTS) and (run := _run_config(file.resolve().parent) or _run_of(file)) is not None:
        return _of_model("checkpoint of a run", run)
    if (described := file.parent / "open_clip_config.json").is_file():
        return _of_open_clip(described)
    beside = file.parent / "config.json"
    is_standard = file.name.partition(".")[0].partition("-0")[0] in BESIDE_CONFIG or path.name.endswith(INDEX)
    if is_standard and beside.is_file() and (about := _of_config_json(beside)) is not None:
        return about
    if kind is Format.torchscript:
        return About("TorchScript archive", _activation_in_program(file))
    if kind is Format.torch and _is_openai(file):
        return About("OpenAI's state dict", Activation.quick_gelu)
    return About(f"{kind} file")


def _of_model(told: str, model: ModelConfig) -> About:
    image = model.image
    return About(told, model.activation, image.mean, image.std, image.interpolation, image.resize_mode, model)


def _exported_model(file: Path) -> ModelConfig | None:
    metadata = read_safetensors_header(file, file.stat().st_size).get("__metadata__")
    if not isinstance(metadata, dict) or OUR_METADATA not in metadata:
        return None
    try:
        values = json.loads(metadata[OUR_METADATA])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: its metadata {OUR_METADATA} is not JSON. Export it again.") from error
    model = _checked(values, file)
    if model.text.tokenizer == HERE:
        model.text.tokenizer = str(file.parent)
    return model


def _run_config(folder: Path) -> ModelConfig | None:
    """The model of the run whose `config.yaml` lies in `folder`; None for a `config.yaml` of something else."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        values: Any = OmegaConf.to_container(read_yaml(path))
    except Exception:  # any YAML may be called so
        return None
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or "embed_dim" not in model:
        return None
    return with_saved_tokenizer(read_run_config(folder).model, folder)


def _run_of(file: Path) -> ModelConfig | None:
    """The model of the run that a checkpoint's file belongs to: `<run>/checkpoints/<step>/<file>`."""
    parents = file.resolve().parents
    return _run_config(parents[2]) if len(parents) > 2 and parents[1].name == "checkpoints" else None


def _of_open_clip(path: Path) -> About:
    content = read_json(path)
    description, preprocessing = content.get("model_cfg", {}), content.get("preprocess_cfg", {})
    about = _of_description(description, path.parent.name, default=Activation.gelu)
    try:
        pictures = About(
            "open_clip folder",
            mean=_numbers(preprocessing.get("mean")),
            std=_numbers(preprocessing.get("std")),
            interpolation=_optional(Interpolation, preprocessing.get("interpolation")),
            resize_mode=_optional(ResizeMode, preprocessing.get("resize_mode")),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: preprocess_cfg asks for something that is not there: {error}.") from error
    return _with_model(pictures, about.activation, about.model)


def _with_model(pictures: About, activation: Activation | None, model: ModelConfig | None) -> About:
    """What is known of the pictures, together with a model whose configuration says the same."""
    names = ("mean", "std", "interpolation", "resize_mode")
    known = {name: getattr(pictures, name) for name in names if getattr(pictures, name) is not None}
    if model is not None:
        model = replace(model, image=replace(model.image, **known))
    return replace(pictures, activation=activation, model=model)


def _of_description(description: dict[str, Any], name: str, default: Activation) -> About:
    """Of an architecture in open_clip's words, which name no activation but quick_gelu."""
    if not is_open_clip_description(description):
        return About("folder")
    model = model_of_description(description, name)
    if model is not None and model.image.kind not in (ImageTower.vit, ImageTower.resnet):
        return About("folder", model.activation, model=model)
    activation = Activation.quick_gelu if description.get("quick_gelu") else default
    if "quick_gelu" in description and not description["quick_gelu"]:
        activation = Activation.gelu
    return About("folder", activation, model=replace(model, activation=activation) if model else None)


def _of_config_json(path: Path) -> About | None:
    config = read_json(path)
    if is_open_clip_description(config):  # FlagAI's published weights are OpenAI's; its configuration may not say so
        return replace(_of_description(config, path.parent.name, default=Activation.quick_gelu), format="FlagAI folder")
    if not is_huggingface_config(config):
        kind = config.get("model_type")
        return About(f"file of weights beside a config.json of model_type={kind}") if isinstance(kind, str) else None
    model = replace(model_config_of(config), name=path.parent.name)
    if model.image.kind is ImageTower.siglip:
        model.text.tokenizer = str(path.parent)
    return _with_model(_picture_processing(path.parent), model.activation, model)


def _picture_processing(folder: Path) -> About:
    """Of a Hugging Face folder: from `preprocessor_config.json`, or `processor_config.json` as newer versions write."""
    found = next(
        (folder / name for name in ("preprocessor_config.json", "processor_config.json") if (folder / name).is_file()),
        None,
    )
    content = read_json(found) if found else {}
    content = content.get("image_processor", content)
    size, resample = content.get("size"), content.get("resample")
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if resample is not None and resample not in RESAMPLING:
        raise CheckpointError(f"{found}: resample={resample} must be 2 (bilinear) or 3 (bicubic).")
    resize_mode = None
    if isinstance(size, dict):
        resize_mode = ResizeMode.shortest if "shortest_edge" in size else ResizeMode.squash
    return About(
        "Hugging Face folder",
        mean=_numbers(content.get("image_mean")),
        std=_numbers(content.get("image_std")),
        interpolation=RESAMPLING.get(resample),
        resize_mode=resize_mode,
    )


def _activation_in_program(archive: Path) -> Activation:
    """OpenAI's, unless the archive's program calls gelu. Its text is searched, not run."""
    members = zip_members(archive)
    program = [info for name, info in members.items() if name.startswith("code/") and name.endswith(".py")]
    if sum(info.file_size for info in program) > MAX_TEXT:
        raise CheckpointError(f"{archive}: the program in it is larger than any model's. Fetch it from its publisher.")
    with zipfile.ZipFile(archive) as opened:
        calls_gelu = any(b"torch.gelu(" in opened.read(info) for info in program)
    return Activation.gelu if calls_gelu else Activation.quick_gelu


def _is_openai(file: Path) -> bool:
    """Whether a torch file names what OpenAI alone stores beside the weights; a pickle's texts stand in it as they are."""
    if not zipfile.is_zipfile(file):
        return False
    pickled = zip_members(file)[PICKLED]
    with zipfile.ZipFile(file) as opened:
        return pickled.file_size < MAX_TEXT and b"input_resolution" in opened.read(pickled)


def _numbers(values: Any) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


def _optional(cls: Any, value: Any) -> Any:
    return None if value is None else cls(value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
