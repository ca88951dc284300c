"""The LightningModule of a run: training step, optimizer, validation, and its part of a checkpoint.

A training step encodes this rank's pairs and computes the loss of the global batch. Lightning's strategy averages the gradients,
and `Checkpointer` (`callbacks`) decides when to save. Validation collects the features of the whole set and scores them once, at the
end.
"""

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from clip_exp.checkpoints.io import (
    EMA_KEY,
    LOSS_STATE,
    name_optimizer_state,
    number_optimizer_state,
    random_state,
    set_random_state,
)
from clip_exp.config.files import OLDER_METRICS
from clip_exp.config.training import TrainConfig
from clip_exp.data.images import normalize, preprocessing_of
from clip_exp.data.loader import Batch, EvalBatch
from clip_exp.devices import exact_float32
from clip_exp.errors import CheckpointError
from clip_exp.evaluation.classification import build_classifier
from clip_exp.evaluation.validation import ValidationFeatures, deduplicate, validation_metrics
from clip_exp.losses.batch import CLIPOutput
from clip_exp.models.clip import CLIP
from clip_exp.ranks.group import broadcast_from_main, gather_objects
from clip_exp.text.tokenizer import build_tokenizer
from clip_exp.training.lora import adapted_part, merge, unmerge
from clip_exp.training.optim import (
    build_optimizer,
    build_scheduler,
    frozen_modules,
    frozen_names,
    hash_of,
    logit_scale_range,
    named_groups,
)
from clip_exp.training.skipped_steps import skip_step
from clip_exp.training.strategies import whole

WEIGHTS = {"state_dict", EMA_KEY}  # keys of a checkpoint that hold weights of the model
START_LOGIT_SCALE = "start_logit_scale"
FROZEN_LOSS = "frozen_loss_sha256"  # key of a checkpoint with the hash of the frozen weights of the loss
LOSS_PREFIX = "loss."


class ZeroShot(NamedTuple):
    """Class names and prompt templates for zero-shot classification of the validation images."""

    class_names: list[str]
    templates: list[str]


class CLIPModule(pl.LightningModule):
    """Lightning module that trains a dual encoder.

    Args:
        model: the dual encoder; see `clip_exp.models.clip.CLIP`.
        loss: module that maps (CLIPOutput, caption_id_B, image_id_B) to a scalar. Its parameters are trained with those of the model.
        config: configuration of the run.
        total_steps: optimizer steps of the run, the length of the learning rate schedule.
        zero_shot: class names and templates; None: validation reports no zero-shot accuracy.
    """

    def __init__(
        self, model: CLIP, loss: nn.Module, config: TrainConfig, total_steps: int, zero_shot: ZeroShot | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.config = config
        self.total_steps = total_steps
        self.zero_shot = zero_shot
        self.tokenizer = build_tokenizer(config.model.text)
        self.preprocessing = preprocessing_of(config.model.image)
        # Computed once, here: ZeRO-3 later replaces the parameters by flat parts, and the groups depend on their shapes.
        groups = named_groups(model, config.finetune, loss)
        self.parameter_names = [name for members in groups.values() for name, _ in members]
        self.group_sizes = [len(members) for members in groups.values()]
        self.group_starts = [config.finetune.freeze_towers_steps if group.delayed else 0 for group in groups]
        self.towers_frozen = config.finetune.freeze_towers_steps > 0
        self.frozen_loss = frozen_names(loss)
        self.frozen_loss_sha256 = hash_of(loss, self.frozen_loss)
        self.start_logit_scale: float | None = None  # value at step 0 of the run, also after it was resumed
        self.step_metrics: dict[str, Tensor] = {}
        self.skipped = torch.tensor(False)  # whether the gradient of the last step was not finite; see `skipped_steps`
        # Features of this rank's last batch with the ids of their images and captions, for `diagnosis`
        self.last_features: dict[str, tuple[Tensor, Tensor]] = {}
        self._validation: list[list[Tensor]] = []
        self._random_states: list[dict[str, Tensor]] = []
        self.train()

    def train(self, mode: bool = True) -> "CLIPModule":
        """Set training mode, except for frozen modules: those stay in evaluation mode, without dropout or updates of statistics."""
        super().train(mode)
        towers = [self.model.image, self.model.text] if self.towers_frozen else []
        for module in (*towers, *frozen_modules(self.model), *frozen_modules(self.loss)):
            module.eval()
        return self

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # LP-FT: after the first steps, in which only the projections learn, the towers go back to training mode.
        towers_frozen = self.trainer.global_step < self.config.finetune.freeze_towers_steps
        if towers_frozen != self.towers_frozen:
            self.towers_frozen = towers_frozen
            self.train()

    def _pixels(self, image_BCHW: Tensor) -> Tensor:
        """Normalize uint8 images for the image tower, in the dtype of the weights. On the device: uint8 is a quarter of the bytes to copy."""
        return normalize(image_BCHW, self.preprocessing.mean, self.preprocessing.std).to(self.model.logit_scale.dtype)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        texts = {name: value for name, value in batch.columns.items() if not value.is_floating_point()}
        output = self.model(self._pixels(batch.image), batch.tokens, self.config.micro_batch_size, texts)
        columns = {name: output.columns.get(name, value) for name, value in batch.columns.items()}
        # This is the loss of the global batch, not of this rank's part: the loss gathers the features of all ranks with their gradient
        # and compares this rank's rows with all columns. Averaged over the ranks by the strategy, the gradient is exact. So one
        # process, DDP and ZeRO have the same loss curve.
        inputs = output._replace(columns=columns, images=batch.image, tokens=batch.tokens)
        loss = self.loss(inputs, batch.caption_id, batch.image_id)
        self.last_features = {
            "image": (output.image_features.detach(), batch.image_id),
            "text": (output.text_features.detach(), batch.caption_id),
        }
        self.step_metrics["train/loss"] = loss.detach()
        self.step_metrics["train/logit_scale"] = output.logit_scale.detach().clone()
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip the gradient of the model and the loss, and skip the step if it is not finite. DeepSpeed does both itself."""
        gradients = [p for p in self.parameters() if p.grad is not None]
        if gradients and not hasattr(self.trainer.strategy, "deepspeed_engine"):
            limit = self.config.trainer.gradient_clip_val or float("inf")
            by_value = self.config.trainer.gradient_clip_algorithm == "value"
            norm = torch.nn.utils.clip_grad_norm_(gradients, float("inf") if by_value else limit)
            if by_value:
                torch.nn.utils.clip_grad_value_(gradients, limit)
            self.step_metrics["train/grad_norm"] = norm
            self.skipped = ~torch.isfinite(norm)
            skip_step(optimizer, self.skipped)

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and the learning rate schedule that is stepped once per optimizer step."""
        if self.start_logit_scale is None:
            self.start_logit_scale = self.model.logit_scale.item()
        optimizer = build_optimizer(
            self.model,
            self.config.optimizer,
            self.config.finetune,
            self.loss,
            logit_scale_range=logit_scale_range(self.config.loss, self.start_logit_scale),
            cpu_offload=self.config.strategy.offloads,
            scaled_gradients=self.trainer.precision == "16-mixed",
        )
        scheduler = build_scheduler(optimizer, self.config.scheduler, self.total_steps, self.group_starts)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ------------------------------------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Key the optimizer state by parameter name, add the random state of every rank, and merge LoRA adapters into the weights.

        Names instead of numbers let any other strategy load the state. For adapted layers the state also contains the base weights and
        factors unchanged: resuming is exact, and nothing outside training needs to know about LoRA. Weights of the loss are not part of
        the model, so they are in the state too; frozen ones, such as a teacher's, are only identified by a hash.
        """
        of_loss = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith(LOSS_PREFIX)}
        checkpoint[LOSS_STATE] = {
            name: value
            for key, value in of_loss.items()
            if (name := key.removeprefix(LOSS_PREFIX)) not in self.frozen_loss
        }
        checkpoint[FROZEN_LOSS] = self.frozen_loss_sha256
        checkpoint["optimizer_states"] = [
            name_optimizer_state(s, self.parameter_names) for s in checkpoint["optimizer_states"]
        ]
        checkpoint["random_states"] = gather_objects(random_state())
        checkpoint[START_LOGIT_SCALE] = self.start_logit_scale
        if self.config.finetune.lora is not None:
            for key in WEIGHTS & checkpoint.keys():
                checkpoint[f"adapted_{key}"] = adapted_part(checkpoint[key])
                checkpoint[key] = merge(checkpoint[key], self.config.finetune.lora)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Undo what `on_save_checkpoint` did; the random states are restored when training starts."""
        checkpoint["optimizer_states"] = [
            number_optimizer_state(s, self.parameter_names) for s in checkpoint["optimizer_states"]
        ]
        # Lightning finds the state of `patience` by a key that contains the name of its metric.
        for name, older in OLDER_METRICS.items():
            checkpoint["callbacks"] = {
                key.replace(older, name): state for key, state in checkpoint.get("callbacks", {}).items()
            }
        if checkpoint.get(FROZEN_LOSS) != self.frozen_loss_sha256:
            raise CheckpointError(
                "the frozen weights of the loss differ from those that the run started with. Restore them, or set resume=never to start "
                "a new run."
            )
        frozen = {name: value for name, value in self.loss.state_dict().items() if name in self.frozen_loss}
        for name, value in {**frozen, **checkpoint.get(LOSS_STATE, {})}.items():
            checkpoint["state_dict"][f"{LOSS_PREFIX}{name}"] = value
        self._random_states = checkpoint["random_states"]
        # Missing in older checkpoints: the run then continues with the scale that they contain.
        self.start_logit_scale = checkpoint.get(START_LOGIT_SCALE)
        if self.config.finetune.lora is not None:
            for key in WEIGHTS & checkpoint.keys():
                checkpoint[key] = unmerge(checkpoint[key], checkpoint.pop(f"adapted_{key}"))

    def on_train_start(self) -> None:
        """Seed dropout differently on every rank; a run that resumes on the same number of ranks restores their random states.

        This must happen here: Lightning's DDP gives all ranks the same seed when it starts, which is right for the initial weights only.
        """
        if len(self._random_states) == self.trainer.world_size:
            set_random_state(self._random_states[self.trainer.global_rank])
        else:
            torch.manual_seed(self.config.seed + 1 + self.trainer.global_rank)

    # ------------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self._validation = []
        # Each rank has the batch normalization statistics of its own part of the data. Checkpoints contain those of rank 0, so all
        # ranks validate with these.
        broadcast_from_main(self.model.buffers())

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """Store the batch's features and ids on the device: reading them here would wait for the GPU in every batch."""
        columns = [
            batch.index,
            self.model.encode_image(self._pixels(batch.image), normalize=True).float(),
            batch.label,
            batch.caption_index,
            self.model.encode_text(batch.tokens, normalize=True).float(),
            batch.caption_image,
            batch.caption_id,
        ]
        self._validation.append(columns)

    @exact_float32()
    def on_validation_epoch_end(self) -> None:
        """Score the whole validation set on the device. Every image and caption counts once, whatever the number of ranks."""
        # On the CPU, because ranks have different numbers of captions: objects may differ in size, tensors of a collective may not.
        parts = gather_objects([torch.cat(column).cpu() for column in zip(*self._validation, strict=True)])
        self._validation = []
        features = deduplicate(*(torch.cat(column).to(self.device) for column in zip(*parts, strict=True)))
        classes = None
        if self.zero_shot is not None:
            classes = build_classifier(self.model, self.tokenizer, *self.zero_shot, device=self.device)
        metrics = self._validation_loss(features) | validation_metrics(features, classes)
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, logger=False, sync_dist=True)

    def _validation_loss(self, features: ValidationFeatures) -> dict[str, float]:
        """Return the mean loss over batches of the training size, so that it is comparable with `train/loss`.

        Each image is paired with its first caption. Images that do not fill a last batch are left out. A set smaller than a batch is one
        batch. With fewer images than ranks there is no loss, nor with a custom loss that needs more than features and ids.
        """
        images, first = features.first_captions()
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        per_rank = min(self.config.global_batch_size, len(images)) // ranks
        scale = whole(self.model.logit_scale).exp()
        bias = None if self.model.logit_bias is None else whole(self.model.logit_bias)
        if getattr(self.loss, "needs_batch", False):
            return {}
        losses = []
        for start in range(0, len(images) - per_rank * ranks + 1, per_rank * ranks) if per_rank else ():
            rows = slice(start + per_rank * rank, start + per_rank * (rank + 1))
            output = CLIPOutput(features.image_features[images[rows]], features.text_features[first[rows]], scale, bias)
            losses.append(self.loss(output, features.caption_id[first[rows]], images[rows]))
        return {"loss": torch.stack(losses).mean().item()} if losses else {}
