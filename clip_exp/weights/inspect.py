"""Detection of the format of weights and of their training settings, from file names, first bytes and configuration files.

Neither imports torch nor executes anything in a file. The shapes of weights do not show the activation or the
preprocessing of the training images: weights trained with `quick_gelu` load into a model with `gelu`, but score worse.
Formats with a configuration contain these settings; for OpenAI's files they are known.
"""

import json
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clip_exp.checkpoints.folders import EMA_WEIGHTS, WEIGHTS
from clip_exp.config.base import parse, plain
from clip_exp.config.files import read_run_config, read_yaml, require_literal
from clip_exp.config.model import HERE, Activation, ImageTowerConfig, Interpolation, ModelConfig, ResizeMode, Tower
from clip_exp.config.names import known_models
from clip_exp.config.targets import require_allowed
from clip_exp.errors import CheckpointError, ClipExpError, ConfigError
from clip_exp.models.families.published import (
    ACTIVATIONS,
    describes,
    has_activation_of_description,
    is_huggingface_config,
    is_open_clip_description,
    model_config_of,
    model_of_description,
)
from clip_exp.open_clip_files import Entry
from clip_exp.runs import with_saved_tokenizer
from clip_exp.storage import LFS_POINTER

# In a folder, the first existing file is read. A folder of open_clip may also contain the image tower alone as
# `model.safetensors`.
IN_FOLDER = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX = ".index.json"
PICKLE = b"\x80"
TORCHSCRIPT, PICKLED = "constants.pkl", "data.pkl"
# Maximum size in bytes of the header of a safetensors file, which is the library's own limit, and of JSON files
MAX_JSON = 100_000_000
# Key in the metadata of a safetensors file for the configuration of its model as JSON
OUR_METADATA = "clip_exp.model"
# Stems of weights files that a `config.json` in the same folder describes
DESCRIBED_BY_CONFIG = ("model", "pytorch_model")
# Maximum size in bytes of a pickle or program to search; those of large models have one million
MAX_TEXT = 20_000_000
# Pillow's numbers of interpolation modes
RESAMPLING = {2: Interpolation.bilinear, 3: Interpolation.bicubic}


class Format(StrEnum):
    """File formats of weights."""

    safetensors = "safetensors"
    torch = "torch"
    torchscript = "TorchScript"
    npz = "NumPy"


def weight_files(path: Path) -> list[Path]:
    """Return the files with a model's weights: a single file, or the parts of a sharded one.

    Args:
        path: file, index of a sharded model, or folder written by Hugging Face, open_clip or DeepSpeed.

    Raises:
        CheckpointError: there are no weights, a part is missing, or the weights are DeepSpeed's ZeRO shards.
    """
    if path.is_dir():
        found = next((path / name for name in IN_FOLDER if (path / name).is_file()), None) or _of_deepspeed(path)
        if found is None:
            raise CheckpointError(
                f"{path} has no weights: the folder must contain one of {', '.join(IN_FOLDER)}, or a DeepSpeed checkpoint."
            )
        path = found
    if not path.is_file():
        raise CheckpointError(f"{path}: file not found. Give a .safetensors, .pt or .bin file, or a folder.")
    return _parts(path) if path.name.endswith(INDEX) else [path]


def _of_deepspeed(folder: Path) -> Path | None:
    """Return DeepSpeed's file with the complete weights, in the folder that the file `latest` names or in this one; None if there is none."""
    latest = folder / "latest"
    name = latest.read_bytes()[:255].decode("utf-8", "replace").strip() if latest.is_file() else ""
    checkpoint = folder / name if name.isprintable() and Path(name).name == name else folder
    files = sorted(path for path in checkpoint.glob("*mp_rank_*_model_states.pt") if path.is_file())
    if any(file.name.startswith("zero_pp_rank_") for file in files):
        raise CheckpointError(
            f"{folder} contains shards of DeepSpeed ZeRO-3. Merge them with DeepSpeed's script in that folder "
            f"(python {folder / 'zero_to_fp32.py'} {folder} OUTPUT), and give its output."
        )
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: DeepSpeed model parallelism over {len(files)} ranks is not supported. Merge the parts, and give the result."
        )
    return files[0] if files else None


def part_names(index: Path) -> list[str]:
    """Return the names of the parts of a sharded model, which are in the folder of its index.

    Raises:
        CheckpointError: the index is invalid, or names files in other folders.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no valid `weight_map` from weights to files. Download it again.")
    parts = sorted(set(names.values()))
    if outside := [
        part for part in parts if part in ("", "..") or Path(part).name != part or "\0" in part or len(part) > 255
    ]:
        raise CheckpointError(
            f"{index} names files outside its folder ({outside[0]!r}). Download it from its publisher."
        )
    return parts


def _parts(index: Path) -> list[Path]:
    parts = [index.parent / name for name in part_names(index)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(parts)} parts are missing: {', '.join(missing[:5])}. Download them."
        )
    return parts


def format_of(path: Path) -> Format:
    """Return the format of a file, detected by its first bytes, and check that the file is complete.

    Raises:
        CheckpointError: the file is truncated, or does not contain weights: a web page, a Git LFS pointer, or another
            format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty. Download it again.")
    if start.startswith(LFS_POINTER):
        raise CheckpointError(f"{path} is a Git LFS pointer instead of the file itself. Run `git lfs pull` there.")
    # In a safetensors file, the header follows 8 bytes that may have any values.
    header = start[8:9] == b"{"
    if not header and start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise CheckpointError(
            f"{path} is a web page instead of weights. Download the file itself, after logging in if necessary."
        )
    if start.startswith(b"PK"):
        return _format_of_zip(path)
    if header or path.suffix == ".safetensors":
        read_safetensors_header(path, size)
        return Format.safetensors
    if start.startswith(PICKLE):
        return Format.torch
    raise CheckpointError(
        f"{path} does not contain weights in a supported format: safetensors, torch, TorchScript, or NumPy's .npz."
    )


def _format_of_zip(path: Path) -> Format:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is truncated: its end is missing. Download it again.")
    if arrays := npz_members(path):
        _refuse_packed(path, arrays, "numpy.savez")
        return Format.npz
    names = zip_members(path)
    if PICKLED not in names:
        raise CheckpointError(
            f"{path} is a zip archive without weights of torch or NumPy. Give a .safetensors, .pt, .bin or .npz file."
        )
    _refuse_packed(
        path, [info for name, info in names.items() if name == PICKLED or name.startswith("data/")], "torch.save"
    )
    return Format.torchscript if TORCHSCRIPT in names else Format.torch


def _refuse_packed(path: Path, records: list[zipfile.ZipInfo], writer: str) -> None:
    """Raise a CheckpointError if records are compressed, since a few bytes could expand to any size."""
    unpacked, size = sum(info.file_size for info in records), path.stat().st_size
    if unpacked > size:
        raise CheckpointError(
            f"{path} has compressed records ({unpacked:,} bytes in a file of {size:,} bytes), which are not supported. Download it again, "
            f"or write it with {writer}."
        )


def npz_members(path: Path) -> list[zipfile.ZipInfo]:
    """Return the members of an archive of NumPy arrays; empty for another kind of archive, or a damaged one.

    Raises:
        CheckpointError: two members have the same name, so that readers may disagree on the content.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:
        # `zip_members` will report the problem.
        return []
    if not all(info.filename.endswith(".npy") for info in members):
        return []
    _refuse_twice(path, [info.filename for info in members])
    return members


def zip_members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members of a zip file of torch by their names under its top folder.

    Raises:
        CheckpointError: the archive is damaged, or two members have the same name, so that readers may disagree on the
            content.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(info.filename.partition("/")[2], info) for info in archive.infolist()]
    except Exception as error:
        # A damaged archive can cause any exception.
        raise CheckpointError(f"{path} is a damaged archive ({error}). Download it again.") from error
    _refuse_twice(path, [name for name, _ in members])
    return dict(members)


def _refuse_twice(path: Path, names: list[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        raise CheckpointError(f"{path} is a damaged archive (it has two records {twice[0]}). Download it again.")


def read_safetensors_header(path: Path, size: int) -> dict[str, Any]:
    """Read the header of a safetensors file: names, shapes and offsets of the tensors, and `__metadata__`.

    The header is JSON, after 8 bytes with its length.

    Args:
        path: path of the file.
        size: size of the file in bytes.

    Raises:
        CheckpointError: the header is invalid, or the file is truncated.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_JSON + 1
        text = file.read(length) if length <= MAX_JSON else b""
    try:
        header = json.loads(text)
        end = max(
            (int(value["data_offsets"][1]) for name, value in header.items() if name != "__metadata__"), default=0
        )
    except Exception as error:
        # A damaged header can cause any exception.
        raise CheckpointError(
            f"{path} is not a valid safetensors file. Download it again, or write it again."
        ) from error
    if size < 8 + length + end:
        raise CheckpointError(f"{path} is truncated: it has {size:,} of {8 + length + end:,} bytes. Download it again.")
    return header


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        CheckpointError: the file is not JSON, is not an object, or is too large.
    """
    if (size := path.stat().st_size) > MAX_JSON:
        raise CheckpointError(f"{path} is too large for a configuration: {size:,} bytes. Download it again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object. Download it again.")
    return content


@dataclass(frozen=True)
class About:
    """Format and training settings of weights, known before they are read. None: unknown.

    Attributes:
        format: name of the format, for messages.
        activation: activation of the MLPs.
        mean: mean of the RGB channels for pixels in 0..1.
        std: standard deviation of the RGB channels.
        interpolation: interpolation of the images.
        resize_mode: resizing of the images.
        model: configuration of the model.
    """

    format: str
    activation: Activation | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: Interpolation | None = None
    resize_mode: ResizeMode | None = None
    model: ModelConfig | None = None


@dataclass(frozen=True)
class Found:
    """Weights on disk.

    Attributes:
        path: file, or folder that `read_weights` reads.
        about: format and training settings.
        description: description of the weights, for messages and `run.json`.
        tower: image or text, if only this tower starts from the weights; None: the whole model.
    """

    path: Path
    about: About
    description: str
    tower: str | None = None


def describe(path: str | Path) -> About:
    """Return the format and training settings of weights.

    The sources are, in this order: the metadata of a safetensors file that clip_exp exported; a run's `config.yaml`; an
    `open_clip_config.json` next to the file; a `config.json` of transformers or FlagAI next to `model.safetensors` or
    `pytorch_model.bin`; the program of a TorchScript archive; the names that only OpenAI's state dicts have.

    Args:
        path: file or folder as for `read_weights`, or a run folder.

    Raises:
        CheckpointError: there are no weights, a file is damaged, or the configuration is not supported.
    """
    path = Path(path).expanduser()
    try:
        about = _describe(path)
        return about if about.model is None else replace(about, model=_checked(plain(about.model), path))
    except (ClipExpError, PermissionError):
        raise
    except Exception as error:
        # A damaged configuration can cause any exception.
        raise CheckpointError(
            f"{path}: the configuration of the model, in the file or next to it, cannot be read ({_first_line(error)}). Download it "
            "again, or copy the weights file to a separate folder and give it with model=NAME."
        ) from error


def _checked(values: dict[str, Any], path: Path) -> ModelConfig:
    """Validate the configuration of a model from a third party.

    Raises:
        CheckpointError: a key is unknown, a value is invalid, or there are interpolations.
        TargetNotAllowedError: it names custom code that is not allowed.
    """
    require_literal(values, str(path))
    require_allowed({"model": values}, str(path))
    try:
        return parse(ModelConfig, values, "model.")
    except ConfigError as error:
        lines = str(error).splitlines()
        raise CheckpointError(
            "\n".join(f"{path}: invalid configuration of the model: {line}" for line in lines)
        ) from error


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
    config_json = file.parent / "config.json"
    is_standard = file.name.partition(".")[0].partition("-0")[0] in DESCRIBED_BY_CONFIG or path.name.endswith(INDEX)
    if is_standard and config_json.is_file() and (about := _of_config_json(config_json)) is not None:
        return about
    if kind is Format.torchscript:
        return About("TorchScript archive", _activation_in_program(file))
    if kind is Format.npz and _is_siglip(file):
        # SigLIP resizes both sides of an image and scales pixels to -1..1; Flax's gelu is the tanh approximation.
        half = [0.5] * 3
        return About("big_vision's SigLIP", Activation.gelu_tanh, half, half, resize_mode=ResizeMode.squash)
    if kind is Format.torch and _is_openai(file):
        return About("OpenAI's state dict", Activation.quick_gelu)
    return About(f"{kind} file")


def _of_model(format: str, model: ModelConfig) -> About:
    image = model.image
    return About(format, model.activation, image.mean, image.std, image.interpolation, image.resize_mode, model)


def _exported_model(file: Path) -> ModelConfig | None:
    metadata = read_safetensors_header(file, file.stat().st_size).get("__metadata__")
    if not isinstance(metadata, dict) or OUR_METADATA not in metadata:
        return None
    try:
        values = json.loads(metadata[OUR_METADATA])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the metadata {OUR_METADATA} is not valid JSON. Export it again.") from error
    model = _checked(values, file)
    if model.text.tokenizer == HERE:
        model.text.tokenizer = str(file.parent)
    return model


def _run_config(folder: Path) -> ModelConfig | None:
    """Return the model of the run whose `config.yaml` is in `folder`; None for a `config.yaml` of another program."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        values: Any = OmegaConf.to_container(read_yaml(path))
    except Exception:
        # The file may be that of another program.
        return None
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or "embed_dim" not in model:
        return None
    return with_saved_tokenizer(read_run_config(folder).model, folder)


def _run_of(file: Path) -> ModelConfig | None:
    """Return the model of the run that a file of a checkpoint belongs to: `<run>/checkpoints/<step>/<file>`."""
    parents = file.resolve().parents
    return _run_config(parents[2]) if len(parents) > 2 and parents[1].name == "checkpoints" else None


def _of_open_clip(path: Path) -> About:
    content = read_json(path)
    description, preprocessing = content.get("model_cfg", {}), content.get("preprocess_cfg", {})
    about = _of_description(description, path.parent.name, default=Activation.gelu)
    try:
        images = About(
            "open_clip folder",
            mean=_numbers(preprocessing.get("mean")),
            std=_numbers(preprocessing.get("std")),
            interpolation=_optional(Interpolation, preprocessing.get("interpolation")),
            resize_mode=_optional(ResizeMode, preprocessing.get("resize_mode")),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: preprocess_cfg has an unsupported value: {error}.") from error
    return _with_model(images, about.activation, about.model)


def _with_model(images: About, activation: Activation | None, model: ModelConfig | None) -> About:
    """Add an activation and a model to the settings of images, and set the same settings in the model's configuration."""
    names = ("mean", "std", "interpolation", "resize_mode")
    known = {name: getattr(images, name) for name in names if getattr(images, name) is not None}
    if model is not None:
        model = model.model_copy(update={"image": model.image.model_copy(update=known)})
    return replace(images, activation=activation, model=model)


def _of_description(description: dict[str, Any], name: str, default: Activation) -> About:
    """Return the settings from open_clip's configuration of a model, which names only the activation quick_gelu."""
    if not is_open_clip_description(description):
        return About("folder")
    model = described_model(description, name)
    if model is not None and not has_activation_of_description(model):
        return About("folder", model.activation, model=model)
    activation = Activation.quick_gelu if description.get("quick_gelu") else default
    if "quick_gelu" in description and not description["quick_gelu"]:
        activation = Activation.gelu
    return About("folder", activation, model=model.model_copy(update={"activation": activation}) if model else None)


def described_model(description: dict[str, Any], name: str) -> ModelConfig | None:
    """Return the model for open_clip's configuration: one with clip_exp's towers, or an option of `conf/model/`; None if unsupported."""
    return model_of_description(description, name) or next(
        (option for option in known_models() if describes(description, option.open_clip_name)), None
    )


def _of_config_json(path: Path) -> About | None:
    config = read_json(path)
    if is_open_clip_description(config):
        # FlagAI's published weights are OpenAI's, though its configuration may not name the activation.
        return replace(_of_description(config, path.parent.name, default=Activation.quick_gelu), format="FlagAI folder")
    if not is_huggingface_config(config):
        if isinstance(trained := config.get("pretrained_cfg"), dict):
            interpolation = trained.get("interpolation")
            return About(
                "timm folder",
                mean=_numbers(trained.get("mean")),
                std=_numbers(trained.get("std")),
                interpolation=Interpolation(interpolation) if interpolation in list(Interpolation) else None,
            )
        kind = config.get("model_type")
        if not isinstance(kind, str):
            return None
        return replace(
            _image_processing(path.parent),
            format=f"weights file next to a config.json with model_type={kind}",
            activation=ACTIVATIONS.get(str(config.get("hidden_act"))),
        )
    model = model_config_of(config, path.parent).model_copy(update={"name": path.parent.name})
    return _with_model(_image_processing(path.parent), model.activation, model)


def _image_processing(folder: Path) -> About:
    """Return the settings of images in a Hugging Face folder: `preprocessor_config.json`, or `processor_config.json` of newer versions."""
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
    """Return the activation in a TorchScript archive: QuickGELU, as OpenAI's, unless its program calls gelu.

    The text of the program is searched, not executed.
    """
    members = zip_members(archive)
    program = [info for name, info in members.items() if name.startswith("code/") and name.endswith(".py")]
    if sum(info.file_size for info in program) > MAX_TEXT:
        raise CheckpointError(f"{archive}: its program is too large for a model. Download it from its publisher.")
    with zipfile.ZipFile(archive) as opened:
        calls_gelu = any(b"torch.gelu(" in opened.read(info) for info in program)
    return Activation.gelu if calls_gelu else Activation.quick_gelu


def _is_openai(file: Path) -> bool:
    """Return True if a torch file contains `input_resolution`, which only OpenAI stores with the weights. A pickle has names as plain text."""
    if not zipfile.is_zipfile(file):
        return False
    pickled = zip_members(file)[PICKLED]
    with zipfile.ZipFile(file) as opened:
        return pickled.file_size < MAX_TEXT and b"input_resolution" in opened.read(pickled)


def _is_siglip(file: Path) -> bool:
    """Return True if a NumPy archive has an image tower with attention pooling, and a text tower."""
    names = [info.filename.removeprefix("params/") for info in npz_members(file)]
    return any(name.startswith("img/MAPHead_0/") for name in names) and any(name.startswith("txt/") for name in names)


def _numbers(values: Any) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


def _optional(cls: Any, value: Any) -> Any:
    return None if value is None else cls(value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def activation_of_entry(listed: Entry, model: ModelConfig) -> Activation | None:
    """Return the activation of published weights; None for the architecture's own activation.

    The registry marks only `quick_gelu`. Without the mark, the activation is gelu, unless the architecture defines its
    own.
    """
    if listed.quick_gelu:
        return Activation.quick_gelu
    own = model.activation is Activation.gelu_tanh or model.image.own_activation
    return None if own and model.activation is not Activation.quick_gelu else Activation.gelu


def activation_contradiction(model: ModelConfig, trained: Activation | None, description: str) -> str | None:
    """Return an error message if the configuration has another activation than the weights; None otherwise.

    Args:
        model: configuration of the model.
        trained: activation that the weights were trained with; None: unknown.
        description: description of the weights, for the message.
    """
    if trained is None or model.activation in (None, trained) or not model.uses_activation:
        return None
    return (
        f"model.activation={model.activation}, but {description} was trained with {trained}: leave it out, or give weights that were "
        f"trained with {model.activation}."
    )


PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def resolve_model(model: ModelConfig, *starts: Found) -> ModelConfig:
    """Fill in the values of a model's configuration that are not set with those of the weights. The decisions are printed.

    The preprocessing of images may be set to other values than in the training of the weights; the activation may not.

    Args:
        model: configuration of the model.
        starts: weights of the model, or of its towers.

    Raises:
        ConfigError: the configuration does not fit the weights, or the weights of one tower do not fit those of the
            other.
    """
    if problems := [problem for found in starts for problem in _contradictions(model, found)]:
        raise ConfigError("\n".join(problems))
    resolved = model
    for found in starts:
        if found.tower != "text":
            resolved = resolved.model_copy(update={"image": _filled(model.image, found.about)})
    acting = [found for found in starts if any(tower.takes_activation for tower in _of(model, found))]
    if model.activation is not None or not acting:
        return resolved
    trained = {
        activation: found.description for found in acting if (activation := _activation_of(model, found)) is not None
    }
    if len(trained) > 1:
        activations = " and ".join(f"{name} was trained with {activation}" for activation, name in trained.items())
        raise ConfigError(
            f"{activations}, but model.activation applies to both towers: give weights with the same activation."
        )
    for activation, name in trained.items():
        _report(f"model.activation={activation}: the activation of the weights {name}")
        return resolved.model_copy(update={"activation": activation})
    if any(tower.takes_activation and not tower.own_activation for found in acting for tower in _of(model, found)):
        _report(
            f"model.activation=gelu: the activation of {' and '.join(found.description for found in acting)} is unknown. If the weights "
            "were trained with quick_gelu, as OpenAI's models and their descendants, set model.activation=quick_gelu."
        )
        return resolved.model_copy(update={"activation": Activation.gelu})
    return resolved


def as_resolved(model: ModelConfig, earlier: ModelConfig) -> ModelConfig:
    """Fill in the values of a model's configuration that are not set with those of `earlier`, a resolved configuration."""
    filled = {name: getattr(earlier.image, name) for name in PREPROCESSING if getattr(model.image, name) is None}
    return model.model_copy(
        update={
            "activation": model.activation or earlier.activation,
            "image": model.image.model_copy(update=filled),
            "text": model.text.as_resolved(earlier.text),
        }
    )


def _contradictions(model: ModelConfig, found: Found) -> Iterator[str]:
    acts = any(tower.takes_activation for tower in _of(model, found))
    if acts and (problem := activation_contradiction(model, _activation_of(model, found), found.description)):
        yield problem
    theirs = found.about.model
    if theirs is None or not (differing := list(_differing(model, theirs, found.tower))):
        return
    alike = (each for each in known_models() if _kinds(each) == _kinds(theirs))
    known = [each for each in alike if not list(_differing(each, theirs, found.tower))]
    known.sort(key=lambda each: each.image.image_size != theirs.image.image_size)
    hint = f"Set model={known[0].name}." if known else "Set these keys, or select the model of the weights."
    yield f"{found.description} does not fit model={model.name}: {', '.join(differing)}. {hint}"


def _of(model: ModelConfig, found: Found) -> tuple[Tower, ...]:
    """Return the configurations of the towers that start from the weights."""
    return model.towers if found.tower is None else (getattr(model, found.tower),)


def _differing(ours: ModelConfig, theirs: ModelConfig, tower: str | None) -> Iterator[str]:
    """Yield the values that change the shapes of weights, or the output for the same weights.

    Input sizes are not compared, since position embeddings are interpolated.
    """
    if ours.embed_dim != theirs.embed_dim and tower is None:
        yield f"model.embed_dim={theirs.embed_dim} instead of {ours.embed_dim}"
    for name, here, there in zip(("image", "text"), ours.towers, theirs.towers, strict=True):
        if tower not in (None, name):
            continue
        # A tower of open_clip may be equivalent to one of another kind.
        if here.kind != there.kind and (here.foreign or there.foreign):
            continue
        keys = ("kind", *here.architecture_keys) if here.kind == there.kind else ("kind",)
        for key in keys:
            if getattr(here, key) != getattr(there, key):
                yield f"model.{name}.{key}={getattr(there, key)} instead of {getattr(here, key)}"


def _kinds(model: ModelConfig) -> list[str]:
    return [tower.kind for tower in model.towers]


def _activation_of(model: ModelConfig, found: Found) -> Activation | None:
    """Return the activation of weights; None if unknown.

    Weights with a configuration that names no activation have gelu. Towers of open_clip define their own default.
    """
    about = found.about
    if about.activation or about.model is None or model.image.own_activation:
        return about.activation
    return about.model.activation or Activation.gelu


def _filled(image: ImageTowerConfig, about: About) -> ImageTowerConfig:
    open_fields = [name for name in PREPROCESSING if getattr(image, name) is None]
    return image.model_copy(update={name: getattr(about, name) for name in open_fields})


def _report(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def note_architecture(model: ModelConfig, own_weights: Collection[str] = ("image", "text")) -> ModelConfig:
    """Return a configuration with the architecture of towers of other libraries, so that it can be built without looking them up again.

    Args:
        model: configuration of the model.
        own_weights: towers, image and text, that start from weights of their own library if the configuration says so.

    Raises:
        ConfigError: the configuration of an encoder is not available, or a backbone is unknown.
    """
    return model.model_copy(
        update={
            "image": model.image.resolved("image" in own_weights),
            "text": model.text.resolved("text" in own_weights),
        }
    )
