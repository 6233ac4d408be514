"""How long a run will take: the passes it makes over images, and what a pass costs on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from data import Batch, Data, TrainLoader
from utils.attacks import PGD
from utils.config import CommonSettings
from utils.config_adv import AdversarialSettings
from utils.config_rb import TicketSettings
from utils.engine import Plan, sgd, train_step
from utils.forward import Execution, Forward, best_precision
from utils.network import build_network, network_spec

# In forward passes: an attack's step is one there and one back to the image, an update there and back to image and weights.
_ATTACK_STEP, _UPDATE = 2, 3
_SECONDS = 2.0  # of measuring, after which one step more is not taken


@dataclass(frozen=True)
class Images:
    """How many there are to train, validate and test on."""

    train: int
    val: int
    test: int


def images_of(data: Data) -> Images:
    return Images(len(data.train), len(data.val), len(data.test))


def trainings(settings: CommonSettings) -> list[tuple[Plan, bool]]:
    """The stages of a run, each with whether attacked images are looked at after its epochs."""
    if isinstance(settings, AdversarialSettings):
        return [(settings.training, True)]
    assert isinstance(settings, TicketSettings)
    first = [] if settings.stage1_pretrained is not None else [(settings.plan1, settings.stage1_ra)]
    return [*first, (settings.plan2, True)]


def image_passes(settings: CommonSettings, images: Images) -> float:
    """Forward passes of single images (or what costs as much) in a whole run, stage 1 of Robust Bird at its longest."""
    test = _looked_at(settings.test_attack)
    total = 0.0
    for plan, attacked in trainings(settings):
        epochs = plan.epochs * images.train * (_UPDATE + _ATTACK_STEP * plan.attack_steps)
        validated, tested = plan.epochs / settings.eval_every * images.val, plan.epochs / settings.test_every * images.test
        total += epochs + ((validated + tested) * test if attacked else plan.epochs * images.val)
    # The best and the final model on test and training images, in float32, which takes about twice as long as bf16.
    return total + 2 * 2 * test * (images.train + images.test)


def _looked_at(attack: PGD) -> int:
    """Passes to look at an image clean and attacked."""
    return 2 + _ATTACK_STEP * attack.steps


def seconds_per_pass(settings: CommonSettings, data: Data, device: torch.device) -> float:
    """Measured on training steps of the dense network with a short attack, after one to warm up: the fastest of at most three, since
    whatever else runs can only slow them. Nothing is compiled."""
    plan = trainings(settings)[-1][0]
    model = build_network(network_spec(settings, data), device, settings.seed)
    optimizer = sgd(model, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    precision = best_precision(device) if settings.precision == "auto" else settings.precision
    forward = Forward(model, Execution(precision, graphs=False))
    batch = next(TrainLoader(data.train, settings.batch_size, data.augmentation, settings.seed).epoch(0))
    attack = PGD(settings.train_eps / 255, 1 / 255, 1, settings.norm, random_start=False)

    def step(batch: Batch) -> None:
        train_step(model, optimizer, batch, attack=attack, attack_training=plan.attack_training, key=(0,), forward=forward)
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
    """In the unit that fits: ``40 s``, ``12 min``, ``3.5 h``, ``2.1 days``."""
    for limit, unit, size in ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 86400:.1f} days"
