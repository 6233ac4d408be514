"""``load_model``: a trained network from a file or a URL, ready to use."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

import torch
from torch import nn


def load_model(
    path_or_url: str | Path,
    device: str | torch.device = "cpu",
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    width: float | None = None,
    depth_factor: int | None = None,
    width_factor: int | None = None,
) -> nn.Module:
    """A trained network in eval mode: images ``[N, C, H, W]``, float32 pixels in [0, 1], to logits ``[N, num_classes]``.

    Args:
        path_or_url: a checkpoint of ours (masked, packed or slim), a safetensors file that ``scripts/export.py`` wrote, or a
            state dict, such as the paper's code and ``--format state_dict`` write. What a URL names is downloaded once, into
            ``torch.hub``'s folder, or our cache of a user who has no home. Nothing in a file is run.
        device: where the network goes.
        arch, num_classes: of a state dict, which does not say them (``build_model``).
        width, depth_factor, width_factor: of a state dict whose network has not the usual ones.

    Raises:
        utils.errors.InputError: no such file, nothing at the URL, a broken file, another network than described, or a
            description for a file that has its own.
    """
    # Imported here because the modules that read files build networks, and so import this package.
    from utils.network import network_of, stored_network

    path = _downloaded(path_or_url) if "://" in str(path_or_url) else Path(path_or_url)
    given = {"arch": arch, "num_classes": num_classes, "depth_factor": depth_factor, "width_factor": width_factor}
    content, spec = stored_network(path, **given, width=None if width is None else float(width))
    return network_of(content, path, spec, torch.device(device)).eval()


def _downloaded(url: str | Path) -> Path:
    """Where what is at ``url`` is kept; fetched if it is not there yet."""
    from utils.errors import InputError, one_line

    name = PurePosixPath(unquote(urlparse(str(url)).path)).name
    # The best model of every run has one file name, so the address goes into the name here.
    path = _hub_folder() / "checkpoints" / f"{hashlib.sha256(str(url).encode()).hexdigest()[:8]}_{name}"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(str(url), str(path), progress=False)
        except (OSError, ValueError) as error:  # urllib's errors are OSErrors; a URL it cannot read is a ValueError
            raise InputError(f"cannot download {url} ({one_line(error)})") from error
    return path


def _hub_folder() -> Path:
    from data.sources import default_cache

    folder = Path(torch.hub.get_dir())
    # Of a user without a home, torch takes "~" for the name of a folder, or the root folder for the home.
    if folder.parts[0] == "~" or (os.environ.get("HOME") == "" and folder.parts[:2] == ("/", ".cache")):
        return default_cache()
    return folder
