"""What training on several ranks needs: the process group as Lightning sees it, and DeepSpeed's ZeRO on GPUs as well as on CPUs."""

import argparse
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from clip_exp.config.training import DeepSpeedConfig
from clip_exp.models.clip import CLIP
from clip_exp.ranks.group import rank, world_size

# What clip_exp wants of DeepSpeed unless `strategy.config` says otherwise.
DEEPSPEED_DEFAULTS = {
    "timers": {"throughput": {"enabled": False}},  # would wait for the device twice in every step
    "communication_data_type": "fp32",  # gradients are averaged as DDP's are, whatever the precision
}
# Where Lightning keeps the loss scale of float16 in a checkpoint, in the form of `GradScaler.state_dict()`.
LOSS_SCALE = MixedPrecision.__qualname__


class GroupEnvironment(ClusterEnvironment):
    """Lightning's view of the process group that `ranks.group` has joined, whatever a scheduler's variables say.

    Left to itself, Lightning takes rank and number of ranks from the first scheduler whose variables it finds, and a batch
    script has SLURM's for one task. Every process is a node with one device for Lightning, which numbers devices by local
    rank otherwise and then wants to see those of the other ranks, too: under `srun --gpus-per-task=1` there are none.
    """

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return world_size()

    def set_world_size(self, size: int) -> None:
        """The group decides."""

    def global_rank(self) -> int:
        return rank()

    def set_global_rank(self, rank: int) -> None:
        """The group decides."""

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return rank()


def deepspeed_strategy(config: DeepSpeedConfig, device: torch.device) -> "PortableDeepSpeedStrategy":
    """ZeRO as configured, with DeepSpeed's own configuration under `config.config`."""
    os.environ["DS_ACCELERATOR"] = device.type  # DeepSpeed reads it when it is imported
    interpreter = str(Path(sys.executable).parent)
    if interpreter not in os.environ["PATH"].split(os.pathsep):  # where alone it looks for ninja, for its CPU Adam
        os.environ["PATH"] = interpreter + os.pathsep + os.environ["PATH"]
    strategy = PortableDeepSpeedStrategy(
        stage=config.stage,
        offload_optimizer=config.offload,
        offload_parameters=config.offload and config.stage == 3,
        pin_memory=device.type == "cuda",  # copies from and to pageable host memory are slow, and block
    )
    assert isinstance(strategy.config, dict)
    merged: Any = OmegaConf.to_container(OmegaConf.merge(strategy.config, DEEPSPEED_DEFAULTS, config.config))
    strategy.config = merged
    return strategy


class PortableDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, on any device, with checkpoints that any other strategy can take up.

    Lightning refuses DeepSpeed off CUDA, though DeepSpeed itself runs on CPUs; and it saves DeepSpeed's own folders of pickled
    shards. Here weights and optimizer state are gathered parameter by parameter, and saved and restored as without DeepSpeed: a run
    can go on under another strategy, and its weights open without DeepSpeed.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.unchanged: dict[str, Tensor] = {}  # float32 weights and buffers that DeepSpeed keeps in low precision only

    @property
    def rounds_weights(self) -> bool:
        """Whether the weights of the forward pass are in bf16 or float16, and those that the optimizer steps in float32."""
        return self.precision_plugin.precision != "32-true"

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        # DeepSpeed would look for a compiler, and compile for a minute what only its inference engine calls.
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _set_node_environment_variables(self) -> None:
        """`ranks.group` has set them. DeepSpeed takes LOCAL_RANK for the number of the device, not for that of the rank."""
        os.environ["LOCAL_RANK"] = str(self.root_device.index or 0)

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        """As Lightning's, with a number for the device on a CPU too, where it has none, and with float32 weights that are not rounded.

        DeepSpeed makes the float32 weights that the optimizer steps from those that it has rounded. Put back, they are what the run
        starts from: the weights of `pretrained`, or of the checkpoint that it resumes from.
        """
        import deepspeed

        trained: dict[str, Tensor] = {}
        if self.rounds_weights:
            self.unchanged = dict(_not_trained(model))
            trained = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index or 0),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        for name, parameter in model.named_parameters():
            if name in trained:
                _set_whole(parameter, trained[name], None, self.world_size, self.global_rank)
        self._update_exact()
        return engine, wrapped

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **arguments: Any
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **arguments)
        self._update_exact()
        return output

    def _update_exact(self) -> None:
        """Give the model the logit scale and bias in float32: rounded, the temperature would change in steps of 1.6% and more.

        The optimizer steps a float32 copy, which is gathered here (one number); the gradient goes to the rounded parameter. DeepSpeed's
        `torch_autocast` would keep all weights in float32, with twice the memory and traffic, and clips float16 gradients before it
        unscales them.
        """
        if self.rounds_weights:
            model: CLIP = self.lightning_module.model  # type: ignore[union-attr, assignment]
            scale_and_bias = {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias}
            model.exact = {name: whole(value) for name, value in scale_and_bias.items() if value is not None}

    # ------------------------------------------------------------------------------------------------ checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights go in before DeepSpeed splits them."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        scaler = _loss_scaler(self.optimizers[0])
        scale = {} if scaler is None else {LOSS_SCALE: loss_scale_state(scaler)}
        Strategy.save_checkpoint(self, {**checkpoint, **scale}, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights in float32, gathered one parameter at a time; empty on all ranks but the first."""
        weights = {}
        for name, full in self.whole_state():
            if self.is_global_zero:
                weights[name] = full.detach().cpu().clone()
        return weights

    def whole_state(self) -> Iterator[tuple[str, Tensor]]:
        """The module's state dict, whole and in float32 on every rank (which must all ask), one at a time."""
        module = self.lightning_module
        assert module is not None
        kept = module.state_dict().keys()  # a module may have buffers that are not
        for name, parameter in module.named_parameters(remove_duplicate=False):
            yield name, self.unchanged[name] if name in self.unchanged else whole(parameter)
        for name, buffer in module.named_buffers(remove_duplicate=False):
            if name in kept:
                yield name, self.unchanged.get(name, buffer.float() if buffer.is_floating_point() else buffer)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state in the form of `torch.optim.Optimizer.state_dict()`; without tensors on all ranks but the first."""
        from deepspeed.utils import safe_get_full_optimizer_state

        _link_optimizer_state(optimizer)
        inner: Optimizer = optimizer.optimizer  # type: ignore[attr-defined]
        flats = _flat_partitions(optimizer)
        shared = {key: value for key, value in inner.state[flats[0]].items() if not _is_elementwise(value, flats[0])}
        keys = [key for key in inner.state[flats[0]] if key not in shared]
        state: dict[int, dict[str, Any]] = {}
        for index, parameter in enumerate(self._trained_parameters()):
            full = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            if self.is_global_zero:
                state[index] = {**shared, **{key: value.cpu().clone() for key, value in full.items()}}
        # Parameters have numbers, where the inner optimizer's groups have flat tensors.
        groups, numbers = [], itertools.count()
        for group, size in zip(inner.param_groups, self.lightning_module.group_sizes, strict=True):  # type: ignore[union-attr, arg-type]
            groups.append({**group, "params": list(itertools.islice(numbers, size))})
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load a whole state. ZeRO makes its flat state only at its first step, so it is made and linked here first."""
        saved = checkpoint["optimizer_states"][0]
        optimizer = self.optimizers[0]
        if (scaler := _loss_scaler(optimizer)) is not None:
            load_loss_scale(scaler, checkpoint.get(LOSS_SCALE, {}))
        inner: Optimizer = optimizer.optimizer  # type: ignore[attr-defined]
        for group, values in zip(inner.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})
        if not saved["state"]:
            return
        first = saved["state"][0]
        parameters = self._trained_parameters()
        whole_shape = getattr(parameters[0], "ds_shape", parameters[0].shape)
        keys = [key for key, value in first.items() if isinstance(value, Tensor) and value.shape == whole_shape]
        for flat in _flat_partitions(optimizer):
            shared = {
                key: _for_group(value, inner.param_groups[0], flat.device) if isinstance(value, Tensor) else value
                for key, value in first.items()
                if key not in keys
            }
            inner.state[flat] = {**shared, **{key: torch.zeros_like(flat) for key in keys}}
        _link_optimizer_state(optimizer)
        for index, parameter in enumerate(parameters):
            for key in keys:
                _set_whole(parameter, saved["state"][index][key], key, self.world_size, self.global_rank)

    def _trained_parameters(self) -> list[nn.Parameter]:
        """In the order of the optimizer's groups."""
        module: Any = self.lightning_module
        by_name = dict(module.model.named_parameters())
        return [by_name[name] for name in module.parameter_names]


def loss_scale_state(scaler: Any) -> dict[str, Any]:
    """Return the state of DeepSpeed's dynamic loss scaler as that of a `GradScaler`, which DDP's precision plugin loads.

    What a `GradScaler` does not have, and ignores, is under `deepspeed`.
    """
    counters = {name: getattr(scaler, name) for name in ("cur_iter", "last_overflow_iter", "cur_hysteresis")}
    return {**GradScaler("cpu", init_scale=float(scaler.cur_scale)).state_dict(), "deepspeed": counters}


def load_loss_scale(scaler: Any, state: Mapping[str, Any]) -> None:
    """Give DeepSpeed's dynamic loss scaler a saved state; after a run under DDP it has the scale alone, in older checkpoints nothing."""
    scaler.cur_scale = state.get("scale", scaler.cur_scale)
    for name, value in state.get("deepspeed", {}).items():
        setattr(scaler, name, value)


def _loss_scaler(optimizer: Any) -> Any | None:
    """Return the loss scaler of a ZeRO optimizer where the scale is dynamic: in float16, unless the user fixed it."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def _for_group(value: Tensor, group: dict[str, Any], device: torch.device) -> Tensor:
    """Return a copy of what parameters share (`step`), on the device where torch's optimizers want it.

    A fused or capturable step reads it in its kernel; others read it on the CPU (`Optimizer.load_state_dict` does likewise).
    """
    in_kernel = group.get("fused") or group.get("capturable")
    return value.to(device if in_kernel else "cpu", copy=True)


def _flat_partitions(optimizer: Any) -> list[Tensor]:
    """The flat float32 tensors that this rank's inner optimizer steps, under ZeRO-1 and 2, bf16 ZeRO-1, and ZeRO-3."""
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise TypeError(f"{type(optimizer).__name__} is no ZeRO optimizer that clip_exp knows")


def _link_optimizer_state(optimizer: Any) -> None:
    """Let ZeRO-1 and 2 find each parameter's part of the flat state.

    DeepSpeed 0.19 links them once, after the first group of the first step, when the other groups have no state yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _is_elementwise(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape and value.ndim > 0


def _not_trained(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Copies of the weights that do not learn, and of the buffers of modules in which none does."""
    for name, part in module.named_modules():
        weights = list(part.parameters())
        frozen = bool(weights) and not any(weight.requires_grad for weight in weights)
        own = [(key, weight) for key, weight in part.named_parameters(recurse=False) if not weight.requires_grad]
        own += part.named_buffers(recurse=False) if frozen else []
        for key, value in own:
            yield f"{name}.{key}".lstrip("."), value.detach().cpu().clone()


def whole(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's values in float32 on its device; under DeepSpeed gathered from all ranks (which must all call).

    Of a parameter that learns these are the values that the optimizer steps, not what a strategy rounds them to.
    """
    sharded = hasattr(parameter, "ds_id")
    if parameter.requires_grad and (sharded or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        values: Tensor = safe_get_full_fp32_param(parameter)
        return values.detach()
    if not sharded:
        return parameter.detach().float()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().float().clone()


def _set_whole(parameter: nn.Parameter, value: Tensor, key: str | None, ranks: int, rank: int) -> None:
    """Write this rank's part of what the optimizer has of a parameter: a state, or under None the float32 values that it steps.

    DeepSpeed 0.19's setter for ZeRO-3 fails for a parameter with fewer elements than ranks, so the part is cut out here.
    """
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        return
    size = utils.safe_get_local_optimizer_state(parameter, key).numel()
    padded = torch.zeros(size * ranks, dtype=value.dtype)
    padded[: value.numel()] = value.flatten()
    utils.safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], key)
