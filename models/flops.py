"""The two FLOPs counts (docs/runs.md), always side by side: *real* and *paper*.

*Real* is 2 x live weights x output positions, summed over convolutions and linear layers. *Paper*
counts the output channels twice and leaves linear layers out; it exists for comparison with the
paper's table.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.modes import in_mode

# Backward costs twice the forward pass, so a step on one image is (1 + 2) forward passes.
_PASSES = 3


@dataclass(frozen=True)
class LayerCost:
    """One prunable layer: its weights, output channels and output positions for one image.

    ``by_third`` holds the positions of queries, keys and values if an attention layer projects
    different numbers of them with one weight, a third of its rows for each; ``positions`` is then
    that of the queries.
    """

    name: str
    weights: int
    channels_out: int
    positions: int
    convolution: bool
    by_third: tuple[int, ...] = ()


Live = Mapping[str, int | Tensor]


@torch.no_grad()
def layer_costs(model: nn.Module, image_shape: Sequence[int]) -> list[LayerCost]:
    """Costs of every convolution, linear layer and attention projection, one for each call in a
    forward pass on a zero image ``[C, H, W]`` (or input of any other shape); named after their
    weights in ``named_parameters``."""
    costs: list[LayerCost] = []
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def record(
        name: str, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any
    ) -> None:
        if isinstance(module, nn.MultiheadAttention):
            given = {**dict(zip(("query", "key"), inputs, strict=False)), **options}
            costs.extend(_attention_costs(module, name, names, given["query"], given["key"]))
        else:
            weight = _weight_name(module, "weight", name, names)
            costs.append(_layer_cost(module, weight, inputs[0], output))

    layers = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as hooks, in_mode(model, False):
        for name, module in model.named_modules():
            if isinstance(module, layers):
                hook = functools.partial(record, name)
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        # a fused encoder layer does not call its submodules
        torch.backends.mha.set_fastpath_enabled(False)
        hooks.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        parameter = next(model.parameters())
        model(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    return costs


def _weight_name(module: nn.Module, leaf: str, name: str, names: Mapping[int, str]) -> str:
    """The name of the parameter behind a weight: the original one if it is parametrized, that of
    the first layer if it is shared."""
    own = dict(module.named_parameters())
    for kept in (f"parametrizations.{leaf}.original", f"{leaf}_orig", leaf):
        if kept in own:
            return names[id(own[kept])]
    return f"{name}.{leaf}"


def _layer_cost(module: Any, weight: str, x: Tensor, output: Tensor) -> LayerCost:
    """The cost of a layer: each weight multiplies once per output position or, in a transposed
    convolution, per input position."""
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    outputs = module.out_channels if convolution else module.out_features
    positions = (
        x.numel() // module.in_channels
        if convolution and module.transposed
        else output.numel() // outputs
    )
    return LayerCost(weight, module.weight.numel(), outputs, positions, convolution)


def _attention_costs(
    module: nn.MultiheadAttention, name: str, names: Mapping[int, str], query: Tensor, key: Tensor
) -> list[LayerCost]:
    """Costs of the projections of a multi-head attention; products between tokens have no weights
    and do not count."""
    width, out = module.embed_dim, module.out_proj
    asked, known = query.numel() // width, key.numel() // module.kdim
    thirds = (asked, known, known) if asked != known else ()
    projections = {
        "in_proj_weight": (asked, thirds),
        "q_proj_weight": (asked, ()),
        "k_proj_weight": (known, ()),
        "v_proj_weight": (known, ()),
    }
    found = [
        LayerCost(
            _weight_name(module, leaf, name, names),
            getattr(module, leaf).numel(),
            width,
            positions,
            False,
            by_third,
        )
        for leaf, (positions, by_third) in projections.items()
        if getattr(module, leaf) is not None
    ]
    last = _weight_name(out, "weight", f"{name}.out_proj", names)
    return [*found, LayerCost(last, out.weight.numel(), width, asked, False)]


def real_inference(costs: Sequence[LayerCost], live: Live | None = None) -> int:
    """Real inference FLOPs per image.

    Args:
        costs: as ``layer_costs`` returns them.
        live: numbers of live weights, or masks, by name; unnamed layers are dense.

    Raises:
        ValueError: a count is given where a mask is needed (``LayerCost.by_third``).
    """
    return sum(
        2 * _multiplications(cost, (live or {}).get(cost.name, cost.weights)) for cost in costs
    )


def _multiplications(cost: LayerCost, live: int | Tensor) -> int:
    if not cost.by_third:
        return int(live if isinstance(live, int) else live.sum()) * cost.positions
    if isinstance(live, int):
        if live not in (0, cost.weights):
            raise ValueError(
                f"{cost.name} projects {cost.by_third[0]} queries and {cost.by_third[1]} keys: give"
                " its mask, not a count"
            )
        return live // 3 * sum(cost.by_third)
    return sum(
        int(rows.sum()) * positions
        for rows, positions in zip(live.chunk(3), cost.by_third, strict=True)
    )


def paper_inference(costs: Sequence[LayerCost], live: Live | None = None) -> int:
    """Paper inference FLOPs per image; ``live`` as for ``real_inference``."""
    counted = [
        (cost, (live or {}).get(cost.name, cost.weights)) for cost in costs if cost.convolution
    ]
    return sum(2 * _multiplications(cost, kept) * cost.channels_out for cost, kept in counted)


def real_training(
    inference_by_epoch: Sequence[int], images: int, attack_steps: int, further: Sequence[int] = ()
) -> int:
    """Real FLOPs of a whole adversarial training, from the real inference count of each epoch;
    ``further`` are passes per image beyond attack and update, by epoch."""
    steps, further = _PASSES * (attack_steps + 1), further or [0] * len(inference_by_epoch)
    return images * sum(
        inference * (steps + passes)
        for inference, passes in zip(inference_by_epoch, further, strict=True)
    )


def paper_training(
    final_inference: int, images: int, attack_steps: int, epochs: int, further: Sequence[int] = ()
) -> int:
    """Paper FLOPs of a whole training, which count the final network in every epoch; ``further`` as
    in ``real_training``."""
    return images * final_inference * (_PASSES * (attack_steps + 1) * epochs + sum(further))
