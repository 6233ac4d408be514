import json
import math
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from models import build_model
from sparse_core import (
    DENSITY_METHODS,
    GROWTHS,
    SPARSE_INITS,
    DensityController,
    DropFractionSchedule,
    Masking,
    MaskingConfig,
    Verdict,
    drop_lowest,
    global_masks,
    grow_highest,
    initial_masks,
    layer_counts,
    layer_densities,
    mask_hash,
    prunable,
)
from tests import toy
from tests.processes import in_processes
from utils.attacks import PGD, pgd_attack
from utils.seeding import random_bits


def read(path):
    return json.loads(path.read_text())


def shapes_of(arch, golden):
    return {
        name: shape
        for name, shape in read(golden / "state_dict_shapes.json")[arch]
        if len(shape) in (2, 4)
    }


# ---------------------------------------------------------------- densities


@pytest.mark.parametrize("arch", ["resnet18", "vgg16", "wideresnet"])
def test_igq_equals_the_oracle(arch, golden):
    for density, sparsities in read(golden / "igq_sparsities.json")[arch]["sparsity"].items():
        ours = layer_densities(shapes_of(arch, golden), float(density), "igq")
        assert [1 - d for d in ours.values()] == pytest.approx(sparsities, abs=1e-4)


def test_erk_equals_the_oracle(golden):
    for arch, by_density in read(golden / "erk_densities.json").items():
        for density, expected in by_density.items():
            assert layer_densities(shapes_of(arch, golden), float(density), "erk") == pytest.approx(
                expected, abs=1e-6
            )


def test_er_by_hand():
    # Densities in proportion to (4+3)/12 and (10+64)/640, with 0.2 * 748 weights in all.
    shapes = {"a": (4, 3, 3, 3), "b": (10, 64)}
    ours = layer_densities(shapes, 0.2, "er")
    assert ours["a"] / ours["b"] == pytest.approx((7 / 12) / (74 / 640))
    assert ours["a"] * 108 + ours["b"] * 640 == pytest.approx(0.2 * 748)


@pytest.mark.parametrize("method", DENSITY_METHODS)
@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5, 0.9, 1.0])
def test_counts_are_exact_in_total_and_never_empty(method, density, golden):
    shapes = shapes_of("resnet18", golden)
    counts = layer_counts(shapes, density, method)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(counts.values()) == round(density * sum(sizes.values()))
    assert all(1 <= counts[name] <= sizes[name] for name in shapes)


def test_counts_of_a_network_with_tiny_layers():
    counts = layer_counts({"a": (2, 2), "b": (100, 100)}, 0.001, "igq")
    assert sum(counts.values()) == 10
    assert min(counts.values()) >= 1
    with pytest.raises(ValueError, match="fewer weights than the network has layers"):
        layer_counts({"a": (2, 2), "b": (2, 2)}, 0.1, "uniform")


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_densities_outside_the_range_are_refused(density):
    with pytest.raises(ValueError, match="density"):
        layer_densities({"a": (2, 2)}, density, "igq")


def test_unknown_methods_and_no_layers_are_refused():
    with pytest.raises(ValueError, match="unknown density method"):
        layer_densities({"a": (2, 2)}, 0.5, "fair")
    with pytest.raises(ValueError, match="no layers"):
        layer_densities({}, 0.5, "igq")
    with pytest.raises(ValueError, match="unknown sparse start"):
        initial_masks(toy.network(), 0.5, "fair")


# ---------------------------------------------------------------- drop and grow


def test_drop_lowest_by_hand():
    mask = torch.tensor([True, True, False, True, True])
    score = torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0])
    assert drop_lowest(score, mask, 2).tolist() == [True, False, False, True, False]
    # the tie goes to the lower index
    assert drop_lowest(score, mask, 1).tolist() == [True, False, False, True, True]
    assert drop_lowest(score, mask, 0).tolist() == mask.tolist()
    assert mask.tolist() == [True, True, False, True, True]


def test_grow_highest_by_hand():
    mask = torch.tensor([True, False, False, False, True])
    score = torch.tensor([9.0, 1.0, 5.0, 5.0, 9.0])
    assert grow_highest(score, mask, 1).tolist() == [True, False, True, False, True]
    assert grow_highest(score, mask, 3).tolist() == [True] * 5


@pytest.mark.parametrize(
    ("function", "n"), [(drop_lowest, 4), (drop_lowest, -1), (grow_highest, 3)]
)
def test_impossible_counts_are_refused(function, n):
    mask = torch.tensor([True, True, True, False, False])
    with pytest.raises(ValueError, match="cannot choose"):
        function(torch.zeros(5), mask, n)


def test_masks_and_scores_must_fit():
    with pytest.raises(ValueError, match="same shape"):
        drop_lowest(torch.zeros(4), torch.ones(5, dtype=torch.bool), 1)
    with pytest.raises(ValueError, match="same shape"):
        grow_highest(torch.zeros(5), torch.ones(5), 1)


@pytest.mark.parametrize("seed", range(5))
def test_drop_and_grow_equal_a_stable_sort(seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 6, (6, 5, 3, 3), generator=generator).float()  # many ties
    mask = torch.rand(score.shape, generator=generator) < 0.5
    live, dead = (
        mask.flatten().nonzero().squeeze(1).tolist(),
        (~mask).flatten().nonzero().squeeze(1).tolist(),
    )
    flat = score.flatten().tolist()
    dropped = drop_lowest(score, mask, 17).flatten()
    assert sorted(live, key=lambda i: flat[i])[17:] == sorted(
        dropped.nonzero().squeeze(1).tolist(), key=lambda i: (flat[i], i)
    )
    grown = grow_highest(score, mask, 17) & ~mask
    assert set(grown.flatten().nonzero().squeeze(1).tolist()) == set(
        sorted(dead, key=lambda i: -flat[i])[:17]
    )


def test_counts_hold_with_nan_and_infinite_scores():
    score = torch.tensor([float("nan"), float("inf"), 1.0, float("nan"), -float("inf"), 2.0])
    everything, nothing = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    for n in range(7):
        assert drop_lowest(score, everything, n).sum() == 6 - n
        assert grow_highest(score, nothing, n).sum() == n
    assert grow_highest(score, nothing, 3).tolist() == [True, True, False, True, False, False]


def test_memory_format_does_not_change_the_choice():
    score = torch.randint(0, 4, (4, 6, 3, 3)).float()
    mask = torch.rand(score.shape) < 0.5
    last = [t.to(memory_format=torch.channels_last) for t in (score, mask)]
    assert torch.equal(drop_lowest(score, mask, 20), drop_lowest(*last, 20))
    assert torch.equal(grow_highest(score, mask, 20), grow_highest(*last, 20))


def test_one_layer_updates_equal_the_oracle(golden):
    arrays = np.load(golden / "prune_grow.npz")
    for case in read(golden / "prune_grow.json"):
        weight, gradient, before, after = (
            torch.from_numpy(arrays[f"{case['case']}_{part}"])
            for part in ("weight", "grad", "mask_before", "mask_after")
        )
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = nn.Parameter(weight.clone())
        config = MaskingConfig(
            density=0.5,
            total_steps=10,
            growth="gradient",
            drop_fraction=case["death_rate"],
            drop_schedule="constant",
            adaptive=True,
            start_epoch=0,
            prune_ratio=case["prune_ratio"],
            growth_ratio=case["growth_ratio"],
        )
        masking = Masking(
            layer, torch.optim.SGD(layer.parameters(), 0.1), config, masks={"weight": before.bool()}
        )
        verdict = Verdict(case["extra_prune"], case["extra_grow"])
        masking.controller.decide = lambda epoch, verdict=verdict: verdict
        layer.weight.grad = gradient.clone()
        masking.update_topology()
        assert torch.equal(masking.masks["weight"], after.bool()), case["case"]
        assert int(after.sum()) == case["nonzero_after"]


# ---------------------------------------------------------------- schedules and verdicts


def test_drop_fraction_equals_the_oracle(golden):
    for key, values in read(golden / "death_rate_cosine.json")["values"].items():
        initial, total = key.split("_")
        schedule = DropFractionSchedule(float(initial), int(total))
        assert [schedule.at(step) for step in range(len(values))] == pytest.approx(values, abs=1e-6)


def test_other_schedules():
    linear = DropFractionSchedule(0.5, 10, "linear")
    assert [linear.at(step) for step in (0, 5, 10, 99)] == pytest.approx(
        [0.5, 0.2525, 0.005, 0.005]
    )
    assert DropFractionSchedule(0.5, 10, "constant").at(7) == 0.5
    assert DropFractionSchedule(0.001, 10).at(10) == 0.001  # never rises above its start


@pytest.mark.parametrize("arguments", [(0.0, 10), (1.5, 10), (0.5, 0), (0.5, 10, "sine")])
def test_bad_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match=r"drop fraction|total_steps|unknown schedule"):
        DropFractionSchedule(*arguments)


def test_verdicts_equal_the_oracle(golden):
    for series in read(golden / "fbp_decisions.json"):
        controller = DensityController(
            series["epoch_range"], series["update_threshold"], series["dynamic_epoch"]
        )
        for epoch, (gap, loss, expected) in enumerate(
            zip(
                series["gap_train_ra_minus_val_ra"],
                series["val_loss"],
                series["extra_prune_extra_grow_by_epoch"],
                strict=True,
            )
        ):
            verdict = controller.decide(epoch)
            assert [verdict.prune, verdict.grow] == expected
            controller.observe(train_ra=gap + 30, val_ra=30, val_loss=loss)


def test_a_verdict_needs_two_epochs():
    controller = DensityController(start_epoch=0)
    assert controller.decide(0) == Verdict()
    controller.observe(train_ra=30, val_ra=30, val_loss=2.0)
    assert controller.decide(1) == Verdict()
    controller.observe(train_ra=31, val_ra=30, val_loss=2.0)
    assert controller.decide(2) == Verdict(prune=True, grow=True)  # an equal loss did not fall


# ---------------------------------------------------------------- initial masks


@pytest.mark.parametrize("method", SPARSE_INITS)
def test_every_start_has_the_exact_count_and_leaves_the_network_alone(method):
    model = toy.network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = initial_masks(model, 0.3, method, batches=[toy.images()])
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.3 * 300)
    assert list(masks) == ["0.weight", "5.weight"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_scores_by_data_need_data(method):
    with pytest.raises(ValueError, match="needs batches"):
        initial_masks(toy.network(), 0.3, method)


def test_random_starts_follow_the_seed():
    first, again, other = (
        initial_masks(toy.network(), 0.3, "igq", seed=seed) for seed in (1, 1, 2)
    )
    assert mask_hash(first) == mask_hash(again) != mask_hash(other)


def test_magnitude_keeps_the_largest_over_all_layers():
    model = toy.network()
    masks = initial_masks(model, 0.3, "magnitude")
    kept = torch.cat([w[masks[name]].abs() for name, w in prunable(model).items()])
    lost = torch.cat([w[~masks[name]].abs() for name, w in prunable(model).items()])
    assert kept.min() >= lost.max()


def linear_pair():
    """A linear layer with inputs and labels: its cross-entropy gradients have a closed form."""
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -1.0, 0.25], [1.0, 0.5, -0.5]]))
    x, y = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]]), torch.tensor([0, 1])
    return layer, x, y


def test_snip_by_hand():
    layer, x, y = linear_pair()
    gradient = (torch.softmax(x @ layer.weight.T, 1) - F.one_hot(y, 2)).T @ x
    expected = global_masks({"weight": (layer.weight * gradient).abs().detach()}, 0.5)
    assert torch.equal(
        initial_masks(layer, 0.5, "snip", batches=[(x, y)])["weight"], expected["weight"]
    )
    in_two = initial_masks(layer, 0.5, "snip", batches=[(x[:1], y[:1]), (x[1:], y[1:])])
    assert torch.equal(in_two["weight"], expected["weight"])


def test_grasp_by_hand():
    layer, x, y = linear_pair()

    def loss(weight):
        return F.cross_entropy(x @ weight.T / 200, y, reduction="sum")

    weight = layer.weight.detach()
    gradient = torch.autograd.functional.jacobian(loss, weight)
    hessian = torch.autograd.functional.hessian(loss, weight).reshape(6, 6)
    score = weight * (hessian @ gradient.flatten()).view_as(weight)
    expected = global_masks({"weight": score}, 0.5)["weight"]
    assert torch.equal(initial_masks(layer, 0.5, "grasp", batches=[(x, y)])["weight"], expected)


def test_synflow_keeps_the_strongest_path():
    """With 3 of 8 weights, two linear layers must keep one path from input to output and a
    weight of the other output."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -3.0], [2.0, 1.0]]))
        model[1].weight.copy_(torch.tensor([[-4.0, 1.0], [1.0, 1.0]]))
    batches = [(torch.zeros(1, 2), torch.zeros(1))]
    masks = initial_masks(model, 3 / 8, "synflow", batches=batches)
    assert masks["0.weight"].tolist() == [[False, True], [False, False]]
    assert masks["1.weight"].tolist() == [[True, False], [True, False]]
    with pytest.raises(ValueError, match="one for each output"):
        initial_masks(model, 2 / 8, "synflow", batches=batches)


# ---------------------------------------------------------------- masks in training


def start(density=0.3, steps=8, model=None, **options):
    model = model or toy.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    return model, optimizer, Masking(model, optimizer, MaskingConfig(density, steps, **options))


def train(model, optimizer, masking, steps, first=0):
    for step in range(first, first + steps):
        x, y = toy.images(seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        masking.step()


def assert_dead_is_zero(model, optimizer, masking):
    for name, weight in prunable(model).items():
        dead = ~masking.masks[name]
        assert not weight[dead].any()
        assert not torch.signbit(weight[dead]).any()  # no negative zeros
        assert not optimizer.state[weight]["momentum_buffer"][dead].any()


@pytest.mark.parametrize("growth", ["random", "gradient", "momentum"])
def test_density_never_drifts_and_dead_weights_stay_zero(growth):
    model, optimizer, masking = start(growth=growth, update_frequency=2, steps=12)
    live = masking.live_counts()
    hashes = set()
    for step in range(12):
        train(model, optimizer, masking, 1, first=step)
        assert masking.live_counts() == live
        assert_dead_is_zero(model, optimizer, masking)
        hashes.add(mask_hash(masking.masks))
    assert masking.density() == 90 / 300
    assert [event["step"] for event in masking.events] == [2, 4, 6, 8, 10, 12]
    assert len(hashes) > 3
    assert masking.explored_fraction() > masking.density()


def test_masks_rest_between_updates():
    model, optimizer, masking = start(update_frequency=3, steps=12)
    hashes = []
    for step in range(6):
        train(model, optimizer, masking, 1, first=step)
        hashes.append(mask_hash(masking.masks))
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3] == hashes[4] != hashes[5]


def test_grown_weights_start_at_zero_and_returned_ones_keep_their_value():
    model, optimizer, masking = start(growth="gradient", update_frequency=3, drop_fraction=0.9)
    train(model, optimizer, masking, 2)
    x, y = toy.images(seed=2)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    old = {name: mask.clone() for name, mask in masking.masks.items()}
    values = {name: weight.detach().clone() for name, weight in prunable(model).items()}
    masking.step()
    grown = 0
    for name, weight in prunable(model).items():
        new = masking.masks[name] & ~old[name]
        grown += int(new.sum())
        assert not weight[new].any()
        assert not optimizer.state[weight]["momentum_buffer"][new].any()
        stayed = masking.masks[name] & old[name]
        assert torch.equal(weight[stayed], values[name][stayed])
    assert grown > 10
    assert_dead_is_zero(model, optimizer, masking)


def test_gradient_growth_takes_the_largest_gradients():
    model, _, masking = start(growth="gradient")
    x, y = toy.images()
    F.cross_entropy(model(x), y).backward()
    before = {name: mask.clone() for name, mask in masking.masks.items()}
    masking.update_topology()
    for name, weight in prunable(model).items():
        candidates = ~before[name] | ~masking.masks[name]
        new = masking.masks[name] & ~before[name]
        left = candidates & ~masking.masks[name]
        assert weight.grad.abs()[new].min() >= weight.grad.abs()[left].max()


def test_momentum_growth_sees_the_momentum_before_it_is_masked():
    model, optimizer, masking = start(growth="momentum", update_frequency=1)
    x, y = toy.images()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    raw = {
        name: optimizer.state[w]["momentum_buffer"].abs().clone()
        for name, w in prunable(model).items()
    }
    before = {name: mask.clone() for name, mask in masking.masks.items()}
    masking.step()
    for name in raw:
        new = masking.masks[name] & ~before[name]
        left = ~before[name] & ~masking.masks[name]
        assert raw[name][new].min() >= raw[name][left].max() > 0


def test_growth_without_what_it_needs_is_refused():
    _, _, masking = start(growth="gradient")
    with pytest.raises(ValueError, match="needs the gradient"):
        masking.update_topology()
    _, _, masking = start(growth="momentum")
    with pytest.raises(ValueError, match="needs a step"):
        masking.update_topology()


def test_random_growth_is_a_pure_function_of_seed_and_step():
    def after(seed, noise):
        torch.manual_seed(noise)
        model, optimizer, masking = start(update_frequency=2, seed=seed)
        train(model, optimizer, masking, 4)
        return mask_hash(masking.masks)

    assert after(1, 0) == after(1, 7) != after(2, 0)


def test_fixed_masks_stay():
    model, optimizer, masking = start(fixed=True, update_frequency=1)
    before = mask_hash(masking.masks)
    train(model, optimizer, masking, 4)
    assert mask_hash(masking.masks) == before
    assert not masking.events
    assert_dead_is_zero(model, optimizer, masking)


def test_a_fully_dense_layer_is_left_alone():
    model = toy.network()
    masks = {
        "0.weight": torch.ones(4, 3, 3, 3, dtype=torch.bool),
        "5.weight": torch.rand(3, 64) < 0.2,
    }
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masking = Masking(
        model,
        optimizer,
        MaskingConfig(0.5, 8, update_frequency=1, adaptive=True, start_epoch=0),
        masks=masks,
    )
    for _ in range(3):
        masking.observe(train_ra=len(masking.controller.gaps), val_ra=0, val_loss=-masking.epoch)
    train(model, optimizer, masking, 3)
    assert masking.masks["0.weight"].all()
    assert masking.live_counts()["5.weight"] < int(masks["5.weight"].sum())
    assert all(event["prune"] and not event["grow"] for event in masking.events)


def test_growing_stops_at_a_full_layer():
    model = toy.network()
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in prunable(model).items()}
    masks["5.weight"][0, 0] = False
    config = MaskingConfig(
        0.9, 8, update_frequency=1, adaptive=True, start_epoch=0, growth_ratio=5.0
    )
    masking = Masking(model, torch.optim.SGD(model.parameters(), 0.1), config, masks=masks)
    for loss in (1.0, 2.0):
        masking.observe(train_ra=0, val_ra=0, val_loss=loss)
    masking.step()
    assert masking.masks["5.weight"].all()


def test_second_frequency_begins_past_half_the_run():
    _, _, masking = start(update_frequency=2, second_frequency=5, steps=20)
    due = []
    for step in range(1, 21):
        masking.steps = step
        due += [step] if masking.update_due() else []
    assert due == [2, 4, 6, 8, 10, 15, 20]


def test_flying_bird_plus_prunes_and_grows_by_the_counts():
    _, _, masking = start(
        density=0.3, adaptive=True, start_epoch=0, drop_schedule="constant", drop_fraction=0.25
    )
    before = masking.live_counts()
    for gap, loss in ((1.0, 1.0), (2.0, 2.0)):
        masking.observe(train_ra=gap, val_ra=0, val_loss=loss)
    masking.update_topology()
    for name, live in before.items():
        drop, prune = math.ceil(0.25 * live), math.ceil(0.25 * 0.4 * live)
        assert masking.live_counts()[name] == live - drop - prune + int(drop * 1.05)
    assert masking.events[0] | {"density": 0} == {
        "step": 0, "epoch": 2, "drop_fraction": 0.25, "prune": True, "grow": True, "density": 0
    }  # fmt: skip


def test_resume_is_exact_to_the_bit():
    whole = start(growth="gradient", update_frequency=2, adaptive=True, start_epoch=1, steps=12)
    for epoch in range(3):
        train(*whole, 4, first=4 * epoch)
        whole[2].observe(train_ra=10 + epoch, val_ra=9, val_loss=2 - epoch)
    first = start(growth="gradient", update_frequency=2, adaptive=True, start_epoch=1, steps=12)
    train(*first, 4)
    first[2].observe(train_ra=10, val_ra=9, val_loss=2)
    second = start(growth="gradient", update_frequency=2, adaptive=True, start_epoch=1, steps=12)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    for epoch in (1, 2):
        train(*second, 4, first=4 * epoch)
        second[2].observe(train_ra=10 + epoch, val_ra=9, val_loss=2 - epoch)
    assert mask_hash(whole[2].masks) == mask_hash(second[2].masks)
    assert whole[2].events == second[2].events
    assert whole[2].explored_fraction() == second[2].explored_fraction()
    for ours, theirs in zip(
        whole[0].state_dict().values(), second[0].state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_state_of_another_network_is_refused():
    _, _, masking = start()
    state = masking.state_dict()
    state["masks"].pop("5.weight")
    with pytest.raises(ValueError, match="do not fit"):
        start()[2].load_state_dict(state)


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.0},
        {"sparse_init": "x"},
        {"growth": "x"},
        {"update_frequency": 0},
        {"second_frequency": 0},
        {"prune_ratio": -1.0},
        {"adaptive": True, "fixed": True},
    ],
)
def test_bad_configurations_are_refused(options):
    with pytest.raises(ValueError, match=r"density|unknown|at least 1|negative|fixed"):
        MaskingConfig(**{"density": 0.5, "total_steps": 10, **options})


def test_other_optimizers_have_their_state_masked_too():
    model = toy.network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    masking = Masking(model, optimizer, MaskingConfig(0.3, 8, update_frequency=2))
    train(model, optimizer, masking, 5)
    for name, weight in prunable(model).items():
        dead = ~masking.masks[name]
        assert not weight[dead].any()
        assert not optimizer.state[weight]["exp_avg"][dead].any()


def test_second_moments_are_those_of_the_dense_gradient():
    """They scale steps and cannot revive a weight. Masked, they would let a grown weight jump, and
    rob layers whose step is scaled as a whole (LAMB) or by rows (Adafactor) of their step."""
    model = toy.network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)
    masking = Masking(model, optimizer, MaskingConfig(0.3, 100, fixed=True))
    expected = {name: torch.zeros_like(weight) for name, weight in masking.weights.items()}
    for step in range(5):
        train(model, optimizer, masking, 1, first=step)
        for name, weight in masking.weights.items():
            expected[name].mul_(0.999).add_(0.001 * weight.grad**2)
    for name, weight in masking.weights.items():
        torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], expected[name])
        assert not weight[~masking.masks[name]].any()


class Kronecker(torch.optim.Optimizer):
    """Keeps a square matrix for each side of a weight, as Shampoo does."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                state["sides"] = [torch.eye(size) for size in weight.shape]
                state["exp_avg"] = weight.grad.clone()


def test_matrices_that_look_like_momentum_of_a_square_weight_are_named():
    for shape, named in (((6, 6), True), ((6, 4), False)):
        model = nn.Sequential(nn.Linear(*shape, bias=False))
        optimizer = Kronecker(model.parameters(), {"lr": 0.1})
        masking = Masking(model, optimizer, MaskingConfig(0.5, 10, fixed=True))
        model(torch.ones(2, shape[0])).sum().backward()
        optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            masking.step()
        found = [str(warning.message) for warning in caught]
        assert found == (
            [
                "Kronecker keeps sides of 0.weight, shaped like it and so masked like momentum, "
                "which ruins a preconditioner"
            ]
            if named
            else []
        )


class Computed(nn.Conv2d):
    """Multiplies by ``change(weight)``."""

    def __init__(self, change, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.change = change

    def forward(self, x):
        return self._conv_forward(x, self.change(self.weight), self.bias)


@pytest.mark.parametrize("shape", [{"groups": 1}, {"groups": 8}, {"groups": 4, "dilation": 2}])
@pytest.mark.parametrize(
    ("change", "keeps"),
    [
        (lambda w: w - w.mean((1, 2, 3), keepdim=True), False),
        (lambda w: (w - w.mean()) / w.std(), False),
        (lambda w: w / w.norm(), True),
        (lambda w: w.sign() * w.abs().mean(), True),
        (lambda w: w, True),
    ],
)
def test_layers_that_compute_their_weight_are_refused(change, keeps, shape):
    model = nn.Sequential(Computed(change, 8, 16, 3, **shape), nn.Flatten())
    before = model[0].weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if keeps:
        Masking(model, optimizer, MaskingConfig(1.0, 10, fixed=True))
    else:
        with pytest.raises(ValueError, match="0 does not multiply by its weight"):
            Masking(model, optimizer, MaskingConfig(1.0, 10, fixed=True))
        given = {"0.weight": torch.ones_like(before, dtype=torch.bool)}
        with pytest.raises(ValueError, match="0 does not multiply by its weight"):
            Masking(model, optimizer, MaskingConfig(1.0, 10, fixed=True), masks=given)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: F.relu(nn.Linear.forward(self, x)),
        lambda self, x: F.layer_norm(nn.Linear.forward(self, x), (self.out_features,)),
        lambda self, x: nn.Linear.forward(self, x) + torch.randn(self.out_features),
        lambda self, x, y: nn.Linear.forward(self, x) + y,
        lambda self, x: x + nn.Linear.forward(self, x),
        lambda self, x: nn.Linear.forward(self, F.layer_norm(x, (self.in_features,))),
        lambda self, x: nn.Linear.forward(self, x.flip(-1)),
        lambda self, x: nn.Linear.forward(self, x) + x @ torch.ones(8, 2) @ torch.ones(2, 8),
        lambda self, x: x @ self.weight.T,
        lambda self, x: torch.einsum("ni,oi->no", x, self.weight),
    ],
)
def test_layers_that_only_do_more_are_masked(forward):
    layer = type("Mine", (nn.Linear,), {"forward": forward})(8, 8)
    initial_masks(nn.Sequential(layer), 0.5)


def test_a_computed_weight_is_seen_in_a_plain_product_too():
    def forward(self, x):
        return x @ (self.weight - self.weight.mean()).T

    layer = type("Mine", (nn.Linear,), {"forward": forward})(8, 8)
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="0 does not multiply by its weight"):
        initial_masks(nn.Sequential(layer), 0.5)
    assert torch.equal(torch.random.get_rng_state(), before)


class Unusual(nn.Sequential):
    """``train`` returns nothing, in eval mode the answer is a tuple, and a tensor of its own, no
    parameter, has a gradient."""

    own = torch.ones(10, requires_grad=True)

    def train(self, mode=True):
        super().train(mode)

    def forward(self, x):
        logits = super().forward(x.clone().requires_grad_()) * self.own
        return logits if self.training else (logits, x)


def test_unusual_networks_are_scored():
    model = Unusual(nn.Flatten(), nn.Linear(192, 10))
    batches = [(torch.rand(8, 3, 8, 8), torch.arange(8))]
    for method in ("snip", "grasp"):
        masks = initial_masks(model, 0.25, method, batches=batches)
        assert int(masks["1.weight"].sum()) == 480
    ones = [(torch.ones(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8))]
    initial_masks(nn.Sequential(*model), 0.25, "synflow", batches=ones)  # needs only the shape


def test_a_state_that_is_the_momentum_itself_is_masked():
    model = nn.Sequential(nn.Linear(6, 4))
    optimizer = Foreign(model.parameters(), "", None)
    optimizer.step = lambda: optimizer.state.update({p: p.grad.clone() for p in model.parameters()})
    masking = Masking(model, optimizer, MaskingConfig(0.5, 10, fixed=True))
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    masking.step()
    momentum, mask = optimizer.state[model[0].weight], masking.masks["0.weight"]
    assert not momentum[~mask].any()
    assert momentum[mask].all()


def test_weights_added_or_replaced_after_the_masking_are_noticed():
    model, optimizer, masking = start(fixed=True)
    train(model, optimizer, masking, 2)
    model.append(nn.Linear(10, 10))
    optimizer.add_param_group({"params": list(model[-1].parameters())})
    with pytest.warns(UserWarning, match=r"\.weight appeared or thawed .* stay dense"):
        state = masking.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masking.state_dict()  # once
    # fixed masks have no updates, so a resumed run checks at its first step
    model, optimizer, masking = start(fixed=True)
    masking.load_state_dict({**state, "masks": masking.masks, "explored": masking.masks})
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(ValueError, match=r"0\.weight of the model is no longer"):
        masking.step()


def test_an_update_after_the_last_step_of_a_constant_schedule_is_named():
    with pytest.warns(UserWarning, match="an update follows the last of total_steps=8"):
        start(update_frequency=4, drop_schedule="constant")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(update_frequency=4)
        start(update_frequency=3, drop_schedule="constant")


def test_weights_split_over_processes_are_refused():
    model, optimizer, _ = start()
    model[0].weight.device_mesh = None  # as those of fully_shard have
    with pytest.raises(ValueError, match=r"0\.weight is split over processes"):
        Masking(model, optimizer, MaskingConfig(0.3, 8))


def _observing(world, compare):
    model = toy.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = MaskingConfig(
        0.5, 8, update_frequency=4, adaptive=True, start_epoch=0, epoch_range=2, prune_ratio=1.0
    )
    masking = Masking(model, optimizer, config, compare=compare)
    train(model, optimizer, masking, 3)
    gap = 10.0 * world.rank  # only the second process sees its gap widen
    for epoch in range(3):
        masking.observe(train_ra=50 + gap * epoch, val_ra=50.0, val_loss=1.0 - epoch)
    try:
        train(model, optimizer, masking, 2, first=3)
    except ValueError as error:
        return {"said": str(error)}
    return {"said": "", "density": masking.density()}


def test_processes_that_would_train_different_masks_are_refused(tmp_path):
    for compare in (True, False):
        (tmp_path / str(compare)).mkdir()
        found = in_processes(2, _observing, tmp_path / str(compare), compare)
        if compare:
            assert all("masks differ between processes" in one["said"] for one in found)
        else:
            assert found[0]["density"] > found[1]["density"]


def test_float64_trajectory_equals_the_oracle(golden):
    """Eight steps with attack, batch norm, optimizer, masks and two updates by gradient growth."""
    arrays = np.load(golden / "trajectory.npz")

    def part(prefix):
        return {
            name.removeprefix(prefix): torch.from_numpy(arrays[name])
            for name in arrays.files
            if name.startswith(prefix)
        }

    model = build_model("resnet18", 10, width=0.125)
    model.load_state_dict(part("init/"))
    model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    config = MaskingConfig(density=0.5, total_steps=8, growth="gradient", update_frequency=3)
    masking = Masking(
        model, optimizer, config, masks={name: mask.bool() for name, mask in part("mask0/").items()}
    )
    attack = PGD(8 / 255, 2 / 255, 2, random_start=False)
    losses = []
    for x, y in zip(
        torch.from_numpy(arrays["x"]).double() / 255, torch.from_numpy(arrays["y"]), strict=True
    ):
        adversarial = pgd_attack(model, x, y, attack, training=True)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(adversarial), y)
        loss.backward()
        optimizer.step()
        masking.step()
        losses.append(loss.item())
    assert losses == pytest.approx(arrays["losses"].tolist(), abs=1e-8)
    for name, mask in part("mask8/").items():
        assert torch.equal(masking.masks[name], mask.bool()), name
    for name, value in part("final/").items():
        assert (model.state_dict()[name].float() - value).abs().max() <= 1e-6, name


def test_masks_that_would_never_move_are_said():
    """A warning here where the command line refuses; static masks need ``fixed``."""
    model = toy.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="no mask update falls into 100 steps"):
        Masking(model, optimizer, MaskingConfig(0.5, 100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Masking(model, optimizer, MaskingConfig(0.5, 100, fixed=True))
        Masking(model, optimizer, MaskingConfig(0.5, 900))
        Masking(model, optimizer, MaskingConfig(0.5, 100, second_frequency=60))


def test_an_optimizer_of_another_model_is_refused():
    model, other = toy.network(), toy.network()
    with pytest.raises(ValueError, match=r"the optimizer does not hold 0\.weight"):
        Masking(model, torch.optim.SGD(other.parameters(), 0.1), MaskingConfig(0.5, 900))
    model[0].weight.requires_grad_(False)  # a frozen layer needs no optimizer
    Masking(model, torch.optim.SGD(model[5].parameters(), 0.1), MaskingConfig(0.5, 900))


class Attentive(nn.Module):
    """Every kind of layer with a prunable weight, and parameters that must stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv3, self.up = (
            nn.Conv1d(3, 8, 3),
            nn.Conv3d(2, 4, 3),
            nn.ConvTranspose2d(4, 6, 3),
        )
        self.attention = nn.MultiheadAttention(8, 2)
        self.embedding, self.norm = nn.Embedding(10, 8), nn.LayerNorm([8, 8])
        self.positions = nn.Parameter(torch.rand(5, 8))
        self.head = nn.Linear(8, 10, bias=False)


def test_prunable_are_the_weights_of_layers_and_not_what_has_their_shape():
    attention = ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert list(prunable(Attentive())) == [
        "conv1.weight",
        "conv3.weight",
        "up.weight",
        *attention,
        "head.weight",
    ]


def masking_of(model, **settings):
    return Masking(
        model,
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        MaskingConfig(0.2, 10, update_frequency=1, **settings),
    )


@pytest.mark.parametrize(
    ("change", "helps"),
    [
        (nn.utils.parametrizations.weight_norm, "remove_parametrizations"),
        (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "prune.remove"),
        (nn.utils.parametrizations.orthogonal, "remove_parametrizations"),
    ],
)
def test_computed_weights_are_refused_by_name(change, helps):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    change(model[0])
    with pytest.raises(ValueError, match=rf"^0 .*{helps}"):
        masking_of(model)


def test_a_spectral_norm_has_the_density_that_was_asked_for():
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(20, 20)), nn.Linear(20, 20)
    )
    masking_of(model)
    live = sum(int(layer.weight.count_nonzero()) for layer in model)
    assert live == round(0.2 * 800)


def test_frozen_layers_are_left_alone_and_named():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    with pytest.warns(UserWarning, match=r"frozen .*: 0\.weight$"):
        masking = masking_of(model)
    assert torch.equal(model[0].weight, before)
    assert (list(masking.masks), masking.live_counts()) == (["1.weight"], {"1.weight": 80})


def test_dead_weights_stay_zero_when_their_gradient_is_infinite():
    model = nn.Sequential(nn.Linear(20, 20))
    masking = masking_of(model, fixed=True)
    model[0].weight.grad = torch.full_like(model[0].weight, float("inf"))
    masking._state._optimizers[0].step()
    masking.step()
    assert bool((model[0].weight[~masking.masks["0.weight"]] == 0).all())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": torch.optim.Adam,
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5),
    "plain sgd": lambda p: torch.optim.SGD(p, 0.1),
    "plain rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
}
MOMENTUM = MaskingConfig(0.2, 10, update_frequency=1, growth="momentum")


@pytest.mark.parametrize(
    ("optimizer", "key"),
    [("sgd", "momentum_buffer"), ("adam", "exp_avg"), ("rmsprop", "momentum_buffer")],
)
def test_momentum_growth_takes_momentum_and_nothing_else(optimizer, key):
    model = nn.Sequential(nn.Linear(20, 20))
    made = OPTIMIZERS[optimizer](model.parameters())
    masking = Masking(model, made, MOMENTUM)
    model(torch.rand(4, 20)).square().sum().backward()
    made.step()
    expected = made.state[model[0].weight][key].abs().clone()
    assert torch.equal(GROWTHS["momentum"](masking, "0.weight"), expected)
    masking.step()
    assert masking.live_counts() == {"0.weight": 80}


@pytest.mark.parametrize(
    "optimizer", ["plain sgd", "plain rmsprop", "adagrad", "adadelta", "adafactor"]
)
def test_momentum_growth_without_momentum_is_refused_at_once(optimizer):
    model = nn.Sequential(nn.Linear(20, 20))
    with pytest.raises(ValueError, match=r"optimizer with momentum.* 0\.weight has none"):
        Masking(model, OPTIMIZERS[optimizer](model.parameters()), MOMENTUM)
    parts = [{"params": [model[0].weight], "momentum": 0.0}, {"params": [model[0].bias]}]
    with pytest.raises(ValueError, match="optimizer with momentum"):
        Masking(model, torch.optim.SGD(parts, 0.1, momentum=0.9), MOMENTUM)


class Foreign(torch.optim.Optimizer):
    """Keeps one tensor per parameter, computed from its gradient."""

    def __init__(self, parameters, key, kept, **defaults):
        super().__init__(parameters, defaults)
        self.key, self.kept = key, kept

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter][self.key] = self.kept(parameter.grad)


@pytest.mark.parametrize(
    ("key", "kept", "message"),
    [
        (
            "exp_avg",
            lambda g: g.mean(dim=1),
            r"momentum shaped like 0\.weight, in floats; .* \(20,\)",
        ),
        (
            "exp_avg",
            lambda g: g.to(torch.uint8),
            r"momentum shaped like 0\.weight, in floats; .*uint8",
        ),
        ("state1", lambda g: g.to(torch.uint8), "optimizer with momentum"),
    ],
)
def test_momentum_that_is_not_like_the_weight_is_refused(key, kept, message):
    model = nn.Sequential(nn.Linear(20, 20, bias=False))
    optimizer = Foreign(model.parameters(), key, kept, betas=(0.9, 0.99))
    masking = Masking(model, optimizer, MOMENTUM)
    model(torch.rand(4, 20)).square().sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=message):
        masking.step()


def test_a_state_that_is_not_in_floats_is_refused():
    """In a quantized state, byte 0 need not stand for the value zero."""
    model = nn.Sequential(nn.Linear(20, 20, bias=False))
    optimizer = Foreign(model.parameters(), "state1", lambda g: g.to(torch.uint8))
    masking = Masking(model, optimizer, MaskingConfig(0.2, 10, update_frequency=1))
    model(torch.rand(4, 20)).square().sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"state of 0\.weight in torch\.uint8"):
        masking.step()


def test_momentum_growth_waits_for_the_first_step():
    """A gradient scaler may skip the first steps, which leaves no momentum yet."""
    model = nn.Sequential(nn.Linear(20, 20))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masking = Masking(
        model, optimizer, MaskingConfig(0.2, 10, update_frequency=2, growth="momentum")
    )
    before = masking.masks["0.weight"].clone()
    masking.step()
    masking.step()
    assert torch.equal(masking.masks["0.weight"], before)
    model(torch.rand(4, 20)).square().sum().backward()
    optimizer.step()
    masking.step()
    assert [event["step"] for event in masking.events] == [3]
    assert masking.live_counts() == {"0.weight": 80}


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer and keeps slow weights: nested in its state, or in a list of tensors or
    dicts of its own."""

    def __init__(self, optimizer, where):
        self.inner, self.where, self.slow = optimizer, where, []
        self.param_groups = optimizer.param_groups
        self.state, self.fast_state = {}, optimizer.state

    def step(self):
        self.inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = torch.ones_like(parameter)
                if self.where == "list":
                    self.slow.append(slow)
                elif self.where == "dict":
                    self.slow.append({parameter: slow})
                else:
                    self.state[parameter] = {"slow": {"weights": [slow]}}


@pytest.mark.parametrize("where", ["state", "list", "dict"])
def test_what_a_wrapping_optimizer_remembers_is_masked_or_refused(where):
    model = toy.network()
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer = Lookahead(inner, where)
    masking = Masking(model, optimizer, MOMENTUM)
    x, y = toy.images()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    if where != "state":
        with pytest.raises(ValueError, match="Lookahead keeps tensors of the shape of"):
            masking.step()
        return
    masking.step()
    for name, weight in prunable(model).items():
        dead = ~masking.masks[name]
        assert not inner.state[weight]["momentum_buffer"][dead].any()
        assert not optimizer.state[weight]["slow"]["weights"][0][dead].any()
        assert optimizer.state[weight]["slow"]["weights"][0].any()


def test_what_joins_the_optimizer_later_is_no_hidden_state():
    model = toy.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masking = Masking(model, optimizer, MaskingConfig(0.3, 8, update_frequency=1))
    optimizer.add_param_group({"params": [nn.Parameter(torch.rand(3, 64))]})
    train(model, optimizer, masking, 2)
    assert_dead_is_zero(model, optimizer, masking)


def test_an_object_around_an_optimizer_needs_no_groups_of_its_own():
    class Scaled:
        def __init__(self, optimizer):
            self.optimizers = {"first": optimizer}

    model = toy.network()
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masking = Masking(model, Scaled(inner), MOMENTUM)
    train(model, inner, masking, 3)
    assert_dead_is_zero(model, inner, masking)
    with pytest.raises(ValueError, match="optimizer with momentum"):
        Masking(model, Scaled(torch.optim.SGD(model.parameters(), 0.1)), MOMENTUM)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_either_spectral_norm_is_masked_and_not_moved(norm):
    layer = norm(nn.Linear(20, 20))
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    masking = masking_of(nn.Sequential(layer))
    assert sum(masking.live_counts().values()) == 80
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in layer.named_buffers())


def test_a_computed_projection_of_an_attention_is_refused():
    attention = nn.MultiheadAttention(8, 2)
    nn.utils.parametrizations.weight_norm(attention, "in_proj_weight")
    with pytest.raises(ValueError, match="remove_parametrizations"):
        prunable(nn.Sequential(attention))


@pytest.mark.parametrize("useless", [0.0, float("inf"), float("nan")])
def test_an_update_that_falls_on_useless_gradients_is_put_off(useless):
    model = nn.Sequential(nn.Linear(20, 20))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masking = Masking(
        model, optimizer, MaskingConfig(0.2, 10, update_frequency=2, growth="gradient")
    )
    weight, before = model[0].weight, masking.masks["0.weight"].clone()
    for step in range(1, 4):
        weight.grad = torch.rand_like(weight) if step != 2 else torch.full_like(weight, useless)
        masking.step()
        if step == 2:
            assert torch.equal(masking.masks["0.weight"], before)
            state = masking.state_dict()
            masking.load_state_dict(state)
    assert not torch.equal(masking.masks["0.weight"], before)
    assert [event["step"] for event in masking.events] == [3]
    assert masking.live_counts() == {"0.weight": 80}


def test_a_layer_without_a_gradient_keeps_its_mask():
    model = nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20)])
    masking = masking_of(model, growth="gradient")
    before = {name: mask.clone() for name, mask in masking.masks.items()}
    model[0].weight.grad = torch.rand_like(model[0].weight)
    masking.step()
    assert torch.equal(masking.masks["1.weight"], before["1.weight"])
    assert not torch.equal(masking.masks["0.weight"], before["0.weight"])


@pytest.mark.parametrize("method", ["magnitude", "snip", "grasp"])
def test_a_scored_start_leaves_every_layer_and_every_output_a_weight(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)
    )
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
        model[5].weight.mul_(1e-6)
    masks = initial_masks(model, 0.01, method, batches=[toy.images(12)])
    assert all(bool(mask.any()) for mask in masks.values())
    assert bool(masks["5.weight"].any(dim=1).all())
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.01 * total)
    with pytest.raises(ValueError, match="one for each output"):
        initial_masks(model, 4 / total, method, batches=[toy.images(12)])


def test_an_emptied_convolution_in_channels_last_is_given_a_weight():
    model = toy.network().to(memory_format=torch.channels_last)
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    plain = toy.network()
    plain.load_state_dict(model.state_dict())
    masks = initial_masks(model, 0.05, "magnitude")
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "0.weight": 1,
        "5.weight": 14,
    }
    assert mask_hash(masks) == mask_hash(initial_masks(plain, 0.05, "magnitude"))


def by_index(mask, n):
    """The mask with its first ``n`` dead positions grown."""
    return grow_highest(torch.zeros(mask.shape), mask, n)


def test_ties_of_a_growth_are_drawn():
    score, mask = torch.zeros(10, 10), torch.zeros(10, 10, dtype=torch.bool)
    score[3] = 1.0
    first, again, other = (grow_highest(score, mask, 30, tie_key=key) for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first[3].all()
    assert (int(first.sum()), int(first.any(dim=1).sum())) == (30, 10)
    tied = torch.cat([torch.arange(30), torch.arange(40, 100)])
    expected = tied[random_bits(1, tied).argsort()[:20]]  # depends on the position's index alone
    assert set((first & (score == 0)).flatten().nonzero().squeeze(1).tolist()) == set(
        expected.tolist()
    )
    last = [
        part[None, :, :, None].to(memory_format=torch.channels_last)
        for part in (score.view(10, 10), mask)
    ]
    assert torch.equal(grow_highest(*last, 30, tie_key=1).view(10, 10), first)


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_equal_scores_grow_where_the_seed_says(growth):
    def grown(seed, steps=1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40, bias=False))
        masks = {"0.weight": torch.zeros(40, 40, dtype=torch.bool)}
        masks["0.weight"][:4] = True
        optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
        config = MaskingConfig(
            0.1,
            9,
            update_frequency=1,
            growth=growth,
            seed=seed,
            drop_schedule="constant",
            drop_fraction=0.25,
        )
        masking = Masking(model, optimizer, config, masks=masks)
        for _ in range(steps):
            before = masking.masks["0.weight"].clone()
            model[0].weight.grad = torch.full_like(model[0].weight, 1e-3)
            optimizer.step()
            masking.step()
        return before, masking.masks["0.weight"]

    before, after = grown(1)
    new = after & ~before
    assert int(after.sum()) == 160
    # spread over the 36 dead rows; chosen by index, they would lie in one at most
    assert int(new.any(dim=1).sum()) > 18
    assert torch.equal(after, grown(1)[1])
    assert not torch.equal(after, grown(2)[1])
    assert not torch.equal(after, grown(1, 2)[1])


@pytest.mark.parametrize("method", ["magnitude", "snip", "synflow"])
def test_equal_scores_of_a_start_are_drawn(method):
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 4, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[1].weight.copy_(torch.arange(1.0, 5).view(4, 1).expand(4, 20))
    batches = [(torch.ones(2, 20), torch.tensor([0, 1]))]
    first, again, other = (
        initial_masks(model, 0.3, method, seed=seed, batches=batches) for seed in (1, 1, 2)
    )
    assert mask_hash(first) == mask_hash(again) != mask_hash(other)
    live = int(first["0.weight"].sum())
    assert live > 20
    assert not torch.equal(first["0.weight"], by_index(torch.zeros(20, 20, dtype=torch.bool), live))
    assert int(first["0.weight"].any(dim=1).sum()) > 5


def test_random_starts_and_growth_keep_the_rule_of_the_index():
    score = torch.tensor([0.5, 0.25, 0.5, 0.5])
    assert global_masks({"a": score}, 0.5)["a"].tolist() == [True, False, True, False]


@pytest.mark.parametrize("method", ["magnitude", "snip", "grasp", "synflow"])
def test_scores_without_use_are_refused(method):
    model, batches = toy.network(), [toy.images()]
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=rf"{method} scores the weights of 0\.weight.* not finite"):
        initial_masks(model, 0.3, method, batches=batches)
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.zero_()
    with pytest.raises(ValueError, match=f"{method} scores every weight with zero"):
        initial_masks(model, 0.3, method, batches=batches)


@pytest.mark.parametrize("density", [0.02, 0.06])
def test_synflow_leaves_every_layer_and_every_output_a_weight(density):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 6)
    )
    with torch.no_grad():
        model[4].weight[2:].mul_(1e-6)
    masks = initial_masks(model, density, "synflow", batches=[(torch.zeros(1, 30), torch.zeros(1))])
    assert all(bool(mask.any()) for mask in masks.values())
    assert bool(masks["4.weight"].any(dim=1).all())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(density * 1120)


def dead_start(growth, dense=False, fixed=False, **options):
    model = toy.network()
    masks = {
        "0.weight": torch.zeros(4, 3, 3, 3, dtype=torch.bool),
        "5.weight": torch.ones(3, 64, dtype=torch.bool),
    }
    if not dense:
        masks["5.weight"][:, 20:] = False
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    config = MaskingConfig(0.5, 8, update_frequency=1, growth=growth, fixed=fixed, **options)
    with pytest.warns(UserWarning, match=r"without a live weight.*: 0\.weight$"):
        masking = Masking(model, optimizer, config, masks=masks)
    return model, optimizer, masking


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("growth", ["random", "gradient", "momentum"])
def test_a_dead_layer_is_said_once_and_regrows(growth, dense):
    model, optimizer, masking = dead_start(growth, dense)
    total = sum(masking.live_counts().values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # one weight of value zero still lets nothing through
        warnings.filterwarnings("ignore", "no mask update since")
        train(model, optimizer, masking, 1)
        assert masking.live_counts() == {"0.weight": 1, "5.weight": total - 1}
        train(model, optimizer, masking, 4, first=1)
    assert sum(masking.live_counts().values()) == total
    assert masking.live_counts()["0.weight"] >= 1
    assert_dead_is_zero(model, optimizer, masking)


def test_a_layer_that_dies_later_is_said_and_regrows():
    model, optimizer, masking = start(update_frequency=1)
    state = masking.state_dict()
    state["masks"]["0.weight"][:] = False
    with pytest.warns(UserWarning, match=r"a mask update lets each grow one: 0\.weight$"):
        masking.load_state_dict(state)
    total = sum(masking.live_counts().values())
    train(model, optimizer, masking, 1)
    assert masking.live_counts() == {"0.weight": 1, "5.weight": total - 1}


def test_a_dead_layer_regrows_under_the_verdicts_too():
    model, optimizer, masking = dead_start(
        "random", adaptive=True, start_epoch=0, drop_schedule="constant", drop_fraction=0.5
    )
    for gap, loss in ((1.0, 1.0), (2.0, 2.0)):
        masking.observe(train_ra=gap, val_ra=0, val_loss=loss)
    train(model, optimizer, masking, 1)
    assert masking.live_counts() == {"0.weight": 1, "5.weight": 60 - 30 - 12 + int(30 * 1.05) - 1}


def test_a_regrown_layer_learns_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.Sigmoid(), nn.Linear(10, 3))
    masks = {"0.weight": torch.zeros(10, 10, dtype=torch.bool), "2.weight": torch.rand(3, 10) < 0.5}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"without a live weight"):
        masking = Masking(
            model,
            optimizer,
            MaskingConfig(0.2, 10, update_frequency=2, growth="gradient"),
            masks=masks,
        )
    x, y = torch.rand(12, 10), torch.arange(12) % 3
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        masking.step()
    assert int(model[0].weight.count_nonzero()) == 1


def test_fixed_masks_say_that_a_dead_layer_stays():
    model, optimizer, masking = dead_start("random", fixed=True)
    train(model, optimizer, masking, 3)
    assert masking.live_counts()["0.weight"] == 0


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = (
            nn.Embedding(10, 8),
            nn.LayerNorm([8, 8]),
            nn.Linear(8, 4),
        )
        self.positions = nn.Parameter(torch.rand(5, 8))

    def forward(self, x):
        return self.head(self.embedding(x).mean(dim=1))


@pytest.mark.parametrize("by", ["mapping", "predicate"])
@pytest.mark.parametrize("method", ["erk", "magnitude", "snip"])
def test_prunable_chooses_otherwise(by, method):
    model = Chosen()
    named = dict(model.named_parameters())
    chosen = {
        "mapping": {"positions": model.positions, "embedding.weight": model.embedding.weight},
        "predicate": lambda name, layer, parameter: (
            isinstance(layer, nn.Embedding) or name == "positions"
        ),
    }[by]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(torch.randint(0, 10, (6, 3)), torch.randint(0, 4, (6,)))]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masking = Masking(
        model,
        optimizer,
        MaskingConfig(0.25, 9, sparse_init=method, update_frequency=2),
        batches=batches,
        prunable=chosen,
    )
    assert list(masking.masks) == ["positions", "embedding.weight"]
    assert sum(masking.live_counts().values()) == round(0.25 * 120)
    assert all(
        torch.equal(value, before[name])
        for name, value in model.state_dict().items()
        if name not in masking.masks
    )
    assert all(
        int(named[name].count_nonzero()) == live for name, live in masking.live_counts().items()
    )
    assert set(initial_masks(model, 0.25, "erk", prunable=chosen)) == set(masking.masks)


def test_the_choice_of_the_documentation(capsys):
    page = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
    (snippet,) = [
        part for part in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "prunable=" in part
    ]
    exec(compile(snippet, "extending.md", "exec"), {})
    assert eval(capsys.readouterr().out).keys() == {"0.weight", "2.weight"}


def test_a_predicate_sees_the_layer_that_computes():
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
        nn.utils.spectral_norm(nn.Linear(8, 8)),
        nn.Bilinear(2, 2, 2),
    )
    seen = {}
    masking = Masking(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        MaskingConfig(0.5, 900),
        prunable=lambda name, layer, parameter: (
            seen.setdefault(name, type(layer)) is not nn.Bilinear
        ),
    )
    assert [kind.__name__.removeprefix("Parametrized") for kind in seen.values()] == [
        "Linear",
        "Linear",
        "Bilinear",
    ]
    assert list(masking.masks) == ["0.parametrizations.weight.original", "1.weight_orig"]
    assert issubclass(seen["0.parametrizations.weight.original"], nn.Linear)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["head.weight_"], "prunable names head.weight_, which is not a parameter"),
        (["head.bias"], r"head\.bias has the shape \(4,\)"),
        (
            ["normed.parametrizations.weight.original1"],
            "normed has a weight computed by WeightNorm",
        ),
        (["older.weight_v"], "older has a weight_norm"),
        (["pruned.weight_orig"], "pruned has a mask of torch.nn.utils.prune"),
        ([], "none is chosen"),
    ],
)
def test_choices_that_cannot_be_masked_are_refused(names, message):
    model = Chosen()
    model.normed, model.pruned = (
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4),
    )
    model.older = nn.utils.weight_norm(nn.Linear(4, 4))
    prune.random_unstructured(model.pruned, "weight", 0.5)
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=message):
        Masking(
            model,
            optimizer,
            MaskingConfig(0.5, 900),
            prunable={name: named.get(name, model.positions) for name in names},
        )
    if names and names != ["head.bias"] and names[0] in named:
        with pytest.raises(ValueError, match=message):
            Masking(
                model,
                optimizer,
                MaskingConfig(0.5, 900),
                prunable=lambda name, layer, parameter: name in names,
            )


def test_a_parameter_of_another_model_is_refused_as_prunable():
    model, other = Chosen(), Chosen()
    with pytest.raises(
        ValueError, match=r"prunable names head\.weight, which is not a parameter of this model"
    ):
        initial_masks(model, 0.5, prunable={"head.weight": other.head.weight})


def test_chosen_frozen_weights_are_left_alone_and_named():
    model = Chosen()
    model.positions.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"frozen .*: positions$"):
        masking = Masking(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            MaskingConfig(0.5, 900),
            prunable=lambda *given: True,
        )
    assert list(masking.masks) == ["embedding.weight", "norm.weight", "norm.bias", "head.weight"]


@pytest.mark.parametrize("leaf", ["in_proj_weight", "out_proj"])
def test_a_spectral_norm_on_an_attention_is_right_or_refused(leaf):
    def attention(norm):
        made = nn.MultiheadAttention(8, 2)
        norm(*((made.out_proj,) if leaf == "out_proj" else (made, leaf)))
        return made

    model = attention(nn.utils.parametrizations.spectral_norm)
    masking = masking_of(model)
    assert sum(
        int(weight.count_nonzero()) for weight in (model.in_proj_weight, model.out_proj.weight)
    ) == round(0.2 * 256)
    assert sum(masking.live_counts().values()) == round(0.2 * 256)
    older = nn.Sequential(attention(nn.utils.spectral_norm))
    # attention does not call the forward of out_proj, which computes the older norm
    if leaf == "out_proj":
        with pytest.raises(ValueError, match=r"^0\.out_proj has the older spectral_norm"):
            masking_of(older)
        return
    masking_of(older)
    older[0](*[torch.rand(3, 8)] * 3)
    assert int(older[0].in_proj_weight.count_nonzero()) + int(
        older[0].out_proj.weight.count_nonzero()
    ) == round(0.2 * 256)


def test_a_start_is_scored_after_a_forward_pass_with_the_older_spectral_norm():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 3))
    x, y = torch.rand(4, 6), torch.randint(0, 3, (4,))
    model(x)
    masks = initial_masks(model, 0.5, "snip", batches=[(x, y)])
    assert sum(int(mask.sum()) for mask in masks.values()) == 27


def test_a_lazy_layer_is_refused_before_its_first_batch():
    model = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(ValueError, match=r"^0 has no weight before its first batch"):
        prunable(model)
    with pytest.raises(ValueError, match=r"^0 has no weight before its first batch"):
        initial_masks(model, 0.5, prunable=lambda name, layer, parameter: True)


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_scores_of_a_network_with_dropout_are_of_the_seed(method):
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 20), nn.Dropout(0.5), nn.Tanh(), nn.Linear(20, 3)
    )
    starts = []
    for _ in range(2):
        torch.rand(3)  # the host program may draw
        starts.append(initial_masks(model, 0.2, method, seed=1, batches=[toy.images()]))
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


# ---------------------------------------------------------------- silent mistakes in a user's loop


def test_weights_that_other_masks_have_pruned_are_warned_of():
    """A checkpoint loaded before the Masking is made would lose most of its weights."""
    model, optimizer, masking = start()
    train(model, optimizer, masking, 2)
    with pytest.warns(UserWarning, match=r"^0\.weight is sparse already, and these masks keep \d"):
        start(model=model, seed=2)
    model, optimizer, masking = start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Masking(model, optimizer, MaskingConfig(0.3, 8, fixed=True), masks=masking.masks)


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: setattr(model[5], "weight", nn.Parameter(torch.rand(3, 64))),
        lambda model: nn.utils.parametrizations.weight_norm(model[5]),
        lambda model: model.load_state_dict(model.state_dict(), assign=True),
    ],
)
def test_weights_replaced_after_the_masks_are_made_are_refused(replace):
    model, optimizer, masking = start()
    replace(model)
    with pytest.raises(ValueError, match="no longer the parameter that is masked"):
        train(model, optimizer, masking, 1)


def test_a_frozen_and_an_unused_layer_keep_their_masks_under_random_growth():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "frozen": nn.Linear(8, 8)})
    model["unused"] = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masking = Masking(model, optimizer, MaskingConfig(0.3, 9, update_frequency=1))
    before = {name: mask.clone() for name, mask in masking.masks.items()}
    model["frozen"].weight.requires_grad_(False)
    for _ in range(3):
        model["frozen"](model["used"](torch.rand(4, 8))).sum().backward()
        optimizer.step()
        masking.step()
    same = {name for name, mask in masking.masks.items() if torch.equal(mask, before[name])}
    assert same == {"frozen.weight", "unused.weight"}
    optimizer.zero_grad()  # without any gradient, random growth works on
    masking.step()
    assert not torch.equal(masking.masks["unused.weight"], before["unused.weight"])


def test_momentum_of_a_step_that_a_scaler_skipped_is_not_grown_by():
    model, optimizer, masking = start(growth="momentum", update_frequency=2)
    train(model, optimizer, masking, 1)
    masking.step()  # the optimizer was not stepped: momentum at dead weights is zero
    assert not masking.events
    train(model, optimizer, masking, 1, first=1)
    assert [event["step"] for event in masking.events] == [3]


def test_updates_that_never_come_are_warned_of_once():
    model, optimizer, masking = start(growth="gradient", update_frequency=2)

    def step():
        F.cross_entropy(model(toy.images()[0]), toy.images()[1]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        masking.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step()
    with pytest.warns(UserWarning, match=r"no mask update since step 0: gradient growth finds"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            step()
    assert not masking.events


def test_masks_stepped_before_the_optimizer_are_warned_of():
    model, _, masking = start()
    x, y = toy.images()
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="belongs after optimizer.step"):
        masking.step()
    model, _, masking = start()
    F.cross_entropy(model(x), y).backward()
    for weight in prunable(model).values():
        weight.grad.fill_(float("inf"))  # a scaler skips such a step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masking.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_frequency": 9.75}, "must be whole: 8, 9.75"),
        ({"second_frequency": 2.5}, "must be whole"),
        ({"total_steps": 7.5}, "must be whole"),
        ({"second_frequency": 0}, "at least 1"),
    ],
)
def test_numbers_of_steps_are_whole(options, message):
    with pytest.raises(ValueError, match=message):
        MaskingConfig(**{"density": 0.3, "total_steps": 8, **options})


def test_masks_that_are_full_are_warned_of():
    with pytest.warns(UserWarning, match="every weight is live, so no mask will ever change"):
        start(density=1.0, update_frequency=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(density=1.0, fixed=True)


def test_flying_bird_plus_refuses_validation_that_was_not_measured():
    options = {"adaptive": True, "start_epoch": 1, "update_frequency": 1}
    model, optimizer, masking = start(**options)
    for _ in range(2):
        masking.observe(train_ra=50.0, val_ra=float("nan"), val_loss=1.0)
    with pytest.raises(ValueError, match="numbers from every epoch's validation"):
        train(model, optimizer, masking, 1)


def test_optimizers_that_cannot_be_masked_are_refused_and_unmasked_weights_are_named():
    model = toy.network()
    config = MaskingConfig(0.3, 8, fixed=True)
    with pytest.raises(ValueError, match="LBFGS keeps one history of all weights"):
        Masking(model, torch.optim.LBFGS(model.parameters()), config)
    with pytest.raises(ValueError, match="Rprop keeps a step size of each weight"):
        Masking(model, torch.optim.Rprop(model.parameters()), config)
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "head": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match="are masked, not lstm; prunable= chooses weights"):
        masking_of(model)
    model = nn.ModuleDict({"head": nn.Linear(40, 40), "table": nn.Embedding(99, 40)})
    for size, warns in ((3, False), (50, True)):
        model.experts = nn.Parameter(torch.rand(size, 2, 2))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            masking_of(model)
        assert ["not experts" in str(warning.message) for warning in caught] == [True] * warns


def test_a_tied_weight_is_chosen_by_either_of_its_names():
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embedding"].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masking = Masking(
        model,
        optimizer,
        MaskingConfig(0.5, 900),
        prunable=lambda name, layer, parameter: isinstance(layer, nn.Linear),
    )
    assert masking.live_counts() == {"embedding.weight": 16}


def test_a_parameter_named_like_half_of_a_weight_norm():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.proj_v = nn.Linear(4, 4), nn.Parameter(torch.rand(4, 4))

    model = Gated()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masking = Masking(model, optimizer, MaskingConfig(0.5, 900), prunable=lambda *given: True)
    assert set(masking.masks) == {"proj_v", "proj.weight"}


def test_sparse_gradients_cannot_be_grown_by():
    model = nn.Sequential(nn.EmbeddingBag(8, 4, sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = MaskingConfig(0.5, 8, update_frequency=1, growth="gradient")
    masking = Masking(model, optimizer, config, prunable=lambda *given: True)
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"^0\.weight: sparse gradients"):
        masking.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, fused=True),
        lambda p: torch.optim.SGD(p, 0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, fused=True),
    ],
)
def test_the_right_order_is_not_warned_of(make):
    """Fused optimizers do not count up a tensor's version."""
    model = toy.network()
    optimizer = make(model.parameters())
    masking = Masking(model, optimizer, MaskingConfig(0.3, 8, update_frequency=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, masking, 2)
        copied = pickle.loads(pickle.dumps((model, optimizer, masking)))
        train(*copied, 2, first=2)
    assert not optimizer._optimizer_step_post_hooks
    resumed = Masking(model, optimizer, masking.config, masks=masking.masks)
    resumed.load_state_dict(masking.state_dict())
    assert not optimizer._optimizer_step_post_hooks
