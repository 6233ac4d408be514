import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from data import Augmentation, Batch, TrainLoader
from tests import toy
from utils.attacks import PGD
from utils.errors import RunError
from utils.training.engine import train_epoch, train_step
from utils.training.schedule import Plan, cyclic_rate, learning_rate, set_learning_rate

ATTACK = PGD(8 / 255, 2 / 255, 3)
PLAN = Plan(epochs=10, attack=ATTACK, attack_training=True, seed=1, lr=0.1, milestones=())


def parts(seed=0):
    model = toy.network()
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)


def epoch(model, optimizer, split, **options):
    loader = TrainLoader(split, 5, Augmentation(1), seed=1)
    given = {f.name: options.pop(f.name) for f in dataclasses.fields(Plan) if f.name in options}
    plan = dataclasses.replace(PLAN, **given)
    return train_epoch(
        model,
        optimizer,
        loader.epoch(0),
        **({"plan": plan, "epoch": 0, "steps": len(loader)} | options),
    )


def test_learning_rate_falls_tenfold_at_each_milestone():
    rates = [learning_rate(epoch, 0.1, (2, 4)) for epoch in range(6)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert learning_rate(7, 0.1, ()) == 0.1


def test_the_cycle_rises_for_two_fifths_and_falls_to_nothing():
    assert [cyclic_rate(fraction, 0.2) for fraction in (0.0, 0.2, 0.4, 0.7, 1.0)] == pytest.approx(
        [0.0, 0.1, 0.2, 0.1, 0.0]
    )
    plan = dataclasses.replace(PLAN, lr=0.2, schedule="onecycle", epochs=5)
    rates = [plan.rate(epoch, step, 20) for epoch in range(5) for step in range(20)]
    assert max(rates) == pytest.approx(0.2, rel=0.02)
    assert rates.index(max(rates)) in (39, 40)
    assert 0 < rates[0] < 0.005
    assert 0 < rates[-1] < 0.005
    assert PLAN.rate(3, 5, 20) == 0.1


def test_every_step_has_the_rate_of_the_plan():
    model, optimizer = parts()
    rates = []
    optimizer.register_step_pre_hook(
        lambda optimizer, arguments, options: rates.append(optimizer.param_groups[0]["lr"])
    )
    plan = dataclasses.replace(PLAN, lr=0.2, schedule="onecycle", epochs=2)
    epoch(model, optimizer, toy.split(20), lr=0.2, schedule="onecycle", epochs=2)
    assert rates == [plan.rate(0, step, 4) for step in range(4)]
    assert len(set(rates)) == 4


def test_set_learning_rate():
    _, optimizer = parts()
    set_learning_rate(optimizer, 0.03)
    assert optimizer.param_groups[0]["lr"] == 0.03


def test_a_clean_step_is_plain_sgd():
    x, y = toy.images()
    model, optimizer = parts()
    loss, right, _ = train_step(
        model, optimizer, Batch(x, y, torch.arange(12)), attack=None, attack_training=True, key=(1,)
    )
    twin, twin_optimizer = parts()
    logits = twin(x)
    F.cross_entropy(logits, y).backward()
    twin_optimizer.step()
    assert loss == F.cross_entropy(logits, y)
    assert right == (logits.argmax(1) == y).sum()
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(("training", "passes"), [(True, 3 + 1), (False, 1)])
def test_the_attack_moves_batch_norm_only_in_train_mode(training, passes):
    model, optimizer = parts()
    x, y = toy.images()
    train_step(
        model,
        optimizer,
        Batch(x, y, torch.arange(12)),
        attack=ATTACK,
        attack_training=training,
        key=(1,),
    )
    assert model[1].num_batches_tracked == passes
    assert model.training


def test_training_learns_and_counts():
    model, optimizer = parts()
    split = toy.split(30)
    first = epoch(model, optimizer, split)
    for _ in range(8):
        last = epoch(model, optimizer, split)
    assert first.images == 30
    assert last.loss < 0.5 * first.loss
    assert last.accuracy > 90


def test_mean_loss_and_accuracy_weigh_uneven_batches_by_images():
    model, optimizer = parts()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    model[1].momentum = 0.0
    split = toy.split(7)
    result = epoch(model, optimizer, split, attack=None, lr=0.0)
    losses, right = [], 0
    for batch in TrainLoader(split, 5, Augmentation(1), seed=1).epoch(0):
        logits = model.train()(batch.x)
        losses += F.cross_entropy(logits, batch.y, reduction="none").tolist()
        right += int((logits.argmax(1) == batch.y).sum())
    assert result.loss == pytest.approx(sum(losses) / 7, rel=1e-5)
    assert result.accuracy == pytest.approx(100 * right / 7)


def test_the_same_seed_and_epoch_give_the_same_bits():
    results = []
    for noise in (0, 1):
        model, optimizer = parts()
        torch.manual_seed(noise)
        epoch(model, optimizer, toy.split(12))
        results.append(model.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True)
    )


def test_another_seed_gives_others():
    one, other = parts(), parts()
    epoch(*one, toy.split(12))
    epoch(*other, toy.split(12), seed=2)
    assert not torch.equal(one[0][0].weight, other[0][0].weight)


@pytest.mark.parametrize("print_freq", [1, 50])
def test_a_loss_that_is_not_finite_names_its_step(print_freq):
    model, optimizer = parts()
    loader = TrainLoader(toy.split(20), 5, Augmentation(), seed=1)

    def poisoned():
        for step, batch in enumerate(loader.epoch(0)):
            if step == 1:
                with torch.no_grad():
                    model[5].weight.fill_(float("nan"))
            yield batch

    with pytest.raises(RunError, match=r"nan in epoch 4, step 2 of 4"):
        train_epoch(
            model, optimizer, poisoned(), plan=PLAN, epoch=3, steps=4, print_freq=print_freq
        )


def test_progress_comes_at_its_frequency_and_at_the_end():
    model, optimizer = parts()
    seen = []
    epoch(model, optimizer, toy.split(35), print_freq=3, on_progress=seen.append)
    assert [(p.step, p.steps) for p in seen] == [(3, 7), (6, 7), (7, 7)]


def test_slow_steps_show_once_a_second(monkeypatch):
    monkeypatch.setattr("utils.training.engine._SECONDS_BETWEEN_REPORTS", 0.0)
    model, optimizer = parts()
    seen = []
    epoch(model, optimizer, toy.split(15), print_freq=50, on_progress=seen.append)
    assert [p.step for p in seen] == [1, 2, 3]


def test_the_optimizer_spares_each_process_the_import_of_dynamo():
    script = (
        "import sys, torch; from utils.training.engine import sgd;"
        " model = torch.nn.Linear(2, 1);"
        " optimizer = sgd(model, lr=0.1, momentum=0.9, weight_decay=0.0);"
        " model(torch.ones(1, 2)).sum().backward(); optimizer.step(); optimizer.zero_grad();"
        " optimizer.load_state_dict(optimizer.state_dict()); assert len(optimizer.state) == 2;"
        " sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
