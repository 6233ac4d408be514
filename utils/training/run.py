"""One training in one folder: what ``main_adv.py`` and the Robust Bird scripts share.

A run trains one stage after the other; the last is the adversarial one that its figures are of.
Every epoch leaves a checkpoint and a line of metrics, so that a cut run goes on where its last
epoch ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from models import CUSTOM_ARCHITECTURES
from models.loading import full_size, network_of, spec_in
from utils.errors import InputError, RunError, Stopped, one_line
from utils.evaluation.scores import FinalScores, epoch_scores, final_scores
from utils.execution.distributed import ALONE, World, lost_another
from utils.execution.forward import Execution, Forward
from utils.execution.interruption import TIME_LIMIT_CODE, Interruption
from utils.settings.applied import load_data_for, network_spec, placed
from utils.settings.common import CommonSettings
from utils.settings.stored import settings_in
from utils.storage.checkpoint import (
    checksum,
    load_checkpoint,
    load_newest,
    load_weights,
    network_weights,
    refuse_unfit_training_state,
    snapshot,
)
from utils.storage.packing import compact
from utils.storage.paths import RunPaths
from utils.storage.provenance import environment, made_by
from utils.storage.run_folder import RunFolder, SilentRunFolder, read_summary, refuse_locked
from utils.training import messages, resuming
from utils.training.collapse import CollapseError
from utils.training.display import EpochDisplay
from utils.training.engine import EpochResult, Progress, Tally
from utils.training.forecast import Forecast, duration, images_of, seconds_left
from utils.training.rehearsal import refusing, rehearse_checkpoint
from utils.training.stage import Row, Stage
from utils.training.summary import figures, run_flops, summary_text, weight_checksums

# a picture costs a quarter of a second, which short epochs would feel
_SECONDS_BETWEEN_PICTURES = 15.0
AVERAGE = "average_"  # begins the names of the averaged network's figures


class Run(ABC):
    """One run, from its first epoch or from where its folder stands. A script says what its stages
    are."""

    stage: Stage

    def __init__(
        self, settings: CommonSettings, device: torch.device, world: World = ALONE
    ) -> None:
        """Build everything and check it against the data; nothing is written, and no other process
        asked, before ``train``."""
        if settings.resume_dir is not None:
            refuse_locked(RunPaths(Path(settings.resume_dir)))
        self.data = load_data_for(settings, device)
        self.settings, self.paths = placed(settings, self.data, device, world.size)
        self.device = device
        self.world = world
        refuse_locked(self.paths)  # what is said of its files would be of a moment
        self.stamps = self.paths.stamps()  # before anything of it is read
        self.spec = network_spec(settings, self.data)
        self.history: list[Row] = []
        self.drawn_at = float("-inf")
        self.interruption = Interruption(
            settings.time_limit, os.getppid() if world.size > 1 else None
        )
        # of the checkpoint: the epoch that it was left in
        self.partial: Mapping[str, Any] | None = None
        self.epoch = 0  # that is trained or tested now, and what it has done so far
        self.tally: Tally | None = None
        self.forecast = Forecast()
        self.has_advanced = False  # since this process began
        self.saved_at = time.monotonic()
        self.saved = ""
        self.last_good = self.paths.checkpoint  # the file that holds what was saved
        self.warning: str | None = None
        compiled = {"auto": None, "on": True, "off": False}[settings.compile]
        self.execution = Execution(
            self.settings.precision, compiled, self.settings.cuda_graphs, world
        )
        self.processes = world.size  # of the checkpoint, if there is one
        self._begin()

    def _begin(self) -> None:
        """At the checkpoint, or anew."""
        settings, paths = self.settings, self.paths
        resuming_one = settings.resume or settings.resume_dir is not None
        has_checkpoint = paths.checkpoint.exists() or paths.previous.exists()
        resuming.refuse_used_folder(paths, resuming=resuming_one, has_checkpoint=has_checkpoint)
        if has_checkpoint:
            content, self.last_good, self.warning = load_newest(paths.checkpoint, paths.previous)
            resuming.refuse_grown(settings, settings_in(content, self.last_good), paths.root)
            self._restore(content)
            return
        if settings.resume:
            resuming.refuse_changed_images(settings, paths, self.data)
        with refusing(settings.arch):
            self.stage = self.first_stage()
            if settings.arch in CUSTOM_ARCHITECTURES:
                self.stage.figures()
                states = self.stage.state_dict()
                rehearse_checkpoint(
                    self.stage.model, states, self.network, self.data, self.device, settings.seed
                )

    # ---- what a script says

    @abstractmethod
    def first_stage(self) -> Stage:
        """The stage a fresh run begins with."""

    def stage_of(self, content: Mapping[str, Any]) -> Stage:
        """The stage a checkpoint was left in; its states are loaded afterwards."""
        return self.first_stage()

    @abstractmethod
    def train_stages(self) -> None:
        """Train from where ``history`` ends to the end."""

    @abstractmethod
    def headline(self) -> str:
        """What begins, in a line."""

    def cautions(self) -> Sequence[str]:
        """What the settings leave idle."""
        return ()

    def further_state(self) -> dict[str, Any]:
        """What the script's checkpoints hold beyond stage and history."""
        return {}

    def where(self) -> str:
        """What goes before an epoch in a message."""
        return ""

    @property
    @abstractmethod
    def epochs(self) -> int:
        """Epochs of the last stage."""

    @property
    def rows(self) -> list[Row]:
        """The epochs of the last stage: the run's figures are of these."""
        return self.history

    @property
    def network(self) -> dict[str, Any]:
        """The description of the network as it is now."""
        return {**self.spec, **self.stage.removed()}

    # ---- epochs

    def train(self) -> None:
        world = self.world
        if world.from_first(lambda: self.paths.summary.exists() and len(self.rows) == self.epochs):
            if world.is_first:
                print(f"{self.paths.root} is finished:\n{summary_text(read_summary(self.paths))}")
            return
        if world.size > 1:
            self._take_over()
        self.folder = world.agree(
            self._own_folder if world.is_first else lambda: SilentRunFolder(self.paths)
        )
        with self._saying_how_it_ends(), self.interruption, self.folder.settled():
            self.folder.drop(self.paths.summary)  # of a run that has grown
            self.folder.rewrite_epochs(self.history)
            # in the middle of an epoch the network is no longer that of the last row
            if self.rows and self.partial is None:
                self._save_best()
            self._announce()
            self.train_stages()
            self._finish()

    def _own_folder(self) -> RunFolder:
        return RunFolder.create(self.paths, self.config(), self.settings.tensorboard, self.stamps)

    @contextlib.contextmanager
    def _saying_how_it_ends(self) -> Iterator[None]:
        """Add to what ends a run early where it can go on from."""
        world = self.world
        try:
            yield
        except Stopped as stopped:
            self.folder.say(f"{stopped}; {self.last_good_text}; --resume goes on from there")
            raise
        except (RunError, InputError) as error:
            # an input that fails now, after training began, is a failed run
            raise RunError(f"{world.name}{self.where()}{error}; {self.last_good_text}") from error
        except torch.OutOfMemoryError as error:
            out = f"{world.name}out of memory on {self.device}, a smaller --batch_size needs less"
            raise RunError(f"{out}; {self.last_good_text}") from error
        except RuntimeError as error:
            if world.size == 1 or not lost_another(error):
                raise
            raise RunError(
                f"{world.name}another process of this run has ended; {self.last_good_text}"
            ) from error
        except KeyboardInterrupt:
            self.folder.say(f"interrupted; {self.last_good_text}; --resume goes on from there")
            raise

    def _take_over(self) -> None:
        """Begin where the first process does: the others may have scored, or found on disk,
        something else."""
        content = self.world.from_first(lambda: snapshot(self._content(self.partial)))
        self.world.agree(lambda: None if self.world.is_first else self._restore(content))
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
        stage = self.stage  # not before: a rollback builds another
        stage.finish_epoch(epoch)
        scores = self.attacked_scores(title, self._measured_after(epoch))
        self.refuse_broken_network(epoch, stage.steps, scores.get("val_loss", 0.0))
        if stage.masking is not None:
            stage.masking.observe(
                train_ra=trained.accuracy,
                val_ra=scores.get("val_ra", math.nan),
                val_loss=scores.get("val_loss", math.nan),
            )
        seconds = time.perf_counter() - start
        self.history.append(
            {
                **self.common_row(epoch, trained, trained.seconds + seconds),
                "eval_seconds": seconds,
                **scores,
                **(stage.guard.figures() if stage.guard else {}),
            }
        )
        self.save()
        self._save_best()
        self.say_epoch(title)

    def _measured_after(self, epoch: int) -> list[str]:
        """Which parts of the data are looked at after an epoch (from 0) of the last stage; after
        the very last all are."""
        every = {"val": self.settings.eval_every, "test": self.settings.test_every}
        return [
            part
            for part, epochs in every.items()
            if (epoch + 1) % epochs == 0 or epoch + 1 == self.epochs
        ]

    def say_epoch(self, title: str) -> None:
        self.folder.say(messages.epoch_text(title, self.history[-1]))

    def train_epoch(self, epoch: int, title: str) -> EpochResult:
        """The steps of an epoch that are left, again from the last checkpoint after each
        rollback."""
        while True:
            try:
                return self._train_epoch(epoch, title)
            except CollapseError as error:
                self._roll_back(error)

    def _roll_back(self, error: CollapseError) -> None:
        """To the last checkpoint, with a shorter step; ``RunError`` unless that was asked for."""
        before = self.stage.guard.rollbacks if self.stage.guard else 0
        if self.settings.on_collapse != "rollback":
            again = "--on_collapse rollback repeats it with a smaller step"
            self._fail_together(RunError(f"{error} ({again})"))
        self.folder.settle()
        if not self.world.from_first(self.last_good.exists):
            self._fail_together(RunError(f"{error}, before there was a checkpoint to go back to"))
        content = self.world.from_first(lambda: load_checkpoint(self.last_good))
        self._restore(content)
        assert self.stage.guard is not None
        self.stage.guard.rollbacks = before + 1
        size = 255 * self.stage.guard.attack.step_size
        self.folder.say(
            f"warning: {error}; resuming after {self.saved} with a step of {size:.3g}/255"
        )

    def _fail_together(self, error: RunError) -> None:
        """Of what all processes have met at the same step, the first one speaks."""
        raise error if self.folder.writes else Stopped("", 3)

    def _look_for_collapse(self, tally: Tally) -> None:
        guard = self.stage.guard
        if guard is None or not guard.is_due(tally.step, self.stage.steps):
            return
        where = f"epoch {self.epoch + 1}, step {tally.step} of {self.stage.steps}"
        try:
            guard.look(self.stage.forward, where)
        except CollapseError as error:
            if self.settings.on_collapse != "warn":
                raise
            if not guard.is_told:
                self.folder.say(f"warning: {error}; the last good model is {self.paths.best_ra}")
            guard.is_told = True

    def _train_epoch(self, epoch: int, title: str) -> EpochResult:
        """The steps of an epoch that are left; the checkpoint says how many were done."""
        self.epoch, self.tally = epoch, Tally(self.stage.steps)
        tally = self.tally
        if self.partial is not None:
            tally.load_state_dict(self.partial, self.device)
            self.partial = None
        print_freq = self.settings.print_freq

        def after_step(tally: Tally) -> None:
            self.has_advanced = True
            self._look_for_collapse(tally)
            settings, minutes = self.settings, (time.monotonic() - self.saved_at) / 60
            if (
                settings.save_every and tally.step % settings.save_every == 0
            ) or minutes >= settings.save_minutes:
                self._save_partial(tally)
            self.leave_if_asked()

        if words := self.stage.prepare():
            self.folder.say(words)
        with EpochDisplay(self.folder, title, len(self.data.train), print_freq) as display:

            def on_progress(progress: Progress) -> None:
                display.training(progress)
                self._forecast(tally)

            result = self.stage.train_epoch(
                epoch, tally, print_freq=print_freq, on_progress=on_progress, after_step=after_step
            )
        for note in self.stage.forward.notes():
            self.folder.say(note)
        return result

    def _forecast(self, tally: Tally) -> None:
        """Say once, after a few steps, how long the run is likely to take."""
        pace = self.forecast.update(tally.images, tally.seconds, tally.step == self.stage.steps)
        if pace is not None:
            left = seconds_left(
                self.settings,
                images_of(self.data),
                self.history,
                tally.step / self.stage.steps,
                pace,
            )
            self.folder.say(
                f"likely {duration(left)} to go, tests included, at the pace of the first steps"
            )

    def leave_if_asked(self) -> None:
        """Between two steps, or two batches of a test: save and leave, if somebody asked for it."""
        stopped = self.interruption.asked()
        # A test begins anew after a cut, so a limit shorter than a test would be met in it for
        # ever.
        if stopped is not None and stopped.code == TIME_LIMIT_CODE and not self.has_advanced:
            stopped = None
        mine = stopped.code if stopped else int(self.folder.has_failed())
        code = self.world.highest(mine)  # one process that is asked, or cannot write, stops all
        if code == 0:
            return
        if code == 1:
            self.folder.settle()  # raises what went wrong
            raise Stopped("", 3)
        if self.tally is not None:
            self._save_partial(self.tally)
        why = str(stopped) if stopped else "another process was asked to stop"
        raise Stopped(why if self.world.is_first else "", code)

    def _batch_callback(self, display: EpochDisplay) -> Callable[[int], None]:
        """What a test calls after each batch."""

        def on_batch(images: int) -> None:
            display.images(images)
            self.leave_if_asked()

        return on_batch

    def attacked_scores(
        self, title: str, parts: Collection[str] = ("val", "test")
    ) -> dict[str, float]:
        """Validation and test (``parts``), clean and attacked; of the averaged network too, if
        there is one, by names that begin with ``average_``."""
        found = self._scores(title, self.stage.forward, parts)
        averaged = self.stage.averaged() if parts else None
        if averaged is not None:
            # a second network is not worth compiling
            forward = Forward(averaged, dataclasses.replace(self.stage.execution, compile=False))
            scores = self._scores(f"{title} average", forward, parts)
            found |= {AVERAGE + name: score for name, score in scores.items()}
        return found

    def _scores(self, title: str, forward: Forward, parts: Collection[str]) -> dict[str, float]:
        images = {"val": len(self.data.val), "test": len(self.data.test)}
        with EpochDisplay(
            self.folder, f"{title} test", sum(images[part] for part in parts)
        ) as display:
            return epoch_scores(
                forward.model,
                self.data,
                self.settings.test_attack,
                seed=self.settings.seed,
                parts=parts,
                forward=forward,
                on_batch=self._batch_callback(display),
            )

    def refuse_broken_network(self, epoch: int, step: int, val_loss: float) -> None:
        """The losses of an epoch are those before each update; this looks at what the last update
        left."""
        finite = all(
            bool(value.isfinite().all()) for value in self.stage.model.state_dict().values()
        )
        if not (finite and math.isfinite(val_loss)):
            error = RunError(
                f"the network was no longer finite after epoch {epoch + 1}, step {step} of"
                f" {self.stage.steps}"
            )
            self._fail_together(error)

    def common_row(self, epoch: int, trained: EpochResult, seconds: float) -> Row:
        """What every line of ``metrics.jsonl`` has; epochs count from 1 there, accuracies are in
        percent."""
        stage = self.stage
        return {
            "epoch": epoch + 1,
            "lr": stage.plan.rate(epoch, 0, stage.steps),
            "train_loss": trained.loss,
            "train_sa" if stage.plan.attack is None else "train_ra": trained.accuracy,
            **stage.figures(),
            "updates": (
                [{**e, "epoch": epoch + 1} for e in stage.masking.events if e["epoch"] == epoch]
                if stage.masking
                else []
            ),
            "images_per_second": trained.images / trained.seconds,
            "train_seconds": trained.seconds,
            "seconds": seconds,
        }

    # ---- files

    def save(self) -> None:
        """The checkpoint first: what a crash cuts off after it is made good from it on resume."""
        self.tally = None
        self.has_advanced = True
        self._save_checkpoint(None)
        self.folder.append_epoch(self.history[-1])
        if time.monotonic() - self.drawn_at > _SECONDS_BETWEEN_PICTURES:
            self.draw()

    def _save_partial(self, tally: Tally) -> None:
        """A checkpoint in the middle of an epoch, if the network is still good for one."""
        if self.folder.writes:
            tally.progress(self.epoch)
            self.refuse_broken_network(self.epoch, tally.step, 0.0)
            self._save_checkpoint(tally)

    def _save_checkpoint(self, tally: Tally | None) -> None:
        if not self.folder.writes:
            return
        partial = None if tally is None else tally.state_dict()
        content = self._content(partial)
        parameters = [name for name, _ in self.stage.model.named_parameters()]
        saved = messages.saved_text(self.history, partial, self.stage.steps)

        def on_disk() -> None:
            self.saved, self.last_good = saved, self.paths.checkpoint

        # never what is broken instead of what is not
        keep = self.paths.previous if self.last_good == self.paths.checkpoint else None
        self.folder.save(
            self.paths.checkpoint, compact(content, parameters), keep=keep, on_disk=on_disk
        )
        self.saved_at = time.monotonic()

    def _content(self, partial: Mapping[str, Any] | None) -> dict[str, Any]:
        """Everything to go on from, ``partial`` being how far the epoch has come."""
        where = {
            "history": self.history,
            **self.further_state(),
            "partial": partial,
            "processes": self.world.size,
        }
        return {**self.network_content(), **self.stage.state_dict(), **where}

    def _save_best(self) -> None:
        """Keep the network if the last epoch is the best so far, by validation alone."""
        for key, path in (("val_ra", self.paths.best_ra), ("val_sa", self.paths.best_sa)):
            if key in self.history[-1]:
                row, prefix = self._best(key)
                if row is self.history[-1]:
                    self.folder.save(path, self.network_content(prefix))

    def _best(self, key: str) -> tuple[Row, str]:
        """The best epoch, and ``average_`` if its averaged network is better than its own; the
        first of equals."""
        every = [(row, kind) for row in self.rows for kind in ("", AVERAGE) if kind + key in row]
        return max(every, key=lambda found: found[0][found[1] + key])

    def draw(self) -> None:
        if not self.folder.writes:
            return
        # matplotlib takes longer to import than --help and refusals may take
        from utils.training.curves import training_curves

        self.folder.write_picture(
            self.paths.curves, training_curves(self.history, self.paths.root.name)
        )
        self.drawn_at = time.monotonic()

    def network_content(self, prefix: str = "") -> dict[str, Any]:
        """The network as it is, or its average (``prefix`` ``average_``), and which it is: what
        every checkpoint of this run holds."""
        last, average = self.history[-1] if self.history else {}, self.stage.average
        model = average.model if prefix and average is not None else self.stage.model
        return {
            "state_dict": model.state_dict(),
            **({"averaged": True} if prefix else {}),
            "network": self.network,
            "script": self.settings.script,
            "settings": dataclasses.asdict(self.settings),
            "digests": dict(self.data.digests),
            "epoch": last.get("epoch", 0),
            "val_ra": last.get(prefix + "val_ra"),
            "val_sa": last.get(prefix + "val_sa"),
        }

    def _restore(self, content: Mapping[str, Any]) -> None:
        path, spec = self.paths.checkpoint, spec_in(content, self.paths.checkpoint) or {}
        resuming.refuse_other_images(content, path, self.data, self.settings.data)
        # older ones do not name their classes
        if {"classes": self.spec["classes"], **full_size(spec)} != full_size(self.spec):
            raise InputError(
                f"{path} was trained on other data: classes, image size or pixel statistics differ"
            )
        self.spec = spec
        try:
            self.history = list(content["history"])
            self.stage = self.stage_of(content)
            load_weights(self.stage.model, network_weights(content, path), path, self.settings.arch)
            refuse_unfit_training_state(self.stage.model, content)
            self.stage.load_state_dict(content)
            self.partial = content.get("partial")
            self.processes = int(content.get("processes", 1))
            self.saved = messages.saved_text(self.history, self.partial, self.stage.steps)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be resumed from ({one_line(error)})") from error

    def config(self) -> Row:
        """Contents of ``config.json``."""
        data = self.data
        images = {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
        return {
            "method": self.settings.method,
            "settings": dataclasses.asdict(self.settings),
            "milestones": self.settings.milestones_in(self.epochs),
            "network": self.network,
            "classes": data.classes,
            "digests": dict(data.digests),
            "images": images,
            "steps_per_epoch": self.stage.steps,
            "compiled": self.stage.execution.compile,
            "made_by": self.made_by,
        }

    @cached_property
    def made_by(self) -> list[Row]:
        """The processes that made this run, one entry a start or resume; the last is this one."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return [
            *made_by(self.paths),
            {"when": now, "processes": self.world.size, **environment(self.device)},
        ]

    def _announce(self) -> None:
        say = self.folder.say
        say(self.headline())
        say(f"writing to {self.paths.root}")
        if self.warning:
            say(f"warning: {self.warning}")
        if self.saved:
            say(f"resuming after {self.saved}")
        elif self.settings.resume:
            closest = resuming.closest_existing_run(self.settings, self.paths)
            say(f"note: nothing to resume there, this run starts anew{closest}")
        if self.processes != self.world.size and not self.settings.sync_bn:
            say(f"note: {messages.processes_text(self.processes, self.world.size)}")
        for caution in (*self.data.notes, *self.cautions()):
            say(f"note: {caution}")

    @property
    def last_good_text(self) -> str:
        # other processes than the first do not know how far it has come
        return messages.last_good_text(self.last_good, self.saved if self.world.is_first else "")

    # ---- report

    def _finish(self) -> None:
        self.draw()
        if self.stage.average is not None:
            self.folder.save(self.paths.average, self.network_content(AVERAGE))
        summary = self.summary()
        self.folder.write_summary(summary)
        self.folder.say(summary_text(summary))
        self.folder.say(f"everything is in {self.paths.root}")

    def summary(self) -> Row:
        settings, (row, prefix), last = self.settings, self._best("val_ra"), self.rows[-1]
        self.folder.settle()
        path = self.paths.best_ra
        stored = self.world.from_first(lambda: load_checkpoint(path))
        if (stored["epoch"], stored["val_ra"]) != (row["epoch"], row[prefix + "val_ra"]):
            self.folder.say(
                f"warning: {path.name} is of an epoch {stored['epoch']} that was lost"
                " and trained again"
            )
        best = self._final_scores(
            "best", network_of(stored, path, spec_in(stored, path) or self.spec, self.device)
        )
        final = self._final_scores("final", self.stage.model)
        average = {}
        if self.stage.average is not None and AVERAGE + "val_ra" in last:
            own = {"epoch": last["epoch"], "val_ra": last[AVERAGE + "val_ra"]}
            scores = self._final_scores("averaged", self.stage.average.model)
            average = {"average": figures(own, scores)}
        return {
            "method": settings.method,
            "run": self.paths.root.name,
            "settings": dataclasses.asdict(settings),
            "best": figures(stored, best, averaged=bool(stored.get("averaged"))),
            "final": figures(last, final),
            **average,
            "diff": best.test_ra - final.test_ra,
            "robust_gap": final.robust_gap,
            "density": last["density"],
            "layer_densities": last["layer_densities"],
            "explored": last["explored"],
            "flops": self.flops(),
            "seconds": sum(row["seconds"] for row in self.history),
            "weights": weight_checksums(self.paths) if self.folder.writes else {},
            "made_by": self.made_by,
        }

    def _final_scores(self, name: str, model: torch.nn.Module) -> FinalScores:
        train, asked = self.data.train, self.settings.gap_subset
        if asked is not None:
            train = train.subset(train.spread(asked))
        images = len(self.data.test) + len(train)
        with EpochDisplay(self.folder, f"{name} model", images) as display:
            return final_scores(
                model,
                self.data,
                self.settings.test_attack,
                seed=self.settings.seed,
                train=train,
                world=self.world,
                on_batch=self._batch_callback(display),
            )

    def flops(self) -> dict[str, dict[str, int]]:
        """Both counts for the last stage."""
        return run_flops(self.stage, self.rows, len(self.data.train))
