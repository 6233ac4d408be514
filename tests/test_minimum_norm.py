"""FMN against closed-form distances and against PGD."""

import math

import pytest
import torch
from torch import nn

from models import build_model
from utils.attacks import PGD, pgd_attack
from utils.minimum_norm import FMN, _candidates, minimum_norm, tuned


class Linear(nn.Module):
    """Logits that are linear in the pixels."""

    def __init__(self, classes, pixels):
        super().__init__()
        self.layer = nn.Linear(pixels, classes)

    def forward(self, x):
        return self.layer(x.flatten(1))


def linear(classes=2, seed=1):
    torch.manual_seed(seed)
    model = Linear(classes, 3 * 4 * 4).double()
    x = 0.4 + 0.2 * torch.rand(32, 3, 4, 4, dtype=torch.float64)  # far from the edge of the box
    return model, x, model(x).argmax(1)


def boundary_distance(model, x, y):
    """Smallest linf distance to another class of a linear network: the logits' difference over the
    l1 norm of the weights' difference."""
    weight, logits = model.layer.weight, model(x)
    wrong = torch.arange(weight.shape[0])[None].repeat(len(x), 1)
    lead = logits.gather(1, y[:, None]) - logits
    norm = (weight[y][:, None] - weight[wrong]).abs().sum(dim=2)
    return torch.where(norm > 0, lead / norm, math.inf).amin(dim=1)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_finds_the_distance_to_the_boundary_of_a_linear_network(classes):
    model, x, y = linear(classes)
    adversarial, distance = minimum_norm(model, x, y, FMN(200, step_size=0.3))
    expected = boundary_distance(model, x, y)
    assert (distance >= expected - 1e-12).all()
    ratio = distance / expected
    # among ten classes, a descent may end at the boundary to a class that is not the closest
    assert (ratio < 1.002).sum() >= (32 if classes < 10 else 30)
    assert ratio.max() < 1.2
    assert ((adversarial - x).flatten(1).abs().amax(1) - distance).abs().max() < 1e-12
    assert (model(adversarial).argmax(1) != y).float().mean() > 0.9  # a tie counts as fooled


def test_misclassified_images_are_at_distance_zero_and_hopeless_ones_at_infinity():
    model, x, y = linear()
    adversarial, distance = minimum_norm(model, x, 1 - y, FMN(5))
    assert torch.equal(adversarial, x)
    assert not distance.any()
    with torch.no_grad():
        model.layer.weight.zero_()
        model.layer.bias.copy_(torch.tensor([1.0, 0.0]))
    adversarial, distance = minimum_norm(model, x, torch.zeros_like(y), FMN(5))
    assert torch.equal(adversarial, x)
    assert distance.isinf().all()


def test_images_stay_in_the_box_and_answers_do_not_depend_on_the_batch():
    model = build_model("resnet18", 10, width=0.0625, seed=2).eval()
    x = torch.rand(6, 3, 8, 8).round()  # black and white: at the edge of the box
    y = model(x).argmax(1)
    adversarial, distance = minimum_norm(model, x, y, FMN(20))
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert distance.isfinite().all()
    assert (distance > 0).all()
    halves = [minimum_norm(model, x[part], y[part], FMN(20))[1] for part in (slice(3), slice(3, 6))]
    assert torch.allclose(torch.cat(halves), distance, rtol=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_tuned_attack_is_no_weaker_than_pgd():
    """Within the same radius, FMN fools as many images as PGD, up to 4 %."""
    model, x, y = toy_network()
    attack = tuned(model, x, y, seed=1, trials=8, steps=20)
    assert attack == tuned(model, x, y, seed=1, trials=8, steps=20)
    _, distance = minimum_norm(model, x, y, FMN(100, attack.step_size, attack.momentum))
    eps = distance.median().item()
    fooled = model(pgd_attack(model, x, y, PGD(eps, eps / 10, 40, random_start=False))).argmax(1)
    assert (distance <= eps).float().mean() >= (fooled != y).float().mean() - 0.04


def toy_network():
    """A small network, trained briefly so that its gradients mean something."""
    torch.manual_seed(0)
    images = torch.rand(128, 1, 8, 8)
    labels = (images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))).long() + 0
    model = build_model("resnet18", 3, mean=[0.5], std=[0.25], width=0.0625, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    return model, images[:64], labels[:64]


def test_the_search_looks_at_images_that_are_classified_correctly():
    """Most are misclassified, and at distance 0 whatever the attack."""
    model, x, y = linear(classes=3)
    labels = torch.where(torch.arange(len(y)) < 24, (y + 1) % 3, y)
    options = {"seed": 1, "trials": 8, "steps": 20}
    assert tuned(model, x, labels, **options) == tuned(model, x[24:], y[24:], **options)
    found = [
        minimum_norm(model, x[24:], y[24:], attack)[1].median().item()
        for attack in _candidates(1, 8, 20)
    ]
    _, distance = minimum_norm(model, x[24:], y[24:], tuned(model, x, labels, **options))
    assert distance.median().item() == min(found) < max(found)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"step_size": 0.0}, {"momentum": 1.0}])
def test_settings_without_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match="FMN needs"):
        FMN(**wrong)
