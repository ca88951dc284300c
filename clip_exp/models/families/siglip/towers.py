"""Towers of SigLIP (Zhai et al. 2023): a Vision Transformer with attention pooling, and a bidirectional text transformer.

All layer norms have eps 1e-6, as in big_vision, where the published weights come from.
"""

import torch
from torch import Tensor, nn

from clip_exp.models.families.clip.text import init_text_weights
from clip_exp.models.families.clip.vit import PatchDropout, to_patches
from clip_exp.models.layers import MLP, AttentionPool, LayerNorm, Transformer

NORM_EPS = 1e-6


class LatentPool(nn.Module):
    """Attention pooling with a learned query, followed by an MLP: [B, N, D] to [B, D] (Lee et al. 2019)."""

    def __init__(self, width: int, heads: int, *, mlp_ratio: float, activation: str) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.empty(width))
        self.attention = AttentionPool(width, heads, width)
        self.ln = LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, int(width * mlp_ratio), activation)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BD = self.attention(self.latent.to(x_BND.dtype).expand(len(x_BND), -1), x_BND)
        return x_BD + self.mlp(self.ln(x_BD))


class SigLIPImage(nn.Module):
    """Vision Transformer that maps images to features of `width` channels. It has no projection, so `embed_dim` is `width`.

    Initialized as in timm, from which open_clip takes this tower: N(0, 0.02²) for matrices and positions, zero biases, torch's defaults
    for the patch embedding, and for the query a normal distribution with standard deviation width**-0.5, truncated at 2 of them.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        dropout: float = 0.0,
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_embedding = nn.Linear(3 * patch_size**2, width)
        self.positional_embedding = nn.Parameter(torch.empty((image_size // patch_size) ** 2, width))
        self.patch_dropout = PatchDropout(patch_dropout)
        self.transformer = Transformer(
            width,
            layers,
            heads,
            mlp_ratio=mlp_ratio,
            activation=activation,
            dropout=dropout,
            causal=False,
            norm_eps=NORM_EPS,
        )
        self.ln_post = LayerNorm(width, eps=NORM_EPS)
        self.pool = LatentPool(width, heads, mlp_ratio=mlp_ratio, activation=activation)
        self._init_weights(width)

    def _init_weights(self, width: int) -> None:
        nn.init.normal_(self.positional_embedding, std=0.02)
        nn.init.trunc_normal_(self.pool.latent)
        with torch.no_grad():
            self.pool.latent.mul_(width**-0.5)
        for part in (self.transformer, self.pool):
            for name, parameter in part.named_parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return features, not normalized.

        Args:
            image_BCHW: float images of side `image_size`, normalized by the mean and standard deviation of each channel.

        Returns:
            [B, width].
        """
        patch_BND = self.patch_embedding(to_patches(image_BCHW, self.patch_size))
        patch_BND = self.patch_dropout(patch_BND + self.positional_embedding.to(patch_BND.dtype))
        return self.pool(self.ln_post(self.transformer.forward_all(patch_BND)))


class SigLIPText(nn.Module):
    """Bidirectional transformer that maps token ids to features.

    Every token attends to all tokens, including padding, and the last one is pooled. So texts must be padded to `context_length`: a
    shorter batch would have different features. Initialized like CLIP's text tower, as in open_clip.
    """

    def __init__(
        self,
        *,
        context_length: int,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(
            width,
            layers,
            heads,
            mlp_ratio=mlp_ratio,
            activation=activation,
            dropout=dropout,
            causal=False,
            norm_eps=NORM_EPS,
        )
        self.ln_final = LayerNorm(width, eps=NORM_EPS)
        self.projection = nn.Linear(width, embed_dim)
        init_text_weights(self.token_embedding, self.positional_embedding, self.transformer, self.projection)
        nn.init.zeros_(self.projection.bias)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Return features, not normalized.

        Args:
            tokens_BL: int64, padded to `context_length`.

        Returns:
            [B, embed_dim].
        """
        x_BLD = self.token_embedding(tokens_BL)
        x_BLD = x_BLD + self.positional_embedding[: tokens_BL.shape[1]].to(x_BLD.dtype)
        last_B = torch.full([len(tokens_BL)], tokens_BL.shape[1] - 1, device=tokens_BL.device)
        return self.projection(self.ln_final(self.transformer(x_BLD, last_B)))
