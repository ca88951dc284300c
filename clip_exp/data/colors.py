"""Random changes of a training picture's colors and sharpness, by the functions of `torchvision.transforms.v2`."""

from collections.abc import Callable, Sequence

from torch import Tensor

from clip_exp.config.data_schema import AugmentationConfig
from clip_exp.data.randomness import Draws


def happens(probability: float, draws: Draws) -> bool:
    """Nothing is drawn for what is switched off."""
    return probability > 0 and draws.uniform() < probability


def change_colors(image_CHW: Tensor, draws: Draws, augmentation: AugmentationConfig) -> Tensor:
    """Color jitter, grey and Gaussian blur, in this order.

    Args:
        image_CHW: uint8 [3, H, W].

    Returns: uint8 [3, H, W].
    """
    if augmentation.color_jitter is not None and happens(augmentation.color_jitter_prob, draws):
        image_CHW = jitter(image_CHW, augmentation.color_jitter, draws)
    if happens(augmentation.gray_scale_prob, draws):
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        image_CHW = rgb_to_grayscale(image_CHW, num_output_channels=3)
    if happens(augmentation.gaussian_blur_prob, draws):
        from torchvision.transforms.v2.functional import gaussian_blur

        sigma = draws.uniform(*augmentation.gaussian_blur_sigma)
        image_CHW = gaussian_blur(image_CHW, [blur_kernel(image_CHW.shape[-1])] * 2, [sigma] * 2)
    return image_CHW


def jitter(image_CHW: Tensor, strengths: Sequence[float], draws: Draws) -> Tensor:
    """Brightness, contrast, saturation and hue in a random order, as torchvision's ColorJitter.

    The first three are multiplied by a factor from [max(0, 1 - strength), 1 + strength]; the hue is turned by [-strength,
    strength] of a full circle. First the order is drawn, then the four factors.

    Args:
        image_CHW: uint8 [3, H, W].
        strengths: of the four.
    """
    from torchvision.transforms.v2 import functional as F  # 0.9 s to import, and few runs need it

    changes: list[Callable[[Tensor, float], Tensor]]
    changes = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    order = _shuffled(len(changes), draws)
    factors = [draws.uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths[:3]]
    factors.append(draws.uniform(-strengths[3], strengths[3]))
    for which in order:
        if strengths[which] > 0:
            image_CHW = changes[which](image_CHW, factors[which])
    return image_CHW


def blur_kernel(size: int) -> int:
    """Side of the kernel, pixels: a tenth of the picture's, odd (SimCLR; Chen et al. 2020, appendix A)."""
    return 2 * max(1, size // 20) + 1


def _shuffled(n: int, draws: Draws) -> list[int]:
    """Fisher and Yates."""
    order = list(range(n))
    for last in range(n - 1, 0, -1):
        other = draws.integer(last + 1)
        order[last], order[other] = order[other], order[last]
    return order
