"""What masks cost: applying them, and a mask update, against a PGD training step.

    python benchmarks/masking.py --arch resnet18 --batch_size 128 --train_step 10
    python benchmarks/masking.py --quick

A step and the mask work take turns; prints medians. Targets: applying masks at most 3 % of a step,
an update at most two steps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import timing
import torch

from sparse_core import GROWTHS, Masking, MaskingConfig
from utils.errors import run_command


def main() -> None:
    options = timing.parse(timing.parser((__doc__ or "").splitlines()[0]))
    model = timing.network(options)
    optimizer = timing.optimizer_of(model)
    step = timing.training_step(model, optimizer, timing.random_batch(options), options)
    step()  # gradients and momentum exist from here on
    masking = {
        growth: Masking(model, optimizer, MaskingConfig(0.2, 1000, growth=growth))
        for growth in GROWTHS
    }
    work: dict[str, Callable[[], object]] = {
        "training step": step,
        "masks on": masking["random"].apply,
    }
    work |= {f"update, {growth} growth": masking[growth].update_topology for growth in GROWTHS}
    medians = timing.alternate(work, options.repeats, options.device)
    if options.json:
        print(
            json.dumps(
                {"torch": torch.__version__, "threads": torch.get_num_threads(), "ms": medians}
            )
        )
        return
    print(timing.setting(options))
    for name, ms in medians.items():
        print(f"{name:24s} {ms:10.2f} ms  {100 * ms / medians['training step']:7.2f} % of a step")


if __name__ == "__main__":
    sys.exit(run_command(main))
