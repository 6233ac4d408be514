"""Workarounds for libraries that do not import as they are; the only place for such code.

``torchvision`` beside a CPU build of torch cannot load its compiled operators and fails while it
registers shape functions for two of them. ``advertorch`` 0.2.3 imports a function that newer torch
no longer has. Call ``import_torchvision()`` and ``import_advertorch()`` instead of importing them.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_TORCHVISION_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# kept alive: a garbage-collected Library takes its definitions along
_libraries: list[torch.library.Library] = []


def import_torchvision(submodule: str = "") -> ModuleType:
    """``torchvision`` (or ``torchvision.<submodule>``). Data sets, transforms and models work;
    detection operators may not."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name, schema in _TORCHVISION_OPERATORS.items():
            if not hasattr(torch.ops.torchvision, name):
                library = torch.library.Library("torchvision", "FRAGMENT" if _libraries else "DEF")
                library.define(schema)
                _libraries.append(library)
    return importlib.import_module(f"torchvision.{submodule}" if submodule else "torchvision")


def import_advertorch(submodule: str = "attacks") -> ModuleType:
    """``advertorch.<submodule>``, an independent reference for tests and benchmarks."""
    import_torchvision()  # advertorch imports it
    importlib.import_module("torch.autograd.gradcheck")
    # The attribute torch.autograd.gradcheck is a function that hides the module of that name.
    module = sys.modules["torch.autograd.gradcheck"]
    if not hasattr(module, "zero_gradients"):
        module.zero_gradients = _zero_gradients  # type: ignore[attr-defined]
    return importlib.import_module(f"advertorch.{submodule}")


def _zero_gradients(x: torch.Tensor) -> None:
    if x.grad is not None:
        x.grad.detach_().zero_()
