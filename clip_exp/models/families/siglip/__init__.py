"""Configuration of SigLIP's towers (Zhai et al. 2023): a Vision Transformer with attention pooling, and a bidirectional text transformer."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from clip_exp.config.model import ModelConfig
from clip_exp.models.families.clip import (
    OPEN_CLIP_BLOCK,
    TRANSFORMERS_BLOCK,
    PatchTransformerConfig,
    TokenTransformerConfig,
)
from clip_exp.open_clip_files import published
from clip_exp.renaming import (
    BATCHED,
    FLAX_PATCHES,
    KERNEL,
    TOKEN,
    Names,
    Row,
    dense,
    into_heads,
    norm,
    out_of_heads,
)

if TYPE_CHECKING:
    from torch import nn

# The pooling of clip_exp has separate parameters for query, keys and values, because its query is learned.
POOL_PARTS = ("pool.attention.q.", "pool.attention.key_", "pool.attention.value_")

POOL, ATTENTION = "MAPHead_0.", "MultiHeadDotProductAttention_0."
BIG_VISION_BLOCK = (
    *norm(".ln_1.", ".LayerNorm_0."),
    *norm(".ln_2.", ".LayerNorm_1."),
    *into_heads(".attention.qkv.", f".{ATTENTION}", "query", "key", "value"),
    *out_of_heads(".attention.out.", f".{ATTENTION}out."),
    *dense(".mlp.fc.", ".MlpBlock_0.Dense_0."),
    *dense(".mlp.proj.", ".MlpBlock_0.Dense_1."),
)


class SigLIPImageConfig(PatchTransformerConfig):
    """Vision Transformer with attention pooling by a learned query. It has no projection, so `embed_dim` is `width`."""

    kind: Literal["siglip"] = "siglip"

    in_open_clip: ClassVar[bool] = True
    names: ClassVar[dict[str, Names]] = {
        "clip_exp": Names((), ("pool.latent",)),
        "open_clip": Names(
            (
                Row("patch_embedding.weight", "trunk.patch_embed.proj.weight", KERNEL),
                Row("patch_embedding.bias", "trunk.patch_embed.proj.bias"),
                Row("positional_embedding", "trunk.pos_embed", BATCHED),
                Row("transformer.blocks.", "trunk.blocks."),
                Row("ln_post.", "trunk.norm."),
                Row("pool.latent", "trunk.attn_pool.latent", TOKEN),
                Row("pool.attention.q.", "trunk.attn_pool.q."),
                Row(POOL_PARTS[1:], "trunk.attn_pool.kv."),
                Row("pool.attention.out.", "trunk.attn_pool.proj."),
                Row("pool.ln.", "trunk.attn_pool.norm."),
                Row("pool.mlp.", "trunk.attn_pool.mlp."),
                Row(".ln_1.", ".norm1."),
                Row(".attention.qkv.", ".attn.qkv."),
                Row(".attention.out.", ".attn.proj."),
                Row(".ln_2.", ".norm2."),
                Row(".mlp.fc.", ".mlp.fc1."),
                Row(".mlp.proj.", ".mlp.fc2."),
            ),
            ("trunk.", "trunk.attn_pool.latent"),
        ),
        "transformers": Names(
            (
                Row("patch_embedding.weight", "vision_model.embeddings.patch_embedding.weight", KERNEL),
                Row("patch_embedding.bias", "vision_model.embeddings.patch_embedding.bias"),
                Row("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
                Row("transformer.blocks.", "vision_model.encoder.layers."),
                Row("ln_post.", "vision_model.post_layernorm."),
                Row("pool.latent", "vision_model.head.probe", TOKEN),
                Row(POOL_PARTS, "vision_model.head.attention.in_proj_"),
                Row("pool.attention.out.", "vision_model.head.attention.out_proj."),
                Row("pool.ln.", "vision_model.head.layernorm."),
                Row("pool.mlp.", "vision_model.head.mlp."),
                *TRANSFORMERS_BLOCK,
            ),
            ("vision_model.head.probe",),
        ),
        "big_vision": Names(
            (
                Row("patch_embedding.weight", "embedding.kernel", FLAX_PATCHES),
                Row("patch_embedding.bias", "embedding.bias"),
                Row("positional_embedding", "pos_embedding", BATCHED),
                Row("transformer.blocks.", "Transformer.encoderblock_"),
                *norm("ln_post.", "Transformer.encoder_norm."),
                Row("pool.latent", f"{POOL}probe", TOKEN),
                *into_heads("pool.attention.q.", f"{POOL}{ATTENTION}", "query"),
                *into_heads("pool.attention.key_", f"{POOL}{ATTENTION}", "key"),
                *into_heads("pool.attention.value_", f"{POOL}{ATTENTION}", "value"),
                *out_of_heads("pool.attention.out.", f"{POOL}{ATTENTION}out."),
                *norm("pool.ln.", f"{POOL}LayerNorm_0."),
                *dense("pool.mlp.fc.", f"{POOL}MlpBlock_0.Dense_0."),
                *dense("pool.mlp.proj.", f"{POOL}MlpBlock_0.Dense_1."),
                *BIG_VISION_BLOCK,
            ),
            ("embedding.kernel", f"{POOL}probe"),
        ),
    }

    def fits(self, model: ModelConfig, at: str) -> Iterator[str]:
        if self.width != model.embed_dim:
            yield (
                f"{at}embed_dim={model.embed_dim} must be {at}image.width={self.width}: a siglip image tower has "
                "no projection."
            )

    def build(self, model: ModelConfig, own_weights: bool = False) -> "nn.Module":
        from clip_exp.models.families.siglip.towers import SigLIPImage  # imports torch

        return SigLIPImage(**self.patch_transformer(model))

    def open_clip_cfg(self, model: ModelConfig) -> dict[str, Any]:
        return {**published(model.open_clip_name)["vision_cfg"], "image_size": self.image_size}

    def open_clip_problems(self, model: ModelConfig) -> Iterator[str]:
        if not published(model.open_clip_name):
            yield (
                "format=open_clip refers to SigLIP's image tower by the name of its timm backbone: set model.open_clip_name to "
                "open_clip's name of the same architecture, such as ViT-B-16-SigLIP, or use format=huggingface, safetensors or onnx."
            )


class SigLIPTextConfig(TokenTransformerConfig):
    """Bidirectional transformer that pools at the last token; texts are always padded to the context length."""

    kind: Literal["siglip"] = "siglip"
    tokenizer: str = Field(description="tokenizer: a name on the Hugging Face hub, or a folder")

    in_open_clip: ClassVar[bool] = True
    sigmoid: ClassVar[bool] = True
    openai_tokenizer: ClassVar[bool] = False
    names: ClassVar[dict[str, Names]] = {
        "clip_exp": Names((), ("token_embedding.", "projection.bias")),
        "open_clip": Names(
            (Row("projection.", "text_projection."), *OPEN_CLIP_BLOCK), ("token_embedding.", "text_projection.bias")
        ),
        "transformers": Names(
            (
                Row("token_embedding.", "text_model.embeddings.token_embedding."),
                Row("positional_embedding", "text_model.embeddings.position_embedding.weight"),
                Row("transformer.blocks.", "text_model.encoder.layers."),
                Row("ln_final.", "text_model.final_layer_norm."),
                Row("projection.", "text_model.head."),
                *TRANSFORMERS_BLOCK,
            ),
            ("text_model.embeddings.token_embedding.", "text_model.head."),
        ),
        "big_vision": Names(
            (
                Row("token_embedding.weight", "Embed_0.embedding"),
                Row("positional_embedding", "pos_embedding", BATCHED),
                Row("transformer.blocks.", "Encoder_0.encoderblock_"),
                *norm("ln_final.", "Encoder_0.encoder_norm."),
                *dense("projection.", "head."),
                *BIG_VISION_BLOCK,
            ),
            ("Embed_0.", "head."),
        ),
    }

    def build(self, model: ModelConfig, own_weights: bool = False) -> "nn.Module":
        from clip_exp.models.families.siglip.towers import SigLIPText  # imports torch

        return SigLIPText(**self.token_transformer(model))

    def open_clip_model(self, model: ModelConfig) -> dict[str, Any]:
        return {"custom_text": True}  # its weights have the prefix `text.`

    def open_clip_cfg(self, model: ModelConfig) -> dict[str, Any]:
        values = super().open_clip_cfg(model)
        different = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
        return values | different
