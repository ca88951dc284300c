"""Reading weights from files and folders, and where in a file those of a model are. Nothing that a file holds is ever executed.

A trainer keeps the model in an attribute of its module, that in a wrapper, and the whole next to an optimizer, a teacher or an average.
No trainer is known here. Every mapping of tensors, with every prefix behind which the names of a model begin, is a place; read is
the one in which no name of the model is missing (`search`). What else the file holds is reported.
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
from clip_exp.weights.names import LAYOUTS, Reading, projections, readings, to_ours
from clip_exp.weights.torchscript import read_torchscript

KEY = "pretrained_prefix"
DEPTH = 2  # of mappings below the top of a file
# What torch puts into names: torch.compile, FSDP, checkpointing of activations, Lightning's DeepSpeed, DistributedDataParallel.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "module"}
AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?|shadow)(?:[._\d]|$)", re.IGNORECASE)
BIAS = "logit_bias"  # goes with the loss, not with the model
BY_PART = {layout.image: name for name, layout in LAYOUTS.items()}
POSITIONS = ("positional_embedding", "pos_embed")  # ours and open_clip's, and timm's: of any number


class Place(NamedTuple):
    """A mapping of tensors in a file, and a prefix of its names."""

    keys: tuple[str, ...]  # that lead to the mapping
    mapping: dict[str, Tensor]  # by name without wrappers
    prefix: str  # empty, or with a dot at its end
    layout: str | Reading | None  # one of LAYOUTS; of one tower, its reading; None: the names are not those of a model
    weights: dict[str, Tensor]  # of the model or tower, by name behind the prefix

    @property
    def label(self) -> str:
        return ".".join([*self.keys, self.prefix]).strip(".")

    def is_within(self, other: "Place") -> bool:
        """Return whether another place has all weights of this one."""
        within = {other.prefix + name for name in other.weights}
        return self.keys == other.keys and all(self.prefix + name in within for name in self.weights)

    def answers(self, wanted: str) -> bool:
        """Return whether `pretrained_prefix` names this place, by its whole label or the end of it."""
        return self.label == wanted or (wanted != "" and self.label.endswith(f".{wanted}"))

    def left_over(self, content: Mapping[Any, Any]) -> list[str]:
        """Return what else the file holds that has tensors, in few words."""
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
    own: Mapping[str, Tensor] | None = None,
    config: ModelConfig | None = None,
    wanted: str | None = None,
    tower: str | None = None,
) -> tuple[Place, list[str]]:
    """Return the place of the model's weights, and the labels of averaged copies that are as complete.

    Args:
        content: of the file.
        source: the file, for messages.
        own: state dict of the model; None: any model that has both towers.
        config: of the model, where its towers are other libraries'.
        wanted: `pretrained_prefix`.
        tower: image or text, whose weights alone are searched for; it needs `own` and `config`.

    Raises:
        CheckpointError: no place holds weights, or several hold all of the model's, or none is the one that is `wanted`.
    """
    parts = {part for name in own or () for part in name.split(".")}
    what = "the model" if tower is None else f"the {tower} tower"
    if tower is None:
        places = list(_places(content, WRAPPERS - parts))
    else:
        assert own is not None
        assert config is not None
        places = list(_places_of_tower(content, WRAPPERS - parts, list(readings(tower, config, own))))
    if wanted is not None:
        named = [place for place in places if place.answers(wanted.strip("."))]
        if not named:
            # nearly every prefix has some names of a tower behind it
            listed = [place for place in places if tower is None or not _misfits(place, own, config)[0]]
            there = _options(listed) or f"none: no names in it are those of {what}"
            raise CheckpointError(f"{source}: {KEY}={wanted} names no weights of {what}. The file has {there}.")
        places = [place for place in named if place.label == wanted.strip(".")] or named
    if not places and tower is not None:
        raise CheckpointError(
            f"{source}: no names in it are those of {what}, model.{tower}.kind={getattr(config, tower).kind}."
        )
    if not places:
        return _whole(content, source, own is None), []
    misfits = [_misfits(place, own, config) for place in places]
    best = min(misfits)
    fitting = [place for place, count in zip(places, misfits, strict=True) if count == best]
    if tower is not None:
        fitting = _distinct(fitting)
    if best[0]:  # incomplete: the first of the nearest, which fitting will refuse by its missing names
        return fitting[0], []
    averaged = [place for place in fitting if AVERAGED.search(place.label)]
    chosen = [place for place in fitting if place not in averaged] or averaged
    if len(chosen) > 1:
        raise CheckpointError(
            f"{source}: has all weights of {what} in {len(chosen)} places. Choose one: {_options(chosen)}."
        )
    return chosen[0], [place.label for place in averaged if place is not chosen[0]]


def _distinct(places: list[Place]) -> list[Place]:
    """Return the places that are no part of another: a backbone's weights also fit without the prefix of its tower."""
    kept: list[Place] = []
    for place in sorted(places, key=lambda place: (-len(place.weights), -len(place.prefix))):
        if not any(place.is_within(other) for other in kept):
            kept.append(place)
    return kept


def _options(places: Iterable[Place]) -> str:
    return listing(dict.fromkeys(f"{KEY}={place.label or repr('')}" for place in places))


def _mappings(
    content: Mapping[Any, Any], keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    if any(isinstance(value, Tensor) and isinstance(name, str) for name, value in content.items()):
        yield keys, content
    if len(keys) < DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, dict):
                yield from _mappings(value, (*keys, key))


def _places(content: Mapping[Any, Any], wrappers: set[str]) -> Iterator[Place]:
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
            yield Place(keys, tensors, prefix, layout, weights)


def _places_of_tower(content: Mapping[Any, Any], wrappers: set[str], ways: list[Reading]) -> Iterator[Place]:
    for keys, mapping in _mappings(content):
        tensors = _without(wrappers, mapping)
        cuts = [(prefix, rest, tensor) for name, tensor in tensors.items() for prefix, _, rest in _cuts(name)]
        for reading in ways:
            prefixes = dict.fromkeys(prefix for prefix, rest, _ in cuts if rest in reading.names)
            found: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
            for prefix, rest, tensor in cuts:
                if prefix in found and reading.has(rest):
                    found[prefix][rest] = tensor
            for prefix, weights in found.items():
                yield Place(keys, tensors, prefix, reading, weights)


def _cuts(name: str) -> Iterator[tuple[str, str, str]]:
    """Yield every prefix of a dotted name, the part behind it, and the name behind it."""
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


def _misfits(place: Place, own: Mapping[str, Tensor] | None, config: ModelConfig | None) -> tuple[int, int]:
    """Return how many weights of the model are missing, and how many have another shape. Nothing is copied."""
    try:
        bare = {name: torch.empty(value.shape, device="meta") for name, value in place.weights.items()}
        ours = to_ours(place.layout, bare, config)
    except (RuntimeError, ValueError, IndexError):  # a reshape that a weight does not allow
        ours = {}
    if own is None:
        return sum(not any(name.startswith(tower) for name in ours) for tower in ("image.", "text.")), 0
    shared = [name for name in own if name in ours and not name.endswith(POSITIONS)]
    other_shape = sum(ours[name].shape != own[name].shape for name in shared)
    missing = own.keys() - ours.keys() - {BIAS}
    if isinstance(place.layout, Reading):
        missing -= projections(missing)
    return len(missing), other_shape


def _whole(content: Mapping[Any, Any], source: Path, any_model: bool) -> Place:
    """Return the largest mapping of a file in which no names are those of a model."""
    mappings = list(_mappings(content))
    keys, mapping = max(mappings, key=lambda found: len(found[1]), default=((), content))
    if wrong := [name for name, value in mapping.items() if not isinstance(name, str) or not isinstance(value, Tensor)]:
        raise CheckpointError(f"{source}: not weights: {listing(map(str, wrong))}")
    tensors = _without(WRAPPERS, mapping)
    branches = zip(*(name.split(".")[:-1] for name in tensors), strict=False)
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, branches)]
    prefix = "".join(f"{part}." for part in shared) if any_model and len(tensors) > 1 else ""
    return Place(keys, tensors, prefix, None, {name.removeprefix(prefix): value for name, value in tensors.items()})


def _holds_tensors(value: Any, depth: int = 4) -> bool:
    if isinstance(value, dict | list | tuple) and depth:
        return any(_holds_tensors(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


def listing(names: Iterable[str], limit: int = 10) -> str:
    """Return the first names, and how many more there are. A file can name its weights anything, and a terminal obeys some of it."""
    names = [name if name.isprintable() and len(name) <= 200 else f"{name[:100]!r}…" for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class _Ignored:
    """What a pickle gets in place of a number or an array of numpy: nothing of numpy runs, and no model needs them."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


NUMPY = [
    *(f"numpy.{module}.multiarray.{name}" for module in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
]


OPTIMIZER, FLAX_MODEL = "opt/", "opt/target/"  # of big_vision's files; of older ones of Flax's, where the model is
BFLOAT16 = np.dtype("V2")  # NumPy has none of its own
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
    """A torch file whose pickle asks for something other than weights."""


class _Pickled(Exception):
    """An array of objects; its message is the array's name."""


class Weights(NamedTuple):
    """A model's weights out of a file."""

    state: dict[str, Tensor]  # under our names
    source: str  # where they are, for messages
    note: str | None  # on what else the file holds


def read_weights(path: str | Path, config: ModelConfig | None = None) -> dict[str, Tensor]:
    """Return the weights of any model, under our names; see `find_model_weights`."""
    return find_model_weights(path, config).state


def find_model_weights(
    path: str | Path,
    config: ModelConfig | None = None,
    own: Mapping[str, Tensor] | None = None,
    prefix: str | None = None,
    *,
    numbers: bool = True,
    tower: str | None = None,
) -> Weights:
    """Find the model's weights in a file or folder, on the CPU, in the file's dtype.

    Args:
        path: `.safetensors`, what `torch.save` wrote (`.pt`, `.bin`, `.ckpt`), or a TorchScript archive such as OpenAI's, or
            big_vision's `.npz`; a folder as Hugging Face's and open_clip's `save_pretrained`, or DeepSpeed, write, also in parts.
            Names are ours, or those of open_clip, OpenAI, FlagAI, cn-clip, big_vision, or transformers' CLIPModel, SiglipModel and
            ChineseCLIPModel; for where in the file they are see `search`.
        config: of the model that they are for, see `to_ours`.
        own: state dict of that model; None: any with both towers.
        prefix: `pretrained_prefix`, where several fit.
        numbers: False: names and shapes alone, without memory.
        tower: image or text: the weights of that tower alone, out of a file of one tower or of a model; `own` is then that tower's.

    Raises:
        CheckpointError: no such file, not readable, or it holds something other than weights; see `search`.
    """
    path = Path(path).expanduser()
    content: dict[Any, Any] = {}
    for file in weight_files(path):
        content |= read_content(file, numbers)
    if not content:
        raise CheckpointError(f"{path}: holds no weights. Fetch or write it again.")
    place, averaged = search(content, path, own, config, prefix, tower)
    if wrong := [name for name, tensor in place.weights.items() if not _dense(tensor, numbers)]:
        raise CheckpointError(
            f"{path}: holds sparse, nested or quantized tensors, which no model here takes: {listing(wrong)}"
        )
    source = f"{path} ({listing([place.label])})" if place.label else str(path)
    left = place.left_over(content)
    note = f"{source} is read; left out is {listing(left)}." if left else None
    if averaged:
        note = f"{note} An averaged copy is read by {KEY}={listing(averaged)}."
    try:
        return Weights(to_ours(place.layout, place.weights, config), source, note)
    except (RuntimeError, ValueError, IndexError) as error:  # a reshape that a weight does not allow
        raise CheckpointError(f"{path}: holds weights of shapes that their names do not have ({error}).") from error


def read_content(path: Path, numbers: bool = True) -> dict[Any, Any]:
    """Return what a file holds: tensors, in nested dictionaries if it is torch's.

    Args:
        numbers: see `find_model_weights`.

    Raises:
        UnsafePickle: reading it would need code in it.
        CheckpointError: not readable, or no dictionary.
    """
    match format_of(path):
        case Format.safetensors:
            return _read_safetensors(path)
        case Format.torchscript:
            return dict(read_torchscript(path))
        case Format.npz:
            return dict(_read_npz(path, numbers))
        case Format.torch:
            content = _read_torch(path, numbers)
            if not isinstance(content, dict) or not content:
                raise CheckpointError(
                    f"{path}: holds no dictionary of weights, nor one under state_dict, module, model or another key."
                )
            return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}). Fetch or write it again.") from error


def _read_npz(path: Path, numbers: bool) -> dict[str, Tensor]:
    """Return the arrays of big_vision's files, with dots for the slashes in their names, and each block's weights apart.

    Left out are what its optimizer keeps, and arrays that are not of numbers.
    """
    found: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in npz_members(path):
                name = info.filename.removesuffix(".npy")
                if name.startswith(OPTIMIZER) and not name.startswith(FLAX_MODEL):
                    continue
                with archive.open(info) as file:
                    tensor = _array(file, info, numbers)
                if tensor is None:
                    continue
                before, stacked, after = name.partition("/encoderblock/")
                if stacked and tensor.ndim:  # along the first axis: all blocks were one loop
                    each = {f"{before}/encoderblock_{i}/{after}": part for i, part in enumerate(tensor.unbind())}
                else:
                    each = {name: tensor}
                found |= {part.replace("/", "."): value for part, value in each.items()}
    except _Pickled as error:
        raise CheckpointError(
            f"{path}: refused, because its array {error} is a pickle, which is no weight and could run code. Fetch the file again."
        ) from error
    except Exception as error:  # a damaged array can break its reader in any way
        raise CheckpointError(f"{path}: not a readable file of NumPy's ({error}). Fetch or write it again.") from error
    return found


def _array(file: IO[bytes], info: zipfile.ZipInfo, numbers: bool) -> Tensor | None:
    read_header = HEADERS.get(np.lib.format.read_magic(file))
    if read_header is None:
        raise ValueError(f"{info.filename}: unknown version")
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise _Pickled(info.filename)
    kind = BFLOAT16 if dtype == BFLOAT16 else dtype.newbyteorder("=")
    if kind not in NUMPY_DTYPES:
        return None
    if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():  # before memory is taken for it
        raise ValueError(f"{info.filename}: its header tells another size")
    if not numbers:
        return torch.empty(shape, dtype=NUMPY_DTYPES[kind], device="meta")
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    if kind is BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(kind, copy=False)).contiguous()


def _read_torch(path: Path, numbers: bool) -> Any:
    ignored: list[Any] = [(_Ignored, name) for name in NUMPY]
    try:
        # an open file, because torch reads a path by its ending
        with path.open("rb") as file, torch.serialization.safe_globals(ignored):
            return torch.load(file, map_location="cpu" if numbers else "meta", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UnsafePickle(
                f"{path}: refused, because its pickle asks for {named[1]}, which is no weight and could run code. Fetch the file "
                f"again, or rewrite it where you trust its author: clip-exp convert {quote(str(path))} output={quote(path.stem)}.safetensors "
                "trust_pickle=true"
            ) from error
        raise UnsafePickle(
            f"{path}: refused, because torch finds no weights in this pickle. Fetch or write the file again."
        ) from error
    except Exception as error:  # a damaged file can break the unpickler in any way
        # Behind the first sentence is advice, also bad one.
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise CheckpointError(f"{path}: not a readable torch file ({reason}). Fetch or write it again.") from error


def _dense(tensor: Tensor, numbers: bool) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    return plain and (tensor.device.type == "cpu" or not numbers)
