"""Weights of clip_exp and of other libraries: found by name, fetched, read, and turned into ours and back."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_exp.weights.files import read_weights
    from clip_exp.weights.fit import fit_weights, load_weights
    from clip_exp.weights.open_clip import from_open_clip, to_open_clip

__all__ = ["fit_weights", "from_open_clip", "load_weights", "read_weights", "to_open_clip"]
PLACES = {
    "fit_weights": "fit",
    "load_weights": "fit",
    "read_weights": "files",
    "from_open_clip": "open_clip",
    "to_open_clip": "open_clip",
}


def __getattr__(name: str) -> Any:
    """Import on first use: weights are found by name, and a model's configuration is settled, without torch."""
    if name in PLACES:
        return getattr(import_module(f"clip_exp.weights.{PLACES[name]}"), name)
    raise AttributeError(f"module 'clip_exp.weights' has no attribute '{name}'")
