"""Settings applied to this machine and its data: data set, run folder, network description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data import Data, load_data
from utils.settings.common import CommonSettings, S
from utils.storage.paths import RunPaths


def load_data_for(settings: CommonSettings, device: torch.device) -> Data:
    """Load the data set of the settings onto ``device``."""
    names = ("image_size", "train_subset", "test_subset", "cache_dir")
    options = {name: getattr(settings, name) for name in names}
    return load_data(settings.dataset, settings.data, device=device, **options)


def placed(settings: S, data: Data, device: torch.device, processes: int = 1) -> tuple[S, RunPaths]:
    """Resolve the settings for this machine and find the run folder; a resumed run may have been
    started on another machine."""
    variants = settings.on_machine(device, processes)
    # sync_bn keeps its stored value, in case several processes resume the run later
    if settings.resume_dir is not None:
        paths = RunPaths(Path(settings.resume_dir))
        return settings.with_values(precision=variants[0].precision), paths
    root = Path(settings.save_dir)
    folders = [(variant, RunPaths(root / variant.run_name(data.digest))) for variant in variants]
    begun = (one for one in folders if one[1].checkpoint.exists() or one[1].previous.exists())
    return next(begun, folders[0]) if settings.resume else folders[0]


def network_spec(settings: CommonSettings, data: Data) -> dict[str, Any]:
    """The network's description for ``build_network``, with its class names; every checkpoint holds
    it. ``image_size`` is the shorter side; images that are not square add ``image_shape``, their
    height and width."""
    height, width = data.image_shape[1:]
    return {
        "arch": settings.arch,
        "num_classes": len(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "width": settings.width,
        "depth_factor": settings.depth_factor,
        "width_factor": settings.width_factor,
        "image_size": min(height, width),
        "classes": list(data.classes),
        **({} if height == width else {"image_shape": [height, width]}),
    }
