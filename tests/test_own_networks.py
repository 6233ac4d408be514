"""Custom networks: trained through mask updates, resumed to the bit and evaluated, or refused
before the first step."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import main_adv
import models
from data import Augmentation, TrainLoader, load_data
from models import Normalize
from models.flops import layer_costs, real_inference
from sparse_core import Masking, MaskingConfig
from tests import toy
from tests.processes import in_processes
from tests.test_resume import assert_equal, stop_at
from tests.toy import only_run
from utils.errors import InputError, RunError
from utils.execution.distributed import ALONE
from utils.execution.forward import PLAIN, Execution, Forward
from utils.export import export
from utils.seeding import cpu_generator_states
from utils.settings.adversarial import AdversarialSettings
from utils.settings.command_line import parse_settings
from utils.storage.checkpoint import load_checkpoint
from utils.training.averages import Average, EpochAverage, ExponentialAverage
from utils.training.engine import train_epoch
from utils.training.rehearsal import rehearse_step
from utils.training.schedule import Plan


class Tokens(nn.Module):
    """A ViT of one layer on 4x4 patches: class token, positions, attention, an MLP on tokens."""

    def __init__(self, classes, normalize, drop=0.0):
        super().__init__()
        self.normalize = normalize
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.token, self.positions = (
            nn.Parameter(torch.zeros(1, 1, 8)),
            nn.Parameter(torch.randn(1, 5, 8) / 10),
        )
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
    """A linear layer applied twice, and its weight once more under another name."""

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
    """Has a layer that its forward pass does not use."""

    def __init__(self, classes, normalize):
        super().__init__()
        self.body, self.unused = plain(classes, normalize), nn.Linear(6, 7)

    def forward(self, x):
        return self.body(x)


class Depth(nn.Module):
    """Stochastic depth by ``torch.rand``, as people write it."""

    def __init__(self, classes, normalize):
        super().__init__()
        self.normalize, self.first, self.block, self.head = (
            normalize,
            nn.Linear(64, 12),
            nn.Linear(12, 12),
            nn.Linear(12, classes),
        )

    def forward(self, x):
        x = self.first(self.normalize(x).flatten(1)).relu()
        kept = torch.rand(len(x), 1, device=x.device) < 0.8 if self.training else 1.0
        return self.head(x + kept * self.block(x).relu())


def plain(classes, normalize, *after):
    layers = [
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        *after,
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, classes),
    ]
    return nn.Sequential(normalize, *layers)


def transposed(classes, normalize):
    up = nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2)
    return nn.Sequential(
        normalize,
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        up,
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, classes),
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
    "--dataset digits --epochs 3 --decreasing_lr 2 --batch_size 25 --train_subset 100 --test_subset"
    " 60 --lr 0.05 --train_step 2 --test_step 1 --precision float32 --device cpu"
).split()
METHODS = {
    "dense": [],
    "fb": "--fb --density 0.4 --update_frequency 3 --growth gradient".split(),
    "fbp": "--fbp --density 0.4 --update_frequency 3 --dynamic_epoch 1".split(),
}


@pytest.fixture
def run(run_adv, monkeypatch):
    for name, build in NETWORKS.items():
        monkeypatch.setitem(models.CUSTOM_ARCHITECTURES, name, build)
    return lambda name, method, *flags: run_adv(*RUN, "--arch", name, *METHODS[method], *flags)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["fb", "fbp"])
@pytest.mark.parametrize("name", MASKED)
def test_trains_resumes_to_the_bit_and_evaluates(run, run_adv, tmp_path, monkeypatch, name, method):
    outcome = run(name, method, "--save_dir", tmp_path / "whole")
    assert outcome.code == 0, outcome.err
    torch.rand(7)  # another program may draw between two parts of a run
    stop_at(monkeypatch, 6)
    assert run(name, method, "--save_dir", tmp_path / "cut").code == 75
    torch.manual_seed(5)
    stop_at(monkeypatch, None)
    assert run(name, method, "--save_dir", tmp_path / "cut", "--resume").code == 0
    assert_equal(tmp_path / "whole", tmp_path / "cut")
    best = only_run(tmp_path / "whole").best_ra
    outcome = run_adv(
        "--eval", "--pretrained", best, "--test_step", 1, "--test_subset", 60, "--device", "cpu"
    )
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("average", ["--ema .99", "--swa 0"])
@pytest.mark.parametrize("method", ["fb", "channels"])
def test_masks_and_averages_go_together(run_adv, monkeypatch, tmp_path, method, average):
    monkeypatch.setitem(models.CUSTOM_ARCHITECTURES, "own", dropout)
    flags = [*RUN, "--arch", "own", *METHODS["fb"], *average.split(), "--save_dir", tmp_path]
    flags += ["--structure", "channel", "--channel_multiple", "1"] * (method == "channels")
    parts = []
    begin = Average.begin
    monkeypatch.setattr(Average, "begin", lambda *both: (begin(*both), parts.append(both)))
    stop_at(monkeypatch, 1)
    assert run_adv(*flags).code == 75
    # the average began with the weights that training began with
    assert len(parts) == 1
    stop_at(monkeypatch, None)
    outcome = run_adv(*flags, "--resume")
    assert outcome.code == 0, outcome.err


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", WEIGHT_NORMS)
def test_a_weight_norm_trains_dense_and_is_refused_for_masks(run, tmp_path, monkeypatch, name):
    for method in ("fb", "fbp"):
        outcome = run(name, method, "--save_dir", tmp_path / "out")
        assert outcome.code == 2
        assert len(outcome.err.strip().splitlines()) == 1
        assert f"--arch {name}: 1 has a" in outcome.err
    assert not (tmp_path / "out").exists()
    assert run(name, "dense", "--save_dir", tmp_path / "whole").code == 0
    stop_at(monkeypatch, 6)
    assert run(name, "dense", "--save_dir", tmp_path / "cut").code == 75
    stop_at(monkeypatch, None)
    assert run(name, "dense", "--save_dir", tmp_path / "cut", "--resume").code == 0
    assert_equal(tmp_path / "whole", tmp_path / "cut")
    best = only_run(tmp_path / "whole").best_ra
    export(best, "safetensors")
    with pytest.raises(InputError, match="--format state_dict stores such a network"):
        export(best, "packed")


# ---------------------------------------------------------------- refused


class Wrapped(nn.Module):
    """The plain network between two functions."""

    def __init__(self, classes, normalize, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.body, self.before, self.after = plain(classes, normalize), before, after

    def forward(self, x):
        return self.after(self.body(self.before(x)))


class Outside(nn.Module):
    """Projects by a random matrix that is not a buffer."""

    def __init__(self, classes, normalize):
        super().__init__()
        self.normalize, self.projection, self.head = (
            normalize,
            torch.randn(64, 12),
            nn.Linear(12, classes),
        )

    def forward(self, x):
        return self.head((self.normalize(x).flatten(1) @ self.projection).relu())


def still(classes, normalize):
    return plain(classes, normalize).requires_grad_(False)


def batch_statistics(classes, normalize):
    return plain(classes, normalize, nn.BatchNorm2d(6, track_running_stats=False))


def wrapped(**parts):
    return lambda classes, normalize: Wrapped(classes, normalize, **parts)


class Standardized(nn.Conv2d):
    """Convolves with its weight minus its mean, over its standard deviation."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Same(nn.Conv2d):
    """Pads its input itself, as networks converted from TensorFlow do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def with_layer(layer):
    return lambda classes, normalize: nn.Sequential(
        normalize, layer(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes)
    )


def built(layer):
    def build(classes, normalize):
        model = with_layer(layer)(classes, normalize)
        model(torch.zeros(2, 1, 8, 8))
        return model

    return build


@pytest.mark.parametrize("flags", [["--fb", *toy.TOY_MASKS], []])
def test_a_weight_that_is_standardized_can_only_train_dense(run_adv, tmp_path, monkeypatch, flags):
    monkeypatch.setitem(models.CUSTOM_ARCHITECTURES, "std", built(Standardized))
    monkeypatch.setitem(models.CUSTOM_ARCHITECTURES, "same", built(Same))
    assert run_adv(*RUN, "--arch", "same", "--save_dir", tmp_path / "same", *flags).code == 0
    outcome = run_adv(*RUN, "--arch", "std", "--save_dir", tmp_path / "std", *flags)
    assert outcome.code == (2 if flags else 0)
    assert ("1 does not multiply by its weight" in outcome.err) == bool(flags)


def test_layers_whose_weight_is_used_without_a_call_are_named(run_adv, tmp_path, monkeypatch):
    class Cosine(nn.Module):
        def __init__(self, classes, normalize):
            super().__init__()
            self.body, self.head = plain(16, normalize), nn.Linear(16, classes, bias=False)

        def forward(self, x):
            return 8 * F.linear(self.body(x), F.normalize(self.head.weight, dim=1))

    monkeypatch.setitem(models.CUSTOM_ARCHITECTURES, "cosine", Cosine)
    with pytest.warns(
        UserWarning, match=r"FLOPs leave out layers that are not called: head\.weight"
    ):
        assert run_adv(*RUN, "--arch", "cosine", "--save_dir", tmp_path).code == 0


REFUSED = {
    "fails": (wrapped(before=lambda x: x[:, :, 1:]), "cannot be trained: RuntimeError in"),
    "other classes": (
        wrapped(after=lambda logits: logits[:, 1:]),
        "returns [2, 9] for 2 images instead of logits [2, 10]",
    ),
    "squeezes one image": (
        wrapped(after=lambda logits: logits.squeeze(0)),
        "returns [10] for 1 images instead of logits [1, 10]",
    ),
    "gives two": (
        wrapped(after=lambda logits: (logits, logits)),
        "returns a tuple for 2 images instead of logits [2, 10]",
    ),
    "softmax": (wrapped(after=lambda logits: logits.softmax(1)), "probabilities instead of logits"),
    "always drops": (wrapped(after=lambda logits: F.dropout(logits, 0.5)), "is not deterministic"),
    "batch statistics": (batch_statistics, "depends on the rest of its batch"),
    "changes its images": (wrapped(before=lambda x: x.mul_(2)), "in-place operation"),
    "detached": (wrapped(before=lambda x: x.detach()), "passes no gradient to its images"),
    "still": (still, "none of the network's parameters can be trained"),
    "outside": (Outside, "state outside its state_dict"),
    "lazy": (
        lambda classes, normalize: nn.Sequential(normalize, nn.Flatten(), nn.LazyLinear(classes)),
        "lazy layers",
    ),
    "no network": (lambda classes, normalize: None, "a NoneType and not a torch.nn.Module"),
    "no builder": (lambda classes: None, "cannot be trained: TypeError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_train_is_refused_before_anything_is_written(
    run_adv, tmp_path, monkeypatch, name
):
    build, reason = REFUSED[name]
    monkeypatch.setitem(models.CUSTOM_ARCHITECTURES, name, build)
    outcome = run_adv(*RUN, "--arch", name, "--save_dir", tmp_path / "out")
    assert (outcome.code, reason in outcome.err, len(outcome.err.strip().splitlines())) == (
        2,
        True,
        1,
    ), outcome.err
    assert name in outcome.err
    assert not (tmp_path / "out").exists()


class Skips(nn.Module):
    """A block that its first step does not use."""

    def __init__(self, classes, normalize):
        super().__init__()
        self.normalize, self.convolution = normalize, nn.Conv2d(1, 4, 3)
        self.block, self.head = nn.Linear(4, 4), nn.Linear(4, classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        x = self.convolution(self.normalize(x)).mean((2, 3))
        if self.training:
            self.calls += 1
        if not self.training or self.calls > 4:
            x = x + self.block(x)
        return self.head(x)


def test_a_block_may_be_used_later_than_the_first_step(run_adv, tmp_path, monkeypatch):
    monkeypatch.setitem(models.CUSTOM_ARCHITECTURES, "skips", Skips)
    with pytest.warns(UserWarning, match=r"unchanged until they are used: block\.weight"):
        outcome = run_adv(*RUN, "--arch", "skips", "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    content = load_checkpoint(only_run(tmp_path).checkpoint)
    assert len(content["optimizer"]["state"]) == 6  # the block's two, too


def linear(classes, normalize):
    return nn.Sequential(normalize, nn.Flatten(), nn.Linear(64, classes))


def test_a_network_without_a_ticket_is_refused_before_its_first_stage(
    run_eb, tmp_path, monkeypatch
):
    monkeypatch.setitem(models.CUSTOM_ARCHITECTURES, "linear", linear)
    flags = [flag for flag in toy.TOY_BIRD if flag not in ("--width", "0.0625")]
    outcome = run_eb(*flags, "--arch", "linear", "--save_dir", tmp_path / "out")
    assert outcome.code == 2
    assert "without convolutions has no unstructured ticket" in outcome.err
    assert not (tmp_path / "out").exists()


class Frozen(nn.Sequential):
    """Keeps its batch norm in eval mode, as one should."""

    def train(self, mode=True):
        super().train(mode)
        self[2].eval()
        return self


@pytest.mark.filterwarnings("error:training puts")
def test_a_norm_that_stays_in_eval_mode_is_nothing_to_warn_of(run_adv, tmp_path, monkeypatch):
    def build(classes, normalize):
        return Frozen(*plain(classes, normalize)).train()

    monkeypatch.setitem(models.CUSTOM_ARCHITECTURES, "stays", build)
    outcome = run_adv(*RUN, "--arch", "stays", "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err


def test_a_norm_that_starts_in_eval_mode_is_named(run_adv, tmp_path, monkeypatch):
    def frozen(classes, normalize):
        model = plain(classes, normalize)
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
        return model

    monkeypatch.setitem(models.CUSTOM_ARCHITECTURES, "frozen", frozen)
    with pytest.warns(UserWarning, match="training puts 2 into train mode"):
        outcome = run_adv(*RUN, "--arch", "frozen", "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err


# ---------------------------------------------------------------- random draws


def test_the_generators_of_the_host_are_left_alone(run, tmp_path):
    before = cpu_generator_states()
    assert run("dropout", "fb", "--save_dir", tmp_path).code == 0
    assert cpu_generator_states() == before


def test_a_rehearsal_leaves_the_network_as_it_was():
    model = dropout(10, Normalize((0.0,), (1.0,))).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    idle, draws = rehearse_step(model, load_data("digits", train_subset=20, test_subset=20), PLAIN)
    assert (idle, draws) == ([], True)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Noting(nn.Module):
    """Adds a random draw in train mode and records it; has an unused layer."""

    def __init__(self):
        super().__init__()
        self.head, self.unused, self.noted = nn.Linear(192, 3), nn.Linear(2, 2), []

    def forward(self, x):
        if self.training:
            draw = torch.rand(1)
            self.noted.append(float(draw))
            x = x + draw * 0.1
        return self.head(x.flatten(1))


def noted(world):
    torch.manual_seed(0)
    model = Noting()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masking = Masking(
        model, optimizer, MaskingConfig(0.5, 6, growth="gradient", update_frequency=2)
    )
    loader = TrainLoader(toy.split(12), 4, Augmentation(), seed=1, world=world)
    forward = Forward(model, Execution(world=world), has_idle=True)
    plan = Plan(2, None, attack_training=False, seed=1, lr=0.1, milestones=())
    for epoch in range(2):
        train_epoch(
            model,
            optimizer,
            loader.epoch(epoch),
            plan=plan,
            epoch=epoch,
            steps=len(loader),
            masking=masking,
            forward=forward,
        )
    return {"noted": model.noted, "state": model.state_dict(), "updates": len(masking.events)}


def test_steps_and_processes_draw_for_themselves_and_an_unused_layer_is_no_trouble(tmp_path):
    first, second = in_processes(2, noted, tmp_path)
    alone = noted(ALONE)
    assert len(set(first["noted"] + second["noted"])) == 12
    assert alone["noted"] == first["noted"]
    assert first["updates"] == 3
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    assert torch.equal(first["state"]["unused.weight"], alone["state"]["unused.weight"])


class Sometimes(Noting):
    """Uses a layer in every second step only."""

    def forward(self, x):
        logits = super().forward(x)
        return logits + self.unused(logits[:, :2]).sum() if len(self.noted) % 2 == 0 else logits


def unprepared(world):
    model = Sometimes()
    forward = Forward(model, Execution(world=world))
    try:
        for _ in range(3):
            forward.averaged(torch.rand(2, 3, 8, 8)).sum().backward()
    except RunError as error:
        return str(error)
    return "nothing"


def test_a_layer_that_is_used_in_some_steps_is_said_in_a_line(tmp_path):
    said = in_processes(2, unprepared, tmp_path)
    assert all("one process can train such a network" in text for text in said), said


def own_run(world, save_dir):
    models.CUSTOM_ARCHITECTURES["unused"] = Unused
    settings = parse_settings(
        AdversarialSettings,
        [*RUN, "--arch", "unused", *METHODS["fb"], "--save_dir", save_dir],
        "",
        lambda given: {},
    )
    main_adv.AdversarialRun(settings, torch.device("cpu"), world).train()
    return {}


def test_several_processes_train_a_network_with_an_unused_layer(tmp_path):
    in_processes(2, own_run, tmp_path, str(tmp_path / "runs"))
    assert len(load_checkpoint(only_run(tmp_path / "runs").checkpoint)["masking"]["events"]) == 4


def test_a_shared_weight_costs_its_live_weights_each_time():
    model = Tied(10, Normalize((0.0,), (1.0,)))
    assert real_inference(layer_costs(model, (1, 8, 8)), {"twice.weight": 5}) == 2 * (
        64 * 12 + 3 * 5 + 12 * 10
    )


# ---------------------------------------------------------------- averages


class Small(nn.Module):
    """A convolution and a classifier around ``middle``; ``head`` makes the classifier's call."""

    def __init__(self, classes, normalize, middle=None, head=lambda self: self.last):
        super().__init__()
        self.first = nn.Sequential(normalize, nn.Conv2d(1, 8, 3), middle or nn.ReLU())
        self.last = nn.Linear(288, classes)
        self.head = head(self)

    def forward(self, x):
        return self.head(self.first(x).relu().flatten(1))


class FrozenNorm(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class Attending(nn.Module):
    """Adds a mask of minus infinities, as local attention does."""

    def __init__(self, persistent):
        super().__init__()
        far = torch.eye(6).log()  # 0 on the diagonal, else -inf
        self.register_buffer("far", far, persistent=persistent)

    def forward(self, x):
        return (x @ x.mT + self.far).softmax(-1) @ x


class Running(nn.Module):
    """Centres by its own running mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(), 0.1)
        return x - self.mean


MIDDLES = {
    "attending": lambda: Attending(persistent=False),
    "stored": lambda: Attending(persistent=True),
    "frozen norm": lambda: FrozenNorm(8),
    "instance norm": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    "own statistics": Running,
    "batch norm": lambda: nn.BatchNorm2d(8),
}


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("middle", MIDDLES)
def test_an_average_of_equal_networks_is_that_network(middle, kind):
    torch.manual_seed(0)
    model = Small(10, nn.Identity(), MIDDLES[middle]())
    x = torch.rand(64, 1, 8, 8)
    for _ in range(60):
        model.train()(x)  # statistics of their own, far from the initial ones
    average = ExponentialAverage(model, 0.5) if kind == "ema" else EpochAverage(model)
    for epoch in range(3):
        for _ in range(20):
            model.train()(x)
            average.after_step(model, None)
        average.after_epoch(model, None, epoch)
    if isinstance(average, EpochAverage):
        average.estimate_statistics([x])
    ours, theirs = average.model(x), model.eval()(x)
    assert torch.allclose(ours, theirs, atol=0.02 * theirs.abs().max().item())


def test_what_no_average_moves_is_copied():
    """Whole numbers among the parameters, and a buffer that two norms share."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].running_mean = model[0].running_mean
    model.register_parameter("sizes", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
    average = ExponentialAverage(model, 0.5)
    model.sizes.data += 1
    average.after_step(model, None)
    assert average.model.sizes.tolist() == [2, 3]


@pytest.mark.parametrize("middle", ["attending", "stored"])
def test_buffers_of_infinities_are_no_broken_network(run_adv, tmp_path, monkeypatch, middle):
    def build(classes, normalize):
        return Small(classes, normalize, MIDDLES[middle]())

    monkeypatch.setitem(models.CUSTOM_ARCHITECTURES, "small", build)
    outcome = run_adv(*RUN, "--arch", "small", "--ema", ".5", "--save_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    rows = (next(tmp_path.iterdir()) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["average_val_loss"] < 3.0


def test_a_network_whose_copies_keep_its_weights_is_not_averaged(run_adv, tmp_path, monkeypatch):
    def build(classes, normalize):
        return Small(classes, normalize, head=lambda self: lambda x: self.last(x))

    monkeypatch.setitem(models.CUSTOM_ARCHITECTURES, "bound", build)
    for flags in (["--ema", ".5"], ["--swa", "2"], ["--fb", "--fix", "--sparse_init", "snip"]):
        outcome = run_adv(*RUN, "--arch", "bound", *flags, "--save_dir", tmp_path / flags[0])
        assert outcome.code == 2
        assert "computes with the original's weights" in outcome.err
        assert outcome.err.count("\n") == 1
    assert run_adv(*RUN, "--arch", "bound", "--save_dir", tmp_path / "plain").code == 0
