"""Networks, built by name or loaded from checkpoints."""

from models.build import (
    ARCHITECTURES,
    CUSTOM_ARCHITECTURES,
    arch_names,
    build_model,
    canonical_arch,
    check_image_size,
)
from models.loading import load_model
from models.normalize import Normalize

__all__ = [
    "ARCHITECTURES",
    "CUSTOM_ARCHITECTURES",
    "Normalize",
    "arch_names",
    "build_model",
    "canonical_arch",
    "check_image_size",
    "load_model",
]
