"""An index of pictures: one safetensors file that holds their features, what made them, and which files they are of.

Tensors: `features` float32 [N, D] of unit norm, `size` int64 [N] in bytes, `mtime_ns` int64 [N], `sample` int64 [N], a hash of a
part of the content (`data.files`), and `paths`, the names' bytes with a NUL between; rows are in the order of the paths. Metadata: `clip_exp.index`, JSON of a `Recipe`. A path is relative to the
index's folder where the picture lies below it, so that both can be moved together.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from clip_exp.config.base import parse, plain
from clip_exp.config.model import ModelConfig
from clip_exp.data.files import normal_path
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.loading.source import ModelSource
from clip_exp.loading.wise_ft import Mix
from clip_exp.storage import InUse, atomic_file, lock, remove_leftovers

if TYPE_CHECKING:
    from torch import Tensor

KEY, VERSION = "clip_exp.index", 2


@dataclass(frozen=True)
class Recipe:
    """What decides the features of an index."""

    weights_sha256: str
    weights: str  # the file, absolute
    model: dict[str, Any]  # its configuration; it says what happens to a picture before the image tower
    precision: str
    frames: int  # of a video
    version: int = VERSION
    mix: dict[str, Any] | None = None  # with what the weights were mixed
    prefix: str | None = None  # which of the file's weights

    @property
    def source(self) -> ModelSource:
        """The model that made the index."""
        model = parse(ModelConfig, self.model, "model.")
        return ModelSource(model, Path(self.weights), mix=Mix(**self.mix) if self.mix else None, prefix=self.prefix)


class Entries(NamedTuple):
    """The contents of an index, in the order of the paths."""

    paths: list[str]  # as `stored_path` gives them
    size: "Tensor"  # int64 [N], bytes
    mtime_ns: "Tensor"  # int64 [N]
    sample: "Tensor"  # int64 [N], hash of a part of the content
    features: "Tensor"  # float32 [N, D] of unit norm; mapped from the file, not read


def recipe_of(source: ModelSource, precision: str, frames: int) -> Recipe:
    """What an index of a model is made with; may read the weights for their hash."""
    mix = asdict(source.mix) if source.mix else None
    weights = str(source.weights.resolve())
    return Recipe(source.sha256(), weights, plain(source.model), precision, frames, mix=mix, prefix=source.prefix)


def read_recipe(path: Path) -> Recipe:
    """What an index was made with. No torch.

    Raises:
        CheckpointError: the file is no index, is damaged, or is another version's.
    """
    try:
        with safe_open(path, framework="np") as file:
            values = json.loads((file.metadata() or {})[KEY])
    except (OSError, SafetensorError, KeyError) as error:
        reason = getattr(error, "strerror", None) or "it is no index, or damaged"
        raise CheckpointError(f"index={path} cannot be used: {reason}. Name another file, or make it anew.") from None
    if values["version"] != VERSION:
        raise CheckpointError(f"index={path} was made by another version of clip_exp: make it anew.")
    recipe = Recipe(**values)
    try:
        parse(ModelConfig, recipe.model, "model.")
    except ConfigError as error:
        raise CheckpointError(
            f"index={path} was made by another version of clip_exp, whose models have other keys: make it anew.\n{error}"
        ) from None
    return recipe


def agree(path: Path, before: Recipe, wanted: Recipe) -> None:
    """Refuse to mix or compare features of different origin.

    Raises:
        CheckpointError: another model, or other weights.
    """
    if before.weights_sha256 == wanted.weights_sha256 and before.source.model == wanted.source.model:
        return
    models = [
        f"{recipe.model['name']} with {recipe.weights} (sha256 {recipe.weights_sha256[:12]}…)"
        for recipe in (before, wanted)
    ]
    same = "" if before.weights_sha256 != wanted.weights_sha256 else ", whose settings are others"
    raise CheckpointError(
        f"index={path} was made by {models[0]}, not by {models[1]}{same}: their features cannot be compared. "
        "Leave the model out to use the index's own, or name another index."
    )


def read_entries(path: Path) -> Entries:
    """The contents; later changes of the file do not reach them."""
    with safe_open(path, framework="pt") as file:
        names = bytes(file.get_tensor("paths").numpy())
        columns = [file.get_tensor(name) for name in Entries._fields[1:]]
    return Entries([os.fsdecode(name) for name in names.split(b"\0")] if names else [], *columns)


def write_index(path: Path, recipe: Recipe, entries: Entries) -> None:
    """Write the file whole or not at all, by who has it `held`; the same contents are the same bytes.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    names = b"\0".join(map(os.fsencode, entries.paths))
    tensors = {
        **entries._asdict(),
        "paths": torch.frombuffer(bytearray(names), dtype=torch.uint8),
        "features": entries.features.contiguous(),
    }
    try:
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, {KEY: json.dumps(asdict(recipe), sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"index={path} cannot be written: {getattr(error, 'strerror', None) or error}."
        ) from error


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Inside, no other process changes the index; reading needs no lock. The lock ends with the process, however it ends.

    Without locks in the file system, of two changes at once the last one stays.

    Raises:
        ConfigError: another process holds it.
        CheckpointError: the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            alone = stack.enter_context(lock(path.with_name(f".{path.name}.lock"), remove=True))
        except InUse as error:
            raise ConfigError(f"index={path} is being changed by {error.owner}: wait for it.") from None
        except OSError as error:
            raise CheckpointError(f"index={path} cannot be written: {error.strerror}.") from error
        if alone:
            remove_leftovers(path)
        yield


def stored_path(path: str | Path, folder: str | Path) -> str:
    """A path relative to `folder` if it lies below it, else absolute."""
    absolute, base = normal_path(str(path)), os.path.join(normal_path(str(folder)), "")
    return absolute.removeprefix(base)


def full_path(stored: str, folder: str | Path) -> str:
    """The absolute path of an entry of the index in `folder`."""
    return os.path.join(normal_path(str(folder)), stored)
