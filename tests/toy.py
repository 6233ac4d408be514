"""Small test objects: a two-layer network, tiny data, and commands run in this process."""

from __future__ import annotations

import importlib
import signal
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data import Augmentation, Data, Split
from utils.errors import run_command
from utils.storage.paths import RunPaths

# A run of a few seconds on digits: 100 training images in 4 steps an epoch.
TOY_RUN = (
    "--dataset digits --width 0.0625 --epochs 2 --decreasing_lr 1 --batch_size 25 --train_subset"
    " 100 --test_subset 60 --train_step 1 --test_step 1 --precision float32"
).split()
# Files that a finished run leaves.
RUN_FILES = (
    "config.json metrics.jsonl result.log run.lock checkpoint.pth.tar checkpoint_previous.pth.tar"
    " model_RA_best.pth.tar model_SA_best.pth.tar net_train.png summary.json"
).split()
# Robust Bird on the same data. With EASY_TICKET, which accepts any masks, the ticket emerges at the
# second epoch; it is trained for two epochs.
TOY_BIRD = (
    "--dataset digits --width 0.0625 --epochs1 4 --epochs2 2 --decreasing_lr 1 --batch_size 25"
    " --train_subset 100 --test_subset 60 --train_step 1 --test_step 1 --precision float32"
).split()
EASY_TICKET = "--eb_window 2 --eb_tolerance 1".split()
TOY_MASKS = "--density 0.3 --update_frequency 2".split()


def network(classes: int = 3) -> nn.Module:
    """Convolution, batch norm, linear on 3x8x8 images; two prunable layers of 4*3*9 = 108 and
    64*classes weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def images(n: int = 12, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.randint(
        0, classes, (n,), generator=generator
    )


def split(n: int = 12, classes: int = 3, side: int = 8, seed: int = 0, channels: int = 3) -> Split:
    """``n`` random uint8 images with labels 0, 1, 2, 0, ...; each is brighter in the channel of its
    class (modulo 3), if it has that channel."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 200, (n, side, side, 3), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % classes
    stored[torch.arange(n), :, :, labels % 3] += 55
    return Split(stored[..., :channels].contiguous(), labels, torch.arange(n), torch.device("cpu"))


def data(n: int = 12) -> Data:
    parts = [split(n, seed=seed) for seed in range(3)]
    return Data(*parts, ["a", "b", "c"], (0.0,) * 3, (1.0,) * 3, Augmentation())


def write_image_tree(
    root: Path, per_class: tuple[int, int] = (20, 8), side: int = 16, classes: int = 3
) -> Path:
    """Write an image folder. Each class has its own colour, so that it can be learned; beyond three
    classes, some share one."""
    rng = np.random.RandomState(0)
    for part, count in zip(("train", "test"), per_class, strict=True):
        for number, name in enumerate(("ant", "bee", "cow", "dog", "emu")[:classes]):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 120, (side, side, 3))
                pixels[..., number % 3] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


def call_main(module: str, flags: Iterable[object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Call a script's ``main`` with ``flags``; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *map(str, flags)])
    handler, form = signal.getsignal(signal.SIGINT), warnings.formatwarning
    try:
        return run_command(importlib.import_module(module).main)
    finally:  # a command never restores these, as its process ends
        signal.signal(signal.SIGINT, handler)
        warnings.formatwarning = form


def only_run(save_dir: Path) -> RunPaths:
    """The paths of the one run folder in ``save_dir``."""
    (root,) = save_dir.iterdir()
    return RunPaths(root)


@dataclass
class Outcome:
    code: int
    out: str
    err: str


class Command:
    """Runs a script's ``main`` in this process, with the exit codes of the command line."""

    def __init__(self, module: str, monkeypatch, capsys) -> None:
        self.module, self.monkeypatch, self.capsys = module, monkeypatch, capsys

    def __call__(self, *flags: object) -> Outcome:
        code = call_main(self.module, flags, self.monkeypatch)
        captured = self.capsys.readouterr()
        return Outcome(code, captured.out, captured.err)
