"""Wide ResNets (Zagoruyko and Komodakis, 2016) with the names of the paper's checkpoints."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from models.normalize import Normalize
from models.resnet import conv1x1, conv3x3


class WideBlock(nn.Module):
    """BN-ReLU-conv twice; a 1x1 projection from the first activation where the channel count
    changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv3x3(channels_in, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        differs = channels_in != channels or stride != 1
        self.convShortcut = conv1x1(channels_in, channels, stride) if differs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out = self.conv1(activated)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


def wide_stage(depth: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
    """``depth`` blocks, the first of which changes width and stride."""
    blocks = [WideBlock(channels_in, channels, stride)]
    blocks += [WideBlock(channels, channels, 1) for _ in range(depth - 1)]
    return nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks)))


class WideResNet(nn.Module):
    """WRN-``depth``-``widen`` on images ``[N, C, H, W]`` in [0, 1]; returns logits ``[N,
    classes]``.

    Args:
        depth: 6 n + 4 layers, n blocks a stage.
        widen: factor on the stages' 16, 32, 64 channels.
        num_classes: size of the logits.
        normalize: the first module; its length gives the number of image channels.
    """

    def __init__(self, depth: int, widen: int, num_classes: int, normalize: Normalize) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(
                f"the depth of a wide ResNet is 6 n + 4 (10, 16, 22, 28, 34, ...), not {depth}"
            )
        if widen < 1:
            raise ValueError(f"the width factor of a wide ResNet is at least 1, not {widen}")
        blocks = (depth - 4) // 6
        self.normalize = normalize
        self.conv1 = conv3x3(normalize.mean.numel(), 16)
        self.block1 = wide_stage(blocks, 16, 16 * widen, 1)
        self.block2 = wide_stage(blocks, 16 * widen, 32 * widen, 2)
        self.block3 = wide_stage(blocks, 32 * widen, 64 * widen, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        return self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))
