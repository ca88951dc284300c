"""Which files hold weights, and in which format: told from names and first bytes, before torch is imported."""

import json
import struct
import zipfile
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Any

from clip_exp.errors import CheckpointError
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


class Format(StrEnum):
    """How a file of weights is written."""

    safetensors = "safetensors"
    torch = "torch"
    torchscript = "TorchScript"


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights: one, or the parts of a large one.

    Args:
        path: a file, the index of a model in parts, or a folder as Hugging Face and open_clip write them.

    Raises:
        CheckpointError: there is none, or a part is missing.
    """
    if path.is_dir():
        found = next((path / name for name in IN_FOLDER if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{path}: no weights in this folder. It needs one of {', '.join(IN_FOLDER)}.")
        path = found
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file of weights. Give a .safetensors, .pt or .bin file, or a folder.")
    return _parts(path) if path.name.endswith(INDEX) else [path]


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
    raise CheckpointError(f"{path}: not weights: neither a safetensors file, a torch file nor a TorchScript archive.")


def _format_of_zip(path: Path) -> Format:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: cut short: its end is missing. Fetch it again.")
    names = zip_members(path)
    if PICKLED not in names:
        raise CheckpointError(f"{path}: a zip archive without weights of torch. Give a .safetensors, .pt or .bin file.")
    told = sum(info.file_size for name, info in names.items() if name == PICKLED or name.startswith("data/"))
    if told > (size := path.stat().st_size):
        raise CheckpointError(
            f"{path}: its records would be {told:,} bytes, out of a file of {size:,}: packed, as torch never writes them. Fetch "
            "it again, or write it with torch.save."
        )
    return Format.torchscript if TORCHSCRIPT in names else Format.torch


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
    if twice := [name for name, count in Counter(name for name, _ in members).items() if name and count > 1]:
        raise CheckpointError(f"{path}: a damaged archive (its record {twice[0]} is there twice). Fetch it again.")
    return dict(members)


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
