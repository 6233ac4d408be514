"""Accuracy on clean and attacked images, after each epoch and at the end of a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch, Data, Split, plain_batches
from data.augment import to_float
from models.modes import in_mode
from utils.attacks import PGD, AutoAttack, attack_draws
from utils.evaluation.sanity import CHECKED_IMAGES, MAX_ZERO_GRADIENT_SHARE, images_without_gradient
from utils.evaluation.trials import (
    EVAL_BATCH,
    answers_of,
    autoattack_trials,
    clean_trial,
    pgd_trials,
    run_trials,
)
from utils.execution.distributed import ALONE, World
from utils.execution.forward import Execution, Forward
from utils.execution.hardware import full_precision

OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """``accuracy`` in percent and mean cross-entropy ``loss`` over ``images`` images; the loss of a
    worst case over several attacks is NaN."""

    accuracy: float
    loss: float
    images: int


@dataclass(frozen=True)
class FinalScores:
    """The reported figures of one network, in percent: ``robust_gap`` is RA on un-augmented
    training images minus test RA."""

    test_sa: float
    test_ra: float
    train_ra: float
    robust_gap: float


def evaluate(
    model: nn.Module,
    split: Split,
    attack: PGD | AutoAttack | None = None,
    *,
    seed: int = 1,
    restarts: int = 1,
    forward: Forward | None = None,
    on_batch: OnBatch = lambda images: None,
) -> Score:
    """Accuracy in eval mode on a split, clean or attacked; the network's modes are left as found.

    The random start of each image depends only on ``seed`` and its index, so a network gets the
    same score in every epoch and at the end. Several processes share the batches and get exactly
    the score of one process.

    Args:
        attack: one PGD attack, or all of AutoAttack, which always runs in float32; None for clean
            images.
        restarts: random starts of PGD; an image counts as correct if it withstands all of them.
            More than one runs in float32.
        forward: how and by which processes the network is computed; by default in float32, not
            compiled, by this process.
        on_batch: called with the number of images after each batch, or each round of batches of
            several processes.

    Warns:
        UserWarning: PGD's loss has no gradient at many of the images checked, so the accuracy says
            little about robustness.

    Raises:
        InputError: PGD gets no gradient or one that is not finite; AutoAttack gets fewer than four
            classes.
        ValueError: ``restarts`` above 1 for anything but PGD with a random start.
    """
    forward = Forward(model) if forward is None else forward
    # in inference mode the attack itself reports what is wrong
    if isinstance(attack, PGD) and attack.steps and not torch.is_inference_mode_enabled():
        _check_gradients(forward, split, attack)
    return score(forward, split, attack, seed=seed, restarts=restarts, on_batch=on_batch)


def _check_gradients(forward: Forward, split: Split, attack: PGD) -> None:
    if attack.loss == "kl":  # KL has no gradient at the clean image
        return
    indices = split.spread(CHECKED_IMAGES)
    with in_mode(forward.model, False), full_precision():
        images = to_float(split.rows(indices))
        silent = images_without_gradient(forward.model, images, split.labels[indices], attack.loss)
    if silent > MAX_ZERO_GRADIENT_SHARE * len(indices) and forward.world.is_first:
        counted = (
            f"the attack's loss ({attack.loss}) has no gradient at {silent} of {len(indices)}"
            " images checked"
        )
        warnings.warn(
            f"{counted}: PGD is weak there, and the robust accuracy may be too high; see"
            " loss='margin' or AutoAttack",
            stacklevel=3,
        )


def score(
    forward: Forward,
    split: Split,
    attack: PGD | AutoAttack | None = None,
    *,
    seed: int = 1,
    restarts: int = 1,
    on_batch: OnBatch = lambda images: None,
) -> Score:
    """``evaluate`` without the gradient check, for training, which measures after every epoch."""
    if isinstance(attack, AutoAttack) or restarts > 1:
        return _worst_case(forward, split, attack, seed, restarts, on_batch)
    world = forward.world
    batches = math.ceil(len(split) / EVAL_BATCH)
    right_and_loss = torch.zeros(2, batches, dtype=torch.float64, device=split.device)
    mine = plain_batches(split, EVAL_BATCH, world)
    with in_mode(forward.model, False), torch.no_grad():
        for first in range(0, batches, world.size):
            batch = next(mine, None)
            if batch is not None:
                right_and_loss[:, first + world.rank] = _right_and_loss(
                    forward, batch, attack, seed
                )
            on_batch(min(len(split), (first + world.size) * EVAL_BATCH) - first * EVAL_BATCH)
    # Each column is filled by one process, so the sum over processes only adds zeros and is exact;
    # the columns are then summed in the order of a single process.
    right, loss = world.total(right_and_loss).sum(dim=1).tolist()
    return Score(100.0 * right / len(split), loss / len(split), len(split))


def _worst_case(
    forward: Forward,
    split: Split,
    attack: PGD | AutoAttack | None,
    seed: int,
    restarts: int,
    on_batch: OnBatch,
) -> Score:
    model, world = forward.model, forward.world
    if attack is None:
        raise ValueError("restarts need an attack")
    if isinstance(attack, AutoAttack):
        if restarts > 1:
            raise ValueError("restarts have no effect on AutoAttack, which has its own")
        with in_mode(model, False), torch.no_grad():
            classes = model(next(plain_batches(split, 2)).x).shape[1]
        trials = [clean_trial(), *autoattack_trials(model, attack, classes, split.device, seed)]
    else:
        trials = pgd_trials(model, attack, seed, restarts=restarts)
    given = (model, {"test": split}, trials)
    outcomes = run_trials(*given, world=world, on_round=lambda trial, images: on_batch(images))
    return Score(outcomes.accuracy(trials[-1]), math.nan, len(split))


def _right_and_loss(forward: Forward, batch: Batch, attack: PGD | None, seed: int) -> Tensor:
    """Number of correct answers and summed cross-entropy on a batch, float64 ``[2]``."""
    x = batch.x
    if attack is not None:
        draws = attack_draws(attack, batch.indices, x.shape[1:], seed, "evaluate")
        x = forward.attack(x, batch.y, attack, training=False, draws=draws)
    logits = forward(x)
    loss = F.cross_entropy(logits, batch.y, reduction="sum")
    return torch.stack([(answers_of(logits) == batch.y).sum().double(), loss.double()])


def epoch_scores(
    model: nn.Module,
    data: Data,
    attack: PGD,
    *,
    seed: int,
    parts: Collection[str] = ("val", "test"),
    forward: Forward | None = None,
    on_batch: OnBatch = lambda images: None,
) -> dict[str, float]:
    """The scores after an epoch, by their names in ``metrics.jsonl``: ``val_sa``, ``val_ra``,
    ``val_loss`` (the mean robust loss), ``test_sa`` and ``test_ra``; accuracies in percent.

    Args:
        parts: splits to measure: ``val``, ``test`` or both.
    """
    forward = Forward(model) if forward is None else forward
    scores: dict[str, float] = {}
    for part, split in (("val", data.val), ("test", data.test)):
        if part in parts:
            robust = score(forward, split, attack, seed=seed, on_batch=on_batch)
            scores |= {f"{part}_sa": score(forward, split).accuracy, f"{part}_ra": robust.accuracy}
            scores |= {"val_loss": robust.loss} if part == "val" else {}
    return scores


def final_scores(
    model: nn.Module,
    data: Data,
    attack: PGD,
    *,
    seed: int,
    train: Split | None = None,
    world: World = ALONE,
    on_batch: OnBatch = lambda images: None,
) -> FinalScores:
    """The reported figures, in full float32; training RA is measured on ``train`` (by default all
    training images). Several processes share the work."""
    forward = Forward(model, Execution(world=world))
    with full_precision():
        test_sa = score(forward, data.test).accuracy
        test_ra = score(forward, data.test, attack, seed=seed, on_batch=on_batch).accuracy
        split = data.train if train is None else train
        train_ra = score(forward, split, attack, seed=seed, on_batch=on_batch).accuracy
    return FinalScores(test_sa, test_ra, train_ra, train_ra - test_ra)
