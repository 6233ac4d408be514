"""Losses, weight perturbation and averages against references written from their papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_core import Masking, MaskingConfig
from tests import toy
from tests.test_resume import only_run
from utils.attacks import PGD, attack_draws, n_fgsm, pgd_attack
from utils.storage.checkpoint import load_checkpoint
from utils.storage.run_folder import read_epochs, read_summary
from utils.training.averages import EpochAverage, ExponentialAverage
from utils.training.losses import LOSSES, Options
from utils.training.weight_perturbation import perturbed_weights


def two_layers():
    """Logits of an image [a, b]: ReLU of a first layer, times a second; float64."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    model.double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [0.5, 2.0]]))
        model[2].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    return model


CLEAN = torch.tensor([[1.0, 0.5]], dtype=torch.float64)  # hidden (0.5, 1.5), logits (1, 1.5)
ATTACKED = torch.tensor([[0.5, 0.25]], dtype=torch.float64)  # half of it: logits (0.5, 0.75)
Y = torch.tensor([0])


def by_hand(a, b):
    """Probabilities of two logits."""
    return math.exp(a) / (math.exp(a) + math.exp(b)), math.exp(b) / (math.exp(a) + math.exp(b))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_of_the_attacked_images_and_smoothed(smoothing):
    loss, logits = LOSSES["ce"].compute(
        two_layers(), CLEAN, ATTACKED, Y, Options(label_smoothing=smoothing)
    )
    p = by_hand(0.5, 0.75)
    expected = -(1 - smoothing / 2) * math.log(p[0]) - smoothing / 2 * math.log(p[1])
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert logits.tolist() == [[0.5, 0.75]]


def test_trades_is_the_clean_loss_and_the_divergence():
    loss, _ = LOSSES["trades"].compute(two_layers(), CLEAN, ATTACKED, Y, Options(beta=6.0))
    p, q = by_hand(1.0, 1.5), by_hand(0.5, 0.75)
    divergence = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    assert loss.item() == pytest.approx(-math.log(p[0]) + 6 * divergence, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_the_losses_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, x_adv = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    y = torch.tensor([0, 2, 1])

    def loss(weight):
        def network(images):
            return torch.func.functional_call(model, {"0.weight": weight}, images)

        options = Options(LOSSES[name].beta or 0.0, label_smoothing=0.1)
        return LOSSES[name].compute(network, x, x_adv, y, options)[0]

    assert torch.autograd.gradcheck(loss, (model[0].weight.detach().clone().requires_grad_(),))


def ascent(model, x, y):
    return lambda: F.cross_entropy(model(x), y)


def test_weights_move_by_gamma_along_the_gradient_and_come_back_to_the_bit():
    model = two_layers()
    before = [p.detach().clone() for p in model.parameters()]
    gradients = torch.autograd.grad(ascent(model, ATTACKED, Y)(), list(model.parameters()))
    with perturbed_weights(model, 0.01, ascent(model, ATTACKED, Y)):
        inside = [p.detach().clone() for p in model.parameters()]
        ascent(model, ATTACKED, Y)().backward()
    for w, moved, g in zip(before, inside, gradients, strict=True):
        length = math.sqrt((w**2).sum().item()) / math.sqrt((g**2).sum().item())
        assert torch.allclose(moved, w + 0.01 * length * g, atol=1e-14, rtol=0)
    for parameter, w, moved in zip(model.parameters(), before, inside, strict=True):
        assert torch.equal(parameter, w)
        assert not torch.equal(moved, w)
    # The gradient is that at the moved weights.
    twin = two_layers()
    with torch.no_grad():
        for parameter, moved in zip(twin.parameters(), inside, strict=True):
            parameter.copy_(moved)
    expected = torch.autograd.grad(ascent(twin, ATTACKED, Y)(), list(twin.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_the_ascent_leaves_norms_biases_and_statistics_alone():
    model = toy.network().train()
    x, y = toy.images()
    alone = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() < 2}
    twin = toy.network().train()
    F.cross_entropy(twin(x), y).backward()
    with perturbed_weights(model, 0.01, ascent(model, x, y)):
        assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in alone.items())
        assert int(model[1].num_batches_tracked) == 0
        F.cross_entropy(model(x), y).backward()
    assert int(model[1].num_batches_tracked) == 1
    # The first layer moved, so the statistics are near those of an unmoved one, not the same.
    assert torch.allclose(model[1].running_mean, twin[1].running_mean, atol=1e-2)


def test_weights_come_back_when_the_update_fails():
    model = two_layers()
    before = [p.detach().clone() for p in model.parameters()]
    moved = perturbed_weights(model, 0.1, ascent(model, ATTACKED, Y))
    with pytest.raises(KeyboardInterrupt), moved:
        raise KeyboardInterrupt
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


def test_an_exponential_average_warms_up_and_takes_the_statistics_along():
    model = toy.network().double().train()
    average = ExponentialAverage(model, 0.3)
    expected = {n: v.clone() for n, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = toy.images()
    for step in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
        average.after_step(model, None)
        d = min(0.3, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = d * expected[name] + (1 - d) * value
            else:
                expected[name] = value.clone()
    assert (1 + 5) / (10 + 5) > 0.3 > 3 / 12  # warm within these steps
    for name, value in average.model.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-12, rtol=0), name
    assert not average.model.training


def sparse(**options):
    model = toy.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    config = MaskingConfig(0.3, 50, update_frequency=20, **options)
    return model, optimizer, Masking(model, optimizer, config)


def step_with_perturbation(model, optimizer, masking):
    x, y = toy.images()
    with perturbed_weights(model, 0.01, ascent(model, x, y), masking.masks):
        named = dict(model.named_parameters())
        assert all(not named[name][~mask].any() for name, mask in masking.masks.items())
        ascent(model, x, y)().backward()
    optimizer.step()
    masking.step()


def test_masked_entries_stay_zero_with_perturbation_and_average():
    model, optimizer, masking = sparse()
    average = ExponentialAverage(model, 0.9)
    for _ in range(50):
        step_with_perturbation(model, optimizer, masking)
        average.after_step(model, masking)
        averaged = dict(average.model.named_parameters())
        for name, mask in masking.masks.items():
            assert not masking.weights[name][~mask].any()
            assert not averaged[name][~mask].any()
    assert len(masking.events) == 2


def test_a_weight_that_grows_begins_its_exponential_average_anew():
    model, optimizer, masking = sparse()
    average = ExponentialAverage(model, 0.9)
    for _ in range(20):
        before = {name: mask.clone() for name, mask in masking.masks.items()}
        step_with_perturbation(model, optimizer, masking)
        average.after_step(model, masking)
    for name, mask in masking.masks.items():
        grown = mask & ~before[name]
        assert grown.any()
        averaged = dict(average.model.named_parameters())[name]
        assert torch.equal(averaged[grown], masking.weights[name][grown])


def test_an_average_over_epochs_is_the_mean_since_a_weight_grew():
    model, _, masking = sparse()
    average = EpochAverage(model)
    name = next(iter(masking.masks))
    masks = [mask.clone() for mask in (masking.masks[name],) * 3]
    live, dead = masks[0].nonzero()[0], (~masks[0]).nonzero()[0]
    late, lost = tuple(dead.tolist()), tuple(live.tolist())
    masks[1][late] = True  # grows for the second epoch
    masks[2][late] = True
    masks[2][lost] = False  # is dropped for the third
    seen = []
    for epoch, mask in enumerate(masks):
        masking.masks = {**masking.masks, name: mask}  # as an update does, a new mapping
        average.after_step(model, masking)
        with torch.no_grad():
            masking.weights[name].normal_().mul_(mask)
        seen.append(masking.weights[name].detach().clone())
        average.after_epoch(model, masking)
        assert average.count == epoch + 1
    found = dict(average.model.named_parameters())[name]
    steady = masks[0] & masks[1] & masks[2]
    assert torch.allclose(found[steady], torch.stack(seen).mean(0)[steady], atol=1e-6)
    assert found[late].item() == pytest.approx(((seen[1] + seen[2]) / 2)[late].item(), abs=1e-6)
    assert found[lost].item() == 0


def test_statistics_of_an_average_are_those_of_clean_images():
    model = toy.network()
    average = EpochAverage(model)
    average.after_epoch(model, None)
    x, _ = toy.images(24)
    average.estimate_statistics([x[:12], x[12:]])
    seen = model[0](x)
    expected = seen.unflatten(0, (2, 12)).mean(dim=(1, 3, 4)).mean(0)
    assert torch.allclose(average.model[1].running_mean, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "epochs"])
def test_an_average_that_is_saved_and_loaded_goes_on_to_the_bit(kind):
    def made(model):
        return ExponentialAverage(model, 0.9) if kind == "exponential" else EpochAverage(model)

    def advance(average, model, masking):
        if kind == "exponential":
            average.after_step(model, masking)
        else:
            average.after_epoch(model, masking)

    model, optimizer, masking = sparse()
    whole, first = made(model), made(model)
    for step in range(6):
        step_with_perturbation(model, optimizer, masking)
        advance(whole, model, masking)
        if step < 3:
            advance(first, model, masking)
        elif step == 3:
            second = made(toy.network())
            second.load_state_dict(first.state_dict())
        if step >= 3:
            advance(second, model, masking)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


# ---------------------------------------------------------------- attacks in training


def test_n_fgsm_is_one_step_from_twice_the_radius_without_projection():
    model, (x, y) = toy.network().double(), toy.images()
    x, eps = x.double(), 8 / 255
    attack = n_fgsm(eps)
    draws = attack_draws(attack, torch.arange(len(x)), x.shape[1:], 1, "test")
    found = pgd_attack(model, x, y, attack, draws=draws)
    noisy = (x + (4 * draws - 2) * eps).requires_grad_()
    F.cross_entropy(model.eval()(noisy), y, reduction="sum").backward()
    assert torch.equal(found, (noisy + eps * noisy.grad.sign()).clamp(0, 1).detach())
    farthest = (found - x).abs().max().item()
    assert 2.5 * eps < farthest <= 3 * eps + 1e-12


def test_trades_attack_climbs_the_divergence_from_a_gaussian_start():
    model, (x, y) = toy.network().double(), toy.images()
    x, eps = x.double(), 8 / 255
    attack = PGD(eps, 2 / 255, 3, loss="kl", start="gaussian")
    draws = attack_draws(attack, torch.arange(len(x)), x.shape[1:], 1, "test")
    found = pgd_attack(model, x, y, attack, draws=draws)
    model.eval()
    p = model(x).softmax(1).detach()
    mine = (x + 1e-3 * torch.special.ndtri(draws.double())).clamp(0, 1)
    for _ in range(3):
        mine = mine.detach().requires_grad_()
        (p * (p.log() - model(mine).log_softmax(1))).sum().backward()
        mine = mine.detach() + 2 / 255 * mine.grad.sign()
        mine = torch.minimum(torch.maximum(mine, x - eps), x + eps).clamp(0, 1)
    assert torch.allclose(found, mine, atol=1e-12)


def test_the_update_after_a_perturbation_differs_by_the_gradients_point_alone():
    """w - lr g(w + v), where g is taken at the moved weights and nothing else is moved."""
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [weight.detach().clone() for weight in model.parameters()]
    with perturbed_weights(model, 0.1, ascent(model, ATTACKED, Y)):
        optimizer.zero_grad()
        ascent(model, ATTACKED, Y)().backward()
    optimizer.step()
    twin = two_layers()
    ascent(twin, ATTACKED, Y)().backward()
    with torch.no_grad():
        for weight in twin.parameters():
            weight += 0.1 * weight.norm() / weight.grad.norm() * weight.grad
    twin.zero_grad()
    ascent(twin, ATTACKED, Y)().backward()
    for weight, old, other in zip(model.parameters(), before, twin.parameters(), strict=True):
        assert torch.allclose(weight, old - 0.1 * other.grad, atol=1e-12)


# ---------------------------------------------------------------- whole runs

REMEDIES = {
    "averages": "--ema .9",
    "perturbed": "--awp .01 --awp_start .5",
    "trades": "--train_loss trades --label_smoothing .1",
    "n-fgsm": "--train_attack n-fgsm --swa 1 --lr_schedule onecycle",
    "fgsm-rs": "--train_attack fgsm-rs --lr_schedule cosine --nesterov",
    "clean": "--train_attack none --ema .5",
}


@pytest.mark.parametrize("name", REMEDIES)
@pytest.mark.parametrize("method", ["dense", "fb", "fbp", "static"])
def test_every_remedy_works_with_every_method(run_adv, tmp_path, name, method):
    masks = {"dense": [], "fb": ["--fb"], "fbp": ["--fbp"], "static": ["--fix"]}[method]
    if method != "dense":
        masks += ["--density", ".3"]
    if method in ("fb", "fbp"):
        masks += ["--update_frequency", "2"]
    if method == "fbp":
        masks += ["--dynamic_epoch", "1"]
    outcome = run_adv(*toy.TOY_RUN, *masks, *REMEDIES[name].split(), "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    check_run(only_run(tmp_path), has_average="--ema" in REMEDIES[name] or "swa" in REMEDIES[name])


@pytest.mark.parametrize("name", [name for name in REMEDIES if name != "clean"])
def test_every_remedy_works_on_a_ticket(run_eb, tmp_path, name):
    flags = [*toy.TOY_BIRD, *toy.EASY_TICKET, *REMEDIES[name].split(), "--density", ".3"]
    outcome = run_eb(*flags, "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    check_run(only_run(tmp_path), has_average="--ema" in REMEDIES[name] or "swa" in REMEDIES[name])


def check_run(paths, has_average):
    content, summary, rows = (
        load_checkpoint(paths.checkpoint),
        read_summary(paths),
        read_epochs(paths),
    )
    masks = (content["masking"] or {"masks": {}})["masks"]
    assert ("average" in content, paths.average.exists()) == (has_average, has_average)
    best = max(max(row[k] for k in row if k.endswith("val_ra")) for row in rows if "val_ra" in row)
    assert summary["best"]["val_ra"] == best
    if not has_average:
        return
    averaged = load_checkpoint(paths.average)
    assert averaged["averaged"]
    assert averaged["val_ra"] == rows[-1]["average_val_ra"]
    assert summary["average"]["test_ra"] >= 0
    for name, mask in masks.items():
        assert not averaged["state_dict"][name][~mask].any()
        assert averaged["state_dict"][name][content["state_dict"][name] != 0].all()
