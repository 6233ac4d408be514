import math

import pytest
import torch
from torch import nn

from data import plain_batches
from tests import processes, toy
from utils.attacks import PGD, AutoAttack
from utils.evaluation.scores import evaluate
from utils.evaluation.trials import (
    Outcomes,
    Trial,
    answers_of,
    autoattack_trials,
    clean_trial,
    pgd_trials,
    run_trials,
)

ATTACK = PGD(26 / 255, 6 / 255, 8)


class Cut(Exception):
    pass


def fitted(classes=5, n=12):
    """A linear network fitted to its images, so that attacks have something to break."""
    torch.manual_seed(0)
    model, split = (
        nn.Sequential(nn.Flatten(), nn.Linear(192, classes)),
        toy.split(n, classes=classes),
    )
    pixels = split.images.permute(0, 3, 1, 2).float().flatten(1) / 255
    with torch.no_grad():
        targets = nn.functional.one_hot(split.labels, classes).float()
        model[1].weight.copy_((torch.linalg.pinv(pixels) @ targets * 8).T)
    return model, split


def answers(outcomes, trials):
    return {trial.name: outcomes.predicted(trial).tolist() for trial in trials}


def test_predictions_by_image_are_those_of_the_network():
    model, split = toy.network(), toy.split(20)
    model.train()
    trial = clean_trial()
    outcomes = run_trials(model, {"test": split}, [trial])
    assert model.training
    logits = model.eval()(split.images.permute(0, 3, 1, 2).float() / 255)
    assert outcomes.predicted(trial).tolist() == logits.argmax(1).tolist()
    assert outcomes.accuracy(trial) == evaluate(model, split).accuracy


def test_the_first_start_is_that_of_evaluate_and_later_ones_spare_what_is_broken():
    model, split = fitted(n=40)
    attack = PGD(26 / 255, 26 / 255, 1)
    trials = pgd_trials(model, attack, 1, restarts=3, name="PGD-1")
    outcomes = run_trials(model, {"test": split}, trials)
    assert [trial.name for trial in trials] == ["PGD-1", "PGD-1, start 2", "PGD-1, start 3"]
    assert outcomes.accuracy(trials[0]) == evaluate(model, split, attack).accuracy
    right = [outcomes.right(trial) for trial in trials]
    assert 0 < right[0].sum() < 40
    shown = outcomes.predicted(trials[1]) != Outcomes.NOT_SHOWN
    assert torch.equal(shown, right[0])
    assert torch.equal(right[2], right[0] & right[1] & right[2])
    # Start 3 sees only the images that withstood the first two.
    assert torch.equal(outcomes.predicted(trials[2]) != Outcomes.NOT_SHOWN, right[0] & right[1])
    assert outcomes.accuracy(trials[2]) == evaluate(model, split, attack, restarts=3).accuracy


def test_restarts_need_a_random_start():
    with pytest.raises(ValueError, match="random start"):
        pgd_trials(toy.network(), PGD(0.1, 0.1, 1, random_start=False), 1, restarts=2)


def cut_and_continued(model, split, trials, rounds):
    """The same trials, interrupted after every ``rounds`` batches and resumed from the state that a
    file would hold; returns the outcomes and the number of interruptions."""
    labels = {"test": split.labels[split.indices]}
    state, cuts = Outcomes(labels).state_dict(), 0
    while True:
        outcomes, seen = Outcomes(labels), []
        outcomes.load_state_dict(state)

        def stop(trial, images, seen=seen):
            seen.append(images)
            if len(seen) == rounds:
                raise Cut

        try:
            run_trials(model, {"test": split}, trials, outcomes, on_round=stop)
        except Cut:
            state, cuts = outcomes.state_dict(), cuts + 1
        else:
            return outcomes, cuts


@pytest.mark.parametrize("rounds", [1, 2])
def test_cut_and_continued_is_uncut_for_pgd(rounds):
    model, split = fitted(n=40)
    attack = PGD(26 / 255, 26 / 255, 1)
    trials = [
        Trial(t.name, t.craft, t.part, t.spares, batch=7)
        for t in [clean_trial(), *pgd_trials(model, attack, 1, restarts=3)]
    ]
    whole = run_trials(model, {"test": split}, trials)
    outcomes, cuts = cut_and_continued(model, split, trials, rounds)
    assert cuts >= 4
    assert answers(outcomes, trials) == answers(whole, trials)


def test_an_answer_that_is_no_number_is_no_class():
    logits = torch.tensor([[math.nan, 0.0], [0.0, 1.0], [1.0, math.nan]])
    assert answers_of(logits).tolist() == [-2, 1, -2]
    split = toy.split(8, classes=3)
    broken = toy.network()
    with torch.no_grad():
        broken[-1].bias.fill_(math.nan)
    outcomes = run_trials(broken, {"test": split}, [clean_trial()])
    assert outcomes.accuracy(clean_trial()) == 0


def test_cut_and_continued_is_uncut_for_autoattack():
    model, split = fitted(n=40)
    trials = [
        clean_trial(),
        *autoattack_trials(model, AutoAttack(26 / 255), 5, split.device, seed=1),
    ]
    trials = [Trial(t.name, t.craft, t.part, t.spares, batch=16) for t in trials]
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    whole = run_trials(model, {"test": split}, trials)
    # the library seeds the global generator
    assert torch.equal(torch.random.get_rng_state(), before)
    outcomes, cuts = cut_and_continued(model, split, trials, 1)
    assert cuts >= 5
    assert answers(outcomes, trials) == answers(whole, trials)
    accuracies = [whole.accuracy(trial) for trial in trials]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] == 100.0 > accuracies[-1]


@pytest.mark.parametrize(("norm", "eps"), [("linf", 26 / 255), ("l2", 1.0)])
def test_autoattack_stays_in_the_ball(norm, eps):
    model, split = fitted(n=40)
    batch = next(plain_batches(split, 8))
    for trial in autoattack_trials(model, AutoAttack(eps, norm), 5, split.device, seed=1)[:2]:
        offset = (trial.craft(batch) - batch.x).flatten(1)
        largest = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1)
        assert 0.0 < float(largest.max()) <= eps * (1 + 1e-5)


def test_the_estimate_is_a_share_of_what_was_shown_or_a_bound():
    labels = {"test": torch.tensor([0, 1, 2, 3])}
    outcomes = Outcomes(labels)
    first, second = (
        Trial("a", lambda batch: batch.x),
        Trial("b", lambda batch: batch.x, spares=("a",)),
    )
    rows = outcomes.rows(first, [first, second])
    outcomes.add(first, rows[:2], torch.tensor([0, 0], dtype=torch.int16), 1)
    assert outcomes.estimate(first, rows) == 50.0
    outcomes.add(first, rows[2:], torch.tensor([2, 3], dtype=torch.int16), 1)
    assert outcomes.accuracy(first) == 75.0
    rows = outcomes.rows(second, [first, second])
    assert rows.tolist() == [0, 2, 3]
    assert outcomes.estimate(second, rows) == 75.0
    outcomes.add(second, rows[:1], torch.tensor([1], dtype=torch.int16), 1)
    assert outcomes.estimate(second, rows) == 50.0


def test_transfer_crafts_on_the_other_network():
    model, split = fitted(n=40)
    torch.manual_seed(5)
    stranger = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    own, transferred = (
        run_trials(model, {"test": split}, trials).accuracy(trials[0])
        for trials in (pgd_trials(model, ATTACK, 1), pgd_trials(model, ATTACK, 1, source=stranger))
    )
    assert own < transferred


def in_process(world):
    model, split = fitted(n=40)
    trials = [clean_trial(), *pgd_trials(model, PGD(26 / 255, 26 / 255, 1), 1, restarts=2)]
    trials = [Trial(t.name, t.craft, t.part, t.spares, batch=7) for t in trials]
    return answers(run_trials(model, {"test": split}, trials, world=world), trials)


def test_several_processes_find_what_one_finds(tmp_path):
    from utils.execution.distributed import ALONE

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = in_process(ALONE)
    finally:
        torch.set_num_threads(threads)
    assert processes.in_processes(3, in_process, tmp_path) == [alone] * 3
