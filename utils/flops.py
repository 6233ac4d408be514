"""The two FLOPs counts of SPEC 9, always side by side: *real* and *paper*.

*Real* is 2 x live weights x output positions, summed over convolutions and linear layers. *Paper* counts
the output channels twice and leaves linear layers out; it exists to be laid beside the paper's table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.attacks import in_mode

# Backward costs twice the forward pass, so a step on one image is (1 + 2) forward passes.
_PASSES = 3


@dataclass(frozen=True)
class LayerCost:
    """One prunable layer: its weights, output channels and output positions for one image."""

    name: str
    weights: int
    channels_out: int
    positions: int
    convolution: bool


@torch.no_grad()
def layer_costs(model: nn.Module, image_shape: Sequence[int]) -> list[LayerCost]:
    """Every convolution and linear layer, from one forward pass on an empty image ``[C, H, W]``."""
    costs: list[LayerCost] = []

    def hook(name: str):
        def record(module: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            positions = output[0].numel() // output.shape[1]
            costs.append(LayerCost(f"{name}.weight", module.weight.numel(), output.shape[1], positions, isinstance(module, nn.Conv2d)))

        return record

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    try:
        parameter = next(model.parameters())
        with in_mode(model, False):
            model(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return costs


def real_inference(costs: Sequence[LayerCost], live: Mapping[str, int] | None = None) -> int:
    """Floating-point operations for one image; ``live`` weights by name, all by default."""
    return sum(2 * (c.weights if live is None else live[c.name]) * c.positions for c in costs)


def paper_inference(costs: Sequence[LayerCost], live: Mapping[str, int] | None = None) -> int:
    """The paper's count for one image."""
    return sum(2 * (c.weights if live is None else live[c.name]) * c.channels_out * c.positions for c in costs if c.convolution)


def real_training(inference_by_epoch: Sequence[int], images: int, attack_steps: int) -> int:
    """Of a whole adversarial training, from each epoch's real inference count."""
    return _PASSES * (attack_steps + 1) * images * sum(inference_by_epoch)


def paper_training(final_inference: int, images: int, attack_steps: int, epochs: int) -> int:
    """The paper's count of a whole training: that of the final network in every epoch."""
    return _PASSES * (attack_steps + 1) * images * epochs * final_inference
