"""Flags and settings are one thing: a frozen dataclass whose fields are the flags of ``main_adv.py``.

The only place that sees argparse. A flag that could not take effect is refused with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, get_type_hints

import torch

from data import DECODED_HERE, SOURCES
from models import ARCHITECTURES, STAGES, canonical_arch
from sparse_core import GROWTHS, SCHEDULES, SPARSE_INITS, MaskingConfig, update_is_due
from utils.attacks import NORMS, PGD
from utils.errors import InputError

DENSE = "dense"  # the method without masks


def flag(default: Any, group: str, text: str, *, choices: Sequence[str] = (), result: bool = True) -> Any:
    """A dataclass field that is also the flag ``--<field>``, spelled with ``_`` or with ``-``.

    Args:
        default: value where the flag is not given.
        group: heading in ``--help``.
        text: help line, with the unit.
        choices: allowed values.
        result: whether it can change the outcome of a run, and so belongs to the run's hash.
    """
    metadata = {"group": group, "help": text, "choices": tuple(choices), "result": result}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Everything ``main_adv.py`` can be told, in the units of its flags (eps and step sizes in 1/255)."""

    # data
    dataset: str = flag("digits", "data", "data set", choices=tuple(SOURCES))
    data: str = flag("data", "data", "folder of the data, or where torchvision downloads it", result=False)
    image_size: int | None = flag(None, "data", "side in pixels to which image folders are resized when decoded")
    train_subset: int | None = flag(None, "data", "train on so many images, stratified by class")
    test_subset: int | None = flag(None, "data", "test on so many images, stratified by class")
    cache_dir: str | None = flag(None, "data", "where decoded image folders are kept", result=False)
    # network
    arch: str = flag("resnet18", "network", "architecture", choices=(*ARCHITECTURES, *(f"{n}_bn" for n in STAGES)))
    width: float = flag(1.0, "network", "factor on all channel counts of ResNets and VGGs")
    depth_factor: int = flag(34, "network", "depth of wideresnet")
    width_factor: int = flag(10, "network", "widening of wideresnet")
    # run
    seed: int = flag(1, "run", "seed of every draw")
    device: str = flag("auto", "run", "auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"), result=False)
    gpu: int | None = flag(None, "run", "number of the GPU", result=False)
    save_dir: str = flag("runs", "run", "folder of run folders", result=False)
    print_freq: int = flag(50, "run", "steps between progress lines", result=False)
    resume: bool = flag(False, "run", "go on with the run folder that these flags name", result=False)
    resume_dir: str | None = flag(None, "run", "go on with this run folder", result=False)
    eval: bool = flag(False, "run", "evaluate --pretrained instead of training", result=False)
    pretrained: str | None = flag(None, "run", "checkpoint for --eval, ours or the paper's", result=False)
    eval_attack: str = flag("pgd", "run", "attack of --eval", choices=("pgd", "cw", "autoattack"), result=False)
    # training
    batch_size: int = flag(128, "training", "images a step")
    lr: float = flag(0.1, "training", "learning rate at the start")
    decreasing_lr: str = flag("100,150", "training", "epochs at which it is divided by 10; fractions of the run too")
    momentum: float = flag(0.9, "training", "of SGD")
    weight_decay: float = flag(5e-4, "training", "of SGD")
    epochs: int = flag(200, "training", "epochs of the run")
    # attacks
    norm: str = flag("linf", "attack", "ball of the attacks", choices=NORMS)
    train_eps: float = flag(8.0, "attack", "radius in training, in 1/255")
    train_step: int = flag(10, "attack", "steps in training")
    train_gamma: float = flag(2.0, "attack", "step size in training, in 1/255")
    train_randinit: bool = flag(True, "attack", "random start in training")
    attack_mode: str = flag("train", "attack", "mode of the network while attacked in training", choices=("train", "eval"))
    test_eps: float = flag(8.0, "attack", "radius in tests, in 1/255")
    test_step: int = flag(20, "attack", "steps in tests")
    test_gamma: float = flag(2.0, "attack", "step size in tests, in 1/255")
    test_randinit: bool = flag(True, "attack", "random start in tests")
    # sparsity
    fb: bool = flag(False, "sparsity", "Flying Bird: prune and regrow at one density")
    fbp: bool = flag(False, "sparsity", "Flying Bird+: the density adapts too")
    fix: bool = flag(False, "sparsity", "static sparsity: the first masks stay")
    density: float = flag(0.2, "sparsity", "kept fraction of convolution and linear weights")
    sparse_init: str = flag("igq", "sparsity", "how the first masks are chosen", choices=SPARSE_INITS)
    growth: str = flag("random", "sparsity", "which dead weights grow", choices=GROWTHS)
    death: str = flag("magnitude", "sparsity", "which live weights are dropped", choices=("magnitude",))
    redistribution: str = flag("none", "sparsity", "of weights between layers", choices=("none",))
    reset: bool = flag(False, "sparsity", "refused: it has no meaning in the paper's method")
    death_rate: float = flag(0.5, "sparsity", "fraction of live weights dropped at the first update")
    decay_schedule: str = flag("cosine", "sparsity", "of the dropped fraction", choices=SCHEDULES)
    update_frequency: int = flag(900, "sparsity", "steps between mask updates")
    dynamic_fre: bool = flag(False, "sparsity", "use --second_frequency in the second half of the run")
    second_frequency: int = flag(1200, "sparsity", "steps between mask updates in the second half")
    dynamic_epoch: str = flag("100", "sparsity", "first epoch at which Flying Bird+ adapts; a fraction of the run too")
    epoch_range: int = flag(4, "sparsity", "epoch-to-epoch differences that Flying Bird+ looks at")
    update_threshold: float = flag(0.5, "sparsity", "fraction of them that makes a verdict")
    prune_ratio: float = flag(0.4, "sparsity", "size of Flying Bird+'s extra prune, of the dropped fraction")
    growth_ratio: float = flag(0.05, "sparsity", "size of its extra growth, of the grown weights")

    @property
    def method(self) -> str:
        """``dense``, ``fb``, ``fbp`` or ``static``."""
        return "fbp" if self.fbp else "static" if self.fix else "fb" if self.fb else DENSE

    @property
    def milestones(self) -> tuple[int, ...]:
        """Epochs at which the learning rate is divided by ten."""
        return tuple(_epoch(part, self.epochs, "--decreasing_lr") for part in self.decreasing_lr.split(",") if part.strip())

    @property
    def first_adaptive_epoch(self) -> int:
        """The epoch from which Flying Bird+ adapts the density."""
        return _epoch(self.dynamic_epoch, self.epochs, "--dynamic_epoch")

    @property
    def train_attack(self) -> PGD:
        return PGD(self.train_eps / 255, self.train_gamma / 255, self.train_step, self.norm, self.train_randinit)

    @property
    def test_attack(self) -> PGD:
        return PGD(self.test_eps / 255, self.test_gamma / 255, self.test_step, self.norm, self.test_randinit)

    def masking(self, steps_per_epoch: int) -> MaskingConfig:
        """The library's settings for a run with so many steps an epoch."""
        return MaskingConfig(
            density=self.density,
            total_steps=self.epochs * steps_per_epoch,
            sparse_init=self.sparse_init,
            fixed=self.fix,
            growth=self.growth,
            drop_fraction=self.death_rate,
            drop_schedule=self.decay_schedule,
            update_frequency=self.update_frequency,
            second_frequency=self.second_frequency if self.dynamic_fre else None,
            adaptive=self.fbp,
            start_epoch=self.first_adaptive_epoch,
            epoch_range=self.epoch_range,
            update_threshold=self.update_threshold,
            prune_ratio=self.prune_ratio,
            growth_ratio=self.growth_ratio,
            seed=self.seed,
        )

    def resolved(self) -> dict[str, Any]:
        """The fields with different spellings of one meaning made alike."""
        values = dataclasses.asdict(self)
        values["decreasing_lr"] = ",".join(str(epoch) for epoch in self.milestones)
        values["dynamic_epoch"] = str(self.first_adaptive_epoch)
        values["fb"] = self.method == "fb"  # --fb --fix is the same run as --fix
        return values

    def identity(self) -> dict[str, Any]:
        """What makes this run's result differ from that of another: the settings that are not at their default."""
        values = self.resolved()
        return {f.name: values[f.name] for f in dataclasses.fields(self) if f.metadata["result"] and values[f.name] != f.default}

    def run_name(self) -> str:
        """``<method>_<arch>_<dataset>_<what matters>_<hash>``."""
        text = json.dumps(self.identity(), sort_keys=True)
        parts = [self.method, self.arch, self.dataset]
        parts += [] if self.method == DENSE else [f"d{self.density:g}"]
        parts += [f"e{self.epochs}", f"s{self.seed}", hashlib.sha256(text.encode()).hexdigest()[:8]]
        return "_".join(parts)


# ---------------------------------------------------------------- from the command line


def pick_device(settings: Settings) -> torch.device:
    """The device asked for; raises ``InputError`` if this machine does not have it."""
    gpus = torch.cuda.device_count()
    if settings.device == "cpu" or (settings.device == "auto" and not gpus and settings.gpu is None):
        return torch.device("cpu")
    if not gpus:
        asked = "--device cuda" if settings.device == "cuda" else f"--gpu {settings.gpu}"
        raise InputError(f"{asked}: torch sees no GPU on this machine; --device cpu trains without one")
    number = settings.gpu or 0
    if not 0 <= number < gpus:
        raise InputError(f"--gpu {number}: torch sees {gpus} GPU(s), numbered from 0")
    return torch.device("cuda", number)


class OneLineParser(argparse.ArgumentParser):
    """argparse with errors on one line and a suggestion for a flag it does not know."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_settings(
    arguments: Sequence[str], description: str, stored_settings: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> Settings:
    """Settings from a command line.

    Args:
        arguments: the command line without the program.
        description: for ``--help``.
        stored_settings: called with the flags given, by field; returns the settings of the checkpoint that they
            point to (``--pretrained``, ``--resume_dir``), or nothing. What was not given is taken from there.

    Raises:
        InputError: unknown flags, bad values, flags that could not take effect or contradict the checkpoint.
    """
    parser = OneLineParser(description=description, allow_abbrev=False)
    known = _add_flags(parser)
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise InputError(f"unknown argument {unknown[0]}{_suggestion(unknown[0], known)}")
    given = vars(namespace)
    # How a run was told to go (device, --resume, ...) is not what it is; only where its data lies is taken over.
    stored = {name: value for name, value in stored_settings(given).items() if name in _STORED}
    settings = settings_from({**stored, **given})
    _refuse_contradictions(given, stored, settings)
    _refuse_without_effect(settings, frozenset(given))
    return settings


def _suggestion(unknown: str, known: Sequence[str]) -> str:
    plain = {name.replace("-", "_"): name for name in known}
    near = difflib.get_close_matches(unknown.split("=")[0].replace("-", "_"), list(plain), n=1)
    return f"; did you mean {plain[near[0]]}?" if near else ""


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Settings with some fields given by name, each checked; raises ``InputError``."""
    known = {f.name for f in dataclasses.fields(Settings)}
    settings = Settings(**{name: value for name, value in values.items() if name in known})
    try:
        settings = dataclasses.replace(settings, arch=canonical_arch(settings.arch))
    except ValueError as error:
        raise InputError(str(error)) from error
    _check_values(settings)
    return settings


def _add_flags(parser: argparse.ArgumentParser) -> list[str]:
    """Add a flag for each field, in its group; returns the spellings for suggestions."""
    hints = get_type_hints(Settings)
    groups: dict[str, Any] = {}
    known = []
    for f in dataclasses.fields(Settings):
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        spellings = _spellings(f.name)
        known += spellings
        text = f.metadata["help"] + ("" if f.default in (None, False) else f" (default {f.default})")
        options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
        if hints[f.name] is bool:
            options["action"] = argparse.BooleanOptionalAction if f.default else "store_true"
        else:
            options["type"] = next(t for t in (int, float, str) if t is hints[f.name] or hints[f.name] == (t | None))
            options["metavar"] = options["type"].__name__.upper()
            if f.metadata["choices"]:
                options["choices"], options["metavar"] = f.metadata["choices"], "|".join(f.metadata["choices"])
        groups[title].add_argument(*spellings, **options)
    return known


def _spellings(name: str) -> list[str]:
    """The flag with underscores and, where that differs, with dashes."""
    return list(dict.fromkeys(["--" + name, "--" + name.replace("_", "-")]))


def _epoch(text: str, epochs: int, name: str) -> int:
    """An epoch, given as its number or as a fraction of the run below one."""
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{name}: {text.strip()!r} is neither an epoch nor a fraction of the run") from None
    if not math.isfinite(value) or value < 0 or (value >= 1 and value != int(value)):
        raise InputError(f"{name}: {text.strip()!r} is neither an epoch nor a fraction of the run")
    return round(value * epochs) if value < 1 else int(value)


# ---------------------------------------------------------------- what is refused

_MOVING_MASK = "growth death redistribution death_rate decay_schedule update_frequency dynamic_fre second_frequency".split()
_ADAPTIVE = "dynamic_epoch epoch_range update_threshold prune_ratio growth_ratio".split()
_ANY_MASK = ["density", "sparse_init", *_MOVING_MASK, *_ADAPTIVE]
_TRAINING_ONLY = "resume resume_dir save_dir print_freq".split()
# What a checkpoint's settings may fill in: what decides the result, and where the data lies.
_STORED = {f.name for f in dataclasses.fields(Settings) if f.metadata["result"]} | {"data", "cache_dir"}
# Settings of a run that describe how a network came about; --eval may repeat them and not change them.
_NETWORK = "dataset arch width depth_factor width_factor".split()
_EVALUATION = "image_size train_subset test_subset seed norm test_eps test_step test_gamma test_randinit".split()
_NOT_NEGATIVE = "momentum weight_decay train_eps train_step train_gamma test_eps test_step test_gamma prune_ratio growth_ratio".split()


def _check_values(s: Settings) -> None:
    """Values that make no sense in any run."""
    for f in dataclasses.fields(s):
        value = getattr(s, f.name)
        _require(not isinstance(value, float) or math.isfinite(value), f"--{f.name} must be finite, not {value}")
    _require(s.batch_size >= 2, f"--batch_size must be at least 2 (batch norm needs two images), not {s.batch_size}")
    for name in ("epochs", "print_freq", "update_frequency", "second_frequency", "epoch_range"):
        _require(getattr(s, name) >= 1, f"--{name} must be at least 1, not {getattr(s, name)}")
    for name in ("image_size", "train_subset", "test_subset"):
        value = getattr(s, name)
        _require(value is None or value >= 1, f"--{name} must be at least 1, not {value}")
    for name in ("lr", "width"):
        _require(getattr(s, name) > 0, f"--{name} must be positive, not {getattr(s, name)}")
    for name in _NOT_NEGATIVE:
        _require(getattr(s, name) >= 0, f"--{name} must not be negative, but is {getattr(s, name)}")
    _require(0 < s.density <= 1, f"--density is the kept fraction and lies in (0, 1], not {s.density:g}")
    _require(0 < s.death_rate <= 1, f"--death-rate lies in (0, 1], not {s.death_rate:g}")
    _require(0 < s.update_threshold <= 1, f"--update_threshold lies in (0, 1], not {s.update_threshold:g}")
    _require(s.save_dir != "", "--save_dir must not be empty")
    _require(s.milestones == tuple(sorted(s.milestones)), f"--decreasing_lr {s.decreasing_lr}: epochs must not fall")
    _require(s.first_adaptive_epoch >= 0, "--dynamic_epoch must not be negative")


def _refuse_contradictions(given: Mapping[str, Any], stored: Mapping[str, Any], s: Settings) -> None:
    """Flags that say of a checkpoint what it is not."""
    for f in dataclasses.fields(s):
        name = f.name
        if name not in given or not f.metadata["result"]:
            continue
        if s.eval and name in _EVALUATION:
            continue
        if name in stored:
            same = s.resolved()[name] == settings_from(stored).resolved()[name]
            _require(same, f"--{name} {given[name]} contradicts the checkpoint, which has {stored[name]}")
        elif s.eval and name not in _NETWORK:
            raise InputError(f"--{name} has no effect with --eval")


def _refuse_without_effect(s: Settings, given: frozenset[str]) -> None:
    """Flags that were given and could not take effect."""
    _require(not s.reset, "--reset has no meaning in the paper's method; leave it out")
    _require(s.fb + s.fbp < 2, "--fb and --fbp are two methods; choose one")
    _require(not (s.fbp and s.fix), "--fbp adapts the masks and --fix keeps them; choose one")
    _only(given, ["data"], s.dataset != "digits", "--dataset digits, which needs no folder; which data set is it?")
    _only(given, ["image_size", "cache_dir"], s.dataset in DECODED_HERE, f"--dataset {s.dataset}, which is not decoded from a folder")
    _only(given, ["depth_factor", "width_factor"], s.arch == "wideresnet", f"--arch {s.arch}, only with wideresnet")
    _only(given, ["width"], s.arch != "wideresnet", "--arch wideresnet, which has --width_factor")
    _require(not (s.device == "cpu" and s.gpu is not None), "--gpu has no effect with --device cpu")
    _require(not (s.resume and s.resume_dir), "--resume names the folder by the flags, --resume_dir by its path; choose one")
    if s.eval:
        _require(s.pretrained is not None, "--eval needs --pretrained FILE")
        _only(given, _TRAINING_ONLY, False, "--eval")
        if s.eval_attack == "autoattack":
            _only(given, ["test_step", "test_gamma", "test_randinit"], False, "--eval_attack autoattack, which has its own steps")
            _only(given, ["train_subset"], False, "--eval_attack autoattack, which looks at test images alone")
        _only(given, ["test_gamma"], s.test_step > 0, "--test_step 0")
        return  # flags of the training were compared with the checkpoint's
    _only(given, ["pretrained", "eval_attack"], False, "training; add --eval")
    _only(given, ["save_dir"], s.resume_dir is None, "--resume_dir, which names the folder itself")
    _only(given, ["train_gamma", "attack_mode"], s.train_step > 0, "--train_step 0")
    _only(given, ["test_gamma"], s.test_step > 0, "--test_step 0")
    masked = s.method != DENSE
    _only(given, _ANY_MASK, masked, "a dense run, which has no masks; see --fb, --fbp and --fix")
    _only(given, _MOVING_MASK, not s.fix, "--fix, whose masks do not move")
    _only(given, _ADAPTIVE, s.fbp, "this method; only --fbp adapts the density")
    _only(given, ["second_frequency"], s.dynamic_fre, "no --dynamic_fre")
    _require(s.growth != "momentum" or s.momentum > 0, "--growth momentum has no effect with --momentum 0")
    if "decreasing_lr" in given:
        _require(all(m < s.epochs for m in s.milestones), f"--decreasing_lr {s.decreasing_lr} lies past the end of {s.epochs} epochs")
    if s.fbp:
        first = s.first_adaptive_epoch
        _require(
            first < s.epochs,
            f"--fbp adapts from --dynamic_epoch {first} on, past the end of {s.epochs} epochs; a fraction such as 0.5 works too",
        )
    if masked and s.density == 1:
        raise InputError(f"--density 1 leaves nothing to prune, so --{s.method if not s.fix else 'fix'} could not take effect")


def refuse_idle_masks(s: Settings, steps_per_epoch: int) -> None:
    """Refuse a run too short for its masks to change; known once the data is."""
    if s.method in ("fb", "fbp"):
        _require(
            bool(_update_steps(s, steps_per_epoch)),
            f"with {_frequencies(s)} no mask update falls into the run of {s.epochs * steps_per_epoch} steps, so the masks would "
            "never change; lower it, or ask for static masks with --fix",
        )


def cautions(s: Settings, steps_per_epoch: int) -> list[str]:
    """What the settings leave idle although nobody asked for it in so many words; a run says so at its start."""
    found = []
    if not any(milestone < s.epochs for milestone in s.milestones):
        found.append(f"the learning rate never falls, --decreasing_lr {s.decreasing_lr} lies past the end")
    if s.fbp:
        # A verdict needs two finished epochs to compare.
        last, first = _update_steps(s, steps_per_epoch)[-1], max(s.first_adaptive_epoch, 2) * steps_per_epoch
        if last <= first:
            found.append(
                f"with {_frequencies(s)} the last mask update is at step {last} and Flying Bird+ adapts after step {first}, "
                "so the density stays as it is"
            )
    return found


def _update_steps(s: Settings, steps_per_epoch: int) -> list[int]:
    config = s.masking(steps_per_epoch)
    return [step for step in range(1, config.total_steps + 1) if update_is_due(config, step)]


def _frequencies(s: Settings) -> str:
    return f"--update_frequency {s.update_frequency}" + (f" and --second_frequency {s.second_frequency}" if s.dynamic_fre else "")


def _only(given: frozenset[str], names: Sequence[str], allowed: bool, where: str) -> None:
    for name in names:
        _require(allowed or name not in given, f"--{name} has no effect with {where}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
