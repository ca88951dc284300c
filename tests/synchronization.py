"""Operations that let the process wait for the GPU, found without one: by watching what is dispatched on fake CUDA tensors.

with FakeTensorMode(allow_non_fake_inputs=True), SynchronizationWatch() as watch:
    ...  # on tensors made with device="cuda"
assert watch.found == []
"""

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The process needs a number of the GPU's: a value, or how many elements the result has.
READS = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "repeat_interleave", "bincount",
    "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
TESTS = Path(__file__).parent


class SynchronizationWatch(TorchDispatchMode):
    """A context that notes every operation after which the process waits for the GPU.

    Attributes:
        found: of each, in order: the operation, and the line of the package or of the test that it came from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        inputs = tree_leaves((args, kwargs))
        # Before it runs: an operation on fake tensors fails where it needs a number of theirs.
        if "cuda" in _device_types(inputs):
            by_mask = name in INDEXING and any(_is_mask(index) for index in tree_leaves(args[1]))
            if by_mask or name in READS:
                self._note(f"{name} by a mask" if by_mask else name)
        result = func(*args, **(kwargs or {}))
        outputs = tree_leaves(result)
        if (
            name in COPIES
            and {"cpu", "cuda"} <= _device_types(inputs + outputs)
            and not _does_not_block(func, args, kwargs)
        ):
            self._note(f"{name} between cpu and cuda")
        return result

    def _note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if _is_ours(frame.filename)]
        place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        self.found.append(what + place)


def _device_types(values: list[Any]) -> set[str]:
    return {value.device.type for value in values if isinstance(value, torch.Tensor)}


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)


def _does_not_block(func: Any, args: Any, kwargs: Any) -> bool:
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
    return bool(named.get("non_blocking"))


def _is_ours(filename: str) -> bool:
    path = Path(filename)
    return path != Path(__file__) and (TESTS in path.parents or TESTS.parent / "clip_exp" in path.parents)
