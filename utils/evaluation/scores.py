"""Accuracy on clean and on attacked images, and the figures that end a run."""

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
from utils.attacks import LOSSES, PGD, AutoAttack, attack_draws
from utils.evaluation.sanity import LOOKED_AT, SILENT_SHARE, images_without_gradient
from utils.evaluation.trials import (
    EVAL_BATCH,
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

    The random start of each image depends on ``seed`` and its index alone, so the same network has
    the same score in every epoch and at the end. Several processes share the batches, and have the
    score of one process to the bit.

    Args:
        attack: one PGD attack, or the whole of AutoAttack, which is always computed in float32.
        restarts: random starts of PGD; an image counts as right if it withstands them all. More
            than one is computed in float32.
        forward: how the network is computed, and by which processes; plainly in float32 and alone
            by default.
        on_batch: called after each batch, of several processes after each round of batches, with
            the images in it.

    Warns:
        UserWarning: PGD's loss has no gradient at many of some images, so that the accuracy says
            little of the network's robustness.

    Raises:
        InputError: the network passes no gradient to its images or one that is not finite, and PGD
            needs it; AutoAttack of fewer than four classes.
        ValueError: restarts without PGD.
    """
    forward = Forward(model) if forward is None else forward
    # in which the attack says what is wrong
    if isinstance(attack, PGD) and attack.steps and not torch.is_inference_mode_enabled():
        _look_at_gradients(forward, split, attack)
    return score(forward, split, attack, seed=seed, restarts=restarts, on_batch=on_batch)


def _look_at_gradients(forward: Forward, split: Split, attack: PGD) -> None:
    if attack.loss == "kl":  # which has none at the image itself, where this looks
        return
    indices = split.spread(LOOKED_AT)
    with in_mode(forward.model, False), full_precision():
        images = to_float(split.rows(indices))
        silent = images_without_gradient(
            forward.model, images, split.labels[indices], LOSSES[attack.loss]
        )
    if silent > SILENT_SHARE * len(indices) and forward.world.is_first:
        counted = (
            f"the attack's loss ({attack.loss}) has no gradient at {silent} of {len(indices)}"
            " images looked at"
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
    """``evaluate`` without its look at the network, for a training, which measures after every
    epoch."""
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
    # A column is of one process, so the sum over processes adds zeros: it is exact, and then in the
    # order of one process.
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
    if attack is None:
        raise ValueError("restarts need an attack")
    if isinstance(attack, AutoAttack):
        if restarts > 1:
            raise ValueError("restarts have no effect on AutoAttack, which has its own")
        trials = [
            clean_trial(),
            *autoattack_trials(
                forward.model, attack, _classes(forward.model, split), split.device, seed
            ),
        ]
    else:
        trials = pgd_trials(forward.model, attack, seed, restarts=restarts)
    outcomes = run_trials(
        forward.model,
        {"test": split},
        trials,
        world=forward.world,
        on_round=lambda trial, images: on_batch(images),
    )
    return Score(outcomes.accuracy(trials[-1]), math.nan, len(split))


def _classes(model: nn.Module, split: Split) -> int:
    with in_mode(model, False), torch.no_grad():
        return model(next(plain_batches(split, 2)).x).shape[1]


def _right_and_loss(forward: Forward, batch: Batch, attack: PGD | None, seed: int) -> Tensor:
    """Right answers and summed cross-entropy on one batch, float64 ``[2]``."""
    x = batch.x
    if attack is not None:
        draws = attack_draws(attack, batch.indices, x.shape[1:], seed, "evaluate")
        x = forward.attack(x, batch.y, attack, training=False, draws=draws)
    logits = forward(x)
    loss = F.cross_entropy(logits, batch.y, reduction="sum")
    return torch.stack([(logits.argmax(dim=1) == batch.y).sum().double(), loss.double()])


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
    """What is measured after an epoch, by the names it has in ``metrics.jsonl``: ``val_sa``,
    ``val_ra``, ``val_loss`` (the mean robust loss), ``test_sa`` and ``test_ra``; accuracies in
    percent.

    Args:
        parts: ``val``, ``test`` or both.
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
    """The reported figures, in full float32, with the RA of the training images in ``train`` (all
    by default); several processes share the work."""
    forward = Forward(model, Execution(world=world))
    with full_precision():
        test_sa = score(forward, data.test).accuracy
        test_ra = score(forward, data.test, attack, seed=seed, on_batch=on_batch).accuracy
        split = data.train if train is None else train
        train_ra = score(forward, split, attack, seed=seed, on_batch=on_batch).accuracy
    return FinalScores(test_sa, test_ra, train_ra, train_ra - test_ra)
