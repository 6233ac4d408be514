"""Networks of one's own: trained through mask updates, resumed to the bit and evaluated, or refused before a step."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import models
from tests.test_resume import assert_equal, only_run, stop_at

CLASSES, SIDE = 10, 8


class Tokens(nn.Module):
    """A ViT of one layer on 4x4 patches: class token, positions, attention, an MLP on tokens."""

    def __init__(self, classes, normalize, drop=0.0):
        super().__init__()
        self.normalize = normalize
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8) / 10)
        self.norm, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=drop, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.patches(self.normalize(x)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class Tied(nn.Module):
    """One linear layer computed twice, and its weight once more under another name."""

    def __init__(self, classes, normalize):
        super().__init__()
        self.normalize = normalize
        self.first, self.twice, self.again = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.again.weight = self.twice.weight
        self.head = nn.Linear(12, classes)

    def forward(self, x):
        x = self.first(self.normalize(x).flatten(1)).relu()
        return self.head(self.again(self.twice(self.twice(x).relu()).relu()).relu())


class Unused(nn.Module):
    """Has a layer that its forward leaves out."""

    def __init__(self, classes, normalize):
        super().__init__()
        self.body, self.unused = plain(classes, normalize), nn.Linear(6, 7)

    def forward(self, x):
        return self.body(x)


class Depth(nn.Module):
    """Stochastic depth by torch.rand, as people write it."""

    def __init__(self, classes, normalize):
        super().__init__()
        self.normalize, self.first, self.block, self.head = normalize, nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, classes)

    def forward(self, x):
        x = self.first(self.normalize(x).flatten(1)).relu()
        kept = torch.rand(len(x), 1, device=x.device) < 0.8 if self.training else 1.0
        return self.head(x + kept * self.block(x).relu())


def plain(classes, normalize, *after):
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), *after, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, classes)]
    return nn.Sequential(normalize, *layers)


def transposed(classes, normalize):
    up = nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2)
    return nn.Sequential(
        normalize, nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), up, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, classes)
    )


def frozen(classes, normalize):
    model = plain(classes, normalize)
    model[1].requires_grad_(False)
    return model


def dropout(classes, normalize):
    return plain(classes, normalize, nn.Dropout2d(0.2), nn.Dropout(0.2))


def normed(norm):
    def build(classes, normalize):
        model = plain(classes, normalize)
        norm(model[1])
        return model

    return build


NETWORKS = {
    "vit": Tokens,
    "vit with dropout": lambda classes, normalize: Tokens(classes, normalize, 0.2),
    "tied": Tied,
    "transposed": transposed,
    "unused": Unused,
    "frozen": frozen,
    "dropout": dropout,
    "depth": Depth,
    "spectral_norm": normed(parametrizations.spectral_norm),
    "older spectral_norm": normed(nn.utils.spectral_norm),
    "weight_norm": normed(parametrizations.weight_norm),
    "older weight_norm": normed(nn.utils.weight_norm),
}
WEIGHT_NORMS = ("weight_norm", "older weight_norm")
MASKED = [name for name in NETWORKS if name not in WEIGHT_NORMS]

# Four steps an epoch, updates at steps 3, 6 and 9.
RUN = (
    "--dataset digits --epochs 3 --decreasing_lr 2 --batch_size 25 --train_subset 100 --test_subset 60 --lr 0.05 "
    "--train_step 2 --test_step 1 --precision float32 --device cpu"
).split()
METHODS = {
    "dense": [],
    "fb": "--fb --density 0.4 --update_frequency 3 --growth gradient".split(),
    "fbp": "--fbp --density 0.4 --update_frequency 3 --dynamic_epoch 1".split(),
}


@pytest.fixture
def run(run_adv, monkeypatch):
    monkeypatch.setattr(models, "OWN", {})
    for name, build in NETWORKS.items():
        monkeypatch.setitem(models.OWN, name, build)
    return lambda name, method, *flags: run_adv(*RUN, "--arch", name, *METHODS[method], *flags)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["fb", "fbp"])
@pytest.mark.parametrize("name", MASKED)
def test_trains_resumes_to_the_bit_and_evaluates(run, run_adv, tmp_path, monkeypatch, name, method):
    outcome = run(name, method, "--save_dir", tmp_path / "whole")
    assert outcome.code == 0, outcome.err
    torch.rand(7)  # whatever another program draws between two parts of a run
    stop_at(monkeypatch, 6)
    assert run(name, method, "--save_dir", tmp_path / "cut").code == 75
    torch.manual_seed(5)
    stop_at(monkeypatch, None)
    assert run(name, method, "--save_dir", tmp_path / "cut", "--resume").code == 0
    assert_equal(tmp_path / "whole", tmp_path / "cut")
    best = only_run(tmp_path / "whole").best_ra
    outcome = run_adv("--eval", "--pretrained", best, "--test_step", 1, "--test_subset", 60, "--device", "cpu")
    assert outcome.code == 0, outcome.err
