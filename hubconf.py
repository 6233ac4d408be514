"""Entry points for ``torch.hub``: untrained and trained networks, from a folder
(``source="local"``) or a repository.

    model = torch.hub.load("path/to/this/folder", "load", "model_RA_best.pth.tar", source="local")
    model = torch.hub.load("path/to/this/folder", "load", "flying-bird", source="local")
    model = torch.hub.load("path/to/this/folder", "resnet18", num_classes=10, source="local")

Every network maps images ``[N, C, H, W]`` with pixels in [0, 1] to logits ``[N, num_classes]``.
"""

from pathlib import Path as _Path
from typing import Any as _Any

from torch import nn as _nn

from models import build_model as _build_model
from models import load_model as _load_model

dependencies = ["torch", "numpy", "safetensors", "filelock"]


def load(path_or_url: str | _Path, device: str = "cpu", **description: _Any) -> _nn.Module:
    """A trained network in eval mode, from a checkpoint, safetensors or a state dict (see
    ``models.load_model``), or by its name in ``results/models``."""
    named = _Path(__file__).parent / "results" / "models" / str(path_or_url)
    return _load_model(named if named.is_dir() else path_or_url, device, **description)


def build(arch: str, num_classes: int = 10, **options: _Any) -> _nn.Module:
    """An untrained network of any architecture; ``options`` as in ``models.build_model``."""
    return _build_model(arch, num_classes, **options)


def resnet18(num_classes: int = 10, **options: _Any) -> _nn.Module:
    """An untrained pre-activation ResNet-18 with the CIFAR stem."""
    return _build_model("resnet18", num_classes, **options)


def vgg16(num_classes: int = 10, **options: _Any) -> _nn.Module:
    """An untrained VGG-16 with batch norm and one linear layer."""
    return _build_model("vgg16", num_classes, **options)


def wideresnet(num_classes: int = 10, **options: _Any) -> _nn.Module:
    """An untrained WRN-34-10, or another size by ``depth_factor`` and ``width_factor``."""
    return _build_model("wideresnet", num_classes, **options)
