"""Adversarial training of dense and sparse networks: dense, Flying Bird, Flying Bird+ and static
masks.

    python main_adv.py --dataset digits --width 0.25 --epochs 20 --fbp --dynamic_epoch 0.5 ...

Read it top to bottom: flags -> run -> epochs -> report. ``--help`` lists the flags.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data import calibration_batches
from models.loading import build_network
from sparse_core import Masking
from utils.errors import InputError, run_command
from utils.evaluation.command import evaluate_checkpoint, stored_settings
from utils.execution.distributed import joined
from utils.settings.adversarial import DENSE, AdversarialSettings, cautions, refuse_idle_masks
from utils.settings.command_line import parse_settings
from utils.settings.device import pick_device
from utils.training.messages import execution_text, setting_text
from utils.training.run import Run
from utils.training.stage import Stage


def main() -> None:
    description = (__doc__ or "").splitlines()[0]
    with joined() as world:
        settings = world.agree(
            lambda: parse_settings(AdversarialSettings, sys.argv[1:], description, stored_settings)
        )
        device = world.agree(lambda: pick_device(settings, world))
        if settings.eval:
            evaluate_checkpoint(settings, device, world)
        else:
            world.agree(lambda: AdversarialRun(settings, device, world), in_turn=True).train()


class AdversarialRun(Run):
    """One stage of adversarial training, dense or with masks from its first step on."""

    settings: AdversarialSettings

    def first_stage(self) -> Stage:
        settings = self.settings
        stage = Stage(
            build_network(self.spec, self.device, settings.seed),
            self.data,
            settings.training,
            settings,
            self.execution,
        )
        refuse_idle_masks(settings, stage.steps)
        if settings.method != DENSE:
            scored = settings.sparse_init in ("snip", "grasp", "synflow")
            batches = calibration_batches(self.data, seed=settings.seed) if scored else []
            try:
                stage.masking = Masking(
                    stage.model, stage.optimizer, settings.masking(stage.steps), batches=batches
                )
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
        s = self.settings
        density = f" at density {s.density:g}" if self.stage.masking else ""
        return (
            f"{s.method}{density}: {setting_text(s, self.data)}, {s.attack_text},"
            f" {s.epochs} epochs, {execution_text(self.execution, self.device)}"
        )

    def cautions(self) -> Sequence[str]:
        return cautions(self.settings, self.stage.steps)


if __name__ == "__main__":
    sys.exit(run_command(main))
