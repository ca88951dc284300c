"""What evaluations keep on disk, so that it is computed once: features of pictures and texts, and classifiers.

An entry is a folder named by a hash of everything its contents depend on, so nothing in it is ever out of date. Files are
written whole or not at all; two processes that make the same one write the same contents, and the later takes the place.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_exp._version import __version__
from clip_exp.storage import atomic_file

log = logging.getLogger(__name__)
IN_USE_S = 3600.0  # an entry that was used this recently may be another process's
SUFFIX = ".safetensors"
CHECKSUM = "crc32"


class Cache:
    """A folder of entries. Nothing that is wrong with it ends an evaluation: what it lacks is computed.

    Args:
        folder: made when something is first kept.
        limit_gb: `prune` removes the entries that were not used for longest until the rest fits.
    """

    def __init__(self, folder: Path, limit_gb: float) -> None:
        self.folder = folder
        self.limit_gb = limit_gb
        self._refused = False

    def entry(self, kind: str, **about: Any) -> Path:
        """The folder for what `about` (JSON values) decides completely, with the version of clip_exp. It may not exist yet."""
        text = json.dumps({"clip_exp": __version__, **about}, sort_keys=True)
        folder = self.folder / kind / hashlib.sha256(text.encode()).hexdigest()[:32]
        with suppress(OSError):  # it is not there, or another user's
            os.utime(folder)
        return folder

    def names(self, entry: Path) -> set[str]:
        """The files of an entry."""
        return {path.name.removesuffix(SUFFIX) for path in entry.glob(f"*{SUFFIX}") if not path.name.startswith(".")}

    def read(self, entry: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and metadata of a file; None if there is none, or it is damaged."""
        path = entry / f"{name}{SUFFIX}"
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
                metadata = file.metadata() or {}
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("%s cannot be read (%s) and is made again.", path, error)
            return None
        if metadata.pop(CHECKSUM, None) != _checksum(tensors):
            log.warning("%s was changed after it was written and is made again.", path)
            return None
        return tensors, metadata

    def write(self, entry: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Keep tensors that are on the CPU; a disk that is full or read-only is told once, and from then on nothing is kept."""
        if self._refused:
            return
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        try:
            entry.mkdir(parents=True, exist_ok=True)
            # The checksum finds what a loss of power damaged.
            with atomic_file(entry / f"{name}{SUFFIX}", durable=False) as temporary:
                save_file(tensors, temporary, {**(metadata or {}), CHECKSUM: _checksum(tensors)})
        except (OSError, SafetensorError) as error:
            self._refused = True
            log.warning(
                "features cannot be kept in %s (%s): an interrupted evaluation would start over.", self.folder, error
            )

    def prune(self) -> None:
        """Remove what was not used for longest, down to the limit; what was used within the hour stays."""
        entries = [found for folder in self.folder.glob("*/*/") if (found := _entry(folder)) is not None]
        total = sum(size for _, size, _ in entries)
        for used, size, folder in sorted(entries):
            if total <= self.limit_gb * 1e9:
                return
            if time.time() - used > IN_USE_S:
                shutil.rmtree(folder, ignore_errors=True)
                total -= size


def _checksum(tensors: dict[str, Tensor]) -> str:
    checksum = 0
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.numpy(), checksum)  # type: ignore[arg-type]
    return f"{checksum:08x}"


def _entry(folder: Path) -> tuple[float, int, Path] | None:
    """When an entry was last used, its bytes, and the folder, less what a killed writer left; None if it has just gone."""
    try:
        used, size = folder.stat().st_mtime, 0
        for path in folder.iterdir():
            status = path.stat()
            if path.name.startswith(".") and time.time() - status.st_mtime > IN_USE_S:
                path.unlink(missing_ok=True)
                os.utime(folder, (used, used))
            else:
                size += status.st_size
    except OSError:
        return None
    return used, size, folder
