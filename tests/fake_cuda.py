"""Tensors that say they are on a GPU, for tests of what would run there on machines without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from clip_exp.config.model import ModelConfig
from clip_exp.data.images import per_channel
from clip_exp.models.clip import CLIP, build_model


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Run operations without computing anything, on any device."""
    per_channel.cache_clear()  # what it keeps is of this context alone
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(torch.Tensor, "pin_memory", lambda self: self),  # needs a driver
    ):
        yield
    per_channel.cache_clear()


def fake_model(config: ModelConfig, device: str, **arguments: float) -> CLIP:
    """Return a model of fake tensors; to be called within `fake_tensors`."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        model = build_model(config, **arguments)
    return model.to_empty(device=device)


@contextmanager
def autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """As `torch.autocast`, which does nothing for `cuda` where there is no GPU."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
