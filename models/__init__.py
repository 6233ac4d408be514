"""Networks, built by name or loaded from checkpoints."""

from models.build import (
    ALIASES,
    ARCHITECTURES,
    CUSTOM_ARCHITECTURES,
    RESNETS,
    arch_names,
    build_model,
    canonical_arch,
    check_image_size,
)
from models.loading import load_model
from models.normalize import Normalize
from models.resnet import BasicBlock, Bottleneck, PreActResNet
from models.vgg import STAGES, VGG
from models.wideresnet import WideResNet

__all__ = [
    "ALIASES",
    "ARCHITECTURES",
    "CUSTOM_ARCHITECTURES",
    "RESNETS",
    "STAGES",
    "VGG",
    "BasicBlock",
    "Bottleneck",
    "Normalize",
    "PreActResNet",
    "WideResNet",
    "arch_names",
    "build_model",
    "canonical_arch",
    "check_image_size",
    "load_model",
]
