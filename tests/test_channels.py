"""Channel groups in networks of every kind, and networks with some channels removed."""

import copy

import pytest
import torch
from torch import nn

from models import build_model, load_model
from models.channels import (
    channel_counts,
    find_channels,
    narrow,
    plan_channels,
    plan_largest,
    put,
    silence,
)
from models.flops import layer_costs, real_inference
from models.loading import build_network, full_size_state
from tests import toy
from utils.export import Trained, export

NETWORKS = {
    "resnet18": ({"width": 0.25}, 16, 12),
    "resnet50": ({"width": 0.125}, 16, 37),
    "vgg16": ({"width": 0.25}, 32, 13),
    "wideresnet": ({"depth_factor": 16, "width_factor": 2}, 16, 10),
}
CPU = torch.device("cpu")


class Joined(nn.Module):
    """Two concatenated branches, a depthwise convolution, a group norm across channels, and pixels
    flattened into a linear layer."""

    def __init__(self, classes=3):
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(20)
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.mixed = nn.Conv2d(20, 8, 3, padding=1)
        self.across = nn.GroupNorm(2, 8)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8 * 4 * 4, classes)

    def forward(self, x):
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu()
        x = self.across(self.mixed(self.depthwise(x))).relu()
        return self.linear(nn.functional.avg_pool2d(self.last(x), 2).flatten(1))


class Looped(nn.Module):
    """A convolution applied twice, so its input channels are its output channels."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        x = self.again(self.again(self.first(x)).relu()).relu()
        return self.linear(x.mean((2, 3)))


def randomized(model, seed=0):
    """The model in float64 with random values: initial ones might hide a mistake."""
    model = model.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                scale, shift = torch.rand(2, *value.shape, generator=generator).double()
                value.mul_(0.5 + scale).add_(0.1 * shift)
    return model


def half(channels, seed=3):
    return channels.first(channel_counts(channels.sizes, 0.5, 1), seed)


@pytest.mark.parametrize("arch", NETWORKS)
def test_the_groups_of_a_network_are_its_streams_and_the_insides_of_its_blocks(arch):
    flags, side, groups = NETWORKS[arch]
    model = build_model(arch, 10, **flags)
    channels = find_channels(model, (3, side, side))
    assert len(channels.sizes) == groups
    assert not channels.whole
    if arch == "resnet18":  # the first stream is written by the stem and by both blocks
        written = [
            name
            for name, owners in channels.owners.items()
            if name.endswith("weight") and 0 in owners and int(owners[0][0]) == 0
        ]
        assert {"conv1.weight", "layer1.0.conv2.weight", "layer1.1.conv2.weight"} <= set(written)
        assert "layer1.0.conv1.weight" not in written
    # every index of a convolution belongs to a channel, except the pixels that the first one reads
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            owners = channels.owners[f"{name}.weight"]
            assert all(bool((owner >= 0).all()) for owner in owners.values())
            assert set(owners) == ({0} if layer.in_channels == 3 else {0, 1})


@pytest.mark.parametrize("arch", NETWORKS)
def test_a_narrow_network_computes_what_the_full_one_does_without_reading_the_others(arch):
    flags, side, _ = NETWORKS[arch]
    model = randomized(build_model(arch, 10, **flags))
    channels = find_channels(model, (3, side, side))
    live = half(channels)
    small = narrow(copy.deepcopy(model), channels.kept(live))
    silence(model, channels, ~live)
    x = torch.rand(4, 3, side, side, dtype=torch.float64)
    for training in (True, False):
        expected, found = model.train(training)(x), small.train(training)(x)
        assert (expected - found).abs().max() <= 1e-10 * expected.abs().max()
    # it has the shapes of an ordinary network of half the width
    widths = {n: tuple(v.shape) for n, v in small.state_dict().items()}
    if arch in ("resnet18", "vgg16"):
        other = build_model(arch, 10, width=flags["width"] / 2)
        assert widths == {n: tuple(v.shape) for n, v in other.state_dict().items()}
    costs, counts = (
        layer_costs(model.float(), (3, side, side)),
        channel_counts(channels.sizes, 0.5, 1),
    )
    assert channels.inference_flops(costs, counts) == real_inference(
        layer_costs(small.float(), (3, side, side))
    )


def test_concatenated_depthwise_and_flattened_channels_are_followed():
    model = randomized(Joined())
    channels = find_channels(model, (3, 8, 8))
    assert channels.sizes == {"left": 8, "right": 12, "last": 8}
    assert list(channels.whole) == ["mixed"]
    assert "GroupNorm" in channels.whole["mixed"]
    live = half(channels)
    small = narrow(copy.deepcopy(model), channels.kept(live))
    assert small.depthwise.groups == small.depthwise.in_channels == 10
    assert small.linear.in_features == 4 * 16
    silence(model, channels, ~live)
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    assert (model(x) - small(x)).abs().max() <= 1e-12


def test_positions_say_where_each_number_lies():
    model = randomized(build_model("resnet18", 10, width=0.125))
    channels = find_channels(model, (3, 16, 16))
    live = half(channels)
    small = narrow(copy.deepcopy(model), channels.kept(live)).state_dict()
    state = model.state_dict()
    positions = channels.positions(live, {n: v.shape for n, v in state.items()})
    for name, index in positions.items():
        assert torch.equal(torch.take(state[name], index), small[name])


def test_what_cannot_be_divided_is_left_whole_or_refused():
    channels = find_channels(Looped(), (3, 8, 8))
    assert sum(channels.sizes.values()) in (8, 16)  # coupled with itself, or left alone
    with pytest.raises(ValueError, match="no group of its channels can be divided"):
        find_channels(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), (3, 8, 8))
    shared = toy.network()
    shared[0] = nn.utils.parametrizations.spectral_norm(shared[0])
    with pytest.raises(ValueError, match="computed weights"):
        find_channels(shared, (3, 8, 8))


def test_a_network_with_a_size_written_into_its_forward_pass_keeps_those_channels():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.linear = nn.Linear(8, 3)

        def forward(self, x):
            x = self.a(x).relu()
            assert x.shape[1] == 8
            return self.linear(self.b(x).relu().mean((2, 3)))

    channels = find_channels(Fixed(), (3, 8, 8))
    assert channels.sizes == {"b": 8}
    assert "a" in channels.whole


@pytest.mark.parametrize(
    ("density", "multiple", "counts"),
    [
        (0.5, 16, {"a": 16, "b": 32, "c": 4, "d": 16}),
        (0.3, 16, {"a": 16, "b": 16, "c": 4, "d": 16}),
        (0.5, 1, {"a": 13, "b": 32, "c": 2, "d": 8}),
        (0.9, 8, {"a": 24, "b": 56, "c": 4, "d": 16}),
        (1.0, 16, {"a": 27, "b": 64, "c": 4, "d": 16}),
    ],
)
def test_counts_are_the_nearest_multiples(density, multiple, counts):
    sizes = {"a": 27, "b": 64, "c": 4, "d": 16}
    assert channel_counts(sizes, density, multiple) == counts


@pytest.mark.parametrize("fraction", [0.6, 0.25, 0.1])
@pytest.mark.parametrize("arch", ["resnet18", "wideresnet"])
def test_flops_give_the_density(arch, fraction):
    flags, side, _ = NETWORKS[arch]
    model = build_model(arch, 10, **flags)
    plan = plan_channels(model, (3, side, side), 0.2, flops=fraction, multiple=4)
    channels, full = plan.channels, plan.channels.inference_flops(plan.costs, plan.channels.sizes)
    taken = channels.inference_flops(plan.costs, plan.counts) / full
    more = {n: min(channels.sizes[n], c + 4) for n, c in plan.counts.items()}
    fewer = {n: max(4, c - 4) for n, c in plan.counts.items()}
    steps = [channels.inference_flops(plan.costs, counts) / full for counts in (fewer, more)]
    assert steps[0] <= fraction <= steps[1]
    assert abs(taken - fraction) < (steps[1] - steps[0]) / 2
    assert full == real_inference(plan.costs)


def test_numbers_of_channels_that_cannot_be_are_refused():
    model = build_model("resnet18", 10, width=0.25)
    with pytest.raises(ValueError, match=r"keeps 0\.8 of the 16 channels of conv1"):
        plan_channels(model, (3, 16, 16), 0.05)
    with pytest.raises(ValueError, match="divides none of the groups"):
        plan_channels(model, (3, 16, 16), 0.5, multiple=128)
    with pytest.raises(ValueError, match="no density takes"):
        plan_channels(model, (3, 16, 16), 0.5, flops=0.001)
    for asked in ({"density": 0.95}, {"density": 0.5, "flops": 0.999}):
        with pytest.raises(ValueError, match="keeps all channels"):
            plan_channels(model, (3, 16, 16), **asked, multiple=16)
    notes = "; ".join(plan_channels(model, (3, 16, 16), 0.5, multiple=32).notes())
    assert "left whole: conv1, layer1.0.conv1, layer1.1.conv1" in notes


# ---------------------------------------------------------------- the largest scales


def scaled(arch, seed=0):
    model = build_model(arch, 10, **NETWORKS[arch][0])
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.copy_(torch.randn(module.num_features, generator=generator))
    return model


def mean_scales(model, channels):
    """Mean absolute scale of each channel, computed one by one from the owners."""
    state = model.state_dict()
    found = {number: [] for number in range(channels.total)}
    for name in channels.scales:
        for owner, scale in zip(channels.owners[name][0].tolist(), state[name], strict=True):
            found[owner].append(abs(scale.item()))
    return torch.tensor([sum(values) / len(values) for values in found.values()])


@pytest.mark.parametrize("arch", NETWORKS)
def test_the_channels_with_the_largest_mean_scale_stay(arch):
    model = scaled(arch)
    before = copy.deepcopy(model.state_dict())
    plan, live, helped = plan_largest(model, (3, 32, 32), 0.3, multiple=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    scores = mean_scales(model, plan.channels)
    assert not helped
    assert int(live.sum()) == round(0.3 * plan.channels.total) == sum(plan.counts.values())
    assert scores[live].min() >= scores[~live].max()


def test_each_count_is_rounded_to_the_nearest_multiple_and_small_groups_stay_whole():
    model = scaled("resnet18")
    exact, _, _ = plan_largest(model, (3, 32, 32), 0.4, multiple=1)
    plan, live, _ = plan_largest(model, (3, 32, 32), 0.4, multiple=32)
    sizes = plan.channels.sizes
    assert min(sizes.values()) < 32
    for (name, count), part in zip(
        plan.counts.items(), plan.channels.by_group(live).values(), strict=True
    ):
        assert int(part.sum()) == count
        choices = [*range(32, sizes[name] + 1, 32)] or [sizes[name]]
        assert count == min(choices, key=lambda n: abs(n - exact.counts[name]))


@pytest.mark.parametrize(("floor", "stay"), [(0.0, 1), (0.1, 3), (0.3, 9)])
def test_a_group_keeps_its_floor_and_the_others_give_for_it(floor, stay):
    model = scaled("resnet18")
    with torch.no_grad():
        model.layer2[0].bn2.weight.mul_(1e-6)
    plan, live, helped = plan_largest(model, (3, 32, 32), 0.3, floor, multiple=1)
    assert helped["layer2.0.conv1"] == 0
    part = plan.channels.by_group(live)["layer2.0.conv1"]
    largest = model.layer2[0].bn2.weight.abs().topk(stay).indices.tolist()
    assert part.nonzero().flatten().tolist() == sorted(largest)
    assert int(live.sum()) == round(0.3 * plan.channels.total)


def test_groups_without_norms_stay_whole():
    plan, live, _ = plan_largest(Joined(), (3, 8, 8), 0.5, multiple=1)
    parts = plan.channels.by_group(live)
    assert {name: int(part.sum()) for name, part in parts.items()} == plan.counts
    assert plan.counts["last"] == plan.channels.sizes["last"] == 8
    assert plan.counts["left"] + plan.counts["right"] == 10
    assert "without a batch norm to rank them and so left whole: last" in plan.notes()


class Pooled(nn.Module):
    """Attention with one query over all pixels, as in the ResNets of CLIP."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.mixed = nn.Conv2d(16, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        x = self.mixed(self.norm(self.conv(x)).relu()).flatten(2).mT
        return self.linear(self.attention(x.mean(1, keepdim=True), x, x)[0][:, 0])


def test_planned_flops_count_attentions_keys_and_queries():
    plan = plan_channels(Pooled(), (3, 8, 8), 0.5, multiple=8)
    full = plan.channels.inference_flops(plan.costs, plan.channels.sizes)
    assert full == real_inference(plan.costs)


class OutOfDomain(nn.Module):
    """An RMS norm couples its channels; a constant that the check of exactness changes hides it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.register_buffer("scale", torch.full((3,), 0.9))
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        x = self.second((x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()).relu()).relu()
        return self.linear(x.mean((2, 3))) * self.scale.atanh()


def test_a_check_that_ends_in_nan_proves_nothing():
    try:
        channels = find_channels(OutOfDomain(), (3, 8, 8))
    except ValueError as error:
        assert "cannot do without some of them" in str(error)  # noqa: PT017 (either way)
    else:
        assert "first" not in channels.sizes


def test_a_depthwise_convolution_of_one_channel_grows_again():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Flatten())
    narrow(model, {"0": [[1], None]})
    assert model(torch.rand(2, 1, 3, 3)).shape == (2, 9)
    put(model, {"0.weight": torch.rand(2, 1, 3, 3), "0.bias": torch.zeros(2)})
    assert model(torch.rand(2, 2, 3, 3)).shape == (2, 18)
    ordinary = nn.Sequential(nn.Conv2d(4, 4, 3))
    narrow(ordinary, {"0": [[1], None]})
    put(ordinary, {"0.weight": torch.rand(2, 4, 3, 3), "0.bias": torch.zeros(2)})
    assert ordinary[0].groups == 1


def test_densities_and_floors_that_cannot_be_are_refused():
    model = scaled("resnet18")
    with pytest.raises(ValueError, match="fewer channels than it has groups"):
        plan_largest(model, (3, 32, 32), 1e-6)
    for floor in (-0.1, 0.6, float("nan")):
        with pytest.raises(ValueError, match="floor"):
            plan_largest(model, (3, 32, 32), 0.5, floor)
    with pytest.raises(ValueError, match="divides none"):
        plan_largest(model, (3, 32, 32), 0.5, multiple=999)
    with pytest.raises(ValueError, match="batch norm"):
        plan_largest(Looped(), (3, 8, 8), 0.5, multiple=1)


@pytest.mark.parametrize("arch", ["resnet18", "vgg16", "wideresnet"])
def test_a_description_builds_the_narrow_network_and_its_weights_in_full_size(arch):
    flags, side, _ = NETWORKS[arch]
    spec = {"arch": arch, "num_classes": 10, "mean": [0.5] * 3, "std": [0.25] * 3, **flags}
    model = randomized(build_network(spec, CPU)).float()
    channels = find_channels(model, (3, side, side))
    spec["channels"] = channels.kept(half(channels))
    small = build_network(spec, CPU).eval()
    small.load_state_dict(narrow(copy.deepcopy(model), spec["channels"]).state_dict())
    full = build_network({n: v for n, v in spec.items() if n != "channels"}, CPU).eval()
    full.load_state_dict(full_size_state(spec, small.state_dict()))
    x = torch.rand(2, 3, side, side)
    assert (full(x) - small(x)).abs().max() <= 1e-5 * small(x).abs().max()


@pytest.mark.parametrize(
    "channels",
    [
        {"conv9": [[0], None]},
        {"conv1": [[0, 99], None]},
        {"conv1": [[], None]},
        {"bn": [[1, 0], None]},
    ],
)
def test_channels_that_a_network_does_not_have_are_refused(channels):
    with pytest.raises(ValueError, match=r"no layer 'conv9'|cannot keep these channels"):
        narrow(build_model("resnet18", 10, width=0.125), channels)


def test_a_trained_narrow_network_loads_by_itself_and_exports_in_full_size(run_adv, tmp_path):
    flags = "--fb --structure channel --channel_multiple 1 --update_frequency 2".split()
    assert run_adv(*toy.TOY_RUN, *flags, "--save_dir", tmp_path).code == 0
    (root,) = tmp_path.iterdir()
    path = root / "model_RA_best.pth.tar"
    model = load_model(path)
    assert model.conv1.out_channels == 2  # of 4
    assert run_adv("--eval", "--pretrained", path, "--test_step", 1).code == 0
    full = build_network({**Trained.read(path).spec, "channels": {}}, CPU).eval()
    out, _ = export(path, "state_dict", tmp_path / "full.pth")
    full.load_state_dict(torch.load(out, weights_only=True))
    x = torch.rand(2, 1, 8, 8)
    assert (full(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()


# ---------------------------------------------------------------- coupled, shared, frozen


class Gated(nn.Module):
    """Halves of a convolution's channels gate each other; a second block can be divided."""

    def __init__(self, split):
        super().__init__()
        self.split = split
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.c, self.linear = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        left, right = self.split(self.a(x))
        return self.linear(self.c(self.b(left * right.sigmoid()).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "split",
    [
        lambda x: x.chunk(2, 1),
        lambda x: x.split(8, 1),
        lambda x: (x[:, :8], x[:, 8:]),
        lambda x: (x[:, ::2], x[:, 1::2]),
    ],
)
def test_channels_that_gate_each_other_are_removed_exactly_or_left_whole(split):
    model = randomized(Gated(split))
    channels = find_channels(model, (3, 8, 8))
    assert {"b", "c"} <= set(channels.sizes)
    for seed in range(12):
        live = half(channels, seed)
        small, silenced = narrow(copy.deepcopy(model), channels.kept(live)), copy.deepcopy(model)
        silence(silenced, channels, ~live)
        x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
        assert torch.allclose(small.eval()(x), silenced.eval()(x), rtol=1e-9, atol=1e-12)


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.Flatten(),
        nn.Linear(384, 3),
    )


def test_shared_and_frozen_layers_keep_their_channels():
    tied, frozen = chain(), chain()
    tied[2].weight = tied[4].weight
    frozen[4].weight.requires_grad_(False)
    for model, reason in ((tied, "is shared with another layer"), (frozen, "4.weight is frozen")):
        channels = find_channels(model, (3, 8, 8))
        assert channels.sizes
        assert any(reason in why for why in channels.whole.values())


def test_a_network_that_the_library_cannot_follow_is_refused_or_keeps_channels():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 4, 16))
            self.linear = nn.Linear(16, 3)

        def forward(self, x):
            x = nn.functional.pixel_shuffle(self.a(x), 2)
            return self.linear(self.c(self.b(x).relu()).relu().mean((2, 3)))

    channels = find_channels(Shuffled(), (3, 8, 8))
    assert set(channels.sizes) <= {"b", "c"}
