"""Layers of the towers: a pre-norm transformer (Radford et al. 2021, section 2.4), attention pooling, and a projection after any trunk."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_exp.config.model import Projection


class QuickGELU(nn.Module):
    """Sigmoid approximation of GELU, which OpenAI trained with: x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}


class LayerNorm(nn.LayerNorm):
    """Layer normalization with float32 statistics that returns the dtype of its input, as in open_clip.

    `nn.LayerNorm` under autocast returns float32 on CUDA but the input's dtype on a CPU, so the layers after it would differ.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


def select_token(x_BND: Tensor, position_B: Tensor) -> Tensor:
    """Return one token of each sequence as a sequence of length one.

    Args:
        x_BND: sequences of any dtype.
        position_B: int64, position of the token in each sequence.

    Returns:
        [B, 1, D].
    """
    return x_BND[torch.arange(len(x_BND), device=x_BND.device), position_B].unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with one projection for queries, keys and values.

    Initialized like `nn.MultiheadAttention`: Xavier over the fused projection, zero biases.
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
        """Return the output of attention for every token, [B, N, D], or for one token of each sequence, [B, 1, D].

        Args:
            x_BND: sequences of tokens.
            only_B: int64, position of the token of each sequence whose output is computed; None: all tokens.
            seen_B1NN: bool, tokens (last axis) that each token attends to, instead of the causal order.
        """
        q_BAND, k_BAND, v_BAND = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if seen_B1NN is not None:
            y_BAND = F.scaled_dot_product_attention(q_BAND, k_BAND, v_BAND, attn_mask=seen_B1NN)
        elif only_B is None:
            y_BAND = F.scaled_dot_product_attention(q_BAND, k_BAND, v_BAND, is_causal=self.causal)
        else:
            q_BA1D = select_token(q_BAND.transpose(1, 2), only_B).transpose(1, 2)
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
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float,
        activation: str,
        dropout: float,
        causal: bool,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, heads, causal)
        self.ln_2 = LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor, only_B: Tensor | None = None, seen_B1NN: Tensor | None = None) -> Tensor:
        """Return the residual stream after this block, for every token, or only for token `only_B` of each sequence."""
        attended_BND = self.attention(self.ln_1(x_BND), only_B, seen_B1NN)
        if only_B is not None:
            x_BND = select_token(x_BND, only_B)
        x_BND = x_BND + self.dropout(attended_BND)
        return x_BND + self.dropout(self.mlp(self.ln_2(x_BND)))


class Transformer(nn.Module):
    """Stack of transformer blocks.

    If the features depend on only one token of each sequence, the last block computes only that token. This is exact, and saves three
    quarters of the computation of a block.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        mlp_ratio: float,
        activation: str,
        dropout: float,
        causal: bool,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                mlp_ratio=mlp_ratio,
                activation=activation,
                dropout=dropout,
                causal=causal,
                norm_eps=norm_eps,
            )
            for _ in range(layers)
        )

    def forward(self, x_BND: Tensor, pool_B: Tensor) -> Tensor:
        """Return the residual stream after the last block at token `pool_B` (int64) of each sequence: [B, D]."""
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x_BND = block(x_BND, pool_B if i == last else None)
        return x_BND.squeeze(1)

    def forward_all(self, x_BND: Tensor, seen_B1NN: Tensor | None = None) -> Tensor:
        """Return the residual stream of every token: [B, N, D]. `seen_B1NN` is that of `Attention`."""
        for block in self.blocks:
            x_BND = block(x_BND, None, seen_B1NN)
        return x_BND


class AttentionPool(nn.Module):
    """Multi-head attention with a single query per sequence.

    Keys and values are not computed. The dot product of the query q with a key K x equals that of K'q with x, and the weighted mean of
    the values V x equals V applied to the weighted mean of the x. So a token costs `heads` times `width` instead of `width` squared,
    with the same result. Forward and backward of RN50's pooling took 0.05 s of one CPU core at batch 16, compared with 0.38 s with keys
    and values of every token, and 0.66 s with a query of every token too; a whole step took 4.1 s.

    The projections of keys and values are parameters of this module, not submodules: a strategy that shards the weights gathers the
    parameters of a module when the module is called.
    """

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.key_weight, self.value_weight = (nn.Parameter(torch.empty(width, width)) for _ in range(2))
        self.key_bias, self.value_bias = (nn.Parameter(torch.empty(width)) for _ in range(2))
        self.out = nn.Linear(width, out_width)

    def forward(self, query_BD: Tensor, x_BND: Tensor) -> Tensor:
        """Return the output of attention for the query of each sequence: [B, out_width]."""
        by_head = (self.heads, -1)
        q_BAE = self.q(query_BD).unflatten(-1, by_head)
        folded_BAD = torch.einsum("bae,aed->bad", q_BAE, self.key_weight.unflatten(0, by_head))
        # A bias of the keys shifts all logits of a head equally, so it has no effect. It is still used, because DDP waits for the
        # gradient of every parameter.
        shift_BA1 = torch.einsum("bae,ae->ba", q_BAE, self.key_bias.unflatten(0, by_head)).unsqueeze(-1)
        logits_BAN = (folded_BAD @ x_BND.transpose(1, 2) + shift_BA1) * q_BAE.shape[-1] ** -0.5
        gathered_BAD = logits_BAN.softmax(dim=-1).to(x_BND.dtype) @ x_BND
        value_BAE = torch.einsum("bad,aed->bae", gathered_BAD, self.value_weight.unflatten(0, by_head))
        return self.out(value_BAE.flatten(1) + self.value_bias)


class ProjectedTower(nn.Module):
    """Tower that consists of a trunk of another library and a projection to the shared space.

    Args:
        trunk: module that maps its input to [B, channels].
        projection: module that maps [B, channels] to [B, embed_dim].
    """

    def __init__(self, trunk: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.projection = projection

    def forward(self, x: Tensor) -> Tensor:
        """Return features [B, embed_dim], not normalized.

        Args:
            x: normalized images [B, 3, H, W], or token ids [B, L].
        """
        return self.projection(self.trunk(x))


def build_projection(channels: int, embed_dim: int, projection: Projection) -> nn.Module:
    """Build the projection to the shared space.

    An MLP has a hidden width of twice the shared space, and no bias in its last layer, as in open_clip.
    """
    match projection:
        case Projection.linear:
            return nn.Linear(channels, embed_dim, bias=False)
        case Projection.mlp:
            hidden = 2 * embed_dim
            return nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False))
        case Projection.none:
            return nn.Identity()
