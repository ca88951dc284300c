"""The image tower of the RN models: a ResNet pooled by attention (He et al. 2016, as CLIP changed it).

The changes (Radford et al. 2021, section 2.4): a stem of three convolutions, an average pool before every convolution
that would have a stride, and attention pooling, whose query is the mean of the image.

Batch normalization takes its statistics from what a device sees at once: a device's share of the batch, or a micro-batch.
Losses therefore depend a little on the number of devices and on `micro_batch_size`, unlike those of transformers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_exp.models.layers import AttentionPool

EXPANSION = 4  # channels of a block's output over those of its 3 x 3 convolution
STRIDE = 32  # pixels that a side of the last feature map's cell stands for


class Stem(nn.Module):
    """[B, 3, H, W] to [B, width, H / 4, W / 4]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        x_BCHW = F.relu(self.bn2(self.conv2(x_BCHW)), inplace=True)
        x_BCHW = F.relu(self.bn3(self.conv3(x_BCHW)), inplace=True)
        return F.avg_pool2d(x_BCHW, 2)


def shrink(x_BCHW: Tensor, stride: int) -> Tensor:
    """The means of squares of `stride` pixels a side."""
    return F.avg_pool2d(x_BCHW, stride) if stride > 1 else x_BCHW


class Shortcut(nn.Module):
    """The input of a block in the size of its output."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.bn(self.conv(shrink(x_BCHW, self.stride)))


class Bottleneck(nn.Module):
    """[B, in_channels, H, W] to [B, 4 * channels, H / stride, W / stride]. Starts out as its shortcut alone."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        out_channels = EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        nn.init.zeros_(self.bn3.weight)
        resized = stride > 1 or in_channels != out_channels
        self.shortcut = Shortcut(in_channels, out_channels, stride) if resized else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        y_BCHW = F.relu(self.bn2(self.conv2(y_BCHW)), inplace=True)
        y_BCHW = self.bn3(self.conv3(shrink(y_BCHW, self.stride)))
        y_BCHW += self.shortcut(x_BCHW)
        return F.relu(y_BCHW, inplace=True)


class MeanPool(nn.Module):
    """What the mean of a feature map gathers from its cells: [B, C, H, W] to [B, embed_dim]."""

    def __init__(self, cells: int, channels: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        std = channels**-0.5
        self.positional_embedding = nn.Parameter(std * torch.randn(1 + cells, channels))
        self.attention = AttentionPool(channels, heads, embed_dim)
        for name, parameter in self.attention.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=std)
            elif name in ("key_bias", "value_bias"):
                nn.init.uniform_(parameter, -std, std)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BND = x_BCHW.flatten(2).transpose(1, 2)
        x_BND = torch.cat([x_BND.mean(dim=1, keepdim=True), x_BND], dim=1)
        x_BND = x_BND + self.positional_embedding.to(x_BND.dtype)
        return self.attention(x_BND[:, 0], x_BND)


class ModifiedResNet(nn.Module):
    """Images to embeddings.

    Initial weights are those of open_clip: torch's defaults for convolutions, zero for the last norm of every block, and
    N(0, 1 / channels) for the positions and the matrices of the attention pooling.

    Args:
        image_size: side of an image, a multiple of 32 pixels.
        stages: blocks of each of the four stages.
        width: channels of the stem; the last feature map has 32 times as many.
        heads: of the attention pooling; OpenAI took half of `width`.
        embed_dim: channels of the embedding.
    """

    def __init__(self, *, image_size: int, stages: list[int], width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.stem = Stem(width)
        self.stages = nn.Sequential()
        channels = width
        for i, blocks in enumerate(stages):
            stage = nn.Sequential()
            for j in range(blocks):
                stage.append(Bottleneck(channels, width * 2**i, stride=2 if i > 0 and j == 0 else 1))
                channels = EXPANSION * width * 2**i
            self.stages.append(stage)
        self.pool = MeanPool((image_size // STRIDE) ** 2, channels, heads, embed_dim)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Embeddings, not normalized.

        Args:
            image_BCHW: float, less the mean and over the standard deviation of its channels, `image_size` on a side.

        Returns:
            [B, embed_dim].
        """
        # Channels last is the layout of the tensor cores, and on a CPU (one core, RN50 at 224 pixels, forward and
        # backward) took 9% off a step at batch 4 and 16% at batch 16. Only the activations have it: the optimizers'
        # flat buffers and the files of weights want plain ones.
        image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
        return self.pool(self.stages(self.stem(image_BCHW)))
