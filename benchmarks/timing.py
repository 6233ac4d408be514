"""Shared by the benchmarks: flags, networks and batches, and timing of work in turns."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Augmentation, Batch, Split, TrainLoader
from models import ARCHITECTURES, build_model, check_image_size
from models.channels import ChannelPlan, narrow, plan_channels
from utils.attacks import PGD
from utils.errors import InputError, require
from utils.execution.forward import Forward
from utils.execution.hardware import use_fast_kernels
from utils.training.engine import sgd, train_step

Options = argparse.Namespace
QUICK = {"width": 0.25, "batch_size": 64, "side": 8, "channels": 1, "repeats": 9}


def parser(description: str, *, trains: bool = True) -> argparse.ArgumentParser:
    """The flags of every benchmark, or of one that does not train; ``parse`` interprets
    ``--quick``."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--arch", default="resnet18", choices=ARCHITECTURES)
    flags.add_argument("--width", type=float, default=1.0)
    flags.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    flags.add_argument("--channels", type=int, default=3, help="of the images")
    flags.add_argument("--repeats", type=int, default=5)
    if trains:
        flags.add_argument("--batch_size", type=int, default=128)
        flags.add_argument("--train_step", type=int, default=10)
        flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--json", action="store_true", help="one line of JSON")
    flags.add_argument(
        "--quick", action="store_true", help="the quickstart's network on 8x8 images"
    )
    return flags


def parse(
    flags: argparse.ArgumentParser, quick: dict[str, object] | None = None
) -> argparse.Namespace:
    """The options; with ``--quick`` the values of ``quick`` (or ``QUICK``) are the defaults."""
    if flags.parse_known_args()[0].quick:
        flags.set_defaults(**(QUICK if quick is None else quick))
    options = flags.parse_args()
    require(options.repeats > 0, "--repeats must be at least 1")
    if options.arch == "wideresnet":
        options.width = 1.0  # it has a width_factor instead
    device = str(getattr(options, "device", "cpu"))
    require(device == "cpu" or torch.cuda.is_available(), f"--device {device}: there is no GPU")
    try:
        check_image_size(options.arch, options.side)
    except ValueError as error:
        raise InputError(f"--side {options.side}: {error}") from error
    use_fast_kernels(torch.device(options.device))
    return options


def network(options: argparse.Namespace) -> nn.Module:
    """A fresh network, in train mode, channels-last."""
    mean, std = [0.5] * options.channels, [0.25] * options.channels
    return placed(build_model(options.arch, 10, mean=mean, std=std, width=options.width), options)


def narrowed(
    options: argparse.Namespace, density: float
) -> tuple[nn.Module, nn.Module, ChannelPlan, torch.Tensor]:
    """A narrowed network, the full one, the plan of its channels, and which of them are live."""
    full = network(options)
    try:
        plan = plan_channels(full, (options.channels, options.side, options.side), density)
    except ValueError as error:
        raise InputError(f"--width {options.width:g} is too narrow: {error}") from error
    live = plan.channels.first(plan.counts, 1)
    small = narrow(copy.deepcopy(full), plan.channels.kept(live))
    return placed(small, options), full, plan, live


def placed(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """The model on the device, in train mode, channels-last."""
    return model.to(options.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def random_batch(options: argparse.Namespace) -> Batch:
    x = torch.rand(
        options.batch_size, options.channels, options.side, options.side, device=options.device
    )
    y = torch.randint(0, 10, (options.batch_size,), device=options.device)
    return Batch(
        x.to(memory_format=torch.channels_last),
        y,
        torch.arange(options.batch_size, device=options.device),
    )


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return sgd(model, lr=0.1, momentum=0.9, weight_decay=5e-4)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    options: Options,
    forward: Forward | None = None,
) -> Callable[[], object]:
    """One PGD training step, as a function to time; in float32 by default."""
    attack = PGD(8 / 255, 2 / 255, options.train_step)
    return lambda: train_step(
        model,
        optimizer,
        batch,
        attack=attack,
        attack_training=True,
        key=(1, "attack", 0),
        forward=forward,
    )


def setting(options: argparse.Namespace) -> str:
    size = (
        f"{options.arch} x{options.width:g}, batch {options.batch_size},"
        f" {options.side}x{options.side}"
    )
    return (
        f"{size}, PGD-{options.train_step}, {options.device}, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}"
    )


def print_json(**figures: object) -> None:
    """One line, with the version and the number of threads of torch."""
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), **figures}))


def synthetic(options: argparse.Namespace, images: int = 4096) -> Split:
    """Random images of ten classes, on the device."""
    device, shape = torch.device(options.device), (options.side, options.side, options.channels)
    return Split(
        torch.randint(0, 256, (images, *shape), dtype=torch.uint8, device=device),
        torch.randint(0, 10, (images,), device=device),
        torch.arange(images, device=device),
        device,
    )


def batches(options: argparse.Namespace, split: Split) -> Iterator[Batch]:
    """Augmented batches without end."""
    augmentation = Augmentation(options.side // 8, flip=True)
    loader = TrainLoader(split, options.batch_size, augmentation, seed=1)
    return (batch for epoch in itertools.count() for batch in loader.epoch(epoch))


def alternate(
    work: Mapping[str, Callable[[], object]], repeats: int, device: str, pause: float = 0.0
) -> dict[str, float]:
    """Median milliseconds of each piece of work. They take turns after a warm-up round, so a
    machine that slows down slows all of them.

    With ``pause`` (seconds) each turn begins with a pause and an uncounted call: the threads of an
    onnxruntime session spin for a while after its work, on cores that the next one needs.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, run in work.items():
            if pause:
                time.sleep(pause)
                run()
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
