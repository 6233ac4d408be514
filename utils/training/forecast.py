"""Forecast of a run's time: the passes over images it has left, and the cost of a pass."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data import Batch, Data, TrainLoader
from models.loading import build_network
from utils.attacks import PGD
from utils.execution.forward import Execution, Forward
from utils.execution.hardware import best_precision
from utils.settings.applied import network_spec
from utils.settings.common import CommonSettings
from utils.training.engine import sgd, train_step

# Cost in forward passes: an attack step is a forward pass and a backward pass to the image; the
# backward pass of an update also goes to the weights.
_ATTACK_STEP, _UPDATE = 2, 3
_SECONDS = 2.0  # of measuring, after which no further step is measured
_MIN_SECONDS = 5.0  # of training after the first update that a forecast needs


def image_passes(
    settings: CommonSettings, images: Mapping[str, int], done: Sequence[float]
) -> float:
    """Forward passes of single images, or their equivalent, that a run has left; stage 1 of Robust
    Bird counts with all its epochs.

    Args:
        settings: of the run.
        images: of its data, by split (``Data.images``).
        done: epochs finished in each stage; may be fractional.
    """
    test = 2 + _ATTACK_STEP * settings.test_attack.steps  # of an image, clean and attacked
    total = 0.0
    for (plan, attacked), behind in zip(settings.trainings(), done, strict=True):
        epochs = plan.epochs - behind
        first = int(behind)
        further: float = sum(plan.further_passes(epoch) for epoch in range(first, plan.epochs))
        further -= (behind - first) * plan.further_passes(first)
        looks = 2 if plan.ema or plan.swa_start is not None else 1
        validated = epochs / settings.eval_every * images["val"]
        tested = epochs / settings.test_every * images["test"]
        total += epochs * images["train"] * (_UPDATE + _ATTACK_STEP * plan.attack_steps)
        total += further * images["train"]
        total += looks * (validated + tested) * test if attacked else epochs * images["val"]
    # Final scores of the best and the final model, measured once if they are one, on test and
    # training images, in float32, which takes about twice as long as bf16.
    train = min(images["train"], settings.gap_subset or images["train"])
    return total + 2 * 2 * test * (train + images["test"])


class Forecast:
    """Measures the pace of training on its first steps and reports it once.

    The first update only starts the clock: choosing kernels and allocating memory slow it down. A
    first epoch that is too short to measure is left out for the same reason.
    """

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None
        self._is_warm = False
        self._has_reported = False

    def update(self, images: int, seconds: float, is_over: bool) -> float | None:
        """Seconds per image, the first time they are known; None otherwise. ``images`` took
        ``seconds`` so far in this epoch; ``is_over`` says whether it ends here."""
        if self._has_reported:
            return None
        start, before = self._first = self._first or (
            (0.0, 0) if self._is_warm else (seconds, images)
        )
        took = seconds - start
        if took >= _MIN_SECONDS or (is_over and took and self._is_warm):
            self._has_reported = True
            return took / (images - before)
        if is_over:
            self._first, self._is_warm = None, True
        return None


def seconds_left(
    settings: CommonSettings,
    images: Mapping[str, int],
    history: Sequence[Mapping[str, Any]],
    share: float,
    pace: float,
) -> float:
    """Estimated seconds left of a run in the middle of an epoch, tests included.

    Args:
        settings, images: as in ``image_passes``.
        history: rows of its metrics.
        share: fraction of the epoch's training that is done.
        pace: seconds per image in this stage's training.
    """
    done = settings.epochs_done(history)
    plans = [plan for plan, _ in settings.trainings()]
    stage = next(number for number, plan in enumerate(plans) if done[number] < plan.epochs)
    plan = plans[stage]
    passes = _UPDATE + _ATTACK_STEP * plan.attack_steps + plan.further_passes(int(done[stage]))
    done[stage] += share
    return pace / passes * image_passes(settings, images, done)


def seconds_per_pass(settings: CommonSettings, data: Data, device: torch.device) -> float:
    """Seconds per pass of one image: the fastest of at most three training steps after one to warm
    up, since other load can only slow them. The steps train the dense network, uncompiled, with a
    one-step attack."""
    plan = settings.trainings()[-1][0]
    model = build_network(network_spec(settings, data), device, settings.seed)
    optimizer = sgd(
        model, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    precision = best_precision(device) if settings.precision == "auto" else settings.precision
    forward = Forward(model, Execution(precision, graphs="off"))
    batch = next(
        TrainLoader(data.train, settings.batch_size, data.augmentation, settings.seed).epoch(0)
    )
    attack = PGD(settings.train_eps / 255, 1 / 255, 1, settings.norm, random_start=False)

    def step(batch: Batch) -> None:
        train_step(
            model,
            optimizer,
            batch,
            attack=attack,
            attack_training=plan.attack_training,
            key=(0,),
            forward=forward,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step(batch)
    taken: list[float] = []
    while len(taken) < 3 and sum(taken) < _SECONDS:
        start = time.perf_counter()
        step(batch)
        taken.append(time.perf_counter() - start)
    return min(taken) / (len(batch.y) * (_UPDATE + _ATTACK_STEP))


def duration(seconds: float) -> str:
    """A duration in the unit that fits: ``40 s``, ``12 min``, ``3.5 h``, ``2.1 days``."""
    for limit, unit, size in ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 86400:.1f} days"
