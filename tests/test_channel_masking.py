"""Flying Bird with structured channels: the narrow network always computes what the full one with
dead channels does."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from models import build_model
from models.channels import channel_counts, find_channels, narrow, silence
from sparse_core import MaskingConfig, Verdict
from tests.test_channels import Joined, randomized
from utils.training.averages import EpochAverage, ExponentialAverage
from utils.training.channel_masking import ChannelMasking
from utils.training.engine import sgd

NETWORKS = {
    "resnet18": (lambda: build_model("resnet18", 3, width=0.125), 16),
    "resnet50": (lambda: build_model("resnet50", 3, width=0.0625), 16),
    "vgg16": (lambda: build_model("vgg16", 3, width=0.125), 32),
    "wideresnet": (lambda: build_model("wideresnet", 3, depth_factor=16, width_factor=2), 8),
    "joined": (Joined, 8),
}
EVERY = 2  # steps between mask updates


class Training:
    """A narrow network in training, step by step, in float64."""

    def __init__(self, name="resnet18", density=0.5, score="taylor", multiple=1, **config):
        make, side = NETWORKS[name]
        store = randomized(make())
        self.channels = find_channels(store, (3, side, side))
        counts = channel_counts(self.channels.sizes, density, multiple)
        live = self.channels.first(counts, 1)
        self.model = narrow(copy.deepcopy(store), self.channels.kept(live))
        self.optimizer = sgd(self.model, lr=0.01, momentum=0.9, weight_decay=5e-4)
        given = {
            "density": density,
            "total_steps": 1000,
            "growth": "gradient",
            "drop_fraction": 0.3,
            "update_frequency": EVERY,
        }
        self.masking = ChannelMasking(
            self.model,
            store,
            self.optimizer,
            self.channels,
            live,
            MaskingConfig(**{**given, **config}),
            score=score,
            multiple=multiple,
        )
        self.store = store
        self.shapes = {n: v.shape for n, v in store.state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(8, 3, side, side, generator=generator, dtype=torch.float64)
        self.y = torch.arange(8) % 3

    def loss_of(self, network):
        return F.cross_entropy(network(self.x), self.y)

    def update_weights(self):
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.loss_of(self.model)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def step(self):
        self.update_weights()
        return self.masking.step(self.loss_of)

    def full(self):
        """The full-size network with the same live channels; no layer reads the dead ones."""
        full = copy.deepcopy(self.store)
        positions = self.channels.positions(self.masking.live, self.shapes)
        state, narrow_state = full.state_dict(), self.model.state_dict()
        for name, value in state.items():
            if name in positions:
                value.put_(positions[name], narrow_state[name])
            else:
                value.copy_(narrow_state[name])
        silence(full, self.channels, ~self.masking.live)
        return full


@pytest.mark.parametrize("name", NETWORKS)
def test_the_narrow_network_is_the_full_one_through_three_updates(name):
    """Both take the same step, momentum included, before and after each update."""
    training = Training(name)
    moved = 0
    for _ in range(3):
        for _ in range(EVERY):
            full = training.full()
            momenta = {
                n: training.optimizer.state[p].get("momentum_buffer")
                for n, p in training.model.named_parameters()
                if p in training.optimizer.state
            }
            positions = training.channels.positions(training.masking.live, training.shapes)
            optimizer = sgd(full, lr=0.01, momentum=0.9, weight_decay=5e-4)
            for n, parameter in full.named_parameters():
                if momenta.get(n) is not None:
                    whole = torch.zeros_like(parameter)
                    if n in positions:
                        whole.put_(positions[n], momenta[n])
                    else:
                        whole.copy_(momenta[n])
                    optimizer.state[parameter]["momentum_buffer"] = whole
            full.train()
            loss = training.loss_of(full)
            loss.backward()
            optimizer.step()
            assert training.update_weights() == pytest.approx(loss.item(), rel=1e-10)
            state = full.state_dict()
            for n, value in training.model.state_dict().items():
                expected = torch.take(state[n], positions[n]) if n in positions else state[n]
                assert torch.allclose(value, expected, rtol=1e-8, atol=1e-10), n
            moved += training.masking.step(training.loss_of) is not None
    assert moved == 3
    assert training.masking.explored_fraction() > training.masking.density()


@pytest.mark.parametrize("training_mode", [True, False])
@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("name", NETWORKS)
def test_growth_does_not_change_what_the_network_computes(monkeypatch, name, growth, training_mode):
    """Dropping does, so the reference is the network after the drop and before growth."""
    training = Training(name, growth=growth)
    original, without = ChannelMasking._probe, []

    def spy(self, loss_of, kept):
        small = narrow(copy.deepcopy(self._store), self.channels.kept(kept)).train(training_mode)
        without.append(small(training.x).detach())
        return original(self, loss_of, kept)

    monkeypatch.setattr(ChannelMasking, "_probe", spy)
    while training.step() is None:
        pass
    found = training.model.train(training_mode)(training.x)
    assert (found - without[0]).abs().max() <= 1e-12


def test_what_grows_has_its_old_weights_nobody_who_reads_it_and_a_new_norm():
    training = Training()
    store = {n: v.clone() for n, v in training.store.state_dict().items()}
    was = training.masking.live.clone()
    while training.step() is None:
        pass
    grown = training.masking.live & ~was
    assert int(grown.sum()) > 0
    state = training.model.state_dict()
    momenta = {
        n: training.optimizer.state[p]["momentum_buffer"]
        for n, p in training.model.named_parameters()
    }
    # the inner channels of the first block: written by conv1, normalized by bn2, read by conv2
    inside = training.channels.by_group(torch.arange(training.channels.total))["layer1.0.conv1"]
    live_inside = inside[training.masking.live[inside]]
    new = [k for k, channel in enumerate(live_inside.tolist()) if grown[channel]]
    rows = [live_inside[k].item() - inside[0].item() for k in new]
    assert new
    old_inputs = training.channels.indices("layer1.0.conv1.weight", training.masking.live & was)[1]
    live_inputs = training.channels.indices("layer1.0.conv1.weight", training.masking.live)[1]
    old = [k for k, index in enumerate(live_inputs.tolist()) if index in old_inputs.tolist()]
    for k, row in zip(new, rows, strict=True):
        assert torch.equal(
            state["layer1.0.conv1.weight"][k][old], store["layer1.0.conv1.weight"][row][old_inputs]
        )
        assert state["layer1.0.bn2.weight"][k] == 1
        assert state["layer1.0.bn2.bias"][k] == 0
        assert state["layer1.0.bn2.running_mean"][k] != 0  # estimated on the last batch
        assert not state["layer1.0.conv2.weight"][:, k].any()
        assert not momenta["layer1.0.conv1.weight"][k].any()
        assert not momenta["layer1.0.conv2.weight"][:, k].any()
    stayed = [k for k in range(len(live_inside)) if k not in new]
    assert momenta["layer1.0.conv1.weight"][stayed].any()


def test_swaps_and_pruning_leave_a_channel():
    training = Training(drop_fraction=0.5, prune_ratio=10.0)
    counts = training.masking.counts()
    scores = torch.rand(training.channels.total, dtype=torch.float64)
    changes = training.masking._changes(scores, 0.5, Verdict(prune=True))
    assert all(dropped < counts[name] for name, (dropped, _) in changes.items())
    assert any(dropped == counts[name] - 1 for name, (dropped, _) in changes.items())


def test_channels_move_with_deterministic_kernels_too():
    plain, careful = Training("resnet18"), Training("resnet18")
    for _ in range(5):
        plain.step()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            careful.step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(plain.masking.live, careful.masking.live)
    states = plain.model.state_dict(), careful.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_lowest_scores_are_dropped_and_the_highest_gradients_grow():
    """Scores by hand for the inner channels of one block, which have one norm and one reader."""
    training = Training(drop_fraction=0.5)
    masking, group = training.masking, "layer2.1.conv1"
    total, norm = 0.0, training.model.layer2[1].bn2
    for _ in range(EVERY):
        before = norm.weight.detach().clone()
        training.update_weights()
        total = total + (before * norm.weight.grad).abs()
        if masking.steps + 1 < EVERY:
            masking.step(training.loss_of)
    numbers = training.channels.by_group(torch.arange(training.channels.total))[group]
    was = masking.live[numbers].clone()
    live = was.nonzero().squeeze(1)
    n = math.ceil(masking.schedule.at(EVERY) * len(live))
    n = min(n, int((~was).sum()))
    lowest = live[total.argsort()[:n]]
    # by hand: the full network after every group's drop
    scores = masking._sums / EVERY
    kept = masking.live.clone()
    for name, part in training.channels.by_group(kept).items():
        score = training.channels.by_group(scores)[name]
        alive = part.nonzero().squeeze(1)
        count = min(math.ceil(masking.schedule.at(EVERY) * len(alive)), int((~part).sum()))
        part[alive[score[alive].argsort()[: min(count, len(alive) - 1)]]] = False
    probe = training.full().train()
    state = probe.state_dict()
    for name in training.channels.scales:
        dead = ~kept[training.channels.owners[name][0]]
        state[name][dead] = 1.0
        state[name.replace("weight", "bias")][dead] = 0.0
    silence(probe, training.channels, ~kept)
    training.loss_of(probe).backward()
    gradient = probe.layer2[1].conv2.weight.grad.transpose(0, 1).flatten(1).norm(dim=1)
    candidates = (~was).nonzero().squeeze(1)
    highest = candidates[gradient[candidates].argsort(descending=True)[:n]]
    masking.step(training.loss_of)
    now = masking.live[numbers]
    assert set((was & ~now).nonzero().squeeze(1).tolist()) == set(lowest.tolist())
    assert set((now & ~was).nonzero().squeeze(1).tolist()) == set(highest.tolist())


def test_counts_of_every_group_are_exact_and_fixed_channels_stay():
    training = Training(multiple=2)
    counts = training.masking.counts()
    assert counts == channel_counts(training.channels.sizes, 0.5, 2)
    shapes = {n: v.shape for n, v in training.model.state_dict().items()}
    places = {n: v.data_ptr() for n, v in training.model.state_dict().items()}
    for _ in range(4 * EVERY):
        training.step()
    assert training.masking.counts() == counts
    assert len(training.masking.events) == 4
    assert {n: v.shape for n, v in training.model.state_dict().items()} == shapes
    assert {n: v.data_ptr() for n, v in training.model.state_dict().items()} == places
    fixed = Training(fixed=True)
    live = fixed.masking.live.clone()
    for _ in range(2 * EVERY):
        assert fixed.step() is None
    assert torch.equal(fixed.masking.live, live)


@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.05])
def test_ratios_below_a_multiple_hold_on_average(ratio):
    """A ratio of 0 changes nothing; a small one waits until it makes a whole multiple."""
    config = {"start_epoch": 0, "epoch_range": 2, "prune_ratio": 0.0, "growth_ratio": ratio}
    masking = Training(density=0.25, multiple=2, adaptive=True, **config).masking
    masking.steps, live = 1, masking.live.double().mean().item() * masking.channels.total
    verdict = Verdict(grow=True, prune=False)
    scores = torch.rand(masking.channels.total, dtype=torch.float64)
    added = 0
    for _ in range(100):
        changes = masking._changes(scores, 0.3, verdict)
        added += sum(grown - dropped for dropped, grown in changes.values())
    assert added == pytest.approx(100 * 0.3 * live * ratio, abs=2)


def test_another_optimizer_than_sgd_is_refused():
    training = Training()
    live, config = training.masking.live, MaskingConfig(0.5, 1000, update_frequency=2)
    for optimizer in (
        torch.optim.Adam(training.model.parameters()),
        torch.optim.SGD([{"params": [p]} for p in training.model.parameters()], lr=0.1),
    ):
        with pytest.raises(ValueError, match="SGD with one parameter group"):
            ChannelMasking(
                training.model, training.store, optimizer, training.channels, live, config
            )


@pytest.mark.parametrize(("prune", "grow"), [(True, False), (False, True), (True, True)])
def test_flying_bird_plus_adds_and_removes_whole_multiples(prune, grow):
    training = Training(
        multiple=2, adaptive=True, start_epoch=0, epoch_range=2, prune_ratio=0.5, growth_ratio=0.5
    )
    masking = training.masking
    for epoch in range(3):
        gap, loss = (epoch if prune else -epoch), (epoch if grow else -epoch)
        masking.observe(train_ra=50 + gap, val_ra=50, val_loss=10 + loss)
    before = masking.counts()
    average = ExponentialAverage(training.model, 0.5)
    while (move := training.step()) is None:
        pass
    average.follow(move)
    after = masking.counts()
    changes = {name: after[name] - before[name] for name in before}
    assert all(change % 2 == 0 for change in changes.values())
    assert all(count >= 2 for count in after.values())
    assert any(change < 0 for change in changes.values()) == prune
    assert any(change > 0 for change in changes.values()) == grow
    assert move.reshapes
    assert masking.events[-1]["prune"] == prune
    # network and optimizer keep training in the new shapes
    for _ in range(2 * EVERY):
        if (move := training.step()) is not None:
            average.follow(move)
        average.after_step(training.model, masking)
        assert all(
            s["momentum_buffer"].shape == p.shape for p, s in training.optimizer.state.items()
        )
    named = {n: p.shape for n, p in training.model.named_parameters()}
    kept = narrow(copy.deepcopy(training.store), masking.kept())
    assert {n: p.shape for n, p in kept.named_parameters()} == named
    assert training.model.layer1[0].conv1.out_channels == masking.counts()["layer1.0.conv1"]


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_an_average_follows_its_channels_and_begins_anew_with_what_grows(kind):
    training = Training()
    average = (
        ExponentialAverage(training.model, 0.9) if kind == "ema" else EpochAverage(training.model)
    )
    values = []
    while True:
        training.update_weights()
        move = training.masking.step(training.loss_of)
        if move is not None:
            before = {n: v.clone() for n, v in average.model.state_dict().items()}
            average.follow(move)
            break
        average.after_step(training.model, training.masking)
        average.after_epoch(training.model, training.masking, len(values))
        values.append({n: p.detach().clone() for n, p in training.model.named_parameters()})
    mine = average.model.state_dict()
    for name, source in move.sources.items():
        stays = source >= 0
        assert torch.equal(mine[name][stays], torch.take(before[name], source[stays]))
        assert torch.equal(mine[name][~stays], move.values[name][~stays])
    if kind == "swa":
        training.update_weights()
        average.after_epoch(training.model, training.masking, len(values))
        for name, weight in training.model.named_parameters():
            if name not in move.sources:  # belongs to no channel
                continue
            source, new = move.sources[name], average.model.state_dict()[name]
            stays = source >= 0
            assert torch.equal(new[~stays], weight[~stays])
            old = torch.take(values[0][name], source.clamp_min(0))
            assert torch.allclose(new[stays], ((old + weight) / 2)[stays])


def test_first_weights_have_the_spread_of_the_narrow_layers():
    store = build_model("resnet18", 3, width=1.0)
    first = store.layer3[0].conv2.weight.std()
    channels = find_channels(store, (3, 16, 16))
    live = channels.first(channel_counts(channels.sizes, 0.25, 1), 1)
    model = narrow(copy.deepcopy(store), channels.kept(live))
    optimizer = sgd(model, lr=0.1, momentum=0.9, weight_decay=0)
    config = MaskingConfig(density=0.25, total_steps=10, update_frequency=5)
    ChannelMasking(model, store, optimizer, channels, live, config)
    narrow_one = build_model("resnet18", 3, width=0.25)
    spread, usual = (m.layer3[0].conv2.weight.std().item() for m in (model, narrow_one))
    assert spread == pytest.approx(2 * first.item(), rel=0.02)
    assert spread == pytest.approx(usual, rel=0.05)
    assert torch.equal(  # not rescaled: its inputs are pixels
        model.conv1.weight, store.conv1.weight[channels.indices("conv1.weight", live)[0]]
    )


def test_a_state_of_other_channels_is_refused():
    training, other = Training(), Training(density=0.25)
    with pytest.raises(ValueError, match="not those of the network"):
        training.masking.load_state_dict(other.masking.state_dict())
