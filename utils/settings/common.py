"""Settings common to all training scripts, as a frozen dataclass whose fields are the flags.

Each script extends it. A flag that could not take effect is refused with the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch

from data import DECODED_HERE, SOURCES
from models import CUSTOM_ARCHITECTURES, arch_names, canonical_arch
from utils.attacks import NORMS, PGD, fgsm_rs, n_fgsm
from utils.errors import InputError, require
from utils.execution.hardware import GRAPHS, PRECISIONS, best_precision
from utils.settings.flags import epoch_number, flag, refuse_odd_values
from utils.settings.guess import guess_data_set
from utils.settings.recipes import RECIPES
from utils.settings.rules import Rule, refuse
from utils.training.losses import LOSSES, Options, TrainLoss
from utils.training.schedule import LR_SCHEDULES, ON_COLLAPSE, Plan

# A stage trains on clean images, on those of PGD, or of FGSM-RS with a cyclic learning rate.
STAGE_KINDS = ("sgd", "pgd", "fast")
ONE_STEP = ("n-fgsm", "fgsm-rs")
_MEANINGS = {"density": ": it is the fraction kept"}
_FAST_PEAK = 0.2  # peak learning rate of ``fast``

COMMON_RULES = (
    Rule(
        "beta", lambda s: s.loss.beta is None, "--train_loss {s.train_loss}, whose loss is one term"
    ),
    Rule("recipe", lambda s: s.evaluates, "--eval"),
    Rule(
        "recipe", lambda s: s.resume_dir is not None, "--resume_dir, whose run keeps its settings"
    ),
    Rule("awp_start", lambda s: not s.awp, "no --awp"),
    Rule("", lambda s: s.ema and s.swa, "--ema and --swa are two averages; choose one"),
    Rule(
        "",
        lambda s: s.loss.attack != "ce" and s.train_attack != "pgd",
        "--train_loss {s.train_loss} has no effect with --train_attack {s.train_attack}: its"
        " attack is PGD on a loss of its own",
    ),
    Rule(
        "",
        lambda s: s.loss.attack == "kl" and not s.train_randinit,
        "--train_loss {s.train_loss} with --no-train_randinit would attack nothing: at the image"
        " itself its attack has no gradient",
    ),
    Rule(
        "",
        lambda s: not s.evaluates and s.norm == "l2" and s.train_attack in ONE_STEP,
        "--norm l2 has no effect with --train_attack {s.train_attack}, which steps along the sign",
    ),
    Rule(
        "train_step train_gamma train_randinit",
        lambda s: not s.evaluates and s.train_attack != "pgd" and not s.uses_pgd,
        "--train_attack {s.train_attack}, which has steps of its own",
        True,
    ),
    Rule(
        "decreasing_lr",
        lambda s: s.lr_schedule != "step" and not s.earlier_stage_steps,
        "--lr_schedule {s.lr_schedule}, which has no steps",
        True,
    ),
    Rule(
        "train_eps attack_mode",
        lambda s: not s.evaluates and s.train_attack == "none",
        "--train_attack none",
    ),
    Rule(
        "on_collapse",
        lambda s: not s.evaluates and not s.trains_in_one_step,
        "{s.attack_text}, which is not one step to the edge of the ball",
    ),
    Rule("", lambda s: s.nesterov and not s.momentum, "--nesterov has no effect with --momentum 0"),
    Rule("data", lambda s: s.dataset == "digits", "--dataset digits, which needs no folder", True),
    Rule(
        "image_size",
        lambda s: s.dataset not in DECODED_HERE,
        "--dataset {s.dataset}, which is not decoded from a folder",
    ),
    Rule(
        "cache_dir",
        lambda s: s.dataset not in DECODED_HERE,
        "--dataset {s.dataset}, which is not decoded from a folder",
        True,
    ),
    Rule(
        "depth_factor width_factor",
        lambda s: s.arch != "wideresnet",
        "--arch {s.arch}, only with wideresnet",
        True,
    ),
    Rule("width", lambda s: s.arch == "wideresnet", "--arch wideresnet, which has --width_factor"),
    Rule(
        "width", lambda s: s.arch in CUSTOM_ARCHITECTURES, "--arch {s.arch}, whose size is its own"
    ),
    Rule("gpu", lambda s: s.device == "cpu" and s.gpu is not None, "--device cpu"),
    Rule("cuda_graphs", lambda s: s.device == "cpu", "--device cpu", True),
    Rule(
        "",
        lambda s: s.cuda_graphs == "full" and s.awp,
        "--cuda_graphs full cannot take --awp, whose perturbation is not in the graph",
    ),
    Rule(
        "",
        lambda s: s.resume and s.resume_dir,
        "--resume names the folder by the flags, --resume_dir by its path; choose one",
    ),
    Rule(
        "save_dir",
        lambda s: s.resume_dir is not None,
        "--resume_dir, which names the folder itself",
    ),
    Rule(
        "",
        lambda s: s.sync_bn and s.compile == "on",
        "--compile on cannot take a network whose batch norm communicates, as with --sync_bn",
    ),
    Rule(
        "train_gamma attack_mode",
        lambda s: s.train_step == 0 and not s.evaluates,
        "--train_step 0",
        True,
    ),
    Rule("test_gamma", lambda s: s.test_step == 0, "--test_step 0", True),
)


@dataclass(frozen=True)
class CommonSettings:
    """Settings of every training script, in the flags' units (eps and step sizes in 1/255)."""

    script: ClassVar[str]  # the script whose flags these are
    examples: ClassVar[tuple[str, ...]]  # commands, for ``--help``
    may_grow: ClassVar[frozenset[str]]  # flags that may increase on resuming
    rules: ClassVar[tuple[Rule, ...]] = COMMON_RULES
    evaluates: ClassVar[bool] = False  # whether nothing is trained
    # whether a stage before the last lowers its learning rate at --decreasing_lr
    earlier_stage_steps: ClassVar[bool] = False
    # messages about the command line: flags left aside, values of the recipe
    notes: ClassVar[tuple[str, ...]] = ()

    # data
    dataset: str = flag.data("digits", "data set", choices=SOURCES)
    data: str = flag.data(
        "data", "data folder, into which torchvision downloads", result=False, metavar="DIR"
    )
    image_size: int | None = flag.data(
        None, "side in pixels to which image folders are resized when decoded", metavar="PIXELS"
    )
    train_subset: int | None = flag.data(
        None, "number of training images, stratified by class (default: all)", metavar="IMAGES"
    )
    test_subset: int | None = flag.data(
        None, "number of test images, stratified by class (default: all)", metavar="IMAGES"
    )
    gap_subset: int | None = flag.data(
        None,
        "number of training images that the robust gap is measured on (default: all)",
        metavar="IMAGES",
    )
    cache_dir: str | None = flag.data(
        None, "cache folder for decoded image folders", result=False, metavar="DIR"
    )
    # network
    arch: str = flag.network("resnet18", "architecture", choices=arch_names)
    width: float = flag.network(1.0, "width multiplier of ResNets and VGGs")
    depth_factor: int = flag.network(34, "depth of wideresnet")
    width_factor: int = flag.network(10, "widening of wideresnet")
    # run
    seed: int = flag.training(1, "random seed")
    device: str = flag.hardware(
        "auto",
        "device to train on; auto uses a GPU if there is one",
        choices=("auto", "cpu", "cuda"),
    )
    deterministic: bool = flag.hardware(
        False, "request bit-identical results on a GPU (untested); a CPU always gives them"
    )
    gpu: int | None = flag.hardware(None, "index of the GPU")
    save_dir: str = flag.files("runs", "folder in which the run folder is created", metavar="DIR")
    print_freq: int = flag.files(50, "steps between progress lines", metavar="STEPS")
    resume: bool = flag.files(False, "resume the run with these settings")
    resume_dir: str | None = flag.files(None, "resume this run folder", metavar="DIR")
    save_every: int | None = flag.files(
        None, "steps between checkpoints within an epoch", metavar="STEPS"
    )
    save_minutes: float = flag.files(
        10.0, "minutes between checkpoints within an epoch", metavar="MINUTES"
    )
    time_limit: float | None = flag.files(
        None, "minutes after which the run saves and exits with code 75", metavar="MINUTES"
    )
    tensorboard: bool = flag.files(
        False, "also write TensorBoard events to tensorboard/ in the run folder"
    )
    # training
    batch_size: int = flag.training(128, "images per step", metavar="IMAGES")
    lr: float = flag.training(0.1, "initial learning rate; with onecycle, the peak")
    decreasing_lr: str = flag.training(
        "100,150",
        "epochs, or fractions of the run, at which --lr is divided by 10",
        metavar="EPOCHS",
    )
    momentum: float = flag.training(0.9, "SGD momentum")
    weight_decay: float = flag.training(0.0005, "SGD weight decay")
    nesterov: bool = flag.training(False, "use Nesterov momentum")
    lr_schedule: str = flag.training(
        "step",
        "step decay (--decreasing_lr), half cosine to 0, or one cycle peaking at --lr",
        choices=LR_SCHEDULES,
    )
    sync_bn: bool = flag.training(False, "synchronize batch norm across processes (GPUs only)")
    # remedies against robust overfitting, in the last stage
    recipe: str = flag.remedies(
        "paper",
        "preset for flags not given: the paper's, with remedies, or for short training",
        choices=tuple(RECIPES),
        result=False,
    )
    train_loss: str = flag.remedies("ce", "training loss", choices=lambda: tuple(LOSSES))
    beta: float | None = flag.remedies(
        None, "weight of the robust term of the loss (default: 6 for trades)"
    )
    label_smoothing: float = flag.remedies(0.0, "label smoothing of the training loss")
    awp: float = flag.remedies(
        0.0, "size of the adversarial weight perturbation (usual: .01; for trades .005)"
    )
    awp_start: str = flag.remedies(
        "0", "first epoch with --awp; may be a fraction of the run", metavar="EPOCH"
    )
    ema: float = flag.remedies(0.0, "decay of an exponential average of the weights (usual: .995)")
    swa: str | None = flag.remedies(
        None,
        "first epoch of stochastic weight averaging; may be a fraction of the run",
        metavar="EPOCH",
    )
    on_collapse: str = flag.remedies(
        "stop",
        "on catastrophic overfitting: stop, only warn, or roll back and take smaller steps",
        choices=ON_COLLAPSE,
        result=False,
    )
    # speed
    precision: str = flag.hardware(
        "auto",
        "training precision; auto is bf16 where supported, float32 is TF32 on GPUs",
        choices=("auto", *PRECISIONS),
        result=True,
    )
    compile: str = flag.hardware(
        "auto",
        "torch.compile; auto compiles runs long enough to gain from it",
        choices=("auto", "on", "off"),
    )
    cuda_graphs: str = flag.hardware(
        "auto",
        "CUDA graphs: of each attack (auto), none, or of whole updates (full, untimed)",
        choices=GRAPHS,
    )
    eval_every: int = flag.hardware(
        1,
        "epochs of the last stage between validations; the best model is chosen among them",
        metavar="EPOCHS",
        result=True,
    )
    test_every: int = flag.hardware(1, "epochs of the last stage between tests", metavar="EPOCHS")
    # attacks
    train_attack: str = flag.attack(
        "pgd",
        "training attack of the last stage: PGD, a one-step attack, or clean images",
        choices=("pgd", *ONE_STEP, "none"),
    )
    norm: str = flag.attack("linf", "norm of the attacks", choices=NORMS)
    train_eps: float = flag.attack(8.0, "radius of the training attack, in 1/255")
    train_step: int = flag.attack(10, "steps of the training attack")
    train_gamma: float = flag.attack(2.0, "step size of the training attack, in 1/255")
    train_randinit: bool = flag.attack(True, "random start of the training attack")
    attack_mode: str | None = flag.attack(
        None,
        "mode of the network under the training attack (default: train; eval for trades)",
        choices=("train", "eval"),
    )
    test_eps: float = flag.attack(8.0, "radius of the test attack, in 1/255")
    test_step: int = flag.attack(20, "steps of the test attack")
    test_gamma: float = flag.attack(2.0, "step size of the test attack, in 1/255")
    test_randinit: bool = flag.attack(True, "random start of the test attack")

    @property
    def method(self) -> str:
        """Short name of the method, first in the run's folder name."""
        raise NotImplementedError

    @property
    def pgd(self) -> PGD:
        """The multi-step training attack, before the training loss adapts its loss and start."""
        return PGD(
            self.train_eps / 255,
            self.train_gamma / 255,
            self.train_step,
            self.norm,
            self.train_randinit,
        )

    @property
    def uses_pgd(self) -> bool:
        """Whether any stage trains on adversarial images of ``pgd``."""
        return self.train_attack == "pgd"

    @property
    def loss(self) -> TrainLoss:
        return LOSSES[self.train_loss]

    @property
    def training_attack(self) -> PGD | None:
        """The attack of the last stage's training; None for clean images."""
        if self.train_attack == "pgd":
            return dataclasses.replace(self.pgd, loss=self.loss.attack, start=self.loss.start)
        one_step = {"n-fgsm": n_fgsm, "fgsm-rs": fgsm_rs}.get(self.train_attack)
        return None if one_step is None else one_step(self.train_eps / 255)

    @property
    def trains_in_one_step(self) -> bool:
        """Whether the last stage's attack takes a single step to the edge of the ball, which
        training can overfit to."""
        attack = self.trainings()[-1][0].attack
        return attack is not None and attack.is_one_step

    @property
    def attack_text(self) -> str:
        """The last stage's training in words, for the headline."""
        if self.train_attack == "none":
            return "clean training"
        name = f"PGD-{self.train_step}" if self.train_attack == "pgd" else self.train_attack.upper()
        loss = "" if self.train_loss == "ce" else f"{self.train_loss} "
        return f"{loss}{name} training at {self.train_ball}"

    @property
    def test_attack(self) -> PGD:
        return PGD(
            self.test_eps / 255,
            self.test_gamma / 255,
            self.test_step,
            self.norm,
            self.test_randinit,
        )

    @property
    def train_ball(self) -> str:
        """Norm and radius in training, such as ``linf 8/255``."""
        return f"{self.norm} {self.train_eps:g}/255"

    @property
    def test_ball(self) -> str:
        """Norm and radius in tests, such as ``linf 8/255``."""
        return f"{self.norm} {self.test_eps:g}/255"

    def milestones_in(self, epochs: int) -> tuple[int, ...]:
        """Epochs of a training of ``epochs`` at which the learning rate is divided by ten."""
        return tuple(
            epoch_number(part, epochs, "--decreasing_lr")
            for part in self.decreasing_lr.split(",")
            if part.strip()
        )

    def last_plan(self, epochs: int) -> Plan:
        """The plan of a last stage that trains by ``train_attack``, with its remedies."""
        beta = self.loss.beta if self.beta is None else self.beta
        swa = None if self.swa is None else epoch_number(self.swa, epochs, "--swa")
        return dataclasses.replace(
            self.plan("pgd", epochs, self.seed),
            attack=self.training_attack,
            attack_training=(self.attack_mode or self.loss.attack_mode) == "train",
            schedule=self.lr_schedule,
            loss=self.loss,
            options=Options(beta or 0.0, self.label_smoothing),
            awp=self.awp,
            awp_start=epoch_number(self.awp_start, epochs, "--awp_start"),
            ema=self.ema,
            swa_start=swa,
            guarded=True,
        )

    def plan(self, kind: str, epochs: int, seed: int) -> Plan:
        """The plan of a stage of one of ``STAGE_KINDS``, without remedies."""
        if kind == "fast":
            return Plan(
                epochs,
                fgsm_rs(self.train_eps / 255),
                attack_training=False,
                seed=seed,
                lr=_FAST_PEAK,
                milestones=(),
                schedule="onecycle",
            )
        attack = self.pgd if kind == "pgd" else None
        return Plan(
            epochs,
            attack,
            attack_training=(self.attack_mode or "train") == "train",
            seed=seed,
            lr=self.lr,
            milestones=self.milestones_in(epochs),
        )

    def trainings(self) -> list[tuple[Plan, bool]]:
        """The plans of a run's stages, each with whether RA is measured after its epochs."""
        raise NotImplementedError

    def epochs_done(self, history: Sequence[Mapping[str, Any]]) -> list[float]:
        """Finished epochs of each stage, from a run's lines of metrics."""
        raise NotImplementedError

    # ---- identity

    def with_values(self, **values: Any) -> Self:
        """Replace some values; the notes of the command line are kept."""
        changed = dataclasses.replace(self, **values)
        object.__setattr__(changed, "notes", self.notes)
        return changed

    def on_machine(self, device: torch.device, processes: int) -> list[Self]:
        """The settings as resolved on a machine: first as a new run there has them, then as a run
        started elsewhere may have them."""
        usual = best_precision(device)
        precisions = (
            [usual, *(p for p in PRECISIONS if p != usual)]
            if self.precision == "auto"
            else [self.precision]
        )
        # One process has nothing to synchronize, but it may resume a run of several.
        synchronized = [False, True] if self.sync_bn and processes == 1 else [self.sync_bn]
        return [self.with_values(precision=p, sync_bn=s) for s in synchronized for p in precisions]

    def canonical(self) -> dict[str, Any]:
        """All fields in a canonical form, so that equivalent settings compare equal."""
        usual_mode = self.attack_mode == self.loss.attack_mode
        beta = None if self.beta == self.loss.beta else self.beta
        mode = None if usual_mode else self.attack_mode
        return {**dataclasses.asdict(self), "attack_mode": mode, "beta": beta}

    def identity(self) -> dict[str, Any]:
        """The settings that can change the result and are not at their default."""
        values = self.canonical()
        return {
            f.name: values[f.name]
            for f in dataclasses.fields(self)
            if f.metadata["result"] and values[f.name] != f.default
        }

    def run_name(self, images: str = "") -> str:
        """``<method>_<arch>_<dataset>_<name parts>_s<seed>_<hash>``; ``images`` is the data set's
        digest (``Data.digest``)."""
        text = json.dumps(self.identity() | ({"images": images} if images else {}), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return "_".join(
            [self.method, self.arch, self.dataset, *self.name_parts(), f"s{self.seed}", digest]
        )

    def name_parts(self) -> list[str]:
        """The most important settings, for the run's name."""
        raise NotImplementedError

    # ---- checks and cautions

    @classmethod
    def guessed(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values guessed from the given flags: without ``--dataset``, the data set by the content
        or name of ``--data``; ``InputError`` if neither tells."""
        if "data" not in given or "dataset" in given:
            return {}
        dataset, folder = guess_data_set(given["data"]), Path(given["data"])
        why = (
            "holds no data set that is known by its files, and"
            if folder.is_dir()
            else "is no folder, and"
        )
        require(
            dataset is not None, f"--data {folder} {why} names no data set; name it with --dataset"
        )
        return {"dataset": dataset}

    def check_values(self) -> None:
        """Raise ``InputError`` for values that make no sense in any run."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            require(
                not isinstance(value, float) or abs(value) < _FLOAT32_MAX,
                f"--{f.name} must be finite (in float32), not {value}",
            )
        require(
            self.batch_size >= 2,
            f"--batch_size must be at least 2 (batch norm needs two images), not {self.batch_size}",
        )
        subsets = ["train_subset", "test_subset", "gap_subset"]
        self.check_numbers(
            at_least_one=[
                *subsets,
                "image_size",
                "save_every",
                "print_freq",
                "eval_every",
                "test_every",
            ],
            positive=["lr", "width", "save_minutes", "time_limit"],
            not_negative=[*_NOT_NEGATIVE, "beta"],
            shares=["ema", "label_smoothing", "awp"],
        )
        require(self.save_dir != "", "--save_dir must not be empty")

    def check_numbers(
        self,
        at_least_one: Sequence[str] = (),
        positive: Sequence[str] = (),
        not_negative: Sequence[str] = (),
        fractions: Sequence[str] = (),
        shares: Sequence[str] = (),
    ) -> None:
        """Raise ``InputError`` for fields (by name) outside of their range, which is (0, 1] for
        ``fractions`` and [0, 1) for ``shares``; None is always accepted."""
        ranges: list[tuple[Sequence[str], Callable[[float], bool], str]] = [
            (at_least_one, lambda value: value >= 1, "be at least 1"),
            (positive, lambda value: value > 0, "be positive"),
            (not_negative, lambda value: value >= 0, "be 0 or more"),
            (fractions, lambda value: 0 < value <= 1, "lie in (0, 1]"),
            (shares, lambda value: 0 <= value < 1, "lie in [0, 1)"),
        ]
        for names, fits, must in ranges:
            for name in names:
                value = getattr(self, name)
                what = f"--{name} is {value}, but must {must}"
                require(value is None or fits(value), what + _MEANINGS.get(name, ""))

    def canonical_starts(self, epochs: int) -> dict[str, str | None]:
        """First epochs of the remedies, as text, in a last stage of ``epochs``."""
        plan = self.last_plan(epochs)
        swa = None if plan.swa_start is None else str(plan.swa_start)
        return {"awp_start": str(plan.awp_start), "swa": swa}

    def refuse_late_remedies(self, epochs: int) -> None:
        """Raise ``InputError`` for remedies that start after the end of ``epochs`` epochs."""
        for name, text in (("awp_start", self.awp_start), ("swa", self.swa or "0")):
            start = epoch_number(text, epochs, f"--{name}")
            require(start < epochs, f"--{name} {text} lies past the end of {epochs} epochs")

    def check_milestones(self, epochs: int) -> None:
        """Raise ``InputError`` if the milestones are out of order."""
        milestones = self.milestones_in(epochs)
        require(
            milestones == tuple(sorted(milestones)),
            f"--decreasing_lr {self.decreasing_lr}: epochs must not decrease (of {epochs})",
        )

    def refuse_late_milestones(self, epochs: int) -> None:
        """Raise ``InputError`` if ``--decreasing_lr`` names an epoch that a training of ``epochs``
        does not have."""
        for part in (part.strip() for part in self.decreasing_lr.split(",") if part.strip()):
            epoch = epoch_number(part, epochs, "--decreasing_lr")
            why = (
                f"--decreasing_lr {self.decreasing_lr} lies past the end of {epochs} epochs;"
                " fractions such as 0.5 work too"
            )
            if float(part) < 1:
                why = (
                    f"--decreasing_lr {self.decreasing_lr}: {part} of {epochs} epochs comes to"
                    f" epoch {epoch}, the end; leave it out"
                )
            require(epoch < epochs, why)

    def refuse_wrong_units(self, given: frozenset[str]) -> None:
        """Raise ``InputError`` for given radii and step sizes that seem to be in another unit than
        1/255."""
        for name in [name for name in IN_LEVELS if name in given]:
            value, kind = getattr(self, name), name.split("_")[1]
            small = (
                f"--{name} is in units of 1/255, so {value:g} has next to no effect; give"
                f" {255 * value:.4g} for {value:g} in [0, 1]"
            )
            require(value == 0 or value >= _LEAST_LENGTHS[self.norm, kind], small)
            everything = kind == "eps" and self.norm == "linf" and value > 255
            require(
                not everything,
                f"--{name} is in 1/255 and must lie in [0, 255] with --norm linf, but is"
                f" {value:g}; 8 is usual",
            )

    def attack_cautions(self, part: str, own_steps: bool = False) -> list[str]:
        """Warnings about the ball of ``part`` (``train`` or ``test``), if it seems unintended; with
        ``own_steps`` the attack ignores the flags' step sizes."""
        eps, gamma, steps = (getattr(self, f"{part}_{name}") for name in ("eps", "gamma", "step"))
        radius, step = {"linf": (8, 2), "l2": (128, 15)}[self.norm]
        usual = f"--{part}_eps {radius}" + ("" if own_steps else f" --{part}_gamma {step}")
        if self.norm == "linf" and eps >= _GRAY:
            return [f"--norm linf with --{part}_eps {eps:g} lets every image become gray"]
        if 0 < eps < _WEAK[self.norm]:
            return [
                f"--norm {self.norm} with --{part}_eps {eps:g} has next to no effect; {usual} is"
                " usual"
            ]
        if self.norm == "l2" and 0 < steps * gamma < eps / 2 and not own_steps:
            return [
                f"--norm l2: {steps} steps of --{part}_gamma {gamma:g} do not reach half of"
                f" --{part}_eps {eps:g}; {usual} is usual"
            ]
        return []

    def refuse_idle(self, given: frozenset[str]) -> None:
        """Raise ``InputError`` for flags that were given and could not take effect."""
        refuse(self.rules, self, given)

    def may_differ(self, name: str) -> bool:
        """Whether a flag may contradict the checkpoint's setting of that name."""
        return False

    def must_match_checkpoint(self, name: str) -> bool:
        """Whether a flag can only repeat what the checkpoint says."""
        return False


S = TypeVar("S", bound=CommonSettings)


# ---------------------------------------------------------------- from the command line


def settings_from(kind: type[S], values: Mapping[str, Any]) -> S:
    """Settings with the given fields, checked; ``InputError`` for bad values. Unknown names are
    ignored."""
    refuse_odd_values(kind, values)
    known = {f.name for f in dataclasses.fields(kind)}
    settings = kind(**{name: value for name, value in values.items() if name in known})
    unknown = f"unknown --train_loss {settings.train_loss}; known: {', '.join(LOSSES)}"
    require(
        settings.train_loss in LOSSES, f"{unknown}; a custom loss needs the script that adds it"
    )
    try:
        settings = dataclasses.replace(settings, arch=canonical_arch(settings.arch))
    except ValueError as error:
        raise InputError(str(error)) from error
    settings.check_values()
    return settings


# ---------------------------------------------------------------- limits

_FLOAT32_MAX = 3.4e38
IN_LEVELS = "train_eps train_gamma test_eps test_gamma".split()  # in 1/255
# Smaller lengths, in 1/255, are taken to be in units of [0, 1]: with a radius below half a gray
# level, an image is all but clean.
_LEAST_LENGTHS = {
    ("linf", "eps"): 0.5,
    ("linf", "gamma"): 0.05,
    ("l2", "eps"): 2.0,
    ("l2", "gamma"): 0.3,
}
# radii in 1/255 that no network notices: l2 16 moves each of 32x32x3 values by a third of a level
_WEAK = {"linf": 0.5, "l2": 16.0}
_GRAY = 127.5  # linf radius in 1/255 at which every image can become gray
_NOT_NEGATIVE = (
    "momentum weight_decay train_eps train_step train_gamma test_eps test_step test_gamma".split()
)
