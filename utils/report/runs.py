"""Reads finished runs from their folders and groups those that differ only in the seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from utils.errors import InputError, require
from utils.settings.adversarial import DENSE, AdversarialSettings
from utils.settings.common import CommonSettings, settings_from
from utils.settings.robust_bird import EarlyBirdSettings, TicketSettings
from utils.storage.json_files import misfit, read_object
from utils.storage.paths import RunPaths
from utils.storage.provenance import made_by
from utils.storage.run_folder import read_epochs, read_summary

Row = Mapping[str, Any]

METHOD_NAMES = {
    "dense": "Dense",
    "rb": "Robust Bird",
    "rb-channel": "Robust Bird, channels",
    "fb": "Flying Bird",
    "fbp": "Flying Bird+",
    "fb-channel": "Flying Bird, channels",
    "fbp-channel": "Flying Bird+, channels",
    "static": "Static",
    "static-channel": "Static, channels",
    "oneshot": "One-shot",
    "oneshot-channel": "One-shot, channels",
}
_ORDER = list(METHOD_NAMES)
# Settings in words, where the name followed by the value does not read well.
_WORDS = {
    "data": "images of {}",
    "dataset": "data set {}",
    "arch": "architecture {}",
    "width": "width factor {}",
    "image_size": "images of {} pixels a side",
    "train_subset": "{} training images",
    "gap_subset": "training RA of {} images",
    "test_subset": "{} test images",
    "batch_size": "{} images a step",
    "lr": "learning rate {}",
    "decreasing_lr": "learning rate falls at epochs {}",
    "norm": "{} ball",
    "train_eps": "training radius {}/255",
    "train_step": "PGD-{} training",
    "train_gamma": "training step size {}/255",
    "train_randinit": "random start in training",
    "test_eps": "test radius {}/255",
    "test_step": "PGD-{} tests",
    "test_gamma": "test step size {}/255",
    "test_randinit": "random start in tests",
    "attack_mode": "attacked in {} mode",
    "epochs": "{} epochs",
    "epochs1": "{} epochs of stage 1",
    "epochs2": "{} epochs of stage 2",
    "stage1": "stage 1 {}",
    "stage2": "stage 2 {}",
    "stage1_pretrained": "ticket from {}",
    "precision": "trained in {}",
    "processes": "in {} process(es)",
    "eb_window": "early-bird window {}",
    "eb_tolerance": "early-bird tolerance {}",
    "death_rate": "drop fraction {}",
    "update_frequency": "mask updates every {} steps",
    "dynamic_epoch": "density adapts from epoch {}",
    "eval_every": "validated every {} epochs",
}
# the parts of config.json that are read, as a shape for ``misfit``
_CONFIG = {"settings?": dict, "network?": dict, "images?": dict, "versions?": dict}
_UNSET = {
    "train_subset": "all",
    "gap_subset": "all",
    "test_subset": "all",
    "image_size": "as many",
    "stage1_pretrained": "stage 1",
    "attack_mode": "the usual",
    "beta": "the usual",
    "swa": "none",
}
# the live fraction of the prunable weights at the end of a run, of its summary
density: Callable[[Row], float] = itemgetter("density")
_MOST_TOLD = 3  # settings in a label; if more differ, only the necessary ones are named
# Labels compare these settings over all runs, and others only within a method.
_SCALE = "dataset data arch width depth_factor width_factor image_size train_subset".split()
_ATTACK = ("norm", "train_eps", "train_step", "test_eps", "test_step")


@dataclass(frozen=True)
class Measured:
    """Mean over ``n`` seeds and sample standard deviation ``spread``, None for one seed."""

    mean: float
    spread: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """From one value per seed, at least one."""
        spread = None if len(values) == 1 else math.nan
        if len(values) > 1 and all(map(math.isfinite, values)):
            spread = statistics.stdev(values)
        return cls(statistics.fmean(values), spread, len(values))


@dataclass(frozen=True)
class FinishedRun:
    """A run folder that holds ``summary.json``; its other files are read on demand."""

    paths: RunPaths
    summary: Row

    @classmethod
    def read(cls, root: Path) -> FinishedRun:
        """Read a run folder; raises ``InputError`` if it does not hold a finished run."""
        paths = RunPaths(root)
        summary = read_summary(paths)
        if summary.get("method") not in METHOD_NAMES:
            raise InputError(f"{paths.summary} names an unknown method: {summary.get('method')!r}")
        return cls(paths, summary)

    @property
    def name(self) -> str:
        return str(self.summary["run"])

    @property
    def method(self) -> str:
        return str(self.summary["method"])

    @cached_property
    def settings(self) -> CommonSettings:
        """Raises ``InputError`` if the summary holds none."""
        kinds = {"rb": EarlyBirdSettings, "oneshot": TicketSettings}
        kind: type[CommonSettings] = kinds.get(
            self.method.removesuffix("-channel"), AdversarialSettings
        )
        try:
            return settings_from(kind, self.summary["settings"])
        except (InputError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.paths.summary} does not hold the settings of a run ({error})"
            ) from error

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that determines the result except the seed, with equivalent spellings unified."""
        return self._deciding(self.settings.canonical())

    @cached_property
    def asked(self) -> dict[str, Any]:
        """The same, as spelled by the user."""
        return self._deciding(dataclasses.asdict(self.settings))

    def _deciding(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = {
            f.name: values[f.name]
            for f in dataclasses.fields(self.settings)
            if f.metadata["result"] and f.name != "seed"
        }
        how = {"precision": self.precision, "processes": self.processes}
        return {**found, "data": self.data, **how}

    @cached_property
    def data(self) -> str | None:
        """Digest of the data set's content; in older runs the name of the image folder, or None."""
        if self.digests:
            return hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()
        return Path(self.settings.data).name if self.settings.dataset == "imagefolder" else None

    @property
    def digests(self) -> Row:
        """Digests of the parts of the data set; empty in older runs."""
        return self._found.get("digests") or {}

    def took_data_of(self, evaluation: Row) -> bool:
        """Whether an evaluation is of the run's data set; older ones do not say, and pass."""
        theirs = evaluation.get("digests")
        return not theirs or not self.digests or theirs == self.digests

    @property
    def precision(self) -> str:
        """The precision of the training."""
        if self.settings.precision == "auto":
            return str(self._found.get("precision", "float32"))
        return self.settings.precision

    @property
    def processes(self) -> str:
        """The number of training processes; all numbers, in order, if it changed on resume."""
        numbers = dict.fromkeys(str(entry.get("processes", 1)) for entry in self.made_by)
        return ", ".join(numbers) or "1"

    @cached_property
    def made_by(self) -> list[dict[str, Any]]:
        """One entry for each start or resume of the run, oldest first."""
        return made_by(self.paths)

    @cached_property
    def _found(self) -> Row:
        """``config.json``, empty if it does not exist."""
        return self.config if self.paths.config.exists() else {}

    @cached_property
    def config(self) -> Row:
        """``config.json``; raises ``InputError`` if there is none."""
        config = read_object(self.paths.config)
        if wrong := misfit(config, _CONFIG):
            raise InputError(f"{self.paths.config} does not say how a run was made: {wrong}")
        return config

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``; raises ``InputError`` if they cannot be read or end before
        the run did, as in a copy made while it trained."""
        rows, end = read_epochs(self.paths), self.summary["final"]["epoch"]
        found = rows[-1]["epoch"] if rows else 0
        require(found >= end, f"{self.paths.metrics} ends with epoch {found} of {end}")
        return rows

    @property
    def last_stage(self) -> list[dict[str, Any]]:
        """The rows of the adversarial training; for Robust Bird those of stage 2."""
        return [row for row in self.epochs if row.get("stage", 2) == 2]

    @cached_property
    def evaluations(self) -> list[Row]:
        """The results of ``main_adv.py --eval`` in ``evaluations/``, oldest first; raises
        ``InputError`` if one cannot be read."""
        files = (self.paths.root / "evaluations").glob("*.json")
        found = [(path.stat().st_mtime, path.name, read_object(path)) for path in files]
        # Copied files are all as old as the copy; older evaluations do not say when they were made.
        found.sort(key=lambda entry: (str(entry[2].get("when", "")), *entry[:2]))
        return [evaluation for _, _, evaluation in found]


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed, ordered by seed, and a label that tells them from the
    other groups of a report."""

    label: str
    runs: Sequence[FinishedRun]

    @property
    def first(self) -> FinishedRun:
        return self.runs[0]

    @property
    def method(self) -> str:
        return self.first.method

    @property
    def settings(self) -> CommonSettings:
        """The settings of the first seed."""
        return self.first.settings

    @property
    def seeds(self) -> list[int]:
        return [run.settings.seed for run in self.runs]

    @property
    def density(self) -> float:
        """The requested density; for structured channels the fraction of channels."""
        return 1.0 if self.method == DENSE else self.first.identity["density"]

    def measured(self, figure: Callable[[Row], float]) -> Measured:
        """A figure of the summaries, measured over the seeds."""
        return Measured.of([figure(run.summary) for run in self.runs])


def command_of(run: FinishedRun) -> str:
    """The command that trains such a run: the settings that are not at their defaults, and the path
    of the data."""
    settings = run.settings
    folder = "" if settings.script == "main_adv.py" else "Robust-Bird/"
    words = ["python", folder + settings.script]
    usual = settings.guessed({"structure": getattr(settings, "structure", None)})
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        as_usual = value == usual.get(f.name, f.default)
        if as_usual or not (f.metadata["result"] or f.name in ("data", "on_collapse")):
            continue
        switch = isinstance(value, bool)
        words += [f"--{'no-' if value is False else ''}{f.name}", *([] if switch else [str(value)])]
    return shlex.join(words)


def find_runs(folders: Iterable[Path]) -> tuple[list[FinishedRun], list[str]]:
    """The finished runs in ``folders``, each a run folder or a folder of run folders, ordered by
    method; and notes on what was left out.

    Raises:
        InputError: a run folder given directly is not finished, or a folder has no finished run.
    """
    found: dict[Path, FinishedRun] = {}
    unfinished: list[str] = []
    for folder in folders:
        is_run = RunPaths(folder).holds_a_run() or not folder.is_dir()
        inner = [] if is_run else sorted(folder.iterdir())
        inner = [path for path in inner if RunPaths(path).holds_a_run()]
        finished = [path for path in inner if RunPaths(path).summary.exists()]
        if inner and not finished:
            raise InputError(f"{folder} holds no finished run")
        for root in finished or [folder]:
            found.setdefault(root.resolve(), FinishedRun.read(root))
        unfinished += [path.name for path in inner if path not in finished]
    notes = [f"left out, as they are not finished: {', '.join(unfinished)}"] if unfinished else []
    return sorted(found.values(), key=lambda run: _ORDER.index(run.method)), notes


def grouped(runs: Sequence[FinishedRun]) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first runs, and notes on them. Of several runs with one seed, a
    group takes the first."""
    members: dict[Any, dict[int, FinishedRun]] = {}
    notes = []
    for run in runs:
        seeds = members.setdefault((run.method, *run.identity.items()), {})
        if run.settings.seed in seeds:
            notes.append(
                f"left out, as {seeds[run.settings.seed].paths.root} has its settings and its seed:"
                f" {run.paths.root}"
            )
        seeds.setdefault(run.settings.seed, run)
    by_seed = [[seeds[seed] for seed in sorted(seeds)] for seeds in members.values()]
    labels = _labels([group[0] for group in by_seed])
    groups = [Group(label, group) for label, group in zip(labels, by_seed, strict=True)]
    return groups, [*notes, *filter(None, map(_other_versions, groups))]


def _other_versions(group: Group) -> str:
    """A note on seeds that were trained with different versions of torch, or an empty string."""
    found = {
        str(version)
        for run in group.runs
        for entry in run.made_by
        if (version := entry.get("versions", {}).get("torch"))
    }
    versions = " and ".join(sorted(found))
    return f"{group.label}: trained by torch {versions}" if len(found) > 1 else ""


def lines_by_density(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Groups that differ only in the density, densest first, as one line with a title each; a line
    begins with the dense runs of the same scale and attacks that are the most like it."""
    lines: dict[Any, list[Group]] = {}
    for group in groups:
        if group.method != DENSE:
            rest = tuple(item for item in group.first.identity.items() if item[0] != "density")
            lines.setdefault((group.method, *rest), []).append(group)
    labels = _labels([line[0].first for line in lines.values()], without="density")
    found = []
    for label, line in zip(labels, lines.values(), strict=True):
        dense = [g for g in groups if g.method == DENSE and _same_scale(g, line[0])]
        closest = [max(dense, key=partial(_alike, line[0]))] if dense else []
        by_density = sorted(line, key=lambda group: -group.measured(density).mean)
        found.append((label, closest + by_density))
    return found


def setting_text(name: str, value: object) -> str:
    """A setting in words."""
    words = _WORDS.get(name, name.replace("_", " ") + ("" if isinstance(value, bool) else " {}"))
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return words.format(value_text(name, value))


def value_text(name: str, value: object) -> str:
    """The value of a setting in words, also of one that is not set."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return _UNSET.get(name, "by default")
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _labels(runs: Sequence[FinishedRun], without: str = "") -> list[str]:
    """For each run, its method and the settings that tell it apart: those of ``_SCALE`` from all
    other runs, the rest from runs of the same method."""
    found = []
    for run in runs:
        same = [other for other in runs if other.method == run.method]
        own = [
            name for name in ("density", *run.identity) if name not in _SCALE and name != without
        ]
        names = [name for name in _SCALE if _differs(name, runs)]
        names += [name for name in dict.fromkeys(own) if _differs(name, same)]
        if len(names) > _MOST_TOLD:
            names = _sufficient(names, runs, same)
        told = [
            setting_text(name, _data_name(run, runs) if name == "data" else run.identity[name])
            for name in names
            if name in run.identity
        ]
        found.append(METHOD_NAMES[run.method] + (f" ({', '.join(told)})" if told else ""))
    return found


def _data_name(run: FinishedRun, runs: Sequence[FinishedRun]) -> str:
    """The name of a run's data, with part of the digest if other data have the same name."""

    def named(one: FinishedRun) -> tuple[str, str]:
        return one.settings.dataset, Path(one.settings.data).name

    dataset, folder = named(run)
    name = folder if dataset == "imagefolder" else dataset
    others = {other.data for other in runs if named(other) == named(run)}
    return f"{name} {run.data[:8]}" if run.data and len(others) > 1 else name


def _sufficient(
    names: Sequence[str], runs: Sequence[FinishedRun], same: Sequence[FinishedRun]
) -> list[str]:
    """The ``names`` that tell apart runs which those before them do not: for ``_SCALE`` among all
    ``runs``, else among those of the ``same`` method."""
    kept: list[str] = []
    for name in names:
        among = runs if name in _SCALE else same
        kinds, finer = (
            len({tuple(run.identity.get(n) for n in told) for run in among})
            for told in (kept, [*kept, name])
        )
        kept += [name] if finer > kinds else []
    return kept


def _differs(name: str, runs: Sequence[FinishedRun]) -> bool:
    """Whether a setting tells runs apart. One that only follows from another does not, such as
    milestones given as fractions of the length."""
    asked = [run.asked.get(name) for run in runs]
    means = [run.identity.get(name) for run in runs]
    return any(value != asked[0] for value in asked) and any(value != means[0] for value in means)


def _alike(one: Group, other: Group) -> int:
    """Number of settings in which two groups agree."""
    theirs = other.first.identity
    return sum(theirs.get(name) == value for name, value in one.first.identity.items())


def _same_scale(one: Group, other: Group) -> bool:
    return all(
        one.first.identity.get(name) == other.first.identity.get(name)
        for name in (*_SCALE, *_ATTACK)
    )
