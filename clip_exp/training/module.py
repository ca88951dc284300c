"""The LightningModule: a dual encoder, its loss and its optimizer; one training step and the validation of a whole set."""

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from clip_exp.checkpoints.io import (
    EMA_KEY,
    name_optimizer_state,
    number_optimizer_state,
    random_state,
    set_random_state,
)
from clip_exp.config.training import TrainConfig
from clip_exp.data.images import normalize, preprocessing_of
from clip_exp.data.loader import Batch, EvalBatch
from clip_exp.devices import exact_float32
from clip_exp.evaluation.classification import build_classifier
from clip_exp.evaluation.validation import ValidationFeatures, deduplicate, validation_metrics
from clip_exp.losses.batch import CLIPOutput
from clip_exp.models.clip import CLIP
from clip_exp.ranks.group import gather_objects, share_from_main
from clip_exp.text.tokenizer import build_tokenizer
from clip_exp.training.lora import adapted_part, merge, unmerge
from clip_exp.training.optim import build_optimizer, build_scheduler, logit_scale_range, named_groups, quiet
from clip_exp.training.strategies import whole

WEIGHTS = {"state_dict", EMA_KEY}  # of the model, in a checkpoint
START_LOGIT_SCALE = "start_logit_scale"


class ZeroShot(NamedTuple):
    """Class names and templates that validation images are classified with."""

    class_names: list[str]
    templates: list[str]


class CLIPModule(pl.LightningModule):
    """Trains `model` with `loss`.

    Args:
        model: the dual encoder; see `clip_exp.models.clip.CLIP`.
        loss: (CLIPOutput, caption_id_B, image_id_B) -> scalar.
        config: the run's configuration.
        total_steps: optimizer steps of the run, which the schedule is stretched over.
        zero_shot: adds zero-shot accuracy to validation.
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
        # Read once: a strategy that splits the parameters changes their shapes, which the groups depend on.
        groups = named_groups(model, config.finetune)
        self.parameter_names = [name for members in groups.values() for name, _ in members]
        self.group_sizes = [len(members) for members in groups.values()]
        self.group_starts = [config.finetune.freeze_towers_steps if group.late else 0 for group in groups]
        self.probing = config.finetune.freeze_towers_steps > 0
        self.start_logit_scale: float | None = None  # that the run started with, however often it was resumed
        self.step_metrics: dict[str, Tensor] = {}
        self._validation: list[list[Tensor]] = []
        self._random_states: list[dict[str, Tensor]] = []
        self.train()

    def train(self, mode: bool = True) -> "CLIPModule":
        """As usual, but what does not learn stays in evaluation mode."""
        super().train(mode)
        for module in quiet(self.model, probing=self.probing):
            module.eval()
        return self

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        probing = self.trainer.global_step < self.config.finetune.freeze_towers_steps
        if probing != self.probing:
            self.probing = probing
            self.train()

    def _pixels(self, image_BCHW: Tensor) -> Tensor:
        """uint8 images to what the image tower takes, in the precision that its weights have."""
        return normalize(image_BCHW, self.preprocessing.mean, self.preprocessing.std).to(self.model.logit_scale.dtype)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output = self.model(self._pixels(batch.image), batch.tokens, self.config.micro_batch_size)
        # The loss of the global batch: features are gathered with their gradient, a rank scores its rows against all columns, and the
        # strategy's averaging over ranks gives the exact gradient. So one process, DDP and ZeRO have the same curve.
        loss = self.loss(output, batch.caption_id, batch.image_id)
        self.step_metrics["train/loss"] = loss.detach()
        self.step_metrics["train/logit_scale"] = output.logit_scale.detach().clone()
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip the gradient of the whole model by its norm, and keep the norm. DeepSpeed does both itself."""
        gradients = [p for p in self.model.parameters() if p.grad is not None]
        if gradients and not hasattr(self.trainer.strategy, "deepspeed_engine"):
            limit = self.config.trainer.gradient_clip_val or float("inf")
            self.step_metrics["train/grad_norm"] = torch.nn.utils.clip_grad_norm_(gradients, limit)

    def configure_optimizers(self) -> Any:
        if self.start_logit_scale is None:
            self.start_logit_scale = self.model.logit_scale.item()
        optimizer = build_optimizer(
            self.model,
            self.config.optimizer,
            self.config.finetune,
            logit_scale_range=logit_scale_range(self.config.loss, self.start_logit_scale),
            cpu_offload=self.config.strategy.offloads,
            scaled_gradients=self.trainer.precision == "16-mixed",
        )
        scheduler = build_scheduler(optimizer, self.config.scheduler, self.total_steps, self.group_starts)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ------------------------------------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the optimizer's state by parameter, add the random state of every rank, and merge adapters into the weights.

        Names, not numbers, so that any strategy can take the state up. Of adapted layers the base weights and factors are in the state,
        bit by bit: resuming is exact, and nothing outside training needs to know of LoRA.
        """
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
        checkpoint["optimizer_states"] = [
            number_optimizer_state(s, self.parameter_names) for s in checkpoint["optimizer_states"]
        ]
        # The state of `patience` is found by the name of its metric, which older versions called `val/zeroshot_top1`.
        checkpoint["callbacks"] = {
            key.replace("val/zeroshot_", "val/"): state for key, state in checkpoint.get("callbacks", {}).items()
        }
        self._random_states = checkpoint["random_states"]
        self.start_logit_scale = checkpoint.get(START_LOGIT_SCALE)  # older checkpoints: the scale that they have
        if self.config.finetune.lora is not None:
            for key in WEIGHTS & checkpoint.keys():
                checkpoint[key] = unmerge(checkpoint[key], checkpoint.pop(f"adapted_{key}"))

    def on_train_start(self) -> None:
        """Seed what is drawn while training (dropout), which differs from rank to rank as weights do not.

        Here, because Lightning's DDP gives all ranks the same seed when it starts. A run that resumes on as many ranks as before
        continues with their random states.
        """
        if len(self._random_states) == self.trainer.world_size:
            set_random_state(self._random_states[self.trainer.global_rank])
        else:
            torch.manual_seed(self.config.seed + 1 + self.trainer.global_rank)

    # ------------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self._validation = []
        # Running statistics of batch normalization: each rank has those of its own share, checkpoints have rank 0's.
        share_from_main(self.model.buffers())

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """Keep the batch's features and ids on the device: reading them here would wait for the GPU in every batch."""
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
        """Score the whole set at once, on the device; every image and caption counts once on any number of ranks."""
        # Through the CPU, since ranks have unequal numbers of captions, and objects of any size are gathered there.
        shares = gather_objects([torch.cat(column).cpu() for column in zip(*self._validation, strict=True)])
        self._validation = []
        features = deduplicate(*(torch.cat(column).to(self.device) for column in zip(*shares, strict=True)))
        classes = None
        if self.zero_shot is not None:
            classes = build_classifier(self.model, self.tokenizer, *self.zero_shot, device=self.device)
        metrics = self._validation_loss(features) | validation_metrics(features, classes)
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, logger=False, sync_dist=True)

    def _validation_loss(self, features: ValidationFeatures) -> dict[str, float]:
        """Mean loss over batches of the training size, each image with its first caption: comparable with `train/loss`.

        The images that fill no batch are left out; a set smaller than a batch is one batch; fewer images than ranks: no loss.
        """
        images, first = features.first_captions()
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        share = min(self.config.global_batch_size, len(images)) // ranks
        scale = whole(self.model.logit_scale).exp()
        bias = None if self.model.logit_bias is None else whole(self.model.logit_bias)
        losses = []
        for start in range(0, len(images) - share * ranks + 1, share * ranks) if share else ():
            rows = slice(start + share * rank, start + share * (rank + 1))
            output = CLIPOutput(features.image_features[images[rows]], features.text_features[first[rows]], scale, bias)
            losses.append(self.loss(output, features.caption_id[first[rows]], images[rows]))
        return {"loss": torch.stack(losses).mean().item()} if losses else {}
