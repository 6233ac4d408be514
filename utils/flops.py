"""The two FLOPs counts of SPEC 9, always side by side: *real* and *paper*.

*Real* is 2 x live weights x output positions, summed over convolutions and linear layers. *Paper* counts
the output channels twice and leaves linear layers out; it exists to be laid beside the paper's table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    """Every convolution, linear layer and projection of an attention, once for each time that it is computed for one empty image
    ``[C, H, W]`` (or any other shape); named as ``named_parameters`` names their weights."""
    costs: list[LayerCost] = []

    def hook(name: str):
        def record(module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Tensor], output: Any) -> None:
            if isinstance(module, nn.MultiheadAttention):
                costs.extend(_attention_costs(name, module, *_query_and_key(inputs, options)))
            else:
                costs.append(_layer_cost(name, module, inputs[0], output))

        return record

    layers = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in model.named_modules() if isinstance(m, layers)]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused encoder layer does not call the modules within it
    try:
        parameter = next(model.parameters())
        with in_mode(model, False):
            model(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
    named, first = dict(model.named_parameters(remove_duplicate=False)), {id(p): name for name, p in model.named_parameters()}
    return [replace(cost, name=first.get(id(named.get(cost.name)), cost.name)) for cost in costs]  # of a weight that layers share


def _layer_cost(name: str, module: Any, x: Tensor, output: Tensor) -> LayerCost:
    """Each weight of a layer multiplies once a position: of its output, of a transposed convolution once a position of its input."""
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    outputs = module.out_channels if convolution else module.out_features
    positions = x.numel() // module.in_channels if convolution and module.transposed else output.numel() // outputs
    own = dict(module.named_parameters())
    leaf = next((leaf for leaf in ("parametrizations.weight.original", "weight_orig") if leaf in own), "weight")  # of a spectral norm
    return LayerCost(f"{name}.{leaf}", module.weight.numel(), outputs, positions, convolution)


def _attention_costs(name: str, module: nn.MultiheadAttention, query: Tensor, key: Tensor) -> list[LayerCost]:
    """The projections of a multi-head attention; the products of its tokens with each other have no weights and do not count."""
    width = module.embed_dim
    asked, known = query.numel() // width, key.numel() // module.kdim
    packed = {"in_proj_weight": (asked + 2 * known) // 3}
    single = {"q_proj_weight": asked, "k_proj_weight": known, "v_proj_weight": known}
    found = [
        LayerCost(f"{name}.{leaf}", getattr(module, leaf).numel(), width, positions, False)
        for leaf, positions in {**packed, **single}.items()
        if getattr(module, leaf) is not None
    ]
    return [*found, LayerCost(f"{name}.out_proj.weight", module.out_proj.weight.numel(), width, asked, False)]


def _query_and_key(inputs: tuple[Tensor, ...], options: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    query = inputs[0] if inputs else options["query"]
    return query, inputs[1] if len(inputs) > 1 else options["key"]


def real_inference(costs: Sequence[LayerCost], live: Mapping[str, int] | None = None) -> int:
    """Floating-point operations for one image; ``live`` weights by name, all of a layer that it does not name."""
    return sum(2 * (live or {}).get(c.name, c.weights) * c.positions for c in costs)


def paper_inference(costs: Sequence[LayerCost], live: Mapping[str, int] | None = None) -> int:
    """The paper's count for one image."""
    return sum(2 * (live or {}).get(c.name, c.weights) * c.channels_out * c.positions for c in costs if c.convolution)


def real_training(inference_by_epoch: Sequence[int], images: int, attack_steps: int) -> int:
    """Of a whole adversarial training, from each epoch's real inference count."""
    return _PASSES * (attack_steps + 1) * images * sum(inference_by_epoch)


def paper_training(final_inference: int, images: int, attack_steps: int, epochs: int) -> int:
    """The paper's count of a whole training: that of the final network in every epoch."""
    return _PASSES * (attack_steps + 1) * images * epochs * final_inference
