"""Losses, weight perturbation and averages against references written from their papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import utils.training.collapse
from sparse_core import Masking, MaskingConfig
from tests import toy
from tests.toy import only_run
from utils.attacks import PGD, attack_draws, n_fgsm, pgd_attack
from utils.evaluation.scores import Score
from utils.execution.forward import Forward
from utils.report.runs import FinishedRun, grouped
from utils.report.tables import Comparison, summary_table
from utils.settings.adversarial import AdversarialSettings
from utils.settings.command_line import parse_settings
from utils.settings.robust_bird import EarlyBirdSettings
from utils.storage.checkpoint import load_checkpoint
from utils.storage.run_folder import read_epochs, read_summary
from utils.training.averages import EpochAverage, ExponentialAverage
from utils.training.collapse import CollapseError, CollapseGuard
from utils.training.losses import LOSSES, Options
from utils.training.weight_perturbation import perturbed_weights


def two_layers():
    """Two linear layers with a ReLU between them, for images of two pixels, in float64."""
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
    """Softmax of two logits."""
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
    # The gradient is taken at the moved weights.
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
    # The first layer has moved, so its statistics are close to the unmoved ones, not equal.
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
    assert (1 + 5) / (10 + 5) > 0.3 > 3 / 12  # the warm-up ends within these steps
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
        masking.masks = {**masking.masks, name: mask}  # a new mapping, as after an update
        average.after_step(model, masking)
        with torch.no_grad():
            masking.weights[name].normal_().mul_(mask)
        seen.append(masking.weights[name].detach().clone())
        average.after_epoch(model, masking, epoch)
        assert average.count == epoch + 1
    found = dict(average.model.named_parameters())[name]
    steady = masks[0] & masks[1] & masks[2]
    assert torch.allclose(found[steady], torch.stack(seen).mean(0)[steady], atol=1e-6)
    assert found[late].item() == pytest.approx(((seen[1] + seen[2]) / 2)[late].item(), abs=1e-6)
    assert found[lost].item() == 0


def test_statistics_of_an_average_are_those_of_clean_images():
    model = toy.network()
    average = EpochAverage(model)
    average.after_epoch(model, None, 0)
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
            average.after_epoch(model, masking, average.count)

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
    table = summary_table([summary])
    final = summary["average"]
    assert ", averaged " in table
    assert f"{final['test_ra']:.2f} " in table.splitlines()[-1]
    (group,), _ = grouped([FinishedRun.read(paths.root)])
    plain, average = Comparison.all_of([group], None)
    assert average.label == f"{plain.label}, averaged"
    assert average.ours["ra_final"].mean == final["test_ra"]
    assert average.ours["ra_best"] == plain.ours["ra_best"]
    for name, mask in masks.items():
        assert not averaged["state_dict"][name][~mask].any()
        assert averaged["state_dict"][name][content["state_dict"][name] != 0].all()


def test_an_averaged_network_is_evaluated_as_it_was_scored(run_adv, tmp_path):
    flags = [*toy.TOY_RUN, "--fb", *toy.TOY_MASKS, "--ema", ".9"]
    assert run_adv(*flags, "--save_dir", tmp_path).code == 0
    paths = only_run(tmp_path)
    outcome = run_adv("--eval", "--pretrained", paths.average)
    assert outcome.code == 0, outcome.err
    (evaluation,) = FinishedRun.read(paths.root).evaluations
    assert evaluation["test_ra"] == read_summary(paths)["average"]["test_ra"]
    assert evaluation["network"]["weights"] == read_summary(paths)["weights"][paths.average.name]


def test_an_epoch_that_is_finished_twice_is_averaged_once():
    """As when a run is stopped during the tests that follow an epoch."""
    model = toy.network()
    average = EpochAverage(model)
    average.after_epoch(model, None, 3)
    with torch.no_grad():
        model[5].weight.mul_(3)
    resumed = EpochAverage(toy.network())
    resumed.load_state_dict(average.state_dict())
    for one in (average, resumed):
        one.after_epoch(model, None, 3)
        assert one.count == 1
        one.after_epoch(model, None, 4)
        assert torch.allclose(one.model[5].weight, 2 / 3 * model[5].weight)


def test_statistics_of_an_average_are_of_mixed_classes(run_adv, tmp_path, monkeypatch):
    """Image folders are sorted by class, and a last batch of one image would be too small."""
    folder = toy.write_image_tree(tmp_path / "images", per_class=(192, 8))
    batches = []

    def estimate(self, given):
        batches.append([batch.mean((0, 2, 3)) for batch in given])

    monkeypatch.setattr(EpochAverage, "estimate_statistics", estimate)
    flags = ["--data", folder, "--dataset", "imagefolder", "--width", ".0625", "--epochs", "1"]
    flags += ["--train_step", "1", "--test_step", "1", "--swa", "0", "--train_subset", "513"]
    outcome = run_adv(*flags, "--save_dir", tmp_path / "runs")
    assert outcome.code == 0, outcome.err
    (means,) = batches
    assert len(means) == 2  # of 513 images, the last one with the others
    assert all((mean.max() - mean.min()) < 0.1 for mean in means)  # of three colours


# ---------------------------------------------------------------- catastrophic overfitting

ONE_STEP = [*toy.TOY_RUN, "--epochs", "3", "--train_attack", "fgsm-rs", "--fb", *toy.TOY_MASKS]


@pytest.fixture
def accuracies(monkeypatch):
    """``accuracies(*looks)`` makes the guard see these pairs of PGD-10 and one-step accuracy, and
    returns the list of step sizes that it asks about."""

    def see(*looks):
        left, sizes = [value for look in looks for value in look], []

        def score(forward, split, attack, *, seed):
            sizes.append(255 * attack.step_size)
            return Score(left.pop(0) if left else 50.0, 0.0, len(split))

        monkeypatch.setattr(utils.training.collapse, "score", score)
        return sizes

    return see


FINE, COLLAPSED = (40.0, 45.0), (10.0, 80.0)


def test_a_collapse_stops_the_run_and_keeps_the_last_good_model(run_adv, tmp_path, accuracies):
    accuracies(*[FINE] * 5, COLLAPSED)
    outcome = run_adv(*ONE_STEP, "--save_dir", tmp_path)
    assert outcome.code == 3
    assert "catastrophic overfitting in epoch 2, step 2 of 4" in outcome.err
    assert "fell from 40.0 to 10.0 % on 256 validation images" in outcome.err
    assert outcome.err.count("\n") == 1
    assert load_checkpoint(only_run(tmp_path).best_ra)["epoch"] == 1


def test_a_collapse_may_be_a_warning(run_adv, tmp_path, accuracies):
    accuracies(*[FINE] * 5, *[COLLAPSED] * 9)
    outcome = run_adv(*ONE_STEP, "--on_collapse", "warn", "--save_dir", tmp_path)
    assert outcome.code == 0
    assert outcome.out.count("warning: catastrophic overfitting") == 1
    assert read_epochs(only_run(tmp_path))[-1]["guard_ra"] == 10


def test_a_warning_names_no_model_that_is_not_there(run_adv, tmp_path, accuracies):
    accuracies(FINE, COLLAPSED)
    outcome = run_adv(*ONE_STEP, "--on_collapse", "warn", "--save_dir", tmp_path)
    assert outcome.code == 0
    assert "warning: catastrophic overfitting in epoch 1" in outcome.out
    assert "the last good model" not in outcome.out


def test_a_collapse_may_be_rolled_back_with_a_smaller_step(run_adv, tmp_path, accuracies):
    sizes = accuracies(*[FINE] * 5, COLLAPSED)
    outcome = run_adv(*ONE_STEP, "--on_collapse", "rollback", "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "repeating epoch 2 with a step of 7.5/255" in outcome.out
    assert sizes[1::2][:6] == [10.0] * 6
    assert sizes[1::2][6:] == [7.5] * 8
    rows = read_epochs(only_run(tmp_path))
    assert [(row["epoch"], row.get("step_size")) for row in rows] == [(1, None), (2, 7.5), (3, 7.5)]


def test_a_collapse_that_returns_after_every_rollback_ends_the_run(run_adv, tmp_path, accuracies):
    sizes = accuracies(*[FINE] * 5, *[COLLAPSED] * 20)
    flags = ["--on_collapse", "rollback", "--save_every", "1"]  # after the collapse, too
    outcome = run_adv(*ONE_STEP, *flags, "--save_dir", tmp_path)
    assert outcome.code == 3
    assert "again after 8 rollbacks" in outcome.err
    assert len(set(sizes[1::2])) == 9
    assert outcome.out.count("repeating epoch 2") == 8


def test_a_ticket_rolls_back_to_the_start_of_its_training(run_eb, tmp_path, accuracies):
    accuracies(FINE, COLLAPSED)
    flags = [*toy.TOY_BIRD, *toy.EASY_TICKET, "--train_attack", "fgsm-rs"]
    outcome = run_eb(*flags, "--on_collapse", "rollback", "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "repeating epoch 1 with a step of" in outcome.out
    assert [row["stage"] for row in read_epochs(only_run(tmp_path))] == [1, 1, 2, 2]


def test_a_run_that_stopped_at_a_collapse_rolls_back(run_adv, tmp_path, accuracies):
    """In its first epoch, with a checkpoint saved after the collapse and before it was measured."""
    flags = [*ONE_STEP, "--save_dir", tmp_path, "--batch_size", "13", "--save_every", "3"]
    accuracies(FINE, COLLAPSED)  # after steps 2 and 4 of 8
    stopped = run_adv(*flags)
    assert stopped.code == 3
    assert "step 3 of 8 of epoch 1" in stopped.err
    accuracies(COLLAPSED)
    resumed = run_adv(*flags, "--resume", "--on_collapse", "rollback")
    assert resumed.code == 0, resumed.err
    assert "repeating epoch 1 with a step of 7.5/255" in resumed.out
    assert len(read_epochs(only_run(tmp_path))) == 3
    assert not only_run(tmp_path).rollback.exists()


def test_when_checkpoints_are_saved_does_not_change_what_is_repeated(run_adv, tmp_path, accuracies):
    for every in ("1", "100"):
        accuracies(*[FINE] * 5, COLLAPSED)
        flags = ["--on_collapse", "rollback", "--save_every", every]
        assert run_adv(*ONE_STEP, *flags, "--save_dir", tmp_path / every).code == 0
    one, other = (
        read_summary(only_run(tmp_path / every))["weights"]["checkpoint.pth.tar"]
        for every in ("1", "100")
    )
    assert one == other


def test_what_went_on_after_a_warning_cannot_be_rolled_back(run_adv, tmp_path, accuracies):
    accuracies(FINE)
    flags = [*ONE_STEP, "--save_dir", tmp_path, "--on_collapse"]
    assert run_adv(*flags, "warn", "--time_limit", "0.001").code == 75
    accuracies(COLLAPSED)
    resumed = run_adv(*flags, "rollback", "--resume")
    assert resumed.code == 3
    assert "the state before it was not kept" in resumed.err


@pytest.mark.parametrize(
    ("chance", "looks", "collapses"),
    [
        (10.0, [FINE, (21.0, 80.0)], False),  # no less than half of the best
        (10.0, [FINE, (10.0, 12.0)], False),  # one-step accuracy fell too: another problem
        (10.0, [(12.0, 12.0), (5.0, 12.0)], False),  # at chance level
        (1.0, [(2.4, 2.8), (0.8, 2.4)], False),  # a few of 256 images
        (10.0, [FINE, (15.0, 46.0)], True),
        (10.0, [(9.0, 10.0), (0.0, 24.2)], True),  # before it withstood anything
        (1.0, [(1.2, 1.2), (0.0, 9.0)], True),
    ],
)
def test_what_a_collapse_is(accuracies, chance, looks, collapses):
    accuracies(*looks)
    guard = CollapseGuard(PGD(8 / 255, 10 / 255, 1), toy.data(30), 1)
    guard._chance = chance
    forward = Forward(toy.network())
    guard.check(forward, "epoch 1")
    if collapses:
        with pytest.raises(CollapseError, match="in epoch 2"):
            guard.check(forward, "epoch 2")
    else:
        guard.check(forward, "epoch 2")


def test_training_by_many_steps_is_not_watched(run_adv, tmp_path):
    outcome = run_adv(*toy.TOY_RUN, "--save_dir", tmp_path)
    assert outcome.code == 0
    assert all("guard_ra" not in row for row in read_epochs(only_run(tmp_path)))
    refused = run_adv(*toy.TOY_RUN, "--on_collapse", "warn", "--save_dir", tmp_path)
    assert refused.code == 2
    assert "not one step to the edge" in refused.err


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--beta 3", "--beta has no effect with --train_loss ce"),
        ("--train_loss trades --beta -1", "--beta is -1.0, but must be 0 or more"),
        ("--train_loss mart", "invalid choice: 'mart'"),
        ("--train_loss trades --train_attack n-fgsm", "its attack is PGD on a loss of its own"),
        ("--train_loss trades --no-train_randinit", "would attack nothing"),
        ("--awp_start 1", "no --awp"),
        ("--awp .01 --awp_start 2", "--awp_start 2 lies past the end of 2 epochs"),
        ("--awp -1", "must lie in [0, 1)"),
        ("--ema 1", "must lie in [0, 1)"),
        ("--ema .9 --swa 1", "choose one"),
        ("--swa 2", "--swa 2 lies past the end of 2 epochs"),
        ("--label_smoothing nan", "must be finite"),
        ("--train_attack n-fgsm --norm l2", "steps along the sign"),
        ("--train_attack none --train_eps 4", "--train_eps has no effect with --train_attack none"),
        ("--nesterov --momentum 0", "--nesterov has no effect"),
    ],
)
def test_remedies_without_meaning_are_refused(run_adv, tmp_path, flags, why):
    outcome = run_adv(*toy.TOY_RUN, *flags.split(), "--save_dir", tmp_path / "runs")
    assert (outcome.code, why in outcome.err, outcome.err.count("\n")) == (2, True, 1), outcome.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--stage2 sgd --awp .01", "--awp has no effect with --stage2 sgd, only with pgd"),
        ("--train_attack none", "--stage2 sgd trains on clean images"),
        ("--swa 2", "--swa 2 lies past the end of 2 epochs"),
    ],
)
def test_remedies_without_meaning_for_a_ticket_are_refused(run_eb, tmp_path, flags, why):
    outcome = run_eb(*toy.TOY_BIRD, *flags.split(), "--save_dir", tmp_path / "runs")
    assert (outcome.code, why in outcome.err, outcome.err.count("\n")) == (2, True, 1), outcome.err
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- recipes


def parse(kind, flags):
    return parse_settings(kind, flags.split(), "", lambda given: {})


def test_a_recipe_sets_what_was_not_given():
    fast = parse(AdversarialSettings, "--recipe fast --lr .15 --fb")
    assert (fast.train_attack, fast.epochs, fast.lr) == ("n-fgsm", 30, 0.15)
    assert (fast.lr_schedule, fast.ema, fast.awp) == ("onecycle", 0.995, 0)
    assert fast.notes[-1] == (
        "recipe fast: --train_attack n-fgsm --epochs 30 --lr_schedule onecycle --ema 0.995"
    )
    modern = parse(AdversarialSettings, "--recipe modern --swa .5 --decreasing_lr .5")
    assert (modern.lr_schedule, modern.ema, modern.awp) == ("step", 0, 0.01)
    assert parse(AdversarialSettings, "--recipe modern --train_loss trades").awp == 0.005
    assert parse(AdversarialSettings, "--recipe modern --train_loss ce").awp == 0.01
    ticket = parse(EarlyBirdSettings, "--recipe fast")
    assert (ticket.epochs1, ticket.epochs2, ticket.plan2.attack.start) == (200, 30, "wide")
    assert (ticket.plan1.attack, ticket.plan1.lr) == (None, 0.1)  # the search is the paper's
    given = parse(EarlyBirdSettings, "--recipe modern --decreasing_lr 20,40")
    assert (given.lr_schedule, given.plan1.milestones) == ("cosine", (20, 40))


def test_a_start_has_one_name_as_epoch_and_as_fraction():
    halves = [parse(AdversarialSettings, f"--epochs 20 --swa {swa}") for swa in ("10", "0.5")]
    assert halves[0].run_name() == halves[1].run_name()


def test_a_recipe_is_the_run_of_its_flags():
    by_hand = "--lr_schedule cosine --ema .995 --label_smoothing .1 --awp .01"
    one = parse(AdversarialSettings, "--recipe modern --fbp")
    assert one.run_name() == parse(AdversarialSettings, f"--fbp {by_hand}").run_name()
    plain = parse(AdversarialSettings, "--recipe paper --fbp")
    assert plain.run_name() == parse(AdversarialSettings, "--fbp").run_name()


def test_a_run_by_a_recipe_says_and_resumes_it(run_adv, tmp_path):
    flags = [*toy.TOY_RUN, "--recipe", "modern", "--fb", *toy.TOY_MASKS]
    outcome = run_adv(*flags, "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "note: recipe modern: --ema 0.995 --label_smoothing 0.1 --awp 0.01" in outcome.out
    root = only_run(tmp_path).root
    grown = run_adv("--resume_dir", root, "--epochs", 3)
    assert grown.code == 0, grown.err
    assert "average val RA" in grown.out
    refused = run_adv("--resume_dir", root, "--recipe", "fast")
    assert (refused.code, "whose run keeps its settings" in refused.err) == (2, True)
