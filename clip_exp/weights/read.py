"""TowerLayout of weights from files and folders. Code in a file is never executed.

Trainers save a model under the name of an attribute, inside of wrappers, and next to an optimizer, a teacher or
averaged weights. This module does not depend on the conventions of particular trainers. Instead, every mapping of
tensors in a file, combined with every prefix after which names of a model follow, is a candidate. `search` selects the
candidate that has all weights of the model. Other contents are reported.
"""

import math
import pickle
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from shlex import quote
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clip_exp.config.model import ModelConfig
from clip_exp.errors import CheckpointError
from clip_exp.weights.inspect import Format, format_of, npz_members, weight_files
from clip_exp.weights.names import LAYOUTS, TowerLayout, projections, to_ours, tower_layouts
from clip_exp.weights.torchscript import read_torchscript

KEY = "pretrained_prefix"
# Maximum depth of nested mappings in a file
DEPTH = 2
# Parts of names from wrappers: torch.compile, FSDP, activation checkpointing, Lightning's DeepSpeed,
# DistributedDataParallel
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "module"}
AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?|shadow)(?:[._\d]|$)", re.IGNORECASE)
# Depends on the loss rather than on the model
BIAS = "logit_bias"
BY_PART = {layout.image: name for name, layout in LAYOUTS.items()}
# Names of position embeddings (ours and open_clip's, and timm's), whose number of positions may differ
POSITIONS = ("positional_embedding", "pos_embed")


class Candidate(NamedTuple):
    """Candidate for the weights of a model in a file: a mapping of tensors, and a prefix of its names.

    Attributes:
        keys: keys that lead to the mapping.
        mapping: tensors by name without wrappers.
        prefix: prefix of the names, empty or with a dot at its end.
        layout: one of LAYOUTS; for a single tower, its layout; None: the names are not those of a model.
        weights: weights of the model or tower, by name without the prefix.
    """

    keys: tuple[str, ...]
    mapping: dict[str, Tensor]
    prefix: str
    layout: str | TowerLayout | None
    weights: dict[str, Tensor]

    @property
    def label(self) -> str:
        """Value of `pretrained_prefix` that selects this candidate."""
        return ".".join([*self.keys, self.prefix]).strip(".")

    def is_within(self, other: "Candidate") -> bool:
        """Return True if another candidate has all weights of this one."""
        within = {other.prefix + name for name in other.weights}
        return self.keys == other.keys and all(self.prefix + name in within for name in self.weights)

    def matches(self, requested: str) -> bool:
        """Return True if a value of `pretrained_prefix` is the label of this candidate, or the end of the label."""
        return self.label == requested or (requested != "" and self.label.endswith(f".{requested}"))

    def left_over(self, content: Mapping[Any, Any]) -> list[str]:
        """Return short descriptions of all other tensors in the file."""
        used = {self.prefix + name for name in self.weights}
        starts = {
            name: self.prefix if name.startswith(self.prefix) else "" for name in self.mapping if name not in used
        }
        other = Counter(start + name.removeprefix(start).partition(".")[0] for name, start in starts.items())
        found = [f"{part} ({count} tensors)" if count > 1 else part for part, count in other.items()]
        for depth, key in enumerate((*self.keys, None)):
            found += [
                ".".join([*self.keys[:depth], str(name)])
                for name, value in content.items()
                if name != key and not isinstance(value, Tensor) and _holds_tensors(value)
            ]
            content = content[key] if key is not None else {}
        return found


def search(
    content: Mapping[Any, Any],
    source: Path,
    expected: Mapping[str, Tensor] | None = None,
    config: ModelConfig | None = None,
    requested: str | None = None,
    tower: str | None = None,
) -> tuple[Candidate, list[str]]:
    """Search a file for the weights of a model.

    Args:
        content: content of the file.
        source: path of the file, for messages.
        expected: state dict of the model; None: any model with both towers.
        config: configuration of the model, required if its towers are those of other libraries.
        requested: value of `pretrained_prefix`.
        tower: image or text, to search for the weights of this tower only; requires `expected` and `config`.

    Returns:
        The candidate with the model's weights, and the labels of averaged copies that are as complete.

    Raises:
        CheckpointError: no candidate has weights of the model, several have all of them, or none matches `requested`.
    """
    parts = {part for name in expected or () for part in name.split(".")}
    what = "the model" if tower is None else f"the {tower} tower"
    if tower is None:
        candidates = list(_candidates(content, WRAPPERS - parts))
    else:
        assert expected is not None
        assert config is not None
        candidates = list(_candidates_of_tower(content, WRAPPERS - parts, list(tower_layouts(tower, config, expected))))
    if requested is not None:
        named = [candidate for candidate in candidates if candidate.matches(requested.strip("."))]
        if not named:
            # For a tower, list only complete candidates, since nearly every prefix has some of its names.
            listed = [
                candidate for candidate in candidates if tower is None or not _misfits(candidate, expected, config)[0]
            ]
            options = f"The file has {_options(listed)}." if listed else "The file has none."
            raise CheckpointError(f"{source}: {KEY}={requested} matches no weights of {what}. {options}")
        candidates = [candidate for candidate in named if candidate.label == requested.strip(".")] or named
    if not candidates and tower is not None:
        raise CheckpointError(f"{source} has no weights of {what} (model.{tower}.kind={getattr(config, tower).kind}).")
    if not candidates:
        return _whole(content, source, expected is None), []
    misfits = [_misfits(candidate, expected, config) for candidate in candidates]
    best = min(misfits)
    fitting = [candidate for candidate, count in zip(candidates, misfits, strict=True) if count == best]
    if tower is not None:
        fitting = _distinct(fitting)
    # No candidate is complete: return the first of the best, so that the error lists its missing names.
    if best[0]:
        return fitting[0], []
    averaged = [candidate for candidate in fitting if AVERAGED.search(candidate.label)]
    chosen = [candidate for candidate in fitting if candidate not in averaged] or averaged
    if len(chosen) > 1:
        raise CheckpointError(
            f"{source} has {len(chosen)} complete sets of weights of {what}. Select one: {_options(chosen)}."
        )
    return chosen[0], [candidate.label for candidate in averaged if candidate is not chosen[0]]


def _distinct(candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates that are not part of another one: a backbone's weights also fit without the prefix of its tower."""
    distinct: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: (-len(candidate.weights), -len(candidate.prefix))):
        if not any(candidate.is_within(other) for other in distinct):
            distinct.append(candidate)
    return distinct


def _options(candidates: Iterable[Candidate]) -> str:
    return listing(dict.fromkeys(f"{KEY}={candidate.label or repr('')}" for candidate in candidates))


def _mappings(
    content: Mapping[Any, Any], keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    if any(isinstance(value, Tensor) and isinstance(name, str) for name, value in content.items()):
        yield keys, content
    if len(keys) < DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, dict):
                yield from _mappings(value, (*keys, key))


def _candidates(content: Mapping[Any, Any], wrappers: set[str]) -> Iterator[Candidate]:
    for keys, mapping in _mappings(content):
        tensors = _without(wrappers, mapping)
        found: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name in tensors:
            found |= {(prefix, BY_PART[part]): {} for prefix, part, _ in _cuts(name) if part in BY_PART}
        layouts = defaultdict(list)
        for prefix, layout in found:
            layouts[prefix].append(layout)
        for name, tensor in tensors.items():
            for prefix, part, rest in _cuts(name):
                for layout in layouts.get(prefix, ()):
                    if part in LAYOUTS[layout].parts:
                        found[prefix, layout][rest] = tensor
        for (prefix, layout), weights in found.items():
            yield Candidate(keys, tensors, prefix, layout, weights)


def _candidates_of_tower(
    content: Mapping[Any, Any], wrappers: set[str], layouts: list[TowerLayout]
) -> Iterator[Candidate]:
    for keys, mapping in _mappings(content):
        tensors = _without(wrappers, mapping)
        cuts = [(prefix, rest, tensor) for name, tensor in tensors.items() for prefix, _, rest in _cuts(name)]
        for layout in layouts:
            prefixes = dict.fromkeys(prefix for prefix, rest, _ in cuts if rest in layout.names)
            found: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
            for prefix, rest, tensor in cuts:
                if prefix in found and layout.has(rest):
                    found[prefix][rest] = tensor
            for prefix, weights in found.items():
                yield Candidate(keys, tensors, prefix, layout, weights)


def _cuts(name: str) -> Iterator[tuple[str, str, str]]:
    """Yield every prefix of a dotted name, the part after the prefix, and the name after the prefix."""
    start = 0
    while True:
        part = name[start:].partition(".")[0]
        yield name[:start], part, name[start:]
        start += len(part) + 1
        if start > len(name):
            return


def _without(wrappers: set[str], mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    tensors = {name: value for name, value in mapping.items() if isinstance(name, str) and isinstance(value, Tensor)}
    bare = {
        ".".join(part for part in name.split(".") if part not in wrappers): value for name, value in tensors.items()
    }
    return bare if len(bare) == len(tensors) else tensors


def _misfits(
    candidate: Candidate, expected: Mapping[str, Tensor] | None, config: ModelConfig | None
) -> tuple[int, int]:
    """Return the number of weights that are missing in a candidate, and the number with another shape. Copies no data."""
    try:
        bare = {name: torch.empty(value.shape, device="meta") for name, value in candidate.weights.items()}
        ours = to_ours(candidate.layout, bare, config)
    except (RuntimeError, ValueError, IndexError):
        # A weight cannot be reshaped.
        ours = {}
    if expected is None:
        return sum(not any(name.startswith(tower) for name in ours) for tower in ("image.", "text.")), 0
    shared = [name for name in expected if name in ours and not name.endswith(POSITIONS)]
    other_shape = sum(ours[name].shape != expected[name].shape for name in shared)
    missing = expected.keys() - ours.keys() - {BIAS}
    if isinstance(candidate.layout, TowerLayout):
        missing -= projections(missing)
    return len(missing), other_shape


def _whole(content: Mapping[Any, Any], source: Path, any_model: bool) -> Candidate:
    """Return the largest mapping of a file, if no names are those of a model."""
    mappings = list(_mappings(content))
    keys, mapping = max(mappings, key=lambda found: len(found[1]), default=((), content))
    if wrong := [name for name, value in mapping.items() if not isinstance(name, str) or not isinstance(value, Tensor)]:
        raise CheckpointError(f"{source} has values that are not weights: {listing(map(str, wrong))}.")
    tensors = _without(WRAPPERS, mapping)
    branches = zip(*(name.split(".")[:-1] for name in tensors), strict=False)
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, branches)]
    prefix = "".join(f"{part}." for part in shared) if any_model and len(tensors) > 1 else ""
    return Candidate(keys, tensors, prefix, None, {name.removeprefix(prefix): value for name, value in tensors.items()})


def _holds_tensors(value: Any, depth: int = 4) -> bool:
    if isinstance(value, dict | list | tuple) and depth:
        return any(_holds_tensors(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


def listing(names: Iterable[str], limit: int = 10) -> str:
    """Return the first names and the number of the others. Names from a file may contain terminal escape sequences, which are escaped."""
    names = [name if name.isprintable() and len(name) <= 200 else f"{name[:100]!r}…" for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class _Ignored:
    """Replacement for NumPy's scalars and arrays in a pickle, which no model needs, so that no code of NumPy runs."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


NUMPY = [
    *(f"numpy.{module}.multiarray.{name}" for module in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
]


# Prefixes of the optimizer's state in big_vision's files, and of the model in older files of Flax
OPTIMIZER, FLAX_MODEL = "opt/", "opt/target/"
# NumPy has no bfloat16 type
BFLOAT16 = np.dtype("V2")
NUMPY_DTYPES = {
    np.dtype("float64"): torch.float64,
    np.dtype("float32"): torch.float32,
    np.dtype("float16"): torch.float16,
    BFLOAT16: torch.bfloat16,
    np.dtype("int64"): torch.int64,
    np.dtype("int32"): torch.int32,
}
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class UnsafePickle(CheckpointError):
    """Error raised for a torch file whose pickle contains objects other than weights."""


class _Pickled(Exception):
    """Error raised for an array of objects; its message is the array's name."""


class Weights(NamedTuple):
    """Weights of a model from a file.

    Attributes:
        state: weights by our names.
        source: location of the weights, for messages.
        note: message about the other contents of the file, if any.
    """

    state: dict[str, Tensor]
    source: str
    note: str | None


def read_weights(path: str | Path, config: ModelConfig | None = None) -> dict[str, Tensor]:
    """Read the weights of any model, by our names; see `find_model_weights`."""
    return find_model_weights(path, config).state


def find_model_weights(
    path: str | Path,
    config: ModelConfig | None = None,
    expected: Mapping[str, Tensor] | None = None,
    prefix: str | None = None,
    *,
    with_values: bool = True,
    tower: str | None = None,
) -> Weights:
    """Read the model's weights from a file or folder, on the CPU, in the file's dtype.

    Args:
        path: file or folder. Files are `.safetensors`, files of `torch.save` (`.pt`, `.bin`, `.ckpt`), TorchScript
            archives such as OpenAI's, and big_vision's `.npz`. Folders are those written by `save_pretrained` of
            Hugging Face and open_clip, or by DeepSpeed, also sharded. Names are ours, or those of open_clip, OpenAI,
            FlagAI, cn-clip, big_vision, or transformers' CLIPModel, SiglipModel and ChineseCLIPModel; `search`
            describes where in a file they may be.
        config: configuration of the model, see `to_ours`.
        expected: state dict of the model; None: any model with both towers.
        prefix: value of `pretrained_prefix`, which selects the weights in a file with several models.
        with_values: read the values; False: only names and shapes, as tensors on the meta device.
        tower: image or text, to read the weights of this tower only, from a file of the tower or of a model; `expected`
            is then the state dict of the tower.

    Raises:
        CheckpointError: the file does not exist, cannot be read, or has no weights of the model; see `search`.
    """
    path = Path(path).expanduser()
    content: dict[Any, Any] = {}
    for file in weight_files(path):
        content |= read_content(file, with_values)
    if not content:
        raise CheckpointError(f"{path} contains no weights. Download it again, or write it again.")
    candidate, averaged = search(content, path, expected, config, prefix, tower)
    if wrong := [name for name, tensor in candidate.weights.items() if not _dense(tensor, with_values)]:
        raise CheckpointError(
            f"{path} contains sparse, nested or quantized tensors, which are not supported: {listing(wrong)}."
        )
    source = f"{path} ({listing([candidate.label])})" if candidate.label else str(path)
    left = candidate.left_over(content)
    note = f"reading {source}; left out: {listing(left)}." if left else None
    if averaged:
        note = f"{note} For averaged weights, set {KEY}={listing(averaged)}."
    try:
        return Weights(to_ours(candidate.layout, candidate.weights, config), source, note)
    except (RuntimeError, ValueError, IndexError) as error:
        # A weight cannot be reshaped.
        raise CheckpointError(f"{path}: the shape of a weight does not fit its name ({error}).") from error


def read_content(path: Path, with_values: bool = True) -> dict[Any, Any]:
    """Read the content of a file: tensors by name, for a torch file in nested dictionaries.

    Args:
        path: path of the file.
        with_values: see `find_model_weights`.

    Raises:
        UnsafePickle: loading the file would execute code in it.
        CheckpointError: the file cannot be read, or is not a dictionary.
    """
    match format_of(path):
        case Format.safetensors:
            return _read_safetensors(path)
        case Format.torchscript:
            return dict(read_torchscript(path))
        case Format.npz:
            return dict(_read_npz(path, with_values))
        case Format.torch:
            content = _read_torch(path, with_values)
            if not isinstance(content, dict) or not content:
                raise CheckpointError(
                    f"{path} contains no dictionary of weights, not even under a key such as state_dict, module or model."
                )
            return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a valid safetensors file ({error}). Download it again, or write it again."
        ) from error


def _read_npz(path: Path, with_values: bool) -> dict[str, Tensor]:
    """Read the arrays of big_vision's files, with dots instead of slashes in the names and with separate weights for each block.

    The optimizer's state and arrays that are not numeric are left out.
    """
    found: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in npz_members(path):
                name = info.filename.removesuffix(".npy")
                if name.startswith(OPTIMIZER) and not name.startswith(FLAX_MODEL):
                    continue
                with archive.open(info) as file:
                    tensor = _array(file, info, with_values)
                if tensor is None:
                    continue
                before, stacked, after = name.partition("/encoderblock/")
                # The weights of all blocks are stacked along the first axis.
                if stacked and tensor.ndim:
                    each = {f"{before}/encoderblock_{i}/{after}": part for i, part in enumerate(tensor.unbind())}
                else:
                    each = {name: tensor}
                found |= {part.replace("/", "."): value for part, value in each.items()}
    except _Pickled as error:
        raise CheckpointError(
            f"{path} is unsafe: its array {error} is a pickle, which could execute code. Download the file again from a trusted source."
        ) from error
    except Exception as error:
        # A damaged array can cause any exception.
        raise CheckpointError(
            f"{path} is not a valid NumPy file ({error}). Download it again, or write it again."
        ) from error
    return found


def _array(file: IO[bytes], info: zipfile.ZipInfo, with_values: bool) -> Tensor | None:
    read_header = HEADERS.get(np.lib.format.read_magic(file))
    if read_header is None:
        raise ValueError(f"{info.filename}: unknown version")
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise _Pickled(info.filename)
    kind = BFLOAT16 if dtype == BFLOAT16 else dtype.newbyteorder("=")
    if kind not in NUMPY_DTYPES:
        return None
    # Checked before memory is allocated
    if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
        raise ValueError(f"{info.filename}: the size does not match the header")
    if not with_values:
        return torch.empty(shape, dtype=NUMPY_DTYPES[kind], device="meta")
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    if kind is BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(kind, copy=False)).contiguous()


def _read_torch(path: Path, with_values: bool) -> Any:
    ignored: list[Any] = [(_Ignored, name) for name in NUMPY]
    try:
        # An open file, because for a path, torch selects the format by the extension.
        with path.open("rb") as file, torch.serialization.safe_globals(ignored):
            return torch.load(file, map_location="cpu" if with_values else "meta", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UnsafePickle(
                f"{path} is unsafe: its pickle loads {named[1]}, which could execute code. Download the file again, or convert it "
                f"if you trust its author: clip-exp convert {quote(str(path))} output={quote(path.stem)}.safetensors trust_pickle=true"
            ) from error
        raise UnsafePickle(
            f"{path} cannot be loaded: torch finds no weights in its pickle. Download it again, or write it again."
        ) from error
    except Exception as error:
        # A damaged file can cause any exception. After its first sentence, torch's message has advice that does not
        # apply here.
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise CheckpointError(
            f"{path} is not a valid torch file ({reason}). Download it again, or write it again."
        ) from error


def _dense(tensor: Tensor, with_values: bool) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    return plain and (tensor.device.type == "cpu" or not with_values)
