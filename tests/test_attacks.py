import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from tests import toy
from utils.attacks import PGD, attack_draws, margin, pgd_attack
from utils.compat import import_advertorch

LINF = PGD(8 / 255, 2 / 255, 10, random_start=False)
L2 = PGD(128 / 255, 15 / 255, 10, "l2", random_start=False)


def oracle_network(arrays) -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    names = [name for name in arrays.files if name.startswith("p_")]
    with torch.no_grad():
        for parameter, name in zip(network.parameters(), names, strict=True):
            parameter.copy_(torch.from_numpy(arrays[name]))
    return network


@pytest.mark.parametrize(("attack", "expected"), [(LINF, "adv_linf"), (L2, "adv_l2")])
def test_equals_the_oracle(attack, expected, golden):
    arrays = np.load(golden / "pgd.npz")
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]).long()
    adversarial = pgd_attack(oracle_network(arrays), x, y, attack)
    close = (adversarial - torch.from_numpy(arrays[expected])).abs() <= 1e-5
    assert close.double().mean() >= 0.999


@pytest.mark.parametrize(("attack", "theirs"), [(LINF, "LinfPGDAttack"), (L2, "L2PGDAttack")])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_advertorch_on_random_networks(attack, theirs, seed):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)
    ).eval()
    x, y = toy.images(16, 4, seed)
    yardstick = getattr(import_advertorch(), theirs)(
        network,
        nn.CrossEntropyLoss(reduction="sum"),
        attack.eps,
        attack.steps,
        attack.step_size,
        rand_init=False,
        clip_min=0.0,
        clip_max=1.0,
    )
    close = (pgd_attack(network, x, y, attack) - yardstick.perturb(x, y)).abs() <= 1e-5
    assert close.double().mean() >= 0.999


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stays_in_the_ball_and_in_the_pixel_range(norm):
    attack = PGD(0.3, 0.2, 7, norm)
    x, y = toy.images(20)
    draws = attack_draws(attack, torch.arange(20), x.shape[1:], 1, "attack", 0)
    offset = pgd_attack(toy.network(), x, y, attack, draws=draws) - x
    size = offset.abs().amax(dim=(1, 2, 3)) if norm == "linf" else offset.flatten(1).norm(dim=1)
    assert size.max() <= 0.3 + 1e-6
    assert size.min() > 0.1
    assert (x + offset).min() >= 0
    assert (x + offset).max() <= 1 + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_fills_the_ball(norm):
    attack = PGD(0.1, 0.0, 0, norm)
    x = torch.full((2000, 1, 2, 2), 0.5)
    draws = attack_draws(attack, torch.arange(2000), x.shape[1:], 1)
    offset = (
        pgd_attack(nn.Identity(), x, torch.zeros(2000, dtype=torch.long), attack, draws=draws) - x
    ).flatten(1)
    if norm == "linf":
        assert offset.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.03)
    else:  # (radius / eps) ** dimension is uniform
        ratio = (offset.norm(dim=1) / 0.1) ** 4
        assert ratio.mean().item() == pytest.approx(0.5, abs=0.03)
    assert offset.mean().abs() < 0.005


def test_an_image_has_its_start_whatever_its_batch():
    attack = PGD(0.1, 0.1, 1)
    shape = torch.Size((3, 8, 8))
    whole = attack_draws(attack, torch.arange(10), shape, 1, "attack", 2)
    part = attack_draws(attack, torch.tensor([7, 3]), shape, 1, "attack", 2)
    assert torch.equal(part, whole[[7, 3]])
    assert not torch.equal(whole, attack_draws(attack, torch.arange(10), shape, 1, "attack", 3))


def test_leaves_no_gradients_modes_or_flags_behind():
    network = toy.network()
    network[1].eval()  # mixed train and eval modes
    network[5].weight.requires_grad_(False)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    x, y = toy.images()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = pgd_attack(network, x, y, LINF, training=False)
    assert not result.requires_grad
    assert not x.requires_grad
    assert [module.training for module in network] == [True, False, True, True, True, True]
    assert not network[5].weight.requires_grad
    assert network[0].weight.requires_grad
    assert torch.equal(network[0].weight.grad, torch.ones_like(network[0].weight))
    assert network[5].bias.grad is None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_train_mode_moves_batch_norm_once_a_step_and_eval_mode_never():
    x, y = toy.images()
    network = toy.network()
    pgd_attack(network, x, y, LINF, training=True)
    assert network[1].num_batches_tracked == LINF.steps
    pgd_attack(network, x, y, LINF, training=False)
    assert network[1].num_batches_tracked == LINF.steps


def test_works_under_no_grad_and_with_frozen_networks():
    network = toy.network().requires_grad_(False)
    x, y = toy.images()
    with torch.no_grad():
        assert not torch.equal(pgd_attack(network, x, y, LINF), x)


def test_does_not_depend_on_the_batch_size():
    network = toy.network().eval()
    x, y = toy.images()
    whole = pgd_attack(network, x, y, LINF)
    parts = torch.cat(
        [pgd_attack(network, x[i : i + 1], y[i : i + 1], LINF) for i in range(len(x))]
    )
    assert (whole - parts).abs().max() < 1e-5


def test_an_l2_attack_without_gradient_stays_finite():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    nn.init.zeros_(network[1].weight)
    x, y = toy.images()
    assert torch.equal(pgd_attack(network, x, y, L2), x)


def test_margin_is_the_best_wrong_logit_minus_the_true_one():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    assert margin(logits, torch.tensor([0, 2])).item() == (2 - 3) + (5 - 1)


def test_margin_attack_finds_wrong_answers():
    network = toy.network().eval()
    x, y = toy.images(60)
    y = network(x).argmax(dim=1)
    adversarial = pgd_attack(network, x, y, PGD(0.3, 0.05, 20, random_start=False, loss="margin"))
    assert (network(adversarial).argmax(dim=1) == y).double().mean() < 0.5


@pytest.mark.parametrize(
    "options", [{"norm": "l1"}, {"loss": "dlr"}, {"start": "far"}, {"eps": -1.0}, {"steps": -1}]
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match=r"unknown|negative"):
        PGD(**{"eps": 0.1, "step_size": 0.1, "steps": 1, **options})


def test_draws_and_random_start_go_together():
    x, y = toy.images()
    with pytest.raises(ValueError, match="draws"):
        pgd_attack(toy.network(), x, y, PGD(0.1, 0.1, 1, random_start=True))


@pytest.mark.parametrize(("attack", "theirs"), [(LINF, "LinfPGDAttack"), (L2, "L2PGDAttack")])
@pytest.mark.parametrize("targeted", [False, True])
def test_inputs_of_any_shape_and_targets_equal_advertorch(attack, theirs, targeted):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).eval()
    x, y = torch.rand(16, 20), torch.arange(16) % 4
    targets = (y + 1) % 4
    loss = nn.CrossEntropyLoss(reduction="sum")
    kept = {"rand_init": False, "clip_min": 0.0, "clip_max": 1.0, "targeted": targeted}
    yardstick = getattr(import_advertorch(), theirs)(
        network, loss, attack.eps, attack.steps, attack.step_size, **kept
    )
    ours = pgd_attack(network, x, y, attack, targets=targets if targeted else None)
    assert (ours - yardstick.perturb(x, targets if targeted else y)).abs().max() <= 1e-5
    assert (ours - x).abs().max() > 0


def test_a_frozen_batch_norm_keeps_its_statistics_in_a_model_that_trains():
    model = toy.network().train()
    model[1].eval()
    before = model[1].running_mean.clone()
    pgd_attack(model, *toy.images(), LINF, training=True)
    assert torch.equal(model[1].running_mean, before)
    assert (model.training, model[1].training) == (True, False)


def test_inference_mode_is_refused_with_what_helps():
    x, y = toy.images()
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        pgd_attack(toy.network(), x, y, LINF)


MEAN, STD = (
    torch.tensor(values).view(1, 3, 1, 1) for values in ([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: (x - MEAN) / STD,
            (
                r"in \[0, 1\], and these are from -2 to 2\.\d+; divide 0\.\.255 by 255, and let the"
                r" model itself"
            ),
        ),
        (lambda x: 255 * x, r"from 0\.\d+ to 25\d"),
        (
            lambda x: (255 * x).to(torch.uint8),
            r"floating images in \[0, 1\], not torch.uint8; divide",
        ),
        (lambda x: x - 0.5, r"from -0\.\d+ to 0\.\d+"),
        (lambda x: x / 0, r"inf"),
        (lambda x: x * float("nan"), r"nan"),
    ],
)
@pytest.mark.parametrize("attack", [LINF, L2])
def test_images_outside_the_pixel_range_are_refused_in_one_line(change, message, attack):
    model, (x, y) = toy.network(), toy.images()
    for _ in range(2):  # a refused network is checked again
        with pytest.raises(ValueError, match=message) as refusal:
            pgd_attack(model, change(x), y, attack)
        assert "\n" not in str(refusal.value)
    assert pgd_attack(model, x, y, attack).shape == x.shape


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x - x.min() - 1e-6,
        lambda x: x / x.max() + 1e-6,
        lambda x: x.round(),
        lambda x: x[:0],
    ],
)
def test_images_a_hair_outside_the_pixel_range_are_fine(change):
    x, y = toy.images()
    x = change(x)
    adversarial = pgd_attack(toy.network(), x, y[: len(x)], LINF)
    assert ((adversarial >= 0) & (adversarial <= 1)).all()


def test_the_range_is_looked_at_once_for_each_network_and_keeps_none_alive(monkeypatch):
    looks = []
    monkeypatch.setattr(
        torch.Tensor, "aminmax", lambda x, look=torch.Tensor.aminmax: looks.append(1) or look(x)
    )
    (one, other), (x, y) = (toy.network(), toy.network()), toy.images()
    for model in (one, one, other, one, other):
        pgd_attack(model, x, y, LINF)
    assert len(looks) == 2
    assert list(vars(one)) == list(vars(toy.network()))
    gone = weakref.ref(one)
    del one, model
    gc.collect()
    assert gone() is None


def test_a_compiled_attack_does_not_look_at_the_range(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "aminmax", None)
    model, (x, y) = toy.network(), toy.images()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert pgd_attack(model, x, y, LINF).shape == x.shape
