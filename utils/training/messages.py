"""Texts of a run's log lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data import Data
from utils.execution.forward import Execution
from utils.settings.common import CommonSettings


def setting_text(settings: CommonSettings, data: Data) -> str:
    """Network, data and tests, for the headline."""
    images = f"{' / '.join(map(str, data.images.values()))} images"
    tests = f"PGD-{settings.test_step} tests at {settings.test_ball}"
    return f"{settings.arch} on {settings.dataset} ({images}), {tests}"


def execution_text(execution: Execution, device: torch.device) -> str:
    """Precision, device and processes, for the headline."""
    processes = execution.world.size
    where = f"{device.type} in {processes} processes" if processes > 1 else str(device)
    return f"in {execution.precision} on {where}"


def epoch_text(title: str, row: Mapping[str, Any]) -> str:
    """One line with the figures that an epoch has."""
    figures = [f"{title}  lr {row['lr']:g}  loss {row['train_loss']:.3f}"]
    for part in ("train", "val", "test"):
        measured = [
            f"{kind.upper()} {row[f'{part}_{kind}']:.2f}"
            for kind in ("ra", "sa")
            if f"{part}_{kind}" in row
        ]
        figures += [f"{part} {' '.join(measured)}"] if measured else []
    if "average_val_ra" in row:
        figures.append(f"average val RA {row['average_val_ra']:.2f}")
    pace = f"{row['images_per_second']:.0f} img/s  {row['seconds']:.1f} s"
    return "  ".join([*figures, f"density {row['density']:.4f}", pace])


def saved_text(
    history: Sequence[Mapping[str, Any]], partial: Mapping[str, Any] | None, steps: int
) -> str:
    """How far a checkpoint with ``history`` and an epoch's ``partial`` tally has come."""
    done = 0 if partial is None else len(partial["weights"])
    within = f"step {done} of {steps}" if done < steps else "all steps"
    if not history:
        return f"{within} of epoch 1"
    last, step = history[-1], f", and {within} of the next" if done else ""
    stage = f"stage {last['stage']}, " if "stage" in last else ""
    return f"{stage}epoch {last['epoch']}{step}"
