"""Adversarial training of dense and sparse networks: dense, Flying Bird, Flying Bird+ and static masks.

    python main_adv.py --dataset digits --width 0.25 --epochs 20 --fbp --dynamic_epoch 0.5 ...

Read it top to bottom: flags -> run -> epochs -> report. ``--help`` lists the flags.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from data import Data, calibration_batches
from sparse_core import Masking
from utils.checkpoint import load_checkpoint
from utils.config import parse_settings, pick_device, require
from utils.config_adv import DENSE, AdversarialSettings, cautions, evaluation_settings, refuse_idle_masks
from utils.distributed import World, joined
from utils.errors import InputError, run_command
from utils.evaluate import auto_attack, evaluate, final_scores, full_precision
from utils.network import build_network, network_of, network_spec, spec_in
from utils.run import Run, Stage, load_data_for, settings_in, settings_of_run


def main() -> None:
    description = (__doc__ or "").splitlines()[0]
    with joined() as world:
        settings = world.agree(lambda: parse_settings(AdversarialSettings, sys.argv[1:], description, stored_settings))
        device = world.agree(lambda: pick_device(settings, world))
        if settings.eval:
            evaluate_checkpoint(settings, device, world)
        else:
            world.agree(lambda: AdversarialRun(settings, device, world), in_turn=True).train()


def stored_settings(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in the checkpoint that the flags point to, if it has any."""
    if given.get("eval") and given.get("pretrained"):
        content = load_checkpoint(given["pretrained"])
        return evaluation_settings(content.get("script"), settings_in(content, given["pretrained"]))
    return settings_of_run(AdversarialSettings.script, given["resume_dir"]) if given.get("resume_dir") else {}


class AdversarialRun(Run):
    """One stage of adversarial training, dense or with masks from its first step on."""

    settings: AdversarialSettings

    def first_stage(self) -> Stage:
        settings = self.settings
        stage = Stage(build_network(self.spec, self.device, settings.seed), self.data, settings.training, settings, self.execution)
        refuse_idle_masks(settings, stage.steps)
        if settings.method != DENSE:
            scored = settings.sparse_init in ("snip", "grasp", "synflow")
            batches = calibration_batches(self.data) if scored else []
            try:
                stage.masking = Masking(stage.model, stage.optimizer, settings.masking(stage.steps), batches=batches)
            except ValueError as error:
                raise InputError(str(error)) from error
        return stage

    @property
    def epochs(self) -> int:
        return self.settings.epochs

    def train_stages(self) -> None:
        for epoch in range(len(self.history), self.epochs):
            self.adversarial_epoch(epoch, f"epoch {epoch + 1}/{self.epochs}")

    def headline(self) -> str:
        s, masking = self.settings, self.stage.masking
        density = f" at density {masking.density():.4f}" if masking else ""
        return f"{s.method}{density}: {self.where_and_what()}, PGD-{s.train_step} training, {s.epochs} epochs, {self.on_what()}"

    def cautions(self) -> Sequence[str]:
        return cautions(self.settings, self.stage.steps)


def evaluate_checkpoint(settings: AdversarialSettings, device: torch.device, world: World) -> None:
    """``--eval``: print SA, RA and the gap of ``--pretrained``; writes nothing."""
    model, data = world.agree(lambda: network_and_data(settings, device), in_turn=True)
    attack = settings.test_attack
    if settings.eval_attack == "autoattack":
        world.agree(lambda: require(world.size == 1, "--eval_attack autoattack works in one process; start it without torchrun"))
        with full_precision():
            clean = evaluate(model, data.test)
        robust = auto_attack(model, data.test, attack, seed=settings.seed)
        print(f"test SA {clean.accuracy:.2f}  test RA (AutoAttack) {robust.accuracy:.2f}  on {robust.images} images")
        return
    name = f"PGD-{attack.steps}"
    if settings.eval_attack == "cw":
        attack, name = dataclasses.replace(attack, loss="margin"), f"CW-{attack.steps}"
    scores = final_scores(model, data, attack, seed=settings.seed, world=world)
    if world.is_first:
        print(
            f"test RA ({name}) {scores.test_ra:.2f}  test SA {scores.test_sa:.2f}  training RA {scores.train_ra:.2f}"
            f"  robust generalization gap {scores.robust_gap:.2f}"
        )


def network_and_data(settings: AdversarialSettings, device: torch.device) -> tuple[nn.Module, Data]:
    """What ``--pretrained`` holds and what it is evaluated on; raises ``InputError`` if they do not fit."""
    path = settings.pretrained
    assert path is not None
    content = load_checkpoint(path)
    data = load_data_for(settings, device)
    spec = spec_in(content, path) or network_spec(settings, data)
    if spec["num_classes"] != len(data.classes):
        raise InputError(f"{path} knows {spec['num_classes']} classes and the data has {len(data.classes)}")
    if len(spec["mean"]) != data.image_shape[0]:
        raise InputError(f"{path} takes {len(spec['mean'])} channels and the images have {data.image_shape[0]}")
    return network_of(content, path, {**spec, "image_size": min(data.image_shape[1:])}, device), data


if __name__ == "__main__":
    sys.exit(run_command(main))
