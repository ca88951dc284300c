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
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_exp import __version__

log = logging.getLogger(__name__)
IN_USE_S = 3600.0  # an entry that was used this recently may be another process's


class Cache:
    """A folder of entries.

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
        if folder.is_dir():
            os.utime(folder)
        return folder

    def read(self, entry: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and metadata of a file; None if there is none, or it is damaged."""
        path = entry / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged (%s) and is made again.", path, error)
            return None

    def write(self, entry: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Keep tensors; a disk that is full or read-only is told once, and the evaluation goes on without."""
        if self._refused:
            return
        temporary = entry / f".{name}.{os.getpid()}"
        try:
            entry.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata)
            temporary.replace(entry / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            self._refused = True
            temporary.unlink(missing_ok=True)
            log.warning(
                "features cannot be kept in %s (%s): an interrupted evaluation would start over.", self.folder, error
            )

    def prune(self) -> None:
        """Remove what was not used for longest, down to the limit; what was used within the hour stays."""
        entries = [(folder.stat().st_mtime, _bytes(folder), folder) for folder in self.folder.glob("*/*/")]
        total = sum(size for _, size, _ in entries)
        for used, size, folder in sorted(entries):
            if total <= self.limit_gb * 1e9:
                return
            if time.time() - used > IN_USE_S:
                shutil.rmtree(folder, ignore_errors=True)
                total -= size


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
