"""Command `clip-exp convert`: writes the tensors of a torch file as safetensors, which cannot contain code."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_exp.config.commands import ConvertConfig
from clip_exp.errors import CheckpointError, ConfigError, Problems
from clip_exp.storage import atomic_file
from clip_exp.weights.inspect import Format, format_of

if TYPE_CHECKING:
    from torch import Tensor

ENDING = ".safetensors"
DTYPES = {f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)} | {
    "bool", "bfloat16", "float8_e4m3fn", "float8_e5m2",
}  # fmt: skip
# Maximum depth of nested dictionaries, which may be recursive
MAX_DEPTH = 20


def convert(config: ConvertConfig) -> int:
    """Convert the file and return the exit code.

    Raises:
        ConfigError: `file` or `output` is not set, `output` exists, or its folder does not exist.
        CheckpointError: `file` cannot be read, needs `trust_pickle`, or has no tensors; or `output` cannot be written.
    """
    file, output = _check(config)
    # Imports torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    found, left_out = _tensors(_read(file, config.trust_pickle))
    if not found:
        raise CheckpointError(f"{file} contains no tensors: no file is written.")
    try:
        with atomic_file(output) as temporary:
            save_file(found, temporary, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"output={output} cannot be written: {reason}.") from error
    print(f"written: {output} ({len(found)} tensors, {output.stat().st_size / 1e6:,.1f} MB)")
    if left_out:
        from clip_exp.weights.read import listing

        print(f"left out, not tensors: {listing(left_out)}")
    print(f"next:    pretrained={output}")
    return 0


def _check(config: ConvertConfig) -> tuple[Path, Path]:
    """Check `file` and `output` without torch, and return them."""
    problems = Problems()
    if config.file is None:
        problems.add(f"file has no value: set the file to convert (clip-exp convert FILE output=NAME{ENDING}).")
    if config.output is None:
        problems.add(f"output has no value: set the file to write (output=NAME{ENDING}).")
    file, output = (Path(path or ".").expanduser() for path in (config.file, config.output))
    if config.output is not None and output.suffix != ENDING:
        problems.add(f"output={output} must end with {ENDING}, the only output format.")
    elif config.output is not None and (output.exists() or output.is_symlink()):
        problems.add(f"output={output} already exists: give another file, or remove it.")
    elif config.output is not None and not output.parent.is_dir():
        problems.add(f"output={output}: folder {output.parent} not found. Create it, or give another file.")
    with problems:
        if config.file is not None and not file.is_file():
            raise CheckpointError(f"file={file} does not exist or is a folder: give a file (.pt, .pth, .bin or .ckpt).")
        if config.file is not None and format_of(file) is Format.safetensors:
            raise ConfigError(f"file={file} is already a safetensors file: use it directly (pretrained={file}).")
    problems.raise_if_any()
    return file, output


def _read(file: Path, trusted: bool) -> Any:
    """Read a file. Only a pickle that torch refuses to load safely needs `trusted`."""
    from clip_exp.weights.read import UnsafePickle, read_content

    try:
        return read_content(file)
    except UnsafePickle:
        if not trusted:
            raise
    import torch

    print(
        f"warning: loading {file} executes code in its pickle, because trust_pickle=true is set.",
        file=sys.stderr,
        flush=True,
    )
    try:
        with file.open("rb") as opened:
            return torch.load(opened, map_location="cpu", weights_only=False)
    except ImportError as error:
        raise CheckpointError(
            f"{file}: its pickle needs a package that is not installed ({error}). Run this where the project that wrote it is installed."
        ) from error
    except Exception as error:
        # Code in a pickle can raise any exception.
        raise CheckpointError(f"{file}: cannot be loaded ({type(error).__name__}: {error}).") from error


def _tensors(content: Any) -> tuple[dict[str, "Tensor"], list[str]]:
    """Return the tensors by name, without shared memory, and the names of all other values."""
    from torch import Tensor

    found: dict[str, Tensor] = {}
    left_out, seen = [], set()
    for name, value in _flat(content):
        if name in found or name == "__metadata__" or not isinstance(value, Tensor) or not _fits(value):
            left_out.append(name)
            continue
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return found, left_out


def _flat(content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the values in nested dictionaries and the weights of modules, under their keys joined by dots."""
    from torch import nn

    if isinstance(content, nn.Module):
        content = content.state_dict()
    if isinstance(content, Mapping) and content and depth < MAX_DEPTH:
        for key, value in content.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key), depth + 1)
    else:
        yield name or type(content).__name__, content


def _fits(tensor: "Tensor") -> bool:
    """Return True if safetensors can store a tensor: it is dense, with a supported dtype, and not on the meta device."""
    import torch

    dense = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized and not tensor.is_meta
    return dense and str(tensor.dtype).removeprefix("torch.") in DTYPES
