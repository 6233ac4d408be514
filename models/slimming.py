"""Channels removed for good: a network whose convolutions, norms and classifier are really smaller
(Robust Bird, ``channel``).

Channels are chosen by the size of their batch-norm scale (Liu et al., "Network Slimming", 2017). In
a pre-activation network several norms read one residual stream, each with a choice of its own: such
a norm picks its channels from the stream, and a stream loses the channels that nobody reads, so
that its sums stay consistent.

    kept = kept_channels(model, density=0.5)      # batch norm -> channels that stay
    small = slim(model, kept)                     # equals the masked network, channel by channel
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_core import global_masks, grow_highest

Kept = Mapping[str, Sequence[int]]


def kept_channels(
    model: nn.Module, density: float, floor: float = 0.0
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """The channels of each batch norm with the largest |scale| over all of them together.

    Scales of different depths are not quite comparable: early in training the whole last norm,
    which the classifier reads, may lie below everything else. So every norm keeps its ``floor``,
    and the others give for it.

    Args:
        model: a network of this project with batch norms; not changed.
        density: kept fraction of all channels, in (0, 1].
        floor: least kept fraction of each norm's channels, in [0, density]; one channel always
            stays.

    Returns:
        Channels that stay by name of the batch norm, ascending, ``round(density * total)`` in all
        unless the floors together are more; and for the norms that the floor helped how many
        channels they would have kept without it.

    Raises:
        ValueError: a density that leaves fewer channels than there are batch norms, or below the
            floor.
    """
    scales = {
        name: module.weight.detach().abs()
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    if not 0 <= floor <= density:
        raise ValueError(
            f"the floor {floor:g} is a fraction of each layer's channels and at most the density"
            f" {density:g}"
        )
    if round(density * sum(scale.numel() for scale in scales.values())) < len(scales):
        raise ValueError(
            f"density {density:g} leaves fewer channels than the network has batch norms"
            f" ({len(scales)})"
        )
    plain = {name: int(mask.sum()) for name, mask in global_masks(scales, density).items()}
    floors = {name: max(1, math.floor(floor * scale.numel())) for name, scale in scales.items()}
    secured = {name: _largest(scale, floors[name]) for name, scale in scales.items()}
    masks = global_masks(
        {name: scale.masked_fill(secured[name], torch.inf) for name, scale in scales.items()},
        density,
    )
    kept = {
        name: (mask | secured[name]).nonzero().squeeze(1).tolist() for name, mask in masks.items()
    }
    return kept, {name: count for name, count in plain.items() if count < floors[name]}


def usual_floor(density: float) -> float:
    """A tenth of a layer is enough to go on with; half of the density leaves the ranking a say
    where nearly all must go."""
    return min(0.1, density / 2)


def _largest(scale: Tensor, n: int) -> Tensor:
    """Where the ``n`` largest are, ties to the earlier channel."""
    return grow_highest(scale, torch.zeros_like(scale, dtype=torch.bool), n)


@torch.no_grad()
def mask_channels(model: nn.Module, kept: Kept) -> None:
    """Silence all other channels in place: scale and shift zero. What ``slim`` removes, still in
    its full size."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            dead = torch.ones(module.num_features, dtype=torch.bool)
            dead[list(kept[name])] = False
            module.weight[dead] = 0.0
            module.bias[dead] = 0.0


def slim(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of a ResNet, VGG or wide ResNet without the other channels.

    In eval mode it computes what ``mask_channels`` leaves of the full network. Names in its state
    dict are unchanged.

    Raises:
        ValueError: an architecture that is none of these, channels that do not fit, or a norm
            without any.
    """
    model = copy.deepcopy(model)
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }
    if norms.keys() != kept.keys():
        raise ValueError("the kept channels do not name this network's batch norms")
    for name, channels in kept.items():
        if (
            not channels
            or min(channels) < 0
            or max(channels) >= norms[name].num_features
            or len(set(channels)) < len(channels)
        ):
            raise ValueError(f"{name} cannot keep these channels of its {norms[name].num_features}")
    indices: dict[nn.Module, Tensor] = {
        norms[name]: torch.tensor(sorted(channels)) for name, channels in kept.items()
    }
    if hasattr(model, "features"):
        _slim_chain(model, indices)
    elif hasattr(model, "layer1") or hasattr(model, "block1"):
        _slim_residual(model, indices)
    else:
        raise ValueError(
            f"{type(model).__name__} is neither a ResNet, a VGG nor a wide ResNet of this project"
        )
    return model


Indices = Mapping[nn.Module, Tensor]


class PickingBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of some channels of a stream: ``x[:, picked]``, then as usual."""

    picked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        # As rows of channels, in which a channels-last batch lies in memory: picking keeps that
        # layout, and its backward is fast.
        n, _, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).flatten(0, 2).index_select(1, self.picked)
        return super().forward(rows.view(n, height, width, -1).permute(0, 3, 1, 2))


class _PickingFirst(PickingBatchNorm2d):
    """The same where channels lie one after the other in memory, so that picking one copies a
    block."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x.index_select(1, self.picked))


def for_channels_first(model: nn.Module) -> nn.Module:
    """A copy that computes the same and suits engines with images as ``[N, C, H, W]`` in memory, as
    onnxruntime has them."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, PickingBatchNorm2d):
            module.__class__ = _PickingFirst
    return model


def _slim_chain(model: Any, indices: Indices) -> None:
    """VGG: each convolution feeds one norm, each norm the next convolution."""
    alive: Tensor | None = None
    layers = list(model.features)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Conv2d):
            assert isinstance(following, nn.BatchNorm2d)
            _narrow(layer, out=indices[following], into=alive)
            _narrow_norm(following, indices[following])
            alive = indices[following]
    _narrow(model.classifier, into=alive)


@dataclass(frozen=True)
class _Block:
    """A residual block: norm i feeds convolution i; the shortcut, where there is one, reads the
    first norm."""

    module: nn.Module
    norms: list[nn.BatchNorm2d]
    convolutions: list[nn.Conv2d]
    shortcut: nn.Conv2d | None


@dataclass
class _Stream:
    """A residual sum: who writes it, and which norms (with the module and the name that hold them)
    read it."""

    writers: list[nn.Conv2d]
    readers: list[tuple[nn.Module, str]]


def _slim_residual(model: Any, indices: Indices) -> None:
    final_norm, classifier = ("bn", "linear") if hasattr(model, "layer1") else ("bn1", "fc")
    streams = [_Stream([model.conv1], [])]
    for block in _blocks(model):
        streams[-1].readers.append((block.module, "bn1"))
        *inner, last = block.convolutions
        for convolution, norm, following in zip(inner, block.norms, block.norms[1:], strict=False):
            _narrow(convolution, out=indices[following], into=indices[norm])
            _narrow_norm(following, indices[following])
        _narrow(last, into=indices[block.norms[-1]])
        if block.shortcut is None:
            streams[-1].writers.append(last)
        else:
            _narrow(block.shortcut, into=indices[block.norms[0]])
            streams.append(_Stream([block.shortcut, last], []))
    streams[-1].readers.append((model, final_norm))
    _narrow(getattr(model, classifier), into=indices[getattr(model, final_norm)])
    for stream in streams:
        _slim_stream(stream, indices)


def _blocks(model: nn.Module) -> Iterator[_Block]:
    names = (
        ("layer1", "layer2", "layer3", "layer4")
        if hasattr(model, "layer1")
        else ("block1.layer", "block2.layer", "block3.layer")
    )
    for name in names:
        for module in model.get_submodule(name).children():
            norms = [getattr(module, f"bn{i}") for i in (1, 2, 3) if hasattr(module, f"bn{i}")]
            convolutions = [
                getattr(module, f"conv{i}") for i in (1, 2, 3) if hasattr(module, f"conv{i}")
            ]
            projection: Any = getattr(module, "shortcut", None) or [
                getattr(module, "convShortcut", None)
            ]
            yield _Block(module, norms, convolutions, projection[0])


def _slim_stream(stream: _Stream, indices: Indices) -> None:
    """Drop what no reader keeps, and let each reader pick its channels from what is left."""
    alive = torch.cat([indices[getattr(holder, name)] for holder, name in stream.readers]).unique()
    for writer in stream.writers:
        _narrow(writer, out=alive)
    for holder, name in stream.readers:
        norm = getattr(holder, name)
        chosen = indices[norm]
        _narrow_norm(norm, chosen)
        if len(chosen) < len(alive):
            norm.__class__ = PickingBatchNorm2d
            norm.register_buffer(
                "picked", torch.searchsorted(alive, chosen).to(norm.weight.device), persistent=False
            )


@torch.no_grad()
def _narrow(layer: nn.Module, out: Tensor | None = None, into: Tensor | None = None) -> None:
    """Keep some output and input channels of a convolution or linear layer."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    weight = layer.weight
    if out is not None:
        weight = weight[out.to(weight.device)]
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[out.to(weight.device)])
    if into is not None:
        weight = weight[:, into.to(weight.device)]
    layer.weight = nn.Parameter(weight.clone())
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = weight.shape[:2]
    else:
        layer.out_features, layer.in_features = weight.shape


@torch.no_grad()
def _narrow_norm(norm: nn.BatchNorm2d, channels: Tensor) -> None:
    channels = channels.to(norm.weight.device)
    norm.weight = nn.Parameter(norm.weight[channels])
    norm.bias = nn.Parameter(norm.bias[channels])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean = norm.running_mean[channels]
    norm.running_var = norm.running_var[channels]
    norm.num_features = len(channels)
