"""Networks as safetensors: weights, zeros included, and metadata from which to rebuild the network.

The format (https://huggingface.co/docs/safetensors) allows only strings as metadata, so each value
is written as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from utils.errors import BrokenCheckpointError, InputError
from utils.storage.json_files import parsed

SUFFIX = ".safetensors"
# Metadata that describe the network; the rest says where it comes from.
_NETWORK = frozenset(
    "arch num_classes mean std width depth_factor width_factor image_size image_shape channels"
    " classes".split()
)


def safetensors_bytes(
    state: Mapping[str, Tensor], spec: Mapping[str, Any], about: Mapping[str, Any]
) -> bytes:
    """The content of a safetensors file: a state dict, its network's description for
    ``build_network``, and further plain values under names that ``spec`` does not use."""
    # the usual mark of PyTorch files
    metadata = {
        "format": "pt",
        **{name: json.dumps(value) for name, value in {**spec, **about}.items()},
    }
    # copies, as the format has no tensors that share memory
    copies = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()
    }
    return safetensors.torch.save(copies, metadata)


def load_safetensors(path: str | Path) -> dict[str, Any]:
    """Load a file as the content of a checkpoint: ``state_dict``, ``network`` if the file describes
    one, and the values of ``about``.

    Raises:
        InputError: no such file.
        BrokenCheckpointError: not safetensors, truncated, or with metadata that are not ours.
    """
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            told = {
                name: parsed(text)
                for name, text in (file.metadata() or {}).items()
                if name != "format"
            }
    except (safetensors.SafetensorError, ValueError) as error:
        raise BrokenCheckpointError(
            f"{path} is not a safetensors file of ours or is damaged"
        ) from error
    network = {name: value for name, value in told.items() if name in _NETWORK}
    about = {name: value for name, value in told.items() if name not in _NETWORK}
    return {**about, "state_dict": state, **({"network": network} if network else {})}
