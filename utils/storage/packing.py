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

    def live(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: value[masks[n]] if n in masks else value for n, value in tensors.items()}

    optimizer = dict(content["optimizer"])
    optimizer["state"] = {
        number: (
            {**state, _BUFFER: state[_BUFFER][masks[parameters[number]]]}
            if _is_packed(state, parameters[number], masks)
            else state
        )
        for number, state in optimizer["state"].items()
    }
    bits = {
        kind: {name: _to_bits(mask) for name, mask in masking[kind].items()}
        for kind in ("masks", "explored")
    }
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    packed = {"shapes": shapes, "parameters": list(parameters)}
    return {
        **content,
        "state_dict": live(content["state_dict"]),
        **_of_average(content, live),
        "optimizer": optimizer,
        "masking": {**masking, **bits},
        "packed": packed,
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
    masks = masking["masks"]

    def full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: _spread(t, masks[n]) if n in masks else t for n, t in tensors.items()}

    optimizer = dict(content["optimizer"])
    optimizer["state"] = {
        number: (
            {**state, _BUFFER: _spread(state[_BUFFER], masks[parameters[number]])}
            if _is_packed(state, parameters[number], masks)
            else state
        )
        for number, state in optimizer["state"].items()
    }
    return {
        **content,
        "state_dict": full(content["state_dict"]),
        **_of_average(content, full),
        "optimizer": optimizer,
        "masking": masking,
    }


def _of_average(
    content: Mapping[str, Any], change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Any]:
    """The averaged network of a checkpoint, if any, with ``change`` applied to its weights."""
    average = content.get("average")
    if not isinstance(average, Mapping):
        return {}
    by_weight = {kind: change(average[kind]) for kind in ("weights", "ages") if kind in average}
    return {"average": {**average, **by_weight}}


def _is_packed(state: Mapping[str, Any], name: str, masks: Mapping[str, Tensor]) -> bool:
    return name in masks and isinstance(state.get(_BUFFER), Tensor)


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
