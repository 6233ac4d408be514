import pytest
import torch
from torch import nn

from tests import toy
from utils.errors import InputError
from utils.evaluation.sanity import check_network

X, Y = toy.images(12)


def sound():
    return toy.network().eval()


class Wrapped(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.inner, self.change = toy.network(), change
        self.eval()

    def forward(self, x):
        return self.change(self.inner, x)


def test_a_sound_network_passes_and_is_left_alone():
    model = sound()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert check_network(model, X, Y) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inner, x: inner(x).softmax(dim=1), "probabilities instead of logits"),
        (lambda inner, x: inner(x).log_softmax(dim=1), "log-probabilities"),
        (lambda inner, x: inner(x) + torch.rand(1), "not deterministic"),
        (lambda inner, x: inner(x) - 5 * inner(x).mean(dim=0), "the rest of its batch"),
        (lambda inner, x: inner(x) * float("nan"), "not finite"),
        (lambda inner, x: inner((x * 4).round() / 4), "zero at all 12 images"),
        (lambda inner, x: inner(x.detach()).detach(), "no gradient to its images"),
        (
            lambda inner, x: inner(x) + 0 * (x.flatten(1).sum(1, keepdim=True) * 0).sqrt(),
            "gradient at some images is not finite",
        ),
    ],
)
def test_each_check_fires(change, message):
    with pytest.raises(InputError, match=message):
        check_network(Wrapped(change), X, Y)


def test_training_mode_fires():
    with pytest.raises(InputError, match="the network itself is training"):
        check_network(toy.network().train(), X, Y)
    model = sound()
    model[1].train()
    with pytest.raises(InputError, match="1 is training"):
        check_network(model, X, Y)


def test_some_silent_images_are_a_warning():
    """A network so sure of some images that its gradient vanishes in float32."""

    def change(inner, x):
        sure = torch.nn.functional.one_hot(Y, 3) * 1e4
        return inner(x) + torch.where(torch.arange(len(x))[:, None] >= 4, sure[: len(x)], 0.0)

    (warning,) = check_network(Wrapped(change), X, Y)
    assert "no gradient at 8 of 12 images" in warning
