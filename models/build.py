"""Networks by name: pre-activation ResNets, VGGs with batch norm, wide ResNets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from models.normalize import Normalize
from models.resnet import BasicBlock, Bottleneck, PreActResNet
from models.vgg import STAGES, VGG
from models.wideresnet import WideResNet
from utils.seeding import seeded, stream

RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
# The paper's scripts name the VGGs with and without "_bn" and mean the same network.
ALIASES = {f"{name}_bn": name for name in STAGES}
ARCHITECTURES = (*RESNETS, *STAGES, "wideresnet")
# Networks that users add: functions of the number of classes and the normalization module, which
# comes first.
CUSTOM_ARCHITECTURES: dict[str, Callable[[int, Normalize], nn.Module]] = {}


def build_model(
    arch: str,
    num_classes: int,
    *,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    width: float = 1.0,
    depth_factor: int = 34,
    width_factor: int = 10,
    image_size: int | None = None,
    seed: int = 1,
) -> nn.Module:
    """Build a fresh network that maps images ``[N, C, H, W]`` in [0, 1] to logits ``[N, classes]``.

    Args:
        arch: one of ``ARCHITECTURES`` or ``CUSTOM_ARCHITECTURES`` (``vgg16_bn`` and the like are
            the same as ``vgg16``).
        num_classes: number of classes.
        mean, std: per channel, for the ``normalize`` module; their length is the number of image
            channels.
        width: factor on every channel count of ResNets and VGGs (the paper's "small dense"
            baseline).
        depth_factor, width_factor: depth and widening of ``wideresnet``.
        image_size: side of the images in pixels, checked against what the network can take.
        seed: the initial weights are a pure function of it.

    Raises:
        ValueError: unknown architecture, or a size or width that the network cannot take.
    """
    arch = canonical_arch(arch)
    check_image_size(arch, image_size)
    if width <= 0:
        raise ValueError(f"width must be positive, not {width}")
    if width != 1.0 and arch not in (*RESNETS, *STAGES):
        raise ValueError(f"width scales ResNets and VGGs, not {arch}; wideresnet has width_factor")
    normalize = Normalize(mean, std)
    with seeded(stream(seed, "init")):
        if arch in CUSTOM_ARCHITECTURES:
            return _complete(arch, CUSTOM_ARCHITECTURES[arch](num_classes, normalize))
        network, sizes = network_class(arch, width, depth_factor, width_factor)
        return network(*sizes, num_classes, normalize)


def network_class(
    arch: str, width: float, depth_factor: int, width_factor: int
) -> tuple[type[nn.Module], tuple[Any, ...]]:
    """The class of one of ``ARCHITECTURES``, and its arguments before the number of classes and the
    normalization. Arguments as for ``build_model``."""
    if arch in RESNETS:
        block, depths = RESNETS[arch]
        return PreActResNet, (block, depths, [_scaled(c, width) for c in (64, 128, 256, 512)])
    if arch in STAGES:
        return VGG, ([[_scaled(c, width) for c in stage] for stage in STAGES[arch]],)
    return WideResNet, (depth_factor, width_factor)


def _complete(arch: str, model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"models.CUSTOM_ARCHITECTURES[{arch!r}] gives a {type(model).__name__} and not a"
            " torch.nn.Module"
        )
    lazy = [
        name
        for name, parameter in model.named_parameters()
        if isinstance(parameter, UninitializedParameter)
    ]
    if lazy:
        raise ValueError(
            f"{arch} has lazy layers, whose weights --seed cannot draw:"
            f" {', '.join(lazy)}; give their sizes"
        )
    return model


def canonical_arch(arch: str) -> str:
    """The name without aliases; raises ``ValueError`` for an unknown one."""
    name = ALIASES.get(arch, arch)
    if name not in (*ARCHITECTURES, *CUSTOM_ARCHITECTURES):
        own = (
            "a custom network is known only to the script that adds it to"
            " models.CUSTOM_ARCHITECTURES, so load it there"
        )
        raise ValueError(
            f"unknown architecture {arch!r}; known:"
            f" {', '.join((*ARCHITECTURES, *CUSTOM_ARCHITECTURES))}; {own} (docs/extending.md)"
        )
    return name


def arch_names() -> tuple[str, ...]:
    """Every name that ``build_model`` takes now, aliases included."""
    return (*ARCHITECTURES, *ALIASES, *CUSTOM_ARCHITECTURES)


def check_image_size(arch: str, image_size: int | None) -> None:
    """Raise ``ValueError`` if the network cannot take images of this side; ``CUSTOM_ARCHITECTURES``
    are not checked."""
    if arch in CUSTOM_ARCHITECTURES:
        return
    # Every stride and pool needs at least one pixel: five pools in a VGG, three strides in a ResNet
    # (rounding up), two in a WRN.
    smallest = 32 if arch.startswith("vgg") else 8
    if image_size is not None and image_size < smallest:
        raise ValueError(
            f"{arch} cannot take {image_size}x{image_size} images: it needs at least"
            f" {smallest}x{smallest}"
        )


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))
