"""Provenance: which software and hardware produced a result."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from utils.errors import InputError
from utils.storage.json_files import misfit, read_object
from utils.storage.paths import RunPaths

_ENVIRONMENT = ("versions", "revision", "device", "hardware")
_LIBRARIES = "torch torchvision numpy scikit-learn Pillow advertorch pyautoattack tensorboard"


def made_by(paths: RunPaths) -> list[dict[str, Any]]:
    """The processes that produced a run, from its ``config.json``: one entry per start or resume;
    older runs recorded only the last."""
    try:
        config = read_object(paths.config)
    except InputError:  # missing, or damaged and about to be rewritten
        return []
    older = {name: config[name] for name in ("processes", *_ENVIRONMENT) if name in config}
    entries = config.get("made_by", [older] if older else [])
    return [] if misfit(entries, [{"processes?": int, "versions?": {"*": str}}]) else entries


def environment(device: torch.device) -> dict[str, Any]:
    """Library versions, source revision, device and hardware, for ``config.json`` and results."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES.split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    found = (versions, source_revision(), str(device), hardware)
    return dict(zip(_ENVIRONMENT, found, strict=True))


def source_revision() -> str:
    """The commit of this source, with ``-dirty`` if files differ; ``unknown`` outside git."""
    root = Path(__file__).resolve().parents[2]
    command = "git describe --always --abbrev=12 --dirty --exclude=*".split()
    options: dict[str, Any] = {"cwd": root, "text": True, "timeout": 10}
    try:
        found = subprocess.check_output(command, stderr=subprocess.DEVNULL, **options)
        return found.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"
