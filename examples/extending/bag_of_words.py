"""A text tower: the mean of the embeddings of a text's tokens, without their order.

python train.py --config-dir examples/extending/conf model=vit_tiny model/text=bag_of_words data=digits
"""

from torch import Tensor, nn

PADDING = 0  # of OpenAI's tokenizer


class BagOfWords(nn.Module):
    """Mean of the token embeddings, without the padding.

    Args:
        vocab_size: number of token ids; clip_exp passes model.text.vocab_size.
        width: channels of the embeddings.
    """

    def __init__(self, vocab_size: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Return features [B, channels] of token ids; clip_exp adds the projection to the shared space."""
        seen_BL1 = (tokens_BL != PADDING).unsqueeze(-1)
        embedded_BLD = self.embedding(tokens_BL) * seen_BL1
        return self.norm(embedded_BLD.sum(dim=1) / seen_BL1.sum(dim=1))
