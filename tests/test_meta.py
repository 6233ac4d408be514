"""A whole training step on the meta device, whose tensors have no values: nothing waits for a
value, and no host tensor mixes with the device's."""

import contextlib

import pytest
import torch

from data import Batch
from models import build_model
from sparse_core import Masking, MaskingConfig
from utils import attacks
from utils.attacks import PGD
from utils.execution.forward import Forward
from utils.training.engine import train_step
from utils.training.losses import LOSSES, Options

META = torch.device("meta")
NETWORKS = {
    "resnet18": {"width": 0.125},
    "resnet50": {"width": 0.125},
    "vgg16": {"width": 0.125},
    "wideresnet": {"depth_factor": 10, "width_factor": 1},
}


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """The meta device has no autocast, not even a disabled one."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: contextlib.nullcontext())


def batch(n=8):
    labels = torch.zeros(n, dtype=torch.int64, device=META)
    return Batch(torch.zeros(n, 3, 32, 32, device=META), labels, labels)


def stepping(arch, attack, **options):
    model = build_model(arch, 10, **NETWORKS[arch]).to(META, memory_format=torch.channels_last)
    # skip the one intended wait: the range check of a network's first images
    attacks._range_checked.add(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=True)
    computed = Forward(model)

    def step(**further):
        return train_step(
            model,
            optimizer,
            batch(),
            attack=attack,
            attack_training=True,
            key=(1, "attack", 0),
            forward=computed,
            **options,
            **further,
        )

    return model.train(), optimizer, step


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("arch", NETWORKS)
def test_a_step_never_looks_at_a_value(arch, norm):
    model, _, step = stepping(arch, PGD(0.03, 0.01, 2, norm))
    for _ in range(2):
        done = step()
    assert (done.loss.device, done.right.device) == (META, META)
    assert done.loss_of(model).device == META
    assert all(parameter.grad.device == META for parameter in model.parameters())


@pytest.mark.parametrize("remedy", ["trades", "smoothing", "awp", "n-fgsm"])
def test_nor_does_a_remedy(remedy):
    attack = attacks.n_fgsm(0.03) if remedy == "n-fgsm" else PGD(0.03, 0.01, 2)
    options = {"awp": 0.01} if remedy == "awp" else {}
    if remedy == "trades":
        attack = PGD(0.03, 0.01, 2, loss="kl", start="gaussian")
        options = {"loss": LOSSES["trades"], "options": Options(6.0)}
    if remedy == "smoothing":
        options = {"options": Options(label_smoothing=0.1)}
    _, _, step = stepping("resnet18", attack, **options)
    assert step().loss.device == META


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("arch", NETWORKS)
def test_masks_wait_at_updates_alone(arch, growth, adaptive, monkeypatch):
    """Nothing waits between mask updates; only counting live weights does, at the start and at
    updates."""
    monkeypatch.setattr(Masking, "live_counts", lambda self: dict.fromkeys(self.masks, 1))
    model, optimizer, step = stepping(arch, PGD(0.03, 0.01, 1))
    names = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    masks = {
        name: torch.ones(value.shape, dtype=torch.bool)
        for name, value in model.named_parameters()
        if name in names
    }
    config = MaskingConfig(0.5, 100, growth=growth, adaptive=adaptive, update_frequency=10)
    masking = Masking(model, optimizer, config, masks=masks)
    for _ in range(3):
        step(masks=masking.masks)
        masking.step()
    assert masking.steps == 3
