"""Settings of ``main_adv.py``: dense, Flying Bird, Flying Bird+ and static-mask training, and
evaluation of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sparse_core import GROWTHS, SCHEDULES, SPARSE_INITS, MaskingConfig, update_is_due
from utils.errors import require
from utils.settings.common import COMMON_RULES, CommonSettings
from utils.settings.flags import epoch_number, flag
from utils.settings.rules import Rule
from utils.training.channel_masking import CHANNEL_GROWTHS, CHANNEL_SCORES
from utils.training.schedule import Plan

DENSE = "dense"  # the method without masks

_MOVING_MASK = (
    "growth death redistribution death_rate decay_schedule update_frequency dynamic_fre"
    " second_frequency"
)
_CHANNELS = "flops channel_multiple channel_score"
_ADAPTIVE = "dynamic_epoch epoch_range update_threshold prune_ratio growth_ratio"
EVAL_ATTACKS = ("pgd", "cw", "autoattack", "masking")
# With --eval, flags of the network must match a checkpoint that has settings, and flags of the
# evaluation may differ from it. All others can only repeat it.
_NETWORK = "dataset arch width depth_factor width_factor".split()
_EVALUATION = "image_size train_subset test_subset gap_subset seed norm".split()
_EVALUATION += "test_eps test_step test_gamma test_randinit".split()


_METHOD_RULES = (
    Rule("", lambda s: s.reset, "--reset has no meaning in the paper's method; leave it out"),
    Rule(
        "",
        lambda s: s.cuda_graphs == "full" and s.structure == "channel",
        "--cuda_graphs full cannot take --structure channel, whose scores are not in the graph",
    ),
    Rule("", lambda s: s.fb and s.fbp, "--fb and --fbp are two methods; choose one"),
    Rule("", lambda s: s.fbp and s.fix, "--fbp adapts the masks and --fix keeps them; choose one"),
)
_EVALUATION_RULES = (
    Rule("", lambda s: s.pretrained is None, "--eval needs --pretrained FILE"),
    Rule("resume resume_dir save_dir precision", lambda s: True, "--eval"),
    Rule(
        "print_freq save_every save_minutes compile cuda_graphs eval_every test_every tensorboard",
        lambda s: True,
        "--eval",
        True,
    ),
    Rule(
        "",
        lambda s: s.restarts > 1 and not s.test_randinit,
        "--restarts has no effect with --no-test_randinit: all starts are the same",
    ),
    Rule(
        "restarts source",
        lambda s: s.eval_attack in ("autoattack", "masking"),
        "--eval_attack {s.eval_attack}, which has attacks of its own",
    ),
    Rule(
        "train_subset gap_subset",
        lambda s: s.eval_attack in ("autoattack", "masking"),
        "--eval_attack {s.eval_attack}, which uses test images alone",
    ),
    Rule(
        "train_subset gap_subset",
        lambda s: s.source is not None,
        "--source, which uses test images alone",
    ),
    Rule(
        "test_step test_gamma test_randinit",
        lambda s: s.eval_attack == "autoattack",
        "--eval_attack autoattack, which has its own steps",
    ),
    Rule(
        "test_step",
        lambda s: s.eval_attack == "masking",
        "--eval_attack masking, which tries several",
    ),
    Rule(
        "",
        lambda s: s.eval_attack in ("autoattack", "masking") and s.test_eps == 0,
        "--eval_attack {s.eval_attack} needs a ball to search: --test_eps is 0",
    ),
    Rule(
        "",
        lambda s: s.eval_attack == "masking" and s.test_gamma == 0,
        "--eval_attack masking needs steps: --test_gamma is 0",
    ),
)
_TRAINING_RULES = (
    Rule("pretrained eval_attack restarts source eval_dir", lambda s: True, "training; add --eval"),
    Rule(
        "density",
        lambda s: s.method == DENSE,
        "a dense run, which has no masks; see --fb, --fbp and --fix",
        True,
    ),
    Rule(
        f"sparse_init structure {_CHANNELS} {_MOVING_MASK} {_ADAPTIVE}",
        lambda s: s.method == DENSE,
        "a dense run, which has no masks; see --fb, --fbp and --fix",
    ),
    Rule(_CHANNELS, lambda s: s.structure == "weight", "masks of weights; see --structure channel"),
    Rule(
        "sparse_init",
        lambda s: s.structure == "channel",
        "--structure channel, which draws its first channels by the seed",
    ),
    Rule("density", lambda s: s.flops is not None, "--flops, which gives the density"),
    Rule("channel_score", lambda s: s.fix, "--fix, whose channels do not move"),
    Rule(
        "",
        lambda s: s.structure == "channel" and s.growth not in CHANNEL_GROWTHS,
        "--growth {s.growth} applies to weights only; channels grow by "
        + " or ".join(CHANNEL_GROWTHS),
    ),
    Rule(_MOVING_MASK, lambda s: s.fix, "--fix, whose masks do not move"),
    Rule(_ADAPTIVE, lambda s: not s.fbp, "this method; only --fbp adapts the density"),
    Rule("second_frequency", lambda s: not s.dynamic_fre, "no --dynamic_fre"),
    Rule(
        "",
        lambda s: s.growth == "momentum" and not s.momentum,
        "--growth momentum has no effect with --momentum 0",
    ),
    Rule(
        "",
        lambda s: s.fbp and s.eval_every > 1,
        "--fbp uses the validation of every epoch, so --eval_every must stay 1",
    ),
    Rule(
        "",
        lambda s: s.method != DENSE and 1 in (s.density, s.flops),
        "--density or --flops 1 leaves nothing to prune, so --fb, --fbp or --fix could not take"
        " effect",
    ),
)


@dataclass(frozen=True)
class AdversarialSettings(CommonSettings):
    """Settings of ``main_adv.py``; each field is a flag."""

    script: ClassVar[str] = "main_adv.py"
    examples: ClassVar[tuple[str, ...]] = (
        (
            "python main_adv.py --dataset cifar10 --data data/cifar10 --fbp --density 0.2"
            " --dynamic_fre"
        ),
        "python main_adv.py --resume_dir runs/RUN",
        "python main_adv.py --eval --pretrained runs/RUN/model_RA_best.pth.tar",
    )
    may_grow: ClassVar[frozenset[str]] = frozenset({"epochs"})
    # run
    eval: bool = flag.evaluation(False, "evaluate --pretrained instead of training")
    pretrained: str | None = flag.evaluation(
        None, "checkpoint to evaluate, ours or from the paper's code", metavar="FILE"
    )
    eval_attack: str = flag.evaluation(
        "pgd",
        "attack of --eval: PGD, PGD on the CW margin, AutoAttack, or a gradient-masking check",
        choices=EVAL_ATTACKS,
    )
    restarts: int = flag.evaluation(
        1, "random starts of the attack of --eval; an image must withstand them all"
    )
    source: str | None = flag.evaluation(
        None, "checkpoint to craft the images of --eval on (transfer attack)", metavar="FILE"
    )
    eval_dir: str | None = flag.evaluation(
        None,
        "folder for the results of --eval (default: evaluations/ beside the checkpoint)",
        metavar="DIR",
    )
    # training
    epochs: int = flag.training(200, "epochs to train", metavar="EPOCHS")
    # sparsity
    fb: bool = flag.sparsity(False, "Flying Bird: prune and regrow at a fixed density")
    fbp: bool = flag.sparsity(False, "Flying Bird+: also adapt the density")
    fix: bool = flag.sparsity(False, "static masks: never update the initial ones")
    density: float = flag.sparsity(0.2, "fraction of weights to keep (channels: default .5)")
    structure: str = flag.sparsity(
        "weight", "what is pruned and regrown", choices=("weight", "channel")
    )
    flops: float | None = flag.sparsity(
        None, "fraction of inference FLOPs to keep, instead of --density; channels only"
    )
    channel_multiple: int | None = flag.sparsity(
        None,
        "keep a multiple of this many channels in each group (default: 16; narrow networks 8)",
        metavar="CHANNELS",
    )
    channel_score: str = flag.sparsity(
        "taylor",
        "drop channels by |scale * gradient| since the last update, or by |scale|",
        choices=CHANNEL_SCORES,
    )
    sparse_init: str = flag.sparsity("igq", "how initial masks are chosen", choices=SPARSE_INITS)
    growth: str = flag.sparsity("random", "which dead weights to grow", choices=GROWTHS)
    death: str = flag.sparsity("magnitude", "which live weights to drop", choices=("magnitude",))
    redistribution: str = flag.sparsity(
        "none", "redistribution of weights between layers", choices=("none",)
    )
    reset: bool = flag.sparsity(False, "refused: it has no meaning in the paper's method")
    death_rate: float = flag.sparsity(
        0.5, "live fraction dropped at the first update (channels: default .2)"
    )
    decay_schedule: str = flag.sparsity(
        "cosine", "schedule of the dropped fraction", choices=SCHEDULES
    )
    update_frequency: int = flag.sparsity(900, "steps between mask updates", metavar="STEPS")
    dynamic_fre: bool = flag.sparsity(False, "use --second_frequency in the second half of the run")
    second_frequency: int = flag.sparsity(
        1200, "steps between mask updates in the second half", metavar="STEPS"
    )
    dynamic_epoch: str = flag.sparsity(
        "100",
        "first epoch in which Flying Bird+ adapts the density; may be a fraction of the run",
        metavar="EPOCH",
    )
    epoch_range: int = flag.sparsity(
        4, "number of epoch-to-epoch differences that Flying Bird+ compares", metavar="EPOCHS"
    )
    update_threshold: float = flag.sparsity(0.5, "fraction of these differences needed to act")
    prune_ratio: float = flag.sparsity(
        0.4, "extra weights that Flying Bird+ prunes, relative to those dropped"
    )
    growth_ratio: float = flag.sparsity(
        0.05, "extra weights that Flying Bird+ grows, relative to those regrown"
    )

    @property
    def rules(self) -> tuple[Rule, ...]:  # type: ignore[override]
        first, last = (_EVALUATION_RULES, ()) if self.eval else ((), _TRAINING_RULES)
        return (*_METHOD_RULES, *first, *COMMON_RULES, *last)

    @property
    def evaluates(self) -> bool:  # type: ignore[override]
        return self.eval

    @property
    def method(self) -> str:
        """``dense``, ``fb``, ``fbp`` or ``static``; with ``-channel`` for channel pruning."""
        method = "fbp" if self.fbp else "static" if self.fix else "fb" if self.fb else DENSE
        return f"{method}-channel" if method != DENSE and self.structure == "channel" else method

    @property
    def moves(self) -> bool:
        """Whether masks are updated while the network trains."""
        return (self.fb or self.fbp) and not self.fix

    @property
    def milestones(self) -> tuple[int, ...]:
        """Epochs at which the learning rate is divided by ten."""
        return self.milestones_in(self.epochs)

    @property
    def first_adaptive_epoch(self) -> int:
        """The epoch from which Flying Bird+ adapts the density."""
        return epoch_number(self.dynamic_epoch, self.epochs, "--dynamic_epoch")

    @property
    def training(self) -> Plan:
        """The plan of the run's only stage."""
        return self.last_plan(self.epochs)

    def trainings(self) -> list[tuple[Plan, bool]]:
        return [(self.training, True)]

    def epochs_done(self, history: Sequence[Mapping[str, Any]]) -> list[float]:
        return [len(history)]

    def masking(self, steps_per_epoch: int) -> MaskingConfig:
        """Settings of ``sparse_core`` for a run of ``steps_per_epoch`` steps an epoch."""
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

    def canonical(self) -> dict[str, Any]:
        fb = self.fb and self.moves  # --fb --fix is the same run as --fix
        epochs = ",".join(str(epoch) for epoch in self.milestones)
        return {
            **super().canonical(),
            **self.canonical_starts(self.epochs),
            "decreasing_lr": epochs,
            "dynamic_epoch": str(self.first_adaptive_epoch),
            "fb": fb,
        }

    def name_parts(self) -> list[str]:
        kept = f"d{self.density:g}" if self.flops is None else f"f{self.flops:g}"
        return [*([] if self.method == DENSE else [kept]), f"e{self.epochs}"]

    # ---- checks and cautions

    @classmethod
    def guessed(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Adds the defaults that differ for structured channels."""
        usual = {"density": 0.5, "death_rate": 0.2} if given.get("structure") == "channel" else {}
        return {**super().guessed(given), **usual}

    def check_values(self) -> None:
        super().check_values()
        counts = ["epochs", "update_frequency", "second_frequency", "epoch_range", "restarts"]
        self.check_numbers(
            at_least_one=[*counts, "channel_multiple"],
            not_negative=["prune_ratio", "growth_ratio"],
            fractions=["density", "flops", "death_rate", "update_threshold"],
        )
        self.check_milestones(self.epochs)
        _ = self.first_adaptive_epoch  # raises for what is no epoch

    def refuse_idle(self, given: frozenset[str]) -> None:
        super().refuse_idle(given)
        if not self.eval:
            self.refuse_late_remedies(self.epochs)
            if "decreasing_lr" in given:
                self.refuse_late_milestones(self.epochs)
            if self.fbp:
                self._refuse_late_adaptation()

    def _refuse_late_adaptation(self) -> None:
        first = self.first_adaptive_epoch
        late = (
            f"--fbp adapts from --dynamic_epoch {self.dynamic_epoch} on, past the end of"
            f" {self.epochs} epochs; 0.5 is half of them"
        )
        if float(self.dynamic_epoch) < 1:
            late = (
                f"--dynamic_epoch {self.dynamic_epoch} of {self.epochs} epochs comes to epoch"
                f" {first}, the end; 0.5 is earlier"
            )
        require(first < self.epochs, late)

    def may_differ(self, name: str) -> bool:
        return self.eval and name in _EVALUATION

    def must_match_checkpoint(self, name: str) -> bool:
        return self.eval and name not in _NETWORK


def evaluation_settings(script: object, stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that ``--eval`` takes over from a checkpoint: all those of ``main_adv.py``; from
    other scripts only those of the data, the network and the evaluation."""
    if script in (None, AdversarialSettings.script):
        return stored
    return {
        name: value
        for name, value in stored.items()
        if name in {*_NETWORK, *_EVALUATION, "data", "cache_dir"}
    }


def refuse_idle_masks(s: AdversarialSettings, steps_per_epoch: int) -> None:
    """Raise ``InputError`` for a run too short for a mask update, once the data is known."""
    if s.moves:
        require(
            bool(_update_steps(s, steps_per_epoch)),
            f"with {_frequencies(s)} no mask update falls into the run of"
            f" {s.epochs * steps_per_epoch} steps, so the masks would never change; lower it, or"
            " ask for static masks with --fix",
        )


def cautions(s: AdversarialSettings, steps_per_epoch: int) -> list[str]:
    """Warnings at the start of a run about settings that do little or nothing, perhaps
    unintentionally."""
    found = [
        *s.notes,
        *([] if s.train_attack == "none" else s.attack_cautions("train", s.train_attack != "pgd")),
        *s.attack_cautions("test"),
    ]
    if s.lr_schedule == "step" and not any(epoch < s.epochs for epoch in s.milestones):
        found.append(
            f"the learning rate is never lowered: --decreasing_lr {s.decreasing_lr} lies past"
            " the end"
        )
    if s.moves:
        found += _cautions_about_updates(s, steps_per_epoch)
    return found


def _cautions_about_updates(s: AdversarialSettings, steps_per_epoch: int) -> list[str]:
    """Warnings about the mask updates of a run that has at least one."""
    last, steps = _update_steps(s, steps_per_epoch)[-1], s.epochs * steps_per_epoch
    # a verdict needs two finished epochs to compare
    first = max(s.first_adaptive_epoch, 2) * steps_per_epoch
    at_last = f"with {_frequencies(s)} the last mask update is at step {last}"
    if s.fbp and last <= first:
        return [
            f"{at_last} and Flying Bird+ adapts after step {first}, so the density stays as it is"
        ]
    if s.dynamic_fre and 2 * last <= steps:
        return [
            f"{at_last} of {steps}, so the masks stay in the second half; a smaller"
            " --second_frequency moves them"
        ]
    return []


def _update_steps(s: AdversarialSettings, steps_per_epoch: int) -> list[int]:
    config = s.masking(steps_per_epoch)
    return [step for step in range(1, config.total_steps + 1) if update_is_due(config, step)]


def _frequencies(s: AdversarialSettings) -> str:
    return f"--update_frequency {s.update_frequency}" + (
        f" and --second_frequency {s.second_frequency}" if s.dynamic_fre else ""
    )
