"""Adversarial training: dense, with static masks, with Flying Bird or with Flying Bird+.

    python main_adv.py --dataset digits --width 0.25 --epochs 20 --fbp --dynamic_epoch 0.5 ...

Read it top to bottom: flags -> run -> epochs -> report. ``--help`` lists the flags.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from data import calibration_batches
from models.channels import plan_channels
from models.flops import LayerCost
from models.loading import build_network, full_size
from sparse_core import Masking
from utils.errors import InputError, run_command
from utils.evaluation.command import evaluate_checkpoint, stored_settings
from utils.execution.distributed import joined
from utils.settings.adversarial import DENSE, AdversarialSettings, cautions, refuse_idle_masks
from utils.settings.command_line import parse_settings
from utils.settings.device import pick_device
from utils.training.channel_masking import ChannelMasking
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
    channel_notes: Sequence[str] = ()

    def first_stage(self) -> Stage:
        settings = self.settings
        if settings.structure == "channel" and settings.method != DENSE:
            return self._narrow_stage()
        stage = self._stage_on(build_network(self.spec, self.device, settings.seed))
        if settings.method != DENSE:
            scored = settings.sparse_init in ("snip", "grasp", "synflow")
            batches = calibration_batches(self.data, seed=settings.seed) if scored else []
            try:
                stage.masking = Masking(
                    stage.model,
                    stage.optimizer,
                    settings.masking(stage.steps),
                    batches=batches,
                    compare=False,  # the training step does
                )
            except ValueError as error:
                raise InputError(str(error)) from error
        return stage

    def stage_of(self, content: Mapping[str, Any]) -> Stage:
        self.spec = full_size(self.spec)  # the masks know which channels are live
        live = (content["masking"] or {}).get("live")
        return self.first_stage() if live is None else self._narrow_stage(live)

    def _narrow_stage(self, live: Tensor | None = None) -> Stage:
        """A stage on the ``live`` channels; by default the seed draws the initial ones."""
        settings = self.settings
        store = build_network(self.spec, self.device, settings.seed)
        asked = (settings.density, settings.flops, settings.channel_multiple)
        try:
            plan = plan_channels(store, self.data.image_shape, *asked)
        except (ValueError, ImportError) as error:  # torch-pruning may not be installed
            raise InputError(str(error)) from error
        live = plan.channels.first(plan.counts, settings.seed) if live is None else live
        network = {**self.spec, "channels": plan.channels.kept(live)}
        stage = self._stage_on(build_network(network, self.device), plan.costs)
        how: dict[str, Any] = {"score": settings.channel_score, "multiple": plan.multiple}
        how |= {"config": settings.masking(stage.steps), "world": self.world}
        stage.masking = ChannelMasking(
            stage.model, store, stage.optimizer, plan.channels, live, **how
        )
        self.channel_notes = plan.notes()
        return stage

    def _stage_on(self, model: nn.Module, full: Sequence[LayerCost] | None = None) -> Stage:
        settings = self.settings
        dense = None if full is None else {cost.name: cost.weights for cost in full}
        stage = Stage(model, self.data, settings.training, settings, self.execution, dense)
        refuse_idle_masks(settings, stage.steps)
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
        if s.flops is not None:
            density = f" at {s.flops:g} of the FLOPs"
        return (
            f"{s.method}{density}: {setting_text(s, self.data)}, {s.attack_text},"
            f" {s.epochs} epochs, {execution_text(self.execution, self.device)}"
        )

    def cautions(self) -> Sequence[str]:
        return [*self.channel_notes, *cautions(self.settings, self.stage.steps)]


if __name__ == "__main__":
    sys.exit(run_command(main))
