"""``main_adv.py --eval``: evaluates a checkpoint under an attack and saves the answer for each
image, so an interrupted evaluation can resume."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from data import Data
from data.augment import to_float
from models import CUSTOM_ARCHITECTURES
from models.loading import network_of, refuse_other_classes, spec_in
from models.modes import in_mode
from utils.errors import InputError, RunError, Stopped, one_line, require
from utils.evaluation import gradient_masking
from utils.evaluation.sanity import CHECKED_IMAGES, check_answers, check_network
from utils.evaluation.trials import (
    Outcomes,
    Trial,
    autoattack_trials,
    clean_trial,
    pgd_trials,
    run_trials,
)
from utils.execution.distributed import World
from utils.execution.hardware import full_precision
from utils.execution.interruption import Interruption
from utils.settings.adversarial import AdversarialSettings, evaluation_settings
from utils.settings.applied import load_data_for, network_spec
from utils.settings.stored import resumed_settings, settings_in
from utils.storage.checkpoint import checksum, load_checkpoint, save_checkpoint
from utils.storage.files import json_bytes, writable_folder, write_atomically, write_figure
from utils.storage.inputs import read_checkpoint
from utils.storage.provenance import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SECONDS_BETWEEN_SAVES = 30.0


def stored_settings(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings stored in the checkpoint or run that the flags name, empty if there are none."""
    if given.get("eval") and given.get("pretrained"):
        content = read_checkpoint(given["pretrained"])
        return evaluation_settings(content.get("script"), settings_in(content, given["pretrained"]))
    return resumed_settings(AdversarialSettings.script, given)


def network_and_data(
    settings: AdversarialSettings, device: torch.device
) -> tuple[EvaluatedNetwork, Data]:
    """The network in ``--pretrained`` and the data, with the classes in the network's order; raises
    ``InputError`` if the two do not fit, and warns if the classes had to be renumbered."""
    data = load_data_for(settings, device)
    assert settings.pretrained is not None
    evaluated = network_for(settings.pretrained, settings, data, device)
    if evaluated.classes == data.classes:
        return evaluated, data
    warnings.warn(
        f"{settings.pretrained} numbers the classes in another order than the data: they are"
        " matched by name",
        stacklevel=2,
    )
    return evaluated, data.numbered(evaluated.classes)


@dataclass(frozen=True)
class EvaluatedNetwork:
    """A network from a checkpoint, its architecture, its class names in order, and the epoch and
    validation RA stored with it."""

    model: nn.Module
    arch: str
    classes: list[str]
    epoch: float | None
    val_ra: float | None

    @cached_property
    def weights(self) -> str:
        """Checksum of the state dict."""
        return checksum(self.model.state_dict())


def network_for(
    path: str, settings: AdversarialSettings, data: Data, device: torch.device
) -> EvaluatedNetwork:
    """Load the network in a checkpoint; raises ``InputError`` if it does not fit the data."""
    content = read_checkpoint(path)
    spec = spec_in(content, path) or network_spec(settings, data)
    if spec["num_classes"] != len(data.classes):
        raise InputError(
            f"{path} has {spec['num_classes']} classes but the data has {len(data.classes)}"
        )
    if len(spec["mean"]) != data.image_shape[0]:
        raise InputError(
            f"{path} takes {len(spec['mean'])} channels and the images have {data.image_shape[0]}"
        )
    refuse_other_classes(path, spec, data.classes)
    model = network_of(content, path, {**spec, "image_size": min(data.image_shape[1:])}, device)
    classes = spec.get("classes") or data.classes
    # Others' checkpoints may hold anything there.
    epoch, val_ra = (
        value if isinstance(value := content.get(name), (int, float)) else None
        for name in ("epoch", "val_ra")
    )
    return EvaluatedNetwork(model, spec["arch"], classes, epoch, val_ra)


def evaluate_checkpoint(settings: AdversarialSettings, device: torch.device, world: World) -> None:
    """Evaluate ``--pretrained`` under ``--eval_attack``, resuming an interrupted evaluation, and
    print the result."""
    evaluation = world.agree(lambda: Evaluation(settings, device, world), in_turn=True)
    # The processes may have read different answers from disk.
    evaluation.outcomes.load_state_dict(world.from_first(evaluation.outcomes.state_dict))
    evaluation.run()
    if world.is_first:
        evaluation.finish()


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation's ``title``, its trials in order, and the trials whose accuracies are
    reported as test RA and, unless it is None, training RA."""

    title: str
    trials: Sequence[Trial]
    test: Trial
    train: Trial | None = None


class Evaluation:
    """One evaluation of one checkpoint. Writes ``<checkpoint>_<attack>_<hash>.json``, the summary,
    and ``.pth.tar``, the answer for each image."""

    def __init__(self, settings: AdversarialSettings, device: torch.device, world: World) -> None:
        """Load and check everything; raises ``InputError``. Writes nothing, but creates the output
        folder."""
        self.settings, self.device, self.world = settings, device, world
        self.attack = settings.test_attack
        if settings.eval_attack == "cw":
            self.attack = dataclasses.replace(self.attack, loss="margin")
        self.evaluated, self.data = network_and_data(settings, device)
        self.model = self.evaluated.model
        self.source = None if settings.source is None else self._source(settings.source)
        self.networks = [self.evaluated, *([self.source] if self.source else [])]
        self.plan = self._plan()
        train, subset = self.data.train, settings.gap_subset
        if subset is not None and self.plan.train is not None:
            train = train.subset(train.spread(subset))
        self.splits = {"test": self.data.test, "train": train}
        self.warnings = self._check_network()
        self.folder = self._folder()
        self.outcomes = Outcomes(
            {name: split.labels[split.indices].cpu() for name, split in self.splits.items()}
        )
        self.saved_at = time.monotonic()
        self.began_at = ""
        if self.answers.exists():
            self._resume()

    def _source(self, path: str) -> EvaluatedNetwork:
        source = network_for(path, self.settings, self.data, self.device)
        other = (
            f"--source {path} numbers the classes in another order than --pretrained"
            f" {self.settings.pretrained}"
        )
        require(source.classes == self.data.classes, other)
        return source

    # ---- the plan

    def _plan(self) -> EvaluationPlan:
        settings, model, attack = self.settings, self.model, self.attack
        if settings.eval_attack == "autoattack":
            trials = autoattack_trials(
                model, attack, len(self.data.classes), self.device, settings.seed
            )
            return EvaluationPlan("AutoAttack", [clean_trial(), *trials], trials[-1])
        if settings.eval_attack == "masking":
            trials = gradient_masking.trials(model, attack, settings.seed)
            return EvaluationPlan(
                "signs of gradient masking",
                [clean_trial(), *trials],
                next(t for t in trials if t.name == "PGD-20"),
            )
        name = f"{'CW' if attack.loss == 'margin' else 'PGD'}-{attack.steps}"
        source = None if self.source is None else self.source.model
        options: dict[str, Any] = {"restarts": settings.restarts, "name": name, "source": source}
        test = pgd_trials(model, attack, settings.seed, **options)
        train = []
        if self.source is None:
            train = pgd_trials(model, attack, settings.seed, part="train", **options)
        title = name + (f" x {settings.restarts}" if settings.restarts > 1 else "")
        title += "" if attack.random_start else " without random start"
        title += f" crafted on {_short(settings.source)}" if settings.source else ""
        return EvaluationPlan(
            title, [clean_trial(), *test, *train], test[-1], train[-1] if train else None
        )

    def _check_network(self) -> list[str]:
        """Check both networks, and the gradients of the one that the attack ascends."""
        split = self.data.test
        indices = split.spread(CHECKED_IMAGES)
        x, y = to_float(split.rows(indices)), split.labels[indices]
        warnings = []
        for network in self.networks:
            with in_mode(network.model, False), full_precision():
                if network is self.networks[-1]:
                    warnings += check_network(network.model, x, y, self.attack.loss)
                else:
                    check_answers(network.model, x)
        return warnings

    # ---- files

    def _folder(self) -> Path:
        settings = self.settings
        assert settings.pretrained is not None
        beside = Path(settings.pretrained).parent / "evaluations"
        folder = beside if settings.eval_dir is None else Path(settings.eval_dir)
        return writable_folder(folder, "--eval_dir DIR")

    def _path(self, suffix: str) -> Path:
        stem = Path(self.settings.pretrained or "").name.split(".")[0]
        attack = re.sub(r"[^a-z0-9]+", "-", self.plan.title.lower()).strip("-")[:40]
        return self.folder / f"{stem}_{attack}_{self.key[:8]}{suffix}"

    @property
    def answers(self) -> Path:
        """The file with the answer for each image."""
        return self._path(".pth.tar")

    @cached_property
    def key(self) -> str:
        """Digest of everything that determines the answers: networks, attack, seed, images."""
        settings = self.settings
        source = None if self.source is None else self.source.weights
        parts: list[Any] = [self.evaluated.weights, source, dataclasses.asdict(self.attack)]
        parts += [settings.eval_attack, settings.restarts, settings.seed]
        rows = [(split.indices, split.labels[split.indices]) for split in self.splits.values()]
        parts += [checksum({"indices": indices, "labels": y}) for indices, y in rows]
        parts.append(self.data.digest)
        parts += [(trial.name, trial.batch) for trial in self.plan.trials]
        # Equal weights do not make equal networks.
        archs = [network.arch for network in self.networks]
        parts += archs if CUSTOM_ARCHITECTURES.keys() & archs else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _resume(self) -> None:
        content = load_checkpoint(self.answers)
        if content.get("key") != self.key:
            raise InputError(
                f"{self.answers} belongs to another evaluation; move it away, or use"
                " another --eval_dir"
            )
        self.outcomes.load_state_dict(content["outcomes"])
        done = sum(self.outcomes.batches_done(trial) > 0 for trial in self.plan.trials)
        self.began_at = (
            f"resuming from {self.answers} ({done} of {len(self.plan.trials)} trials begun or done)"
        )

    def save(self) -> None:
        """Save the answers found so far."""
        self.saved_at = time.monotonic()
        if not self.world.is_first:
            return
        used = {trial.part: None for trial in self.plan.trials}
        parts = {
            "indices": {name: self.splits[name].indices.cpu() for name in used},
            "labels": {name: self.outcomes.labels[name] for name in used},
        }
        try:
            save_checkpoint(
                self.answers, {"key": self.key, "outcomes": self.outcomes.state_dict(), **parts}
            )
        except OSError as error:
            raise RunError(f"cannot write {self.answers} ({error.strerror or error})") from error

    # ---- work

    def run(self) -> None:
        """Run all trials; on a signal or at ``--time_limit``, save and raise ``Stopped``."""
        if self.world.is_first:
            own_steps = self.settings.eval_attack == "autoattack"
            cautions = self.settings.attack_cautions("test", own_steps)
            for note in (*self.data.notes, *self.settings.notes, *cautions):
                print(f"note: {one_line(note)}", flush=True)
            for warning in self.warnings:
                print(f"warning: {warning}", flush=True)
            if self.began_at:
                print(self.began_at, flush=True)
        shown = _Progress(self.plan.trials, self.outcomes, quiet=not self.world.is_first)
        with (
            Interruption(self.settings.time_limit) as interruption,
            contextlib.closing(shown) as progress,
        ):

            def on_round(trial: Trial, images: int) -> None:
                progress.advance(trial)
                stopped = interruption.asked()
                code = self.world.highest(stopped.code if stopped else 0)
                if code or time.monotonic() - self.saved_at > _SECONDS_BETWEEN_SAVES:
                    self.save()
                if code:
                    why = f"{stopped}; the same command resumes from {self.answers}"
                    raise Stopped(why if stopped and self.world.is_first else "", code)

            given = (self.model, self.splits, self.plan.trials, self.outcomes)
            run_trials(*given, world=self.world, on_round=on_round)
            self.save()

    def finish(self) -> dict[str, Any]:
        """Write the summary, print the result and return it."""
        result = self.result()
        picture: Figure | None = None
        lines = [self._headline(result)]
        if self.settings.eval_attack == "masking":
            signs = gradient_masking.signs(
                self.model, self.data.test, self.attack, self.settings.seed, result["trials"]
            )
            lines += gradient_masking.text(signs)
            result["signs"] = [dataclasses.asdict(sign) for sign in signs.found]
            result["surface"] = signs.surface
            picture = gradient_masking.figure(self.attack, result["trials"], signs)
        elif self.settings.eval_attack == "autoattack":
            lines.append(
                "after "
                + ", ".join(f"{t.name} {result['trials'][t.name]:.2f}" for t in self.plan.trials)
            )
        summary = self._path(".json")
        try:
            write_atomically(summary, json_bytes(result))
            if picture is not None:
                write_figure(self._path(".png"), picture)
                lines.append(f"picture: {self._path('.png')}")
        except OSError as error:
            file = error.filename or summary
            raise RunError(f"cannot write {file} ({error.strerror or error})") from error
        print("\n".join([*lines, f"by image: {self.answers}"]))
        return result

    def result(self) -> dict[str, Any]:
        """The summary; accuracies in percent, radius and step size in 1/255."""
        accuracies = {trial.name: self.outcomes.accuracy(trial) for trial in self.plan.trials}
        ra = accuracies[self.plan.test.name]
        train_ra = None if self.plan.train is None else accuracies[self.plan.train.name]
        attack, settings, network = self.attack, self.settings, self.evaluated
        kind = "transfer" if self.source is not None else settings.eval_attack
        told = {"weights": network.weights, "epoch": network.epoch, "val_ra": network.val_ra}
        parts = dict.fromkeys(trial.part for trial in self.plan.trials)
        return {
            "checkpoint": Path(settings.pretrained or "").name,
            "network": told,
            "attack": kind,
            "title": self.plan.title,
            "norm": attack.norm,
            "eps": attack.eps * 255,
            # AutoAttack chooses its own steps. The check for gradient masking runs many attacks and
            # reports the RA of PGD-20.
            "step_size": None if kind == "autoattack" else attack.step_size * 255,
            "steps": {"autoattack": None, "masking": 20}.get(kind, attack.steps),
            "restarts": None if kind == "autoattack" else settings.restarts,
            "source": settings.source,
            "source_weights": self.source.weights if self.source else None,
            "seed": settings.seed,
            "digests": dict(self.data.digests),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "images": {part: len(self.splits[part]) for part in parts},
            "test_sa": accuracies["clean"],
            "test_ra": ra,
            "train_ra": train_ra,
            "robust_gap": None if train_ra is None else train_ra - ra,
            "trials": accuracies,
            "warnings": self.warnings,
            **environment(self.device),
        }

    def _headline(self, result: Mapping[str, Any]) -> str:
        masking = self.settings.eval_attack == "masking"
        attack = f"{'PGD-20' if masking else result['title']}, {self.settings.test_ball}"
        robust = f"test RA ({attack}) {result['test_ra']:.2f}"
        standard = f"test SA {result['test_sa']:.2f}"
        if result["train_ra"] is not None:
            gap = f"robust generalization gap {result['robust_gap']:.2f}"
            return f"{robust}  {standard}  training RA {result['train_ra']:.2f}  {gap}"
        if masking:
            return f"{robust}  {standard}  on {result['images']['test']} images"
        return f"{standard}  {robust}  on {result['images']['test']} images"


class _Progress:
    """On a terminal, a progress bar with the running estimate for each trial; elsewhere, a line for
    each finished trial."""

    def __init__(self, trials: Sequence[Trial], outcomes: Outcomes, quiet: bool) -> None:
        self._trials, self._outcomes = trials, outcomes
        self._quiet = quiet
        self._trial: Trial | None = None
        self._bar: Any = None

    def advance(self, trial: Trial) -> None:
        """Show how far a trial has come."""
        if trial is not self._trial:
            self.close()
            self._trial = trial
            self._rows = self._outcomes.rows(trial, self._trials)
            options: dict[str, Any] = {"unit": "img", "leave": False, "desc": trial.name}
            options["disable"] = True if self._quiet else None
            self._bar = tqdm(total=len(self._rows), **options)
        shown = int((self._outcomes.predicted(trial)[self._rows] != Outcomes.NOT_SHOWN).sum())
        self._bar.update(shown - self._bar.n)
        estimate, done = self._outcomes.estimate(trial, self._rows), shown == len(self._rows)
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{'at most ' if trial.spares else ''}{estimate:.2f} %")
        elif done and not self._quiet:
            print(
                f"{trial.name}: {self._outcomes.accuracy(trial):.2f} % of"
                f" {len(self._outcomes.labels[trial.part])} images",
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _short(path: str) -> str:
    """A checkpoint's folder and name, for a title."""
    folder, name = Path(path).resolve().parts[-2:]
    return f"{folder}/{name.split('.')[0]}"
