"""A finished run as a submission: its best network, how much of it is pruned, and its accuracy
under the attacks that benchmarks require."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.augment import to_float
from models.flops import layer_costs, real_inference
from sparse_core import prunable
from utils.errors import Stopped, require
from utils.evaluation.command import Evaluation, stored_settings
from utils.execution.distributed import World
from utils.execution.hardware import full_precision
from utils.execution.interruption import Interruption
from utils.export import Trained
from utils.minimum_norm import FMN, minimum_norm, tuned
from utils.report.runs import FinishedRun
from utils.settings.adversarial import AdversarialSettings
from utils.settings.command_line import parse_settings
from utils.settings.device import pick_device
from utils.storage.checkpoint import load_checkpoint, save_checkpoint

# classes in the order of their labels, and numbers of test images
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
TEST_IMAGES = {"CIFAR10": 10_000, "CIFAR100": 10_000, "SVHN": 26_032}
_SIDE = 32  # of the images of these data sets, in pixels
# flags of an evaluation that the benchmark fixes
_OWN = "eval pretrained eval_attack test_eps norm eval_dir source restarts".split()
_TUNED_ON, _BATCH = 64, 128  # images for FMN's search, and per batch of FMN


@dataclass(frozen=True)
class Entry:
    """A finished run and its best network."""

    run: FinishedRun
    path: Path
    trained: Trained

    @classmethod
    def read(cls, folder: Path) -> Entry:
        """Read a run folder; raises ``InputError`` if it is not finished or has no best model."""
        run = FinishedRun.read(folder)
        path = run.paths.best_ra
        require(path.is_file(), f"{path} is not there, so there is no network to submit")
        return cls(run, path, Trained.read(path))

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.trained.spec

    @property
    def narrow(self) -> bool:
        """Whether channels were removed rather than weights."""
        return "channels" in self.spec

    @cached_property
    def removed(self) -> float:
        """Percentage pruned: of the convolutions' channels, or of the weights of convolutions and
        linear layers."""
        if not self.narrow:
            return 100 * (1 - self.trained.density)
        live, full = _channels(self.trained.model), _channels(self.trained.full_size())
        return 100 * (1 - live / full)

    @property
    def inference_flops(self) -> int:
        """FLOPs of one image, with zero weights skipped."""
        weights = prunable(self.trained.model)
        live = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
        return real_inference(
            layer_costs(self.trained.model, self.trained.images(1)[0].shape), live
        )

    @cached_property
    def dataset(self) -> str | None:
        """The benchmarks' name of the data set, or None; an image folder counts as CIFAR-10 if its
        classes and image size match."""
        if self.trained.image_shape != (_SIDE, _SIDE):
            return None
        if list(self.spec.get("classes") or ()) == _CIFAR10:
            return "CIFAR10"
        name = self.run.settings.dataset.upper()
        return name if name in TEST_IMAGES else None


def _channels(model: nn.Module) -> int:
    return sum(layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))


@dataclass(frozen=True)
class Scores:
    """Clean and AutoAttack accuracy in percent, and the evaluation they are from."""

    clean: float
    robust: float
    images: int
    evaluation: Evaluation

    def shortfall(self, entry: Entry, whose: str) -> str | None:
        """A message if the scores do not cover all test images of the entry's data set."""
        wanted = TEST_IMAGES[str(entry.dataset)]
        if self.images >= wanted:
            return None
        return f"measured on {self.images} images; {whose} wants all {wanted:,} test images"


def attack_settings(
    entry: Entry, norm: str, eps: float, flags: Sequence[str]
) -> AdversarialSettings:
    """The settings of an evaluation under AutoAttack.

    Args:
        entry: the run and its network.
        norm, eps: ball of the attack, radius in 1/255.
        flags: further flags of ``main_adv.py --eval``.

    Raises:
        InputError: flags are invalid, or would change the attack or the network.
    """
    for flag in flags:
        name = flag.lstrip("-").split("=")[0].replace("-", "_")
        require(
            not flag.startswith("--") or name not in _OWN,
            f"{flag.split('=')[0]} is the benchmark's to choose",
        )
    own = ["--eval", "--pretrained", str(entry.path), "--eval_attack", "autoattack"]
    own += ["--norm", norm, "--test_eps", f"{eps:g}"]
    return parse_settings(AdversarialSettings, [*flags, *own], "", stored_settings)


def autoattack(entry: Entry, norm: str, eps: float, flags: Sequence[str]) -> Scores:
    """Run AutoAttack on the test images, with the arguments of ``attack_settings``; resumes an
    interrupted evaluation. Raises ``InputError`` if the data do not fit."""
    settings = attack_settings(entry, norm, eps, flags)
    evaluation = Evaluation(settings, pick_device(settings), World())
    evaluation.run()
    result = evaluation.finish()
    return Scores(result["test_sa"], result["test_ra"], result["images"]["test"], evaluation)


def distances(scores: Scores, trials: int, steps: int) -> tuple[FMN, list[float]]:
    """HO-FMN's settings, and the linf distance from each test image, in the evaluation's order, to
    the closest adversarial image found. Saved beside the evaluation, so that a call can resume.

    Args:
        scores: an evaluation, which gives the network and the images.
        trials: number of settings that the search tries, each with half of the steps.
        steps: of the attack.

    Raises:
        Stopped: on a signal or at ``--time_limit``; the distances found are saved.
    """
    evaluation = scores.evaluation
    model, split, settings = evaluation.model, evaluation.data.test, evaluation.settings
    name = f"{evaluation.answers.name.split('.')[0]}_fmn-{steps}-{trials}.pth.tar"
    kept = evaluation.answers.with_name(name)
    attack, found = None, list[float]()
    if kept.exists():
        content = load_checkpoint(kept)
        attack, found = FMN(**content["attack"]), content["distances"]

    def images(indices: Tensor) -> tuple[Tensor, Tensor]:
        return to_float(split.rows(indices)), split.labels[indices]

    with (
        full_precision(),
        Interruption(settings.time_limit) as interruption,
        tqdm(total=len(split), desc="FMN", unit="img", leave=False, disable=None) as bar,
    ):

        def leave_if_asked() -> None:
            if stopped := interruption.asked():
                raise Stopped(f"{stopped}; the same command resumes", stopped.code)

        if attack is None:
            x, y = images(split.spread(_TUNED_ON))
            half = max(1, steps // 2)
            best = tuned(
                model, x, y, seed=settings.seed, trials=trials, steps=half, on_trial=leave_if_asked
            )
            attack = FMN(steps, best.step_size, best.momentum)
        bar.update(len(found))
        for indices in split.indices[len(found) :].split(_BATCH):
            found += minimum_norm(model, *images(indices), attack)[1].tolist()
            save_checkpoint(kept, {"attack": asdict(attack), "distances": found})
            bar.update(len(indices))
            leave_if_asked()
    return attack, found


def beyond(found: Sequence[float], eps: float) -> float:
    """Robust accuracy in percent at ``eps``, for pixels in [0, 1], by the distances found."""
    return 100 * sum(distance > eps for distance in found) / len(found)


def agrees(network: nn.Module, entry: Entry, *, normalization: bool) -> bool:
    """Whether a network, loaded as the benchmark does, gives the entry's logits; ``normalization``
    says if it normalizes the pixels itself."""
    images = entry.trained.images(5)
    with torch.no_grad():
        expected = entry.trained.model(images)
        if not normalization:
            mean, std = (torch.tensor(entry.spec[name]) for name in ("mean", "std"))
            images = (images - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
        difference = (network.eval()(images) - expected).abs().max()
    return bool(difference <= 1e-5 * expected.abs().max())
