"""The image tower: a Vision Transformer pooled at its class token (Dosovitskiy et al. 2021, as CLIP changed it)."""

import torch
from torch import Tensor, nn

from clip_exp.models.layers import LayerNorm, Transformer


def to_patches(image_BCHW: Tensor, patch_size: int) -> Tensor:
    """The image's patches, row by row, each flattened like a convolution's kernel: [B, N, C * patch_size**2]."""
    B, C, H, W = image_BCHW.shape
    grid = image_BCHW.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class PatchDropout(nn.Module):
    """A training step sees some of the patches of each image, drawn anew, and costs that much less (Li et al. 2023, FLIP).

    Args:
        share: of the patches, left out; at least one patch stays.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, patch_BND: Tensor) -> Tensor:
        """[B, N, D] to [B, K, D], positions already added, in no order; all of them outside of training."""
        if not self.training or self.share == 0:
            return patch_BND
        B, N, _ = patch_BND.shape
        kept = max(1, int(N * (1 - self.share)))
        kept_BK = torch.randn(B, N, device=patch_BND.device).topk(kept, sorted=False).indices
        return patch_BND.take_along_dim(kept_BK[..., None], dim=1)


class VisionTransformer(nn.Module):
    """Images to embeddings.

    Initial weights are those of open_clip: torch's defaults inside the blocks, N(0, 1 / width) for the class token, the
    positions and the projection.
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
        """Embeddings, not normalized.

        Args:
            image_BCHW: float, less the mean and over the standard deviation of its channels, `image_size` on a side.

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
