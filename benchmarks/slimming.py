"""What removed channels gain: a PGD training step and inference, dense against slim, in one run.

    python benchmarks/slimming.py --arch resnet18 --batch_size 128 --train_step 10
    python benchmarks/slimming.py --stage1 RUN/model_stage1.pth.tar      the channels that a trained
    network chooses python benchmarks/slimming.py --quick

Dense and slim take turns; medians and ratios are printed. Without --stage1 the batch norm scales
that choose the channels
are drawn at random, so every layer loses about the same share. Target: a training step at density
.5 at least twice as fast.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import timing
import torch
from torch import nn

from models.flops import layer_costs, real_inference
from models.loading import network_of, spec_in
from models.modes import in_mode
from models.slimming import kept_channels, slim, usual_floor
from utils.errors import InputError, run_command
from utils.storage.checkpoint import load_checkpoint

DENSITIES = (0.5, 0.35, 0.2)


def main() -> None:
    flags = timing.parser((__doc__ or "").splitlines()[0])
    flags.add_argument(
        "--stage1", help="checkpoint of a dense network; it also says what the network is"
    )
    options = timing.parse(flags)
    dense = trained(options) if options.stage1 else with_random_scales(timing.network(options))
    networks = {"dense": dense} | {
        f"channels {density:g}": slimmed(dense, density, options) for density in DENSITIES
    }
    batch = timing.random_batch(options)
    work: dict[str, Callable[[], object]] = {}
    for name, model in networks.items():
        work[f"{name}: step"] = timing.training_step(
            model, timing.optimizer_of(model), batch, options
        )
        work[f"{name}: inference"] = inference(model, batch.x)
    medians = timing.alternate(work, options.repeats, options.device)
    flops = {
        name: real_inference(layer_costs(model, batch.x.shape[1:]))
        for name, model in networks.items()
    }
    if options.json:
        print(
            json.dumps(
                {
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    "ms": medians,
                    "flops": flops,
                }
            )
        )
        return
    print(timing.setting(options))
    for name in networks:
        step, forward = medians[f"{name}: step"], medians[f"{name}: inference"]
        print(
            f"{name:14s} step {step:9.1f} ms  {medians['dense: step'] / step:5.2f}x   inference"
            f" {forward:8.2f} ms  {medians['dense: inference'] / forward:5.2f}x   FLOPs"
            f" {flops['dense'] / flops[name]:5.2f}x fewer"
        )


def slimmed(dense: nn.Module, density: float, options: argparse.Namespace) -> nn.Module:
    """As ``train_eb.py --pruning channel`` makes it."""
    return timing.placed(
        slim(dense, kept_channels(dense, density, usual_floor(density))[0]), options
    )


def with_random_scales(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.copy_(torch.rand(module.num_features, generator=generator))
    return model


def trained(options: argparse.Namespace) -> nn.Module:
    """The network of ``--stage1``; its size and images replace those of the flags."""
    content = load_checkpoint(options.stage1)
    spec = spec_in(content, options.stage1)
    if spec is None or "kept" in spec:
        raise InputError(
            f"{options.stage1} does not hold a dense network of ours, as model_stage1.pth.tar of a"
            " Robust Bird run does"
        )
    options.classes = spec["num_classes"]
    options.arch, options.width, options.side, options.channels = (
        spec["arch"],
        spec["width"],
        spec["image_size"],
        len(spec["mean"]),
    )
    return timing.placed(
        network_of(content, options.stage1, spec, torch.device(options.device)), options
    )


def inference(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        with in_mode(model, False), torch.no_grad():
            model(x)

    return run


if __name__ == "__main__":
    sys.exit(run_command(main))
