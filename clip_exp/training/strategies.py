"""Distributed strategies for Lightning: its view of the process group, and DeepSpeed ZeRO on GPUs and on CPUs."""

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
from clip_exp.training.optim import named_parameters

# Settings of DeepSpeed that differ from its own defaults; `strategy.config` overrides them.
DEEPSPEED_DEFAULTS = {
    "timers": {"throughput": {"enabled": False}},  # would synchronize with the device twice per step
    "communication_data_type": "fp32",  # average gradients in float32, as DDP does, whatever the precision
}
# Key of a checkpoint under which Lightning stores the loss scale of float16, as a `GradScaler.state_dict()`.
LOSS_SCALE = MixedPrecision.__qualname__


class GroupEnvironment(ClusterEnvironment):
    """Cluster environment that describes to Lightning the process group that `ranks.group` has joined.

    By default, Lightning takes rank and number of ranks from the first scheduler whose variables it finds. In a batch script those are
    SLURM's for a single task. Every process is described as a node with one device. Otherwise Lightning would number devices by local
    rank, and require that each process sees the devices of all others, which `srun --gpus-per-task=1` hides.
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
        """Do nothing: the process group decides."""

    def global_rank(self) -> int:
        return rank()

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the process group decides."""

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return rank()


def deepspeed_strategy(config: DeepSpeedConfig, device: torch.device) -> "PortableDeepSpeedStrategy":
    """Build the ZeRO strategy; `config.config` is merged into DeepSpeed's own configuration."""
    os.environ["DS_ACCELERATOR"] = device.type  # DeepSpeed reads it when it is imported
    interpreter = str(Path(sys.executable).parent)
    if interpreter not in os.environ["PATH"].split(os.pathsep):  # to find ninja, which compiles the CPU Adam
        os.environ["PATH"] = interpreter + os.pathsep + os.environ["PATH"]
    strategy = PortableDeepSpeedStrategy(
        stage=config.stage,
        offload_optimizer=config.offload,
        offload_parameters=config.offload and config.stage == 3,
        pin_memory=device.type == "cuda",  # copies to and from pageable host memory are slow and blocking
    )
    assert isinstance(strategy.config, dict)
    merged: Any = OmegaConf.to_container(OmegaConf.merge(strategy.config, DEEPSPEED_DEFAULTS, config.config))
    strategy.config = merged
    return strategy


class PortableDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed strategy for any device, with checkpoints that any other strategy can load.

    Lightning's strategy requires CUDA, although DeepSpeed runs on CPUs, and it saves DeepSpeed's folders of pickled shards. This class
    gathers weights and optimizer state parameter by parameter, and saves and restores them as without DeepSpeed. So a run can be resumed
    with another strategy, and its weights can be loaded without DeepSpeed.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.unchanged: dict[
            str, Tensor
        ] = {}  # float32 copies of frozen weights and buffers, which DeepSpeed stores only rounded

    @property
    def rounds_weights(self) -> bool:
        """True if the forward pass uses bf16 or float16 weights, and the optimizer steps float32 copies."""
        return self.precision_plugin.precision != "32-true"

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        # Otherwise DeepSpeed would spend a minute compiling an operator that only its inference engine uses.
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _set_node_environment_variables(self) -> None:
        """Set LOCAL_RANK, which DeepSpeed uses as the index of the device; `ranks.group` has set the other variables."""
        os.environ["LOCAL_RANK"] = str(self.root_device.index or 0)

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        """Initialize DeepSpeed as Lightning does, on CPUs too, and restore the exact float32 weights.

        DeepSpeed creates the float32 weights of the optimizer from weights that it has already rounded. The exact ones are written back, so
        that the run starts from the weights of `pretrained`, or of the checkpoint that it resumes from.
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
        """Set the float32 logit scale and bias of the model: rounded, the temperature would change in steps of 1.6 % or more.

        The optimizer steps a float32 copy, a single number that is gathered here; the gradient goes to the rounded parameter. DeepSpeed's
        `torch_autocast` is no alternative: it keeps all weights in float32, with twice the memory and traffic, and clips float16 gradients
        before it unscales them.
        """
        if self.rounds_weights:
            model: CLIP = self.lightning_module.model  # type: ignore[union-attr, assignment]
            scale_and_bias = {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias}
            model.exact = {name: whole(value) for name, value in scale_and_bias.items() if value is not None}

    # ------------------------------------------------------------------------------------------------ checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: weights must be loaded before DeepSpeed shards them."""
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
        """Return the whole weights in float32, gathered one parameter at a time; empty on all ranks except rank 0."""
        weights = {}
        for name, full in self.whole_state():
            if self.is_global_zero:
                weights[name] = full.detach().cpu().clone()
        return weights

    def whole_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and whole float32 tensors of the module's state dict, one at a time. All ranks must iterate."""
        module = self.lightning_module
        assert module is not None
        persistent = module.state_dict().keys()  # without non-persistent buffers
        for name, parameter in module.named_parameters(remove_duplicate=False):
            yield name, self.unchanged[name] if name in self.unchanged else whole(parameter)
        for name, buffer in module.named_buffers(remove_duplicate=False):
            if name in persistent:
                yield name, self.unchanged.get(name, buffer.float() if buffer.is_floating_point() else buffer)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state in the form of `torch.optim.Optimizer.state_dict()`; without tensors on all ranks except rank 0."""
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
        # The inner optimizer's groups contain flat tensors; in the state dict they list the numbers of the parameters.
        groups, numbers = [], itertools.count()
        for group, size in zip(inner.param_groups, self.lightning_module.group_sizes, strict=True):  # type: ignore[union-attr, arg-type]
            groups.append({**group, "params": list(itertools.islice(numbers, size))})
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load a whole state. ZeRO creates its flat state only in its first step, so it is created and linked here first."""
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
        """Return the trained parameters in the order of the optimizer's groups."""
        module: Any = self.lightning_module
        by_name = dict(named_parameters(module.model, module.loss))
        return [by_name[name] for name in module.parameter_names]


def loss_scale_state(scaler: Any) -> dict[str, Any]:
    """Return the state of DeepSpeed's dynamic loss scaler in the form of a `GradScaler`, which DDP's precision plugin can load.

    DeepSpeed's own counters, which a `GradScaler` ignores, are under `deepspeed`.
    """
    counters = {name: getattr(scaler, name) for name in ("cur_iter", "last_overflow_iter", "cur_hysteresis")}
    return {**GradScaler("cpu", init_scale=float(scaler.cur_scale)).state_dict(), "deepspeed": counters}


def load_loss_scale(scaler: Any, state: Mapping[str, Any]) -> None:
    """Load a saved state into DeepSpeed's dynamic loss scaler: only the scale if it was saved under DDP, nothing from older checkpoints."""
    scaler.cur_scale = state.get("scale", scaler.cur_scale)
    for name, value in state.get("deepspeed", {}).items():
        setattr(scaler, name, value)


def _loss_scaler(optimizer: Any) -> Any | None:
    """Return the loss scaler of a ZeRO optimizer if the scale is dynamic (float16, unless the user fixed it), else None."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def _for_group(value: Tensor, group: dict[str, Any], device: torch.device) -> Tensor:
    """Return a copy of a state that parameters share (`step`), on the device where torch's optimizers expect it.

    A fused or capturable optimizer reads it in its kernel, others on the CPU; `Optimizer.load_state_dict` does the same.
    """
    in_kernel = group.get("fused") or group.get("capturable")
    return value.to(device if in_kernel else "cpu", copy=True)


def _flat_partitions(optimizer: Any) -> list[Tensor]:
    """Return the flat float32 tensors that this rank's inner optimizer steps, for ZeRO-1 and 2, bf16 ZeRO-1, and ZeRO-3."""
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise TypeError(f"{type(optimizer).__name__} is not a ZeRO optimizer that clip_exp supports")


def _link_optimizer_state(optimizer: Any) -> None:
    """Link each parameter to its part of the flat state of ZeRO-1 and 2.

    DeepSpeed 0.19 links them only once, after the first group of the first step, when the other groups have no state yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _is_elementwise(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape and value.ndim > 0


def _not_trained(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and copies of the frozen weights, and of the buffers of modules whose weights are all frozen."""
    for name, part in module.named_modules():
        weights = list(part.parameters())
        frozen = bool(weights) and not any(weight.requires_grad for weight in weights)
        own = [(key, weight) for key, weight in part.named_parameters(recurse=False) if not weight.requires_grad]
        own += part.named_buffers(recurse=False) if frozen else []
        for key, value in own:
            yield f"{name}.{key}".lstrip("."), value.detach().cpu().clone()


def whole(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's whole values in float32 on its device; under DeepSpeed, all ranks must call this.

    For a trained parameter these are the values that the optimizer steps, not the rounded values of the forward pass.
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
    """Write this rank's part of an optimizer state of a parameter; with `key` None, of the float32 values that the optimizer steps.

    The part is cut out here, because DeepSpeed 0.19's setter for ZeRO-3 fails for parameters with fewer elements than ranks.
    """
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        return
    size = utils.safe_get_local_optimizer_state(parameter, key).numel()
    padded = torch.zeros(size * ranks, dtype=value.dtype)
    padded[: value.numel()] = value.flatten()
    utils.safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], key)
