"""VGG with batch norm and one linear layer (Simonyan and Zisserman, 2015), in the CIFAR form of the
paper."""

from __future__ import annotations

from torch import Tensor, nn

from models.normalize import Normalize

# Channels of each convolution, a list for each of the five stages that end in a 2x2 max pool.
STAGES: dict[str, list[list[int]]] = {
    "vgg11": [[64], [128], [256] * 2, [512] * 2, [512] * 2],
    "vgg13": [[64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2],
    "vgg16": [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3],
    "vgg19": [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4],
}


class VGG(nn.Module):
    """Convolutions with batch norm in five stages on images ``[N, C, H, W]`` in [0, 1]; returns
    logits.

    Args:
        stages: channels by stage, e.g. ``STAGES["vgg16"]``, already scaled.
        num_classes: size of the logits.
        normalize: applied first; its length gives the number of image channels.
    """

    def __init__(self, stages: list[list[int]], num_classes: int, normalize: Normalize) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = normalize.mean.numel()
        for stage in stages:
            for width in stage:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        self.normalize = normalize  # registered last: the order of the paper's state dict
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.normalize(x)).mean(dim=(2, 3)))
