"""Image tower of the RN models: a ResNet with attention pooling (He et al. 2016, with CLIP's changes).

The changes (Radford et al. 2021, section 2.4) are a stem of three convolutions, an average pool before each convolution that would
otherwise have a stride, and attention pooling with the mean of the feature map as query.

Batch normalization uses the statistics of the samples that a device processes at once: its part of the batch, or a micro-batch. So,
unlike with transformers, losses depend slightly on the number of devices and on `micro_batch_size`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_exp.models.layers import AttentionPool

EXPANSION = 4  # channels of a block's output over those of its 3 x 3 convolution
STRIDE = 32  # pixels per cell of the last feature map, along a side


class Stem(nn.Module):
    """Stem of three convolutions: [B, 3, H, W] to [B, width, H / 4, W / 4]."""

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
    """Downsample by averaging squares with a side of `stride` pixels."""
    return F.avg_pool2d(x_BCHW, stride) if stride > 1 else x_BCHW


class Shortcut(nn.Module):
    """Shortcut that maps the input of a block to the shape of its output."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.bn(self.conv(shrink(x_BCHW, self.stride)))


class Bottleneck(nn.Module):
    """Bottleneck block: [B, in_channels, H, W] to [B, 4 * channels, H / stride, W / stride].

    Initially it computes only its shortcut, since the last norm has zero weights.
    """

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
    """Attention pooling with the mean of the feature map as query: [B, C, H, W] to [B, embed_dim]."""

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
    """ResNet that maps images to features.

    Initialized as in open_clip: torch's defaults for convolutions, zero for the last norm of each block, and N(0, 1 / channels) for the
    positions and matrices of the attention pooling.

    Args:
        image_size: side of the images in pixels, a multiple of 32.
        stages: number of blocks in each of the four stages.
        width: channels of the stem; the last feature map has 32 times as many.
        heads: heads of the attention pooling; OpenAI used half of `width`.
        embed_dim: width of the features.
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
        """Return features, not normalized.

        Args:
            image_BCHW: float images of side `image_size`, normalized by the mean and standard deviation of each channel.

        Returns:
            [B, embed_dim].
        """
        # Channels last is the layout of tensor cores. On a CPU (one core, RN50 at 224 pixels, forward and backward) it made a step 9 %
        # faster at batch 4, and 16 % at batch 16. Only activations use it: the flat buffers of optimizers and weight files need
        # contiguous weights.
        image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
        return self.pool(self.stages(self.stem(image_BCHW)))
