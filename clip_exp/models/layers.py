"""The pre-norm transformer that both towers are made of (Radford et al. 2021, section 2.4)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI trained with: x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}


def take(x_BND: Tensor, position_B: Tensor) -> Tensor:
    """One token of each sequence, as a sequence of length one.

    Args:
        x_BND: any dtype.
        position_B: int64, which token of each sequence.

    Returns:
        [B, 1, D].
    """
    return x_BND[torch.arange(len(x_BND), device=x_BND.device), position_B].unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with one projection for queries, keys and values.

    Starts out as `nn.MultiheadAttention` does: Xavier over the fused projection, no biases.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_BND: Tensor, only_B: Tensor | None = None, seen_B1NN: Tensor | None = None) -> Tensor:
        """What every token, or only token `only_B` of each sequence, gathers: [B, N, D] or [B, 1, D].

        Args:
            seen_B1NN: bool, which tokens (last axis) a token sees, in the place of the causal order.
        """
        q_BAND, k_BAND, v_BAND = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if seen_B1NN is not None:
            y_BAND = F.scaled_dot_product_attention(q_BAND, k_BAND, v_BAND, attn_mask=seen_B1NN)
        elif only_B is None:
            y_BAND = F.scaled_dot_product_attention(q_BAND, k_BAND, v_BAND, is_causal=self.causal)
        else:
            q_BA1D = take(q_BAND.transpose(1, 2), only_B).transpose(1, 2)
            position_N = torch.arange(x_BND.shape[1], device=x_BND.device)
            seen_B11N = (position_N <= only_B[:, None])[:, None, None] if self.causal else None
            y_BAND = F.scaled_dot_product_attention(q_BA1D, k_BAND, v_BAND, attn_mask=seen_B11N)
        return self.out(y_BAND.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.proj = nn.Linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.proj(self.activation(self.fc(x_BND)))


class Block(nn.Module):
    def __init__(
        self, width: int, heads: int, *, mlp_ratio: float, activation: str, dropout: float, causal: bool
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor, only_B: Tensor | None = None, seen_B1NN: Tensor | None = None) -> Tensor:
        """The residual stream after this block: of every token, or only of token `only_B` of each sequence."""
        attended_BND = self.attention(self.ln_1(x_BND), only_B, seen_B1NN)
        if only_B is not None:
            x_BND = take(x_BND, only_B)
        x_BND = x_BND + self.dropout(attended_BND)
        return x_BND + self.dropout(self.mlp(self.ln_2(x_BND)))


class Transformer(nn.Module):
    """A stack of blocks whose outcome is one token of each sequence.

    No other token of the last block reaches the features, so the last block computes only that one. This is exact, and
    saves three quarters of a block.
    """

    def __init__(
        self, width: int, layers: int, heads: int, *, mlp_ratio: float, activation: str, dropout: float, causal: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=mlp_ratio, activation=activation, dropout=dropout, causal=causal)
            for _ in range(layers)
        )

    def forward(self, x_BND: Tensor, pool_B: Tensor) -> Tensor:
        """The residual stream after the last block at token `pool_B` (int64) of each sequence: [B, D]."""
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x_BND = block(x_BND, pool_B if i == last else None)
        return x_BND.squeeze(1)

    def forward_all(self, x_BND: Tensor, seen_B1NN: Tensor) -> Tensor:
        """The residual stream of every token, each of which sees those that `seen_B1NN` tells: [B, N, D]."""
        for block in self.blocks:
            x_BND = block(x_BND, None, seen_B1NN)
        return x_BND
