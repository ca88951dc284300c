"""Module around a user's loss, which makes a formula for one process exact on any number of ranks.

Every rank gathers the rows of the global batch and computes the whole loss. The backward pass of the gather sums the gradients over
the ranks, and the strategy averages those of the parameters, so that each parameter has the gradient of the loss of one process.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from clip_exp.config.model import TOWERS
from clip_exp.config.targets import parameters_of
from clip_exp.errors import ConfigError
from clip_exp.losses.batch import CLIPOutput, gather, gather_with_grad
from clip_exp.losses.custom import INPUTS


class CustomLoss(nn.Module):
    """Loss that passes its inputs by name to the user's loss.

    Args:
        function: the user's module or function.
        target: its name, for messages.
        gather: pass the rows of the global batch instead of those of this rank.

    Attributes:
        names: names of the arguments of the user's loss.
        required: those without a default.
        takes_all: whether it takes all inputs, as `**inputs`.
        towers: towers whose features it takes.
        needs_batch: whether the loss needs more than features and ids, so that it cannot be computed in validation.
    """

    def __init__(self, function: Callable[..., Tensor], target: str, *, gather: bool = True) -> None:
        super().__init__()
        self.function = function  # registered as a submodule if it is a module
        self.target, self.gather = target, gather
        parameters = parameters_of(function.forward if isinstance(function, nn.Module) else function) or {}
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.names = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.required = {name for name in self.names if parameters[name].default is parameters[name].empty}
        self.towers = [tower for tower in TOWERS if self.takes_all or f"{tower}_features" in self.names]
        for module in self.modules():
            if module not in (self, function) and any(p.requires_grad for p in module.parameters(recurse=False)):
                _compute_in_own_dtype(module)
        self.per_rank: Callable[..., dict[str, Tensor]] | None = getattr(function, "per_rank", None)
        self.needs_batch = self.per_rank is not None or bool(self.required - {*INPUTS})

    def forward(self, output: CLIPOutput, caption_id_B: Tensor, image_id_B: Tensor) -> Tensor:
        """Compute the loss, a float32 scalar, from a model's output and the int64 ids of its captions and images."""
        device = output.image_features.device
        rows = {
            "image_features": output.image_features,
            "text_features": output.text_features,
            "caption_ids": caption_id_B,
            "image_ids": image_id_B,
            **output.columns,
            **self._per_rank(output),
        }
        # Without autocast: bf16 logits up to 100 would be rounded to multiples of 0.5.
        with torch.autocast(device.type, enabled=False):
            if self.gather:
                rows = {name: _gathered(value) for name, value in rows.items()}
            scale_and_bias = {"logit_scale": output.logit_scale}
            if output.logit_bias is not None:
                scale_and_bias["logit_bias"] = output.logit_bias
            inputs = {name: _float32(value) for name, value in {**rows, **scale_and_bias}.items()}
            taken = {name: value for name, value in inputs.items() if self.takes_all or name in self.names}
            loss = self.function(**taken)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ConfigError(f"loss._target_={self.target} returned {what}, but a scalar tensor is required.")
            # DDP waits for a gradient of every parameter, also where the loss does not use the output of a tower.
            for value in (value for name, value in inputs.items() if name not in taken and value.requires_grad):
                loss = loss + 0.0 * value.sum()
            return loss.float().reshape(())

    def _per_rank(self, output: CLIPOutput) -> dict[str, Tensor]:
        """Return what the user's loss computes from the inputs of this rank, such as the features of a teacher."""
        if self.per_rank is None:
            return {}
        if output.images is None:
            raise ValueError("the output has no images")
        given = {"images": output.images, "tokens": output.tokens}
        names = (parameters_of(self.per_rank) or {}).keys()
        # Strategies that round weights to bf16 or float16 also round those of the loss.
        rounded = {p.dtype for p in self.parameters()} - {torch.float32}
        device_type = output.images.device.type
        with torch.autocast(device_type, dtype=rounded.pop()) if rounded else nullcontext():
            return self.per_rank(**{name: value for name, value in given.items() if name in names})


def _compute_in_own_dtype(module: nn.Module) -> None:
    """Let a module cast its input to the dtype of its weights, and its output to float32.

    Strategies that round weights to bf16 or float16 also round those of the loss, whose other inputs are float32.
    """

    def cast_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        dtype = next(module.parameters(recurse=False)).dtype
        return None if dtype == torch.float32 else tree_map_only(Tensor, partial(_cast, dtype=dtype), (args, kwargs))

    def cast_output(module: nn.Module, args: Any, output: Any) -> Any:
        return tree_map_only(Tensor, _float32, output)

    module.register_forward_pre_hook(cast_input, with_kwargs=True)
    module.register_forward_hook(cast_output)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _gathered(value: Tensor) -> Tensor:
    return gather_with_grad(value) if value.requires_grad else gather(value)


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
