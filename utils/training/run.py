"""One training in one folder: what ``main_adv.py`` and the Robust Bird scripts share.

A run trains its stages in turn; its reported figures are those of the last, adversarial one. Each
epoch saves a checkpoint and a line of metrics, from which an interrupted run resumes.
"""

from __future__ import annotations

import math
import os
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from models import flops
from models.loading import network_of, spec_in
from models.modes import norm_statistics
from utils.errors import RunError, Stopped
from utils.execution.distributed import ALONE, World
from utils.execution.interruption import TIME_LIMIT_CODE, Interruption
from utils.settings.common import CommonSettings
from utils.storage.checkpoint import checksum, load_checkpoint, snapshot
from utils.storage.packing import compact
from utils.storage.run_folder import RunFolder, SilentRunFolder, read_summary
from utils.training import messages, resuming
from utils.training.collapse import MOST_ROLLBACKS, CollapseError
from utils.training.display import EpochDisplay
from utils.training.ending import saying_how_it_ends
from utils.training.engine import Progress, Tally
from utils.training.forecast import Forecast, duration, seconds_left
from utils.training.run_state import RunState
from utils.training.saving import AVERAGE, best_epoch, epoch_row
from utils.training.stage import Row
from utils.training.summary import entry, summary_content, summary_text, weight_checksums
from utils.training.testing import Tester

# Drawing takes a quarter of a second, too long after every short epoch.
_SECONDS_BETWEEN_PICTURES = 15.0


class Run(RunState):
    """One run, new or resumed from its folder; each script's subclass defines the stages."""

    def __init__(
        self, settings: CommonSettings, device: torch.device, world: World = ALONE
    ) -> None:
        self.interruption = Interruption(  # first, as loading counts
            settings.time_limit, os.getppid() if world.size > 1 else None
        )
        super().__init__(settings, device, world)
        self.drawn_at = time.monotonic()
        self.epoch = 0  # the current one, and what it has done so far
        self.tally: Tally | None = None
        self.forecast = Forecast()
        self.has_advanced = False  # since this process began
        self.save_is_due = False  # within the epoch

    # ---- defined by each script

    @abstractmethod
    def train_stages(self) -> None:
        """Train from where ``history`` ends to the end."""

    @abstractmethod
    def headline(self) -> str:
        """The run in one line: method, data, attacks."""

    def cautions(self) -> Sequence[str]:
        """Notes on settings that have no effect."""
        return ()

    def where(self) -> str:
        """Prefix of an epoch in messages, such as ``stage 1: ``."""
        return ""

    # ---- epochs

    def train(self) -> None:
        world = self.world
        if world.from_first(lambda: self.paths.summary.exists() and len(self.rows) == self.epochs):
            if world.is_first:
                print(f"{self.paths.root} is finished:\n{summary_text(read_summary(self.paths))}")
            return
        if world.size > 1:
            self._take_over()
        world.agree(self._require_best)
        self.folder = world.agree(
            self._own_folder if world.is_first else lambda: SilentRunFolder(self.paths)
        )
        self.tester = Tester(self.data, self.settings, world, self.folder, self.leave_if_asked)
        ends = saying_how_it_ends(self.folder, world, self.device, self.where, self.checkpoints)
        with ends, self.interruption, self.folder.settled():
            self.folder.drop(self.paths.summary)  # the run may have been extended
            self.folder.rewrite_epochs(self.history)
            # Within an epoch, the network is no longer that of the last row.
            if self.rows and self.partial is None:
                self._save_best()
            self._announce()
            self.train_stages()
            self._finish()

    def _require_best(self) -> None:
        """``InputError`` if the best network so far is lost: the run could not end."""
        epochs = [row for row in self.rows if "val_ra" in row]
        if not self.world.is_first or not epochs:
            return
        is_saved_again = self.partial is None and best_epoch(epochs, "val_ra")[0] is self.rows[-1]
        if not is_saved_again:
            load_checkpoint(self.paths.best_ra)

    def _own_folder(self) -> RunFolder:
        return RunFolder.create(self.paths, self.config(), self.settings.tensorboard, self.stamps)

    def _take_over(self) -> None:
        """Adopt the first process's state: the others may have found another on disk."""
        content = self.world.from_first(lambda: snapshot(self.content(self.partial)))
        self.world.agree(lambda: None if self.world.is_first else self.restore(content))
        self.require_same_state()

    def require_same_state(self) -> None:
        """``RunError`` unless all processes hold the same network, optimizer and masks."""
        if self.world.size > 1:
            state = checksum(
                {
                    "epochs": len(self.history),
                    **self.network_content(),
                    **self.stage.state_dict(),
                    **self.further_state(),
                }
            )
            self.world.require_equal(int(state[:15], 16), "weights or masks")

    def adversarial_epoch(self, epoch: int, title: str) -> None:
        """Train, test and record one epoch (from 0) of the last stage."""
        trained, start = self.train_epoch(epoch, title), time.perf_counter()
        stage = self.stage  # not earlier: a rollback replaces it
        if stage.average is not None:
            stage.average.after_epoch(stage.model, stage.masking, epoch)
        scores = self.tester.after_epoch(stage, title, self._measured_after(epoch))
        self.refuse_broken_network(epoch, stage.steps, scores.get("val_loss", 0.0))
        if stage.masking is not None:
            stage.masking.observe(
                train_ra=trained.accuracy,
                val_ra=scores.get("val_ra", math.nan),
                val_loss=scores.get("val_loss", math.nan),
            )
        guarded = stage.guard.figures() if stage.guard else {}
        self.record(title, epoch, trained, time.perf_counter() - start, {**scores, **guarded})
        self._save_best()

    def _measured_after(self, epoch: int) -> list[str]:
        """The splits to test on after an epoch (from 0) of the last stage: both after the last."""
        every = {"val": self.settings.eval_every, "test": self.settings.test_every}
        return [
            part
            for part, epochs in every.items()
            if (epoch + 1) % epochs == 0 or epoch + 1 == self.epochs
        ]

    def train_epoch(self, epoch: int, title: str) -> Progress:
        """Train the remaining steps of an epoch, all of them again after each rollback."""
        self._save_rollback()
        while True:
            try:
                return self._train_epoch(epoch, title)
            except CollapseError as error:
                self._roll_back(error)

    def _save_rollback(self) -> None:
        """Keep the state at the start of an epoch. The end of the last one was measured, and when
        checkpoints are saved within an epoch does not change what a rollback repeats."""
        watched = self.stage.guard is not None and self.settings.on_collapse != "warn"
        if watched and self.partial is None and self.folder.writes:
            names = [name for name, _ in self.stage.model.named_parameters()]
            self.folder.save(self.paths.rollback, compact(self.content(None), names))

    def _roll_back(self, error: CollapseError) -> None:
        """Restore the state at the start of the epoch and shorten the attack's step; raises
        ``RunError`` unless ``--on_collapse rollback``."""
        before = self.stage.guard.rollbacks if self.stage.guard else 0
        if self.settings.on_collapse != "rollback":
            again = "--on_collapse rollback repeats it with a smaller step, warn continues"
            self.world.fail(RunError(f"{error} ({again})"))
        self.folder.settle()
        path, stage = self.paths.rollback, self.further_state()
        content = self.world.from_first(lambda: load_checkpoint(path) if path.exists() else {})
        kept = {name: content.get(name) for name in ("history", *stage)}
        if kept != {"history": self.history, **stage}:  # it went on after a warning
            self.world.fail(RunError(f"{error}; the state before it was not kept"))
        if before >= MOST_ROLLBACKS:
            self.world.fail(RunError(f"{error}, again after {before} rollbacks"))
        self.restore(content)
        assert self.stage.guard is not None
        self.stage.guard.rollbacks = before + 1
        size = 255 * self.stage.guard.attack.step_size
        self.folder.say(
            f"warning: {error}; repeating epoch {self.epoch + 1} with a step of {size:.3g}/255"
        )

    def _train_epoch(self, epoch: int, title: str) -> Progress:
        """Train the steps of an epoch that the checkpoint has not done."""
        stage = self.stage
        self.epoch, tally = epoch, Tally(stage.steps)
        self.tally = tally
        if self.partial is not None:
            tally.load_state_dict(self.partial, self.device)
            self.partial = None
        print_freq = self.settings.print_freq
        warn = self._warn_of_collapse if self.settings.on_collapse == "warn" else None

        def after_step(tally: Tally) -> None:
            self.has_advanced = True
            if stage.guard is not None:
                stage.guard.after_step(stage.forward, epoch, tally.step, stage.steps, warn)
            self.save_is_due |= self.checkpoints.is_due(self.settings, tally.step)
            if self.save_is_due:
                self._save_partial(tally)
            self.leave_if_asked()

        if words := stage.prepare():
            self.folder.say(words)
        with EpochDisplay(self.folder, title, len(self.data.train), print_freq) as display:

            def on_progress(progress: Progress) -> None:
                display.training(progress)
                self._forecast(tally)

            result = stage.train_epoch(
                epoch, tally, print_freq=print_freq, on_progress=on_progress, after_step=after_step
            )
        for note in stage.forward.notes():
            self.folder.say(note)
        return result

    def _warn_of_collapse(self, error: CollapseError) -> None:
        best = self.paths.best_ra
        saved = f"; the last good model is {best}" if best.exists() else ""
        self.folder.say(f"warning: {error}{saved}")

    def _forecast(self, tally: Tally) -> None:
        """Say once, after a few steps, how long the run is likely to take."""
        pace = self.forecast.update(tally.images, tally.seconds, tally.step == self.stage.steps)
        if pace is not None:
            left = seconds_left(
                self.settings, self.data.images, self.history, tally.step / self.stage.steps, pace
            )
            self.folder.say(
                f"about {duration(left)} left, tests included, at the pace of the first steps"
            )

    def leave_if_asked(self) -> None:
        """Between two steps, or two batches of a test: save and exit if asked to."""
        stopped = self.interruption.asked()
        # An interrupted test starts over, so a limit shorter than a test would never be passed.
        if stopped is not None and stopped.code == TIME_LIMIT_CODE and not self.has_advanced:
            stopped = None
        mine = stopped.code if stopped else int(self.folder.has_failed())
        code = self.world.highest(mine)  # one process that must stop stops all
        if code == 0:
            return
        if code == 1:
            self.folder.settle()  # raises what went wrong
            raise Stopped("", 3)
        if self.tally is not None:
            self._save_partial(self.tally)
        why = str(stopped) if stopped else "another process was asked to stop"
        raise Stopped(why if self.world.is_first else "", code)

    def refuse_broken_network(self, epoch: int, step: int, val_loss: float) -> None:
        """Raise ``RunError`` if the weights are not finite: an epoch's losses cannot show what its
        last update did."""
        model = self.stage.model
        values = [*model.parameters(), *norm_statistics(model).values()]
        finite = all(bool(value.isfinite().all()) for value in values)
        if not (finite and math.isfinite(val_loss)):
            error = RunError(
                f"the network was no longer finite after epoch {epoch + 1}, step {step} of"
                f" {self.stage.steps}"
            )
            self.world.fail(error)

    # ---- files

    def record(
        self, title: str, epoch: int, trained: Progress, tested: float, figures: Row
    ) -> None:
        """Save a finished epoch (from 0), whose tests took ``tested`` seconds and gave ``figures``;
        the checkpoint first, as a resumed run restores the rest."""
        seconds = {"seconds": trained.seconds + tested, "eval_seconds": tested}
        row = {**epoch_row(self.stage, epoch, trained), **seconds, **figures}
        self.history.append({**self.further_state(), **row})
        self.tally = None
        self.has_advanced = True
        self._save_checkpoint(None)
        self.folder.append_epoch(self.history[-1])
        if time.monotonic() - self.drawn_at > _SECONDS_BETWEEN_PICTURES:
            self.draw()
        self.folder.say(messages.epoch_text(title, self.history[-1]))

    def _save_partial(self, tally: Tally) -> None:
        """Save a checkpoint within an epoch; raises ``RunError`` if the network is broken."""
        if self.folder.writes:
            tally.progress(self.epoch)
            self.refuse_broken_network(self.epoch, tally.step, 0.0)
            self._save_checkpoint(tally)

    def _save_checkpoint(self, tally: Tally | None) -> None:
        self.save_is_due = False
        if not self.folder.writes:
            return
        partial = None if tally is None else tally.state_dict()
        names = [name for name, _ in self.stage.model.named_parameters()]
        progress = messages.saved_text(self.history, partial, self.stage.steps)
        self.checkpoints.save(self.folder, self.content(partial), names, progress)

    def _save_best(self) -> None:
        """Save the network if the last epoch is the best so far on the validation images."""
        for key, path in (("val_ra", self.paths.best_ra), ("val_sa", self.paths.best_sa)):
            if key in self.history[-1]:
                row, prefix = best_epoch(self.rows, key)
                if row is self.history[-1]:
                    self.folder.save(path, self.network_content(prefix))

    def draw(self) -> None:
        if not self.folder.writes:
            return
        # imported late: matplotlib would slow --help and refusals
        from utils.training.curves import training_curves

        self.folder.write_picture(
            self.paths.curves, training_curves(self.history, self.paths.root.name)
        )
        self.drawn_at = time.monotonic()

    def _announce(self) -> None:
        say = self.folder.say
        say(self.headline())
        say(f"writing to {self.paths.root}")
        if self.checkpoints.warning:
            say(f"warning: {self.checkpoints.warning}")
        if self.checkpoints.progress:
            say(f"resuming after {self.checkpoints.progress}")
        elif self.settings.resume:
            closest = resuming.closest_existing_run(self.settings, self.paths)
            say(f"note: nothing to resume there, starting from scratch{closest}")
        if self.processes != self.world.size and not self.settings.sync_bn:
            who = f"{self.processes} process(es) and resumed by {self.world.size}"
            then = "from here on batch norm sees batches split differently"
            say(f"note: the checkpoint was written by {who}: {then}")
        for caution in (*self.data.notes, *self.cautions()):
            say(f"note: {caution}")

    # ---- report

    def _finish(self) -> None:
        self.draw()
        if self.stage.average is not None:
            self.folder.save(self.paths.average, self.network_content(AVERAGE))
        summary = self.summary()
        self.folder.write_json(self.paths.summary, summary)
        self.folder.say(summary_text(summary))
        self.folder.drop(self.paths.rollback)
        self.folder.say(f"everything is in {self.paths.root}")

    def summary(self) -> Row:
        """Contents of ``summary.json``, with the final figures of each network."""
        self.folder.settle()
        best, last = self._stored_best(), self.rows[-1]
        spec = spec_in(best, self.paths.best_ra) or self.spec
        model = network_of(best, self.paths.best_ra, spec, self.device)
        test = self.tester.final
        entries = {
            "best": entry(best, test("best", model), averaged=bool(best.get("averaged"))),
            "final": entry(last, test("final", self.stage.model)),
        }
        if self.stage.average is not None and AVERAGE + "val_ra" in last:
            own = {"epoch": last["epoch"], "val_ra": last[AVERAGE + "val_ra"]}
            entries["average"] = entry(own, test("averaged", self.stage.average.model))
        return {
            **summary_content(self.settings, self.paths.root.name, self.history, entries),
            "flops": self.flops(),
            "weights": weight_checksums(self.paths) if self.folder.writes else {},
            "made_by": self.made_by,
        }

    def _stored_best(self) -> dict[str, Any]:
        """The best network's checkpoint; warns if it is not from the best epoch."""
        path = self.paths.best_ra
        stored = self.world.from_first(lambda: load_checkpoint(path))
        row, prefix = best_epoch(self.rows, "val_ra")
        if (stored["epoch"], stored["val_ra"]) != (row["epoch"], row[prefix + "val_ra"]):
            self.folder.say(
                f"warning: {path.name} is from epoch {stored['epoch']}, which was lost and trained"
                " again"
            )
        return stored

    def flops(self) -> dict[str, dict[str, int]]:
        """FLOPs of the last stage: real ones from its metrics, and as the paper counts them."""
        stage, images, rows = self.stage, len(self.data.train), self.rows
        plan, by_epoch = stage.plan, [row["inference_flops"] for row in rows]
        steps = plan.attack_steps
        # as trained: in a longer run, fractions of its length name other epochs
        further = [row.get("further_passes", plan.further_passes(n)) for n, row in enumerate(rows)]
        real = flops.real_training(by_epoch, images, steps, further)
        inference = flops.paper_inference(stage.costs, stage.live_counts())
        paper = flops.paper_training(inference, images, steps, plan.epochs, further)
        return {
            "real": {"inference": by_epoch[-1], "training": real},
            "paper": {"inference": inference, "training": paper},
        }
