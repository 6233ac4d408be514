"""Accuracy on clean and on attacked images, and the figures that end a run (SPEC 8)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch, Data, Split, plain_batches
from utils.attacks import PGD, attack_draws, in_mode
from utils.distributed import ALONE, World
from utils.errors import InputError
from utils.forward import Execution, Forward

_AUTOATTACK_CLASSES = 4
EVAL_BATCH = 256  # fixed, so that a saved model gives the same digits whatever it was trained with

OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """``accuracy`` in percent and mean cross-entropy ``loss`` over ``images`` images."""

    accuracy: float
    loss: float
    images: int


@dataclass(frozen=True)
class FinalScores:
    """The reported figures of one network, in percent: ``robust_gap`` is RA on un-augmented training images minus test RA."""

    test_sa: float
    test_ra: float
    train_ra: float
    robust_gap: float


def evaluate(
    model: nn.Module,
    split: Split,
    attack: PGD | None = None,
    *,
    seed: int = 1,
    forward: Forward | None = None,
    on_batch: OnBatch = lambda images: None,
) -> Score:
    """Accuracy in eval mode on a split, clean or attacked; the network's modes are left as found.

    The random start of each image depends on ``seed`` and its index alone, so the same network has the same score
    in every epoch and at the end. Several processes share the batches, and have the score of one process to the bit.

    Args:
        forward: how the network is computed, and by which processes; plainly in float32 and alone by default.
        on_batch: called after each batch, of several processes after each round of batches, with the images in it.
    """
    forward = Forward(model) if forward is None else forward
    world = forward.world
    batches = math.ceil(len(split) / EVAL_BATCH)
    right_and_loss = torch.zeros(2, batches, dtype=torch.float64, device=split.device)
    mine = plain_batches(split, EVAL_BATCH, world)
    with in_mode(model, False), torch.no_grad():
        for first in range(0, batches, world.size):
            batch = next(mine, None)
            if batch is not None:
                right_and_loss[:, first + world.rank] = _right_and_loss(forward, batch, attack, seed)
            on_batch(min(len(split), (first + world.size) * EVAL_BATCH) - first * EVAL_BATCH)
    # A column is of one process, so the sum over processes adds zeros: it is exact, and then in the order of one process.
    right, loss = world.total(right_and_loss).sum(dim=1).tolist()
    return Score(100.0 * right / len(split), loss / len(split), len(split))


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
    """What is measured after an epoch, by the names it has in ``metrics.jsonl``: ``val_sa``, ``val_ra``, ``val_loss`` (the mean
    robust loss), ``test_sa`` and ``test_ra``; accuracies in percent.

    Args:
        parts: ``val``, ``test`` or both.
    """
    scores: dict[str, float] = {}
    for part, split in (("val", data.val), ("test", data.test)):
        if part in parts:
            robust = evaluate(model, split, attack, seed=seed, forward=forward, on_batch=on_batch)
            scores |= {f"{part}_sa": evaluate(model, split, forward=forward).accuracy, f"{part}_ra": robust.accuracy}
            scores |= {"val_loss": robust.loss} if part == "val" else {}
    return scores


def final_scores(
    model: nn.Module, data: Data, attack: PGD, *, seed: int, world: World = ALONE, on_batch: OnBatch = lambda images: None
) -> FinalScores:
    """The reported figures, in full float32; several processes share the work."""
    forward = Forward(model, Execution(world=world))
    with full_precision():
        test_sa = evaluate(model, data.test, forward=forward).accuracy
        test_ra = evaluate(model, data.test, attack, seed=seed, forward=forward, on_batch=on_batch).accuracy
        train_ra = evaluate(model, data.train, attack, seed=seed, forward=forward, on_batch=on_batch).accuracy
    return FinalScores(test_sa, test_ra, train_ra, train_ra - test_ra)


def auto_attack(model: nn.Module, split: Split, attack: PGD, *, seed: int) -> Score:
    """The standard AutoAttack (Croce and Hein, 2020) by pyautoattack within ``attack``'s ball: an image counts as
    right only if it withstands all four attacks."""
    from pyautoattack import AutoAttack

    batches = list(plain_batches(split, EVAL_BATCH))
    with in_mode(model, False), torch.no_grad():
        classes = model(batches[0].x[:1]).shape[1]
    if classes < _AUTOATTACK_CLASSES:
        raise InputError(f"AutoAttack's targeted losses need at least {_AUTOATTACK_CLASSES} classes and the network has {classes}")
    x, y = torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])
    with in_mode(model, False), full_precision():
        library = AutoAttack(
            model, norm={"linf": "Linf", "l2": "L2"}[attack.norm], eps=attack.eps, version="standard", seed=seed, device=split.device
        )
        # Its nine targets a class assume ten classes.
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = min(9, classes - 1)
        adversarial, _ = library.run_standard_evaluation(x.contiguous(), y, batch_size=EVAL_BATCH)
        with torch.no_grad():
            logits = torch.cat([model(part) for part in adversarial.split(EVAL_BATCH)])
    accuracy = 100.0 * (logits.argmax(dim=1) == y).double().mean().item()
    return Score(accuracy, F.cross_entropy(logits, y).item(), len(split))


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Float32 without TF32, and the same kernels every time, for a while; whatever the training used."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
