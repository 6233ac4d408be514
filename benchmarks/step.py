"""The PGD training step against the paper's loop and the machine's ceiling, in one run.

    python benchmarks/step.py --arch resnet18 --batch_size 128 --train_step 10
    python benchmarks/step.py --quick            a small batch and two attack steps, under a minute
    python benchmarks/step.py --width 0.25 --side 8 --channels 1 --batch_size 64

(a) The paper's loop: advertorch's PGD, float32, NCHW, eager, plain SGD, images from a DataLoader
with 2 workers and torchvision's transforms. (b) Ours, adding one optimization at a time, and then
the uncompiled step with one remedy each. (c) The ceiling: a large matrix product in float32 and,
if the hardware has it, in bf16. All take turns after a warm-up; prints medians. A step counts as
2 x attack steps + 3 inferences, since an attack needs no weight gradients; a remedy's further
passes are not counted.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Split
from models.flops import layer_costs, real_inference
from utils.attacks import PGD, n_fgsm
from utils.compat import import_advertorch, import_torchvision
from utils.errors import RunError, run_command
from utils.execution.forward import Execution, Forward
from utils.execution.hardware import best_precision
from utils.training.averages import ExponentialAverage
from utils.training.engine import train_step
from utils.training.losses import LOSSES, Options

PAPER = "the paper's loop"


def main() -> None:
    flags = timing.parser((__doc__ or "").splitlines()[0])
    flags.add_argument(
        "--only", help="comma-separated parts of the names to run; the paper's loop is always there"
    )
    options = timing.parse(flags, {"batch_size": 32, "train_step": 2, "repeats": 3})
    split = timing.synthetic(options)
    work: dict[str, Callable[[], object]] = {}
    try:
        work[PAPER] = papers_loop(options, split)
    except ModuleNotFoundError as error:
        print(f"note: the paper's loop needs {error.name}, so there are no ratios", file=sys.stderr)
    for name, step in ours(options, split).items():
        if options.only is None or any(part in name for part in options.only.split(",")):
            work[name] = step
    # on hardware without bf16 its product would take a minute
    if best_precision(torch.device(options.device)) == "bf16":
        work["bf16 matrix product"] = matrix_product(options, torch.bfloat16)
    work["float32 matrix product"] = matrix_product(options, torch.float32)
    medians = timing.alternate(work, options.repeats, options.device)
    report(options, medians)


def report(options: argparse.Namespace, medians: dict[str, float]) -> None:
    shape = (options.channels, options.side, options.side)
    inference = real_inference(layer_costs(timing.network(options), shape))
    flops = options.batch_size * (2 * options.train_step + 3) * inference
    ceilings = {
        name: 2 * _side(options) ** 3 / ms / 1e6
        for name, ms in medians.items()
        if "product" in name
    }
    ceiling = ceilings[f"{best_precision(torch.device(options.device))} matrix product"]
    paper = medians.get(PAPER)
    rows = [
        {
            "name": name,
            "ms": ms,
            "images_per_second": 1e3 * options.batch_size / ms,
            "gflops": flops / ms / 1e6,
            "ratio": paper and paper / ms,
        }
        for name, ms in medians.items()
        if "product" not in name
    ]
    for row in rows:
        row["share"] = row["gflops"] / ceiling
    if options.json:
        timing.print_json(rows=rows, ceilings=ceilings)
        return
    print(timing.setting(options))
    print(
        f"{'':34s}{'ms a step':>11s}{'images/s':>10s}{'GFLOP/s':>9s}"
        f"{'ratio':>7s}{'of the ceiling':>16s}"
    )
    for row in rows:
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] else "-"
        print(
            f"{row['name']:34s}{row['ms']:11.1f}{row['images_per_second']:10.1f}{row['gflops']:9.0f}"
            f"{ratio:>7s}{100 * row['share']:14.0f} %"
        )
    for name, gflops in ceilings.items():
        print(f"{name:34s}{medians[name]:11.1f}{'':10s}{gflops:9.0f}")


# ---------------------------------------------------------------- (a) the paper's loop


def papers_loop(options: argparse.Namespace, split: Split) -> Callable[[], object]:
    """A step of the paper's loop: DataLoader batch, advertorch's attack in train mode, update."""
    attacks, context = import_advertorch("attacks"), import_advertorch("context")
    transforms = import_torchvision("transforms")
    padding = options.side // 8
    crop = [
        transforms.ToPILImage(),
        transforms.RandomCrop(options.side, padding=padding),
        transforms.RandomHorizontalFlip(),
    ]
    transform = transforms.Compose([*crop, transforms.ToTensor()])
    images, labels = split.images.cpu().numpy(), split.labels.tolist()
    loader = torch.utils.data.DataLoader(
        list(zip(images, labels, strict=True)),
        options.batch_size,
        collate_fn=partial(_transformed, transform),
        shuffle=True,
        num_workers=2,
        drop_last=True,
        pin_memory=_cuda(options),
    )
    model = timing.network(options).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    loss = nn.CrossEntropyLoss(reduction="sum")
    adversary = attacks.LinfPGDAttack(
        model,
        loss_fn=loss,
        eps=8 / 255,
        nb_iter=options.train_step,
        eps_iter=2 / 255,
        rand_init=True,
        clip_min=0.0,
        clip_max=1.0,
    )
    batches = (batch for _ in itertools.count() for batch in loader)

    def step() -> None:
        x, y = (part.to(options.device) for part in next(batches))
        with context.ctx_noparamgrad(model):
            x = adversary.perturb(x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _transformed(transform: Callable[[np.ndarray], Tensor], rows: list[Any]) -> list[Tensor]:
    return torch.utils.data.default_collate([(transform(image), y) for image, y in rows])


# ---------------------------------------------------------------- (b) ours


def ours(options: argparse.Namespace, split: Split) -> dict[str, Callable[[], object]]:
    """This project's step, adding one optimization at a time, then with one remedy each."""
    device = torch.device(options.device)
    precision = best_precision(device)
    variants = {"ours: float32, channels-last": Execution(graphs="off")}
    if precision == "bf16":
        variants["+ bf16"] = Execution(precision, graphs="off")
    if not options.quick:  # compiling takes longer than the rest of a quick run
        variants["+ compiled"] = Execution(precision, compile=True, graphs="off")
    if _cuda(options):
        variants["+ the attack as one CUDA graph"] = Execution(precision, compile=not options.quick)
        variants["+ all of it as one CUDA graph"] = Execution(
            precision, compile=not options.quick, graphs="full"
        )
    steps = {name: _step(options, split, execution) for name, execution in variants.items()}
    plain = Execution(precision, graphs="off")
    trades = {"loss": LOSSES["trades"], "options": Options(beta=6.0)}
    pgd = PGD(8 / 255, 2 / 255, options.train_step)
    climbing = replace(pgd, loss="kl", start="gaussian")
    steps |= {
        f"{precision}, AWP": _step(options, split, plain, remedy={"awp": 0.01}),
        f"{precision}, EMA": _step(options, split, plain, ema=0.995),
        f"{precision}, TRADES": _step(options, split, plain, attack=climbing, remedy=trades),
        f"{precision}, N-FGSM": _step(options, split, plain, attack=n_fgsm(8 / 255)),
    }
    return steps


def _step(
    options: argparse.Namespace,
    split: Split,
    execution: Execution,
    *,
    attack: PGD | None = None,
    ema: float = 0.0,
    remedy: Mapping[str, Any] | None = None,
) -> Callable[[], object]:
    model = timing.network(options)
    optimizer = timing.optimizer_of(model)
    batches = timing.batches(options, split)
    attack = attack or PGD(8 / 255, 2 / 255, options.train_step)
    forward = Forward(model, execution, [options.batch_size])
    average = ExponentialAverage(model, ema) if ema else None

    def step() -> None:
        train_step(
            model,
            optimizer,
            next(batches),
            attack=attack,
            attack_training=attack.loss == "ce",
            key=(1, "attack", 0),
            forward=forward,
            **(remedy or {}),
        )
        if notes := forward.notes():  # a row named after a graph must use one
            raise RunError(notes[0])
        if average is not None:
            average.after_step(model, None)

    return step


# ---------------------------------------------------------------- (c) the ceiling


def matrix_product(options: argparse.Namespace, precision: torch.dtype) -> Callable[[], object]:
    side = _side(options)
    a, b = (torch.rand(side, side, device=options.device).to(precision) for _ in range(2))
    return lambda: a @ b


def _side(options: argparse.Namespace) -> int:
    return 8192 if _cuda(options) else 2048


def _cuda(options: argparse.Namespace) -> bool:
    return torch.device(options.device).type == "cuda"


if __name__ == "__main__":
    sys.exit(run_command(main))
