"""Image tower: a Vision Transformer that pools at its class token (Dosovitskiy et al. 2021, with CLIP's changes)."""

import torch
from torch import Tensor, nn

from clip_exp.models.layers import LayerNorm, Transformer


def to_patches(image_BCHW: Tensor, patch_size: int) -> Tensor:
    """Split images into patches, row by row, each flattened like a convolution kernel: [B, N, C * patch_size**2]."""
    B, C, H, W = image_BCHW.shape
    grid = image_BCHW.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class PatchDropout(nn.Module):
    """Random dropping of patches during training, different in each step, which makes steps cheaper (FLIP, Li et al. 2023).

    Args:
        fraction: fraction of the patches that are dropped; at least one patch is kept.
    """

    def __init__(self, fraction: float) -> None:
        super().__init__()
        self.fraction = fraction

    def forward(self, patch_BND: Tensor) -> Tensor:
        """Return a random subset of the patches in any order, [B, N, D] to [B, K, D]; outside of training, all of them.

        Positions must already be added.
        """
        if not self.training or self.fraction == 0:
            return patch_BND
        B, N, _ = patch_BND.shape
        kept = max(1, int(N * (1 - self.fraction)))
        kept_BK = torch.randn(B, N, device=patch_BND.device).topk(kept, sorted=False).indices
        return patch_BND.take_along_dim(kept_BK[..., None], dim=1)


class VisionTransformer(nn.Module):
    """Vision Transformer that maps images to features.

    Initialized as in open_clip: torch's defaults inside the blocks, and N(0, 1 / width) for the class token, the positions and the
    projection.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        dropout: float = 0.0,
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        std = width**-0.5
        self.patch_embedding = nn.Linear(3 * patch_size**2, width, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        self.positional_embedding = nn.Parameter(std * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.patch_dropout = PatchDropout(patch_dropout)
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(
            width, layers, heads, mlp_ratio=mlp_ratio, activation=activation, dropout=dropout, causal=False
        )
        self.ln_post = LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=std)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return features, not normalized.

        Args:
            image_BCHW: float images of side `image_size`, normalized by the mean and standard deviation of each channel.

        Returns:
            [B, embed_dim].
        """
        patch_BND = self.patch_embedding(to_patches(image_BCHW, self.patch_size))
        position_ND = self.positional_embedding.to(patch_BND.dtype)
        class_D = self.class_embedding.to(patch_BND.dtype) + position_ND[0]
        patch_BND = self.patch_dropout(patch_BND + position_ND[1:])
        x_BND = torch.cat([class_D.expand(len(patch_BND), 1, -1), patch_BND], dim=1)
        class_position_B = torch.zeros(len(x_BND), dtype=torch.int64, device=x_BND.device)
        x_BD = self.transformer(self.ln_pre(x_BND), class_position_B)
        return self.projection(self.ln_post(x_BD))
