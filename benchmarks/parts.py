"""What an epoch is made of: training steps, batches, masks, tests and checkpoints.

    python benchmarks/parts.py --arch resnet18 --batch_size 128 --train_step 10
    python benchmarks/parts.py --quick

Each part is timed as in benchmarks/step.py, in the training precision, and multiplied by its number
in an epoch of CIFAR-10 (45,000 images, 5,000 for validation, 10,000 for the test, PGD-20). Targets:
batches at most 2 % of a step, masks at most 3 %, an update at most two steps, checkpoints at most
1 % of the epoch.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import timing
import torch

from sparse_core import GROWTHS, Masking, MaskingConfig
from utils.attacks import PGD
from utils.errors import run_command
from utils.evaluation.scores import EVAL_BATCH, evaluate
from utils.execution.forward import Execution, Forward
from utils.execution.hardware import best_precision
from utils.storage.packing import compact
from utils.storage.paths import RunPaths
from utils.storage.run_folder import RunFolder

TRAIN, VAL, TEST = 45_000, 5_000, 10_000
UPDATE_FREQUENCY = 900


def main() -> None:
    flags = timing.parser((__doc__ or "").splitlines()[0])
    flags.add_argument(
        "--compile", action="store_true", help="the network, as --compile on of a run"
    )
    options = timing.parse(flags)
    with tempfile.TemporaryDirectory() as folder:
        run_folder = RunFolder.create(RunPaths(Path(folder) / "run"), {})
        work = parts(options, run_folder)
        medians = timing.alternate(work, options.repeats, options.device)
        run_folder.settle()
    steps = math.ceil(TRAIN / options.batch_size)
    tests = math.ceil(VAL / EVAL_BATCH) + math.ceil(TEST / EVAL_BATCH)
    times = dict.fromkeys(("training step", "batch", "masks on"), float(steps))
    times |= {f"mask update, {growth} growth": 0.0 for growth in GROWTHS}
    times["mask update, random growth"] = steps / UPDATE_FREQUENCY
    times |= {"PGD-20 test of a batch": tests, "clean test of a batch": tests, "checkpoint": 1}
    seconds = {name: medians[name] * number / 1e3 for name, number in times.items()}
    if options.json:
        timing.print_json(ms=medians, epoch_seconds=seconds)
        return
    print(timing.setting(options))
    total, step = sum(seconds.values()), medians["training step"]
    print(
        f"{'':26s}{'ms':>10s}{'of a step':>12s}{'an epoch has':>14s}"
        f"{'seconds':>10s}{'of the epoch':>14s}"
    )
    for name, number in times.items():
        share = f"{100 * medians[name] / step:9.2f} %"
        print(
            f"{name:26s}{medians[name]:10.2f}{share:>12s}{number:14.4g}"
            f"{seconds[name]:10.2f}{100 * seconds[name] / total:12.2f} %"
        )
    hours, training = 200 * total / 3600, 200 * seconds["training step"] / 3600
    print(
        f"{'an epoch':26s}{'':36s}{total:10.2f}      200 epochs: {hours:.2f} h, of which training"
        f" {training:.2f} h"
    )


def parts(options: timing.Options, run_folder: RunFolder) -> dict[str, Callable[[], object]]:
    device = torch.device(options.device)
    model = timing.network(options)
    optimizer = timing.optimizer_of(model)
    execution = Execution(best_precision(device), compile=options.compile)
    forward = Forward(model, execution, (options.batch_size, EVAL_BATCH))
    step = timing.training_step(model, optimizer, timing.random_batch(options), options, forward)
    step()  # gradients and momentum exist from here on
    masks = {
        growth: Masking(model, optimizer, MaskingConfig(0.2, 1000, growth=growth))
        for growth in GROWTHS
    }
    masking = masks["random"]
    split = timing.synthetic(options)
    batches = timing.batches(options, split)
    tested = split.subset(torch.arange(EVAL_BATCH))
    parameters = [name for name, _ in model.named_parameters()]

    def save() -> None:
        states = {"optimizer": optimizer.state_dict(), "masking": masking.state_dict()}
        content = compact({"state_dict": model.state_dict(), **states}, parameters)
        paths = run_folder.paths
        run_folder.save(paths.checkpoint, content, keep=paths.previous)

    return {
        "training step": step,
        "batch": lambda: next(batches),
        "masks on": masking.apply,
        **{f"mask update, {name} growth": masks[name].update_topology for name in masks},
        "PGD-20 test of a batch": lambda: evaluate(
            model, tested, PGD(8 / 255, 2 / 255, 20), forward=forward
        ),
        "clean test of a batch": lambda: evaluate(model, tested, forward=forward),
        "checkpoint": save,
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
