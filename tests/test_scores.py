import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.augment import to_float
from tests import toy
from tests.test_trials import fitted
from utils.attacks import PGD, AutoAttack
from utils.errors import InputError
from utils.evaluation.scores import epoch_scores, evaluate, final_scores

ATTACK = PGD(8 / 255, 2 / 255, 5)


def test_clean_accuracy_and_loss_by_hand():
    model, split = toy.network(), toy.split(20)
    score = evaluate(model, split)
    logits = model.eval()(to_float(split.images))
    assert score.accuracy == pytest.approx(
        100 * (logits.argmax(1) == split.labels).double().mean().item()
    )
    assert score.loss == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-5)
    assert score.images == 20


def test_only_the_rows_of_the_split_count():
    model, split = toy.network(), toy.split(20)
    rows = torch.tensor([3, 11, 4])
    score = evaluate(model, split.subset(rows))
    logits = model.eval()(to_float(split.images[rows]))
    assert score.accuracy == pytest.approx(
        100 * (logits.argmax(1) == split.labels[rows]).double().mean().item()
    )


def test_robust_accuracy_does_not_depend_on_the_batch(monkeypatch):
    model, split = toy.network(), toy.split(20)
    whole = evaluate(model, split, ATTACK)
    monkeypatch.setattr("utils.evaluation.scores.EVAL_BATCH", 3)
    parts = evaluate(model, split, ATTACK)
    assert parts.accuracy == whole.accuracy
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4)


def test_attacks_raise_the_loss_and_leave_the_network():
    model, split = toy.network(), toy.split(20)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert evaluate(model, split, ATTACK).loss > evaluate(model, split).loss
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_epoch_and_final_scores_agree():
    model, data = toy.network(), toy.data(20)
    epoch, final = (
        epoch_scores(model, data, ATTACK, seed=1),
        final_scores(model, data, ATTACK, seed=1),
    )
    assert (epoch["test_sa"], epoch["test_ra"]) == (final.test_sa, final.test_ra)
    assert final.train_ra == evaluate(model, data.train, ATTACK).accuracy
    assert final.robust_gap == final.train_ra - final.test_ra
    assert epoch["val_loss"] == evaluate(model, data.val, ATTACK).loss
    assert (epoch["val_sa"], epoch["val_ra"]) == (
        evaluate(model, data.val).accuracy,
        evaluate(model, data.val, ATTACK).accuracy,
    )
    assert evaluate(model, data.val, ATTACK).loss != evaluate(model, data.test, ATTACK).loss


def test_only_what_is_asked_for_is_measured():
    model, data = toy.network(), toy.data(20)
    whole = epoch_scores(model, data, ATTACK, seed=1)
    assert list(whole) == ["val_sa", "val_ra", "val_loss", "test_sa", "test_ra"]
    for part in ("val", "test"):
        some = epoch_scores(model, data, ATTACK, seed=1, parts=[part])
        assert some == {name: value for name, value in whole.items() if name.startswith(part)}
    assert epoch_scores(model, data, ATTACK, seed=1, parts=[]) == {}


def test_every_image_is_reported():
    counts = []
    epoch_scores(toy.network(), toy.data(20), ATTACK, seed=1, on_batch=counts.append)
    assert sum(counts) == 40


@pytest.mark.parametrize(("classes", "eps"), [(10, 32 / 255), (5, 24 / 255)])
def test_autoattack_is_at_most_pgd(classes, eps):
    model, split = fitted(classes, n=40)
    pgd, autoattack = (
        evaluate(model, split, PGD(eps, eps / 4, 5)),
        evaluate(model, split, AutoAttack(eps)),
    )
    assert evaluate(model, split).accuracy > 90
    assert autoattack.accuracy <= pgd.accuracy < 90


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_in_an_empty_ball_is_clean_accuracy(norm):
    torch.manual_seed(0)
    model, split = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), toy.split(6, classes=10)
    tiny = evaluate(model, split, AutoAttack(1e-7, norm))
    assert tiny.accuracy == evaluate(model, split).accuracy


@pytest.fixture
def tf32_allowed():
    # Not by monkeypatch, which would restore the switch by deleting it first; that fails.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_reported_figures_are_full_float32(tf32_allowed):
    seen = set()
    model = toy.network()
    model.register_forward_pre_hook(
        lambda *_: seen.add(
            (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        )
    )
    before = torch.backends.cudnn.allow_tf32
    final_scores(model, toy.data(6), ATTACK, seed=1)
    assert seen == {(False, False)}
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (
        True,
        before,
    )


def test_autoattack_needs_four_classes():
    with pytest.raises(InputError, match="at least 4 classes"):
        evaluate(toy.network(), toy.split(6), AutoAttack(ATTACK.eps))


def test_more_starts_never_find_less():
    model, split = toy.network(), toy.split(40)
    one, five = (evaluate(model, split, ATTACK, restarts=n) for n in (1, 5))
    assert five.accuracy <= one.accuracy
    assert five.images == 40
    with pytest.raises(ValueError, match="restarts need an attack"):
        evaluate(model, split, restarts=2)
    with pytest.raises(ValueError, match="no effect on AutoAttack"):
        evaluate(model, split, AutoAttack(0.1), restarts=2)


class Sure(nn.Module):
    """So sure of the first ``images`` of each batch that the gradient of the cross-entropy vanishes
    in float32."""

    def __init__(self, images=10**6, change=lambda logits: logits):
        super().__init__()
        self.inner, self.images, self.change = toy.network(), images, change

    def forward(self, x):
        logits = self.change(self.inner(x))
        return torch.where(torch.arange(len(x))[:, None] < self.images, 1e6 * logits, logits)


@pytest.mark.parametrize(
    ("images", "told"), [(10**6, "at 20 of 20"), (5, "at 5 of 20"), (2, None), (0, None)]
)
def test_an_attack_without_gradients_is_said_and_left_as_found(recwarn, images, told):
    model, split = Sure(images), toy.split(20)
    # the model classifies every image correctly
    split = dataclasses.replace(split, labels=model.eval()(to_float(split.images)).argmax(dim=1))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, split, ATTACK)
    lines = [str(warning.message) for warning in recwarn.list]
    assert len(lines) == (told is not None)
    assert all(
        f"the attack's loss (ce) has no gradient {told} images checked: PGD is weak" in line
        for line in lines
    )
    assert all(warning.filename == __file__ for warning in recwarn.list)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )


def test_only_an_attack_by_that_loss_looks_at_its_gradients(recwarn):
    model, split = Sure(), toy.split(20)
    evaluate(model, split)
    evaluate(model, split, PGD(8 / 255, 2 / 255, 0))
    evaluate(model, split, PGD(8 / 255, 2 / 255, 1, loss="margin"))
    assert not recwarn.list


def test_a_training_does_not_look_at_gradients(monkeypatch, recwarn):
    monkeypatch.setattr("utils.evaluation.scores.images_without_gradient", None)
    model, data = Sure(), toy.data(20)
    epoch_scores(model, data, ATTACK, seed=1)
    final_scores(model, data, ATTACK, seed=1)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("change", "message"),
    [(torch.detach, "no gradient to its images"), (lambda y: y * float("nan"), "not finite")],
)
@pytest.mark.parametrize("restarts", [1, 2])
def test_gradients_that_are_none_or_not_finite_are_refused(change, message, restarts):
    with pytest.raises(InputError, match=message):
        evaluate(Sure(0, change), toy.split(20), ATTACK, restarts=restarts)


def test_inference_mode_is_answered_by_the_attack():
    model, split = toy.network(), toy.split(20)
    with torch.inference_mode():
        assert evaluate(model, split).images == 20
        with pytest.raises(ValueError, match="inference_mode"):
            evaluate(model, split, ATTACK)
