"""What a file or folder of weights is, and what it tells about how they were made: looked up in names, first bytes and descriptions.

Without torch, and nothing that a file holds is executed. Shapes do not tell a model's nonlinearity, nor what happened to the images it
was trained on: weights of `quick_gelu` load into a model of `gelu` and score worse. Formats that come with a configuration do tell, and so
do OpenAI's own files.
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

# In a folder the first that exists is read. A folder of open_clip may also hold the image tower alone as `model.safetensors`.
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
MAX_JSON = 100_000_000  # bytes, of a safetensors file's header, which is the library's own limit, and of files of JSON
OUR_METADATA = "clip_exp.model"  # in a safetensors file: its model's configuration as JSON
BESIDE_CONFIG = ("model", "pytorch_model")  # files that a `config.json` beside them is about
MAX_TEXT = 20_000_000  # bytes of a pickle or program that are searched; those of large models have one million
RESAMPLING = {2: Interpolation.bilinear, 3: Interpolation.bicubic}  # Pillow's numbers


class Format(StrEnum):
    """How a file of weights is written."""

    safetensors = "safetensors"
    torch = "torch"
    torchscript = "TorchScript"
    npz = "NumPy"


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights: one, or the parts of a large one.

    Args:
        path: a file, the index of a model in parts, or a folder as Hugging Face, open_clip and DeepSpeed write them.

    Raises:
        CheckpointError: there is none, or a part is missing, or the weights are in DeepSpeed's shards.
    """
    if path.is_dir():
        found = next((path / name for name in IN_FOLDER if (path / name).is_file()), None) or _of_deepspeed(path)
        if found is None:
            raise CheckpointError(
                f"{path}: no weights in this folder. It needs one of {', '.join(IN_FOLDER)}, or a checkpoint of DeepSpeed's."
            )
        path = found
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file of weights. Give a .safetensors, .pt or .bin file, or a folder.")
    return _parts(path) if path.name.endswith(INDEX) else [path]


def _of_deepspeed(folder: Path) -> Path | None:
    """Return the file of the whole weights in the folder that `latest` names, or in this one."""
    latest = folder / "latest"
    name = latest.read_bytes()[:255].decode("utf-8", "replace").strip() if latest.is_file() else ""
    checkpoint = folder / name if name.isprintable() and Path(name).name == name else folder
    files = sorted(path for path in checkpoint.glob("*mp_rank_*_model_states.pt") if path.is_file())
    if any(file.name.startswith("zero_pp_rank_") for file in files):
        raise CheckpointError(
            f"{folder}: shards of DeepSpeed's ZeRO-3, none of which has whole weights. Put them together with the script that DeepSpeed "
            f"wrote there (python {folder / 'zero_to_fp32.py'} {folder} OUTPUT), and give its output."
        )
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: a model that DeepSpeed split over {len(files)} ranks, whose parts are not put together here."
        )
    return files[0] if files else None


def part_names(index: Path) -> list[str]:
    """The files of a model in parts, all in the folder of its index.

    Raises:
        CheckpointError: the index names none, or others.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: has no `weight_map` from weights to files. Fetch it again.")
    parts = sorted(set(names.values()))
    if outside := [
        part for part in parts if part in ("", "..") or Path(part).name != part or "\0" in part or len(part) > 255
    ]:
        raise CheckpointError(f"{index}: names files outside its folder ({outside[0]!r}). Fetch it from its publisher.")
    return parts


def _parts(index: Path) -> list[Path]:
    parts = [index.parent / name for name in part_names(index)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(parts)} parts are missing: {', '.join(missing[:5])}. Fetch them."
        )
    return parts


def format_of(path: Path) -> Format:
    """The format of a file, by its first bytes and whether it has its end.

    Raises:
        CheckpointError: it is cut short, or no weights: a web page, a Git-LFS pointer, another kind of file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path}: an empty file. Fetch it again.")
    if start.startswith(LFS_POINTER):
        raise CheckpointError(f"{path}: a Git-LFS pointer instead of the file itself. Run `git lfs pull` there.")
    header = start[8:9] == b"{"  # of a safetensors file, whose first bytes are a number, and may be any letters
    if not header and start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise CheckpointError(
            f"{path}: a web page instead of weights. Fetch the file itself, logged in where it is asked."
        )
    if start.startswith(b"PK"):
        return _format_of_zip(path)
    if header or path.suffix == ".safetensors":
        read_safetensors_header(path, size)
        return Format.safetensors
    if start.startswith(PICKLE):
        return Format.torch
    raise CheckpointError(
        f"{path}: not weights: neither a safetensors file, a torch file, a TorchScript archive nor NumPy's .npz."
    )


def _format_of_zip(path: Path) -> Format:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: cut short: its end is missing. Fetch it again.")
    if arrays := npz_members(path):
        _refuse_packed(path, arrays, "numpy.savez")
        return Format.npz
    names = zip_members(path)
    if PICKLED not in names:
        raise CheckpointError(
            f"{path}: a zip archive without weights of torch or NumPy. Give a .safetensors, .pt, .bin or .npz file."
        )
    _refuse_packed(
        path, [info for name, info in names.items() if name == PICKLED or name.startswith("data/")], "torch.save"
    )
    return Format.torchscript if TORCHSCRIPT in names else Format.torch


def _refuse_packed(path: Path, records: list[zipfile.ZipInfo], writer: str) -> None:
    """A few bytes of an archive can claim to be any number of them."""
    told, size = sum(info.file_size for info in records), path.stat().st_size
    if told > size:
        raise CheckpointError(
            f"{path}: its records would be {told:,} bytes, out of a file of {size:,}: packed, as weights never are. Fetch "
            f"it again, or write it with {writer}."
        )


def npz_members(path: Path) -> list[zipfile.ZipInfo]:
    """Return the members of an archive of NumPy's arrays; none where it is another kind of archive, or a damaged one.

    Raises:
        CheckpointError: it has two members of a name, of which readers take one or the other.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:  # `zip_members` says what is wrong
        return []
    if not all(info.filename.endswith(".npy") for info in members):
        return []
    _refuse_twice(path, [info.filename for info in members])
    return members


def zip_members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members of torch's zip files by their names below the one top folder.

    Raises:
        CheckpointError: the archive is damaged, or has two members of a name, of which readers take one or the other.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(info.filename.partition("/")[2], info) for info in archive.infolist()]
    except Exception as error:  # a damaged directory can break the reader in any way
        raise CheckpointError(f"{path}: a damaged archive ({error}). Fetch it again.") from error
    _refuse_twice(path, [name for name, _ in members])
    return dict(members)


def _refuse_twice(path: Path, names: list[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        raise CheckpointError(f"{path}: a damaged archive (its record {twice[0]} is there twice). Fetch it again.")


def read_safetensors_header(path: Path, size: int) -> dict[str, Any]:
    """Names, shapes and places of the tensors, and `__metadata__`: JSON behind 8 bytes that tell its length.

    Args:
        size: of the file, bytes.

    Raises:
        CheckpointError: not such a header, or the file ends before its tensors do.
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
    except Exception as error:  # a damaged header can break its reader in any way
        raise CheckpointError(f"{path}: not a readable safetensors file. Fetch or write it again.") from error
    if size < 8 + length + end:
        raise CheckpointError(f"{path}: cut short: {size:,} of {8 + length + end:,} bytes. Fetch it again.")
    return header


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: not JSON, something other than an object, or more than any model needs.
    """
    if (size := path.stat().st_size) > MAX_JSON:
        raise CheckpointError(f"{path}: {size:,} bytes of JSON, where a model needs thousands. Fetch it again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object. Fetch it again.")
    return content


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


@dataclass(frozen=True)
class Found:
    """Weights on this disk."""

    path: Path  # a file, or a folder that `read_weights` reads
    about: About
    told: str  # what they are, for people and for `run.json`
    tower: str | None = None  # image or text: the weights are wanted for that tower alone


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
        return parse(ModelConfig, values, "model.")
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
    if kind is Format.npz and _is_siglip(file):
        # Both sides of an image to size, pixels in -1..1; Flax's gelu is that of tanh.
        half = [0.5] * 3
        return About("big_vision's SigLIP", Activation.gelu_tanh, half, half, resize_mode=ResizeMode.squash)
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
        images = About(
            "open_clip folder",
            mean=_numbers(preprocessing.get("mean")),
            std=_numbers(preprocessing.get("std")),
            interpolation=_optional(Interpolation, preprocessing.get("interpolation")),
            resize_mode=_optional(ResizeMode, preprocessing.get("resize_mode")),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: preprocess_cfg asks for something that is not there: {error}.") from error
    return _with_model(images, about.activation, about.model)


def _with_model(images: About, activation: Activation | None, model: ModelConfig | None) -> About:
    """What is known of the images, together with a model whose configuration says the same."""
    names = ("mean", "std", "interpolation", "resize_mode")
    known = {name: getattr(images, name) for name in names if getattr(images, name) is not None}
    if model is not None:
        model = model.model_copy(update={"image": model.image.model_copy(update=known)})
    return replace(images, activation=activation, model=model)


def _of_description(description: dict[str, Any], name: str, default: Activation) -> About:
    """Of an architecture in open_clip's words, which name no activation but quick_gelu."""
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
    """Return the model that open_clip's words describe: of towers of ours, or an option of `conf/model/`; None: neither."""
    return model_of_description(description, name) or next(
        (option for option in known_models() if describes(description, option.open_clip_name)), None
    )


def _of_config_json(path: Path) -> About | None:
    config = read_json(path)
    if is_open_clip_description(config):  # FlagAI's published weights are OpenAI's; its configuration may not say so
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
        told = f"file of weights beside a config.json of model_type={kind}"
        return replace(
            _image_processing(path.parent), format=told, activation=ACTIVATIONS.get(str(config.get("hidden_act")))
        )
    model = model_config_of(config, path.parent).model_copy(update={"name": path.parent.name})
    return _with_model(_image_processing(path.parent), model.activation, model)


def _image_processing(folder: Path) -> About:
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


def _is_siglip(file: Path) -> bool:
    """Return whether an archive of NumPy's names an image tower that pools by attention, and a text tower."""
    names = [info.filename.removeprefix("params/") for info in npz_members(file)]
    return any(name.startswith("img/MAPHead_0/") for name in names) and any(name.startswith("txt/") for name in names)


def _numbers(values: Any) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


def _optional(cls: Any, value: Any) -> Any:
    return None if value is None else cls(value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def activation_of_entry(listed: Entry, model: ModelConfig) -> Activation | None:
    """Of published weights; None where they have the architecture's own.

    The registry marks `quick_gelu` alone. Without the mark it is gelu, where the architecture is not one of another kind.
    """
    if listed.quick_gelu:
        return Activation.quick_gelu
    own = model.activation is Activation.gelu_tanh or model.image.own_activation
    return None if own and model.activation is not Activation.quick_gelu else Activation.gelu


def activation_contradiction(model: ModelConfig, trained: Activation | None, told: str) -> str | None:
    """What to say where the configuration names another activation than that of training."""
    if trained is None or model.activation in (None, trained) or not model.uses_activation:
        return None
    return (
        f"model.activation={model.activation}, but {told} was trained with {trained}: leave it out, or give weights that were "
        f"trained with {model.activation}."
    )


PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def settle(model: ModelConfig, *starts: Found) -> ModelConfig:
    """The configuration with what it leaves open filled in from the weights; what was decided is printed.

    What images go through may be set to something else than in training; the nonlinearity may not.

    Args:
        starts: weights of the model, or of its towers.

    Raises:
        ConfigError: the configuration contradicts the weights in what their shapes do not tell, or those of one tower the other's.
    """
    if problems := [problem for found in starts for problem in _contradictions(model, found)]:
        raise ConfigError("\n".join(problems))
    settled = model
    for found in starts:
        if found.tower != "text":
            settled = settled.model_copy(update={"image": _filled(model.image, found.about)})
    acting = [found for found in starts if any(tower.takes_activation for tower in _of(model, found))]
    if model.activation is not None or not acting:
        return settled
    trained = {activation: found.told for found in acting if (activation := _activation_of(model, found)) is not None}
    if len(trained) > 1:
        told = " and ".join(f"{name} was trained with {activation}" for activation, name in trained.items())
        raise ConfigError(f"{told}, and model.activation is that of both towers: give weights of one activation.")
    for activation, name in trained.items():
        _tell(f"activation {activation}, as the weights {name}")
        return settled.model_copy(update={"activation": activation})
    if any(tower.takes_activation and not tower.own_activation for found in acting for tower in _of(model, found)):
        _tell(
            f"activation gelu: {' and '.join(found.told for found in acting)} does not say which its training used. If that was "
            "quick_gelu, as in OpenAI's models and their descendants, set model.activation=quick_gelu."
        )
        return settled.model_copy(update={"activation": Activation.gelu})
    return settled


def as_settled(model: ModelConfig, earlier: ModelConfig) -> ModelConfig:
    """The configuration with what it leaves open filled in as `earlier`, which was settled, has it."""
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
    if acts and (problem := activation_contradiction(model, _activation_of(model, found), found.told)):
        yield problem
    theirs = found.about.model
    if theirs is None or not (differing := list(_differing(model, theirs, found.tower))):
        return
    alike = (each for each in known_models() if _kinds(each) == _kinds(theirs))
    known = [each for each in alike if not list(_differing(each, theirs, found.tower))]
    known.sort(key=lambda each: each.image.image_size != theirs.image.image_size)
    way_out = f"Choose model={known[0].name}." if known else "Set these, or choose the `model` that it is of."
    yield f"{found.told} is of another model than model={model.name}: {', '.join(differing)}. {way_out}"


def _of(model: ModelConfig, found: Found) -> tuple[Tower, ...]:
    """Return the towers that the weights are of."""
    return model.towers if found.tower is None else (getattr(model, found.tower),)


def _differing(ours: ModelConfig, theirs: ModelConfig, tower: str | None) -> Iterator[str]:
    """Yield what makes other weights, or other numbers out of the same ones; sizes of inputs do not: positions are made to fit."""
    if ours.embed_dim != theirs.embed_dim and tower is None:
        yield f"model.embed_dim={theirs.embed_dim} instead of {ours.embed_dim}"
    for name, here, there in zip(("image", "text"), ours.towers, theirs.towers, strict=True):
        if tower not in (None, name):
            continue
        if here.kind != there.kind and (here.foreign or there.foreign):  # open_clip's may be any of the others
            continue
        keys = ("kind", *here.architecture_keys) if here.kind == there.kind else ("kind",)
        for key in keys:
            if getattr(here, key) != getattr(there, key):
                yield f"model.{name}.{key}={getattr(there, key)} instead of {getattr(here, key)}"


def _kinds(model: ModelConfig) -> list[str]:
    return [tower.kind for tower in model.towers]


def _activation_of(model: ModelConfig, found: Found) -> Activation | None:
    """What the weights say; a model whose configuration lies beside them has gelu unless that names another.

    Of open_clip's configurations each has its own, which holds where nothing is said.
    """
    about = found.about
    if about.activation or about.model is None or model.image.own_activation:
        return about.activation
    return about.model.activation or Activation.gelu


def _filled(image: ImageTowerConfig, about: About) -> ImageTowerConfig:
    open_fields = [name for name in PREPROCESSING if getattr(image, name) is None]
    return image.model_copy(update={name: getattr(about, name) for name in open_fields})


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def note_architecture(model: ModelConfig, own_weights: Collection[str] = ("image", "text")) -> ModelConfig:
    """A configuration that says by itself what its towers of other libraries are.

    Args:
        own_weights: towers, image and text, that start from the weights of their own library where the configuration says so.

    Raises:
        ConfigError: the encoder's configuration cannot be had, or there is no such backbone.
    """
    return model.model_copy(
        update={
            "image": model.image.resolved("image" in own_weights),
            "text": model.text.resolved("text" in own_weights),
        }
    )
