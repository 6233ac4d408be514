"""What masks cost: one pass over the weights and one mask update, against a PGD training step, in one run.

    python benchmarks/masking.py --arch resnet18 --batch_size 128 --train_step 10
    python benchmarks/masking.py --quick

A step and the mask work take turns, so that a machine that slows down slows both; medians are printed.
Targets: masks on at most 3 % of a step, an update at most two steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Batch
from models import ARCHITECTURES, build_model
from sparse_core import GROWTHS, Masking, MaskingConfig
from utils.attacks import PGD
from utils.engine import train_step


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    model = build_model(options.arch, 10, width=options.width, mean=[0.5] * options.channels, std=[0.25] * options.channels)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    attack = PGD(8 / 255, 2 / 255, options.train_step)
    batch = random_batch(options, device)

    def step() -> None:
        train_step(model, optimizer, batch, attack=attack, attack_training=True, key=(1, "attack", 0))

    step()  # gradients and momentum exist from here on
    masking = {growth: Masking(model, optimizer, MaskingConfig(0.2, 1000, growth=growth)) for growth in GROWTHS}
    work: dict[str, Callable[[], None]] = {"training step": step, "masks on": masking["random"].apply}
    work |= {f"update, {growth} growth": masking[growth].update_topology for growth in GROWTHS}
    medians = alternate(work, options.repeats, device)
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "ms": medians}))
        return
    print(
        f"{options.arch} x{options.width:g}, batch {options.batch_size}, {options.side}x{options.side}, PGD-{options.train_step}, {device}"
    )
    for name, ms in medians.items():
        print(f"{name:24s} {ms:10.2f} ms  {100 * ms / medians['training step']:7.2f} % of a step")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="resnet18", choices=ARCHITECTURES)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--channels", type=int, default=3, help="of the images")
    parser.add_argument("--train_step", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--quick", action="store_true", help="the quickstart's network on 8x8 images, a few seconds")
    options = parser.parse_args()
    if options.quick:
        options.width, options.batch_size, options.side, options.channels, options.repeats = 0.25, 64, 8, 1, 9
    return options


def random_batch(options: argparse.Namespace, device: torch.device) -> Batch:
    x = torch.rand(options.batch_size, options.channels, options.side, options.side, device=device)
    y = torch.randint(0, 10, (options.batch_size,), device=device)
    return Batch(x.to(memory_format=torch.channels_last), y, torch.arange(options.batch_size, device=device))


def alternate(work: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each, taken in turns after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, run in work.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
