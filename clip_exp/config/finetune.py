"""Schema of fine-tuning: frozen layers, learning rates per tower and layer, and LoRA."""

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from clip_exp.config.base import Config, Count, Index, Positive, Proportion, Unused, must_be


class TowerTuningConfig(Config):
    """Fine-tuning of one tower.

    Depth is 0 for the embeddings, 1 to L for the L blocks, and L + 1 for the layers after the blocks.
    """

    freeze: bool = Field(
        False,
        description="freeze the tower's weights and batch-norm statistics (LiT; Zhai et al. 2022)",
    )
    unfrozen_blocks: Annotated[Index, must_be("at least 0, which trains only the layers after the blocks")] | None = (
        Field(
            None,
            description="with freeze=true: number of last blocks that are trained anyway, together with the layers after them; null: none",
        )
    )
    lr_factor: Annotated[Positive, must_be("greater than 0; freeze=true freezes a tower")] = Field(
        1.0, description="learning rate of the tower as a factor of optimizer.lr"
    )
    layer_decay: Annotated[Positive, Field(le=1)] = Field(
        1.0,
        description="layer-wise learning rate decay: additional factor layer_decay ** (L + 1 - depth), where depth is 0 for the "
        "embeddings, 1 to L for the blocks, and L + 1 after them",
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "unfrozen_blocks", lambda tower: not tower.freeze, "without {at}freeze=true", "set that, or leave this out"
        ),
        Unused(
            "lr_factor layer_decay",
            lambda tower: tower.freeze and tower.unfrozen_blocks is None,
            "with {at}freeze=true and without {at}unfrozen_blocks",
        ),
    )


class LoRAConfig(Config):
    """LoRA (Hu et al. 2022): low-rank updates B A of linear layers are trained instead of their weights, by the `peft` library.

    All other weights of both towers are frozen. Checkpoints contain the merged weights.
    """

    rank: Count = Field(16, description="rank of the updates")
    alpha: Positive = Field(32.0, description="scale of the updates: they are multiplied by alpha / rank")
    dropout: Proportion = Field(0.0, description="dropout probability of the adapters' input")
    image: bool = Field(True, description="add adapters to the image tower")
    text: bool = Field(True, description="add adapters to the text tower")
    targets: list[str] = Field(
        [],
        description="linear layers with adapters, by the end of their names, such as attention.qkv; empty: all linear layers of the blocks",
    )

    def rules(self, at: str) -> Iterator[str]:
        if not (self.image or self.text):
            yield f"{at}image and {at}text are both false: at least one tower must have adapters."


def _frozen_without_adapters(tower: str) -> Unused:
    return Unused(
        f"{tower}.lr_factor {tower}.layer_decay",
        lambda tuning: tuning.lora is not None and not getattr(tuning.lora, tower),
        f"since {{at}}lora.{tower}=false freezes the tower",
    )


class FineTuneConfig(Config):
    """Fine-tuning of pretrained weights: which of them are trained, and how fast."""

    image: TowerTuningConfig = Field(default_factory=TowerTuningConfig, description="fine-tuning of the image tower")
    text: TowerTuningConfig = Field(default_factory=TowerTuningConfig, description="fine-tuning of the text tower")
    lora: LoRAConfig | None = Field(
        None,
        description="LoRA: train low-rank updates of linear layers instead of their weights (finetune=lora); null: no adapters",
    )
    freeze_towers_steps: Index = Field(
        0,
        description="number of first steps in which only the projections and the logit scale learn (LP-FT, Kumar et al. 2022)",
    )

    unused: ClassVar[tuple[Unused, ...]] = (_frozen_without_adapters("image"), _frozen_without_adapters("text"))

    def rules(self, at: str) -> Iterator[str]:
        if self.lora is None:
            if all(tower.freeze and tower.unfrozen_blocks is None for tower in (self.image, self.text)):
                yield (
                    f"{at}image.freeze and {at}text.freeze are both true, so only the logit scale would be trained: "
                    "leave one out, or set unfrozen_blocks."
                )
            return
        for name, tower in (("image", self.image), ("text", self.text)):
            if tower.freeze:
                yield (
                    f"{at}{name}.freeze and {at}lora exclude each other: lora freezes all weights already. "
                    f"To train no adapters in the {name} tower, set {at}lora.{name}=false."
                )
        if self.freeze_towers_steps:
            yield f"{at}freeze_towers_steps and {at}lora exclude each other: lora freezes the projections."
