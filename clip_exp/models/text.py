"""The text tower: a causal transformer pooled at the end-of-text token (Radford et al. 2021, section 2.4)."""

import torch
from torch import Tensor, nn

from clip_exp.models.layers import Block, Transformer


class TextTransformer(nn.Module):
    """Token ids to embeddings.

    A token sees only what stands before it, so nothing behind the end-of-text token matters: a batch may be cut to its
    longest text, and costs only that.
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
            width, layers, heads, mlp_ratio=mlp_ratio, activation=activation, dropout=dropout, causal=True
        )
        self.ln_final = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        self._init_weights(width, layers)

    def _init_weights(self, width: int, layers: int) -> None:
        """The distributions of OpenAI's CLIP; biases and norms keep torch's defaults."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        residual_std = (2 * width * layers) ** -0.5
        for block in self.transformer.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=residual_std)
            nn.init.normal_(block.mlp.fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.proj.weight, std=residual_std)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Embeddings, not normalized.

        Args:
            tokens_BL: int64, padded with zeros, at most `context_length` long. The end-of-text token has the highest id
                of the vocabulary, which is how it is found.

        Returns:
            [B, embed_dim].
        """
        x_BLD = self.token_embedding(tokens_BL)
        x_BLD = x_BLD + self.positional_embedding[: tokens_BL.shape[1]].to(x_BLD.dtype)
        x_BD = self.transformer(x_BLD, tokens_BL.argmax(dim=-1))
        return self.projection(self.ln_final(x_BD))

    def forward_trees(
        self, tokens_BN: Tensor, position_BN: Tensor, seen_BNN: Tensor, tree_E: Tensor, node_E: Tensor
    ) -> Tensor:
        """Embeddings of texts that share their beginnings (`clip_exp.text.prefixes.TokenTrees`), not normalized.

        A token's state depends on what stands before it alone, so texts that begin alike are one path up to where they part.

        Args:
            tokens_BN: int64, the nodes of each tree.
            position_BN: int64, tokens that stand before each node.
            seen_BNN: bool, whether a node sees the node of the last axis.
            tree_E, node_E: int64, where each text ends.

        Returns:
            [E, embed_dim].
        """
        x_BND = self.token_embedding(tokens_BN) + self.positional_embedding[position_BN]
        x_BND = self.transformer.forward_all(x_BND, seen_BNN[:, None])
        return self.projection(self.ln_final(x_BND[tree_E, node_E]))
