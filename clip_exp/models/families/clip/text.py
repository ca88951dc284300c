"""Text tower: a causal transformer that pools at the end-of-text token (Radford et al. 2021, section 2.4)."""

import torch
from torch import Tensor, nn

from clip_exp.models.layers import Block, LayerNorm, Transformer
from clip_exp.text.prefixes import TreeLayout


def init_text_weights(
    token_embedding: nn.Embedding, positional_embedding: nn.Parameter, transformer: Transformer, projection: nn.Linear
) -> None:
    """Initialize a text tower as in OpenAI's CLIP; biases and norms keep torch's defaults."""
    width = token_embedding.embedding_dim
    nn.init.normal_(token_embedding.weight, std=0.02)
    nn.init.normal_(positional_embedding, std=0.01)
    nn.init.normal_(projection.weight, std=width**-0.5)
    residual_std = (2 * width * len(transformer.blocks)) ** -0.5
    for block in transformer.blocks:
        assert isinstance(block, Block)
        nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.attention.out.weight, std=residual_std)
        nn.init.normal_(block.mlp.fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.proj.weight, std=residual_std)


class TextTransformer(nn.Module):
    """Causal transformer that maps token ids to features.

    A token attends only to earlier tokens, so padding after the end-of-text token has no effect. A batch can be trimmed to its longest
    text, which is most of the speed of training.

    Attributes:
        shares_prefixes: True, since it accepts trees of texts.
    """

    shares_prefixes = True

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
        self.ln_final = LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        init_text_weights(self.token_embedding, self.positional_embedding, self.transformer, self.projection)

    def forward(self, tokens_BL: Tensor, trees: TreeLayout | None = None) -> Tensor:
        """Return features, not normalized.

        Trees are an argument of `forward`, not of another method, because a strategy that shards the weights gathers them when the
        module is called.

        Args:
            tokens_BL: int64, padded with zeros. One text per row, of at most `context_length` tokens. The end-of-text token is found as
                the token with the highest id. With `trees`, the nodes of one tree per row.
            trees: structure of the tree in each row; None: rows are plain texts.

        Returns:
            [B, embed_dim]; with `trees` one row per text, [E, embed_dim].
        """
        x_BLD = self.token_embedding(tokens_BL)
        position = slice(tokens_BL.shape[1]) if trees is None else trees.position_BN
        x_BLD = x_BLD + self.positional_embedding[position].to(x_BLD.dtype)
        if trees is None:
            x_ED = self.transformer(x_BLD, tokens_BL.argmax(dim=-1))
        else:
            x_ED = self.transformer.forward_all(x_BLD, trees.seen_BNN[:, None])[trees.tree_E, trees.node_E]
        return self.projection(self.ln_final(x_ED))
