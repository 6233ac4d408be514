"""What training with structured channels costs: a step at each density against a dense one, a mask
update in steps, and file sizes.

    python benchmarks/channels.py --batch_size 32 --train_step 2
    python benchmarks/channels.py --quick
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import timing
import torch
import torch.nn.functional as F

from models.flops import layer_costs, real_inference
from sparse_core import MaskingConfig
from utils.errors import run_command
from utils.execution.forward import Execution, Forward
from utils.execution.hardware import best_precision
from utils.storage.files import saved_bytes
from utils.training.channel_masking import ChannelMasking

DENSITIES = (0.5, 0.25)


def main() -> None:
    options = timing.parse(timing.parser(__doc__ or ""))
    batch = timing.random_batch(options)
    execution = Execution(best_precision(torch.device(options.device)))
    work: dict[str, Callable[[], object]] = {}
    sizes: dict[str, tuple[int, int, int]] = {}

    def add(name: str, model: torch.nn.Module, masking: ChannelMasking | None = None) -> None:
        optimizer = masking.optimizer if masking else timing.optimizer_of(model)
        forward = Forward(model, execution)
        work[name] = timing.training_step(model, optimizer, batch, options, forward)
        work[name]()  # gives the optimizer its momentum
        flops = real_inference(layer_costs(model, batch.x.shape[1:]))
        network, resume = model.state_dict(), [model.state_dict(), optimizer.state_dict()]
        states = [*resume, masking.state_dict()] if masking else resume
        sizes[name] = (flops, len(saved_bytes(network)), len(saved_bytes(states)))
        if masking is not None:
            work[f"update {name}"] = lambda: masking.update(
                lambda net: F.cross_entropy(forward.plainly(net, batch.x), batch.y)
            )

    add("dense", timing.network(options))
    for density in DENSITIES:
        model, store, plan, live = timing.narrowed(options, density)
        optimizer = timing.optimizer_of(model)
        config = MaskingConfig(density, 1000, growth="gradient", drop_fraction=0.2)
        add(
            f"{density:g} of the channels",
            model,
            ChannelMasking(model, store, optimizer, plan.channels, live, config),
        )
    times = timing.alternate(work, options.repeats, options.device)
    rows = [
        {
            "network": name,
            "ms": round(times[name], 1),
            "faster": round(times["dense"] / times[name], 2),
            "fewer FLOPs": round(sizes["dense"][0] / flops, 2),
            "update in steps": round(times.get(f"update {name}", 0.0) / times[name], 2),
            "network file": round(network / sizes["dense"][1], 3),
            "checkpoint": round(resume / sizes["dense"][2], 3),
        }
        for name, (flops, network, resume) in sizes.items()
    ]
    if options.json:
        timing.print_json(setting=timing.setting(options), rows=rows)
        return
    print(f"{timing.setting(options)}, {execution.precision}")
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    sys.exit(run_command(main))
