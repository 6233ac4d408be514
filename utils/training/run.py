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

from models import CUSTOM_ARCHITECTURES, flops
from models.loading import network_of, spec_in
from utils.errors import InputError, RunError, Stopped, one_line
from utils.evaluation.scores import epoch_scores, final_scores
from utils.execution.distributed import ALONE, World, lost_another
from utils.execution.forward import Execution
from utils.execution.interruption import TIME_LIMIT_CODE, Interruption
from utils.settings.applied import load_data_for, network_spec, placed
from utils.settings.common import CommonSettings, settings_from
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
from utils.storage.json_files import read_object
from utils.storage.packing import compact
from utils.storage.paths import RunPaths
from utils.storage.provenance import environment, made_by
from utils.storage.run_folder import RunFolder, SilentRunFolder, read_summary, refuse_locked
from utils.training.display import EpochDisplay
from utils.training.engine import EpochResult, Progress, Tally
from utils.training.forecast import Forecast, duration, images_of, seconds_left
from utils.training.rehearsal import refusing, rehearse_checkpoint
from utils.training.stage import Row, Stage
from utils.training.summary import summary_text

# a picture costs a quarter of a second, which short epochs would feel
_SECONDS_BETWEEN_PICTURES = 15.0


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
        settings, self.paths = placed(settings, self.data, device, world.size)
        self.settings = settings
        self.device = device
        self.world = world
        resuming = settings.resume or settings.resume_dir is not None
        refuse_locked(self.paths)  # what is said of its files would be of a moment
        if self.paths.holds_a_run() and not resuming:
            raise InputError(
                f"{self.paths.root} already holds a run with these settings; --resume goes on with"
                " it, another --save_dir starts elsewhere"
            )
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
        self.execution = Execution(
            settings.precision,
            {"auto": None, "on": True, "off": False}[settings.compile],
            world=world,
        )
        self.processes = world.size  # of the checkpoint, if there is one
        if resuming and (self.paths.checkpoint.exists() or self.paths.previous.exists()):
            content, self.last_good, self.warning = load_newest(
                self.paths.checkpoint, self.paths.previous
            )
            self._refuse_grown(settings_in(content, self.last_good))
            self._restore(content)
            return
        if self.paths.metrics.exists() and self.paths.metrics.read_text().strip():
            raise InputError(
                f"{self.paths.root} has epochs and no checkpoint; nothing is left to go on from,"
                " another --save_dir starts anew"
            )
        if settings.resume:
            self._refuse_changed_images()
        with refusing(settings.arch):
            self.stage = self.first_stage()
            if settings.arch in CUSTOM_ARCHITECTURES:
                self.stage.figures()
                rehearse_checkpoint(
                    self.stage.model,
                    self.stage.state_dict(),
                    self.spec,
                    self.data,
                    device,
                    settings.seed,
                )

    def _refuse_changed_images(self) -> None:
        """A run beside this one that has all of its settings and read other images at the same
        place was meant."""
        mine = self.settings
        for root, config, differs in self._beside():
            if not differs and (config.get("method"), config["settings"].get("data")) == (
                mine.method,
                mine.data,
            ):
                self._refuse_other_images(config, root)

    def _refuse_other_images(self, content: Mapping[str, Any], path: Path) -> None:
        """``content``: of a checkpoint or a ``config.json``; older ones do not say which data they
        were of."""
        theirs = content.get("digests")
        theirs = theirs if isinstance(theirs, Mapping) else {}
        changed = [
            part for part, digest in self.data.digests.items() if theirs.get(part, digest) != digest
        ]
        if changed:
            raise InputError(
                f"{path} was trained on other data than {self.settings.data} holds now: its"
                f" {', '.join(changed)} differ"
            )

    def _refuse_grown(self, stored: Mapping[str, Any]) -> None:
        """A run that was given more epochs keeps the folder that is named by fewer: those flags are
        of another run by now."""
        if self.settings.resume_dir is not None:
            return
        for name in self.settings.may_grow:
            if stored.get(name) != getattr(self.settings, name):
                raise InputError(
                    f"the run in {self.paths.root} has grown to --{name} {stored.get(name)};"
                    " --resume_dir goes on with it"
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
            self.folder.say(f"{stopped}; {self._last_good()}; --resume goes on from there")
            raise
        except (RunError, InputError) as error:
            # an input that fails now, after training began, is a failed run
            raise RunError(f"{world.name}{self.where()}{error}; {self._last_good()}") from error
        except torch.OutOfMemoryError as error:
            out = f"{world.name}out of memory on {self.device}, a smaller --batch_size needs less"
            raise RunError(f"{out}; {self._last_good()}") from error
        except RuntimeError as error:
            if world.size == 1 or not lost_another(error):
                raise
            raise RunError(
                f"{world.name}another process of this run has ended; {self._last_good()}"
            ) from error
        except KeyboardInterrupt:
            self.folder.say(f"interrupted; {self._last_good()}; --resume goes on from there")
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
        stage = self.stage
        trained, start = self.train_epoch(epoch, title), time.perf_counter()
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
        """The last epoch's figures in a line, as far as it has them."""
        row = self.history[-1]
        figures = [f"{title}  lr {row['lr']:g}  loss {row['train_loss']:.3f}"]
        for part in ("train", "val", "test"):
            measured = [
                f"{kind.upper()} {row[f'{part}_{kind}']:.2f}"
                for kind in ("ra", "sa")
                if f"{part}_{kind}" in row
            ]
            figures += [f"{part} {' '.join(measured)}"] if measured else []
        figures += [
            f"density {row['density']:.4f}",
            f"{row['images_per_second']:.0f} img/s",
            f"{row['seconds']:.1f} s",
        ]
        self.folder.say("  ".join(figures))

    def train_epoch(self, epoch: int, title: str) -> EpochResult:
        """The steps of an epoch that are left; the checkpoint says how many were done."""
        self.epoch, self.tally = epoch, Tally(self.stage.steps)
        tally = self.tally
        if self.partial is not None:
            tally.load_state_dict(self.partial, self.device)
            self.partial = None
        print_freq = self.settings.print_freq

        def after_step(tally: Tally) -> None:
            self.has_advanced = True
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

            return self.stage.train_epoch(
                epoch, tally, print_freq=print_freq, on_progress=on_progress, after_step=after_step
            )

    def _forecast(self, tally: Tally) -> None:
        """Say once, after a few steps, how long the run is likely to take."""
        pace = self.forecast.look(tally.images, tally.seconds, tally.step == self.stage.steps)
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
        """Validation and test (``parts``), clean and attacked."""
        images = {"val": len(self.data.val), "test": len(self.data.test)}
        with EpochDisplay(
            self.folder, f"{title} test", sum(images[part] for part in parts)
        ) as display:
            on_batch = self._batch_callback(display)
            attack, seed = self.settings.test_attack, self.settings.seed
            forward = self.stage.forward
            return epoch_scores(
                self.stage.model,
                self.data,
                attack,
                seed=seed,
                parts=parts,
                forward=forward,
                on_batch=on_batch,
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
            raise error if self.folder.writes else Stopped("", 3)

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
        saved = self._saved_where(partial)

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

    def _saved_where(self, partial: Mapping[str, Any] | None) -> str:
        """How far a checkpoint written now has come."""
        done = 0 if partial is None else len(partial["weights"])
        steps = f"step {done} of {self.stage.steps}" if done < self.stage.steps else "all steps"
        if not self.history:
            return f"{steps} of epoch 1"
        last, step = self.history[-1], f", and {steps} of the next" if done else ""
        stage = f"stage {last['stage']}, " if "stage" in last else ""
        return f"{stage}epoch {last['epoch']}{step}"

    def _save_best(self) -> None:
        """Keep the network if the last epoch is the best so far, by validation alone."""
        for key, path in (("val_ra", self.paths.best_ra), ("val_sa", self.paths.best_sa)):
            if key in self.history[-1] and self._best_row(key) is self.history[-1]:
                self.folder.save(path, self.network_content())

    def _best_row(self, key: str) -> Row:
        # the first of equals
        return max((row for row in self.rows if key in row), key=lambda row: row[key])

    def draw(self) -> None:
        if not self.folder.writes:
            return
        # matplotlib takes longer to import than --help and refusals may take
        from utils.training.curves import training_curves

        self.folder.write_picture(
            self.paths.curves, training_curves(self.history, self.paths.root.name)
        )
        self.drawn_at = time.monotonic()

    def network_content(self) -> dict[str, Any]:
        """The network as it is, and which it is: what every checkpoint of this run holds."""
        last = self.history[-1] if self.history else {}
        return {
            "state_dict": self.stage.model.state_dict(),
            "network": self.spec,
            "script": self.settings.script,
            "settings": dataclasses.asdict(self.settings),
            "digests": dict(self.data.digests),
            "epoch": last.get("epoch", 0),
            "val_ra": last.get("val_ra"),
            "val_sa": last.get("val_sa"),
        }

    def _restore(self, content: Mapping[str, Any]) -> None:
        path, spec = self.paths.checkpoint, spec_in(content, self.paths.checkpoint) or {}
        self._refuse_other_images(content, path)
        # older ones do not name their classes
        if {"classes": self.spec["classes"], **spec, "kept": None} != {**self.spec, "kept": None}:
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
            self.saved = self._saved_where(self.partial)
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
            "network": self.spec,
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
        self.folder.say(self.headline())
        self.folder.say(f"writing to {self.paths.root}")
        if self.warning:
            self.folder.say(f"warning: {self.warning}")
        if self.saved:
            self.folder.say(f"going on after {self.saved}")
        elif self.settings.resume:
            self.folder.say(
                f"note: nothing to resume there, this run starts anew{self._closest_existing_run()}"
            )
        if self.processes != self.world.size and not self.settings.sync_bn:
            changed = (
                f"the checkpoint was written by {self.processes} process(es) and {self.world.size}"
                " go(es) on"
            )
            self.folder.say(f"note: {changed}: from here on batch norm sees other parts of a batch")
        for caution in (*self.data.notes, *self.cautions()):
            self.folder.say(f"note: {caution}")

    def _closest_existing_run(self) -> str:
        """The run beside this one that differs from it in one or two settings, which may be the one
        that was meant."""
        found = [
            (len(differs), root, ", ".join(differs) or "these settings and other data")
            for root, _, differs in self._beside()
        ]
        found = [near for near in found if near[0] <= 2 and "--seed" not in near[2]]
        return one_line(f"; {min(found)[1]} has {min(found)[2]}") if found else ""

    def _beside(self) -> Iterator[tuple[Path, Row, list[str]]]:
        """Other runs beside this one: folder, ``config.json`` and the flags in which they differ
        from it."""
        mine, results = (
            self.settings.canonical(),
            [f for f in dataclasses.fields(self.settings) if f.metadata["result"]],
        )
        for path in self.paths.root.parent.glob("*/" + self.paths.config.name):
            if path.parent == self.paths.root:
                continue
            try:
                config = read_object(path)
                theirs = settings_from(type(self.settings), settings_in(config, path)).canonical()
            except InputError:  # whatever else lies there
                continue
            yield (
                path.parent,
                config,
                [f"--{f.name} {theirs[f.name]}" for f in results if theirs[f.name] != mine[f.name]],
            )

    def where_and_what(self) -> str:
        """Network, data and tests, for the headline."""
        s, data = self.settings, self.data
        images = f"{len(data.train)} / {len(data.val)} / {len(data.test)} images"
        return f"{s.arch} on {s.dataset} ({images}), PGD-{s.test_step} tests at {s.test_ball}"

    def on_what(self) -> str:
        """Device, precision and processes, for the headline."""
        device = (
            f"{self.device.type} in {self.world.size} processes"
            if self.world.size > 1
            else str(self.device)
        )
        return f"in {self.execution.precision} on {device}"

    def _last_good(self) -> str:
        if not self.last_good.exists():
            return "no epoch was finished, so there is no checkpoint yet"
        # the others do not know how far the first has come
        where = f" ({self.saved})" if self.world.is_first else ""
        return f"the last good checkpoint is {self.last_good}{where}"

    # ---- report

    def _finish(self) -> None:
        self.draw()
        summary = self.summary()
        self.folder.write_summary(summary)
        self.folder.say(summary_text(summary))
        self.folder.say(f"everything is in {self.paths.root}")

    def summary(self) -> Row:
        settings, last = self.settings, self.rows[-1]
        self.folder.settle()
        stored = self.world.from_first(lambda: load_checkpoint(self.paths.best_ra))
        row = self._best_row("val_ra")
        if (stored["epoch"], stored["val_ra"]) != (row["epoch"], row["val_ra"]):
            self.folder.say(
                f"warning: {self.paths.best_ra.name} is of an epoch {stored['epoch']} that was lost"
                " and trained again"
            )
        best = network_of(stored, self.paths.best_ra, self.spec, self.device)
        scores = {}
        for name, model in (("best", best), ("final", self.stage.model)):
            with EpochDisplay(
                self.folder, f"{name} model", len(self.data.test) + len(self.data.train)
            ) as display:
                scores[name] = final_scores(
                    model,
                    self.data,
                    settings.test_attack,
                    seed=settings.seed,
                    world=self.world,
                    on_batch=self._batch_callback(display),
                )
        return {
            "method": settings.method,
            "run": self.paths.root.name,
            "settings": dataclasses.asdict(settings),
            "best": {
                "epoch": stored["epoch"],
                "val_ra": stored["val_ra"],
                **dataclasses.asdict(scores["best"]),
            },
            "final": {
                "epoch": last["epoch"],
                "val_ra": last["val_ra"],
                **dataclasses.asdict(scores["final"]),
            },
            "diff": scores["best"].test_ra - scores["final"].test_ra,
            "robust_gap": scores["final"].robust_gap,
            "density": last["density"],
            "layer_densities": last["layer_densities"],
            "explored": last["explored"],
            "flops": self.flops(),
            "seconds": sum(row["seconds"] for row in self.history),
            "weights": self._weights(),
            "made_by": self.made_by,
        }

    def _weights(self) -> dict[str, str]:
        """A checksum of each network that an evaluation may be of, by its file."""
        found = {}
        for path in (
            (self.paths.best_ra, self.paths.best_sa, self.paths.checkpoint)
            if self.folder.writes
            else ()
        ):
            network = network_of(load_checkpoint(path), path, self.spec, torch.device("cpu"))
            found[path.name] = checksum(network.state_dict())
        return found

    def flops(self) -> dict[str, dict[str, int]]:
        """Both counts for the last stage."""
        images, steps, by_epoch = (
            len(self.data.train),
            self.stage.plan.attack_steps,
            [row["inference_flops"] for row in self.rows],
        )
        paper = flops.paper_inference(self.stage.costs, self.stage.live_counts())
        return {
            "real": {
                "inference": by_epoch[-1],
                "training": flops.real_training(by_epoch, images, steps),
            },
            "paper": {
                "inference": paper,
                "training": flops.paper_training(paper, images, steps, self.epochs),
            },
        }
