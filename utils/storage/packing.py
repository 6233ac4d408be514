"""Packing sparse networks: live weights (and their momentum) as vectors, masks as bits.

Checkpoints for resuming are packed without loss, at density 0.2 to less than a quarter of the plain
size; released networks are rounded to float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BUFFER = "momentum_buffer"


def compact(content: Mapping[str, Any], parameters: Sequence[str]) -> dict[str, Any]:
    """Pack the masked weights of a run's checkpoint; without masks, return it as it is.

    Args:
        content: the run's checkpoint with ``state_dict``, ``optimizer`` and ``masking``; not
            modified.
        parameters: names of the parameters in the optimizer's order.
    """
    masking = content["masking"]
    if masking is None or "masks" not in masking:  # channel masking leaves no zeros
        return dict(content)
    masks: Mapping[str, Tensor] = masking["masks"]
    bits = {
        kind: {name: _to_bits(mask) for name, mask in masking[kind].items()}
        for kind in ("masks", "explored")
    }
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    return {
        **_changed(content, masks, parameters, lambda value, mask: value[mask]),
        "masking": {**masking, **bits},
        "packed": {"shapes": shapes, "parameters": list(parameters)},
    }


def compact_network(content: Mapping[str, Any], weights: Collection[str]) -> dict[str, Any]:
    """Pack a network for release.

    Args:
        content: holds a float32 ``state_dict``; not modified.
        weights: names of the tensors to round to float16 and strip of zeros; the others (norms,
            biases) are small and stay float32.
    """
    state = dict(content["state_dict"])
    shapes, live = {}, {}
    for name in weights:
        rounded = state[name].half()
        mask = rounded != 0
        shapes[name], live[name] = list(mask.shape), _to_bits(mask)
        state[name] = rounded[mask]
    return {**content, "state_dict": state, "packed": {"shapes": shapes, "live": live}}


def expand(content: Mapping[str, Any]) -> dict[str, Any]:
    """Undo ``compact`` exactly, and ``compact_network`` up to its rounding to float16."""
    content = dict(content)
    packed = content.pop("packed", None)
    if packed is None:
        return content
    if "live" in packed:
        state = dict(content["state_dict"])
        for name, bits in packed["live"].items():
            state[name] = _spread(state[name].float(), _from_bits(bits, packed["shapes"][name]))
        return {**content, "state_dict": state}
    shapes, parameters = packed["shapes"], packed["parameters"]
    bits = content["masking"]
    masking = {
        **bits,
        **{
            kind: {n: _from_bits(bits[kind][n], shapes[n]) for n in shapes}
            for kind in ("masks", "explored")
        },
    }
    changed = _changed(content, masking["masks"], parameters, _spread)
    return {**changed, "masking": masking}


def _changed(
    content: Mapping[str, Any],
    masks: Mapping[str, Tensor],
    parameters: Sequence[str],
    change: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Any]:
    """A checkpoint with ``change(tensor, mask)`` of all that is shaped like a masked weight: the
    weights, their averages and their momentum."""

    def each(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: change(t, masks[n]) if n in masks else t for n, t in tensors.items()}

    state = dict(content["optimizer"]["state"])
    for number, own in state.items():
        name = parameters[number]
        if name in masks and isinstance(own.get(_BUFFER), Tensor):
            state[number] = {**own, _BUFFER: change(own[_BUFFER], masks[name])}
    changed: dict[str, Any] = {
        "state_dict": each(content["state_dict"]),
        "optimizer": {**content["optimizer"], "state": state},
    }
    if isinstance(average := content.get("average"), Mapping):
        by_weight = {kind: each(average[kind]) for kind in ("weights", "ages") if kind in average}
        changed["average"] = {**average, **by_weight}
    return {**content, **changed}


def _spread(live: Tensor, mask: Tensor) -> Tensor:
    full = torch.zeros(mask.shape, dtype=live.dtype)
    full[mask] = live
    return full


def _to_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1)))


def _from_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    count = math.prod(shape)
    # unpackbits would pad with zeros up to ``count``
    if not 8 * (bits.numel() - 1) < count <= 8 * bits.numel():
        raise ValueError("a mask has another number of bits than its weight")
    flat = np.unpackbits(bits.numpy(), count=count)
    return torch.from_numpy(flat.astype(bool)).reshape(tuple(shape))
