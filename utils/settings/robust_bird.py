"""Settings of the Robust Bird scripts: ``train_eb.py`` draws the ticket when it emerges,
``train_base.py`` after ``--epochs1`` epochs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from models.channels import usual_floor
from utils.early_bird import KINDS, TOLERANCES, EarlyBird
from utils.errors import InputError, require
from utils.seeding import stream
from utils.settings.common import COMMON_RULES, STAGE_KINDS, CommonSettings
from utils.settings.flags import flag
from utils.settings.rules import Rule
from utils.storage.inputs import require_checkpoint
from utils.training.schedule import Plan

_CHANNELS = "channel_floor channel_multiple"
TICKET_RULES = (
    *COMMON_RULES,
    Rule(
        "stage1 epochs1 stage1_ra eb_window eb_tolerance",
        lambda s: s.stage1_pretrained is not None,
        "--stage1_pretrained, which skips stage 1",
    ),
    Rule(_CHANNELS, lambda s: s.pruning != "channel", "--pruning unstructured", True),
    Rule(_CHANNELS, lambda s: s.density == 1, "--density 1, which removes nothing", True),
    Rule(
        "",
        lambda s: "fast" in s.stages and s.norm == "l2",
        "--norm l2 has no effect with a fast stage, which steps along the sign",
    ),
    Rule(
        "",
        lambda s: s.train_attack == "none",
        "--train_attack none: --stage2 sgd trains on clean images",
    ),
    Rule(
        "recipe train_loss beta label_smoothing awp awp_start ema swa train_attack lr_schedule",
        lambda s: s.stage2 != "pgd",
        "--stage2 {s.stage2}, only with pgd",
    ),
    Rule(
        "train_step train_gamma train_randinit attack_mode",
        lambda s: "pgd" not in s.stages,
        "{s.stage_names}, only with pgd",
    ),
    Rule("train_eps", lambda s: set(s.stages) == {"sgd"}, "stages on clean images"),
    Rule(
        "lr decreasing_lr",
        lambda s: set(s.stages) == {"fast"},
        "stages fast, whose learning rate follows a cycle of its own",
    ),
)


@dataclass(frozen=True)
class TicketSettings(CommonSettings):
    """Settings of ``train_base.py``, which draws the ticket after exactly ``--epochs1`` epochs."""

    script: ClassVar[str] = "train_base.py"
    examples: ClassVar[tuple[str, ...]] = (
        (
            "python Robust-Bird/train_base.py --data data/cifar10 --stage1 fast --epochs1 30"
            " --density 0.1"
        ),
        "python Robust-Bird/train_base.py --resume_dir runs/RUN",
    )
    may_grow: ClassVar[frozenset[str]] = frozenset({"epochs2"})
    rules: ClassVar[tuple[Rule, ...]] = TICKET_RULES
    early_stop: ClassVar[bool] = False
    method_name: ClassVar[str] = "oneshot"

    # run
    print_freq: int = flag.files(100, "steps between progress lines", metavar="STEPS")
    # training
    decreasing_lr: str = flag.training(
        "50,150",
        "epochs, or fractions of a stage, at which --lr is divided by 10",
        metavar="EPOCHS",
    )
    # stages
    stage1: str = flag.stages(
        "sgd", "training of the dense network: clean, PGD or FGSM-RS images", choices=STAGE_KINDS
    )
    epochs1: int = flag.stages(200, "epochs of stage 1", metavar="EPOCHS")
    stage1_ra: bool = flag.stages(
        False,
        "also measure RA and the test set in stage 1 (not needed to find the ticket)",
        result=False,
    )
    stage1_pretrained: str | None = flag.stages(
        None, "checkpoint of a trained dense network to prune, instead of stage 1", metavar="FILE"
    )
    stage2: str = flag.stages("pgd", "training of the ticket", choices=STAGE_KINDS)
    epochs2: int = flag.stages(200, "epochs of stage 2", metavar="EPOCHS")
    # sparsity
    pruning: str = flag.sparsity(
        "unstructured", "prune single weights, or remove whole channels", choices=KINDS
    )
    density: float = flag.sparsity(0.2, "fraction of weights or channels to keep")
    channel_floor: float | None = flag.sparsity(
        None,
        "minimum fraction kept of each group's channels, before rounding (default: .1, at most"
        " density / 2)",
    )
    channel_multiple: int | None = flag.sparsity(
        None,
        "keep a multiple of this many channels in each group (default: 16; narrow networks 8)",
        metavar="CHANNELS",
    )

    @property
    def method(self) -> str:
        """``rb`` or ``oneshot``, with ``-channel`` where channels are removed."""
        return self.method_name + ("-channel" if self.pruning == "channel" else "")

    @property
    def stages(self) -> tuple[str, ...]:
        """The kinds of the stages that are trained."""
        return (self.stage2,) if self.stage1_pretrained is not None else (self.stage1, self.stage2)

    @property
    def earlier_stage_steps(self) -> bool:  # type: ignore[override]
        return any(kind != "fast" for kind in self.stages[:-1])

    @property
    def stage_names(self) -> str:
        """The kinds of the stages in words, such as ``sgd and pgd``."""
        return " and ".join(self.stages)

    def stage_text(self, kind: str) -> str:
        """A kind of stage with its attack in words, for the headline."""
        return {
            "sgd": "sgd",
            "pgd": f"PGD-{self.train_step} training at {self.train_ball}",
            "fast": f"fast at {self.train_ball}",
        }[kind]

    @property
    def plan1(self) -> Plan:
        # Its own random stream, so that stage 2 has the draws of a dense run of main_adv.py with
        # this seed.
        return self.plan(self.stage1, self.epochs1, stream(self.seed, "stage1"))

    @property
    def plan2(self) -> Plan:
        if self.stage2 == "pgd":
            return self.last_plan(self.epochs2)
        plan = self.plan(self.stage2, self.epochs2, self.seed)
        return dataclasses.replace(plan, guarded=True)

    @property
    def uses_pgd(self) -> bool:
        first = self.stage1_pretrained is None and self.stage1 == "pgd"
        return first or (self.stage2 == "pgd" and self.train_attack == "pgd")

    def trainings(self) -> list[tuple[Plan, bool]]:
        first = [] if self.stage1_pretrained is not None else [(self.plan1, self.stage1_ra)]
        return [*first, (self.plan2, True)]

    def epochs_done(self, history: Sequence[Mapping[str, Any]]) -> list[float]:
        """A stage 1 that found its ticket counts in full."""
        first, second = ([row for row in history if row["stage"] == stage] for stage in (1, 2))
        if self.stage1_pretrained is not None:
            return [len(second)]
        is_over = bool(second) or (self.early_stop and bool(first) and first[-1]["ticket"])
        return [self.epochs1 if is_over else len(first), len(second)]

    @property
    def floor(self) -> float:
        """Minimum kept fraction of each group's channels."""
        return usual_floor(self.density) if self.channel_floor is None else self.channel_floor

    def early_bird(self) -> EarlyBird:
        """The detector that compares the masks of stage 1."""
        return EarlyBird(self.density, kind=self.pruning)

    def canonical(self) -> dict[str, Any]:
        one, two = (
            ",".join(map(str, self.milestones_in(epochs)))
            for epochs in (self.epochs1, self.epochs2)
        )
        floor = None if self.floor == usual_floor(self.density) else self.floor
        found = super().canonical()
        if "pgd" in self.stages[:-1] and self.loss.attack_mode != "train":
            # The usual mode of stage 1, which trains with cross-entropy, is another one.
            found["attack_mode"] = self.attack_mode
        return {
            **found,
            **self.canonical_starts(self.epochs2),
            "decreasing_lr": one if one == two else f"{one}; {two}",
            "channel_floor": floor,
        }

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        if self.stage1_pretrained is not None:  # the file's content counts, not its path
            found["stage1_pretrained"] = _digest(self.stage1_pretrained)
        return found

    def name_parts(self) -> list[str]:
        first = "" if self.stage1_pretrained is not None else f"{self.epochs1}-"
        return [f"d{self.density:g}", f"e{first}{self.epochs2}"]

    # ---- checks and cautions

    def check_values(self) -> None:
        super().check_values()
        self.check_numbers(
            at_least_one=["epochs1", "epochs2", "channel_multiple"], fractions=["density"]
        )
        fits = (
            f"--channel_floor {self.floor:g} must lie in [0, --density {self.density:g}]: a"
            " group cannot be guaranteed more than that"
        )
        require(0 <= self.floor <= self.density, fits)
        for epochs in (self.epochs1, self.epochs2):
            self.check_milestones(epochs)

    def refuse_idle(self, given: frozenset[str]) -> None:
        super().refuse_idle(given)
        self.refuse_late_remedies(self.epochs2)
        if "decreasing_lr" in given:
            epochs = (self.epochs1, self.epochs2)[-len(self.stages) :]
            steps = [kind != "fast" for kind in self.stages]
            steps[-1] &= self.lr_schedule == "step"
            self.refuse_late_milestones(max(itertools.compress(epochs, steps)))

    def cautions(self) -> list[str]:
        """Warnings at the start of a run about settings that do little or nothing, perhaps
        unintentionally."""
        found = [
            *self.notes,
            *(self.attack_cautions("train") if set(self.stages) != {"sgd"} else []),
            *self.attack_cautions("test"),
        ]
        if self.density == 1:
            found.append(
                "--density 1 keeps everything, so nothing is pruned and both stages train the dense"
                " network"
            )
        steps = self.stage2 != "fast" and self.lr_schedule == "step"
        if steps and not any(
            milestone < self.epochs2 for milestone in self.milestones_in(self.epochs2)
        ):
            found.append(
                f"the learning rate of stage 2 is never lowered: --decreasing_lr"
                f" {self.decreasing_lr} lies past its end"
            )
        return found


@dataclass(frozen=True)
class EarlyBirdSettings(TicketSettings):
    """Settings of ``train_eb.py``, whose stage 1 ends when the ticket emerges."""

    script: ClassVar[str] = "train_eb.py"
    examples: ClassVar[tuple[str, ...]] = (
        (
            "python Robust-Bird/train_eb.py --data data/cifar10 --stage1 sgd --stage2 pgd"
            " --density 0.2"
        ),
        "python Robust-Bird/train_eb.py --data data/cifar10 --pruning channel --density 0.5",
        "python Robust-Bird/train_eb.py --resume_dir runs/RUN",
    )
    rules: ClassVar[tuple[Rule, ...]] = (
        *TICKET_RULES,
        Rule(
            "eb_window eb_tolerance",
            lambda s: s.eb_window > s.epochs1,
            "--epochs1 {s.epochs1}, fewer epochs than --eb_window {s.eb_window}, so no"
            " ticket could emerge",
        ),
        Rule(
            "eb_tolerance",
            lambda s: s.eb_window == 1,
            "--eb_window 1, which compares nothing",
            True,
        ),
    )
    early_stop: ClassVar[bool] = True
    method_name: ClassVar[str] = "rb"

    epochs1: int = flag.stages(200, "maximum number of epochs of stage 1", metavar="EPOCHS")
    eb_window: int = flag.stages(
        5, "number of consecutive epochs whose masks must agree", metavar="EPOCHS"
    )
    eb_tolerance: float | None = flag.stages(
        None, "largest fraction of positions in which they may differ (default: .08; channels .1)"
    )

    def early_bird(self) -> EarlyBird:
        return EarlyBird(self.density, self.eb_window, self.eb_tolerance, self.pruning)

    def canonical(self) -> dict[str, Any]:
        usual = self.eb_tolerance == TOLERANCES[self.pruning]
        return {**super().canonical(), "eb_tolerance": None if usual else self.eb_tolerance}

    def check_values(self) -> None:
        super().check_values()
        self.check_numbers(at_least_one=["eb_window"])
        tolerance = self.eb_tolerance
        require(
            tolerance is None or 0 <= tolerance <= 1,
            f"--eb_tolerance is a fraction and must lie in [0, 1], not {tolerance}",
        )

    def cautions(self) -> list[str]:
        found = super().cautions()
        if self.stage1_pretrained is None and self.eb_window > self.epochs1:
            found.append(
                f"no ticket can emerge: it takes --eb_window {self.eb_window} masks and stage 1 has"
                f" {self.epochs1} epochs"
            )
        return found


def _digest(path: str) -> str:
    require_checkpoint(path)
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        reason = (
            f"cannot be read ({error.strerror or error}); --resume_dir resumes a run that no"
            " longer needs it"
        )
        raise InputError(f"--stage1_pretrained {path} {reason}") from error
