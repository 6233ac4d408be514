import dataclasses

import pytest
import torch
from torch import nn

from tests import toy
from tests.test_trials import fitted
from utils.attacks import PGD
from utils.evaluation.command import gradient_masking as diagnosis
from utils.evaluation.trials import clean_trial, run_trials

ATTACK = PGD(22 / 255, 5.5 / 255, 20)


def looked_at(model, split, attack=ATTACK):
    trials = [clean_trial(), *diagnosis.trials(model, attack, seed=1)]
    outcomes = run_trials(model, {"test": split}, trials)
    accuracies = {trial.name: outcomes.accuracy(trial) for trial in trials}
    return accuracies, diagnosis.signs(model, split, attack, 1, accuracies)


def suspicious(signs):
    return [sign.question for sign in signs.found if sign.suspicious]


class Masked(nn.Module):
    """A network whose gradient is noise: pixels are rounded and a fast wave is added to logits."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        wave = 1e-3 * torch.sin(x.flatten(1) * 1e4).sum(1, keepdim=True)
        hidden = self.inner((x * 64).round() / 64)
        return hidden + wave * torch.arange(hidden.shape[1])


def test_an_honest_network_has_no_sign():
    model, split = fitted(n=40)
    accuracies, signs = looked_at(model, split)
    assert accuracies["clean"] == accuracies["noise"] == 100.0 > accuracies["PGD-20"]
    assert accuracies["PGD-20 in 0.5 eps"] >= accuracies["PGD-20"] >= accuracies["PGD-20 in 2 eps"]
    assert suspicious(signs) == []
    assert "no sign of gradient masking" in diagnosis.text(signs)[-1]
    # The network is linear: the loss rises along the gradient, and more than across it.
    assert signs.surface[-1][0] > signs.surface[0][-1]


def test_a_masked_network_has_signs():
    model, split = fitted(n=40)
    _, signs = looked_at(Masked(model), split)
    assert {
        "does the loss rise along the gradient?",
        "do many images survive a large ball?",
    } <= set(suspicious(signs))
    assert "do not trust its RA" in diagnosis.text(signs)[-1]
    assert any(line.startswith("SUSPICIOUS") for line in diagnosis.text(signs))


FINE = {"clean": 80.0, "noise": 79.0, "one step": 52.0, "PGD-20": 50.0, "PGD-100": 49.5}
FINE |= {f"PGD-20, steps of {part:g} eps": 50.0 for part in diagnosis.STEP_SIZES} | {
    f"PGD-20 in {r:g} eps": 0.0 for r in diagnosis.RADII
}


@pytest.mark.parametrize(
    ("change", "question"),
    [
        ({"one step": 40.0}, "does one step find more than many?"),
        ({"PGD-100": 45.0}, "do more steps keep finding more?"),
        ({"PGD-20, steps of 0.5 eps": 40.0}, "does another step size find more?"),
        ({"PGD-20 in 16 eps": 30.0}, "do many images survive a large ball?"),
        ({"noise": 60.0}, "is noise over half as strong as PGD?"),
    ],
)
def test_each_sign_fires(change, question):
    model, split = fitted(n=6)
    many = split.subset(torch.arange(6).repeat(20))
    assert suspicious(diagnosis.signs(model, many, ATTACK, 1, FINE)) == []
    assert suspicious(diagnosis.signs(model, many, ATTACK, 1, {**FINE, **change})) == [question]


def test_two_of_a_few_images_are_no_sign():
    model, split = fitted(n=6)
    changed = FINE | {"PGD-100": 30.0, "PGD-20, steps of 0.5 eps": 25.0}
    assert suspicious(diagnosis.signs(model, split, ATTACK, 1, changed)) == []


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_lies_on_the_surface(norm):
    _, split = fitted(n=6)
    split.images.fill_(128)  # far from black and white, so that nothing is clipped
    from data import plain_batches

    batch = next(plain_batches(split, 6))
    attack = dataclasses.replace(ATTACK, norm=norm, random_start=False)
    offset = (diagnosis._noise(batch, attack, 1) - batch.x).flatten(1)
    size = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1)
    assert torch.allclose(size, torch.full_like(size, ATTACK.eps), rtol=1e-4)


def test_the_picture_shows_every_series():
    model, split = fitted(n=6)
    accuracies, signs = looked_at(model, split)
    axes = diagnosis.figure(ATTACK, accuracies, signs).axes
    assert [len(ax.lines[0].get_xdata()) for ax in axes[:3]] == [5, 6, 6]
    assert axes[3].images[0].get_array().shape == (9, 9)


def test_the_network_is_left_as_it_was():
    model, split = toy.network(), toy.split(8)
    diagnosis.signs(model, split, ATTACK, 1, FINE)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
