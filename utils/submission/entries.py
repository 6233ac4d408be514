"""A finished run as something to submit: its best network, what is pruned in it, and how it does
under the attacks that others ask for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.augment import to_float
from models.loading import full_size_state
from utils.errors import InputError, require
from utils.evaluation.command import Evaluation, stored_settings
from utils.execution.distributed import World
from utils.execution.hardware import full_precision
from utils.export import Trained
from utils.minimum_norm import FMN, minimum_norm, tuned
from utils.report.runs import FinishedRun
from utils.settings.adversarial import AdversarialSettings
from utils.settings.command_line import parse_settings
from utils.settings.device import pick_device
from utils.storage.checkpoint import load_checkpoint, save_checkpoint

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
_BENCHMARKS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}
_TUNED_ON, _BATCH = 64, 128  # images of FMN's search, and of a batch under it


@dataclass(frozen=True)
class Entry:
    """A finished run and its best network."""

    run: FinishedRun
    path: Path
    trained: Trained

    @classmethod
    def read(cls, folder: Path) -> Entry:
        """Raises ``InputError``: no finished run, or one without its best model."""
        run = FinishedRun.read(folder)
        path = run.paths.best_ra
        require(path.is_file(), f"{path} is not there, so there is no network to submit")
        return cls(run, path, Trained.read(path))

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.trained.spec

    @property
    def narrow(self) -> bool:
        """Whether channels were removed, and not weights."""
        return "channels" in self.spec

    @cached_property
    def removed(self) -> float:
        """What is pruned, in percent: of the channels that convolutions have, or of the weights of
        convolutions and linear layers."""
        if not self.narrow:
            return 100 * (1 - self.trained.density)
        live, full = _channels(self.trained.model), _channels(self.trained.full_size())
        return 100 * (1 - live / full)

    @cached_property
    def dataset(self) -> str | None:
        """The benchmarks' name of the data set; a folder of images counts by its classes."""
        if sorted(self.spec.get("classes") or ()) == _CIFAR10:
            return "CIFAR10"
        return _BENCHMARKS.get(self.run.settings.dataset)


def _channels(model: nn.Module) -> int:
    return sum(layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent under AutoAttack, and the evaluation that they are of."""

    clean: float
    robust: float
    images: int
    evaluation: Evaluation


def autoattack(entry: Entry, eps: float, flags: Sequence[str]) -> Scores:
    """AutoAttack on the test images; what a call before this one did is not done again.

    Args:
        entry: whose network.
        eps: radius in 1/255.
        flags: of ``main_adv.py --eval`` beside the network and the attack.

    Raises:
        InputError: flags or data that do not fit.
    """
    own = ["--eval", "--pretrained", str(entry.path), "--eval_attack", "autoattack"]
    own += ["--test_eps", f"{eps:g}"]
    settings = parse_settings(AdversarialSettings, [*own, *flags], "", stored_settings)
    evaluation = Evaluation(settings, pick_device(settings), World())
    evaluation.run()
    evaluation.finish()
    result = evaluation.result()
    return Scores(result["test_sa"], result["test_ra"], result["images"]["test"], evaluation)


def distances(scores: Scores, trials: int, steps: int) -> tuple[FMN, list[float]]:
    """The linf distance to the closest adversarial image that HO-FMN finds, for each test image in
    the evaluation's order; kept beside the evaluation.

    Args:
        scores: whose network and images.
        trials: settings that the search tries, each with half of the steps.
        steps: of the attack.
    """
    evaluation = scores.evaluation
    model, split, seed = evaluation.model, evaluation.data.test, evaluation.settings.seed
    name = f"{evaluation.answers.name.split('.')[0]}_fmn-{steps}-{trials}.pth.tar"
    kept = evaluation.answers.with_name(name)
    if kept.exists():
        content = load_checkpoint(kept)
        return FMN(**content["attack"]), content["distances"]

    def images(indices: Tensor) -> tuple[Tensor, Tensor]:
        return to_float(split.rows(indices)), split.labels[indices]

    found: list[float] = []
    with full_precision():
        total = trials + math.ceil(len(split) / _BATCH)
        with tqdm(total=total, desc="FMN", leave=False, disable=None) as bar:
            x, y = images(split.spread(_TUNED_ON))
            half = max(1, steps // 2)
            attack = tuned(model, x, y, seed=seed, trials=trials, steps=half, on_trial=bar.update)
            attack = FMN(steps, attack.step_size, attack.momentum)
            for indices in split.indices.split(_BATCH):
                found += minimum_norm(model, *images(indices), attack)[1].tolist()
                bar.update()
    save_checkpoint(kept, {"attack": asdict(attack), "distances": found})
    return attack, found


def beyond(found: Sequence[float], eps: float) -> float:
    """The percentage of images that no perturbation up to ``eps`` (of [0, 1]) fooled."""
    return 100 * sum(distance > eps for distance in found) / len(found)


def flat_state(entry: Entry, *, normalization: bool) -> dict[str, Tensor]:
    """The full-size state dict, zeros where nothing lives, with or without the pixels' mean and
    standard deviation."""
    state = full_size_state(entry.spec, entry.trained.state)
    return {
        name: value.contiguous()
        for name, value in state.items()
        if normalization or not name.startswith("normalize.")
    }


def agrees(network: nn.Module, entry: Entry, *, normalization: bool) -> bool:
    """Whether a network, loaded as others do, answers as ours."""
    images = entry.trained.images(5)
    with torch.no_grad():
        expected = entry.trained.model(images)
        if not normalization:
            mean, std = (torch.tensor(entry.spec[name]) for name in ("mean", "std"))
            images = (images - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
        difference = (network.eval()(images) - expected).abs().max()
    return bool(difference <= 1e-5 * expected.abs().max())


def refuse_non_empty(out: Path) -> None:
    """Raise ``InputError`` for a folder that holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; --out names a new folder")


def json_text(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
