"""The two stages of Robust Bird in one run: find a ticket by cheap training, prune the network to
it, and train it adversarially (docs/algorithms.md)."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models import flops
from models.channels import ChannelPlan, narrow, plan_largest
from models.loading import build_network, full_size, network_of, refuse_other_classes, spec_in
from models.modes import norm_statistics
from sparse_core import Masking, MaskingConfig, initial_masks, prunable
from utils.early_bird import ticket_mask
from utils.errors import InputError, require
from utils.evaluation.scores import score
from utils.execution.distributed import joined
from utils.settings.command_line import parse_settings
from utils.settings.device import pick_device
from utils.settings.robust_bird import TicketSettings
from utils.settings.stored import resumed_settings
from utils.storage.checkpoint import load_checkpoint
from utils.storage.inputs import read_checkpoint
from utils.training.forecast import Forecast
from utils.training.messages import execution_text, setting_text
from utils.training.run import Run
from utils.training.stage import Row, Stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(kind: type[TicketSettings], description: str) -> None:
    """Run a Robust Bird script with settings of the class ``kind``."""

    with joined() as world:
        settings = world.agree(
            lambda: parse_settings(
                kind, sys.argv[1:], description, partial(resumed_settings, kind.script)
            )
        )
        device = world.agree(lambda: pick_device(settings, world))
        world.agree(lambda: RobustBirdRun(settings, device, world), in_turn=True).train()


class RobustBirdRun(Run):
    """Stage 1 on the dense network until its ticket is drawn, stage 2 on the ticket."""

    settings: TicketSettings

    # ---- start and resume

    def first_stage(self) -> Stage:
        settings = self.settings
        self.early_bird = settings.early_bird()
        model = build_network(self.spec, self.device, settings.seed)
        self._refuse_what_cannot_be_pruned(model)
        if settings.stage1_pretrained is not None:
            model = self._pretrained(settings.stage1_pretrained)
        return self._first_on(model)

    def stage_of(self, content: Mapping[str, Any]) -> Stage:
        settings = self.settings
        self.early_bird = settings.early_bird()
        dense = build_network(full_size(self.spec), self.device)
        stage = self._first_on(dense)
        if content["stage"] == 2:
            masks = content["masking"] and content["masking"]["masks"]
            return self._second_stage(build_network(self.spec, self.device), masks)
        rows = self.rows1
        paths = [] if self._ticket_is_drawn() else [self.paths.mask(row["epoch"]) for row in rows]
        masks = [load_checkpoint(path)["mask"] for path in paths]
        distances = [row["mask_distances"] for row in rows]
        self.early_bird.load_state_dict({"distances": distances, "masks": masks})
        return stage

    def _first_on(self, model: nn.Module) -> Stage:
        """Stage 1 on a dense network, with whose costs the ticket's are compared."""
        settings = self.settings
        stage = Stage(model, self.data, settings.plan1, settings, self.execution)
        self.stage_number, self.dense_costs = 1, stage.costs
        return stage

    def _refuse_what_cannot_be_pruned(self, model: nn.Module) -> None:
        """Raise ``InputError`` now instead of after stage 1."""
        settings = self.settings
        try:
            if settings.stage1_pretrained is None:
                ticket_mask(model, settings.density, settings.pruning)
            if settings.pruning == "channel":
                self._largest_channels(model)
            else:
                initial_masks(model, settings.density, "magnitude")
        except (ValueError, ImportError) as error:  # torch-pruning may not be installed
            raise InputError(str(error)) from error

    def _largest_channels(
        self, model: nn.Module
    ) -> tuple[ChannelPlan, torch.Tensor, dict[str, int]]:
        s = self.settings
        shape = self.data.image_shape
        return plan_largest(model, shape, s.density, s.floor, s.channel_multiple)

    def _pretrained(self, path: str) -> nn.Module:
        """The network of ``--stage1_pretrained``; raises ``InputError`` if it does not fit."""
        content = read_checkpoint(path)
        spec = spec_in(content, path) or {}
        if "channels" in spec:
            raise InputError(
                f"--stage1_pretrained {path} is a network whose channels were already removed; a"
                " dense one is needed"
            )
        self._refuse_other_spec(path, spec)
        same = refuse_other_classes(path, spec, self.data.classes)
        require(
            same, f"--stage1_pretrained {path} numbers the classes in another order than the data"
        )
        model = network_of(content, path, self.spec, self.device)
        values = [*model.parameters(), *norm_statistics(model).values()]
        if not all(bool(value.isfinite().all()) for value in values):
            raise InputError(f"--stage1_pretrained {path} has weights that are not finite")
        weights = prunable(model).values()
        live = sum(int(weight.count_nonzero()) for weight in weights)
        total = sum(weight.numel() for weight in weights)
        wanted = round(self.settings.density * total) if self.settings.density < 1 else 0
        if self.settings.pruning == "unstructured" and live < wanted:
            sparse = (
                f"--stage1_pretrained {path} is already sparse: {live / total:.4f} of its weights"
                " are not zero"
            )
            # Grown weights stay zero without a gradient, e.g. all of a 3x3 kernel but its centre
            # where the feature map has one pixel.
            why = (
                f"fewer than --density {self.settings.density:g} keeps (the density of its run"
                " counts live weights that are zero too)"
            )
            raise InputError(f"{sparse}, {why}; a dense network is needed, or a lower --density")
        return model

    def _refuse_other_spec(self, path: str, theirs: Mapping[str, Any]) -> None:
        """Raise ``InputError`` naming the flags in which a self-describing checkpoint differs."""
        names = [
            name
            for name in ("arch", "width", "depth_factor", "width_factor")
            if name in theirs and theirs[name] != self.spec[name]
        ]
        if names:
            was, now = (
                " ".join(f"--{name} {spec[name]}" for name in names) for spec in (theirs, self.spec)
            )
            raise InputError(
                f"--stage1_pretrained {path} is not a checkpoint of this network: it was trained"
                f" with {was}, this run has {now}"
            )

    @property
    def epochs(self) -> int:
        return self.settings.epochs2

    @property
    def rows(self) -> list[Row]:
        return [row for row in self.history if row["stage"] == 2]

    @property
    def rows1(self) -> list[Row]:
        return [row for row in self.history if row["stage"] == 1]

    def headline(self) -> str:
        s, kept = self.settings, "channels" if self.settings.pruning == "channel" else "weights"
        most = f"{'at most ' if s.early_stop else ''}{s.epochs1} epochs"
        now = f"{s.stage_text(s.stage1)} for {most}"
        if s.stage1_pretrained is not None:
            now = f"pruning {s.stage1_pretrained}"
        what = f"{s.method} at density {s.density:g} of the {kept}: {setting_text(s, self.data)}"
        last = s.attack_text if s.stage2 == "pgd" else s.stage_text(s.stage2)
        then = f"then {last} for {s.epochs2}"
        return f"{what}, {now}, {then}, {execution_text(self.execution, self.device)}"

    def cautions(self) -> Sequence[str]:
        return self.settings.cautions() if self.stage_number == 1 else ()

    def further_state(self) -> dict[str, Any]:
        return {"stage": self.stage_number}

    def where(self) -> str:
        return f"stage {self.stage_number}: "

    # ---- the two stages

    def train_stages(self) -> None:
        settings = self.settings
        if self.stage_number == 1:
            if settings.stage1_pretrained is None:
                self._find_ticket()
            self._prune()
        for epoch in range(len(self.rows), settings.epochs2):
            self.adversarial_epoch(epoch, f"stage 2 epoch {epoch + 1}/{settings.epochs2}")
        # Only now: if the last checkpoint of stage 1 is damaged, a run resumes from the one before,
        # with these masks.
        self.folder.drop(self.paths.mask(1).parent)

    def _find_ticket(self) -> None:
        while not self._ticket_is_drawn():
            self._epoch_of_stage_1(len(self.history))
        self.folder.write_picture(self.paths.distances, self._picture())
        self.folder.save(self.paths.stage1, self.network_content())
        last, bird = self.rows1[-1], self.early_bird
        recent, tolerance = bird.recent(), bird.tolerance
        if not self.settings.early_stop:
            self.folder.say(f"the ticket is drawn after epoch {last['epoch']}")
            return
        if last["ticket"]:
            found = f"the ticket emerged after epoch {last['epoch']}"
        else:
            found = (
                f"warning: no ticket emerged within --epochs1 {self.settings.epochs1}; continuing"
                " with the mask of its last epoch"
            )
        if recent:
            found += (
                f" (its mask differs from the {len(recent)} before in at most {max(recent):.4f},"
                f" tolerance {tolerance:g})"
            )
        self.folder.say(found)

    def _ticket_is_drawn(self) -> bool:
        rows = self.rows1
        return bool(rows) and (
            len(rows) == self.settings.epochs1 or (self.settings.early_stop and rows[-1]["ticket"])
        )

    def _epoch_of_stage_1(self, epoch: int) -> None:
        """Train and evaluate one epoch (from 0) of stage 1, draw its mask, and record it."""
        title = f"stage 1 epoch {epoch + 1}/{self.settings.epochs1}"
        trained, start = self.train_epoch(epoch, title), time.perf_counter()
        if self.settings.stage1_ra:
            measured = self.tester.after_epoch(self.stage, title, ("val", "test"))
        else:
            clean = score(
                self.stage.forward, self.data.val, on_batch=lambda images: self.leave_if_asked()
            )
            measured = {"val_sa": clean.accuracy, "val_clean_loss": clean.loss}
        loss = measured["val_loss" if self.settings.stage1_ra else "val_clean_loss"]
        self.refuse_broken_network(epoch, self.stage.steps, loss)
        emerged = self.early_bird.observe(self.stage.model)
        drawn: Row = {"mask_distances": self.early_bird.distances[-1], "ticket": emerged}
        # Each mask is written once: with all of them in every checkpoint, 200 epochs would write
        # tens of gigabytes.
        self.folder.save(
            self.paths.mask(epoch + 1), {"mask": self.early_bird.state_dict()["masks"][-1]}
        )
        self.record(title, epoch, trained, time.perf_counter() - start, {**measured, **drawn})

    def _prune(self) -> None:
        """Prune the weights of stage 1 without rewinding; stage 2 starts with a fresh optimizer."""
        settings, model = self.settings, self.stage.model
        if settings.density == 1:
            self.folder.say("warning: --density 1 keeps everything, nothing is pruned")
        elif settings.pruning == "channel":
            plan, live, helped = self._largest_channels(model)
            for note in plan.notes():
                self.folder.say(note)
            for name, count in helped.items():
                self.folder.say(
                    f"note: by rank alone {name} would keep {count} of its channels; it keeps its"
                    f" {plan.counts[name]} largest"
                )
            self.spec = {**self.spec, "channels": plan.channels.kept(live)}
            weights = narrow(model, self.spec["channels"]).state_dict()
            # built the way a resumed run builds it, so that even the strides agree
            model = build_network(self.spec, self.device)
            model.load_state_dict(weights)
        masks = None
        if settings.pruning == "unstructured" and settings.density < 1:
            masks = initial_masks(model, settings.density, "magnitude", seed=settings.seed)
        self.stage = self._second_stage(model, masks)
        self.folder.write_json(self.paths.config, self.config())
        self.require_same_state()
        if settings.density < 1:
            self._say_pruned()

    def _second_stage(self, model: nn.Module, masks: Mapping[str, torch.Tensor] | None) -> Stage:
        settings = self.settings
        self.stage_number = 2
        self.forecast = Forecast()  # its pace differs: other attacks, fewer weights or channels
        dense = {cost.name: cost.weights for cost in self.dense_costs}
        stage = Stage(model, self.data, settings.plan2, settings, self.execution, dense)
        if masks is not None:
            steps = settings.epochs2 * stage.steps
            config = MaskingConfig(
                settings.density, steps, sparse_init="magnitude", fixed=True, seed=settings.seed
            )
            stage.masking = Masking(
                stage.model, stage.optimizer, config, masks=masks, compare=False
            )
        return stage

    def _say_pruned(self) -> None:
        live, figures = self.stage.live_counts(), self.stage.figures()
        dense = flops.real_inference(self.dense_costs)
        self.folder.say(
            f"pruned: {sum(live.values())} weights stay (density"
            f" {figures['density']:.4f}), {figures['inference_flops']:.4g} FLOPs an image,"
            f" {figures['inference_flops'] / dense:.3f} of the dense network's"
        )
        for name in [name for name, count in live.items() if count == 0]:
            self.folder.say(f"note: {name} lost all of its weights")

    # ---- report

    def draw(self) -> None:
        super().draw()
        if self.stage_number == 1 and self.rows1 and self.folder.writes:
            self.folder.write_picture(self.paths.distances, self._picture())

    def _picture(self) -> Figure:
        from utils.training.curves import mask_distances

        rows, watched = self.rows1, self.early_bird
        drawn = rows[-1]["epoch"] if self._ticket_is_drawn() else None
        found = (watched.window, watched.tolerance, rows[-1]["ticket"])
        seen = found if self.settings.early_stop else None
        return mask_distances([row["mask_distances"] for row in rows], drawn, seen)

    def summary(self) -> Row:
        settings, rows = self.settings, self.rows1
        first: Row = {
            "kind": settings.stage1 if rows else None,
            "epochs": len(rows),
            "pretrained": settings.stage1_pretrained,
        }
        if rows:
            emerged = settings.early_stop and rows[-1]["ticket"]
            seconds = sum(row["seconds"] for row in rows)
            first |= {"emerged": emerged, "val_sa": rows[-1]["val_sa"], "seconds": seconds}
        sides = self.spec.get("channels", {})
        kept = {name: len(out) for name, (out, _) in sides.items() if out is not None}
        return {**super().summary(), "stage1": first, "channels": kept}

    def flops(self) -> dict[str, dict[str, int]]:
        """Real and paper FLOPs of the ticket; those of training include stage 1."""
        counts, rows = super().flops(), self.rows1
        images, steps = len(self.data.train), self.settings.plan1.attack_steps
        counts["real"]["training"] += flops.real_training(
            [row["inference_flops"] for row in rows], images, steps
        )
        dense = flops.paper_inference(self.dense_costs)
        counts["paper"]["training"] += flops.paper_training(dense, images, steps, len(rows))
        return counts
