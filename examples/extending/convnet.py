"""An image tower: a small convolutional network.

python train.py --config-dir examples/extending/conf model=vit_tiny model/image=convnet data=digits
"""

from itertools import pairwise

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Convolutions with stride 2, each of which doubles the number of channels, and mean pooling.

    Args:
        width: channels after the first convolution.
        depth: number of convolutions.
    """

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        channels = [3, *(width * 2**i for i in range(depth))]
        # Blocks in a list have depths, for finetune.image.layer_decay and unfrozen_blocks.
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(1, after), nn.GELU())
            for before, after in pairwise(channels)
        )

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return features [B, channels] of normalized images; clip_exp adds the projection to the shared space."""
        x = image_BCHW
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))
