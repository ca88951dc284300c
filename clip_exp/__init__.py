"""clip_exp: a config-driven framework for CLIP experiments.

`load` opens a model for inference, `train` and `evaluate` run the commands of the same names, `Run` is a training run with
its results, and `find_images` lists image files. The command line is `clip-exp --help`.
"""

from typing import TYPE_CHECKING, Any

from clip_exp._version import __version__

if TYPE_CHECKING:
    from clip_exp.api import Run, evaluate, find_images, load, train

__all__ = ["Run", "__version__", "evaluate", "find_images", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import the Python API on first use, so that `import clip_exp` and `--help` are fast."""
    if name in __all__:
        from clip_exp import api

        return getattr(api, name)
    raise AttributeError(f"module 'clip_exp' has no attribute '{name}'")


def __dir__() -> list[str]:
    """Return the names of the module, with the API that is not imported yet."""
    return sorted({*globals(), *__all__})
