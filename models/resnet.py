"""Pre-activation ResNets with the CIFAR stem (He et al., "Identity Mappings in Deep Residual
Networks", 2016).

Names and shapes of the state dict are those of the paper's checkpoints. The last feature map is
averaged whatever its size, so 8x8, 32x32 and 64x64 images share one network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.normalize import Normalize


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution that, with few input channels, applies its stride by slicing.

    oneDNN (in torch 2.13) writes past its buffers in the weight gradient of a strided,
    channels-last 1x1 convolution with fewer than 16 input channels and an odd batch. Slicing first
    is the same arithmetic.
    """

    def forward(self, x: Tensor) -> Tensor:
        stride = self.stride[0]
        if stride > 1 and self.in_channels < 16:
            return F.conv2d(x[:, :, ::stride, ::stride], self.weight, self.bias)
        return super().forward(x)


def conv1x1(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return Pointwise(channels_in, channels_out, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """BN-ReLU-conv twice; where shapes differ, the shortcut projects the first activation."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv3x3(channels_in, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(conv1x1(channels_in, channels, stride))

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = self.shortcut(activated) if hasattr(self, "shortcut") else x
        out = self.conv1(activated)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a four-fold wider output (ResNet-50)."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = channels * self.expansion
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv1x1(channels_in, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, wide)
        if stride != 1 or channels_in != wide:
            self.shortcut = nn.Sequential(conv1x1(channels_in, wide, stride))

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = self.shortcut(activated) if hasattr(self, "shortcut") else x
        out = self.conv1(activated)
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        return out + shortcut


class PreActResNet(nn.Module):
    """Four stages of pre-activation blocks on images ``[N, C, H, W]`` in [0, 1]; returns logits
    ``[N, classes]``.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        depths: blocks in each of the four stages.
        widths: channels of each stage before the block's expansion.
        num_classes: size of the logits.
        normalize: the first module; its length gives the number of image channels.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        normalize: Normalize,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = conv3x3(normalize.mean.numel(), widths[0])
        stages = []
        channels = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for position in range(depth):
                stride = 2 if stage > 0 and position == 0 else 1
                blocks.append(block(channels, width, stride))
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.normalize(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.relu(self.bn(x)).mean(dim=(2, 3)))
